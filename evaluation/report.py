"""One HTML file about runs: `python evaluate.py report runs/stage3 runs/other`.

The runs of train.py are compared in the same charts; then come the pictures of each, and their flags. The
file holds everything, pictures as data. It runs no script and fetches nothing, and a content policy in it
forbids both; texts from files are escaped.
"""
import base64
import html
import io
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common import Refused, atomic, knob, parse_config, read_log
from evaluation import read_json
from pictures import COLORS, draw_curve, panels, read_picture

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
h1 { font-size: 1.5em } h2 { font-size: 1.2em; border-bottom: 1px solid #ccc }
img { max-width: 100%%; height: auto } figure { margin: 0 0 12px }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%%, 320px), 1fr)) }
.scroll { overflow-x: auto } .scroll img { max-width: max(100%%, 720px) }
table { border-collapse: collapse; font-size: .85em }
td { border: 1px solid #ccc; padding: 3px 8px; text-align: left; overflow-wrap: normal }
</style></head><body>%s</body></html>
"""


@dataclass(frozen=True)
class ReportConfig:
    folders: tuple[str, ...] = knob((), "run folders, which are compared", words=True)
    out: str = knob("report.html", "the file to write")


def main(argv: list[str] | None = None) -> dict:
    """Write the report. Returns its "path"."""
    cfg = parse_config(ReportConfig, argv, description=__doc__.split("\n")[0])
    folders = [Path(folder) for folder in cfg.folders]
    needed = [folder / name for folder in folders for name in ("metrics.jsonl", "config.json")]
    if not needed or not all(map(is_own, needed)):
        raise Refused("expected run folders, with a metrics.jsonl and a config.json of their own, got "
                      f"{' '.join(cfg.folders) or 'none'}")
    parts = [f"<h1>ParaUni: {text(cfg.folders)}</h1><h2>Curves</h2>"]
    parts.append(charts({folder: read_log(folder / "metrics.jsonl") for folder in folders}))
    for folder in folders:
        parts.append(f"<h2>{text(folder)}</h2>")
        # not of subfolders
        for path in filter(is_own, sorted(folder.glob("*.png"))):
            picture = read_picture(path)
            picture.thumbnail((1600, picture.height))
            caption = f"<figcaption>{text(path.name)}</figcaption>"
            parts.append(f'<figure class="scroll">{embed(picture.save, path.name)}{caption}</figure>')
    parts += ["<h2>Configuration</h2>", config_table(folders)]
    with atomic(cfg.out) as temporary:
        # a file's name need not be text
        temporary.write_text(PAGE % "\n".join(parts), encoding="utf-8", errors="replace")
    print(f"written to {cfg.out}")
    return {"path": cfg.out}


def is_own(path: Path) -> bool:
    """A file of the folder itself: a link may lead to anything, and the page is made to be given away."""
    return path.is_file() and not path.is_symlink()


def text(value: object) -> str:
    """Any value as HTML, safe in an attribute too."""
    if isinstance(value, (list, tuple)):
        return ", ".join(map(text, value))
    return "" if value is None else html.escape(str(value))


def embed(save: Callable, name: str) -> str:
    """A picture as data in the page: what a PIL picture's save(), or a figure's savefig(), writes."""
    buffer = io.BytesIO()
    save(buffer, format="png")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{text(name)}" src="data:image/png;base64,{data}">'


def charts(logs: dict[Path, list[dict]]) -> str:
    """A chart for each number in the logs that changes, all runs in it."""
    records = [record for log in logs.values() for record in log]
    names = sorted(set(itertools.chain(*records)))
    parts, constant = [], []
    for name in [name for start in CHARTS for name in names if name.startswith(start)]:
        if len({record.get(name) for record in records} - {None}) < 2:
            constant.append(name)
            continue
        figure, (axis,) = panels(1, 4.2, 2.4)
        for (folder, log), color in zip(logs.items(), itertools.cycle(COLORS)):
            # a run that has just begun has no line yet
            if log:
                draw_curve(axis, log, name, color, str(folder))
        if not parts:
            axis.legend(fontsize=8)
        parts.append(embed(figure.savefig, name))
    return ("<p>Pale: as logged. Solid: smoothed, EMA 0.1. Grey line: a new reward's phase. Dotted: LDAM "
            f"fires. Constant, not drawn: {text(constant) or 'none'}.</p>"
            f"<section class='charts'>{''.join(parts)}</section>")


def config_table(folders: list[Path]) -> str:
    """Every flag of every run; those that differ come first."""
    configs = [read_json(folder / "config.json") for folder in folders]
    names = dict.fromkeys(itertools.chain(*configs))
    rows = [[name, *(config.get(name) for config in configs)] for name in names]
    # false goes before true
    rows.sort(key=lambda row: len(set(map(json.dumps, row[1:]))) == 1)
    lines = ["".join(f"<td>{text(value)}</td>" for value in row) for row in [["flag", *folders], *rows]]
    return f"<div class='scroll'><table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table></div>"
