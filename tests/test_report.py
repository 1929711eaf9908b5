"""evaluation/report.py: what the page shows, and that nothing in it can act."""
import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from common import Refused
from evaluation import report

EVIL = '<script>alert("1")</script> $x^2$ & </table>'


def png(width: int = 40, height: int = 30, color: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), color).save(buffer, format="png")
    return buffer.getvalue()


def make_run(folder: Path, fires: bool = False, **settings: object) -> Path:
    """A stage 3 run of 20 epochs."""
    folder.mkdir(parents=True)
    lines = [{"epoch": 0, "phase": "clip", "heldout/clip": 0.4}]
    for n in range(1, 21):
        lines.append({"epoch": n, "phase": "clip" if n <= 10 else "aesthetic", "reward/clip": 0.01 * n,
                      "kl": 0.001 * n, "grad_norm": 3.0 if n == 5 else 1.0, "ratio_dev": 0.0,
                      "ldam/r_s": min(n, 4), "ldam/fired": int(fires and n == 7), "ldam/gamma": 0.2})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {"preset": "nano", "lr": 1e-4, "rewards": ["clip", "aesthetic"], "ldam_layers": "present",
              "ldam_spike": 100.0, "ldam_patience": 5, **settings}
    (folder / "config.json").write_text(json.dumps(config))
    for n, color in zip((0, 5, 10, 15, 20), ("red", "blue", "green", "pink", "gold")):
        (folder / f"epoch-{n:05}.png").write_bytes(png(color=color))
    return folder


def make(tmp_path: Path, *folders: Path) -> tuple[dict, str]:
    result = report.main([*map(str, folders), "--out", str(tmp_path / "r.html")])
    return result, (tmp_path / "r.html").read_text(encoding="utf-8")


class Elements(HTMLParser):
    """Every start tag with its attributes, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.words = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data + " "


def test_runs_are_shown_with_curves_pictures_layers_and_flags(tmp_path: Path) -> None:
    _, page = make(tmp_path, make_run(tmp_path / "quiet"), make_run(tmp_path / "fires", fires=True, lr=3e-4))
    found = Elements(page)
    names = [attributes["alt"] for tag, attributes in found.tags if tag == "img"]
    assert names[:4] == ["reward/clip", "kl", "grad_norm", "ldam/r_s"]
    assert names[4:] == ["epoch-00000.png", "epoch-00020.png"] * 2
    assert "Constant, not drawn: heldout/clip, ratio_dev." in found.words
    # what differs between the runs comes first
    assert re.findall(r"<tr><td>(\w+)</td>", page[page.index("Configuration"):])[0] == "lr"


def test_results_are_shown_as_tables_and_pictures(tmp_path: Path) -> None:
    folder = tmp_path / "geneval"
    folder.mkdir()
    tasks = [{"task": "counting", "right": 0.25, "n": 4}, {"task": "colors", "right": 1 / 3, "n": 3}]
    content = {"name": "a part", "tasks": tasks, "claims": [{"claim": "once"}]}
    (folder / "geneval.json").write_text(json.dumps(content))
    (folder / "claims.csv").write_text("claim,verdict\nit helps,undecided\n")
    (folder / "figure2.png").write_bytes(png(2000, 100, "blue"))
    _, page = make(tmp_path, folder)
    assert "<td>counting</td><td>0.25</td><td>4</td>" in page and "<td>0.3333</td>" in page
    assert "<td>it helps</td><td>undecided</td>" in page and "once" not in page
    (data,) = re.findall('src="data:image/png;base64,([^"]+)"', page)
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    assert picture.size == (1600, 80) and picture.getpixel((800, 40)) == (0, 0, 255)


def test_nothing_in_the_page_can_act_or_be_fetched(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", prompts=EVIL, **{EVIL: EVIL})
    with open(run / "metrics.jsonl", "a") as file:
        for n in (21, 22):
            file.write(json.dumps({"epoch": n, "phase": EVIL, f"reward/{EVIL}": n}) + "\n")
    (run / "<b onclick=x>.png").write_bytes(png())
    _, page = make(tmp_path, run)
    found = Elements(page)
    assert not {"script", "iframe", "object", "b", "link rel=stylesheet"} & {tag for tag, _ in found.tags}
    assert found.words.count('<script>alert("1")') >= 3                                 # there, and harmless
    for _, attributes in found.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert all(attributes.get(name, "data:").startswith("data:") for name in ("src", "href"))
    policy = next(a["content"] for _, a in found.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "script" not in policy
    assert "@import" not in page and "url(" not in page


def test_a_file_that_cannot_be_read_is_left_out_and_named(tmp_path: Path) -> None:
    run, folder = make_run(tmp_path / "run"), tmp_path / "results"
    folder.mkdir()
    (run / "epoch-00020.png").write_bytes(png(200, 200)[:120])
    (run / "link.png").symlink_to(run / "epoch-00000.png")
    (folder / "bad.json").write_text('{"a": ')
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "bad.csv").write_bytes(b"a,b\n\xff\xfe,1\n")
    (folder / "ok.csv").write_text("a,b\n1,2\n")
    result, page = make(tmp_path, run, folder)
    named = {Path(reason.split(":")[0]).name for reason in result["left_out"]}
    assert named == {"epoch-00020.png", "bad.json", "deep.json", "bad.csv"}
    assert all(name in Elements(page).words for name in named)
    assert "<td>1</td><td>2</td>" in page and "link.png" not in page


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="nowhere"):
        make(tmp_path, tmp_path / "nowhere")
