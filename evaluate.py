"""Measure a model: `python evaluate.py COMMAND`; each has a --help.

    geneval      does it draw what is asked for? nano: its held-out prompts and an exact judge, below; else
                 GenEval's prompts, detector and rules (evaluation/geneval.py)
    dpg          the same for long prompts: DPG-Bench, a model that answers questions (evaluation/dpg.py)
    rewards      what did training gain? the rewards of held-out prompts, before and after
    reconstruct  "Keep the image as it is.": what of a picture survives the way through the condition?
    compare      pictures of two stage files side by side, same prompts and noise
    understand   does the vision-language model still see? questions about pictures (evaluation/understand.py)
    layers       what does each layer carry? (evaluation/layers.py)
    ablate       what is each part worth? (evaluation/ablate.py)
    report       a run, or several, as one HTML file (evaluation/report.py)

Each prints a table and writes it, with its settings, as JSON into --out. What was cut short goes on with the
same command; `torchrun --nproc-per-node N` shares geneval and dpg of full size between N processes.

Letters: B pictures, H W pixels, E embedding.
"""
import json
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from common import Dist, Refused, StopSignal, derive_seed, knob, run
from data import nano_prompts, read_picture, to_tensor
from evaluation import (DrawConfig, ablate, dpg, draw, drawing_settings, finish, layers, load, mean_and_error,
                        number, report, resume_lines, same_settings, spread, start, understand)
from evaluation.geneval import PER_PROMPT, GenevalConfig, full_geneval, task_scores, task_table
from grpo import open_prompts, open_rewards, score_heldout
from model import PRESETS, ParaUni, weights_folder
from nano import world
from pictures import save_sheet
from rewards import embed_images, load_clip


# ----------------------------------------------------------------------------- geneval

def geneval(argv: list[str] | None = None) -> dict:
    """GenEval, six tasks: pictures of its prompts through a detector; for nano, through the exact judge."""
    cfg, dist = start(GenevalConfig, argv, geneval.__doc__)
    if cfg.images or cfg.metadata or not PRESETS[cfg.preset].shapes_world:
        return full_geneval(cfg, dist)
    return nano_geneval(cfg, dist)


def nano_geneval(cfg: GenevalConfig, dist: Dist) -> dict:
    """Held-out prompts of the nano world through its exact judge. {} if it was stopped."""
    assert dist.world_size == 1, "nano's benchmark is a matter of minutes for one process"
    prompts = world.benchmark_prompts()
    chosen = spread(cfg.limit, len(prompts))
    model, folder = load(cfg, dist.device), Path(cfg.out)
    same_settings(folder, drawing_settings(cfg, model))
    path = folder / "verdicts.jsonl"
    verdicts = {(record["prompt"], record["sample"]): record["right"] for record in resume_lines(path)}
    wanted = [(i, j) for i in chosen for j in range(cfg.per_prompt)]
    todo = [key for key in wanted if key not in verdicts]

    def pictures(keys: list[tuple[int, int]]) -> Tensor:
        seeds = [derive_seed(cfg.seed, "geneval", i, j) for i, j in keys]
        return draw(cfg, model, [prompts[i].text for i, _ in keys], seeds)          # (B, 3, H, W)

    # draw and judge; the file has every verdict at once
    with StopSignal() as stop, open(path, "a") as file, tqdm(total=len(todo), unit="picture") as bar:
        while todo and not stop.stop:
            keys, todo = todo[:cfg.batch_size], todo[cfg.batch_size:]
            right = world.judge(pictures(keys), [prompts[i] for i, _ in keys])
            verdicts |= zip(keys, right)
            for i, j in keys:
                record = {"prompt": i, "sample": j, "right": verdicts[i, j], "task": prompts[i].task}
                file.write(json.dumps({**record, "text": prompts[i].text}) + "\n")
            file.flush()
            bar.update(len(keys))
    if todo:
        print(f"stopped with {len(todo)} pictures to go; the same command goes on from here")
        return {}

    # up to two right pictures of each task, then up to two wrong ones, drawn again from their seeds
    verdicts = {key: verdicts[key] for key in wanted}
    shuffled = sorted(wanted, key=lambda key: derive_seed(cfg.seed, "examples", *key))
    examples = []
    for is_right in (True, False):
        for task in world.TASKS:
            one_a_prompt = {key[0]: key for key in shuffled
                            if verdicts[key] == is_right and prompts[key[0]].task == task}
            examples += list(one_a_prompt.values())[:2]
    captions = [f"{'right' if verdicts[i, j] else 'wrong'}: {prompts[i].text}" for i, j in examples]
    save_sheet(folder / "examples.png", pictures(examples), 6, captions)

    whole = len(chosen) == len(prompts) and cfg.per_prompt == PER_PROMPT
    part = f"{len(chosen)} of {len(prompts)} prompts, {cfg.per_prompt} of {PER_PROMPT} pictures each"
    name = "nano GenEval" if whole else f"part of nano GenEval, not the benchmark ({part})"
    scores = task_scores(verdicts, [prompt.task for prompt in prompts])
    return finish(cfg, "geneval", {"name": name, "benchmark": whole, **scores},
                  f"{name}\n{task_table(scores)}\npictures {folder / 'examples.png'}")


# ----------------------------------------------------------------------------- before and after

def paired(before: list[float], after: list[float]) -> dict:
    """Means with s.e., and the mean paired difference with its 95 % interval (normal, +- 1.96 s.e.).

    Pairs that lack a finite score on either side are left out; n counts the others.
    """
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if math.isfinite(a) and math.isfinite(b)]
    change, error = mean_and_error([b - a for a, b in pairs])
    interval = None if error is None else [change - 1.96 * error, change + 1.96 * error]
    return {"n": len(pairs), "before": mean_and_error([a for a, _ in pairs]),
            "after": mean_and_error([b for _, b in pairs]), "change": change, "interval": interval}


def paired_table(table: dict[str, dict], before: str, after: str) -> str:
    columns = (before, "s.e.", after, "s.e.", "change", "95 % from", "to")
    lines = [f"{'':15} {' '.join(f'{title:>9}' for title in columns)} {'n':>5}"]
    for name, row in table.items():
        means = [number(value, 9) for value in (*row["before"], *row["after"])]
        changes = [number(value, 9, "+") for value in (row["change"], *(row["interval"] or (None, None)))]
        lines.append(f"{name:15} {' '.join(means + changes)} {row['n']:5}")
    return "\n".join(lines)


def nulls(scores: dict[str, list[float]]) -> dict[str, list[float | None]]:
    """JSON has no NaN and no infinity."""
    return {name: [value if math.isfinite(value) else None for value in values]
            for name, values in scores.items()}


@dataclass(frozen=True)
class RewardsConfig(DrawConfig):
    stage_file: str = knob("", "the weights after training, as runs/stage3/stage3.safetensors; must be given")
    baseline: str = knob("", "the weights before; empty: stage2.safetensors in --weights")
    prompts: str = knob("", "file with one held-out prompt a line; empty: the nano world's")
    limit: int = knob(0, "the first so many prompts; 0: all of them")
    rewards: tuple[str, ...] = knob(("clip", "pickscore", "aesthetic"), "names, or file.py:function")
    reward_weights: str = knob("auto", "folder with clip/, pickscore/, aesthetic/; "
                                       "auto: nano's own, or weights/rewards")
    out: str = knob("runs/rewards", "folder for the table")


def rewards(argv: list[str] | None = None) -> dict:
    """Rewards of held-out prompts before and after training, from the same noise, one picture a prompt."""
    cfg, dist = start(RewardsConfig, argv, rewards.__doc__)
    if not cfg.stage_file or cfg.weights == "random" and not cfg.baseline:
        raise Refused("name the weights after training with --stage-file, and with --baseline those before "
                      "where --weights has no stage2.safetensors")
    baseline = cfg.baseline or str(weights_folder(cfg.preset, cfg.weights) / "stage2.safetensors")
    as_in_training = SimpleNamespace(seed=cfg.seed, micro_batch=cfg.batch_size, dtype=cfg.dtype,
                                     eval_steps=cfg.num_steps, eval_guidance_scale=cfg.guidance_scale)
    scores = []
    for file in (baseline, cfg.stage_file):
        # a model of its own: a stage 1 file must not keep another's DiT
        model = load(cfg, dist.device, file)
        prompts = heldout_prompts(cfg, model)
        scorers = open_rewards(cfg, model, prompts[0])
        scores.append(score_heldout(model, scorers, prompts, as_in_training, dist))
    before, after = scores
    table = {name: paired(before[name], after[name]) for name in before}
    result = {"baseline": baseline, "rewards": table, "prompts": prompts, "before": nulls(before),
              "after": nulls(after)}
    return finish(cfg, "rewards", result, f"before {baseline}\nafter  {cfg.stage_file}\n"
                                          f"{paired_table(table, 'before', 'after')}")


def heldout_prompts(cfg: DrawConfig, model: ParaUni) -> list[str]:
    """The first --limit prompts of --prompts, else of the nano world's."""
    if not (cfg.prompts or model.preset.shapes_world):
        raise Refused(f"preset {cfg.preset} has no held-out prompts of its own: name a file with --prompts")
    prompts = open_prompts(cfg.prompts, model) or nano_prompts(test=True)
    return prompts[:cfg.limit or None]


# ----------------------------------------------------------------------------- compare

@dataclass(frozen=True)
class CompareConfig(DrawConfig):
    other: str = knob("", "the other stage file; must be given")
    prompts: str = knob("", "file with one prompt a line; empty: the nano world's held-out ones")
    limit: int = knob(8, "the first so many prompts; 0: all of them")
    out: str = knob("runs/compare", "folder for compare.png")


def compare(argv: list[str] | None = None) -> dict:
    """Pictures of two stage files, a row each: same prompts, same noise (paper Figures 3 and 10)."""
    cfg, dist = start(CompareConfig, argv, compare.__doc__)
    if not cfg.other:
        raise Refused("name the stage file to compare with: --other FILE")
    rows = []
    for file in (cfg.stage_file, cfg.other):
        model = load(cfg, dist.device, file)
        prompts = heldout_prompts(cfg, model)
        for first in range(0, len(prompts), cfg.batch_size):
            part = prompts[first:first + cfg.batch_size]
            seeds = [derive_seed(cfg.seed, "picture", first + k) for k in range(len(part))]
            rows.append(draw(cfg, model, part, seeds))                              # (b, 3, H, W)
    path = Path(cfg.out) / "compare.png"
    titles = [f"{Path(file).parent.name}\n{Path(file).stem}" for file in (cfg.stage_file, cfg.other)]
    save_sheet(path, torch.cat(rows), len(prompts), prompts * 2, titles)
    return finish(cfg, "compare", {"prompts": prompts}, f"pictures {path}")


# ----------------------------------------------------------------------------- reconstruct

KEEP = "Keep the image as it is."                           # the paper's prompt (supplement, section 4)


@dataclass(frozen=True)
class ReconstructConfig(DrawConfig):
    stage_file: str = knob("auto", "weights trained with all layers; auto: the newest in --weights")
    last_layer_file: str = knob("", "weights trained with the last layer only (train.py --layers); "
                                    "empty: those of --stage-file, read at their last layer")
    images: str = knob("", "folder of pictures; empty: held-out pictures of the nano world")
    count: int = knob(200, "pictures")
    reward_weights: str = knob("auto", "folder with clip/, for CLIP similarity; "
                                       "auto: nano's own, or weights/rewards")
    out: str = knob("runs/reconstruct", "folder for table and pictures")


def reconstruct(argv: list[str] | None = None) -> dict:
    """PSNR, SSIM and CLIP similarity of pictures kept "as they are": last layer against all layers.

    Reading of the paper: "the input image is encoded by VAE and then fed into the VLM", which has no input
    for latents; here the picture goes through the VLM's vision tower. The prompt is the bare sentence;
    guidance compares with no prompt about the same picture. The row `autoencoder` says how much of a picture
    the DC-AE alone keeps, `another` how near any other picture is: the ends of the scale.
    """
    cfg, dist = start(ReconstructConfig, argv, reconstruct.__doc__.split("\n")[0])
    model = load(cfg, dist.device)
    originals = pictures_to_keep(cfg, model)                                        # (count, 3, H, W)
    kept = {"original": originals,
            "autoencoder": through_autoencoder(cfg, model, originals),
            "all layers": keep_pictures(cfg, model, originals)}
    if cfg.last_layer_file:
        last_layer = cfg.last_layer_file
        kept["last layer"] = keep_pictures(cfg, load(cfg, dist.device, last_layer), originals)
    else:
        last_layer = "the same weights, read at the last layer"
        kept["last layer"] = keep_pictures(cfg, model, originals, layers=[model.preset.vlm_layers])
    path = Path(cfg.out) / "reconstruct.png"
    columns = min(8, len(originals))
    save_sheet(path, torch.cat([images[:columns] for images in kept.values()]), columns, titles=list(kept))

    folder = Path(cfg.reward_weights)
    if cfg.reward_weights == "auto":
        folder = weights_folder(cfg.preset if model.preset.shapes_world else "rewards", "auto")
    clip, _, picture = load_clip(folder / "clip")
    measures = {"psnr": psnr, "ssim": ssim, "clip": partial(clip_similarity, clip.eval(), picture)}
    kept["another"] = kept.pop("original").roll(1, 0)
    marks = {name: {key: measure(images, originals).tolist() for key, measure in measures.items()}
             for name, images in kept.items()}
    table = {key: paired(marks["last layer"][key], marks["all layers"][key]) for key in measures}
    ends = {name: {key: mean_and_error([mark for mark in marks[name][key] if math.isfinite(mark)])
                   for key in measures} for name in ("autoencoder", "another")}
    lines = [f"last layer: {last_layer}", paired_table(table, "last", "all")]
    for name, row in ends.items():
        lines.append(f"{name:15} " + ", ".join(f"{key} {number(mean, 0)} (s.e. {number(error, 0)})"
                                               for key, (mean, error) in row.items()))
    result = {"prompt": KEEP, "last_layer": last_layer, "table": table, "ends": ends,
              "pictures": {name: nulls(scores) for name, scores in marks.items()}}
    return finish(cfg, "reconstruct", result, "\n".join([*lines, f"pictures {path}"]))


def pictures_to_keep(cfg: ReconstructConfig, model: ParaUni) -> Tensor:
    """The originals, (count, 3, H, W) in [0, 1]: centre crops of --images, or pictures of the nano world."""
    if not cfg.images:
        if not model.preset.shapes_world:
            raise Refused(f"preset {cfg.preset} has no pictures of its own: name a folder with --images")
        return world.question_set(cfg.count, cfg.seed % 2 ** 32)[0]
    paths = sorted(path for path in Path(cfg.images).iterdir() if path.is_file())[:cfg.count]
    if len(paths) < 2:
        raise Refused(f"expected at least 2 pictures in {cfg.images}, found {len(paths)}")
    size = model.preset.image_size, model.preset.image_size
    return torch.stack([to_tensor(ImageOps.fit(read_picture(path), size, Image.Resampling.BICUBIC))
                        for path in paths])


def keep_pictures(cfg: ReconstructConfig, model: ParaUni, originals: Tensor,
                  layers: list[int] | None = None) -> Tensor:
    """Each picture, shown to the VLM with the instruction to keep it, drawn anew: (B, 3, H, W)."""
    drawn = []
    for first in range(0, len(originals), cfg.batch_size):
        part = originals[first:first + cfg.batch_size].to(model.device)             # (b, 3, H, W)
        seeds = [derive_seed(cfg.seed, "reconstruct", first + k) for k in range(len(part))]
        drawn.append(draw(cfg, model, [KEEP] * len(part), seeds, images=part, layers=layers))
    return torch.cat(drawn)                                                         # (B, 3, H, W)


@torch.no_grad()
def through_autoencoder(cfg: ReconstructConfig, model: ParaUni, originals: Tensor) -> Tensor:
    return torch.cat([model.decode(model.vae.encode(part.to(model.device) * 2 - 1)).cpu()
                      for part in originals.split(cfg.batch_size)])                 # (B, 3, H, W)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio, dB, of pairs of pictures (B, 3, H, W) in [0, 1], (B,) fp64."""
    return -10 * (a.double() - b.double()).square().mean((1, 2, 3)).log10()         # (B,)


def ssim(a: Tensor, b: Tensor, window: int = 7) -> Tensor:
    """Structural similarity of pairs of pictures (B, 3, H, W) in [0, 1], (B,) fp64 (Wang et al. 2004).

    Means over every square window inside the picture, sample covariance, constants 0.01 and 0.03, mean over
    colours: what scikit-image computes by default.
    """
    a, b = a.double(), b.double()
    mean_a, mean_b, aa, bb, ab = (F.avg_pool2d(x, window, 1) for x in (a, b, a * a, b * b, a * b))
    sample = window ** 2 / (window ** 2 - 1)
    var_a = sample * (aa - mean_a ** 2)                                             # (B, 3, H - 6, W - 6)
    var_b = sample * (bb - mean_b ** 2)                                             # (B, 3, H - 6, W - 6)
    cov = sample * (ab - mean_a * mean_b)                                           # (B, 3, H - 6, W - 6)
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    similar = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
    similar = similar / ((mean_a ** 2 + mean_b ** 2 + c1) * (var_a + var_b + c2))   # (B, 3, H - 6, W - 6)
    return similar.mean((1, 2, 3))                                                  # (B,)


@torch.no_grad()
def clip_similarity(clip: CLIP, picture: dict, a: Tensor, b: Tensor) -> Tensor:
    """The cosine of the CLIP embeddings of pairs of pictures (B, 3, H, W) in [0, 1], (B,)."""
    a, b = (embed_images(clip.visual, images, picture) for images in (a, b))        # (B, E) each
    return (a * b).sum(-1)                                                          # (B,)


# ----------------------------------------------------------------------------- entry

COMMANDS = {"geneval": geneval, "dpg": dpg.main, "rewards": rewards, "reconstruct": reconstruct,
            "compare": compare, "understand": understand.main, "layers": layers.main, "ablate": ablate.main,
            "report": report.main}


def main(argv: list[str] | None = None) -> dict:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return {}
    if not argv or argv[0] not in COMMANDS:
        raise Refused(f"expected the first word to be one of {', '.join(COMMANDS)}; see --help")
    return COMMANDS[argv[0]](argv[1:])


if __name__ == "__main__":
    run(main)
