"""DPG-Bench: its rule against a second writing of it, and the way from pictures to the score."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (BertTokenizer, BlipConfig, BlipForQuestionAnswering, BlipImageProcessor,
                          BlipProcessor)

import evaluate
import evaluation
from common import Refused, derive_seed
from evaluation import dpg
from test_geneval import SIDE, Painter

COLUMNS = ("item_id", "text", "keywords", "proposition_id", "dependency", "category_broad",
           "category_detailed", "tuple", "question_natural_language")


def reference_dpg(items: list[tuple], answers: dict) -> tuple[dict, dict]:
    """The rule in the small: prompt -> score, category -> share of yes."""
    prompts, categories = {}, {}
    for name, rows in items:
        total = []
        for tile in answers[name]:
            value = {number: int(answer == "yes") for number, answer in tile.items()}
            for row in rows:
                number, detailed = row["proposition_id"], row["tuple"].split("(")[0].strip()
                for level in {detailed, detailed.split("-")[0].strip()}:
                    categories.setdefault(level, []).append(int(tile[number] == "yes"))
                for parent in row["dependency"].split(", "):
                    if parent in value and value[parent] == 0:
                        value[number] = 0
            total.append(sum(value.values()) / len(value))
        prompts[name] = sum(total) / len(total)
    return prompts, {name: 100 * sum(marks) / len(marks) for name, marks in categories.items()}


def made_up_item(name: str, rng: np.random.Generator) -> tuple[str, list[dict]]:
    """Up to 12 propositions, most hanging on others, a few on later ones or on ones that are not there."""
    rows = []
    for n in range(1, int(rng.integers(2, 13))):
        parents = rng.permutation(range(1, n))[:rng.integers(0, 3)].tolist() if rng.random() < 0.8 else []
        parents += [n + 1] if rng.random() < 0.05 else []
        kind = ["entity - whole", "attribute - color", "relation - spatial", "global"][rng.integers(4)]
        rows.append({"proposition_id": str(n), "dependency": ", ".join(map(str, parents)) or "0",
                     "tuple": f"{kind} (thing {n})"})
    return name, rows


def test_scores_are_those_of_a_second_writing_of_the_rule() -> None:
    rng = np.random.default_rng(3)
    items = [made_up_item(f"item_{i}", rng) for i in range(300)]
    said = ["yes"] * 15 + ["no"] * 3 + ["yes please", "Yes"]
    answers = {name: [{row["proposition_id"]: str(rng.choice(said)) for row in rows} for _ in range(4)]
               for name, rows in items}
    got = dpg.dpg_scores(items, answers)
    prompts, categories = reference_dpg(items, answers)
    assert got["prompts"] == pytest.approx(prompts, abs=1e-12)
    assert {row["questions"]: row["score"] for row in got["rows"][1:]} == pytest.approx(categories)
    assert got["score"] == pytest.approx(100 * np.mean(list(prompts.values())))
    assert got["error"] == pytest.approx(100 * np.std(list(prompts.values()), ddof=1) / len(prompts) ** 0.5)


def question_file(path: Path, *rows: str) -> Path:
    path.write_bytes("\r\n".join(("\ufeff" + ",".join(COLUMNS), *rows, "")).encode())
    return path


def test_an_item_is_no_path(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="stem of a file name as item_id"):
        dpg.read_items(question_file(tmp_path / "q.csv", "../a,t,k,1,0,e,w,x (y),q?"))


class FakeAnswerer:
    """Yes in light pictures; counts its questions."""
    name, asked = "fake", []

    def __call__(self, picture: Image.Image, questions: list[str]) -> list[str]:
        assert picture.size == (SIDE, SIDE)
        self.asked.append(len(questions))
        return ["yes" if picture.getpixel((0, 0))[0] > 100 else "no"] * len(questions)


def score(out: Path, *flags: object) -> dict:
    path = question_file(out / "q.csv", "a1,two dogs,k,1,0,entity,whole,entity - whole (dog),Is there a dog?",
                         'a1,two dogs,k,2,"1, 7",other,count,"other - count (dogs, two)",Are there two?',
                         "b_2,a red cup,k,1,0,entity,whole,entity - whole (cup),Is there a cup?")
    flags = ["--preset", "b-512", "--questions", path, "--out", out, *flags]
    return evaluate.main(["dpg", *map(str, flags)])


def test_it_draws_asks_scores_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    painter = Painter()
    monkeypatch.setattr(evaluation, "load", lambda *args: painter)
    monkeypatch.setattr(dpg, "Answerer", lambda *args: FakeAnswerer())
    result = score(tmp_path)
    light = {name: [derive_seed(0, "dpg", name, k) % 200 > 100 for k in range(4)] for name in ("a1", "b_2")}
    assert result["score"] == pytest.approx(100 * np.mean(list(light.values())))
    assert FakeAnswerer.asked == [2] * 4 + [1] * 4 and result["judge"] == "fake" and not result["benchmark"]
    assert result["name"].endswith("not the benchmark: 2 prompts of 1065; the judge is not mPLUG-large")
    (tmp_path / "answers/b_2.json").unlink()
    FakeAnswerer.asked.clear()
    painter.batches = []
    assert score(tmp_path)["prompts"] == result["prompts"]
    assert FakeAnswerer.asked == [1] * 4 and not painter.batches
    (tmp_path / "images/a1.json").write_text('"two cats"')
    with pytest.raises(Refused, match="a1.json asks for something else"):
        score(tmp_path)
    (tmp_path / "images/a1.png").unlink()                   # the rest of another model's folder
    assert score(tmp_path, "--images", tmp_path / "images")["prompts"] == {"b_2": result["prompts"]["b_2"]}


def test_ready_answers_are_scored_alone(tmp_path: Path) -> None:
    answers = {"a1": [{"1": "yes", "2": "no"}, {"1": "no", "2": "yes"}]}
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"judge": "made up", "items": answers}))
    result = score(tmp_path, "--answers", path)
    assert result["score"] == 25 and list(result["prompts"]) == ["a1"] and result["error"] is None
    assert "prompts without exactly 4 pictures" in result["name"]
    assert {"questions": "entity", "score": 50, "s.e.": None, "n": 2} in result["rows"]
    path.write_text(path.read_text().replace('"2": "yes"', '"3": "yes"'))
    with pytest.raises(KeyError, match="2"):                # never counted as a no
        score(tmp_path, "--answers", path)


def test_a_bad_grid_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dpg, "Answerer", lambda *args: FakeAnswerer())
    Image.new("RGB", (16, 15)).save(tmp_path / "a1.png")
    with pytest.raises(Refused, match="a1.png"):
        score(tmp_path, "--images", tmp_path)


def test_the_answering_model_answers_as_transformers_does(tmp_path: Path) -> None:
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] [DEC] is there a dog yes no ?".split()
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
             "projection_dim": 16}
    text = {**small, "vocab_size": len(words), "encoder_hidden_size": 16, "bos_token_id": 5,
            "pad_token_id": 0, "eos_token_id": 3, "sep_token_id": 3}
    vision = {**small, "image_size": 32, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = BlipForQuestionAnswering(BlipConfig(text_config=text, vision_config=vision)).eval()
    model.save_pretrained(tmp_path / "m")
    processor = BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}),
                              BertTokenizer(str(tmp_path / "vocab.txt")))
    processor.save_pretrained(tmp_path / "m")
    answerer = dpg.Answerer(str(tmp_path / "m"), torch.device("cpu"))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    inputs = processor(images=image, text="is a dog there?", return_tensors="pt")
    expected = processor.decode(model.generate(**inputs, max_new_tokens=10)[0], skip_special_tokens=True)
    # the shorter question is padded
    assert answerer(image, ["is there a dog there?", "is a dog there?"])[1] == expected.strip().lower()
    assert expected
