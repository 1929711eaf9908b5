"""LDAM against Algorithm 1 written out line by line, its ablations and bound, resuming, which layers fire."""
import json
import math
import random

import pytest

from ldam import LDAM, REGIONS, perturbed_layers, region_layers

Series = list[tuple[float, float]]


def algorithm_1(series: Series) -> list[float | None]:
    """The paper's Algorithm 1 in its own names, gamma by supplement Eq. 1 to 5; gamma where it fires."""
    g_before, r_before, n_cool, r_s = math.inf, 0.0, 0, 0
    g_s = False
    fired: list[float | None] = []
    for n, (g_n, r_n) in enumerate(series, 1):
        gamma = None
        if g_n >= g_before * 10 ** 2:
            g_s = True
        if r_n <= r_before:
            r_s = r_s + 1
        if n_cool == 0:
            if g_s and r_s >= 5:
                G, R = zip(*series[max(0, n - 5):n])
                gamma = 0.1 * (max(G) - min(G) + max(R) - min(R))
                r_s = 0
                g_s = False
                n_cool = n
        else:
            n_cool = n_cool - 1
        g_before = g_n
        r_before = r_n
        fired.append(gamma)
    return fired


def draw_series(kind: str, seed: int) -> Series:
    """120 epochs whose norms jump by more than a hundred now and then."""
    rng = random.Random(f"{kind} {seed}")
    series = []
    for _ in range(120):
        grad_norm = 10 ** rng.uniform(-4, 1)
        reward = rng.gauss(0.5, 0.2)
        if kind == "few values":
            # exact ties, norms of zero, and exact jumps by a hundred
            grad_norm = rng.choice([0.0, 0.01, 0.5, 1.0, 100.0])
            reward = rng.choice([0.0, 0.25, 0.5])
        series.append((grad_norm, reward))
    return series


@pytest.mark.parametrize("kind", ["continuous", "few values"])
def test_it_is_algorithm_1_to_the_letter(kind: str) -> None:
    fired = 0
    for seed in range(300):
        series = draw_series(kind, seed)
        ldam = LDAM(gamma_max=math.inf)
        want = algorithm_1(series)
        assert [ldam.update(*epoch) for epoch in series] == want, seed
        fired += sum(gamma is not None for gamma in want)
    assert fired > 300


def fired_epochs(ldam: LDAM, series: Series) -> list[int]:
    return [n for n, epoch in enumerate(series, 1) if ldam.update(*epoch) is not None]


def test_which_signals_trigger() -> None:
    # the norm jumps in epoch 2, the reward declines for the fifth time in epoch 7
    series = [(0.001, 0.9)] + [(1.0, 0.8 - 0.1 * n) for n in range(3)] + [(1.0, 0.9), (1.0, 0.5), (1.0, 0.4)]
    assert fired_epochs(LDAM(), series) == [7]
    assert fired_epochs(LDAM(use_reward=False), series) == [2]
    no_jump = [(1.0, reward) for _, reward in series]
    assert fired_epochs(LDAM(), no_jump) == fired_epochs(LDAM(use_reward=False), no_jump) == []
    assert fired_epochs(LDAM(use_grad_norm=False), no_jump) == [7]
    assert fired_epochs(LDAM(spike=1.0, patience=2), no_jump) == [3, 7]
    # what does not trigger still counts in gamma, which has a bound
    for gamma_max, gamma in ((1.0, 0.05), (0.01, 0.01)):
        ldam = LDAM(use_grad_norm=False, patience=1, gamma_max=gamma_max)
        assert [ldam.update(*epoch) for epoch in [(0.2, 0.5), (0.6, 0.4)]] == [None, pytest.approx(gamma)]
        assert ldam.last["bounded"] == (gamma == gamma_max)


@pytest.mark.parametrize("stop", [3, 40])
def test_a_resumed_one_goes_on_identically(stop: int) -> None:
    series = draw_series("few values", 0)
    whole, resumed = LDAM(), LDAM()
    for epoch in series[:stop]:
        whole.update(*epoch)
    # plain types, and no infinity
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict(), allow_nan=False)))
    for epoch in series[stop:]:
        assert resumed.update(*epoch) == whole.update(*epoch)
        assert resumed.last == whole.last


def test_regions_part_every_depth_and_each_reward_has_its_own() -> None:
    for depth in range(3, 101):
        parts = [region_layers(region, depth) for region in REGIONS]
        assert all(parts) and sum(parts, []) == list(range(1, depth + 1)), depth
    middle, deep = list(range(12, 24)), list(range(24, 29))
    assert perturbed_layers(["clip"], 28) == deep
    assert perturbed_layers(["clip", "aesthetic", "pickscore"], 28) == middle + deep
    for name in ("aesthetic", "pickscore", "of_a_user"):
        assert perturbed_layers([name], 28) == middle
