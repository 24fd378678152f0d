"""`examples/gallery`: the pictures of the front page's cards, from rows that are kept and rows that are new."""

import json
import re
from pathlib import Path
from statistics import fmean
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'circuitroute[plot]'")

from gallery.command import IMAGES, ROOT, main
from gallery.draw import STUDIED, TIMED

from benchmarks.circuits.table import cases, times
from benchmarks.rows import read

BEYOND = {"circuits", "cnf", "k-subset", "logic", "priors", "survey"}
CARDS = {"balance", "budget", "cost", "dynamic-k", "learning", "report"} | BEYOND


def drawn(folder: Path) -> set[str]:
    for path in folder.glob("*.svg"):
        assert ElementTree.parse(path).getroot().tag.endswith("svg")
    return {path.stem.removeprefix("card-") for path in folder.glob("card-*.svg")}


def test_the_front_page_shows_the_cards_that_are_drawn(tmp_path: Path) -> None:
    assert main(["draw", "--images", str(tmp_path)]) == 0
    assert drawn(tmp_path) == CARDS
    assert drawn(IMAGES) == CARDS
    front = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert set(re.findall(r"images/card-([\w-]+)\.svg", front)) == CARDS
    assert set(re.findall(r"images/([\w-]+)\.svg", front)) == {f"card-{name}" for name in CARDS}
    sizes = [ElementTree.parse(path).getroot().get("viewBox") for path in (*tmp_path.iterdir(), *IMAGES.glob("card-*"))]
    assert set(sizes) == {"0 0 288 180"}  # points; the letters of a wider one would be smaller on a telephone


def test_the_front_page_promises_what_the_rows_say() -> None:
    front = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    timed = [case for key, case in cases(read(TIMED / "cpu-circuits.jsonl")).items() if key[:2] == ("spl", 256)]
    klay = [times(case, "klay") or 0.0 for case in timed]
    assert len(klay) == 8
    assert f"KLay's best way takes {min(klay):.1f} to {max(klay):.0f} times as long" in front
    survey = [row for row in read(TIMED / "cpu-survey.jsonl") if row["op"] == "survey"]
    r = [row["ratio"] for row in survey if row["n"] == 1000]
    assert front.count(f"{min(r):.1f} to {max(r):.0f} times as long") == 2
    assert all(row["outcome"].startswith("R ") for row in survey if row["n"] == 10000)
    paths = [row for row in read(STUDIED / "logic-layers.jsonl") if row["task"] == "paths"]
    broken = {
        method: 100 * fmean(row["violations"] for row in paths if row["method"] == method)
        for method in ("sigmoid", "sigmoid + semantic loss", "ConstraintLayer")
    }
    said = "{:.0f} times in 100, with semantic loss {:.0f} times".format(*broken.values())
    assert said in front
    assert broken["ConstraintLayer"] == 0


@pytest.mark.slow
def test_what_is_measured_can_be_drawn(tmp_path: Path) -> None:
    rows, log = tmp_path / "rows.jsonl", tmp_path / "log.jsonl"
    files = ["--rows", str(rows), "--log", str(log)]
    assert main(["measure", "--seeds", "2", "--steps", "50", *files]) == 0
    found = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    assert {row["op"] for row in found} == {"errors", "loads", "totals"}
    assert all(len(row["errors"]) == 2 for row in found if row["op"] == "errors")
    assert all(sum(row["tokens"]) == 8192 for row in found if row["op"] == "totals")
    kept = [row["tokens"] for row in found if row.get("method") == "budget-mode"]
    assert len(kept) == 2
    assert not any(any(tokens[11:]) for tokens in kept)
    assert main(["draw", "--images", str(tmp_path), *files]) == 0
    assert drawn(tmp_path) == CARDS
