"""LDAM against a trace of Algorithm 1 worked out by hand, its ablations and bound, resume, regions."""
import doctest
import json
import math

import pytest

import ldam as ldam_module
from ldam import LDAM, REGIONS, perturbed_layers, region_layers

# n, gradient norm, reward  ->  g_s, r_s at the decision, n_cool after it, gamma (None: not fired)
TRACE = [
    (1, 0.500, 0.20, 0, 0, 0, None),        # nothing before it: g_0 infinite, r_0 zero
    (2, 0.500, 0.19, 0, 1, 0, None),
    (3, 0.400, 0.21, 0, 1, 0, None),        # a rise leaves r_s alone
    (4, 0.400, 0.18, 0, 2, 0, None),
    (5, 0.002, 0.17, 0, 3, 0, None),        # a fall of the norm by 200 is no jump
    (6, 0.300, 0.16, 1, 4, 0, None),        # 0.3 / 0.002 = 150 > 100: latched
    (7, 0.300, 0.22, 1, 4, 0, None),
    (8, 0.500, 0.20, 1, 5, 8, 0.0558),      # 0.1 * (0.5 - 0.002 + 0.22 - 0.16); epoch 8: eight epochs of rest
    (9, 0.001, 0.19, 0, 1, 7, None),        # both counters started anew, and listen while resting
    (10, 0.20, 0.18, 1, 2, 6, None),        # 0.2 / 0.001 = 200
    (11, 0.20, 0.17, 1, 3, 5, None),
    (12, 0.20, 0.16, 1, 4, 4, None),
    (13, 0.20, 0.15, 1, 5, 3, None),        # both gates are open, but it rests
    (14, 0.20, 0.14, 1, 6, 2, None),
    (15, 0.30, 0.15, 1, 6, 1, None),
    (16, 0.30, 0.16, 1, 6, 0, None),
    (17, 0.40, 0.18, 1, 6, 17, 0.024),      # 0.1 * (0.4 - 0.2 + 0.18 - 0.14), without any decline today
    (18, 0.001, 0.17, 0, 1, 16, None),
    (19, 0.50, 0.16, 1, 2, 15, None),
    (20, 0.50, 0.15, 1, 3, 14, None),
    (21, 0.50, 0.14, 1, 4, 13, None),
    (22, 0.50, 0.13, 1, 5, 12, None),
    *[(n, 0.50, 0.13, 1, 5, 34 - n, None) for n in range(23, 35)],
    (35, 0.50, 0.23, 1, 5, 35, 0.010),      # 0.1 * (0.5 - 0.5 + 0.23 - 0.13); rests of 8, 17, 35 epochs
    (36, 0.50, 0.22, 0, 1, 34, None),
]


def fired_epochs(ldam: LDAM, epochs: list[tuple[float, float]]) -> list[int]:
    return [n for n, epoch in enumerate(epochs, 1) if ldam.update(*epoch) is not None]


def test_trace_of_algorithm_1() -> None:
    ldam = LDAM()
    assert ldam.last is None
    for n, grad_norm, reward, g_s, r_s, n_cool, gamma in TRACE:
        got = ldam.update(grad_norm, reward)
        assert got == (None if gamma is None else pytest.approx(gamma, rel=1e-9)), f"epoch {n}"
        last = ldam.last
        assert [last[key] for key in ("epoch", "g_s", "r_s", "n_cool")] == [n, g_s, r_s, n_cool]
        assert (last["fired"], last["gamma"], last["bounded"]) == (int(gamma is not None), got or 0.0, 0)
    assert set(ldam.last) == {"epoch", "g_s", "r_s", "n_cool", "gamma", "gamma_raw", "fired", "bounded"}


def test_which_signals_trigger() -> None:
    start = [(grad_norm, reward) for _, grad_norm, reward, *_ in TRACE[:8]]     # jump in 6, 5th decline in 8
    assert fired_epochs(LDAM(), start) == [8]
    assert fired_epochs(LDAM(use_reward=False), start) == [6]
    assert fired_epochs(LDAM(trigger="any"), start) == [6]
    no_jump = [(0.5, 0.2 - 0.01 * n) for n in range(8)]                         # 5th decline in 6
    assert fired_epochs(LDAM(), no_jump) == []
    assert fired_epochs(LDAM(use_reward=False), no_jump) == []
    assert fired_epochs(LDAM(use_grad_norm=False), no_jump) == [6]
    assert fired_epochs(LDAM(trigger="any"), no_jump) == [6]
    no_decline = [(0.001, 0.1), (0.5, 0.2), (0.5, 0.3)]
    assert fired_epochs(LDAM(), no_decline) == fired_epochs(LDAM(use_grad_norm=False), no_decline) == []
    assert fired_epochs(LDAM(use_reward=False), no_decline) == [2]


def test_ablated_signal_still_counts_in_gamma() -> None:
    ldam = LDAM(use_grad_norm=False, patience=1)
    assert ldam.update(0.2, 0.5) is None
    assert ldam.update(0.6, 0.4) == pytest.approx(0.05)                         # 0.1 * (0.4 + 0.1)


def test_knobs_of_trigger_and_gamma() -> None:
    epochs = [(1.0, 0.9), (4.0, 0.8), (4.0, 0.7), (4.0, 0.6)]                   # the norm jumps by 4
    assert fired_epochs(LDAM(spike=4.0, patience=2), epochs) == []              # "> spike", not ">="
    assert fired_epochs(LDAM(spike=3.9, patience=2), epochs) == [3]
    assert fired_epochs(LDAM(spike=3.9, patience=3), epochs) == [4]
    ldam = LDAM(gamma0=0.5, window=2, spike=3.9, patience=2, gamma_max=9.0)
    assert [ldam.update(*epoch) for epoch in epochs][2] == pytest.approx(0.05)  # the window has lost epoch 1
    ldam = LDAM(gamma0=0.5, window=3, spike=3.9, patience=2, gamma_max=9.0)
    assert [ldam.update(*epoch) for epoch in epochs][2] == pytest.approx(1.6)   # 0.5 * (3 + 0.2)


def test_gamma_is_bounded_and_says_so() -> None:
    epochs = [(0.1, 0.5), (50.0, 0.4)]                                          # 0.1 * (49.9 + 0.1) = 5
    ldam = LDAM(patience=1)
    assert [ldam.update(*epoch) for epoch in epochs] == [None, 1.0]
    assert ldam.last["gamma_raw"] == pytest.approx(5.0)
    assert (ldam.last["gamma"], ldam.last["bounded"]) == (1.0, 1)
    ldam.update(50.0, 0.4)                                                      # at rest: none to bound
    assert ldam.last["gamma_raw"] == pytest.approx(5.0)
    assert (ldam.last["gamma"], ldam.last["bounded"], ldam.last["fired"]) == (0.0, 0, 0)
    wide = LDAM(patience=1, gamma_max=10.0)
    assert [wide.update(*epoch) for epoch in epochs][1] == pytest.approx(5.0)
    assert wide.last["bounded"] == 0


def test_start_and_zero_gradient_are_no_jump() -> None:
    ldam = LDAM(use_reward=False)
    assert fired_epochs(ldam, [(1e6, 0.0), (0.0, 0.0), (1.0, 0.0), (99.0, 0.0)]) == []
    assert fired_epochs(ldam, [(99.0 * 101, 0.0)]) == [1]
    ldam = LDAM(use_grad_norm=False, patience=1)
    assert ldam.update(1.0, -0.1) == 0.0                                        # below r_0: gamma 0.0


@pytest.mark.parametrize("stop", range(0, 36, 5))
def test_resume_continues_identically(stop: int) -> None:
    whole, first, resumed = LDAM(), LDAM(), LDAM()
    for _, grad_norm, reward, *_ in TRACE[:stop]:
        whole.update(grad_norm, reward)
        first.update(grad_norm, reward)
    state = json.loads(json.dumps(first.state_dict(), allow_nan=False))         # plain types, and no infinity
    resumed.load_state_dict(state)
    assert resumed.state_dict() == first.state_dict()
    for _, grad_norm, reward, *_ in TRACE[stop:]:
        assert resumed.update(grad_norm, reward) == whole.update(grad_norm, reward)
        assert resumed.last == whole.last


def test_state_is_a_copy_and_foreign_states_are_refused() -> None:
    ldam = LDAM()
    ldam.update(1.0, 0.5)
    state = ldam.state_dict()
    ldam.update(2.0, 0.4)
    assert state["grad_norms"] == [1.0] and state["rewards"] == [0.5]
    with pytest.raises(ValueError, match="must have the keys"):
        LDAM().load_state_dict({"epoch": 3})
    with pytest.raises(ValueError, match="window=2"):
        LDAM(window=2).load_state_dict(state | {"grad_norms": [1.0] * 5, "rewards": [1.0] * 5})


@pytest.mark.parametrize("grad_norm, reward", [(math.nan, 0.1), (math.inf, 0.1), (-1.0, 0.1), (0.1, math.nan),
                                               (0.1, -math.inf)])
def test_values_that_would_poison_the_window_leave_no_trace(grad_norm: float, reward: float) -> None:
    ldam = LDAM()
    for _, g, r, *_ in TRACE[:7]:
        ldam.update(g, r)
    state = ldam.state_dict()
    with pytest.raises(ValueError, match="after epoch 7"):
        ldam.update(grad_norm, reward)
    assert ldam.state_dict() == state
    assert ldam.update(0.5, 0.20) == pytest.approx(0.0558)


def test_settings_without_meaning_are_refused() -> None:
    for settings, sentence in [(dict(use_grad_norm=False, use_reward=False), "nothing can trigger it"),
                               (dict(trigger="both"), "'all' or 'any'"), (dict(window=1), "window=1"),
                               (dict(patience=0), "patience=0"), (dict(gamma0=0.0), "gamma0=0.0"),
                               (dict(gamma_max=-1.0), "gamma_max=-1.0"), (dict(spike=0.0), "spike=0.0")]:
        with pytest.raises(ValueError, match=sentence):
            LDAM(**settings)


def test_regions_at_the_depths_in_use() -> None:
    cuts = {28: (12, 24), 24: (11, 21), 8: (4, 7), 6: (3, 6), 36: (16, 31)}     # first middle, first deep
    for depth, (middle, deep) in cuts.items():
        assert region_layers("shallow", depth) == list(range(1, middle)), depth
        assert region_layers("middle", depth) == list(range(middle, deep)), depth
        assert region_layers("deep", depth) == list(range(deep, depth + 1)), depth


def test_regions_part_every_depth_without_gap_or_overlap() -> None:
    for depth in range(3, 101):
        parts = [region_layers(region, depth) for region in REGIONS]
        assert all(parts) and sum(parts, []) == list(range(1, depth + 1)), depth
    with pytest.raises(ValueError, match="at least 3"):
        region_layers("deep", 2)
    with pytest.raises(ValueError, match="shallow, middle, deep"):
        region_layers("bottom", 28)


def test_layers_of_the_rewards_so_far() -> None:
    middle, deep = list(range(12, 24)), list(range(24, 29))
    assert perturbed_layers(["aesthetic"], 28) == perturbed_layers(["pickscore"], 28) == middle
    assert perturbed_layers(["clip"], 28) == deep
    assert perturbed_layers(["aesthetic", "pickscore"], 28) == middle           # no layer twice
    assert perturbed_layers(["aesthetic", "pickscore", "clip"], 28) == middle + deep
    assert perturbed_layers(["clip", "aesthetic"], 28) == middle + deep         # sorted, whatever the order
    assert perturbed_layers(["my_module:brightness"], 28) == middle
    assert perturbed_layers(["pickscore", "clip"], 6) == [3, 4, 5, 6]


def test_examples_in_the_docstrings() -> None:
    results = doctest.testmod(ldam_module)
    assert results.attempted >= 2 and results.failed == 0
