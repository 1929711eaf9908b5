"""analyse.py: its figures against plain computations, its rows' trainings, resume, and the verdicts."""
import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import analyse
import evaluate
import model as model_module
import rewards
import train
from analyse import AblateConfig, LayersConfig, ROWS
from common import derive_seed, read_metrics, read_safetensors
from helpers import TINY, save_parts, tiny_model
from ldam import LDAM
from model import ParaUni, save_trained
from train import TrainConfig

PROMPTS = ["a red heart", "a blue star", "two moons", "a ring above a square"]
L = TINY.vlm.num_layers


class Brightness(nn.Module):
    """Stands in for a reward: the mean of one colour."""

    def __init__(self, channel: int) -> None:
        super().__init__()
        self.weight, self.calls = nn.Parameter(torch.eye(3)[channel]), 0

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        self.calls += 1
        return images.mean((2, 3)) @ self.weight.detach()                               # (B,)


@pytest.fixture(autouse=True)
def tiny_preset(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(model_module.PRESETS, "nano", TINY)
    yield


@pytest.fixture
def scorers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Brightness]:
    """The three rewards, replaced by one colour each."""
    found = {name: Brightness(k) for k, name in enumerate(("clip", "pickscore", "aesthetic"))}
    monkeypatch.setattr(rewards, "build_reward", lambda name, device, weights=None: found[name])
    return found


def rows_of(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# ----------------------------------------------------------------------------- claims

def test_quantiles_are_those_of_students_t() -> None:
    u = np.linspace(-np.pi / 2, np.pi / 2, 200_001)[1:-1]                # x = tan u, to reach the heavy tails
    for df, quantile in enumerate(analyse.T95, start=1):
        density = (1 + np.tan(u) ** 2 / df) ** (-(df + 1) / 2) / np.cos(u) ** 2
        inside = density[np.abs(np.tan(u)) < quantile].sum() / density.sum()
        assert inside == pytest.approx(0.95, abs=2e-4), df


@pytest.mark.parametrize("values, verdict", [
    ([1.0, 1.1, 0.9], "supported"), ([-1.0, -1.1, -0.9], "contradicted"), ([1.0, -1.0, 0.5], "undecided"),
    ([0.3, 0.1, 0.2], "undecided"),                                      # 3.46 errors: 4.30 are needed of 3
    ([0.3, 0.1, 0.2] * 10, "supported"), ([5.0], "undecided")])
def test_verdicts(values: list[float], verdict: str) -> None:
    found = analyse.claim("x", "y", values, "seeds")
    assert found.verdict == verdict and found.record()["verdict"] == verdict
    if len(values) > 1:
        assert found.error == pytest.approx(np.std(values, ddof=1) / len(values) ** 0.5)


# ----------------------------------------------------------------------------- switches of training

def test_the_layers_that_are_fused_and_the_norm_are_saved_and_loaded(tmp_path: Path) -> None:
    model = tiny_model()
    everything = model.condition(PROMPTS)                                               # (B, N, E)
    c = model.condition_layers(model.encode_prefix(PROMPTS))                            # (L, B, N, E)
    model.fuse_as([1, 3], norm=True)
    assert torch.allclose(model.condition(PROMPTS), (c[0] + c[2]) / 2, atol=1e-6)
    assert torch.allclose(model.condition(PROMPTS, layers=list(range(1, L + 1))), everything, atol=1e-6)
    model.fuse_as([1, 3], norm=False)
    bare = model.condition(PROMPTS)
    assert not torch.allclose(bare, (c[0] + c[2]) / 2, atol=1e-2)
    save_trained(model, tmp_path / "w.safetensors", 1, TrainConfig())
    assert not any("agglayer_norm" in name for name in read_safetensors(tmp_path / "w.safetensors")[0])
    again = tiny_model()
    again.load_trained(tmp_path / "w.safetensors", 1)
    assert torch.equal(again.condition(PROMPTS), bare)


def test_bad_switches_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--layers to name some of 1..4"):
        tiny_model().fuse_as([1, 5], norm=True)
    with pytest.raises(ValueError, match="--stage 1 only"):
        train.parse(["--stage", "2", "--layers", "1"])
    with pytest.raises(ValueError, match="--layers as numbers"):
        train.parse(["--stage", "1", "--layers", "last"])


# ----------------------------------------------------------------------------- layers

@pytest.fixture
def looked_into(monkeypatch: pytest.MonkeyPatch) -> dict[str, ParaUni]:
    models = {"": tiny_model(0), "last": tiny_model(1)}
    monkeypatch.setattr(evaluate, "load", lambda cfg, stage_file: (models[stage_file], "fp32"))
    return models


def layers_config(tmp_path: Path, **change: object) -> LayersConfig:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    return LayersConfig(**{"prompts": str(tmp_path / "prompts.txt"), "num_steps": 2, "batch_size": 3,
                           "out": str(tmp_path / "out"), "last_file": "last", **change})


def test_figures_are_what_plain_code_computes(tmp_path: Path, looked_into: dict, scorers: dict,
                                              capsys: pytest.CaptureFixture) -> None:
    run = write_log(tmp_path / "run", [1.0] * 6, [0.1] * 6)
    result = analyse.layers(layers_config(tmp_path, runs=(str(run),)))
    model = looked_into[""]
    seeds = [derive_seed(0, "analyse", i) for i in range(len(PROMPTS))]

    def red(which: list[int]) -> np.ndarray:
        return model.generate(PROMPTS, 2, 4.5, seed=seeds, layers=which)[:, 0].mean((1, 2)).double().numpy()
    whole = red(list(range(1, L + 1)))
    single = rows_of(tmp_path / "out" / "figure2.csv")
    assert [row["condition"] for row in single] == ["all", *(f"layer {i}" for i in range(1, L + 1))]
    assert float(single[0]["clip"]) == pytest.approx(whole.mean(), rel=1e-4)
    one = red([2])
    assert float(single[2]["clip"]) == pytest.approx(one.mean(), rel=1e-4)
    assert float(single[2]["clip s.e."]) == pytest.approx(one.std(ddof=1) / 2, rel=1e-3)
    removed = rows_of(tmp_path / "out" / "figure5.csv")
    assert [row["removed"] for row in removed] == ["shallow", "middle", "deep"]
    change = red([1, 4]) - whole                                  # of 4 layers, 2 and 3 stand in the middle
    assert analyse.without_region("middle", L) == [1, 4]
    assert float(removed[1]["clip"]) == pytest.approx(change.mean(), abs=1e-5)
    c = model.condition_layers(model.encode_prefix(PROMPTS)).detach()                   # (L, B, N, E)
    cosines = rows_of(tmp_path / "out" / "figure4.csv")
    assert len(cosines) == 2 * L
    for i in range(L):
        for j in range(L):
            plain = torch.cosine_similarity(c[i], c[j], dim=-1).mean().item()
            assert float(cosines[i][f"layer {j + 1}"]) == pytest.approx(plain, abs=1e-4)
    for name in ("figure2", "figure4", "figure5", "figure9", "curves_signals", "figure2_pictures"):
        assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert {row["verdict"] for row in result["claims"]} <= {"supported", "contradicted", "undecided"}
    assert len(result["claims"]) == 7 and "Figure 5" in capsys.readouterr().out


def test_an_analysis_goes_on_where_it_was_cut(tmp_path: Path, looked_into: dict, scorers: dict) -> None:
    cfg = layers_config(tmp_path, last_file="")
    whole = analyse.layers(cfg)
    path, calls = tmp_path / "out" / "variants.jsonl", scorers["clip"].calls
    assert calls == 1 + L + 3
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:4]) + lines[4][:20])                                 # a crash cut the 4th
    assert analyse.layers(cfg) == whole
    assert scorers["clip"].calls == calls + 1 + L + 3 - 3
    assert path.read_text() == "".join(lines)
    with pytest.raises(ValueError, match="--num-steps 2 -> 3"):
        analyse.layers(replace(cfg, num_steps=3))


def test_the_slope_claim_follows_the_layers(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    scores = {"all": {"clip": [1.0] * 20},
              **{f"layer {i}": {"clip": list(0.1 * i + 0.01 * rng.standard_normal(20))} for i in range(1, 9)}}
    rising, beaten = analyse.figure2(scores, 8, tmp_path)[1]
    assert (rising.verdict, beaten.verdict) == ("supported", "supported")
    assert rising.estimate == pytest.approx(0.1, abs=0.01) and beaten.estimate == pytest.approx(0.2, abs=0.02)
    falling = {name: {"clip": [-x for x in row["clip"]]} for name, row in scores.items()}
    assert analyse.figure2(falling, 8, tmp_path)[1][0].verdict == "contradicted"


def test_the_curves_are_smoothed_by_a_tenth() -> None:
    assert analyse.ema([None, 1.0, 2.0, None, 0.0]) == [None, 1.0, pytest.approx(1.1), pytest.approx(1.1),
                                                        pytest.approx(0.99)]


# ----------------------------------------------------------------------------- ablate: rows and their flags

def test_rows_fuse_what_they_say() -> None:
    flags = {name: analyse.layer_flags(name, 8) for name, row in ROWS.items() if row.family == "layers"}
    assert flags == {"all": [], "no-norm": ["--no-norm"], "last": ["--layers", "8"],
                     "no-shallow": ["--layers", "4,5,6,7,8"], "no-middle": ["--layers", "1,2,3,7,8"],
                     "no-deep": ["--layers", "1,2,3,4,5,6"], "every-other": ["--layers", "2,4,6,8"]}
    assert {name for name, row in ROWS.items() if row.paper} >= {
        "no-shallow", "no-middle", "no-deep", "every-other", "no-norm", "no-grad-norm", "no-reward"}


@pytest.mark.parametrize("name", ROWS)
def test_every_row_is_flags_that_train_takes(name: str, parts: Path, tmp_path: Path) -> None:
    cfg = AblateConfig(weights=str(parts), out=str(tmp_path), reinforce=True)
    plan = analyse.make_plan(cfg, name, 1, L, 1.5, 3)
    parsed = [train.parse(flags) for flags in plan["stages"]]
    assert [p.stage for p in parsed] == ([3] if ROWS[name].family == "ldam" else [1, 2, 3])
    assert all(p.seed == 1 and p.resume == "auto" for p in parsed)
    last = parsed[-1]
    if ROWS[name].family == "ldam":
        nano = name in analyse.AT_NANO_THRESHOLDS
        assert (last.ldam_spike, last.ldam_patience) == ((1.5, 3) if nano else (100.0, 5))
        assert last.ldam == (name != "no-ldam") and (last.ldam_mode == "keep") == (name == "ldam-keep")
        assert last.ldam_use_grad_norm == (name != "no-grad-norm")
        assert last.ldam_use_reward == (name != "no-reward")
    else:
        assert parsed[0].norm == (name != "no-norm") and parsed[1].init.endswith("stage1/stage1.safetensors")


# ----------------------------------------------------------------------------- ablate: one run

@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model()
    folder = save_parts(model, tmp_path_factory.mktemp("parts"))
    save_trained(model, folder / "stage2.safetensors", 2, TrainConfig(stage=2))
    return folder


def tiny_plan(parts: Path, folder: Path, *stages: list[str]) -> None:
    folder.mkdir()
    common = ["--weights", str(parts), "--resume", "auto"]
    score = {"limit": 6, "num_steps": 2, "guidance_scale": 1.0, "batch_size": 6, "seed": 0,
             "weights": str(parts)}
    (folder / "plan.json").write_text(json.dumps({"stages": [[*flags, *common] for flags in stages],
                                                  "from": "", "score": score}))


def test_a_row_is_trained_scored_and_not_trained_again(parts: Path, tmp_path: Path, scorers: dict,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    folder, short = tmp_path / "row", ["--batch-size", "4", "--micro-batch", "4", "--steps", "2"]
    tiny_plan(parts, folder,
              ["--stage", "1", "--run-dir", str(folder / "stage1"), "--layers", "2,4", "--no-norm", *short],
              ["--stage", "2", "--run-dir", str(folder / "stage2"), *short,
               "--init", str(folder / "stage1" / "stage1.safetensors")])
    monkeypatch.setattr(sys, "argv", ["analyse.py"])
    analyse.run_row([str(folder)])
    row = json.loads((folder / "row.json").read_text())
    assert set(row["scores"]) == {*analyse.MEASURES, "tasks"} and 0 <= row["scores"]["judge"] <= 1
    assert json.loads((folder / "stage1" / "stage1.json").read_text())["command"].startswith(
        "python train.py --stage 1")
    trained, metadata = read_safetensors(folder / "stage2" / "stage2.safetensors")
    assert (metadata["layers"], metadata["norm"]) == ("2,4", "False")           # stage 2 goes on as stage 1
    assert not list(folder.glob("stage*/checkpoints"))
    monkeypatch.setattr(train, "main", lambda flags: pytest.fail("trained again"))
    analyse.run_row([str(folder)])
    assert json.loads((folder / "row.json").read_text())["scores"] == row["scores"]


def test_the_heldout_loss_is_the_mean_over_pictures_whatever_the_batch() -> None:
    model = tiny_model()
    whole = analyse.heldout_loss(model, 0, count=6, batch=6)
    assert analyse.heldout_loss(model, 0, count=6, batch=4) == pytest.approx(whole, rel=1e-5)
    assert analyse.heldout_loss(model, 1, count=6, batch=6) != whole
    with torch.no_grad():
        model.dit.proj_out.weight.mul_(3)
    assert analyse.heldout_loss(model, 0, count=6, batch=6) > whole
    model.vae.bfloat16()                                # as the published and the shipped files are
    assert analyse.heldout_loss(model, 0, count=6, batch=6) > whole


# ----------------------------------------------------------------------------- ablate: all runs

CHILD = """
import json, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
signal.signal(signal.SIGTERM, lambda *a: sys.exit(0))
if folder.name.startswith("last") and {broken}:
    print("everything was fine", "error: the disk is full", sep=chr(10)); sys.exit(2)
time.sleep({seconds})
(folder / "row.json").write_text(json.dumps({{"seconds": 1, "scores": {{"judge": 0.5, "loss": 1.0}}}}))
"""


def stand_in(monkeypatch: pytest.MonkeyPatch, seconds: float = 0, broken: bool = False) -> list[str]:
    """Runs are played by a few lines; returns the names of those that were started."""
    started: list[str] = []

    def start(folder: Path, jobs: int) -> subprocess.Popen:
        started.append(folder.name)
        with open(folder / "log.txt", "a") as log:
            return subprocess.Popen([sys.executable, "-S", "-c", CHILD.format(broken=broken, seconds=seconds),
                                     str(folder)], stdout=log)
    monkeypatch.setattr(analyse, "start_row", start)
    return started


def plans(*names: str) -> dict[tuple[str, int], dict]:
    return {(name, seed): {"stages": [["--stage", "1"]], "score": {}} for seed in (0, 1) for name in names}


def test_finished_runs_are_never_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg, started = AblateConfig(out=str(tmp_path), jobs=2), stand_in(monkeypatch)
    assert analyse.run_rows(cfg, plans("all", "last"))
    assert sorted(started) == ["all-seed0", "all-seed1", "last-seed0", "last-seed1"]
    (tmp_path / "last-seed1" / "row.json").unlink()
    assert analyse.run_rows(cfg, plans("all", "last")) and started[4:] == ["last-seed1"]
    other = {**plans("all"), ("all", 0): {"stages": [["--stage", "2"]], "score": {}}}
    with pytest.raises(ValueError, match="other settings .stages: --stage 1 -> --stage 2.*--out"):
        analyse.run_rows(cfg, other)
    assert len(started) == 5


def test_a_run_that_fails_is_named_and_the_others_are_kept(tmp_path: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    started = stand_in(monkeypatch, broken=True)
    with pytest.raises(ValueError, match="last-seed0 ended early .error: the disk is full.*log.txt"):
        analyse.run_rows(AblateConfig(out=str(tmp_path), jobs=2), plans("all", "last"))
    assert (tmp_path / "all-seed0" / "row.json").is_file() and "last-seed1" not in started


def test_a_signal_stops_all_runs_and_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture) -> None:
    started = stand_in(monkeypatch, seconds=60)
    inner = analyse.start_row

    def start(folder: Path, jobs: int) -> subprocess.Popen:
        process = inner(folder, jobs)
        if len(started) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return process
    monkeypatch.setattr(analyse, "start_row", start)
    assert not analyse.run_rows(AblateConfig(out=str(tmp_path), jobs=2), plans("all", "last"))
    assert len(started) == 2 and "the same command goes on" in capsys.readouterr().out


def test_a_run_is_a_process_that_logs_into_its_folder(tmp_path: Path) -> None:
    process = analyse.start_row(tmp_path, jobs=2)
    assert process.wait() == 2
    said = (tmp_path / "log.txt").read_text()
    assert said.startswith("error: expected the folder of one row of `evaluate.py ablate`, with a plan.json")
    assert process.args[1:] == [analyse.__file__, str(tmp_path)]


# ----------------------------------------------------------------------------- ablate: LDAM's thresholds

def write_log(folder: Path, norms: list[float], rewards_: list[float], fired: int = 0,
              phases: int = 1) -> Path:
    """A stage 3 log whose every phase has these gradient norms and rewards."""
    folder.mkdir(parents=True, exist_ok=True)
    lines, names = [{"epoch": 0, "phase": "clip", "heldout/clip": 0.4}], ("clip", "pickscore", "aesthetic")
    for phase in range(phases):
        ldam = LDAM()
        for norm, reward in zip(norms, rewards_):
            ldam.update(norm, reward)
            lines.append({"epoch": len(lines), "phase": names[phase], f"reward/{names[phase]}": reward,
                          "reward/other": 0.0, "grad_norm": norm, "kl": 0.0, "ldam/fired": 0,
                          "ldam/r_s": ldam.last["r_s"], "ldam/gamma_raw": ldam.last["gamma_raw"]})
    lines[1]["ldam/fired"] = fired
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


#                 epoch  1    2    3    4    5    6    7    8
NORMS, FALLS = [1.0, 1.0, 2.5, 1.0, 1.0, 1.0, 1.0, 1.0], [0.9, 0.8, 0.7, 0.9, 0.6, 0.5, 0.4, 0.3]


def test_replay_fires_where_algorithm_1_does(tmp_path: Path) -> None:
    log = analyse.stage3_log(write_log(tmp_path, NORMS, FALLS, phases=2))
    assert analyse.replay(log, 100, 5) == []
    assert analyse.replay(log, 2, 2) == [3, 11]                   # the jump and the second decline: epoch 3
    assert analyse.replay(log, 2, 3) == [5, 13]
    assert analyse.replay(log, 2, 5) == [7, 15]
    assert analyse.replay(log, 3, 1) == []                        # the largest jump is 2.5
    assert analyse.replay(log, 2, 6) == []                        # only in the phase's last epoch: no use
    log[2]["grad_norm"] = None                                    # the jump was not finite: nobody saw it
    assert analyse.replay(log, 2, 2) == [11]


def test_the_strictest_thresholds_at_which_every_run_fires(tmp_path: Path) -> None:
    one = analyse.stage3_log(write_log(tmp_path / "a", NORMS, FALLS))
    two = analyse.stage3_log(write_log(tmp_path / "b", [1, 1, 1.6, 1, 1, 1, 1, 1], FALLS))
    assert analyse.find_thresholds([one]) == (2.0, 5) and analyse.find_thresholds([one, two]) == (1.5, 5)
    half = [record | {"phase": "clip" if record["epoch"] < 9 else "pickscore", "reward/pickscore": 0.5}
            for record in analyse.stage3_log(write_log(tmp_path / "d", NORMS + [1.0] * 8, FALLS * 2))]
    assert analyse.find_thresholds([half]) == (2.0, 5)                  # fires in one phase of two
    third = [*half, half[0] | {"epoch": 17, "phase": "aesthetic", "reward/aesthetic": 0.5}]
    assert analyse.find_thresholds([third]) == (analyse.SPIKES[-1], 1)  # in one of three
    never = analyse.stage3_log(write_log(tmp_path / "c", [1.0] * 8, FALLS))
    assert analyse.find_thresholds([one, never]) == (analyse.SPIKES[-1], 1)


# ----------------------------------------------------------------------------- ablate: the table

def finished(folder: Path, name: str, seed: int, judge: float, loss: float = 0.5, fired: int = 0) -> None:
    run = folder / f"{name}-seed{seed}"
    run.mkdir(parents=True)
    scores = {"judge": judge, "clip": 0.4, "pickscore": 0.4, "aesthetic": 5.0, "loss": loss, "tasks": {}}
    (run / "row.json").write_text(json.dumps({"scores": scores, "seconds": 1}))
    if ROWS[name].family == "ldam":
        write_log(run / "stage3", NORMS, FALLS, fired)


def test_table_claims_and_what_ldam_did(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for seed in range(3):
        finished(tmp_path, "all", seed, 0.50 + 0.01 * seed, loss=0.40)
        finished(tmp_path, "no-norm", seed, (0.30, 0.312, 0.32)[seed], loss=0.5 + 0.001 * seed)
        finished(tmp_path, "last", seed, 0.50 - 0.1 * (seed - 1), loss=0.3 + 0.001 * seed)
        finished(tmp_path, "ldam", seed, 0.2)
        finished(tmp_path, "no-ldam", seed, 0.2)
        finished(tmp_path, "ldam-epoch", seed, 0.21 + 0.01 * seed, fired=1)
    result = analyse.summarise(AblateConfig(out=str(tmp_path)), tmp_path, 2.0, 5)
    table = {row["row"]: row for row in rows_of(tmp_path / "ablate.csv")}
    norm = table[ROWS["no-norm"].title]
    drop = np.array([0.30, 0.312, 0.32]) - np.array([0.50, 0.51, 0.52])
    assert float(norm["judge"]) == pytest.approx(np.mean([0.30, 0.312, 0.32]), rel=1e-5)
    assert float(norm["judge s.e."]) == pytest.approx(np.std([0.30, 0.312, 0.32], ddof=1) / 3 ** 0.5,
                                                      rel=1e-4)
    assert float(norm["judge difference"]) == pytest.approx(drop.mean(), rel=1e-4)
    assert float(norm["difference s.e."]) == pytest.approx(drop.std(ddof=1) / 3 ** 0.5, rel=1e-3)
    assert norm["paper"] == "0.73" and norm["firings"] == ""
    assert table[ROWS["ldam-epoch"].title]["firings"] == "3"
    said = {(row["claim"], row["measure"]): row["verdict"] for row in result["claims"]}
    assert said["Without LayerNorm it is worse", "judge"] == "supported"
    assert said["Without LayerNorm it is worse", "loss"] == "supported"             # a larger loss is worse
    assert said["The last layer alone is worse than all", "judge"] == "undecided"
    assert said["The last layer alone is worse than all", "loss"] == "contradicted"
    assert said["LDAM helps", "judge"] == "undecided"                   # 0.02 +- 0.0058: 3.5 errors, not 4.3
    assert not any("deep" in claim for claim, _ in said)                            # no such row was trained
    text = (tmp_path / "ablate.md").read_text()
    assert "By the judge, supported: Without LayerNorm it is worse." in text
    assert "By the loss, contradicted: The last layer alone is worse than all." in text
    assert "LDAM never fired in 3 runs of 8 epochs" in text and "jump of the gradient norm was 2.5" in text
    assert "3 of 3 of these runs ended in the very scores of the run without LDAM." in text
    assert "noise for an epoch: judge +0.0200 ± 0.0058 (standard error of 3 seeds)" in text
    assert result["ldam"]["most declines"] == 6 and text in capsys.readouterr().out
    grid = {(float(r["spike"]), int(r["patience"])): int(r["firings"])
            for r in rows_of(tmp_path / "thresholds.csv")}
    assert grid[100.0, 5] == 0 and grid[2.0, 5] == 3 and grid[3.0, 1] == 0
    for name in ("ablate", "thresholds", "figure9"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_thresholds_are_asked_for_where_they_cannot_be_found(tmp_path: Path, parts: Path,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    with pytest.raises(ValueError, match="add ldam to --rows, or give --spike and --patience"):
        analyse.ablate(AblateConfig(out=str(tmp_path / "out"), weights=str(parts), rows=("ldam-keep",)))


@pytest.mark.parametrize("flags, said", [({"seeds": 1}, "--seeds of at least 2"), ({"rows": ()}, "--rows"),
                                         ({"spike": 2.0}, "together"), ({"limit": 3}, "--limit")])
def test_bad_flags_of_ablate(flags: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AblateConfig(**flags)


@pytest.mark.parametrize("flags, said", [({"rewards": ("aesthetic",)}, "with clip"),
                                         ({"limit": -1}, "--limit"), ({"preset": "l-1024"}, "--prompts")])
def test_bad_flags_of_layers(flags: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LayersConfig(**flags)


def test_a_folder_that_is_no_stage_3_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "loss": 0.5}\n')
    with pytest.raises(ValueError, match="stage 3 run"):
        analyse.stage3_log(tmp_path)
    assert read_metrics(tmp_path / "metrics.jsonl")


def test_help_does_not_load_torch() -> None:
    code = ("import sys, analyse, report; "
            "sys.exit(bool({'torch', 'transformers', 'numpy', 'matplotlib', 'PIL'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(analyse.__file__).parent).returncode == 0
