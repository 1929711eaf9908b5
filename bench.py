"""Speed and memory, against a limit measured in the same run: the matrix products alone.

    python bench.py --what sample                               pictures/s, seconds a phase, share of the peak
    python bench.py --what stage3 --vs naive                    both in one process, taking turns; the ratio
    python bench.py --what dit --vs diffusers --preset l-1024 --blocks 4 --batch 2 --dtype bf16
    python bench.py --what growth --out docs/growth-nano.png    cost against size, beside the expected line

--what  dit      one forward pass of the DiT, its condition's keys and values included
        step     the same with these given, as in every step of sampling
        dit-train  forward and backward pass
        decode   latents to pictures
        sample   prompts to pictures; with --vs diffusers, conditions to pictures
        stage1, stage2, stage3   one optimizer step (an epoch in stage 3), without reading data
        growth   seconds against tokens, pictures a group, VLM layers, queries, processes
        window   stage 3 with a sliding window of stochastic steps: reward gained per minute
        startup  seconds until train.py --help has answered
        network  bytes and seconds between 1, 8, 64, 512 devices, on paper

Weights are random unless --weights says otherwise: no figure here depends on them. Two sides take turns, the
first one changing from round to round, after a round that does not count; the ratio is that of each round.
Model FLOPs are those of matrix products, attention and convolutions, counted operator by operator in one
untimed eager run. The peak is the best of square products; the matmul bound is the time of exactly the
products that a run makes, each by itself on tensors of the same shape. Memory is the allocator's peak on
CUDA; on a CPU the peak of all live tensors in an eager run, so that it does not depend on the machine.

It is long because each measurement has two sides, ours and a peer's, and none of it is needed to train.

Letters: B pictures, N queries, E condition width, C h w latent, G pictures a group, P groups.
"""
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from common import ROOT, compile_modules, compile_parts, knob, parse_config, run_main
from train import RECIPES

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from grpo import Run
    from model import ParaUni, Preset

WHAT = ("dit", "step", "dit-train", "decode", "sample", "stage1", "stage2", "stage3",
        "growth", "window", "startup", "network")
RIVALS = {"dit": "diffusers", "step": "diffusers", "dit-train": "diffusers", "decode": "diffusers",
          "sample": "diffusers", "stage1": "naive", "stage2": "naive", "stage3": "naive"}


@dataclass(frozen=True)
class BenchConfig:
    what: str = knob("sample", "what to measure; see the head of bench.py", choices=WHAT)
    preset: str = knob("nano", "size of everything")
    weights: str = knob("random", "random, auto (weights/nano), hub, or a folder; --what window takes auto")
    vs: str = knob("", "also measure: diffusers (dit, step, dit-train, decode, sample) or naive (stages)",
                   choices=("", "diffusers", "naive"))
    blocks: int = knob(0, "DiT blocks kept; 0: all")
    vlm_layers: int = knob(0, "VLM layers kept; 0: all")
    batch: int = knob(4, "pictures a run; in stage 3, pictures a forward pass")
    num_groups: int = knob(2, "stage 3: prompts an epoch")
    group_size: int = knob(8, "stage 3: pictures a prompt")
    num_steps: int = knob(10, "sampling steps; published: 20 in sampling, 10 in stage 3")
    guidance_scale: float = knob(4.5, "classifier-free guidance; 1 turns it off")
    dtype: str = knob("auto", "auto: bf16 on CUDA, fp32 on CPU; weights where nothing is trained, else "
                              "matrix products", choices=("auto", "fp32", "bf16"))
    compile: bool = knob(False, "torch.compile, on both sides: the whole DiT; in stages as train.py does")
    gradient_checkpointing: bool = knob(False, "compute activations of LIM and DiT again in backward")
    layer_chunk: int = knob(0, "VLM layers that LIM takes at a time; 0: all")
    rounds: int = knob(5, "runs that count, of each side")
    clock: str = knob("wall", "wall: seconds passed; cpu: seconds of processor time, for a shared machine",
                      choices=("wall", "cpu"))
    threads: int = knob(0, "CPU threads; 0: torch's default")
    steps: int = knob(24, "--what window: updates for each window")
    seed: int = knob(0, "all randomness is derived from it")
    out: str = knob("", "JSON file for the figures; --what growth: picture of the curves, JSON beside it")

    def __post_init__(self) -> None:
        for name in ("batch", "num_groups", "rounds", "steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected --{name.replace('_', '-')} of at least 1, "
                                 f"got {getattr(self, name)}")
        if self.what == "window" and self.preset != "nano":
            raise ValueError(f"--what window trains --preset nano, got {self.preset}")
        if self.vs and RIVALS.get(self.what) != self.vs:
            raise ValueError(f"expected --vs {RIVALS.get(self.what, 'nothing')} with --what {self.what}, "
                             f"got {self.vs}")


# ----------------------------------------------------------------------------- measuring

class Clock:
    """Seconds of the phases of one run."""

    def __init__(self, kind: str = "wall") -> None:
        self.now = time.process_time if kind == "cpu" else time.perf_counter
        self.seconds: dict[str, float] = {}
        self.last = self.now()

    def mark(self, phase: str) -> None:
        """All that was done since the last mark was `phase`."""
        import torch
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = self.now()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        self.last = now


Side = Callable[[Clock], None]


def alternate(sides: dict[str, Side], rounds: int, clock: str = "wall") -> dict[str, list[dict[str, float]]]:
    """Seconds of every phase and round of each side; the sides take turns, and turns in going first."""
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name in list(sides)[::-1 if turn % 2 else 1]:
            timer = Clock(clock)
            sides[name](timer)
            timer.mark("rest")
            if turn:                                                    # the first round warms up
                seconds[name].append(timer.seconds)
    return seconds


@dataclass(frozen=True)
class Cost:
    """What one run does, whatever it is timed at."""
    flops: int                      # of matrix products, attention and convolutions
    memory: int                     # bytes, peak above what was alive before
    products: Counter               # shape, stride and dtype of two matrices, or stacks -> how often


def count(run: Callable[[], None], device: "torch.device") -> Cost:
    """Count one eager run, operator by operator."""
    import weakref
    import torch
    from torch import Tensor
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torch.utils.flop_counter import flop_registry
    aten, products, alive, now, peak, flops = torch.ops.aten, Counter(), set(), 0, 0, 0

    def attended(q: Tensor, k: Tensor, v: Tensor) -> int:
        return 2 * q[..., 0].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])

    def convolved(x: Tensor, weight: Tensor, out: Tensor, transposed: bool) -> int:
        return 2 * weight[0].numel() * (x if transposed else out).numel()

    def free(key: int, size: int) -> None:
        nonlocal now
        alive.discard(key)
        now -= size

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal now, peak, flops
            kind, kwargs = func.overloadpacket, kwargs or {}
            given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs))
                     if isinstance(t, torch.Tensor)}
            if kind in (aten.mm, aten.addmm, aten.bmm, aten.baddbmm):
                matrices = [a for a in args if isinstance(a, torch.Tensor)][-2:]
                products[tuple((tuple(m.shape), m.stride(), m.dtype) for m in matrices)] += 1
            out = func(*args, **kwargs)
            if kind is aten.convolution:
                flops += convolved(args[0], args[1], out, args[6])
            elif kind is aten.convolution_backward:     # trap: the registered formula forgets the groups
                flops += sum(args[10][:2]) * convolved(args[1], args[2], args[0], args[7])
            elif "scaled_dot_product" in kind.__name__:         # whatever the kernel
                back = "backward" in kind.__name__              # five products, where forward takes two
                flops += 5 * attended(*args[1:4]) // 2 if back else attended(*args[:3])
            elif kind in flop_registry:
                flops += flop_registry[kind](*args, **kwargs, out_val=out)
            for tensor in tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    key, size = storage._cdata, storage.nbytes()
                    if key not in alive and key not in given:
                        alive.add(key)
                        now += size
                        peak = max(peak, now)
                        weakref.finalize(storage, free, key, size)
            return out

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with Watch():
        run()
    memory = torch.cuda.max_memory_allocated() - before if device.type == "cuda" else peak
    return Cost(flops, memory, products)


def best_seconds(work: Callable[[], object], kind: str, repeats: int = 5) -> float:
    """The least of a few timings, after one that does not count."""
    work()
    seconds = []
    for _ in range(repeats):
        timer = Clock(kind)
        work()
        timer.mark("all")
        seconds.append(timer.seconds["all"])
    return min(seconds)


def matmul_peak(device: "torch.device", dtype: "torch.dtype", kind: str) -> float:
    """FLOP/s of square matrix products, the best of three sizes."""
    import torch
    rates = []
    for n in (4096, 8192, 16384) if device.type == "cuda" else (512, 1024, 2048):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        rates.append(2 * n ** 3 / best_seconds(lambda a=a, b=b: a @ b, kind))
    return max(rates)


def matmul_seconds(products: Counter, device: "torch.device", kind: str) -> float:
    """The matmul bound: each counted product by itself, times how often it was made."""
    import torch
    total = 0.0
    for matrices, times in products.items():
        a, b = (torch.empty_strided(shape, stride, dtype=dtype, device=device) if 0 not in stride
                else torch.empty(shape, dtype=dtype, device=device) for shape, stride, dtype in matrices)
        a.normal_()
        b.normal_()
        with torch.no_grad():
            total += times * best_seconds(lambda a=a, b=b: a @ b, kind, 3)
    return total


# ----------------------------------------------------------------------------- what is measured

@dataclass(frozen=True)
class Work:
    sides: dict[str, Side]              # "ours" first
    pictures: int                       # a run makes, or learns from


def load(cfg: BenchConfig, preset: "Preset | None" = None) -> "ParaUni":
    """The model, cut to --blocks and --vlm-layers where they are given."""
    import torch
    from model import NANO_WEIGHTS, PRESETS, ParaUni, load_tokenizer
    full = PRESETS[cfg.preset]
    preset = preset or replace(
        full, vlm=replace(full.vlm, num_layers=cfg.vlm_layers or full.vlm.num_layers),
        dit=replace(full.dit, num_layers=cfg.blocks or full.dit.num_layers))
    if cfg.weights != "random" and preset != full:
        raise ValueError("--blocks and --vlm-layers cut a model down: they need --weights random, "
                         f"got {cfg.weights}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if preset == full:
        model = ParaUni.from_preset(cfg.preset, cfg.weights, cfg.seed, device)
    else:
        model = ParaUni._random(preset, cfg.seed, torch.float32).to(device)
        if cfg.preset == "nano":
            model.tokenizer = load_tokenizer(preset.vlm, NANO_WEIGHTS / "vlm")
    model.lim.gradient_checkpointing = model.dit.gradient_checkpointing = cfg.gradient_checkpointing
    model.lim.layer_chunk = cfg.layer_chunk
    return model


def draw(cfg: BenchConfig, name: str, shape: tuple[int, ...], device: "torch.device") -> "Tensor":
    from common import generator
    from dit import randn
    return randn(shape, generator(cfg.seed, "bench", name), device)


def captions(number: int) -> list[str]:
    """Distinct prompts, as far as there are any."""
    from data import nano_prompts
    texts = nano_prompts(test=False)
    return [texts[i % len(texts)] for i in range(number)]


def dit_work(cfg: BenchConfig) -> Work:
    """One pass of the DiT: forward, forward with keys and values given, or forward and backward."""
    import torch
    from dit import DiT
    from common import generator
    from model import PRESETS
    from naive import diffusers_dit, velocity
    preset, B = PRESETS[cfg.preset], cfg.batch
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dit = DiT(replace(preset.dit, num_layers=cfg.blocks or preset.dit.num_layers))
    dit.init_weights(generator(cfg.seed, "dit"))
    dit.to(device, torch.bfloat16 if cfg.dtype == "bf16" else torch.float32)
    dit.gradient_checkpointing = cfg.gradient_checkpointing
    train = cfg.what == "dit-train"
    dit.requires_grad_(train)
    x = draw(cfg, "x", (B, *preset.latent_shape), device).to(dit.dtype)                      # (B, C, h, w)
    c = draw(cfg, "c", (B, preset.num_queries, preset.dit.caption_channels), device).to(dit.dtype)
    t = torch.linspace(0.1, 0.9, B, device=device)                                      # (B,)
    velocities = {"ours": (dit, lambda kv: dit(x, t, kv=kv) if cfg.what == "step" else dit(x, t, c))}
    if cfg.vs:
        theirs = diffusers_dit(dit)
        velocities["diffusers"] = theirs, lambda kv: velocity(theirs, x, t, c)
    if cfg.compile:
        compile_modules(*(module for module, _ in velocities.values()))
    with torch.no_grad():
        kv = dit.cross_kv(c)

    def side(module, forward) -> Side:
        def run(clock: Clock) -> None:
            with torch.set_grad_enabled(train), kernels(cfg, train and module is dit):
                v = forward(kv)
            clock.mark("forward")
            if train:
                module.zero_grad(set_to_none=True)
                v.float().square().mean().backward()
                clock.mark("backward")
        return run
    return Work({name: side(*pair) for name, pair in velocities.items()}, B)


def kernels(cfg: BenchConfig, trains: bool) -> AbstractContextManager:
    """Ours trains as train.py does, which picks the attention kernel whose gradient is fast; as that choice
    stays, the other side gets torch's own back."""
    import torch
    from common import precision
    return precision("cuda" if torch.cuda.is_available() else "cpu", cfg.dtype if trains else "fp32")


def decode_work(cfg: BenchConfig) -> Work:
    """Latents to pictures."""
    import torch
    from common import generator
    from model import PRESETS
    from vae import DCAE
    preset = PRESETS[cfg.preset]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = DCAE(preset.vae)
    vae.init_weights(generator(cfg.seed, "vae"))
    vae.to(device, torch.bfloat16 if cfg.dtype == "bf16" else torch.float32).requires_grad_(False)
    z = draw(cfg, "z", (cfg.batch, *preset.latent_shape), device).to(next(vae.parameters()).dtype)
    decoders = {"ours": vae.decode}
    if cfg.vs:
        theirs = diffusers_vae(vae)
        decoders["diffusers"] = lambda z: theirs.decode(z / preset.vae.scaling_factor).sample

    def side(decode) -> Side:
        def run(clock: Clock) -> None:
            with torch.no_grad():
                decode(z)
            clock.mark("decode")
        return run
    return Work({name: side(decode) for name, decode in decoders.items()}, cfg.batch)


def diffusers_vae(vae: "torch.nn.Module") -> "torch.nn.Module":
    """diffusers' DC-AE on the same weights."""
    import torch
    from diffusers import AutoencoderDC
    with torch.device("meta"):
        theirs = AutoencoderDC(**vae.config.to_json())
    theirs.load_state_dict(vae.state_dict(), assign=True)
    return theirs.requires_grad_(False)


def sample_work(cfg: BenchConfig) -> Work:
    """Prompts to pictures. Against diffusers' pipeline both sides start from the same conditions."""
    import torch
    from dit import sample_ode
    model = load(cfg).requires_grad_(False)
    kind = torch.bfloat16 if cfg.dtype == "bf16" else torch.float32
    model.dit.to(kind)
    model.lim.to(kind)
    model.queries.data = model.queries.data.to(kind)
    prompts = captions(cfg.batch)
    noise = draw(cfg, "noise", (cfg.batch, *model.preset.latent_shape), model.device)   # (B, C, h, w)
    with torch.no_grad():
        given = model.condition(prompts), model.condition([None])                       # (B, N, E), (1, N, E)
    if cfg.compile:
        compile_modules(model.dit)

    def ours(clock: Clock) -> None:
        with torch.no_grad():
            c, c_uncond = given if cfg.vs else (model.condition(prompts), model.condition([None]))
            clock.mark("condition")
            z = sample_ode(model.dit, noise, c, c_uncond, cfg.num_steps, cfg.guidance_scale)
            clock.mark("denoise")
            model.decode(z)
            clock.mark("decode")
    if not cfg.vs:
        return Work({"ours": ours}, cfg.batch)
    from diffusers import DPMSolverMultistepScheduler, SanaPipeline
    from naive import diffusers_dit
    theirs = diffusers_dit(model.dit)
    if cfg.compile:
        compile_modules(theirs)
    solver = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True,
                                         flow_shift=3.0)
    pipe = SanaPipeline(None, None, diffusers_vae(model.vae), theirs, solver)
    pipe.set_progress_bar_config(disable=True)
    c, c_uncond = given[0].to(kind), given[1].expand_as(given[0]).to(kind)
    mask = torch.ones(c.shape[:2], device=c.device)                                     # (B, N)

    def pipeline(clock: Clock) -> None:
        side = model.preset.image_size
        pipe(prompt_embeds=c, prompt_attention_mask=mask, negative_prompt=None,
             negative_prompt_embeds=c_uncond, negative_prompt_attention_mask=mask, latents=noise, height=side,
             width=side, num_inference_steps=cfg.num_steps, guidance_scale=cfg.guidance_scale,
             use_resolution_binning=False, output_type="pt")
        clock.mark("all")
    return Work({"ours": ours, "diffusers": pipeline}, cfg.batch)


def supervised_work(cfg: BenchConfig) -> Work:
    """An optimizer step of stage 1 or 2: a caption a picture, all different, one of them dropped."""
    import torch
    from common import adamw, precision
    from dit import flow_matching_loss
    from naive import peer_of, stage1_loss
    model, B = load(cfg), cfg.batch
    model.requires_grad_(False)
    for p in model.trainable(stage := int(cfg.what[-1])).values():
        p.requires_grad_(True)
    said = [None, *captions(B - 1)]
    x0, noise = (draw(cfg, name, (B, *model.preset.latent_shape), model.device)         # (B, C, h, w)
                 for name in ("x0", "noise"))
    t = torch.linspace(0.1, 0.9, B, device=model.device)                                # (B,)

    def updater(learner: "ParaUni") -> Callable[[Clock, "Tensor"], None]:
        params = list(learner.trainable(stage).values())
        opt = adamw(params, 1e-6, 0.05)

        def update(clock: Clock, loss: "Tensor") -> None:
            opt.zero_grad(set_to_none=True)
            loss.backward()
            clock.mark("backward")
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            opt.step()
            clock.mark("optimizer")
        return update

    update = updater(model)

    def ours(clock: Clock) -> None:
        prefix = model.encode_prefix(said, max_tokens=model.preset.train_tokens)
        clock.mark("prefix")
        with precision(model.device, cfg.dtype):
            c = model.fuse(model.condition_layers(prefix))                              # (B, N, E)
            clock.mark("condition")
            loss = flow_matching_loss(model.dit, x0, c, t, noise)
        clock.mark("dit")
        update(clock, loss)
    sides = {"ours": ours}
    if cfg.vs:
        peer = peer_of(model)
        update_peer = updater(peer)
        if cfg.compile:
            compile_parts(model.device, peer.lim, peer.dit)

        def naive(clock: Clock) -> None:
            loss = stage1_loss(peer, x0, said, t, noise, cfg.dtype)
            clock.mark("forward")
            update_peer(clock, loss)
        sides["naive"] = naive
    if cfg.compile:
        compile_parts(model.device, model.lim, model.dit)
    return Work(sides, B)


def brightness(images: "Tensor", prompts: list[str]) -> "Tensor":
    """A reward that costs nothing: the mean of each picture (B, 3, H, W)."""
    return images.mean((1, 2, 3))


@contextmanager
def stage3_run(cfg: BenchConfig, model: "ParaUni") -> Iterator["Run"]:
    """Stage III, ready for run_epoch; its files lie in a temporary folder."""
    import grpo
    from common import setup_dist
    from train import parse
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.txt"
        prompts.write_text("\n".join(captions(64)))
        settings = replace(
            parse(["--stage", "3", "--preset", cfg.preset]), run_dir=folder, prompts=str(prompts),
            eval_prompts=str(prompts), rewards=(f"{Path(__file__).resolve()}:brightness",), ldam=False,
            num_groups=cfg.num_groups, group_size=cfg.group_size, micro_batch=cfg.batch, lr=1e-6,
            num_steps=cfg.num_steps, guidance_scale=cfg.guidance_scale, dtype=cfg.dtype, compile=cfg.compile,
            gradient_checkpointing=cfg.gradient_checkpointing, anchor="recompute", seed=cfg.seed)
        model.requires_grad_(False)
        for p in model.trainable(3).values():
            p.requires_grad_(True)
        yield grpo.start(settings, model, setup_dist())


def stage3_sides(cfg: BenchConfig, run: "Run") -> dict[str, Side]:
    """An epoch as grpo.py does it and, with --vs naive, as its peers would, of the parts that they have."""
    import torch
    from common import adamw, generator
    from grpo import group_advantages, run_epoch
    import naive as peers
    model, settings = run.model, run.cfg

    def ours(clock: Clock) -> None:
        record = run_epoch(run, 0)
        if clock.now is time.perf_counter:
            clock.seconds |= {phase: record[f"time/{phase}"] for phase in ("rollout", "reward", "update")}
            clock.last += sum(clock.seconds.values())
        else:
            clock.mark("epoch")

    if not cfg.vs:
        return {"ours": ours}
    peer, reference = peers.peer_of(model), peers.peer_of(run.reference)
    params = list(peer.trainable(3).values())
    opt = adamw(params, settings.lr, settings.weight_decay)
    if cfg.compile:
        compile_parts(model.device, *(part for each in (peer, reference) for part in (each.lim, each.dit)))

    def naive(clock: Clock) -> None:
        groups = [run.source.draw(0, g) for g in range(cfg.num_groups)]                 # P
        said = [p for p in groups for _ in range(cfg.group_size)]                       # B
        rngs = [generator("picture", cfg.seed, 0, g, m)
                for g in range(cfg.num_groups) for m in range(cfg.group_size)]
        latents, log_probs = peers.rollout(peer, said, rngs, settings)
        clock.mark("rollout")
        scores = next(iter(run.scorers.values()))(model.decode(latents[-1]), said)      # (B,)
        advantages = group_advantages(scores.view(cfg.num_groups, -1)).flatten()        # (B,)
        clock.mark("reward")
        opt.zero_grad(set_to_none=True)
        peers.accumulate_gradient(peer, reference, said, latents, log_probs, advantages, settings)
        torch.nn.utils.clip_grad_norm_(params, settings.clip_norm)
        opt.step()
        clock.mark("update")
    return {"ours": ours, "naive": naive}


# ----------------------------------------------------------------------------- reports

def measure(cfg: BenchConfig, work: Work, device: "torch.device") -> dict:
    """Time and count both sides of a work, print the table, return the figures."""
    import torch
    dtype = torch.bfloat16 if cfg.dtype == "bf16" else torch.float32
    seconds = alternate(work.sides, cfg.rounds, cfg.clock)
    peak, figures = matmul_peak(device, dtype, cfg.clock), {}
    for name, side in work.sides.items():
        runs = [sum(phases.values()) for phases in seconds[name]]
        with torch.compiler.set_stance("force_eager") if cfg.compile else nullcontext():
            cost = count(lambda side=side: side(Clock(cfg.clock)), device)
        figures[name] = {
            "seconds": median(runs), "fastest": min(runs), "slowest": max(runs),
            "phases": {phase: median(r[phase] for r in seconds[name]) for phase in seconds[name][0]},
            "pictures_per_second": work.pictures / median(runs), "gflop": cost.flops / 1e9,
            "share_of_peak": cost.flops / median(runs) / peak, "peak_memory_gb": cost.memory / 1e9}
        if cfg.what in ("dit", "step", "dit-train") and name == "ours":
            bound = matmul_seconds(cost.products, device, cfg.clock)
            figures[name] |= {"matmul_seconds": bound, "share_of_matmul_bound": bound / median(runs)}
    print(f"matmul peak {peak / 1e9:.0f} GFLOP/s ({cfg.dtype})")
    for name, figure in figures.items():
        print_side(name, figure)
    if len(figures) == 2:
        figures |= compare(seconds, figures)
    return {"matmul_peak_gflops": peak / 1e9, **figures}


def print_side(name: str, figure: dict) -> None:
    phases = ", ".join(f"{phase} {s:.3g}" for phase, s in figure["phases"].items() if s > 1e-4)
    print(f"{name:10} {figure['seconds']:.3g} s a run ({figure['fastest']:.3g} - {figure['slowest']:.3g}), "
          f"{figure['pictures_per_second']:.3g} pictures/s: {phases}\n"
          f"{'':10} {figure['gflop']:.4g} GFLOP, {figure['share_of_peak']:.0%} of the peak; "
          f"memory {figure['peak_memory_gb']:.3g} GB"
          + (f"; {figure['share_of_matmul_bound']:.0%} of the matmul bound, {figure['matmul_seconds']:.3g} s"
             if "matmul_seconds" in figure else ""))


def compare(seconds: dict[str, list[dict[str, float]]], figures: dict) -> dict:
    """Theirs over ours: the ratio of each round, median and spread; and of the memory."""
    ours, theirs = seconds
    ratios = [sum(b.values()) / sum(a.values()) for a, b in zip(seconds[ours], seconds[theirs])]
    memory = figures[ours]["peak_memory_gb"] / figures[theirs]["peak_memory_gb"]
    print(f"{theirs} / {ours}: {median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f}); "
          f"memory {ours} / {theirs}: {memory:.2f}")
    return {"ratio": median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios),
            "memory_ratio": memory}


def startup(rounds: int) -> dict:
    """Seconds from the shell to the end of train.py --help."""
    runs = []
    for _ in range(rounds):
        began = time.perf_counter()
        subprocess.run([sys.executable, str(ROOT / "train.py"), "--help"], check=True, capture_output=True)
        runs.append(time.perf_counter() - began)
    print(f"train.py --help {median(runs):.2f} s ({min(runs):.2f} - {max(runs):.2f})")
    return {"seconds": median(runs), "fastest": min(runs), "slowest": max(runs)}


def window_table(cfg: BenchConfig) -> dict:
    """Stage III of nano with windows of stochastic steps: what a minute of training gains."""
    from common import read_metrics
    from train import main as train
    rows = {}
    for size in (0, 3, 1):
        with tempfile.TemporaryDirectory() as folder:
            train(["--stage", "3", "--weights", "auto" if cfg.weights == "random" else cfg.weights,
                   "--run-dir", folder, "--rewards", "aesthetic", "--steps", str(cfg.steps),
                   "--sde-window", str(size), "--save-every", str(cfg.steps), "--eval-every", str(cfg.steps),
                   "--seed", str(cfg.seed)])
            records = read_metrics(Path(folder) / "metrics.jsonl")
        spent = sum(value for r in records for key, value in r.items() if key.startswith("time/"))
        gain = records[-1]["heldout/aesthetic"] - records[0]["heldout/aesthetic"]
        rows[size] = {"seconds": spent, "gain": gain, "gain_per_minute": 60 * gain / spent}
    print("window  seconds  held-out gain  gain a minute")
    for size, row in rows.items():
        print(f"{size or 'all':>6}  {row['seconds']:7.1f}  {row['gain']:13.3f}  "
              f"{row['gain_per_minute']:13.3f}")
    return rows


# ----------------------------------------------------------------------------- growth

def growth_points(cfg: BenchConfig) -> Iterator[tuple[str, int, Side]]:
    """(axis, size, what to time) along every axis but processes."""
    import torch
    from grpo import run_epoch
    from model import PRESETS
    model = load(cfg)
    preset, device = model.preset, model.device
    c = draw(cfg, "c", (cfg.batch, preset.num_queries, preset.dit.caption_channels), device)
    side = preset.latent_shape[1]
    with torch.no_grad():
        kv = model.dit.cross_kv(c)
    for n in (side // 2, side, 2 * side, 4 * side):
        x = draw(cfg, "x", (cfg.batch, preset.latent_shape[0], n, n), device)

        def forward(clock: Clock, x: "Tensor" = x) -> None:
            with torch.no_grad():
                model.dit(x, torch.full((len(x),), 0.5, device=device), kv=kv)
        yield "image tokens", n * n // preset.dit.patch_size ** 2, forward
    for size in (2, 4, 8, 16):
        one = replace(cfg, group_size=size, num_groups=1, batch=min(cfg.batch, size))
        with stage3_run(one, model) as run:
            yield "pictures a group", size, lambda clock, run=run: run_epoch(run, 0)
    full = PRESETS[cfg.preset]
    depth = full.vlm.num_layers if cfg.preset == "nano" else 4
    for layers in (depth // 4, depth // 2, depth):
        yield "VLM layers", layers, condition_side(cfg, replace(
            preset, vlm=replace(preset.vlm, num_layers=layers), dit=replace(preset.dit, num_layers=1)))
    for queries in (full.num_queries // 4, full.num_queries // 2, full.num_queries, 2 * full.num_queries):
        yield "queries", queries, condition_side(cfg, replace(
            preset, num_queries=queries, vlm=replace(preset.vlm, num_layers=2),
            dit=replace(preset.dit, num_layers=1)))


def condition_side(cfg: BenchConfig, preset: "Preset") -> Side:
    """Prefix, queries, LIM and back, for as many prompts as --batch."""
    model = load(cfg, preset)
    model.requires_grad_(False)
    for p in model.trainable(1).values():
        p.requires_grad_(True)
    said = captions(cfg.batch)

    def run(clock: Clock) -> None:
        model.fuse(model.condition_layers(model.encode_prefix(said))).square().mean().backward()
    return run


def growth(cfg: BenchConfig, device: "torch.device") -> dict:
    """Seconds along every axis, beside those that the counted FLOPs predict from the largest size."""
    curves: dict[str, list[dict]] = {}
    for axis, size, side in growth_points(cfg):
        seconds = median(sum(s.values()) for s in alternate({"ours": side}, cfg.rounds, cfg.clock)["ours"])
        flops = count(lambda side=side: side(Clock(cfg.clock)), device).flops
        curves.setdefault(axis, []).append({"size": size, "seconds": seconds, "gflop": flops / 1e9})
    for points in curves.values():
        rate = points[-1]["seconds"] / points[-1]["gflop"]
        for point in points:
            point["expected"] = rate * point["gflop"]
    curves["processes"] = process_points(cfg)
    print(f"{'':18} {'size':>6} {'seconds':>9} {'expected':>9}")
    for axis, points in curves.items():
        for point in points:
            print(f"{axis:18} {point['size']:6} {point['seconds']:9.3g} {point['expected']:9.3g}")
    if cfg.out:
        plot_growth(curves, Path(cfg.out))
    return curves


def process_points(cfg: BenchConfig) -> list[dict]:
    """A stage III epoch of the same pictures on 1 and 2 processes of one thread; expected: half the time."""
    points = []
    for ranks in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            figures = Path(folder) / "figures.json"
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
                       str(ranks), str(ROOT / "bench.py"), "--what", "stage3", "--preset", cfg.preset,
                       "--blocks", str(cfg.blocks), "--vlm-layers", str(cfg.vlm_layers), "--threads", "1",
                       "--num-groups", str(2 * cfg.num_groups), "--group-size", str(cfg.group_size),
                       "--num-steps", str(cfg.num_steps), "--batch", str(cfg.batch), "--dtype", cfg.dtype,
                       "--rounds", str(cfg.rounds), "--clock", cfg.clock, "--out", str(figures)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
            points.append({"size": ranks, "seconds": json.loads(figures.read_text())["ours"]["seconds"]})
            points[-1]["expected"] = points[0]["seconds"] / ranks
    return points


def plot_growth(curves: dict[str, list[dict]], path: Path) -> None:
    """One panel an axis, both scales logarithmic: dots measured, line expected."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(1, len(curves), figsize=(3 * len(curves), 2.8), layout="constrained")
    for axis, (name, points) in zip(axes, curves.items()):
        sizes = [p["size"] for p in points]
        axis.loglog(sizes, [p["expected"] for p in points], color="tab:gray", label="expected")
        axis.loglog(sizes, [p["seconds"] for p in points], "o", color="tab:blue", label="measured")
        axis.set_xticks(sizes, [str(s) for s in sizes], minor=False)
        axis.minorticks_off()
        axis.set(xlabel=name, ylabel="seconds" if axis is axes[0] else "")
    axes[0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


# ----------------------------------------------------------------------------- devices, on paper

@dataclass(frozen=True)
class Network:
    """What `communication` assumes of a cluster; the defaults are H100s, 8 to a machine."""
    per_machine: int = 8                # devices
    inside: float = 300e9               # bytes/s a device sends inside a machine (NVLink, achieved)
    between: float = 40e9               # bytes/s a device sends to another machine (400 Gb/s each, achieved)
    latency: float = 20e-6              # seconds a hop
    rate: float = 400e12                # FLOP/s a device reaches in bf16


def communication(trained: int, flops: float, devices: int, passes: int = 0, forwards: int = 0,
                  network: Network = Network()) -> dict[str, float]:      # noqa: B008  (frozen)
    """Traffic of one optimizer step of a device against its computing time, nothing overlapped.

    trained  parameters with a gradient
    flops    of one device's share of the step; weak scaling, so the same for any number of devices
    passes   0: DDP, one all-reduce of fp32 gradients a step. Else FSDP2: forward and backward passes a step,
             each of which gathers the weights twice in bf16 and reduces and scatters fp32 gradients
    forwards FSDP2: passes without a gradient, which gather the weights once
    A ring sends (n - 1) / n of the data once to gather or to scatter, twice to reduce to all, in n - 1 hops;
    where it leaves the machine, its slowest link sets the pace.
    Returns bytes and seconds a device sends, seconds it computes, and the share of the step spent sending.
    """
    n, split = devices, passes > 0
    sent = trained * ((2 * 2 + 4) * passes + 2 * forwards if split else 2 * 4) * (n - 1) / n
    hops = (n - 1) * (3 * passes + forwards if split else 2)
    bandwidth = network.inside if n <= network.per_machine else network.between
    seconds, computing = sent / bandwidth + hops * network.latency, flops / network.rate
    return {"devices": n, "bytes": sent, "seconds": seconds, "computing": computing,
            "share": seconds / (seconds + computing)}


def stage3_flops(preset: "Preset", pictures: int, num_steps: int, dit_parameters: int) -> float:
    """FLOPs of a stage III epoch in the DiT, where nearly all are: two for each weight and token, three times
    as many with the backward pass; with guidance, every picture counts twice."""
    tokens = preset.latent_shape[1] * preset.latent_shape[2] / preset.dit.patch_size ** 2
    forward = 2 * 2 * dit_parameters * tokens * pictures
    return forward * (num_steps + (num_steps - 1) * (1 + 3))            # rollout; reference and update


def network_table(cfg: BenchConfig) -> dict:
    """communication() of a stage III epoch of Table 1, one group of 24 pictures or more to a device."""
    import torch
    from dit import DiT
    from lim import LIM
    from model import PRESETS
    preset, G, K, micro_batch = PRESETS[cfg.preset], 24, 10, 8
    with torch.device("meta"):
        dit, lim = (sum(p.numel() for p in part.parameters()) for part in (DiT(preset.dit), LIM(preset.lim)))
    trained = dit + lim + preset.num_queries * preset.vlm.width
    chunks, rows = math.ceil(G / micro_batch), {}
    flops = stage3_flops(preset, G, K, dit)
    print(f"{cfg.preset}: {trained / 1e6:.0f} M trained; each device has a group of {G}, {flops:.3g} FLOP")
    print("devices        DDP GB  seconds  share      FSDP GB  seconds  share   computing")
    for n in (1, 8, 64, 512):
        ddp = communication(trained, flops, n)
        fsdp = communication(trained, flops, n, chunks * (K - 1), chunks * (K + K - 1))
        rows[n] = {"ddp": ddp, "fsdp": fsdp}
        print(f"{n:7}  " + "  ".join(f"{r['bytes'] / 1e9:11.4g} {r['seconds']:8.3g} {r['share']:6.1%}"
                                     for r in (ddp, fsdp)) + f"  {ddp['computing']:8.3g} s")
    return rows


# ----------------------------------------------------------------------------- entry

def bench(cfg: BenchConfig, device: "torch.device") -> dict:
    if cfg.what == "growth":
        return growth(cfg, device)
    if cfg.what == "stage3":
        with stage3_run(cfg, load(cfg)) as run:
            return measure(cfg, Work(stage3_sides(cfg, run), cfg.num_groups * cfg.group_size), device)
    work = {"decode": decode_work, "sample": sample_work, "stage1": supervised_work,
            "stage2": supervised_work}.get(cfg.what, dit_work)
    return measure(cfg, work(cfg), device)


def main(argv: list[str] | None = None) -> dict:
    cfg = parse_config(BenchConfig, {name: {} for name in RECIPES}, argv, __doc__.split("\n")[0])
    from common import config_dict, environment, write_json
    alone = {"startup": lambda: startup(cfg.rounds), "window": lambda: window_table(cfg),
             "network": lambda: network_table(cfg)}
    if cfg.what in alone:
        figures = alone[cfg.what]()
    else:
        import torch
        from common import cleanup_dist
        sys.path.append(str(ROOT / "tests"))                            # naive.py, which measures us
        if cfg.threads:
            torch.set_num_threads(cfg.threads)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        cfg = replace(cfg, dtype=("bf16" if device.type == "cuda" else "fp32") if cfg.dtype == "auto"
                      else cfg.dtype)
        print(json.dumps(config_dict(cfg)), json.dumps(environment()), sep="\n", flush=True)
        figures = bench(cfg, device)
        cleanup_dist()
    if cfg.out and os.environ.get("RANK", "0") == "0":
        write_json(Path(cfg.out).with_suffix(".json"), {"config": config_dict(cfg), **figures})
    return figures


if __name__ == "__main__":
    run_main(main)
