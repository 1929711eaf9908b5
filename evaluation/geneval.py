"""GenEval at full size (arXiv 2310.11513): pictures of its prompts, a detector, a namer of colours, rules.

Three steps, each with files of its own: what is done stays done, and another program can do any of them.

    pictures    --out/images, or --images: GenEval's layout, 00000/metadata.jsonl, 00000/samples/00000.png ...
    detections  --out/detections, one JSON a prompt; or --detections: a JSON or a folder of some, each
                {"detector": name, "pictures": {"00000/samples/00000.png": {"objects": [object, ...]}}}
    verdicts    --out/verdicts.jsonl, and the table

An object is {"class", "score" 0..1, "box" [left, top, right, bottom], "mask" {"size": [H, W], "counts":
lengths of runs down the columns, the first one of zeros}, "color"}; the last two may be absent. Processes of
torchrun share pictures and detections, prompt by prompt. GenEval runs on mmdet's Mask2Former Swin-S; the one
here is Facebook's, of the same size and classes, and a score by it says so. Thresholds and rules are those of
GenEval's code.

Letters: P padded, h w resized, H W picture, Q queries of the detector, B crops, E embedding.
"""
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import Mask2FormerForUniversalSegmentation

from common import Dist, Refused, StopSignal, atomic, derive_seed, fingerprint, knob, read_lines, write_json
from data import read_picture
from evaluation import (DrawConfig, Job, any_rank, draw_files, fetched, file_digest, finish, is_done,
                        mean_and_error, number, read_json, read_judged, spread, title_of)
from model import weights_folder
from rewards import load_clip

PROMPTS_URL = "https://raw.githubusercontent.com/djghosh13/geneval/main/prompts/evaluation_metadata.jsonl"
PROMPTS_DIGEST = "ac3c481628128939793c13827f94fb83c9bc0a7efef1c29bfbe1c117c8c99e5e"    # of the 553 prompts
PER_PROMPT = 4                          # pictures of each prompt that make the benchmark
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
# COCO's 80 classes in its order, three under the names that GenEval's prompts use
NAMES = tuple("""person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire
hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra,
giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite,
baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, knife,
spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair,
couch, potted plant, bed, dining table, toilet, tv, laptop, computer mouse, tv remote, computer keyboard,
cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair
drier, toothbrush""".replace("\n", " ").split(", "))
RENAMED = {"mouse": "computer mouse", "remote": "tv remote", "keyboard": "computer keyboard"}


@dataclass(frozen=True)
class GenevalConfig(DrawConfig):
    out: str = knob("runs/geneval",
                    "folder for verdicts, table and pictures; what was cut short there goes on")
    per_prompt: int = knob(PER_PROMPT, "pictures of each prompt")
    limit: int = knob(0, "prompts, evenly spread over the benchmark's, for a quick look; 0: all of them")
    metadata: str = knob("", "GenEval's evaluation_metadata.jsonl; empty: fetch it; nano has its own prompts")
    images: str = knob("", "score a folder of any model's pictures in GenEval's layout; empty: draw them")
    detections: str = knob("", "ready detections, a JSON file or a folder of them, in place of --detector")
    detector: str = knob("facebook/mask2former-swin-small-coco-instance",
                         "Mask2Former: a folder, or a repository of the hub")
    clip: str = knob("auto", "folder of the CLIP that names colours; auto: that of the published CLIP score, "
                             "which `tools/convert.py rewards` writes")
    score: bool = knob(True, "score the pictures; --no-score only draws them")


# ----------------------------------------------------------------------------- the rules

MIN_SCORE, MIN_SCORE_COUNTING = 0.3, 0.9        # a detection must lie above
MAX_PER_CLASS = 16
SHRINK, REACH = 0.1, 0.5                        # of positions: share of the sizes, share of the distance


def keep(objects: list[dict], task: str) -> dict[str, list[dict]]:
    """What counts as seen: by class, best first, above the task's threshold, at most 16 of a class."""
    least = MIN_SCORE_COUNTING if task == "counting" else MIN_SCORE
    seen: dict[str, list[dict]] = {}
    for thing in sorted(objects, key=lambda thing: -thing["score"]):
        group = seen.setdefault(thing["class"], [])
        if thing["score"] > least and len(group) < MAX_PER_CLASS:
            group.append(thing)
    return seen


def position(a: dict, b: dict) -> set[str]:
    """Where a lies from b: the offset of the centres, shrunk on each axis by a tenth of both sizes, reaches
    beyond half of its unshrunk length. Up to two relations hold."""
    a, b = a["box"], b["box"]
    offset = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    sizes = [abs(a[i + 2] - a[i]) + abs(b[i + 2] - b[i]) for i in (0, 1)]
    shrunk = [math.copysign(max(abs(o) - SHRINK * size, 0.0), o) for o, size in zip(offset, sizes)]
    if max(map(abs, shrunk)) < 1e-3:
        return set()
    dx, dy = (value / math.hypot(*offset) for value in shrunk)
    holds = {"left of": dx < -REACH, "right of": dx > REACH, "above": dy < -REACH, "below": dy > REACH}
    return {relation for relation in holds if holds[relation]}


def need_color(objects: list[dict], request: dict) -> list[dict]:
    """The objects whose colour decides: the best `count` of each class that a colour is asked of."""
    seen = keep(objects, request["tag"])
    groups = [seen.get(clause["class"], [])[:clause["count"]]
              for clause in request["include"] if "color" in clause]
    return [thing for group in groups for thing in group]


def check_clause(clause: dict, best: list[dict], groups: list[list[dict]]) -> str:
    """Why a clause of "include" fails, "" if it holds.

    best    the best `count` objects of its class;  groups  those of the clauses before
    """
    name, count = clause["class"], clause["count"]
    if len(best) < count:
        return f"expected {count} {name}, found {len(best)}"
    if "color" in clause:
        colors = [thing["color"] for thing in best]
        if colors.count(clause["color"]) < count:
            return f"expected {count} {clause['color']} {name}, found {', '.join(colors)}"
    if "position" in clause:
        relation, target = clause["position"]
        for other in groups[target]:
            if not all(relation in position(thing, other) for thing in best):
                return f"expected {name} {relation} {other['class']}, it is not"
    return ""


def verdict(objects: list[dict], request: dict) -> tuple[bool, str]:
    """GenEval's verdict on one picture, and the reason where it is wrong. Those of `need_color` must have a
    colour. Extra objects do not hurt, except those of classes under "exclude" (counting)."""
    seen = keep(objects, request["tag"])
    groups: list[list[dict]] = []
    reasons = []
    for clause in request["include"]:
        best = seen.get(clause["class"], [])[:clause["count"]]
        reasons.append(check_clause(clause, best, groups))
        groups.append(best)
    for clause in request.get("exclude", []):
        found = len(seen.get(clause["class"], []))
        if found >= clause["count"]:
            reasons.append(f"expected fewer than {clause['count']} {clause['class']}, found {found}")
    reasons = [reason for reason in reasons if reason]
    return not reasons, "; ".join(reasons)


def task_scores(verdicts: dict[tuple[int, int], bool], tasks: list[str]) -> dict:
    """Share of right pictures of each task, and `overall`, the unweighted mean of the tasks, with s.e.

    verdicts  (prompt, sample) -> right;  tasks  of each prompt
    An error counts prompts, not pictures, since the pictures of a prompt fail together; those of tasks add in
    squares.
    """
    rows, errors = {}, []
    for task in TASKS:
        by_prompt: dict[int, list[float]] = {}
        for (i, _), right in verdicts.items():
            if tasks[i] == task:
                by_prompt.setdefault(i, []).append(float(right))
        if by_prompt:
            every = [right for group in by_prompt.values() for right in group]
            error = mean_and_error([fmean(group) for group in by_prompt.values()])[1]
            errors.append(error)
            rows[task] = {"right": fmean(every), "error": error, "prompts": len(by_prompt),
                          "pictures": len(every)}
    overall = {"right": fmean(row["right"] for row in rows.values()),
               "error": None if None in errors else math.hypot(*errors) / len(errors),
               "prompts": sum(row["prompts"] for row in rows.values()),
               "pictures": len(verdicts)}
    return {"tasks": rows, "overall": overall}


def task_table(scores: dict) -> str:
    lines = [f"{'task':15} {'right':>8} {'s.e.':>8} {'prompts':>8} {'pictures':>8}"]
    for name, row in (*scores["tasks"].items(), ("mean of tasks", scores["overall"])):
        lines.append(f"{name:15} {number(row['right'])} {number(row['error'])} "
                     f"{row['prompts']:8} {row['pictures']:8}")
    return "\n".join(lines)


# ----------------------------------------------------------------------------- the detector

SHORT, LONG = 800, 1333                         # sides of the picture that the detector sees, at most, pixels
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)      # ImageNet's, of levels 0 .. 255
TOP = 100                                       # pairs of query and class that are looked at


def run_lengths(mask: np.ndarray) -> dict:
    """A mask (H, W) in COCO's plain form: lengths of runs down the columns, the first one of zeros."""
    flat = mask.T.ravel().astype(bool)
    ends = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff([0, *ends, len(flat)]).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}


def mask_of(runs: dict) -> np.ndarray:
    """The mask (H, W) of run lengths."""
    H, W = runs["size"]
    values = np.arange(len(runs["counts"])) % 2 == 1
    return np.repeat(values, runs["counts"]).reshape(W, H).T                        # (H, W)


class Detector:
    """Mask2Former of transformers for COCO's 80 classes, with the post-processing of mmdet."""

    def __init__(self, source: str, device: torch.device) -> None:
        self.model, report = Mask2FormerForUniversalSegmentation.from_pretrained(
            source, use_safetensors=True, output_loading_info=True, dtype=torch.float32)
        labels = self.model.config.id2label
        names = tuple(RENAMED.get(labels[i], labels[i]) for i in sorted(labels))
        if report["missing_keys"] or names != NAMES:
            raise Refused(f"{source} is no detector of COCO's 80 classes in their order, or lacks weights: "
                          f"{len(names)} classes, missing {sorted(report['missing_keys'])[:3]}")
        self.model.eval().to(device)
        self.name = f"{source} sha256:{fingerprint(self.model)[:16]}"

    def prepare(self, image: Image.Image) -> tuple[Tensor, tuple[int, int]]:
        """The picture as the network sees it, (1, 3, P, P), padded right and below; h, w without padding."""
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()        # (1, 3, H, W)
        H, W = x.shape[-2:]
        scale = min(LONG / max(H, W), SHORT / min(H, W))
        h, w = int(H * scale + 0.5), int(W * scale + 0.5)
        x = F.interpolate(x, (h, w), mode="bilinear", align_corners=False).round()  # (1, 3, h, w)
        x = (x - x.new_tensor(MEAN)[:, None, None]) / x.new_tensor(STD)[:, None, None]
        return F.pad(x, (0, -w % 32, 0, -h % 32)), (h, w)                           # (1, 3, P, P)

    @torch.no_grad()
    def __call__(self, image: Image.Image) -> list[dict]:
        """All objects of a picture with a score above GenEval's lowest threshold, best first.

        score = probability of the class times the mean of the mask's sigmoid inside the mask
        box   = the mask's extent, one beyond it on the right and below
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
            query, label = divmod(at, len(NAMES))
            mask = out.masks_queries_logits[:, query:query + 1]                     # (1, 1, P / 4, P / 4)
            mask = F.interpolate(mask, x.shape[-2:], mode="bilinear")[..., :h, :w]  # (1, 1, h, w)
            mask = F.interpolate(mask, image.size[::-1], mode="bilinear")[0, 0]     # (H, W)
            inside = mask > 0
            score = prob * ((mask.sigmoid() * inside).sum() / (inside.sum() + 1e-6)).item()
            if score > MIN_SCORE:
                rows, columns = (inside.any(axis).nonzero().flatten().tolist() for axis in (1, 0))
                box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
                objects.append({"class": NAMES[label], "score": score, "box": box,
                                "mask": run_lengths(inside.cpu().numpy())})
        return sorted(objects, key=lambda thing: -thing["score"])


# ----------------------------------------------------------------------------- the namer of colours

TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}",
             "a photo of a {color} object")
GREY = (0x99,) * 3                              # in place of what is not the object


def crop(image: Image.Image, thing: dict) -> Image.Image:
    """The object's box, all outside its mask grey; PIL rounds a box to whole pixels, here to one at least."""
    if "mask" in thing:
        mask = Image.fromarray(mask_of(thing["mask"]))
        image = Image.composite(image, Image.new("RGB", image.size, GREY), mask)
    left, top, right, bottom = map(round, thing["box"])
    return image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))


class ColorNamer:
    """CLIP picks one of GenEval's ten colours for a crop, by the mean of three sentences about each."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        if not (folder / "open_clip_config.json").is_file():
            raise Refused(f"no CLIP in {folder} to name colours: `tools/convert.py rewards` writes one, "
                          "or give --clip")
        self.clip, self.encode, picture = load_clip(folder)
        self.clip.eval().to(device)
        self.device = device
        self.sentences: dict[str, Tensor] = {}
        self.look = open_clip.image_transform(picture["size"], is_train=False, mean=tuple(picture["mean"]),
                                              std=tuple(picture["std"]))

    @torch.no_grad()
    def __call__(self, image: Image.Image, objects: list[dict]) -> list[str]:
        """The colour of each object of a picture."""
        crops = torch.stack([self.look(crop(image, thing)) for thing in objects])   # (B, 3, T, T)
        seen = F.normalize(self.clip.encode_image(crops.to(self.device)), dim=-1)   # (B, E)
        best = [(self.describe(thing["class"]) @ row).argmax().item() for row, thing in zip(seen, objects)]
        return [COLORS[i] for i in best]

    def describe(self, name: str) -> Tensor:
        """A unit embedding for each colour of a thing called `name`, (10, E)."""
        if name not in self.sentences:
            texts = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
            text = self.clip.encode_text(self.encode(texts).to(self.device))        # (30, E)
            text = F.normalize(text, dim=-1).view(len(COLORS), len(TEMPLATES), -1)  # (10, 3, E)
            self.sentences[name] = F.normalize(text.mean(1), dim=-1)                # (10, E)
        return self.sentences[name]


# ----------------------------------------------------------------------------- the command

class Prompt(NamedTuple):
    """A folder of GenEval's layout."""
    folder: str                 # "00000"
    request: dict               # what its metadata.jsonl asks for
    samples: list[str]          # "00000/samples/00000.png" ...


def full_geneval(cfg: GenevalConfig, dist: Dist) -> dict:
    """Draw, detect, judge, each unless it is there. {} if it was stopped, and on all ranks but the first."""
    out, folder = Path(cfg.out), Path(cfg.images or f"{cfg.out}/images")
    if not cfg.images:
        path = fetched(cfg.metadata, PROMPTS_URL, "--metadata", cfg, dist)
        requests = [json.loads(line) for line in read_lines(path)]
        if not draw_files(cfg, dist, drawing_jobs(cfg, dist, requests, folder)):
            return {}
    prompts = read_layout(folder)
    stopped = not cfg.score or not cfg.detections and not detect_all(cfg, dist, folder, prompts)
    if any_rank(stopped, dist) or not dist.lead:
        return {}

    files = [out / "detections" / f"{prompt.folder}.json" for prompt in prompts]
    detector, found, digests = read_judged(cfg.detections, files, "detector", "pictures")
    verdicts, records, lacks = judge(cfg, dist, folder, prompts, found, digests)
    lacks += [] if "mmdet" in detector else ["the detector is not mmdet's"]
    with atomic(out / "verdicts.jsonl") as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in records))
    scores = task_scores(verdicts, [prompt.request["tag"] for prompt in prompts])
    title = title_of("GenEval", lacks)
    result = {"name": title, "benchmark": not lacks, "detector": detector, **scores}
    return finish(cfg, "geneval", result, f"{title}\ndetector {detector}\n{task_table(scores)}\n"
                                          f"verdicts {out / 'verdicts.jsonl'}")


def drawing_jobs(cfg: GenevalConfig, dist: Dist, requests: list[dict], folder: Path) -> list[Job]:
    """What is to be drawn, after each prompt's metadata.jsonl has been written, or found to be the same."""
    jobs = []
    for i in spread(cfg.limit, len(requests)):
        path = folder / f"{i:05}" / "metadata.jsonl"
        if path.is_file() and read_json(path) != requests[i]:
            raise Refused(f"{path} asks for something else than --metadata there: choose another --out")
        if dist.lead:
            with atomic(path) as temporary:
                temporary.write_text(json.dumps(requests[i]) + "\n")
        for j in range(cfg.per_prompt):
            picture = path.parent / "samples" / f"{j:05}.png"
            jobs.append(Job(picture, requests[i]["prompt"], [derive_seed(cfg.seed, "geneval", i, j)]))
    return jobs


def read_layout(folder: Path) -> list[Prompt]:
    prompts = []
    for path in sorted(folder.glob("[0-9]*/metadata.jsonl")):
        pictures = sorted(path.parent.glob("samples/*.png"))
        names = [picture.relative_to(folder).as_posix() for picture in pictures]
        prompts.append(Prompt(path.parent.name, read_json(path), names))
    if not prompts:
        raise Refused(f"expected folders with metadata.jsonl and samples/00000.png in {folder}, found none")
    return prompts


def detect_all(cfg: GenevalConfig, dist: Dist, folder: Path, prompts: list[Prompt]) -> bool:
    """Detections of this process's share of the prompts. False if a signal stopped it."""
    detector = Detector(cfg.detector, dist.device)
    with StopSignal() as stop:
        for prompt in tqdm(prompts[dist.rank::dist.world_size], unit="prompt", disable=not dist.lead):
            if stop.stop:
                print("stopped; the same command goes on from here")
                return False
            path = Path(cfg.out) / "detections" / f"{prompt.folder}.json"
            made_of = {"detector": detector.name,
                       "sha256": {name: file_digest(folder / name) for name in prompt.samples}}
            if not is_done(path, made_of):
                found = {name: {"objects": detector(read_picture(folder / name))} for name in prompt.samples}
                write_json(path, {**made_of, "pictures": found})
    return True


def judge(cfg: GenevalConfig, dist: Dist, folder: Path, prompts: list[Prompt], found: dict[str, dict],
          digests: dict[str, str]) -> tuple[dict[tuple[int, int], bool], list[dict], list[str]]:
    """(prompt, sample) -> right; a record of each verdict with its reason; what lacks of the benchmark."""
    unknown = {thing["class"] for entry in found.values() for thing in entry["objects"]} - set(NAMES)
    if unknown:
        raise Refused(f"the detections name {sorted(unknown)[:3]}: expected COCO's classes, with "
                      f"{', '.join(RENAMED.values())}")
    clip = weights_folder("rewards", "auto") / "clip" if cfg.clip == "auto" else Path(cfg.clip)
    verdicts, records, sizes, colors = {}, [], set(), None
    for i, prompt in enumerate(prompts):
        for j, name in enumerate(prompt.samples):
            digest = file_digest(folder / name)
            if name not in found or digests.get(name, digest) != digest:
                raise Refused(f"no detections of {name}, or of another picture: detect it again; an empty "
                              "list says that nothing is there")
            objects, picture = found[name]["objects"], read_picture(folder / name)
            sizes.add(picture.size)
            nameless = [thing for thing in need_color(objects, prompt.request) if "color" not in thing]
            if nameless:
                colors = colors or ColorNamer(clip, dist.device)
                for thing, color in zip(nameless, colors(picture, nameless)):
                    thing["color"] = color
            verdicts[i, j], reason = verdict(objects, prompt.request)
            records.append({"filename": name, "task": prompt.request["tag"],
                            "prompt": prompt.request["prompt"], "right": verdicts[i, j], "reason": reason})

    lacks = []
    if prompts_digest([prompt.request for prompt in prompts]) != PROMPTS_DIGEST:
        lacks.append(f"{len(prompts)} prompts that are not the published 553")
    if any(len(prompt.samples) != PER_PROMPT for prompt in prompts):
        lacks.append(f"prompts without exactly {PER_PROMPT} pictures")
    if len(sizes) > 1:
        lacks.append(f"pictures of {len(sizes)} sizes")
    return verdicts, records, lacks


def prompts_digest(requests: list[dict]) -> str:
    """SHA-256 of what is asked, whatever the order; PROMPTS_DIGEST for the published prompts."""
    lines = sorted(json.dumps(request, sort_keys=True) for request in requests)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
