"""The options that bound what a command may compile: ``--max-nodes`` and ``--max-seconds``."""

from __future__ import annotations

import argparse

from circuitroute.deadline import DEFAULT_SECONDS

MAX_NODES = 1_000_000


def add_limits(parser: argparse.ArgumentParser) -> None:
    """Add the two options, with the limits of :func:`circuitroute.compile` as their defaults."""
    parser.add_argument(
        "--max-nodes", type=int, default=MAX_NODES, metavar="N", help=f"the largest circuit (default {MAX_NODES})"
    )
    parser.add_argument(
        "--max-seconds",
        type=float,
        default=DEFAULT_SECONDS,
        metavar="S",
        help=f"how long all of it may take, in CPU seconds; inf for no limit (default {DEFAULT_SECONDS:g})",
    )
