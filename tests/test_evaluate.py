"""evaluate.py: nano's benchmark and its resume, rewards before and after, pictures side by side and kept."""
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

import evaluate
import evaluation
from common import Refused, derive_seed, generator
from helpers import TINY, moved, save_stage, tiny_model
from model import PRESETS
from nano import world
from pictures import reward_table
from test_geneval import Painter

pytestmark = pytest.mark.usefixtures("tiny_preset")
PROMPTS = world.benchmark_prompts()


class ScenePainter(Painter):
    """Paints what is asked for where the seed is even, nothing where it is odd."""

    def generate(self, prompts: list[str], *args: float, seed: list[int], **more: None) -> Tensor:
        super().generate(prompts, *args, seed=seed, **more)
        scenes = [world.scene_for(np.random.default_rng(s), world.parse_prompt(text))
                  for text, s in zip(prompts, seed)]
        return world.render([world.Scene((), 0.5) if s % 2 else scene for s, scene in zip(seed, scenes)])


@pytest.fixture
def painter(monkeypatch: pytest.MonkeyPatch) -> Painter:
    painter = ScenePainter()
    monkeypatch.setattr(evaluation, "load", lambda *args: painter)
    return painter


def geneval(out: Path, *flags: str) -> dict:
    return evaluate.main(["geneval", "--out", str(out), "--limit", "8", "--per-prompt", "3",
                          "--batch-size", "7", *flags])


def test_verdicts_are_the_judges(tmp_path: Path, painter: Painter, monkeypatch: pytest.MonkeyPatch) -> None:
    result = geneval(tmp_path, "--seed", "-1")
    records = [json.loads(line) for line in (tmp_path / "verdicts.jsonl").read_text().splitlines()]
    assert [(r["prompt"], r["sample"]) for r in records] == [(75 * k, j) for k in range(8) for j in range(3)]
    assert all(r["right"] == (derive_seed(-1, "geneval", r["prompt"], r["sample"]) % 2 == 0) for r in records)
    assert {r["right"] for r in records} == {True, False}
    assert [len(batch) for batch in painter.batches] == [7, 7, 7, 3]
    # a part is not the benchmark
    assert "without exactly 4 pictures; 8 prompts of 600" in result["name"] and not result["benchmark"]
    assert json.loads((tmp_path / "geneval.json").read_text())["overall"] == result["overall"]
    # all prompts, here 6, and four pictures of each are
    monkeypatch.setattr(world, "benchmark_prompts", lambda: PROMPTS[::100])
    assert evaluate.main(["geneval", "--out", str(tmp_path / "all")])["name"] == "nano GenEval"


def test_a_stopped_evaluation_goes_on_under_the_same_settings(tmp_path: Path, painter: Painter) -> None:
    whole = geneval(tmp_path / "whole")
    painter.batches, painter.stop_at = [], 1
    with pytest.raises(KeyboardInterrupt):
        geneval(tmp_path / "part")
    painter.batches, painter.stop_at = [], -1
    assert geneval(tmp_path / "part") == whole
    assert [len(batch) for batch in painter.batches] == [7, 7, 3]
    # more pictures are no other setting
    assert geneval(tmp_path / "part", "--per-prompt", "4", "--batch-size", "64", "--no-score") == {}
    assert len(painter.batches[-1]) == 8
    with pytest.raises(Refused, match="-steps 20 -> 9, --guidance-scale 4.5 -> 3.0, --dtype fp32 -> bf16"):
        geneval(tmp_path / "part", "--guidance-scale", "3", "--num-steps", "9", "--dtype", "bf16")
    with torch.no_grad():
        painter.weight += 1e-7
    with pytest.raises(Refused, match="--weights sha256"):
        geneval(tmp_path / "part")


def test_paired_difference_against_hand_numbers() -> None:
    # differences 1 0 2 1
    scores = {"clip": [1.0, 2.0, 9.0, 3.0, 4.0]}, {"clip": [2.0, 2.0, float("nan"), 5.0, 5.0]}
    row, = evaluate.paired(*scores)
    half = 1.96 * (2 / 3) ** 0.5 / 2
    assert row == {"measure": "clip", "before": 2.5, "before s.e.": pytest.approx((5 / 3) ** 0.5 / 2),
                   "after": 3.5, "after s.e.": pytest.approx(3 ** 0.5 / 2), "change": 1,
                   "95 % from": pytest.approx(1 - half), "to": pytest.approx(1 + half), "n": 4}
    # the table at the end of a phase
    line = reward_table(*scores).split("\n")[1]
    assert line.split() == ["clip", "2.5000", "3.5000", "+1.0000", "0.4082", "4"]


@pytest.fixture(scope="module")
def two_files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Stage files of two models that draw different pictures; the second one's run began with the first."""
    files: list[str] = []
    for seed in range(2):
        folder = tmp_path_factory.mktemp("file")
        files.append(str(save_stage(moved(tiny_model(), 0.3, seed), folder, 3, init="".join(files))))
    return files


def test_rewards_before_and_after(tmp_path: Path, two_files: list[str]) -> None:
    (tmp_path / "own.py").write_text(
        "def light(images, prompts):\n    return images.mean((1, 2, 3))\n"
        "one = lambda images, prompts: images.mean()[None]\n"
        "def holes(images, prompts):\n"
        "    return images.new_tensor([float('nan') if 'moon' in p else 0 for p in prompts])\n")
    (tmp_path / "p.txt").write_text("a ring\ntwo moons\na red star\na heart\n")

    def rewards(after: str, names: tuple[str, ...] = ("light", "holes")) -> dict:
        return evaluate.main(["rewards", "--weights", "random", "--num-steps", "1", "--out", str(tmp_path),
                              "--baseline", two_files[0] * (after == two_files[0]), "--stage-file", after,
                              "--prompts", f"{tmp_path}/p.txt", "--limit", "3",
                              "--rewards", ",".join(f"{tmp_path}/own.py:{name}" for name in names)])
    same, other = rewards(two_files[0]), rewards(two_files[1])
    assert same["rewards"][0]["95 % from"] == same["rewards"][0]["to"] == 0
    assert same["before"] == other["before"]
    a, b = (torch.tensor(other[when]["light"]) for when in ("before", "after"))
    assert other["prompts"] == ["a ring", "two moons", "a red star"] and len(a) == 3 and (a != b).all()
    assert other["rewards"][0]["change"] == pytest.approx((b - a).mean().item(), abs=1e-6)
    assert other["rewards"][1]["n"] == 2 and other["after"]["holes"] == [0, None, 0]
    assert json.loads((tmp_path / "rewards.json").read_text())["after"] == other["after"]
    with pytest.raises(Refused, match="one number per image"):
        rewards(two_files[0], ("one",))


def test_psnr_and_ssim_are_those_of_scikit_image() -> None:
    rng = generator("pictures")
    a = torch.rand(3, 3, 33, 40, generator=rng)
    b = torch.stack([(a[0] + 0.05).clamp(max=1), 1 - a[1], torch.rand(3, 33, 40, generator=rng)])
    for k in range(3):
        x, y = (t[k].permute(1, 2, 0).double().numpy() for t in (a, b))
        similar = structural_similarity(x, y, channel_axis=2, data_range=1.0)
        assert evaluate.ssim(a, b)[k].item() == pytest.approx(similar, abs=1e-6)
        decibel = peak_signal_noise_ratio(x, y, data_range=1.0)
        assert evaluate.psnr(a, b)[k].item() == pytest.approx(decibel, abs=1e-6)


def test_the_last_layer_is_compared_with_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, originals, model = [], world.question_set(3)[0], tiny_model()

    def generate(prompts: list[str], num_steps: int, guidance_scale: float, seed: list[int], images: Tensor,
                 layers: list[int] | None) -> Tensor:
        seen.append((prompts, layers, tuple(seed)))
        return images + (0.1 if layers else 0.05)           # all layers are nearer

    monkeypatch.setattr(model, "generate", generate)
    monkeypatch.setattr(evaluate, "load", lambda *args: model)
    result = evaluate.main(["reconstruct", "--count", "3", "--batch-size", "2", "--out", str(tmp_path)])
    prompts, layers, seeds = zip(*seen)
    assert list(map(len, prompts)) == [2, 1, 2, 1] and layers == (None, None, [4], [4])
    assert set(sum(prompts, [])) == {"Keep the image as it is."}
    # from the same noise, each picture from its own
    assert seeds[:2] == seeds[2:] and len(set(sum(seeds, ()))) == 3
    row, similar, clip = result["table"]                    # -20 log10 of 0.1, 0.05
    assert row["n"] == 3 and [row["before"], row["after"]] == pytest.approx([20, 26.0206], abs=1e-4)
    assert similar["change"] > 0 and -1 <= clip["before"] <= 1
    rolled = evaluate.ssim(originals.roll(1, 0), originals).mean().item()
    assert result["ends"][1]["before"] == pytest.approx(rolled)
    # a model that was trained so is one of its own, and reads what it was trained with; in a fork of nano too
    files = []
    monkeypatch.setitem(PRESETS, "fork", TINY)
    monkeypatch.setattr(evaluate, "load", lambda cfg, device, *file: files.append(file) or model)
    evaluate.main([*"reconstruct --preset fork --count 3 --last-layer-file own --out".split(), str(tmp_path)])
    assert files == [(), ("own",)] and [layers for _, layers, _ in seen[4:]] == [None, None]


def test_pictures_of_ones_own_are_cropped_and_kept(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / ".DS_Store").touch()                  # as macOS does
    for i in range(2):
        Image.new("RGB", (40, 50 + i), (80 * i, 40, 200)).save(tmp_path / "p" / f"{i}.jpg")
    result = evaluate.main(["reconstruct", "--weights", "random", "--num-steps", "1",
                            "--images", str(tmp_path / "p"), "--out", str(tmp_path)])
    assert result["table"][0]["n"] == 2 and abs(result["ends"][0]["before"] - 14.84) < 0.1
    evaluate.save_sheet(tmp_path / "sheet.png", torch.zeros(1, 3, 8, 8), 1, ["$^$"], ["$^$"])   # no formula


@pytest.mark.parametrize("argv", [["--limit", "3", "geneval"], ["reconstruct"],
                                  ["rewards", "--baseline", "none"], ["reconstruct", "--images", "."]])
def test_missing_data_is_refused(argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No preset but nano has pictures and prompts of its own; an empty folder has none either."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "load", lambda *args: SimpleNamespace(preset=PRESETS["l-1024"]))
    with pytest.raises(Refused, match="--help|--images|--prompts"):
        evaluate.main([*argv, "--preset", "l-1024"])
