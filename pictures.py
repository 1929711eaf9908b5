"""The one reader of pictures, for every script; and what a run leaves to look at: sheets of pictures, curves
of rewards, the table of what has changed.

B pictures, H W pixels.
"""
import io
import itertools
import math
import warnings
from collections.abc import Iterable
from pathlib import Path
from textwrap import fill

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from common import Refused, atomic

MAX_PIXELS = 80_000_000
# PIL reads other formats too, some of them by starting programs
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF")
# what brings a picture upright, by its EXIF orientation
TURN = Image.Transpose
UPRIGHT = {2: TURN.FLIP_LEFT_RIGHT, 3: TURN.ROTATE_180, 4: TURN.FLIP_TOP_BOTTOM, 5: TURN.TRANSPOSE,
           6: TURN.ROTATE_270, 7: TURN.TRANSVERSE, 8: TURN.ROTATE_90}
# of text in one chunk of a PNG: drawing programs keep their whole work in it
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
# a prompt, a reward or a folder may hold dollars: they are no formula
matplotlib.rcParams["text.parse_math"] = False


# ----------------------------------------------------------------------------- reading

def read_picture(source: str | Path | bytes) -> Image.Image:
    """A picture as people see it: upright 8-bit RGB, white where it is transparent, the first frame of a GIF.

    source: the path of a file, or its bytes. Raises Refused.
    """
    try:
        data = source
        if not isinstance(source, bytes):
            # a pipe would be waited for, and a device need have no end
            if not Path(source).is_file():
                raise ValueError("no such file")
            data = Path(source).read_bytes()
        # what PIL warns of is either refused or harmless
        with warnings.catch_warnings(action="ignore"):
            return decode(data)
    except UnidentifiedImageError:
        reason = f"no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} picture"
    # a decoder promises nothing about what it raises
    except Exception as error:
        reason = str(error) or type(error).__name__
    raise Refused(reason if isinstance(source, bytes) else f"{source}: {reason}")


def decode(data: bytes) -> Image.Image:
    # only the header is read here
    picture = Image.open(io.BytesIO(data), formats=FORMATS)
    if picture.width * picture.height > MAX_PIXELS:
        raise ValueError(f"{picture.width} x {picture.height} pixels, the most is {MAX_PIXELS:,}")

    # not by ImageOps.exif_transpose: it writes the other fields anew, and fails where one is odd
    orientation = picture.getexif().get(ExifTags.Base.Orientation)
    if orientation in UPRIGHT:
        picture = picture.transpose(UPRIGHT[orientation])

    # 16 bits: convert() would cut everything above 255 to white
    if picture.mode.startswith("I"):
        grey = np.asarray(picture).clip(0, 65535) / 257
        picture = Image.fromarray(grey.round().astype(np.uint8))

    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture)
    return picture.convert("RGB")


# ----------------------------------------------------------------------------- writing

def panels(columns: int, width: float = 4, height: float = 3.2, rows: int = 1) -> tuple[Figure, list]:
    """A figure of rows x columns panels, so many inches each, and its axes."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained", dpi=120)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def save_sheet(path: str | Path, images: Tensor, columns: int, captions: Iterable[str] = (),
               titles: Iterable[str] = ()) -> None:
    """A white sheet of images (B, 3, H, W) in [0, 1]: a caption under each, a title left of each row."""
    rows = math.ceil(len(images) / columns)
    figure, axes = panels(columns, 1.3, 1.6, rows)
    for axis in axes:
        axis.axis("off")
    for axis, image in zip(axes, images):
        pixels = image.float().cpu().clamp(0, 1).permute(1, 2, 0).numpy()               # (H, W, 3)
        axis.imshow(pixels, interpolation="nearest")
    for axis, caption in zip(axes, captions):
        axis.text(0.5, -0.04, fill(caption, 20), transform=axis.transAxes, fontsize=7, ha="center", va="top")
    for axis, title in zip(axes[::columns], titles):
        axis.text(-0.08, 0.5, fill(title, 18), transform=axis.transAxes, rotation=90, fontsize=9,
                  ha="right", va="center", multialignment="center")
    save_figure(path, figure)


def save_figure(path: str | Path, figure: Figure) -> None:
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png")


# of runs, or of bars, side by side
COLORS = ("tab:red", "tab:blue", "tab:green", "tab:purple", "tab:orange", "tab:cyan", "tab:brown")


def draw_curve(axis: Axes, log: list[dict], key: str, color: str, label: str = "") -> None:
    """A number of a log, as logged (pale) and as EMA 0.1 (the paper's supplement, section 3). Grey: a new
    phase; dotted: LDAM fires."""
    unit = "epoch" if "epoch" in log[0] else "step"
    known = [record for record in log if record.get(key) is not None]
    x = [record[unit] for record in known]
    y = [record[key] for record in known]
    # held-out scores are few: show where they are
    few = len(x) < 8
    rate = 1.0 if few else 0.1
    smoothed = itertools.accumulate(y, lambda average, value: (1 - rate) * average + rate * value)
    axis.plot(x, y, color=color, alpha=0.3, marker="." if few else "")
    axis.plot(x, list(smoothed), color=color, label=label)
    axis.set_title(key, fontsize=10)
    axis.set_xlabel(unit)
    for before, record in zip(log[:1] + log, log):
        if record.get("phase") != before.get("phase"):
            axis.axvline(record[unit] - 0.5, color="grey", linewidth=0.5)
        if record.get("ldam/fired"):
            axis.axvline(record[unit], color=color, linewidth=0.8, linestyle=":")


def draw_curves(axes: list[Axes], logs: dict[str, list[dict]], keys: list[str]) -> None:
    """A panel a number, a colour a run; one that has just begun has no line yet."""
    for axis, key in zip(axes, keys):
        for (run, log), color in zip(logs.items(), itertools.cycle(COLORS)):
            if log:
                draw_curve(axis, log, key, color, run)
    if keys:
        axes[0].legend(fontsize=7)


def plot_rewards(path: str | Path, records: list[dict]) -> None:
    """Mean reward of each epoch of stage III (paper Figure 9), a panel a reward. Its own phase is shaded;
    black dots are held-out scores."""
    names = list(dict.fromkeys(record["phase"] for record in records))
    figure, axes = panels(len(names), height=3)
    for axis, name in zip(axes, names):
        draw_curve(axis, records, f"reward/{name}", "tab:blue")
        axis.set_title(name)
        looks = [record for record in records if f"heldout/{name}" in record]
        axis.plot([record["epoch"] for record in looks], [record[f"heldout/{name}"] for record in looks],
                  "o-", color="black", markersize=3, linewidth=0.8)
        own = [record["epoch"] for record in records if record["phase"] == name and record["epoch"] > 0]
        axis.axvspan(own[0] - 0.5, own[-1] + 0.5, color="tab:blue", alpha=0.08)
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
