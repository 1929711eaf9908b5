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
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from common import Refused, atomic, knob, parse_config, read_log
from data import read_picture
from evaluation import read_csv, read_json
from evaluation.claims import COLORS, draw_curve, panels

LONG, MOST = 12, 300            # rows above which a table starts folded; rows that are shown
MAX_WIDTH = 1600                # pixels; wider pictures are made smaller
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
    folders: tuple[str, ...] = knob((), "run folders, which are compared, and folders of results", words=True)
    out: str = knob("report.html", "the file to write")


def main(argv: list[str] | None = None) -> dict:
    """Write the report. Returns "left_out": what could not be read."""
    cfg = parse_config(ReportConfig, argv, description=__doc__.splitlines()[0])
    folders = [Path(folder) for folder in cfg.folders]
    if not folders or not all(folder.is_dir() for folder in folders):
        raise Refused(f"expected folders of runs or results, got {' '.join(cfg.folders) or 'none'}")
    logs = {folder: read_log(folder / "metrics.jsonl") for folder in folders
            if (folder / "metrics.jsonl").is_file()}
    left_out: list[str] = []
    parts = [f"<h1>ParaUni: {text(cfg.folders)}</h1>"]
    if logs:
        parts += ["<h2>Curves</h2>", charts(logs)]
    for folder in folders:
        files = files_to_show(folder, is_run=folder in logs)
        parts += [f"<h2>{text(folder)}</h2>", *contents(files, left_out)]
    if logs:
        parts += ["<h2>Configuration</h2>", config_table(logs)]
    parts += [f"<p>Left out: {text(reason)}</p>" for reason in left_out]
    with atomic(cfg.out) as temporary:
        temporary.write_text(PAGE % "\n".join(parts), encoding="utf-8")
    print(*(f"left out: {reason}" for reason in left_out), f"written to {cfg.out}", sep="\n")
    return {"left_out": left_out}


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


def json_tables(name: str, data: dict) -> str:
    """What a command has written: a table of its single values, then one of each of its tables."""
    tables = {key: value for key, value in data.items()
              if isinstance(value, list) and value and isinstance(value[0], dict)}
    single = [{"name": key, "value": value} for key, value in data.items() if key not in tables]
    whole = f"<h3>{text(name)}</h3>{table(single)}" if single else ""
    for key, rows in tables.items():
        whole += f"<h3>{text(name)}: {text(key)}</h3>{table(rows)}"
    return whole


def files_to_show(folder: Path, is_run: bool) -> list[Path]:
    """The tables, then the pictures of a folder; of a run the pictures, of those that it drew while training
    the first and the last. Links may lead anywhere."""
    files = [path for suffix in ("csv", "json", "png") for path in sorted(folder.glob(f"*.{suffix}"))
             if path.is_file() and not path.is_symlink()]
    if not is_run:
        return files
    epochs = [path for path in files if path.name.startswith("epoch-")]
    return [path for path in files if path.suffix == ".png" and path not in epochs[1:-1]]


def contents(files: list[Path], left_out: list[str]) -> list[str]:
    """The files as they are shown. One that cannot be read is left out and named."""
    parts = []
    for path in files:
        try:
            if path.suffix == ".png":
                picture = read_picture(path)
                picture.thumbnail((MAX_WIDTH, picture.height))
                caption = f"<figcaption>{text(path.name)}</figcaption>"
                parts.append(f'<figure class="scroll">{embed(picture.save, path.name)}{caption}</figure>')
            elif path.suffix == ".csv":
                parts.append(f"<h3>{text(path.name)}</h3>{table(read_csv(path))}")
            else:
                # the commands also write their tables as CSV, which is shown already
                parts.append(json_tables(path.name, {name: value for name, value in read_json(path).items()
                                                     if not path.with_name(f"{name}.csv").is_file()}))
        except Exception as error:
            left_out.append(f"{path}: {error!r}")
    return parts


def charts(logs: dict[Path, list[dict]]) -> str:
    """A chart for each number in the logs that changes, all runs in it."""
    records = [record for log in logs.values() for record in log]
    names = sorted({name for record in records for name in record})
    parts, constant = [], []
    for name in [name for start in CHARTS for name in names if name.startswith(start)]:
        if len({record.get(name) for record in records} - {None}) < 2:
            constant.append(name)
            continue
        figure, (axis,) = panels(1, 4.2, 2.4)
        for (folder, log), color in zip(logs.items(), itertools.cycle(COLORS)):
            draw_curve(axis, log, name, color, folder.name)
        if not parts:
            axis.legend(fontsize=8)
        parts.append(embed(figure.savefig, name))
    return ("<p>Pale: as logged. Solid: smoothed, EMA 0.1. Grey line: a new reward's phase. Dotted: LDAM "
            f"fires. Constant, not drawn: {text(constant) or 'none'}.</p>"
            f"<section class='charts'>{''.join(parts)}</section>")


def config_table(folders: Iterable[Path]) -> str:
    """Every flag of every run; those that differ come first."""
    configs = {str(folder): read_json(folder / "config.json") for folder in folders}
    names = dict.fromkeys(name for config in configs.values() for name in config)
    rows = [{"flag": name, **{run: config.get(name) for run, config in configs.items()}} for name in names]
    differs = [row for row in rows if len({json.dumps(value) for value in list(row.values())[1:]}) > 1]
    return (table(differs) if differs else "") + table([row for row in rows if row not in differs])
