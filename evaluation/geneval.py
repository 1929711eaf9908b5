"""GenEval (arXiv 2310.11513): pictures of its prompts through a detector; for nano, through an exact judge.

Three steps, each with files of its own: what is done stays done, and another program can do any of them.

    pictures    --out/images, or --images: GenEval's layout, 00000/metadata.jsonl, 00000/samples/00000.png ...
    detections  --out/detections, one JSON a prompt; or --detections: a JSON or a folder of some, each
                {"judge": the detector, "items": {"00000/samples/00000.png": [object, ...]}}
    verdicts    --out/verdicts.jsonl, and the table

An object is {"class", "score" 0..1, "box" [left, top, right, bottom], "color" where the prompt asks for one}.
GenEval runs on mmdet's Mask2Former Swin-S; the one here is Facebook's, of the same size and classes, and a
score by it says so. Thresholds and rules are those of GenEval's code. nano has held-out prompts of its own
and no detections: nano/world.py judges its pictures.

Letters: P padded, h w resized, H W picture, Q queries of the detector, E embedding, T side of CLIP's tower.
"""
import json
import math
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from itertools import chain, product
from pathlib import Path
from statistics import fmean

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import normalize, pil_to_tensor, to_tensor
from tqdm import tqdm
from transformers import Mask2FormerForUniversalSegmentation

from common import Dist, Refused, derive_seed, fingerprint, knob, read_lines, write_json
from evaluation import (DrawConfig, draw_files, fetched, finish, keep_request, load_judge, mean_and_error,
                        read_json, read_judged, spread, start, table, title_of, wait, write_lines)
from model import PRESETS, weights_folder
from nano import world
from nano.world import TASKS, sides
from pictures import read_picture
from rewards import load_clip

PROMPTS_URL = "https://raw.githubusercontent.com/djghosh13/geneval/main/prompts/evaluation_metadata.jsonl"
PROMPTS_DIGEST = "ac3c481628128939793c13827f94fb83c9bc0a7efef1c29bfbe1c117c8c99e5e"    # of the 553 prompts
PER_PROMPT = 4                          # pictures of each prompt that make the benchmark
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
# COCO's names that GenEval's prompts call otherwise
RENAMED = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}


@dataclass(frozen=True)
class GenevalConfig(DrawConfig):
    out: str = knob("runs/geneval", "folder for pictures and table; what was cut short there goes on")
    per_prompt: int = knob(PER_PROMPT, "pictures of each prompt")
    limit: int = knob(0, "prompts, evenly spread over all that there are, for a quick look; 0: all of them")
    metadata: str = knob("", "GenEval's evaluation_metadata.jsonl; empty: fetch it; nano has its own prompts")
    images: str = knob("", "score a folder of any model's pictures in GenEval's layout; empty: draw them")
    detections: str = knob("", "ready detections, a JSON file or a folder of them, in place of --detector")
    detector: str = knob("facebook/mask2former-swin-small-coco-instance", "a folder, or a name of the hub")
    score: bool = knob(True, "score the pictures; --no-score only draws them")


# ----------------------------------------------------------------------------- the rules

MIN_SCORE, MIN_SCORE_COUNTING = 0.3, 0.9        # a detection must lie above
MAX_PER_CLASS = 16


def keep(objects: list[dict], task: str) -> dict[str, list[dict]]:
    """What counts as seen: by class, best first, above the task's threshold, at most 16 of a class."""
    least = MIN_SCORE_COUNTING if task == "counting" else MIN_SCORE
    seen = defaultdict(list)
    for thing in sorted(objects, key=lambda thing: -thing["score"]):
        group = seen[thing["class"]]
        if thing["score"] > least and len(group) < MAX_PER_CLASS:
            group.append(thing)
    return seen


def position(a: dict, b: dict) -> set[str]:
    """Where a lies from b."""
    a = np.reshape(a["box"], (2, 2))                                            # (corner, axis)
    b = np.reshape(b["box"], (2, 2))                                            # (corner, axis)
    sizes = np.abs(a[1] - a[0]) + np.abs(b[1] - b[0])                           # (2,)
    return sides(a.mean(0) - b.mean(0), sizes)


def need_color(objects: list[dict], request: dict) -> list[dict]:
    """The objects whose colour decides: the best `count` of each class that a colour is asked of."""
    seen = keep(objects, request["tag"])
    return [thing for clause in request["include"] if "color" in clause
            for thing in seen[clause["class"]][:clause["count"]]]


def verdict(objects: list[dict], request: dict) -> bool:
    """GenEval's verdict on one picture. Those of `need_color` must have a colour. Extra objects do not hurt,
    except those of classes under "exclude" (counting)."""
    seen = keep(objects, request["tag"])
    # of each clause the best `count` objects of its class
    groups = [seen[clause["class"]][:clause["count"]] for clause in request["include"]]
    for clause, best in zip(request["include"], groups):
        right = [thing for thing in best if "color" not in clause or thing["color"] == clause["color"]]
        if len(right) < clause["count"]:
            return False
        if "position" in clause:
            relation, target = clause["position"]
            pairs = product(best, groups[target])
            if not all(relation in position(*pair) for pair in pairs):
                return False
    return all(len(seen[clause["class"]]) < clause["count"] for clause in request.get("exclude", []))


def task_scores(verdicts: list[dict]) -> dict:
    """Share of right pictures of each task, and the unweighted mean of the tasks, "overall"; a row each under
    "tasks". Errors count prompts, not pictures, since the pictures of a prompt fail together.

    verdicts  of each picture its "prompt", a number, the "task" of that, and whether it is "right"
    """
    by_prompt = defaultdict(list)
    for record in verdicts:
        by_prompt[record["task"], record["prompt"]].append(record["right"])
    rows = []
    for task in TASKS:
        groups = [group for (of, _), group in by_prompt.items() if of == task]
        if groups:
            every = list(chain(*groups))
            _, error = mean_and_error(list(map(fmean, groups)))
            rows.append({"task": task, "right": fmean(every), "s.e.": error, "prompts": len(groups),
                         "pictures": len(every)})
    overall = fmean(row["right"] for row in rows)
    # the tasks' errors add in squares
    errors = [row["s.e."] for row in rows]
    error = None if None in errors else math.hypot(*errors) / len(errors)
    rows.append({"task": "overall", "right": overall, "s.e.": error, "prompts": len(by_prompt),
                 "pictures": len(verdicts)})
    return {"overall": overall, "tasks": rows}


# ----------------------------------------------------------------------------- detector, namer of colours

SHORT, LONG = 800, 1333                         # sides of the picture that the detector sees, at most, pixels
MEAN = (123.675, 116.28, 103.53)                # ImageNet's, of levels 0 .. 255
STD = (58.395, 57.12, 57.375)
TOP = 100                                       # pairs of query and class that are looked at


class Detector:
    """Mask2Former of transformers for COCO's classes, with the post-processing of mmdet."""

    def __init__(self, source: str, device: torch.device) -> None:
        self.model, self.name = load_judge(Mask2FormerForUniversalSegmentation, source, device)
        labels = self.model.config.id2label
        self.classes = [RENAMED.get(labels[i], labels[i]) for i in sorted(labels)]

    def prepare(self, image: Image.Image) -> tuple[Tensor, tuple[int, int]]:
        """The picture as the network sees it, (1, 3, P, P), padded right and below; h, w without padding."""
        x = pil_to_tensor(image)[None].float()                                      # (1, 3, H, W)
        H, W = x.shape[-2:]
        scale = min(LONG / max(H, W), SHORT / min(H, W))
        h, w = int(H * scale + 0.5), int(W * scale + 0.5)
        x = F.interpolate(x, (h, w), mode="bilinear").round()                       # (1, 3, h, w)
        x = normalize(x, MEAN, STD)
        return F.pad(x, (0, -w % 32, 0, -h % 32)), (h, w)                           # (1, 3, P, P)

    @torch.no_grad()
    def __call__(self, image: Image.Image) -> list[dict]:
        """All objects of a picture with a score above GenEval's lowest threshold, best first.

        score = probability of the class times the mean of the mask's sigmoid inside the mask
        box   = the mask's extent, one beyond it on the right and below
        mask  = where the object is, a picture of one bit
        """
        x, (h, w) = self.prepare(image)
        out = self.model(pixel_values=x.to(self.model.device))
        probs = out.class_queries_logits[0].softmax(-1)[:, :-1]                     # (Q, 80)
        best, index = probs.flatten().topk(min(TOP, probs.numel()))                 # (TOP,) each
        objects = []
        for prob, at in zip(best.tolist(), index.tolist()):
            # the score can only be lower: leave the mask be
            if prob <= MIN_SCORE:
                break
            query, label = divmod(at, len(self.classes))
            mask = out.masks_queries_logits[:, query:query + 1]                     # (1, 1, P / 4, P / 4)
            mask = F.interpolate(mask, x.shape[-2:], mode="bilinear")[..., :h, :w]  # (1, 1, h, w)
            mask = F.interpolate(mask, image.size[::-1], mode="bilinear")[0, 0]     # (H, W)
            inside = mask > 0
            score = prob * ((mask.sigmoid() * inside).sum() / (inside.sum() + 1e-6)).item()
            if score > MIN_SCORE:
                mask = Image.fromarray(inside.cpu().numpy())
                objects.append({"class": self.classes[label], "score": score,
                                "box": list(mask.getbbox()), "mask": mask})
        return sorted(objects, key=lambda thing: -thing["score"])


def crop(image: Image.Image, thing: dict) -> Image.Image:
    """The object's box, all outside its mask grey."""
    grey = Image.new("RGB", image.size, "#999999")
    return Image.composite(image, grey, thing["mask"]).crop(thing["box"])


class ColorNamer:
    """CLIP picks one of GenEval's ten colours for a crop, by the mean of three sentences about each."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.clip, self.encode = load_clip(folder)
        self.clip.eval().to(device)
        self.name = f"sha256:{fingerprint(self.clip)[:16]}"
        self.device = device
        self.describe = cache(self.describe)
        visual = self.clip.visual
        self.look = open_clip.image_transform(visual.image_size[0], is_train=False,
                                              mean=tuple(visual.image_mean), std=tuple(visual.image_std))

    @torch.no_grad()
    def __call__(self, image: Image.Image, thing: dict) -> str:
        """The colour of an object of a picture."""
        pixels = self.look(crop(image, thing))[None]                                # (1, 3, T, T)
        seen = self.clip.encode_image(pixels.to(self.device))[0]                    # (E,)
        return COLORS[(seen @ self.describe(thing["class"])).argmax()]

    def describe(self, name: str) -> Tensor:
        """A unit embedding for each colour of a thing called `name`, (E, 10)."""
        templates = f"a photo of a {{}} {name}", f"a photo of a {{}}-colored {name}", "a photo of a {} object"
        return open_clip.build_zero_shot_classifier(self.clip, self.encode, COLORS, templates,
                                                    device=self.device)             # (E, 10)


# ----------------------------------------------------------------------------- the command

def main(argv: list[str] | None = None) -> dict:
    """Draw, judge, each unless it is there. {} with --no-score, and on all ranks but the first."""
    cfg, dist = start(GenevalConfig, argv, __doc__)
    out, folder = Path(cfg.out), Path(cfg.images or f"{cfg.out}/images")
    is_nano = PRESETS[cfg.preset].shapes_world and not (cfg.images or cfg.metadata)
    own = world.benchmark_prompts() if is_nano else []
    if cfg.images:
        prompts = find_prompts(folder)
    else:
        requests = [{"tag": prompt.task, "prompt": prompt.text} for prompt in own]
        if not is_nano:
            requests = list(map(json.loads, read_lines(fetched(cfg.metadata, PROMPTS_URL, cfg, dist))))
        prompts = [(i, request, [f"{i:05}/samples/{j:05}.png" for j in range(cfg.per_prompt)])
                   for i, request in enumerate(requests)]
    prompts = spread(prompts, cfg.limit)
    # the overall score is a mean of these tasks: of another one it would say nothing
    unknown = {request["tag"] for _, request, _ in prompts} - set(TASKS)
    if unknown:
        raise Refused(f"expected the tags {', '.join(TASKS)}, got {', '.join(sorted(unknown))}")

    # pictures and, but for nano, detections
    samples = [(i, j, name, request) for i, request, names in prompts for j, name in enumerate(names)]
    if not cfg.images:
        for i, request, _ in prompts:
            keep_request(folder / f"{i:05}" / "metadata.jsonl", request, dist)
        draw_files(cfg, dist, [(folder / name, request["prompt"], [derive_seed(cfg.seed, "geneval", i, j)])
                               for i, j, name, request in samples])
    if cfg.score and not (is_nano or cfg.detections):
        detect_all(cfg, dist, folder, prompts)
    if not cfg.score or not dist.lead:
        return {}

    # verdicts, and what keeps them from bearing the benchmark's name
    counts = {len(names) for *_, names in prompts}
    lacks = {f"prompts without exactly {PER_PROMPT} pictures": counts != {PER_PROMPT}}
    if is_nano:
        images = [to_tensor(read_picture(folder / name)) for _, _, name, _ in samples]      # of (3, H, W)
        verdicts = world.judge(torch.stack(images), [own[i] for i, *_ in samples])
        benchmark, detector = "nano GenEval", "the exact judge of nano"
        lacks[f"{len(prompts)} prompts of {len(own)}"] = len(prompts) != len(own)
    else:
        detector, found = read_judged(Path(cfg.detections or out / "detections"))
        wrong = RENAMED.keys() & {thing["class"] for objects in found.values() for thing in objects}
        if wrong:
            raise Refused(f"the detections name {sorted(wrong)}, in GenEval {list(RENAMED.values())}")
        # in percent all would count as seen; one that is no number would also spoil the order of the others
        odd = [thing["score"] for objects in found.values() for thing in objects
               if not 0 <= round(thing["score"], 3) <= 1]
        if odd:
            raise Refused(f"expected scores from 0 to 1 in the detections, got {odd[0]}")
        # a picture that is not in `found` is an error: an empty list would say that nothing is there
        verdicts = [verdict(found[name], request) for _, _, name, request in samples]
        benchmark, digest = "GenEval", prompts_digest([request for _, request, _ in prompts])
        lacks[f"{len(prompts)} prompts that are not the published 553"] = digest != PROMPTS_DIGEST
        lacks["the detector is not mmdet's"] = "mmdet" not in detector
    title, path = title_of(benchmark, lacks), out / "verdicts.jsonl"
    records = [{"prompt": i, "sample": j, "filename": name, "right": right, "task": request["tag"],
                "text": request["prompt"]} for (i, j, name, request), right in zip(samples, verdicts)]
    write_lines(path, records)
    scores = task_scores(records)
    return finish(cfg, "geneval", {**title, "detector": detector, **scores},
                  f"{title['name']}\ndetector {detector}\n{table(scores['tasks'])}\n"
                  f"pictures {folder}\nverdicts {path}")


def find_prompts(folder: Path) -> list[tuple]:
    """Of each prompt of another program its number, what it asks for, and the names of its pictures."""
    prompts = []
    for path in sorted(folder.glob("[0-9]*/metadata.jsonl")):
        number = path.parent.name
        pictures = sorted(filter(Path.is_file, path.parent.glob("samples/*.png")))
        names = [f"{number}/samples/{picture.name}" for picture in pictures]
        prompts.append((int(number), read_json(path), names))
    if not prompts:
        raise Refused(f"expected folders with metadata.jsonl and samples/00000.png in {folder}, found none")
    return prompts


def detect_all(cfg: GenevalConfig, dist: Dist, folder: Path, prompts: list[tuple]) -> None:
    """Detections of all prompts, shared by the processes."""
    # the CLIP that names colours is that of the published CLIP score
    namer = ColorNamer(weights_folder("rewards", "auto") / "clip", dist.device)
    detector = Detector(cfg.detector, dist.device)
    asked = {clause["class"] for _, request, _ in prompts for clause in request["include"]}
    unknown = sorted(asked - set(detector.classes))
    if unknown:
        raise Refused(f"{cfg.detector} does not know {unknown[:3]}")
    for i, request, names in tqdm(prompts[dist.rank::dist.world_size], disable=not dist.lead):
        path = Path(cfg.out) / "detections" / f"{i:05}.json"
        digests = {name: sha256((folder / name).read_bytes()).hexdigest() for name in names}
        made_of = {"judge": detector.name, "clip": namer.name, "request": request, "sha256": digests}
        # the same judge has seen the same pictures
        if path.is_file() and made_of.items() <= read_json(path).items():
            continue
        found = {}
        for name in names:
            picture = read_picture(folder / name)
            objects = found[name] = detector(picture)
            # a colour where it decides
            for thing in need_color(objects, request):
                thing["color"] = namer(picture, thing)
            for thing in objects:
                del thing["mask"]
        write_json(path, {**made_of, "items": found})
    wait(dist)


def prompts_digest(requests: list[dict]) -> str:
    """SHA-256 of what is asked, whatever the order; PROMPTS_DIGEST for the published prompts."""
    lines = sorted(json.dumps(request, sort_keys=True) for request in requests)
    return sha256("\n".join(lines).encode()).hexdigest()
