"""evaluation/understand.py: formats from files made here, metrics by hand; what is cut short goes on."""
import base64
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import evaluate
from common import Refused
from evaluation import understand
from evaluation.understand import BENCHMARKS, Question
from helpers import file_of
from nano import world


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def values(name: str, questions: list[Question], answers: list[str]) -> dict[str, float]:
    return {row["name"]: row["value"] for row in BENCHMARKS[name][1](questions, answers)}


PIXELS = np.random.default_rng(0).integers(0, 255, (30, 30, 3), dtype=np.uint8)
PICTURE = base64.b64encode(file_of(Image.fromarray(PIXELS))).decode()


def test_pope(tmp_path: Path) -> None:
    entries = [{"question_id": i, "image": f"{i}.jpg", "text": "Is there a dog in the image?", "label": label}
               for i, label in enumerate(("yes", "yes", "no", "no"))]
    asked = understand.read_pope(write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, entries))))
    assert [q.right for q in asked] == ["yes", "yes", "no", "no"]
    assert asked[2].image == Path("2.jpg")
    assert asked[0].text.startswith("Is there a dog") and "single word" in asked[0].text
    # the third is a yes since nothing is denied, as the official script has it
    got = values("pope", asked, ["Yes, there is.", "No", "hard to say", "There is not one."])
    assert got == {"accuracy": 0.5, "precision": 0.5, "recall": 0.5, "F1": 0.5, "share of yes": 0.5}
    assert values("pope", asked, ["no"] * 4)["F1"] == 0


def test_mmbench_asks_every_turn_of_the_options(tmp_path: Path) -> None:
    table = ("index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage\n"
             f"7\tWhich?\u2028One?\tLook.\tred\tblue\tpink\t\tB\tcolors\t{PICTURE}\n"
             "8\tWhere?\t\tup\tdown\t\t\tA\tplaces\t7\n")
    asked = understand.read_mmbench(write(tmp_path / "m.tsv", table))
    assert [q.name for q in asked] == ["7", "1000007", "2000007", "8", "1000008"]
    assert [q.right for q in asked] == ["B", "A", "C", "A", "B"] and asked[4].image == asked[0].image
    assert asked[1].text == ("Look.\nWhich?\u2028One?\nA. blue\nB. pink\nC. red\n"
                             "Answer with the option's letter from the given choices directly.")
    assert values("mmbench", asked, ["B", "(A)", "C. red", "A", "A"]) == {
        "colors": 1, "places": 0, "all": 0.5, "first turn": 1}
    # a circular file has the turns already
    turned = table + f"1000008\tWhere?\t\tdown\tup\t\t\tB\tplaces\t{PICTURE}\n"
    for limit, turns in ((None, 5), (1, 3)):
        assert understand.read_mmbench(write(tmp_path / "c.tsv", turned), limit) == asked[:turns]


@pytest.mark.parametrize(("answer", "letter"), [
    ("B", "B"), ("(C) a cow", "C"), ("It is B.", "B"), ("It is A", "A"), ("dog", "B"), ("Answer: cow", "C"),
    ("cat or dog", ""), ("E", ""), ("", ""), ("B's", ""), ("A dog", "B"), ("A is right", "A")])
def test_the_letter_of_an_answer(answer: str, letter: str) -> None:
    assert understand.choice_letter(answer, ["cat", "dog", "cow"]) == letter


@pytest.mark.parametrize("name", ["pope", "mmbench"])
def test_a_file_that_is_missing_empty_or_malformed_is_refused(tmp_path: Path, name: str) -> None:
    no_answer = "index\tquestion\tA\tB\timage\tcategory\tanswer\n1\tWhich?\tx\ty\tAAAA\tz\t"
    for path in (tmp_path / "nothing", write(tmp_path / "a", ""), write(tmp_path / "b", no_answer)):
        with pytest.raises(Refused, match=f"published file of {name}"):
            evaluate.main(["understand", f"--benchmark={name}", f"--out={tmp_path}", f"--questions={path}"])


class Seer(nn.Module):
    """Stands in for ParaUni: says yes where the middle of the picture is light."""
    device = torch.device("cpu")
    preset = SimpleNamespace(vlm=SimpleNamespace(vision_config=SimpleNamespace(image_size=[30, 30])))

    def __init__(self, stop_at: int = -1) -> None:
        super().__init__()
        self.vlm, self.asked, self.stop_at = nn.Linear(1, 1, bias=False), [], stop_at
        nn.init.ones_(self.vlm.weight)

    def answer(self, images: Tensor, questions: list[str]) -> list[str]:
        if len(self.asked) == self.stop_at:
            raise KeyboardInterrupt
        assert images.shape[1:] == (3, 30, 30)
        self.asked.append(len(questions))
        return ["Yes" if level > 0.5 else "No" for level in images[:, 0, 15, 15].tolist()]


@pytest.fixture
def pope(tmp_path: Path) -> list[str]:
    """Five questions about five pictures: three right ones for a Seer, and the flags that ask them."""
    entries = []
    for i, (level, label) in enumerate(zip((255, 0, 255, 0, 255), "yes no no yes yes".split())):
        Image.new("RGB", (20, 30), (level,) * 3).save(tmp_path / f"{i}.jpg")
        entries.append({"question_id": i, "image": f"{i}.jpg", "text": "Is it light?", "label": label})
    path = write(tmp_path / "pope.jsonl", "\n".join(map(json.dumps, entries)))
    return ["understand", "--benchmark", "pope", "--questions", str(path), "--images", str(tmp_path),
            "--batch-size", "2", "--out", str(tmp_path / "o")]


def test_a_benchmark_is_asked_and_gone_on_with(pope: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seer = Seer(stop_at=1)
    monkeypatch.setattr(understand, "load", lambda *args: seer)
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(pope)
    seer.stop_at = -1
    result = evaluate.main(pope)
    assert seer.asked == [2, 2, 1]
    assert {row["name"]: row["value"] for row in result["rows"]}["accuracy"] == 0.6
    with pytest.raises(Refused, match="other settings .--images .* -> /, --dtype fp32 -> bf16."):
        evaluate.main([*pope, "--images", "/", "--dtype", "bf16"])


def test_the_untouched_model_is_asked_the_same(pope: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seer, other = Seer(), Seer()
    monkeypatch.setattr(understand, "load", lambda *args: seer)
    monkeypatch.setattr(understand.ParaUni, "from_preset", lambda *args, **more: other)
    flags = [*pope, "--reference", "auto"]
    assert evaluate.main(flags)["untouched"] == {"same_answers": 5, "of": 5, "same_weights": True}
    nn.init.zeros_(other.vlm.weight)
    other.answer = lambda images, questions: ["No"] * len(questions)
    assert evaluate.main([*flags, "--out", flags[flags.index("--out") + 1] + "2"])["untouched"] == {
        "same_answers": 2, "of": 5, "same_weights": False}


def test_pictures_of_questions_may_be_bytes() -> None:
    seer, content = Seer(), file_of(Image.fromarray(PIXELS))
    got = understand.tile(Question("q", "all", content, "", ""), "", seer)
    assert torch.equal(got, torch.from_numpy(PIXELS).permute(2, 0, 1) / 255)
    with pytest.raises(Refused, match="question q: "):
        understand.tile(Question("q", "all", content[:400], "", ""), "", seer)


def test_nano_s_questions_are_marked_by_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, pairs = world.question_set(7, 2 ** 32 - 1)
    answers = iter([right for _, right in pairs[:6]] + ["ring"])
    seer = Seer()
    monkeypatch.setattr(understand, "load", lambda *args: seer)
    seer.answer = lambda images, asked: [next(answers) for _ in asked]
    result = evaluate.main(["understand", "--seed=-1", "--limit=7", "--out", str(tmp_path)])
    assert result["rows"][-1] == {"name": "all", "value": pytest.approx(6 / 7),
                                  "s.e.": pytest.approx(1 / 7), "n": 7}
    kinds = {" ".join(text.split()[:2]) for text, _ in pairs}
    assert {row["name"] for row in result["rows"]} == kinds | {"all"}
    with pytest.raises(Refused, match="preset l-1024 needs --benchmark and --questions"):
        evaluate.main(["understand", "--preset", "l-1024", "--out", str(tmp_path)])
