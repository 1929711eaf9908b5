"""A sentence of the paper and what was measured of it; the figures of `layers`, `ablate` and `report`."""
from matplotlib.axes import Axes
from torch import Tensor

from evaluation import mean_and_error
from pictures import smoothed

COLORS = ("tab:red", "tab:blue", "tab:green", "tab:purple", "tab:orange", "tab:cyan", "tab:brown")
# Two-sided 95 % quantiles of Student's t for 1, 2, 3 ... degrees of freedom: with 3 seeds +- 4.30 errors
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def t_quantile(df: int) -> float:
    """Beyond the table: its expansion in 1/df, at most 0.003 off."""
    if df <= len(T95):
        return T95[df - 1]
    return 1.960 + 2.372 / df + 2.822 / df ** 2


def claim(text: str, measure: str, values: list[float] | Tensor, over: str = "prompts") -> dict:
    """A row of the table of claims: a sentence is supported, contradicted or undecided at 95 %.

    measure  what the values are: positive where they speak for the claim
    values   one for each of what `over` names: prompts, seeds
    """
    values = list(map(float, values))
    estimate, error = mean_and_error(values)
    verdict = "undecided"
    if error is not None and abs(estimate) > t_quantile(len(values) - 1) * error:
        verdict = "supported" if estimate > 0 else "contradicted"
    return {"claim": text, "verdict": verdict, "measure": measure, "estimate": estimate,
            "standard error": error, "n": len(values), "over": over}


def draw_curve(axis: Axes, log: list[dict], key: str, color: str, label: str) -> None:
    """A number of a log, as logged (pale) and as EMA 0.1. Grey: a new phase; dotted: LDAM fires."""
    unit = "epoch" if "epoch" in log[0] else "step"
    known = [record for record in log if record.get(key) is not None]
    x = [record[unit] for record in known]
    y = [record[key] for record in known]
    # held-out scores are few: show where they are
    few = len(x) < 8
    axis.plot(x, y, color=color, alpha=0.3, marker="." if few else "")
    axis.plot(x, smoothed(y, 1.0 if few else 0.1), color=color, label=label)
    axis.set_title(key, parse_math=False, fontsize=10)
    axis.set_xlabel(unit)
    for before, record in zip(log[:1] + log, log):
        if record.get("phase") != before.get("phase"):
            axis.axvline(record[unit] - 0.5, color="grey", linewidth=0.5)
        if record.get("ldam/fired"):
            axis.axvline(record[unit], color=color, linewidth=0.8, linestyle=":")
