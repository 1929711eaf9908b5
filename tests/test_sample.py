"""sample.py: the files it writes, the question it asks, what it refuses."""
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sample
from common import Refused
from helpers import moved, save_stage, tiny_model
from model import ParaUni

pytestmark = pytest.mark.usefixtures("tiny_preset")
RANDOM = ["--weights", "random", "--num-steps", "1"]


def pixels(path: Path) -> np.ndarray:
    return np.array(Image.open(path)).astype(int)


def test_pictures_and_their_names(tmp_path: Path, tiny_weights: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "list.txt").write_text("\ufefftwo moons\r\n\r\n", encoding="utf-8")
    flags = ["--prompts", str(tmp_path / "list.txt"), "--out", str(tmp_path / "new/pictures"), "--seed", "-1",
             "--weights", str(tiny_weights), "--num-steps", "2"]
    paths = sample.main(["A red heart, left of a star.", *flags])
    assert [path.name for path in paths] == ["000-a-red-heart-left-of-a-star.png", "001-two-moons.png",
                                             "grid.png"]
    assert capsys.readouterr().out.split() == [str(path) for path in paths]
    images = tiny_model().generate(["A red heart, left of a star.", "two moons"], 2, seed=-1)
    for path, image in zip(paths, images):
        levels = (image * 255).round().permute(1, 2, 0).numpy().astype(int)
        assert np.abs(pixels(path) - levels.repeat(8, 0).repeat(8, 1)).max() <= 1


def test_several_pictures_a_prompt_in_any_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "BATCH", 2)                 # a prompt is split over batches
    paths = sample.main(["a ring", "a moon", "--per-prompt", "3", "--out", str(tmp_path), *RANDOM])
    assert [path.name[:5] for path in paths[:-1]] == ["000-0", "000-1", "000-2", "001-0", "001-1", "001-2"]
    assert len({pixels(path).tobytes() for path in paths[:-1]}) == 6
    once = sample.main(["a ring", "a moon", "--out", str(tmp_path / "once"), *RANDOM])
    # more pictures, the same first one
    assert np.abs(pixels(once[1]) - pixels(paths[3])).max() <= 1


def test_stage_file_and_guidance_reach_the_picture(tmp_path: Path, tiny_weights: Path) -> None:
    def picture(*flags: str) -> bytes:
        flags = ["--weights", str(tiny_weights), "--num-steps", "2", "--out", str(tmp_path), *flags]
        return pixels(sample.main(["a ring", *flags])[0]).tobytes()
    other = ["--stage-file", str(save_stage(moved(tiny_model(), 0.3), tmp_path, 2))]
    assert picture() == picture("--stage-file", str(tiny_weights / "stage2.safetensors"))
    assert len({picture(), picture(*other), picture(*other, "--guidance-scale", "1")}) == 3
    save_stage(moved(tiny_model(), float("nan")), tmp_path, 2)
    with pytest.raises(Refused, match="NaN"):
        picture(*other)


def test_chat_asks_about_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                     capsys: pytest.CaptureFixture) -> None:
    asked, chat = [], ParaUni.chat
    monkeypatch.setattr(ParaUni, "chat", lambda self, *args: asked.append(args) or chat(self, *args))
    levels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(levels).save(tmp_path / "p.png")
    answer = sample.main(["--chat", str(tmp_path / "p.png"), "how many circles?", *RANDOM])
    (image, question), = asked
    assert np.array_equal((image * 255).round().permute(1, 2, 0), levels)
    assert question == "how many circles?" and capsys.readouterr().out == f"{answer}\n"


@pytest.mark.parametrize("prompt, words", [("a zebra", "zebra"), ("a " * 245, "tokens")])
def test_what_cannot_be_read_is_refused_before_any_picture(prompt: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=words):
        sample.main([*["a ring"] * 17, prompt, "--out", str(tmp_path / "out"), *RANDOM])
    assert not (tmp_path / "out").exists()
