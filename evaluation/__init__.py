"""What the commands of evaluate.py share: flags, tables, files, work that goes on where it was cut short.

A command is `main(argv) -> dict`. It prints a table and writes it, with its settings, as JSON into --out.
What is slow is written piece by piece, beside a settings.json with all that it depends on: the same command
goes on from there, one with other settings is refused. An error (s.e.) is a sample standard deviation /
sqrt(n), over prompts or over questions.

Letters: B pictures, H W pixels.
"""
import csv
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple
from urllib.request import urlopen

import torch
from torch import Tensor
from tqdm import tqdm

from common import (Dist, Refused, StopSignal, atomic, config_dict, environment, fingerprint, knob,
                    mean_over_ranks, parse_config, precision, resolve, setup_dist, write_json)
from model import PRESETS, ParaUni
from sample import load, save_picture


@dataclass(frozen=True)
class EvalConfig:
    """The flags of every command."""
    preset: str = knob("nano", "size of everything", choices=PRESETS)
    weights: str = knob("auto", "auto: weights/PRESET, which tools/convert.py writes; random; or a folder")
    stage_file: str = knob("auto", "a stageN.safetensors; auto: the newest in --weights; none")
    out: str = knob("runs/evaluate", "folder for tables and pictures")
    seed: int = knob(0, "all randomness is derived from it")
    batch_size: int = knob(64, "pictures at a time")
    dtype: str = knob("auto", "auto: bf16 on CUDA, fp32 on CPU", choices=("auto", "fp32", "bf16"))


@dataclass(frozen=True)
class DrawConfig(EvalConfig):
    """The flags of every command that draws pictures."""
    num_steps: int = knob(20, "sampling steps")
    guidance_scale: float = knob(4.5, "classifier-free guidance; 1 turns it off")


def start(cls: type, argv: list[str] | None, description: str) -> tuple[Any, Dist]:
    """The flags of a command with every "auto" decided, and this process's place."""
    cfg = parse_config(cls, argv, description=description)
    dist = setup_dist()
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    return resolve(cfg, dist.device), dist


# ----------------------------------------------------------------------------- tables

def mean_and_error(values: list[float]) -> tuple[float | None, float | None]:
    """Mean and its standard error; None where there are too few values."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return (fmean(values) if values else None), error


def number(value: float | None, width: int = 8, sign: str = "") -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{sign}{width}.4f}"


def finish(cfg: EvalConfig, name: str, result: dict, table: str) -> dict:
    """Print the table; write the result with how it was made."""
    path = Path(cfg.out) / f"{name}.json"
    write_json(path, {**result, "config": config_dict(cfg), "environment": environment()})
    print(f"{table}\nwritten to {path}")
    return result


def title_of(benchmark: str, lacks: list[str]) -> str:
    """What is not the whole benchmark, or not by its own judge, does not bear its name alone."""
    return f"{benchmark}'s rules, not the benchmark: {'; '.join(lacks)}" if lacks else benchmark


def spread(limit: int, total: int) -> list[int]:
    """`limit` places evenly over `total`; 0: all of them."""
    limit = min(limit, total) or total
    return [k * total // limit for k in range(limit)]


# ----------------------------------------------------------------------------- files

def read_json(path: str | Path) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8-sig"))


def read_table(path: str | Path, delimiter: str = ",") -> list[dict[str, str]]:
    """The rows of a table below its line of column names."""
    # a picture in base64 is one field
    csv.field_size_limit(2 ** 31 - 1)
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        return list(csv.DictReader(file, delimiter=delimiter))


def fetched(path: str, url: str, flag: str, cfg: EvalConfig, dist: Dist) -> Path:
    """The file that a flag names; where it names none a public one, fetched once into --out."""
    copy = Path(cfg.out) / url.rpartition("/")[2]
    if not path and not copy.is_file() and dist.lead:
        try:
            with urlopen(url, timeout=30) as answer, atomic(copy) as temporary:
                temporary.write_bytes(answer.read())
        except OSError as error:
            raise Refused(f"cannot fetch {url} ({error}): fetch it elsewhere, name it with {flag}") from error
    # the others wait until it is there
    any_rank(False, dist)
    return Path(path) if path else copy


def any_rank(flag: bool, dist: Dist) -> bool:
    """True if any process says so. All must ask: they wait for each other here."""
    return mean_over_ranks(float(flag), dist) > 0


def file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ----------------------------------------------------------------------------- work that goes on

def same_settings(folder: Path, settings: dict) -> None:
    """Write settings.json into a folder; refuse to go on with work of other settings."""
    path = folder / "settings.json"
    old = read_json(path) if path.is_file() else settings
    changed = [f"--{name.replace('_', '-')} {old.get(name)} -> {value}"
               for name, value in settings.items() if old.get(name) != value]
    if changed:
        raise Refused(f"{folder} holds work of other settings ({', '.join(changed)}): give those, or choose "
                      "another --out")
    write_json(path, settings)


def drawing_settings(cfg: DrawConfig, model: ParaUni) -> dict:
    """All that a picture depends on, apart from its prompt."""
    names = ("preset", "seed", "num_steps", "guidance_scale", "dtype")
    return {"weights": f"sha256:{fingerprint(model)[:16]}", **{name: getattr(cfg, name) for name in names}}


def resume_lines(path: Path) -> list[dict]:
    """The records of an earlier run, one a line; a last line that was cut is taken off."""
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    with atomic(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in lines))
    return [json.loads(line) for line in lines]


def is_done(path: Path, made_of: dict) -> bool:
    """Is a judge's file there, and is it just this judge's about just these pictures?"""
    return path.is_file() and made_of.items() <= read_json(path).items()


def read_judged(path: str, files: list[Path], judge: str, key: str) -> tuple[str, dict, dict]:
    """What one judge said, from the file or folder that a flag names, or from ours.

    Each file is {judge: name, key: {picture or prompt: what was said}, "sha256": {picture: of its file}}, the
    last one if it likes. Returns the name, and both dicts of all files together.
    """
    if path:
        files = sorted(Path(path).glob("*.json")) if Path(path).is_dir() else [Path(path)]
    parts = [read_json(file) for file in files]
    names = {part.get(judge, "not named") for part in parts}
    if len(names) != 1:
        raise Refused(f"expected what one {judge} said, got {sorted(names)} in {len(files)} files of {path}")
    said = {name: value for part in parts for name, value in part[key].items()}
    digests = {name: value for part in parts for name, value in part.get("sha256", {}).items()}
    return names.pop(), said, digests


# ----------------------------------------------------------------------------- pictures

def draw(cfg: DrawConfig, model: ParaUni, prompts: list[str], seeds: list[int], **more: Any) -> Tensor:
    """A picture of each prompt from its own noise, (B, 3, H, W) in [0, 1] on the CPU, whatever the batch."""
    with precision(model.device, cfg.dtype):
        return model.generate(prompts, cfg.num_steps, cfg.guidance_scale, seed=seeds, **more).cpu()


class Job(NamedTuple):
    """A file to be drawn: one picture of a prompt, or four in a square."""
    path: Path
    text: str
    seeds: list[int]


def draw_files(cfg: DrawConfig, dist: Dist, jobs: list[Job]) -> bool:
    """Draw this process's share of the files that are not there yet. False if a signal stopped it."""
    model = load(cfg, dist.device)
    same_settings(Path(cfg.out), drawing_settings(cfg, model))
    todo = [job for job in jobs[dist.rank::dist.world_size] if not job.path.is_file()]
    per_file = len(jobs[0].seeds)
    per_batch = max(1, cfg.batch_size // per_file)
    with StopSignal() as stop, tqdm(total=len(todo), unit="file", disable=not dist.lead) as bar:
        while todo and not stop.stop:
            part, todo = todo[:per_batch], todo[per_batch:]
            prompts = [job.text for job in part for _ in job.seeds]
            seeds = [seed for job in part for seed in job.seeds]
            images = draw(cfg, model, prompts, seeds)                               # (B, 3, H, W)
            for job, group in zip(part, images.split(per_file)):
                save_picture(job.path, group[0] if per_file == 1 else square(group))
            bar.update(len(part))
    if any_rank(bool(todo), dist):
        print(f"stopped with {len(todo)} files to go; the same command goes on from here")
        return False
    return True


def square(images: Tensor) -> Tensor:
    """Four pictures (4, 3, H, W) as one: top left, top right, bottom left, bottom right."""
    top, bottom = (torch.cat([left, right], 2) for left, right in images.split(2))  # (3, H, 2 W) each
    return torch.cat([top, bottom], 1)                                              # (3, 2 H, 2 W)
