"""A sentence of the paper and what was measured of it; tables and figures of `layers` and `ablate`."""
import csv
import math
from pathlib import Path

from matplotlib.figure import Figure

from evaluation import mean_and_error

# Two-sided 95 % quantiles of Student's t for 1, 2, 3 ... degrees of freedom: with 3 seeds +- 4.30 errors
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
Z95, Z80 = 1.960, 0.842                     # normal quantiles: two-sided 95 %, one-sided 80 %


def t_quantile(df: int) -> float:
    """Beyond the table: its expansion in 1/df, at most 0.003 off."""
    return T95[df - 1] if df <= len(T95) else Z95 + 2.372 / df + 2.822 / df ** 2


def claim(text: str, measure: str, values: list[float], over: str) -> dict:
    """A row of claims.csv.

    measure  what the values are: positive where they speak for the claim
    values   one for each of what `over` names: prompts, seeds
    """
    n = len(values)
    estimate, error = mean_and_error(values)
    verdict, needed = "undecided", None
    if error is not None and abs(estimate) > t_quantile(n - 1) * error:
        verdict = "supported" if estimate > 0 else "contradicted"
    elif error and estimate:
        needed = n_needed(error * math.sqrt(n) / abs(estimate), n)
    return {"claim": text, "verdict": verdict, "measure": measure, "estimate": estimate,
            "standard error": error, "n": n, "over": over, "n needed": needed}


def n_needed(spread: float, n: int) -> int:
    """The smallest sample above n that decides with a chance of 80 %, were mean and spread as measured.

    spread  standard deviation in units of the mean
    """
    size = max(n + 1, math.ceil(((Z95 + Z80) * spread) ** 2))
    # in a small sample the quantile is larger than the normal one
    while (t_quantile(size - 1) + Z80) * spread > math.sqrt(size):
        size += 1
    return size


# ----------------------------------------------------------------------------- tables and figures

def write_csv(path: Path, rows: list[dict]) -> None:
    """Rows with the same keys; floats with 6 digits, None as an empty cell."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value
                             for key, value in row.items()})


def markdown(rows: list[dict]) -> str:
    """The rows as a Markdown table; floats with 4 decimals."""
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    for row in rows:
        cells = [f"{value:.4f}" if isinstance(value, float) else value for value in row.values()]
        lines.append(["" if cell is None else str(cell) for cell in cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def panels(columns: int, width: float = 4, height: float = 3.2, rows: int = 1) -> tuple[Figure, list]:
    """A figure of rows x columns panels, so many inches each, and its axes."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained", dpi=120)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)
