"""report.py: what is in the page, that nothing in it can act, and how a real browser draws it."""
import base64
import io
import json
import os
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

import report
from report import ReportConfig

EVIL = '<script>alert("x")</script><img src=http://evil.example/a.png onerror=alert(1)>&\'"'


def png(width: int = 40, height: int = 30, color: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), color).save(buffer, format="PNG")
    return buffer.getvalue()


def make_run(folder: Path, epochs: int = 20, fires: bool = False, **config: object) -> Path:
    """A finished stage 3 run of two phases, as train.py leaves it."""
    folder.mkdir(parents=True)
    lines = [{"epoch": 0, "phase": "aesthetic", "heldout/clip": 0.4}]
    for n in range(1, epochs + 1):
        fired = int(fires and n == 4)
        lines.append({"epoch": n, "phase": "aesthetic" if n <= epochs // 2 else "clip", "reward/clip": n / 10,
                      "kl": None if n == 3 else 0.01 * n, "grad_norm": 3.0 if n == 4 else 1.0,
                      "ratio_dev": 0.0, "ldam/fired": fired, "ldam/gamma": 0.5 * fired,
                      "ldam/r_s": min(n, 4), **({"ldam/layers": [4, 5, 6]} if fired else {})})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {"stage": 3, "preset": "nano", "seed": 0, "ldam_spike": 100.0, "ldam_patience": 5, **config}
    (folder / "config.json").write_text(json.dumps(settings))
    for n, color in zip((0, 5, 10, 15, 20), ("red", "blue", "green", "pink", "gold")):
        (folder / f"epoch-{n:05}.png").write_bytes(png(color=color))
    (folder / "before_after.png").write_bytes(png(1000, 40))
    return folder


def make(tmp_path: Path, *folders: Path, **flags: object) -> tuple[dict, str]:
    out = tmp_path / "r.html"
    result = report.report(ReportConfig(folders=tuple(map(str, folders)), out=str(out), **flags))
    return result, out.read_text(encoding="utf-8")


class Elements(HTMLParser):
    """Every start tag with its attributes, and the text outside of style."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.words, self.open = "", ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open = tag

    def handle_data(self, data: str) -> None:
        if self.open != "style":
            self.words += data + " "


# ----------------------------------------------------------------------------- content

def test_a_run_has_curves_grids_layers_and_configuration(tmp_path: Path) -> None:
    result, page = make(tmp_path, make_run(tmp_path / "run"))
    assert result["runs"] == 1 and result["left_out"] == []
    for name in ("reward/clip", "kl", "grad_norm", "ldam/r_s"):
        assert f'aria-label="{name}"' in page
    assert "Constant, not drawn:" in page and "ratio_dev" in page
    shown = re.findall(r"<figcaption>(\w+): (epoch-\d+\.png)</figcaption>", page)
    assert shown == [("before", "epoch-00000.png"), ("during", "epoch-00010.png"),
                     ("after", "epoch-00020.png")]
    assert result["pictures"] == 4 and "<figcaption>before_after.png</figcaption>" in page
    assert base64.b64encode((tmp_path / "run" / "epoch-00010.png").read_bytes()).decode() in page
    assert "<td>ldam_spike</td>" in page


def test_curves_are_the_values_and_their_ema(tmp_path: Path) -> None:
    svg = report.chart("x", [("#123456", [(float(n), float(n % 3)) for n in range(1, 11)])], "epoch", 0.5, [])
    raw, smooth = ([[float(v) for v in p.split(",")] for p in line.split()]
                   for line in re.findall(r'points="([^"]+)"', svg))
    level, expected = 1.0, []
    for n in range(1, 11):
        level = 0.5 * level + 0.5 * (n % 3)
        expected.append(level)
    assert [(24 + 140 - y) / 70 for _, y in raw] == pytest.approx([n % 3 for n in range(1, 11)], abs=1e-2)
    assert [(24 + 140 - y) / 70 for _, y in smooth] == pytest.approx(expected, abs=1e-2)
    assert raw[0][0] == 56 and raw[-1][0] == 56 + 276


def test_long_curves_are_averaged_not_cut() -> None:
    points = [(float(n), float(n % 2)) for n in range(10_000)]
    thin = report.thinned(points)
    assert len(thin) <= report.POINTS and thin[0] == (12.0, 0.48) and thin[-1][0] > 9980


def test_runs_are_compared_and_what_differs_comes_first(tmp_path: Path) -> None:
    runs = make_run(tmp_path / "a", lr=1e-4), make_run(tmp_path / "b", lr=3e-4)
    result, page = make(tmp_path, *runs)
    assert result["runs"] == 2
    chart = page[page.index('aria-label="reward/clip"'):]
    chart = chart[:chart.index("</svg>")]
    assert all(chart.count(color) == 2 for color in report.COLORS[:2])          # raw and smoothed, for each
    rows = re.findall(r"<tr( class=differs)?><td>(\w+)</td>", page[page.index("<h2>Configuration"):])
    assert rows[0] == (" class=differs", "lr") and not any(mark for mark, _ in rows[1:])


def test_layer_map_says_when_and_where_ldam_fired_and_how_far_it_was(tmp_path: Path) -> None:
    _, page = make(tmp_path, make_run(tmp_path / "quiet"), make_run(tmp_path / "fires", fires=True))
    words = Elements(page).words
    needs = ("largest jump of the gradient norm 3 (fires above 100), "
             "most declines of the reward 4 (fires at 5)")
    assert f"LDAM never fired in 20 epochs: {needs}." in words
    assert f"LDAM fired after 1 of 20 epochs; {needs}." in words
    drawn = page[page.index('aria-label="layers perturbed"'):]
    assert drawn[:drawn.index("</svg>")].count(f'fill="{report.COLORS[1]}"') == 3


def test_results_are_shown_as_tables_and_pictures(tmp_path: Path) -> None:
    folder = tmp_path / "geneval"
    folder.mkdir()
    tasks = {"counting": {"right": 0.25, "n": 4}, "colors": {"right": 1 / 3, "n": 3}}
    content = {"name": "a part", "tasks": tasks, "prompts": [EVIL] * 6, "claims": [{"claim": "once"}]}
    (folder / "geneval.json").write_text(json.dumps(content))
    (folder / "claims.csv").write_text(f'claim,verdict\n"{EVIL.replace(chr(34), "")}",undecided\n')
    (folder / "figure2.png").write_bytes(png())
    result, page = make(tmp_path, folder)
    assert result["pictures"] == 1 and result["runs"] == 0
    assert "<td>counting</td><td class=number>0.25</td><td class=number>4</td>" in page
    assert "<td class=number>0.3333</td>" in page and "<td>undecided</td>" in page and "once" not in page
    assert Elements(page).words.count("alert(") >= 7


def test_stages_1_and_2_are_drawn_by_step(tmp_path: Path) -> None:
    run = tmp_path / "s1"
    run.mkdir()
    lines = [json.dumps({"step": n, "loss": 1 / n}) + "\n" for n in range(1, 30)]
    (run / "metrics.jsonl").write_text("".join(lines))
    _, page = make(tmp_path, run)
    assert 'aria-label="loss"' in page and ">step 29<" in page and "Not a run of stage 3." in page


# ----------------------------------------------------------------------------- nothing in it can act

def test_texts_of_files_stay_texts(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", prompts=EVIL, **{EVIL: EVIL})
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"epoch": 21, "phase": EVIL, f"reward/{EVIL}": 1.0}) + "\n")
        file.write(json.dumps({"epoch": 22, "phase": EVIL, f"reward/{EVIL}": 2.0}) + "\n")
    (run / "<b onclick=x>.png").write_bytes(png())
    _, page = make(tmp_path, run)
    found = Elements(page)
    assert not {"script", "iframe", "object", "b onclick=x"} & {tag for tag, _ in found.tags}
    assert found.words.count("<script>") >= 3                                   # there, and harmless
    for _, attributes in found.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:")
    policy = next(a["content"] for t, a in found.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "script" not in policy
    assert "@import" not in page and "url(" not in page


def test_damaged_files_are_left_out_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "MAX_PIXELS", 50_000)
    run = make_run(tmp_path / "run")
    (run / "epoch-00010.png").write_bytes(png(200, 200)[:120])
    (run / "note.png").write_text("no picture")
    (run / "bomb.png").write_bytes(png(300, 300))
    (run / "link.png").symlink_to(run / "epoch-00000.png")
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "bad.json").write_text('{"a": ')
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "bad.csv").write_bytes(b"a,b\n\xff\xfe,1\n")
    (folder / "empty.csv").write_text("")
    (folder / "ok.csv").write_text("a,b\n1,2\n")
    result, page = make(tmp_path, run, folder)
    named = [Path(said.split(":")[0]).name for said in result["left_out"]]
    assert set(named) == {"epoch-00010.png", "note.png", "bomb.png", "bad.json", "deep.json", "bad.csv",
                          "empty.csv"}
    assert "<h2>Left out</h2>" in page and result["pictures"] == 3 and "link.png" not in page
    words = Elements(page).words
    assert all(said.split(":")[0] in words for said in result["left_out"])


@pytest.mark.parametrize("spoil, said", [
    (lambda run: shutil.rmtree(run), "found no folder"),
    (lambda run: (run / "metrics.jsonl").write_text(""), "is empty"),
    (lambda run: (run / "metrics.jsonl").write_text('{"epoch": 1}\n{"epo\n{"epoch": 2}\n'), "line 2 of"),
    (lambda run: (run / "config.json").write_text("{"), "config.json is damaged"),
    (lambda run: [path.unlink() for path in run.iterdir()], "found neither")])
def test_a_folder_that_cannot_be_shown_is_one_sentence(tmp_path: Path, spoil, said: str) -> None:
    run = make_run(tmp_path / "run")
    spoil(run)
    with pytest.raises((ValueError, FileNotFoundError), match=said) as error:
        make(tmp_path, run)
    assert str(run) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("flags, said", [({"folders": ()}, "expected the folder"),
                                         ({"smooth": 0.0}, "--smooth"), ({"max_width": 3}, "--max-width"),
                                         ({"out": "no/such/r.html"}, "--out")])
def test_bad_flags_are_refused(tmp_path: Path, flags: dict, said: str) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(ValueError, match=said):
        report.report(ReportConfig(**{"folders": (str(run),), **flags}))


# ----------------------------------------------------------------------------- time, and a browser

def big_report(tmp_path: Path) -> Path:
    """As much as a long comparison holds: two runs of 6,000 epochs and wide grids."""
    for name in ("one", "two"):
        run = make_run(tmp_path / ("a-very-long-name-without-any-break" * 3) / name, 6000, fires=True)
        for n in (0, 10, 20):
            (run / f"epoch-{n:05}.png").write_bytes(png(2400, 1300))
    folder = tmp_path / "results"
    folder.mkdir()
    wide = ["x" * 60 + str(k) for k in range(20)]
    (folder / "wide.csv").write_text("\n".join([",".join(wide)] + [",".join(["0.123456789"] * 20)] * 8))
    make(tmp_path, *sorted(tmp_path.glob("a-very*/*")), folder)
    return tmp_path / "r.html"


def test_a_long_comparison_takes_less_than_10_seconds(tmp_path: Path) -> None:
    began = time.process_time()
    path = big_report(tmp_path)
    assert time.process_time() - began < 10
    assert path.stat().st_size < 5e6


class Chromium:
    """A headless browser spoken to over two pipes (its DevTools protocol): no port, no other package."""

    def __init__(self, program: str, profile: Path) -> None:
        # The browser reads its commands from descriptor 3 and answers on 4; a zero byte ends each message.
        read, self.out = os.pipe()
        self.back, write = os.pipe()
        command = (f'exec "{program}" --headless --no-sandbox --disable-gpu --no-first-run '
                   f'--remote-debugging-pipe --disable-dev-shm-usage --user-data-dir="{profile}" '
                   f"3<&{read} 4>&{write}")
        self.process = subprocess.Popen(["bash", "-c", command], pass_fds=(read, write),
                                        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL)
        os.close(read)
        os.close(write)
        self.number, self.buffer, self.events = 0, b"", []

    def ask(self, method: str, session: str = "", **params: object) -> dict:
        """Send a command and wait for its answer; what happens meanwhile goes to `events`."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def receive(self) -> dict:
        while b"\0" not in self.buffer:
            more = os.read(self.back, 65536)
            assert more, "the browser has closed its pipe"
            self.buffer += more
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def look(self, url: str, width: int, script: str) -> object:
        """Open a page in a window of that width, wait until it is loaded, and return what the script says."""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable", session)
        self.ask("Emulation.setDeviceMetricsOverride", session, width=width, height=844, deviceScaleFactor=2,
                 mobile=True)
        self.ask("Page.navigate", session, url=url)
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.receive())
        return self.ask("Runtime.evaluate", session, expression=script, returnByValue=True,
                        awaitPromise=True)["result"]["value"]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.out)
        os.close(self.back)


BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
                if (path := shutil.which(name))), None)
LOOK = """(async () => {
  document.querySelectorAll('details').forEach(d => d.open = true);
  const images = [...document.images];
  await Promise.all(images.map(i => i.decode()));
  return {images: images.length, drawn: images.filter(i => i.naturalWidth > 0 && i.offsetWidth > 0).length,
          inner: window.innerWidth, page: document.documentElement.scrollWidth,
          charts: [...document.querySelectorAll('svg')].filter(
            s => s.getBoundingClientRect().width > 250).length,
          small: [...document.querySelectorAll('p,td,li,figcaption')].filter(
            e => parseFloat(getComputedStyle(e).fontSize) < 11).length};
})()"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on this machine to draw the page with")
def test_a_browser_draws_it_on_a_phone_without_an_error(tmp_path: Path) -> None:
    path = big_report(tmp_path)
    browser = Chromium(BROWSER, tmp_path / "profile")
    try:
        seen = browser.look(path.as_uri(), 390, LOOK)
    finally:
        browser.close()
    page = path.read_text()
    assert seen["images"] == seen["drawn"] == page.count("<img ") == 8
    assert seen["inner"] == 390 and seen["page"] <= 390
    assert seen["charts"] == page.count("<svg ") > 5 and seen["small"] == 0
    methods = [event.get("method") for event in browser.events]
    assert not {"Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"} & set(methods)
    asked = [event["params"]["request"]["url"] for event in browser.events
             if event.get("method") == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]     # and nothing else
