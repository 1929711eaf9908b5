"""Stages I and III written as their peers write them: the reference that exactness and speed are measured by.

Stage I as in OpenUni: one pass of the VLM over prompt and queries for every picture, all of it with gradient.
Stage III as in Flow-GRPO, whose condition is a fixed text embedding, carried over to a condition that is
trained: encoded for every picture, and in the update for every picture and timestep, with back-propagation
through LIM, VLM and queries each time. Formulas are written out here once more, nothing is shared with
grpo.py. Left out: LDAM's noise, groups of more than one device.

`peer` is a ParaUni made of what peers have, see peer_of: diffusers' DiT, transformers' SigLIP as connector.

Letters: B pictures, K steps, L VLM layers, S prompt tokens, N queries, D VLM width, E condition width,
C H W latent.
"""
import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributions import Normal

from common import precision
from dit import DiT, euler_grid, randn
from lim import LIM
from model import PROMPT, UNCONDITIONAL, ParaUni
from vae import DCAE


def diffusers_dit(dit: DiT) -> nn.Module:
    """diffusers' SANA with a copy of the weights of our DiT."""
    from diffusers import SanaTransformer2DModel

    from tools.convert import published_config
    # no second copy of the weights; but positions are a buffer that no file holds, so they must be computed
    with torch.device("meta" if dit.config.interpolation_scale is None else "cpu"):
        theirs = SanaTransformer2DModel.from_config(published_config(dit.config))
    theirs.load_state_dict({name: p.detach().clone() for name, p in dit.state_dict().items()}, assign=True)
    return theirs.requires_grad_(any(p.requires_grad for p in dit.parameters()))


def velocity(theirs: nn.Module, x: Tensor, t: Tensor, c: Tensor) -> Tensor:
    """The velocity of diffusers' SANA in our convention, (B, C, H, W)."""
    return theirs(x.to(theirs.dtype), c.to(theirs.dtype), 1000 * t, return_dict=False)[0]


def diffusers_vae(vae: DCAE) -> nn.Module:
    """diffusers' DC-AE on the weights of ours."""
    from diffusers import AutoencoderDC

    from tools.convert import published_config
    with torch.device("meta"):
        theirs = AutoencoderDC(**published_config(vae.config))
    theirs.load_state_dict(vae.state_dict(), assign=True)
    return theirs.requires_grad_(False)


def diffusers_pipeline(dit: nn.Module, vae: DCAE) -> Callable:
    """diffusers' SANA pipeline of such a DiT and our DC-AE's weights, without its text encoder."""
    from diffusers import DPMSolverMultistepScheduler, SanaPipeline
    solver = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True,
                                         flow_shift=3.0)
    pipeline = SanaPipeline(None, None, diffusers_vae(vae), dit, solver)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def siglip_connector(lim: LIM) -> nn.Module:
    """transformers' SigLIP encoder, of which OpenUni's connector is a copy, with the weights of ours."""
    from transformers.models.siglip.modeling_siglip import SiglipEncoder, SiglipVisionConfig

    class Connector(SiglipEncoder):
        def forward(self, rows: Tensor) -> Tensor:                                      # (R, N, D)
            return super().forward(inputs_embeds=rows).last_hidden_state

    config, ours = lim.config, lim.connector
    settings = SiglipVisionConfig(
        hidden_size=config.width, intermediate_size=config.mlp_width, num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6)
    settings._attn_implementation = "sdpa"
    with torch.device("meta"):
        theirs = Connector(settings)
    theirs.load_state_dict({name: p.detach().clone() for name, p in ours.state_dict().items()}, assign=True)
    return theirs.requires_grad_(any(p.requires_grad for p in ours.parameters()))


def peer_of(model: ParaUni) -> ParaUni:
    """The same model of the parts that peers have, weights copied; VLM and autoencoder are shared."""
    peer = copy.deepcopy(model, {id(part): part for part in (model.vlm, model.vae, model.dit)})
    peer.lim.connector, peer.dit = siglip_connector(model.lim), diffusers_dit(model.dit)
    return peer


def condition(peer: ParaUni, prompts: list[str | None], max_tokens: int | None = None) -> Tensor:
    """One condition a picture, (B, N, E): prompt and queries in one pass of the VLM, all with gradient."""
    texts = [UNCONDITIONAL.format(image="") if p is None else PROMPT.format(prompt=p) for p in prompts]
    ids, mask = peer.tokenize(texts, max_tokens)                                        # (B, S)
    B, N = len(ids), peer.preset.num_queries
    words = peer.vlm.get_input_embeddings()(ids)                                        # (B, S, D)
    queries = peer.queries.to(words.dtype).expand(B, -1, -1)                            # (B, N, D)
    mask = torch.cat([mask, mask.new_ones(B, N)], 1)                                    # (B, S + N)
    out = peer.vlm.model.language_model(
        inputs_embeds=torch.cat([words, queries], 1), attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=False, output_hidden_states=True)
    q = torch.stack([h[:, -N:] for h in out.hidden_states[1:]])                         # (L, B, N, D)
    rows = q.flatten(0, 1).to(peer.queries.dtype)                                       # (L B, N, D)
    c = peer.lim.agglayer_norm(peer.lim.projector(peer.lim.connector(rows)))            # (L B, N, E)
    return c.unflatten(0, (-1, B)).mean(0)                                              # (B, N, E)


def stage1_loss(peer: ParaUni, x0: Tensor, prompts: list[str | None], t: Tensor, noise: Tensor,
                dtype: str = "fp32") -> Tensor:
    """The flow-matching loss of a batch, a condition for each picture."""
    with precision(x0.device, dtype):
        c = condition(peer, prompts, peer.preset.train_tokens)                          # (B, N, E)
        s = t[:, None, None, None]
        v = velocity(peer.dit, (1 - s) * x0 + s * noise, t, c)                          # (B, C, H, W)
    return (v.float() - (noise - x0)).square().mean()


def guided(dit: nn.Module, x: Tensor, t: float, c: Tensor, c_uncond: Tensor, cfg) -> Tensor:
    """Velocity with guidance, the condition of both halves given as it is: (B, C, H, W)."""
    times = torch.full((len(x),), t, device=x.device)
    with precision(x.device, cfg.dtype):
        if cfg.guidance_scale <= 1:
            return velocity(dit, x, times, c).float()
        v = velocity(dit, torch.cat([x, x]), torch.cat([times, times]), torch.cat([c_uncond, c])).float()
    v_uncond, v_cond = v.chunk(2)
    return v_uncond + cfg.guidance_scale * (v_cond - v_uncond)


def transition(x: Tensor, v: Tensor, t: float, t_next: float, noise_level: float) -> Normal:
    """The distribution of the next latent of the flow SDE (Flow-GRPO's step)."""
    sigma, dt = noise_level * math.sqrt(t / (1 - (t_next if t == 1 else t))), t_next - t
    mean = x + (v + sigma ** 2 / (2 * t) * (x + (1 - t) * v)) * dt
    return Normal(mean, torch.tensor(sigma * math.sqrt(-dt), device=x.device))


def encode(peer: ParaUni, prompts: list[str], cfg) -> tuple[Tensor, Tensor]:
    """Conditions of pictures, and the unconditional one as often."""
    with precision(peer.device, cfg.dtype):
        return condition(peer, prompts), condition(peer, [None] * len(prompts))


@torch.no_grad()
def rollout(peer: ParaUni, prompts: list[str], generators: list[torch.Generator],
            cfg) -> tuple[Tensor, Tensor]:
    """Latents (K + 1, B, C, H, W) and log-probabilities (K - 1, B) of pictures, a prompt each."""
    sigmas = euler_grid(cfg.num_steps, cfg.shift)[0].tolist()
    parts = []
    for i in range(0, len(prompts), cfg.micro_batch):
        rngs = generators[i:i + cfg.micro_batch]
        c, c_uncond = encode(peer, prompts[i:i + cfg.micro_batch], cfg)
        latents, log_probs = [randn((len(c), *peer.preset.latent_shape), rngs, peer.device)], []
        for k, (t, t_next) in enumerate(zip(sigmas[:-1], sigmas[1:])):
            x = latents[-1]
            v = guided(peer.dit, x, t, c, c_uncond, cfg)
            if k == cfg.num_steps - 1:
                latents.append(x + (t_next - t) * v)
                continue
            step = transition(x, v, t, t_next, cfg.noise_level)
            latents.append(step.mean + step.stddev * randn(x.shape, rngs, x.device))
            log_probs.append(step.log_prob(latents[-1]).mean((1, 2, 3)))
        parts.append((torch.stack(latents), torch.stack(log_probs)))
    latents, log_probs = zip(*parts)
    return torch.cat(latents, 1), torch.cat(log_probs, 1)


def accumulate_gradient(peer: ParaUni, reference: ParaUni, prompts: list[str], latents: Tensor,
                        log_probs: Tensor, advantages: Tensor, cfg) -> None:
    """Add the gradient of clipped objective and KL to .grad, one picture chunk and timestep after another."""
    sigmas, steps = euler_grid(cfg.num_steps, cfg.shift)[0].tolist(), cfg.num_steps - 1
    for i in range(0, len(prompts), cfg.micro_batch):
        part, texts = slice(i, i + cfg.micro_batch), prompts[i:i + cfg.micro_batch]
        for k in range(steps):
            x, x_next = latents[k, part], latents[k + 1, part]
            args = sigmas[k], sigmas[k + 1], cfg.noise_level
            step = transition(x, guided(peer.dit, x, sigmas[k], *encode(peer, texts, cfg), cfg), *args)
            with torch.no_grad():
                v = guided(reference.dit, x, sigmas[k], *encode(reference, texts, cfg), cfg)
                mean_ref = transition(x, v, *args).mean
            ratio = (step.log_prob(x_next).mean((1, 2, 3)) - log_probs[k, part]).exp()  # (b,)
            bounded = ratio.clamp(1 - cfg.clip_range, 1 + cfg.clip_range)
            loss = torch.maximum(-advantages[part] * ratio, -advantages[part] * bounded).mean()
            kl = ((step.mean - mean_ref).square() / (2 * step.variance)).mean()
            ((loss + cfg.kl_coef[0] * kl) * len(texts) / len(prompts) / steps).backward()
