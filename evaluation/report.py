"""One HTML file about runs and results: `python evaluate.py report runs/stage3 runs/geneval`.

A folder with a metrics.jsonl is a run of train.py; several of them are compared in the same charts. Of any
other folder the tables (CSV, JSON) and pictures (PNG) are shown. The file holds everything, pictures as data.
It runs no script and fetches nothing, and a content policy in it forbids both; texts from files are escaped.

Left out: what lies in subfolders, and links.
"""
import base64
import html
import io
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common import Refused, atomic, knob, parse_config, read_log
from data import read_picture
from evaluation import read_json, read_table
from evaluation.layers import COLORS, largest_jump
from ldam import perturbed_layers
from model import PRESETS
from pictures import smoothed

LONG, MOST = 12, 300            # rows above which a table starts folded; rows that are shown
# the numbers in a log that are drawn, in this order
CHARTS = ("reward/", "heldout/", "loss", "kl", "grad_norm", "ratio_dev", "clip_frac", "zero_std",
          "ldam/gamma_raw", "ldam/r_s", "lr", "skipped", "time/")
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
      content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><title>ParaUni report</title><style>
body { margin: auto; max-width: 1100px; padding: 12px; font: 16px/1.5 system-ui, sans-serif }
body { overflow-wrap: anywhere }
h1 { font-size: 1.5em } h2 { font-size: 1.2em; border-bottom: 1px solid #ccc } h3 { font-size: 1em }
img { max-width: 100%%; height: auto } figure { margin: 0 0 12px }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%%, 320px), 1fr)) }
.scroll { overflow-x: auto } .scroll img { max-width: max(100%%, 720px) }
table { border-collapse: collapse; font-size: .85em }
td, th { border: 1px solid #ccc; padding: 3px 8px; text-align: left; overflow-wrap: normal }
</style></head><body>%s</body></html>
"""


@dataclass(frozen=True)
class ReportConfig:
    """Flags of `evaluate.py report`."""
    folders: tuple[str, ...] = knob((), "run folders, which are compared, and folders of results", words=True)
    out: str = knob("report.html", "the file to write")
    smooth: float = knob(0.1, "share of a new value in the smoothed curves (EMA)")
    max_width: int = knob(1600, "pixels; wider pictures are made smaller")


@dataclass(frozen=True)
class Run:
    """A folder of train.py: its log and its flags."""
    folder: Path
    records: list[dict]
    config: dict


def main(argv: list[str] | None = None) -> dict:
    """Write the report. Returns its "path", the number of "runs", and "left_out": what could not be read."""
    cfg = parse_config(ReportConfig, argv, description=__doc__.splitlines()[0])
    folders = [Path(folder) for folder in cfg.folders]
    if not folders or not all(folder.is_dir() for folder in folders):
        raise Refused(f"expected folders of runs or results, got {' '.join(cfg.folders) or 'none'}")
    runs = [Run(folder, read_log(folder / "metrics.jsonl"), json.loads((folder / "config.json").read_text()))
            for folder in folders if (folder / "metrics.jsonl").is_file()]
    left_out: list[str] = []
    parts = [f"<h1>ParaUni: {text(cfg.folders)}</h1>"]
    if runs:
        parts += ["<h2>Curves</h2>", charts(runs, cfg.smooth), "<h2>Layers that LDAM perturbed</h2>"]
        parts += map(layer_map, runs)
    for folder in folders:
        parts.append(f"<h2>{text(folder)}</h2>")
        is_run = (folder / "metrics.jsonl").is_file()
        files = chosen_pictures(folder) if is_run else readable_files(folder)
        parts += contents(files, cfg.max_width, left_out)
    if runs:
        parts += ["<h2>Configuration</h2>", config_table(runs)]
    parts += [f"<p>Left out: {text(reason)}</p>" for reason in left_out]
    with atomic(cfg.out) as temporary:
        temporary.write_text(PAGE % "\n".join(parts), encoding="utf-8")
    print(*(f"left out: {reason}" for reason in left_out), f"written to {cfg.out}", sep="\n")
    return {"path": cfg.out, "runs": len(runs), "left_out": left_out}


def text(value: object) -> str:
    """Any value as HTML, safe in an attribute too; numbers with 4 digits, of a long list the first ones."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(text, value[:8])) + (" ..." if len(value) > 8 else "")
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else html.escape(str(value))


# ----------------------------------------------------------------------------- pictures and tables

def embed(save: Callable, name: str) -> str:
    """A picture as data in the page: what a PIL picture's save(), or a figure's savefig(), writes."""
    buffer = io.BytesIO()
    save(buffer, format="png")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{text(name)}" src="data:image/png;base64,{data}">'


def table(rows: list[dict]) -> str:
    """Rows with the same keys; a long table starts folded."""
    lines = ["".join(f"<th>{text(name)}</th>" for name in rows[0])]
    lines += ["".join(f"<td>{text(value)}</td>" for value in row.values()) for row in rows[:MOST]]
    whole = f"<div class='scroll'><table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table></div>"
    return whole if len(rows) <= LONG else f"<details><summary>{len(rows)} rows</summary>{whole}</details>"


def json_tables(name: str, data: object) -> str:
    """Nested JSON as tables: dicts that are alike, in a list or a dict, make one; single values another."""
    if isinstance(data, list) and data and all(isinstance(row, dict) for row in data):
        return f"<h3>{text(name)}</h3>{table(data)}"
    if not isinstance(data, dict) or not data:
        return ""
    if all(isinstance(row, dict) and row.keys() == next(iter(data.values())).keys() for row in data.values()):
        return f"<h3>{text(name)}</h3>{table([{'': key, **row} for key, row in data.items()])}"
    nested = {key: value for key, value in data.items() if isinstance(value, dict)
              or isinstance(value, list) and any(isinstance(row, dict) for row in value)}
    single = [{"name": key, "value": value} for key, value in data.items() if key not in nested]
    own = f"<h3>{text(name)}</h3>{table(single)}" if single else ""
    return own + "".join(json_tables(f"{name}: {key}", value) for key, value in nested.items())


def readable_files(folder: Path) -> list[Path]:
    """The tables, then the pictures of a folder. Links may lead anywhere."""
    return [path for suffix in ("csv", "json", "png") for path in sorted(folder.glob(f"*.{suffix}"))
            if path.is_file() and not path.is_symlink()]


def chosen_pictures(run: Path) -> list[Path]:
    """Of the pictures of the same prompts through training the first, a middle and the last; all others."""
    pictures = [path for path in readable_files(run) if path.suffix == ".png"]
    epochs = [path for path in pictures if path.name.startswith("epoch-")]
    shown = {*epochs[:1], *epochs[len(epochs) // 2:][:1], *epochs[-1:]}
    return [path for path in pictures if path in shown or path not in epochs]


def contents(files: list[Path], max_width: int, left_out: list[str]) -> list[str]:
    """The files as they are shown. One that cannot be read is left out and named."""
    parts = []
    for path in files:
        try:
            if path.suffix == ".png":
                picture = read_picture(path)
                picture.thumbnail((max_width, picture.height))
                caption = f"<figcaption>{text(path.name)}</figcaption>"
                parts.append(f'<figure class="scroll">{embed(picture.save, path.name)}{caption}</figure>')
            elif path.suffix == ".csv":
                parts.append(f"<h3>{text(path.name)}</h3>{table(read_table(path))}")
            else:
                # the commands also write their tables as CSV, which is shown already
                parts.append(json_tables(path.name, {name: value for name, value in read_json(path).items()
                                                     if not path.with_name(f"{name}.csv").is_file()}))
        except Exception as error:
            left_out.append(f"{path}: {error!r}")
    return parts


# ----------------------------------------------------------------------------- runs

def charts(runs: list[Run], share: float) -> str:
    """A chart for each number in the logs that changes, all runs in it."""
    names = {name for run in runs for record in run.records for name in record}
    order = [name for start in CHARTS for name in sorted(names) if name.startswith(start)]
    parts, constant = [], []
    for name in order:
        if len({record[name] for run in runs for record in run.records if name in record} - {None}) < 2:
            constant.append(name)
            continue
        figure = Figure(figsize=(4.2, 2.4), layout="constrained", dpi=130)
        axis = figure.subplots()
        for run, color in zip(runs, itertools.cycle(COLORS)):
            draw_curve(axis, run, name, color, share)
        axis.set_title(name, parse_math=False, fontsize=10)
        if not parts:
            axis.legend(fontsize=8)
        parts.append(embed(figure.savefig, name))
    return (f"<p>Pale: as logged. Solid: smoothed, EMA {share:g}. Dashed: a new reward's phase begins. "
            f"Constant, not drawn: {text(constant) or 'none'}.</p>"
            f"<section class='charts'>{''.join(parts)}</section>")


def draw_curve(axis: Axes, run: Run, name: str, color: str, share: float) -> None:
    unit = "epoch" if "epoch" in run.records[0] else "step"
    known = [record for record in run.records if record.get(name) is not None]
    x, y = [record[unit] for record in known], [record[name] for record in known]
    # held-out scores are few: show where they are
    few = len(x) < 8
    axis.plot(x, y, color=color, alpha=0.3, marker="." if few else "")
    axis.plot(x, smoothed(y, 1.0 if few else share), color=color, label=run.folder.name)
    axis.set_xlabel(unit)
    for before, record in zip(run.records, run.records[1:]):
        if record.get("phase") != before.get("phase"):
            axis.axvline(record[unit] - 0.5, color="grey", linewidth=0.6, linestyle="--")


def layer_map(run: Run) -> str:
    """When LDAM fired, on which layers and how hard; where it never did, how far it was from it."""
    title = f"<h3>{text(run.folder)}</h3>"
    records = [record for record in run.records if "ldam/r_s" in record]
    if not records:
        return f"{title}<p>No run of stage 3, or LDAM was off.</p>"
    fired = [record for record in records if record["ldam/fired"]]
    declines = max(record["ldam/r_s"] for record in records)
    sentence = (f"LDAM fired after {len(fired)} of {len(records)} epochs. Largest jump of the gradient norm: "
                f"{largest_jump(records):.3g} (fires from {run.config['ldam_spike']:g}). "
                f"Most declines of the reward: {declines} (fires from {run.config['ldam_patience']}).")
    if not fired:
        return f"{title}<p>{sentence}</p>"
    rewards = [name.rpartition(":")[2] for name in run.config["rewards"]]
    L = PRESETS[run.config["preset"]].vlm_layers
    rows = []
    for record in fired:
        phase = rewards.index(record["phase"])
        named = rewards[phase:phase + 1] if run.config["ldam_layers"] == "present" else rewards[:phase + 1]
        rows.append({"epoch": record["epoch"], "phase": record["phase"], "gamma": record["ldam/gamma"],
                     "layers": perturbed_layers(named, L)})
    figure = Figure(figsize=(4.2, 2.4), layout="constrained", dpi=130)
    axis = figure.subplots()
    points = [(row["epoch"], layer, row["gamma"]) for row in rows for layer in row["layers"]]
    epochs, layers, gammas = zip(*points)
    marks = axis.scatter(epochs, layers, c=gammas, marker="s", vmin=0)
    axis.set(xlabel="epoch", ylabel="layer", xlim=(0, records[-1]["epoch"] + 1), ylim=(0.5, L + 0.5))
    figure.colorbar(marks, label="gamma")
    return f"{title}<p>{sentence}</p>{embed(figure.savefig, 'layers by epoch')}{table(rows)}"


def config_table(runs: list[Run]) -> str:
    """Every flag of every run; those that differ come first."""
    names = dict.fromkeys(name for run in runs for name in run.config)
    rows = [{"flag": name, **{str(run.folder): run.config.get(name) for run in runs}} for name in names]
    differs = [row for row in rows if len({json.dumps(value) for value in list(row.values())[1:]}) > 1]
    return (table(differs) if differs else "") + table([row for row in rows if row not in differs])
