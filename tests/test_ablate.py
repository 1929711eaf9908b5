"""evaluation/ablate.py: the flags of its rows, runs that are trained, resumed, stopped, and the table."""
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import train
from common import Refused, parse_config
from evaluation import ablate
from evaluation.ablate import ROWS, AblateConfig
from grpo import GRPOConfig

pytestmark = pytest.mark.usefixtures("tiny_preset")


# of the tiny model's four layers
FUSED = {"last": [4], "every-other": [2, 4], "no-shallow": [2, 3, 4], "no-middle": [1, 4],
         "no-deep": [1, 2, 3]}


@pytest.mark.parametrize("name", ROWS)
def test_every_row_is_flags_that_train_takes(name: str, tiny_weights: Path, tmp_path: Path) -> None:
    cfg = AblateConfig(weights=str(tiny_weights), out=str(tmp_path))
    plan = ablate.make_plan(cfg, name, 1)
    configs = {"1": train.TrainConfig, "2": train.TrainConfig, "3": GRPOConfig}
    stages = [parse_config(configs[flags[1]], flags) for flags in plan["stages"]]
    assert [stage.stage for stage in stages] == ([3] if ROWS[name].family == "ldam" else [1, 2])
    assert all(stage.seed == 1 and stage.resume == "auto" for stage in stages)
    if ROWS[name].family == "layers":
        assert list(stages[0].layers) == FUSED.get(name, []) and stages[0].norm == (name != "no-norm")
        assert stages[1].init.endswith("stage1/stage1.safetensors")
        return
    last = stages[-1]
    assert last.ldam_patience == 5 and last.ldam_spike == (100 if name in ("no-ldam", "ldam") else 2.5)
    assert last.ldam == (name != "no-ldam") and (last.ldam_mode == "keep") == (name == "ldam-keep")
    assert last.ldam_use_grad_norm == (name != "no-grad-norm")
    assert last.ldam_use_reward == (name != "no-reward")


def test_a_run_is_trained_once(tiny_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ablate, "build_reward",
                        lambda name, device, weights: lambda images, prompts: images.mean((1, 2, 3)))
    monkeypatch.setattr(ablate.world, "benchmark_prompts", lambda: ablate.world.prompt_list(True, 1))
    monkeypatch.setattr(ablate, "NUM_LOSS", 4)
    monkeypatch.setattr(ablate, "DRAWING", replace(ablate.DRAWING, num_steps=2, guidance_scale=1.0))
    cfg = AblateConfig(weights=str(tiny_weights), out=str(tmp_path), stage1_steps=2, stage2_steps=2)
    folder, plan = tmp_path / "no-middle-seed0", ablate.make_plan(cfg, "no-middle", 0)
    assert ablate.run_row(folder, plan)
    scores = json.loads((folder / "row.json").read_text())["scores"]
    assert set(scores) == {*ablate.MEASURES} and 0 <= scores["judge"] <= 1
    assert not list(folder.glob("stage*/checkpoints"))
    monkeypatch.setattr(train, "main", lambda flags: pytest.fail("trained again"))
    assert ablate.run_row(folder, plan)
    assert json.loads((folder / "row.json").read_text())["scores"] == scores


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs are played by a line; returns the names of those that were started. The third one is stopped."""
    names: list[str] = []

    def run_row(folder: Path, plan: dict) -> bool:
        names.append(folder.name)
        if len(names) == 3:
            return False
        finished(folder.parent, folder.name.split("-")[0], int(folder.name[-1]), 0.5)
        return True
    monkeypatch.setattr(ablate, "run_row", run_row)
    return names


def test_what_was_stopped_goes_on_and_other_flags_are_refused(tmp_path: Path, started: list[str]) -> None:
    flags = ["--out", str(tmp_path), "--rows", "all,last", "--seeds", "2"]
    assert ablate.main(flags) == {}
    assert started == ["all-seed0", "all-seed1", "last-seed0"]
    assert [row["seeds"] for row in ablate.main(flags)["ablate"]] == [2, 2]
    assert started[3:] == ["last-seed0", "last-seed1"]
    for rows in ("all,last", "no-deep"):                                # what is there stands in the table
        with pytest.raises(Refused, match="all-seed0 .*--stages .*'120'.* -> .*'6'"):
            ablate.main([*flags, "--rows", rows, "--stage1-steps", "6"])
    assert len(started) == 5


def finished(folder: Path, name: str, seed: int, judge: float, loss: float = 0.5, fired: int = 0) -> None:
    """What a run leaves; LDAM fires once in a phase, or not at all."""
    run = folder / f"{name}-seed{seed}"
    run.mkdir(parents=True, exist_ok=True)
    scores = {"judge": judge, "clip": 0.4, "pickscore": 0.4, "aesthetic": 5.0, "loss": loss}
    (run / "row.json").write_text(json.dumps({"scores": scores}))
    if ROWS[name].family == "ldam":
        lines = [{"epoch": 0, "phase": "clip", "heldout/clip": 0.4}]
        for phase in ablate.REWARDS:
            for has_fired in (0, fired, 0):
                lines.append({"epoch": len(lines), "phase": phase, "ldam/fired": has_fired})
        (run / "stage3").mkdir(exist_ok=True)
        (run / "stage3" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_table_claims_and_what_ldam_did(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for seed in range(3):
        finished(tmp_path, "all", seed, [0.50, 0.51, 0.52][seed], 0.40)
        finished(tmp_path, "no-norm", seed, [0.30, 0.312, 0.32][seed], [0.500, 0.501, 0.502][seed])
        finished(tmp_path, "last", seed, [0.60, 0.50, 0.40][seed], [0.300, 0.301, 0.302][seed])
        finished(tmp_path, "ldam", seed, 0.2)
        finished(tmp_path, "no-ldam", seed, 0.2)
        finished(tmp_path, "ldam-epoch", seed, [0.21, 0.22, 0.23][seed], fired=1)
    result = ablate.summarise(AblateConfig(out=str(tmp_path)))
    table = {row["row"]: row for row in result["ablate"]}
    norm, drop = table[ROWS["no-norm"].title], np.array([0.30, 0.312, 0.32]) - np.array([0.50, 0.51, 0.52])
    assert norm["judge difference"] == pytest.approx(drop.mean(), rel=1e-4)
    assert norm["difference s.e."] == pytest.approx(drop.std(ddof=1) / 3 ** 0.5, rel=1e-3)
    assert norm["paper"] == 0.73 and norm["firings"] is None
    assert [table[ROWS[name].title]["firings"] for name in ("ldam-epoch", "ldam")] == [9, 0]
    claims = {(row["claim"], row["measure"]): row for row in result["claims"]}
    for text, measure, verdict in (
            ("It is worse with no LayerNorm", "judge", "supported"),
            ("It is worse with no LayerNorm", "loss", "supported"),             # a larger loss is worse
            ("It is worse with last layer only", "judge", "undecided"),
            ("It is worse with last layer only", "loss", "contradicted"),
            ("LDAM helps", "judge", "undecided")):                      # 0.02 +- 0.0058: 3.5 errors, not 4.3
        assert claims[text, measure]["verdict"] == verdict, text
    assert not any("deep" in text for text, _ in claims)                        # no such row was trained
    assert ablate.PAPER_NOTE in capsys.readouterr().out
    assert (tmp_path / "ablate.png").is_file()
