"""Understanding: the question files of eight benchmarks, and each one's own metric. No model.

    POPE, MME         yes or no                  accuracy, F1; accuracy of questions and of pictures
    MMBench, SEED     a letter                   circular accuracy; accuracy by type
    MMMU, RealWorldQA a letter, a word, a number accuracy
    TextVQA           words                      soft agreement with ten annotators
    MM-Vet            sentences                  none here: a submission file for its outside grader

Formats are the published ones; metrics are those of each benchmark's own code, and where one differs it says
so. A reader takes the path of a file and gives Questions; a metric takes them with the responses, gives rows.
"""
import ast
import csv
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from scoring import json_lines, mean_and_error, need, read_json, read_text


# ----------------------------------------------------------------------------- questions

WORD = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Question:
    name: str                           # of its own in the file
    group: str                          # task, category or subject
    image: str                          # file name, or the picture itself in base64
    text: str                           # as it is put to the model
    answers: tuple[str, ...]            # all that are right; none where an outside grader decides
    choices: tuple[str, ...] = ()       # texts of A, B, ...


def multiple_choice(question: str, choices: list[str], hint: str = "") -> str:
    options = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, choices))
    return (f"{hint}\n" if hint else "") + f"{question}\n{options}{LETTER}"


def read_pope(path: Path) -> list[Question]:
    """JSON lines: question_id, image, text, label yes or no. One file for each of its three samplings."""
    out = []
    for where, entry in json_lines(path, "--questions"):
        need(entry, ("question_id", "image", "text", "label"), where)
        if entry["label"] not in ("yes", "no"):
            raise ValueError(f"{where}: expected the label yes or no, got {entry['label']!r}")
        out.append(Question(str(entry["question_id"]), "all", entry["image"], entry["text"] + WORD,
                            (entry["label"],)))
    return out


def read_mme(path: Path) -> list[Question]:
    """A folder of task folders: beside each picture (or in questions_answers_YN/, the picture in images/)
    a text file of two lines, question, tab, Yes or No."""
    files = sorted(f for f in path.rglob("*.txt")) if path.is_dir() else []
    if not files:
        raise FileNotFoundError("expected --questions to name MME's folder of tasks, a text file a picture, "
                                f"found none in {path}")
    out = []
    for file in files:
        task = file.relative_to(path).parts[0]
        near = [file.parent, file.parent.parent / "images"]
        pictures = [p for folder in near for end in (".png", ".jpg", ".jpeg")
                    if (p := folder / (file.stem + end)).is_file()]
        if not pictures:
            raise FileNotFoundError(f"expected a picture {file.stem}.png or .jpg beside {file}, found none")
        for number, line in enumerate(read_text(file, "--questions").splitlines(), start=1):
            question, _, answer = line.rpartition("\t")
            if answer.strip() not in ("Yes", "No") or not question:
                raise ValueError(f"line {number} of {file}: expected a question, a tab, Yes or No, "
                                 f"got {line[:60]!r}")
            out.append(Question(f"{task}/{file.stem}/{number}", task, str(pictures[0]), question,
                                (answer.strip().lower(),)))
    return out


def read_table(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, dict[str, str]]]:
    """(where, row) of a file of tab-separated values with a line of columns."""
    csv.field_size_limit(2 ** 31 - 1)                       # a picture in base64 is one field
    reader = csv.DictReader(read_text(path, "--questions").splitlines(keepends=True), delimiter="\t")
    if missing := [name for name in columns if name not in (reader.fieldnames or ())]:
        raise ValueError(f"line 1 of {path} (--questions) lacks the columns {', '.join(missing)}")
    for row in reader:
        where = f"line {reader.line_num} of {path} (--questions)"
        need({key: value or None for key, value in row.items() if key}, columns, where)
        yield where, row


def read_mmbench(path: Path) -> list[Question]:
    """Tab-separated: index, question, A, B, ..., answer, category, image (base64, or an earlier row's index),
    hint if there is one. A question stands there once or, circular, once for each turn of its options at
    index + k 1,000,000; where it stands once, the turns are made here."""
    pictures, rows = {}, []
    for where, row in read_table(path, ("index", "question", "A", "B", "answer", "category", "image")):
        if not row["index"].isdigit() or row["answer"] not in tuple(LETTERS):
            raise ValueError(f"{where}: expected a number as index and a letter as answer, "
                             f"got {row['index']!r} and {row['answer']!r}")
        pictures[row["index"]] = pictures.get(row["image"], row["image"])
        rows.append(row)
    circular = any(int(row["index"]) >= 10 ** 6 for row in rows)
    out = []
    for row in rows:
        choices = [row[letter] for letter in LETTERS if row.get(letter)]
        right = LETTERS.index(row["answer"])
        for turn in range(1 if circular else len(choices)):
            turned = choices[turn:] + choices[:turn]
            index, answer = int(row["index"]) + turn * 10 ** 6, LETTERS[(right - turn) % len(choices)]
            out.append(Question(str(index), row["category"], pictures[row["index"]],
                                multiple_choice(row["question"], turned, row.get("hint") or ""), (answer,),
                                tuple(turned)))
    return out


def read_seed(path: Path) -> list[Question]:
    """JSON: questions of question_id, question_type_id, data_id, question, choice_a .. d, answer;
    question_type names the types. Those on pictures (data_type image) are asked."""
    data = read_json(path, "--questions")
    if not isinstance(data, dict) or not data.get("questions"):
        raise ValueError(f"expected {path} (--questions) to be SEED-Bench's JSON with questions, found none")
    types = {number: name for name, number in data.get("question_type", {}).items()}
    out = []
    for number, entry in enumerate(data["questions"]):
        where = f"question {number} of {path} (--questions)"
        if isinstance(entry, dict) and entry.get("data_type", "image") != "image":
            continue
        need(entry, ("question_id", "question_type_id", "data_id", "question", "choice_a", "choice_b",
                     "answer"), where)
        choices = [entry[f"choice_{letter}"] for letter in "abcd" if entry.get(f"choice_{letter}")]
        kind = types.get(entry["question_type_id"], str(entry["question_type_id"]))
        out.append(Question(str(entry["question_id"]), kind, entry["data_id"],
                            multiple_choice(entry["question"], choices), (entry["answer"],), tuple(choices)))
    return out


def read_mmmu(path: Path) -> list[Question]:
    """JSON lines with the published fields: id, question, options, answer, question_type, image_1 (file name
    or base64). Of several pictures only the first is shown."""
    out = []
    for where, entry in json_lines(path, "--questions"):
        need(entry, ("id", "question", "answer", "question_type", "image_1"), where)
        choices = as_list(entry.get("options") or [], where)
        text = re.sub(r"<image \d>", "", entry["question"]).strip()
        answers = entry["answer"]
        if isinstance(answers, str) and answers.startswith("["):
            answers = as_list(answers, where)
        subject = "_".join(str(entry["id"]).split("_")[1:-1]) or "all"
        asked = multiple_choice(text, choices) if choices else text + WORD
        out.append(Question(str(entry["id"]), entry.get("subject", subject), entry["image_1"], asked,
                            tuple(map(str, answers)) if isinstance(answers, list) else (str(answers),),
                            tuple(choices)))
    return out


def read_realworldqa(path: Path) -> list[Question]:
    """JSON, a list or one object a line: image, question (with its options and how to answer), answer."""
    if read_text(path, "--questions").lstrip().startswith("["):
        entries = [(f"entry {number} of {path} (--questions)", entry)
                   for number, entry in enumerate(read_json(path, "--questions"))]
    else:
        entries = list(json_lines(path, "--questions"))
    out = []
    for number, (where, entry) in enumerate(entries):
        need(entry, ("image", "question", "answer"), where)
        choices = re.findall(r"^\s*[A-J][.)]\s*(.+?)\s*$", entry["question"], re.M)
        out.append(Question(str(number), "all", entry["image"], entry["question"], (str(entry["answer"]),),
                            tuple(choices)))
    return out


def read_textvqa(path: Path) -> list[Question]:
    """JSON: data of question_id, image_id (the picture's name without .jpg), question, ten answers."""
    data = read_json(path, "--questions")
    if not isinstance(data, dict) or not data.get("data"):
        raise ValueError(f"expected {path} (--questions) to be TextVQA's JSON with data, found none")
    out = []
    for number, entry in enumerate(data["data"]):
        need(entry, ("question_id", "image_id", "question", "answers"),
             f"question {number} of {path} (--questions)")
        answers = as_list(entry["answers"], f"question {number} of {path} (--questions)")
        out.append(Question(str(entry["question_id"]), "all", f"{entry['image_id']}.jpg",
                            entry["question"] + WORD, tuple(map(str, answers))))
    return out


def read_mmvet(path: Path) -> list[Question]:
    """JSON: v1_0 -> imagename, question, capability. Its answers are graded outside, by a language model."""
    data, out = read_json(path, "--questions"), []
    for name, entry in (data.items() if isinstance(data, dict) else ()):
        need(entry, ("imagename", "question"), f"{name} of {path} (--questions)")
        out.append(Question(name, "all", entry["imagename"], entry["question"], ()))
    if not out:
        raise ValueError(f"expected {path} (--questions) to be MM-Vet's JSON with questions, found none")
    return out


def as_list(value: str | list, where: str) -> list:
    """A list that some files have as a list, others as Python's way to write it."""
    try:
        value = ast.literal_eval(value) if isinstance(value, str) else value
    except (ValueError, SyntaxError):
        pass                                                # not a list: said below
    if not isinstance(value, list):
        raise ValueError(f"{where}: expected a list, got {str(value)[:60]!r}")
    return value


# ----------------------------------------------------------------------------- metrics

Row = dict[str, str | float | int | None]               # name, value, error, n


def row(name: str, values: list[float]) -> Row:
    mean, error = mean_and_error(values)
    return {"name": name, "value": mean, "error": error, "n": len(values)}


def first_words(response: str) -> list[str]:
    """The words of the first sentence."""
    return re.findall(r"[a-z]+", response.lower().split(".")[0])


def yes_or_no(response: str) -> str:
    """"yes" or "no" if the first sentence says exactly one of them, else ""."""
    said = {"yes", "no"} & set(first_words(response))
    return said.pop() if len(said) == 1 else ""


def choice_letter(response: str, choices: tuple[str, ...]) -> str:
    """The letter of the chosen option: said at the start, in brackets or at the end; else that of the only
    option whose text is said; else "" (the official MMMU scorer guesses at random there)."""
    text, letters = response.strip(), LETTERS[:len(choices)]
    for pattern in (rf"^([{letters}])(?![A-Za-z'])", rf"\(([{letters}])\)", rf"\b([{letters}])[.):]",
                    rf"\b([{letters}])$"):
        if letters and (match := re.search(pattern, text)):
            return match[1]
    said = [letter for letter, choice in zip(LETTERS, choices) if choice.strip().lower() in text.lower()]
    return said[0] if len(said) == 1 else ""


def plain(text: str) -> str:
    """Lower case without articles, apostrophes and punctuation; digits for number words (VQA's form)."""
    words = "zero one two three four five six seven eight nine ten".split()
    digits = dict(zip(words, map(str, range(11))))
    text = re.sub(r"(?<=\d),(?=\d)", "", text.lower().replace("'", ""))
    words = re.sub(r"[^\w\s.:%$-]|(?<!\d)\.|\.(?!\d)", " ", text).split()
    return " ".join(digits.get(word, word) for word in words if word not in ("a", "an", "the"))


def open_answer(response: str, answers: tuple[str, ...]) -> bool:
    """MMMU's rule for open questions: the last thing said contains a right text as words, or a right number,
    to two decimals."""
    last = re.split(r"\b(?:is|are|equals?|answer:)\b|=|\n", response.strip().rstrip("."))[-1]
    said = plain(last)
    numbers = [round(float(n), 2) for n in re.findall(r"-?\d+(?:\.\d+)?", last.replace(",", ""))]

    def right(answer: str) -> bool:
        if re.fullmatch(r"-?\d+(?:\.\d+)?", answer):
            return round(float(answer), 2) in numbers
        return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", said) is not None
    return any(map(right, map(plain, answers)))


def vqa_accuracy(response: str, answers: tuple[str, ...]) -> float:
    """VQA's soft accuracy: over each choice of all but one of the annotators, min(1, agreeing / 3), mean.
    Differs: apostrophes are dropped on both sides, in place of the official table of contractions."""
    said, every = plain(response), [plain(answer) for answer in answers]
    agree = [answer == said for answer in every]
    return fmean(min(1.0, (sum(agree) - own) / 3) for own in agree)


def grouped(questions: list[Question], marks: list[float]) -> list[Row]:
    """A row for each group, then all questions together."""
    groups: dict[str, list[float]] = {}
    for question, mark in zip(questions, marks, strict=True):
        groups.setdefault(question.group, []).append(mark)
    return [*(row(name, groups[name]) for name in sorted(groups) if name != "all"), row("all", marks)]


def score_pope(questions: list[Question], responses: list[str]) -> list[Row]:
    """Accuracy, precision and recall of yes, F1, share of yes. As official, a first sentence without "no" and
    "not" is a yes."""
    said = [not {"no", "not"} & set(first_words(response)) for response in responses]
    real = [question.answers[0] == "yes" for question in questions]
    hits, n = sum(a and b for a, b in zip(said, real)), len(said)
    precision, recall = (hits / sum(x) if sum(x) else 0.0 for x in (said, real))
    f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
    marks = [float(a == b) for a, b in zip(said, real)]
    shares = (("precision", precision), ("recall", recall), ("F1", f1))
    return [row("accuracy", marks),
            *({"name": name, "value": value, "error": None, "n": n} for name, value in shares),
            row("share of yes", [float(x) for x in said])]


COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def score_mme(questions: list[Question], responses: list[str]) -> list[Row]:
    """Each task: 100 (share of right answers + share of pictures with both right); perception and cognition
    are sums over tasks."""
    tasks: dict[str, dict[str, list[bool]]] = {}
    for question, response in zip(questions, responses, strict=True):
        pictures = tasks.setdefault(question.group, {})
        marks = pictures.setdefault(question.name.rpartition("/")[0], [])
        marks.append(yes_or_no(response) == question.answers[0])
    rows = []
    for task, pictures in sorted(tasks.items()):
        every = [right for pair in pictures.values() for right in pair]
        rows.append({"name": task, "value": 100 * (fmean(every) + fmean(map(all, pictures.values()))),
                     "error": None, "n": len(every)})
    totals = []
    for title, inside in (("perception", False), ("cognition", True)):
        if part := [r for r in rows if (r["name"].lower() in COGNITION) == inside]:
            totals.append({"name": title, "value": sum(r["value"] for r in part), "error": None,
                           "n": sum(r["n"] for r in part)})
    return rows + totals


def score_choices(questions: list[Question], responses: list[str]) -> list[Row]:
    """Share of right letters; without options, MMMU's rule for open questions (SEED-Bench, MMMU)."""
    marks = [choice_letter(said, q.choices) == q.answers[0] if q.choices else open_answer(said, q.answers)
             for q, said in zip(questions, responses, strict=True)]
    return grouped(questions, list(map(float, marks)))


def score_mmbench(questions: list[Question], responses: list[str]) -> list[Row]:
    """CircularEval: right in every turn of its options; `first turn` is the plain share."""
    turns: dict[int, list[bool]] = {}
    first = {}
    for question, said in zip(questions, responses, strict=True):
        base = int(question.name) % 10 ** 6
        turns.setdefault(base, []).append(choice_letter(said, question.choices) == question.answers[0])
        first.setdefault(base, question)
    rows = grouped(list(first.values()), [float(all(turns[base])) for base in first])
    return [*rows, row("first turn", [float(turns[base][0]) for base in first])]


def score_realworldqa(questions: list[Question], responses: list[str]) -> list[Row]:
    """Exact match: the letter where there are options, else the word or number."""
    def right(question: Question, said: str) -> bool:
        if question.choices and question.answers[0] in LETTERS:
            return choice_letter(said, question.choices) == question.answers[0]
        return plain(said) == plain(question.answers[0])
    return grouped(questions, [float(right(q, said)) for q, said in zip(questions, responses, strict=True)])


def score_textvqa(questions: list[Question], responses: list[str]) -> list[Row]:
    return grouped(questions, [vqa_accuracy(said, q.answers)
                               for q, said in zip(questions, responses, strict=True)])


def score_mmvet(questions: list[Question], responses: list[str]) -> list[Row]:
    """No score: a language model outside grades the submission file."""
    return [{"name": "answers, to be graded", "value": None, "error": None, "n": len(responses)}]


Reader, Metric = Callable[[Path], list[Question]], Callable[[list[Question], list[str]], list[Row]]
FORMATS: dict[str, tuple[Reader, Metric]] = {
    "pope": (read_pope, score_pope), "mme": (read_mme, score_mme), "mmbench": (read_mmbench, score_mmbench),
    "seed": (read_seed, score_choices), "mmmu": (read_mmmu, score_choices),
    "realworldqa": (read_realworldqa, score_realworldqa), "textvqa": (read_textvqa, score_textvqa),
    "mmvet": (read_mmvet, score_mmvet)}
