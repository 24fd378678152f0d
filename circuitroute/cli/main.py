"""The command line: `circuitroute demo`, `explain`, `bench`, `count` and `report`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import circuitroute as cr
from circuitroute.cli import checkout
from circuitroute.cli.count import command as count
from circuitroute.cli.explain import command as explain
from circuitroute.cli.report import command as report

# Each adds subcommands, whose parsers set `run`: (options, command line) -> exit code.
COMMANDS: tuple[Callable[[Any], None], ...] = (
    checkout.add_parsers,
    explain.add_parser,
    count.add_parser,
    report.add_parser,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line (sys.argv's by default) and returns its exit code; 2 for bad arguments.

    As of programs that a signal ends: 130 where it was interrupted, 141 where nobody reads its output any more.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        options = _parser().parse_args(arguments)
        code: int = options.run(options, shlex.join(["circuitroute", *arguments]))
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("circuitroute: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _close_output()
        return 141
    except SystemExit as stop:  # argparse has printed its message, the help or the version
        return stop.code if isinstance(stop.code, int) else 0
    return code


def _close_output() -> None:
    """Drop what is still to be written, which Python would try again, and complain about, at its end."""
    with suppress(OSError, ValueError):  # not a file of the system's
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="circuitroute", description="Exact inference over constrained subsets, and routers on top."
    )
    parser.add_argument("--version", action="version", version=f"circuitroute {cr.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add_parser in COMMANDS:
        add_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
