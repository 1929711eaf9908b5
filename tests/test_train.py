"""The three stages end to end on a tiny model: what moves and what does not, exact resume."""
import json
import math
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import grpo
import train
from common import Dist, generator, load_checkpoint, read_metrics, read_safetensors
from data import FilePrompts, NanoLatents, NanoPrompts, read_prompts
from helpers import TINY, save_parts, tiny_model
from model import ParaUni, save_trained
from train import TrainConfig, parse

ROOT = Path(train.__file__).parent
SHORT = ("--steps", "5", "--batch-size", "4", "--micro-batch", "4", "--warmup", "1",
         "--log-every", "2", "--lr", "1e-3")
REINFORCE = ("--steps", "2", "--num-groups", "2", "--group-size", "2", "--num-steps", "3",
             "--micro-batch", "4", "--warmup", "0", "--num-eval", "4", "--eval-steps", "2")
# The file `stop` beside it, "3 SIGTERM", says at which call of `bright` what happens;
# calls are counted within a run.
pytestmark = pytest.mark.usefixtures("tiny_preset")
REWARDS = '''
import os
import signal
from pathlib import Path

calls = 0


def bright(images, prompts):
    global calls
    calls += 1
    stop = Path(__file__).with_name("stop")
    if stop.read_text() == "2 RAISE" and calls in (2, 3):
        raise ConnectionError("the server is gone")
    if stop.exists() and stop.read_text().split()[0] == str(calls) and "RAISE" not in stop.read_text():
        kind = stop.read_text().split()[1]
        if kind == "CRASH":
            raise SystemExit("the power went out")
        if kind == "NAN":
            return images.mean((1, 2, 3)) * float("nan")
        os.kill(os.getpid(), getattr(signal, kind))
    return images.mean((1, 2, 3))


def red(images, prompts):
    return images[:, 0].mean((1, 2))
'''
# What other programs may read from a line of the log of stage 3
KEYS = {"epoch", "phase", "reward/bright", "reward/red", "kl", "ratio_dev", "clip_frac", "zero_std",
        "grad_norm", "ldam/fired", "ldam/gamma", "ldam/r_s", "ldam/g_s", "ldam/n_cool", "time/rollout",
        "time/reward", "time/update"}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of weights with the files of stages 1 and 2 in it."""
    model = tiny_model()
    folder = save_parts(model, tmp_path_factory.mktemp("parts"))
    for stage in (1, 2):
        save_trained(model, folder / f"stage{stage}.safetensors", stage, TrainConfig(stage=stage))
    return folder


@pytest.fixture(scope="module")
def rewards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "rewards.py"
    path.write_text(REWARDS)
    return path


@pytest.fixture
def run(parts: Path, rewards: Path, tmp_path: Path) -> Callable:
    """run(stage, folder name, *flags) trains in tmp_path/name, as the command line does,
    and returns what main returns."""
    def run(stage: int, name: str, *flags: str, stop: str = "0 never") -> dict[str, float]:
        rewards.with_name("stop").write_text(stop)
        return train.main(flags_of(stage, parts, rewards, tmp_path / name, *flags))
    return run


def flags_of(stage: int, parts: Path, rewards: Path, run_dir: Path, *flags: str) -> list[str]:
    given = (*REINFORCE, "--rewards", f"{rewards}:bright,{rewards}:red") if stage == 3 else SHORT
    return ["--stage", str(stage), "--weights", str(parts), "--run-dir", str(run_dir), *given, *flags]


@pytest.fixture(scope="module")
def whole(parts: Path, rewards: Path,
          tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """A run of stage 3 that nothing disturbed, and what it returned."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    rewards.with_name("stop").write_text("0 never")
    return folder, train.main(flags_of(3, parts, rewards, folder))


def newest(run_dir: Path) -> tuple[dict, dict]:
    tensors, state, _ = load_checkpoint(max((run_dir / "checkpoints").iterdir()))
    return tensors, state


def flat(tree: object, name: str = "") -> dict[str, object]:
    """Leaves of nested dicts and lists by their path."""
    if isinstance(tree, (dict, list, tuple)):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {path: leaf for key, value in items for path, leaf in flat(value, f"{name}/{key}").items()}
    return {name: tree}


def assert_same_run(a: Path, b: Path, stage: int) -> None:
    """Bit for bit: weights, EMA, optimizer, everything else of the last checkpoint,
    the file of the stage, and the log."""
    for left, right in zip(map(flat, newest(a)), map(flat, newest(b))):
        assert left.keys() == right.keys()
        left.pop("/seconds", None)
        assert [k for k in left if not (torch.equal(left[k], right[k]) if isinstance(left[k], Tensor)
                                        else left[k] == right[k])] == []
    left, right = (read_safetensors(folder / f"stage{stage}.safetensors")[0] for folder in (a, b))
    assert left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)
    logs = [[{k: v for k, v in line.items() if not k.startswith("time/")}
             for line in read_metrics(folder / "metrics.jsonl")] for folder in (a, b)]
    assert logs[0] == logs[1] and len(logs[0]) > 1


# ----------------------------------------------------------------------------- flags

def test_defaults_then_recipe_then_flags() -> None:
    assert parse([]) == TrainConfig(**train.NANO[1])
    assert parse(["--stage", "3"]) == TrainConfig(stage=3, **train.NANO[3])
    assert (parse(["--stage=2", "--preset", "l-1024"])
            == TrainConfig(stage=2, preset="l-1024", **train.PAPER[2]))
    cfg = parse(["--stage", "3", "--group-size", "4", "--rewards", "clip,aesthetic", "--no-ldam",
                 "--clip-range", "0.5"])
    assert (cfg.group_size, cfg.rewards, cfg.ldam, cfg.clip_range) == (4, ("clip", "aesthetic"), False, 0.5)
    assert cfg.num_groups == train.NANO[3]["num_groups"] and cfg.noise_level == TrainConfig().noise_level
    assert parse(["--stage", "3", "--stage", "1"]).steps == train.NANO[1]["steps"]


@pytest.mark.parametrize(("argv", "said"), [
    (["--groups-size", "4"], "did you mean --group-size"), (["--preset", "nanoo"], "unknown preset 'nanoo'"),
    (["--stage", "4"], "--stage"), (["--stage", "three"], "--stage"), (["--steps", "many"], "--steps"),
    (["--times", "late"], "--times"), (["now"], "unexpected argument 'now'")])
def test_bad_flags_end_with_one_line(argv: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        parse(argv)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and said in error and error.count("\n") == 1


@pytest.mark.parametrize("flags", [["--steps", "0"], ["--micro-batch", "0"], ["--ema-decay", "1.5"],
                                   ["--caption-dropout", "-0.1"], ["--lr", "0"], ["--noise-level", "0"],
                                   ["--clip-range", "-1"], ["--inner-updates", "0"]])
def test_values_out_of_range_name_their_flag(flags: list[str]) -> None:
    with pytest.raises(ValueError, match=flags[0]):
        parse(flags)
    with pytest.raises(ValueError, match="--no-ldam"):
        parse(["--no-ldam-use-grad-norm", "--no-ldam-use-reward"])


def test_every_knob_is_read_somewhere() -> None:
    text = "".join((ROOT / name).read_text() for name in ("train.py", "grpo.py", "model.py"))
    assert [f.name for f in fields(TrainConfig) if f"cfg.{f.name}" not in text] == []


def test_help_answers_at_once() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    answer = subprocess.run([sys.executable, "train.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert answer.returncode == 0
    assert "published: 1 % of the steps" in answer.stdout and "--ldam-gamma0" in answer.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
    code = ("import sys, train; train.parse(['--stage', '3']); "
            "print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])")
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert answer.stdout == "[]\n"


# ----------------------------------------------------------------------------- data

def test_prompts_of_a_file_come_round_in_new_orders(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a\n\n b \nc\nd\ne\n")
    said = read_prompts(tmp_path / "p.txt")
    assert said == ["a", "b", "c", "d", "e"]
    source = FilePrompts(said, per_step=2, seed=0)
    drawn = [source.draw(step, item) for step in range(10) for item in range(2)]
    rounds = [drawn[i:i + 5] for i in range(0, 20, 5)]
    assert all(sorted(r) == said for r in rounds) and len(set(map(tuple, rounds))) > 1
    assert [FilePrompts(said, 2, 0).draw(step, 1) for step in range(10)] == drawn[1::2]
    for name, content in (("none.txt", None), ("empty.txt", " \n\n")):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises((FileNotFoundError, ValueError), match="--prompts"):
            read_prompts(tmp_path / name)


def test_items_are_a_function_of_seed_step_and_item() -> None:
    source = NanoPrompts(0)
    assert len({source.draw(step, item) for step in range(3) for item in range(6)}) > 9
    assert NanoPrompts(0).draw(2, 1) == source.draw(2, 1)
    assert [NanoPrompts(1).draw(0, i) for i in range(6)] != [source.draw(0, i) for i in range(6)]
    data = NanoLatents(tiny_model().vae, 0)
    x, captions, weights = data.batch(3, [4, 1])
    assert weights is None
    assert x.shape == (2, *TINY.latent_shape) and x.dtype == torch.float32
    one, caption, _ = data.batch(3, [1])
    torch.testing.assert_close(one[0], x[1])
    assert caption == captions[1:]


# ----------------------------------------------------------------------------- stages 1 and 2

@pytest.mark.parametrize("times", ["uniform", "noisy"])
def test_the_loss_of_a_batch_is_the_mean_of_its_items(times: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = replace(TrainConfig(), dtype="fp32", caption_dropout=0.6, times=times)
    model, asked = tiny_model(), []
    real = model.encode_prefix
    monkeypatch.setattr(model, "encode_prefix",
                        lambda prompts, **options: (asked.append(prompts), real(prompts, **options))[1])
    data, items = NanoLatents(model.vae, cfg.seed), list(range(8))
    together = train.item_loss(cfg, model, data, 5, items)
    alone = torch.stack([train.item_loss(cfg, model, data, 5, [item]) for item in items])
    torch.testing.assert_close(together, alone.mean(), rtol=1e-5, atol=0)
    assert alone.std() > 0
    batch, singles = asked[0], [prompts[0] for prompts in asked[1:]]
    assert 0 < singles.count(None) < 8
    assert set(batch) == set(singles) and len(batch) == len(set(batch)) < 8     # read once each
    assert torch.equal(train.item_loss(cfg, model, data, 5, items), together)
    assert train.item_loss(cfg, model, data, 6, items) != together
    asked.clear()
    train.item_loss(replace(cfg, caption_dropout=1.0), model, data, 5, items)
    assert asked == [[None]]


def test_times_are_drawn_as_said() -> None:
    rngs = [generator("times", i) for i in range(4000)]
    uniform = train.draw_times("uniform", rngs)
    assert uniform.min() >= 0.001 and uniform.max() <= 1 and abs(uniform.mean().item() - 0.5005) < 0.02
    torch.testing.assert_close((uniform * 1000).round() / 1000, uniform)
    noisy = train.draw_times("noisy", rngs)
    assert 0 < noisy.min() and noisy.max() < 1 and abs(torch.logit(noisy).mean().item() - 1) < 0.06
    both = train.draw_times("noisy", [generator("a"), generator("b")])
    assert both[1] == train.draw_times("noisy", [generator("b")])[0]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_stage_trains_its_parts_and_leaves_the_rest_bit_identical(
        stage: int, run: Callable, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, real = [], train.load_model
    monkeypatch.setattr(train, "load_model", lambda cfg: (kept.append(real(cfg)), kept[-1])[1])
    run(stage, "run")
    before = real(parse(["--stage", str(stage), "--weights", str(parts)]))[0].state_dict()
    after = kept[0][0].state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    for part in ("queries", "lim.", "dit.", "vlm.", "vae."):
        names = {name for name in before if name.startswith(part)}
        trains = part in (("queries", "lim.") if stage == 1 else ("queries", "lim.", "dit."))
        assert len(names & changed) > 0.8 * len(names) if trains else not names & changed, part
    assert not kept[0][0].vlm.training and not kept[0][0].vae.training

    tensors, metadata = read_safetensors(tmp_path / "run" / f"stage{stage}.safetensors")
    assert metadata["stage"] == str(stage) and metadata["preset"] == "nano"
    assert json.loads(metadata["config"])["lr"] > 0
    prefixes = ("queries", "lim.") if stage == 1 else ("queries", "lim.", "dit.")
    assert tensors.keys() == {name for name in before if name.startswith(prefixes)}
    ema = newest(tmp_path / "run")[0]["ema"]
    assert all(torch.equal(tensors[name], ema[name]) for name in ema)
    assert any(not torch.equal(tensors[name], after[name]) for name in ema)


def test_gradients_do_not_depend_on_the_micro_batch(run: Callable, tmp_path: Path) -> None:
    lines = []
    for micro_batch in ("4", "3", "1"):
        run(2, micro_batch, "--micro-batch", micro_batch, "--steps", "1")
        lines.append(read_metrics(tmp_path / micro_batch / "metrics.jsonl")[0])
    for line in lines[1:]:
        assert line["loss"] == pytest.approx(lines[0]["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(lines[0]["grad_norm"], rel=1e-4)


def test_supervised_training_lowers_the_loss(run: Callable, tmp_path: Path) -> None:
    run(2, "run", "--steps", "30", "--lr", "3e-3", "--log-every", "10")
    losses = [line["loss"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert len(losses) == 3 and losses[2] < 0.9 * losses[0]


@pytest.mark.parametrize("stage", [1, 2])
def test_an_interrupted_supervised_run_continues_bit_for_bit(stage: int, run: Callable, tmp_path: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    run(stage, "whole")
    real, calls = train.item_loss, []

    def interrupting(*args: object) -> Tensor:
        calls.append(1)
        if len(calls) == 3:                           # within step 3 of 5, in the middle of a line of the log
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)
    monkeypatch.setattr(train, "item_loss", interrupting)
    assert run(stage, "parts") == {}
    assert not (tmp_path / "parts" / f"stage{stage}.safetensors").exists()
    assert newest(tmp_path / "parts")[1]["step"] == 3
    assert run(stage, "parts", "--resume", "auto")["step"] == 5 and len(calls) == 5
    assert_same_run(tmp_path / "whole", tmp_path / "parts", stage)
    assert run(stage, "parts", "--resume", "auto")["step"] == 5 and len(calls) == 5     # nothing left to do


# ----------------------------------------------------------------------------- stage 3

def test_the_log_and_the_files_of_stage_3(run: Callable, tmp_path: Path,
                                          capsys: pytest.CaptureFixture) -> None:
    final = run(3, "run", "--eval-every", "1")
    first, *lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert [line["phase"] for line in lines] == ["bright"] * 2 + ["red"] * 2
    assert first["epoch"] == 0 and first.keys() == {"epoch", "phase", "heldout/bright", "heldout/red"}
    for line in lines:
        assert line.keys() >= KEYS | {"heldout/bright", "heldout/red"}
        assert line["ratio_dev"] <= 1e-6 and 0 <= line["kl"] < 1 and line["grad_norm"] > 0
    assert lines[0]["kl"] < 1e-9 < lines[1]["kl"] and lines[1]["kl"] < lines[3]["kl"]
    assert lines[0]["lr"] == lines[2]["lr"] > lines[1]["lr"] == lines[3]["lr"]  # each phase: its own schedule
    assert lines[1]["ldam/n_cool"] == 0
    assert final == {"bright": lines[3]["heldout/bright"], "red": lines[3]["heldout/red"]}
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert files >= {"stage3.safetensors", "config.json", "rewards.png", "before_after.png", "checkpoints",
                     *(f"epoch-{n:05}.png" for n in range(5))}
    assert "phase 2, red" in capsys.readouterr().out


def test_the_saved_file_makes_the_pictures_that_were_scored(run: Callable, parts: Path, rewards: Path,
                                                            tmp_path: Path) -> None:
    final = run(3, "run", "--ema-decay", "0.3", "--lr", "1e-3")
    model = ParaUni.from_parts(TINY, parts)
    model.load_trained(tmp_path / "run" / "stage3.safetensors", 3, "nano")
    cfg = parse(["--stage", "3", *REINFORCE])
    scorers = {"bright": lambda images, said: images.mean((1, 2, 3)),
               "red": lambda images, said: images[:, 0].mean((1, 2))}
    scores = grpo.score_heldout(model, scorers, grpo.nano_prompts(test=True)[:4], replace(cfg, dtype="fp32"),
                                Dist(0, 1, 0, torch.device("cpu")))
    assert {name: sum(values) / 4 for name, values in scores.items()} == pytest.approx(final, abs=1e-6)
    before = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    assert abs(before["heldout/bright"] - final["bright"]) > 1e-5


def test_an_interrupted_stage_3_continues_bit_for_bit_across_phases(run: Callable, whole: tuple,
                                                                    tmp_path: Path) -> None:
    # calls of the reward: 1 held-out, 2 epoch 1, 3 epoch 2 = end of the phase; after a resume counted anew
    for stop, epoch in (("2 SIGTERM", 1), ("1 SIGINT", 2), ("1 SIGTERM", 3)):
        assert run(3, "parts", *(("--resume", "auto") if epoch > 1 else ()), stop=stop) == {}
        assert newest(tmp_path / "parts")[1]["epoch"] == epoch
    assert run(3, "parts", "--resume", "auto") == whole[1]
    assert_same_run(whole[0], tmp_path / "parts", 3)
    assert run(3, "parts", "--resume", "auto") == whole[1]             # a finished run has nothing left to do
    assert_same_run(whole[0], tmp_path / "parts", 3)


@pytest.mark.parametrize(("at", "every", "saved"), [("2 CRASH", "1", []), ("3 CRASH", "1", [1]),
                                                    ("6 CRASH", "2", [2])])
def test_a_stage_3_that_died_goes_on_from_what_it_saved(at: str, every: str, saved: list[int], run: Callable,
                                                        whole: tuple, tmp_path: Path) -> None:
    # calls of the reward: 1 held-out, 2 and 3 the first phase, 4 held-out, 5 and 6 the second
    with pytest.raises(SystemExit, match="power"):
        run(3, "parts", "--save-every", every, stop=at)
    assert [int(path.name[5:]) for path in (tmp_path / "parts").glob("checkpoints/step-*")] == saved
    run(3, "parts", "--save-every", every, "--resume", "auto")
    assert_same_run(whole[0], tmp_path / "parts", 3)


@pytest.mark.parametrize("mode", ["epoch", "keep"])
def test_ldam_fires_and_the_run_still_continues_bit_for_bit(mode: str, run: Callable, tmp_path: Path) -> None:
    # any gradient norm counts as a jump: fires after the second epoch of each phase, with the largest gamma,
    # and acts in the third
    flags = ("--steps", "3", "--ldam-mode", mode, "--ldam-spike", "1e-9", "--no-ldam-use-reward",
             "--ldam-gamma0", "1e6", "--ldam-gamma-max", "0.5")
    run(3, "whole", *flags)
    lines = read_metrics(tmp_path / "whole" / "metrics.jsonl")[1:]
    assert [line["ldam/fired"] for line in lines] == [0, 1, 0, 0, 1, 0]
    assert [line["ldam/gamma"] for line in lines] == [0, 0.5, 0, 0, 0.5, 0]
    assert lines[1]["ldam/layers"] == [2, 3] and all(line["ratio_dev"] <= 1e-6 for line in lines)
    assert run(3, "parts", *flags, stop="3 SIGTERM") == {}                              # right after it fired
    state = newest(tmp_path / "parts")
    assert state[1]["gamma"] == 0.5 and ("ldam" in state[0]) == (mode == "keep")
    assert run(3, "parts", *flags, "--resume", "auto", stop="3 SIGTERM") == {}          # in the second phase
    run(3, "parts", *flags, "--resume", "auto")
    assert_same_run(tmp_path / "whole", tmp_path / "parts", 3)

    run(3, "without", *flags, "--no-ldam")
    plain = read_metrics(tmp_path / "without" / "metrics.jsonl")[1:]
    assert [a["reward/bright"] == b["reward/bright"] for a, b in zip(plain, lines)][:3] == [True, True, False]
    saved = read_safetensors(tmp_path / "whole" / "stage3.safetensors")[0]
    assert ("ldam.layer_factor" in saved) == (mode == "keep")


def test_an_epoch_without_a_usable_reward_changes_nothing(run: Callable, tmp_path: Path) -> None:
    run(3, "run", "--save-every", "1", "--keep", "9", stop="3 NAN")
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["skipped"] for line in lines[1:]] == [0, 1, 1, 1]
    assert [line["reward_nan"] for line in lines[1:]] == [0, 2, 0, 0] and lines[2]["reward/bright"] is None
    before, after, later = (load_checkpoint(tmp_path / "run" / "checkpoints" / f"step-{step:08}")[0]
                            for step in (1, 2, 3))
    assert all(torch.equal(before[kind][name], after[kind][name]) for kind in before for name in before[kind])
    assert not torch.equal(after["trained"]["queries"], later["trained"]["queries"])


def test_too_many_skipped_epochs_stop_the_run_and_it_can_go_on(run: Callable, whole: tuple,
                                                               tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 updates in a row were skipped up to epoch 2"):
        run(3, "run", "--max-skipped", "1", stop="3 NAN")
    assert newest(tmp_path / "run")[1]["epoch"] == 2
    run(3, "run", "--max-skipped", "2", "--resume", "auto")
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["skipped"] == 1


def test_a_reward_that_raises_costs_its_group_only(run: Callable, whole: tuple, tmp_path: Path,
                                                   capsys: pytest.CaptureFixture) -> None:
    run(3, "run", stop="2 RAISE")                              # in epoch 1, and for its first group again
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["reward_nan"] for line in lines[1:]] == [1, 0, 0, 0]
    assert lines[1]["grad_norm"] > 0 and lines[-1]["skipped"] == 0
    assert "reward bright failed on" in capsys.readouterr().out


def test_a_watched_reward_may_fail_without_stopping_the_run(run: Callable, tmp_path: Path) -> None:
    run(3, "run", stop="5 NAN")
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["reward/bright"] is None for line in lines[1:]] == [False, False, True, False]
    assert lines[3]["phase"] == "red"
    assert (tmp_path / "run" / "rewards.png").exists()


def test_the_other_ways_of_an_update(run: Callable, tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a red heart\na blue ring\n")
    (tmp_path / "eval.txt").write_text("two green stars\na moon\n")
    flags = ("--steps", "3", "--inner-updates", "2", "--anchor", "recompute", "--sde-window", "1",
             "--dtype", "bf16", "--no-ldam", "--prompts", str(tmp_path / "train.txt"),
             "--eval-prompts", str(tmp_path / "eval.txt"), "--clip-range", "1e-4")
    run(3, "run", *flags)
    first, *lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]      # 3 steps of 2 an epoch are 2 epochs a phase
    assert all(line["ratio_dev"] == 0 and line["ldam/fired"] == 0 and math.isfinite(line["grad_norm"])
               for line in lines)
    assert lines[0]["lr"] > lines[1]["lr"] > 0              # of the last update of an epoch: never a lost one
    assert lines[0]["clip_frac"] > 0                           # the second update is off the rollout's policy
    run(3, "parts", *flags, stop="2 SIGTERM")
    run(3, "parts", *flags, "--resume", "auto")
    assert_same_run(tmp_path / "run", tmp_path / "parts", 3)


# ----------------------------------------------------------------------------- refusals

def test_a_batch_that_devices_cannot_share_is_refused() -> None:
    with pytest.raises(ValueError, match="--batch-size to be a multiple of the number of devices, 2, got 5"):
        train.train_supervised(TrainConfig(batch_size=5), tiny_model(),
                               Dist(0, 2, 0, torch.device("cpu")), None)


def test_stages_are_chained_strictly(run: Callable, parts: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="weights of stage 1, got stage 2"):
        run(2, "a", "--init", str(parts / "stage2.safetensors"))
    with pytest.raises(ValueError, match="weights of stage 2, got stage 1"):
        run(3, "b", "--init", str(parts / "stage1.safetensors"))
    with pytest.raises(FileNotFoundError,
                       match="stage 2 starts from stage 1: expected .*none.safetensors.*--stage 1"):
        run(2, "c", "--init", str(tmp_path / "none.safetensors"))
    with pytest.raises(ValueError, match="--init"):
        run(1, "d", "--init", str(parts / "stage1.safetensors"))
    save_trained(tiny_model(), tmp_path / "other.safetensors", 1, TrainConfig(preset="l-512"))
    with pytest.raises(ValueError, match="of preset nano, it is of l-512"):
        run(2, "e", "--init", str(tmp_path / "other.safetensors"))
    with pytest.raises(FileNotFoundError, match="--weights must name a folder"):
        run(1, "f", "--weights", str(tmp_path))


def test_init_is_heeded_on_random_weights_too(parts: Path) -> None:
    model, said = train.load_model(parse(["--stage", "3", "--weights", "random", "--seed", "9", "--init",
                                          str(parts / "stage2.safetensors")]))
    assert torch.equal(model.queries, tiny_model().queries) and "stage2.safetensors" in said
    other = train.load_model(parse(["--stage", "3", "--weights", "random", "--seed", "9"]))[0]
    assert not torch.equal(other.queries, model.queries)


def test_a_folder_that_holds_a_run_is_left_alone(run: Callable, tmp_path: Path) -> None:
    run(1, "run", "--steps", "1")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match="--resume auto"):
        run(1, "run", "--steps", "1")
    with pytest.raises(ValueError, match="--lr 0.001 -> 0.5"):
        run(1, "run", "--steps", "1", "--resume", "auto", "--lr", "0.5")
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


class Seen(Exception):
    """The configuration that a run would have."""


@pytest.mark.parametrize("flags, compiled", [
    ((), False), (("--compile",), True),
    (("--preset", "b-512"), True), (("--preset", "b-512", "--no-compile"), False)])
def test_a_gpu_compiles_all_but_nano(flags: tuple[str, ...], compiled: bool, tmp_path: Path,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    def seen(cfg: TrainConfig) -> None:
        raise Seen(cfg)
    monkeypatch.setattr("common.setup_dist", lambda: Dist(0, 1, 0, torch.device("cuda")))
    monkeypatch.setattr(train, "load_model", seen)
    with pytest.raises(Seen) as stopped:
        train.main(["--stage", "1", "--run-dir", str(tmp_path / "run"), *flags])
    cfg = stopped.value.args[0]
    assert (cfg.compile, cfg.dtype) == (compiled, "bf16")
