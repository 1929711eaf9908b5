"""A sentence of the paper and what was measured of it."""
from torch import Tensor

from evaluation import mean_and_error

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
