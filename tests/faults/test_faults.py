"""Each cell of the table: a sample in the ordinary run, all of them with ``make test-all``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.columns import COLUMNS, SLOW
from tests.faults.entries import ENTRIES

ROOT = Path(__file__).resolve().parents[2]
# "column :: entry" -> why it is not as it should be yet; one that has come right must leave the list.
OPEN: dict[str, str] = {}


def judged(cells: list[str]) -> dict[str, tuple[str | None, str | None]]:
    """(seen, wrong) of every cell, in processes: one that a cell ends is followed by another for those after it."""
    found: dict[str, tuple[str | None, str | None]] = {}
    paths = os.pathsep.join([str(ROOT), str(ROOT / "compilers")])
    while rest := [cell for cell in cells if cell not in found]:
        run = subprocess.run(
            [sys.executable, "-m", "tests.faults.worker", "-"],
            input="\n".join(rest),
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": paths},
            capture_output=True,
            text=True,
            check=False,
        )
        lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
        found |= {line["cell"]: (line["seen"], line["wrong"]) for line in lines if "cell" in line}
        if run.returncode:
            last = next((line["begins"] for line in reversed(lines) if "begins" in line), rest[0])
            assert last not in found, run.stderr[-2000:]
            found[last] = (None, f"the process ended with {run.returncode}: {run.stderr[-300:]}")
    return found


def require(found: dict[str, tuple[str | None, str | None]]) -> None:
    """That nothing is wrong but what is known to be open."""
    wrong = {cell: why for cell, (_, why) in found.items() if why is not None}
    unknown = [f"{cell}\n    {why}" for cell, why in wrong.items() if cell not in OPEN]
    assert not unknown, f"{len(unknown)} of {len(found)} cells:\n" + "\n".join(unknown)
    mended = [cell for cell in OPEN if cell in found and cell not in wrong]
    assert not mended, f"no longer open: {mended}"


def sample() -> list[str]:
    """A diagonal: every column that is not slow, with a few entries; every entry with a few columns."""
    columns, entries = [name for name in COLUMNS if name not in SLOW], list(ENTRIES)
    pairs = {(columns[i % len(columns)], entries[i % len(entries)]) for i in range(2 * len(entries))}
    return [f"{column} :: {entry}" for column, entry in sorted(pairs)]


def test_a_sample_of_the_table():
    found = judged(sample())
    assert sum(seen is not None for seen, _ in found.values()) > len(found) / 2
    require(found)


@pytest.mark.slow
@pytest.mark.parametrize("column", COLUMNS)
def test_all_of_a_column(column):
    require(judged([f"{column} :: {entry}" for entry in ENTRIES]))


def test_what_is_open_is_in_the_table():
    assert all(cell.split(" :: ")[0] in COLUMNS and cell.split(" :: ")[1] in ENTRIES for cell in OPEN)
