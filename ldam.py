"""Layer-wise Dynamic Adjustment Mechanism (LDAM): when stage III perturbs the condition, how hard, and which
layers (paper Algorithm 1; gamma from supplement Eq. 1-5). Bookkeeping on two numbers an epoch, without torch:
the perturbation itself, c_i (1 + gamma eps) (Eq. 6), belongs to whoever holds the c_i.

Reading of the paper
- Start: g_0 is infinite and r_0 is 0. So epoch 1 is no jump, and a decline only if its reward is 0 or less.
- Both comparisons include equality: a reward that stands still counts as a decline, and after an epoch of
  norm 0 (no group's rewards differed, and no pull from the KL) every norm counts as a jump.
- All layers of a reward's region are perturbed at once, each with a noise of its own.
- Declines need not follow one another. Only firing resets g_s and r_s; both keep listening during the rest.
- Firing in epoch n, counted from 1 in each reward's phase, is followed by n epochs of rest, so the earliest
  next one is 2n + 1: in the 2,000 epochs of a phase at most nine, the first in epoch 5 or later.
- Both gates must be open. An ablated signal drops out of the gates, not out of gamma, so that an ablation
  changes one thing.
- gamma has no bound in the paper, and a jump can make it huge; gamma_max is ours. Its default 1 is where the
  noise is as large as the feature it multiplies, and one entry in six changes sign: P(eps < -1) = 0.16.
"""
import math
from dataclasses import dataclass

# Section 4.1: first and last layer of the 28 that the paper's VLM has; the rest is shallow
PAPER_DEPTH = 28
REGIONS = {"shallow": (1, 11), "middle": (12, 23), "deep": (24, 28)}
REWARD_REGIONS = {"clip": "deep", "pickscore": "middle", "aesthetic": "middle"}


def region_layers(region: str, num_layers: int) -> list[int]:
    """The layers (numbered from 1) of a VLM of num_layers layers that make up one of REGIONS.

    Layer i of L stands where layer floor(28 i / L) of 28 does, so each layer is in one region only.
    >>> region_layers("deep", 28), region_layers("middle", 8), region_layers("deep", 8)
    ([24, 25, 26, 27, 28], [4, 5, 6], [7, 8])
    """
    first, last = REGIONS[region]
    # max: beyond 28 layers the first ones would stand before layer 1
    return [i for i in range(1, num_layers + 1) if first <= max(1, PAPER_DEPTH * i // num_layers) <= last]


def perturbed_layers(rewards: list[str], num_layers: int) -> list[int]:
    """The layers that these rewards perturb, sorted. A reward that the paper does not know counts as middle,
    the region that answers to more than one of the paper's.

    >>> perturbed_layers(["clip"], 8), perturbed_layers(["aesthetic", "clip"], 8)
    ([7, 8], [4, 5, 6, 7, 8])
    """
    regions = {REWARD_REGIONS.get(name, "middle") for name in rewards}
    return sorted(i for region in regions for i in region_layers(region, num_layers))


@dataclass
class LDAM:
    """Algorithm 1, one update() an epoch."""
    gamma0: float = 0.1             # scale of the perturbation
    window: int = 5                 # epochs whose ranges make up gamma
    spike: float = 100.0            # ratio of successive gradient norms that counts as a jump
    patience: int = 5               # declines of the reward that open its gate
    use_grad_norm: bool = True      # listen to the gradient norm (False: ablation)
    use_reward: bool = True         # listen to the reward (False: ablation)
    gamma_max: float = 1.0          # upper bound of gamma

    def __post_init__(self) -> None:
        assert self.use_grad_norm or self.use_reward, "LDAM needs a signal: gradient norm, reward, or both"
        self.n = 0                                  # epochs seen
        self.g_s, self.r_s, self.n_cool = False, 0, 0
        self.grad_norms: list[float] = []           # of the last `window` epochs, newest last
        self.rewards: list[float] = []
        self.last: dict[str, float] = {}            # what to log of the last update

    def update(self, grad_norm: float, reward: float) -> float | None:
        """Take in an epoch's gradient norm before clipping, and its mean reward; return gamma where the
        perturbation fires, to act in the next epoch, else None: 0.0 is a gamma too. An epoch without finite
        numbers must be left out: it would spoil gamma for `window` epochs."""
        assert math.isfinite(grad_norm) and math.isfinite(reward), f"not finite: {grad_norm}, {reward}"
        previous_norm = self.grad_norms[-1] if self.grad_norms else math.inf
        previous_reward = self.rewards[-1] if self.rewards else 0.0
        self.n += 1
        self.grad_norms = [*self.grad_norms, grad_norm][-self.window:]
        self.rewards = [*self.rewards, reward][-self.window:]

        # lines 5-10: the gradient norm jumped; the reward did not rise
        if grad_norm >= self.spike * previous_norm:
            self.g_s = True
        if reward <= previous_reward:
            self.r_s += 1

        # supplement Eq. 1-5
        G, R = self.grad_norms, self.rewards
        gamma_raw = self.gamma0 * (max(G) - min(G) + max(R) - min(R))

        # lines 11-23: rest, or fire where the gates are open
        norm_opens = self.g_s or not self.use_grad_norm
        reward_opens = self.r_s >= self.patience or not self.use_reward
        fired = self.n_cool == 0 and norm_opens and reward_opens
        gamma = min(gamma_raw, self.gamma_max) if fired else None
        self.last = {"fired": int(fired), "gamma": gamma or 0.0, "gamma_raw": gamma_raw,
                     "bounded": int(fired and gamma_raw > self.gamma_max),
                     "g_s": int(self.g_s), "r_s": self.r_s}
        if fired:
            self.g_s, self.r_s, self.n_cool = False, 0, self.n
        elif self.n_cool > 0:
            self.n_cool -= 1
        self.last["n_cool"] = self.n_cool
        return gamma

    def state_dict(self) -> dict:
        """All that a resumed run needs to go on identically, in plain types, without the settings."""
        return {"n": self.n, "g_s": self.g_s, "r_s": self.r_s, "n_cool": self.n_cool,
                "grad_norms": self.grad_norms, "rewards": self.rewards}

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(state)
