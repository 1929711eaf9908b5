"""benchmarks.py and judges.py: GenEval and DPG-Bench at full size with small stand-ins; the detector's
post-processing, the colour crops and the answering model against plain second writings."""
import json
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import benchmarks
import evaluate
import judges
import rewards
import scoring
from common import Dist, derive_seed
from scoring import COLORS, NAMES, Found

REQUESTS = [
    {"tag": "single_object", "prompt": "a photo of a dog", "include": [{"class": "dog", "count": 1}]},
    {"tag": "counting", "prompt": "a photo of two cups", "include": [{"class": "cup", "count": 2}],
     "exclude": [{"class": "cup", "count": 3}]},
    {"tag": "colors", "prompt": "a photo of a red car",
     "include": [{"class": "car", "count": 1, "color": "red"}]}]
SIDE, ALONE = 8, Dist(0, 1, 0, torch.device("cpu"))


class Painter(nn.Module):
    """Stands in for ParaUni: a picture is one grey level, drawn from its seed."""
    device, preset = torch.device("cpu"), SimpleNamespace(image_size=SIDE)

    def __init__(self, stop_at: int = -1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.batches, self.stop_at = [], stop_at

    def generate(self, prompts: list[str], num_steps: int, guidance_scale: float, seed: list[int]) -> Tensor:
        if len(self.batches) == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        self.batches.append(list(zip(prompts, seed)))
        return torch.tensor([s % 200 / 255 for s in seed]).view(-1, 1, 1, 1).expand(-1, 3, SIDE, SIDE)


@pytest.fixture
def painter(monkeypatch: pytest.MonkeyPatch) -> Painter:
    painter = Painter()
    monkeypatch.setattr(evaluate, "load_model", lambda *args: painter)
    return painter


@pytest.fixture
def metadata(tmp_path: Path) -> Path:
    path = tmp_path / "metadata.jsonl"
    path.write_text("\n".join(map(json.dumps, REQUESTS)))
    return path


def grey(path: Path) -> int:
    return int(np.asarray(Image.open(path))[0, 0, 0])


def folder_of(root: Path, per_prompt: int = 4) -> Path:
    """A finished folder of GenEval's layout."""
    for i, request in enumerate(REQUESTS):
        (root / f"{i:05}" / "samples").mkdir(parents=True)
        (root / f"{i:05}" / "metadata.jsonl").write_text(json.dumps(request))
        for j in range(per_prompt):
            level = 50 * i + j
            Image.new("RGB", (SIDE, SIDE), (level, level, level)).save(root / f"{i:05}/samples/{j:05}.png")
    return root


def thing(name: str, score: float = 0.95, color: str | None = None) -> dict:
    return {"class": name, "score": score, "box": [0, 0, 4, 4], **({"color": color} if color else {})}


SEEN = [[[thing("dog")], [thing("dog", 0.3)], [], [thing("cat")]],
        [[thing("cup")] * 2, [thing("cup")] * 3, [thing("cup")] * 2 + [thing("cup", 0.9)], [thing("cup")]],
        [[thing("car", 0.5, "red")], [thing("car", 0.5, "blue")], [thing("car", 0.4, "red"),
                                                                  thing("car", 0.5, "blue")], []]]
RIGHT = [True, False, False, False, True, False, True, False, True, False, False, False]


def detections(path: Path, seen: list = SEEN) -> Path:
    pictures = {f"{i:05}/samples/{j:05}.png": {"objects": objects}
                for i, group in enumerate(seen) for j, objects in enumerate(group)}
    path.write_text(json.dumps({"detector": "made up", "pictures": pictures}))
    return path


def score(out: Path, *flags: object) -> dict:
    return evaluate.main(["geneval", "--out", str(out), *map(str, flags)])


# ----------------------------------------------------------------------------- pictures

def test_pictures_are_drawn_in_geneval_s_layout_and_only_once(tmp_path: Path, metadata: Path,
                                                              painter: Painter) -> None:
    def draw(*flags: object) -> dict:
        return score(tmp_path / "o", "--metadata", metadata, "--no-score", "--per-prompt", 2,
                     "--batch-size", 4, *flags)
    assert draw() == {} and [len(batch) for batch in painter.batches] == [4, 2]
    for i, request in enumerate(REQUESTS):
        assert json.loads((tmp_path / f"o/images/{i:05}/metadata.jsonl").read_text()) == request
        for j in range(2):
            level = grey(tmp_path / f"o/images/{i:05}/samples/{j:05}.png")
            assert level == derive_seed(0, "geneval", i, j) % 200
    assert painter.batches[1][1] == ("a photo of a red car", derive_seed(0, "geneval", 2, 1))
    (tmp_path / "o/images/00001/samples/00000.png").unlink()
    painter.batches = []
    draw("--batch-size", 1)
    assert painter.batches == [[("a photo of two cups", derive_seed(0, "geneval", 1, 0))]]
    with pytest.raises(ValueError, match="settings.json is of other settings .--seed 0 -> 1.: give those"):
        draw("--seed", 1)
    metadata.write_text("\n".join(map(json.dumps, REQUESTS[::-1])))
    with pytest.raises(ValueError, match="00000/metadata.jsonl does not match --metadata: it asks for 'a"):
        draw()


def test_drawing_that_was_stopped_goes_on(tmp_path: Path, metadata: Path, painter: Painter,
                                          capsys: pytest.CaptureFixture) -> None:
    flags = ["--metadata", metadata, "--no-score", "--batch-size", 5]
    painter.stop_at = 1
    assert score(tmp_path, *flags) == {} and "stopped with 2 files to go" in capsys.readouterr().out
    assert len(list(tmp_path.glob("images/*/samples/*.png"))) == 10
    painter.batches, painter.stop_at = [], -1
    score(tmp_path, *flags)
    assert [len(batch) for batch in painter.batches] == [2]


def test_two_processes_share_the_work(tmp_path: Path, painter: Painter,
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks, "any_rank", lambda flag, dist: flag)
    cfg = benchmarks.DpgConfig(out=str(tmp_path))
    jobs = [benchmarks.Job(tmp_path / f"{i}.png", "x", (i, 50 + i, 100 + i, 150 + i)) for i in range(5)]
    for rank, expected in ((1, {1, 3}), (0, {0, 1, 2, 3, 4})):
        assert benchmarks.draw_files(cfg, Dist(rank, 2, rank, torch.device("cpu")), jobs)
        assert {int(path.stem) for path in tmp_path.glob("?.png")} == expected
    grid = np.asarray(Image.open(tmp_path / "3.png"))[:, :, 0]                          # (2 SIDE, 2 SIDE)
    assert [grid[0, 0], grid[0, -1], grid[-1, 0], grid[-1, -1]] == [3, 53, 103, 153]
    assert [np.asarray(tile)[0, 0, 0] for tile in benchmarks.tiles(tmp_path / "3.png")] == [3, 53, 103, 153]


@pytest.mark.parametrize(("spoil", "sentence"), [
    (lambda p: p.write_bytes(p.read_bytes()[:45]), "cannot be read as a picture .*: remove it and run again"),
    (lambda p: Image.new("RGB", (SIDE, 9)).save(p), "to be 8 x 8 pixels, it is 8 x 9: remove it"),
])
def test_a_spoilt_picture_is_named_before_more_is_drawn(tmp_path: Path, metadata: Path, painter: Painter,
                                                        spoil: object, sentence: str) -> None:
    flags = ["--metadata", metadata, "--no-score", "--per-prompt", 1]
    score(tmp_path, *flags)
    painter.batches = []
    spoil(tmp_path / "images/00001/samples/00000.png")
    with pytest.raises(ValueError, match=f"00001/samples/00000.png {sentence}"):
        score(tmp_path, *flags)
    assert not painter.batches


# ----------------------------------------------------------------------------- scores of ready detections

def test_ready_detections_are_scored_without_weights(tmp_path: Path, capsys: pytest.CaptureFixture,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    folder, found = folder_of(tmp_path / "images"), detections(tmp_path / "d.json")
    result = score(tmp_path / "o", "--images", folder, "--detections", found)
    records = [json.loads(line) for line in (tmp_path / "o/verdicts.jsonl").read_text().splitlines()]
    assert [record["right"] for record in records] == RIGHT and records[5]["reason"] == (
        "expected fewer than 3 cup, found 3")
    assert {task: row["right"] for task, row in result["tasks"].items()} == {
        "single_object": 0.25, "counting": 0.5, "colors": 0.25}
    assert result["overall"]["right"] == pytest.approx(1 / 3) and not result["benchmark"]
    said = capsys.readouterr().out
    assert "GenEval's rules, not the benchmark (3 prompts that are not the published 553)" in said
    assert "detector made up" in said
    monkeypatch.setattr(benchmarks, "GENEVAL_DIGEST", scoring.geneval_digest(REQUESTS))
    assert score(tmp_path / "o", "--images", folder, "--detections", found)["name"] == "GenEval"
    (folder / "00002/samples/00003.png").unlink()
    Image.new("RGB", (9, 9)).save(folder / "00001/samples/00003.png")
    assert score(tmp_path / "o", "--images", folder, "--detections", found)["name"] == (
        "GenEval's rules, not the benchmark (1 prompts without exactly 4 pictures, as 00002; "
        "pictures of 2 sizes, as 8 x 8, 9 x 9)")


@pytest.mark.parametrize(("spoil", "sentence"), [
    (lambda f: (f / "00001/metadata.jsonl").unlink(), "expected .*00001/metadata.jsonl, found none"),
    (lambda f: (f / "00001/metadata.jsonl").write_text("{"), "line 1 of .*metadata.jsonl .* is not JSON"),
    (lambda f: (f / "00001/samples/00001.png").write_bytes(b"no"), "00001/samples/00001.png cannot be read"),
    (lambda f: (f / "00001/samples/00001.png").rename(f / "00001/samples/b.jpg"), "b.jpg is not named as"),
    (lambda f: (f / "00001/samples/00001.png").rename(f / "00001/samples/00007.png"),
     "no detections of 00001/samples/00007.png in .*d.json"),
    (lambda f: (f / "00007").mkdir(), "expected .*00007/metadata.jsonl, found none"),
])
def test_a_bad_folder_is_named(tmp_path: Path, spoil: object, sentence: str) -> None:
    folder, found = folder_of(tmp_path / "images"), detections(tmp_path / "d.json")
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        score(tmp_path / "o", "--images", folder, "--detections", found)


def test_detections_of_other_pictures_are_refused(tmp_path: Path) -> None:
    folder, found = folder_of(tmp_path / "images", per_prompt=1), detections(tmp_path / "d.json")
    data = json.loads(found.read_text())
    data["pictures"]["00000/samples/00000.png"]["sha256"] = "0" * 64
    found.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="detections of 00000/samples/00000.png are of another picture"):
        score(tmp_path / "o", "--images", folder, "--detections", found)


@pytest.mark.parametrize(("flags", "sentence"), [
    (["--images", "nothing"], "expected a folder with 00000/metadata.jsonl.* found none in nothing"),
    (["--images", "{images}", "--detections", "nothing"], "found no nothing"),
    (["--images", "{images}", "--detector", "{tmp}"], "--detector to name a model with weights, found no"),
    (["--images", "{images}", "--detector", "no/such"], "no/such is no folder and cannot be fetched"),
    (["--images", "{images}", "--no-score"], "expected --images to be scored"),
    (["--preset", "b-512", "--metadata", "nothing"], "expected --metadata to name a file, found no file"),
])
def test_mistakes_are_one_sentence(tmp_path: Path, flags: list[str], sentence: str) -> None:
    folder_of(tmp_path / "images", per_prompt=1)
    flags = [flag.format(images=tmp_path / "images", tmp=tmp_path) for flag in flags]
    with pytest.raises((ValueError, FileNotFoundError), match=sentence) as error:
        score(tmp_path / "o", *flags)
    assert "\n" not in str(error.value)


def test_a_public_file_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io
    import urllib.request
    asked = []
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: asked.append(url) or io.BytesIO(b"x"))
    for _ in range(2):
        path = benchmarks.fetched("", "https://host/dir/file.csv", str(tmp_path), "--questions", ALONE)
        assert path == str(tmp_path / "file.csv") and Path(path).read_bytes() == b"x"
    assert asked == ["https://host/dir/file.csv"] and benchmarks.fetched("mine", "", "", "", ALONE) == "mine"

    def offline(url: str, timeout: float) -> None:
        raise OSError("no route")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    with pytest.raises(FileNotFoundError, match="cannot fetch https://host/b .no route.: .* name it with"):
        benchmarks.fetched("", "https://host/b", str(tmp_path), "--metadata", ALONE)


# ----------------------------------------------------------------------------- detecting

class FakeDetector:
    """Sees what SEEN says, by the grey level of the picture; counts its pictures."""
    seen: list[str] = []
    name = "fake"

    def __init__(self, source: str, device: torch.device) -> None:
        self.source = source

    def __call__(self, picture: Image.Image) -> list[Found]:
        level = picture.getpixel((0, 0))[0]
        self.seen.append(level)
        objects = SEEN[level // 50][level % 50]
        return [scoring.read_found({key: value for key, value in entry.items() if key != "color"}, "")
                for entry in objects]


class FakeColors(FakeDetector):
    name = "fake colours"

    def __call__(self, picture: Image.Image, found: list[Found]) -> list[Found]:
        level = picture.getpixel((0, 0))[0]
        best = max(SEEN[level // 50][level % 50], key=lambda entry: entry["score"])
        return [Found(f.name, f.score, f.box, f.mask, best["color"]) for f in found]


def test_detections_are_kept_and_only_what_changed_is_looked_at_again(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judges, "Detector", FakeDetector)
    monkeypatch.setattr(judges, "ColorNamer", FakeColors)
    monkeypatch.setattr(FakeDetector, "seen", [])
    folder = folder_of(tmp_path / "images")
    result = score(tmp_path / "o", "--images", folder)
    assert len(FakeDetector.seen) == 12 and result["detector"] == "fake"
    lines = (tmp_path / "o/verdicts.jsonl").read_text().splitlines()
    assert [json.loads(line)["right"] for line in lines] == RIGHT
    (tmp_path / "o/detections/00002.json").unlink()         # an evaluation that was stopped there
    Image.new("RGB", (SIDE, SIDE), (3, 3, 3)).save(folder / "00000/samples/00000.png")
    FakeDetector.seen.clear()
    again = score(tmp_path / "o", "--images", folder)
    assert FakeDetector.seen == [3, 100, 101, 102, 103]
    assert again["tasks"]["single_object"]["right"] == 0
    assert again["tasks"]["colors"] == result["tasks"]["colors"]
    for path in (folder / "00001/samples").iterdir():       # a prompt without pictures
        path.unlink()
    monkeypatch.setattr(FakeDetector, "name", "another")    # not mixed with the first one's
    FakeDetector.seen.clear()
    result = score(tmp_path / "o", "--images", folder)
    assert len(FakeDetector.seen) == 8 and "1 prompts without exactly 4 pictures, as 00001" in result["name"]
    assert list(result["tasks"]) == ["single_object", "colors"]


def test_run_lengths_go_there_and_back() -> None:
    mask = np.array([[1, 0, 0], [1, 1, 0]], dtype=bool)
    assert judges.run_lengths(mask) == {"size": [2, 3], "counts": [0, 2, 1, 1, 2]}      # down the columns
    rng = np.random.default_rng(0)
    for share in (0.0, 0.1, 0.5, 1.0):
        mask = rng.random((5, 7)) < share
        assert np.array_equal(judges.mask_of(judges.run_lengths(mask)), mask)


@pytest.fixture(scope="module")
def detector_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mask2Former of a few thousand weights."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
    back = {new: old for old, new in judges.RENAMED.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        swin = SwinConfig(image_size=32, embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=4,
                          out_features=["stage1", "stage2", "stage3", "stage4"])
        model = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(
            backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32,
            encoder_feedforward_dim=16, dim_feedforward=16, encoder_layers=1, decoder_layers=2,
            num_attention_heads=2, num_queries=5,
            id2label={i: back.get(name, name) for i, name in enumerate(NAMES)}))
        nn.init.normal_(model.class_predictor.weight, std=0.5)                          # sure of some classes
    folder = tmp_path_factory.mktemp("detector")
    model.save_pretrained(folder)
    return folder


def reference_detections(detector: judges.Detector, image: Image.Image) -> list[tuple]:
    """All pairs of query and class above the threshold, whole masks first."""
    x, (h, w) = detector.prepare(image)
    with torch.no_grad():
        out = detector.model(pixel_values=x)
    probs = out.class_queries_logits[0].softmax(-1)[:, :80]                             # (Q, 80)
    masks = F.interpolate(out.masks_queries_logits, x.shape[-2:], mode="bilinear", align_corners=False)
    masks = F.interpolate(masks[..., :h, :w], image.size[::-1], mode="bilinear", align_corners=False)[0]
    found = []
    for query, mask in enumerate(masks):
        inside = (mask > 0).double()
        quality = (mask.double().sigmoid() * inside).sum() / (inside.sum() + 1e-6)
        ys, xs = np.nonzero(inside.numpy())
        for label in range(80):
            score = (probs[query, label] * quality).item()
            if score > judges.MIN_SCORE:
                found.append((NAMES[label], score, (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1), inside))
    return sorted(found, key=lambda f: -f[1])


def test_the_detector_is_its_description(detector_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judges, "SHORT", 60)                # in place of 800 and 1333 pixels
    monkeypatch.setattr(judges, "LONG", 100)
    monkeypatch.setattr(judges, "MIN_SCORE", 0.03)
    detector = judges.Detector(str(detector_folder), torch.device("cpu"))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 44, 3), dtype=np.uint8))
    x, size = detector.prepare(image)
    assert x.shape == (1, 3, 64, 96) and size == (60, 88)
    assert not x[..., 60:, :].any() and not x[..., 88:].any()
    assert detector.prepare(image.resize((60, 30)))[1] == (50, 100)
    found, expected = detector(image), reference_detections(detector, image)
    assert 3 < len(expected) < judges.TOP and [f.name for f in found] == [e[0] for e in expected]
    for f, (_, score, box, inside) in zip(found, expected, strict=True):
        assert f.score == pytest.approx(score, rel=1e-4) and f.box == tuple(map(float, box))
        assert np.array_equal(judges.mask_of(f.mask), inside.numpy().astype(bool))
    assert re.fullmatch(rf"{detector_folder} sha256:[0-9a-f]{{16}}", detector.name)


def test_a_detector_of_other_classes_or_without_all_weights_is_refused(tmp_path: Path,
                                                                       detector_folder: Path) -> None:
    from safetensors.torch import load_file, save_file
    config = json.loads((detector_folder / "config.json").read_text())
    state = load_file(detector_folder / "model.safetensors")
    config["id2label"] |= {"0": "robot"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="COCO's 80 classes in their order, .* knows 80: robot, bicycle"):
        judges.Detector(str(tmp_path), torch.device("cpu"))
    del state["class_predictor.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lack 1 tensors, .*: class_predictor.weight"):
        judges.Detector(str(tmp_path), torch.device("cpu"))


def test_a_crop_is_grey_outside_the_mask() -> None:
    pixels = np.arange(6 * 5 * 3, dtype=np.uint8).reshape(6, 5, 3)
    mask = np.zeros((6, 5), dtype=bool)
    mask[1:4, 2:4] = True
    box = (1.6, 1.4, 4.4, 4.0)                              # PIL rounds it to 2, 1, 4, 4
    got = np.asarray(judges.crop(Image.fromarray(pixels), Found("dog", 1, box, judges.run_lengths(mask))))
    assert np.array_equal(got, np.where(mask[..., None], pixels, 0x99)[1:4, 2:4])
    whole = judges.crop(Image.fromarray(pixels), Found("dog", 1, (1.0, 1.0, 1.2, 1.3)))
    assert np.array_equal(np.asarray(whole), pixels[1:2, 1:2])          # no mask; a pixel at least
    with pytest.raises(ValueError, match="the mask of a dog is of .6, 5. pixels, its picture of .5, 5."):
        judges.crop(Image.new("RGB", (5, 5)), Found("dog", 1, box, judges.run_lengths(mask)))


def test_colors_are_the_nearest_mean_sentence(tmp_path: Path) -> None:
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 1}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1}
    cfg = {"model_cfg": {"embed_dim": 16, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        rewards.save_reward(tmp_path, rewards.build_clip(cfg), cfg)
    namer = judges.ColorNamer(str(tmp_path), torch.device("cpu"))
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8))
    found = [Found(name, 0.9, (x, 2.0, x + 20.0, 30.0))
             for name, x in (("car", 1.0), ("dog", 15.0), ("car", 31.0))]
    named = namer(image, found)
    assert [(n.name, n.box) for n in named] == [(f.name, f.box) for f in found]
    for thing_ in named:
        texts = [[f"a photo of a {c} {thing_.name}", f"a photo of a {c}-colored {thing_.name}",
                  f"a photo of a {c} object"] for c in COLORS]
        with torch.no_grad():
            means = torch.stack([F.normalize(namer.clip.encode_text(namer.encode(t)), dim=-1).mean(0)
                                 for t in texts])
            pixels = namer.look(image.crop(tuple(map(int, thing_.box))))[None]
            logits = F.normalize(namer.clip.encode_image(pixels), dim=-1) @ F.normalize(means, dim=-1).T
        assert thing_.color == COLORS[logits.argmax().item()]


# ----------------------------------------------------------------------------- dpg

DPG = ",".join(scoring.DPG_COLUMNS) + """
a1,two dogs,k,1,0,entity,whole,entity - whole (dog),Is there a dog?
a1,two dogs,k,2,1,other,count,"other - count (dogs, two)",Are there two?
b_2,a red cup,k,1,0,entity,whole,entity - whole (cup),Is there a cup?
"""


class FakeAnswerer:
    """Yes in light pictures; counts its questions."""
    name, asked = "fake", []

    def __init__(self, source: str, device: torch.device) -> None:
        self.source = source

    def __call__(self, picture: Image.Image, questions: list[str]) -> list[str]:
        self.asked.append(len(questions))
        assert picture.size == (SIDE, SIDE)
        return ["yes" if picture.getpixel((0, 0))[0] > 100 else "no"] * len(questions)


def dpg(out: Path, *flags: object) -> dict:
    (out / "q.csv").write_text(DPG)
    return evaluate.main(["dpg", "--preset", "b-512", "--questions", str(out / "q.csv"), "--out", str(out),
                          *map(str, flags)])


def test_dpg_draws_asks_and_scores_and_goes_on(tmp_path: Path, painter: Painter,
                                               monkeypatch: pytest.MonkeyPatch,
                                               capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(judges, "Answerer", FakeAnswerer)
    monkeypatch.setattr(FakeAnswerer, "asked", [])
    result = dpg(tmp_path)
    light = {name: [derive_seed(0, "dpg", name, k) % 200 > 100 for k in range(4)] for name in ("a1", "b_2")}
    assert result["score"] == pytest.approx(100 * np.mean([np.mean(light["a1"]), np.mean(light["b_2"])]))
    assert FakeAnswerer.asked == [2] * 4 + [1] * 4 and result["judge"] == "fake" and not result["benchmark"]
    said = capsys.readouterr().out
    assert "not the benchmark (2 prompts scored, the benchmark has 1065)" in said
    assert "judge fake; the official one is mPLUG-large" in said
    (tmp_path / "answers/b_2.json").unlink()
    FakeAnswerer.asked.clear()
    painter.batches = []
    assert dpg(tmp_path)["prompts"] == result["prompts"]
    assert FakeAnswerer.asked == [1] * 4 and not painter.batches
    (tmp_path / "images/a1.png").unlink()                   # the rest of another model's folder
    assert dpg(tmp_path, "--images", tmp_path / "images")["prompts"] == {"b_2": result["prompts"]["b_2"]}


def test_ready_answers_are_scored_alone(tmp_path: Path) -> None:
    answers = {"a1": {"tiles": [{"1": "yes", "2": "no"}, {"1": "no", "2": "yes"}]}}
    (tmp_path / "a.json").write_text(json.dumps({"judge": "made up", "items": answers}))
    flags = ["--images", tmp_path, "--answers", tmp_path / "a.json"]
    result = dpg(tmp_path, *flags)
    assert result["score"] == 25 and list(result["prompts"]) == ["a1"] and result["error"] is None
    assert result["categories"]["entity"] == {"yes": 50, "n": 2}
    quirks = dpg(tmp_path, *flags, "--official-quirks")     # proposition 1 of a1 is lost with the first row
    assert quirks["dropped"] == ["a1"] and quirks["score"] is None
    del answers["a1"]["tiles"][1]["2"]
    (tmp_path / "a.json").write_text(json.dumps({"judge": "made up", "items": answers}))
    with pytest.raises(ValueError, match="a.json .--answers., a1 lacks '2'"):
        dpg(tmp_path, *flags)
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ValueError, match="expected .*a.json .--answers. to be"):
        dpg(tmp_path, *flags)


def test_bad_grids_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judges, "Answerer", FakeAnswerer)
    (tmp_path / "grids").mkdir()
    with pytest.raises(FileNotFoundError, match="expected grids called a1.png, ... in .*grids, found none"):
        dpg(tmp_path, "--images", tmp_path / "grids")
    Image.new("RGB", (16, 15)).save(tmp_path / "grids" / "a1.png")
    with pytest.raises(ValueError, match="a1.png to be a square of 2 x 2 pictures, it is 16 x 15 pixels"):
        dpg(tmp_path, "--images", tmp_path / "grids")


def test_the_answering_model_answers_as_transformers_does(tmp_path: Path) -> None:
    from transformers import (BertTokenizer, BlipConfig, BlipForQuestionAnswering, BlipImageProcessor,
                              BlipProcessor)
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] [DEC] is there a dog yes no ?".split()
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    text = {"vocab_size": len(words), "hidden_size": 16, "encoder_hidden_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "intermediate_size": 16, "projection_dim": 16, "bos_token_id": 5,
            "pad_token_id": 0, "eos_token_id": 3, "sep_token_id": 3}
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
              "image_size": 32, "patch_size": 8, "projection_dim": 16}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = BlipForQuestionAnswering(BlipConfig(text_config=text, vision_config=vision)).eval()
    model.save_pretrained(tmp_path / "m")
    processor = BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}),
                              BertTokenizer(str(tmp_path / "vocab.txt")))
    processor.save_pretrained(tmp_path / "m")
    answerer = judges.Answerer(str(tmp_path / "m"), torch.device("cpu"))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    asked = ["is there a dog?", "is a dog there?"]
    expected = []
    for question in asked:
        with torch.no_grad():
            inputs = processor(images=image, text=question, return_tensors="pt")
            out = model.generate(**inputs, max_new_tokens=10)
        expected.append(processor.decode(out[0], skip_special_tokens=True).strip().rstrip(".").lower())
    assert answerer(image, asked) == expected and any(expected)
