"""One HTML file about runs and what measured them: `python evaluate.py report runs/stage3 runs/geneval`.

The curves of all runs in the same charts, then the tables and pictures of each folder, then the runs' flags.
The file holds everything, pictures as data; it runs no script and fetches nothing, and texts are escaped.
"""
import base64
import html
import io
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path

from common import Refused, atomic, knob, parse_config, read_log
from evaluation import read_json, table
from pictures import draw_curves, panels

# the numbers in a log that are drawn, in this order
CHARTS = ("reward/", "heldout/", "loss", "kl", "grad_norm", "ratio_dev", "clip_frac", "zero_std",
          "ldam/gamma_raw", "ldam/r_s", "lr", "skipped", "time/")
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>ParaUni report</title><style>
body { margin: auto; max-width: 1300px; padding: 12px; font-family: sans-serif }
img { max-width: 100%%; display: block; margin-bottom: 12px } pre { overflow-x: auto }
</style></head><body>
<p>Pale: as logged. Solid: smoothed, EMA 0.1. Grey: a new phase. Dotted: LDAM fires.</p>
%s</body></html>
"""


@dataclass(frozen=True)
class ReportConfig:
    folders: tuple[str, ...] = knob((), "folders of runs, and of what measured them", words=True)
    out: str = knob("report.html", "the file to write")


def main(argv: list[str] | None = None) -> dict:
    """Write the report. Returns its "path"."""
    cfg = parse_config(ReportConfig, argv, description=__doc__.split("\n")[0])
    folders = [Path(folder) for folder in cfg.folders]
    if not folders or not all(folder.is_dir() for folder in folders):
        raise Refused(f"expected folders, such as runs/stage3, got {' '.join(cfg.folders) or 'none'}")
    runs = [folder for folder in folders
            if is_own(folder / "metrics.jsonl") and is_own(folder / "config.json")]
    logs = {str(folder): read_log(folder / "metrics.jsonl") for folder in runs}
    parts = [embed("curves", charts(logs))] if logs else []
    for folder in folders:
        parts.append(f"<h2>{html.escape(str(folder))}</h2>")
        for path in filter(is_own, sorted(folder.glob("*.json"))):
            found = read_json(path)
            lists = found.values() if isinstance(found, dict) else []
            parts += [preformatted(rows) for rows in lists
                      if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows)]
        for path in filter(is_own, sorted(folder.glob("*.png"))):
            parts.append(embed(path.name, path.read_bytes()))
    if logs:
        parts += ["<h2>Flags</h2>", preformatted(flags(runs))]
    with atomic(cfg.out) as temporary:
        # a file's name need not be text
        temporary.write_text(PAGE % "\n".join(parts), encoding="utf-8", errors="replace")
    print(f"written to {cfg.out}")
    return {"path": cfg.out}


def is_own(path: Path) -> bool:
    """A file of the folder itself: a link may lead to anything, and the page is made to be given away."""
    return path.is_file() and not path.is_symlink()


def embed(name: str, png: bytes) -> str:
    """A picture as data in the page."""
    return f'<img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def preformatted(rows: list[dict]) -> str:
    return f"<pre>{html.escape(table(rows))}</pre>"


def charts(logs: dict[str, list[dict]]) -> bytes:
    """A chart for each number in the logs that changes, all runs in it."""
    records = list(itertools.chain(*logs.values()))
    known = sorted(set().union(*records))
    names = [name for start in CHARTS for name in known
             if name.startswith(start) and len({record.get(name) for record in records} - {None}) > 1]
    figure, axes = panels(3, 4.2, 2.6, rows=max(1, math.ceil(len(names) / 3)))
    draw_curves(axes, logs, names)
    for axis in axes[len(names):]:
        axis.axis("off")
    buffer = io.BytesIO()
    figure.savefig(buffer)
    return buffer.getvalue()


def flags(folders: list[Path]) -> list[dict]:
    """Every flag of every run; those that differ come first."""
    configs = [read_json(folder / "config.json") for folder in folders]
    rows = [[name, *(json.dumps(config.get(name)) for config in configs)]
            for name in dict.fromkeys(itertools.chain(*configs))]
    # false goes before true
    rows.sort(key=lambda row: len(set(row[1:])) == 1)
    return [dict(zip(["flag", *map(str, folders)], row)) for row in rows]
