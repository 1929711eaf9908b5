"""questions.py: every format is read from a file made here, every metric is held against hand numbers."""
import base64
import json
from pathlib import Path

import pytest

import questions
from questions import FORMATS, Question


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def values(rows: list[dict]) -> dict[str, float]:
    return {row["name"]: row["value"] for row in rows}


def test_pope(tmp_path: Path) -> None:
    lines = [{"question_id": i, "image": f"{i}.jpg", "text": "Is there a dog in the image?", "label": label}
             for i, label in enumerate(("yes", "yes", "no", "no"))]
    asked = questions.read_pope(write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, lines))))
    assert [q.answers for q in asked] == [("yes",), ("yes",), ("no",), ("no",)] and asked[2].image == "2.jpg"
    assert asked[0].text.startswith("Is there a dog") and "single word" in asked[0].text
    # the third is a yes since nothing is denied, as the official script has it
    got = values(questions.score_pope(asked, ["Yes, there is.", "No", "hard to say", "There is not one."]))
    assert got == {"accuracy": 0.5, "precision": 0.5, "recall": 0.5, "F1": 0.5, "share of yes": 0.5}
    assert values(questions.score_pope(asked, ["no"] * 4))["F1"] == 0
    write(tmp_path / "p.jsonl", json.dumps(lines[0]) + "\n" + json.dumps({**lines[1], "label": "maybe"}))
    with pytest.raises(ValueError, match="line 2 .* the label yes or no, got 'maybe'"):
        questions.read_pope(tmp_path / "p.jsonl")


def test_mme(tmp_path: Path) -> None:
    for task, picture, text in (("count", "a", "Two?\tYes\nThree?\tNo\n"),
                                ("count", "b", "One?\tYes\nTwo?\tNo\n"),
                                ("code_reasoning", "c", "Is it C?\tYes\nIs it Go?\tNo\n")):
        write(tmp_path / task / f"{picture}.txt", text)
        write(tmp_path / task / f"{picture}.png", "")
    asked = questions.read_mme(tmp_path)
    assert [(q.group, q.name) for q in asked][:3] == [
        ("code_reasoning", "code_reasoning/c/1"), ("code_reasoning", "code_reasoning/c/2"),
        ("count", "count/a/1")]
    assert asked[0].image == str(tmp_path / "code_reasoning" / "c.png") and asked[0].answers == ("yes",)
    got = questions.score_mme(asked, ["Yes", "no.", "yes", "no", "Yes", "Yes, two"])
    # count: 3 of 4 questions and 1 of 2 pictures
    assert values(got) == {"code_reasoning": 200, "count": 125, "perception": 125, "cognition": 200}
    write(tmp_path / "count" / "a.txt", "Two?\tYes\nThree? No\n")
    with pytest.raises(ValueError, match="line 2 of .*a.txt: expected a question, a tab, Yes or No"):
        questions.read_mme(tmp_path)
    (tmp_path / "count" / "b.png").unlink()
    write(tmp_path / "count" / "a.txt", "Two?\tYes\n")
    with pytest.raises(FileNotFoundError, match="a picture b.png or .jpg beside"):
        questions.read_mme(tmp_path)
    with pytest.raises(FileNotFoundError, match="MME's folder of tasks"):
        questions.read_mme(tmp_path / "nothing")


PICTURE = base64.b64encode(b"x" * 300).decode()


def test_mmbench_asks_every_turn_of_the_options(tmp_path: Path) -> None:
    table = ("index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage\n"
             f"7\tWhich?\tLook.\tred\tblue\tpink\t\tB\tcolors\t{PICTURE}\n"
             "8\tWhere?\t\tup\tdown\t\t\tA\tplaces\t7\n")
    asked = questions.read_mmbench(write(tmp_path / "m.tsv", table))
    assert [q.name for q in asked] == ["7", "1000007", "2000007", "8", "1000008"]
    assert [q.answers[0] for q in asked] == ["B", "A", "C", "A", "B"] and asked[4].image == PICTURE
    assert asked[1].text == ("Look.\nWhich?\nA. blue\nB. pink\nC. red\n"
                             "Answer with the option's letter from the given choices directly.")
    got = values(questions.score_mmbench(asked, ["B", "(A)", "C. red", "A", "A"]))
    assert got == {"colors": 1, "places": 0, "all": 0.5, "first turn": 1}
    turned = table + f"1000008\tWhere?\t\tdown\tup\t\t\tB\tplaces\t{PICTURE}\n"
    asked = questions.read_mmbench(write(tmp_path / "c.tsv", turned))
    assert [q.name for q in asked] == ["7", "8", "1000008"]
    with pytest.raises(ValueError, match="line 3 .* a letter as answer, got '8' and 'down'"):
        questions.read_mmbench(write(tmp_path / "d.tsv", table.replace("\tA\tplaces", "\tdown\tplaces")))
    with pytest.raises(ValueError, match="line 1 .* lacks the columns index"):
        questions.read_mmbench(write(tmp_path / "e.tsv", "question\tA\n"))


def test_seed(tmp_path: Path) -> None:
    one = {"question_id": "1", "question_type_id": 2, "data_id": "x.jpg", "question": "Q?", "choice_a": "cat",
           "choice_b": "dog", "choice_c": "cow", "choice_d": "", "answer": "B", "data_type": "image"}
    data = {"question_type": {"Scene Understanding": 1, "Instance Identity": 2},
            "questions": [one, {**one, "question_id": "2", "data_type": "video"}]}
    asked = questions.read_seed(write(tmp_path / "s.json", json.dumps(data)))
    assert len(asked) == 1 and asked[0].group == "Instance Identity"
    assert asked[0].choices == ("cat", "dog", "cow")
    assert values(questions.score_choices(asked, ["a dog"])) == {"Instance Identity": 1, "all": 1}
    del one["choice_b"]
    with pytest.raises(ValueError, match="question 0 of .* lacks 'choice_b'"):
        questions.read_seed(write(tmp_path / "s.json", json.dumps(data)))


def test_mmmu(tmp_path: Path) -> None:
    lines = [{"id": "validation_Accounting_1", "question": "<image 1> Which?", "options": "['$6', '$7']",
              "answer": "B", "question_type": "multiple-choice", "image_1": "a.png"},
             {"id": "validation_Math_Art_2", "question": "How much?", "options": "[]",
              "answer": "['2.50', 'five']", "question_type": "open", "image_1": "b.png"}]
    asked = questions.read_mmmu(write(tmp_path / "m.jsonl", "\n".join(map(json.dumps, lines))))
    assert [q.group for q in asked] == ["Accounting", "Math_Art"]
    assert asked[0].text.startswith("Which?\nA. $6")
    assert asked[1].answers == ("2.50", "five") and not asked[1].choices
    assert values(questions.score_choices(asked, ["The answer is (B).", "so x = 2.5"]))["all"] == 1
    assert values(questions.score_choices(asked, ["A", "5 and not more"]))["all"] == 0.5    # five is 5
    lines[1]["options"] = "a, b"
    with pytest.raises(ValueError, match="line 2 of .* expected a list, got 'a, b'"):
        questions.read_mmmu(write(tmp_path / "m.jsonl", "\n".join(map(json.dumps, lines))))


def test_realworldqa(tmp_path: Path) -> None:
    entries = [{"image": "0.webp", "question": "Which way?\nA. left\nB. right\nSay which.", "answer": "B"},
               {"image": "1.webp", "question": "How many? Answer with a number.", "answer": "3"}]
    for text in (json.dumps(entries), "\n".join(map(json.dumps, entries))):
        asked = questions.read_realworldqa(write(tmp_path / "r.json", text))
        assert asked[0].choices == ("left", "right") and asked[0].text == entries[0]["question"]
        assert values(questions.score_realworldqa(asked, ["B. right", "Three."])) == {"all": 1}
        assert values(questions.score_realworldqa(asked, ["A", "33"])) == {"all": 0}


def test_textvqa(tmp_path: Path) -> None:
    data = {"data": [{"question_id": 5, "image_id": "f00", "question": "What?",
                      "answers": ["The Coca-Cola"] * 2 + ["pepsi"] * 7 + ["fanta"]}]}
    asked = questions.read_textvqa(write(tmp_path / "t.json", json.dumps(data)))
    assert asked[0].image == "f00.jpg" and asked[0].name == "5"
    for said, mark in (("Pepsi.", 1.0), ("coca cola", 0.0), ("a coca-cola", 0.6), ("fanta", 0.3)):
        # two agree: 8 of 10 leave-one-out sets see two (2/3), 2 see one (1/3); one agrees: 9 see it (1/3)
        assert values(questions.score_textvqa(asked, [said]))["all"] == pytest.approx(mark), said


def test_mmvet_has_no_score_here(tmp_path: Path) -> None:
    data = {"v1_0": {"imagename": "a.png", "question": "Why?", "answer": "x", "capability": ["rec"]}}
    asked = questions.read_mmvet(write(tmp_path / "v.json", json.dumps(data)))
    assert asked == [Question("v1_0", "all", "a.png", "Why?", ())]
    assert questions.score_mmvet(asked, ["because"])[0]["value"] is None


@pytest.mark.parametrize(("said", "letter"), [
    ("B", "B"), ("(C) a cow", "C"), ("The answer is B.", "B"), ("I think it is A", "A"), ("dog", "B"),
    ("Answer: cow", "C"), ("cat or dog", ""), ("E", ""), ("", ""), ("B's", ""),
])
def test_the_letter_of_a_response(said: str, letter: str) -> None:
    assert questions.choice_letter(said, ("cat", "dog", "cow")) == letter


def test_yes_and_no() -> None:
    for said, read in (("Yes.", "yes"), ("no, yes", ""), ("It is. Yes", ""), ("NO", "no"), ("", "")):
        assert questions.yes_or_no(said) == read


def test_a_normal_form_of_words() -> None:
    assert questions.plain("The Two Dogs' 1,000.5 $!") == "2 dogs 1000.5 $"


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "mme"])
def test_every_reader_names_a_file_that_is_missing_empty_or_malformed(tmp_path: Path, name: str) -> None:
    read, _ = FORMATS[name]
    with pytest.raises(FileNotFoundError, match="expected --questions to name a file, found no file"):
        read(tmp_path / "nothing")
    for text in ("", "{", '{"a": 1}'):
        with pytest.raises(ValueError, match="--questions"):
            read(write(tmp_path / "q", text))


def test_errors_are_over_questions() -> None:
    asked = [Question(str(i), "g", "", "", ("A",), ("x", "y")) for i in range(4)]
    rows = questions.score_choices(asked, ["A", "A", "B", "B"])
    assert rows == [{"name": name, "value": 0.5, "error": pytest.approx((1 / 3) ** 0.5 / 2), "n": 4}
                    for name in ("g", "all")]
