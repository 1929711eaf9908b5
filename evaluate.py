"""Measure a model: `python evaluate.py COMMAND`; each has a --help.

    geneval      does it draw what is asked for? GenEval's prompts, detector and rules (benchmarks.py);
                 nano: held-out prompts of the nano world and its exact judge
    dpg          the same for long prompts: DPG-Bench's questions, a model that answers them (benchmarks.py)
    rewards      what did training gain? the reward models on held-out prompts, before and after
    reconstruct  "Keep the image as it is.": what of a picture survives the way through the condition?
    understand   does the vision-language model still see? the nano world's questions, or those of POPE, MME,
                 MMBench, SEED-Bench, MMMU, RealWorldQA, TextVQA, MM-Vet
    layers       what does each layer carry? (analyse.py)
    ablate       what is each part worth? (analyse.py)
    report       a run, or several, as one HTML file (report.py)

Each prints a table and writes it, with its settings, as JSON into --out. What was cut short goes on with the
same command; `torchrun --nproc-per-node N` shares geneval and dpg of full size between N processes. Rules
stand in scoring.py and questions.py, learned judges in judges.py. Standard errors (s.e.) are over prompts, or
over questions: sample standard deviation / sqrt(n). Letters: B pictures, H W pixels.
"""
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from common import (WEIGHTS_HELP, config_dict, derive_seed, fingerprint, knob, parse_config, read_metrics,
                    run_main)
from sample import load_model, out_folder
from scoring import PER_PROMPT, mean_and_error, task_table
from train import RECIPES, TrainConfig

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor
    from model import ParaUni
    from questions import Question


@dataclass(frozen=True)
class ModelConfig:
    """Flags of every command."""
    preset: str = knob("nano", "size of everything")
    weights: str = knob("auto", WEIGHTS_HELP)
    stage_file: str = knob("", "a stage's weights, as runs/stage3/stage3.safetensors; "
                               "empty: the newest in --weights")
    out: str = knob("", "folder for tables and pictures")
    seed: int = knob(0, "all randomness is derived from it")
    batch_size: int = knob(64, "pictures at a time")
    dtype: str = knob("auto", "auto: bf16 on CUDA, fp32 on CPU", choices=("auto", "fp32", "bf16"))

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("num_steps", 1), ("per_prompt", 1), ("count", 1),
                            ("limit", 0)):
            if (value := getattr(self, name, least)) < least:
                raise ValueError(f"expected --{name.replace('_', '-')} of at least {least}, got {value}")


# ----------------------------------------------------------------------------- shared

def load(cfg: ModelConfig, stage_file: str) -> tuple["ParaUni", str]:
    """A model and the precision that --dtype means on its device."""
    model = load_model(cfg.preset, cfg.weights, stage_file, cfg.seed)
    auto = "bf16" if model.device.type == "cuda" else "fp32"
    return model, auto if cfg.dtype == "auto" else cfg.dtype


def number(value: float | None, width: int = 8, sign: str = "") -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{sign}{width}.4f}"


def finish(cfg: ModelConfig, name: str, result: dict, table: str) -> dict:
    """Print the table; write the result with how it was made."""
    from common import environment, write_json
    path = Path(cfg.out) / f"{name}.json"
    write_json(path, {**result, "config": config_dict(cfg), "environment": environment()})
    print(f"{table}\nwritten to {path}")
    return result


def spread(limit: int, total: int) -> list[int]:
    """`limit` places evenly over `total`; 0: all of them."""
    if limit > total:
        raise ValueError(f"expected --limit of at most {total}, the benchmark's prompts, got {limit}")
    return [k * total // (limit or total) for k in range(limit or total)]


def same_settings(was: dict, settings: dict, where: Path) -> None:
    """ValueError names the settings in which earlier work, which would be gone on with, differs."""
    changed = [f"--{name.replace('_', '-')} {was.get(name, '(absent)')} -> {value}"
               for name, value in settings.items() if was.get(name) != value]
    if changed:
        raise ValueError(f"{where} is of other settings ({', '.join(changed)}): give those, "
                         "or choose another --out")


def resume_lines(path: Path, settings: dict) -> list[dict]:
    """The records of an earlier run with the same settings; they stand in the file's first line.
    A last line that was cut is taken off."""
    with open(path, "ab+") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
    records = read_metrics(path)
    if not records:
        path.write_text(json.dumps({"settings": settings}) + "\n")
        return []
    same_settings(records[0].get("settings", {}), settings, path)
    return records[1:]


def open_picture(path: Path) -> "Image.Image":
    """An RGB picture, turned as its camera says. ValueError if it cannot be read to the end."""
    from PIL import Image, ImageOps
    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"expected a picture {path}, found none") from error
    except (OSError, SyntaxError) as error:                  # PIL says the one or the other of a damaged PNG
        raise ValueError(f"{path} cannot be read as a picture ({error}): remove it and run again") from error


def to_tensor(picture: "Image.Image") -> "Tensor":
    """(3, H, W) fp32 in [0, 1]."""
    import numpy as np
    import torch
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


# ----------------------------------------------------------------------------- geneval

@dataclass(frozen=True)
class GenevalConfig(ModelConfig):
    out: str = knob("runs/geneval",
                    "folder for verdicts, table and pictures; an interrupted evaluation there goes on")
    per_prompt: int = knob(PER_PROMPT, "pictures of each prompt")
    limit: int = knob(0, "prompts, evenly spread over the benchmark's, for a quick look; 0: all of them")
    num_steps: int = knob(20, "sampling steps")
    guidance_scale: float = knob(4.5, "classifier-free guidance; 1 turns it off")
    metadata: str = knob("", "GenEval's evaluation_metadata.jsonl; empty: fetch it; nano has its own prompts")
    images: str = knob("", "score a folder of any model's pictures in GenEval's layout; empty: draw them")
    detections: str = knob("", "ready detections, a JSON file or a folder of them, in place of --detector")
    detector: str = knob("facebook/mask2former-swin-small-coco-instance",
                         "Mask2Former: a folder, or a repository of the hub")
    clip: str = knob("openai/clip-vit-large-patch14", "the CLIP that names colours: a folder, or on the hub")
    score: bool = knob(True, "score the pictures; --no-score only draws them")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images and not self.score:
            raise ValueError("expected --images to be scored: leave out --no-score, or --images to draw some")


def geneval(cfg: GenevalConfig) -> dict:
    """GenEval, six tasks: pictures of its prompts through a detector; for nano, through the exact judge."""
    if cfg.preset == "nano" and not (cfg.images or cfg.metadata):
        return nano_geneval(cfg)
    import benchmarks
    return benchmarks.in_group(benchmarks.full_geneval, cfg)


def nano_geneval(cfg: GenevalConfig) -> dict:
    """Held-out prompts of the nano world through its exact judge."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("the nano benchmark is a matter of minutes for one process: "
                         "start it with python, or with torchrun --nproc-per-node 1")
    from common import save_png
    from nano import world
    prompts = world.benchmark_prompts()
    chosen = spread(cfg.limit, len(prompts))
    folder = out_folder(cfg.out)
    model, dtype = load(cfg, cfg.stage_file)
    settings = {"weights": f"sha256:{fingerprint(model)[:16]}", "seed": cfg.seed, "num_steps": cfg.num_steps,
                "guidance_scale": cfg.guidance_scale, "dtype": dtype}          # all that a verdict depends on
    verdicts = {(record["prompt"], record["sample"]): record["right"]
                for record in resume_lines(folder / "verdicts.jsonl", settings)}
    wanted = [(i, j) for i in chosen for j in range(cfg.per_prompt)]
    if not judge_pictures(cfg, model, dtype, prompts,
                          [key for key in wanted if key not in verdicts], verdicts):
        return {}
    verdicts = {key: verdicts[key] for key in wanted}
    save_png(folder / "examples.png", example_grid(cfg, model, dtype, prompts, verdicts))
    whole = len(chosen) == len(prompts) and cfg.per_prompt == PER_PROMPT
    name = ("nano GenEval" if whole else
            f"part of nano GenEval, not the benchmark ({len(chosen)} of {len(prompts)} prompts, "
            f"{cfg.per_prompt} of {PER_PROMPT} pictures each)")
    scores = task_table(verdicts, [prompt.task for prompt in prompts])
    result = {"name": name, "benchmark": whole, "settings": settings, **scores}
    return finish(cfg, "geneval", result,
                  f"{name}\n{geneval_table(scores)}\npictures {folder / 'examples.png'}")


def draw(cfg: GenevalConfig, model: "ParaUni", dtype: str, prompts: list,
         keys: list[tuple[int, int]]) -> "Tensor":
    """The pictures (prompt, sample) of the benchmark, (B, 3, H, W) in [0, 1] on the CPU:
    the same in any batch."""
    from common import precision
    seeds = [derive_seed(cfg.seed, "geneval", i, j) for i, j in keys]
    with precision(model.device, dtype):
        return model.generate([prompts[i].text for i, _ in keys], cfg.num_steps, cfg.guidance_scale,
                              seed=seeds).cpu()


def judge_pictures(cfg: GenevalConfig, model: "ParaUni", dtype: str, prompts: list,
                   todo: list[tuple[int, int]], verdicts: dict[tuple[int, int], bool]) -> bool:
    """Draw and judge pictures; add each verdict to `verdicts` and to the file.
    False if a signal stopped it."""
    from common import StopSignal
    from nano import world
    from tqdm import tqdm
    with StopSignal() as signal, open(Path(cfg.out) / "verdicts.jsonl", "a") as file:
        with tqdm(total=len(todo), unit="picture", dynamic_ncols=True, disable=not todo) as bar:
            for first in range(0, len(todo), cfg.batch_size):
                if signal.stop:
                    bar.close()
                    print(f"stopped with {len(todo) - first} pictures to go; "
                          "the same command goes on from here")
                    return False
                keys = todo[first:first + cfg.batch_size]
                right = world.judge(draw(cfg, model, dtype, prompts, keys), [prompts[i] for i, _ in keys])
                for (i, j), verdict in zip(keys, right):
                    line = {"prompt": i, "sample": j, "right": verdict, "task": prompts[i].task}
                    file.write(json.dumps({**line, "text": prompts[i].text}) + "\n")
                file.flush()
                verdicts |= zip(keys, right)
                bar.update(len(keys))
    return True


def geneval_table(scores: dict) -> str:
    lines = [f"{'task':15} {'right':>8} {'s.e.':>8} {'prompts':>8} {'pictures':>8}"]
    for name, row in (*scores["tasks"].items(), ("mean of tasks", scores["overall"])):
        lines.append(f"{name:15} {number(row['right'])} {number(row['error'])} "
                     f"{row['prompts']:8} {row['pictures']:8}")
    return "\n".join(lines)


def example_grid(cfg: GenevalConfig, model: "ParaUni", dtype: str, prompts: list,
                 verdicts: dict[tuple[int, int], bool]) -> "Image.Image":
    """Up to two right pictures of each task, then up to two wrong ones, drawn again from their seeds."""
    import numpy as np
    from common import image_grid
    from nano import world
    keys = list(verdicts)
    keys = [keys[k] for k in np.random.default_rng(cfg.seed).permutation(len(keys))]
    chosen = []
    for right in (True, False):
        for task in world.TASKS:
            one_a_prompt = {key[0]: key for key in keys
                            if verdicts[key] == right and prompts[key[0]].task == task}
            chosen += list(one_a_prompt.values())[:2]
    captions = [f"{'right' if verdicts[key] else 'wrong'}: {prompts[key[0]].text}" for key in chosen]
    images = draw(cfg, model, dtype, prompts, chosen)                                   # (B, 3, H, W)
    return image_grid(images, min(6, len(chosen)), 128 // images.shape[-1], captions)


# ----------------------------------------------------------------------------- rewards

@dataclass(frozen=True)
class RewardsConfig(ModelConfig):
    stage_file: str = knob("", "the weights after training, as runs/stage3/stage3.safetensors; must be given")
    baseline: str = knob("", "the weights before; empty: stage2.safetensors in --weights")
    prompts: str = knob("", "file with one held-out prompt a line; empty: the nano world's")
    limit: int = knob(0, "the first so many prompts; 0: all of them")
    rewards: tuple[str, ...] = knob(("clip", "pickscore", "aesthetic"), "names, or file.py:function")
    reward_weights: str = knob("", "folder of the reward models; empty: weights/nano")
    num_steps: int = knob(20, "sampling steps")
    guidance_scale: float = knob(4.5, "classifier-free guidance; 1 turns it off")
    out: str = knob("runs/rewards", "folder for the table")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.stage_file:
            raise ValueError("expected --stage-file to name the weights after training, got none")
        if not self.rewards:
            raise ValueError("expected --rewards to name at least one reward, got none")
        if self.preset != "nano" and not self.prompts:
            raise ValueError(f"preset {self.preset} has no held-out prompts of its own: "
                             "name a file with --prompts")
        if self.weights == "random" and not self.baseline:
            raise ValueError("random weights have no stage2.safetensors: "
                             "name the weights before with --baseline")


def rewards(cfg: RewardsConfig) -> dict:
    """Rewards of held-out prompts before and after training, from the same noise, one picture a prompt."""
    from data import nano_prompts, read_prompts
    from model import weights_folder
    prompts = read_prompts(cfg.prompts) if cfg.prompts else nano_prompts(test=True)
    prompts = prompts[:cfg.limit or len(prompts)]
    baseline = cfg.baseline or str(weights_folder(cfg.preset, cfg.weights) / "stage2.safetensors")
    out_folder(cfg.out)
    before, after = heldout_scores(cfg, baseline, prompts), heldout_scores(cfg, cfg.stage_file, prompts)
    table = {name: compare(before[name], after[name]) for name in before}
    result = {"baseline": baseline, "rewards": table, "prompts": prompts, "before": before, "after": after}
    return finish(cfg, "rewards", result,
                  f"before {baseline}\nafter  {cfg.stage_file}\n{rewards_table(table)}")


def heldout_scores(cfg: RewardsConfig, stage_file: str, prompts: list[str]) -> dict[str, list[float | None]]:
    """Each reward of a picture of every prompt, drawn and scored as training does;
    None where it is not finite."""
    from common import Dist
    from grpo import score_heldout
    from rewards import build_reward
    model, dtype = load(cfg, stage_file)    # anew each time: a stage 1 file must not keep another's DiT
    model.tokenize(prompts)                          # an unknown word is reported before the first picture
    scorers = {name.rpartition(":")[2]: build_reward(name, model.device, weights=cfg.reward_weights or None)
               for name in cfg.rewards}
    as_in_training = TrainConfig(stage=3, seed=cfg.seed, micro_batch=cfg.batch_size, dtype=dtype,
                                 eval_steps=cfg.num_steps, eval_guidance_scale=cfg.guidance_scale)
    scores = score_heldout(model, scorers, prompts, as_in_training, Dist(0, 1, 0, model.device))
    return {name: [x if math.isfinite(x) else None for x in values] for name, values in scores.items()}


def compare(before: list[float | None], after: list[float | None]) -> dict:
    """Means with standard errors, and the mean paired difference with its 95 % interval
    (normal, +- 1.96 s.e.).

    Pairs that lack a score on either side are left out; n counts the others.
    """
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if a is not None and b is not None]
    change, error = mean_and_error([b - a for a, b in pairs])
    interval = None if error is None else [change - 1.96 * error, change + 1.96 * error]
    return {"n": len(pairs), "before": mean_and_error([a for a, _ in pairs]),
            "after": mean_and_error([b for _, b in pairs]), "change": change, "interval": interval}


def rewards_table(table: dict[str, dict],
                  titles: tuple[str, str, str] = ("reward", "before", "after")) -> str:
    columns = (titles[1], "s.e.", titles[2], "s.e.", "change", "95 % from", "to")
    lines = [f"{titles[0]:15} {' '.join(f'{title:>9}' for title in columns)} {'n':>5}"]
    for name, row in table.items():
        means = [number(value, 9) for value in (*row["before"], *row["after"])]
        changes = [number(value, 9, "+") for value in (row["change"], *(row["interval"] or (None, None)))]
        lines.append(f"{name:15} {' '.join(means + changes)} {row['n']:5}")
    return "\n".join(lines)


# ----------------------------------------------------------------------------- reconstruct

KEEP = "Keep the image as it is."                            # the paper's instruction (supplement, Table 2)


@dataclass(frozen=True)
class ReconstructConfig(ModelConfig):
    stage_file: str = knob("", "weights trained with all layers; empty: the newest in --weights")
    last_layer_file: str = knob("", "weights trained with the last layer only (train.py --layers); "
                                    "empty: --stage-file, read at its last layer")
    images: str = knob("", "folder of pictures; empty: held-out pictures of the nano world")
    count: int = knob(200, "pictures")
    num_steps: int = knob(20, "sampling steps")
    guidance_scale: float = knob(4.5, "classifier-free guidance; 1 turns it off")
    reward_weights: str = knob("", "folder with clip/, for CLIP similarity; empty: weights/nano")
    out: str = knob("runs/reconstruct", "folder for table and pictures")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset != "nano" and not self.images:
            raise ValueError(f"preset {self.preset} has no pictures of its own: name a folder with --images")


def reconstruct(cfg: ReconstructConfig) -> dict:
    """PSNR, SSIM and CLIP similarity of pictures kept "as they are": last layer against all layers.

    The row `autoencoder` says how much of a picture the DC-AE alone keeps, `another` how near any other
    picture is: the ends of the scale.
    """
    from common import save_png
    folder = out_folder(cfg.out)
    model, dtype = load(cfg, cfg.stage_file)
    originals = kept_pictures(cfg, model.preset.image_size)                             # (count, 3, H, W)
    kept = {"all layers": keep_images(cfg, model, dtype, originals, None),
            "autoencoder": through_autoencoder(model, originals, cfg.batch_size),
            "another": originals.roll(1, 0)}
    if cfg.last_layer_file:
        model, dtype = load(cfg, cfg.last_layer_file)
    last = None if cfg.last_layer_file else [model.preset.vlm.num_layers]
    kept["last layer"] = keep_images(cfg, model, dtype, originals, last)
    clip = clip_similarity(cfg)
    marks = {name: likeness(images, originals, clip) for name, images in kept.items()}
    table = {name: compare(marks["last layer"][name], marks["all layers"][name])
             for name in ("psnr", "ssim", "clip")}
    ends = {name: {key: mean_and_error([x for x in marks[name][key] if x is not None]) for key in table}
            for name in ("autoencoder", "another")}
    save_png(folder / "reconstruct.png", reconstruction_sheet({"original": originals, **kept}))
    lines = [rewards_table(table, ("", "last", "all"))]
    for name, row in ends.items():
        lines.append(f"{name:15} " + ", ".join(f"{key} {number(mean, 0)} (s.e. {number(error, 0)})"
                                               for key, (mean, error) in row.items()))
    of = cfg.last_layer_file or "the same weights, read at the last layer"
    result = {"prompt": KEEP, "last_layer": of, "table": table, "ends": ends, "pictures": marks}
    return finish(cfg, "reconstruct", result, f"last layer: {of}\n" + "\n".join(lines)
                  + f"\npictures {folder / 'reconstruct.png'}")


def reconstruction_sheet(rows: dict[str, "Tensor"]) -> "Image.Image":
    """The first eight pictures, a row for each way they went."""
    import torch
    import torch.nn.functional as F
    from common import image_grid
    names = ("original", "autoencoder", "last layer", "all layers")
    columns, side = min(8, len(rows["original"])), min(128, rows["original"].shape[-1])
    images = torch.cat([F.adaptive_avg_pool2d(rows[name][:columns], side) for name in names])
    return image_grid(images, columns, max(1, 96 // side), row_titles=list(names))


def kept_pictures(cfg: ReconstructConfig, side: int) -> "Tensor":
    """The originals, (count, 3, H, W) in [0, 1]: centre crops of --images, or pictures of the nano world."""
    import torch
    from PIL import Image, ImageOps
    if not cfg.images:
        from nano import world
        return world.question_set(cfg.count, cfg.seed)[0]
    ends = (".png", ".jpg", ".jpeg", ".webp")
    paths = sorted(p for p in Path(cfg.images).glob("*") if p.suffix.lower() in ends)[:cfg.count]
    if len(paths) < 2:
        raise FileNotFoundError(f"expected --images to name a folder of at least 2 pictures, "
                                f"found {len(paths)} in {cfg.images}")
    return torch.stack([to_tensor(ImageOps.fit(open_picture(path), (side, side), Image.Resampling.BICUBIC))
                        for path in paths])


def keep_images(cfg: ReconstructConfig, model: "ParaUni", dtype: str, originals: "Tensor",
                layers: list[int] | None) -> "Tensor":
    """Each picture, shown to the VLM with the instruction to keep it, drawn anew. (B, 3, H, W) on the CPU."""
    import torch
    from common import precision
    out = []
    for first in range(0, len(originals), cfg.batch_size):
        part = originals[first:first + cfg.batch_size].to(model.device)
        seeds = [derive_seed(cfg.seed, "reconstruct", first + k) for k in range(len(part))]
        with precision(model.device, dtype):
            out.append(model.generate([KEEP] * len(part), cfg.num_steps, cfg.guidance_scale, seed=seeds,
                                      images=part, layers=layers).cpu())
    return torch.cat(out)                                                               # (B, 3, H, W)


def through_autoencoder(model: "ParaUni", originals: "Tensor", batch_size: int) -> "Tensor":
    import torch
    with torch.no_grad():
        return torch.cat([model.decode(model.vae.encode(part.to(model.device) * 2 - 1)).cpu()
                          for part in originals.split(batch_size)])                     # (B, 3, H, W)


def clip_similarity(cfg: ReconstructConfig) -> Callable:
    """A function of two batches of pictures: the cosine of their CLIP embeddings, (B,)."""
    from rewards import NANO_WEIGHTS, embed_images, load_clip
    import torch
    clip, _, picture = load_clip((Path(cfg.reward_weights) if cfg.reward_weights else NANO_WEIGHTS) / "clip")
    visual = clip.visual.eval()

    @torch.no_grad()
    def similarity(a: "Tensor", b: "Tensor") -> "Tensor":
        return (embed_images(visual, a, picture, cfg.batch_size)
                * embed_images(visual, b, picture, cfg.batch_size)).sum(-1)             # (B,)
    return similarity


def likeness(images: "Tensor", originals: "Tensor", clip: Callable) -> dict[str, list[float | None]]:
    """PSNR in dB, SSIM, CLIP similarity of each pair; None where two pictures are the same to the bit."""
    from scoring import psnr, ssim
    scores = {"psnr": psnr(images, originals), "ssim": ssim(images, originals),
              "clip": clip(images, originals)}
    return {name: [x if math.isfinite(x) else None for x in values.tolist()]
            for name, values in scores.items()}


# ----------------------------------------------------------------------------- understand

KINDS = {"how many": "how many", "what color": "what color", "what shape": "what shape",
         "is there": "is there", "is the": "relation",
         "what is": "what is"}                              # first two words of a question -> its kind
BENCHMARKS = ("nano", "pope", "mme", "mmbench", "seed", "mmmu", "realworldqa", "textvqa", "mmvet")


@dataclass(frozen=True)
class UnderstandConfig(ModelConfig):
    benchmark: str = knob("nano", "whose questions, and whose metric", choices=BENCHMARKS)
    questions: str = knob("", "the benchmark's question file (MME: its folder)")
    images: str = knob("", "folder of its pictures; not needed where they are in the question file")
    count: int = knob(2000, "questions about the nano world, each about a picture of its own")
    limit: int = knob(0, "the first so many questions of --questions; 0: all of them")
    max_new_tokens: int = knob(32, "longest answer to --questions, tokens (MM-Vet wants sentences: 512)")
    reference: str = knob("", "folder with the untouched vlm/, or auto: that of --weights; "
                              "ask it the same, and compare")
    batch_size: int = knob(250, "questions at a time")
    out: str = knob("runs/understand", "folder for table and answers; an interrupted benchmark there goes on")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.benchmark == "nano") == bool(self.questions):
            raise ValueError("expected --questions for every --benchmark but nano, got --benchmark "
                             f"{self.benchmark} and --questions {self.questions or '(none)'}")
        if self.benchmark == "nano" and self.preset != "nano":
            raise ValueError("the questions about the nano world are in its own words: "
                             f"--preset {self.preset} needs --benchmark and --questions")


def understand(cfg: UnderstandConfig) -> dict:
    """The vision-language model's answers: to held-out questions about the nano world, or to a benchmark's.

    The hashes show that training left it alone: two runs with equal ones gave the same answers from
    the same bits.
    """
    return nano_understand(cfg) if cfg.benchmark == "nano" else full_understand(cfg)


def nano_understand(cfg: UnderstandConfig) -> dict:
    from nano import world
    out_folder(cfg.out)
    model, dtype = load(cfg, cfg.stage_file)
    images, pairs = world.question_set(cfg.count, cfg.seed)                             # (count, 3, H, W)
    asked = [question for question, _ in pairs]
    answers = answers_to(model, dtype, images, asked, cfg.batch_size)
    wrong = [[question, said, right] for (question, right), said in zip(pairs, answers) if said != right]
    result = {"kinds": answer_scores(pairs, answers), "vlm_sha256": fingerprint(model.vlm),
              "first_wrong": wrong[:50],
              "answers_sha256": hashlib.sha256("\n".join(answers).encode()).hexdigest()}
    lines = [f"{'question':15} {'right':>8} {'s.e.':>8} {'n':>6}"]
    for kind, row in result["kinds"].items():
        lines.append(f"{kind:15} {number(row['right'])} {number(row['error'])} {row['n']:6}")
    lines += [f"{name:14} {result[name]}" for name in ("answers_sha256", "vlm_sha256")]
    if cfg.reference:
        untouched = untouched_model(cfg)
        result["untouched"] = against(answers, answers_to(untouched, dtype, images, asked, cfg.batch_size),
                                      result["vlm_sha256"], untouched)
        lines.append(untouched_line(result["untouched"]))
    return finish(cfg, "understand", result, "\n".join(lines))


def answers_to(model: "ParaUni", dtype: str, images: "Tensor", asked: list[str],
               batch_size: int) -> list[str]:
    """Answers of one word about pictures (B, 3, H, W), greedy."""
    from common import precision
    from tqdm import tqdm
    answers = []
    with precision(model.device, dtype):
        for first in tqdm(range(0, len(asked), batch_size), unit="batch", dynamic_ncols=True):
            part = slice(first, first + batch_size)
            answers += model.answer(images[part].to(model.device), asked[part], max_new_tokens=4)
    return answers


def untouched_model(cfg: UnderstandConfig) -> "ParaUni":
    """The VLM as it was before any stage, in a model of its own: no stage file is loaded into it."""
    import torch
    from model import PRESETS, ParaUni, weights_folder
    folder = weights_folder(cfg.preset, cfg.weights if cfg.reference == "auto" else cfg.reference)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return ParaUni.from_parts(PRESETS[cfg.preset], folder, 0, device, torch.bfloat16)   # of its unused DiT


def against(answers: list[str], others: list[str], digest: str, untouched: "ParaUni") -> dict:
    """How many answers are those of the untouched VLM, and are the weights?"""
    return {"same_answers": sum(a == b for a, b in zip(answers, others, strict=True)), "of": len(answers),
            "same_weights": fingerprint(untouched.vlm) == digest}


def untouched_line(row: dict) -> str:
    return (f"as the untouched VLM: {row['same_answers']} of {row['of']} answers; "
            f"weights {'equal to the bit' if row['same_weights'] else 'differ'}")


def answer_scores(pairs: list[tuple[str, str]], answers: list[str]) -> dict[str, dict]:
    """Share of right answers for each kind of question present, and of all."""
    marks: dict[str, list[float]] = {kind: [] for kind in (*KINDS.values(), "all")}
    for (question, right), said in zip(pairs, answers, strict=True):
        for kind in (KINDS[" ".join(question.split()[:2])], "all"):
            marks[kind].append(float(said == right))
    rows = {}
    for kind, values in marks.items():
        if values:
            mean, error = mean_and_error(values)
            rows[kind] = {"right": mean, "error": error, "n": len(values)}
    return rows


def full_understand(cfg: UnderstandConfig) -> dict:
    """A published benchmark. Each picture is shown as one square tile, as the model sees it everywhere here:
    InternVL's own evaluation cuts large ones into up to 12."""
    from common import write_json
    from questions import FORMATS
    read, metric = FORMATS[cfg.benchmark]
    questions = read(Path(cfg.questions))
    questions = questions[:cfg.limit or len(questions)]
    out = out_folder(cfg.out)
    model, dtype = load(cfg, cfg.stage_file)
    settings = {"benchmark": cfg.benchmark, "dtype": dtype, "max_new_tokens": cfg.max_new_tokens,
                "weights": f"sha256:{fingerprint(model.vlm)[:16]}",
                "questions": f"sha256:{hashlib.sha256(repr(questions).encode()).hexdigest()[:16]}"}
    answers = ask_questions(cfg, model, dtype, questions, out / "answers.jsonl", settings)
    if len(answers) < len(questions):
        return {}
    rows = metric(questions, answers)
    result = {"benchmark": cfg.benchmark, "rows": rows, "settings": settings,
              "vlm_sha256": fingerprint(model.vlm),
              "answers_sha256": hashlib.sha256("\n".join(answers).encode()).hexdigest()}
    lines = [f"{cfg.benchmark}, {len(questions)} questions" + (" (part of the file)" if cfg.limit else ""),
             f"{'':25} {'value':>9} {'s.e.':>8} {'n':>6}"]
    lines += [f"{r['name']:25} {number(r['value'], 9)} {number(r['error'])} {r['n']:6}" for r in rows]
    if cfg.benchmark == "mmvet":
        write_json(out / "mmvet_submission.json", {q.name: said for q, said in zip(questions, answers)})
        lines.append(f"for the grader: {out / 'mmvet_submission.json'}")
    if cfg.reference:
        untouched = untouched_model(cfg)
        others = ask_questions(cfg, untouched, dtype, questions, out / "answers_untouched.jsonl", {
            **settings, "weights": f"sha256:{fingerprint(untouched.vlm)[:16]}"})
        if len(others) < len(questions):
            return {}
        result["untouched"] = against(answers, others, result["vlm_sha256"], untouched)
        lines.append(untouched_line(result["untouched"]))
    return finish(cfg, "understand", result, "\n".join(lines))


def ask_questions(cfg: UnderstandConfig, model: "ParaUni", dtype: str, questions: list["Question"],
                  path: Path, settings: dict) -> list[str]:
    """The answers to all questions, in order, written as they come; fewer if a signal stopped it."""
    import torch
    from common import StopSignal, precision
    from tqdm import tqdm
    answers = [record["answer"] for record in resume_lines(path, settings)]
    with StopSignal() as signal, open(path, "a") as file, precision(model.device, dtype):
        with tqdm(total=len(questions), initial=len(answers), unit="question", dynamic_ncols=True) as bar:
            while len(answers) < len(questions) and not signal.stop:
                part = questions[len(answers):len(answers) + cfg.batch_size]
                images = torch.stack([tile(q, cfg.images, model.preset.vlm.image_size) for q in part])
                said = model.answer(images.to(model.device), [q.text for q in part], cfg.max_new_tokens)
                for question, answer in zip(part, said):
                    file.write(json.dumps({"name": question.name, "answer": answer}) + "\n")
                file.flush()
                answers += said
                bar.update(len(part))
    if len(answers) < len(questions):
        print(f"stopped with {len(questions) - len(answers)} questions to go; "
              "the same command goes on from here")
    return answers[:len(questions)]


def tile(question: "Question", folder: str, side: int) -> "Tensor":
    """A question's picture as the VLM's one tile, (3, side, side) in [0, 1]: a file, or base64."""
    import base64
    import binascii
    import io
    from PIL import Image, UnidentifiedImageError
    if len(question.image) < 256:
        picture = open_picture(Path(folder) / question.image)
    else:
        try:
            picture = Image.open(io.BytesIO(base64.b64decode(question.image, validate=True))).convert("RGB")
        except (binascii.Error, UnidentifiedImageError, OSError) as error:
            raise ValueError(f"the picture of question {question.name} is damaged ({error})") from error
    return to_tensor(picture.resize((side, side), Image.Resampling.BICUBIC))


# ----------------------------------------------------------------------------- entry

COMMANDS = {                                                # name -> (module, its config, its function)
    "geneval": (__name__, "GenevalConfig", "geneval"), "dpg": ("benchmarks", "DpgConfig", "dpg"),
    "rewards": (__name__, "RewardsConfig", "rewards"),
    "reconstruct": (__name__, "ReconstructConfig", "reconstruct"),
    "understand": (__name__, "UnderstandConfig", "understand"),
    "layers": ("analyse", "LayersConfig", "layers"), "ablate": ("analyse", "AblateConfig", "ablate"),
    "report": ("report", "ReportConfig", "report")}


def main(argv: list[str] | None = None) -> dict:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["-h"], ["--help"]):
        print(__doc__)
        return {}
    if not argv or argv[0] not in COMMANDS:
        got = repr(argv[0]) if argv else "nothing"
        raise ValueError(f"expected the first word to be one of {', '.join(COMMANDS)}, got {got}; see --help")
    module, config, command = COMMANDS[argv[0]]
    cls, run = (getattr(import_module(module), name) for name in (config, command))
    presets = {name: {} for name in RECIPES} if hasattr(cls, "preset") else {}
    return run(parse_config(cls, presets, argv[1:], run.__doc__.split("\n")[0]))


if __name__ == "__main__":
    run_main(main)
