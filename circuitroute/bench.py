"""`circuitroute bench`: the benchmarks of a checkout, as `python -m benchmarks` runs them."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent
NOT_HERE = "the benchmarks are not part of the installed package: run this in a checkout of circuitroute"

# No argument starts with it, so that none looks like an option of this parser.
NO_PREFIX = "\0"


def add_parser(commands: Any) -> None:
    """Adds `bench` to an argparse subparsers object. It has no options of its own: the benchmarks read them all."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "bench",
        help="time the engines side by side with other ways to do the same (in a checkout)",
        add_help=False,
        prefix_chars=NO_PREFIX,
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, command: str) -> int:
    """Runs the benchmarks; returns their exit code, or 2 where there are none.

    command: the command line, unused: rows record what was measured.
    """
    checkout = find_checkout()
    if checkout is None:
        print(f"circuitroute bench: error: {NOT_HERE}", file=sys.stderr)
        return 2
    with _importable(checkout):
        main: Callable[..., int] = importlib.import_module("benchmarks.__main__").main
        try:
            return main(options.arguments, prog="circuitroute bench")
        except SystemExit as stop:  # argparse has printed its message or the help
            return stop.code if isinstance(stop.code, int) else 0


def find_checkout() -> Path | None:
    """The folder that holds the benchmarks: the one with this package in it, else the current one."""
    places = (PACKAGE.parent, Path.cwd())
    return next((place for place in places if (place / "benchmarks" / "registry.py").is_file()), None)


@contextmanager
def _importable(checkout: Path) -> Iterator[None]:
    """The checkout first on the path: the benchmarks take their truth from its tests."""
    before = list(sys.path)
    sys.path.insert(0, str(checkout))
    try:
        yield
    finally:
        sys.path[:] = before
