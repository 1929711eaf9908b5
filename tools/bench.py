"""Speed and memory, alone or beside another side: diffusers, a naive loop, another checkout of this project.
Commands: docs/speed.md.

--what  dit        a forward pass of the DiT, the condition's keys and values included
        dit-train  forward and backward pass
        decode     latents to pictures
        sample     prompts to pictures; beside diffusers, conditions to pictures
        stage1     an optimizer step of stage I, without reading data
        stage3     an epoch of stage III, by train.py
        window     stage III of nano with a sliding window of stochastic steps: reward gained a minute
--vs    diffusers, for the first four; naive (tests/naive.py), for the stages; or a folder

How. Each side is a process, a worker: none can change what the other finds. It builds its modules and runs
once to warm up; then sides take turns, and turns in going first; a ratio is that of one round, theirs / ours.
One more run, eager and not timed, counts FLOPs and, on a CPU, memory: the peak of all live tensors; on CUDA
it is the allocator's, in a timed run. Memory is what a run takes above what was there before. Weights are
random: no figure depends on them.

Letters: B pictures, N queries, E condition width, C h w latent.
"""
import copy
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

# appended, not inserted: a worker of another checkout has that one on PYTHONPATH, in front of this one
ROOT = Path(__file__).resolve().parent.parent
sys.path += [str(ROOT), str(ROOT / "tools"), str(ROOT / "tests")]

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import naive
import train
from common import (Refused, RunConfig, adamw, compile_parts, environment, generator, knob, make_trainable,
                    parse_config, precision, read_log, resolve, run)
from data import nano_prompts
from dit import DiT, flow_matching_loss, sample_ode
from evaluation import table
from grpo import GRPOConfig, group_advantages
from meter import Meter
from model import PRESETS, ParaUni
from vae import DCAE

RIVALS = {"dit": "diffusers", "dit-train": "diffusers", "decode": "diffusers", "sample": "diffusers",
          "stage1": "naive", "stage3": "naive", "window": ""}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
synchronize = torch.get_device_module(DEVICE).synchronize           # a CPU is not waited for
GB = 1e9


@dataclass(frozen=True)
class BenchConfig:
    what: str = knob("sample", "what is measured", choices=RIVALS)
    vs: str = knob("", "diffusers, naive, or the folder of another checkout")
    preset: str = knob("nano", "size of everything", choices=PRESETS)
    blocks: int = knob(0, "DiT blocks kept; 0: all")
    vlm_layers: int = knob(0, "VLM layers kept; 0: all")
    batch: int = knob(4, "pictures a run; in stage 3, pictures a forward pass")
    num_groups: int = knob(2, "stage 3: prompts an epoch")
    group_size: int = knob(8, "stage 3: pictures a prompt")
    num_steps: int = knob(10, "sampling steps")
    dtype: str = knob("auto", "of weights, in the stages of matrix products; auto: bf16 on CUDA, else fp32",
                      choices=("auto", *DTYPES))
    compile: bool = knob(False, "torch.compile, on both sides, as train.py does it")
    rounds: int = knob(5, "runs of each side that count")
    steps: int = knob(24, "--what window: updates for each window")
    side: str = knob("", "given to workers: which side one is")


def parse(argv: list[str] | None) -> BenchConfig:
    args = parse_config(BenchConfig, argv, description=__doc__.splitlines()[0])
    is_checkout = args.what != "window" and Path(args.vs, "train.py").is_file()
    if args.vs and args.vs != RIVALS[args.what] and not is_checkout:
        takes = f"{RIVALS[args.what]}, or a checkout" if args.what in SIDES else "nothing"
        raise Refused(f"--what {args.what} takes --vs {takes}")
    return replace(args, dtype="bf16" if CUDA else "fp32") if args.dtype == "auto" else args


# ----------------------------------------------------------------------------- a worker

def take_turns() -> Iterator[None]:
    """Waits until it is this side's turn, has a run made (a yield) and reports it."""
    # reports have the pipe for themselves: what training prints goes where errors go
    reports = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for command in sys.stdin:
        # a GPU's memory was the other side's meanwhile; one run that does not count takes it back
        if CUDA:
            yield
            synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        is_counted = command == "count\n"
        if is_counted:
            torch.compiler.set_stance("force_eager")
        with Meter() if is_counted else nullcontext() as meter:
            began = time.perf_counter()
            yield
            synchronize()
            report = {"seconds": time.perf_counter() - began}
        if is_counted:
            report |= {"flops": meter.flops, "memory": meter.peak}
        if CUDA:
            report["memory"] = torch.cuda.max_memory_allocated() - before
            torch.cuda.empty_cache()
        print(json.dumps(report), file=reports, flush=True)
    # the other end is closed
    sys.exit()


def cut(name: str, blocks: int, vlm_layers: int) -> None:
    """A preset keeps only its first layers, or all where the number is 0."""
    preset = PRESETS[name]
    dit = replace(preset.dit, num_layers=blocks or preset.dit.num_layers)
    lim = replace(preset.lim, vlm_layers=vlm_layers or preset.lim.vlm_layers)
    vlm = copy.deepcopy(preset.vlm)
    vlm.text_config.num_hidden_layers = lim.vlm_layers
    vlm.text_config.layer_types = vlm.text_config.layer_types[:lim.vlm_layers]
    PRESETS[name] = replace(preset, vlm=vlm, dit=dit, lim=lim)


def captions(number: int) -> list[str]:
    """Distinct prompts, as far as there are any."""
    texts = nano_prompts(test=False)
    return [texts[i % len(texts)] for i in range(number)]


def learner(args: BenchConfig, stage: int) -> ParaUni:
    """A model that is ready to be trained, with the attention kernels that train.py picks."""
    resolve(args, DEVICE)
    model = ParaUni.from_preset(args.preset, weights="random", device=DEVICE)
    make_trainable(RunConfig(stage), model)
    return model


def run_dit(args: BenchConfig, turns: Iterator[None], is_peer: bool) -> None:
    preset, B = PRESETS[args.preset], args.batch
    trains = args.what == "dit-train"
    if trains and not is_peer:
        resolve(args, DEVICE)
    with torch.device(DEVICE):
        dit = DiT(preset.dit).to(DTYPES[args.dtype]).requires_grad_(trains)
        x = torch.randn(B, *preset.latent_shape, dtype=dit.dtype)                       # (B, C, h, w)
        c = torch.randn(B, preset.num_queries, preset.dit.caption_channels, dtype=dit.dtype)    # (B, N, E)
        t = torch.linspace(0.1, 0.9, B)                                                 # (B,)
    if is_peer:
        dit = naive.diffusers_dit(dit)
    if args.compile:
        compile_parts(DEVICE, dit)
    while True:
        with torch.set_grad_enabled(trains):
            v = naive.velocity(dit, x, t, c) if is_peer else dit(x, t, c)               # (B, C, h, w)
        if trains:
            dit.zero_grad(set_to_none=True)
            v.float().square().mean().backward()
        next(turns)


@torch.no_grad()
def run_decode(args: BenchConfig, turns: Iterator[None], is_peer: bool) -> None:
    preset, dtype = PRESETS[args.preset], DTYPES[args.dtype]
    with torch.device(DEVICE):
        vae = DCAE(preset.vae).to(dtype).requires_grad_(False)
        z = torch.randn(args.batch, *preset.latent_shape, dtype=dtype)                  # (B, C, h, w)
    if is_peer:
        vae, z = naive.diffusers_vae(vae), z / preset.vae.scaling_factor
    while True:
        vae.decode(z)
        next(turns)


@torch.no_grad()
def run_sample(args: BenchConfig, turns: Iterator[None], is_peer: bool) -> None:
    model = ParaUni.from_preset(args.preset, weights="random", device=DEVICE, dtype=DTYPES[args.dtype])
    model.requires_grad_(False)
    side, prompts = model.preset.image_size, captions(args.batch)
    noise = torch.randn(args.batch, *model.preset.latent_shape, device=DEVICE)          # (B, C, h, w)
    c, c_uncond = model.condition(prompts), model.condition([None])                     # (B, N, E), (1, N, E)
    mask = torch.ones(c.shape[:2], device=DEVICE)                                       # (B, N)
    dit = naive.diffusers_dit(model.dit) if is_peer else model.dit
    pipeline = naive.diffusers_pipeline(dit, model.vae) if is_peer else None
    if args.compile:
        compile_parts(DEVICE, dit)
    # conditions are made anew in every run, but where the other side has no part that makes them
    while True:
        if is_peer:
            pipeline(prompt_embeds=c, prompt_attention_mask=mask, negative_prompt=None,
                     negative_prompt_embeds=c_uncond.expand_as(c), negative_prompt_attention_mask=mask,
                     latents=noise, height=side, width=side, num_inference_steps=args.num_steps,
                     guidance_scale=4.5, use_resolution_binning=False, output_type="pt")
        else:
            if args.vs != "diffusers":
                c, c_uncond = model.condition(prompts), model.condition([None])
            model.decode(sample_ode(dit, noise, c, c_uncond, args.num_steps))
        next(turns)


def run_stage1(args: BenchConfig, turns: Iterator[None], is_peer: bool) -> None:
    """All captions differ, and one of them is dropped."""
    model, B = learner(args, stage=1), args.batch
    model = naive.peer_of(model) if is_peer else model
    if args.compile:
        compile_parts(DEVICE, model.lim, model.dit)
    params = list(model.trainable(1).values())
    optimizer = adamw(params, 1e-6, 0.05)
    prompts = [None, *captions(B - 1)]
    x0, noise = torch.randn(2, B, *model.preset.latent_shape, device=DEVICE)            # (B, C, h, w) each
    t = torch.linspace(0.1, 0.9, B, device=DEVICE)                                      # (B,)
    while True:
        optimizer.zero_grad(set_to_none=True)
        if is_peer:
            loss = naive.stage1_loss(model, x0, prompts, t, noise, args.dtype)
        else:
            with precision(DEVICE, args.dtype):
                loss = flow_matching_loss(model.dit, x0, model.condition(prompts), t, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        next(turns)


def stage3_flags(folder: str, preset: str) -> list[str]:
    """Of train.py, for epochs of stage III and nothing between them, with a reward that costs nothing."""
    prompts, reward, never = Path(folder, "prompts.txt"), Path(folder, "brightness.py"), 10 ** 6
    prompts.write_text("\n".join(captions(64)))
    reward.write_text("def brightness(images, prompts):\n    return images.mean((1, 2, 3))\n")
    flags = {"stage": 3, "preset": preset, "weights": "random", "run-dir": f"{folder}/run", "lr": 1e-6,
             "prompts": prompts, "eval-prompts": prompts, "rewards": f"{reward}:brightness", "num-eval": 1,
             "eval-steps": 1, "eval-every": never, "save-every": never, "steps": never,
             # those of the full-size presets, whatever nano's recipe says
             "guidance-scale": 4.5, "sde-window": 0, "kl-coef": 0.01}
    return [f"--{name}={value}" for name, value in flags.items()]


def run_stage3(args: BenchConfig, turns: Iterator[None], is_peer: bool) -> None:
    """train.py, whose optimizer steps once an epoch: from step to step all parts of an epoch are run."""
    if is_peer:
        return run_naive_stage3(args, turns)
    flags = [f"--num-groups={args.num_groups}", f"--group-size={args.group_size}", f"--dtype={args.dtype}",
             f"--micro-batch={args.batch}", f"--num-steps={args.num_steps}", "--no-ldam",
             "--compile" if args.compile else "--no-compile"]
    # optimizers call it after every step, so nothing inside of train.py or grpo.py is touched
    after_step = register_optimizer_step_post_hook(lambda *given: next(turns))
    with tempfile.TemporaryDirectory() as folder, after_step:
        train.main(stage3_flags(folder, args.preset) + flags)


def run_naive_stage3(args: BenchConfig, turns: Iterator[None]) -> None:
    model = learner(args, stage=3)
    peer, reference = naive.peer_of(model), naive.peer_of(model)
    if args.compile:
        compile_parts(DEVICE, peer.lim, peer.dit, reference.lim, reference.dit)
    cfg = GRPOConfig(num_steps=args.num_steps, micro_batch=args.batch, dtype=args.dtype)
    params = list(peer.trainable(3).values())
    optimizer = adamw(params, 1e-6, 0.05)
    prompts = [text for text in captions(args.num_groups) for _ in range(args.group_size)]
    while True:
        # roll out, score, compare within groups, update: as grpo.py does
        generators = [generator("picture", i) for i in range(len(prompts))]
        latents, log_probs = naive.rollout(peer, prompts, generators, cfg)
        rewards = model.decode(latents[-1]).mean((1, 2, 3))                             # (B,)
        advantages = group_advantages(rewards.view(args.num_groups, -1)).flatten()      # (B,)
        optimizer.zero_grad(set_to_none=True)
        naive.accumulate_gradient(peer, reference, prompts, latents, log_probs, advantages, cfg)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        next(turns)


SIDES = {"dit": run_dit, "dit-train": run_dit, "decode": run_decode, "sample": run_sample,
         "stage1": run_stage1, "stage3": run_stage3}


# ----------------------------------------------------------------------------- the sides take turns

@contextmanager
def worker(flags: list[str], side: str) -> Iterator[Callable[[str], dict]]:
    """The process of a side; what it gives has the side make one run, and returns the report."""
    checkout = ROOT if side in ("ours", *RIVALS.values()) else Path(side).resolve()
    path = os.pathsep.join([str(checkout), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, __file__, *flags, "--side", side]
    errors = tempfile.TemporaryFile("w+")
    # it ends when its input does; unbuffered: closing has nothing left to write to one that has ended
    with errors, subprocess.Popen(command, bufsize=0, env=os.environ | {"PYTHONPATH": path}, stderr=errors,
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:

        def ask(turn: str) -> dict:
            # one that has ended says why below
            with suppress(BrokenPipeError):
                process.stdin.write(f"{turn}\n".encode())
            if report := process.stdout.readline():
                return json.loads(report)
            errors.seek(0)
            raise RuntimeError(f"a worker ended:\n{errors.read()[-2000:]}")

        yield ask


def matmul_peak(dtype: torch.dtype) -> float:
    """FLOP/s of square matrix products, the best of three sizes."""
    rates = []
    for n in (4096, 8192, 16384) if CUDA else (512, 1024, 2048):
        a, b = torch.randn(2, n, n, device=DEVICE, dtype=dtype)
        for _ in range(6):
            began = time.perf_counter()
            a @ b
            synchronize()
            rates.append(2 * n ** 3 / (time.perf_counter() - began))
    return max(rates)


def compare(args: BenchConfig, flags: list[str]) -> dict:
    """Time and count the sides, print their figures."""
    with ExitStack() as stack:
        sides = {name: stack.enter_context(worker(flags, name)) for name in ("ours", args.vs) if name}
        for ask in sides.values():
            ask("run")                                                  # warms up
        runs = {name: [] for name in sides}
        order = list(sides)
        for _ in range(args.rounds):
            order.reverse()
            for name in order:
                runs[name].append(sides[name]("run"))
        # the count is of an eager run: on CUDA memory is that of the last run which was timed
        counted = {name: ask("count") | runs[name][-1] for name, ask in sides.items()}
    seconds = {name: [report["seconds"] for report in reports] for name, reports in runs.items()}

    # what each side does
    pictures = args.num_groups * args.group_size if args.what == "stage3" else args.batch
    peak, figures = matmul_peak(DTYPES[args.dtype]), {}
    print(f"matmul peak {peak / GB:.0f} GFLOP/s ({args.dtype})")
    for name, times in seconds.items():
        middle, flops, memory = median(times), counted[name]["flops"], counted[name]["memory"]
        share = flops / middle / peak
        figures[name] = {"seconds": middle, "pictures_per_second": pictures / middle, "share_of_peak": share}
        print(f"{name:10} {middle:.3g} s a run ({min(times):.3g} - {max(times):.3g}), "
              f"{pictures / middle:.3g} pictures/s; {flops / GB:.4g} GFLOP, "
              f"{share:.0%} of the peak; memory {memory / GB:.3g} GB")

    # and the two of them, round by round
    if args.vs:
        ratios = [theirs / ours for ours, theirs in zip(seconds["ours"], seconds[args.vs])]
        memory = counted[args.vs]["memory"] / counted["ours"]["memory"]
        figures |= {"ratio": median(ratios), "memory_ratio": memory}
        print(f"{args.vs} / ours: {median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f}); "
              f"memory {memory:.2f}")
    return figures


def window(args: BenchConfig) -> None:
    """Stage III of nano with windows of stochastic steps: what a minute of training gains."""
    rows = []
    for size in (0, 3, 1):
        with tempfile.TemporaryDirectory() as folder:
            train.main(["--stage=3", "--rewards=aesthetic", f"--run-dir={folder}", f"--sde-window={size}",
                        f"--steps={args.steps}", f"--eval-every={args.steps}", "--kl-coef=0.3"])
            records = read_log(Path(folder, "metrics.jsonl"))
        seconds = sum(value for record in records for key, value in record.items() if key.startswith("time/"))
        gain = records[-1]["heldout/aesthetic"] - records[0]["heldout/aesthetic"]
        rows.append({"window": size or "all", "seconds": seconds, "held-out gain": gain,
                     "gain a minute": 60 * gain / seconds})
    print(table(rows))


def main(argv: list[str] | None = None) -> dict | None:
    args = parse(argv)
    if args.side:
        cut(args.preset, args.blocks, args.vlm_layers)
        turns = take_turns()
        next(turns)
        # it makes one run after another, until its input ends
        is_peer = args.side in RIVALS.values()
        return SIDES[args.what](args, turns, is_peer)
    flags = sys.argv[1:] if argv is None else argv
    print(*flags)
    print(json.dumps(environment()), flush=True)
    return window(args) if args.what == "window" else compare(args, flags)


if __name__ == "__main__":
    run(main)
