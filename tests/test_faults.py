"""What happens to a run: killed, preempted, a peer dead, numbers that are not finite, more or fewer ranks.

Real processes, forked by one server that has imported everything. By default each stage is killed once on one
and on two ranks, on a tiny model. The long versions:
    PARAUNI_KILLS=20 pytest tests/test_faults.py -s -k killed                    20 kills, shared by the cases
    PARAUNI_KILLS=20 PARAUNI_PRESET=nano pytest tests/test_faults.py -s -k killed            on nano's weights
    PARAUNI_SLOW=1 pytest tests/test_faults.py -s -k "restarts or memory"
"""
import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import common
import grpo
import train
from common import Dist, load_checkpoint, read_metrics, read_safetensors
from helpers import TINY, save_parts, tiny_model
from model import NANO_WEIGHTS, PRESETS, save_trained
from train import TrainConfig

ROOT = Path(train.__file__).parent
REAL_NANO = PRESETS["nano"]             # before the fixture puts the tiny model in its place
KILLS = int(os.environ.get("PARAUNI_KILLS", "6"))
pytestmark = pytest.mark.usefixtures("tiny_preset")
NANO = os.environ.get("PARAUNI_PRESET") == "nano"
SLOW = pytest.mark.skipif(not os.environ.get("PARAUNI_SLOW"), reason="minutes: needs PARAUNI_SLOW=1")
SERVER = '''
import json, os, signal, sys, time
sys.path[:0] = [{root!r}, {tests!r}]
import torch
torch.set_num_threads(1)
import tqdm
import common, grpo, model, train
from helpers import TINY
if not {nano}:
    model.PRESETS["nano"] = TINY
os.environ["CUDA_VISIBLE_DEVICES"] = ""


def child(job, rank):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["ranks"]),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(job["port"]))
    log = os.open(job["log"] + str(rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    code = 0
    try:
        common.run_main(lambda: train.main(job["argv"]))
    except SystemExit as stopped:
        code = stopped.code
    except BaseException as error:
        print(repr(error))
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code or 0)


for line in sys.stdin:
    job = json.loads(line)
    pids, began = [], time.monotonic()
    for rank in range(job["ranks"]):
        pid = os.fork()
        if pid == 0:
            child(job, rank)
        pids.append(pid)
    codes, killed, first = dict.fromkeys(pids), None, None
    while None in codes.values():
        now = time.monotonic()
        if job["after"] is not None and killed is None and now - began > job["after"]:
            killed = now
            for pid in pids[:job["victims"]]:
                if codes[pid] is None:
                    os.kill(pid, getattr(signal, job["signal"]))
        if first is not None and now - first > job["grace"]:         # what torchrun does to the survivors
            for pid, code in codes.items():
                if code is None:
                    os.kill(pid, signal.SIGKILL)
            first = None
        for pid, code in codes.items():
            if code is None:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
                    first = now if codes[pid] and first is None else first
        time.sleep(0.005)
    print(json.dumps({{"codes": list(codes.values()), "wall": time.monotonic() - began,
                       "ended": time.monotonic() - killed if killed else None}}), flush=True)
'''
REWARDS = '''
def bright(images, prompts):
    return images.mean((1, 2, 3))


def red(images, prompts):
    return images[:, 0].mean((1, 2))
'''


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A weights folder with the files of stages 1 and 2, and a file of rewards."""
    folder = tmp_path_factory.mktemp("parts")
    if not NANO:
        save_parts(tiny_model(), folder)
        for stage in (1, 2):
            save_trained(tiny_model(), folder / f"stage{stage}.safetensors", stage, TrainConfig(stage=stage))
    (folder / "rewards.py").write_text(REWARDS)
    return folder


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable]:
    """launch(argv, ranks) runs train.py to its end, or sends a signal `after` seconds; how it ended."""
    folder = tmp_path_factory.mktemp("server")
    code = SERVER.format(root=str(ROOT), tests=str(Path(__file__).parent), nano=NANO)
    server = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              stderr=open(folder / "server", "w"), text=True,
                              env=os.environ | {"OMP_NUM_THREADS": "1"})

    def launch(argv: list[str], ranks: int = 1, after: float | None = None, name: str = "SIGKILL",
               victims: int = 9, grace: float = 30.0) -> dict:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for log in folder.glob("log*"):
            log.unlink()
        job = {"argv": argv, "ranks": ranks, "after": after, "signal": name, "victims": victims,
               "grace": grace, "port": port, "log": str(folder / "log")}
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, (folder / "server").read_text()[-3000:]
        logs = [path.read_text(errors="replace") for path in sorted(folder.glob("log*"))]
        return json.loads(answer) | {"logs": logs}
    yield launch
    server.kill()
    server.wait()


def flags(stage: int, parts: Path, run_dir: Path, *more: str) -> list[str]:
    weights = NANO_WEIGHTS if NANO else parts
    both = ["--stage", str(stage), "--weights", str(weights), "--run-dir", str(run_dir), "--lr", "1e-3",
            "--micro-batch", "2"]
    if stage < 3:
        return [*both, "--steps", "5", "--batch-size", "4", "--warmup", "1", "--log-every", "2", *more]
    return [*both, "--steps", "2", "--num-groups", "2", "--group-size", "2", "--num-steps", "3",
            "--warmup", "0", "--num-eval", "4", "--eval-steps", "2", "--guidance-scale", "1", "--rewards",
            f"{parts / 'rewards.py'}:bright,{parts / 'rewards.py'}:red", *more]


def newest(run_dir: Path) -> dict[str, dict[str, Tensor]]:
    return load_checkpoint(max((run_dir / "checkpoints").iterdir()))[0]


def log_of(run_dir: Path) -> list[dict]:
    return [{key: value for key, value in line.items() if not key.startswith("time/")}
            for line in read_metrics(run_dir / "metrics.jsonl")]


# ----------------------------------------------------------------------------- killed, preempted, orphaned

CASES = [(stage, ranks) for stage in (1, 2, 3) for ranks in (1, 2)]


@pytest.mark.parametrize(("stage", "ranks"), CASES)
def test_a_run_that_is_killed_ends_as_if_it_had_not_been(stage: int, ranks: int, launch: Callable,
                                                         parts: Path, tmp_path: Path) -> None:
    whole = launch(flags(stage, parts, tmp_path / "whole", "--save-every", "1"), ranks)
    assert whole["codes"] == [0] * ranks, whole["logs"]
    kills = KILLS // 6 + (CASES.index((stage, ranks)) < KILLS % 6)
    again = flags(stage, parts, tmp_path / "killed", "--save-every", "1", "--resume", "auto")
    chance = random.Random(f"{stage} {ranks}")
    done = 0
    while done < kills:
        moment = chance.uniform(0, whole["wall"])
        ended = launch(again, ranks, after=moment)
        done += -signal.SIGKILL in ended["codes"]
        print(f"stage {stage}, {ranks} ranks: {done} killed, after {moment:.1f} s of {whole['wall']:.1f}")
        if ended["codes"] == [0] * ranks and done < kills:          # it was faster: once more from the start
            shutil.rmtree(tmp_path / "killed")
    assert launch(again, ranks)["codes"] == [0] * ranks
    for name in ("trained", "ema"):
        a, b = newest(tmp_path / "whole")[name], newest(tmp_path / "killed")[name]
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    a, b = (read_safetensors(tmp_path / name / f"stage{stage}.safetensors")[0]
            for name in ("whole", "killed"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "killed")


@pytest.mark.parametrize("stage", [1, 3])
def test_a_preempted_machine_saves_and_leaves_in_peace(stage: int, launch: Callable, parts: Path,
                                                       tmp_path: Path) -> None:
    more = ("--steps", "400") if stage < 3 else ("--steps", "200")
    argv = flags(stage, parts, tmp_path / "run", *more, "--save-every", "9999")
    seconds = 2.0
    while not (tmp_path / "run" / "checkpoints").exists():      # until the signal falls into the loop
        ended = launch([*argv, "--resume", "auto"], 2, after=seconds, name="SIGTERM", victims=2)
        seconds *= 2
    assert ended["codes"] == [0, 0] and "everything is saved" in ended["logs"][0]
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1


def test_a_rank_that_dies_ends_the_others_with_a_clear_message(launch: Callable, parts: Path,
                                                               tmp_path: Path) -> None:
    argv = flags(1, parts, tmp_path / "run", "--steps", "5000", "--save-every", "1", "--log-every", "1")
    ended, seconds = {"logs": [""]}, 2.0
    while not (tmp_path / "run" / "checkpoints").exists() or not ended["logs"]:
        ended = launch([*argv, "--resume", "auto"], 2, after=seconds, victims=1, grace=60)
        seconds *= 2
    assert ended["codes"] == [-signal.SIGKILL, 1] and ended["ended"] < 60
    print(f"the other rank ended {ended['ended']:.1f} s after")
    assert "error: process 1 of 2 lost the others: one of them died" in ended["logs"][1]
    assert "--resume auto" in ended["logs"][1] and "Traceback" not in ended["logs"][1]


@SLOW
def test_torchrun_restarts_from_the_last_checkpoint(parts: Path, tmp_path: Path) -> None:
    script = (f"import sys\nsys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]\n"
              "import torch\ntorch.set_num_threads(1)\nimport model\nfrom helpers import TINY\n"
              "model.PRESETS['nano'] = TINY\nimport common, train\n"
              "common.run_main(lambda: train.main(sys.argv[1:]))\n")
    (tmp_path / "tiny.py").write_text(script)
    argv = flags(1, parts, tmp_path / "run", "--steps", "300", "--save-every", "5", "--resume", "auto")
    job = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone",
                            "--max-restarts", "2", "--nproc-per-node", "2", str(tmp_path / "tiny.py"), *argv],
                           stderr=open(tmp_path / "err", "w"), start_new_session=True)
    while not list((tmp_path / "run").glob("checkpoints/step-*/meta.json")):
        time.sleep(0.5)
        assert job.poll() is None, (tmp_path / "err").read_text()[-2000:]
    children = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()
                and (entry / "stat").exists() and (entry / "stat").read_text().split()[3] == str(job.pid)]
    os.kill(max(children), signal.SIGKILL)
    assert job.wait(timeout=600) == 0, (tmp_path / "err").read_text()[-2000:]
    steps = [line["step"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert steps == list(range(2, 301, 2))


# ----------------------------------------------------------------------------- the number of ranks

@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_take_the_step_that_one_takes(stage: int, launch: Callable, parts: Path,
                                                tmp_path: Path) -> None:
    """One optimizer step of a global batch: alone, on two ranks, and with the model split over them."""
    more = ("--steps", "1", "--lr", "1e-4", "--log-every", "1")
    for name, ranks, extra in (("one", 1, ()), ("two", 2, ()), ("split", 2, ("--fsdp",)),
                               ("again", 1, ("--gradient-checkpointing",))):
        ended = launch(flags(stage, parts, tmp_path / name, *more, *extra), ranks)
        assert ended["codes"] == [0] * ranks, ended["logs"]
    start = tiny_model().trainable(3) if not NANO else None
    one = newest(tmp_path / "one")
    for name in ("two", "split", "again"):
        other = newest(tmp_path / name)
        for kind in ("trained", "ema"):
            a, b = one[kind], other[kind]
            assert a.keys() == b.keys()
            # The bias of a softmax's keys has no gradient but rounding errors, which Adam scales up.
            keys = [key for key in a if not key.endswith("k_proj.bias")]
            for part in ("queries", "lim.", "dit.")[:2 if stage == 1 else 3]:
                names = [key for key in keys if key.startswith(part)]
                error, size = (math.sqrt(sum(x.double().square().sum().item() for x in xs)) for xs in
                               ([a[key] - b[key] for key in names], [a[key] for key in names]))
                print(f"stage {stage}, {name}, {kind}, {part}: {error / size:.1e} relative")
                assert error <= 1e-6 * size
                if start is not None and kind == "trained":
                    moved = sum((a[key] - start[key]).double().square().sum().item() for key in names)
                    assert moved ** 0.5 > 1e-5 * size
        for x, y in zip(log_of(tmp_path / "one"), log_of(tmp_path / name), strict=True):
            assert x.keys() == y.keys()
            for key in x.keys() - {"phase"}:
                assert x[key] == pytest.approx(y[key], rel=1e-4, abs=1e-6), key
        assert (tmp_path / name / f"stage{stage}.safetensors").exists()


def test_a_split_run_resumes_and_ends_where_a_whole_one_does(launch: Callable, parts: Path,
                                                             tmp_path: Path) -> None:
    first = flags(2, parts, tmp_path / "run", "--fsdp", "--save-every", "1", "--keep", "9")
    ended = launch(first, 2)
    assert ended["codes"] == [0, 0], ended["logs"]
    for step in (4, 5):
        for file in (tmp_path / "run" / "checkpoints" / f"step-{step:08}").iterdir():
            file.unlink()
    ended = launch([*first, "--resume", "auto"], 2)
    assert ended["codes"] == [0, 0], ended["logs"]
    assert launch(flags(2, parts, tmp_path / "whole"), 1)["codes"] == [0]
    a, b = newest(tmp_path / "run")["trained"], newest(tmp_path / "whole")["trained"]
    for key in a:
        if not key.endswith("k_proj.bias"):
            torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-5)


def test_splitting_over_one_device_is_refused(parts: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--fsdp splits the model over devices and finds one"):
        train.main(flags(1, parts, tmp_path / "run", "--fsdp"))


class Captured(Exception):
    pass


def test_groups_have_their_own_noise_whatever_the_number_of_ranks(monkeypatch: pytest.MonkeyPatch,
                                                                  parts: Path) -> None:
    """Prompt, seed and first noise of every picture of three epochs: distinct, and equal for any ranks."""
    cfg = train.parse(["--stage", "3", "--num-groups", "4", "--group-size", "3", "--micro-batch", "3",
                       "--rewards", f"{parts / 'rewards.py'}:bright", "--dtype", "fp32", "--num-eval", "4"])
    seen: dict[int, dict[tuple, tuple]] = {}

    def capture(policy: object, reference: object, prefix: object, generators: list, *rest: object) -> None:
        raise Captured(generators)
    monkeypatch.setattr(grpo, "rollout", capture)
    for world in (1, 2, 4):
        for rank in range(world):
            run = grpo.start(cfg, tiny_model(), Dist(rank, world, rank, torch.device("cpu")))
            for epoch in range(3):
                asked: list[list] = []
                monkeypatch.setattr(run.model, "encode_prefix", asked.append)
                with pytest.raises(Captured) as caught:
                    grpo.run_epoch(run, epoch)
                generators, prompts = caught.value.args[0], asked[0][:-1]
                assert len(prompts) == 4 // world and len(generators) == 3 * len(prompts)
                for i, drawn in enumerate(generators):
                    noise = torch.randn(8, generator=drawn)
                    key = epoch, rank * 4 // world + i // 3, i % 3
                    seen.setdefault(world, {})[key] = (drawn.initial_seed(), tuple(noise.tolist()),
                                                       prompts[i // 3])
    assert seen[1] == seen[2] == seen[4] and len(seen[1]) == 3 * 4 * 3
    seeds, noises, _ = map(set, zip(*seen[1].values()))
    assert len(seeds) == len(noises) == 36


# ----------------------------------------------------------------------------- numbers that are not finite

@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(stage: int, parts: Path, tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    real, broken = train.item_loss, {1: math.nan, 3: math.inf}

    def item_loss(cfg: TrainConfig, model: object, data: object, step: int, items: list[int]) -> Tensor:
        loss = real(cfg, model, data, step, items)
        return loss * broken[step] if step in broken and 0 in items else loss
    monkeypatch.setattr(train, "item_loss", item_loss)
    train.main(flags(stage, parts, tmp_path / "run", "--save-every", "1", "--keep", "9", "--log-every", "1"))
    steps = [load_checkpoint(tmp_path / "run" / "checkpoints" / f"step-{n:08}")[:2] for n in range(1, 6)]
    assert [state["skipped"] for _, state in steps] == [0, 1, 1, 2, 2]
    for (before, first), (after, second), same in zip(steps, steps[1:], (True, False, True, False)):
        assert all(torch.equal(before[kind][name], after[kind][name])
                   for kind in before for name in before[kind]) == same
        counts = [max(entry["step"].item() for entry in state["optimizer"]["state"].values())
                  for state in (first, second)]
        assert (counts[0] == counts[1]) == same
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["skipped"] for line in lines] == [0, 1, 1, 2, 2]
    assert [line["loss"] is None for line in lines] == [False, True, False, True, False]


def test_a_loss_that_overflows_is_skipped_though_its_gradient_is_finite(
        parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = train.item_loss

    def item_loss(cfg: TrainConfig, model: object, data: object, step: int, items: list[int]) -> Tensor:
        return real(cfg, model, data, step, items) + (math.inf if step == 1 else 0)
    monkeypatch.setattr(train, "item_loss", item_loss)
    train.main(flags(1, parts, tmp_path / "run", "--log-every", "1"))
    assert [line["skipped"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 1, 1, 1]


def test_too_many_in_a_row_stop_and_say_what_to_look_at(parts: Path, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    real = train.item_loss
    monkeypatch.setattr(train, "item_loss", lambda cfg, model, data, step, items: (
        real(cfg, model, data, step, items) * (math.nan if step >= 1 else 1)))
    with pytest.raises(ValueError, match="3 updates in a row were skipped up to step 4.*--lr.*--dtype fp32"):
        train.main(flags(2, parts, tmp_path / "run", "--max-skipped", "3"))
    assert load_checkpoint(common.find_checkpoint("auto", tmp_path / "run"))[1]["in_a_row"] == 3
    assert all(tensor.isfinite().all() for tensor in newest(tmp_path / "run")["trained"].values())
    assert not (tmp_path / "run" / "stage2.safetensors").exists()


# ----------------------------------------------------------------------------- compile, memory

def test_lim_and_dit_compile_in_one_piece_and_only_once() -> None:
    from torch._dynamo.testing import CompileCounter
    model, counters = tiny_model(), (CompileCounter(), CompileCounter())
    dit = torch.compile(model.dit, backend=counters[0], fullgraph=True)
    lim = torch.compile(model.lim, backend=counters[1], fullgraph=True)
    for count, B in enumerate((2, 3, 4, 5, 6, 2)):
        c = lim(torch.randn(TINY.vlm.num_layers, B, TINY.num_queries, TINY.vlm.width)).mean(0)
        dit(torch.randn(B, *TINY.latent_shape), torch.rand(B), c).mean().backward()
        if count == 1:
            warm = [counter.frame_count for counter in counters]
    assert [counter.frame_count for counter in counters] == warm and max(warm) <= 2


def test_equal_blocks_are_compiled_once_and_not_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.testing import CompileCounter
    torch._dynamo.reset()
    model, counter = tiny_model(), CompileCounter()
    blocks = [*model.lim.connector.layers, *model.dit.transformer_blocks]
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: setattr(
        module, "_compiled_call_impl", torch.compile(module._call_impl, backend=counter, fullgraph=True)))
    common.compile_parts(torch.device("cuda"), model.lim, model.dit)
    for count, B in enumerate((2, 3, 4, 5, 6, 2)):
        c = model.lim(torch.randn(TINY.vlm.num_layers, B, TINY.num_queries, TINY.vlm.width)).mean(0)
        model.dit(torch.randn(B, *TINY.latent_shape), torch.rand(B), c).mean().backward()
        if count == 1:
            warm = counter.frame_count
    assert counter.frame_count == warm <= 4 and len(blocks) > 2          # two kinds; one size, then any


@SLOW
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_memory_stays_flat_over_300_steps_of_nano(stage: int, parts: Path, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "nano", REAL_NANO)
    sizes, write = [], common.RunLog.write

    def measured(log: common.RunLog, record: dict) -> None:
        sizes.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6)
        write(log, record)
    monkeypatch.setattr(common.RunLog, "write", measured)
    monkeypatch.setattr(grpo.RunLog, "write", measured)
    more = ("--steps", "300", "--log-every", "1") if stage < 3 else ("--steps", "150", "--eval-every", "9999")
    train.main(flags(stage, parts, tmp_path / "run", *more, "--save-every", "9999", "--init", "auto",
                     "--weights", str(NANO_WEIGHTS)))
    first, last = max(sizes[:100]), max(sizes[-100:])
    print(f"stage {stage}: peak of the first 100 steps {first:.1f} MB, of the last 100 {last:.1f} MB")
    assert last <= 1.01 * first
