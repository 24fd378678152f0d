"""Rows: one JSON object per line, self-describing, appended; and the table that people read."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]

# (heading, format of a row) of the printed table.
COLUMNS: tuple[tuple[str, str], ...] = (
    ("provider", "{provider}"),
    ("pass", "{pass}"),
    ("median ms", "{median_ms:.2f}"),
    ("p20 - p80", "{p20_ms:.2f} - {p80_ms:.2f}"),
    ("x topk", "{ratio_to_topk:.1f}"),
    ("x floor", "{ratio_to_floor:.0f}"),
    ("peak MiB", "{peak_mib:.0f}"),
    ("max error", "{max_abs_error:.1e}"),
)
# The table needs this much room, also where the output is not a terminal.
WIDTH = 140

# Engines that other packages run, whose versions matter: the engine's name is that of the module.
PACKAGES = ("klay", "numba", "pyjuice", "pysdd", "triton")


def environment(device: torch.device) -> Row:
    """Where and with what the rows were measured."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": cpu_model(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "circuitroute": _version(),
        "utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def versions(engine: str) -> Row:
    """The version of the package that runs an engine; nothing for engines that need torch alone."""
    return {engine: _package_version(engine)} if engine in PACKAGES else {}


@cache
def _package_version(module: str) -> str:
    """By the module, since builds of a package differ in name."""
    (name, *_) = importlib.metadata.packages_distributions()[module]
    return importlib.metadata.version(name)


def cpu_model() -> str:
    """The processor's name as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _version() -> str:
    import circuitroute

    return str(circuitroute.__version__)


def notes(rows: Sequence[Row]) -> list[str]:
    """What providers do less or otherwise than the op asks for, once each."""
    found = dict.fromkeys(f"{row['provider']}: {row['note']}" for row in rows if row.get("note"))
    return list(found)


def prepare(path: Path) -> None:
    """Make sure that rows can be appended to a file, before any time is spent on them; nothing is written.

    Raises:
        OSError: they cannot.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        path.open("ab").close()


def append(path: Path, rows: Sequence[Row]) -> None:
    """Append the rows in one write, so that two runs never share a line and none is left in halves."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(handle, text.encode())
    finally:
        os.close(handle)


def read(path: Path) -> list[Row]:
    """The rows of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def show(title: str, rows: Sequence[Row]) -> None:
    """Print the rows as a table, with rich where it is installed, else plainly; then the notes."""
    headings = [heading for heading, _ in COLUMNS]
    cells = [[_cell(row, form) for _, form in COLUMNS] for row in rows]
    try:
        _show_rich(title, headings, cells)
    except ImportError:
        _show_plain(title, headings, cells)
    for note in notes(rows):
        print(note)


def _show_rich(title: str, headings: list[str], cells: list[list[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index < 2 else "right", no_wrap=True)
    for line in cells:
        table.add_row(*line)
    console = Console()
    Console(width=max(console.width, WIDTH)).print(table)


def _cell(row: Row, form: str) -> str:
    try:
        return form.format(**row)
    except (TypeError, KeyError):  # None or no such field: not measured
        return "-"


def _show_plain(title: str, headings: list[str], cells: list[list[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
    print(title)
    for line in [headings, *cells]:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
