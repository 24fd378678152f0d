"""The command line: which study, on which methods and seeds, and where its rows go."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import gradients, l2x, tables, vae
from .estimators import METHODS

Row = dict[str, Any]

QUICK_STEPS = 150
QUICK_DRAWS = {1: 500, 4: 200}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a study, prints its table and writes its rows, or shows rows from before; returns the exit status."""
    options = _parser().parse_args(arguments)
    if options.study == "show":
        lines = [line for path in options.rows for line in path.read_text(encoding="utf-8").splitlines()]
        _show([json.loads(line) for line in lines], options.figure)
        return 0
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    with options.out.open("w", encoding="utf-8") as out:
        for group in _run(options):
            found = [_short(row) for row in group]
            rows += found
            out.writelines(json.dumps(row) + "\n" for row in found)
            out.flush()
            print(_what(found[0]), file=sys.stderr, flush=True)
    _show(rows, None)
    print(f"rows in {options.out}")
    return 0


def _run(options: argparse.Namespace) -> Iterator[list[Row]]:
    chosen: dict[str, Any] = {} if options.methods is None else {"methods": options.methods}
    if options.study == "gradients":
        if options.quick:
            return gradients.run(("quadratic",), scales=(1.0,), seeds=gradients.SEEDS[:3], draws=QUICK_DRAWS, **chosen)
        return gradients.run(**chosen, seeds=gradients.SEEDS[: options.seeds])
    seeds = range(1 if options.quick else options.seeds)
    if options.study == "l2x":
        budget = replace(l2x.BUDGET, steps=QUICK_STEPS) if options.quick else l2x.BUDGET
        names = options.sets or (("xor",) if options.quick else tuple(l2x.TASKS))
        return l2x.run(names, seeds=seeds, budget=budget, tune=not options.quick, **chosen)
    budget = replace(vae.BUDGET, steps=QUICK_STEPS) if options.quick else vae.BUDGET
    return vae.run(seeds=seeds, budget=budget, tune=not options.quick, **chosen)


def _short(row: Row) -> Row:
    """With six digits of every number, which is more than its noise leaves."""
    return {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in row.items()}


def _what(row: Row) -> str:
    return ", ".join(
        str(row[key]) for key in ("table", "family", "set", "scale", "evaluations", "method") if key in row
    )


def _show(rows: Sequence[Row], figure: Path | None) -> None:
    for text in tables.markdown(rows):
        print(text)
    if figure is not None:
        from .drawing import draw  # needs matplotlib

        draw(rows, figure)
        print(f"figure in {figure}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="k_subset", description=sys.modules[__package__].__doc__)
    studies = parser.add_subparsers(dest="study", required=True)
    drawn = [
        name for name in METHODS if name != "exact"
    ]  # enumeration is the truth of one study and too long for another
    for name, module, seeds, known in (
        ("gradients", gradients, 10, drawn),
        ("l2x", l2x, 5, list(METHODS)),
        ("vae", vae, 5, drawn),
    ):
        summary = str(module.__doc__).partition("\n")[0]
        study = studies.add_parser(name, help=summary, description=summary)
        study.add_argument("--quick", action="store_true", help="a small version, in less than a minute")
        study.add_argument("--seeds", type=_positive, default=seeds, help=f"default: {seeds}")
        study.add_argument("--methods", nargs="+", choices=known, metavar="METHOD", help=f"of {', '.join(known)}")
        study.add_argument("--out", type=Path, default=Path(f"runs/k-subset-{name}.jsonl"), help="for the rows")
        if name == "l2x":
            study.add_argument("--sets", nargs="+", choices=l2x.TASKS, metavar="SET", help=f"of {', '.join(l2x.TASKS)}")
    show = studies.add_parser("show", help="tables and the figure of rows from before")
    show.add_argument("rows", nargs="+", type=Path, metavar="FILE")
    show.add_argument("--figure", type=Path, help="an SVG file for the figure")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
