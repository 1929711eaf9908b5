"""What happens to a run: killed, preempted, numbers that are not finite, more or fewer ranks. Real processes.

By default each stage is killed once on one rank and once on two, on a tiny model. Four times each on nano:
    PARAUNI_KILLS=4 PARAUNI_PRESET=nano pytest tests/test_faults.py -k killed
"""
import functools
import math
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import common
import grpo
import train
from common import Refused, read_log
from helpers import NANO_WEIGHTS, TINY, assert_equal, assert_same_run, log_of, newest, tiny_model
from model import PRESETS, ParaUni
from train import TrainConfig, batch_loss

KILLS = int(os.environ.get("PARAUNI_KILLS", "1"))
NANO = os.environ.get("PARAUNI_PRESET") == "nano"
pytestmark = pytest.mark.usefixtures("tiny_preset")
FORKS = multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module", autouse=True)
def server() -> None:
    """It forks each rank and has imported everything, from where PYTHONPATH says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        FORKS.set_forkserver_preload(["test_faults"])
        forkserver.ensure_running()


def rank_of_a_run(rank: int, ranks: int, port: int, argv: list[str], log: Path) -> None:
    """What torchrun starts."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    if not NANO:
        PRESETS["nano"] = TINY
        # drawn after everything else, and longer than a tiny run
        grpo.draw_examples = lambda *args: torch.zeros(1, 3, 4, 4)
    common.run(lambda: train.main(argv))


class Ended(NamedTuple):
    codes: list[int]        # one a rank; that of a signal is negative
    seconds: float
    output: str


def launch(argv: list[str], ranks: int, until: Callable[[], bool] | None = None,
           number: int = signal.SIGKILL) -> Ended:
    """Run train.py to its end, or until something holds, when a signal is sent to all ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = Path(argv[argv.index("--run-dir") + 1]).with_suffix(".log")
    began = time.monotonic()
    processes = [FORKS.Process(target=rank_of_a_run, args=(rank, ranks, port, argv, log))
                 for rank in range(ranks)]
    for process in processes:
        process.start()
    while until and not until() and any(process.is_alive() for process in processes):
        time.sleep(0.005)
    for process in processes:
        if until and process.is_alive():
            os.kill(process.pid, number)
    for process in processes:
        process.join()
    return Ended([process.exitcode for process in processes], time.monotonic() - began, log.read_text())


def flags(stage: int, weights: Path, run_dir: Path, *more: str) -> list[str]:
    both = ["--stage", str(stage), "--weights", str(NANO_WEIGHTS if NANO else weights),
            "--run-dir", str(run_dir), "--lr", "1e-4", "--micro-batch", "3", "--save-every", "1"]
    if stage < 3:
        return [*both, "--steps", "5", "--batch-size", "4", "--warmup", "0", "--log-every", "2", *more]
    return [*both, "--steps", "2", "--num-groups", "2", "--group-size", "2", "--num-steps", "3",
            "--warmup", "0", "--num-eval", "5", "--eval-steps", "2", "--guidance-scale", "1",
            "--kl-coef", "0.3", "--rewards", f"{weights}/rewards.py:bright,{weights}/rewards.py:red", *more]


@pytest.fixture(scope="module")
def whole(tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """whole(stage, ranks, *flags): the folder of a run that nothing disturbed, and its seconds."""
    folder = tmp_path_factory.mktemp("whole")

    @functools.cache
    def whole(stage: int, ranks: int, *more: str) -> tuple[Path, float]:
        run_dir = folder / "-".join([str(stage), str(ranks), *more])
        ended = launch(flags(stage, tiny_weights, run_dir, "--keep", "9", *more), ranks)
        assert ended.codes == [0] * ranks, ended.output
        return run_dir, ended.seconds
    return whole


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_run_that_is_killed_ends_as_if_it_had_not_been(stage: int, ranks: int, whole: Callable,
                                                         tiny_weights: Path, tmp_path: Path) -> None:
    run_dir, seconds = whole(stage, ranks)
    again = flags(stage, tiny_weights, tmp_path / "run", "--keep", "9", "--resume", "auto")
    chance, done = random.Random(f"{stage} {ranks}"), 0
    while done < KILLS:
        end = time.monotonic() + chance.uniform(0.1, 1) * seconds
        ended = launch(again, ranks, until=lambda: time.monotonic() > end)      # noqa: B023
        done += -signal.SIGKILL in ended.codes
        if ended.codes == [0] * ranks and done < KILLS:
            # it was faster than the undisturbed one: once more from the start
            seconds = ended.seconds
            shutil.rmtree(tmp_path / "run")
    assert launch(again, ranks).codes == [0] * ranks
    assert_same_run(run_dir, tmp_path / "run", stage)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_preempted_run_saves_and_leaves(stage: int, tiny_weights: Path, tmp_path: Path) -> None:
    log = tmp_path / "run" / "metrics.jsonl"
    argv = flags(stage, tiny_weights, tmp_path / "run", "--steps", "300", "--save-every", "9999")
    ended = launch(argv, 2, lambda: log.exists() and log.read_text().count("\n") > 2, signal.SIGTERM)
    assert ended.codes == [0, 0] and "go on with --resume auto" in ended.output
    unit = "epoch" if stage == 3 else "step"
    assert newest(tmp_path / "run")[unit] >= log_of(tmp_path / "run")[-1][unit] > 1
    assert not (tmp_path / "run" / f"stage{stage}.safetensors").exists()


@pytest.mark.parametrize("stage, checkpointing", [(1, ()), (2, ("--gradient-checkpointing",)), (3, ())])
def test_two_ranks_take_the_step_that_one_takes(stage: int, checkpointing: tuple, whole: Callable) -> None:
    one, two = whole(stage, 1)[0], whole(stage, 2, *checkpointing)[0]
    start = tiny_model().trainable(3)
    a, b = (torch.load(folder / "checkpoints" / "00000001.pt") for folder in (one, two))
    for kind in ("trained", "ema"):
        assert a[kind].keys() == b[kind].keys()
        for part in ("queries", "lim.", "dit.")[:2 if stage == 1 else 3]:
            # the bias of a softmax's keys has no gradient but rounding errors, which Adam scales up
            names = [name for name in a[kind] if name.startswith(part) and not name.endswith("k_proj.bias")]
            x, y, before = (torch.cat([tensors[name].detach().double().flatten() for name in names])
                            for tensors in (a[kind], b[kind], start))
            assert (x - y).norm() <= 1e-6 * x.norm()
            assert NANO or (x - before).norm() > 20 * (x - y).norm(), "and it moved"
    # the first lines of the logs, up to the second step
    for x, y in zip(log_of(one)[:stage], log_of(two)):
        assert x.pop("phase", None) == y.pop("phase", None)
        assert x == pytest.approx(y, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("broken", [lambda loss: loss * math.nan, lambda loss: loss + math.inf],
                         ids=["gradient", "loss alone"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(
        broken: Callable, tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaking(cfg: TrainConfig, model: ParaUni, data: object, step: int, items: list[int]) -> Tensor:
        loss = batch_loss(cfg, model, data, step, items)
        return broken(loss) if step == 1 and 0 in items else loss
    monkeypatch.setattr(train, "batch_loss", breaking)
    train.main(flags(1, tiny_weights, tmp_path / "run", "--steps", "3", "--keep", "9", "--log-every", "1"))
    one, two, three = (torch.load(path) for path in sorted((tmp_path / "run" / "checkpoints").iterdir()))
    for kind in ("trained", "ema"):
        assert_equal(one[kind], two[kind])
    assert_equal(one["optimizer"]["state"], two["optimizer"]["state"])
    assert not torch.equal(two["trained"]["queries"], three["trained"]["queries"])
    lines = read_log(tmp_path / "run" / "metrics.jsonl")
    assert [line["skipped"] for line in lines] == [0, 1, 0]
    assert [line["loss"] is None for line in lines] == [False, True, False]


def test_too_many_stop_the_run(tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "batch_loss", lambda cfg, model, data, step, items: (
        batch_loss(cfg, model, data, step, items) * (math.nan if step >= 1 else 1)))
    with pytest.raises(Refused, match="3 steps in a row"):
        train.main(flags(2, tiny_weights, tmp_path / "run", "--max-skipped", "3"))
    state = newest(tmp_path / "run")
    assert state["skipped"] == 3 and all(tensor.isfinite().all() for tensor in state["trained"].values())
    assert not (tmp_path / "run" / "stage2.safetensors").exists()
