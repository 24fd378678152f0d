"""`circuitroute report`: the page of a run's log, opened in a browser where there is one, and what it refuses."""

from __future__ import annotations

import base64
import json
import math
import os
import re
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'circuitroute[plot]'")

import circuitroute as cr
from circuitroute.cli.main import main
from circuitroute.cli.report.figures import RC
from circuitroute.cli.report.page import MARK
from circuitroute.cli.report.series import MOST_POINTS, curves_of, quantities_of
from circuitroute.routing.runs import RunRecord, Step, read_run
from tests.browser import CHROMIUM, FLAGS


class Page(HTMLParser):
    """What a page holds. `pictures`: by the heading above them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.headings: list[str] = []
        self.pictures: dict[str, list[bytes]] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "img":
            kind, _, data = dict(attrs)["src"].partition(",")
            assert kind == "data:image/svg+xml;base64"
            self.pictures.setdefault(self.headings[-1], []).append(base64.b64decode(data))

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())
        if self.tags and self.tags[-1][0] == "h2" and data.strip():
            self.headings.append(data.strip())


def write_log(path: Path, layers: int = 3, steps: int = 8, run: str = "OLMoE <b>& co</b>", loss: bool = True) -> Path:
    circuit = cr.compile(cr.Between(1, 4), 8)
    log = cr.metrics.RunLog(path, run)
    for step in range(steps):
        logits = torch.randn(layers, 32, 8, generator=torch.Generator().manual_seed(step)) * (1 + step)
        routings = [cr.route(each, circuit, key=cr.random_key(step, torch.arange(32))) for each in logits]
        found = cr.metrics.summary(routings, budget=4 * layers)
        log.append(10 * step, found, loss=3 / (1 + step) if loss else None)
    return path


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_log(tmp_path_factory.mktemp("log") / "run.jsonl")


@pytest.fixture(scope="module")
def page(log: Path) -> Path:
    assert main(["report", str(log)]) == 0
    return log.with_suffix(".html")


@pytest.fixture
def short(tmp_path: Path) -> Path:
    """A log of the loss alone, in a folder of its own."""
    path = tmp_path / "short" / "run.jsonl"
    path.parent.mkdir()
    path.write_text('{"step": 0, "loss": 1}\n{"step": 9, "loss": 0.5}\n')
    return path


# ---------------------------------------------------------------------------------------------- the page


def test_a_page_has_a_picture_of_every_quantity(page: Path) -> None:
    found = Page(page.read_text(encoding="utf-8"))
    both = [
        "Load entropy",
        "Max violation",
        "Experts per token",
        "Budget use",
        "Entropy of the decision",
        "Distance of decisions from the mode",
        "Agreement with the mode",
        "Sum of the marginals",
        "Dead experts",
    ]
    assert {title: len(pictures) for title, pictures in found.pictures.items()} == {
        "Loss": 1,
        "Experts per token, all layers": 1,
        **dict.fromkeys(both, 2),
    }
    for pictures in found.pictures.values():
        for picture in pictures:
            assert ElementTree.fromstring(picture).tag.endswith("svg")
    assert "OLMoE <b>& co</b>" in found.texts  # as text, not as tags
    assert not any(tag == "b" for tag, _ in found.tags)
    assert all(attributes.get("alt") for tag, attributes in found.tags if tag == "img")


def test_a_page_needs_nothing_else(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert text.startswith(MARK)
    found = Page(text)
    assert not {"script", "link", "iframe", "object", "base", "a"} & {tag for tag, _ in found.tags}
    assert not re.search(r"url\(|@import", text)
    assert {attributes["src"][:26] for tag, attributes in found.tags if "src" in attributes} == {  # type: ignore[index]
        "data:image/svg+xml;base64,"
    }


def test_the_table_has_the_last_step_in_numbers(page: Path, log: Path) -> None:
    last = read_run(log).steps[-1]
    rows = re.findall(r"<tr>(.*?)</tr>", page.read_text(encoding="utf-8"), re.DOTALL)
    cells = [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in rows]
    assert [row[0] for row in cells] == ["layer", "all", "layer0", "layer1", "layer2"]
    for title, name in (("Load entropy", "load_entropy"), ("Budget use", "budget_use")):
        column = cells[0].index(title)
        for row in cells[1:]:
            assert row[column] == f"{last.values[row[0], name]:.4g}"


def test_the_same_log_makes_the_same_page(short: Path) -> None:
    made = []
    for _ in range(2):
        assert main(["report", str(short)]) == 0
        made.append(short.with_suffix(".html").read_bytes())
    assert made[0] == made[1]


def test_the_command_says_where_the_page_is(short: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(short)]) == 0
    said = capsys.readouterr()
    assert said.out == f"{short.with_suffix('.html')}: 2 logged steps, from 0 to 9\n"
    assert said.err == ""


@pytest.mark.parametrize(
    "rows",
    [
        [{"step": 3, "loss": 1.0}],
        [{"step": 0, "all/load_entropy": 0.5}],
        [{"step": 0, "layer0/load_entropy": 0.5}, {"step": 5, "layer1/max_violation": 2.0}],
        [
            {"step": 0, "loss": math.nan, "all/load_entropy": None},
            {"step": 1, "loss": 1e300, "all/load_entropy": 1e-300},
        ],
        [{"step": 10**12 + i, "layer0/own_number": -(i**3), "layer1/own_number": 7} for i in range(5)],
        [{"step": i, **{f"layer{j}/load_entropy": j / 200 for j in range(200)}} for i in range(2)],
    ],
    ids=["loss alone", "one step", "gaps", "extremes", "other quantities", "many layers"],
)
def test_pages_of_little_and_of_much(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    assert main(["report", str(path)]) == 0
    found = Page(path.with_suffix(".html").read_text(encoding="utf-8"))
    drawn = {key.rpartition("/")[2] for row in rows for key, value in row.items() if value is not None} - {"step"}
    assert len(found.pictures) == len(drawn)


# ---------------------------------------------------------------------------------------------- what is drawn


def record_of(columns: dict[str, list[float | None]]) -> RunRecord:
    count = len(next(iter(columns.values())))
    steps = []
    for i in range(count):
        values = {tuple(k.rsplit("/", 1)): v[i] for k, v in columns.items() if v[i] is not None}
        steps.append(Step(i, None, values))  # type: ignore[arg-type]
    return RunRecord("", tuple(steps))


def test_over_all_is_as_logged_else_the_mean() -> None:
    record = record_of(
        {"a/load_entropy": [1.0, 2.0, 3.0], "b/load_entropy": [3.0, None, 4.0], "all/load_entropy": [None, None, 9.0]}
    )
    (quantity,) = quantities_of(record)
    curves = curves_of(record, quantity)
    assert curves.layers == ("a", "b")
    assert curves.over_all.tolist() == [2.0, 2.0, 9.0]
    assert curves.each[0].tolist() == [1.0, 2.0, 3.0]
    assert np.isnan(curves.each[1]).tolist() == [False, True, False]


def test_long_runs_are_averaged_to_the_width_of_a_picture() -> None:
    record = record_of({"all/load_entropy": [float(i) for i in range(3 * MOST_POINTS)]})
    curves = curves_of(record, quantities_of(record)[0])
    assert curves.steps.tolist() == curves.over_all.tolist() == [3.0 * i + 1 for i in range(MOST_POINTS)]


def test_the_spread_is_that_of_the_tokens() -> None:
    record = record_of({"all/experts_per_token": [2.0], "all/experts_per_token_std": [0.5]})
    (quantity,) = quantities_of(record)
    assert curves_of(record, quantity).spread.tolist() == [0.5]
    record = record_of({"all/experts_per_token": [2.0]})
    assert curves_of(record, quantity).spread is None


def test_invalid_tokens_are_shown_where_there_are_some() -> None:
    assert quantities_of(record_of({"all/invalid_tokens": [0.0, 0.0]})) == []
    assert [q.name for q in quantities_of(record_of({"all/invalid_tokens": [0.0, 0.1]}))] == ["invalid_tokens"]


# ---------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"holds no steps"),
        ('{"step": 0, "loss": 1}\nbroken\n{"step": 1}\n', r"line 2: it is not JSON"),
        ('{"loss": 1}\n', r"line 1: its step is None"),
        ('{"step": 0, "all/load_entropy": "high"}\n', r"line 1: its all/load_entropy is 'high': expected a number"),
        ("step,loss\n0,1\n", r"line 1: it is not JSON"),
        ('{"step": 0}\n{"step": 1, "loss": null, "foo": 1}\n', r"has steps and no numbers: expected keys such as"),
        (b"\x89PNG\r\n\x1a\n\xff", r"it is not text"),
        (json.dumps([{"step": 0}]), r"line 1: it is a JSON list"),
        ('{"circuitroute": "run", "version": 9, "run": ""}\n', r"version 9, and this circuitroute reads 1"),
    ],
)
def test_bad_logs(content: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["report", str(path)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert said.err.startswith("circuitroute report: error: ")
    assert re.search(message, said.err)
    assert list(tmp_path.iterdir()) == [path], "a refused log leaves nothing behind"


def test_a_half_written_last_line_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text('{"step": 0, "loss": 1}\n{"step": 1, "lo')
    assert main(["report", str(path)]) == 0
    said = capsys.readouterr()
    note = "line 2, the last one, is half written and was left out"
    assert said.err == f"circuitroute report: {note}\n"
    assert note in path.with_suffix(".html").read_text(encoding="utf-8")


def test_what_is_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for given, message in (
        (tmp_path / "none.jsonl", "there is no file"),
        (tmp_path, "is a folder: give the log in it"),
        ("", "expected the path of a file"),
    ):
        assert main(["report", str(given)]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
    assert main(["report"]) == 2
    assert "RUN.jsonl" in capsys.readouterr().err


def test_what_is_no_report_is_not_replaced(short: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine.html"
    mine.write_text("mine")
    for out, message in (
        (mine, "is there and no report: give another name, or --force"),
        (short, "is the log itself"),
        (tmp_path, "is a folder: give the name of a file"),
        (tmp_path / "none" / "page.html", "argument --out: cannot write"),
        (mine / "page.html", "argument --out: "),
    ):
        assert main(["report", str(short), "--out", str(out)]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
    assert main(["report", str(short), "--out", str(short), "--force"]) == 2
    assert mine.read_text() == "mine"
    assert read_run(short).steps
    assert main(["report", str(short), "--out", str(mine), "--force"]) == 0
    assert main(["report", str(short), "--out", str(mine)]) == 0  # a report by now
    assert mine.read_text(encoding="utf-8").startswith(MARK)
    (tmp_path / "empty.html").touch()
    assert main(["report", str(short), "--out", str(tmp_path / "empty.html")]) == 0


def test_a_page_is_written_whole_or_not_at_all(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert main(["report", str(short), "--out", str(page)]) == 0
    before = page.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert main(["report", str(short), "--out", str(page)]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert page.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == [page, short.parent]


def test_without_matplotlib_it_says_what_to_install(
    short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert main(["report", str(short), "--out", str(tmp_path / "page.html")]) == 1
    assert "pip install 'circuitroute[plot]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [short.parent]


# ---------------------------------------------------------------------------------------------- in a browser


def opened(path: Path, width: int, profile: Path) -> str:
    """The document as a browser has it in the end; it must have had nothing to complain about."""
    command = [str(CHROMIUM), *FLAGS.split(), f"--user-data-dir={profile}", f"--window-size={width},2000", "--dump-dom"]
    done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=300, check=True)
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout


PROBE = """<script>
addEventListener("load", () => {
  const right = [...document.querySelectorAll("h1, h2, p, img, section")].map(e => e.getBoundingClientRect().right);
  const pictures = [...document.images];
  parent.postMessage(JSON.stringify({
    window: innerWidth,
    document: Math.max(document.documentElement.scrollWidth, document.body.scrollWidth, ...right),
    loaded: pictures.filter(i => i.complete && i.naturalWidth > 0).length,
    pictures: pictures.length,
    columns: getComputedStyle(document.querySelector(".cards")).gridTemplateColumns.split(" ").length,
    letters: Math.min(...pictures.map(i => LETTERS * i.getBoundingClientRect().width / i.naturalWidth)),
  }), "*");
});
</script>"""
# A browser's own window may not be as narrow as a telephone; a frame in it may.
FRAME = """<!DOCTYPE html><body>
<script>addEventListener("message", e => { document.body.dataset.probe = e.data; });</script>
<iframe src="probed.html" style="width: WIDTHpx; height: 1000px; border: 0"></iframe></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here")
@pytest.mark.parametrize(("width", "columns"), [(1200, 3), (400, 1)])
def test_a_browser_shows_it_and_nothing_is_wider_than_the_window(
    page: Path, width: int, columns: int, tmp_path: Path
) -> None:
    """Measured by a script in a copy, since the page itself forbids any."""
    text = page.read_text(encoding="utf-8").replace("style-src", "script-src 'unsafe-inline'; style-src")
    probed = tmp_path / "probed.html"
    size = RC["font.size"] * 96 / 72  # of letters, in pixels of a picture shown at its own size
    probed.write_text(text.replace("</body>", PROBE.replace("LETTERS", str(size)) + "</body>"), encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.replace("WIDTH", str(width)), encoding="utf-8")
    (found,) = re.findall(r'data-probe="(.*?)"', opened(frame, width + 100, tmp_path / "profile"))
    measured = json.loads(unescape(found))
    assert measured["window"] == width
    assert measured["document"] <= width
    assert measured["columns"] == columns
    assert measured["loaded"] == measured["pictures"] == 20
    assert measured["letters"] >= 9  # pixels


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here")
def test_a_browser_has_nothing_to_complain_about(page: Path, tmp_path: Path) -> None:
    dom = opened(page, 1200, tmp_path / "profile")
    assert Page(dom).pictures == Page(page.read_text(encoding="utf-8")).pictures
