"""DPG-Bench at full size (arXiv 2403.05135): pictures of long prompts, and questions about them.

Three steps, each with files of its own: what is done stays done, and another program can do any of them.

    pictures  --out/images/ITEM.png, or --images: four pictures of a prompt in a square
    answers   --out/answers, one JSON a prompt; or --answers: a JSON or a folder of some, each
              {"judge": name, "items": {item: {"tiles": [{"1": "yes", "2": "no", ...}, ...]}}}
    score     the share of questions answered yes, where a question counts as no if one that it hangs on got a
              no; a mean over pictures, then over prompts

Processes of torchrun share pictures and answers, prompt by prompt. DPG-Bench asks mPLUG-large; the model here
is BLIP, and a score by it says so.
"""
import re
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForVisualQuestionAnswering, AutoProcessor

from common import Dist, Refused, StopSignal, derive_seed, fingerprint, knob, write_json
from data import read_picture
from evaluation import (DrawConfig, Job, any_rank, draw_files, fetched, file_digest, finish, is_done,
                        mean_and_error, number, read_judged, read_table, spread, start, title_of)

QUESTIONS_URL = "https://raw.githubusercontent.com/TencentQQGYLab/ELLA/main/dpg_bench/dpg_bench.csv"
NUM_PROMPTS = 1065


@dataclass(frozen=True)
class DpgConfig(DrawConfig):
    out: str = knob("runs/dpg", "folder for pictures, answers and table; what was cut short there goes on")
    questions: str = knob("", "DPG-Bench's question file, CSV; empty: fetch it")
    images: str = knob("", "score a folder of any model's 2 x 2 grids, item_id.png; empty: draw them")
    answers: str = knob("", "ready answers, a JSON file or a folder of them, in place of --vqa")
    vqa: str = knob("Salesforce/blip-vqa-capfilt-large",
                    "the model that answers: a folder, or a repository of the hub")
    official_quirks: bool = knob(False, "score as the official script: the first row is lost, categories see "
                                        "the last picture, a prompt with a missing parent is dropped")
    limit: int = knob(0, "prompts, evenly spread over the file's, for a quick look; 0: all of them")
    score: bool = knob(True, "score the pictures; --no-score only draws them")


# ----------------------------------------------------------------------------- the questions

class Proposition(NamedTuple):
    """One thing that a prompt says."""
    number: int
    parents: list[int]          # propositions without which this one means nothing
    category: str               # "attribute - color"
    question: str               # yes if the picture shows it


class Item(NamedTuple):
    name: str                   # file stem of its grid of pictures
    text: str                   # the prompt
    propositions: list[Proposition]


def read_items(path: Path, quirks: bool = False) -> tuple[list[Item], list[str]]:
    """The prompts of a question file, and notes on what had to be left out.

    quirks  as the official reader: the first row is lost, a dependency that is no number stops it
    """
    items: dict[str, Item] = {}
    notes = []
    for row in read_table(path)[1 if quirks else 0:]:
        # the name becomes a path
        if not re.fullmatch(r"[\w-]+", row["item_id"]):
            raise Refused(f"expected the stem of a file name as item_id in {path}, got {row['item_id']!r}")
        item = items.setdefault(row["item_id"], Item(row["item_id"], row["text"], []))
        place, parents = int(row["proposition_id"]), []
        for word in row["dependency"].split(","):
            if word.strip().isdigit() or quirks:
                parents += [int(word)] if int(word) else []
            else:
                notes.append(f"{item.name}, {place}: the dependency {word!r} is no number, left out")
        category = row["tuple"].split("(")[0].strip()
        item.propositions.append(Proposition(place, parents, category, row["question_natural_language"]))

    # a parent that its prompt does not have
    for item in items.values() if not quirks else ():
        known = {p.number for p in item.propositions}
        for p in item.propositions:
            for parent in set(p.parents) - known:
                notes.append(f"{item.name}, {p.number}: {parent}, its parent, is not there, left out")
                p.parents.remove(parent)
    return list(items.values()), notes


# ----------------------------------------------------------------------------- the rule

def tile_scores(item: Item, answers: dict[int, str]) -> dict[int, float]:
    """1 for yes, 0 for anything else; then, in the file's order, 0 for what hangs on a 0.

    A parent further down the file still has the score of its own answer, as in the official loop.
    KeyError, only under the official quirks, if a parent is not there.
    """
    scores = {number: float(answer == "yes") for number, answer in answers.items()}
    for p in item.propositions:
        if any(scores[parent] == 0 for parent in p.parents):
            scores[p.number] = 0.0
    return scores


def dpg_scores(items: list[Item], answers: dict[str, dict], quirks: bool = False) -> dict:
    """DPG's score in percent (mean over prompts of the mean over pictures of the mean over questions), with
    s.e. over prompts, and the categories.

    answers  item -> {"tiles": [{proposition: answer} of each picture]}; items that are not in it are left out
    Categories are shares of yes without the dependencies, as official, over all pictures.
    """
    scores, dropped, marks = {}, [], {}
    for item in items:
        if item.name not in answers:
            continue
        tiles = [{p.number: tile[str(p.number)] for p in item.propositions}
                 for tile in answers[item.name]["tiles"]]
        try:
            scores[item.name] = fmean(fmean(tile_scores(item, tile).values()) for tile in tiles)
        except KeyError:
            if not quirks:
                raise
            dropped.append(item.name)
            continue
        for tile in tiles[-1:] if quirks else tiles:
            for p in item.propositions:
                for level in {p.category, p.category.split("-")[0].strip()}:
                    marks.setdefault(level, []).append(float(tile[p.number] == "yes"))
    mean, error = mean_and_error([100 * score for score in scores.values()])
    categories = {name: {"yes": 100 * fmean(marks[name]), "n": len(marks[name])} for name in sorted(marks)}
    return {"score": mean, "error": error, "prompts": scores, "dropped": dropped, "categories": categories}


# ----------------------------------------------------------------------------- the judge

class Answerer:
    """A model of transformers that answers questions about a picture in words, as BLIP does."""

    def __init__(self, source: str, device: torch.device) -> None:
        self.model, report = AutoModelForVisualQuestionAnswering.from_pretrained(
            source, use_safetensors=True, output_loading_info=True, dtype=torch.float32)
        if report["missing_keys"] or not self.model.can_generate():
            raise Refused(f"{source} lacks weights, or picks its answers from a list: missing "
                          f"{sorted(report['missing_keys'])[:3]}")
        self.model.eval().to(device)
        self.processor = AutoProcessor.from_pretrained(source)
        self.name = f"{source} sha256:{fingerprint(self.model)[:16]}"

    @torch.no_grad()
    def __call__(self, image: Image.Image, questions: list[str]) -> list[str]:
        """The answers in lower case, without a full stop."""
        images = [image] * len(questions)
        inputs = self.processor(images=images, text=questions, padding=True, return_tensors="pt")
        out = self.model.generate(**inputs.to(self.model.device), max_new_tokens=10)
        texts = self.processor.batch_decode(out, skip_special_tokens=True)
        return [text.strip().rstrip(".").lower() for text in texts]


# ----------------------------------------------------------------------------- the command

def main(argv: list[str] | None = None) -> dict:
    """Draw, ask, score, each unless it is there. {} if it was stopped, and on all ranks but the first."""
    cfg, dist = start(DpgConfig, argv, __doc__.split("\n")[0])
    out, folder = Path(cfg.out), Path(cfg.images or f"{cfg.out}/images")
    path = fetched(cfg.questions, QUESTIONS_URL, "--questions", cfg, dist)
    items, notes = read_items(path, cfg.official_quirks)
    items = [items[i] for i in spread(cfg.limit, len(items))]
    if not cfg.images:
        jobs = [Job(folder / f"{item.name}.png", item.text,
                    [derive_seed(cfg.seed, "dpg", item.name, k) for k in range(4)]) for item in items]
        if not draw_files(cfg, dist, jobs):
            return {}
    if not cfg.answers:
        items = [item for item in items if (folder / f"{item.name}.png").is_file()]
        if not items:
            raise Refused(f"expected grids called ITEM_ID.png in {folder}, found none")
    stopped = not cfg.score or not cfg.answers and not ask_all(cfg, dist, folder, items)
    if any_rank(stopped, dist) or not dist.lead:
        return {}

    files = [out / "answers" / f"{item.name}.json" for item in items]
    judge, answers, _ = read_judged(cfg.answers, files, "judge", "items")
    scores = dpg_scores(items, answers, cfg.official_quirks)
    lacks = []
    if len(scores["prompts"]) != NUM_PROMPTS:
        lacks.append(f"{len(scores['prompts'])} prompts of {NUM_PROMPTS}")
    if "mplug" not in judge.lower():
        lacks.append("the judge is not mPLUG-large")
    title = title_of("DPG-Bench", lacks)
    result = {"name": title, "benchmark": not lacks, "judge": judge, "notes": notes, **scores}
    return finish(cfg, "dpg", result, "\n".join([*notes[:1], title, f"judge {judge}", table(scores)]))


def ask_all(cfg: DpgConfig, dist: Dist, folder: Path, items: list[Item]) -> bool:
    """Answers about this process's share of the grids. False if a signal stopped it."""
    vqa = Answerer(cfg.vqa, dist.device)
    with StopSignal() as stop:
        for item in tqdm(items[dist.rank::dist.world_size], unit="prompt", disable=not dist.lead):
            if stop.stop:
                print("stopped; the same command goes on from here")
                return False
            grid, path = folder / f"{item.name}.png", Path(cfg.out) / "answers" / f"{item.name}.json"
            questions = {str(p.number): p.question for p in item.propositions}
            made_of = {"judge": vqa.name, "sha256": {item.name: file_digest(grid)}, "questions": questions}
            if not is_done(path, made_of):
                tiles = [dict(zip(questions, vqa(tile, list(questions.values())))) for tile in split(grid)]
                write_json(path, {**made_of, "items": {item.name: {"tiles": tiles}}})
    return True


def split(grid: Path) -> list[Image.Image]:
    """The four pictures of a 2 x 2 grid."""
    picture = read_picture(grid)
    side, odd = divmod(picture.width, 2)
    if picture.width != picture.height or odd:
        raise Refused(f"expected {grid} to be a square of 2 x 2 pictures, it is of {picture.size} pixels")
    return [picture.crop((x, y, x + side, y + side)) for y in (0, side) for x in (0, side)]


def table(scores: dict) -> str:
    lines = [f"{'':31} {'score':>8} {'s.e.':>8} {'n':>7}",
             f"{'prompts':31} {number(scores['score'])} {number(scores['error'])} {len(scores['prompts']):7}"]
    for name, row in scores["categories"].items():
        lines.append(f"{name:31} {number(row['yes'])} {'-':>8} {row['n']:7}")
    return "\n".join(lines)
