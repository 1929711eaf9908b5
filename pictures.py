"""What a run leaves to look at: sheets of pictures, curves of rewards, the table of what has changed.

B pictures, H W pixels.
"""
import math
import textwrap
from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot as plt
from torch import Tensor

from common import atomic

matplotlib.use("Agg")


def save_sheet(path: str | Path, images: Tensor, columns: int, captions: list[str] | None = None,
               titles: list[str] | None = None) -> None:
    """A white sheet of images (B, 3, H, W) in [0, 1]: a caption under each, a title left of each row."""
    rows = math.ceil(len(images) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.3 * columns, 1.6 * rows), squeeze=False,
                                layout="constrained")
    for i, axis in enumerate(axes.flat):
        axis.axis("off")
        if i < len(images):
            pixels = images[i].float().cpu().clamp(0, 1).permute(1, 2, 0).numpy()       # (H, W, 3)
            axis.imshow(pixels, interpolation="nearest")
            caption = textwrap.fill(captions[i], 20) if captions else ""
            axis.text(0.5, -0.04, caption, transform=axis.transAxes, fontsize=7, ha="center", va="top")
    for axis, title in zip(axes[:, 0], titles or []):
        axis.text(-0.08, 0.5, title, transform=axis.transAxes, rotation=90, fontsize=9, ha="right",
                  va="center")
    save_figure(path, figure)


def save_figure(path: str | Path, figure: plt.Figure) -> None:
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)


def smoothed(values: list[float], rate: float = 0.1) -> list[float]:
    """Exponential moving average, as in the paper's supplement, section 3."""
    averages: list[float] = []
    for value in values:
        averages.append(value if not averages else (1 - rate) * averages[-1] + rate * value)
    return averages


def plot_rewards(path: str | Path, records: list[dict]) -> None:
    """Mean reward of each epoch of stage III (paper Figure 9), raw (pale) and smoothed, a panel a reward. Its
    own phase is shaded; black dots are held-out scores; a red line stands where LDAM fired."""
    names = list(dict.fromkeys(record["phase"] for record in records))
    looks = [record for record in records if f"heldout/{names[0]}" in record]
    records = [record for record in records if record["epoch"] > 0]
    figure, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 3), squeeze=False,
                                layout="constrained")
    for axis, name in zip(axes[0], names):
        scored = [record for record in records if record[f"reward/{name}"] is not None]
        epochs = [record["epoch"] for record in scored]
        values = [record[f"reward/{name}"] for record in scored]
        axis.plot(epochs, values, color="tab:blue", alpha=0.3)
        axis.plot(epochs, smoothed(values), color="tab:blue")
        axis.plot([record["epoch"] for record in looks], [record[f"heldout/{name}"] for record in looks],
                  "o-", color="black", markersize=3, linewidth=0.8)
        own = [record["epoch"] for record in records if record["phase"] == name]
        axis.axvspan(own[0] - 0.5, own[-1] + 0.5, color="tab:blue", alpha=0.08)
        for record in records:
            if record["ldam/fired"]:
                axis.axvline(record["epoch"], color="tab:red", linewidth=0.8, linestyle=":")
        axis.set(title=name, xlabel="epoch")
    save_figure(path, figure)


def reward_table(before: dict[str, list[float]], after: dict[str, list[float]]) -> str:
    """Mean of each reward before and after, and the paired difference with its standard error."""
    lines = [f"{'held-out reward':20} {'before':>9} {'after':>9} {'change':>9}  {'+- s.e.':>8}   n"]
    for name in before:
        pairs = torch.tensor([before[name], after[name]])                               # (2, prompts)
        pairs = pairs[:, pairs.isfinite().all(0)]
        change, n = pairs[1] - pairs[0], pairs.shape[1]
        error = change.std() / n ** 0.5
        lines.append(f"{name:20} {pairs[0].mean():9.4f} {pairs[1].mean():9.4f} {change.mean():+9.4f}  "
                     f"{error:8.4f} {n:4}")
    return "\n".join(lines)
