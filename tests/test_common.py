"""Tests of the shared plumbing: flags, seeds, processes, weights, checkpoints, run folder, log, pictures."""
import errno
import itertools
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import FrozenInstanceError, dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import common
from common import (
    RunLog, StopSignal, config_dict, cosine_lr, count_params, derive_seed, ema_update, environment,
    find_checkpoint, generator, image_grid, knob, load_checkpoint, load_into, parse_config, peak_memory_gb,
    prepare_run_dir, read_metrics, read_safetensors, run_main, save_checkpoint, save_image, save_png,
    save_safetensors, setup_dist,
)
from helpers import tiny_model

ROOT = Path(common.__file__).parent


@dataclass(frozen=True)
class Config:
    preset: str = knob("small", "named settings")
    stage: int = knob(1, "training stage", choices=(1, 2, 3))
    lr: float = knob(1e-4, "learning rate, 100% at the peak")
    run_dir: str = knob("runs/x", "output folder")
    resume: str = knob("", "auto or a folder")
    compile: bool = knob(False, "compile the model")
    rewards: tuple[str, ...] = knob(("clip", "pick"), "in order", choices=("clip", "pick", "aesthetic"))
    words: tuple[str, ...] = knob((), "prompts", positional="*")

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"--lr must be positive, got {self.lr}")


PRESETS = {"small": {}, "large": {"lr": 0.5, "compile": True, "rewards": ("aesthetic",)}}


def parse(*argv: str) -> Config:
    return parse_config(Config, PRESETS, list(argv))


def parse_error(capsys: pytest.CaptureFixture, *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def run_python(code: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHONPATH": str(ROOT), **env})


# ----------------------------------------------------------------------------- flags, entry point
def test_defaults_preset_flags_in_that_order() -> None:
    assert parse() == Config()
    assert parse("--preset", "large") == Config(preset="large", lr=0.5, compile=True, rewards=("aesthetic",))
    mixed = parse("--lr", "2", "--preset", "large", "--no-compile", "--rewards", "pick, clip")
    assert mixed == Config(preset="large", lr=2.0, compile=False, rewards=("pick", "clip"))
    # a flag equal to the default still beats the preset
    assert parse("--preset", "large", "--lr", "1e-4").lr == 1e-4


def test_types_of_flags() -> None:
    cfg = parse("--stage", "3", "--run-dir", "a b", "--compile", "--rewards", "")
    assert (cfg.stage, cfg.run_dir, cfg.compile, cfg.rewards) == (3, "a b", True, ())
    with pytest.raises(FrozenInstanceError):
        cfg.stage = 2


def test_words_stand_anywhere() -> None:
    cfg = parse("a red star", "--stage", "2", "two moons")
    assert cfg.words == ("a red star", "two moons") and cfg.stage == 2
    assert parse("--stage", "2", "x").words == ("x",)
    assert parse("--stage", "2").words == ()


def test_default_preset_of_the_config_applies() -> None:
    assert parse_config(Config, {"small": {"stage": 3}}, []).stage == 3


def test_config_without_presets() -> None:
    @dataclass(frozen=True)
    class Plain:
        steps: int = knob(5, "steps")

    assert parse_config(Plain, {}, ["--steps", "7"]).steps == 7


@pytest.mark.parametrize("argv, words", [
    (["--sage", "1"], ["--sage", "did you mean --stage"]),
    (["--run_dir", "x"], ["--run_dir", "did you mean --run-dir"]),
    (["--run", "x"], ["--run"]),  # no abbreviations
    (["--stage=1", "--qqqqqq=1"], ["--qqqqqq", "--help"]),
    (["--no-compil"], ["did you mean --no-compile"]),
    (["--stage", "4"], ["--stage", "4", "1, 2, 3"]),
    (["--stage", "two"], ["--stage", "invalid int value", "two"]),
    (["--lr", "fast"], ["--lr", "invalid float value", "fast"]),
    (["--rewards", "clip,beauty"], ["--rewards", "beauty", "clip, pick, aesthetic"]),
    (["--preset", "huge"], ["huge", "--preset", "small, large"]),
    (["--lr"], ["--lr", "expected one argument"]),
    (["--compile=yes"], ["--compile"]),
])
def test_bad_flags_are_one_line(capsys: pytest.CaptureFixture, argv: list[str], words: list[str]) -> None:
    message = parse_error(capsys, *argv)
    assert all(word in message for word in words), message


def test_words_without_a_positional_are_refused(capsys: pytest.CaptureFixture) -> None:
    @dataclass(frozen=True)
    class Plain:
        steps: int = knob(5, "steps")

    with pytest.raises(SystemExit):
        parse_config(Plain, {}, ["seven"])
    assert capsys.readouterr().err == "error: unexpected argument 'seven': see --help\n"


def test_help_shows_defaults_choices_and_presets(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_config(Config, PRESETS, ["--help"], description="Trains.")
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for part in ("Trains.", "(default: 0.0001)", "100% at the peak", "--no-compile",
                 "small, large", "{1,2,3}", "(default: clip,pick)", "(default: none)", "WORDS"):
        assert part in text, part


def test_config_dict_is_plain_json() -> None:
    plain = config_dict(parse("--rewards", "clip"))
    assert plain["rewards"] == ["clip"] and plain["compile"] is False
    assert json.loads(json.dumps(plain)) == plain


def test_import_stays_light() -> None:
    heavy = "{'torch', 'numpy', 'safetensors', 'matplotlib', 'PIL'}"
    code = f"import sys, common; print({heavy} & set(sys.modules))"
    assert run_python(code).stdout.strip() == "set()"


def test_run_main_own_error_is_one_line(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: parse("--lr", "-1"))
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: --lr must be positive, got -1.0\n"


def test_run_main_missing_file_opened_by_us(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: open("/no/such/file"))
    assert stop.value.code == 2 and "/no/such/file" in capsys.readouterr().err


def test_run_main_passes_argv_on() -> None:
    seen = []
    run_main(seen.append, ["--x"])
    run_main(lambda: seen.append("called"))
    assert seen == [["--x"], "called"]


def test_run_main_names_the_flags_where_memory_is_full(capsys: pytest.CaptureFixture) -> None:
    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 36.00 MiB. GPU 0 has 79 GB. More")
    with pytest.raises(SystemExit) as stop:
        run_main(full)
    said = capsys.readouterr().err
    assert stop.value.code == 1 and said.count("\n") == 1 and "36.00 MiB" in said and "More" not in said
    assert "--micro-batch" in said and "--gradient-checkpointing" in said


@pytest.mark.parametrize("bug", [lambda: int("x"), lambda: json.loads("{"), lambda: {}["key"], lambda: 1 / 0,
                                 lambda: torch.zeros(2) @ torch.zeros(3)])
def test_run_main_leaves_bugs_alone(bug: Callable) -> None:
    with pytest.raises((ValueError, KeyError, ZeroDivisionError, RuntimeError)):
        run_main(bug)


def test_run_main_in_a_script(tmp_path: Path) -> None:
    own = run_python("import common; common.run_main(lambda: common.read_metrics('nowhere.jsonl'))")
    assert (own.returncode, own.stdout, own.stderr) == (2, "", "error: no run log at nowhere.jsonl\n")
    library = tmp_path / "site-packages" / "library.py"  # a venv in the project folder is not ours
    library.parent.mkdir()
    library.write_text("def work():\n    raise ValueError('theirs')\n")
    code = (f"import sys, common; sys.path.append({str(library.parent)!r}); import library\n"
            f"common.ROOT = common.Path({str(tmp_path)!r}); common.run_main(library.work)")
    theirs = run_python(code)
    assert theirs.returncode == 1 and "Traceback" in theirs.stderr and "ValueError: theirs" in theirs.stderr


def test_run_main_interrupt(capsys: pytest.CaptureFixture) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as stop:
        run_main(interrupted)
    assert stop.value.code == 130 and capsys.readouterr().err == "interrupted\n"


# ----------------------------------------------------------------------------- seeds and processes
def test_generator_is_stable() -> None:
    key = (0, "rollout", 1, 2, 3)
    assert derive_seed(*key) == 6855106362326582050
    assert torch.randint(10**9, (2,), generator=generator(*key)).tolist() == [779094512, 371713916]


def test_generator_keys_are_distinct() -> None:
    keys = [(1, 2), (2, 1), ("1", 2), (12,), (1, "2"), ("1, 2",), (1, 2, 0), ("a", "b"), ("ab",)]
    assert len({derive_seed(*key) for key in keys}) == len(keys)
    assert all(0 <= derive_seed(*key) < 2**63 for key in keys)


def test_generator_leaves_the_global_state_alone() -> None:
    before = torch.get_rng_state()
    torch.rand(3, generator=generator("x"))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_compiling_goes_block_by_block_on_a_gpu(device: str) -> None:
    import torch._inductor.config as inductor
    inductor.triton.mix_order_reduction, torch._dynamo.config.recompile_limit = True, 8
    model = tiny_model()
    common.compile_parts(torch.device(device), model.lim, model.dit)
    blocks = [*model.lim.connector.layers, *model.dit.transformer_blocks]
    compiled = [part for part in model.modules() if part._compiled_call_impl is not None]
    assert set(compiled) == set([model.lim, model.dit] if device == "cpu" else blocks)
    assert not inductor.triton.mix_order_reduction and torch._dynamo.config.recompile_limit >= 16


def test_single_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    dist = setup_dist()
    assert (dist.rank, dist.world_size, dist.local_rank) == (0, 1, 0)
    assert dist.device.type == "cpu"
    assert not torch.distributed.is_initialized()
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.tensor([1.0, 2.0])
    common.average_gradients([weight], dist)
    assert weight.grad.tolist() == [1.0, 2.0]
    assert common.all_reduce_mean(weight.grad, dist).tolist() == [1.0, 2.0]
    assert common.all_gather_list(weight.grad, dist).tolist() == [1.0, 2.0]
    common.cleanup_dist()


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ValueError, match="1 GPU.*--nproc-per-node"):
        setup_dist()


TWO_RANKS = """
import json, torch, common
from torch import nn
common.BUCKET_ELEMENTS = 4  # several buckets
torch.set_num_threads(1)
dist = common.setup_dist()
r = dist.rank
params = [nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(1)),
          nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1), requires_grad=False)]
params[0].grad = torch.arange(4.0).view(2, 2) + 10 * r
params[1].grad = torch.full((3,), 1.0 + r)
if r == 1:
    params[2].grad = torch.tensor([8.0])
common.average_gradients(params, dist)
gathered = common.all_gather_list(torch.arange(2 * r).view(-1, 1) + 5 * r, dist)
mean = common.all_reduce_mean(torch.tensor([1 + r]), dist)
print(json.dumps({"rank": r, "world": dist.world_size, "mean": mean.tolist(),
                  "grads": [p.grad if p.grad is None else p.grad.tolist() for p in params],
                  "gathered": gathered.tolist(), "dtype": str(gathered.dtype)}))
common.cleanup_dist()
assert not torch.distributed.is_initialized()
"""


def test_two_processes() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "WORLD_SIZE": "2",
              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    workers = [subprocess.Popen([sys.executable, "-c", TWO_RANKS], text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE, env={**shared, "RANK": rank, "LOCAL_RANK": rank})
               for rank in "01"]
    try:
        outputs = [worker.communicate(timeout=120) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for rank, (out, err) in enumerate(outputs):
        assert workers[rank].returncode == 0, err
        assert json.loads(out) == {
            "rank": rank, "world": 2, "mean": [1.5], "gathered": [[5], [6]], "dtype": "torch.int64",
            "grads": [[[5.0, 6.0], [7.0, 8.0]], [1.5] * 3, [4.0], None, None]}


def test_a_lost_peer_is_one_sentence() -> None:
    two, alone = (common.Dist(1, world, 1, torch.device("cpu")) for world in (2, 1))
    for error in (RuntimeError("[../third_party/gloo/transport/tcp/pair.cc:534] Connection closed by peer"),
                  RuntimeError("NCCL error: remote process exited"),
                  torch.distributed.DistNetworkError("gone")):
        with pytest.raises(common.PeerLost, match="process 1 of 2 lost the others.*--resume auto"):
            with common.peer_lost_sentence(two):
                raise error
        with pytest.raises(RuntimeError) as caught, common.peer_lost_sentence(alone):
            raise error
        assert caught.value is error
    with pytest.raises(RuntimeError, match="shapes differ"), common.peer_lost_sentence(two):
        raise RuntimeError("shapes differ")


def test_a_lost_peer_ends_a_script_with_one_line(capsys: pytest.CaptureFixture) -> None:
    def lost() -> None:
        raise common.PeerLost("process 1 of 2 lost the others")
    with pytest.raises(SystemExit) as stop:
        run_main(lost)
    assert stop.value.code == 1 and capsys.readouterr().err == "error: process 1 of 2 lost the others\n"


def test_clipping_is_torchs_own_where_nothing_is_split() -> None:
    alone = common.Dist(0, 1, 0, torch.device("cpu"))
    weights = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    weights[0].grad, weights[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    assert common.clip_gradients(weights, 1.0, alone) == 5 and weights[2].grad is None
    torch.testing.assert_close(weights[0].grad, torch.tensor([0.6, 0.0]))
    assert common.whole({"a": [weights[0], 3]})["a"][0] is weights[0]
    assert common.split_like(weights[0], weights[1]) is weights[0]


# ----------------------------------------------------------------------------- weights
def test_safetensors_round_trip_of_awkward_tensors(tmp_path: Path) -> None:
    shared = torch.arange(6.0).view(2, 3)
    tensors = {"a": shared, "b": shared, "turned": shared.t(), "row": shared[1],
               "half": torch.ones(2).bfloat16()}
    save_safetensors(tmp_path / "new" / "w.safetensors", tensors, {"step": "3"})
    loaded, metadata = read_safetensors(tmp_path / "new" / "w.safetensors")
    assert metadata == {"step": "3"} and loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["w.safetensors"]


@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_safetensors_are_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    path = tmp_path / "w.safetensors"
    save_safetensors(path, {"a": torch.zeros(2)})

    def crash(*args: object) -> None:
        raise RuntimeError("crash")
    monkeypatch.setattr(os, function, crash)
    with pytest.raises(RuntimeError, match="crash"):
        save_safetensors(path, {"a": torch.ones(2)})
    assert read_safetensors(path)[0]["a"].tolist() == [0, 0]
    assert list(tmp_path.iterdir()) == [path]


def test_damaged_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    with pytest.raises(FileNotFoundError, match="no safetensors file at .*w.safetensors"):
        read_safetensors(path)
    save_safetensors(path, {"a": torch.zeros(100)})
    whole = path.read_bytes()
    for content in (whole[:-10], whole[:20], b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="w.safetensors is truncated"):
            read_safetensors(path)


def test_load_into() -> None:
    source, target = nn.Linear(2, 3), nn.Linear(2, 3)
    load_into(target, source.state_dict(), "w.safetensors")
    assert torch.equal(source.weight, target.weight) and torch.equal(source.bias, target.bias)


def test_load_into_named_parameters() -> None:
    source, target = nn.Linear(2, 3), nn.Linear(2, 3)
    load_into({"w": target.weight}, {"w": source.weight.detach()}, "w.safetensors")
    assert torch.equal(source.weight, target.weight) and target.weight.requires_grad
    assert not torch.equal(source.bias, target.bias)
    with pytest.raises(ValueError, match="w.safetensors does not fit the model .1 missing: w; 1 unknown: v."):
        load_into({"w": target.weight}, {"v": source.weight}, "w.safetensors")


def test_load_into_names_every_fault_once() -> None:
    module = nn.Sequential(*[nn.Linear(2, 2) for _ in range(3)])
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    tensors = {"0.weight": torch.zeros(4, 2), "0.bias": torch.zeros(2), "extra": torch.zeros(1)}
    with pytest.raises(ValueError) as error:
        load_into(module, tensors, "w.safetensors", "is --preset right?")
    assert str(error.value) == (
        "w.safetensors does not fit Sequential (4 missing: 1.bias, 1.weight, 2.bias, ...; 1 unknown: extra; "
        "1 of another shape: 0.weight is (4, 2) instead of (2, 2)): is --preset right?")
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


# ----------------------------------------------------------------------------- checkpoints
def save(run_dir: Path, step: int, keep: int = 2, value: float | None = None) -> Path:
    weights = {"w": torch.full((3,), float(step) if value is None else value)}
    state = {"optimizer": {"lr": 0.1, "m": torch.ones(2)}, "rng": torch.get_rng_state(), "place": [1, None]}
    return save_checkpoint(run_dir, step, {"trained": weights, "ema": weights}, state, keep, {"reward": 0.5})


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def test_checkpoint_round_trip(tmp_path: Path) -> None:
    path = save(tmp_path, 123)
    assert path == tmp_path / "checkpoints" / "step-00000123"
    assert sorted(file.name for file in path.iterdir()) == ["ema.safetensors", "meta.json", "state.pt",
                                                            "trained.safetensors"]
    tensors, state, meta = load_checkpoint(path)
    assert tensors.keys() == {"trained", "ema"} and tensors["ema"]["w"].tolist() == [123.0] * 3
    assert torch.equal(state["rng"], torch.get_rng_state()) and state["place"] == [1, None]
    assert meta["step"] == 123 and meta["reward"] == 0.5


def test_old_checkpoints_are_removed(tmp_path: Path) -> None:
    for step in (5, 10, 100):
        save(tmp_path, step)
    assert names(tmp_path) == ["step-00000010", "step-00000100"]
    save(tmp_path, 200, keep=1)
    assert names(tmp_path) == ["step-00000200"]
    with pytest.raises(ValueError, match="at least 1, got 0"):
        save(tmp_path, 300, keep=0)


def test_checkpoints_of_an_abandoned_future_are_removed(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step, keep=3)
    save(tmp_path, 15, keep=1)
    assert names(tmp_path) == ["step-00000015"]


def test_same_step_twice(tmp_path: Path) -> None:
    save(tmp_path, 10)
    save(tmp_path, 10, value=7.0)
    assert names(tmp_path) == ["step-00000010"]
    assert load_checkpoint(find_checkpoint("auto", tmp_path))[0]["trained"]["w"][0] == 7


def crash_everywhere(patches: pytest.MonkeyPatch, function: str, attempt: Callable, check: Callable) -> int:
    """Run attempt() again and again, crashing at the 1st, 2nd, ... os.<function>, until it gets through.

    After each crash check() runs. Returns the number of crashes.
    """
    real = getattr(os, function)
    for crashes in range(100):
        calls = itertools.count()

        def crash(*args: object) -> object:
            if next(calls) == crashes:
                raise RuntimeError("crash")
            return real(*args)
        with patches.context() as patch:
            patch.setattr(os, function, crash)
            try:
                attempt()
                return crashes
            except RuntimeError:
                pass
        check()
    raise AssertionError("never got through")


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("step", [1, 2])  # the same step again, and the next one
def test_a_crash_leaves_a_good_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str,
                                          step: int) -> None:
    save(tmp_path, 1)

    def good() -> None:
        assert load_checkpoint(find_checkpoint("auto", tmp_path))[0]["trained"]["w"][0] in (1, 2)
    crashes = crash_everywhere(monkeypatch, function, lambda: save(tmp_path, step, keep=1, value=2.0), good)
    assert crashes >= 4
    assert names(tmp_path) == [f"step-{step:08d}"]
    assert load_checkpoint(find_checkpoint("auto", tmp_path))[0]["ema"]["w"][0] == 2


def test_a_kill_between_the_two_renames(tmp_path: Path) -> None:
    os.replace(save(tmp_path, 1), tmp_path / "checkpoints" / "step-00000001.old")
    assert load_checkpoint(find_checkpoint("auto", tmp_path))[2]["step"] == 1
    save(tmp_path, 1)
    assert names(tmp_path) == ["step-00000001"]


def test_leftovers_are_never_listed_and_cleaned(tmp_path: Path) -> None:
    save(tmp_path, 1)
    leftover = tmp_path / "checkpoints" / ".tmp-step-00000009"
    leftover.mkdir()
    (leftover / "meta.json").write_text("{}")
    half = tmp_path / "checkpoints" / "step-00000008"  # meta.json, the last to be written, is missing
    half.mkdir()
    (half / "state.pt").write_text("")
    assert find_checkpoint("auto", tmp_path).name == "step-00000001"
    save(tmp_path, 2)
    assert not leftover.exists()


def test_state_that_cannot_be_loaded_safely_fails_on_save(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(Exception, match="[Ww]eights.only"):
        save_checkpoint(tmp_path, 2, {}, {"object": Path("x")})
    assert names(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize("site", ["fsync", "torch.save", "safetensors"])
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, site: str) -> None:
    import safetensors
    import safetensors.torch
    save(tmp_path, 1)

    def full(*args: object) -> None:
        if site == "safetensors":
            raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            if site == "fsync":
                raise
            raise RuntimeError("unexpected pos 704 vs 598")  # what torch.save makes of it
    module, name = {"fsync": (os, "fsync"), "torch.save": (torch, "save"),
                    "safetensors": (safetensors.torch, "save_file")}[site]
    monkeypatch.setattr(module, name, full)
    with pytest.raises(OSError, match="the disk is full.*free some space") as error:
        save(tmp_path, 2)
    assert error.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert names(tmp_path) == ["step-00000001"] and load_checkpoint(find_checkpoint("auto", tmp_path))


def test_find_checkpoint(tmp_path: Path) -> None:
    assert find_checkpoint("auto", tmp_path / "nothing") is None
    assert find_checkpoint("", tmp_path) is None
    older, newer = save(tmp_path, 9), save(tmp_path, 10)
    assert find_checkpoint("", tmp_path) is None
    assert find_checkpoint("auto", tmp_path) == newer
    assert find_checkpoint(str(older), "elsewhere") == older
    assert find_checkpoint(str(tmp_path), "elsewhere") == newer
    with pytest.raises(FileNotFoundError, match="no complete checkpoint in .*nothing.*--resume"):
        find_checkpoint(str(tmp_path / "nothing"), tmp_path)


@pytest.mark.parametrize("name", ["state.pt", "meta.json", "ema.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"garbage of some length", "cut"])
def test_damaged_checkpoint_names_the_file(tmp_path: Path, name: str, content: bytes | str | None) -> None:
    file = save(tmp_path, 1) / name
    if content is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-10] if content == "cut" else content)
    with pytest.raises(FileNotFoundError if content is None else ValueError, match=name):
        load_checkpoint(file.parent)


def test_pickled_code_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    torch.save({"f": print}, path / "state.pt")
    with pytest.raises(ValueError, match="state.pt"):
        load_checkpoint(path)


# ----------------------------------------------------------------------------- run folder and log
def test_fresh_run_dir(tmp_path: Path) -> None:
    cfg = Config(lr=0.25)
    path = prepare_run_dir(str(tmp_path / "a" / "b"), "", cfg)
    assert path == tmp_path / "a" / "b" and json.loads((path / "config.json").read_text()) == config_dict(cfg)
    prepare_run_dir(path, "", cfg)  # holds a config.json only: nothing would be lost


@pytest.mark.parametrize("trace", ["metrics", "checkpoint"])
def test_used_run_dir_is_refused(tmp_path: Path, trace: str) -> None:
    if trace == "metrics":
        (tmp_path / "metrics.jsonl").write_text("")
    else:
        save(tmp_path, 1)
    with pytest.raises(FileExistsError, match="--resume auto.*--run-dir"):
        prepare_run_dir(tmp_path, "", Config())
    assert not (tmp_path / "config.json").exists()
    prepare_run_dir(tmp_path, "auto", Config())


def test_resume_compares_the_config(tmp_path: Path) -> None:
    prepare_run_dir(tmp_path, "", Config(run_dir="a"))
    prepare_run_dir(tmp_path, "auto", Config(run_dir="b", resume="auto"))
    assert json.loads((tmp_path / "config.json").read_text())["run_dir"] == "b"
    with pytest.raises(ValueError, match=r"\(--stage 1 -> 2, --lr 0.0001 -> 0.5\)"):
        prepare_run_dir(tmp_path, "auto", Config(stage=2, lr=0.5, resume="auto"))
    assert json.loads((tmp_path / "config.json").read_text())["stage"] == 1
    prepare_run_dir(tmp_path, "auto", Config(lr=0.5, resume="auto"), may_change=("run_dir", "resume", "lr"))
    assert json.loads((tmp_path / "config.json").read_text())["lr"] == 0.5
    (tmp_path / "config.json").write_text(json.dumps({**config_dict(Config()), "gone": 1}))
    with pytest.raises(ValueError, match=r"--gone 1 -> \(absent\)"):
        prepare_run_dir(tmp_path, "auto", Config())


def test_run_dir_in_the_way_or_forbidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(NotADirectoryError, match="a file is in the way.*--run-dir"):
            prepare_run_dir(path, "", Config())
    monkeypatch.setattr(os, "access", lambda *args: False)  # root may write anywhere
    with pytest.raises(PermissionError, match="no permission to write into .*--run-dir"):
        prepare_run_dir(tmp_path, "", Config())

    def forbidden(*args: object, **flags: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(Path, "mkdir", forbidden)
    with pytest.raises(PermissionError, match="no permission to create .*--run-dir"):
        prepare_run_dir(tmp_path / "x", "", Config())


def test_log_is_strict_json_and_flushed(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.write({"step": 0, "loss": float("nan"), "more": {"a": [math.inf, 1.5]}, "fired": True, "name": "é"})
    line = (tmp_path / "metrics.jsonl").read_text()  # before close
    assert line.endswith("\n") and line.count("\n") == 1
    assert json.loads(line, parse_constant=pytest.fail) == {
        "step": 0, "loss": None, "more": {"a": [None, 1.5]}, "fired": True, "name": "é"}
    log.close()


def test_log_appends_and_forgets_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.write({"note": "start"})
    for step in range(5):
        log.write({"step": step})
    log.close()
    with open(log.path, "a") as file:
        file.write('{"step": 5, "lo')  # killed while writing
    log = RunLog(tmp_path, resume_step=3)
    log.write({"step": 3, "again": True})
    log.close()
    assert read_metrics(log.path) == [{"note": "start"}, {"step": 0}, {"step": 1}, {"step": 2},
                                      {"step": 3, "again": True}]
    log = RunLog(tmp_path)
    log.write({"step": 4})
    log.close()
    assert len(read_metrics(log.path)) == 6


def test_log_resumes_by_another_key_and_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = RunLog(tmp_path)
    for epoch in range(3):
        log.write({"epoch": epoch})
    log.close()

    def crash(*args: object) -> None:
        raise RuntimeError("crash")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(RuntimeError):
            RunLog(tmp_path, resume_step=1, key="epoch")
    assert len(read_metrics(log.path)) == 3
    RunLog(tmp_path, resume_step=1, key="epoch").close()
    assert read_metrics(log.path) == [{"epoch": 0}]
    RunLog(tmp_path, resume_step=0, key="epoch").close()
    assert read_metrics(log.path) == []


def test_read_metrics_tolerates_a_cut_last_line_only(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"a": 1}\n{"a"')
    assert read_metrics(path) == [{"a": 1}]
    path.write_text('{"a": 1}\n{"a"\n{"a": 3}\n')
    with pytest.raises(ValueError, match="line 2 of .*metrics.jsonl"):
        read_metrics(path)
    with pytest.raises(FileNotFoundError, match="no run log"):
        read_metrics(tmp_path / "none")


# ----------------------------------------------------------------------------- signals
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_signal(number: int) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with StopSignal() as stopping:
        assert not stopping.stop and stopping.name == ""
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        assert stopping.stop and stopping.name == signal.Signals(number).name
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


def test_an_echo_of_the_interrupt_is_passed_over_and_a_later_one_is_immediate() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopSignal(grace=0.2) as stopping:
        for _ in range(2):                                    # the terminal's, and torchrun's right behind it
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        assert stopping.stop and stopping.name == "SIGINT"
        time.sleep(0.3)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
    assert signal.getsignal(signal.SIGINT) == before


# ----------------------------------------------------------------------------- training helpers
def test_cosine_lr() -> None:
    rates = [cosine_lr(step, total=110, warmup=10, base=2.0) for step in range(111)]
    assert rates[0] == pytest.approx(2 / 11) and rates[4] == pytest.approx(10 / 11)
    assert rates[10] == 2.0 and max(rates) == 2.0
    assert rates[35] == pytest.approx(1 + math.cos(math.pi / 4))
    assert rates[60] == pytest.approx(1.0) and rates[110] == pytest.approx(0.0)
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert cosine_lr(0, 10, 0, 3.0) == 3.0 and cosine_lr(99, 10, 0, 3.0) == 0.0
    assert cosine_lr(5, 5, 5, 3.0) == 3.0  # warm-up only: no division by zero


def test_ema_update() -> None:
    draws = generator("ema")
    ema = {name: torch.randn(4, generator=draws) for name in "ab"}
    params = {name: nn.Parameter(torch.randn(4, generator=draws)) for name in "ba"}  # another order
    expected = {name: 0.9 * ema[name] + 0.1 * params[name].detach() for name in ema}
    storage = ema["a"].data_ptr()
    ema_update(ema, params, 0.9)
    assert all(torch.allclose(ema[name], expected[name], atol=1e-7) for name in ema)
    assert ema["a"].data_ptr() == storage and not ema["a"].requires_grad
    with pytest.raises(AssertionError, match="keys differ.*b"):
        ema_update({"a": ema["a"]}, params, 0.9)


def test_count_params() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1, bias=False))
    module[1].requires_grad_(False)
    assert count_params(module) == (9, 3)


def test_peak_memory_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0.05 < peak_memory_gb() < 100
    facts = environment()
    assert facts.keys() == {"python", "torch", "transformers", "device", "commit"}
    assert facts["torch"] == torch.__version__ and len(facts["commit"]) in (0, 40)
    assert json.loads(json.dumps(facts)) == facts
    monkeypatch.setenv("PATH", "")  # no git
    assert environment()["commit"] == ""


# ----------------------------------------------------------------------------- pictures
def test_save_image(tmp_path: Path) -> None:
    image = torch.zeros(3, 2, 3)
    image[0, 0, 1], image[1, 1, 2], image[2, 0, 0] = 1.0, 0.5, 7.0  # out of range is clipped
    save_image(tmp_path / "new" / "x.png", image, scale=2)
    picture = Image.open(tmp_path / "new" / "x.png")
    assert picture.size == (6, 4) and picture.mode == "RGB"
    assert [picture.getpixel(at) for at in ((2, 0), (3, 1), (5, 3), (0, 0), (0, 3))] == [
        (255, 0, 0), (255, 0, 0), (0, 128, 0), (0, 0, 255), (0, 0, 0)]


def test_save_png_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_png(tmp_path / "x.png", Image.new("RGB", (2, 2)))

    def crash(*args: object) -> None:
        raise RuntimeError("crash")
    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(RuntimeError):
        save_png(tmp_path / "x.png", Image.new("RGB", (9, 9)))
    assert Image.open(tmp_path / "x.png").size == (2, 2) and len(list(tmp_path.iterdir())) == 1


def test_plain_grid() -> None:
    images = torch.stack([torch.full((3, 4, 6), index / 10) for index in range(5)])
    sheet = image_grid(images, columns=3, scale=10)
    assert sheet.size == (8 + 3 * (60 + 8), 8 + 2 * (40 + 8))
    for index in range(5):  # the middle of every cell, and white where the sixth would be
        at = (8 + 30 + index % 3 * 68, 8 + 20 + index // 3 * 48)
        assert sheet.getpixel(at) == (round(index * 25.5),) * 3
    assert sheet.getpixel((8 + 30 + 2 * 68, 8 + 20 + 48)) == (255, 255, 255)


def test_captions_wrap_and_stay_in_their_cells() -> None:
    images = torch.ones(2, 3, 8, 8)
    captions = ["one red star and two green moons", "x" * 60]  # one long word breaks inside
    sheet = image_grid(images, columns=2, scale=12, captions=captions)
    plain = image_grid(images, columns=2, scale=12)
    assert sheet.width == plain.width and sheet.height >= plain.height + 3 * 16
    gray = sheet.convert("L")
    assert gray.getextrema()[0] < 100  # there is ink
    for left, right in ((0, 8), (104, 112), (sheet.width - 8, sheet.width)):  # and none in the margins
        assert gray.crop((left, 0, right, sheet.height)).getextrema()[0] > 200
    assert gray.crop((0, sheet.height - 8, sheet.width, sheet.height)).getextrema()[0] > 200


def test_row_titles_and_wrong_numbers_of_texts() -> None:
    images = torch.ones(4, 3, 8, 8)
    plain = image_grid(images, columns=2, scale=8)
    titled = image_grid(images, columns=2, scale=8, row_titles=["before", "after"])
    assert titled.size == (plain.width, plain.height + 2 * 16)
    assert titled.convert("L").crop((0, 0, 60, 24)).getextrema()[0] < 100
    assert image_grid(images, columns=2, scale=8, captions=["", "", "x", ""]).height == plain.height + 16
    for texts in ({"captions": ["a"]}, {"row_titles": ["a"]}):
        with pytest.raises(ValueError, match="expects . (captions|row_titles) .* got 1"):
            image_grid(images, columns=2, **texts)
