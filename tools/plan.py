"""What training needs: parameters, FLOPs and memory of every stage of a preset, without a GPU or a weight.

    python tools/plan.py                                      the full-size presets, as tables in markdown
    python tools/plan.py --presets l-1024 --devices 32 > plan.md

How. A model of fake tensors, which have a shape and a dtype and no memory, runs the stages' own functions
forward and backward in the precision of a GPU: frozen VLM in bf16, the rest in fp32, matrix products in bf16.
meter.py counts FLOPs, and every byte from the moment a tensor is made until nothing refers to it any more.
Memory is that of eager runs, and in stage III of an epoch in which LDAM has fired, so that each picture has a
condition of its own; FLOPs are those of an epoch at rest, without those of the rewards.

Letters: m pictures of a micro-batch, B pictures of a device, S prompt tokens, N queries, E condition width,
C h w latent, K steps.
"""
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

from common import knob, make_trainable, parse_config, precision, run
from dit import flow_matching_loss
from evaluation import table
from grpo import GRPOConfig, Perturbation, chunk_kv, encode_conditions, velocity
from ldam import perturbed_layers
from model import PRESETS, ParaUni, Preset
from tools.meter import Meter
from train import TrainConfig

GB = 1e9
RESERVE = 1.5 * GB                      # a device keeps it for the CUDA context and fragments
# the published rewards in fp32: CLIP ViT-L/14, PickScore's ViT-H/14, the aesthetic score's image tower
REWARDS = 4 * (428e6 + 986e6 + 304e6)
MANY = 8                                # pictures of the larger micro-batch that is measured; the other: 1
MOST = 64                               # pictures of a micro-batch that anyone would ask for
STAGES = {1: "align", 2: "fine-tune", 3: "reinforce"}


@dataclass(frozen=True)
class PlanConfig:
    presets: tuple[str, ...] = knob(("b-512", "l-512", "l-1024"), "which presets")
    devices: int = knob(8, "devices that share the work")


# ----------------------------------------------------------------------------- counting

def measure(work: Iterable[None]) -> tuple[list[int], list[int]]:
    """Of each moment of some work, which a yield ends: FLOPs, 2 for a multiplication and an addition; and the
    most bytes alive in it, above those before the work began."""
    flops, peaks = [], []
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]), Meter() as meter:
        for _ in work:
            flops.append(meter.flops)
            peaks.append(meter.peak)
            meter.flops, meter.peak = 0, meter.alive
    return flops, peaks


# ----------------------------------------------------------------------------- what is measured

def build(preset: Preset) -> ParaUni:
    """The preset's model, on torch's default device. Prompts are as long as training has them."""
    vlm = preset.vlm_class._from_config(preset.vlm, dtype=preset.vlm_dtype)
    model = ParaUni(preset, vlm, None)

    def tokenize(texts: list[str], max_tokens: int | None = None) -> tuple[Tensor, Tensor]:
        ids = torch.zeros(len(texts), preset.train_tokens, dtype=torch.long, device=model.device)   # (m, S)
        return ids, torch.ones_like(ids)

    model.tokenize = tokenize
    return model


def supervised(model: ParaUni, cfg: TrainConfig, m: int) -> Iterator[None]:
    """Stages I and II: m pictures, each with a prompt of its own."""
    prefix = model.encode_prefix(["prompt"] * m)
    x0 = torch.zeros(m, *model.preset.latent_shape)                                     # (m, C, h, w)
    with precision(model.device, cfg.dtype):
        c = model.lim.fuse(model.condition_layers(prefix))                              # (m, N, E)
        loss = flow_matching_loss(model.dit, x0, c, torch.zeros(m), torch.zeros_like(x0))
    loss.backward()
    yield


def reinforced(model: ParaUni, cfg: GRPOConfig, m: int) -> Iterator[None]:
    """Stage III, one step of one chunk of m pictures in grpo.accumulate_gradient, LDAM having fired."""
    # what the rollout has left: its latents, and the reference's means
    B, K = cfg.num_groups * cfg.group_size, cfg.num_steps
    rolled = torch.zeros(2 * K + 1, B, *model.preset.latent_shape)                      # (2 K + 1, B, ...)
    layers = perturbed_layers(["aesthetic"], model.preset.lim.vlm_layers)
    perturbation = Perturbation(1.0, layers, keys=[(i,) for i in range(m)])

    # one moment: all conditions, and the chunk forward and backward
    prefix = model.encode_prefix(["prompt"] * cfg.num_groups + [None])
    roots = encode_conditions(model, prefix, perturbation, cfg)
    leaves = tuple(c.detach().requires_grad_() for c in roots)
    noise = perturbation.noise(slice(m), model)
    kv = chunk_kv(model, leaves, slice(1), noise, cfg.guidance_scale, cfg)
    x = rolled[0, :1].expand(m, -1, -1, -1)                                             # (m, C, h, w)
    velocity(model.dit, kv, x, 0.5, cfg).square().mean().backward()
    del kv, noise
    yield

    # the other: back through LIM and VLM
    used = [(root, leaf.grad) for root, leaf in zip(roots, leaves) if leaf.grad is not None]
    torch.autograd.backward(*zip(*used))
    yield


@torch.no_grad()
def rolled_out(model: ParaUni, cfg: GRPOConfig) -> Iterator[None]:
    """Stage III before the update, LDAM at rest: prompts; conditions; keys and values of one group; a step of
    one picture; decoding all pictures."""
    x = torch.zeros(cfg.num_groups * cfg.group_size, *model.preset.latent_shape)        # (B, C, h, w)
    prefix = model.encode_prefix(["prompt"] * cfg.num_groups + [None])
    yield
    conditions = encode_conditions(model, prefix, Perturbation(0.0, [], []), cfg)
    yield
    kv = chunk_kv(model, conditions, slice(1), [], cfg.guidance_scale, cfg)
    yield
    velocity(model.dit, kv, x[:1], 0.5, cfg)
    yield
    with precision(model.device, cfg.dtype):
        model.decode(x)
    yield


# ----------------------------------------------------------------------------- the plan of a stage

@dataclass(frozen=True)
class Plan:
    """One stage of one preset. Bytes are of one device that holds everything."""
    stage: int
    trained: int                        # parameters
    frozen: int
    flops_image: float                  # per picture of a step
    images: int                         # pictures a step, over all devices
    frozen_bytes: float                 # weights
    # weights, gradients, AdamW's two moments, EMA; in stage III the reference
    trained_bytes: float
    # without and with checkpointing: of each moment the bytes alive with one picture, and what each further
    # picture adds; the largest moment counts
    alive: list[list[tuple[float, float]]]
    group_size: int                     # pictures of a prompt: a micro-batch divides it, or is a multiple
    rewards_bytes: float = 0.0          # of stage III; nano's own weigh nothing

    def activations(self, m: int, checkpointing: bool = False) -> float:
        return max(one + more * (m - 1) for one, more in self.alive[checkpointing])

    def memory(self, m: int, checkpointing: bool = False) -> float:
        """Bytes on a device with m pictures a micro-batch."""
        weights = self.frozen_bytes + self.rewards_bytes + self.trained_bytes
        return weights + self.activations(m, checkpointing) + RESERVE

    def largest(self, limit: float, checkpointing: bool = False) -> int:
        """The largest micro-batch that fits into so many bytes, 0 if none does."""
        whole = [m for m in range(1, MOST + 1) if m % self.group_size == 0 or self.group_size % m == 0]
        return max([m for m in whole if self.memory(m, checkpointing) <= limit], default=0)


def recipe(preset: Preset, stage: int) -> TrainConfig | GRPOConfig:
    config = GRPOConfig if stage == 3 else TrainConfig
    return replace(config(stage=stage, **preset.recipes.get(stage, {})), dtype="bf16")


def plan(model: ParaUni, cfg: TrainConfig | GRPOConfig, devices: int) -> Plan:
    """Measure a stage, whose work is shared by some devices."""
    model.requires_grad_(False)
    if cfg.stage == 3:
        work, copies, group_size = reinforced, 6, cfg.group_size
        images = cfg.num_groups * group_size
        # one device has a part of an epoch
        cfg = replace(cfg, num_groups=max(1, cfg.num_groups // devices))
        rollout_flops, rollout_peaks = measure(rolled_out(model, cfg))
    else:
        work, copies, group_size = supervised, 5, 1
        images, rollout_peaks = cfg.batch_size, []
    trained = sum(p.numel() for p in model.trainable(cfg.stage).values())
    # AdamW's step takes one more copy of what is trained
    fixed = [(peak, 0.0) for peak in (*rollout_peaks, 4.0 * trained)]

    # memory grows along a straight line through two sizes of a micro-batch
    alive, further = [], MANY - 1
    for checkpointing in (True, False):
        params = make_trainable(replace(cfg, gradient_checkpointing=checkpointing), model)
        # gradients are there from the first micro-batch on
        for p in params.values():
            p.grad = torch.zeros_like(p)
        one, peaks = measure(work(model, cfg, 1))
        many, more_peaks = measure(work(model, cfg, MANY))
        grows = [(few, (more - few) / further) for few, more in zip(peaks, more_peaks)]
        alive.insert(0, fixed + grows)

    flops = (many[0] - one[0]) / further
    if cfg.stage == 3:
        _, condition, kv, step, decode = rollout_flops
        B, K = cfg.num_groups * group_size, cfg.num_steps
        # shared by all pictures: conditions with gradient, and those of policy and reference in the rollout
        shared = sum(one) - flops + 2 * condition
        # at rest, keys and values and their gradient are a group's and not a picture's
        update = flops - 3 * kv
        forwards = K + (K - 1 if any(cfg.kl_coef) else 0)
        flops = (shared + decode) / B + forwards * step + (K - 1) * cfg.inner_updates * update

    frozen = [p for p in model.parameters() if not p.requires_grad]
    return Plan(cfg.stage, trained, sum(p.numel() for p in frozen), flops, images,
                sum(p.nbytes for p in frozen), 4 * trained * copies, alive, group_size,
                REWARDS if cfg.stage == 3 and not model.preset.shapes_world else 0.0)


# ----------------------------------------------------------------------------- tables

def gb(*sizes: float) -> str:
    return " / ".join(f"{size / GB:.1f}" for size in sizes)


def fits(p: Plan, limit_gb: int) -> str:
    """The largest micro-batch that fits, without checkpointing if any does."""
    if m := p.largest(limit_gb * GB):
        return f"{m}"
    m = p.largest(limit_gb * GB, checkpointing=True)
    return f"{m} `--gradient-checkpointing`" if m else "no"


def main(argv: list[str] | None = None) -> None:
    cfg = parse_config(PlanConfig, argv, description=__doc__.splitlines()[0])
    costs, memory, fit = [], [], []
    for name in cfg.presets:
        with FakeTensorMode():
            model = build(PRESETS[name])
            plans = [plan(model, recipe(model.preset, stage), cfg.devices) for stage in STAGES]
        for p in plans:
            label = f"{name}, {p.stage} {STAGES[p.stage]}"
            costs.append({"preset, stage": label,
                          "trained": f"{p.trained / 1e6:,.0f} M",
                          "frozen": f"{p.frozen / 1e6:,.0f} M",
                          "TFLOPs an image": f"{p.flops_image / 1e12:,.1f}",
                          "images a step": f"{p.images:,}",
                          "PFLOPs a step": f"{p.flops_image * p.images / 1e15:,.2f}"})
            memory.append({"GB on a device": label,
                           "frozen weights": gb(p.frozen_bytes + p.rewards_bytes),
                           "what is trained, with its states": gb(p.trained_bytes),
                           "activations of 1 / 8 images": gb(p.activations(1), p.activations(8)),
                           "the same, checkpointing": gb(p.activations(1, True), p.activations(8, True)),
                           "total of 1": gb(p.memory(1))})
            fit.append({f"largest micro-batch, {cfg.devices} devices": label,
                        "24 GB": fits(p, 24),
                        "40 GB": fits(p, 40),
                        "80 GB": fits(p, 80)})
    print(table(costs), table(memory), table(fit), sep="\n\n")


if __name__ == "__main__":
    run(main)
