"""Does the vision-language model still see? Its answers to questions about pictures (paper's supplement,
Table 3).

    nano       one word    share of right answers by kind of question
    POPE       yes or no   accuracy, F1
    MMBench    a letter    circular accuracy

Metrics are those of each benchmark's own code. Each picture is shown as one square tile, as the model sees it
everywhere here: InternVL's own evaluation cuts large ones into up to 12. The VLM is frozen in all stages:
--reference asks the untouched one the same, and compares weights too. Left out of the paper's table, as
frozen weights answer what the published InternVL3 answers: MME, MMMU, TextVQA, SEED, RealWorldQA and MM-Vet.

Letters: B pictures, H W pixels.
"""
import base64
import hashlib
import json
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_tensor
from tqdm import tqdm

from common import Refused, fingerprint, knob, precision, read_lines
from evaluation import (EvalConfig, finish, load, mean_and_error, read_csv, same_settings, start,
                        table, write_lines)
from model import PRESETS, ParaUni, weights_folder
from nano import world
from pictures import read_picture

WORD = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
LETTERS = "ABCDEFGHIJ"


class Question(NamedTuple):
    name: str                           # of its own in the file
    group: str                          # task, category or subject
    image: Path | bytes | Tensor        # a file, the content of one, or (3, H, W) in [0, 1]
    text: str                           # as it is put to the model
    right: str                          # the answer
    choices: list[str] = []             # texts of A, B, ...


def read_pope(path: Path, limit: int | None = None) -> list[Question]:
    """JSON lines: question_id, image, text, label yes or no. One file for each of its three samplings."""
    questions = []
    for entry in map(json.loads, read_lines(path)[:limit]):
        assert entry["label"] in ("yes", "no"), f"expected the label yes or no, got {entry['label']!r}"
        questions.append(Question(str(entry["question_id"]), "all", Path(entry["image"]),
                                  entry["text"] + WORD, entry["label"]))
    return questions


def read_mmbench(path: Path, limit: int | None = None) -> list[Question]:
    """Tab-separated: index, question, A, B, ..., answer, category, image (base64, or an earlier row's index),
    hint if there is one. Each question is asked once for each turn of its options, at index + k 1,000,000;
    such rows, which circular files have, are made here."""
    pictures: dict[str, bytes] = {}
    questions = []
    for row in read_csv(path, "\t"):
        index, image = row["index"], row["image"]
        if int(index) >= 10 ** 6:
            continue
        if len(pictures) == limit:
            break
        pictures[index] = pictures[image] if image in pictures else base64.b64decode(image, validate=True)
        choices = [row[letter] for letter in LETTERS if row.get(letter)]
        right = list(LETTERS[:len(choices)]).index(row["answer"])
        hint = f"{row['hint']}\n" if row.get("hint") else ""
        for turn in range(len(choices)):
            name = str(int(index) + turn * 10 ** 6)
            options = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, choices))
            text = f"{hint}{row['question']}\n{options}{LETTER}"
            answer = LETTERS[(right - turn) % len(choices)]
            questions.append(Question(name, row["category"], pictures[index], text, answer, choices))
            choices = choices[1:] + choices[:1]
    return questions


def choice_letter(answer: str, choices: list[str]) -> str:
    """The letter of the chosen option: at the start, in brackets or at the end; else that of the only option
    whose text is there; else ""."""
    named = [letter for letter, choice in zip(LETTERS, choices) if choice.strip().lower() in answer.lower()]
    letters = LETTERS[:len(choices)]
    for pattern in (rf"^([{letters}])(?![A-Za-z'])", rf"\(([{letters}])\)", rf"\b([{letters}])[.):]",
                    rf"\b([{letters}])$"):
        match = re.search(pattern, answer.strip())
        # the A of "A dog" is an article, where the dog is an option
        if match and not (answer.strip().startswith("A ") and len(named) == 1):
            return match[1]
    return named[0] if len(named) == 1 else ""


def mean_row(name: str, marks: list[bool]) -> dict:
    mean, error = mean_and_error(marks)
    return {"name": name, "value": mean, "s.e.": error, "n": len(marks)}


def grouped(questions: list[Question], marks: list[bool]) -> list[dict]:
    """A row for each group, then all questions together."""
    groups = defaultdict(list)
    for question, mark in zip(questions, marks, strict=True):
        groups[question.group].append(mark)
    rows = [mean_row(name, groups[name]) for name in sorted(groups)]
    return [*rows, mean_row("all", marks)]


def score_nano(questions: list[Question], answers: list[str]) -> list[dict]:
    return grouped(questions, [answer == question.right for question, answer in zip(questions, answers)])


def score_pope(questions: list[Question], answers: list[str]) -> list[dict]:
    """Accuracy, precision and recall of yes, F1, share of yes. As official, a first sentence without "no" and
    "not" is a yes."""
    first = [answer.lower().split(".")[0] for answer in answers]
    said_yes = [not {"no", "not"} & set(re.findall(r"[a-z]+", sentence)) for sentence in first]
    is_yes = [question.right == "yes" for question in questions]
    hits, n = sum(a and b for a, b in zip(said_yes, is_yes)), len(answers)
    precision, recall = (hits / sum(side) if sum(side) else 0.0 for side in (said_yes, is_yes))
    f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
    # what is no mean over questions has no error
    ratios = {"precision": precision, "recall": recall, "F1": f1}
    return [mean_row("accuracy", [a == b for a, b in zip(said_yes, is_yes)]),
            *({"name": name, "value": value, "s.e.": None, "n": n} for name, value in ratios.items()),
            mean_row("share of yes", said_yes)]


def score_mmbench(questions: list[Question], answers: list[str]) -> list[dict]:
    """CircularEval: right in every turn of its options; `first turn` is the plain share."""
    turns = defaultdict(list)
    for question, answer in zip(questions, answers, strict=True):
        is_right = choice_letter(answer, question.choices) == question.right
        turns[int(question.name) % 10 ** 6].append(is_right)
    first = [question for question in questions if int(question.name) < 10 ** 6]
    rows = grouped(first, [all(marks) for marks in turns.values()])
    return [*rows, mean_row("first turn", [marks[0] for marks in turns.values()])]


# the reader of a published file, and the metric
BENCHMARKS = {"nano": (None, score_nano), "pope": (read_pope, score_pope),
              "mmbench": (read_mmbench, score_mmbench)}


@dataclass(frozen=True)
class UnderstandConfig(EvalConfig):
    benchmark: str = knob("nano", "whose questions, and whose metric", choices=BENCHMARKS)
    questions: str = knob("", "the benchmark's question file")
    images: str = knob("", "folder of its pictures; not needed where they are in the question file")
    limit: int = knob(0, "the first so many questions; 0: all of them, of nano's 2000")
    reference: str = knob("", "also ask the untouched vlm/ of a weights folder; auto: that of --weights")
    batch_size: int = knob(250, "questions at a time")
    out: str = knob("runs/understand", "folder for table and answers; what was cut short there goes on")


def main(argv: list[str] | None = None) -> dict:
    """Ask, score, compare with the untouched VLM."""
    cfg, dist = start(UnderstandConfig, argv, __doc__)
    read, score = BENCHMARKS[cfg.benchmark]
    if cfg.benchmark == "nano":
        if not PRESETS[cfg.preset].shapes_world:
            raise Refused(f"preset {cfg.preset} needs --benchmark and --questions: it has none of its own")
        images, pairs = world.question_set(cfg.limit or 2000, cfg.seed % 2 ** 32)   # (limit, 3, H, W)
        # the first two words of a question are its kind
        questions = [Question(str(i), " ".join(text.split()[:2]), images[i], text, answer)
                     for i, (text, answer) in enumerate(pairs)]
    else:
        # a stranger's file may be wrong in any way
        try:
            questions = read(Path(cfg.questions), cfg.limit or None)
            assert questions, "it holds no questions"
        except Exception as error:
            raise Refused(f"--questions {cfg.questions} cannot be read as the published file of "
                          f"{cfg.benchmark}: {error!r}") from error

    model = load(cfg, dist.device)
    answers = ask(cfg, model, questions, Path(cfg.out))
    rows = score(questions, answers)
    result = {"benchmark": cfg.benchmark, "rows": rows, "vlm_sha256": fingerprint(model.vlm)}
    part = " (a part of them)" if cfg.limit else ""
    text = f"{cfg.benchmark}, {len(questions)} questions{part}\n{table(rows)}"

    if cfg.reference:
        # the VLM as it was before any stage, in a model of its own: no stage file is loaded into it
        folder = weights_folder(cfg.preset, cfg.weights if cfg.reference == "auto" else cfg.reference)
        untouched = ParaUni.from_preset(cfg.preset, folder, "none", device=dist.device, dtype=torch.bfloat16)
        others = ask(cfg, untouched, questions, Path(cfg.out) / "untouched")
        same = {"same_answers": sum(a == b for a, b in zip(answers, others)), "of": len(answers),
                "same_weights": fingerprint(untouched.vlm) == result["vlm_sha256"]}
        result["untouched"] = same
        text += f"\nlike the untouched VLM:\n{table([same])}"
    return finish(cfg, "understand", result, text)


def ask(cfg: UnderstandConfig, model: ParaUni, questions: list[Question], folder: Path) -> list[str]:
    """The answers to all questions, in order, written as they come."""
    asked = repr([(question.name, question.text, question.right) for question in questions])
    same_settings(folder, {"weights": f"sha256:{fingerprint(model.vlm)[:16]}",
                           "questions": f"sha256:{hashlib.sha256(asked.encode()).hexdigest()[:16]}",
                           "benchmark": cfg.benchmark, "images": cfg.images, "seed": cfg.seed,
                           "dtype": cfg.dtype})
    path = folder / "answers.jsonl"
    records = [json.loads(line) for line in read_lines(path)] if path.is_file() else []
    for first in tqdm(range(len(records), len(questions), cfg.batch_size), unit="batch"):
        part = questions[first:first + cfg.batch_size]
        images = torch.stack([tile(question, cfg.images, model) for question in part])      # (B, 3, H, W)
        with precision(model.device, cfg.dtype):
            answers = model.answer(images, [question.text for question in part])
        records += [{"name": question.name, "question": question.text, "right": question.right,
                     "answer": answer} for question, answer in zip(part, answers)]
        write_lines(path, records)
    return [record["answer"] for record in records]


def tile(question: Question, folder: str, model: ParaUni) -> Tensor:
    """A question's picture as the VLM's one tile, (3, side, side) in [0, 1]."""
    image = question.image
    if isinstance(image, Tensor):
        return image
    try:
        picture = read_picture(Path(folder) / image if isinstance(image, Path) else image)
    except Refused as error:
        raise Refused(f"question {question.name}: {error}") from error
    side = model.preset.vlm.vision_config.image_size[0]
    return to_tensor(picture.resize((side, side), Image.Resampling.BICUBIC))
