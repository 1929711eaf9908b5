"""plan.py: what it derives on fake tensors against what real tensors and closed formulas say."""
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import plan
from helpers import TINY
from model import PRESETS
from plan import Cost, Plan

WIDE = replace(TINY, dit=replace(TINY.dit, num_layers=5), vlm=replace(TINY.vlm, num_layers=5))


def dit_matrices(m: int) -> int:
    """FLOPs of WIDE's DiT, forward, by hand: m rows."""
    M, E, P, N, C, R = 32, 32, 64, TINY.num_queries, 8, 80
    embedders = 256 * M + M * M + 6 * M * M + N * (E * M + M * M)
    attention = 4 * P * M * M + 2 * P * M * 16                              # linear: two products with d x d
    attention += P * M                                                      # and one with the sum of the keys
    cross = 2 * P * M * M + 2 * N * M * M + 2 * P * N * M
    ffn = P * (2 * R * M + 9 * 2 * R + R * M)
    return 2 * m * (embedders + P * C * M + 5 * (attention + cross + ffn) + P * M * C)


def test_flops_are_those_of_the_formulas() -> None:
    with FakeTensorMode():
        forward = plan.dit_cost(WIDE, 2, False, False, backward=False).flops
        trained, frozen, again = (plan.dit_cost(WIDE, 2, on, checkpointing).flops
                                  for on, checkpointing in ((True, False), (False, False), (True, True)))
    assert forward == pytest.approx(dit_matrices(2), rel=0.02)
    assert 2.9 * forward < trained < 3.1 * forward                          # backward: twice the forward
    assert forward < frozen < trained < again                               # checkpointing: blocks once more


def test_a_stack_is_measured_by_the_difference_of_two() -> None:
    """Extended from two layers and three, or run with all five: the same."""
    cases = [lambda: plan.dit_cost(WIDE, 2, True, False), lambda: plan.dit_cost(WIDE, 2, True, True),
             lambda: plan.condition_cost(WIDE, 1, False)]
    with FakeTensorMode(), pytest.MonkeyPatch.context() as patch:
        extended = [cost() for cost in cases]
        patch.setattr(plan, "extend", lambda measure, n, first=2: measure(n))
        plan.dit_cost.cache_clear()
        plan.condition_cost.cache_clear()
        for got, cost in zip(extended, cases, strict=True):
            want = cost()
            assert got.flops == want.flops and got.kept == pytest.approx(want.kept, rel=0.02)
            assert got.peak == pytest.approx(want.peak, rel=0.1)    # no straight line where blocks are redone
    plan.dit_cost.cache_clear()
    plan.condition_cost.cache_clear()
    assert extended[1].kept < 0.6 * extended[0].kept and extended[1].peak < extended[0].peak


def test_bytes_are_those_that_real_tensors_take() -> None:
    x = torch.zeros(100, 50, requires_grad=True)
    w = torch.zeros(50, 70, requires_grad=True)
    x.grad, w.grad = torch.zeros_like(x), torch.zeros_like(w)
    cost = plan.run(lambda: ((x @ w).relu() * 2).relu(), backward=True)
    half = 2 * (100 * 50 + 50 * 70)                                         # autocast's copies
    assert cost.kept == half + 2 * 2 * 100 * 70     # both relu's results; the others went at once
    assert cost.flops == 3 * 2 * 100 * 50 * 70 and cost.peak > cost.kept
    assert plan.run(lambda: torch.zeros(10) + torch.zeros(10), False).peak == 120


def test_parameters_are_the_published_ones() -> None:
    sizes = plan.parameters(PRESETS["l-1024"])
    assert sizes == {"vlm": 2_088_957_440, "lim": 225_844_992 + 2 * 2304, "dit": 1_604_641_952,
                     "vae": 312_250_275}


def stage_plan(**changes) -> Plan:
    return replace(Plan(2, 10 ** 9, 10 ** 9, 1e12, 512, 6e9, 2e9, 16e9,
                        {False: [(1e9, 0.0), (8e9, 4e9)], True: [(5e9, 0.0), (2e9, 1e9)]}), **changes)


def test_what_fits_is_what_the_sums_say() -> None:
    p = stage_plan()
    assert p.memory(1, False) == 2e9 + 4e9 + 16e9 + 8e9 + 1.5e9
    assert p.memory(3, True, shards=4) == 2e9 + 20e9 / 4 + 5e9 + 1.5e9      # the condition's pass is larger
    assert p.largest(24, False) == p.largest(24, True) == 0 and p.largest(40, False) == 3
    assert p.largest(40, True) == 15 and p.memory(15, True) <= 40e9 < p.memory(16, True)
    assert (plan.fits(p, 24, 8), plan.fits(p, 24, 1), plan.fits(p, 40, 8)) == ("3 `--fsdp`", "no", "3")
    assert plan.fits(stage_plan(states=60e9), 24, 2) == "no"
    text = plan.report({"x": [p]}, 8)
    assert "| x, 2 fine-tune | 1,000 M | 1,000 M | 1.0 | 512 | 0.51 |" in text
    assert "| x, 2 fine-tune | 3 `--fsdp` | 3 | 13 |" in text


def test_costs_add_up() -> None:
    assert Cost(1, 2, 3) + Cost(1, 1, 1) * 2 == Cost(3, 4, 5)
    assert plan.extend(lambda n: Cost(n, 2 * n + 1, 5), 10) == Cost(10, 21, 5)
    with pytest.raises(ValueError, match="expected --presets of nano, .*, got xl"):
        plan.main(["--presets", "xl"])


def test_every_stage_has_its_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums over measured parts, with parts that are simple to sum."""
    monkeypatch.setattr(plan, "condition_cost", lambda preset, B, on: Cost(B, (2 - on) * B * 1e9, 2e9 * B))
    monkeypatch.setattr(plan, "dit_cost", lambda preset, m, trained, on, backward=True:
                        Cost(m * (100 if trained else 50 if backward else 30), m * 1e9, (3 - on) * m * 1e9))
    monkeypatch.setattr(plan, "decode_cost", lambda preset: Cost(7, 0, 0))
    plans = plan.main(["--presets", "nano", "--devices", "2", "--out", str(tmp_path / "plan.md")])["nano"]
    text = (tmp_path / "plan.md").read_text()
    assert [p.stage for p in plans] == [1, 2, 3] and text.count("| nano, ") == 9
    assert plans[0].trained < plans[1].trained == plans[2].trained
    assert {p.trained + p.frozen for p in plans} == {sum(plan.parameters(PRESETS["nano"]).values())}
    assert [p.images for p in plans] == [64, 64, 32]
    assert (plans[0].flops_image, plans[1].flops_image) == (1 + 50, 1 + 100)
    # 6 steps and 5 of the reference forward, 5 updates, 2 rows each; one of 3 conditions of 2 groups, for 8
    assert plans[2].flops_image == 11 * 2 * 30 + 5 * 2 * 100 + 7 + 1 * 3 / 2 / 8
    assert plans[1].activations == {False: [(2e9, 2e9), (5e9, 5e9)], True: [(2e9, 2e9), (3e9, 3e9)]}
    assert plans[2].activations == {False: [(6e9, 0), (12e9, 6e9)], True: [(6e9, 0), (7e9, 4e9)]}
    assert plans[2].states == 5 / 4 * plans[1].states == 5 * 4 * plans[1].trained
    assert all(p.memory(2, False, 2) < p.memory(2, False) for p in plans)
