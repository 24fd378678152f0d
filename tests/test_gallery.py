"""`examples/gallery`: the pictures of the front page's cards, from rows that are kept and rows that are new."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'circuitroute[plot]'")

from gallery.command import IMAGES, ROOT, main

CARDS = {"balance", "budget", "cost", "dynamic-k", "learning", "report"}


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
    sizes = [ElementTree.parse(path).getroot().get("viewBox") for path in (*tmp_path.iterdir(), *IMAGES.glob("card-*"))]
    assert set(sizes) == {"0 0 288 180"}  # points; the letters of a wider one would be smaller on a telephone


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
