"""The plumbing: flags, seeds, files, the run folder, checkpoints, the helpers of a training step."""
import doctest
import os
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

import common
import data
import ldam
from common import (Refused, RunConfig, adamw, derive_seed, find_checkpoint,
                    fingerprint, generator, knob, open_run, parse_config, read_log, resolve, save_checkpoint)
from helpers import ALONE
from train import TrainConfig


@dataclass(frozen=True)
class Flags:
    size: str = knob("small", "named settings")
    lr: float = knob(1e-4, "learning rate, 100% at the peak")
    compile: bool = knob(False, "compile the model")


def test_defaults_then_recipe_then_flags(capsys: pytest.CaptureFixture) -> None:
    recipe = {"lr": 0.5, "compile": True}
    with pytest.raises(SystemExit):
        parse_config(Flags, ["--help"], recipe)
    assert "100% at the peak (default: 0.5)" in " ".join(capsys.readouterr().out.split())
    assert parse_config(Flags, []) == Flags()
    assert parse_config(Flags, ["--size", "large"], recipe) == Flags(size="large", lr=0.5, compile=True)
    # a flag that equals the default still beats the recipe
    assert parse_config(Flags, ["--lr=1e-4", "--size=large", "--no-compile"], recipe) == Flags(size="large")


def test_what_auto_means_on_each_device() -> None:
    def decided(device: str, small: bool = False, **flags: object) -> tuple:
        cfg = resolve(RunConfig(**flags), torch.device(device), small)
        return cfg.dtype, cfg.compile
    assert decided("cuda") == ("bf16", True)
    assert decided("cuda", small=True) == ("bf16", False)
    assert decided("cuda", dtype="fp32", compile=False) == decided("cpu") == ("fp32", False)


def test_seeds_are_stable() -> None:
    assert derive_seed(0, "rollout", 1, 2, 3) == 6855106362326582050
    assert derive_seed(np.int64(-3), np.int32(7)) == derive_seed(-3, 7)
    before = torch.get_rng_state()
    assert torch.rand(1, generator=generator("x")) == torch.rand(1, generator=generator("x"))
    assert torch.equal(before, torch.get_rng_state())


def test_a_fingerprint_hears_every_bit_and_every_name() -> None:
    module, other = nn.Linear(2, 2), nn.Linear(2, 2)
    other.load_state_dict(module.state_dict())
    assert fingerprint(other) == fingerprint(module) != fingerprint(nn.Sequential(module))
    with torch.no_grad():
        other.bias[1] = torch.nextafter(other.bias[1], torch.tensor(9.0))
    assert fingerprint(other) != fingerprint(module)


@pytest.fixture
def cfg(tmp_path: Path) -> RunConfig:
    return RunConfig(run_dir=str(tmp_path / "run"))


def save(cfg: RunConfig, *steps: int) -> None:
    params = {"w": nn.Parameter(torch.zeros(2, 2))}
    for step in steps:
        save_checkpoint(cfg, ALONE, step, params, {}, adamw(params.values(), 0.1, 0.0), {"step": step})


def saved(cfg: RunConfig) -> list[int]:
    return sorted(int(path.stem) for path in (Path(cfg.run_dir) / "checkpoints").iterdir())


def test_the_newest_stay_and_another_future_goes(cfg: RunConfig) -> None:
    save(cfg, 5, 10, 100)
    assert saved(cfg) == [10, 100]
    for copy_or_half in ("999.pt", ".00000110.pt.77"):
        (Path(cfg.run_dir) / "checkpoints" / copy_or_half).touch()
    save(replace(cfg, keep=1), 200)
    assert saved(cfg) == [200, 999] and find_checkpoint("auto", cfg.run_dir).stem == "00000200"
    save(replace(cfg, keep=3), 160, 170, 150, 165)
    assert saved(cfg) == [150, 165, 999]
    save(replace(cfg, keep=9), *range(170, 180))
    assert saved(cfg) == [*range(171, 180), 999]


@pytest.mark.parametrize("module, function", [(torch, "save"), (os, "fsync"), (os, "replace")])
def test_a_crash_while_saving_leaves_a_good_checkpoint(cfg: RunConfig, module: object, function: str,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*args: object) -> None:
        raise OSError("the disk is full")
    save(cfg, 1)
    monkeypatch.setattr(module, function, crash)
    with pytest.raises(OSError, match="disk"):
        save(cfg, 2)
    monkeypatch.undo()
    assert saved(cfg) == [1] and open_run(replace(cfg, resume="auto"), ALONE)["step"] == 1
    # another machine without this disk found none
    monkeypatch.setattr(common, "gather", lambda step, dist: torch.stack([step, 0 * step]))
    with pytest.raises(Refused, match="different checkpoints"):
        open_run(replace(cfg, resume="auto"), ALONE)


def test_a_checkpoint_with_code_in_it_is_not_loaded(cfg: RunConfig) -> None:
    save(cfg, 1)
    torch.save({"f": print}, find_checkpoint("auto", cfg.run_dir))
    with pytest.raises(Exception, match="[Ww]eights.only"):
        open_run(replace(cfg, resume="auto"), ALONE)


def test_a_run_folder_is_resumed_from_its_newest_checkpoint(cfg: RunConfig, tmp_path: Path) -> None:
    save(cfg, 9, 10)
    newest = Path(cfg.run_dir) / "checkpoints" / "00000010.pt"
    with common.atomic(tmp_path / "x") as one, common.atomic(tmp_path / "x") as other:
        assert one != other
    assert find_checkpoint("auto", cfg.run_dir) == find_checkpoint(cfg.run_dir, "elsewhere") == newest
    for resume, words in (("", "already holds a run"), (str(tmp_path / "gone"), "no checkpoint in .*gone")):
        with pytest.raises(Refused, match=words):
            open_run(replace(cfg, resume=resume), ALONE)


def test_a_flag_that_is_younger_than_a_run_had_its_default_there(cfg: RunConfig) -> None:
    save(replace(cfg, warmup=1000), 1)
    younger = TrainConfig(run_dir=cfg.run_dir, resume="auto")
    open_run(younger, ALONE)
    # a script says so in one line, and fails
    with pytest.raises(SystemExit, match="^error: .*--batch-size 512 -> 2.:"):
        common.run(lambda: open_run(replace(younger, batch_size=2), ALONE))


def test_a_resumed_log_forgets_what_came_after_the_checkpoint(cfg: RunConfig) -> None:
    log = Path(cfg.run_dir) / "metrics.jsonl"
    save(cfg, 2)
    log.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    assert len(read_log(log)) == 3
    open_run(replace(cfg, resume="auto"), ALONE)
    assert log.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("module", [common, data, ldam], ids=lambda module: module.__name__)
def test_the_examples_in_docstrings(module: ModuleType) -> None:
    results = doctest.testmod(module)
    assert results.attempted and not results.failed
