"""`circuitroute explain MODULE:CONSTRAINT -n 64`: its options, and a run."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import circuitroute as cr
from circuitroute.cli.limits import add_limits
from circuitroute.compilation import predict
from circuitroute.deadline import within

from .facts import Facts, facts_of
from .table import print_tables
from .target import constraint_of, importable_from_here

HIDDEN = 4096


def add_parser(commands: Any) -> None:
    """Adds `explain` to an argparse subparsers object."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "explain",
        help="show what a constraint compiles to: sizes, levels, engine, predicted cost",
        description="Compiles a constraint and shows the circuit: its models, sizes and levels, the engine that runs "
        "it here, and its predicted share of a router's arithmetic.",
    )
    parser.add_argument(
        "target",
        metavar="MODULE:CONSTRAINT",
        help="an importable module (or the path of a .py file) and the name in it of a constraint, a circuit, or a "
        "function without arguments that returns one",
    )
    parser.add_argument("-n", type=int, required=True, metavar="N", help="number of variables (experts)")
    parser.add_argument(
        "--hidden", type=int, default=HIDDEN, metavar="N", help=f"hidden size of the router (default {HIDDEN})"
    )
    add_limits(parser)
    parser.add_argument("--json", action="store_true", help="print the same facts as JSON")
    parser.add_argument("--draw", type=Path, metavar="PATH", help="draw the circuit to a .png, .svg or .pdf file")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, command: str) -> int:
    """Explains a constraint; returns the exit code: 0, 1 (a missing extra, a file that cannot be written) or 2 (a
    constraint that cannot be found, built or drawn).

    command: the command line, unused: nothing is recorded.
    """
    try:
        doing, remedy = f"explaining {options.target} over {options.n} variables", "explain a smaller constraint"
        with within(options.max_seconds, lambda: doing, remedy), importable_from_here():
            facts = _facts(options)
            if options.draw is not None:
                facts.circuit.draw(options.draw)
        if options.json:
            print(json.dumps(facts.to_json(), indent=2))
        else:
            print_tables(facts)
    except (cr.CircuitRouteError, ValueError, TypeError) as error:
        return _fail(str(error), 2)
    except BrokenPipeError:
        raise  # nothing to be said, and nobody to say it to
    except (ImportError, OSError) as error:
        return _fail(str(error), 1)
    return 0


def _facts(options: argparse.Namespace) -> Facts:
    if options.hidden < 1:
        raise ValueError(f"argument --hidden: must be at least 1, got {options.hidden}")
    constraint = constraint_of(options.target)
    predicted = predict(constraint, options.n)
    start = time.perf_counter()
    circuit = cr.compile(constraint, options.n, max_nodes=options.max_nodes)
    return facts_of(circuit, time.perf_counter() - start, predicted, options.hidden)


def _fail(message: str, code: int) -> int:
    """Messages of several lines become one."""
    print(f"circuitroute explain: error: {' '.join(message.split())}", file=sys.stderr)
    return code
