"""What every script shares: flags, seeds, process group, checkpoints, run log, pictures. No model code.

Nothing heavy is imported at module level, so that `python train.py --help` answers at once; torch and its
friends are imported inside the functions that use them. Files are written to a temporary sibling, made
durable, then renamed: a crash at any moment leaves either the old file or the new one. It is long because it
is plumbing: the scripts call it, each function stands alone, and a first reading may skip it.
Shapes: N images, H W height and width in pixels.
"""
from __future__ import annotations  # names Tensor without importing torch; no config dataclass lives here

import argparse
import difflib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from PIL import Image, ImageFont
    from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent
BUCKET_ELEMENTS = 2**25  # gradients averaged at a time: 128 MiB in fp32, instead of a second copy of them all


# ------------------------------------------------------------------------------------- flags and entry point
WEIGHTS_HELP = ("auto (weights/nano), hub (fetch the published parts), random (from --seed), "
                "or a folder with vlm/, transformer/, vae/")


def knob(default: Any, help: str, choices: tuple | None = None, positional: str | None = None) -> Any:
    """Field of a config dataclass; the help says the unit; positional="*": bare words instead of a flag."""
    return field(default=default, metadata={"help": help, "choices": choices, "positional": positional})


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"error: {message}\n")


def parse_config(cls: type, presets: dict[str, dict], argv: list[str] | None = None,
                 description: str = "") -> Any:
    """Build the frozen dataclass cls from defaults < --preset < flags.

    cls      fields made by knob(), typed int, float, str, bool or tuple[str, ...] (--rewards a,b,c)
    presets  name -> field differences, picked by the field `preset`; empty where the script has none
    Exits with code 2 and one line on a bad flag. Raises what cls.__post_init__ raises.
    """
    parser = _Parser(description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    actions = [_add_flag(parser, knob_field, presets) for knob_field in fields(cls)]
    given, unknown = parser.parse_known_intermixed_args(argv)  # words may stand on both sides of a flag
    if unknown:
        flags = [flag for action in actions for flag in action.option_strings]
        parser.error(_unknown_sentence(unknown, flags))
    values = {name: tuple(value) if isinstance(value, list) else value
              for name, value in vars(given).items()}
    if not presets:
        return cls(**values)
    name = values.get("preset", cls.preset)
    if name not in presets:
        parser.error(f"unknown preset '{name}': --preset takes one of {', '.join(presets)}")
    return cls(**{**presets[name], **values})


def _add_flag(parser: _Parser, knob_field: Field, presets: dict[str, dict]) -> argparse.Action:
    name, default, meta = knob_field.name, knob_field.default, knob_field.metadata
    assert default is not MISSING and meta, f"field {name} must be made by knob()"
    shown = ",".join(default) if isinstance(default, tuple) else default
    names = f": {', '.join(presets)}" if name == "preset" else ""
    help_text = f"{meta['help']}{names} (default: {shown if shown != '' else 'none'})".replace("%", "%%")
    if meta["positional"]:
        return parser.add_argument(name, nargs=meta["positional"], metavar=name.upper(), help=help_text)
    flag = "--" + name.replace("_", "-")
    if knob_field.type is bool:
        return parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=help_text)
    if knob_field.type == tuple[str, ...]:
        return parser.add_argument(flag, type=_comma_list(meta["choices"]), metavar="A,B", help=help_text)
    assert knob_field.type in (int, float, str), f"field {name}: no flag form for type {knob_field.type}"
    metavar = None if meta["choices"] else knob_field.type.__name__.upper()
    return parser.add_argument(flag, type=knob_field.type, choices=meta["choices"], metavar=metavar,
                               help=help_text)


def _comma_list(choices: tuple | None) -> Callable[[str], tuple[str, ...]]:
    def split(text: str) -> tuple[str, ...]:
        items = tuple(item.strip() for item in text.split(",") if item.strip())
        for item in items:
            if choices and item not in choices:
                raise argparse.ArgumentTypeError(f"'{item}' is not one of {', '.join(choices)}")
        return items
    return split


def _unknown_sentence(unknown: list[str], flags: list[str]) -> str:
    flag = next((word.split("=")[0] for word in unknown if word.startswith("-")), None)
    if flag is None:
        return f"unexpected argument '{unknown[0]}': see --help"
    close = difflib.get_close_matches(flag, flags, n=1)
    return f"unknown flag {flag}: " + (f"did you mean {close[0]}?" if close else "see --help")


def config_dict(cfg: Any) -> dict:
    """The config as plain JSON types (tuples become lists), as written to config.json."""
    return json.loads(json.dumps(asdict(cfg)))


def run_main(main: Callable, argv: list[str] | None = None) -> None:
    """Run main(), or main(argv) if given; a user's mistake becomes one line and exit code 2.

    Only errors that our own code raised on purpose are shortened; a bug, or an error from inside a library,
    keeps its traceback.
    """
    try:
        main() if argv is None else main(argv)
    except (ValueError, OSError) as error:
        if not _raised_by_us(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except PeerLost as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":      # torch's, known without importing it
            raise
        print("error: the GPU's memory is full: lower --micro-batch (the gradient stays the same) or add "
              "--gradient-checkpointing to train.py, lower --batch-size elsewhere; `python plan.py` says "
              f"what fits. torch: {'. '.join(str(error).split('. ')[:3])}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _raised_by_us(error: Exception) -> bool:
    """True if the innermost frame is a file of this project, and for a ValueError also a raise statement.

    C code has no frame: a shape error of numpy seems to come from our line, but that has no raise.
    """
    frame = traceback.extract_tb(error.__traceback__)[-1]
    path = Path(frame.filename).resolve()
    ours = path.is_relative_to(ROOT) and "site-packages" not in path.parts  # a venv may lie in ROOT
    return ours and (isinstance(error, OSError) or "raise " in (frame.line or ""))


# --------------------------------------------------------------------------------------- seeds and processes
def derive_seed(*key: int | str) -> int:
    """63-bit seed from a key of integers and strings, the same on every machine, for any number of processes.

    >>> derive_seed(0, "rollout", 3) != derive_seed(0, 3, "rollout")
    True
    """
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*key: int | str, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator seeded by the key, e.g. generator(seed, "rollout", epoch, group, member).

    The CPU generator uses the low 32 bits of its seed only, so among millions of keys a few share a stream.
    """
    import torch

    return torch.Generator(device=device).manual_seed(derive_seed(*key))


@dataclass(frozen=True)
class Dist:
    rank: int
    world_size: int
    local_rank: int
    device: torch.device


def setup_dist() -> Dist:
    """This process's place, from torchrun's environment or alone. ValueError if there are too few GPUs."""
    import torch

    rank, world_size, local_rank = (int(os.environ.get(name, default)) for name, default in
                                    (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise ValueError(f"process {local_rank} of this machine finds {count} GPU(s): set torchrun's "
                             f"--nproc-per-node to at most {count}")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if world_size > 1:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                             device_id=device if device.type == "cuda" else None)
    return Dist(rank, world_size, local_rank, device)


class PeerLost(RuntimeError):
    """Another process of this job has died."""


@contextmanager
def peer_lost_sentence(dist: Dist) -> Iterator[None]:
    """Turn what a collective raises when another process is gone into one clear PeerLost.

    Without it every surviving process ends in its own traceback of sockets. The launcher ends the job.
    """
    import torch

    try:
        yield
    except RuntimeError as error:
        from_network = isinstance(error, torch.distributed.DistError) or re.search(
            r"gloo|nccl|connection (closed|reset)|broken pipe", str(error), re.IGNORECASE)
        if dist.world_size == 1 or not from_network:
            raise
        raise PeerLost(f"process {dist.rank} of {dist.world_size} lost the others: one of them died; its own "
                       "message stands above, or none if it was killed. The last checkpoint is whole: go on "
                       "with --resume auto (torchrun --max-restarts N does so by itself)") from error


def broadcast(value: Any, dist: Dist) -> Any:
    """Rank 0's value (plain types) on all ranks."""
    import torch

    if dist.world_size == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0, device=dist.device)
    return box[0]


def cleanup_dist() -> None:
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def all_reduce_mean(tensor: Tensor, dist: Dist) -> Tensor:
    """Mean of a tensor of the same shape on all ranks; the tensor itself at world size 1."""
    import torch

    if dist.world_size == 1:
        return tensor
    total = tensor.detach().to(dist.device, copy=True)
    torch.distributed.all_reduce(total)
    return (total / dist.world_size).to(tensor.device)


def all_gather_list(tensor: Tensor, dist: Dist) -> Tensor:
    """All ranks' small tensors joined along dim 0 in rank order; their lengths may differ and may be zero."""
    import torch

    if dist.world_size == 1:
        return tensor
    lengths = [torch.zeros(1, dtype=torch.long, device=dist.device) for _ in range(dist.world_size)]
    torch.distributed.all_gather(lengths, torch.tensor([len(tensor)], device=dist.device))
    longest = max(int(length) for length in lengths)
    padded = torch.zeros(longest, *tensor.shape[1:], dtype=tensor.dtype, device=dist.device)
    padded[:len(tensor)] = tensor.detach()
    parts = [torch.empty_like(padded) for _ in lengths]
    torch.distributed.all_gather(parts, padded)
    return torch.cat([part[:length] for part, length in zip(parts, lengths)]).to(tensor.device)


def average_gradients(params: Iterable[nn.Parameter], dist: Dist) -> None:
    """Replace every .grad by its mean over ranks, a missing one counting as zero; no change at world size 1.

    A parameter that no rank used keeps grad None, so that weight decay skips it as in a run of one process.
    Once a step, after all backward passes: what DistributedDataParallel does, which wraps a forward() and so
    fits neither the leaf in the middle of stage III nor modules called by other names. What `shard` has
    split is averaged already.
    """
    import torch

    if dist.world_size == 1:
        return
    params = [param for param in params if param.requires_grad and not is_sharded(param)]
    used = torch.tensor([float(param.grad is not None) for param in params], device=dist.device)
    torch.distributed.all_reduce(used)
    for bucket in _buckets([param for param, count in zip(params, used.tolist()) if count]):
        for param in bucket:
            if param.grad is None:
                param.grad = torch.zeros_like(param)
        flat = torch.cat([param.grad.flatten() for param in bucket])
        torch.distributed.all_reduce(flat)
        flat /= dist.world_size
        for param, mean in zip(bucket, flat.split([param.numel() for param in bucket])):
            param.grad.copy_(mean.view_as(param))


def _buckets(params: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket, size = [], 0
    for param in params:
        bucket.append(param)
        size += param.numel()
        if size >= BUCKET_ELEMENTS:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


# --------------------------------------------------------------------------------- weights split over devices
def shard(model: nn.Module, dist: Dist) -> None:
    """Split the weights of `lim` and `dit` over all ranks (FSDP2), block by block; with them their gradients,
    optimizer state and EMA. Blocks are gathered when they run; the frozen parts stay whole on every rank.

    Call it when requires_grad is as it will be, before an optimizer or an EMA is made.
    """
    import warnings

    import torch
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)     # no output is changed in place
    mesh = torch.distributed.device_mesh.init_device_mesh(dist.device.type, (dist.world_size,))
    for layer in model.lim.connector.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model.lim, mesh=mesh)
    for block in model.dit.transformer_blocks:
        fully_shard(block.attn2, mesh=mesh)
        register_fsdp_forward_method(block.attn2, "kv")     # runs outside of its block, and so gathers alone
        fully_shard(block, mesh=mesh)
    fully_shard(model.dit, mesh=mesh)
    register_fsdp_forward_method(model.dit, "cross_kv")


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")              # a DTensor, known without importing its package


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor; all of it where it is not split."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tree: Any) -> Any:
    """The same nested dicts and lists with split tensors put together on the CPU. All ranks must call it."""
    if isinstance(tree, dict):
        return {key: whole(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [whole(value) for value in tree]
    return tree.detach().full_tensor().cpu() if hasattr(tree, "to_local") else tree


def split_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor split as `like` is; the tensor itself where that is whole."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def reshard(model: nn.Module | None) -> None:
    """Drop gathered weights. Trap: the outermost ones stay gathered after a forward pass without gradient,
    and the next pass would not see that the split ones have changed."""
    from torch.distributed.fsdp import FSDPModule

    for module in () if model is None else model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """The model with whole weights, for as long as the block lasts. All ranks must enter it."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
    try:
        yield
    finally:
        reshard(model)


def clip_gradients(params: Iterable[nn.Parameter], max_norm: float, dist: Dist) -> float:
    """Scale all gradients down to a joint norm of at most max_norm; returns the norm before."""
    import torch

    params = [param for param in params if param.grad is not None]
    split = [local(param.grad) for param in params if is_sharded(param)]
    if not split:
        return torch.nn.utils.clip_grad_norm_(params, max_norm).item()
    squares = sum(part.square().sum() for part in split)
    torch.distributed.all_reduce(squares)
    squares += sum(param.grad.square().sum() for param in params if not is_sharded(param))
    norm = squares.sqrt()
    torch._foreach_mul_([local(param.grad) for param in params], (max_norm / (norm + 1e-6)).clamp(max=1))
    return norm.item()


# --------------------------------------------------------------------------------------------- durable files
def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, write: Callable[[Path], Any]) -> None:
    """write(temporary sibling), then rename it onto path; folders on the way are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        temporary.chmod(0o644)  # safetensors makes files that only their owner can read
        _fsync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _fsync(path.parent)


def write_json(path: str | Path, data: Any) -> None:
    text = json.dumps(data, indent=2) + "\n"
    write_atomic(Path(path), lambda temporary: temporary.write_text(text))


@contextmanager
def _full_disk_sentence(path: Path) -> Iterator[None]:
    """Turn the three shapes of a full disk into one OSError.

    safetensors says it in text only; torch.save hides the OSError of its file behind a RuntimeError.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        codes = {getattr(cause, "errno", None) for cause in (error, error.__context__)}
        if errno.ENOSPC not in codes and f"os error {errno.ENOSPC}" not in str(error):
            raise
        raise OSError(errno.ENOSPC, f"the disk is full, {path} was not written and what was saved before is "
                                    "untouched: free some space or choose another --run-dir") from error


def save_safetensors(path: str | Path, tensors: dict[str, Tensor],
                     metadata: dict[str, str] | None = None) -> None:
    """Write tensors atomically. Tensors that share storage are written as separate copies."""
    from safetensors.torch import save_file

    path, plain, storages = Path(path), {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous().cpu()
        storage = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    with _full_disk_sentence(path):
        write_atomic(path, lambda temporary: save_file(plain, temporary, metadata))


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors on the CPU, and the text metadata. FileNotFoundError, or ValueError for a damaged file."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"no safetensors file at {path}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file ({error}): write it again") from error


def load_into(target: nn.Module | dict[str, Tensor], tensors: dict[str, Tensor], what: str,
              hint: str = "") -> None:
    """Copy tensors into a module, or into named parameters, strictly; ValueError as refuse_misfit says."""
    import torch

    own = target if isinstance(target, dict) else target.state_dict()
    refuse_misfit(own, {name: tensor.shape for name, tensor in tensors.items()}, what, hint,
                  "the model" if own is target else type(target).__name__)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(split_like(tensors[name], tensor))


def refuse_misfit(own: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], what: str, hint: str = "",
                  model: str = "the model") -> None:
    """ValueError in one sentence, unless a file holds what a model has, by name and shape: what does not fit,
    the first keys, the hint."""
    wrong = [f"{name} is {tuple(shapes[name])} instead of {tuple(tensor.shape)}"
             for name, tensor in own.items() if name in shapes and tuple(shapes[name]) != tuple(tensor.shape)]
    faults = {"missing": sorted(own.keys() - shapes.keys()), "unknown": sorted(shapes.keys() - own.keys()),
              "of another shape": wrong}
    if any(faults.values()):
        listed = "; ".join(f"{len(keys)} {fault}: {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}"
                           for fault, keys in faults.items() if keys)
        raise ValueError(f"{what} does not fit {model} ({listed})" + (f": {hint}" if hint else ""))


# ----------------------------------------------------------------------------------------------- checkpoints
def save_checkpoint(run_dir: str | Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict,
                    keep: int = 2, meta: dict | None = None) -> Path:
    """Write run_dir/checkpoints/step-00000123 in one rename, then remove all but the newest `keep`.

    tensors  name -> state dict, one safetensors file each, e.g. {"trained": ..., "ema": ...}
    state    plain types and tensors: optimizer, position in the data, RNG states
    meta     readable JSON entries that go into meta.json next to "step"
    Checkpoints of later steps go too: after a resume from an older one they are an abandoned future.
    For rank 0 only.
    Raises OSError with a clear sentence if the disk is full; the last good checkpoint stays.
    """
    if keep < 1:
        raise ValueError(f"the number of checkpoints to keep must be at least 1, got {keep}")
    folder = Path(run_dir) / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:08d}"
    temporary, aside = folder / f".tmp-{final.name}", folder / f"{final.name}.old"
    for leftover in folder.glob(".tmp-*"):
        shutil.rmtree(leftover)
    try:
        temporary.mkdir()
        with _full_disk_sentence(final):
            meta = {"step": step, "tensors": list(tensors), **(meta or {})}
            _write_checkpoint(temporary, tensors, state, meta)
        if final.exists():  # no rename onto a full folder: for a moment `aside` is the good one
            if aside.exists():
                _remove(aside)
            os.replace(final, aside)
        os.replace(temporary, final)
        if aside.exists():
            _remove(aside)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _fsync(folder)
    others = [path for path in _checkpoints(run_dir) if path != final]
    earlier = [path for path in others if path.name < final.name]
    for path in others:
        if path not in earlier[max(0, len(earlier) - keep + 1):]:
            _remove(path)
    return final


def _write_checkpoint(folder: Path, tensors: dict[str, dict[str, Tensor]], state: dict, meta: dict) -> None:
    import torch

    for name, entry in tensors.items():
        save_safetensors(folder / f"{name}.safetensors", entry)
    with open(folder / "state.pt", "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    torch.load(folder / "state.pt", weights_only=True, mmap=True)  # a refused type fails now, not later
    write_json(folder / "meta.json", meta)
    _fsync(folder)


def _remove(folder: Path) -> None:
    """Delete a checkpoint: renamed first, so that no crash leaves half a folder under a good name."""
    doomed = folder.with_name(f".tmp-{folder.name}")
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def _checkpoints(run_dir: str | Path) -> list[Path]:
    """Complete checkpoints, oldest first. A crash while a step is saved again may leave its .old copy."""
    found = [meta.parent for meta in Path(run_dir).glob("checkpoints/step-*/meta.json")]
    return sorted(found, key=lambda path: (path.name.removesuffix(".old"), not path.name.endswith(".old")))


def find_checkpoint(resume: str, run_dir: str | Path) -> Path | None:
    """The checkpoint folder that --resume means, None for a start from nothing.

    resume  "auto": the newest in run_dir, if any; "": none; a path: that checkpoint, or that run's newest

    Raises FileNotFoundError if a named folder holds none.
    """
    if resume in ("", "auto"):
        return (_checkpoints(run_dir) or [None])[-1] if resume else None
    if (Path(resume) / "meta.json").is_file():
        return Path(resume)
    found = _checkpoints(resume)
    if not found:
        raise FileNotFoundError(f"no complete checkpoint in {resume}: --resume takes auto, a run folder, or "
                                "one of the folders in its checkpoints/")
    return found[-1]


def load_checkpoint(path: str | Path) -> tuple[dict[str, dict[str, Tensor]], dict, dict]:
    """(tensors, state, meta) as given to save_checkpoint, on the CPU. ValueError names a damaged file."""
    import pickle
    import zipfile

    import torch

    meta_path, state_path = Path(path) / "meta.json", Path(path) / "state.pt"
    for file in (meta_path, state_path):
        if not file.is_file():
            raise FileNotFoundError(f"no checkpoint at {path}: {file.name} is missing")
    advice = "is truncated or damaged: delete this checkpoint and resume from the one before"
    try:
        meta = json.loads(meta_path.read_text())
    except ValueError as error:
        raise ValueError(f"{meta_path} {advice}") from error
    tensors = {name: read_safetensors(Path(path) / f"{name}.safetensors")[0] for name in meta["tensors"]}
    if not zipfile.is_zipfile(state_path):  # torch.load would try its old format and fail obscurely
        raise ValueError(f"{state_path} {advice}")
    try:
        return tensors, torch.load(state_path, map_location="cpu", weights_only=True), meta
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{state_path} {advice}") from error


# ---------------------------------------------------------------------------------------- run folder and log
def prepare_run_dir(run_dir: str | Path, resume: str, cfg: Any,
                    may_change: tuple[str, ...] = ("run_dir", "resume")) -> Path:
    """Create the run folder and write config.json; refuse to mix two runs in one folder. Rank 0 only.

    resume      "" for a fresh run, else "auto" or a path: then config.json of run_dir must equal cfg
    may_change  the only fields that may differ on resume
    """
    run_dir = Path(run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise NotADirectoryError(f"a file is in the way of the folder {run_dir}: change --run-dir") from error
    except PermissionError as error:
        raise PermissionError(f"no permission to create the folder {run_dir}: change --run-dir") from error
    if not os.access(run_dir, os.W_OK | os.X_OK):
        raise PermissionError(f"no permission to write into {run_dir}: change --run-dir")
    used = (run_dir / "metrics.jsonl").exists() or _checkpoints(run_dir)
    if used and not resume:
        raise FileExistsError(f"{run_dir} already holds a run: continue it with --resume auto, or choose "
                              "another --run-dir")
    saved, config = run_dir / "config.json", config_dict(cfg)
    if resume and saved.exists():
        _refuse_changes(saved, config, may_change)
    write_json(saved, config)
    return run_dir


def _refuse_changes(saved: Path, config: dict, may_change: tuple[str, ...]) -> None:
    old = json.loads(saved.read_text())
    changed = [f"--{name.replace('_', '-')} {old.get(name, '(absent)')} -> {config.get(name, '(absent)')}"
               for name in {**old, **config}
               if name not in may_change and old.get(name, MISSING) != config.get(name, MISSING)]
    if changed:
        raise ValueError(f"cannot resume {saved.parent} with other settings ({', '.join(changed)}): give the "
                         "flags of the first run, or start a new one with another --run-dir")


class RunLog:
    """Append-only metrics.jsonl: one strict JSON object a line, on disk after every line. Rank 0 only.

    resume_step  drop the lines with record[key] >= resume_step, left by a killed run after its checkpoint
    """

    def __init__(self, run_dir: str | Path, resume_step: int | None = None, key: str = "step") -> None:
        self.path = Path(run_dir) / "metrics.jsonl"
        if resume_step is not None and self.path.exists():
            kept = [entry for entry in read_metrics(self.path) if entry.get(key, -math.inf) < resume_step]
            text = "".join(json.dumps(entry) + "\n" for entry in kept)
            write_atomic(self.path, lambda temporary: temporary.write_text(text))
        self.file = open(self.path, "a")

    def write(self, record: dict) -> None:
        self.file.write(json.dumps(_strict(record), allow_nan=False) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def _strict(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null, at any depth."""
    if isinstance(value, dict):
        return {name: _strict(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: str | Path) -> list[dict]:
    """The records of a metrics.jsonl. A last line cut by a kill is left out; another bad line: ValueError."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no run log at {path}")
    lines, records = Path(path).read_text().splitlines(), []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"line {number} of {path} is not JSON: {line[:60]!r}") from error
    return records


class StopSignal:
    """SIGINT or SIGTERM sets .stop, so that a loop can save and leave; Ctrl-C again later interrupts at once.

    Trap: on one Ctrl-C a process under torchrun gets SIGINT twice, from the terminal and from torchrun. What
    comes within `grace` seconds of the first signal is that one's echo.
    name is the signal that came last ("SIGTERM"), or "".
    """

    def __init__(self, grace: float = 3.0) -> None:
        self.stop, self.name, self.grace, self.since = False, "", grace, math.inf

    def __enter__(self) -> StopSignal:
        self.previous = {number: signal.signal(number, self._handle)
                         for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and time.monotonic() - self.since > self.grace:
            raise KeyboardInterrupt
        self.stop, self.name = True, signal.Signals(number).name
        self.since = min(self.since, time.monotonic())


# ------------------------------------------------------------------------------------------ training helpers
def adamw(params: Iterable[nn.Parameter], lr: float, weight_decay: float,
          betas: tuple[float, float] = (0.9, 0.95)) -> torch.optim.AdamW:
    """AdamW with weight decay on tensors of two and more dimensions only (not on biases, norms)."""
    import torch
    params = list(params)
    groups = [{"params": [p for p in params if p.ndim >= 2], "weight_decay": weight_decay},
              {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0}]
    split = any(is_sharded(p) for p in params)     # whole and split tensors cannot share a fused loop
    return torch.optim.AdamW(groups, lr=lr, betas=betas, foreach=False if split else None)


def load_optimizer(opt: torch.optim.Optimizer, state: dict) -> None:
    """Load a state of whole tensors into an optimizer whose parameters may be split."""
    params = [p for group in opt.param_groups for p in group["params"]]
    entries = {i: {key: split_like(value, params[i]) if value.ndim else value for key, value in entry.items()}
               for i, entry in state["state"].items()}
    opt.load_state_dict({**state, "state": entries})


def compile_modules(*modules: nn.Module) -> None:
    """torch.compile, in place. Without one fusion of Inductor's on GPUs, of sums over rows with sums over
    columns: for the gradient of the DiT at a width of 2,240 it failed an assertion (torch 2.11, H100)."""
    import torch._dynamo
    import torch._inductor.config as inductor

    inductor.triton.mix_order_reduction = False
    # trap: all compiled modules share one count of what was compiled, and beyond 8 torch falls back to eager;
    # stage 3 needs more, for LIM and DiT, with and without gradient, pictures of training and held-out ones
    torch._dynamo.config.recompile_limit = 64
    for module in modules:
        module.compile()


def compile_parts(device: torch.device, *parts: nn.Module) -> None:
    """Compile LIM and DiT to train them. On a GPU by the blocks of each one's first list: equal blocks share
    what the first of them compiled, so that depth costs no compile time. On a CPU, where only nano is
    trained, whole: on two cores a step of stage 2 takes 0.60 s instead of 0.76, for 165 s of compiling
    instead of 99."""
    from torch import nn

    compile_modules(*(parts if device.type == "cpu" else [
        block for part in parts
        for block in next(each for each in part.modules() if isinstance(each, nn.ModuleList))]))


def precision(device: str | torch.device, dtype: str) -> AbstractContextManager:
    """Forward passes in "fp32", or with matrix products in "bf16" (autocast).

    It also picks the attention kernel, and that choice outlives the block: gradient checkpointing computes
    forward passes again in the backward pass, after the block, and must find the kernel of the first time."""
    import torch
    kind, kernels = torch.device(device).type, torch.backends.cuda
    # On a CPU the fused kernel's bf16 gradient takes twice as long as plain products and a softmax in bf16,
    # and several times as long where heads and sequences are short.
    kernels.enable_flash_sdp(kind != "cpu" or dtype == "fp32")
    kernels.allow_fp16_bf16_reduction_math_sdp(kind == "cpu")
    kernels.enable_cudnn_sdp(False)
    return nullcontext() if dtype == "fp32" else torch.autocast(kind, torch.bfloat16)


def check_skips(in_a_row: int, most: int, where: str) -> None:
    """Stop a run that no longer learns: ValueError says what to look at."""
    if in_a_row >= most:
        raise ValueError(f"{in_a_row} updates in a row were skipped up to {where}: no finite loss and "
                         "gradient, or no finite reward. The weights before them are saved. Look at loss, "
                         "grad_norm and reward_nan in metrics.jsonl: if a norm rose before, lower --lr; if "
                         "not, an input or a reward is bad, or --dtype fp32 is needed")


def cosine_lr(step: int, total: int, warmup: int, base: float) -> float:
    """Learning rate of a step counted from 0: linear to base at step warmup, then cosine to 0 at step total.

    >>> [cosine_lr(step, total=5, warmup=1, base=8.0) for step in (0, 1, 3, 5)]
    [4.0, 8.0, 4.0, 0.0]
    """
    if step < warmup:
        return base * (step + 1) / (warmup + 1)  # + 1: a first step at rate 0 would be wasted
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return 0.5 * base * (1 + math.cos(math.pi * progress))


def ema_update(ema: dict[str, Tensor], params: dict[str, Tensor], decay: float) -> None:
    """ema <- decay * ema + (1 - decay) * params, in place, same keys and dtypes."""
    import torch

    assert ema.keys() == params.keys(), f"keys differ: {sorted(ema.keys() ^ params.keys())[:3]}"
    with torch.no_grad():
        torch._foreach_lerp_([local(e) for e in ema.values()], [local(params[name]) for name in ema],
                             1 - decay)


@contextmanager
def weights_of(params: dict[str, nn.Parameter], ema: dict[str, Tensor],
               model: nn.Module | None = None) -> Iterator[None]:
    """The model with its EMA weights, for as long as the block lasts; `model`: needed if they are split."""
    import torch
    kept = {name: p.detach().clone() for name, p in params.items()}
    with torch.no_grad():
        for name, p in params.items():
            local(p).copy_(local(ema[name]))
    reshard(model)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, p in params.items():
                local(p).copy_(local(kept[name]))
        reshard(model)


def fingerprint(module: nn.Module) -> str:
    """SHA-256 of every parameter and buffer, names included: equal only where all bits are."""
    import torch
    digest = hashlib.sha256()
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def count_params(module: nn.Module) -> tuple[int, int]:
    """(trainable, frozen) parameters."""
    trainable = sum(param.numel() for param in module.parameters() if param.requires_grad)
    return trainable, sum(param.numel() for param in module.parameters()) - trainable


def peak_memory_gb() -> float:
    """Highest memory so far in 1e9 bytes: tensors on the GPU if this process uses one, else resident."""
    import resource

    import torch

    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def environment() -> dict[str, str]:
    """Versions, device and commit, for the run's records; commit is "" outside a git checkout."""
    import platform
    import subprocess
    from importlib.metadata import version

    import torch

    commit = ""
    if shutil.which("git"):
        answer = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
        commit = answer.stdout.strip() if answer.returncode == 0 else ""
    device = f"CPU {platform.machine()}, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    return {"python": platform.python_version(), "torch": str(torch.__version__),
            "transformers": version("transformers"), "device": device, "commit": commit}


# -------------------------------------------------------------------------------------------------- pictures
def save_png(path: str | Path, picture: Image.Image) -> None:
    write_atomic(Path(path), lambda temporary: picture.save(temporary, format="PNG"))


def save_image(path: str | Path, image: Tensor, scale: int = 1) -> None:
    """Save (3, H, W) in [0, 1] as PNG, every pixel drawn scale x scale."""
    save_png(path, _to_picture(image, scale))


def _to_picture(image: Tensor, scale: int) -> Image.Image:
    import numpy as np
    from PIL import Image

    pixels = np.asarray(image.detach().float().cpu().clamp(0, 1) * 255).round().astype(np.uint8)
    picture = Image.fromarray(pixels.transpose(1, 2, 0))
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def image_grid(images: Tensor, columns: int, scale: int = 1, captions: list[str] | None = None,
               row_titles: list[str] | None = None) -> Image.Image:
    """White sheet of images, row by row, with a caption under each image and a title above each row.

    images  (N, 3, H, W) in [0, 1]; every pixel is drawn scale x scale
    Text wraps to the width of its cell (titles: of the sheet). ValueError if there are too few or many texts.
    """
    from PIL import Image, ImageDraw, ImageFont

    N, _, H, W = images.shape
    rows, cell, gap = math.ceil(N / columns), W * scale, 8
    for name, texts, expected in (("captions", captions, N), ("row_titles", row_titles, rows)):
        if texts is not None and len(texts) != expected:
            raise ValueError(f"image_grid expects {expected} {name} for {N} images in {columns} columns, "
                             f"got {len(texts)}")
    font_size = max(12, cell // 24)
    font, line = ImageFont.load_default(font_size), math.ceil(1.3 * font_size)
    width = gap + columns * (cell + gap)
    titles = [_wrap(text, font, width - 2 * gap) for text in row_titles or [""] * rows]
    labels = [_wrap(text, font, cell) for text in captions or [""] * N]
    below = [line * max(map(len, labels[row * columns:(row + 1) * columns])) for row in range(rows)]
    height = gap + sum(line * len(title) + H * scale + under + gap for title, under in zip(titles, below))
    sheet = Image.new("RGB", (width, height), "white")
    draw, top = ImageDraw.Draw(sheet), gap
    for row in range(rows):
        draw.multiline_text((gap, top), "\n".join(titles[row]), "black", font, spacing=line - font_size)
        top += line * len(titles[row])
        for index in range(row * columns, min(N, (row + 1) * columns)):
            left = gap + (index % columns) * (cell + gap)
            sheet.paste(_to_picture(images[index], scale), (left, top))
            for number, text in enumerate(labels[index]):
                at = (left + cell / 2, top + H * scale + number * line + 2)
                draw.text(at, text, "black", font, anchor="ma")
        top += H * scale + below[row] + gap
    return sheet


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Break text into lines of at most width pixels, at spaces where possible; no text, no line."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return [line for line in lines if line]
