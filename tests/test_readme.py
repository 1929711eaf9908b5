"""README and docs say only what is so: their commands, flags, links, snippets and line counts."""
import importlib
import re
import shlex
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from evaluate import COMMANDS
from helpers import tiny_model
from nano import world

ROOT = Path(__file__).resolve().parent.parent
FILES = [ROOT / "README.md", *ROOT.glob("docs/*.md")]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in FILES}
SCRIPTS = ["train", "grpo", "sample", "evaluate", "prepare", "nano.pretrain", "nano.check",
           "evaluation.geneval", "evaluation.dpg", "evaluation.understand", "evaluation.layers",
           "evaluation.ablate", "evaluation.report", "tools.convert", "tools.bench", "tools.plan",
           "tools.gpu_check"]


def flags_of(module: str) -> set[str]:
    """The flags that a script's own config dataclasses stand for."""
    found = {"--help"}
    # of a parser that is plain argparse
    source = Path(importlib.import_module(module).__file__).read_text(encoding="utf-8")
    found |= set(re.findall(r'"(--[a-z][a-z0-9-]*)"', source))
    for config in vars(importlib.import_module(module)).values():
        if isinstance(config, type) and is_dataclass(config):
            for field in fields(config):
                flag = field.name.replace("_", "-")
                found |= {f"--{flag}", f"--no-{flag}"} if field.type is bool else {f"--{flag}"}
    return found


def commands() -> list[tuple[str, list[str]]]:
    """(page, words) of every command in a block of shell code."""
    found = []
    for page, text in PAGES.items():
        for block in re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S):
            lines = block.replace("\\\n", " ").splitlines()
            parts = [part for line in lines for part in line.split(" && ")]
            found += [(page, shlex.split(part, comments=True)) for part in parts]
    return [(page, words) for page, words in found if words]


@pytest.mark.parametrize("page, words", commands(), ids=lambda value: " ".join(value)[:60])
def test_every_command_names_a_script_and_flags_that_it_has(page: str, words: list[str]) -> None:
    if words[0] in ("pip", "pytest", "git"):
        return
    assert words[0] in ("python", "torchrun")
    place = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script, flags = words[place], {word.split("=")[0] for word in words[place + 1:] if word.startswith("--")}
    assert (ROOT / script).is_file() or script.startswith("docs/forks")
    launcher = {name for name in words[1:place] if name.startswith("--")}
    assert launcher <= set(get_args_parser()._option_string_actions)
    modules = [script.removesuffix(".py").replace("/", ".")]
    if script == "train.py":
        modules += ["grpo"]
    if script == "evaluate.py":
        assert words[place + 1] in COMMANDS
        modules += [name for name in SCRIPTS if name == f"evaluation.{words[place + 1]}"]
    added = {f"--{name}" for name in re.findall(r"^\+ +(\w+): .* = knob\(", PAGES[page], re.M)}
    assert flags <= added.union(*map(flags_of, modules))


def test_every_flag_in_the_prose_exists() -> None:
    known = set().union(*map(flags_of, SCRIPTS)) | set(get_args_parser()._option_string_actions)
    named = {flag for page, text in PAGES.items() if page != "forks.md"
             for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text)}
    assert len(named) > 30 and named <= known, named - known


def test_every_link_and_picture_is_there() -> None:
    for page, text in PAGES.items():
        folder = ROOT if page == "README.md" else ROOT / "docs"
        for target in re.findall(r"\]\(([^)#\s]+)", text):
            assert target.startswith("http") or (folder / target).exists(), f"{page}: {target}"


def test_the_readme_is_short_and_its_line_counts_are_right() -> None:
    text = PAGES["README.md"]
    assert len(text.split()) <= 2500
    rows = re.findall(r"^\| `(\w+\.py)` \|.*\| (\d+) \|$", text, re.M)
    assert len(rows) >= 6
    for name, lines in rows:
        assert abs(int(lines) - (ROOT / name).read_text(encoding="utf-8").count("\n")) <= 10, name


def test_the_snippet_of_the_readme_runs_and_its_reward_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGES["README.md"], re.M | re.S)
    monkeypatch.setattr("model.ParaUni.from_preset", lambda name: tiny_model())
    names: dict = {}
    for block in blocks:
        exec(block, names)
    scores = names["red"](names["picture"][None], ["a red heart"])
    assert scores.shape == (1,) and scores.isfinite().all()


def test_prompts_of_the_readme_are_held_out() -> None:
    prompts = [word for page, words in commands() if page == "README.md" and "sample.py" in words
               and "--chat" not in words for word in words if " " in word]
    assert len(prompts) >= 3 and all(world.is_test(world.parse_prompt(text)) for text in prompts)
