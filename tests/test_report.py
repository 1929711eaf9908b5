"""evaluation/report.py: what the page shows, and that nothing in it can act."""
import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from common import Refused
from evaluation import report

EVIL = '<script>alert("1")</script> $x^2$ & </table>'


def make_run(folder: Path, fires: bool = False, **settings: object) -> Path:
    """A stage 3 run of 20 epochs."""
    folder.mkdir(parents=True)
    lines = [{"epoch": 0, "phase": "clip", "heldout/clip": 0.4}]
    for n in range(1, 21):
        lines.append({"epoch": n, "phase": "clip" if n <= 10 else "aesthetic", "reward/clip": 0.01 * n,
                      "kl": 0.001 * n, "grad_norm": 3.0 if n == 5 else 1.0, "ratio_dev": 0.0,
                      "ldam/r_s": min(n, 4), "ldam/fired": int(fires and n == 7), "ldam/gamma": 0.2})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {"preset": "nano", "lr": 1e-4, "rewards": ["clip", "aesthetic"], **settings}
    (folder / "config.json").write_text(json.dumps(config))
    Image.new("RGB", (40, 30)).save(folder / "before_after.png")
    return folder


def make(tmp_path: Path, *folders: Path) -> str:
    (make_run(tmp_path / "new") / "metrics.jsonl").write_text("")                       # has just begun
    report.main([*map(str, folders), str(tmp_path / "new"), "--out", str(tmp_path / "r.html")])
    return (tmp_path / "r.html").read_text(encoding="utf-8")


def tags_of(page: str) -> list[tuple[str, dict]]:
    """Every start tag with its attributes."""
    tags: list[tuple[str, dict]] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: tags.append((tag, dict(attributes)))
    parser.feed(page)
    return tags


def test_runs_are_shown_with_curves_pictures_tables_and_flags(tmp_path: Path) -> None:
    measured = tmp_path / "geneval"
    measured.mkdir()
    (measured / "a.json").write_text(json.dumps({"tasks": [{"task": "colors", "right": 0.25}], "n": [{}, 1]}))
    runs = make_run(tmp_path / "quiet"), make_run(tmp_path / "fires", fires=True, lr=3e-4)
    page = make(tmp_path, *runs, measured)
    names = [attributes["alt"] for tag, attributes in tags_of(page) if tag == "img"]
    assert names == ["curves", *["before_after.png"] * 3] and "| colors | 0.2500 |" in page
    # what differs between the runs comes first
    assert re.findall(r"^\| (\w+) ", page[page.index("<h2>Flags"):], re.M)[:2] == ["lr", "preset"]
    with pytest.raises(Refused, match="expected folders"):
        report.main([str(tmp_path / "nothing")])


def test_nothing_in_the_page_can_act_or_be_fetched(tmp_path: Path) -> None:
    run = make_run(tmp_path / "$\\frac$", prompts=EVIL, **{EVIL: EVIL})
    with open(run / "metrics.jsonl", "a") as file:
        for n in (21, 22):
            file.write(json.dumps({"epoch": n, "phase": EVIL, f"reward/{EVIL}": n}) + "\n")
    Image.new("RGB", (40, 30)).save(run / "<b onclick=x>\udcff.png")
    (run / "link.png").symlink_to(run / "before_after.png")
    page = make(tmp_path, run)
    tags = tags_of(page)
    assert not {"script", "iframe", "object", "b", "link"} & {tag for tag, _ in tags}
    # there, and harmless
    assert html.escape(json.dumps(EVIL)) in page
    for _, attributes in tags:
        assert not any(name.startswith("on") for name in attributes)
        assert all(attributes.get(name, "data:").startswith("data:") for name in ("src", "href"))
    assert "@import" not in page and "url(" not in page and "link.png" not in page
