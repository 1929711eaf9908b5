"""DPG-Bench at full size (arXiv 2403.05135): pictures of long prompts, and questions about them.

Three steps, each with files of its own: what is done stays done, and another program can do any of them.

    pictures  --out/images/ITEM.png, or --images: four pictures of a prompt in a square
    answers   --out/answers, one JSON a prompt; or --answers: a JSON or a folder of some, each
              {"judge": name, "items": {item: [{"1": "yes", "2": "no", ...} of each of its pictures]}}
    score     the share of questions answered yes, where a question counts as no if one that it hangs on got a
              no; a mean over pictures, then over prompts

DPG-Bench asks mPLUG-large; the model here is BLIP, and a score by it says so. Differs from the official
script: that one loses the file's first row, and takes the categories from the last picture of each prompt
alone.
"""
import re
from collections import defaultdict
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from statistics import fmean

import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForVisualQuestionAnswering, AutoProcessor

from common import Refused, derive_seed, knob, write_json
from evaluation import (DrawConfig, draw_files, fetched, finish, keep_request, load_judge, mean_and_error,
                        read_csv, read_json, read_judged, spread, start, table, title_of, wait)
from pictures import read_picture

QUESTIONS_URL = "https://raw.githubusercontent.com/TencentQQGYLab/ELLA/main/dpg_bench/dpg_bench.csv"
NUM_PROMPTS = 1065


@dataclass(frozen=True)
class DpgConfig(DrawConfig):
    out: str = knob("runs/dpg", "folder for pictures, answers and table; what was cut short there goes on")
    questions: str = knob("", "DPG-Bench's question file, CSV; empty: fetch it")
    images: str = knob("", "score a folder of any model's 2 x 2 grids, item_id.png; empty: draw them")
    answers: str = knob("", "ready answers, a JSON file or a folder of them, in place of --vqa")
    vqa: str = knob("Salesforce/blip-vqa-capfilt-large", "what answers: a folder, or a name of the hub")
    limit: int = knob(0, "prompts, evenly spread over the file's, for a quick look; 0: all of them")
    score: bool = knob(True, "score the pictures; --no-score only draws them")


def read_items(path: Path) -> list[tuple]:
    """The name (item_id) of each prompt of a question file, and its rows, one for each thing (proposition)
    that it says: `dependency` are those without which it means nothing; `tuple` begins with its category, as
    "attribute - color (dog, red)"."""
    items = defaultdict(list)
    for row in read_csv(path):
        name = row["item_id"]
        # it becomes a path
        if not re.fullmatch(r"[\w-]+", name):
            raise Refused(f"expected the stem of a file name as item_id in {path}, got {name!r}")
        items[name].append(row)
    return list(items.items())


def tile_scores(rows: list[dict], answers: dict[str, str]) -> dict[str, float]:
    """1 for yes, 0 for anything else; then, in the file's order, 0 for what hangs on a 0.

    A parent further down the file still has the score of its own answer, as in the official loop. "0", no
    parent, and what else is no proposition of the prompt decide nothing.
    """
    scores = {row["proposition_id"]: float(answers[row["proposition_id"]] == "yes") for row in rows}
    for row in rows:
        parents = row["dependency"].split(",")
        if any(scores.get(parent.strip()) == 0 for parent in parents):
            scores[row["proposition_id"]] = 0.0
    return scores


def dpg_scores(items: list[tuple], answers: dict[str, list[dict]]) -> dict:
    """DPG's score in percent, with s.e. over prompts, and the categories: shares of yes without the
    dependencies, as official.

    answers  item -> {proposition: answer} of each picture; items that are not in it are left out
    """
    scores, marks = {}, defaultdict(list)
    for name, rows in items:
        if name not in answers:
            continue
        tiles = answers[name]
        scores[name] = fmean(fmean(tile_scores(rows, tile).values()) for tile in tiles)
        for row in rows:
            category = row["tuple"].split("(")[0].strip()
            for level in {category, category.split("-")[0].strip()}:
                marks[level] += [tile[row["proposition_id"]] == "yes" for tile in tiles]
    mean, error = mean_and_error([100 * score for score in scores.values()])
    rows = [{"questions": "prompts", "score": mean, "s.e.": error, "n": len(scores)}]
    for name, said in sorted(marks.items()):
        rows.append({"questions": name, "score": 100 * fmean(said), "s.e.": None, "n": len(said)})
    return {"score": mean, "error": error, "prompts": scores, "rows": rows}


class Answerer:
    """A model of transformers that answers questions about a picture in words, as BLIP does."""

    def __init__(self, source: str, device: torch.device) -> None:
        self.model, self.name = load_judge(AutoModelForVisualQuestionAnswering, source, device)
        self.processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)

    @torch.no_grad()
    def __call__(self, image: Image.Image, questions: list[str]) -> list[str]:
        """The answers in lower case, without a full stop."""
        inputs = self.processor(images=[image] * len(questions), text=questions, padding=True,
                                return_tensors="pt")
        out = self.model.generate(**inputs.to(self.model.device), max_new_tokens=10)
        texts = self.processor.batch_decode(out, skip_special_tokens=True)
        return [text.strip().rstrip(".").lower() for text in texts]


def main(argv: list[str] | None = None) -> dict:
    """Draw, ask, score, each unless it is there. {} with --no-score, and on all ranks but the first."""
    cfg, dist = start(DpgConfig, argv, __doc__)
    out, folder = Path(cfg.out), Path(cfg.images or f"{cfg.out}/images")
    items = spread(read_items(fetched(cfg.questions, QUESTIONS_URL, cfg, dist)), cfg.limit)
    # pictures, four of each prompt, which stands beside them
    if not (cfg.images or cfg.answers):
        jobs = []
        for name, rows in items:
            text = rows[0]["text"]
            keep_request(folder / f"{name}.json", text, dist)
            seeds = [derive_seed(cfg.seed, "dpg", name, k) for k in range(4)]
            jobs.append((folder / f"{name}.png", text, seeds))
        draw_files(cfg, dist, jobs)
    if not cfg.score:
        return {}

    # answers about each of the four, shared by the processes
    if not cfg.answers:
        items = [item for item in items if (folder / f"{item[0]}.png").is_file()]
        if not items:
            raise Refused(f"expected grids called ITEM_ID.png in {folder}, found none")
        vqa = Answerer(cfg.vqa, dist.device)
        for name, rows in tqdm(items[dist.rank::dist.world_size], disable=not dist.lead):
            grid = folder / f"{name}.png"
            path = out / "answers" / f"{name}.json"
            questions = {row["proposition_id"]: row["question_natural_language"] for row in rows}
            digest = sha256(grid.read_bytes()).hexdigest()
            made_of = {"judge": vqa.name, "sha256": digest, "questions": questions}
            # the same judge has seen the same pictures
            if path.is_file() and made_of.items() <= read_json(path).items():
                continue
            picture = read_picture(grid)
            side, odd = divmod(picture.width, 2)
            if picture.width != picture.height or odd:
                raise Refused(f"expected {grid} to be a square of 2 x 2 pictures, got {picture.size} pixels")
            answers = []
            for x, y in ((0, 0), (side, 0), (0, side), (side, side)):
                tile = picture.crop((x, y, x + side, y + side))
                answers.append(dict(zip(questions, vqa(tile, list(questions.values())))))
            write_json(path, {**made_of, "items": {name: answers}})
        wait(dist)
    if not dist.lead:
        return {}

    judge, answers = read_judged(Path(cfg.answers or out / "answers"))
    scores = dpg_scores(items, answers)
    count = len(scores["prompts"])
    title = title_of("DPG-Bench", {
        f"{count} prompts of {NUM_PROMPTS}": count != NUM_PROMPTS,
        "prompts without exactly 4 pictures": any(len(answers[name]) != 4 for name in scores["prompts"]),
        "the judge is not mPLUG-large": "mplug" not in judge.lower()})
    return finish(cfg, "dpg", {**title, "judge": judge, **scores},
                  f"{title['name']}\njudge {judge}\n{table(scores['rows'])}")
