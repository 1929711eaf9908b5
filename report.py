"""One HTML file about runs and results: `python evaluate.py report runs/stage3 runs/geneval`.

A folder with a metrics.jsonl is a run of train.py; several of them are compared in the same charts. Any other
folder is a result of evaluate.py: its tables (CSV, JSON) and pictures (PNG) are shown. The file holds
everything (pictures as data, charts as SVG), runs no script and fetches nothing; a content policy in it
forbids both. Every text that comes from a file is escaped: a caption cannot become markup.

Left out: what lies in subfolders, and links. Needs Pillow only, neither torch nor matplotlib.
"""
import base64
import csv
import html
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path

from common import knob, read_metrics

COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2")
MAX_PIXELS = 50_000_000         # a picture with more is not opened: a small file can unpack to a huge one
MAX_BYTES = 20_000_000          # a table file with more is not read
POINTS = 400                    # points a line: more are averaged in equal parts
LONG = 12                       # rows above which a table starts folded
ROWS = 300                      # rows of a table that are shown
CHARTS = ("reward/", "heldout/", "loss", "kl", "grad_norm", "ratio_dev", "clip_frac", "zero_std",
          "ldam/gamma_raw", "ldam/r_s", "lr", "time/")                  # in this order, others after them

STYLE = """
*{box-sizing:border-box}
body{margin:0;font:16px/1.5 system-ui,sans-serif;color:#1b1f24;background:#fff;overflow-wrap:anywhere}
main{max-width:1120px;margin:auto;padding:12px}
h1{font-size:1.5em;margin:.4em 0}h2{font-size:1.2em;margin:1.6em 0 .4em;border-bottom:1px solid #d0d7de}
h3{font-size:1em;margin:1.2em 0 .3em}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,320px),1fr));gap:12px}
figure{margin:0 0 12px}figcaption{font-size:.85em;color:#57606a}
svg{display:block;width:100%;height:auto}
svg text{font:11px system-ui,sans-serif;fill:#57606a}svg .title{font-size:12px;font-weight:600;fill:#1b1f24}
.scroll{overflow-x:auto}.wide img{min-width:720px}
img{max-width:100%;height:auto;display:block}.wide img{max-width:none}
table{border-collapse:collapse;font-size:.85em}td,th{padding:3px 8px;border:1px solid #d0d7de;text-align:left;
overflow-wrap:normal}
th{background:#f6f8fa}tr.differs td{background:#fff8c5}
td.number{text-align:right;font-variant-numeric:tabular-nums}
.swatch{display:inline-block;width:.8em;height:.8em;margin-right:.4em;border-radius:2px}
ul.runs{list-style:none;padding:0}summary{cursor:pointer}
"""


@dataclass(frozen=True)
class ReportConfig:
    """Flags of `evaluate.py report`."""
    folders: tuple[str, ...] = knob((), "run folders (compared with each other) and folders of results",
                                    positional="*")
    out: str = knob("report.html", "the file to write")
    smooth: float = knob(0.1, "share of a new value in the smoothed curves (EMA)")
    max_width: int = knob(1600, "pixels; wider pictures are made smaller")

    def __post_init__(self) -> None:
        if not self.folders:
            raise ValueError("expected the folder of a run or of results, such as runs/stage3, got none")
        if not 0 < self.smooth <= 1:
            raise ValueError(f"expected --smooth above 0 and at most 1, got {self.smooth:g}")
        if self.max_width < 64:
            raise ValueError(f"expected --max-width of at least 64, got {self.max_width}")


@dataclass(frozen=True)
class Run:
    """A folder of train.py as the report sees it."""
    name: str
    folder: Path
    color: str
    records: list[dict]
    config: dict

    @property
    def key(self) -> str:
        return "epoch" if any("epoch" in r for r in self.records) else "step"


def report(cfg: ReportConfig) -> dict:
    """One HTML file about runs (compared with each other) and results: curves, pictures, layers, tables.

    Returns {"path": str, "runs": int, "pictures": int, "tables": int, "left_out": [sentences]}.
    Raises FileNotFoundError or ValueError for a folder that is missing or holds nothing to show, and for a
    run log with a damaged line; a damaged picture or table is left out and named, in the report too.
    """
    left_out: list[str] = []
    folders = [Path(name) for name in dict.fromkeys(cfg.folders)]
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"expected the folder of a run or of results, found no folder {folder}")
    logged = [folder for folder in folders if (folder / "metrics.jsonl").is_file()]
    runs = [read_run(folder, COLORS[i % len(COLORS)]) for i, folder in enumerate(logged)]
    results = [result_section(folder, cfg, left_out) for folder in folders if folder not in logged]
    body = [f"<h1>{text('ParaUni: ' + ', '.join(map(str, folders)))}</h1>"]
    if runs:
        body += [overview(runs), "<h2>Curves</h2>", charts(runs, cfg.smooth), "<h2>Pictures</h2>",
                 *(run_pictures(run, cfg, left_out) for run in runs), "<h2>Layers that LDAM perturbed</h2>",
                 *map(layer_map, runs)]
    body += results
    if runs:
        body += ["<h2>Configuration</h2>", config_table(runs)]
    if left_out:
        body += ["<h2>Left out</h2><ul>", *(f"<li>{text(said)}</li>" for said in left_out), "</ul>"]
    page = document("".join(body))
    path = Path(cfg.out)
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"expected --out to name a file in an existing folder, got {path}")
    path.write_text(page, encoding="utf-8")
    counts = {"pictures": page.count("<img "), "tables": page.count("<table>")}
    for said in left_out:
        print(f"left out: {said}")
    print(f"{path}: {len(runs)} run{'s' * (len(runs) != 1)}, {counts['pictures']} pictures, "
          f"{counts['tables']} tables, {len(page) / 1e6:.1f} MB")
    return {"path": str(path), "runs": len(runs), **counts, "left_out": left_out}


def document(body: str) -> str:
    """The page around its body. The policy allows pictures in the file and its own style, nothing else."""
    return ('<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta http-equiv="Content-Security-Policy" '
            "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            '<link rel="icon" href="data:,"><title>ParaUni report</title>'
            f"<style>{STYLE}</style></head><body><main>{body}</main></body></html>\n")


def text(value: object) -> str:
    """Any value as HTML text, safe in an attribute too; numbers with 4 digits."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(text, value))
    return "" if value is None else html.escape(str(value), quote=True)


# ----------------------------------------------------------------------------- runs

def read_run(folder: Path, color: str) -> Run:
    records = [r for r in read_metrics(folder / "metrics.jsonl") if isinstance(r, dict)]
    if not records:
        raise ValueError(f"the run log {folder / 'metrics.jsonl'} is empty: leave this folder out")
    config = {}
    if (folder / "config.json").is_file():
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except ValueError as error:
            path = folder / "config.json"
            raise ValueError(f"{path} is damaged ({error}): restore it, or delete it") from error
    return Run(str(folder), folder, color, records, config)


def overview(runs: list[Run]) -> str:
    lines = []
    for run in runs:
        facts = [f"{name} {run.config[name]}" for name in ("stage", "preset", "seed") if name in run.config]
        last = run.records[-1].get(run.key, len(run.records))
        lines.append(f'<li><span class="swatch" style="background:{run.color}"></span>'
                     f"<b>{text(run.name)}</b> {text(', '.join(facts))}; {run.key} {text(last)}</li>")
    return f'<ul class="runs">{"".join(lines)}</ul>'


def number(value: object) -> float | None:
    """A finite number, else None: the log writes null for NaN."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None


def charts(runs: list[Run], share: float) -> str:
    """A chart for each number in the logs that changes, all runs in it."""
    names = dict.fromkeys(key for run in runs for r in run.records for key, value in r.items()
                          if number(value) is not None)
    names = [name for name in names if name not in ("epoch", "step")]
    rank = {name: next((i for i, start in enumerate(CHARTS) if name.startswith(start)), len(CHARTS))
            for name in names}
    drawn, constant = [], []
    for name in sorted(names, key=rank.__getitem__):
        lines = []
        for run in runs:
            points = [(number(r.get(run.key)), number(r.get(name))) for r in run.records]
            lines.append((run.color, [(x, y) for x, y in points if x is not None and y is not None]))
        if len({y for _, points in lines for _, y in points}) > 1:
            shown = [run for run, (_, points) in zip(runs, lines) if points]
            drawn.append(chart(name, lines, " / ".join(dict.fromkeys(run.key for run in shown)), share,
                               phase_ends(shown[0])))
        else:
            constant.append(name)
    note = (f"<p>Pale: as logged. Solid: smoothed, EMA {share:g}. Dashed: a new reward's phase begins."
            + (f" Constant, not drawn: {text(', '.join(constant))}." if constant else "") + "</p>")
    return note + f'<div class="charts">{"".join(drawn)}</div>'


def phase_ends(run: Run) -> list[float]:
    """Epochs between two phases of stage III."""
    records = [r for r in run.records if "phase" in r and number(r.get("epoch")) is not None]
    return [b["epoch"] - 0.5 for a, b in zip(records, records[1:]) if a["phase"] != b["phase"]]


def smoothed(points: list[tuple[float, float]], share: float) -> list[tuple[float, float]]:
    out, level = [], points[0][1]
    for x, y in points:
        level += share * (y - level)
        out.append((x, level))
    return out


def thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most POINTS points: means of equal parts."""
    size = math.ceil(len(points) / POINTS)
    parts = [points[i:i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def chart(name: str, lines: list[tuple[str, list[tuple[float, float]]]], x_name: str, share: float,
          marks: list[float]) -> str:
    """One SVG: every run's values, pale, and their EMA."""
    left, top, width, height = 56, 24, 276, 140
    xs, ys = ([p[k] for _, points in lines for p in points] for k in (0, 1))
    (x0, x1), (y0, y1) = widened(min(xs), max(xs)), widened(min(ys), max(ys))

    def place(points: list[tuple[float, float]]) -> str:
        return " ".join(f"{left + width * (x - x0) / (x1 - x0):.1f},{top + height * (y1 - y) / (y1 - y0):.1f}"
                        for x, y in points)
    parts = [f'<text class="title" x="{left}" y="14">{text(name)}</text>',
             f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#d0d7de"/>']
    for part, y in ((0.0, y1), (0.5, (y0 + y1) / 2), (1.0, y0)):
        parts.append(f'<text x="{left - 4}" y="{top + height * part + 4:.0f}" '
                     f'text-anchor="end">{y:.3g}</text>')
    under = top + height + 14
    parts += [f'<text x="{left}" y="{under}">{x0:g}</text>',
              f'<text x="{left + width}" y="{under}" text-anchor="end">{text(x_name)} {x1:g}</text>']
    for mark in marks:
        at = left + width * (mark - x0) / (x1 - x0)
        if left < at < left + width:
            parts.append(f'<path d="M{at:.1f} {top}v{height}" stroke="#8c959f" stroke-dasharray="3 3"/>')
    for color, points in lines:
        if not points:
            continue
        dots = len(points) < 8                          # held-out scores are few: show where they are
        for line, opacity in ((points, 0.35), (smoothed(points, 1.0 if dots else share), 1)):
            parts.append(f'<polyline points="{place(thinned(line))}" fill="none" stroke="{color}" '
                         f'stroke-width="1.5" opacity="{opacity}"/>')
        if dots:
            parts += [f'<circle cx="{at.split(",")[0]}" cy="{at.split(",")[1]}" r="2.5" fill="{color}"/>'
                      for at in place(points).split()]
    return (f'<figure><svg viewBox="0 0 340 184" role="img" aria-label="{text(name)}">{"".join(parts)}</svg>'
            "</figure>")


def widened(low: float, high: float) -> tuple[float, float]:
    """An interval that is never empty."""
    return (low, high) if high > low else (low - 0.5, high + 0.5)


# ----------------------------------------------------------------------------- pictures

def picture(path: Path, caption: str, cfg: ReportConfig, left_out: list[str]) -> str:
    """A PNG as a figure with its data in it; "" and a sentence in left_out if it cannot be read whole."""
    from PIL import Image
    try:
        with Image.open(path) as image:
            if image.format != "PNG" or image.width * image.height > MAX_PIXELS:
                left_out.append(f"{path}: expected a PNG of at most {MAX_PIXELS:,} pixels, "
                                f"got {image.format} of {image.width} x {image.height}")
                return ""
            image.load()
            width, height, data = image.width, image.height, path.read_bytes()
            if width > cfg.max_width:
                height = max(1, round(height * cfg.max_width / width))
                width, buffer = cfg.max_width, io.BytesIO()
                image.convert("RGB").resize((width, height)).save(buffer, format="PNG")
                data = buffer.getvalue()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        left_out.append(f"{path}: expected a picture, it cannot be read whole ({error})")
        return ""
    wide = " wide" if width > 720 else ""
    return (f'<figure><div class="scroll{wide}"><img width="{width}" height="{height}" alt="{text(caption)}" '
            f'src="data:image/png;base64,{base64.b64encode(data).decode()}"></div>'
            f"<figcaption>{text(caption)}</figcaption></figure>")


def run_pictures(run: Run, cfg: ReportConfig, left_out: list[str]) -> str:
    """The grids of the same prompts before, during and after training, and both ends side by side."""
    epochs = [path for path in files(run.folder, ".png") if path.name.startswith("epoch-")]
    between = epochs[1:-1]
    chosen = {"before": epochs[:1], "during": between[len(between) // 2:][:1], "after": epochs[1:][-1:]}
    shown = [picture(path, f"{when}: {path.name}", cfg, left_out)
             for when, paths in chosen.items() for path in paths]
    others = [path for path in files(run.folder, ".png") if path not in epochs and path.name != "rewards.png"]
    shown += [picture(path, path.name, cfg, left_out) for path in others]
    return f"<h3>{text(run.name)}</h3>" + ("".join(shown) or "<p>This run has written no pictures.</p>")


def files(folder: Path, suffix: str) -> list[Path]:
    """The regular files of a folder with a suffix, by name. Links may lead anywhere and are left out."""
    return sorted(path for path in folder.iterdir()
                  if path.suffix == suffix and path.is_file() and not path.is_symlink())


# ----------------------------------------------------------------------------- layers

def layer_map(run: Run) -> str:
    """When LDAM fired, on which layers and how hard; where it never did, how far it was from it."""
    records = [r for r in run.records if "ldam/fired" in r]
    title = f"<h3>{text(run.name)}</h3>"
    if not records:
        return f"{title}<p>Not a run of stage 3.</p>"
    if not any("ldam/r_s" in r for r in records):
        return f"{title}<p>LDAM was off.</p>"
    fired = [r for r in records if r["ldam/fired"]]
    norms = [(a["phase"], number(a.get("grad_norm")), b["phase"], number(b.get("grad_norm")))
             for a, b in zip(records, records[1:])]
    jump = max((b / a for p, a, q, b in norms if p == q and a and b is not None), default=0.0)
    declines = max(number(r.get("ldam/r_s")) or 0 for r in records)
    spike, patience = (text(run.config.get(f"ldam_{name}", "?")) for name in ("spike", "patience"))
    needs = (f"largest jump of the gradient norm {jump:.3g} (fires above {spike}), "
             f"most declines of the reward {declines:g} (fires at {patience})")
    if not fired:
        return f"{title}<p>LDAM never fired in {len(records)} epochs: {needs}.</p>"
    count, last = max(max(r["ldam/layers"]) for r in fired), records[-1]["epoch"]
    cell, strongest = 300 / max(1, last), max(r["ldam/gamma"] for r in fired) or 1.0
    parts = [f'<rect x="34" y="6" width="300" height="{12 * count}" fill="none" stroke="#d0d7de"/>']
    for r in fired:
        for i in r["ldam/layers"]:
            shade = 0.3 + 0.7 * r["ldam/gamma"] / strongest
            parts.append(f'<rect x="{34 + cell * (r["epoch"] - 1):.1f}" y="{6 + 12 * (count - i)}" '
                         f'width="{max(2.0, cell):.1f}" height="11" fill="{run.color}" '
                         f'opacity="{shade:.2f}"/>')
    parts += [f'<text x="30" y="{15 + 12 * (count - i)}" text-anchor="end">{i}</text>'
              for i in range(1, count + 1)]
    parts.append(f'<text x="334" y="{22 + 12 * count}" text-anchor="end">epoch {last:g}</text>')
    rows = [{"epoch": r["epoch"], "phase": r["phase"], "gamma": r["ldam/gamma"],
             "layers": ", ".join(map(str, r["ldam/layers"]))} for r in fired]
    return (f'{title}<p>LDAM fired after {len(fired)} of {len(records)} epochs; {needs}.</p><figure>'
            f'<svg viewBox="0 0 340 {28 + 12 * count}" role="img" aria-label="layers perturbed">'
            f'{"".join(parts)}</svg>'
            f"<figcaption>Layers by epoch; darker is a larger gamma.</figcaption></figure>{table(rows)}")


# ----------------------------------------------------------------------------- tables

def table(rows: list[dict], differs: set[int] = frozenset()) -> str:
    """Rows with the same keys as an HTML table; a long one starts folded."""
    if not rows:
        return ""
    head = "".join(f"<th>{text(key)}</th>" for key in rows[0])
    lines = []
    for i, row in enumerate(rows[:ROWS]):
        cells = "".join(f"<td{' class=number' if isinstance(v, (int, float)) else ''}>{text(v)}</td>"
                        for v in row.values())
        lines.append(f"<tr{' class=differs' if i in differs else ''}>{cells}</tr>")
    whole = f'<div class="scroll"><table><tr>{head}</tr>{"".join(lines)}</table></div>'
    if len(rows) <= LONG:
        return whole
    cut = f", the first {ROWS} shown" if len(rows) > ROWS else ""
    return f"<details><summary>{len(rows)} rows{cut}</summary>{whole}</details>"


def config_table(runs: list[Run]) -> str:
    """Every flag of every run; those that differ come first and are marked."""
    names = dict.fromkeys(name for run in runs for name in run.config)
    rows = [{"flag": name, **{run.name: run.config.get(name) for run in runs}} for name in names]
    same = [len({json.dumps(run.config.get(row["flag"])) for run in runs}) == 1 for row in rows]
    rows = ([row for row, equal in zip(rows, same) if not equal]
            + [row for row, equal in zip(rows, same) if equal])
    return table(rows, set(range(same.count(False)))) or "<p>No config.json.</p>"


def result_section(folder: Path, cfg: ReportConfig, left_out: list[str]) -> str:
    """The tables and pictures of a folder that evaluate.py has written."""
    before, parts = len(left_out), []
    for path in files(folder, ".csv"):
        rows = read_table(path, left_out)
        parts.append(f"<h3>{text(path.name)}</h3>{table(rows)}" if rows else "")
    for path in files(folder, ".json"):
        parts.append(json_section(path, {table_.stem for table_ in files(folder, ".csv")}, left_out))
    parts += [picture(path, path.name, cfg, left_out) for path in files(folder, ".png")]
    if not any(parts) and len(left_out) == before:
        raise ValueError(f"expected a run (metrics.jsonl) or results (CSV, JSON, PNG) in {folder}, "
                         "found neither")
    return f"<h2>{text(folder)}</h2>{''.join(parts)}"


def read_file(path: Path, left_out: list[str]) -> str | None:
    if path.stat().st_size > MAX_BYTES:
        left_out.append(f"{path}: larger than {MAX_BYTES:,} bytes")
        return None
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        left_out.append(f"{path}: expected UTF-8 text, byte {error.start} is not")
        return None


def read_table(path: Path, left_out: list[str]) -> list[dict]:
    """A CSV file, its numbers as floats."""
    content = read_file(path, left_out)
    try:
        lines = [] if content is None else list(csv.reader(io.StringIO(content)))
    except csv.Error as error:
        left_out.append(f"{path}: expected a CSV table, cannot read it ({error})")
        return []
    if content is not None and not lines:
        left_out.append(f"{path}: the table is empty")
    return [{name: as_number(cell) for name, cell in zip(lines[0], line)} for line in lines[1:]]


def as_number(cell: str) -> float | str:
    try:
        return float(cell)
    except ValueError:
        return cell


def json_section(path: Path, shown: set[str], left_out: list[str]) -> str:
    """The tables of a JSON file, but for the parts that a CSV file of that name has shown."""
    content = read_file(path, left_out)
    if content is None:
        return ""
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        left_out.append(f"{path}: expected JSON ({type(error).__name__}: {error})")
        return ""
    if isinstance(data, dict):
        data = {name: value for name, value in data.items() if name not in shown}
    parts: list[str] = []
    json_tables(path.name, data, parts)
    return "".join(parts)


def flat(value: object) -> bool:
    return not isinstance(value, (dict, list)) or (isinstance(value, list) and len(value) <= 4
                                                   and not any(isinstance(v, (dict, list)) for v in value))


def json_tables(title: str, data: object, parts: list[str], depth: int = 0) -> None:
    """Tables out of nested JSON: what is flat is one row or one line of it; lists of texts become lists."""
    if depth > 6 or not data or flat(data):
        return
    if isinstance(data, list):
        if all(isinstance(v, dict) for v in data):
            names = dict.fromkeys(name for row in data for name in row)
            data = {str(i): {name: row.get(name) for name in names} for i, row in enumerate(data, 1)}
        elif all(isinstance(v, str) for v in data):
            items = "".join(f"<li>{text(v)}</li>" for v in data[:ROWS])
            parts.append(f"<details><summary>{text(title)}: {len(data)}</summary><ol>{items}</ol></details>")
            return
        else:
            return                                      # a long list of numbers says nothing to a reader
    plain = {name: value for name, value in data.items() if flat(value)}
    if plain:
        rows = [{"name": name, "value": value} for name, value in plain.items()]
        parts.append(f"<h3>{text(title)}</h3>{table(rows)}")
    grouped = {name: value for name, value in data.items()
               if isinstance(value, dict) and value and all(map(flat, value.values()))}
    shared = {name: value for name, value in grouped.items()
              if sum(value.keys() == other.keys() for other in grouped.values()) > 1}
    if shared:
        columns = next(iter(shared.values())).keys()
        rows = [{"": name, **value} for name, value in shared.items() if value.keys() == columns]
        shared = {row[""]: None for row in rows}
        parts.append(f"<h3>{text(title)}</h3>{table(rows)}")
    for name, value in data.items():
        if name not in plain and name not in shared:
            json_tables(f"{title}: {name}", value, parts, depth + 1)
