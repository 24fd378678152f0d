"""`circuitroute count FILE.cnf`: its options, and a run."""

from __future__ import annotations

import argparse
import math
import sys
from decimal import Context, Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import circuitroute as cr
from circuitroute.cli.limits import add_limits
from circuitroute.deadline import within

# Digits of a decimal that stands beside an exact fraction.
DIGITS = 20


class Answer(NamedTuple):
    """What was counted: the problem's kind, whether there are models, their (weighted) number, and by what."""

    kind: str
    satisfiable: bool
    number: Fraction
    about: str


def add_parser(commands: Any) -> None:
    """Adds `count` to an argparse subparsers object."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "count",
        help="count the models of a CNF file exactly",
        description="Compiles the clauses of a DIMACS file and counts their models: weighted, where the file gives "
        "literals weights (c p weight), and projected, where it shows variables (c p show). The lines are those of the "
        "model counting competition; a file that nothing satisfies has the count 0.",
    )
    parser.add_argument("file", type=Path, metavar="FILE.cnf", help="clauses in the DIMACS format")
    parser.add_argument(
        "--compiler", metavar="NAME", help="the name of a compiler, such as sdd (default: the built-in)"
    )
    parser.add_argument("--unweighted", action="store_true", help="leave weights in the file aside")
    add_limits(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, command: str) -> int:
    """Counts; returns the exit code: 0, also where there are no models, or 2 for what cannot be read or counted.

    command: the command line, unused: nothing is recorded.
    """
    try:
        remedy = "try --compiler sdd, or a model counter such as ganak, d4 or sharpSAT-TD"
        with within(options.max_seconds, lambda: f"counting the models of {options.file}", remedy):
            answer = answered(options)
        print("\n".join(lines(answer)))
    except BrokenPipeError:
        raise  # nothing to be said, and nobody to say it to
    except (cr.CircuitRouteError, ValueError, TypeError, OSError, ImportError) as error:
        print(f"circuitroute count: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def answered(options: argparse.Namespace) -> Answer:
    """Reads, compiles and counts."""
    cnf = cr.read_cnf(options.file)
    if options.unweighted:
        cnf = cr.CNF(cnf.clauses, cnf.n, show=cnf.show)
    kind = f"{'p' if cnf.show is not None else ''}{'w' if cnf.weighted else ''}mc"
    cnf = cnf.projected()
    if cnf.n == 0:  # a circuit has a variable at least
        models = 0 if () in cnf.clauses else 1
        return Answer(kind, bool(models), Fraction(models), "there are no variables to count")
    try:
        circuit = cr.compile(cnf, max_nodes=options.max_nodes, compiler=options.compiler)
    except cr.InfeasibleError:
        return Answer(kind, False, Fraction(0), f"no assignment of {cnf.n} variables satisfies the clauses")
    count = circuit.weighted_count() if cnf.weighted else Fraction(circuit.model_count())
    return Answer(
        kind, True, count, f"{cnf.n} variables, a circuit of {circuit.num_nodes} nodes and {circuit.num_edges} products"
    )


def lines(answer: Answer) -> list[str]:
    """What is printed, in the competition's format: comments, s, and c s with the results."""
    kind, satisfiable, count, about = answer
    numerator, denominator = _digits(count.numerator), _digits(count.denominator)
    exact = numerator if denominator == "1" else f"{numerator}/{denominator}"
    found = [
        f"c o {about}",
        f"c o {_named(kind)}: {exact if denominator == '1' else f'{exact}, about {_decimal(count)}'}",
        f"s {'SATISFIABLE' if satisfiable else 'UNSATISFIABLE'}",
        f"c s type {kind}",
    ]
    if count < 0:
        found.append(f"c s neglog10-estimate {_log10(-count):.15g}")
    else:
        found.append(f"c s log10-estimate {_log10(count) if count else -math.inf:.15g}")
    return [*found, f"c s exact arb {'int' if denominator == '1' else 'frac'} {exact}"]


def _named(kind: str) -> str:
    return f"{'projected ' if 'p' in kind else ''}{'weighted ' if 'w' in kind else ''}model count"


def _digits(number: int) -> str:
    """An integer of any length in decimal; ``str`` refuses long ones."""
    return f"{Decimal(number):f}"


def _decimal(count: Fraction) -> str:
    return str(Context(prec=DIGITS).divide(Decimal(count.numerator), Decimal(count.denominator)))


def _log10(count: Fraction) -> float:
    return math.log10(count.numerator) - math.log10(count.denominator)
