"""The README says only what is so: its commands, flags, names, tables, links and snippets."""
import argparse
import ast
import math
import re
import shlex
from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch

import analyse
import data
import evaluate
import grpo
import train
from bench import BenchConfig
from common import Dist
from helpers import tiny_model
from model import PRESETS
from nano import pretrain, world
from plan import PlanConfig
from sample import SampleConfig

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.M | re.S)                        # (language, content)
PROSE = re.sub(r"^```.*?^```$", "", TEXT, flags=re.M | re.S)
PROGRAMS = ("pip", "pytest", "python", "torchrun")
WRITTEN = [part for language, block in BLOCKS if language == "sh"
           for line in block.splitlines() for part in line.split(" && ")]
WRITTEN += [code for code in re.findall(r"`([^`\n]+)`", PROSE) if code.split()[0] in PROGRAMS and " " in code]
COMMANDS = [shlex.split(part, comments=True) for part in dict.fromkeys(WRITTEN)]


class Parsed(Exception):
    pass


def arguments(command: list[str]) -> tuple[str, list[str]]:
    """The script that python or torchrun starts, and its arguments."""
    script = next(i for i, word in enumerate(command) if word.endswith(".py"))
    return command[script], command[script + 1:]


def launcher() -> argparse.ArgumentParser:
    """torchrun's own flags."""
    from torch.distributed.run import get_args_parser
    return get_args_parser()


def table(header: str) -> list[list[str]]:
    """The rows of the table whose first header cell is `header`."""
    lines = TEXT.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(f"| {header} |"))
    rows = []
    for line in lines[first + 2:]:
        if not line.startswith("|"):
            return rows
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    raise AssertionError(f"the table {header} has no end")


# ---- commands ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_parse(command: list[str], monkeypatch: pytest.MonkeyPatch,
                        pytestconfig: pytest.Config) -> None:
    assert command[0] in PROGRAMS
    if command[0] == "pytest":
        known, unknown = pytestconfig._parser.parse_known_and_unknown_args(command[1:])
        assert not unknown and all((ROOT / path).exists() for path in known.file_or_dir)
        return
    if command[:2] == ["pip", "install"]:
        assert all((ROOT / name).is_file() for flag, name in zip(command, command[1:]) if flag == "-r")
        return
    script, argv = arguments(command)
    assert command[0] in ("python", "torchrun") and (ROOT / script).is_file()
    if command[0] == "torchrun":
        started = launcher().parse_args(command[1:])
        assert (started.training_script, started.training_script_args) == (script, argv)
    module = import_module(script.removesuffix(".py").replace("/", "."))
    if script == "nano/pretrain.py":
        assert set(module.arguments().parse_args(argv).parts) <= module.PARTS.keys()
        return
    inner: Callable = module.parse_config

    def parse_only(*args: object) -> None:
        inner(*args)
        raise Parsed

    monkeypatch.setattr(module, "parse_config", parse_only)
    with pytest.raises(SystemExit if argv == ["--help"] else Parsed) as stopped:
        module.main(argv)
    assert argv != ["--help"] or stopped.value.code == 0


def test_prompts_in_commands_are_held_out_prompts_of_the_nano_world() -> None:
    commands = [c for c in COMMANDS if "sample.py" in c and "--chat" not in c and "--preset" not in c]
    prompts = [word for c in commands for word in arguments(c)[1] if " " in word]
    assert len(prompts) >= 3 and all(world.is_test(world.parse_prompt(text)) for text in prompts)


def test_flags_in_the_prose_exist(pytestconfig: pytest.Config) -> None:
    """Flags of the scripts, and those that torchrun and pytest have themselves."""
    of_evaluate = [getattr(import_module(module), name) for module, name, _ in evaluate.COMMANDS.values()]
    known = {"--help"} | set(launcher()._option_string_actions)
    known |= set(pretrain.arguments()._option_string_actions)
    known |= {flag for group in pytestconfig._parser._groups for option in group.options
              for flag in option.names()}
    for config in (train.TrainConfig, SampleConfig, data.EncodeConfig, PlanConfig, BenchConfig, *of_evaluate):
        for field in fields(config):
            name = field.name.replace("_", "-")
            known |= {f"--{name}", f"--no-{name}"} if field.type is bool else {f"--{name}"}
    said = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", PROSE))
    assert len(said) > 20 and said <= known, said - known


# ---- names and tables ----------------------------------------------------------------------------------

def test_the_file_table_is_the_tree() -> None:
    listed = [row[0].strip("`") for row in table("file")]
    there = {str(path.relative_to(ROOT)) for folder in ("", "nano") for path in (ROOT / folder).glob("*.py")}
    assert len(listed) == len(set(listed)) and set(listed) == there - {"nano/__init__.py"}


def names_in(path: Path, kinds: tuple[str, ...] = ("name", "id", "arg")) -> set[str]:
    """What the code of a file names."""
    return {value for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) for kind in kinds
            if isinstance(value := getattr(node, kind, None), str)}


def test_names_in_the_prose_are_in_the_code() -> None:
    """What looks like a function, class or constant in backticks, and every .py file, is there."""
    used = set().union(*map(names_in, (*ROOT.glob("*.py"), *ROOT.glob("nano/*.py"))))
    tutorial = PROSE[PROSE.index("# Tutorial"):PROSE.index("# Running stage III")]
    for word in re.findall(r"`([A-Za-z_]+(?:\.[A-Za-z_]+)?)`", tutorial):
        assert (ROOT / word).is_file() if word.endswith(".py") else set(word.split(".")) <= used, word
    for word in re.findall(r"`([a-z_/]+\.py)`", PROSE):
        assert (ROOT / word).is_file(), word
    pairs = re.findall(r"`([a-z_/]+\.py)`, `([A-Za-z_.]*[A-Za-z_])`", PROSE)        # (`file`, `name in it`)
    assert len(pairs) > 15
    for file, name in pairs:
        inside = names_in(ROOT / file, ("name", "id", "arg", "attr"))
        assert (ROOT / name).is_file() or set(name.split(".")) <= inside, f"{name} in {file}"


def test_the_stage_table_is_the_recipes() -> None:
    for stage, row in enumerate(table("stage"), start=1):
        trained = {"queries", "LIM"} | ({"DiT"} if stage > 1 else set())
        assert row[0].startswith(str(stage)) and set(row[1].split(", ")) == trained
        for cell, preset in zip(row[3:], ("nano", "l-1024"), strict=True):
            cfg = train.parse(f"--stage {stage} --preset {preset} --prompts p --eval-prompts p "
                              "--reward-weights w".split())
            pictures = cfg.batch_size if stage < 3 else cfg.num_groups * cfg.group_size
            steps, size, lr = re.match(r"([\d,]+) × ([\d,]+), ([\de.-]+)", cell).groups()
            said = int(steps.replace(",", "")), int(size.replace(",", "")), float(lr)
            assert said == (cfg.steps, pictures, cfg.lr), (
                f"README: stage {stage} of {preset} is {cfg.steps:,} × {pictures:,}, {cfg.lr:g}")
            if stage == 3:
                grpo.check(cfg, world_size=1)


def test_the_tutorial_counts_as_the_recipes_do() -> None:
    nano, full = (train.parse(["--stage", "3", "--preset", name]) for name in ("nano", "l-1024"))
    visits = [cfg.group_size * (cfg.num_steps - 1) for cfg in (nano, full)]
    assert f"{visits[0]} for nano, {visits[1]} for the paper's" in TEXT
    sizes = [math.prod(PRESETS[cfg.preset].latent_shape) for cfg in (nano, full)]
    product = r"\(([\de.-]+) × ([\d,]+)\)"
    said = re.search(rf"([\d.]+) nats for nano {product} and ([\d.]+) for the paper's size {product}",
                     TEXT).groups()
    for cfg, size, (nats, clip_range, elements) in zip((nano, full), sizes, (said[:3], said[3:]),
                                                       strict=True):
        assert (float(clip_range), int(elements.replace(",", ""))) == (cfg.clip_range, size)
        assert float(nats) == pytest.approx(cfg.clip_range * size, abs=0.05)


def test_the_metrics_table_is_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One epoch of a tiny model with the README's own reward logs every metric of the table, and no other."""
    monkeypatch.chdir(tmp_path)
    snippet = next(block for language, block in BLOCKS
                   if language == "python" and block.startswith("def red"))
    Path("my_reward.py").write_text(snippet)
    cfg = train.parse("--stage 3 --rewards my_reward.py:red --dtype fp32 --num-groups 2 --group-size 2 "
                      "--num-steps 2".split())
    run = grpo.start(cfg, tiny_model(), Dist(0, 1, 0, torch.device("cpu")))
    logged = {key.replace("/red", "/<name>")
              for key in (*grpo.run_epoch(run, 0), *grpo.heldout_means({"red": [0.0]}))}
    listed = [key for row in table("metric") for key in re.findall(r"`([^`]+)`", row[0])]
    assert len(listed) == len(set(listed))
    assert set(listed) == logged | {"ldam/layers"}          # the last one only where LDAM fires


# ---- pictures, formulas, snippets ----------------------------------------------------------------------

def test_linked_files_exist_and_pictures_are_small() -> None:
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", PROSE) if "://" not in link]
    assert len(links) >= 3
    for link in links:
        assert (ROOT / link).is_file(), f"{link} is missing"
        assert not link.endswith(".png") or (ROOT / link).stat().st_size < 500_000


def test_formulas_are_written_as_github_renders_them() -> None:
    """Displays stand alone on a line; Markdown eats a backslash before punctuation;
    some macros are refused."""
    lines = PROSE.splitlines()
    displays = [i for i, line in enumerate(lines) if "$$" in line]
    assert len(displays) >= 12
    for i in displays:
        assert re.fullmatch(r"\$\$[^$]+\$\$", lines[i]) and lines[i - 1] == lines[i + 1] == "", lines[i]
    formulas = re.findall(r"\$([^$\n]+)\$", PROSE)
    for formula in formulas:
        assert not re.search(r"\\[^a-zA-Z]|\\operatorname|[<>*|]", formula), formula
        for one, other in ((r"\{", r"\}"), (r"\\left\b", r"\\right\b")):
            assert len(re.findall(one, formula)) == len(re.findall(other, formula)), formula
    assert all(line.count("$") % 2 == 0 for line in lines)


def test_snippets_run_and_draw_the_picture_of_the_world(tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for language, block in BLOCKS:
        if language == "python":
            exec(compile(block, "README.md", "exec"), names)
    assert names["picture"].shape == (3, 32, 32)
    drawn, shipped = (np.asarray(Image.open(folder / "docs" / "world.png"), dtype=float)
                      for folder in (tmp_path, ROOT))
    assert drawn.shape == shipped.shape and abs(drawn - shipped).mean() < 1


def test_the_chapter_on_measuring_counts_as_the_code_does() -> None:
    """Every command of evaluate.py has an example and its figures are the defaults; so have the presets."""
    assert {arguments(c)[1][0] for c in COMMANDS if "evaluate.py" in c} == evaluate.COMMANDS.keys()
    rows = {row[0].strip("`"): row[1] for row in table("command")}
    assert rows.keys() <= evaluate.COMMANDS.keys()
    ablation, layers = analyse.AblateConfig(), analyse.LayersConfig()
    steps = f"{ablation.stage1_steps} + {ablation.stage2_steps} steps of {ablation.pictures} pictures"
    for said in (f"{len(analyse.ROWS)} rows", f"× {ablation.seeds} seeds", steps, f"{ablation.limit} prompts",
                 f"{ablation.stage3_steps} epochs a reward"):
        assert said in rows["ablate"], said
    variants = PRESETS["nano"].vlm.num_layers + 1 + len(analyse.REGIONS)      # each layer; all; no region
    assert f"{variants} variants × {layers.limit} pictures" in rows["layers"]
    assert f"{evaluate.ReconstructConfig().count} pictures" in rows["reconstruct"]
    assert evaluate.KEEP in rows["reconstruct"]
    assert f"{evaluate.UnderstandConfig().count:,} held-out questions" in rows["understand"]
    assert all(f"`{name}`" in PROSE for name in PRESETS)


def test_the_chapter_on_full_size_says_what_the_code_does() -> None:
    chapter = PROSE[PROSE.index("# Full size"):PROSE.index("# Reference")]
    cfg = train.TrainConfig()
    for said in (f"{data.MIX_BLOCK:,} items", f"{data.MAX_PIXELS // 10**6} million pixels",
                 f"`--max-bad` ({cfg.max_bad:g} of", f"`--max-skipped` ({cfg.max_skipped})"):
        assert said in chapter, said
    kept = re.search(r"keeps its flags, except ([^.]+)\.", chapter).group(1)
    said = {flag.removeprefix("--").replace("-", "_") for flag in re.findall(r"`([^`]+)`", kept)}
    assert said == set(train.MAY_CHANGE) - {"run_dir", "resume"}


def test_every_number_is_filled_in() -> None:
    left = dict.fromkeys(re.findall(r"\{\{\w+\}\}", TEXT))
    assert not left, f"still to be measured: {', '.join(left)}"


def test_the_first_screen_and_the_length() -> None:
    first = TEXT.splitlines()[:20]
    assert any(line.startswith("![") for line in first) and "torchrun train.py --stage 3" in "\n".join(first)
    tutorial = TEXT[:TEXT.index("# Measure a model")]                 # the method, until it has been trained
    assert len(tutorial.splitlines()) < 260 and len(TEXT.splitlines()) < 520 and len(TEXT.split()) < 7300
