"""What do the layers do, and what does each part of the method add? The commands of evaluate.py:

    layers   one trained model, looked into. Each layer alone as the condition (paper Figure 2), how alike the
             layers' c_i are (Figure 4), what each region is worth to each reward (Figure 5), and the curves
             of stage III runs (Figure 9 and the supplement's).
    ablate   many models, trained. The rows of Table 3 and a few more, each over several seeds.

Both write every figure as PNG and CSV, and a verdict on the paper's claims: supported, contradicted or
undecided at 95 %, from the standard error beside it. Every picture of a comparison starts from the same
noise, so differences are paired: by prompt in `layers`, by seed in `ablate`.

A run of `ablate` (a row of the table, with one seed) is a folder: `plan.json` holds the flags of its train.py
runs, `row.json` what came out. What has its row.json is never trained again; what was interrupted goes on
from its checkpoint. The file is long because it is two commands; they share claims and files, no more.

Letters: L VLM layers, B prompts, N queries, E condition width, C H W latent.
"""
import csv
import hashlib
import io
import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from common import config_dict, derive_seed, fingerprint, knob, read_metrics, run_main, write_json
from evaluate import ModelConfig
from ldam import LDAM, REGIONS, region_layers
from scoring import mean_and_error

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor
    from model import ParaUni

# Two-sided 95 % quantiles of Student's t for 1, 2, 3 ... degrees of freedom: with 3 seeds +- 4.30 errors.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)


# ----------------------------------------------------------------------------- claims

@dataclass(frozen=True)
class Claim:
    """A sentence of the paper and what was measured of it; a positive `estimate` speaks for it."""
    text: str
    measure: str                # what the estimate is a difference of
    estimate: float
    error: float | None         # standard error; None: one value only
    n: int                      # values the error is over
    over: str                   # prompts or seeds

    @property
    def verdict(self) -> str:
        """By the 95 % interval of Student's t: undecided where it holds 0."""
        if self.error is None:
            return "undecided"
        df = self.n - 1
        half = (T95[df - 1] if df <= len(T95) else 1.96 + 2.6 / df) * self.error    # beyond: 0.01 off
        if abs(self.estimate) <= half:
            return "undecided"
        return "supported" if self.estimate > 0 else "contradicted"

    def record(self) -> dict:
        return {"claim": self.text, "verdict": self.verdict, "measure": self.measure,
                "estimate": self.estimate, "standard error": self.error, "n": self.n, "over": self.over}


def claim(text: str, measure: str, values: list[float], over: str) -> Claim:
    """A claim from values that are positive where they speak for it, one a prompt or a seed."""
    estimate, error = mean_and_error(values)
    return Claim(text, measure, estimate, error, len(values), over)


# ----------------------------------------------------------------------------- files

def write_csv(path: Path, rows: list[dict]) -> None:
    """Rows with the same keys; floats with 6 digits, an absent number as an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value
                         for key, value in row.items()})
    path.write_text(text.getvalue(), encoding="utf-8")


def markdown(rows: list[dict]) -> str:
    """The rows as a Markdown table; floats with 4 decimals."""
    def cell(value: object) -> str:
        text = "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
        return text.replace("|", "\\|")
    lines = [" | ".join(rows[0]), " | ".join("---" for _ in rows[0])]
    lines += [" | ".join(cell(value) for value in row.values()) for row in rows]
    return "".join(f"| {line} |\n" for line in lines)


def new_figure(columns: int, width: float = 4, height: float = 3.2, rows: int = 1) -> tuple["Figure", list]:
    """A figure of `rows` x `columns` panels (inches each) and its axes, without pyplot's global state."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained", dpi=120)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def refuse_other(path: Path, was: dict, now: dict) -> None:
    """ValueError names what differs between the plan of finished work and the one asked for."""
    changed = [f"{name}: {difference(was.get(name), now.get(name))}" for name in {**was, **now}
               if was.get(name) != now.get(name)]
    if changed:
        raise ValueError(f"{path} is of other settings ({'; '.join(changed)}): give those again, "
                         "or choose another --out")


def difference(was: object, now: object) -> str:
    """Where two values first differ; of the flags of several stages, the flag and its two values."""
    if not (isinstance(was, list) and isinstance(now, list)):
        return f"{was} -> {now}"
    was, now = ([word for flags in stages for word in flags] for stages in (was, now))
    k = next((k for k, (a, b) in enumerate(zip(was, now)) if a != b), min(len(was), len(now)))
    return f"{' '.join(was[max(0, k - 1):k + 1])} -> {' '.join(now[max(0, k - 1):k + 1])}"


def ema(values: list[float | None], share: float = 0.1) -> list[float | None]:
    """smooth <- (1 - share) smooth + share value, from the first value on; None before it."""
    smooth, out = None, []
    for value in values:
        if value is not None:
            smooth = value if smooth is None else (1 - share) * smooth + share * value
        out.append(smooth)
    return out


# ----------------------------------------------------------------------------- layers

@dataclass(frozen=True)
class LayersConfig(ModelConfig):
    """Flags of `evaluate.py layers`."""
    out: str = knob("runs/layers", "folder for figures and tables; an interrupted analysis there goes on")
    last_file: str = knob("", "weights trained on the last layer only, for Figure 4, as "
                              "runs/ablate/last-seed0/stage2/stage2.safetensors; empty: without")
    runs: tuple[str, ...] = knob((), "stage 3 run folders whose curves are drawn; empty: none")
    prompts: str = knob("", "file with one held-out prompt a line; empty: the nano world's")
    limit: int = knob(96, "the first so many prompts; 0: all of them")
    rewards: tuple[str, ...] = knob(("clip", "pickscore", "aesthetic"), "names, or file.py:function")
    reward_weights: str = knob("", "folder of the reward models; empty: weights/nano")
    num_steps: int = knob(20, "sampling steps")
    guidance_scale: float = knob(4.5, "classifier-free guidance; 1 turns it off")

    def __post_init__(self) -> None:
        super().__post_init__()
        if "clip" not in self.rewards:
            raise ValueError("expected --rewards with clip, which Figure 2 shows, "
                             f"got {','.join(self.rewards) or 'none'}")
        if self.preset != "nano" and not self.prompts:
            raise ValueError(f"preset {self.preset} has no held-out prompts of its own: "
                             "name a file with --prompts")


def layers(cfg: LayersConfig) -> dict:
    """The paper's analyses of layers (Figures 2, 4, 5 and training curves), as PNG and CSV.

    Returns the rows of claims.csv, figure2.csv and figure5.csv under these names, {} if stopped.
    """
    from data import nano_prompts, read_prompts
    from evaluate import load, resume_lines
    from rewards import build_reward
    from sample import out_folder
    logs = {run: stage3_log(Path(run)) for run in cfg.runs}
    prompts = read_prompts(cfg.prompts) if cfg.prompts else nano_prompts(test=True)
    prompts = prompts[:cfg.limit or len(prompts)]
    folder = out_folder(cfg.out)
    model, dtype = load(cfg, cfg.stage_file)
    model.tokenize(prompts)                          # an unknown word is reported before the first picture
    scorers = {name.rpartition(":")[2]: build_reward(name, model.device, weights=cfg.reward_weights or None)
               for name in cfg.rewards}
    settings = {"weights": f"sha256:{fingerprint(model)[:16]}", "prompts": digest(prompts), "seed": cfg.seed,
                "num_steps": cfg.num_steps, "guidance_scale": cfg.guidance_scale, "dtype": dtype,
                "rewards": {name: fingerprint(scorer)[:16] for name, scorer in scorers.items()}}
    finished = {record["variant"]: record for record in resume_lines(folder / "variants.jsonl", settings)}
    L = model.preset.vlm.num_layers
    wanted = {"all": list(range(1, L + 1)), **{f"layer {i}": [i] for i in range(1, L + 1)},
              **{f"no {region}": without_region(region, L) for region in REGIONS}}
    if not score_variants(cfg, model, dtype, prompts, scorers, wanted, finished):
        return {}
    scores = {name: finished[name]["scores"] for name in wanted}
    single, claims = figure2(scores, L, folder)
    removed, more = figure5(scores, folder)
    similar = figure4(cfg, model, dtype, prompts, folder)
    claims = [c.record() for c in (*claims, *similar, *more)]
    save_layer_pictures(cfg, model, dtype, prompts, wanted, folder / "figure2_pictures.png")
    if logs:
        figure9(logs, folder)
    write_csv(folder / "claims.csv", claims)
    result = {"claims": claims, "figure2": single, "figure5": removed}
    write_json(folder / "layers.json", {**result, "config": config_dict(cfg), "settings": settings})
    print(f"{markdown(single)}\n{markdown(removed)}\n{markdown(claims)}\nwritten to {folder}")
    return result


def without_region(region: str, num_layers: int) -> list[int]:
    gone = region_layers(region, num_layers)
    return [i for i in range(1, num_layers + 1) if i not in gone]


def draw(model: "ParaUni", dtype: str, prompts: list[str], cfg: "LayersConfig | AblateConfig",
         which: list[int] | None) -> "Tensor":
    """A picture of each prompt, (B, 3, H, W) in [0, 1] on the CPU, conditioned on some layers;
    picture i's noise comes from (seed, i) whatever the layers and the model."""
    import torch
    from common import precision
    images = []
    for first in range(0, len(prompts), cfg.batch_size):
        said = prompts[first:first + cfg.batch_size]
        seeds = [derive_seed(cfg.seed, "analyse", i) for i in range(first, first + len(said))]
        with precision(model.device, dtype):
            images.append(model.generate(said, cfg.num_steps, cfg.guidance_scale, seed=seeds,
                                         layers=which).cpu())                           # (b, 3, H, W)
    return torch.cat(images)                                                            # (B, 3, H, W)


def score_variants(cfg: LayersConfig, model: "ParaUni", dtype: str, prompts: list[str], scorers: dict,
                   wanted: dict[str, list[int]], finished: dict[str, dict]) -> bool:
    """Draw and score every variant that is not in `finished`; add it there and to the file.
    False if a signal stopped it."""
    from common import StopSignal
    from tqdm import tqdm
    todo = [name for name in wanted if name not in finished]
    with (StopSignal() as signal, open(Path(cfg.out) / "variants.jsonl", "a") as file,
          tqdm(total=len(todo), unit="variant", dynamic_ncols=True, disable=not todo) as bar):
        for number, name in enumerate(todo):
            if signal.stop:
                bar.close()
                print(f"stopped with {len(todo) - number} variants to go; the same command goes on from here")
                return False
            bar.set_postfix_str(name)
            images = draw(model, dtype, prompts, cfg, wanted[name])                     # (B, 3, H, W)
            record = {"variant": name, "layers": wanted[name],
                      "scores": {reward: scorer(images, prompts).tolist()
                                 for reward, scorer in scorers.items()}}
            file.write(json.dumps(record) + "\n")
            file.flush()
            finished[name] = record
            bar.update()
    return True


def figure2(scores: dict[str, dict], L: int, folder: Path) -> tuple[list[dict], list[Claim]]:
    """Each single layer as the condition: the rewards by depth; beside them, all layers together."""
    rows = []
    for name in ("all", *(f"layer {i}" for i in range(1, L + 1))):
        row: dict = {"condition": name}
        for reward, values in scores[name].items():
            row[reward], row[f"{reward} s.e."] = mean_and_error(values)
        rows.append(row | {"n": len(scores[name]["clip"])})
    write_csv(folder / "figure2.csv", rows)
    rewards, depth = list(scores["all"]), list(range(1, L + 1))
    figure, axes = new_figure(len(rewards))
    for axis, reward in zip(axes, rewards):
        mean, error = rows[0][reward], rows[0][f"{reward} s.e."] or 0
        axis.axhline(mean, color="black", label="all layers")
        axis.axhspan(mean - error, mean + error, color="black", alpha=0.15, linewidth=0)
        axis.errorbar(depth, [row[reward] for row in rows[1:]],
                      [row[f"{reward} s.e."] or 0 for row in rows[1:]], marker="o", capsize=3,
                      color="tab:blue", label="one layer")
        axis.set(title=reward, xlabel="layer used as the condition")
    axes[0].legend()
    figure.savefig(folder / "figure2.png")
    clip = [scores[f"layer {i}"]["clip"] for i in depth]                                # L lists of B
    slopes = [slope([column[b] for column in clip]) for b in range(len(clip[0]))]
    best = max(clip, key=fmean)
    return rows, [
        claim("A single layer's CLIP score rises with its depth (Figure 2)", "CLIP score a layer", slopes,
              "prompts"),
        claim("All layers together say more than the best single one", "CLIP score, all - best layer",
              [a - b for a, b in zip(scores["all"]["clip"], best)], "prompts")]


def digest(prompts: list[str]) -> str:
    return f"{len(prompts)} of sha256:{hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]}"


def slope(values: list[float]) -> float:
    """Least-squares slope of values over 1, 2, 3 ...

    >>> slope([1.0, 3.0, 5.0])
    2.0
    """
    centre, mean = (len(values) + 1) / 2, fmean(values)
    deviations = [i + 1 - centre for i in range(len(values))]
    return sum(d * (v - mean) for d, v in zip(deviations, values)) / sum(d * d for d in deviations)


def similarity(model: "ParaUni", dtype: str, prompts: list[str], batch_size: int) -> "Tensor":
    """Cosine similarity of c_i and c_j, mean over queries: (B, L, L) on the CPU, for each prompt."""
    import torch
    import torch.nn.functional as F
    from common import precision
    parts = []
    for first in range(0, len(prompts), batch_size):
        prefix = model.encode_prefix(prompts[first:first + batch_size])
        with torch.no_grad(), precision(model.device, dtype):
            c = F.normalize(model.condition_layers(prefix).float(), dim=-1)             # (L, b, N, E)
            parts.append(torch.einsum("ibne,jbne->bij", c, c).cpu() / c.shape[2])       # (b, L, L)
    return torch.cat(parts)                                                             # (B, L, L)


def figure4(cfg: LayersConfig, model: "ParaUni", dtype: str, prompts: list[str], folder: Path) -> list[Claim]:
    """Cosine similarity between layers' c_i, of this model and of one trained on the last layer only."""
    from evaluate import load
    maps = {"trained on all layers": similarity(model, dtype, prompts, cfg.batch_size)}   # (B, L, L)
    if cfg.last_file:
        maps["trained on the last layer"] = similarity(load(cfg, cfg.last_file)[0], dtype, prompts,
                                                       cfg.batch_size)
    L = model.preset.vlm.num_layers
    write_csv(folder / "figure4.csv", [
        {"model": name, "layer": i + 1, **{f"layer {j + 1}": m.mean(0)[i, j].item() for j in range(L)}}
        for name, m in maps.items() for i in range(L)])
    figure, axes = new_figure(len(maps), 4.2, 3.6)
    low = min(m.mean(0).min().item() for m in maps.values())
    for axis, (name, m) in zip(axes, maps.items()):
        drawn = axis.imshow(m.mean(0), vmin=low, vmax=1, origin="lower", extent=(0.5, L + 0.5, 0.5, L + 0.5))
        for region in REGIONS:                              # the regions' borders, that clusters would follow
            edge = max(region_layers(region, L)) + 0.5
            axis.axhline(edge, color="white", linewidth=0.8)
            axis.axvline(edge, color="white", linewidth=0.8)
        axis.set(title=name, xlabel="layer", ylabel="layer")
    figure.colorbar(drawn, ax=axes, label="cosine similarity")
    figure.savefig(folder / "figure4.png")
    region_of = {i: region for region in REGIONS for i in region_layers(region, L)}
    pairs = [(i, j) for i in range(L) for j in range(i)]
    same = [p for p in pairs if region_of[p[0] + 1] == region_of[p[1] + 1]]
    other = [p for p in pairs if p not in same]
    return [claim(f"Layers of one region are more alike than layers of two (Figure 4), {name}",
                  "cosine similarity, same region - two regions",
                  [fmean(one[i, j].item() for i, j in same) - fmean(one[i, j].item() for i, j in other)
                   for one in m], "prompts") for name, m in maps.items() if same]


def figure5(scores: dict[str, dict], folder: Path) -> tuple[list[dict], list[Claim]]:
    """Each region removed: the paired change of each reward."""
    changes = {region: {reward: [a - b for a, b in zip(scores[f"no {region}"][reward], values)]
                        for reward, values in scores["all"].items()} for region in REGIONS}
    rows = []
    for region, by_reward in changes.items():
        row: dict = {"removed": region}
        for reward, values in by_reward.items():
            row[reward], row[f"{reward} s.e."] = mean_and_error(values)
        rows.append(row | {"n": len(values)})
    write_csv(folder / "figure5.csv", rows)
    rewards = list(scores["all"])
    figure, axes = new_figure(len(rewards), 3.2, 3)
    for axis, reward in zip(axes, rewards):
        axis.bar(list(REGIONS), [row[reward] for row in rows], capsize=4, color=["C0", "C1", "C2"],
                 yerr=[row[f"{reward} s.e."] or 0 for row in rows])
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(title=f"change of {reward}", xlabel="region removed")
    figure.savefig(folder / "figure5.png")
    claims = []
    for reward, region in (("clip", "deep"), ("aesthetic", "middle"), ("pickscore", "middle")):
        if reward in rewards:                           # falls further than the mean of the other two
            others = [changes[r][reward] for r in REGIONS if r != region]
            claims.append(claim(f"{reward} needs the {region} region most (Figure 5)",
                                f"{reward}, others removed - {region} removed",
                                [fmean(o[b] for o in others) - changes[region][reward][b]
                                 for b in range(len(others[0]))], "prompts"))
    return rows, claims


def save_layer_pictures(cfg: LayersConfig, model: "ParaUni", dtype: str, prompts: list[str],
                        wanted: dict[str, list[int]], path: Path, rows: int = 4) -> None:
    """The first prompts (a row each) under every variant (a column each), from the same noise."""
    import torch
    from common import image_grid, save_png
    said = prompts[:rows]
    columns = [draw(model, dtype, said, cfg, which) for which in wanted.values()]
    images = torch.stack(columns, 1).flatten(0, 1)                                      # (n, 3, H, W)
    save_png(path, image_grid(images, len(wanted), max(1, 96 // images.shape[-1]),
                              [name for _ in said for name in wanted], said))


def stage3_log(run: Path) -> list[dict]:
    """The epochs of a stage 3 run. ValueError if the folder holds another kind of run."""
    records = [r for r in read_metrics(run / "metrics.jsonl") if "ldam/fired" in r]
    if not records:
        raise ValueError(f"expected the folder of a stage 3 run, with epochs in its log, got {run}")
    return records


def figure9(logs: dict[str, list[dict]], folder: Path) -> None:
    """The curves of stage III runs, raw (pale) and as EMA 0.1: rewards, and what LDAM listens to."""
    rewards = list(dict.fromkeys(key for log in logs.values() for key in log[0] if key.startswith("reward/")))
    signals = ["grad_norm", "ldam/gamma_raw", "ldam/r_s", "kl"]
    for name, keys in (("figure9", rewards), ("curves_signals", signals)):
        keys = [key for key in keys if any(key in r for log in logs.values() for r in log)]
        figure, axes = new_figure(len(keys))
        for k, (run, log) in enumerate(logs.items()):
            for axis, key in zip(axes, keys):
                draw_curve(axis, log, key, f"C{k % 10}", run)
        for axis, key in zip(axes, keys):
            axis.set(title=key, xlabel="epoch")
        axes[0].legend(fontsize=7)
        figure.savefig(folder / f"{name}.png")
        write_csv(folder / f"{name}.csv", [
            {"run": run, "epoch": r["epoch"], "phase": r["phase"], "fired": r["ldam/fired"],
             **{key: r.get(key) for key in keys}} for run, log in logs.items() for r in log])


def draw_curve(axis, log: list[dict], key: str, color: str, label: str) -> None:
    x, raw = [r["epoch"] for r in log], [r.get(key) for r in log]
    axis.plot(x, [math.nan if v is None else v for v in raw], color=color, alpha=0.3)
    axis.plot(x, [math.nan if v is None else v for v in ema(raw)], color=color, label=label)
    for r, last in zip(log[1:], log):
        if r["phase"] != last["phase"]:
            axis.axvline(last["epoch"] + 0.5, color="grey", linewidth=0.5)
    for r in log:
        if r["ldam/fired"]:
            axis.axvline(r["epoch"], color=color, linewidth=0.8, linestyle=":")


# ----------------------------------------------------------------------------- ablate: the rows

@dataclass(frozen=True)
class Row:
    title: str
    family: str                 # "layers": stages 1 and 2 from stage 0; "ldam": stage 3 from one stage 2
    paper: float | None         # GenEval, overall, of the paper's Table 3


ROWS = {
    "all": Row("all layers", "layers", 0.87),
    "no-shallow": Row("no shallow layers", "layers", 0.82),
    "no-middle": Row("no middle layers", "layers", 0.85),
    "no-deep": Row("no deep layers", "layers", 0.84),
    "every-other": Row("every other layer", "layers", 0.86),
    "no-norm": Row("no LayerNorm", "layers", 0.73),
    "last": Row("last layer only", "layers", None),
    "no-ldam": Row("no LDAM", "ldam", None),
    "ldam": Row("LDAM, the paper's thresholds", "ldam", 0.87),
    "ldam-epoch": Row("LDAM, nano thresholds, noise for an epoch", "ldam", None),
    "ldam-keep": Row("LDAM, nano thresholds, noise kept", "ldam", None),
    "no-grad-norm": Row("LDAM, nano thresholds, no gradient-norm gate", "ldam", 0.86),
    "no-reward": Row("LDAM, nano thresholds, no reward gate", "ldam", 0.86)}
AT_NANO_THRESHOLDS = ("ldam-epoch", "ldam-keep", "no-grad-norm", "no-reward")
MEASURES = ("judge", "clip", "pickscore", "aesthetic", "loss")          # only the loss is better small
PAPER_SPIKE, PAPER_PATIENCE = 100.0, 5
SPIKES = (100.0, 30.0, 10.0, 5.0, 3.0, 2.0, 1.7, 1.5, 1.3, 1.2, 1.1)
PATIENCES = (5, 4, 3, 2, 1)
COMPARED = (("Without the shallow layers it is worse", "all", "no-shallow"),        # claim, better, worse
            ("Without the middle layers it is worse", "all", "no-middle"),
            ("Without the deep layers it is worse", "all", "no-deep"),
            ("With every other layer it is worse", "all", "every-other"),
            ("Without LayerNorm it is worse", "all", "no-norm"),
            ("The last layer alone is worse than all", "all", "last"),
            ("LDAM helps", "ldam-epoch", "no-ldam"),
            ("LDAM needs the gradient-norm gate", "ldam-epoch", "no-grad-norm"),
            ("LDAM needs the reward gate", "ldam-epoch", "no-reward"))


@dataclass(frozen=True)
class AblateConfig:
    """Flags of `evaluate.py ablate`. The defaults are sized for about an hour on two CPU cores."""
    weights: str = knob("auto", "auto (weights/nano), or a folder with vlm/, transformer/, vae/ of nano: "
                                "where the rows about layers start")
    init: str = knob("auto", "stage 2 weights where the rows about LDAM start; auto: those in --weights")
    rows: tuple[str, ...] = knob(tuple(ROWS), "rows to train; the table shows every finished one",
                                 choices=tuple(ROWS))
    seeds: int = knob(3, "runs of each row, with seeds 0, 1, 2 ...")
    jobs: int = knob(2, "runs at a time; the cores are shared out among them")
    stage1_steps: int = knob(120, "steps of stage 1, rows about layers")
    stage2_steps: int = knob(100, "steps of stage 2, rows about layers")
    pictures: int = knob(32, "pictures a step in stages 1 and 2")
    reinforce: bool = knob(False, "rows about layers: also stage 3, without LDAM")
    stage3_steps: int = knob(12, "epochs of stage 3 for each of the three rewards")
    num_groups: int = knob(3, "stage 3: prompts an epoch")
    group_size: int = knob(8, "stage 3: pictures a prompt")
    spike: float = knob(0.0, "nano threshold of the gradient's jump; 0: found in the log of row ldam")
    patience: int = knob(0, "nano threshold of the reward's declines; 0: found in the log of row ldam")
    dtype: str = knob("bf16", "of stages 1 and 2; stage 3 and scoring are fp32", choices=("fp32", "bf16"))
    limit: int = knob(120, "test prompts of the nano benchmark, evenly spread, one picture each")
    num_steps: int = knob(10, "sampling steps of these pictures")
    guidance_scale: float = knob(4.5, "their guidance")
    batch_size: int = knob(60, "of them at a time")
    seed: int = knob(0, "their noise; the same for all rows and all training seeds")
    out: str = knob("runs/ablate", "folder for runs, tables and plots; interrupted work there goes on")

    def __post_init__(self) -> None:
        for name, least in (("seeds", 2), ("jobs", 1), ("stage1_steps", 1), ("stage2_steps", 1),
                            ("pictures", 1), ("stage3_steps", 1), ("num_groups", 1), ("group_size", 2),
                            ("limit", 6), ("num_steps", 1), ("batch_size", 1), ("spike", 0), ("patience", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"expected --{name.replace('_', '-')} of at least {least}, "
                                 f"got {getattr(self, name)}")
        if not self.rows:
            raise ValueError(f"expected --rows to name some of {', '.join(ROWS)}, got none")
        if bool(self.spike) != bool(self.patience):
            raise ValueError("expected --spike and --patience together, or neither, "
                             f"got {self.spike:g} and {self.patience}")


def layer_flags(name: str, num_layers: int) -> list[str]:
    """What a row about layers adds to the flags of stage 1."""
    chosen = {"last": [num_layers], "every-other": list(range(num_layers, 0, -2))[::-1],
              **{f"no-{region}": without_region(region, num_layers) for region in REGIONS}}.get(name)
    return (["--layers", ",".join(map(str, chosen))] if chosen else []) + ["--no-norm"] * (name == "no-norm")


def ldam_flags(name: str, spike: float, patience: int) -> list[str]:
    """What a row about LDAM adds to the flags of stage 3."""
    extra = {"no-ldam": ["--no-ldam"], "ldam": [], "ldam-epoch": [], "ldam-keep": ["--ldam-mode", "keep"],
             "no-grad-norm": ["--no-ldam-use-grad-norm"], "no-reward": ["--no-ldam-use-reward"]}[name]
    nano = ["--ldam-spike", f"{spike:g}", "--ldam-patience", str(patience)]
    return extra + nano * (name in AT_NANO_THRESHOLDS)


def make_plan(cfg: AblateConfig, name: str, seed: int, num_layers: int, spike: float, patience: int) -> dict:
    """The train.py flags of a run's stages, in order, and how its pictures are scored."""
    from model import weights_folder
    folder, parts = Path(cfg.out) / f"{name}-seed{seed}", weights_folder("nano", cfg.weights)
    start = str(parts / "stage2.safetensors") if cfg.init == "auto" else cfg.init
    base = {n: ["--stage", str(n), "--seed", str(seed), "--weights", cfg.weights, "--resume", "auto",
                "--keep", "1", "--run-dir", str(folder / f"stage{n}")] for n in (1, 2, 3)}
    supervised = ["--batch-size", str(cfg.pictures), "--micro-batch", str(cfg.pictures), "--dtype", cfg.dtype,
                  "--save-every", "50"]
    reinforced = ["--steps", str(cfg.stage3_steps), "--warmup", "2", "--num-groups", str(cfg.num_groups),
                  "--group-size", str(cfg.group_size), "--micro-batch", str(cfg.num_groups * cfg.group_size),
                  "--num-steps", "4", "--num-eval", "24", "--eval-steps", str(cfg.num_steps),
                  "--eval-every", "10000", "--save-every", "10"]
    if ROWS[name].family == "ldam":
        stages = [base[3] + ["--init", start] + reinforced + ldam_flags(name, spike, patience)]
    else:
        stages = [base[n] + supervised + ["--steps", str(steps), "--warmup", str(max(1, steps // 10))] + more
                  for n, steps, more in (
                      (1, cfg.stage1_steps, layer_flags(name, num_layers)),
                      (2, cfg.stage2_steps, ["--init", str(folder / "stage1" / "stage1.safetensors")]))]
        if cfg.reinforce:
            stages += [base[3] + ["--init", str(folder / "stage2" / "stage2.safetensors")] + reinforced
                       + ["--no-ldam"]]
    return {"stages": stages, "from": stamp(parts, [start] if ROWS[name].family == "ldam" else []),
            "score": {key: getattr(cfg, key) for key in ("limit", "num_steps", "guidance_scale", "batch_size",
                                                         "seed", "weights")}}


def stamp(parts: Path, files: list[str]) -> str:
    """SHA-256 of the weights that a run starts from and is scored by: others must not share its table."""
    from rewards import NANO_WEIGHTS
    folders = [*(parts / part for part in ("vlm", "transformer", "vae")),
               *(NANO_WEIGHTS / name for name in ("clip", "pickscore", "aesthetic"))]
    total = hashlib.sha256()
    for path in (*(path for folder in folders for path in sorted(folder.glob("*.safetensors"))),
                 *map(Path, files)):
        if not path.is_file():
            raise FileNotFoundError(f"expected the weights {path}, found none: change --weights or --init")
        total.update(path.read_bytes())
    return total.hexdigest()[:16]


# ----------------------------------------------------------------------------- ablate: one run

def run_row(argv: list[str]) -> None:
    """`python analyse.py FOLDER`: train and score what FOLDER/plan.json says, from where it was left."""
    import train
    if len(argv) != 1 or not Path(argv[0], "plan.json").is_file():
        raise ValueError("expected the folder of one row of `evaluate.py ablate`, with a plan.json, "
                         f"got {' '.join(argv) or 'nothing'}")
    folder, began = Path(argv[0]), time.perf_counter()
    plan = json.loads((folder / "plan.json").read_text())
    for flags in plan["stages"]:
        stage = flags[flags.index("--stage") + 1]
        path = Path(flags[flags.index("--run-dir") + 1]) / f"stage{stage}.safetensors"
        if path.is_file():
            continue
        sys.argv = ["train.py", *flags]                         # the command that the weights' record quotes
        if not train.main(flags):
            return                                              # a signal stopped it; everything is saved
    scores = score_row(AblateConfig(**plan["score"]), path)
    write_json(folder / "row.json", {"scores": scores, "weights": str(path),
                                     "seconds": round(time.perf_counter() - began)})
    for checkpoints in folder.glob("stage*/checkpoints"):
        shutil.rmtree(checkpoints)


def score_row(cfg: AblateConfig, path: Path) -> dict:
    """What one trained model is worth: the judge's score in six tasks, the rewards of the same pictures, and
    the flow-matching loss on held-out pictures, with the same noise for every model."""
    from evaluate import spread
    from nano import world
    from rewards import build_reward
    from sample import load_model
    model = load_model("nano", cfg.weights, str(path), 0)
    benchmark = world.benchmark_prompts()
    prompts = [benchmark[i] for i in spread(cfg.limit, len(benchmark))]
    said = [prompt.text for prompt in prompts]
    images = draw(model, "fp32", said, cfg, None)                                       # (B, 3, H, W)
    tasks = world.task_scores(world.judge(images, prompts), prompts)
    rewards = {name: build_reward(name, model.device)(images, said).mean().item()
               for name in ("clip", "pickscore", "aesthetic")}
    return {"judge": tasks.pop("overall"), **rewards, "loss": heldout_loss(model, cfg.seed), "tasks": tasks}


def heldout_loss(model: "ParaUni", seed: int, count: int = 256, batch: int = 64) -> float:
    """Mean flow-matching loss on `count` pictures whose captions are never trained on, at even times."""
    import numpy as np
    import torch
    from common import generator
    from dit import flow_matching_loss, randn
    from nano import world
    rng, pairs = np.random.default_rng(derive_seed(seed, "heldout loss")), []
    while len(pairs) < count:
        scene = world.sample_scene(rng)
        if prompt := world.sample_prompt(rng, scene, test=True):
            pairs.append((scene, prompt.text))
    times, total = (torch.arange(count) * 97 % count + 0.5) / count, 0.0                # (count,) mixed
    with torch.no_grad():
        for first in range(0, count, batch):
            part = pairs[first:first + batch]
            images = world.render([scene for scene, _ in part]).to(model.device)        # (b, 3, H, W)
            x0 = model.vae.encode(images * 2 - 1).float()                               # (b, C, h, w)
            noise = randn(x0.shape, [generator(seed, "heldout loss", first + i) for i in range(len(part))],
                          model.device)                                                 # (b, C, h, w)
            c = model.condition([text for _, text in part])                             # (b, N, E)
            t = times[first:first + len(part)].to(x0.device)                            # (b,)
            total += flow_matching_loss(model.dit, x0, c, t, noise).item() * len(part)
    return total / count


# ----------------------------------------------------------------------------- ablate: all runs

def ablate(cfg: AblateConfig) -> dict:
    """Table 3 and more on nano: every row trained over several seeds; table, plots and the claims' verdicts.

    Returns the rows of ablate.csv and claims.csv under these names, what LDAM did at which thresholds
    ("ldam") and all of it in sentences ("said"); {} if stopped.
    """
    from model import PRESETS
    from sample import out_folder
    folder, L = out_folder(cfg.out), PRESETS["nano"].vlm.num_layers
    first = [name for name in cfg.rows if name not in AT_NANO_THRESHOLDS]
    spike, patience = cfg.spike, cfg.patience
    if not run_rows(cfg, {key: make_plan(cfg, *key, L, 0, 0) for key in keys(cfg, first)}):
        return {}
    second = [name for name in cfg.rows if name in AT_NANO_THRESHOLDS]
    if second:
        if not spike:
            spike, patience = find_thresholds(ldam_logs(cfg))
        if not run_rows(cfg, {key: make_plan(cfg, *key, L, spike, patience) for key in keys(cfg, second)}):
            return {}
    return summarise(cfg, folder, spike, patience)


def keys(cfg: AblateConfig, names: list[str]) -> list[tuple[str, int]]:
    """(row, seed), a whole table for seed 0 first."""
    return [(name, seed) for seed in range(cfg.seeds) for name in names]


def run_rows(cfg: AblateConfig, plans: dict[tuple[str, int], dict]) -> bool:
    """Train and score what is not finished, --jobs at a time, each in its own process.
    False if a signal stopped it; ValueError, when the others have ended, if one failed."""
    from common import StopSignal
    from tqdm import tqdm
    todo, running, failed = [], {}, []
    for (name, seed), plan in plans.items():
        folder = Path(cfg.out) / f"{name}-seed{seed}"
        if (folder / "plan.json").is_file():
            refuse_other(folder / "plan.json", json.loads((folder / "plan.json").read_text()), plan)
        if not (folder / "row.json").is_file():
            write_json(folder / "plan.json", plan)
            todo.append(folder)
    with StopSignal() as signal, tqdm(total=len(plans), initial=len(plans) - len(todo), unit="run",
                                      dynamic_ncols=True) as bar:
        told = False
        while running or (todo and not signal.stop):
            while todo and len(running) < cfg.jobs and not (signal.stop or failed):
                folder = todo.pop(0)
                running[start_row(folder, cfg.jobs)] = folder
            if failed:
                todo = []
            if signal.stop and not told:                        # each saves its last step and leaves
                told = True
                for process in running:
                    process.terminate()
            for process in [p for p in running if p.poll() is not None]:
                folder = running.pop(process)
                if (folder / "row.json").is_file():
                    row = json.loads((folder / "row.json").read_text())
                    bar.write(f"{folder.name}: {row['seconds']} s, judge {row['scores']['judge']:.3f}, "
                              f"loss {row['scores']['loss']:.4f}")
                    bar.update()
                elif not signal.stop:
                    failed.append(folder)
            time.sleep(0.1)
    if failed:
        last = [line for line in (failed[0] / "log.txt").read_text().splitlines() if line.strip()][-1:]
        raise ValueError(f"the run {failed[0]} ended early ({''.join(last)[:300]}): see its log.txt; "
                         "the same command goes on from there")
    if signal.stop:
        print("stopped; everything is saved, the same command goes on from here")
    return not signal.stop


def start_row(folder: Path, jobs: int) -> subprocess.Popen:
    threads = max(1, (os.cpu_count() or 1) // jobs)
    env = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    with open(folder / "log.txt", "a") as log:
        return subprocess.Popen([sys.executable, str(Path(__file__).resolve()), str(folder)], stdout=log,
                                stderr=subprocess.STDOUT, env={**env, "OMP_NUM_THREADS": str(threads)})


# ----------------------------------------------------------------------------- ablate: when LDAM fires

def ldam_logs(cfg: AblateConfig) -> list[list[dict]]:
    """The logs of row ldam, one a seed: LDAM listened to every epoch of them."""
    paths = [Path(cfg.out) / f"ldam-seed{seed}" for seed in range(cfg.seeds)]
    missing = [path for path in paths if not (path / "row.json").is_file()]
    if missing:
        raise ValueError("the thresholds at which LDAM fires on nano are found in the row ldam, and "
                         f"{missing[0]} is not finished: add ldam to --rows, or give --spike and --patience")
    return [stage3_log(path / "stage3") for path in paths]


def replay(log: list[dict], spike: float, patience: int) -> list[int]:
    """Epochs of a logged run after which LDAM would fire at other thresholds, phase by phase.

    Exact up to the first one of a run in which nothing fired; from then on that run would have gone another
    way. A firing in the last epoch of a phase is left out: it acts in no epoch.
    """
    fired, phase, ldam = [], None, None
    for record, following in zip(log, [*log[1:], {"phase": None}]):
        if record["phase"] != phase:
            phase, ldam = record["phase"], LDAM(spike=spike, patience=patience)
        reward, norm = record[f"reward/{phase}"], record["grad_norm"]
        if reward is None or norm is None:                      # not finite: LDAM was not asked either
            continue
        if ldam.update(norm, reward) is not None and following["phase"] == phase:
            fired.append(record["epoch"])
    return fired


def find_thresholds(logs: list[list[dict]]) -> tuple[float, int]:
    """The strictest (spike, patience) at which LDAM fires in every run and in half of all phases, so that
    there is something to see; patience goes before spike. The loosest of all where there is none."""
    phases = sum(len({r["phase"] for r in log}) for log in logs)
    for patience in PATIENCES:
        for spike in SPIKES:
            fired = [{r["phase"] for r in log if r["epoch"] in epochs}
                     for log in logs for epochs in [replay(log, spike, patience)]]
            if all(fired) and 2 * sum(map(len, fired)) >= phases:
                return spike, patience
    return SPIKES[-1], PATIENCES[-1]


def ldam_report(logs: list[list[dict]], folder: Path) -> dict:
    """How far the paper's thresholds are from what the runs saw, and how often LDAM fires at others."""
    grid = []
    for patience in PATIENCES:
        for spike in SPIKES:
            counts = [len(replay(log, spike, patience)) for log in logs]
            grid.append({"spike": spike, "patience": patience, "firings": sum(counts),
                         "runs that fire": sum(map(bool, counts)), "runs": len(logs)})
    write_csv(folder / "thresholds.csv", grid)
    figure, (axis,) = new_figure(1, 6, 3)
    counts = [[row["firings"] for row in grid if row["patience"] == patience] for patience in PATIENCES]
    drawn = axis.imshow(counts, aspect="auto", cmap="Blues")
    axis.set(xlabel="jump of the gradient norm (--ldam-spike)", ylabel="declines (--ldam-patience)",
             title=f"firings in {len(logs)} runs of {len(logs[0])} epochs")
    axis.set_xticks(range(len(SPIKES)), [f"{spike:g}" for spike in SPIKES])
    axis.set_yticks(range(len(PATIENCES)), PATIENCES)
    for y, line in enumerate(counts):
        for x, count in enumerate(line):
            axis.text(x, y, count, ha="center", va="center", fontsize=8)
    figure.colorbar(drawn, ax=axis)
    figure.savefig(folder / "thresholds.png")
    jumps = [b["grad_norm"] / a["grad_norm"] for log in logs for a, b in zip(log, log[1:])
             if a["phase"] == b["phase"] and a["grad_norm"] and b["grad_norm"]]
    return {"epochs": sum(map(len, logs)), "runs": len(logs), "largest jump": max(jumps, default=0.0),
            "firings at the paper's thresholds": sum(r["ldam/fired"] for log in logs for r in log),
            "most declines": max((r["ldam/r_s"] for log in logs for r in log if "ldam/r_s" in r), default=0)}


# ----------------------------------------------------------------------------- ablate: the table

def summarise(cfg: AblateConfig, folder: Path, spike: float, patience: int) -> dict:
    """Every finished row of this folder, of the seeds asked for: table, plot, claims, what LDAM did."""
    runs: dict[str, dict[int, dict]] = {}
    for name in ROWS:
        paths = {seed: folder / f"{name}-seed{seed}" / "row.json" for seed in range(cfg.seeds)}
        runs[name] = {seed: json.loads(path.read_text())["scores"]
                      for seed, path in paths.items() if path.is_file()}
    runs = {name: by_seed for name, by_seed in runs.items() if by_seed}
    table = []
    for name, by_seed in runs.items():
        reference = "all" if ROWS[name].family == "layers" else "no-ldam"
        row: dict = {"row": ROWS[name].title, "seeds": len(by_seed)}
        for measure in MEASURES:
            row[measure], row[f"{measure} s.e."] = mean_and_error([s[measure] for s in by_seed.values()])
        change = paired(runs, name, reference, "judge") if name != reference else []
        row["judge against"] = ROWS[reference].title
        row["judge difference"], row["difference s.e."] = mean_and_error(change)
        table.append(row | {"firings": firings(folder, name, list(by_seed)), "paper": ROWS[name].paper})
    write_csv(folder / "ablate.csv", table)
    plot_rows(runs, folder / "ablate.png")
    claims = [claim(text, measure, paired(runs, better, worse, measure), "seeds").record()
              for text, better, worse in COMPARED for measure in MEASURES
              if len(paired(runs, better, worse, measure)) > 1]
    result = {"ablate": table, "claims": claims, "ldam": {}}
    said = ldam_sentences(cfg, folder, runs, result, spike, patience) if "ldam" in runs else []
    if claims:
        write_csv(folder / "claims.csv", claims)
    said += plain_verdicts(claims)
    result["said"] = said
    text = "\n".join([markdown(table), *said, "", markdown(claims) if claims else ""])
    (folder / "ablate.md").write_text(text, encoding="utf-8")
    write_json(folder / "ablate.json", {**result, "config": config_dict(cfg)})
    print(f"{text}\nwritten to {folder}")
    return result


def plain_verdicts(claims: list[dict]) -> list[str]:
    """Which claims hold, by the judge's score, as the paper's table has it, and by the held-out loss."""
    said = []
    for measure in ("judge", "loss"):
        for verdict in ("supported", "contradicted", "undecided"):
            named = [c["claim"] for c in claims if (c["measure"], c["verdict"]) == (measure, verdict)]
            if named:
                said.append(f"By the {measure}, {verdict}: {'; '.join(named)}.")
    return said


def paired(runs: dict[str, dict[int, dict]], better: str, worse: str, measure: str) -> list[float]:
    """better - worse for each seed that both have, turned so that a positive number is an advantage."""
    a, b = runs.get(better, {}), runs.get(worse, {})
    sign = -1 if measure == "loss" else 1
    return [sign * (a[seed][measure] - b[seed][measure]) for seed in a if seed in b]


def firings(folder: Path, name: str, seeds: list[int]) -> int | None:
    """How often LDAM fired in a row's runs; None for a row without stage 3."""
    paths = [folder / f"{name}-seed{seed}" / "stage3" for seed in seeds]
    if not all(path.is_dir() for path in paths):
        return None
    return sum(record["ldam/fired"] for path in paths for record in stage3_log(path))


def ldam_sentences(cfg: AblateConfig, folder: Path, runs: dict, result: dict, spike: float,
                   patience: int) -> list[str]:
    """What LDAM did, in words, from the logs; fills result["ldam"] and draws the curves."""
    logs = [stage3_log(folder / f"ldam-seed{seed}" / "stage3") for seed in runs["ldam"]]
    found = result["ldam"] = ldam_report(logs, folder)
    never = found["firings at the paper's thresholds"] == 0
    said = [f"At the paper's thresholds (jump {PAPER_SPIKE:g}, declines {PAPER_PATIENCE}) LDAM "
            f"{'never fired' if never else 'fired'} in {found['runs']} runs of {len(logs[0])} epochs; the "
            f"largest jump of the gradient norm was {found['largest jump']:.3g}, the most declines "
            f"{found['most declines']}."]
    without = runs.get("no-ldam", {})
    same = [scores == without[seed] for seed, scores in runs["ldam"].items() if seed in without]
    if same:
        said.append(f"{sum(same)} of {len(same)} of these runs ended in the very scores of the run "
                    "without LDAM.")
    if spike:
        found["nano thresholds"] = {"spike": spike, "patience": patience}
        said.append(f"The rows at nano thresholds have jump {spike:g} and declines {patience}; the counts of "
                    "firings at other thresholds are in thresholds.csv.")
        for mode in ("ldam-epoch", "ldam-keep"):
            for measure in ("judge", "clip", "pickscore", "aesthetic"):
                values = paired(runs, mode, "no-ldam", measure)
                if len(values) > 1:
                    c = claim("", measure, values, "seeds")
                    said.append(f"{ROWS[mode].title}: {measure} {c.estimate:+.4f} ± {c.error:.4f} "
                                f"(standard error of {c.n} seeds) against no LDAM.")
    figure9({path.parent.name: stage3_log(path) for path in sorted(folder.glob("*-seed0/stage3"))
             if (path.parent / "row.json").is_file()}, folder)
    return said


def plot_rows(runs: dict[str, dict[int, dict]], path: Path) -> None:
    """Each row's seeds (pale) and mean with its standard error, a panel a measure."""
    figure, axes = new_figure(len(MEASURES), 3, 0.6 + 0.35 * len(runs))
    names = list(runs)[::-1]
    for axis, measure in zip(axes, MEASURES):
        for y, name in enumerate(names):
            color = "tab:blue" if ROWS[name].family == "layers" else "tab:red"
            values = [scores[measure] for scores in runs[name].values()]
            mean, error = mean_and_error(values)
            axis.plot(values, [y] * len(values), "o", color=color, alpha=0.3, markersize=4)
            axis.errorbar([mean], [y], xerr=[error or 0], fmt="o", color=color, capsize=3)
        axis.set(title=measure + (" (less is better)" if measure == "loss" else ""))
        axis.set_yticks(range(len(names)), [ROWS[name].title for name in names] if axis is axes[0] else [])
        axis.grid(axis="y", alpha=0.3)
    figure.savefig(path)


if __name__ == "__main__":
    run_main(run_row, sys.argv[1:])
