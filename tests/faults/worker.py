"""Cells in a process of their own: ``python -m tests.faults.worker "column :: entry" ...``, one JSON line per cell."""

from __future__ import annotations

import json
import sys
import traceback
import warnings

import torch
from torch.distributions import Distribution

from tests.faults.columns import COLUMNS
from tests.faults.entries import ENTRIES

VALIDATES = Distribution._validate_args


def judge(column: str, entry: str) -> tuple[str | None, str | None]:
    """(what was seen, what is wrong); (None, None) where the cell means nothing."""
    Distribution.set_default_validate_args(VALIDATES)  # torch.compile switches this off
    try:
        return COLUMNS[column](ENTRIES[entry]), None
    except AssertionError as error:
        return None, str(error)[:600]
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return None, f"{type(error).__name__}: {str(error)[:400]} ({where.filename.split('/')[-1]}:{where.lineno})"


def _say(line: dict[str, str | None]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def main(cells: list[str]) -> None:
    """Judge these, in this order."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for cell in cells:
        _say({"begins": cell})
        seen, wrong = judge(*cell.split(" :: "))
        _say({"cell": cell, "seen": seen, "wrong": wrong})


if __name__ == "__main__":
    main([line for line in sys.stdin.read().split("\n") if line] if sys.argv[1:] == ["-"] else sys.argv[1:])
