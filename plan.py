"""What training needs: parameters, FLOPs and memory of each stage of each preset, without a GPU or a weight.

    python plan.py                                      the three full-size presets, as tables in markdown
    python plan.py --presets l-1024 --devices 32 --out plan.md

How. The parts of the model are built of fake tensors, which have a shape and a dtype and no memory, and run
forward and backward in train.py's precision on CUDA (frozen VLM in bf16, all else in fp32, matrix products in
bf16). Every FLOP of a matrix product or convolution is counted, and every byte from the moment a tensor is
made until nothing refers to it any more. Layers are alike, so a stack is measured with two and with three of
them, and the difference is one layer. Left out: the reward models, which are small, and in stages 1 and 2
the autoencoder, whose latents come from a cache; RESERVE stands for the CUDA context and fragments.

Letters: B conditions, m pictures of a micro-batch, L VLM layers, N queries, S prompt tokens, D VLM width,
E condition width, C H W latent.
"""
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from common import knob, parse_config, run_main

GB = 1e9
RESERVE = 1.5                           # GB a device keeps for the CUDA context and fragments
DEVICES_GB = (24, 40, 80)
MOST = 64                               # pictures of a micro-batch that anyone would ask for
PROMPT_TOKENS = 128                     # the longest prompt of training
STAGES = {1: "align", 2: "fine-tune", 3: "reinforce"}


@dataclass(frozen=True)
class PlanConfig:
    presets: tuple[str, ...] = knob(("b-512", "l-512", "l-1024"), "which presets")
    devices: int = knob(8, "devices that share the work")
    out: str = knob("", "file for the tables; empty: print them")

    def __post_init__(self) -> None:
        from model import PRESETS
        if unknown := [name for name in self.presets if name not in PRESETS]:
            raise ValueError(f"expected --presets of {', '.join(PRESETS)}, got {unknown[0]}")
        if self.devices < 1:
            raise ValueError(f"expected --devices of at least 1, got {self.devices}")


@dataclass(frozen=True)
class Cost:
    """Of one pass; sums, differences and multiples of costs are costs."""
    flops: float = 0.0                  # 2 for a multiplication and an addition
    kept: float = 0.0                   # bytes alive when the forward pass ends
    peak: float = 0.0                   # most bytes alive at any moment, gradients of parameters left out

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.kept + other.kept, self.peak + other.peak)

    def __mul__(self, n: float) -> "Cost":
        return Cost(self.flops * n, self.kept * n, self.peak * n)


def extend(measure: Callable[[int], Cost], n: int, first: int = 2) -> Cost:
    """The cost at n from those at `first` and one more: cost is a straight line in n."""
    low = measure(first)
    return low if n == first else low + (measure(first + 1) + low * -1) * (n - first)


# ----------------------------------------------------------------------------- measuring on fake tensors

def make_meter():
    """A dispatch mode that follows the bytes of all storages made while it is on: .alive, .peak."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    import torch

    def storages(tree: object) -> list:
        return [t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]

    class Meter(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.alive, self.peak, self.seen = 0, 0, weakref.WeakSet()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):    # the signature is torch's
            given = {id(storage) for storage in storages((args, kwargs))}       # views and in-place results
            out = func(*args, **(kwargs or {}))
            for storage in storages(out):
                if id(storage) not in given:
                    self.count(storage)
            return out

        def count(self, storage) -> None:
            if storage in self.seen:
                return
            size = storage.nbytes()
            self.seen.add(storage)
            self.alive += size
            self.peak = max(self.peak, self.alive)
            weakref.finalize(storage, self.free, size)

        def free(self, size: int) -> None:
            self.alive -= size

    return Meter()


def run(forward: Callable, backward: bool) -> Cost:
    """The cost of forward() under bf16 autocast, and of its backward pass."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    meter = make_meter()
    counter = FlopCounterMode(display=False,
                              custom_mapping={torch.ops.aten.convolution_backward: conv_backward_flops})
    with meter, counter:
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(backward):
            out = forward()
        kept = meter.alive
        if backward:
            out.float().sum().backward()
    return Cost(counter.get_total_flops(), kept, meter.peak)


def conv_backward_flops(grad: list[int], x: list[int], weight: list[int], *more: object,
                        out_shape: object) -> int:
    """torch's own formula takes a depthwise convolution for a dense one where its weight has a gradient."""
    *_, output_mask = more
    return 2 * math.prod(grad) * math.prod(weight[1:]) * sum(output_mask[:2])


def with_grads(module):
    """Gradients from the start, as in all micro-batches but the first; what is measured adds to them."""
    import torch
    for p in module.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p)
    return module


@cache
def condition_cost(preset, B: int, checkpointing: bool) -> Cost:
    """B prompts to conditions: the frozen VLM, prompt without and queries with gradient, then the LIM."""
    import torch
    from model import ParaUni, Prefix, build_vlm

    def measure(L: int) -> Cost:
        small = replace(preset, vlm=replace(preset.vlm, num_layers=L, vision_layers=1),
                        dit=replace(preset.dit, num_layers=1))
        model = ParaUni(small, build_vlm(small.vlm), None)
        model.lim.gradient_checkpointing = checkpointing
        with_grads(model.lim)
        embeds = torch.zeros(B, PROMPT_TOKENS, preset.vlm.width, dtype=model.vlm.dtype)

        def forward() -> torch.Tensor:
            with torch.no_grad():
                cache = model.vlm.model.language_model(inputs_embeds=embeds, use_cache=True).past_key_values
            prefix = Prefix([(layer.keys, layer.values) for layer in cache.layers],
                            torch.ones(B, PROMPT_TOKENS, dtype=torch.long))
            return model.fuse(model.condition_layers(prefix))
        return run(forward, backward=True)
    return extend(measure, preset.vlm.num_layers)


@cache
def dit_cost(preset, m: int, trained: bool, checkpointing: bool, backward: bool = True) -> Cost:
    """m rows through the DiT, with gradient to their conditions, and to its weights if they are trained."""
    import torch
    from dit import DiT

    def measure(num_layers: int) -> Cost:
        dit = DiT(replace(preset.dit, num_layers=num_layers)).requires_grad_(trained)
        dit.gradient_checkpointing = checkpointing
        with_grads(dit)
        x, t = torch.zeros(m, *preset.latent_shape), torch.zeros(m)
        c = torch.zeros(m, preset.num_queries, preset.lim.caption_channels, requires_grad=backward)
        if backward:
            c.grad = torch.zeros_like(c)
        return run(lambda: dit(x, t, c), backward)
    return extend(measure, preset.dit.num_layers)


def decode_cost(preset) -> Cost:
    """Latents to one picture, in fp32."""
    import torch
    from vae import DCAE
    vae = DCAE(preset.vae).requires_grad_(False)
    z = torch.zeros(1, *preset.latent_shape)
    with torch.autocast("cpu", enabled=False):
        return run(lambda: vae.decode(z), backward=False)


# ----------------------------------------------------------------------------- what a preset is made of

def parameters(preset) -> dict[str, int]:
    """Part -> number of parameters, counted on the meta device."""
    import torch
    from model import ParaUni, build_vlm
    with torch.device("meta"):
        model = ParaUni(preset, build_vlm(preset.vlm), None)
    sizes = {part: sum(p.numel() for p in getattr(model, part).parameters())
             for part in ("vlm", "lim", "dit", "vae")}
    return sizes | {"lim": sizes["lim"] + model.queries.numel()}


@dataclass(frozen=True)
class Plan:
    """One stage of one preset. Bytes are of one device that holds everything (DDP)."""
    stage: int
    trained: int                        # parameters
    frozen: int
    flops_image: float                  # per picture of a step
    images: int                         # pictures a step, over all devices
    weights: float                      # bytes: frozen parts, and trained ones in fp32
    frozen_weights: float               # of these, the bytes that FSDP does not split
    states: float                       # bytes: gradients, AdamW's two moments, EMA, in stage 3 the reference
    # checkpointing -> for the condition's pass and the DiT's (bytes at a micro-batch of one picture, bytes
    # that each further picture adds); the larger of the two counts
    activations: dict[bool, list[tuple[float, float]]]

    def alive(self, m: int, checkpointing: bool) -> float:
        return max(one + more * (m - 1) for one, more in self.activations[checkpointing])

    def memory(self, m: int, checkpointing: bool, shards: int = 1) -> float:
        """Bytes on each device with m pictures a micro-batch; shards: devices that split what is trained."""
        split = self.weights - self.frozen_weights + self.states
        return self.frozen_weights + split / shards + self.alive(m, checkpointing) + RESERVE * GB

    def largest(self, limit_gb: float, checkpointing: bool, shards: int = 1) -> int:
        """The largest micro-batch that fits, 0 if none does, and no more than MOST."""
        m = 0
        while m < MOST and self.memory(m + 1, checkpointing, shards) <= limit_gb * GB:
            m += 1
        return m


def plan(preset, stage: int, recipe: dict, devices: int) -> Plan:
    """Measure a stage with the numbers of train.py's recipe."""
    from train import TrainConfig
    cfg = replace(TrainConfig(), **recipe)
    n = parameters(preset)
    trained = n["lim"] + (n["dit"] if stage > 1 else 0)
    frozen = sum(n.values()) - trained
    width = {"bfloat16": 2, "float32": 4}[preset.vlm.dtype]
    frozen_weights = width * n["vlm"] + 4 * (n["dit"] if stage == 1 else n["vae"] if stage == 3 else 0)
    states = 4 * trained * (1 + 2 + 1 + (stage == 3))
    if stage < 3:
        flops, activations, images = supervised(preset, stage)
    else:
        flops, activations, images = reinforced(preset, cfg, devices)
    return Plan(stage, trained, frozen, flops, images or cfg.batch_size, frozen_weights + 4 * trained,
                frozen_weights, states, activations)


def supervised(preset, stage: int) -> tuple[float, dict, int]:
    """Stages 1 and 2: each picture has its own prompt; condition and DiT are one graph."""
    activations = {}
    for checkpointing in (False, True):
        def at(m: int, checkpointing: bool = checkpointing) -> tuple[Cost, Cost]:
            return (condition_cost(preset, m, checkpointing), dit_cost(preset, m, stage > 1, checkpointing))
        (c1, d1), (c2, d2) = at(1), at(2)
        both = c1.kept + d1.peak
        activations[checkpointing] = [(c1.peak, c2.peak - c1.peak), (both, c2.kept + d2.peak - both)]
        if not checkpointing:
            flops = c1.flops + d1.flops
    return flops, activations, 0


def reinforced(preset, cfg, devices: int) -> tuple[float, dict, int]:
    """Stage 3: a group shares one condition; with guidance the DiT runs two rows a picture."""
    G, groups = cfg.group_size, max(1, cfg.num_groups // devices)
    rows, trained_steps = 2 if cfg.guidance_scale > 1 else 1, cfg.num_steps - 1
    activations = {}
    for checkpointing in (False, True):
        def condition(B: int, checkpointing: bool = checkpointing) -> Cost:
            return condition_cost(preset, B, checkpointing)
        all_prompts = extend(condition, groups + 1, 1)          # of a device, at once
        d1, d2 = (dit_cost(preset, rows * m, True, checkpointing) for m in (1, 2))
        activations[checkpointing] = [(all_prompts.peak, 0.0),
                                      (all_prompts.kept + d1.peak, d2.peak - d1.peak)]
        if not checkpointing:
            update = d1.flops
    forward = dit_cost(preset, rows, False, False, backward=False).flops
    reference = trained_steps if cfg.kl_coef > 0 else 0
    condition = condition_cost(preset, 1, False).flops * (groups + 1) / groups
    flops = (forward * (cfg.num_steps + reference) + update * trained_steps * cfg.inner_updates
             + decode_cost(preset).flops + condition / G)
    return flops, activations, cfg.num_groups * G


# ----------------------------------------------------------------------------- tables

def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def fits(p: Plan, limit: int, devices: int) -> str:
    """The gentlest way to fit, and its largest micro-batch."""
    ways = [("", False, 1), (" --gradient-checkpointing", True, 1), (" --fsdp", False, devices),
            (" --fsdp --gradient-checkpointing", True, devices)]
    for flags, checkpointing, shards in ways:
        if (shards == 1 or devices > 1) and (m := p.largest(limit, checkpointing, shards)):
            return f"{m}{f' `{flags.strip()}`' if flags else ''}"
    return "no"


def report(plans: dict[str, list[Plan]], devices: int) -> str:
    """The tables of some presets."""
    costs, memory, fit = [], [], []
    for name, stages in plans.items():
        for p in stages:
            label = f"{name}, {p.stage} {STAGES[p.stage]}"
            costs.append([label, f"{p.trained / 1e6:,.0f} M", f"{p.frozen / 1e6:,.0f} M",
                          f"{p.flops_image / 1e12:,.1f}", f"{p.images:,}",
                          f"{p.flops_image * p.images / 1e15:,.2f}"])
            grads = 4 * p.trained
            memory.append([label, *(f"{x / GB:.1f}" for x in (p.weights, grads, p.states - grads)),
                           *(" / ".join(f"{p.alive(m, on) / GB:.1f}" for m in (1, 8))
                             for on in (False, True)),
                           *(f"{p.memory(1, False, shards) / GB:.1f}" for shards in (1, devices))])
            fit.append([label, *(fits(p, limit, devices) for limit in DEVICES_GB)])
    return "\n\n".join([
        table(["preset, stage", "trained", "frozen", "TFLOPs an image", "images a step", "PFLOPs a step"],
              costs),
        table(["GB on a device", "weights", "gradients", "optimizer, EMA, reference",
               "activations of 1 / 8 images", "the same, checkpointing", "total of 1, DDP",
               f"total of 1, FSDP on {devices}"], memory),
        table([f"largest micro-batch, {devices} devices", *(f"{limit} GB" for limit in DEVICES_GB)], fit)
    ]) + "\n"


def main(argv: list[str] | None = None) -> dict[str, list[Plan]]:
    cfg = parse_config(PlanConfig, {}, argv, __doc__.split("\n")[0])
    from torch._subclasses.fake_tensor import FakeTensorMode
    from model import PRESETS
    from train import RECIPES
    plans = {}
    for name in cfg.presets:
        with FakeTensorMode():
            plans[name] = [plan(PRESETS[name], stage, RECIPES[name][stage], cfg.devices) for stage in STAGES]
    text = report(plans, cfg.devices)
    if cfg.out:
        Path(cfg.out).write_text(text)
    else:
        print(text)
    return plans


if __name__ == "__main__":
    run_main(main)
