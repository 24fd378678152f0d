"""`circuitroute report RUN.jsonl`: its options, and a run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from circuitroute._files import as_path, replace_file
from circuitroute.errors import CircuitFileError
from circuitroute.routing.runs import read_run

from .page import MARK, page_of


def add_parser(commands: Any) -> None:
    """Adds `report` to an argparse subparsers object."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "report",
        help="make a page of pictures of a training run from its log",
        description="Draws what the routers of a training run did, step by step and layer by layer, into one HTML file "
        "that needs nothing else: load entropy, max violation, experts per token, the entropy of decisions, their "
        "distance from the mode, budget use, and the loss where the log has it.",
    )
    parser.add_argument("log", metavar="RUN.jsonl", help="a log, such as circuitroute.metrics.RunLog writes")
    parser.add_argument("--out", metavar="PATH", help="the page to write (default: RUN.html, beside the log)")
    parser.add_argument("--force", action="store_true", help="replace a file at --out that is no report")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, command: str) -> int:
    """Makes the page; returns the exit code: 0, 1 (a missing extra) or 2 (a log that cannot be read, a page that
    cannot be written).

    command: the command line, unused: nothing is recorded.
    """
    try:
        source = _existing(options.log)
        target = source.with_suffix(".html") if options.out is None else as_path("argument --out", options.out)
        _check_target(target, source, options.force)
        record = read_run(source)
        replace_file(target, page_of(record, source.name).encode("utf-8"))
    except (CircuitFileError, ValueError) as error:
        return _fail(str(error), 2)
    except OSError as error:
        return _fail(f"argument --out: cannot write {str(target)!r}: {error.strerror or error}", 2)
    except ImportError as error:
        return _fail(str(error), 1)
    for note in record.notes:
        print(f"circuitroute report: {note}", file=sys.stderr)
    first, last = record.steps[0].step, record.steps[-1].step
    print(f"{target}: {len(record.steps)} logged steps, from {first} to {last}")
    return 0


def _existing(name: str) -> Path:
    """The log's path.

    Raises:
        CircuitFileError: there is no such file, or it is a folder.
    """
    path = as_path("argument RUN.jsonl", name)
    if not path.exists():
        raise CircuitFileError(f"argument RUN.jsonl: there is no file {name!r}")
    if path.is_dir():
        raise CircuitFileError(f"argument RUN.jsonl: {name!r} is a folder: give the log in it")
    return path


def _check_target(target: Path, source: Path, force: bool) -> None:
    """Refuse to replace what no run of this command has made."""
    if not target.exists():
        return
    if target.is_dir():
        raise CircuitFileError(f"argument --out: {str(target)!r} is a folder: give the name of a file")
    if target.samefile(source):
        raise CircuitFileError(f"argument --out: {str(target)!r} is the log itself: give another name")
    if target.is_file() and not force:
        with target.open("rb") as file:
            known = file.read(len(MARK)) == MARK.encode()
        if not known and target.stat().st_size:
            raise CircuitFileError(
                f"argument --out: {str(target)!r} is there and no report: give another name, or --force to replace it"
            )


def _fail(message: str, code: int) -> int:
    """Messages of several lines become one."""
    print(f"circuitroute report: error: {' '.join(message.split())}", file=sys.stderr)
    return code
