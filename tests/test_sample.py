"""sample.py: the files it writes, the question it asks, what it refuses."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import model as model_module
import sample
from common import generator
from model import ParaUni, save_trained

RANDOM = ["--weights", "random", "--num-steps", "1"]


@pytest.fixture(scope="module")
def random_model() -> ParaUni:
    return ParaUni.from_preset("nano", "random", 0)


def pixels(path: Path) -> np.ndarray:
    return np.array(Image.open(path)).astype(int)


def levels(image: torch.Tensor) -> np.ndarray:
    return (image * 255).round().permute(1, 2, 0).numpy().astype(int)


def stage_file(path: Path, model: ParaUni, key: str, stage: int = 3) -> str:
    """Weights of a stage whose DiT listens to its condition: a fresh one predicts zero."""
    weight = model.dit.proj_out.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.copy_(0.05 * torch.randn(weight.shape, generator=generator(key)))
    save_trained(model, path, stage, sample.SampleConfig(prompt=("x",)))
    with torch.no_grad():
        weight.copy_(before)
    return str(path)


def test_help_does_not_load_torch() -> None:
    code = "import sys, sample; sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(sample.__file__).parent).returncode == 0


def test_pictures_are_those_of_generate_enlarged(tmp_path: Path, random_model: ParaUni,
                                                 capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "list.txt").write_text("two moons\n\n")
    paths = sample.main(["A red heart, left of a star.", "--prompts", str(tmp_path / "list.txt"), "--out",
                         str(tmp_path / "new" / "pictures"), *RANDOM])
    assert [path.name for path in paths] == ["000-a-red-heart-left-of-a-star.png",
                                             "001-two-moons.png", "grid.png"]
    assert capsys.readouterr().out.split() == [str(path) for path in paths]
    # v = 0: the words play no part
    images = random_model.generate(["a red heart", "two moons"], num_steps=1, seed=0)
    for path, image in zip(paths, images):
        assert np.array_equal(pixels(path), levels(image).repeat(8, 0).repeat(8, 1))
    assert pixels(paths[-1]).shape[1] == 8 + 2 * (256 + 8)


def test_several_pictures_a_prompt_in_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "BATCH", 2)                 # a prompt is split over batches
    paths = sample.main(["a ring", "a moon", "--per-prompt", "3", "--out", str(tmp_path), *RANDOM])
    assert [path.name[:5] for path in paths[:-1]] == ["000-0", "000-1", "000-2", "001-0", "001-1", "001-2"]
    assert len({pixels(path).tobytes() for path in paths[:-1]}) == 6
    once = sample.main(["a ring", "a moon", "--out", str(tmp_path / "once"), *RANDOM])
    assert np.abs(pixels(once[1]) - pixels(paths[3])).max() <= 1           # more pictures, the same first one
    assert pixels(paths[-1]).shape[1] == 8 + 3 * (256 + 8)


def test_stage_file_and_guidance_reach_the_picture(tmp_path: Path, random_model: ParaUni) -> None:
    def picture(*flags: str) -> bytes:
        return pixels(sample.main(["a ring", "--out", str(tmp_path), *RANDOM, *flags])[0]).tobytes()
    file = stage_file(tmp_path / "s.safetensors", random_model, "a")
    assert (picture() != picture("--stage-file", file)
            != picture("--stage-file", file, "--guidance-scale", "1"))


def test_stage_1_file_goes_onto_the_pretrained_dit(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class Recorder:
        from_preset = staticmethod(
            lambda *args: calls.append(("from_preset", *args[:3], args[4])) or Recorder())
        from_parts = staticmethod(
            lambda preset, folder, *_: calls.append(("from_parts", folder)) or Recorder())

        def load_trained(self, path: Path, preset: str) -> None:
            calls.append(("load_trained", path, preset))

    monkeypatch.setattr(model_module, "ParaUni", Recorder)
    sample.load_model("nano", "auto", "one.safetensors", 0)
    sample.load_model("l-512", "folder", "", 3)
    assert calls == [("from_parts", model_module.NANO_WEIGHTS),
                     ("load_trained", Path("one.safetensors"), "nano"),
                     ("from_preset", "l-512", "folder", 3, torch.bfloat16)]


def test_chat_shows_the_picture_and_prints_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture) -> None:
    asked = []

    class Listener:
        def chat(self, image: torch.Tensor, question: str) -> str:
            asked.append((image, question))
            return "two"

    monkeypatch.setattr(sample, "load_model", lambda *args: Listener())
    Image.new("RGBA", (6, 4), (255, 0, 51, 255)).save(tmp_path / "p.png")
    assert sample.main(["--chat", str(tmp_path / "p.png"), "how many circles?"]) == "two"
    (image, question), = asked
    assert image.shape == (3, 4, 6) and question == "how many circles?" and capsys.readouterr().out == "two\n"
    assert torch.allclose(image[:, 0, 0], torch.tensor([1.0, 0.0, 0.2]))


def test_chat_with_a_real_model_resizes_and_refuses_unknown_words(tmp_path: Path) -> None:
    Image.new("L", (50, 40), 128).save(tmp_path / "p.png")
    assert isinstance(sample.main(["--chat", str(tmp_path / "p.png"), "how many shapes?", *RANDOM]), str)
    with pytest.raises(ValueError, match="'zebras"):
        sample.main(["--chat", str(tmp_path / "p.png"), "how many zebras?", *RANDOM])


@pytest.mark.parametrize(("argv", "sentence"), [
    ([], "expected a prompt in quotes"),
    (["a ring", " "], "expected every prompt to say something"),
    (["--chat", "p.png"], "one question in quotes.* got 0 questions"),
    (["--chat", "p.png", "how", "many?"], "one question in quotes.* got 2 questions"),
    (["--chat", "missing.png", "how many?"], "found no file missing.png"),
    (["--chat", __file__, "how many?"], "cannot be read as one"),
    (["--prompts", "missing.txt"], "found no file missing.txt"),
    (["a ring", "--num-steps", "0"], "--num-steps"),
    (["a ring", "--per-prompt", "0"], "--per-prompt"),
    (["a ring", "--out", __file__], "cannot make the folder --out"),
    (["a ring", "--out", f"{__file__}/deeper"], "cannot make the folder --out"),
    (["a ring", "--preset", "l-512"], "expected --weights to name a folder"),
])
def test_mistakes_are_one_sentence(argv: list[str], sentence: str, tmp_path: Path,
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, OSError), match=sentence) as error:
        sample.main(argv)
    assert "\n" not in str(error.value)


def test_unknown_word_is_refused_before_any_picture(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'zebra'"):
        sample.main(["a ring"] * 17 + ["a zebra", "--out", str(tmp_path / "o"), *RANDOM])
    assert not list((tmp_path / "o").iterdir())
