"""Stages I and III written as their peers write them: the reference that exactness and speed are measured by.

Stage I as in OpenUni: one pass of the VLM over prompt and queries for every picture, all of it with gradient.
Stage III as in Flow-GRPO, whose condition is a fixed text embedding, carried over to a condition that is
trained: encoded for every picture, and in the update for every picture and timestep, with back-propagation
through LIM, VLM and queries each time. Formulas are written out here once more, nothing is shared with
grpo.py. Left out: LDAM's noise, groups of more than one device.

`velocity` is any f(x, t, c) -> v: our DiT, or diffusers' (diffusers_velocity), which is what peers have.

Letters: B pictures, K steps, L VLM layers, S prompt tokens, N queries, D VLM width, E condition width,
C H W latent.
"""
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributions import Normal

from common import precision
from dit import euler_grid, randn
from model import PROMPT, UNCONDITIONAL, ParaUni

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]


def diffusers_velocity(dit: nn.Module) -> tuple[nn.Module, Velocity]:
    """diffusers' SANA with a copy of the weights of our DiT, and its velocity in our convention."""
    from diffusers import SanaTransformer2DModel
    # no second copy of the weights; but positions are a buffer that no file holds, so they must be computed
    with torch.device("meta" if dit.config.interpolation_scale is None else "cpu"):
        theirs = SanaTransformer2DModel.from_config(dit.config.to_json())
    theirs.load_state_dict({name: p.detach().clone() for name, p in dit.state_dict().items()}, assign=True)
    theirs.requires_grad_(any(p.requires_grad for p in dit.parameters()))
    return theirs, lambda x, t, c: theirs(x.to(theirs.dtype), c.to(theirs.dtype), 1000 * t,
                                          return_dict=False)[0]


def condition(model: ParaUni, prompts: list[str | None], max_tokens: int | None = None) -> Tensor:
    """One condition a picture, (B, N, E): prompt and queries in one pass of the VLM, all with gradient."""
    texts = [UNCONDITIONAL.format(image="") if p is None else PROMPT.format(image="", caption=p)
             for p in prompts]
    ids, mask = model.tokenize(texts, max_tokens)                                       # (B, S)
    B, N = len(ids), model.preset.num_queries
    words = model.vlm.get_input_embeddings()(ids)                                       # (B, S, D)
    queries = model.queries.to(words.dtype).expand(B, -1, -1)                           # (B, N, D)
    mask = torch.cat([mask, mask.new_ones(B, N)], 1)                                    # (B, S + N)
    out = model.vlm.model.language_model(
        inputs_embeds=torch.cat([words, queries], 1), attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=False, output_hidden_states=True)
    q = torch.stack([h[:, -N:] for h in out.hidden_states[1:]])                         # (L, B, N, D)
    rows = q.flatten(0, 1).to(model.queries.dtype)                                      # (L B, N, D)
    c = model.lim.agglayer_norm(model.lim.projector(model.lim.connector(rows)))         # (L B, N, E)
    return c.unflatten(0, (-1, B)).mean(0)                                              # (B, N, E)


def stage1_loss(model: ParaUni, velocity: Velocity, x0: Tensor, prompts: list[str | None], t: Tensor,
                noise: Tensor, dtype: str = "fp32") -> Tensor:
    """The flow-matching loss of a batch, a condition for each picture."""
    with precision(x0.device, dtype):
        c = condition(model, prompts, model.preset.train_tokens)                        # (B, N, E)
        s = t[:, None, None, None]
        v = velocity((1 - s) * x0 + s * noise, t, c)                                    # (B, C, H, W)
    return (v.float() - (noise - x0)).square().mean()


def guided(velocity: Velocity, x: Tensor, t: float, c: Tensor, c_uncond: Tensor, cfg) -> Tensor:
    """Velocity with guidance, the condition of both halves given as it is: (B, C, H, W)."""
    times = torch.full((len(x),), t, device=x.device)
    with precision(x.device, cfg.dtype):
        if cfg.guidance_scale <= 1:
            return velocity(x, times, c).float()
        v = velocity(torch.cat([x, x]), torch.cat([times, times]), torch.cat([c_uncond, c])).float()
    v_uncond, v_cond = v.chunk(2)
    return v_uncond + cfg.guidance_scale * (v_cond - v_uncond)


def transition(x: Tensor, v: Tensor, t: float, t_next: float, noise_level: float) -> Normal:
    """The distribution of the next latent of the flow SDE (Flow-GRPO's step)."""
    sigma, dt = noise_level * math.sqrt(t / (1 - (t_next if t == 1 else t))), t_next - t
    mean = x + (v + sigma ** 2 / (2 * t) * (x + (1 - t) * v)) * dt
    return Normal(mean, torch.tensor(sigma * math.sqrt(-dt), device=x.device))


def encode(model: ParaUni, prompts: list[str], cfg) -> tuple[Tensor, Tensor]:
    """Conditions of pictures, and the unconditional one as often."""
    with precision(model.device, cfg.dtype):
        return condition(model, prompts), condition(model, [None] * len(prompts))


@torch.no_grad()
def rollout(model: ParaUni, velocity: Velocity, prompts: list[str], generators: list[torch.Generator],
            cfg) -> tuple[Tensor, Tensor]:
    """Latents (K + 1, B, C, H, W) and log-probabilities (K - 1, B) of pictures, a prompt each."""
    sigmas = euler_grid(cfg.num_steps, cfg.shift)[0].tolist()
    parts = []
    for i in range(0, len(prompts), cfg.micro_batch):
        rngs = generators[i:i + cfg.micro_batch]
        c, c_uncond = encode(model, prompts[i:i + cfg.micro_batch], cfg)
        latents, log_probs = [randn((len(c), *model.preset.latent_shape), rngs, model.device)], []
        for k, (t, t_next) in enumerate(zip(sigmas[:-1], sigmas[1:])):
            x = latents[-1]
            v = guided(velocity, x, t, c, c_uncond, cfg)
            if k == cfg.num_steps - 1:
                latents.append(x + (t_next - t) * v)
                continue
            step = transition(x, v, t, t_next, cfg.noise_level)
            latents.append(step.mean + step.stddev * randn(x.shape, rngs, x.device))
            log_probs.append(step.log_prob(latents[-1]).mean((1, 2, 3)))
        parts.append((torch.stack(latents), torch.stack(log_probs)))
    latents, log_probs = zip(*parts)
    return torch.cat(latents, 1), torch.cat(log_probs, 1)


def accumulate_gradient(model: ParaUni, velocity: Velocity, reference: ParaUni, velocity_ref: Velocity,
                        prompts: list[str], latents: Tensor, log_probs: Tensor, advantages: Tensor,
                        cfg) -> None:
    """Add the gradient of clipped objective and KL to .grad, one picture chunk and timestep after another."""
    sigmas, steps = euler_grid(cfg.num_steps, cfg.shift)[0].tolist(), cfg.num_steps - 1
    for i in range(0, len(prompts), cfg.micro_batch):
        part, said = slice(i, i + cfg.micro_batch), prompts[i:i + cfg.micro_batch]
        for k in range(steps):
            x, x_next = latents[k, part], latents[k + 1, part]
            args = sigmas[k], sigmas[k + 1], cfg.noise_level
            step = transition(x, guided(velocity, x, sigmas[k], *encode(model, said, cfg), cfg), *args)
            with torch.no_grad():
                v = guided(velocity_ref, x, sigmas[k], *encode(reference, said, cfg), cfg)
                mean_ref = transition(x, v, *args).mean
            ratio = (step.log_prob(x_next).mean((1, 2, 3)) - log_probs[k, part]).exp()  # (b,)
            bounded = ratio.clamp(1 - cfg.clip_range, 1 + cfg.clip_range)
            loss = torch.maximum(-advantages[part] * ratio, -advantages[part] * bounded).mean()
            kl = ((step.mean - mean_ref).square() / (2 * step.variance)).mean()
            ((loss + cfg.kl_coef * kl) * len(said) / len(prompts) / steps).backward()
