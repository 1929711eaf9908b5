"""Stage III: Flow-GRPO with LDAM (paper section 3.3). One epoch, in seven steps:

  1. draw `num_groups` prompts; encode the condition of each once, with LDAM's noise if it fired in the
     last epoch
  2. roll out `group_size` pictures a prompt along the stochastic sampler, keeping every latent and its
     log-probability
  3. decode; score with the reward of this phase, and with the others to watch them
  4. advantage = (reward - mean of its group) / std of its group
  5. update: raise the log-probability of steps that led to better pictures, clipped around the rollout's
     policy, and stay near the stage II model (KL)
  6. LDAM looks at the gradient norm and the reward, and may fire
  7. EMA, log, checkpoint, pictures

Rewards come one after another (phases), each with a fresh optimizer, from the weights of the phase before.

What makes it exact. One function, `step_log_prob`, gives the log-probability in the rollout and in the
update, on the same chunks, so the first ratio is 1; it is measured in every epoch. Noise of every kind is
drawn from (seed, epoch, group, member), epochs counted over all phases: nothing depends on the number of
devices, and a resumed run repeats an unbroken one bit for bit.
What makes it cheap. The condition of a prompt is shared by its group. In the update it is encoded once with
gradient and detached to a leaf; the leaf's gradient is summed over all pictures and steps and sent back
through LIM, VLM and queries once.

Differs from Flow-GRPO: the last step is taken without noise, so rewards see clean pictures (it is not
trained, as there); the KL is that of the two Gaussians, dt included; advantages are divided by the group's
own std.

The mathematics is the first third. The rest makes a run of it: phases, resuming, log, pictures.

Letters: P prompts (groups), G members of a group, B = P G pictures, K steps, N queries, E condition width,
C H W latent.
"""
import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean as mean
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm import tqdm

from common import (Dist, RunLog, StopSignal, adamw, all_gather_list, all_reduce_mean, average_gradients,
                    check_skips, clip_gradients, compile_parts, cosine_lr, derive_seed, ema_update,
                    gathered, generator, image_grid, load_checkpoint, load_into, load_optimizer, precision,
                    read_metrics, save_checkpoint, save_png, shard, weights_of, whole)
from data import FilePrompts, NanoPrompts, nano_prompts, read_prompts
from dit import DiT, euler_grid, guided_velocity, randn, sde_step
from ldam import LDAM, perturbed_layers
from model import ParaUni, Prefix, save_trained
from rewards import Reward, build_reward

if TYPE_CHECKING:
    from PIL import Image
    from train import TrainConfig

RATIO_CAUSES = ("the rollout and the update run in different precision or compile modes; "
                "a layer behaves differently in train mode; LDAM's noise differs between the two; "
                "the chunks differ in size")
# What a reward may raise without ending a run of days: its group is masked, counted and named
REWARD_FAILS = (ArithmeticError, LookupError, OSError, RuntimeError, TypeError, ValueError)


# ----------------------------------------------------------------------------- the objective

def group_advantages(rewards: Tensor) -> Tensor:
    """(r - mean) / std within each group (paper Eq. 2; population std).

    rewards (P, G) fp32. Returns (P, G). A group without spread, or with a reward
    that is not finite, gets zeros.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"expected rewards (P, G) with groups of at least two, got {tuple(rewards.shape)}; "
                         "change --group-size")
    mean, std = (rewards.mean(1, keepdim=True),
                 rewards.std(1, correction=0, keepdim=True))                            # (P, 1)
    spread = std > 1e-6 * (1 + mean.abs())                                              # False for NaN too
    return torch.where(spread, (rewards - mean) / std, 0.0)                             # (P, G)


def grpo_loss(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """The clipped objective, to be minimised (paper Eq. 1):
    mean of max(-A ratio, -A clip(ratio, 1 +- clip_range)).

    log_prob, old_log_prob, advantages  (B,) fp32; log-probabilities are means over C H W,
                                        so clip_range is per element
    """
    ratio = torch.exp(log_prob - old_log_prob)                                          # (B,)
    return torch.maximum(-advantages * ratio,
                         -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)).mean()


def gaussian_kl(mean: Tensor, mean_ref: Tensor, std: Tensor) -> Tensor:
    """KL of two Gaussians of the same std, in nats per element: (mean - mean_ref)^2 / (2 std^2).

    mean, mean_ref (B, C, H, W); std (B,) > 0. Returns (B,), with gradient to mean.
    """
    return (mean - mean_ref).square().mean((1, 2, 3)) / (2 * std.square())


# ----------------------------------------------------------------------------- rollout

@dataclass
class Rollout:
    """All that the update needs of the pictures of this rank; latents and log-probabilities in fp32."""
    latents: Tensor             # (K + 1, B, C, H, W)   x_0 is noise, x_K the clean latents
    log_prob: Tensor            # (K, B)                under the policy that drew them; 0 if not stochastic
    mean_ref: Tensor            # (K, B, C, H, W)       the reference's mean of each trained step
    trained: list[int]          # the stochastic steps


def window(num_steps: int, size: int, epoch: int) -> list[int]:
    """The stochastic steps: all but the last; with size > 0 a window of that many,
    which slides by one an epoch (MixGRPO)."""
    if size == 0:
        return list(range(num_steps - 1))
    start = epoch % (num_steps - size)
    return list(range(start, start + size))


def step_log_prob(dit: nn.Module, kv: list, x: Tensor, t: float, t_next: float, cfg: "TrainConfig",
                  x_next: Tensor | None = None, generators: list[torch.Generator] | None = None
                  ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One stochastic step of one chunk: the only place where a log-probability is computed.
    Returns what sde_step does."""
    B = len(x)
    with precision(x.device, cfg.dtype):
        v = guided_velocity(dit, x, torch.full((B,), t, device=x.device), kv,
                            cfg.guidance_scale)                                         # (B, C, H, W)
    return sde_step(x, v, torch.full((B,), t), torch.full((B,), t_next), cfg.noise_level, x_next, generators)


def chunks(num_groups: int, group_size: int, micro_batch: int) -> Iterator[tuple[slice, slice]]:
    """(groups, pictures) of each forward pass: whole groups, or equal parts of one group
    where it exceeds micro_batch."""
    many, part = max(1, micro_batch // group_size), min(micro_batch, group_size)
    for first in range(0, num_groups, many):
        last = min(first + many, num_groups)
        if part == group_size:
            yield slice(first, last), slice(first * group_size, last * group_size)
        else:
            for i in range(first * group_size, last * group_size, part):
                yield slice(first, last), slice(i, i + part)


def chunk_kv(dit: DiT, c: Tensor, c_uncond: Tensor, groups: slice, pictures: slice,
             num_pictures: int, cfg: "TrainConfig") -> list:
    """Cross-attention keys and values of a chunk.
    c has a row a group, or a row a picture where LDAM perturbs each."""
    c = c[pictures if len(c) == num_pictures else groups]
    if cfg.guidance_scale > 1:
        c = torch.cat([c_uncond.expand(len(c), -1, -1), c])
    with precision(c.device, cfg.dtype):
        return dit.cross_kv(c)


def conditions(model: ParaUni, prefix: Prefix, noise: Tensor | None,
               cfg: "TrainConfig") -> tuple[Tensor, Tensor]:
    """(c, c_uncond) of a prefix of P prompts and, last, the unconditional one: (P, N, E) and (1, N, E).

    noise  (L, B, N, E), what LDAM multiplies into each picture's layers, less one; then c is (B, N, E)
    Both are fp32 in every precision, as the update sums the gradients of all pictures and steps in them.
    """
    with precision(model.device, cfg.dtype):
        layers = model.condition_layers(prefix).float()                                 # (L, P + 1, N, E)
    c_layers, c_uncond = layers[:, :-1], model.fuse(layers[:, -1:])                     # (1, N, E)
    if noise is None:
        return model.fuse(c_layers), c_uncond
    each = noise.shape[1] // c_layers.shape[1]
    return model.fuse(c_layers.repeat_interleave(each, 1), noise=noise), c_uncond


@torch.no_grad()
def rollout(policy: ParaUni, reference: ParaUni, prefix: Prefix, generators: list[torch.Generator],
            noise: Tensor | None, trained: list[int], cfg: "TrainConfig") -> Rollout:
    """Sample the pictures of the P prompts of a prefix; `generators`, one a picture,
    draw its x_0 and then its steps."""
    P, B, device = len(prefix.mask) - 1, len(generators), policy.device
    latents = [randn((B, *policy.preset.latent_shape), generators, device)]             # x_0 (B, C, H, W)
    log_probs, means_ref = [], []
    sigmas = euler_grid(cfg.num_steps, cfg.shift)[0].tolist()
    c, c_ref = (conditions(model, prefix, noise, cfg) for model in (policy, reference))
    parts = [(b, chunk_kv(policy.dit, *c, g, b, B, cfg), chunk_kv(reference.dit, *c_ref, g, b, B, cfg))
             for g, b in chunks(P, B // P, cfg.micro_batch)]
    for k, (t, t_next) in enumerate(zip(sigmas[:-1], sigmas[1:])):
        x = latents[-1]
        x_next, log_prob, mean_ref = torch.empty_like(x), x.new_zeros(B), torch.zeros_like(x)
        for b, kv, kv_ref in parts:
            if k in trained:
                x_next[b], log_prob[b], _, _ = step_log_prob(policy.dit, kv, x[b], t, t_next, cfg, None,
                                                             generators[b])
                if cfg.kl_coef > 0:
                    mean_ref[b] = step_log_prob(reference.dit, kv_ref, x[b], t, t_next, cfg, x_next[b])[2]
            else:
                with precision(device, cfg.dtype):
                    v = guided_velocity(policy.dit, x[b], torch.full((len(x[b]),), t, device=device), kv,
                                        cfg.guidance_scale)
                x_next[b] = x[b] + (t_next - t) * v                                     # the Euler step
        latents.append(x_next)
        log_probs.append(log_prob)
        means_ref.append(mean_ref)
    return Rollout(torch.stack(latents), torch.stack(log_probs), torch.stack(means_ref), trained)


# ----------------------------------------------------------------------------- update

def accumulate_gradient(policy: ParaUni, prefix: Prefix, rolled: Rollout, advantages: Tensor,
                        noise: Tensor | None, cfg: "TrainConfig", anchor: bool) -> dict[str, float]:
    """Add the gradient of the objective over this rank's pictures to .grad;
    returns kl, ratio_dev and clip_frac.

    advantages  (B,)
    anchor      take this pass's own log-probabilities as the old ones (--anchor recompute, first update)
    The condition is encoded once, with gradient; pictures and steps see it as a leaf, whose summed gradient
    goes through LIM, VLM and queries once at the end. The same gradient as naively, at a small part of the
    cost.
    """
    P, B, steps = len(prefix.mask) - 1, len(advantages), len(rolled.trained)
    sigmas = euler_grid(cfg.num_steps, cfg.shift)[0].tolist()
    roots = conditions(policy, prefix, noise, cfg)
    leaves = [c.detach().requires_grad_() for c in roots]
    kl_sum, off = torch.zeros((), device=policy.device), []
    for groups, b in chunks(P, B // P, cfg.micro_batch):
        for k in rolled.trained:
            kv = chunk_kv(policy.dit, *leaves, groups, b, B, cfg)
            x, x_next = rolled.latents[k, b], rolled.latents[k + 1, b]                  # (b, C, H, W)
            _, log_prob, mean, std = step_log_prob(policy.dit, kv, x, sigmas[k], sigmas[k + 1], cfg, x_next)
            if anchor:
                rolled.log_prob[k, b] = log_prob.detach()
            kl = (gaussian_kl(mean, rolled.mean_ref[k, b], std).mean() if cfg.kl_coef > 0
                  else mean.new_zeros(()))
            objective = (grpo_loss(log_prob, rolled.log_prob[k, b], advantages[b], cfg.clip_range)
                         + cfg.kl_coef * kl)
            share = len(x) / B / steps
            (objective * share).backward()
            kl_sum += kl.detach() * share
            off.append((torch.exp(log_prob.detach() - rolled.log_prob[k, b]) - 1).abs())
    torch.autograd.backward(roots, [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
                                    for leaf in leaves])
    off = torch.cat(off)                                                                # (B steps,)
    return {"kl": kl_sum.item(), "ratio_dev": off.max().item(),
            "clip_frac": (off > cfg.clip_range).float().mean().item()}


def check_ratio(deviation: float, cfg: "TrainConfig") -> str | None:
    """On the first update the policy is the one that drew the pictures:
    any deviation is an error of the machinery."""
    if deviation <= 0.1 * cfg.clip_range:
        return None
    found = (f"the first update's ratio is off by {deviation:.1e}, "
             f"more than a tenth of --clip-range {cfg.clip_range:g}")
    if cfg.dtype == "bf16" or cfg.compile:
        return (f"{found}: bf16 or compiled kernels round differently with gradient; "
                "--anchor recompute cures it")
    raise RuntimeError(f"{found}. Likely causes: {RATIO_CAUSES}")


# ----------------------------------------------------------------------------- LDAM's noise

def epoch_noise(model: ParaUni, layers: list[int], gamma: float, keys: list[tuple]) -> Tensor:
    """gamma eps for the given layers, zero for the others: (L, B, N, E),
    eps drawn for each picture from its key."""
    preset = model.preset
    shape = len(layers), preset.num_queries, preset.lim.caption_channels
    noise = torch.zeros(preset.vlm.num_layers, len(keys), *shape[1:],
                        device=model.device)                                            # (L, B, N, E)
    for b, key in enumerate(keys):
        noise[[i - 1 for i in layers], b] = gamma * randn(shape, generator("ldam", *key), model.device)
    return noise


def keep_noise(model: ParaUni, layers: list[int], gamma: float, key: tuple) -> None:
    """The other reading: one field a layer for all pictures, multiplied into the model's buffer to stay."""
    noise = epoch_noise(model, layers, gamma, [key])[:, 0]                              # (L, N, E)
    factor = torch.ones_like(noise) if model.layer_factor is None else model.layer_factor
    model.layer_factor = factor * (1 + noise)


# ----------------------------------------------------------------------------- looking at a model

@torch.no_grad()
def score_heldout(model: ParaUni, rewards: dict[str, Reward], prompts: list[str], cfg: "TrainConfig",
                  dist: Dist) -> dict[str, list[float]]:
    """Every reward of one picture of each held-out prompt, always from the same noise,
    by the sampler of `generate`."""
    mine = [i for i in range(len(prompts))
            if i * dist.world_size // len(prompts) == dist.rank]                        # contiguous shares
    columns = []
    for first in range(0, -(-len(prompts) // dist.world_size), cfg.micro_batch):
        items = mine[first:first + cfg.micro_batch] or [0]      # all ranks go round equally often (FSDP)
        said = [prompts[i] for i in items]
        with precision(model.device, cfg.dtype):
            images = model.generate(said, cfg.eval_steps, cfg.eval_guidance_scale,
                                    seed=[derive_seed(cfg.seed, "heldout", i) for i in items])
        if first < len(mine):
            columns.append(torch.stack([score(images, said)
                                        for score in rewards.values()], 1))             # (b, rewards)
    scores = all_gather_list(torch.cat(columns) if columns
                             else torch.zeros(0, len(rewards), device=model.device), dist)
    return {name: scores[:, k].tolist() for k, name in enumerate(rewards)}


def summary(before: dict[str, list[float]], after: dict[str, list[float]], names: list[str]) -> str:
    """Mean before and after, and the paired difference in standard errors."""
    lines = [f"{'held-out reward':20} {'before':>9} {'after':>9} {'change':>9}  {'+- s.e.':>8}   n"]
    for name in names:
        a, b = torch.tensor(before[name]), torch.tensor(after[name])
        change, error = (b - a).mean(), (b - a).std() / len(a) ** 0.5
        lines.append(f"{name:20} {a.mean():9.4f} {b.mean():9.4f} {change:+9.4f}  {error:8.4f} {len(a):4}")
    return "\n".join(lines)


def plot_rewards(records: list[dict], names: list[str], path: Path) -> None:
    """Mean reward of each epoch, raw (pale) and as EMA 0.1, one panel a reward; phases separated by lines."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    records = [r for r in records if f"reward/{names[0]}" in r]
    figure, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 3), squeeze=False,
                                layout="constrained")
    x = [r["epoch"] for r in records]
    for axis, name in zip(axes[0], names):
        raw, smooth = [math.nan if r[f"reward/{name}"] is None else r[f"reward/{name}"] for r in records], []
        for value in raw:
            smooth.append(0.9 * smooth[-1] + 0.1 * value
                          if smooth and math.isfinite(smooth[-1] + value) else value)
        axis.plot(x, raw, color="tab:blue", alpha=0.3)
        axis.plot(x, smooth, color="tab:blue")
        for r, last in zip(records[1:], records):
            if r["phase"] != last["phase"]:
                axis.axvline(last["epoch"] + 0.5, color="grey", linewidth=0.8)
        for r in records:
            if r["ldam/fired"]:
                axis.axvline(r["epoch"], color="tab:red", linewidth=0.8, linestyle=":")
        axis.set(title=name, xlabel="epoch")
    figure.savefig(path, dpi=120)
    plt.close(figure)


# ----------------------------------------------------------------------------- the loop

@dataclass
class Run:
    """What an epoch needs; the last six change."""
    cfg: "TrainConfig"                      # of train.py
    model: ParaUni
    reference: ParaUni                      # the stage II model, frozen: the KL refers to it
    scorers: dict[str, Reward]
    source: NanoPrompts | FilePrompts
    heldout: list[str]
    dist: Dist
    params: dict[str, nn.Parameter]
    ema: dict[str, Tensor]
    opt: torch.optim.Optimizer
    ldam: LDAM
    gamma: float | None                     # set where LDAM fired in the last epoch
    evals: list[dict[str, list[float]]]     # held-out scores before the first phase, and after each
    skipped: int = 0                        # updates left out: no finite gradient, or no group to learn from
    in_a_row: int = 0                       # of them

    @property
    def names(self) -> list[str]:
        """The rewards as the log calls them, in the order of their phases."""
        return list(self.scorers)

    @property
    def per_phase(self) -> int:
        """Epochs of a phase."""
        return -(-self.cfg.steps // self.cfg.inner_updates)


def check(cfg: "TrainConfig", world_size: int) -> None:
    """The arithmetic of groups, in the flags' own names."""
    if cfg.group_size < 2:
        raise ValueError(f"expected --group-size of at least 2, got {cfg.group_size}: "
                         "an advantage compares the members of a group")
    if cfg.num_groups < 1 or cfg.num_groups % world_size:
        raise ValueError(f"expected --num-groups to be a multiple of the number of devices, {world_size}, "
                         f"got {cfg.num_groups}")
    if cfg.micro_batch < cfg.group_size and cfg.group_size % cfg.micro_batch:
        raise ValueError(f"expected --micro-batch to divide --group-size {cfg.group_size} or to be as large, "
                         f"got {cfg.micro_batch}")
    if cfg.num_steps < 2 or not 0 <= cfg.sde_window < cfg.num_steps:
        raise ValueError("expected --num-steps of at least 2 and --sde-window below it, "
                         f"got {cfg.num_steps} and {cfg.sde_window}")
    named = [name for name in cfg.rewards if ":" not in name]
    if cfg.preset != "nano" and (named and not cfg.reward_weights or not (cfg.prompts and cfg.eval_prompts)):
        raise ValueError(f"--preset {cfg.preset} needs prompt files, --prompts and --eval-prompts"
                         + (f", and --reward-weights with the models of {', '.join(named)}" if named else ""))
    if not cfg.rewards or len({name.rpartition(":")[2] for name in cfg.rewards}) < len(cfg.rewards):
        raise ValueError("expected --rewards to name each reward once, "
                         f"got {','.join(cfg.rewards) or 'nothing'}")


def start(cfg: "TrainConfig", model: ParaUni, dist: Dist) -> Run:
    """A run before its first epoch."""
    check(cfg, dist.world_size)
    scorers = {name.rpartition(":")[2]: build_reward(name, model.device, weights=cfg.reward_weights or None)
               for name in cfg.rewards}
    reference = copy.deepcopy(model, {id(model.vlm): model.vlm,                         # shares these two
                                      id(model.vae): model.vae}).requires_grad_(False)
    model.lim.gradient_checkpointing = model.dit.gradient_checkpointing = cfg.gradient_checkpointing
    for each in (model, reference):
        if cfg.fsdp:
            shard(each, dist)
        if cfg.compile:
            compile_parts(each.device, each.lim, each.dit)
    heldout = (read_prompts(cfg.eval_prompts) if cfg.eval_prompts else nano_prompts(test=True))[:cfg.num_eval]
    source = (FilePrompts(read_prompts(cfg.prompts), cfg.num_groups, cfg.seed) if cfg.prompts
              else NanoPrompts(cfg.seed))
    params = model.trainable(3)
    ema = {name: p.detach().clone() for name, p in params.items()}
    return Run(cfg, model, reference, scorers, source, heldout, dist, params, ema,
               *new_phase(cfg, params), None, [])


def new_phase(cfg: "TrainConfig", params: dict[str, nn.Parameter]) -> tuple[torch.optim.Optimizer, LDAM]:
    ldam = LDAM(cfg.ldam_gamma0, spike=cfg.ldam_spike, patience=cfg.ldam_patience,
                use_grad_norm=cfg.ldam_use_grad_norm, use_reward=cfg.ldam_use_reward,
                gamma_max=cfg.ldam_gamma_max, trigger=cfg.ldam_trigger)
    return adamw(params.values(), cfg.lr, cfg.weight_decay), ldam


def score_all(run: Run, images: Tensor, prompts: list[str]) -> dict[str, Tensor]:
    """Every reward of this rank's pictures (b, 3, H, W), gathered from all ranks: name -> (P, G)."""
    G = run.cfg.group_size
    return {name: all_gather_list(score_groups(name, scorer, images, prompts, G), run.dist).view(-1, G)
            for name, scorer in run.scorers.items()}


def score_groups(name: str, scorer: Reward, images: Tensor, prompts: list[str], group_size: int) -> Tensor:
    """The scores of whole groups, (b,); NaN for each group on which the reward fails."""
    try:
        return scorer(images, prompts)                                                  # (b,)
    except REWARD_FAILS as error:
        if len(images) == group_size:
            tqdm.write(f"reward {name} failed on {prompts[0]!r}, its group is masked: {error}")
            return images.new_full((group_size,), math.nan)
    parts = zip(images.split(group_size), range(0, len(images), group_size))
    return torch.cat([score_groups(name, scorer, part, prompts[i:i + group_size], group_size)
                      for part, i in parts])


def run_epoch(run: Run, epoch: int) -> dict:
    """Steps 1 to 6 of the header. Returns the line for the log."""
    cfg, model, dist = run.cfg, run.model, run.dist
    phase, step = divmod(epoch, run.per_phase)
    name, clock = run.names[phase], [time.perf_counter()]
    mine = range(dist.rank * cfg.num_groups // dist.world_size,
                 (dist.rank + 1) * cfg.num_groups // dist.world_size)
    prompts = [run.source.draw(epoch, group) for group in mine]                         # P
    keys = [(cfg.seed, epoch, group, member) for group in mine for member in range(cfg.group_size)]
    layers = perturbed_layers(run.names[:phase + 1], model.preset.vlm.num_layers)
    noise = None
    if run.gamma is not None and cfg.ldam_mode == "epoch":
        noise = epoch_noise(model, layers, run.gamma, keys)                             # (L, B, N, E)
    prefix = model.encode_prefix([*prompts, None])
    trained = window(cfg.num_steps, cfg.sde_window, epoch)
    rolled = rollout(model, run.reference, prefix, [generator("picture", *key) for key in keys],
                     noise, trained, cfg)
    clock.append(time.perf_counter())

    scores = score_all(run, model.decode(rolled.latents[-1]),
                       [p for p in prompts for _ in range(cfg.group_size)])
    usable = scores[name].isfinite().all(1)                                             # (P,)
    advantages = group_advantages(scores[name])                                         # (P, G)
    zero_std = (advantages[usable] == 0).all(1).float().mean().item()
    advantages = advantages[mine.start:mine.stop].flatten()                             # (B,)
    clock.append(time.perf_counter())

    norms, counted = [], []
    for update in range(cfg.inner_updates):
        for group in run.opt.param_groups:
            group["lr"] = cosine_lr(step * cfg.inner_updates + update,
                                    run.per_phase * cfg.inner_updates, cfg.warmup, cfg.lr)
        run.opt.zero_grad(set_to_none=True)
        counted.append(accumulate_gradient(model, prefix, rolled, advantages, noise, cfg,
                                           cfg.anchor == "recompute" and update == 0))
        if update == 0 and (warning := check_ratio(counted[0]["ratio_dev"], cfg)) and epoch == dist.rank == 0:
            print(f"warning: {warning}", flush=True)
        average_gradients(run.params.values(), dist)
        norms.append(clip_gradients(run.params.values(), cfg.clip_norm, dist))
        if math.isfinite(norms[-1]) and usable.any():                           # the same on all ranks
            run.opt.step()
            run.in_a_row = 0
        else:
            run.skipped, run.in_a_row = run.skipped + 1, run.in_a_row + 1
    if run.in_a_row < cfg.inner_updates:                                        # some update was made
        ema_update(run.ema, run.params, cfg.ema_decay)
    clock.append(time.perf_counter())

    record = {"epoch": epoch + 1, "phase": name, **{f"reward/{n}": finite_mean(s) for n, s in scores.items()},
              **{key: all_reduce_mean(torch.tensor(counted[u][key], device=model.device), dist).item()
                 for key, u in (("kl", 0), ("clip_frac", -1))},
              "ratio_dev": all_gather_list(torch.tensor([counted[0]["ratio_dev"]], device=model.device),
                                           dist).max().item(),
              "zero_std": zero_std, "reward_nan": int((~usable).sum()), "grad_norm": norms[0],
              "skipped": run.skipped, "lr": run.opt.param_groups[0]["lr"]}
    record |= perturb(run, layers, record[f"reward/{name}"], norms[0], (cfg.seed, epoch))
    spent = dict(zip(("time/rollout", "time/reward", "time/update"),
                     [b - a for a, b in zip(clock, clock[1:])]))
    return record | spent


def perturb(run: Run, layers: list[int], reward: float, grad_norm: float, key: tuple) -> dict:
    """Step 6: LDAM sees the epoch; sets the gamma of the next one, or multiplies its field in (`keep`)."""
    if not run.cfg.ldam:
        return {"ldam/fired": 0}
    usable = math.isfinite(grad_norm) and math.isfinite(reward)
    run.gamma = run.ldam.update(grad_norm, reward) if usable else None
    last = run.ldam.last if usable else {"fired": 0}
    if run.gamma is not None:
        if run.cfg.ldam_mode == "keep":
            keep_noise(run.model, layers, run.gamma, key)
            run.reference.layer_factor = run.model.layer_factor      # the KL measures weights, not fields
        if run.dist.rank == 0:
            cut = f", cut from {last['gamma_raw']:.3g} by --ldam-gamma-max" if last["bounded"] else ""
            tqdm.write(f"LDAM fires after epoch {key[1] + 1}: gamma {run.gamma:.3g}{cut}, layers {layers}")
    return ({f"ldam/{k}": v for k, v in last.items() if k != "epoch"}
            | ({"ldam/layers": layers} if run.gamma is not None else {}))


def finite_mean(values: Tensor) -> float:
    return values[values.isfinite()].mean().item()


def evaluate(run: Run, epoch: int) -> dict[str, list[float]]:
    """Step 7's look at the EMA weights: held-out scores, and the grid of the same prompts as always."""
    with weights_of(run.params, run.ema, run.model):
        if run.dist.rank == 0 or run.cfg.fsdp:                  # split weights need all ranks to run at all
            grid = picture_grid(run, [run.model], 8)
        if run.dist.rank == 0:
            save_png(Path(run.cfg.run_dir) / f"epoch-{epoch:05}.png", grid)
        return score_heldout(run.model, run.scorers, run.heldout, run.cfg, run.dist)


def picture_grid(run: Run, models: list[ParaUni], columns: int,
                 titles: list[str] | None = None) -> "Image.Image":
    """Pictures of the same prompts and noise by each model,
    a row of `columns` (or two, for one model) each."""
    count = min(columns * (2 if len(models) == 1 else 1), len(run.heldout))
    said = run.heldout[:count]                                # the nano world's list takes the tasks in turn
    with precision(run.model.device, run.cfg.dtype):
        images = torch.cat([m.generate(said, run.cfg.eval_steps, run.cfg.eval_guidance_scale,
                                       seed=run.cfg.seed) for m in models])
    return image_grid(images, min(columns, count), max(1, 96 // images.shape[-1]), said * len(models), titles)


def save(run: Run, epoch: int) -> None:
    """A checkpoint of all that changes; all ranks must call it."""
    kept = {} if run.model.layer_factor is None else {"ldam": {"layer_factor": run.model.layer_factor}}
    tensors = whole({"trained": run.params, "ema": run.ema})
    state = {"epoch": epoch, "evals": run.evals, "gamma": run.gamma, "optimizer": whole(run.opt.state_dict()),
             "ldam": run.ldam.state_dict(), "skipped": run.skipped, "in_a_row": run.in_a_row}
    if run.dist.rank == 0:
        save_checkpoint(run.cfg.run_dir, epoch, {**tensors, **kept}, state, run.cfg.keep)


def restore(run: Run, checkpoint: Path) -> int:
    """Everything back as `save` found it; returns the number of finished epochs."""
    tensors, state, _ = load_checkpoint(checkpoint)
    load_into(run.params, tensors["trained"], str(checkpoint))
    load_into(run.ema, tensors["ema"], str(checkpoint))
    if "ldam" in tensors:
        field = tensors["ldam"]["layer_factor"].to(run.model.device)                    # (L, N, E)
        run.model.layer_factor = run.reference.layer_factor = field
    load_optimizer(run.opt, state["optimizer"])
    run.ldam.load_state_dict(state["ldam"])
    run.evals, run.gamma = state["evals"], state["gamma"]
    run.skipped, run.in_a_row = state["skipped"], state["in_a_row"]
    return state["epoch"]


def train(cfg: "TrainConfig", model: ParaUni, dist: Dist, checkpoint: Path | None) -> dict[str, float]:
    """Stage III from a stage II model. Returns the held-out means after the last phase,
    {} if it was stopped before."""
    run, lead = start(cfg, model, dist), dist.rank == 0
    done = restore(run, checkpoint) if checkpoint else 0
    log = RunLog(cfg.run_dir, resume_step=done + 1 if run.evals else 0, key="epoch") if lead else None
    total = run.per_phase * len(cfg.rewards)
    bar = tqdm(total=total, initial=done, disable=not lead, unit="epoch", dynamic_ncols=True)
    if not run.evals:
        bar.set_postfix_str("scoring the held-out prompts")
        run.evals.append(evaluate(run, 0))
        if lead:
            log.write({"epoch": 0, "phase": run.names[0], **heldout_means(run.evals[-1])})
    with StopSignal() as signal:
        for epoch in range(done, total):
            if epoch % run.per_phase == 0:
                (run.opt, run.ldam), run.gamma = new_phase(cfg, run.params), None
            record = run_epoch(run, epoch)
            last = (epoch + 1) % run.per_phase == 0
            if last or (epoch + 1) % cfg.eval_every == 0:
                scores = evaluate(run, epoch + 1)
                record |= heldout_means(scores)
                run.evals += [scores] * last
            stop = all_reduce_mean(torch.tensor(float(signal.stop), device=model.device), dist).item() > 0
            if lead:
                log.write(record)
                bar.set_postfix_str(f"{record['phase']} {record['reward/' + record['phase']]:.3f}, "
                                    f"kl {record['kl']:.1e}, |ratio-1| {record['ratio_dev']:.0e}, "
                                    f"fired {record['ldam/fired']}")
                bar.update()
            if last or stop or (epoch + 1) % cfg.save_every == 0 or run.in_a_row >= cfg.max_skipped:
                save(run, epoch + 1)
            check_skips(run.in_a_row, cfg.max_skipped, f"epoch {epoch + 1}")
            if stop and epoch + 1 < total:
                bar.close()
                if lead:
                    print(f"stopped after epoch {epoch + 1} of {total}; everything is saved, "
                          "go on with --resume auto")
                return {}
    bar.close()
    if lead:
        log.close()
    finish(run)
    return {name: mean(values) for name, values in run.evals[-1].items()}


def heldout_means(scores: dict[str, list[float]]) -> dict[str, float]:
    return {f"heldout/{name}": mean(values) for name, values in scores.items()}


def finish(run: Run) -> None:
    """The weights, the curves, the pictures before and after, and a table of what each phase did."""
    cfg, folder = run.cfg, Path(run.cfg.run_dir)
    run.reference.layer_factor = None                         # stage II as it was, for the picture before
    with weights_of(run.params, run.ema, run.model):
        with gathered(run.model):
            if run.dist.rank == 0:
                save_trained(run.model, folder / "stage3.safetensors", 3, cfg)
        if run.dist.rank == 0 or cfg.fsdp:
            grid = picture_grid(run, [run.reference, run.model], 8, ["before", "after"])
    if run.dist.rank > 0:
        return
    save_png(folder / "before_after.png", grid)
    plot_rewards(read_metrics(folder / "metrics.jsonl"), run.names, folder / "rewards.png")
    for phase, name in enumerate(run.names):
        print(f"\nphase {phase + 1}, {name}\n{summary(run.evals[phase], run.evals[phase + 1], run.names)}")
    print(f"\nweights  {folder / 'stage3.safetensors'}\n"
          f"curves   {folder / 'rewards.png'}\n"
          f"pictures {folder / 'before_after.png'}")
