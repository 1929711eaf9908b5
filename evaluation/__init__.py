"""What the commands of evaluate.py share: flags, tables, files, pictures, work that goes on.

What is slow is written piece by piece, beside a settings.json with all that it depends on: killed or not, the
same command goes on from there, one with other settings is refused. An error (s.e.) is a sample standard
deviation / sqrt(n), over prompts or over questions.

Letters: B pictures, H W pixels.
"""
import csv
import json
import math
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.utils import make_grid
from tqdm import tqdm

from common import (Dist, Refused, atomic, config_dict, environment, fingerprint, knob, mean_over_ranks,
                    parse_config, precision, refuse_changes, resolve, setup_dist, write_json)
from data import nano_prompts
from grpo import open_prompts
from model import PRESETS, ParaUni
from sample import load, save_picture


# ----------------------------------------------------------------------------- flags
# of every command that asks a model; DrawConfig adds how pictures are drawn, ScoreConfig rewards of them

@dataclass(frozen=True)
class EvalConfig:
    preset: str = knob("nano", "size of everything", choices=PRESETS)
    weights: str = knob("auto", "auto: weights/PRESET, which tools/convert.py writes; random; or a folder")
    stage_file: str = knob("auto", "a stageN.safetensors; auto: the highest N in --weights; none")
    seed: int = knob(0, "all randomness is derived from it")
    batch_size: int = knob(64, "pictures at a time")
    dtype: str = knob("auto", "auto: bf16 on CUDA, fp32 on CPU", choices=("auto", "fp32", "bf16"))


@dataclass(frozen=True)
class DrawConfig(EvalConfig):
    num_steps: int = knob(20, "sampling steps")
    guidance_scale: float = knob(4.5, "classifier-free guidance; 1 turns it off")


@dataclass(frozen=True)
class ScoreConfig(DrawConfig):
    prompts: str = knob("", "file with one held-out prompt a line; empty: the nano world's")
    limit: int = knob(0, "the first so many prompts; 0: all of them")
    rewards: tuple[str, ...] = knob(("clip", "pickscore", "aesthetic"), "names, or file.py:function")
    reward_weights: str = knob("auto", "folder of the reward models; auto: nano's own, or weights/rewards")


def start(cls: type, argv: list[str] | None, doc: str) -> tuple[Any, Dist]:
    """The flags with every "auto" decided, and this process's place; the first line of doc heads --help."""
    cfg = parse_config(cls, argv, description=doc.split("\n")[0])
    dist = setup_dist()
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    return resolve(cfg, dist.device), dist


def heldout_prompts(cfg: ScoreConfig, model: ParaUni) -> list[str]:
    """The first --limit prompts of --prompts, else of the nano world's."""
    if not (cfg.prompts or model.preset.shapes_world):
        raise Refused(f"preset {cfg.preset} has no held-out prompts of its own: name a file with --prompts")
    prompts = open_prompts(cfg.prompts, model) or nano_prompts(test=True)
    return prompts[:cfg.limit or None]


def spread(items: list, limit: int) -> list:
    """`limit` of the items, from all over the list; 0: all of them."""
    total = len(items)
    limit = min(limit, total) or total
    return [items[k * total // limit] for k in range(limit)]


# ----------------------------------------------------------------------------- tables, files

def mean_and_error(values: list[float]) -> tuple[float | None, float | None]:
    """Mean and its standard error; None where there are too few values."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return (fmean(values) if values else None), error


# Two-sided 95 % quantiles of Student's t for 1, 2, 3 ... degrees of freedom: with 3 seeds +- 4.30 errors
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def t_quantile(df: int) -> float:
    """Beyond the table: its expansion in 1/df, at most 0.003 off."""
    if df <= len(T95):
        return T95[df - 1]
    return 1.960 + 2.372 / df + 2.822 / df ** 2


def claim(text: str, measure: str, values: list[float] | Tensor, over: str = "prompts") -> dict:
    """A row of the table of claims: a sentence of the paper is supported, contradicted or undecided at 95 %.

    measure  what the values are: positive where they speak for the claim
    values   one for each of what `over` names: prompts, seeds
    """
    values = list(map(float, values))
    estimate, error = mean_and_error(values)
    verdict = "undecided"
    if error is not None and abs(estimate) > t_quantile(len(values) - 1) * error:
        verdict = "supported" if estimate > 0 else "contradicted"
    return {"claim": text, "verdict": verdict, "measure": measure, "estimate": estimate,
            "standard error": error, "n": len(values), "over": over}


def table(rows: list[dict]) -> str:
    """Rows with the same keys as a Markdown table; floats with 4 decimals, None as an empty cell."""
    lines = [list(rows[0])]
    for row in rows:
        known = ["" if value is None else value for value in row.values()]
        lines.append([f"{value:.4f}" if isinstance(value, float) else str(value) for value in known])
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    padded = [[text.ljust(width) for text, width in zip(line, widths)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def read_csv(path: str | Path, delimiter: str = ",") -> list[dict[str, str]]:
    """The rows of a table below its line of column names."""
    # a picture in base64 is one field
    csv.field_size_limit(2 ** 31 - 1)
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        return list(csv.DictReader(file, delimiter=delimiter))


def read_json(path: str | Path) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8-sig"))


def finish(cfg: EvalConfig, name: str, result: dict, text: str) -> dict:
    """Print what was found; write the result with how it was made."""
    path = Path(cfg.out) / f"{name}.json"
    write_json(path, {**result, "config": config_dict(cfg), "environment": environment()})
    print(f"{text}\nwritten to {path}")
    return result


def same_settings(folder: Path, settings: dict) -> None:
    """Write settings.json into a folder; refuse to go on with work of other settings."""
    path = folder / "settings.json"
    if path.is_file():
        refuse_changes(read_json(path), settings, str(folder))
    write_json(path, settings)


def drawing_settings(cfg: DrawConfig, model: ParaUni) -> dict:
    """All that a picture depends on, apart from its prompt."""
    return {"weights": f"sha256:{fingerprint(model)[:16]}", "preset": cfg.preset, "seed": cfg.seed,
            "num_steps": cfg.num_steps, "guidance_scale": cfg.guidance_scale, "dtype": cfg.dtype}


def write_lines(path: Path, records: list[dict]) -> None:
    """One JSON a line."""
    with atomic(path) as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in records))


def wait(dist: Dist) -> None:
    """Until all processes are here."""
    mean_over_ranks(0.0, dist)


# ----------------------------------------------------------------------------- pictures

def draw(cfg: DrawConfig, model: ParaUni, prompts: list[str], seeds: list[int], images: Tensor | None = None,
         layers: list[int] | None = None) -> Tensor:
    """A picture of each prompt from its own noise, (B, 3, H, W) in [0, 1] on the CPU.

    images  (B, 3, H, W), one shown beside each prompt;  layers  those that are fused
    """
    drawn = []
    for first in range(0, len(prompts), cfg.batch_size):
        part = slice(first, first + cfg.batch_size)
        shown = None if images is None else images[part]                            # (b, 3, H, W)
        with precision(model.device, cfg.dtype):
            new = model.generate(prompts[part], cfg.num_steps, cfg.guidance_scale, seed=seeds[part],
                                 images=shown, layers=layers)                       # (b, 3, H, W)
        drawn.append(new.cpu())
    return torch.cat(drawn)                                                         # (B, 3, H, W)


def keep_request(path: Path, request: Any, dist: Dist) -> None:
    """Write beside pictures what they are to show, as a line of JSON; refuse those of something else."""
    if path.is_file() and read_json(path) != request:
        raise Refused(f"{path} asks for something else than this command: choose another --out")
    if dist.lead:
        write_lines(path, [request])


def draw_files(cfg: DrawConfig, dist: Dist, jobs: list[tuple[Path, str, list[int]]]) -> None:
    """Draw this process's share of the files that are not there yet, and wait for the others'. A job: a file,
    its prompt, and the seed of its picture, or of each of four in a square."""
    model = load(cfg, dist.device)
    same_settings(Path(cfg.out), drawing_settings(cfg, model))
    todo = [job for job in jobs[dist.rank::dist.world_size] if not job[0].is_file()]
    per_file = len(jobs[0][2])
    per_batch = max(1, cfg.batch_size // per_file)
    for first in tqdm(range(0, len(todo), per_batch), unit="batch", disable=not dist.lead):
        paths, texts, seeds = zip(*todo[first:first + per_batch])
        prompts = [text for text in texts for _ in range(per_file)]
        images = draw(cfg, model, prompts, list(chain(*seeds)))                     # (B, 3, H, W)
        for path, group in zip(paths, images.split(per_file)):
            # four in a square: top left, top right, bottom left, bottom right
            save_picture(path, make_grid(group, nrow=2, padding=0))
    wait(dist)


# ----------------------------------------------------------------------------- published benchmarks

def fetched(path: str, url: str, cfg: EvalConfig, dist: Dist) -> Path:
    """The file that a flag names; where it names none a public one, fetched once into --out."""
    copy = Path(cfg.out) / url.rpartition("/")[2]
    if not path and not copy.is_file() and dist.lead:
        torch.hub.download_url_to_file(url, str(copy))
    # the others wait until it is there
    wait(dist)
    return Path(path) if path else copy


def load_judge(kind: type, source: str, device: torch.device) -> tuple[nn.Module, str]:
    """A published model of transformers, from a folder or the hub, and its name in the records."""
    model, report = kind.from_pretrained(source, use_safetensors=True, output_loading_info=True,
                                         dtype=torch.float32, trust_remote_code=False)
    if report["missing_keys"]:
        raise Refused(f"{source} lacks weights: {sorted(report['missing_keys'])[:3]}")
    return model.eval().to(device), f"{source} sha256:{fingerprint(model)[:16]}"


def read_judged(path: Path) -> tuple[str, dict]:
    """What one judge said, from a file or a folder of some: {"judge": name, "items": {item: what it said}}.
    Returns the name, and the items of all files together."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    names, items, count = set(), {}, 0
    for part in map(read_json, files):
        names.add(part["judge"])
        items |= part["items"]
        count += len(part["items"])
    # of two files about one picture, as an earlier run's may be, the last would count
    if len(names) != 1 or len(items) != count:
        raise Refused(f"expected what one judge said in {path}, of each item once, got {sorted(names)} and "
                      f"{count} entries about {len(items)}")
    return names.pop(), items


def title_of(benchmark: str, lacks: dict[str, bool]) -> dict:
    """What is not the whole benchmark, or not by its own judge, does not bear its name alone. lacks: what may
    be said against it, and whether it is so."""
    found = [text for text, is_so in lacks.items() if is_so]
    name = f"{benchmark}'s rules, not the benchmark: {'; '.join(found)}" if found else benchmark
    return {"name": name, "benchmark": not found}
