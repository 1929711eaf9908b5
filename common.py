"""What every script shares: flags, seeds, processes, files, runs; of the model, the names of its parts alone.

A first reading may skip it. A run: open_run, make_trainable, load_checkpoint, save_checkpoint.
"""
import argparse
import hashlib
import json
import math
import os
import platform
import secrets
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent
Weights = dict[str, Tensor]                                 # by name: parameters, or averages of them


class Refused(ValueError):
    """A mistake of the user's that would cost a run, weights or data; the text is one sentence for them."""


def run(main: Callable) -> None:
    """The entry of a script: what we refuse on purpose is one line, everything else keeps its traceback."""
    try:
        main()
    except Refused as error:
        sys.exit(f"error: {error}")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# ----------------------------------------------------------------------------- flags

def knob(default: Any, help: str, choices: Iterable | None = None, words: bool = False) -> Any:
    """A field of a config dataclass that is a flag; `words`: bare words in place of a flag."""
    return field(default=default, metadata={"help": help, "choices": choices, "words": words})


def parse_config(cls: type, argv: list[str] | None = None, recipe: dict | None = None,
                 description: str = "") -> Any:
    """Build the dataclass `cls` of knobs: its defaults < recipe < flags as typed."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for knob_field in fields(cls):
        flag, kind, meta = "--" + knob_field.name.replace("_", "-"), knob_field.type, knob_field.metadata
        shared = {"default": knob_field.default, "help": meta["help"].replace("%", "%%")}
        if meta["words"]:
            parser.add_argument(knob_field.name, nargs="*", **shared)
        elif kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **shared)
        else:
            if kind not in (int, float, str):
                item, _ = get_args(kind)
                kind = lambda text, item=item: tuple(map(item, filter(None, text.split(","))))  # noqa: E731
            parser.add_argument(flag, type=kind, choices=meta["choices"], **shared)
    parser.set_defaults(**(recipe or {}))
    return cls(**vars(parser.parse_intermixed_args(argv)))


def config_dict(cfg: Any) -> dict:
    """The config as plain JSON types (tuples become lists)."""
    return json.loads(json.dumps(asdict(cfg)))


def refuse_changes(old: dict, new: dict, what: str) -> None:
    """Refuse to go on with work done under other settings."""
    changed = [f"--{name.replace('_', '-')} {old.get(name)} -> {value}"
               for name, value in new.items() if old.get(name) != value]
    if changed:
        raise Refused(f"{what} was made with other settings ({', '.join(changed)}): give the flags of the "
                      "first run, or choose another folder")


# ----------------------------------------------------------------------------- seeds and processes

def derive_seed(*key: int | str) -> int:
    """63-bit seed from a key of integers and strings, the same on every machine, for any number of processes.

    >>> derive_seed(0, "rollout", 3) != derive_seed(0, 3, "rollout")
    True
    """
    # numpy's integers count as Python's
    text = json.dumps(key, default=int)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by the key, e.g. generator("picture", seed, epoch, group, member). Torch takes
    the lower 32 bits of a seed alone: among millions of pictures some thousand pairs share their noise."""
    return torch.Generator().manual_seed(derive_seed(*key))


@dataclass(frozen=True)
class Dist:
    """This process's place among those that torchrun started."""
    rank: int
    world_size: int
    device: torch.device

    @property
    def lead(self) -> bool:
        return self.rank == 0


def setup_dist() -> Dist:
    """From torchrun's environment, or alone; nccl on GPUs, gloo on CPUs."""
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size > 1 and not torch.distributed.is_initialized():
        # ranks may wait long for the one that writes a checkpoint, or for a slow reward
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                             timeout=timedelta(hours=1))
    return Dist(rank, world_size, device)


def gather(tensor: Tensor, dist: Dist) -> Tensor:
    """All ranks' tensors, all of one shape, joined along dim 0 in rank order."""
    if dist.world_size == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.world_size)]
    torch.distributed.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def mean_over_ranks(value: float, dist: Dist) -> float:
    values = torch.tensor([value], dtype=torch.float64, device=dist.device)
    return gather(values, dist).mean().item()


def average_gradients(params: Iterable[nn.Parameter], dist: Dist) -> None:
    """Replace every .grad by its mean over ranks, once a step."""
    for p in params if dist.world_size > 1 else ():
        if p.grad is not None:
            torch.distributed.all_reduce(p.grad)
            p.grad /= dist.world_size


def clip_gradients(params: Iterable[nn.Parameter], max_norm: float) -> float:
    """Scale all gradients down to a joint norm of at most max_norm; returns the norm before."""
    return nn.utils.clip_grad_norm_(params, max_norm).item()


# ----------------------------------------------------------------------------- files

@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary sibling to write to, renamed onto `path` at the end: a kill at any moment, and a machine
    that goes down, leave the old file or the new one. Folders on the way are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # a name that no other machine of the run has, nor anyone else knows: behind it might be a link
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        yield temporary
        # safetensors makes a file that its owner alone can read: it gets the mode of any other new file, but
        # on a disk that has none
        with suppress(OSError):
            temporary.chmod(mode)
        # the bytes reach the disk before the name does: else a machine that goes down may leave the newest
        # checkpoint empty, and --resume auto takes it; a network disk says here that it is full
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, data: Any) -> None:
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(data, indent=2) + "\n")


def read_lines(path: str | Path) -> list[str]:
    """The lines of a UTF-8 file that say something, stripped. Only \\n, \\r\\n and \\r end a line; no BOM."""
    text = Path(path).read_text(encoding="utf-8-sig")
    return [line.strip() for line in text.split("\n") if line.strip()]


def fingerprint(module: nn.Module) -> str:
    """SHA-256 of every parameter and buffer, names included: equal only where all bits are."""
    digest = hashlib.sha256()
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def environment() -> dict[str, str]:
    """Versions, device and commit, for a run's records; commit is "" outside a git checkout."""
    commit = subprocess.getoutput(f"git -C {shlex.quote(str(ROOT))} rev-parse HEAD 2> /dev/null")
    device = f"CPU {platform.machine()}, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    return {"torch": str(torch.__version__), "transformers": version("transformers"),
            "device": device, "commit": commit}


# ----------------------------------------------------------------------------- a run

@dataclass(frozen=True)
class RunConfig:
    """The flags of all stages; the defaults are the paper's (supplement, Table 1) where it has any."""
    stage: int = knob(1, "1 align, 2 fine-tune, 3 reinforce (--stage 3 --help)", choices=(1, 2, 3))
    preset: str = knob("nano", "size of everything; see PRESETS in model.py")
    weights: str = knob("auto", "auto: weights/PRESET, which tools/convert.py writes; random; or a folder")
    init: str = knob("auto", "file of the stage before; auto: that in --weights, for stage 1 none; none")
    fresh: tuple[str, ...] = knob((), "prefixes of parameters that --init and --weights may lack")
    run_dir: str = knob("auto", "folder for log, checkpoints, pictures and weights; auto: runs/stageN")
    resume: str = knob("", "go on from a checkpoint: auto (the newest in --run-dir), a run folder or a file")
    seed: int = knob(0, "all randomness is derived from it")
    lr: float = knob(1e-4, "peak learning rate (AdamW, betas 0.9 0.95; cosine to 0)")
    warmup: int = knob(0, "steps of linear warm-up")
    weight_decay: float = knob(0.05, "on tensors of two or more dimensions")
    clip_norm: float = knob(1.0, "gradient norm above which gradients are scaled down")
    ema_decay: float = knob(0.999, "of the weights that are written at the end")
    dtype: str = knob("auto", "auto: bf16 on CUDA, fp32 on CPU", choices=("auto", "fp32", "bf16"))
    compile: bool = knob(None, "torch.compile LIM and DiT; default: on CUDA, but for nano")
    gradient_checkpointing: bool = knob(False, "compute activations again in backward: less memory")
    max_skipped: int = knob(10, "updates in a row without a finite gradient, after which the run stops")
    save_every: int = knob(200, "steps (stage 3: epochs) between checkpoints")
    keep: int = knob(2, "checkpoints kept")


# What a run that goes on may be given anew: none of it changes a single weight
MAY_CHANGE = ("run_dir", "resume", "max_skipped", "save_every", "keep")


def resolve(cfg: Any, device: torch.device, small: bool = False) -> Any:
    """Decide precision, compiling and run folder, and the attention kernels of this process."""
    is_cuda = device.type == "cuda"
    if cfg.dtype == "auto":
        cfg = replace(cfg, dtype="bf16" if is_cuda else "fp32")
    if getattr(cfg, "run_dir", None) == "auto":
        cfg = replace(cfg, run_dir=f"runs/stage{cfg.stage}")
    if getattr(cfg, "compile", False) is None:
        cfg = replace(cfg, compile=is_cuda and not small)
    # On a CPU the fused kernel's bf16 gradient takes twice as long as plain products and a softmax in bf16,
    # and several times as long where heads and sequences are short.
    kernels = torch.backends.cuda
    kernels.enable_flash_sdp(is_cuda or cfg.dtype == "fp32")
    kernels.allow_fp16_bf16_reduction_math_sdp(not is_cuda)
    # cuDNN's own stay off, as in every figure of docs/speed.md
    kernels.enable_cudnn_sdp(False)
    return cfg


def open_run(cfg: RunConfig, dist: Dist) -> dict | None:
    """Refuse to mix two runs in a folder, cut the log, write config.json; returns the checkpoint, if any."""
    checkpoint, log = find_checkpoint(cfg.resume, cfg.run_dir), Path(cfg.run_dir) / "metrics.jsonl"
    state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True) if checkpoint else None
    if state:
        # a flag that is younger than the run had its default there
        old = config_dict(type(cfg)()) | state["config"]
        new = {name: value for name, value in config_dict(cfg).items() if name not in MAY_CHANGE}
        refuse_changes(old, new, str(checkpoint))
    unit = "epoch" if cfg.stage == 3 else "step"
    done = state[unit] if state else 0
    if (gather(torch.tensor([done], device=dist.device), dist) != done).any():
        raise Refused("the processes found different checkpoints: --run-dir must be on a disk that all share")
    if not dist.lead:
        return state
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    # a run goes on in its own folder, or in one that holds none: no line of a log and no checkpoint
    home = checkpoint.resolve().parent if checkpoint else None
    is_own = cfg.resume == "auto" or home == (Path(cfg.run_dir) / "checkpoints").resolve()
    if (lines or find_checkpoint("auto", cfg.run_dir)) and not is_own:
        raise Refused(f"{cfg.run_dir} already holds a run: go on with --resume auto, or change --run-dir")
    # what a killed run logged after its checkpoint goes, a line that was cut among it; stage 3, which saves
    # first and then logs, writes the checkpoint's own line again
    last = done - 1 if unit == "epoch" else done
    lines = [line for line in lines if state and json.loads(line)[unit] <= last]
    with atomic(log) as temporary:
        temporary.write_text("".join(line + "\n" for line in lines))
    write_json(Path(cfg.run_dir) / "config.json", config_dict(cfg))
    print(json.dumps(config_dict(cfg)), json.dumps(environment()), sep="\n", flush=True)
    return state


# the names that save_checkpoint gives: what else lies there, a copy as best.pt, is the user's
CHECKPOINT = "[0-9]" * 8 + ".pt"


def find_checkpoint(resume: str, run_dir: str) -> Path | None:
    """What --resume means: "" nothing, "auto" the newest in the run's folder if there is one, else a path."""
    if not resume:
        return None
    if Path(resume).is_file():
        return Path(resume)
    folder = Path(run_dir if resume == "auto" else resume) / "checkpoints"
    newest = max(folder.glob(CHECKPOINT), default=None)
    if newest is None and resume != "auto":
        raise Refused(f"no checkpoint in {resume}: --resume takes auto, a run folder or a checkpoint of it")
    return newest


def save_checkpoint(cfg: RunConfig, dist: Dist, number: int, params: Weights, ema: Weights,
                    optimizer: torch.optim.Optimizer, rest: dict) -> None:
    """All that a run needs to go on, as one file in one rename. The newest `keep` stay, and none of a later
    number, which would be another future."""
    state = {"trained": params, "ema": ema, "optimizer": optimizer.state_dict(), **rest}
    if dist.lead:
        newest = Path(cfg.run_dir) / "checkpoints" / f"{number:08}.pt"
        # a kill left half of one: at full size that is tens of gigabytes
        for path in newest.parent.glob(f".{CHECKPOINT}.*"):
            path.unlink()
        with atomic(newest) as temporary:
            torch.save(state | {"config": config_dict(cfg)}, temporary)
        past = sorted(path for path in newest.parent.glob(CHECKPOINT) if path <= newest)
        for path in newest.parent.glob(CHECKPOINT):
            if path not in past[-max(cfg.keep, 1):]:
                path.unlink()


@torch.no_grad()
def copy_weights(source: Weights, target: Weights) -> None:
    """Those that `source` has."""
    for name, tensor in source.items():
        target[name].copy_(tensor)


def load_checkpoint(state: dict, params: Weights, ema: Weights, optimizer: torch.optim.Optimizer) -> None:
    """Put back what save_checkpoint was given."""
    copy_weights(state["trained"], params)
    copy_weights(state["ema"], ema)
    optimizer.load_state_dict(state["optimizer"])


def write_log(run_dir: str, record: dict, dist: Dist) -> None:
    """The lead appends one line of JSON to metrics.jsonl."""
    if dist.lead:
        with open(Path(run_dir) / "metrics.jsonl", "a") as file:
            file.write(json.dumps(finite(record)) + "\n")


def finite(record: dict) -> dict:
    """JSON has no NaN and no infinity: they become null."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()}


def read_log(path: str | Path) -> list[dict]:
    """The records of a metrics.jsonl; a last line that a kill has cut is left out."""
    return [json.loads(line) for line in Path(path).read_text().split("\n")[:-1]]


@contextmanager
def catch_stop() -> Iterator[list[int]]:
    """A list into which SIGINT and SIGTERM are put, so that a loop can save and leave."""
    caught: list[int] = []
    previous = {number: signal.signal(number, lambda signum, frame: caught.append(signum))
                for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


# ----------------------------------------------------------------------------- training

def make_trainable(cfg: RunConfig, model: nn.Module) -> Weights:
    """What the stage trains, by name, with the model ready to train it; everything else is frozen."""
    model.requires_grad_(False)
    for p in model.trainable(cfg.stage).values():
        p.requires_grad_(True)
    model.lim.connector.gradient_checkpointing = cfg.gradient_checkpointing
    model.dit.gradient_checkpointing = cfg.gradient_checkpointing
    if cfg.compile:
        compile_parts(model.device, model.lim, model.dit)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def compile_parts(device: torch.device, *parts: nn.Module) -> None:
    """torch.compile, in place. On a GPU by the blocks of each part's first list: equal blocks share what the
    first of them compiled, so that depth costs no compile time. On a CPU, for nano, whole: faster."""
    # without one fusion of Inductor's: for the gradient of the DiT at a width of 2,240 it failed an assertion
    torch._inductor.config.triton.mix_order_reduction = False
    # all compiled modules share one count, and beyond 8 torch falls back to eager; stage 3 needs more
    torch._dynamo.config.recompile_limit = 64
    on_cpu = device.type == "cpu"
    for part in parts:
        lists = [module for module in part.modules() if isinstance(module, nn.ModuleList)]
        for module in [part] if on_cpu else lists[0]:
            # torch 2.14 cannot divide by a size that may vary, where it compiles for a CPU
            module.compile(dynamic=False if on_cpu else None)


def precision(device: torch.device, dtype: str) -> AbstractContextManager:
    """Forward passes in "fp32", or with matrix products in "bf16" (autocast)."""
    return nullcontext() if dtype == "fp32" else torch.autocast(device.type, torch.bfloat16)


def adamw(params: Iterable[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with weight decay on tensors of two and more dimensions only (not on biases, norms)."""
    params = list(params)
    groups = [{"params": [p for p in params if p.ndim >= 2], "weight_decay": weight_decay},
              {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def cosine_lr(step: int, total: int, warmup: int, base: float) -> float:
    """Learning rate of a step counted from 0: linear to base at step warmup, then cosine to 0 at step total.

    >>> [cosine_lr(step, total=5, warmup=1, base=8.0) for step in (0, 1, 3, 5)]
    [4.0, 8.0, 4.0, 0.0]
    """
    if step < warmup:
        return base * (step + 1) / (warmup + 1)             # + 1: a first step at rate 0 would be wasted
    progress = (step - warmup) / (total - warmup)
    return 0.5 * base * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def ema_update(ema: Weights, params: Weights, decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * params, in place."""
    for name, average in ema.items():
        average.lerp_(params[name], 1 - decay)


@contextmanager
def swapped(params: Weights, ema: Weights) -> Iterator[None]:
    """The EMA's values in the model, and the model's in the EMA, until the block ends."""
    @torch.no_grad()
    def swap() -> None:
        for name, p in params.items():
            own = p.clone()
            p.copy_(ema[name])
            ema[name].copy_(own)
    swap()
    yield
    swap()
