"""One command that proves the project on a GPU: `python tools/gpu_check.py`, 8 minutes at most. What an H100
does not get through by then is named in the table, and `--parts` asks for it alone.

    exact           DiT, LIM and DC-AE: bf16 against fp32, compiled against eager
    nano            a few steps of each stage; stage III's first ratio, eager and compiled, LDAM having fired
    b-512, l-1024   steps of each stage at the micro-batch that plan.py says (without reward models), eager
                    and compiled: seconds, share of the matmul peak, memory beside the plan's, what LDAM adds
    dit ...         DiT of 1.6B at full depth, forward of 16 rows and training of 4, beside diffusers
    sample, decode  20 steps with decoding, DC-AE at 512 and 1024 px, beside diffusers

Each part is a process with its own time limit: whatever happens to one, the others run. Weights are random,
but for nano's stage III, and no data is read: pictures are noise, the reward is their brightness. --toy is
the same on a CPU, with a cut-down nano for b-512 and nothing compiled: it proves the script.
"""
import argparse
import copy
import gc
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.optimizer import register_optimizer_step_post_hook

import train
from common import compile_parts, environment, read_log, write_json
from data import Batch
from dit import DiT
from evaluation import table
from lim import LIM
from model import PRESETS, ParaUni
from tools import bench, plan
from tools.bench import DEVICE, GB, synchronize
from vae import DCAE

# part -> seconds that it may take, while the eight minutes last; the first ones matter most
LIMITS = {"exact": 90, "nano": 90, "b-512": 240, "dit compiled": 120, "dit": 90, "dit-train compiled": 180,
          "dit-train": 90, "l-1024": 300, "sample": 150, "decode": 150}
TOY_PARTS = ("exact", "nano", "b-512", "dit")
# preset -> pictures of the one group that its stage III draws: the recipe's, and a third where they are large
FULL_SIZE = {"b-512": 24, "l-1024": 8}
BESIDE_DIFFUSERS = {
    "dit": [["--preset=l-1024", "--batch=16"]],
    "dit-train": [["--preset=l-1024", "--batch=4"]],
    "sample": [["--preset=l-1024", "--vlm-layers=2", "--batch=8", "--num-steps=20", "--rounds=2"]],
    "decode": [["--preset=b-512", "--batch=8"], ["--preset=l-1024", "--batch=2"]]}
TOY_SIZE = [["--preset=nano", "--blocks=1", "--rounds=1", "--batch=2"]]


def row(figure: str, value: float | str, low: float | None = None, high: float | None = None) -> dict:
    """A figure, the bars that it has, and whether it clears them."""
    bar = f">= {low:g}" if low is not None else f"<= {high:g}" if high is not None else ""
    ok = (low is None or value >= low) and (high is None or value <= high)
    return {"figure": figure, "value": value, "bar": bar, "ok": ok}


# ----------------------------------------------------------------------------- exactness

def outputs(module: nn.Module, inputs: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What a module computes, and its gradients as one vector; the autoencoder has none."""
    inputs = [x.to(dtype) for x in inputs]
    if isinstance(module, DCAE):
        with torch.no_grad():
            return module.decode(module.encode(*inputs)).float(), torch.zeros(0)
    out = module(*inputs)
    grads = torch.autograd.grad(out.float().square().mean(), list(module.parameters()), allow_unused=True)
    return out.detach().float(), torch.cat([g.flatten() for g in grads if g is not None])


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


def exact(toy: bool) -> Iterator[dict]:
    """At full width, two blocks deep."""
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    preset = PRESETS["nano" if toy else "l-1024"]
    N, side = preset.num_queries, preset.image_size
    # the three of them, with what they read
    with torch.device(DEVICE):
        dit = DiT(replace(preset.dit, num_layers=2))
        lim = LIM(replace(preset.lim, num_layers=2, vlm_layers=2))
        vae = DCAE(preset.vae)
        x, t = torch.randn(2, *preset.latent_shape), torch.rand(2)                      # (2, C, h, w), (2,)
        c = torch.randn(2, N, preset.lim.caption_channels)                              # (2, N, E)
        layers = torch.randn(2, 2, N, preset.lim.width)                                 # (L, 2, N, D)
        images = torch.rand(1, 3, side, side)                                           # (1, 3, H, W)
    cases = {"DiT": (dit, [x, t, c]), "LIM": (lim, [layers]), "DC-AE": (vae, [images])}
    dit.init_weights()
    lim.init_weights()
    # a new DiT predicts zero
    nn.init.normal_(dit.proj_out.weight, std=0.02)

    # each in bf16, and compiled, against itself
    for name, (module, inputs) in cases.items():
        want, want_grad = outputs(module, inputs, torch.float32)
        low, _ = outputs(copy.deepcopy(module).bfloat16(), inputs, torch.bfloat16)
        yield row(f"{name}, bf16 / fp32, relative error", relative_error(low, want), high=0.05)
        if module is not vae:                   # which is never compiled
            compile_parts(DEVICE, module)
            got, got_grad = outputs(module, inputs, torch.float32)
            yield row(f"{name}, compiled / eager, relative error", relative_error(got, want), high=1e-4)
            yield row(f"{name}, the same of its gradient", relative_error(got_grad, want_grad), high=1e-4)


# ----------------------------------------------------------------------------- steps of the stages

class Enough(Exception):
    """Ends a run that has made its steps."""


def peak_memory() -> int:
    """Bytes at the peak since the last call; of a CPU's process, ever."""
    if DEVICE.type == "cpu":
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak


def run_stage(preset: str, stage: int, flags: list[str],
              steps: int = 3) -> tuple[float, list[int], list[dict]]:
    """Some optimizer steps by train.py: seconds of the last, bytes at the peak in each, and the log."""
    ends, peaks = [], []

    def mark(*of_the_hook: object) -> None:
        synchronize()
        ends.append(time.perf_counter())
        peaks.append(peak_memory())
        if len(ends) == steps:
            raise Enough

    def noise(step: int, items: list[int]) -> Batch:
        latents = torch.randn(len(items), *PRESETS[preset].latent_shape, device=DEVICE)
        return Batch(latents, bench.captions(len(items)))

    # what the run before has left goes
    gc.collect()
    torch.cuda.empty_cache()
    peak_memory()
    # noise in place of latents from files
    train.Latents = lambda *given: SimpleNamespace(batch=noise)
    with tempfile.TemporaryDirectory() as folder:
        if stage == 3:
            # LDAM fires in epochs 1 and 3, and so disturbs 2 and 4
            start = [*bench.stage3_flags(folder, preset), "--no-ldam-use-grad-norm", "--ldam-patience=0"]
        else:
            start = [f"--stage={stage}", f"--preset={preset}", "--weights=random", f"--run-dir={folder}/run",
                     "--data=noise", "--log-every=1"]
        # after each step the clock and the memory are read
        with register_optimizer_step_post_hook(mark), suppress(Enough):
            train.main(start + flags)
        log = read_log(Path(folder, "run", "metrics.jsonl"))
    return ends[-1] - ends[-2], peaks, log


def nano(toy: bool) -> Iterator[dict]:
    batch, groups, size = (4, 1, 2) if toy else (64, 4, 8)
    for stage in (1, 2):
        flags = [f"--batch-size={batch}", f"--micro-batch={batch}"]
        seconds, _, _ = run_stage("nano", stage, flags, steps=2 if toy else 8)
        yield row(f"stage {stage}, pictures/s", batch / seconds)
    # with the weights that it comes with: a new DiT predicts zero, whatever the rounding
    flags = ["--weights=auto", f"--num-groups={groups}", f"--group-size={size}",
             f"--micro-batch={groups * size}", f"--num-steps={3 if toy else 6}"]
    # the bar is a tenth of nano's clip range
    for variant, bar in (("--dtype=fp32", 2e-4), ("--dtype=bf16", None), ("--dtype=bf16 --compile", None)):
        seconds, _, log = run_stage("nano", 3, flags + variant.split(), steps=5)
        yield row(f"stage 3 {variant}, pictures/s", groups * size / seconds)
        # the fourth epoch is one that LDAM disturbs
        yield row(f"stage 3 {variant}, first ratio - 1", log[4]["ratio_dev"], high=bar)


def plans(name: str, toy: bool) -> Iterator[dict]:
    """What plan.py says of a preset's stages, where an epoch is one group of pictures."""
    with FakeTensorMode():
        model = plan.build(PRESETS[name])
        for stage in plan.STAGES:
            cfg = plan.recipe(model.preset, stage)
            if stage == 3:
                cfg = replace(cfg, num_groups=1, group_size=2 if toy else FULL_SIZE[name])
            # its reward is a function, without weights
            yield asdict(plan.plan(model, cfg, devices=1)) | {"rewards_bytes": 0.0}


def full_size(name: str, toy: bool, planned: list[plan.Plan]) -> Iterator[dict]:
    """Stages I to III, eager and then compiled; all runs share one model."""
    # a GPU that others use too has less than all of its memory
    limit = 8 * GB if toy else torch.cuda.mem_get_info()[0]
    peak = bench.matmul_peak(torch.bfloat16)
    with torch.device(DEVICE):
        model = plan.build(PRESETS[name])
        model.lim.init_weights()
        model.dit.init_weights()
    # train.py is handed this model, whatever weights it asks for
    ParaUni.from_preset = classmethod(lambda cls, *given, **named: model)
    for mode in ("--no-compile", "--compile"):
        # stage III has the bars, and compiling may take all of the part's time
        for p in reversed(planned):
            model.zero_grad(set_to_none=True)
            try:
                yield from one_step(name, mode, p, limit, peak, toy)
            # out of memory, or whatever a compiler raises: the other stages are still worth their minute
            except Exception as error:
                failed = f"stage {p.stage} {mode}"
                yield {"figure": failed, "value": repr(error)[:200], "bar": "runs", "ok": False}


def one_step(name: str, mode: str, p: plan.Plan, limit: float, peak: float, toy: bool) -> Iterator[dict]:
    """A step at the largest micro-batch that the plan allows, beside what the plan says of it."""
    checkpointing = p.largest(limit) == 0
    m = p.largest(limit, checkpointing)
    if toy:
        m = min(m, 2)
    # stage III runs one group, in chunks of m; the others one micro-batch
    pictures, sizes = m, [f"--batch-size={m}"]
    if p.stage == 3:
        m, pictures = min(m, p.group_size), p.group_size
        sizes = ["--num-groups=1", f"--group-size={pictures}"]
    saving = ["--gradient-checkpointing"] * checkpointing
    label = f"stage {p.stage} {' '.join([mode, *saving])}, micro-batch {m}"
    if m == 0:
        yield row(label, "does not fit, says the plan")
        return
    flags = [mode, "--dtype=bf16", f"--micro-batch={m}", *sizes, *saving]
    seconds, peaks, log = run_stage(name, p.stage, flags)
    has_bar = (name, p.stage, mode, toy) == ("b-512", 3, "--compile", False)
    share = p.flops_image * pictures / seconds / peak
    memory, expected = max(peaks), p.memory(m, checkpointing) - plan.RESERVE
    yield row(f"{label}, seconds", seconds)
    yield row(f"{label}, pictures/s", pictures / seconds)
    yield row(f"{label}, share of the matmul peak", share, low=0.5 if has_bar else None)
    yield row(f"{label}, GB", memory / GB)
    # the plan is of eager runs, and a process on a CPU holds more than tensors
    if mode == "--no-compile" and not toy:
        yield row(f"{label}, |memory / plan - 1|", abs(memory / expected - 1), high=0.1)
    # the second epoch was disturbed, the third was not; the last one that was logged is the second
    if p.stage == 3:
        yield row(f"{label}, memory where LDAM has fired / not", peaks[1] / peaks[2], high=1.05)
        for part in ("rollout", "reward", "update"):
            yield row(f"{label}, LDAM having fired, seconds of {part}", log[-1][f"time/{part}"])


def beside_diffusers(name: str, toy: bool) -> Iterator[dict]:
    """bench.py's comparisons; a second word of the name says that both sides are compiled."""
    what, _, compiled = name.partition(" ")
    has_bars = bool(compiled) and what == "dit"
    for flags in TOY_SIZE if toy else BESIDE_DIFFUSERS[what]:
        figures = bench.main([f"--what={what}", "--vs=diffusers", *flags, *["--compile"] * bool(compiled)])
        ours, label = figures["ours"], " ".join(flags)
        yield row(f"{label}, seconds", ours["seconds"])
        yield row(f"{label}, pictures/s", ours["pictures_per_second"])
        yield row(f"{label}, share of the matmul peak", ours["share_of_peak"], low=0.75 if has_bars else None)
        yield row(f"{label}, diffusers / ours, seconds", figures["ratio"], low=1.3 if has_bars else None)
        yield row(f"{label}, diffusers / ours, memory", figures["memory_ratio"])


# ----------------------------------------------------------------------------- parts

def work(name: str, folder: Path, toy: bool) -> None:
    """What a part's process does. After each row all rows so far are written."""
    if toy:
        PRESETS["b-512"] = replace(PRESETS["nano"], name="b-512")
        bench.cut("b-512", blocks=1, vlm_layers=2)
        torch.compiler.set_stance("force_eager")
    if name.startswith("plan "):
        rows = plans(name.removeprefix("plan "), toy)
    elif name in FULL_SIZE:
        planned = json.loads((folder / f"plan {name}.json").read_text())
        rows = full_size(name, toy, [plan.Plan(**p) for p in planned])
    elif name == "exact":
        rows = exact(toy)
    elif name == "nano":
        rows = nano(toy)
    else:
        rows = beside_diffusers(name, toy)
    written = []
    for each in rows:
        written.append(each)
        write_json(folder / f"{name}.json", written)


def run_part(name: str, folder: Path, toy: bool, deadline: float) -> dict:
    """Run a part in a process of its own: its status, and the rows that it has written."""
    if name.partition(" ")[0] in BESIDE_DIFFUSERS and not importlib.util.find_spec("diffusers"):
        return {"status": "skipped: diffusers is not installed", "seconds": 0.0, "rows": []}
    began = time.perf_counter()
    limit = max(1.0, deadline - began)
    command = [sys.executable, __file__, "--part", name, "--folder", str(folder)]
    env = os.environ.copy()
    if toy:
        command += ["--toy"]
        # two parts at a time on a CPU: more threads than cores would wait for each other
        env["OMP_NUM_THREADS"] = "1"
    elif name in LIMITS:
        limit = min(limit, LIMITS[name])
    status, path, errors = "ok", folder / f"{name}.json", folder / f"{name}.err"
    try:
        with open(errors, "w") as file:
            subprocess.run(command, env=env, stdout=subprocess.DEVNULL, stderr=file, timeout=limit,
                           check=True)
    except subprocess.TimeoutExpired:
        status = f"stopped after {limit:.0f} s"
    except subprocess.CalledProcessError:
        status = "failed: " + errors.read_text().strip().rpartition("\n")[2]
    seconds = time.perf_counter() - began
    print(f"{name}: {status}, {seconds:.0f} s", flush=True)
    rows = json.loads(path.read_text()) if path.exists() else []
    return {"status": status, "seconds": seconds, "rows": rows}


def report(results: dict[str, dict]) -> str:
    rows = []
    for name, result in results.items():
        unfinished = [] if result["status"] == "ok" else [row("NOT FINISHED", result["status"])]
        for r in result["rows"] + unfinished:
            value = f"{r['value']:.4g}" if isinstance(r["value"], float) else r["value"]
            verdict = ("ok" if r["ok"] else "MISSED") if r["bar"] else ""
            rows.append({"part": name, **r, "value": value, "ok": verdict})
    return table(rows)


def main(argv: list[str] | None = None) -> dict[str, dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", default="gpu_check", help="the report: this name with .json and with .md")
    parser.add_argument("--parts", default="", help="only these, as exact,nano")
    parser.add_argument("--toy", action="store_true", help="small, on a CPU")
    parser.add_argument("--part", default="", help=argparse.SUPPRESS)           # in a part's process
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.part:
        return work(args.part, Path(args.folder), args.toy)
    if DEVICE.type == "cpu" and not args.toy:
        parser.error("there is no CUDA device here; --toy runs on a CPU")
    names = args.parts.split(",") if args.parts else TOY_PARTS if args.toy else list(LIMITS)
    deadline = time.perf_counter() + 8 * 60

    results, out = {}, Path(args.out)
    with tempfile.TemporaryDirectory() as name_of_folder, ThreadPoolExecutor() as planners:
        folder = Path(name_of_folder)
        # plans need no GPU: they are made beside the first parts
        planning = {name: planners.submit(run_part, f"plan {name}", folder, args.toy, deadline)
                    for name in names if name in FULL_SIZE}

        def when_planned(name: str) -> dict:
            if name in planning:
                planning[name].result()
            return run_part(name, folder, args.toy, deadline)

        with ThreadPoolExecutor(2 if args.toy else 1) as pool:
            for name, result in zip(names, pool.map(when_planned, names)):
                results[name] = result
                # after each part: a machine that is taken away leaves what was measured
                write_json(out.with_suffix(".json"), {"toy": args.toy, **environment(), "parts": results})
                out.with_suffix(".md").write_text(report(results))
    print(report(results))
    return results


if __name__ == "__main__":
    main()
