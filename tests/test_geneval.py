"""GenEval: its rules, detector and colours against second writings, the way from pictures to verdicts."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

import evaluate
import evaluation
from common import Dist, Refused, derive_seed
from evaluation import geneval
from evaluation.geneval import COLORS, TASKS

CPU = torch.device("cpu")
SHAPES = ("bench", "dog", "clock", "tv remote")             # few classes, so that they collide
RELATIONS = ("left of", "right of", "above", "below")
CLASSES = ("dog", "cup", "car", "mouse")                    # of a detector, in COCO's words


def reference_position(a: dict, b: dict) -> list[str]:
    a, b = np.array(a["box"]), np.array(b["box"])
    away = (a[:2] + a[2:] - b[:2] - b[2:]) / 2
    width = np.abs(a[2:] - a[:2]) + np.abs(b[2:] - b[:2])
    left_over = np.sign(away) * np.maximum(np.abs(away) - 0.1 * width, 0)
    if (np.abs(left_over) < 1e-3).all():
        return []
    x, y = left_over / np.sqrt((away ** 2).sum())
    return [name for name, here in zip(RELATIONS, (x < -0.5, x > 0.5, y < -0.5, y > 0.5)) if here]


def reference_verdict(objects: list[dict], request: dict) -> bool:
    threshold = 0.9 if request["tag"] == "counting" else 0.3
    order = sorted([found for found in objects if found["score"] > threshold],
                   key=lambda found: found["score"], reverse=True)
    matched, good = [], True
    for want in request["include"]:
        best = [found for found in order if found["class"] == want["class"]][:want["count"]]
        fits = len(best) == want["count"]
        if fits and "color" in want:
            fits = all(found["color"] == want["color"] for found in best)
        if fits and "position" in want:
            relation, group = want["position"]
            fits = matched[group] is not None and all(
                relation in reference_position(a, b) for a in best for b in matched[group])
        matched.append(best if fits else None)
        good = good and fits
    names = [found["class"] for found in order]
    return good and all(names.count(no["class"]) < no["count"] for no in request.get("exclude", []))


def made_up_request(rng: np.random.Generator, task: str) -> dict:
    """A request of the published form."""
    a, b = rng.permutation(SHAPES)[:2].tolist()
    if task == "counting":
        n = int(rng.integers(2, 5))
        return {"tag": task, "include": [{"class": a, "count": n}], "exclude": [{"class": a, "count": n + 1}]}
    include = [{"class": a, "count": 1}]
    if task in ("two_object", "position", "color_attr"):
        include.append({"class": b, "count": 1})
    if task == "position":
        include[1]["position"] = [RELATIONS[rng.integers(4)], 0]
    if task in ("colors", "color_attr"):
        for clause in include:
            clause["color"] = COLORS[rng.integers(3)]
    return {"tag": task, "include": include}


def made_up_detections(rng: np.random.Generator, task: str) -> list[dict]:
    """Up to 8 boxes, often of the same few classes, scores and colours, some exactly on a threshold."""
    objects = []
    for _ in range(rng.integers(0, 9)):
        left, top, width, height = rng.integers([0, 0, 1, 1], [100, 100, 60, 60]).tolist()
        sure = 0.93 + 0.07 * rng.random() if task == "counting" else rng.random()
        score = float(rng.choice([sure, 0.3, 0.9, round(rng.random(), 1)], p=[0.7, 0.1, 0.1, 0.1]))
        name = SHAPES[rng.integers(2 if rng.random() < 0.7 else 4)]
        objects.append({"class": name, "score": score, "box": [left, top, left + width, top + height],
                        "color": COLORS[rng.integers(3)]})
    return objects


@pytest.mark.parametrize("task", TASKS)
def test_verdicts_are_those_of_a_second_writing_of_the_rules(task: str) -> None:
    rng, right, total = np.random.default_rng([7, TASKS.index(task)]), 0, 600
    for _ in range(total):
        request, objects = made_up_request(rng, task), made_up_detections(rng, task)
        # only the colours that were asked for are there
        asked = geneval.need_color(objects, request)
        some = [thing if thing in asked else {**thing, "color": ""} for thing in objects]
        good = geneval.verdict(some, request)
        assert good == reference_verdict(objects, request), (request, objects)
        right += good
    assert 0.02 * total < right < 0.98 * total              # the made-up pictures are no walk-over


def thing(name: str, score: float = 0.95, **color: str) -> dict:
    return {"class": name, "score": score, "box": [0, 0, 4, 4], **color}


def test_task_scores_against_hand_numbers() -> None:
    tasks = ["counting", "counting", "colors", "colors"]
    verdicts = [{"prompt": i, "task": tasks[i], "right": right} for i, right in (
        (0, True), (0, True), (1, False), (1, False),                           # shares 1 and 0
        (2, False), (2, False), (3, False), (3, True))]                         # shares 0 and 1/2
    assert [tuple(row.values()) for row in geneval.task_scores(verdicts)["tasks"]] == [
        ("counting", 0.5, pytest.approx(0.5), 2, 4), ("colors", 0.25, pytest.approx(0.25), 2, 4),
        ("overall", 0.375, pytest.approx(0.3125 ** 0.5 / 2), 4, 8)]
    assert geneval.task_scores(verdicts[:1])["tasks"][-1]["s.e."] is None


def noise_picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def save_detector(folder: Path) -> None:
    """A Mask2Former of a few thousand weights."""
    swin = SwinConfig(image_size=32, embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=4,
                      out_features=["stage1", "stage2", "stage3", "stage4"])
    model = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, dim_feedforward=16,
        encoder_feedforward_dim=16, encoder_layers=1, decoder_layers=2, num_attention_heads=2,
        num_queries=5, id2label=dict(enumerate(CLASSES))))
    nn.init.normal_(model.class_predictor.weight, std=0.5)                  # sure of some classes
    model.save_pretrained(folder)


def reference_detections(detector: geneval.Detector, image: Image.Image) -> list[tuple]:
    """All pairs of query and class above the threshold, whole masks first."""
    x, (h, w) = detector.prepare(image)
    with torch.no_grad():
        out = detector.model(pixel_values=x)
    probs = out.class_queries_logits[0].softmax(-1)[:, :4]                          # (Q, 4)
    masks = F.interpolate(out.masks_queries_logits, x.shape[-2:], mode="bilinear", align_corners=False)
    masks = F.interpolate(masks[..., :h, :w], image.size[::-1], mode="bilinear", align_corners=False)[0]
    found = []
    for mask, row in zip(masks, probs):
        inside = mask > 0
        quality = (mask.double().sigmoid() * inside).sum() / (inside.sum() + 1e-6)
        ys, xs = np.nonzero(inside.numpy())
        for name, prob in zip(detector.classes, row):
            box = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
            found.append((name, (prob * quality).item(), box, inside.numpy()))
    return sorted((f for f in found if f[1] > geneval.MIN_SCORE), key=lambda f: -f[1])


def test_the_detector_is_its_description(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # in place of 800, 1333 and 0.3
    for name, value in (("SHORT", 60), ("LONG", 100), ("MIN_SCORE", 0.03)):
        monkeypatch.setattr(geneval, name, value)
    save_detector(tmp_path)
    detector = geneval.Detector(str(tmp_path), CPU)
    image = noise_picture(44, 30)
    x, size = detector.prepare(image)
    assert x.shape == (1, 3, 64, 96) and size == (60, 88)
    assert not x[..., 60:, :].any() and not x[..., 88:].any()
    # PIL's levels may be one off
    levels = np.asarray(image.resize((88, 60), Image.Resampling.BILINEAR))                  # (60, 88, 3)
    seen = x[0, :, :60, :88].permute(1, 2, 0) * torch.tensor([58.395, 57.12, 57.375])
    assert np.abs(seen.numpy() + [123.675, 116.28, 103.53] - levels).max() < 1.01
    assert detector.prepare(image.resize((60, 30)))[1] == (50, 100)
    found, expected = detector(image), reference_detections(detector, image)
    assert 3 < len(expected) < geneval.TOP and [f["class"] for f in found] == [e[0] for e in expected]
    for thing, (_, score, box, inside) in zip(found, expected, strict=True):
        assert thing["score"] == pytest.approx(score, rel=1e-4) and thing["box"] == box
        assert np.array_equal(thing["mask"], inside)
    assert detector.classes == ["dog", "cup", "car", "computer mouse"]


def test_colors_are_the_nearest_mean_sentence(tmp_path: Path) -> None:
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 1}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1}
    config = {"embed_dim": 16, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    save_file(CLIP(**config).state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    namer = geneval.ColorNamer(tmp_path, CPU)
    image = noise_picture(60, 40)
    mask = np.random.default_rng(1).random((40, 60)) < 0.5
    alone = Image.fromarray(np.where(mask[..., None], image, 0x99).astype(np.uint8))
    for name, x in (("car", 1), ("dog", 15), ("car", 31)):
        thing = {"class": name, "box": [x, 2, x + 20, 30], "mask": Image.fromarray(mask)}
        assert np.array_equal(geneval.crop(image, thing), alone.crop(thing["box"]))
        texts = [[f"a photo of a {c} {name}", f"a photo of a {c}-colored {name}", f"a photo of a {c} object"]
                 for c in COLORS]
        with torch.no_grad():
            rows = [F.normalize(namer.clip.encode_text(namer.encode(text)), dim=-1).mean(0) for text in texts]
            sentences = F.normalize(torch.stack(rows), dim=-1)                          # (10, E)
            logits = sentences @ namer.clip.encode_image(namer.look(alone.crop(thing["box"]))[None])[0]
        assert namer(image, thing) == COLORS[logits.argmax().item()]


REQUESTS = [{"tag": "single_object", "prompt": "a photo of a dog", "include": [{"class": "dog", "count": 1}]},
            {"tag": "counting", "prompt": "a photo of two cups", "include": [{"class": "cup", "count": 2}],
             "exclude": [{"class": "cup", "count": 3}]},
            {"tag": "colors", "prompt": "a photo of a red car",
             "include": [{"class": "car", "count": 1, "color": "red"}]}]
SEEN = [[[thing("dog")], [thing("dog", 0.3)], [], [thing("cat")]],
        [[thing("cup")] * 2, [thing("cup")] * 3, [thing("cup")] * 2 + [thing("cup", 0.9)], [thing("cup")]],
        [[thing("car", 0.5, color="red")], [thing("car", 0.5, color="blue")],
         [thing("car", 0.4, color="red"), thing("car", 0.5, color="blue")], []]]
RIGHT = [True, False, False, False, True, False, True, False, True, False, False, False]
SIDE = 8


class Painter(nn.Module):
    """Stands in for ParaUni: a picture is one grey level, drawn from its seed."""
    device = CPU

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.batches, self.stop_at = [], -1

    def generate(self, prompts: list[str], num_steps: int, guidance_scale: float, seed: list[int],
                 images: None, layers: None) -> Tensor:
        if len(self.batches) == self.stop_at:
            raise KeyboardInterrupt
        self.batches.append(seed)
        levels = torch.tensor(seed) % 200 / 255                                         # (B,)
        return levels[:, None, None, None].expand(-1, 3, SIDE, SIDE)


@pytest.fixture
def painter(monkeypatch: pytest.MonkeyPatch) -> Painter:
    painter = Painter()
    monkeypatch.setattr(evaluation, "load", lambda *args: painter)
    return painter


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A finished folder of GenEval's layout."""
    for i, request in enumerate(REQUESTS):
        folder = tmp_path / f"images/{i:05}"
        (folder / "samples").mkdir(parents=True)
        (folder / "metadata.jsonl").write_text(json.dumps(request))
        for j in range(4):
            Image.new("RGB", (SIDE, SIDE), (50 * i + j,) * 3).save(folder / f"samples/{j:05}.png")
    return tmp_path / "images"


def detections(path: Path, detector: str = "made up") -> Path:
    items = {f"{i:05}/samples/{j:05}.png": objects
             for i, group in enumerate(SEEN) for j, objects in enumerate(group)}
    path.write_text(json.dumps({"judge": detector, "items": items}))
    return path


def score(out: Path, *flags: object) -> dict:
    return evaluate.main(["geneval", "--out", str(out), *map(str, flags)])


def test_pictures_are_drawn_in_geneval_s_layout_and_only_once(tmp_path: Path, painter: Painter) -> None:
    # a BOM, and a line of another file that JSON allows and Python's splitlines() cuts
    requests = [{**REQUESTS[0], "note": "\u2028"}, *REQUESTS[1:]]
    text = "\ufeff" + "\r\n".join(json.dumps(request, ensure_ascii=False) for request in requests)
    (tmp_path / "m.jsonl").write_text(text, encoding="utf-8")
    flags = ["--metadata", tmp_path / "m.jsonl", "--no-score", "--per-prompt", 2, "--batch-size", 4]
    score(tmp_path, *flags)
    score(tmp_path, *flags)
    assert [len(batch) for batch in painter.batches] == [4, 2]
    for i, request in enumerate(requests):
        assert json.loads((tmp_path / f"images/{i:05}/metadata.jsonl").read_text()) == request
        for j in range(2):
            grey = Image.open(tmp_path / f"images/{i:05}/samples/{j:05}.png").getpixel((0, 0))[0]
            assert grey == derive_seed(0, "geneval", i, j) % 200
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, REQUESTS[::-1])))
    for others in (flags, ["--no-score"]):                  # of another file, and nano's own
        with pytest.raises(Refused, match="00000/metadata.jsonl asks for something else"):
            score(tmp_path, *others)


def test_processes_share_the_files(tmp_path: Path, painter: Painter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "wait", lambda dist: None)
    jobs = [(tmp_path / f"{i}.png", "x", [i, 50 + i, 100 + i, 150 + i]) for i in range(5)]
    for rank, expected in ((1, {1, 3}), (0, {0, 1, 2, 3, 4})):
        evaluation.draw_files(geneval.GenevalConfig(out=str(tmp_path)), Dist(rank, 2, CPU), jobs)
        assert {int(path.stem) for path in tmp_path.glob("?.png")} == expected
    grid = np.asarray(Image.open(tmp_path / "3.png"))[:, :, 0]                      # (2 SIDE, 2 SIDE)
    assert grid[::SIDE, ::SIDE].tolist() == [[3, 53], [103, 153]]


def test_a_part_is_not_the_benchmark(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--images", images, "--detections", detections(tmp_path / "d.json")]
    result = score(tmp_path / "o", *flags)
    records = [json.loads(line) for line in (tmp_path / "o/verdicts.jsonl").read_text().splitlines()]
    assert [record["right"] for record in records] == RIGHT
    assert {row["task"]: row["right"] for row in result["tasks"][:-1]} == {
        "single_object": 0.25, "counting": 0.5, "colors": 0.25}
    assert "not the benchmark: 3 prompts that are not the published 553" in result["name"]
    assert len(score(tmp_path / "o", *flags, "--limit", 1)["tasks"]) == 2                   # one, and overall
    # the whole benchmark is called so with mmdet's detector only
    monkeypatch.setattr(geneval, "PROMPTS_DIGEST", geneval.prompts_digest(REQUESTS[::-1]))
    assert "not the benchmark: the detector is not" in score(tmp_path / "o", *flags)["name"]
    detections(tmp_path / "d.json", "mmdet mask2former_swin-s")
    assert score(tmp_path / "o", *flags)["name"] == "GenEval"
    (images / "00002/samples/00003.png").unlink()
    assert "not the benchmark: prompts without" in score(tmp_path / "o", *flags)["name"]


def test_missing_detections_and_coco_s_own_names_are_errors(tmp_path: Path, images: Path) -> None:
    path = detections(tmp_path / "d.json")
    text = path.read_text()
    for old, new, error in (("00000/samples/00000.png", "x", KeyError), ("cup", "mouse", Refused),
                            ("0.95", "95.0", Refused), ("0.95", "NaN", Refused)):
        path.write_text(text.replace(old, new))
        with pytest.raises(error, match="00000/samples/00000.png|mouse|got 95.0|got nan"):
            score(tmp_path / "o", "--images", images, "--detections", path)
    for second in ("one", "two"):
        detections(images / "1.json", "one")
        detections(images / "2.json", second)
        with pytest.raises(Refused, match="what one judge said"):
            score(tmp_path / "o", "--images", images, "--detections", images)


class FakeDetector:
    """Sees what SEEN says, by the grey level of the picture, but no colour; counts its pictures."""
    name, levels, classes = "fake", [], ["dog", "cup", "car"]

    def __call__(self, picture: Image.Image) -> list[dict]:
        level = picture.getpixel((0, 0))[0]
        self.levels.append(level)
        return [{key: entry[key] for key in entry if key != "color"} | {"mask": None}
                for entry in SEEN[level // 50][level % 50]]


class FakeColors:
    name = "fake"

    def __call__(self, picture: Image.Image, thing: dict) -> str:
        i, j = divmod(picture.getpixel((0, 0))[0], 50)
        return max(SEEN[i][j], key=lambda entry: entry["score"])["color"]


def test_only_new_pictures_are_judged(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geneval, "Detector", lambda *args: FakeDetector())
    monkeypatch.setattr(geneval, "ColorNamer", lambda *args: FakeColors())
    score(tmp_path / "o", "--images", images)
    lines = (tmp_path / "o/verdicts.jsonl").read_text().splitlines()
    assert len(FakeDetector.levels) == 12 and [json.loads(line)["right"] for line in lines] == RIGHT
    (tmp_path / "o/detections/00002.json").unlink()         # an evaluation that was stopped there
    Image.new("RGB", (SIDE, SIDE), (3, 3, 3)).save(images / "00000/samples/00000.png")
    FakeDetector.levels.clear()
    assert score(tmp_path / "o", "--images", images)["tasks"][0]["right"] == 0
    assert FakeDetector.levels == [3, 1, 2, 3, 100, 101, 102, 103]
