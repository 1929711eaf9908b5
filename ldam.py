"""Layer-wise Dynamic Adjustment Mechanism (LDAM): when to perturb the condition in stage III, how hard, and
which layers (paper Algorithm 1; gamma from supplement Eq. 1-5). Bookkeeping on two numbers an epoch, without
torch: the perturbation itself, c_i * (1 + gamma * eps), belongs to whoever holds the c_i.

In epoch n, with gradient norm g_n and mean reward r_n:
    1  g_s = 1            if the gradient norm jumped:  g_n / g_(n-1) > spike         latched until firing
    2  r_s = r_s + 1      if the reward fell:           r_n < r_(n-1)                 counted until firing
    3  resting (n_cool > 0):  n_cool = n_cool - 1, and nothing fires this epoch
    4  otherwise, if g_s = 1 and r_s >= patience:  fire with gamma; n_cool = n; g_s = 0; r_s = 0

    gamma = gamma0 * (max G - min G + max R - min R),   G, R = all g_n, r_n of the last `window` epochs

Reading of the paper
- Start: g_0 is infinite and r_0 is 0, so epoch 1 is no jump, and a decline only if its reward is negative.
- Declines need not follow one another: a rise in between does not reset r_s. Only firing resets g_s and r_s;
  both keep listening while resting.
- Both gates of Algorithm 1 must be open (trigger="all"); trigger="any" is the other reading, one is enough.
- An ablated signal (use_grad_norm or use_reward False) drops out of the trigger, not out of gamma, so that an
  ablation changes one thing.
- Cooling off: firing in epoch n is followed by n epochs of rest, so the earliest next one is 2n + 1.
- The jump is a ratio, not a difference: a difference above 100 would by itself make gamma larger than 10.
- An epoch after one of norm 0 (no group's rewards differed) is no jump: that ratio says nothing.
- gamma has no bound in the paper, and a jump can make it huge; gamma_max is ours. Its default 1 is where the
  noise is as large as the feature it multiplies, and one entry in six changes sign: P(eps < -1) = 0.16.
- One LDAM per reward's phase: the epochs counted are that phase's own, starting at 1.
"""
import math
from collections import deque

PAPER_DEPTH = 28                                                        # the VLM depth REGIONS speaks of
REGIONS = {"shallow": (1, 11), "middle": (12, 23), "deep": (24, 28)}    # first and last layer of 28
REWARD_REGIONS = {"clip": "deep", "pickscore": "middle", "aesthetic": "middle"}
DEFAULT_REGION = "middle"                                               # for a reward the paper does not know


def region_layers(region: str, num_layers: int) -> list[int]:
    """The layers (numbered from 1) of a VLM of num_layers layers that make up one of REGIONS.

    Layer i of L stands where layer floor(28 i / L) of 28 does, so each layer is in one region only.
    >>> region_layers("deep", 28), region_layers("middle", 8), region_layers("deep", 8)
    ([24, 25, 26, 27, 28], [4, 5, 6], [7, 8])
    """
    if region not in REGIONS:
        raise ValueError(f"region must be one of {', '.join(REGIONS)}, got {region!r}")
    if num_layers < len(REGIONS):
        raise ValueError(f"num_layers must be at least {len(REGIONS)}, one for each region, got {num_layers}")
    first, last = REGIONS[region]
    # max: beyond 28 layers the first ones would stand before layer 1
    return [i for i in range(1, num_layers + 1) if first <= max(1, PAPER_DEPTH * i // num_layers) <= last]


def perturbed_layers(reward_names_so_far: list[str], num_layers: int) -> list[int]:
    """The layers to perturb when LDAM fires in the phase of the last of these rewards.

    The union over the rewards trained so far: the paper retains the perturbations of the earlier ones. "clip"
    is deep; "pickscore" and "aesthetic" are middle, and so is any other reward: the paper places none, and
    the middle is the region that answers to more than one. Returns sorted layer numbers from 1.
    >>> perturbed_layers(["aesthetic", "clip"], 8)
    [4, 5, 6, 7, 8]
    """
    regions = {REWARD_REGIONS.get(name, DEFAULT_REGION) for name in reward_names_so_far}
    return sorted(i for region in regions for i in region_layers(region, num_layers))


class LDAM:
    """Algorithm 1, one update() an epoch.

    gamma0          scale of the perturbation
    window          epochs whose ranges make up gamma
    spike           ratio of successive gradient norms above which it counts as a jump
    patience        declines of the reward that open the reward gate
    use_grad_norm   listen to the gradient norm (False: ablation)
    use_reward      listen to the reward (False: ablation)
    gamma_max       upper bound of gamma
    trigger         "all" signals in use must have triggered, or "any" of them

    `last` is what to log of the last update() (None before the first):
    epoch           n
    g_s, r_s        as they stood at the decision, before a firing resets them
    n_cool          epochs of rest ahead
    gamma_raw       the formula's value in this epoch, fired or not
    fired           1 or 0
    gamma           what acts in the next epoch, 0.0 where nothing fired
    bounded         1 where gamma_max cut it
    """

    def __init__(self, gamma0: float = 0.1, window: int = 5, spike: float = 100.0, patience: int = 5,
                 use_grad_norm: bool = True, use_reward: bool = True, gamma_max: float = 1.0,
                 trigger: str = "all") -> None:
        if not (use_grad_norm or use_reward):
            raise ValueError("LDAM: use_grad_norm and use_reward are both False, so nothing can trigger it; "
                             "keep one of them, or train without LDAM")
        if trigger not in ("all", "any"):
            raise ValueError(f"LDAM: trigger must be 'all' or 'any', got {trigger!r}")
        if window < 2 or patience < 1:
            raise ValueError(f"LDAM: window must be at least 2 (one epoch has no range) and patience 1, "
                             f"got window={window} and patience={patience}")
        if not (gamma0 > 0 and gamma_max > 0 and spike > 0):
            raise ValueError(f"LDAM: gamma0, gamma_max and spike must be positive, got gamma0={gamma0}, "
                             f"gamma_max={gamma_max} and spike={spike}")
        self.gamma0, self.gamma_max = gamma0, gamma_max
        self.spike, self.patience, self.trigger = spike, patience, trigger
        self.use_grad_norm, self.use_reward = use_grad_norm, use_reward
        self.epoch = 0                                          # n of Algorithm 1, 1 in the first update
        self.g_s, self.r_s, self.n_cool = 0, 0, 0
        self.grad_norms: deque[float] = deque(maxlen=window)    # newest last: the one before is g_(n-1)
        self.rewards: deque[float] = deque(maxlen=window)
        self.last: dict[str, float] | None = None

    def update(self, grad_norm: float, reward: float) -> float | None:
        """Take in one epoch; return gamma where the perturbation fires, to act in the next epoch, else None.

        grad_norm   the epoch's gradient norm before clipping, >= 0
        reward      the epoch's mean reward
        gamma may be very small or even 0.0, so ask `is not None`.
        Raises ValueError, and leaves everything as it was, if a value is not finite or the norm is negative:
        it would spoil gamma for `window` epochs. Leave such an epoch out.
        """
        if not (math.isfinite(grad_norm) and math.isfinite(reward) and grad_norm >= 0):
            raise ValueError(f"LDAM: grad_norm must be finite and >= 0, and reward finite; got {grad_norm} "
                             f"and {reward} after epoch {self.epoch}; leave such an epoch out")
        self.epoch += 1
        self._listen(grad_norm, reward)
        resting = self.n_cool > 0
        self.n_cool -= resting
        fired = self._triggered() and not resting
        G, R = self.grad_norms, self.rewards
        gamma_raw = self.gamma0 * (max(G) - min(G) + max(R) - min(R))
        gamma = min(gamma_raw, self.gamma_max)
        self.last = {"epoch": self.epoch, "g_s": self.g_s, "r_s": self.r_s, "gamma_raw": gamma_raw,
                     "fired": int(fired), "gamma": gamma if fired else 0.0,
                     "bounded": int(fired and gamma_raw > self.gamma_max)}
        if fired:
            self.g_s, self.r_s, self.n_cool = 0, 0, self.epoch
        self.last["n_cool"] = self.n_cool
        return gamma if fired else None

    def _listen(self, grad_norm: float, reward: float) -> None:
        """Lines 1 and 2 of Algorithm 1, then both values enter the window."""
        previous_norm = self.grad_norms[-1] if self.grad_norms else math.inf
        previous_reward = self.rewards[-1] if self.rewards else 0.0
        if previous_norm > 0 and grad_norm > self.spike * previous_norm:
            self.g_s = 1
        if reward < previous_reward:
            self.r_s += 1
        self.grad_norms.append(float(grad_norm))
        self.rewards.append(float(reward))

    def _triggered(self) -> bool:
        gates = []
        if self.use_grad_norm:
            gates.append(self.g_s == 1)
        if self.use_reward:
            gates.append(self.r_s >= self.patience)
        return all(gates) if self.trigger == "all" else any(gates)

    def state_dict(self) -> dict[str, int | list[float]]:
        """All that a resumed run needs to go on identically, in plain types, without the settings."""
        return {"epoch": self.epoch, "g_s": self.g_s, "r_s": self.r_s, "n_cool": self.n_cool,
                "grad_norms": list(self.grad_norms), "rewards": list(self.rewards)}

    def load_state_dict(self, state: dict[str, int | list[float]]) -> None:
        """Go on from a state_dict(). Raises ValueError if it is none, or was saved with a longer window."""
        if state.keys() != self.state_dict().keys():
            raise ValueError(f"LDAM: the state must have the keys {', '.join(self.state_dict())}, "
                             f"got {', '.join(state)}")
        window = self.grad_norms.maxlen
        if len(state["grad_norms"]) > window:
            raise ValueError(f"LDAM: the state holds {len(state['grad_norms'])} epochs, more than "
                             f"window={window}; resume with the window it was saved with")
        self.epoch, self.g_s = state["epoch"], state["g_s"]
        self.r_s, self.n_cool = state["r_s"], state["n_cool"]
        self.grad_norms = deque(state["grad_norms"], maxlen=window)
        self.rewards = deque(state["rewards"], maxlen=window)
