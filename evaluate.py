"""Measure a model: `python evaluate.py COMMAND`; each has a --help.

    geneval      does it draw what is asked for? GenEval's prompts, detector and rules; nano: its held-out
                 prompts and an exact judge (evaluation/geneval.py)
    dpg          the same for long prompts: DPG-Bench, a model that answers questions (evaluation/dpg.py)
    rewards      what did training gain? the rewards of held-out prompts, before and after
    reconstruct  "Keep the image as it is.": what of a picture survives the way through the condition?
    understand   does the vision-language model still see? questions about pictures (evaluation/understand.py)
    layers       what does each layer carry? (evaluation/layers.py)
    ablate       what is each part worth? (evaluation/ablate.py)
    report       a run, or several, as one HTML file (evaluation/report.py)

Most print a table and write it, with its settings, as JSON into --out. Of geneval, dpg, understand, layers
and ablate, what was cut short goes on with the same command; `torchrun --nproc-per-node N` shares the
work of geneval and dpg between N processes.

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
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from common import Refused, derive_seed, knob, run
from evaluation import (DrawConfig, ScoreConfig, ablate, dpg, draw, finish, geneval, heldout_prompts, layers,
                        load, mean_and_error, report, start, table, understand)
from grpo import open_rewards, score_heldout
from model import read_tensors, weights_folder
from nano import world
from pictures import read_picture, save_sheet
from rewards import embed_images, load_clip


def paired(before: dict[str, list[float]], after: dict[str, list[float]]) -> list[dict]:
    """Each measure's means with s.e., and its mean paired change with the 95 % interval (normal, +- 1.96
    s.e.). Pairs that lack a finite score on either side are left out; n counts the others."""
    rows = []
    for name in before:
        pairs = [pair for pair in zip(before[name], after[name], strict=True)
                 if all(map(math.isfinite, pair))]
        row = {"measure": name}
        row["before"], row["before s.e."] = mean_and_error([a for a, _ in pairs])
        row["after"], row["after s.e."] = mean_and_error([b for _, b in pairs])
        row["change"], error = mean_and_error([b - a for a, b in pairs])
        row["95 % from"] = None if error is None else row["change"] - 1.96 * error
        row["to"] = None if error is None else row["change"] + 1.96 * error
        row["n"] = len(pairs)
        rows.append(row)
    return rows


@dataclass(frozen=True)
class RewardsConfig(ScoreConfig):
    stage_file: str = knob("runs/stage3/stage3.safetensors", "the weights after training")
    baseline: str = knob("", "the weights before; empty: the --init of --stage-file's run")
    out: str = knob("runs/rewards", "folder for the table")


def rewards(argv: list[str] | None = None) -> dict:
    """Rewards of held-out prompts before and after training, from the same noise, one picture a prompt."""
    cfg, dist = start(RewardsConfig, argv, rewards.__doc__)
    baseline = cfg.baseline
    if not baseline:
        _, metadata = read_tensors(Path(cfg.stage_file))
        baseline = json.loads(metadata.get("config", "{}")).get("init", "auto")
    if baseline == "auto":
        baseline = str(weights_folder(cfg.preset, cfg.weights) / "stage2.safetensors")
    as_in_training = SimpleNamespace(seed=cfg.seed, micro_batch=cfg.batch_size, dtype=cfg.dtype,
                                     eval_steps=cfg.num_steps, eval_guidance_scale=cfg.guidance_scale)
    scores = []
    for file in (baseline, cfg.stage_file):
        # a model of its own: a stage 1 file must not keep another's DiT
        model = load(cfg, dist.device, file)
        prompts = heldout_prompts(cfg, model)
        scorers = open_rewards(cfg, model, prompts[0])
        scores.append(score_heldout(model, scorers, prompts, as_in_training, dist))
    rows = paired(*scores)
    # of each prompt too; JSON has no NaN and no infinity: they become null
    before, after = json.loads(json.dumps(scores), parse_constant=lambda name: None)
    result = {"baseline": baseline, "rewards": rows, "prompts": prompts, "before": before, "after": after}
    return finish(cfg, "rewards", result, f"before {baseline}\nafter  {cfg.stage_file}\n{table(rows)}")


@dataclass(frozen=True)
class ReconstructConfig(DrawConfig):
    stage_file: str = knob("auto", "weights trained with all layers; auto: of the highest stage in --weights")
    last_layer_file: str = knob("", "weights of the last layer only; empty: --stage-file, read at its last")
    images: str = knob("", "folder of pictures; empty: held-out pictures of the nano world")
    count: int = knob(200, "pictures")
    out: str = knob("runs/reconstruct", "folder for table and pictures")


@torch.no_grad()
def reconstruct(argv: list[str] | None = None) -> dict:
    """PSNR, SSIM and CLIP similarity of pictures kept "as they are": last layer against all layers.

    Reading of the paper: "the input image is encoded by VAE and then fed into the VLM", which has no input
    for latents; here the picture goes through the VLM's vision tower. The prompt is the bare sentence;
    guidance compares with "Generate an image." about it. The ends of the scale are how near any other
    picture is, and how much of a picture the DC-AE alone keeps.
    """
    cfg, dist = start(ReconstructConfig, argv, reconstruct.__doc__)
    model = load(cfg, dist.device)
    # centre crops of one's own pictures, or held-out pictures of the nano world
    if cfg.images:
        # a Mac leaves a hidden file in every folder that its user opens
        paths = sorted(path for path in Path(cfg.images).glob("[!.]*") if path.is_file())[:cfg.count]
        if len(paths) < 2:
            raise Refused(f"expected at least 2 pictures in --images {cfg.images}, found {len(paths)}")
        size = model.preset.image_size, model.preset.image_size
        crops = [ImageOps.fit(read_picture(path), size, Image.Resampling.BICUBIC) for path in paths]
        originals = torch.stack(list(map(to_tensor, crops)))                        # (B, 3, H, W)
    elif model.preset.shapes_world:
        originals, _ = world.question_set(cfg.count, cfg.seed % 2 ** 32)            # (B, 3, H, W)
    else:
        raise Refused(f"preset {cfg.preset} has no pictures of its own: name a folder with --images")
    # what tells how near pictures are
    folder = weights_folder("nano" if model.preset.shapes_world else "rewards", "auto")
    visual = load_clip(folder / "clip")[0].eval().visual
    seeds = [derive_seed(cfg.seed, "reconstruct", i) for i in range(len(originals))]
    # the model that reads its last layer: the same one, or one that was trained so
    last_model, last_layer = model, [model.preset.lim.vlm_layers]
    if cfg.last_layer_file:
        last_model, last_layer = load(cfg, dist.device, cfg.last_layer_file), None
    # the paper's prompt (supplement, section 4)
    prompts = ["Keep the image as it is."] * len(originals)
    # few at a time: at 1024 x 1024 a picture takes gigabytes
    decoded = [model.decode(model.vae.encode(part.to(model.device) * 2 - 1)).cpu()
               for part in originals.split(4)]                                      # of (b, 3, H, W)
    kept = {"autoencoder": torch.cat(decoded),
            "all layers": draw(cfg, model, prompts, seeds, originals),
            "last layer": draw(cfg, last_model, prompts, seeds, originals, last_layer),
            "another": originals.roll(1, 0)}                                        # (B, 3, H, W) each
    path, columns = Path(cfg.out) / "reconstruct.png", min(8, len(originals))
    rows = [images[:columns] for images in (originals, *kept.values())]
    save_sheet(path, torch.cat(rows), columns, titles=["original", *kept])

    # how near they are to the originals
    marks, seen = {}, embed_images(visual, originals)                               # (B, E)
    for name, images in kept.items():
        cosine = (embed_images(visual, images) * seen).sum(-1)                      # (B,)
        marks[name] = {"psnr": [], "ssim": [], "clip": cosine.tolist()}
        # these in fp64, few at a time
        for ours, theirs in zip(images.split(16), originals.split(16)):             # (b, 3, H, W) each
            marks[name]["psnr"] += psnr(ours, theirs).tolist()
            marks[name]["ssim"] += ssim(ours, theirs).tolist()
    rows = paired(marks["last layer"], marks["all layers"])
    ends = paired(marks["another"], marks["autoencoder"])
    before = cfg.last_layer_file or "the same weights, read at the last layer"
    return finish(cfg, "reconstruct", {"last_layer": before, "table": rows, "ends": ends},
                  f"before: {before}; after: all layers\n{table(rows)}\n\n"
                  f"before: another picture; after: the autoencoder alone\n{table(ends)}\npictures {path}")


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio, dB, of pairs of pictures (B, 3, H, W) in [0, 1], (B,) fp64."""
    return -10 * (a.double() - b.double()).square().mean((1, 2, 3)).log10()         # (B,)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of pairs of pictures (B, 3, H, W) in [0, 1], (B,) fp64 (Wang et al. 2004), over
    all windows of 7 x 7 and colours: what scikit-image computes by default."""
    mean = partial(F.avg_pool2d, kernel_size=7, stride=1)

    def covariance(x: Tensor, y: Tensor) -> Tensor:
        return 49 / 48 * (mean(x * y) - mean(x) * mean(y))                          # (B, 3, H - 6, W - 6)

    a, b = a.double(), b.double()
    c1, c2 = 0.01 ** 2, 0.03 ** 2
    similar = (2 * mean(a) * mean(b) + c1) * (2 * covariance(a, b) + c2)
    total = (mean(a) ** 2 + mean(b) ** 2 + c1) * (covariance(a, a) + covariance(b, b) + c2)
    return (similar / total).mean((1, 2, 3))                                        # (B,)


COMMANDS = {"geneval": geneval.main, "dpg": dpg.main, "rewards": rewards, "reconstruct": reconstruct,
            "understand": understand.main, "layers": layers.main, "ablate": ablate.main,
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
