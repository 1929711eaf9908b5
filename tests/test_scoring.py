"""scoring.py: GenEval's and DPG-Bench's rules against a second writing of them, PSNR and SSIM against
scikit-image, and what is said of malformed files."""
import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import scoring
from common import generator
from scoring import COLORS, NAMES, RELATIONS, TASKS, Found

SHAPES = ("bench", "dog", "clock", "tv remote")               # few classes, so that they collide


# ----------------------------------------------------------------------------- GenEval, written a second time
# On arrays (k, 6), one a class: left, top, right, bottom, score, colour.

def reference_position(a: np.ndarray, b: np.ndarray) -> list[str]:
    middle_a, middle_b = (np.array([(x[0] + x[2]) / 2, (x[1] + x[3]) / 2]) for x in (a, b))
    width = np.array([abs(a[2] - a[0]) + abs(b[2] - b[0]), abs(a[3] - a[1]) + abs(b[3] - b[1])])
    away = middle_a - middle_b
    left_over = np.where(np.abs(away) > 0.1 * width, np.abs(away) - 0.1 * width, 0) * np.sign(away)
    if (np.abs(left_over) < 1e-3).all():
        return []
    x, y = left_over / np.sqrt((away ** 2).sum())
    return [name for name, here in zip(("left of", "right of", "above", "below"),
                                       (x < -0.5, x > 0.5, y < -0.5, y > 0.5)) if here]


def reference_verdict(arrays: dict[str, np.ndarray], request: dict) -> bool:
    threshold = 0.9 if request["tag"] == "counting" else 0.3
    seen = {}
    for name, array in arrays.items():
        array = array[np.argsort(-array[:, 4], kind="stable")]
        seen[name] = array[array[:, 4] > threshold][:16]
    nothing, matched, good = np.zeros((0, 6)), [], True
    for want in request["include"]:
        best = seen.get(want["class"], nothing)[:want["count"]]
        fits = len(best) == want["count"]
        if fits and "color" in want:
            fits = bool((best[:, 5] == COLORS.index(want["color"])).sum() >= want["count"])
        if fits and "position" in want:
            relation, group = want["position"]
            fits = matched[group] is not None and all(
                relation in reference_position(a, b) for a in best for b in matched[group])
        matched.append(best if fits else None)
        good = good and fits
    return good and all(len(seen.get(no["class"], nothing)) < no["count"]
                        for no in request.get("exclude", []))


def made_up_request(rng: np.random.Generator, task: str) -> dict:
    """A request of the published form."""
    a, b = rng.permutation(SHAPES)[:2].tolist()
    clauses, color = [{"class": a, "count": 1}], [COLORS[i] for i in rng.integers(0, 3, 2)]
    if task == "counting":
        n = int(rng.integers(2, 5))
        return {"tag": task, "prompt": task, "include": [{"class": a, "count": n}],
                "exclude": [{"class": a, "count": n + 1}]}
    if task in ("two_object", "position", "color_attr"):
        clauses.append({"class": b, "count": 1})
    if task == "position":
        clauses[1]["position"] = [RELATIONS[rng.integers(4)], 0]
    if task in ("colors", "color_attr"):
        for clause, said in zip(clauses, color):
            clause["color"] = said
    return {"tag": task, "prompt": task, "include": clauses}


def made_up_detections(rng: np.random.Generator, task: str) -> list[Found]:
    """Up to 30 boxes, often of the same few classes, scores and colours, some exactly on a threshold."""
    count = int(rng.integers(0, 9)) if rng.random() < 0.8 else 30
    out = []
    for _ in range(count):
        left, top, width, height = (int(x) for x in (*rng.integers(0, 100, 2), *rng.integers(1, 60, 2)))
        sure = 0.93 + 0.07 * rng.random() if task == "counting" else rng.random()
        score = float(rng.choice([sure, 0.3, 0.9, round(rng.random(), 1)], p=[0.7, 0.1, 0.1, 0.1]))
        out.append(Found(SHAPES[rng.integers(2 if count > 9 or rng.random() < 0.7 else 4)], score,
                         (float(left), float(top), float(left + width), float(top + height)), None,
                         COLORS[rng.integers(3)]))
    return out


@pytest.mark.parametrize("task", TASKS)
def test_verdicts_are_those_of_a_second_writing_of_the_rules(task: str) -> None:
    rng, right, total = np.random.default_rng([7, TASKS.index(task)]), 0, 600
    for _ in range(total):
        request, found = made_up_request(rng, task), made_up_detections(rng, task)
        arrays = {name: np.array([[*f.box, f.score, COLORS.index(f.color)] for f in found if f.name == name]
                                 ).reshape(-1, 6) for name in SHAPES}
        good, reason = scoring.verdict(found, request)
        assert good == reference_verdict(arrays, request), (request, found)
        assert good == (reason == "")
        right += good
    assert 0.02 * total < right < 0.98 * total              # the made-up pictures are no walk-over


def boxed(name: str, x: float, y: float, score: float = 0.95, color: str | None = None) -> Found:
    return Found(name, score, (x - 10, y - 10, x + 10, y + 10), None, color)


def one(name: str, **more: object) -> dict:
    return {"class": name, "count": 1, **more}


def ask(task: str, *include: dict, exclude: tuple = ()) -> dict:
    return {"tag": task, "prompt": "x", "include": list(include), "exclude": list(exclude)}


def test_the_thresholds_by_hand() -> None:
    dog, count2 = ask("single_object", one("dog")), ask("counting", {"class": "dog", "count": 2},
                                                        exclude=({"class": "dog", "count": 3},))
    assert scoring.verdict([boxed("dog", 0, 0, 0.301)], dog) == (True, "")
    assert scoring.verdict([boxed("dog", 0, 0, 0.3)], dog) == (False, "expected 1 dog, found 0")
    assert scoring.verdict([boxed("dog", 0, 0)] * 5, dog)[0]                                # more do not hurt
    assert scoring.verdict([boxed("dog", 0, 0, 0.91), boxed("dog", 9, 9, 0.91)], count2)[0]
    assert not scoring.verdict([boxed("dog", 0, 0, 0.91), boxed("dog", 9, 9, 0.9)], count2)[0]
    good, reason = scoring.verdict([boxed("dog", 0, 0, 0.91)] * 3, count2)
    assert not good and reason == "expected fewer than 3 dog, found 3"
    assert len(scoring.keep([boxed("dog", i, 0) for i in range(40)], "colors")["dog"]) == 16


def test_only_the_most_certain_object_of_a_class_is_asked_for_its_color() -> None:
    request = ask("color_attr", one("dog", color="red"), one("clock", color="blue"))
    found = [boxed("dog", 0, 0, 0.8, "blue"), boxed("dog", 50, 0, 0.9, "red"),
             boxed("clock", 9, 9, 0.4, "blue"), boxed("tv", 3, 3, 0.9)]
    assert scoring.need_color(found, request) == [found[1], found[2]] and scoring.verdict(found, request)[0]
    found[1] = boxed("dog", 50, 0, 0.7, "red")
    assert scoring.verdict(found, request) == (False, "expected 1 red dog, found 0: blue")


def test_positions_by_hand() -> None:
    here = boxed("dog", 100, 100)
    assert scoring.position(boxed("tv", 60, 100), here) == {"left of"}
    assert scoring.position(boxed("tv", 140, 138), here) == {"right of", "below"}
    assert scoring.position(boxed("tv", 104, 100), here) == set()           # 4 - 0.1 (20 + 20) is nothing
    # 8 - 4 is half of 8: not beyond it
    assert scoring.position(boxed("tv", 108, 100), here) == set()
    assert scoring.position(boxed("tv", 108.1, 100), here) == {"right of"}
    request = ask("position", one("dog"), one("tv", position=["above", 0]))
    assert scoring.verdict([here, boxed("tv", 100, 20)], request)[0]
    assert scoring.verdict([here, boxed("tv", 100, 180)], request)[1] == "expected tv above dog, it is not"
    assert scoring.verdict([boxed("tv", 100, 20)], request)[1] == (
        "expected 1 dog, found 0; nothing for the tv to be above")


def test_task_table_against_hand_numbers() -> None:
    tasks = ["counting", "counting", "colors", "colors", "position"]
    verdicts = {(0, 0): True, (0, 1): True, (1, 0): False, (1, 1): False,               # shares 1 and 0
                (2, 0): False, (2, 1): False, (3, 0): False, (3, 1): True}              # shares 0 and 1/2
    table = scoring.task_table(verdicts, tasks)
    assert table["tasks"] == {
        "counting": {"right": 0.5, "error": pytest.approx(0.5), "prompts": 2, "pictures": 4},
        "colors": {"right": 0.25, "error": pytest.approx(0.25), "prompts": 2, "pictures": 4}}
    assert table["overall"] == {"right": 0.375, "error": pytest.approx(math.hypot(0.5, 0.25) / 2),
                                "prompts": 4, "pictures": 8}
    assert scoring.task_table({(4, 0): True}, tasks)["overall"]["error"] is None
    assert scoring.task_table({}, tasks)["overall"]["right"] is None


def test_the_classes_are_coco_s_under_geneval_s_names() -> None:
    assert len(set(NAMES)) == 80 and NAMES[:3] == ("person", "bicycle", "car") and NAMES[-1] == "toothbrush"
    assert [NAMES.index(n) for n in ("computer mouse", "tv remote", "computer keyboard")] == [64, 65, 66]


# ----------------------------------------------------------------------------- GenEval's files

def test_requests_are_read_and_their_digest_does_not_depend_on_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    requests = [made_up_request(rng, task) for task in TASKS]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, requests)) + "\n")
    assert scoring.geneval_requests(tmp_path / "m.jsonl") == requests
    digest = scoring.geneval_digest(requests)
    assert digest == scoring.geneval_digest(requests[::-1]) != scoring.geneval_digest(requests[1:])


@pytest.mark.parametrize(("line", "sentence"), [
    ("", "to hold something, it is empty"),
    ('{"tag": "colors"}', "line 1 of .* lacks 'prompt', 'include'"),
    ('{"tag": "colors", ', "line 1 of .* is not JSON"),
    ("[1]", "line 1 of .* must be a JSON object"),
    ('{"tag": "size", "prompt": "x", "include": []}', "a tag of single_object, .*, got 'x' and 'size'"),
    ('{"tag": "colors", "prompt": "x", "include": "dog"}', "include and exclude to be lists"),
    ('{"tag": "position", "prompt": "x", "include": [{"class": "dog", "count": 1, "position": "above"}]}',
     "no object of GenEval"),
    ('{"tag": "colors", "prompt": "x", "include": ["dog"]}', "an object with class, count, got 'dog'"),
    ('{"tag": "colors", "prompt": "x", "include": [{"class": "unicorn", "count": 1}]}',
     "no object of GenEval"),
    ('{"tag": "colors", "prompt": "x", "include": [{"class": "dog", "count": 0}]}', "no object of GenEval"),
    ('{"tag": "position", "prompt": "x", "include": [{"class": "dog", "count": 1, "position": ["up", 0]}]}',
     "no object of GenEval"),
])
def test_a_bad_line_of_metadata_is_named(tmp_path: Path, line: str, sentence: str) -> None:
    (tmp_path / "m.jsonl").write_text(line)
    with pytest.raises(ValueError, match=sentence):
        scoring.geneval_requests(tmp_path / "m.jsonl")


def test_detections_go_into_a_file_and_back(tmp_path: Path) -> None:
    found = [Found("dog", 0.5, (1.0, 2.0, 3.0, 4.0), {"size": [2, 3], "counts": [1, 2, 3]}, "red"),
             Found("tv", 0.25, (0.0, 0.0, 1.0, 1.0))]
    data = {"detector": "d", "pictures": {"a.png": {"objects": list(map(scoring.found_to_json, found))},
                                          "b.png": {"objects": []}}}
    (tmp_path / "x.json").write_text(json.dumps(data))
    for path in (tmp_path, tmp_path / "x.json"):
        assert scoring.read_detections(scoring.json_files(path, "--detections")) == (
            "d", {"a.png": {"objects": found}, "b.png": {"objects": []}})
    (tmp_path / "y.json").write_text(json.dumps({**data, "detector": "e"}))
    with pytest.raises(ValueError, match="expected one detector .* got .'d', 'e'"):
        scoring.read_detections(scoring.json_files(tmp_path, "--detections"))
    for path in ("nothing", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(FileNotFoundError, match="expected --detections to name a JSON file, or a folder"):
            scoring.json_files(path, "--detections")


@pytest.mark.parametrize(("change", "sentence"), [
    ({"class": "mouse"}, "'mouse' is none of GenEval's 80 classes"),
    ({"score": 1.2}, "a score from 0 to 1, got 1.2"),
    ({"mask": {"size": 4}}, "runs that fill it"), ({"mask": [1]}, "runs that fill it"),
    ({"box": 3}, "a box of left, top, right, bottom"),
    ({"box": [0, 1, 2]}, "a box of left, top, right, bottom"), ({"box": [0, 1, 2, None]}, "a box of left"),
    ({"mask": {"size": [2, 2], "counts": [1, 2]}}, "runs that fill it"),
    ({"color": "teal"}, "a color of red"),
    ({"score": None}, "lacks 'score'"),
])
def test_a_bad_detection_is_named(tmp_path: Path, change: dict, sentence: str) -> None:
    thing = {"class": "dog", "score": 0.5, "box": [0, 0, 1, 1], **change}
    (tmp_path / "x.json").write_text(json.dumps({"pictures": {"a.png": {"objects": [thing]}}}))
    with pytest.raises(ValueError, match=f"a.png.*{sentence}"):
        scoring.read_detections([tmp_path / "x.json"])


# ----------------------------------------------------------------------------- DPG-Bench

def reference_dpg(rows: list[dict], answers: dict, quirks: bool) -> tuple[dict, dict]:
    """The rule in the small, on the file's rows: prompt -> score, category -> share of yes."""
    kept = rows[1:] if quirks else rows
    prompts, categories = {}, {}
    for name in dict.fromkeys(row["item_id"] for row in kept):
        mine = [row for row in kept if row["item_id"] == name]
        ids = {int(row["proposition_id"]) for row in mine}
        total, raw, lost = [], [], False
        for tile in answers[name]:
            value = {n: int(tile[n] == "yes") for n in (int(row["proposition_id"]) for row in mine)}
            raw.append(dict(value))
            for row in mine:
                for parent in (int(p) for p in row["dependency"].split(",") if p.strip().isdigit()):
                    if parent and parent not in ids:
                        if quirks:
                            lost = True
                            break
                        continue
                    if parent and value[parent] == 0:
                        value[int(row["proposition_id"])] = 0
                        break
            total.append(sum(value.values()) / len(value))
        if lost:
            continue
        prompts[name] = sum(total) / len(total)
        for tile in (raw[-1:] if quirks else raw):
            for row in mine:
                detailed = row["tuple"].split("(")[0].strip()
                for level in {detailed, detailed.split("-")[0].strip()}:
                    categories.setdefault(level, []).append(tile[int(row["proposition_id"])])
    return prompts, {name: 100 * sum(marks) / len(marks) for name, marks in categories.items()}


def made_up_questions(path: Path, rng: np.random.Generator, prompts: int) -> list[dict]:
    """A question file with up to 12 propositions a prompt, most of them hanging on others, a few on later
    ones and on such as are not there."""
    rows = []
    for i in range(prompts):
        for n in range(1, int(rng.integers(2, 13))):
            parents = rng.permutation(range(1, n))[:rng.integers(0, 3)].tolist() if rng.random() < 0.8 else []
            parents += [n + 1] if rng.random() < 0.05 else []
            kind = ["entity - whole", "attribute - color", "relation - spatial", "global"][rng.integers(4)]
            rows.append({"item_id": f"item_{i}", "text": f"prompt, {i}", "keywords": "k",
                         "proposition_id": str(n), "dependency": ", ".join(map(str, parents)) or "0",
                         "category_broad": "x", "category_detailed": "y", "tuple": f"{kind} (thing {n})",
                         "question_natural_language": f"Is there {n}?"})
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, scoring.DPG_COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return rows


@pytest.mark.parametrize("quirks", [False, True])
def test_dpg_scores_are_those_of_a_second_writing_of_the_rule(tmp_path: Path, quirks: bool) -> None:
    rng = np.random.default_rng(3)
    rows = made_up_questions(tmp_path / "q.csv", rng, 300)
    answers: dict[str, list[dict[int, str]]] = {}
    for row in rows:
        for tile in answers.setdefault(row["item_id"], [{} for _ in range(4)]):
            said = rng.choice(["yes", "no", "yes please"], p=[0.75, 0.2, 0.05])
            tile[int(row["proposition_id"])] = str(said)
    items, notes = scoring.dpg_items(tmp_path / "q.csv", quirks)
    got = scoring.dpg_scores(items, answers, quirks)
    prompts, categories = reference_dpg(rows, answers, quirks)
    assert got["prompts"] == pytest.approx(prompts, abs=1e-12) and got["prompts"].keys() == prompts.keys()
    assert {name: row["yes"] for name, row in got["categories"].items()} == pytest.approx(categories)
    assert len(got["dropped"]) + len(prompts) == 300 and bool(got["dropped"]) == quirks == (not notes)
    assert got["score"] == pytest.approx(100 * np.mean(list(prompts.values())))
    assert got["error"] == pytest.approx(100 * np.std(list(prompts.values()), ddof=1) / len(prompts) ** 0.5)


def question_file(path: Path, *rows: str) -> Path:
    path.write_text(",".join(scoring.DPG_COLUMNS) + "\n" + "\n".join(rows) + "\n")
    return path


def test_dependencies_by_hand(tmp_path: Path) -> None:
    path = question_file(tmp_path / "q.csv", "a,t,k,1,0,e,w,entity - whole (dog),dog?",
                         'a,t,k,2,1,a,c,"attribute - color (dog, red)",red?',
                         'a,t,k,3,"2, left",r,s,"relation - spatial (dog, left)",left?',
                         "a,t,k,4,9,e,w,entity - whole (tv),tv?")
    items, notes = scoring.dpg_items(path)
    assert [p.parents for p in items[0].propositions] == [(), (1,), (2,), ()] and len(notes) == 2
    assert "line 4" in notes[0] and "depends on [9]" in notes[1]
    assert scoring.tile_scores(items[0], {1: "no", 2: "yes", 3: "yes", 4: "yes"}) == {1: 0, 2: 0, 3: 0, 4: 1}
    got = scoring.dpg_scores(items, {"a": [{1: "no", 2: "yes", 3: "yes", 4: "Yes"}]})
    assert got["score"] == 0 and got["categories"]["entity"] == {"yes": 0, "n": 2}
    assert got["categories"]["attribute - color"]["yes"] == 100                     # without the dependency
    assert scoring.dpg_scores(items, {})["score"] is None


@pytest.mark.parametrize(("row", "sentence"), [
    ("a,t,k,one,0,e,w,x (y),q?", "line 2 .* number as proposition_id, got 'one'"),
    ("a,t,k,1,0,e,w,x (y),", "line 2 .* lacks a column's content"),
    ("../a,t,k,1,0,e,w,x (y),q?", "stem of a file name as item_id, got '../a'"),
    ("a,t,k,1,0,e,w,x (y),q?\na,t,k,1,0,e,w,x (y),q?", "line 3 .* proposition 1 of a stands there a second"),
])
def test_a_bad_line_of_the_question_file_is_named(tmp_path: Path, row: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        scoring.dpg_items(question_file(tmp_path / "q.csv", row))


def test_a_file_without_the_columns_or_without_questions(tmp_path: Path) -> None:
    (tmp_path / "q.csv").write_text("item_id,text\na,b\n")
    with pytest.raises(ValueError, match="line 1 .* lacks the columns keywords"):
        scoring.dpg_items(tmp_path / "q.csv")
    with pytest.raises(ValueError, match="questions below the line of columns"):
        scoring.dpg_items(question_file(tmp_path / "q.csv"))
    path = question_file(tmp_path / "q.csv", "a,t,k,1,0,e,w,x (y),q?", 'a,t,k,2,"1, up",e,w,x (y),q?')
    with pytest.raises(ValueError, match="line 3 .* 'up' is no number, where the official reader stops too"):
        scoring.dpg_items(path, quirks=True)


# ----------------------------------------------------------------------------- pictures

def test_psnr_and_ssim_are_those_of_scikit_image() -> None:
    rng = generator("pictures")
    a = torch.rand(4, 3, 33, 40, generator=rng)
    b = torch.stack([a[0], (a[1] + 0.05).clamp(max=1), 1 - a[2], torch.rand(3, 33, 40, generator=rng)])
    for k in range(4):
        x, y = (t[k].permute(1, 2, 0).double().numpy() for t in (a, b))
        similar = structural_similarity(x, y, channel_axis=2, data_range=1.0)
        assert scoring.ssim(a, b)[k].item() == pytest.approx(similar, abs=1e-6)
        if k:
            decibel = peak_signal_noise_ratio(x, y, data_range=1.0)
            assert scoring.psnr(a, b)[k].item() == pytest.approx(decibel, abs=1e-6)
    assert scoring.psnr(a, b)[0].item() == math.inf
    with pytest.raises(ValueError, match="at least 7 x 7"):
        scoring.ssim(a[..., :5], b[..., :5])
