"""The plumbing: flags, seeds, files, the run folder, checkpoints, the helpers of a training step."""
import json
import os
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from common import (
    Dist, Refused, RunConfig, StopSignal, adamw, atomic, clip_gradients, compile_parts, config_dict,
    cosine_lr, derive_seed, ema_update, find_checkpoint, fingerprint, generator, knob, load_checkpoint,
    open_run, parse_config, read_lines, read_log, refuse_changes, resolve, run, save_checkpoint, swapped,
    write_log,
)
from helpers import TINY, tiny_model

ALONE = Dist(0, 1, torch.device("cpu"))


# ----------------------------------------------------------------------------- flags

@dataclass(frozen=True)
class Flags:
    size: str = knob("small", "named settings")
    stage: int = knob(1, "which one", choices=(1, 2))
    lr: float = knob(1e-4, "learning rate, 100% at the peak")
    compile: bool = knob(False, "compile the model")
    rewards: tuple[str, ...] = knob(("clip", "pickscore"), "in order")
    words: tuple[str, ...] = knob((), "prompts", words=True)


def recipe(flags: dict) -> dict:
    return {"lr": 0.5, "compile": True} if flags.get("size") == "large" else {}


def test_defaults_then_recipe_then_flags() -> None:
    assert parse_config(Flags, [], recipe) == Flags()
    assert parse_config(Flags, ["--size", "large"], recipe) == Flags(size="large", lr=0.5, compile=True)
    # a flag that equals the default still beats the recipe
    given = ["--lr", "1e-4", "--size=large", "--no-compile"]
    assert parse_config(Flags, given, recipe) == Flags(size="large")


def test_lists_with_commas_and_words_that_stand_anywhere() -> None:
    cfg = parse_config(Flags, ["a red star", "--rewards", "a,b", "--stage", "2", "two moons"])
    assert (cfg.rewards, cfg.stage, list(cfg.words)) == (("a", "b"), 2, ["a red star", "two moons"])
    assert parse_config(Flags, ["--rewards", ""]).rewards == ()


@pytest.mark.parametrize("argv", [["--sage", "1"], ["--rew", "a"], ["--stage", "3"], ["--stage", "two"],
                                  ["--lr"], ["--compile=yes"]])
def test_a_wrong_flag_ends_the_script_with_its_name(argv: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse_config(Flags, argv)
    assert stopped.value.code == 2 and argv[0].split("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize("change, words", [({"lr": 0.5}, "--lr 0.0001 -> 0.5"),
                                           ({"compile": True}, "--compile False -> True")])
def test_other_flags_are_refused_and_one_that_did_not_exist_has_its_default(change: dict, words: str) -> None:
    old = {"size": "small", "lr": 1e-4}
    refuse_changes(old, Flags(size="large"), ("size",), "the run")
    with pytest.raises(Refused, match=words):
        refuse_changes(old, replace(Flags(), **change), (), "the run")


def test_what_auto_means_on_each_device() -> None:
    def decided(device: str, small: bool = False, **flags: object) -> tuple:
        cfg = resolve(RunConfig(**flags), torch.device(device), small)
        return cfg.dtype, cfg.compile
    assert decided("cuda") == ("bf16", True)
    assert decided("cuda", small=True) == decided("cuda", fsdp=True) == ("bf16", False)
    assert decided("cuda", dtype="fp32", compile=False) == decided("cpu") == ("fp32", False)


def test_a_refusal_is_one_line_and_a_mistake_of_ours_keeps_its_traceback() -> None:
    def refuse() -> None:
        raise Refused("no such file: change --weights")
    with pytest.raises(SystemExit, match="^error: no such file: change --weights$"):
        run(refuse)
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0)


# ----------------------------------------------------------------------------- seeds and files

def test_seeds_are_stable_and_distinct() -> None:
    assert derive_seed(0, "rollout", 1, 2, 3) == 6855106362326582050
    keys = [(1, 2), (2, 1), ("1", 2), (12,), (1, "2"), ("1, 2",), (1, 2, 0), ("ab",), ("a", "b"), (-1, 2)]
    assert len({derive_seed(*key) for key in keys}) == len(keys)
    assert derive_seed(np.int64(-3), np.int32(7)) == derive_seed(-3, 7)
    before = torch.get_rng_state()
    assert torch.rand(1, generator=generator("x")) == torch.rand(1, generator=generator("x"))
    assert torch.equal(before, torch.get_rng_state())


def test_lines_end_at_newlines_only_and_a_bom_is_no_word(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("\ufeffa red\u2028heart\r\n\n  two \x0bmoons \n".encode())
    assert read_lines(tmp_path / "p.txt") == ["a red\u2028heart", "two \x0bmoons"]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.txt"
    with atomic(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(OSError, match="disk"), atomic(path) as temporary:
        temporary.write_text("half")
        raise OSError("the disk is full")
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


def test_a_fingerprint_hears_every_bit_and_every_name() -> None:
    module, other = nn.Linear(2, 2), nn.Linear(2, 2)
    other.load_state_dict(module.state_dict())
    assert fingerprint(other) == fingerprint(module) != fingerprint(nn.Sequential(module))
    with torch.no_grad():
        other.bias[1] = torch.nextafter(other.bias[1], torch.tensor(9.0))
    assert fingerprint(other) != fingerprint(module)


# ----------------------------------------------------------------------------- the run folder

@pytest.fixture
def cfg(tmp_path: Path) -> RunConfig:
    return RunConfig(run_dir=str(tmp_path / "run"))


def after_a_step(value: float) -> tuple[dict, dict, torch.optim.Optimizer]:
    """One parameter, its average, its optimizer."""
    params = {"w": nn.Parameter(torch.full((2, 2), float(value)))}
    optimizer = adamw(params.values(), 0.1, 0.0)
    params["w"].square().sum().backward()
    optimizer.step()
    return params, {"w": torch.full((2, 2), 3.0 * value)}, optimizer


def save(cfg: RunConfig, *steps: int) -> None:
    for step in steps:
        save_checkpoint(cfg, ALONE, step, *after_a_step(step), {"step": step, "place": [1, None]})


def saved(cfg: RunConfig) -> list[int]:
    return sorted(int(path.stem) for path in (Path(cfg.run_dir) / "checkpoints").iterdir())


def test_a_checkpoint_gives_back_weights_average_and_optimizer(cfg: RunConfig) -> None:
    save(cfg, 7)
    state = open_run(replace(cfg, resume="auto"), ALONE, "step")
    params, ema, optimizer = after_a_step(1)
    load_checkpoint(state, params, ema, optimizer)
    want_params, want_ema, want_optimizer = after_a_step(7)
    assert torch.equal(params["w"], want_params["w"]) and torch.equal(ema["w"], want_ema["w"])
    got, want = (list(each.state.values())[0] for each in (optimizer, want_optimizer))
    assert all(torch.equal(got[key], want[key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    assert state["place"] == [1, None] and state["config"] == config_dict(cfg)


def test_the_newest_stay_and_another_future_goes(cfg: RunConfig) -> None:
    save(cfg, 5, 10, 100)
    assert saved(cfg) == [10, 100]
    save(replace(cfg, keep=1), 200)
    assert saved(cfg) == [200]
    save(replace(cfg, keep=3), 160, 170, 150, 165)
    assert saved(cfg) == [150, 165]


@pytest.mark.parametrize("module, function", [(torch, "save"), (os, "replace")])
def test_a_crash_while_saving_leaves_a_good_checkpoint(cfg: RunConfig, module: object, function: str,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*args: object) -> None:
        raise OSError("the disk is full")
    save(cfg, 1)
    monkeypatch.setattr(module, function, crash)
    with pytest.raises(OSError, match="disk"):
        save(cfg, 2)
    monkeypatch.undo()
    assert saved(cfg) == [1] and open_run(replace(cfg, resume="auto"), ALONE, "step")["step"] == 1


def test_a_checkpoint_with_code_in_it_is_not_loaded(cfg: RunConfig) -> None:
    save(cfg, 1)
    torch.save({"f": print}, find_checkpoint("auto", cfg.run_dir))
    with pytest.raises(Exception, match="[Ww]eights.only"):
        open_run(replace(cfg, resume="auto"), ALONE, "step")


def test_what_resume_names(cfg: RunConfig, tmp_path: Path) -> None:
    assert find_checkpoint("auto", cfg.run_dir) is None
    save(cfg, 9, 10)
    older, newer = (Path(cfg.run_dir) / "checkpoints" / f"{step:08}.pt" for step in (9, 10))
    assert find_checkpoint("", cfg.run_dir) is None
    assert find_checkpoint("auto", cfg.run_dir) == find_checkpoint(cfg.run_dir, "elsewhere") == newer
    assert find_checkpoint(str(older), "elsewhere") == older
    with pytest.raises(Refused, match="no checkpoint in .*nothing"):
        find_checkpoint(str(tmp_path / "nothing"), cfg.run_dir)


def test_a_folder_in_use_is_left_alone_and_an_empty_log_is_no_run(cfg: RunConfig) -> None:
    log = Path(cfg.run_dir) / "metrics.jsonl"
    assert open_run(cfg, ALONE, "step") is None and log.read_text() == ""
    assert open_run(cfg, ALONE, "step") is None
    write_log(cfg.run_dir, {"step": 1}, ALONE)
    with pytest.raises(Refused, match="--resume auto"):
        open_run(cfg, ALONE, "step")
    assert read_log(log) == [{"step": 1}]


def test_a_resumed_log_forgets_what_came_after_the_checkpoint(cfg: RunConfig) -> None:
    log = Path(cfg.run_dir) / "metrics.jsonl"
    save(cfg, 2)
    log.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    assert len(read_log(log)) == 3
    open_run(replace(cfg, resume="auto"), ALONE, "step")
    assert log.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_what_is_not_finite_is_null_in_the_log(tmp_path: Path) -> None:
    write_log(tmp_path, {"loss": float("nan"), "norm": float("inf"), "lr": 0.5, "phase": "é"}, ALONE)
    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert record == {"loss": None, "norm": None, "lr": 0.5, "phase": "é"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_remembered_and_the_handlers_put_back(number: int) -> None:
    before = signal.getsignal(number)
    with StopSignal() as stopping:
        assert not stopping.stop
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        assert stopping.stop
    assert signal.getsignal(number) == before


# ----------------------------------------------------------------------------- a training step

def test_the_learning_rate_warms_up_and_falls_along_a_cosine() -> None:
    rates = [cosine_lr(step, total=110, warmup=10, base=2.0) for step in range(111)]
    assert rates[0] == pytest.approx(2 / 11) and rates[10] == max(rates) == 2.0
    assert rates[60] == pytest.approx(1.0) and rates[110] == pytest.approx(0.0)
    assert cosine_lr(0, 10, 0, 3.0) == cosine_lr(5, 5, 5, 3.0) == 3.0


def test_weight_decay_is_on_matrices_only() -> None:
    matrix, bias = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    matrix.grad, bias.grad = torch.zeros(2, 2), torch.zeros(2)
    adamw([matrix, bias], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(matrix.detach(), torch.full((2, 2), 0.95))
    assert torch.equal(bias, torch.ones(2))


def test_clipping_scales_by_the_joint_norm() -> None:
    params = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    params[0].grad, params[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    assert clip_gradients(params, 9.0) == 5 and clip_gradients(params, 1.0) == 5
    torch.testing.assert_close(params[0].grad, torch.tensor([0.6, 0.0]))


def test_the_average_follows_in_place_and_changes_places_with_the_weights() -> None:
    params, ema = {"w": nn.Parameter(torch.ones(1))}, {"w": torch.zeros(1)}
    ema_update(ema, params, 0.9)
    assert ema["w"].item() == pytest.approx(0.1)
    with swapped(params, ema):
        assert params["w"].item() == pytest.approx(0.1) and ema["w"] == 1
    assert params["w"] == 1 and ema["w"].item() == pytest.approx(0.1)


def test_on_a_gpu_equal_blocks_are_compiled_once_whatever_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    dit, counter, compiled, counts = tiny_model().dit, CompileCounter(), [], []

    def compile_with_counter(block: nn.Module) -> None:
        compiled.append(block)
        block._compiled_call_impl = torch.compile(block._call_impl, backend=counter, fullgraph=True)
    monkeypatch.setattr(nn.Module, "compile", compile_with_counter)
    compile_parts(torch.device("cuda"), dit)
    assert compiled == list(dit.transformer_blocks) and len(compiled) == 2
    for B in (2, 3, 4, 2):
        dit(torch.randn(B, *TINY.latent_shape), torch.rand(B), torch.randn(B, 4, 32))
        counts.append(counter.frame_count)
    # for one size, then for any
    assert counts == [1, 2, 2, 2]
