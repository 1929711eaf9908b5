"""evaluation/layers.py and its claims: figures against plain code, verdicts against made-up numbers."""
import json
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from common import Refused, derive_seed
from evaluation import T95, claim, layers, t_quantile
from helpers import TINY, save_stage, save_stages, tiny_model
from ldam import REGIONS, REWARD_REGIONS
from model import ParaUni
from rewards import build_reward

pytestmark = pytest.mark.usefixtures("tiny_preset")
PROMPTS = ["a red heart", "a blue star", "two moons", "a ring above a square"]
L = TINY.lim.vlm_layers


def test_quantiles_are_those_of_students_t() -> None:
    for df in (*range(1, 40), 100, 1000):
        close = 6e-4 if df <= len(T95) else 3e-3
        assert t_quantile(df) == pytest.approx(stats.t.ppf(0.975, df), abs=close), df


def test_a_verdict_is_the_t_test_at_95_percent() -> None:
    # 3.46 errors are enough of 30 values, and not of 3
    for values in ([1.0, 1.1, 0.9], [-1.0, -1.1, -0.9], [0.3, 0.1, 0.2], [0.3, 0.1, 0.2] * 10):
        row, test = claim("x", "y", values, "seeds"), stats.ttest_1samp(values, 0)
        side = "supported" if test.statistic > 0 else "contradicted"
        assert row["verdict"] == (side if test.pvalue < 0.05 else "undecided")
        assert row["standard error"] == pytest.approx(stats.sem(values))
    assert claim("x", "y", [5.0], "seeds")["verdict"] == "undecided"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_stages(tiny_model(0), tmp_path_factory.mktemp("parts"))
    save_stage(tiny_model(1), folder / "last")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return folder


@pytest.fixture
def drawn(parts: Path, monkeypatch: pytest.MonkeyPatch) -> Mock:
    """The rewards are colours of the pictures; returns what is called for every variant that is drawn."""
    (parts / "own.py").write_text("".join(f"def {name}(images, prompts): return images[:, {k}].mean((1, 2))\n"
                                          for k, name in enumerate(("clip", "pickscore", "aesthetic"))))
    channels = {name: build_reward(f"{parts}/own.py:{name}", "cpu") for name in REWARD_REGIONS}
    monkeypatch.setattr(layers, "open_rewards", lambda cfg, model, prompt: channels)
    spy = Mock(wraps=layers.draw_all)
    monkeypatch.setattr(layers, "draw_all", spy)
    return spy


def run(parts: Path, out: Path, *more: str) -> dict:
    return layers.main(["--weights", str(parts), "--prompts", str(parts / "prompts.txt"), "--num-steps", "2",
                        "--batch-size", "3", "--out", str(out), *more])


def test_figures_are_what_plain_code_computes(parts: Path, tmp_path: Path, drawn: Mock) -> None:
    result = run(parts, tmp_path, "--seed", "3", "--last-file", str(parts / "last/stage1.safetensors"))
    model, last = tiny_model(0), ParaUni.from_preset("nano", parts, parts / "last/stage1.safetensors")
    seeds = [derive_seed(3, "analyse", i) for i in range(len(PROMPTS))]

    def red(which: list[int]) -> np.ndarray:
        return model.generate(PROMPTS, 2, 4.5, seed=seeds, layers=which)[:, 0].mean((1, 2)).double().numpy()
    whole, one = red([1, 2, 3, 4]), red([2])
    single = {row["condition"]: row for row in result["figure2"]}
    assert list(single) == ["all", "layer 1", "layer 2", "layer 3", "layer 4"]
    assert single["all"]["clip"] == pytest.approx(whole.mean(), rel=1e-4)
    assert single["layer 2"]["clip"] == pytest.approx(one.mean(), rel=1e-4)
    assert single["layer 2"]["clip s.e."] == pytest.approx(stats.sem(one), rel=1e-3)
    # of 4 layers, 2 and 3 stand in the middle
    removed = {row["removed"]: row for row in result["figure5"]}
    assert removed["middle"]["clip"] == pytest.approx((red([1, 4]) - whole).mean(), abs=1e-5)
    # q_i: the VLM's own features; c_i: behind the LIM
    cosines = {(row["trained on"], row["features"]): row["cosines"] for row in result["figure4"]}
    assert len(cosines) == 2 * 2
    for name, trained in (("all layers", model), ("the last layer", last)):
        prefix = trained.encode_prefix(PROMPTS)
        for kind, f in (("q_i", trained.read_queries(prefix)), ("c_i", trained.condition_layers(prefix))):
            plain = torch.cosine_similarity(f[:, None], f[None], dim=-1).mean((2, 3))                 # (L, L)
            assert torch.allclose(torch.tensor(cosines[name, kind]), plain, atol=1e-4)
    for name in ("figure2", "figure4", "figure5", "figure2_pictures"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_analysis_goes_on(parts: Path, tmp_path: Path, drawn: Mock, monkeypatch: pytest.MonkeyPatch) -> None:
    # pictures are slow, and not at issue
    monkeypatch.setattr(layers, "save_sheet", lambda *sheet: None)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path: None)
    whole, path = run(parts, tmp_path), tmp_path / "variants.json"
    scores, count = json.loads(path.read_text()), drawn.call_count
    path.write_text(json.dumps({name: scores[name] for name in list(scores)[:5]}))
    assert run(parts, tmp_path) == whole and json.loads(path.read_text()) == scores
    assert drawn.call_count == 2 * count - 5
    scores["layer 2"]["pickscore"][1] = float("nan")                                    # a reward failed
    path.write_text(json.dumps(scores))
    assert {row["n"] for row in run(parts, tmp_path)["figure2"]} == {len(PROMPTS) - 1}
    (parts / "own.py").write_text("# another function")
    with pytest.raises(Refused, match="--num-steps 2 -> 3, --rewards"):
        run(parts, tmp_path, "--num-steps", "3")


def test_what_cannot_be_shown_is_refused_before_the_first_picture(parts: Path, drawn: Mock) -> None:
    (parts / "metrics.jsonl").write_text('{"step": 10, "loss": 0.5}\n')                 # a log, of stage 1
    with pytest.raises(Refused, match="clip"):
        run(parts, parts, "--rewards", "aesthetic")
    with pytest.raises(Refused, match="stage 3"):
        run(parts, parts, "--runs", str(parts))
    drawn.assert_not_called()


def noisy(mean: float, n: int = 20) -> Tensor:
    """n values with just this mean, and another part of a spread of 0.01 for each mean."""
    noise = 0.01 * np.random.default_rng(round(1000 * abs(mean))).standard_normal(n)
    return torch.tensor(mean + noise - noise.mean(), dtype=torch.float64)


def test_figure2_follows_the_layers(tmp_path: Path) -> None:
    scores = {"all": {"clip": noisy(1)}, **{f"layer {i}": {"clip": noisy(0.1 * i)} for i in range(1, 9)}}
    rising, more = layers.figure2(scores, 8, tmp_path)[1]
    assert rising["verdict"] == more["verdict"] == "supported"
    assert rising["estimate"] == pytest.approx(0.1) and more["estimate"] == pytest.approx(0.2)
    falling = {name: {"clip": -row["clip"]} for name, row in scores.items()}
    assert layers.figure2(falling, 8, tmp_path)[1][0]["verdict"] == "contradicted"


def test_figure4_tells_clusters_from_mere_nearness() -> None:
    def said(*maps: Tensor) -> list[str]:
        return [row["verdict"] for row in layers.figure4_claims("q_i", *maps)]
    noise = 0.01 * torch.randn(20, 8, 8, generator=torch.Generator().manual_seed(0))
    i = torch.arange(8)
    region = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    near = 1 - 0.1 * (i[:, None] - i).abs() + noise                     # smooth: no border anywhere
    blocks = near - 0.3 * (region[:, None] != region)
    assert said(blocks) == ["supported"] * 3
    assert said(near) == ["supported", "supported", "undecided"]
    # the paper's contrast
    low = near.flip(0) - 0.5
    assert said(blocks, low)[3:] == ["supported"] * 2 and said(low, blocks)[3:] == ["contradicted"] * 2


def test_figure5_judges_all_four_claims_of_the_caption(tmp_path: Path) -> None:
    def claims(**falls: tuple[float, float, float]) -> list[dict]:
        base = {reward: noisy(5) for reward in falls}
        scores = {"all": base}
        for k, region in enumerate(REGIONS):
            scores[f"no {region}"] = {reward: base[reward] - noisy(fall[k]) for reward, fall in falls.items()}
        return layers.figure5(scores, tmp_path)[1]
    papers = claims(clip=(0.2, 0.3, 0.5), pickscore=(0.02, 0.6, 0.3), aesthetic=(-0.02, 0.6, 0.3))
    assert [row["verdict"] for row in papers] == ["supported"] * (3 + 3 + 2)
    other = claims(clip=(-0.2, 0.5, 0.3), pickscore=(0.5, 0.4, 0.3), aesthetic=(-0.5, 0.2, 0.3))
    said = ["contradicted", "supported", "supported", *["contradicted"] * 5]
    assert [row["verdict"] for row in other] == said
