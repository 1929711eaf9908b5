"""Stage III: Flow-GRPO with LDAM (paper sections 3.1 to 3.3). One epoch, in seven steps:

  1. prompts: draw `num_groups`, each is read once; LDAM's noise where it fired in the last epoch
  2. roll out `group_size` pictures a prompt along the SDE; keep every latent, and the log-probability of
     each stochastic step
  3. decode; score with the reward of this phase, and with the others to watch them
  4. compare within groups: advantage = (reward - mean of its group) / std of its group
  5. update: raise the log-probability of steps that led to better pictures, clipped around the rollout's
     policy, and stay near a reference (KL): the stage II model, or that which the phase began with
  6. LDAM looks at the gradient norm and the reward, and may fire
  7. EMA, checkpoint; the next turn looks at held-out prompts, where it is time, and writes this epoch's line

Rewards come one after another (phases). The first begins with the file of stage II (--init), each other with
the last one's weights, all with a fresh optimizer and LDAM. What is written at the end is the EMA.

What makes it exact. One function, `step_log_prob`, gives the log-probability in the rollout and in the
update, on the same chunks, so the first ratio is 1; it is measured in every epoch. The noise of a picture is
drawn from (seed, epoch, group, member), LDAM's from these and the layer, a shared start from (seed, epoch,
group), epochs counted over all phases: no draw depends on the number of devices, and a resumed run repeats
an unbroken one bit for bit (on a GPU, as far as torch's kernels repeat themselves).
What makes it cheap. The VLM reads prompts once an epoch, without gradient; only the queries run again: for
the rollout, its reference and, with gradient, the update. There the gradients of all pictures and steps are
summed in the conditions that they share, and go through LIM and VLM once (accumulate_gradient).

Differs from Flow-GRPO: the last step, which is not trained there either, is taken without noise, so rewards
see clean pictures; an epoch has one update, not one for each half of its pictures. As in its formulas, but
unlike its code, the KL is that of the two Gaussians, whose std includes dt, and, unlike its runs with SD3,
advantages are divided by the group's own std.

Reading of the paper: a reward has --steps of its own; the noise of Eq. 6 is each picture's own and lasts an
epoch (--ldam-mode); the layers of the present reward alone are perturbed (--ldam-layers).

Letters: P prompts (groups) of a rank, G members of a group, B = P G pictures, b pictures of a chunk (of one
forward pass), K steps, L VLM layers, S perturbed layers, N queries, E condition width, C H W latent.
"""
import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from common import (Dist, Refused, RunConfig, Weights, adamw, average_gradients, catch_stop, clip_gradients,
                    copy_weights, cosine_lr, derive_seed, ema_update, gather, generator, knob,
                    load_checkpoint, make_trainable, mean_over_ranks, open_run, precision, read_log,
                    save_checkpoint, set_lr, swapped, write_log)
from data import draw_prompt, nano_prompts, read_prompts
from dit import DiT, euler_grid, guided_velocity, randn, sde_step
from ldam import LDAM, perturbed_layers
from model import PRESETS, PROMPT, ParaUni, Prefix, weights_folder
from pictures import plot_rewards, reward_table, save_sheet
from rewards import Reward, build_reward


@dataclass(frozen=True)
class GRPOConfig(RunConfig):
    """The flags of stage III. Where the paper has no number, groups, sampling, objective are Flow-GRPO's."""
    stage: int = knob(3, "1 align, 2 fine-tune, 3 reinforce", choices=(1, 2, 3))
    steps: tuple[int, ...] = knob((2000,), "optimizer steps: one number a phase, the last for all left")
    micro_batch: int = knob(8, "pictures a forward pass, on one device (the paper's 9 does not divide 24)")
    ema_decay: float = knob(0.9, "of the weights that are written at the end")
    save_every: int = knob(50, "epochs between checkpoints")
    # rewards and prompts
    rewards: tuple[str, ...] = knob(("aesthetic", "pickscore", "clip"),
                                    "in this order, one phase each: names, or file.py:function")
    reward_weights: str = knob("auto", "folder of the reward models; auto: weights/rewards, or nano's own")
    prompts: str = knob("", "file with one training prompt a line; nano has its own")
    eval_prompts: str = knob("", "file with one held-out prompt a line; nano has its own")
    # groups and sampling
    num_groups: int = knob(48, "prompts an epoch, over all devices")
    group_size: int = knob(24, "pictures a prompt")
    num_steps: int = knob(10, "sampling steps in training; the last one is not stochastic")
    noise_level: float = knob(0.7, "a in sigma_t = a sqrt(t / (1 - t)) of the SDE")
    guidance_scale: float = knob(4.5, "classifier-free guidance in training; 1: none, at half the cost")
    shift: float = knob(3.0, "of the time grid towards noise")
    shared_start: bool = knob(False, "the pictures of a prompt begin with the same noise (Flow-GRPO-Fast)")
    sde_window: int = knob(0, "stochastic steps, sliding through the first half; 0: all but the last")
    # objective
    clip_range: float = knob(1e-4, "of the ratio, per latent element (log-probabilities are means)")
    kl_coef: tuple[float, ...] = knob((0.01,), "weight of the KL: one number a phase, the last for all left")
    kl_reference: str = knob("stage2", "what the KL refers to: the model of stage 2, or that which the phase "
                             "began with", choices=("stage2", "phase"))
    inner_updates: int = knob(1, "optimizer steps on each epoch's pictures")
    step_weights: str = knob("equal", "of the steps in the loss; noise: in proportion to their std",
                             choices=("equal", "noise"))
    anchor: str = knob("rollout", "old log-probabilities: the rollout's, or taken again in the update's mode",
                       choices=("rollout", "recompute"))
    # LDAM
    ldam: bool = knob(True, "perturb layers when training stalls")
    ldam_mode: str = knob("epoch", "epoch: fresh noise a picture for one epoch; keep: one field that stays",
                          choices=("epoch", "keep"))
    ldam_layers: str = knob("present", "layers that fire: of the present reward, or of earlier ones too",
                            choices=("present", "all"))
    ldam_gamma0: float = knob(0.1, "scale of the perturbation")
    ldam_gamma_max: float = knob(1.0, "upper bound of gamma")
    ldam_spike: float = knob(100.0, "ratio of successive gradient norms that counts as a jump")
    ldam_patience: int = knob(5, "declines of the reward that open its gate")
    ldam_use_grad_norm: bool = knob(True, "listen to the gradient norm")
    ldam_use_reward: bool = knob(True, "listen to the reward")
    # held-out evaluation
    num_eval: int = knob(96, "held-out prompts, one picture each")
    eval_every: int = knob(50, "epochs between evaluations, over all phases; each phase ends with one")
    eval_steps: int = knob(20, "sampling steps")
    eval_guidance_scale: float = knob(4.5, "guidance")


# ----------------------------------------------------------------------------- advantages, clipped loss

def group_advantages(rewards: Tensor) -> Tensor:
    """(r - mean) / std within each group, population std (Flow-GRPO), (P, G) fp32: the group's mean stands in
    for PPO's value function, and every step of a picture has the picture's advantage. A group without spread,
    or with a reward that is not finite, gets zeros: it teaches nothing."""
    mean = rewards.mean(1, keepdim=True)                                                # (P, 1)
    std = rewards.std(1, correction=0, keepdim=True)                                    # (P, 1)
    # what rounding makes of equal rewards is no spread
    has_spread = std > 1e-6 * rewards.abs().amax(1, keepdim=True)                       # False for NaN too
    return torch.where(has_spread, (rewards - mean) / std, 0.0)                         # (P, G)


def grpo_loss(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """Flow-GRPO's objective, to be minimised: mean of max(-A ratio, -A clip(ratio, 1 +- clip_range)).
    Log-probabilities, means over C H W, and advantages are (b,) fp32."""
    # how much likelier is the step now than when it was drawn? 1 in an epoch's first update, by default its
    # only one: nothing is clipped then, and the gradient is that of -A log_prob
    ratio = torch.exp(log_prob - old_log_prob)                                          # (b,)
    # beyond the clip range there is nothing more to gain, but there is to lose: hence the maximum
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)                               # (b,)
    return torch.maximum(-advantages * ratio, -advantages * clipped).mean()


# ----------------------------------------------------------------------------- conditions, with LDAM's noise

class Perturbation(NamedTuple):
    """LDAM's noise for some layers of every picture. Its way into the condition: encode_conditions hands on
    the c_i of these layers, chunk_kv adds 1/n sum_i c_i noise_i to c, the mean of all n (LIM.perturb)."""
    gamma: float
    layers: list[int]           # none at rest
    keys: list[tuple]           # of each picture: (seed, the perturbed epoch, group, member)
                                # keep: one, (seed, the epoch in which LDAM fired)

    def noise(self, pictures: slice, model: ParaUni) -> list[Tensor]:
        """gamma eps of each perturbed layer (Eq. 6), S x (b, N, E)."""
        shape = len(self.keys[pictures]), model.preset.num_queries, model.preset.lim.caption_channels
        noise = []
        for layer in self.layers:
            # a stream for each picture and layer: rollout and update draw the same, whatever the chunks
            generators = [generator("ldam", *key, layer) for key in self.keys[pictures]]
            noise.append(self.gamma * randn(shape, generators, model.device))           # (b, N, E)
        return noise


def encode_conditions(model: ParaUni, prefix: Prefix, perturbation: Perturbation,
                      cfg: GRPOConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Conditions of a prefix of P prompts and, last, the unconditional one: c (P, N, E), c_uncond (1, N, E),
    and the c_i (S, P, N, E) that LDAM perturbs. fp32, as the update sums all pictures' gradients in them."""
    with precision(model.device, cfg.dtype):
        c_layers = model.condition_layers(prefix).float()                               # (L, P + 1, N, E)
    c = model.lim.fuse(c_layers)                                                        # (P + 1, N, E)
    perturbed = c_layers[[i - 1 for i in perturbation.layers], :-1]                     # (S, P, N, E)
    return c[:-1], c[-1:], perturbed


def chunk_kv(model: ParaUni, conditions: tuple[Tensor, Tensor, Tensor], groups: slice, noise: list[Tensor],
             guidance_scale: float, cfg: GRPOConfig) -> list:
    """Cross-attention keys and values for a chunk of pictures: one condition a group, or one a picture where
    LDAM perturbs each. With guidance, which an objective may forgo, as many unconditional ones in front."""
    c, c_uncond, perturbed = conditions
    c = c[groups]                                                                       # (groups, N, E)
    if noise:
        c = model.lim.perturb(c, perturbed[:, groups], noise)                           # (b, N, E)
    if guidance_scale > 1:
        c = torch.cat([c_uncond.expand(len(c), -1, -1), c])
    with precision(model.device, cfg.dtype):
        return model.dit.cross_kv(c)


def keep_noise(model: ParaUni, reference: ParaUni, perturbation: Perturbation) -> None:
    """The other reading of LDAM: one noise (N, E) a layer for all pictures, multiplied in to stay, in the
    reference too: LIM.forward has it in its c_i from now on, and the weights file holds it."""
    kept = model.lim.kept_noise
    if kept is None:
        shape = model.preset.lim.vlm_layers, model.preset.num_queries, model.preset.lim.caption_channels
        kept = torch.ones(shape)                                                        # (L, N, E)
    # a checkpoint gives it back on the CPU
    kept = kept.to(model.device)
    for layer, noise in zip(perturbation.layers, perturbation.noise(slice(None), model)):
        kept[layer - 1] *= 1 + noise[0]
    model.lim.kept_noise = reference.lim.kept_noise = kept


# ----------------------------------------------------------------------------- rollout

def velocity(dit: DiT, kv: list, x: Tensor, t: float, cfg: GRPOConfig) -> Tensor:
    """The guided velocity of a chunk, (b, C, H, W) fp32."""
    times = torch.full((len(x),), t, device=x.device)                                   # (b,)
    with precision(x.device, cfg.dtype):
        return guided_velocity(dit, x, times, kv, cfg.guidance_scale)


def step_log_prob(dit: DiT, kv: list, x: Tensor, t: float, t_next: float, cfg: GRPOConfig,
                  x_next: Tensor | None = None, generators: list[torch.Generator] | None = None,
                  ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One stochastic step of one chunk, drawn, or scored where x_next is given: the only place where a
    log-probability is computed. Returns sde_step's x_next (b, C, H, W), log_prob (b,), mean, std (b,)."""
    v = velocity(dit, kv, x, t, cfg)                                                    # (b, C, H, W)
    # on the CPU, where sde_step wants them: no wait for the GPU
    t, t_next = torch.full((len(x),), t), torch.full((len(x),), t_next)                 # (b,) each
    return sde_step(x, v, t, t_next, cfg.noise_level, x_next, generators)


def trained_steps(num_steps: int, window: int, epoch: int) -> list[int]:
    """All steps but the last; with window > 0 so many of the first half, where it is decided what is where.
    They slide by one an epoch (MixGRPO; the half is Flow-GRPO-Fast's)."""
    if window == 0:
        return list(range(num_steps - 1))
    start = epoch % (num_steps // 2 - window + 1)
    return list(range(start, start + window))


def chunks(B: int, group_size: int, micro_batch: int) -> Iterator[tuple[slice, slice]]:
    """(groups, pictures) of each forward pass: whole groups, or equal parts of one too large for it."""
    # as many groups as fit; 0 where not even one does, and then a part of it
    size = micro_batch // group_size * group_size or micro_batch
    for first in range(0, B, size):
        last = min(first + size, B)
        yield slice(first // group_size, math.ceil(last / group_size)), slice(first, last)


class Rollout(NamedTuple):
    """All that the update needs of the pictures of this rank; fp32."""
    times: list[float]          # K + 1, from 1 (noise) to 0
    trained: list[int]          # the stochastic steps
    latents: Tensor             # (K + 1, B, C, H, W)   the first is noise, the last one clean
    log_prob: Tensor            # (K, B)                of the trained steps, under the policy that drew them
    mean_ref: Tensor            # (K, B, C, H, W)       the reference's mean of each trained step
    kl_coef: float              # weight of the KL to the reference, in this phase


@torch.no_grad()
def rollout(policy: ParaUni, reference: ParaUni, prefix: Prefix, keys: list[tuple],
            perturbation: Perturbation, trained: list[int], kl_coef: float, cfg: GRPOConfig) -> Rollout:
    """Sample the pictures of a prefix of P prompts, each from its key, (seed, epoch, group, member)."""
    B, K = len(keys), cfg.num_steps
    shape, device = policy.preset.latent_shape, policy.device
    # more steps near the noise, where content is decided
    times = euler_grid(K, cfg.shift)[0].tolist()
    latents = torch.zeros(K + 1, B, *shape, device=device)                              # (K + 1, B, C, H, W)
    log_prob = torch.zeros(K, B, device=device)                                         # (K, B)
    mean_ref = torch.zeros(K, B, *shape, device=device)                                 # (K, B, C, H, W)

    # each prompt's condition, once for all of its pictures
    conditions = encode_conditions(policy, prefix, perturbation, cfg)
    if kl_coef > 0:
        conditions_ref = encode_conditions(reference, prefix, perturbation, cfg)
    for groups, pictures in chunks(B, cfg.group_size, cfg.micro_batch):
        noise = perturbation.noise(pictures, policy)                                    # S x (b, N, E)
        kv = chunk_kv(policy, conditions, groups, noise, cfg.guidance_scale, cfg)
        # LDAM's noise is in both: the KL measures the weights alone
        if kl_coef > 0:
            kv_ref = chunk_kv(reference, conditions_ref, groups, noise, cfg.guidance_scale, cfg)

        # from noise to picture, step by step
        generators = [generator("picture", *key) for key in keys[pictures]]
        # from a shared start, a group's pictures differ by the noise of their trained steps, and by LDAM's
        starts = [generator("start", *key[:3]) for key in keys[pictures]] if cfg.shared_start else generators
        x = randn((len(starts), *shape), starts, device)                                # (b, C, H, W)
        latents[0, pictures] = x
        for k, (t, t_next) in enumerate(zip(times[:-1], times[1:])):
            # a step that will be trained is drawn from its distribution, another one follows the ODE
            if k in trained:
                x_next, log_prob[k, pictures], _, _ = step_log_prob(
                    policy.dit, kv, x, t, t_next, cfg, generators=generators)
                # where would the reference have gone from here?
                if kl_coef > 0:
                    _, _, mean_ref[k, pictures], _ = step_log_prob(
                        reference.dit, kv_ref, x, t, t_next, cfg, x_next)
            else:
                x_next = x + (t_next - t) * velocity(policy.dit, kv, x, t, cfg)         # an Euler step
            latents[k + 1, pictures] = x = x_next
    return Rollout(times, trained, latents, log_prob, mean_ref, kl_coef)


# ----------------------------------------------------------------------------- update

def grpo_objective(dit: DiT, kv: list, rolled: Rollout, pictures: slice, k: int, advantages: Tensor,
                   cfg: GRPOConfig, first: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of step k of a chunk of pictures, a mean over them, and what to log of each picture, (b,), as are
    the advantages. kv: the chunk's conditions; first: it is the first update on these pictures."""
    # how likely is the step from x to x_next, which was taken, under the weights of now?
    x, x_next = rolled.latents[k, pictures], rolled.latents[k + 1, pictures]            # (b, C, H, W) each
    t, t_next = rolled.times[k], rolled.times[k + 1]
    _, log_prob, mean, std = step_log_prob(dit, kv, x, t, t_next, cfg, x_next)
    # the policy is still that of the rollout: its log-probability as rounded here takes that one's place
    if first and cfg.anchor == "recompute":
        rolled.log_prob[k, pictures] = log_prob.detach()
    old_log_prob = rolled.log_prob[k, pictures]                                         # (b,)
    loss = grpo_loss(log_prob, old_log_prob, advantages, cfg.clip_range)

    # the rein: not too far from the reference; KL of two Gaussians of the same std, in nats per element
    kl = torch.zeros_like(log_prob)                                                     # (b,)
    if rolled.kl_coef > 0:
        distance = (mean - rolled.mean_ref[k, pictures]).square().mean((1, 2, 3))       # (b,)
        kl = distance / (2 * std.square())                                              # (b,)
        loss = loss + rolled.kl_coef * kl.mean()
    # the gradient grows as 1 / std, and late steps would drown early ones, which decide what is where; the
    # first step, whose std is noise_level (see sde_step), keeps its weight; a step has a single std
    if cfg.step_weights == "noise":
        loss = loss * std.mean() / cfg.noise_level

    # to be logged; later updates are meant to deviate, the first one is not
    deviation = (torch.exp(log_prob - old_log_prob) - 1).abs()                          # (b,)
    metrics = {"kl": kl, "clip_frac": (deviation > cfg.clip_range).float()}
    if first:
        metrics["ratio_dev"] = deviation
    return loss, metrics


def accumulate_gradient(policy: ParaUni, prefix: Prefix, rolled: Rollout, advantages: Tensor,
                        perturbation: Perturbation, cfg: GRPOConfig, first: bool) -> dict[str, Tensor]:
    """Add the gradient of the objective over this rank's pictures to .grad; returns what to log."""
    B = len(advantages)
    # encoded once, with gradient; LDAM's noise and the DiT build on leaves, which sum the gradients of all
    # pictures and steps
    roots = encode_conditions(policy, prefix, perturbation, cfg)
    leaves = tuple(c.detach().requires_grad_(c.requires_grad) for c in roots)

    metrics: dict[str, list[Tensor]] = {}
    for groups, pictures in chunks(B, cfg.group_size, cfg.micro_batch):
        noise = perturbation.noise(pictures, policy)                                    # S x (b, N, E)
        for k in rolled.trained:
            # anew for each step, whose backward frees it
            kv = chunk_kv(policy, leaves, groups, noise, cfg.guidance_scale, cfg)
            loss, logged = grpo_objective(policy.dit, kv, rolled, pictures, k, advantages[pictures], cfg,
                                          first)
            # chunks may differ in size: the loss is the mean over all pictures and steps of this rank
            share = (pictures.stop - pictures.start) / B / len(rolled.trained)
            (loss * share).backward()
            # whatever the objective wants to be logged
            for name, values in logged.items():
                metrics.setdefault(name, []).append(values.detach())

    # On through LIM, VLM and queries. A backward pass is linear: one with the sum gives what one for each
    # picture and step would. Without guidance or noise some leaves are not used.
    used = [(root, leaf.grad) for root, leaf in zip(roots, leaves) if leaf.grad is not None]
    torch.autograd.backward([root for root, _ in used], [grad for _, grad in used])
    return {name: torch.cat(values) for name, values in metrics.items()}


def summarise(metrics: dict[str, Tensor], dist: Dist) -> dict[str, float]:
    """Means over the pictures and steps of all ranks; of a deviation the largest."""
    joined = {name: gather(values, dist) for name, values in metrics.items()}
    return {name: (values.max() if name.endswith("_dev") else values.mean()).item()
            for name, values in joined.items()}


def check_ratio(deviation: float, cfg: GRPOConfig, warn: bool) -> None:
    """On the first update the policy is the one that drew the pictures: a deviation is the machinery's."""
    if deviation <= 0.1 * cfg.clip_range:
        return
    found = f"the first ratio is off by {deviation:.1e}, more than a tenth of --clip-range {cfg.clip_range:g}"
    if cfg.dtype == "fp32" and not cfg.compile:
        raise RuntimeError(f"{found}. Likely causes: rollout and update run in different precision; a layer "
                           "behaves differently in train mode; LDAM's noise or the chunks differ")
    if warn:
        tqdm.write(f"{found}: bf16 or compiled kernels round differently with gradient; --anchor recompute "
                   "cures it")


# ----------------------------------------------------------------------------- the loop

def new_phase(cfg: GRPOConfig, params: Weights, params_ref: Weights) -> tuple[torch.optim.Optimizer, LDAM]:
    """What a reward begins with, as momentum and declines of the reward before say nothing about this one."""
    # what earlier rewards have taught is not pulled back
    if cfg.kl_reference == "phase":
        copy_weights(params, params_ref)
    ldam = LDAM(cfg.ldam_gamma0, spike=cfg.ldam_spike, patience=cfg.ldam_patience,
                use_grad_norm=cfg.ldam_use_grad_norm, use_reward=cfg.ldam_use_reward,
                gamma_max=cfg.ldam_gamma_max)
    return adamw(params.values(), cfg.lr, cfg.weight_decay), ldam


def train(cfg: GRPOConfig, dist: Dist) -> dict[str, float]:
    """Stage III from a stage II model. Returns the held-out means at the end, {} if it was stopped before."""
    check_flags(cfg, dist.world_size)
    state = open_run(cfg, dist)
    # stage II's weights (--init): the model that learns, and a copy to which the KL refers, made ready alike,
    # but in no optimizer; what nobody trains is shared
    model = ParaUni.from_preset(cfg.preset, cfg.weights, cfg.init, cfg.seed, dist.device, cfg.fresh, stage=2)
    reference = copy.deepcopy(model, {id(model.vlm): model.vlm, id(model.vae): model.vae})
    params, params_ref = make_trainable(cfg, model), make_trainable(cfg, reference)
    ema = {name: p.detach().clone() for name, p in params.items()}

    # prompts and rewards, all of them tried before the first epoch
    prompts = open_prompts(cfg.prompts, model)
    heldout = (open_prompts(cfg.eval_prompts, model) or nano_prompts(test=True))[:cfg.num_eval]
    scorers = open_rewards(cfg, model, heldout[0])
    goals = list(scorers)                                           # a reward each phase

    # where the run stands: at its beginning, or where a checkpoint left it
    done, skipped, gamma, record = 0, 0, None, {"epoch": 0, "phase": goals[0]}
    # held-out scores before the first phase, and after each
    evals: list[dict[str, list[float]]] = state["evals"] if state else []
    # a number that tells whether a prompt has changed
    digest = derive_seed(*prompts, *heldout)
    if state:
        if state["prompts"] != digest:
            raise Refused("the prompt files are not those that this run began with: put them back")
        # the phase's optimizer and LDAM get their state back; a reference that is stage II's was read again
        # above; there is no random state: every draw follows from the seed and its epoch
        optimizer, ldam = new_phase(cfg, params, params_ref)
        load_checkpoint(state, params, ema, optimizer)
        ldam.load_state_dict(state["ldam"])
        copy_weights(state["reference"], params_ref)
        model.lim.kept_noise = reference.lim.kept_noise = state["kept_noise"]
        done, skipped, gamma, record = state["epoch"], state["skipped"], state["gamma"], state["record"]
    before = state["before"] if state else draw_examples(cfg, model, heldout)           # (8, 3, H, W)

    # steps of each phase, the last number for all left; of every epoch its phase, and its first step there
    lengths = [cfg.steps[:phase + 1][-1] for phase in range(len(goals))]
    schedule = [(phase, step) for phase, n in enumerate(lengths) for step in range(0, n, cfg.inner_updates)]
    total = len(schedule)
    mine = range(dist.rank, cfg.num_groups, dist.world_size)        # the groups of this rank
    with catch_stop() as stop, tqdm(total=total, initial=done, disable=not dist.lead, unit="epoch") as bar:
        # A turn first ends the epoch before: held-out scores, a line of the log. They follow its checkpoint,
        # if it has one: a run that fails in them resumes with them. The last turn does no more.
        for epoch, (phase, step) in enumerate([*schedule[done:], (None, 0)], start=done):
            # before and after each phase, and now and then
            if step == 0 or epoch % cfg.eval_every == 0:
                with swapped(params, ema):
                    scores = score_heldout(model, scorers, heldout, cfg, dist)
                if step == 0:
                    evals.append(scores)
                record |= {f"heldout/{name}": finite_mean(values) for name, values in scores.items()}
            write_log(cfg.run_dir, record, dist)
            if epoch == total:
                break
            goal = goals[phase]

            # the next reward begins, from the weights that the last one left
            if step == 0:
                optimizer, ldam = new_phase(cfg, params, params_ref)
            phase_ends = step + cfg.inner_updates == lengths[phase]
            clock = [time.perf_counter()]

            # 1. prompts, each read once; LDAM's noise where it fired in the last epoch
            texts = [draw_prompt(prompts, cfg.num_groups, cfg.seed, epoch, group) for group in mine]    # P
            keys = [(cfg.seed, epoch, group, member) for group in mine for member in range(cfg.group_size)]
            # where LDAM acts, if it fires: the layers that answer to this reward, of those that are fused
            acting = goals[:phase + 1] if cfg.ldam_layers == "all" else [goal]
            layers = sorted({*perturbed_layers(acting, model.preset.lim.vlm_layers)} & {*model.lim.layers})
            perturbation = Perturbation(gamma or 0.0, [] if gamma is None else layers, keys)
            # prompts, and last the unconditional one: their keys and values, without gradient
            prefix = model.encode_prefix([*texts, None])

            # 2. roll out G pictures of each prompt along the SDE
            trained = trained_steps(cfg.num_steps, cfg.sde_window, epoch)
            kl_coef = cfg.kl_coef[:phase + 1][-1]
            rolled = rollout(model, reference, prefix, keys, perturbation, trained, kl_coef, cfg)
            clock.append(time.perf_counter())

            # 3. decode, score
            rewards = score_groups(model, scorers, rolled.latents[-1], texts, cfg, dist)    # name -> (P, G)
            means = {name: finite_mean(values.flatten().tolist()) for name, values in rewards.items()}
            clock.append(time.perf_counter())

            # 4. compare within groups, by this phase's reward; the others are only watched
            usable = rewards[goal].isfinite().all(1)                                    # (P of all ranks,)
            advantages = group_advantages(rewards[goal])                                # (P of all ranks, G)
            # those of this rank's pictures
            own = advantages.chunk(dist.world_size)[dist.rank].flatten()                # (B,)

            # 5. update: back through the DiT for each chunk and step, through LIM and VLM once
            grad_norms, metrics = [], {}
            for update in range(cfg.inner_updates):
                lr = cosine_lr(step + update, lengths[phase], cfg.warmup, cfg.lr)
                set_lr(optimizer, lr)
                optimizer.zero_grad(set_to_none=True)
                logged = accumulate_gradient(model, prefix, rolled, own, perturbation, cfg, first=update == 0)
                average_gradients(params.values(), dist)
                grad_norms.append(clip_gradients(params.values(), cfg.clip_norm))
                # those of the last update stay, and ratio_dev, which the first alone has
                metrics |= summarise(logged, dist)
                # without a finite gradient, or a group of finite rewards, the weights stay as they are
                skipped += 1
                if math.isfinite(grad_norms[-1]) and usable.any():
                    optimizer.step()
                    skipped = 0
            # on the first update rollout and update must agree; another objective may have no ratio
            check_ratio(metrics.get("ratio_dev", 0.0), cfg, warn=dist.lead and epoch == done)
            clock.append(time.perf_counter())

            # 6. LDAM looks at gradient norm and reward; where it fires, the next epoch is perturbed
            gamma, ldam_log = None, {"fired": 0}
            if cfg.ldam and layers and math.isfinite(grad_norms[0]) and math.isfinite(means[goal]):
                gamma, ldam_log = ldam.update(grad_norms[0], means[goal]), ldam.last
            # the next reward begins without
            gamma = None if phase_ends else gamma
            # the other reading: not for an epoch but for good
            if gamma is not None and cfg.ldam_mode == "keep":
                keep_noise(model, reference, Perturbation(gamma, layers, [(cfg.seed, epoch)]))
                gamma = None

            # 7. EMA, save
            # the average follows where at least one of the epoch's updates was made
            if skipped < cfg.inner_updates:
                ema_update(ema, params, cfg.ema_decay)
            record = {"epoch": epoch + 1, "phase": goal, **metrics, "grad_norm": grad_norms[0], "lr": lr,
                      "skipped": skipped, "reward_nan": int((~usable).sum()),
                      "zero_std": (advantages[usable] == 0).all(1).float().mean().item(),
                      **{f"reward/{name}": mean for name, mean in means.items()},
                      **{f"ldam/{name}": value for name, value in ldam_log.items()},
                      "time/rollout": clock[1] - clock[0], "time/reward": clock[2] - clock[1],
                      "time/update": clock[3] - clock[2]}
            bar.update()
            bar.set_postfix_str(f"{goal} {means[goal]:.3f}, |g| {grad_norms[0]:.1e}")
            # saved before anything else may fail
            is_stopped, gives_up = mean_over_ranks(len(stop), dist) > 0, skipped >= cfg.max_skipped
            if is_stopped or gives_up or phase_ends or (epoch + 1) % cfg.save_every == 0:
                save_checkpoint(cfg, dist, epoch + 1, params, ema, optimizer, {
                    "epoch": epoch + 1, "skipped": skipped, "record": record, "evals": evals, "gamma": gamma,
                    "ldam": ldam.state_dict(), "kept_noise": model.lim.kept_noise, "prompts": digest,
                    "before": before, "reference": params_ref if cfg.kl_reference == "phase" else {}})
            if gives_up:
                raise Refused(f"{skipped} updates in a row were skipped up to epoch {epoch + 1}: no finite "
                              "gradient, or no finite reward; the weights before them are saved")
            if is_stopped and epoch + 1 < total:
                return {}

    # the weights file and the pictures are of the average of the weights; a run that was stopped has its
    # checkpoints alone
    with swapped(params, ema):
        model.save_stage(cfg, dist, record)
        after = draw_examples(cfg, model, heldout)                                      # (8, 3, H, W)
    if dist.lead:
        show(cfg, heldout, before, after, goals, evals)
    return {name: finite_mean(values) for name, values in evals[-1].items()}


# ----------------------------------------------------------------------------- scoring

def score(name: str, scorer: Reward, images: Tensor, prompts: list[str]) -> Tensor:
    """A reward of some pictures, (b,); NaN where it raises, as a user's may: it costs a group, not a run."""
    try:
        return scorer(images, prompts)                                                  # (b,)
    except Exception as error:
        tqdm.write(f"reward {name} failed on {prompts[0]!r}, which is left out: {error!r}")
        return torch.full((len(images),), math.nan, device=images.device)


@torch.no_grad()
def score_groups(model: ParaUni, scorers: dict[str, Reward], latents: Tensor, prompts: list[str],
                 cfg: GRPOConfig, dist: Dist) -> dict[str, Tensor]:
    """Every reward of the pictures of latents (B, C, H, W) of P prompts; name -> (P of all ranks, G)."""
    with precision(model.device, cfg.dtype):
        images = model.decode(latents)                                                  # (B, 3, H, W)
    rewards = {}
    for name, scorer in scorers.items():
        # a group is compared as a whole, so it fails as a whole
        own = [score(name, scorer, group, [prompt] * cfg.group_size)
               for group, prompt in zip(images.split(cfg.group_size), prompts)]         # P x (G,)
        rewards[name] = gather(torch.stack(own), dist)                                  # (P of all ranks, G)
    return rewards


@torch.no_grad()
def score_heldout(model: ParaUni, scorers: dict[str, Reward], prompts: list[str], cfg: GRPOConfig,
                  dist: Dist) -> dict[str, list[float]]:
    """Every reward of one picture of each held-out prompt, always from the same noise, by the ODE."""
    rows, total = [], len(prompts)
    for first in range(0, total, cfg.micro_batch * dist.world_size):
        # each rank takes a chunk; the last ones may repeat a picture, so that all make the same calls
        size = min(cfg.micro_batch, math.ceil((total - first) / dist.world_size))
        items = [min(first + dist.rank * size + j, total - 1) for j in range(size)]
        texts = [prompts[i] for i in items]
        seeds = [derive_seed(cfg.seed, "heldout", i) for i in items]
        with precision(model.device, cfg.dtype):
            images = model.generate(texts, cfg.eval_steps, cfg.eval_guidance_scale, seeds)
        columns = [score(name, scorer, images, texts) for name, scorer in scorers.items()]
        rows.append(gather(torch.stack(columns, 1), dist))                              # (chunk, rewards)
    scores = torch.cat(rows)[:total]                                                    # (prompts, rewards)
    return {name: scores[:, j].tolist() for j, name in enumerate(scorers)}


def draw_examples(cfg: GRPOConfig, model: ParaUni, prompts: list[str]) -> Tensor:
    """Pictures of at most eight prompts, always from one noise, (8, 3, H, W) on the CPU."""
    with precision(model.device, cfg.dtype):
        images = model.generate(prompts[:8], cfg.eval_steps, cfg.eval_guidance_scale, seed=cfg.seed)
    return images.cpu()


def finite_mean(values: list[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return fmean(finite) if finite else math.nan


# ----------------------------------------------------------------------------- beginning and end

def check_flags(cfg: GRPOConfig, world_size: int) -> None:
    """Refuse flags that do not fit together."""
    fits = cfg.micro_batch >= cfg.group_size or cfg.group_size % cfg.micro_batch == 0
    if cfg.group_size < 2 or cfg.num_groups % world_size or not fits:
        raise Refused("expected --group-size of at least 2, --num-groups to be a multiple of the number of "
                      f"devices, {world_size}, and --micro-batch to divide --group-size or to be as large")
    numbers = len(cfg.steps), len(cfg.kl_coef)
    if min(numbers) < 1 or max(numbers) > len(cfg.rewards):
        raise Refused("expected --steps and --kl-coef to have a number, at most one for each of --rewards; a "
                      "preset's own are meant for its own rewards: with others, name both")
    if any(steps % cfg.inner_updates for steps in cfg.steps):
        raise Refused("expected --inner-updates to divide --steps")
    if not 0 <= cfg.sde_window <= cfg.num_steps // 2:
        raise Refused("expected --sde-window of at most half of --num-steps")
    if min(cfg.noise_level, *cfg.steps, cfg.num_eval, cfg.eval_every, cfg.save_every) <= 0:
        raise Refused("expected --noise-level, --steps, --num-eval, --eval-every and --save-every above 0")
    if not (PRESETS[cfg.preset].shapes_world or cfg.prompts and cfg.eval_prompts):
        raise Refused(f"preset {cfg.preset} needs prompt files: --prompts and --eval-prompts")


def open_prompts(path: str, model: ParaUni) -> list[str]:
    """The prompts of a file, each tokenised now and not in the tenth hour."""
    # nano has its own, which are made of words that it knows
    prompts = read_prompts(path) if path else []
    for number, prompt in enumerate(prompts, start=1):
        try:
            model.tokenize([PROMPT.format(prompt=prompt)])
        except Refused as error:
            raise Refused(f"{path}, prompt {number}: {error}") from error
    return prompts


def open_rewards(cfg: GRPOConfig, model: ParaUni, prompt: str) -> dict[str, Reward]:
    """The rewards by their short names, in the order of their phases, each tried on two grey pictures:
    on one, a mean over all passes. Weights: weights/rewards, of nano weights/nano, or --reward-weights."""
    folder = weights_folder("nano" if model.preset.shapes_world else "rewards", cfg.reward_weights)
    side = model.preset.image_size
    scorers = {}
    for name in cfg.rewards:
        scorer = build_reward(name, model.device, weights=folder)
        scorer(torch.full((2, 3, side, side), 0.5, device=model.device), [prompt] * 2)
        short_name = name.rpartition(":")[2]
        if short_name in scorers:
            raise Refused(f"expected --rewards to name each reward once, got two called {short_name}")
        scorers[short_name] = scorer
    return scorers


def show(cfg: GRPOConfig, prompts: list[str], before: Tensor, after: Tensor, goals: list[str],
         evals: list[dict[str, list[float]]]) -> None:
    """What a run leaves to look at: pictures before and after, (8, 3, H, W) each, curves, a table a phase."""
    # a row of pictures a model, of the same prompts and noise
    folder, count = Path(cfg.run_dir), len(after)
    save_sheet(folder / "before_after.png", torch.cat([before, after]), count, prompts[:count] * 2,
               ["before", "after"])
    plot_rewards(folder / "rewards.png", read_log(folder / "metrics.jsonl"))
    # the held-out scores before and after each phase
    for goal, first, last in zip(goals, evals[:-1], evals[1:]):
        print(f"\n{goal}\n{reward_table(first, last)}")
