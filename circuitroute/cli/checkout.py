"""`circuitroute demo` and `circuitroute bench`: programs of a checkout, which are not part of the installed package."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

PACKAGE = Path(__file__).resolve().parent.parent


class Program(NamedTuple):
    """A program of the checkout. `title`: how messages about it begin."""

    command: str
    help: str
    module: str
    folders: tuple[str, ...]
    title: str


PROGRAMS = (
    Program(
        "demo",
        "train three small MoE language models and compare their routers (in a checkout)",
        "language_model.command",
        ("examples",),
        "demo is",
    ),
    Program(
        "bench",
        "time the engines side by side with other ways to do the same (in a checkout)",
        "benchmarks.__main__",
        (".",),
        "benchmarks are",
    ),
)
# No argument starts with it, so none looks like an option of these parsers.
NO_PREFIX = "\0"


def add_parsers(commands: Any) -> None:
    """Adds both to an argparse subparsers object, without options: the programs parse all arguments themselves."""
    for program in PROGRAMS:
        parser: argparse.ArgumentParser = commands.add_parser(
            program.command, help=program.help, add_help=False, prefix_chars=NO_PREFIX
        )
        parser.add_argument("arguments", nargs=argparse.REMAINDER)
        parser.set_defaults(run=_runner(program))


def _runner(program: Program) -> Callable[[argparse.Namespace, str], int]:
    """A function that runs a program and returns its exit code, or 2 outside a checkout."""

    def run(options: argparse.Namespace, command: str) -> int:
        checkout = find_checkout()
        if checkout is None:
            print(
                f"circuitroute {program.command}: error: the {program.title} not part of the installed package: "
                "run this in a checkout of circuitroute",
                file=sys.stderr,
            )
            return 2
        with _importable([checkout / folder for folder in program.folders]):
            main: Callable[..., int] = importlib.import_module(program.module).main
            return main(options.arguments, prog=f"circuitroute {program.command}")

    return run


def find_checkout() -> Path | None:
    """The folder that holds this package, else the current one; None where neither is a checkout."""
    places = (PACKAGE.parent, Path.cwd())
    return next((place for place in places if (place / "benchmarks" / "registry.py").is_file()), None)


@contextmanager
def _importable(folders: list[Path]) -> Iterator[None]:
    """Puts these folders first on the path."""
    before = list(sys.path)
    sys.path[:0] = [str(folder.resolve()) for folder in folders]
    try:
        yield
    finally:
        sys.path[:] = before
