"""The rules of the benchmarks, apart from any model: what counts as right, and what it adds up to.

    GenEval        what a detector found in a picture + what its prompt asks for -> right or wrong
    DPG-Bench      yes/no answers about a picture + which question hangs on which -> a score
    pictures       PSNR and SSIM of pairs

Thresholds and rules are the published ones (arXiv 2310.11513, 2403.05135 and their code);
where this file differs from them, it says so. Standard errors (s.e.) are sample standard deviation / sqrt(n).
Nothing heavy is imported here.
Letters: B pictures, H W pixels.
"""
import csv
import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


# ----------------------------------------------------------------------------- shared

def mean_and_error(values: list[float]) -> tuple[float | None, float | None]:
    """Mean and its standard error; None where there are too few values."""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return (fmean(values) if values else None), error


def read_text(path: str | Path, flag: str) -> str:
    """A UTF-8 file that is not empty. `flag` names it in the sentences of the errors."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"expected {flag} to name a file, found no file {path}")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"expected {path} ({flag}) to be UTF-8 text, byte {error.start} is not") from error
    if not text.strip():
        raise ValueError(f"expected {path} ({flag}) to hold something, it is empty")
    return text


def read_json(path: str | Path, flag: str) -> dict | list:
    text = read_text(path, flag)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno} of {path} ({flag}) is not JSON: {error.msg}") from error


def json_lines(path: str | Path, flag: str) -> Iterator[tuple[str, dict]]:
    """(where, object) of every line that is not empty; `where` names file and line."""
    for number, line in enumerate(read_text(path, flag).splitlines(), start=1):
        where = f"line {number} of {path} ({flag})"
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not JSON: {line[:60]!r}") from error
        if not isinstance(entry, dict):
            raise ValueError(f"{where} must be a JSON object, it is {line[:60]!r}")
        yield where, entry


def json_files(path: str | Path, flag: str) -> list[Path]:
    """The file, or all JSON files of the folder, that a flag names."""
    files = sorted(Path(path).glob("*.json")) if Path(path).is_dir() else [Path(path)]
    if not files or not files[0].is_file():
        raise FileNotFoundError(f"expected {flag} to name a JSON file, or a folder of some, found no {path}")
    return files


def need(entry: dict, keys: tuple[str, ...], where: str) -> None:
    """ValueError if one of the keys is missing or null."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: expected an object with {', '.join(keys)}, got {str(entry)[:60]!r}")
    if missing := [key for key in keys if entry.get(key) is None]:
        raise ValueError(f"{where} lacks {', '.join(map(repr, missing))}: expected {', '.join(keys)}")


# ----------------------------------------------------------------------------- GenEval

TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
# COCO's 80 classes in its order, three under the names that GenEval's prompts use
NAMES = tuple("""person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire
hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra,
giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite,
baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, knife,
spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair,
couch, potted plant, bed, dining table, toilet, tv, laptop, computer mouse, tv remote, computer keyboard,
cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair
drier, toothbrush""".replace("\n", " ").split(", "))
GENEVAL_DIGEST = "ac3c481628128939793c13827f94fb83c9bc0a7efef1c29bfbe1c117c8c99e5e"  # of the 553 prompts
PER_PROMPT = 4                          # pictures of each prompt that make the benchmark
MIN_SCORE, MIN_SCORE_COUNTING = 0.3, 0.9        # a detection must lie above
MAX_PER_CLASS = 16
SHRINK, REACH = 0.1, 0.5                # of positions: share of the sizes, share of the distance


@dataclass(frozen=True)
class Found:
    """One object that a detector found."""
    name: str                                   # one of NAMES
    score: float                                # 0 .. 1
    box: tuple[float, float, float, float]      # left, top, right, bottom in pixels
    mask: dict | None = None                    # {"size": [H, W], "counts": run lengths}, COCO's plain form
    color: str | None = None                    # one of COLORS, where a prompt asks for it


def keep(found: list[Found], task: str) -> dict[str, list[Found]]:
    """What counts as seen: by class, best first, above the task's threshold, at most 16 of a class."""
    least, kept = MIN_SCORE_COUNTING if task == "counting" else MIN_SCORE, {}
    for thing in sorted(found, key=lambda f: -f.score):
        if thing.score > least and len(kept.get(thing.name, ())) < MAX_PER_CLASS:
            kept.setdefault(thing.name, []).append(thing)
    return kept


def position(a: Found, b: Found) -> set[str]:
    """Where a lies from b: the offset of the centres, shrunk on each axis by a tenth of both sizes,
    reaches beyond half of its unshrunk length. Up to two relations hold."""
    offset = [(a.box[i] + a.box[i + 2] - b.box[i] - b.box[i + 2]) / 2 for i in (0, 1)]
    sizes = [abs(a.box[i + 2] - a.box[i]) + abs(b.box[i + 2] - b.box[i]) for i in (0, 1)]
    shrunk = [math.copysign(max(abs(o) - SHRINK * s, 0.0), o) for o, s in zip(offset, sizes)]
    if max(map(abs, shrunk)) < 1e-3:
        return set()
    dx, dy = (value / math.hypot(*offset) for value in shrunk)
    holds = {"left of": dx < -REACH, "right of": dx > REACH, "above": dy < -REACH, "below": dy > REACH}
    return {relation for relation in RELATIONS if holds[relation]}


def need_color(found: list[Found], request: dict) -> list[Found]:
    """The detections whose colour decides: the best `count` of each class that a colour is asked of."""
    kept = keep(found, request["tag"])
    groups = [kept.get(clause["class"], [])[:clause["count"]]
              for clause in request["include"] if "color" in clause]
    return [thing for group in groups for thing in group]


def check_clause(clause: dict, kept: dict[str, list[Found]], groups: list[list[Found] | None]) -> str:
    """Why a clause of "include" fails, "" if it holds.
    `groups`: what matched the clauses before, None where one failed."""
    name, count = clause["class"], clause["count"]
    seen = kept.get(name, [])[:count]
    if len(seen) < count:
        return f"expected {count} {name}, found {len(seen)}"
    if "color" in clause and (right := sum(f.color == clause["color"] for f in seen)) < count:
        return f"expected {count} {clause['color']} {name}, found {right}: {', '.join(f.color for f in seen)}"
    if "position" in clause:
        relation, target = clause["position"]
        if groups[target] is None:
            return f"nothing for the {name} to be {relation}"
        for other in (b for a in seen for b in groups[target] if relation not in position(a, b)):
            return f"expected {name} {relation} {other.name}, it is not"
    return ""


def verdict(found: list[Found], request: dict) -> tuple[bool, str]:
    """GenEval's verdict on one picture, and the reason where it is wrong. Those of `need_color` must have a
    colour. Extra objects do not hurt, except those of classes under "exclude" (counting)."""
    kept, groups, reasons = keep(found, request["tag"]), [], []
    for clause in request["include"]:
        reason = check_clause(clause, kept, groups)
        groups.append(None if reason else kept[clause["class"]][:clause["count"]])
        reasons += [reason] if reason else []
    for clause in request.get("exclude", []):
        if (seen := len(kept.get(clause["class"], []))) >= clause["count"]:
            reasons.append(f"expected fewer than {clause['count']} {clause['class']}, found {seen}")
    return not reasons, "; ".join(reasons)


def task_table(verdicts: dict[tuple[int, int], bool], tasks: list[str]) -> dict:
    """Share of right pictures of each task, and `overall`, the unweighted mean of the tasks, with s.e.

    verdicts  (prompt, sample) -> right;  tasks  of each prompt
    An error counts prompts, not pictures, since the pictures of a prompt fail together;
    those of tasks add in squares.
    """
    rows, errors = {}, []
    for task in TASKS:
        by_prompt: dict[int, list[float]] = {}
        for (i, _), right in verdicts.items():
            if tasks[i] == task:
                by_prompt.setdefault(i, []).append(float(right))
        if by_prompt:
            every = [right for shares in by_prompt.values() for right in shares]
            errors.append(mean_and_error([fmean(shares) for shares in by_prompt.values()])[1])
            rows[task] = {"right": fmean(every), "error": errors[-1], "prompts": len(by_prompt),
                          "pictures": len(every)}
    error = None if None in errors or not errors else math.hypot(*errors) / len(errors)
    total = {"right": fmean(row["right"] for row in rows.values()) if rows else None, "error": error,
             "prompts": sum(row["prompts"] for row in rows.values()), "pictures": len(verdicts)}
    return {"tasks": rows, "overall": total}


def check_request(entry: dict, where: str) -> dict:
    """One prompt of GenEval's metadata, or a ValueError that says what is wrong with it."""
    need(entry, ("tag", "prompt", "include"), where)
    if entry["tag"] not in TASKS or not str(entry["prompt"]).strip():
        raise ValueError(f"{where}: expected a prompt and a tag of {', '.join(TASKS)}, "
                         f"got {entry['prompt']!r} and {entry['tag']!r}")
    if not isinstance(entry["include"], list) or not isinstance(entry.get("exclude", []), list):
        raise ValueError(f"{where}: expected include and exclude to be lists of objects")
    for number, clause in enumerate([*entry["include"], *entry.get("exclude", [])]):
        need(clause, ("class", "count"), where)
        places = [[relation, target] for relation in RELATIONS for target in range(number)]
        if (clause["class"] not in NAMES or clause.get("color", COLORS[0]) not in COLORS
                or not isinstance(clause["count"], int) or clause["count"] < 1
                or "position" in clause and clause["position"] not in places):
            raise ValueError(f"{where}: no object of GenEval is described by {json.dumps(clause)}")
    return entry


def geneval_requests(path: str | Path) -> list[dict]:
    """GenEval's prompts with what each asks for: evaluation_metadata.jsonl, or a file of the same form."""
    return [check_request(entry, where) for where, entry in json_lines(path, "--metadata")]


def geneval_digest(requests: list[dict]) -> str:
    """SHA-256 of what is asked, whatever the order; GENEVAL_DIGEST for the published prompts."""
    lines = sorted(json.dumps(request, sort_keys=True) for request in requests)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def read_detections(files: list[Path]) -> tuple[str, dict[str, dict]]:
    """The detector's name, and "00000/samples/00000.png" -> {"objects": [Found, ...], "sha256": of the
    picture, or absent}. A picture without objects has an empty list."""
    form = '{"00000/samples/00000.png": {"objects": [{"class", "score", "box", "mask"}]}}'
    name, parts = said_by_one(files, "--detections", "detector", "pictures", form)
    out = {}
    for file, pictures in parts:
        for picture, entry in pictures.items():
            where = f"{file} (--detections), {picture}"
            need(entry, ("objects",), where)
            out[picture] = {**entry, "objects": [read_found(thing, where) for thing in entry["objects"]]}
    return name, out


def said_by_one(files: list[Path], flag: str, who: str, key: str,
                form: str) -> tuple[str, list[tuple[Path, dict]]]:
    """The name under `who` that all files share, and each file with what it holds under `key`: a dict of
    the given form."""
    names, parts = set(), []
    for file in files:
        data = read_json(file, flag)
        if not isinstance(data, dict) or not isinstance(data.get(key), dict):
            raise ValueError(f'expected {file} ({flag}) to be {{"{who}": name, "{key}": {form}}}')
        names.add(str(data.get(who, "not named")))
        parts.append((file, data[key]))
    if len(names) != 1:
        raise ValueError(f"expected one {who} in the files of {files[0].parent} ({flag}), "
                         f"got {sorted(names)}")
    return names.pop(), parts


def read_found(entry: dict, where: str) -> Found:
    need(entry, ("class", "score", "box"), where)
    name, box, score = entry["class"], entry["box"], entry["score"]
    if name not in NAMES:
        raise ValueError(f"{where}: {name!r} is none of GenEval's 80 classes ({NAMES[0]} ... {NAMES[-1]})")
    if not isinstance(score, (int, float)) or not 0 <= score <= 1:
        raise ValueError(f"{where}: expected a score from 0 to 1, got {score!r}")
    numbers = isinstance(box, list) and all(isinstance(x, (int, float)) and math.isfinite(x) for x in box)
    if not numbers or len(box) != 4:
        raise ValueError(f"{where}: expected a box of left, top, right, bottom, got {box!r}")
    mask, color = entry.get("mask"), entry.get("color")
    if mask is not None and not whole_mask(mask):
        raise ValueError(f'{where}: expected a mask {{"size": [H, W], "counts": runs that fill it}}')
    if color not in (None, *COLORS):
        raise ValueError(f"{where}: expected a color of {', '.join(COLORS)}, got {color!r}")
    return Found(name, float(score), tuple(map(float, box)), mask, color)


def whole_mask(mask: dict) -> bool:
    """Is it {"size": [H, W], "counts": [...]} with runs of H W pixels in all?"""
    parts = [mask.get(key) for key in ("size", "counts")] if isinstance(mask, dict) else [None]
    numbers = all(isinstance(part, list) and all(isinstance(n, int) and n >= 0 for n in part)
                  for part in parts)
    return numbers and len(parts[0]) == 2 and sum(parts[1]) == math.prod(parts[0])


def found_to_json(found: Found) -> dict:
    entry = {"class": found.name, "score": found.score, "box": list(found.box), "mask": found.mask,
             "color": found.color}
    return {key: value for key, value in entry.items() if value is not None}


# ----------------------------------------------------------------------------- DPG-Bench

DPG_PROMPTS = 1065
DPG_COLUMNS = ("item_id", "text", "keywords", "proposition_id", "dependency", "category_broad",
               "category_detailed", "tuple", "question_natural_language")


@dataclass(frozen=True)
class Proposition:
    """One thing that a prompt says."""
    number: int
    parents: tuple[int, ...]            # propositions without which this one means nothing
    category: str                       # "attribute - color"
    question: str                       # yes if the picture shows it


@dataclass(frozen=True)
class Item:
    name: str                           # file stem of its grid of pictures
    text: str                           # the prompt
    propositions: tuple[Proposition, ...]


def parents_of(row: dict, where: str, quirks: bool, notes: list[str]) -> tuple[int, ...]:
    """The numbers of a dependency column; 0 is no parent. A word in it is left out, and noted."""
    numbers = []
    for word in row["dependency"].split(","):
        if word.strip().isdigit():
            numbers.append(int(word))
        elif quirks:
            raise ValueError(f"{where}: the dependency {word.strip()!r} is no number, where the official "
                             "reader stops too: mend the line, or leave out --official-quirks")
        else:
            notes.append(f"{where}: the dependency {word.strip()!r} is no number, left out")
    return tuple(n for n in numbers if n)


def dpg_items(path: str | Path, quirks: bool = False) -> tuple[list[Item], list[str]]:
    """The prompts of a question file with DPG-Bench's nine columns, and notes on lines that need one.

    quirks  as the official reader: the first row is lost
    A parent that its prompt does not have is left out and noted (the official scorer drops such prompts).
    """
    reader = csv.DictReader(read_text(path, "--questions").splitlines(keepends=True))
    if missing := [name for name in DPG_COLUMNS if name not in (reader.fieldnames or ())]:
        raise ValueError(f"line 1 of {path} (--questions) lacks the columns {', '.join(missing)}")
    texts, groups, notes = {}, {}, []
    for number, row in enumerate(reader):
        where = f"line {reader.line_num} of {path} (--questions)"
        if not all(row.get(name) for name in ("item_id", "text", "dependency", "tuple",
                                              "question_natural_language")):
            raise ValueError(f"{where} lacks a column's content: expected {', '.join(DPG_COLUMNS)}")
        if not re.fullmatch(r"[\w-]+", row["item_id"]):
            raise ValueError(f"{where}: expected the stem of a file name as item_id, got {row['item_id']!r}")
        if not row["proposition_id"].strip().isdigit():
            raise ValueError(f"{where}: expected a number as proposition_id, got {row['proposition_id']!r}")
        group, key = groups.setdefault(row["item_id"], {}), int(row["proposition_id"])
        if key in group:
            raise ValueError(f"{where}: proposition {key} of {row['item_id']} stands there a second time")
        texts[row["item_id"]] = row["text"]
        if number or not quirks:
            group[key] = Proposition(key, parents_of(row, where, quirks, notes),
                                     row["tuple"].split("(")[0].strip(), row["question_natural_language"])
    items = [Item(name, texts[name], tuple(group.values())) for name, group in groups.items() if group]
    if not items:
        raise ValueError(f"expected questions below the line of columns in {path} (--questions), found none")
    return [item if quirks else with_known_parents(item, notes) for item in items], notes


def with_known_parents(item: Item, notes: list[str]) -> Item:
    known, out = {p.number for p in item.propositions}, []
    for p in item.propositions:
        if unknown := set(p.parents) - known:
            notes.append(f"{item.name}: proposition {p.number} depends on {sorted(unknown)}, "
                         "which is not there, left out")
        out.append(replace(p, parents=tuple(n for n in p.parents if n in known)))
    return replace(item, propositions=tuple(out))


def tile_scores(item: Item, answers: dict[int, str]) -> dict[int, float]:
    """1 for yes, 0 for anything else; then, in the file's order, 0 for what hangs on a 0.

    A parent further down the file still has the score of its own answer, as in the official loop.
    KeyError, only under the official quirks, if a parent is not there.
    """
    scores = {p.number: float(answers[p.number] == "yes") for p in item.propositions}
    for p in item.propositions:
        if any(scores[parent] == 0 for parent in p.parents):
            scores[p.number] = 0.0
    return scores


def dpg_scores(items: list[Item], answers: dict[str, list[dict[int, str]]], quirks: bool = False) -> dict:
    """DPG's score in percent (mean over prompts of the mean over pictures of the mean over questions),
    with s.e. over prompts, and the categories.

    answers  item -> one {proposition: answer} a picture; items that are not in it are left out
    Categories are shares of yes without the dependencies, as official, over all pictures.
    quirks   as official: categories see the last picture only, a prompt whose parent is missing is dropped
    """
    scores, dropped, marks = {}, [], {}
    for item in items:
        tiles = answers.get(item.name, [])
        try:
            values = [fmean(tile_scores(item, tile).values()) for tile in tiles]
        except KeyError:
            if not quirks:
                raise
            dropped.append(item.name)
            continue
        if not tiles:
            continue
        scores[item.name] = fmean(values)
        for tile in tiles[-1:] if quirks else tiles:
            for p in item.propositions:
                for level in dict.fromkeys((p.category.split("-")[0].strip(), p.category)):
                    marks.setdefault(level, []).append(float(tile[p.number] == "yes"))
    mean, error = mean_and_error(list(scores.values()))
    shares = {name: {"yes": 100 * fmean(values), "n": len(values)} for name, values in sorted(marks.items())}
    return {"score": None if mean is None else 100 * mean, "error": None if error is None else 100 * error,
            "prompts": scores, "dropped": dropped, "categories": shares}


# ----------------------------------------------------------------------------- pictures

def psnr(a: "Tensor", b: "Tensor") -> "Tensor":
    """Peak signal-to-noise ratio, dB, of pairs of pictures (B, 3, H, W) in [0, 1], (B,) fp64."""
    return -10 * (a.double() - b.double()).square().mean((1, 2, 3)).log10()             # (B,)


def ssim(a: "Tensor", b: "Tensor", window: int = 7) -> "Tensor":
    """Structural similarity of pairs of pictures (B, 3, H, W) in [0, 1], (B,) fp64 (Wang et al. 2004).

    Means over every square window inside the picture, sample covariance, constants 0.01 and 0.03, mean over
    colours: what scikit-image computes by default.
    """
    import torch.nn.functional as F
    if min(a.shape[-2:]) < window:
        raise ValueError(f"expected pictures of at least {window} x {window} pixels, got {tuple(a.shape)}")
    a, b = a.double(), b.double()
    mean_a, mean_b, aa, bb, ab = (F.avg_pool2d(x, window, 1) for x in (a, b, a * a, b * b, a * b))
    sample = window ** 2 / (window ** 2 - 1)
    var_a, var_b = sample * (aa - mean_a ** 2), sample * (bb - mean_b ** 2)             # (B, 3, H - 6, W - 6)
    cov, c1, c2 = sample * (ab - mean_a * mean_b), 0.01 ** 2, 0.03 ** 2
    similar = ((2 * mean_a * mean_b + c1) * (2 * cov + c2)
               / ((mean_a ** 2 + mean_b ** 2 + c1) * (var_a + var_b + c2)))             # (B, 3, H - 6, W - 6)
    return similar.mean((1, 2, 3))                                                      # (B,)
