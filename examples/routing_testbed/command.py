"""The command line: which students are trained, in which processes, and where the rows go."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from functools import partial
from pathlib import Path

from . import gradients, pareto, pareto_summary, report, timing
from .layered_task import LAYERED, SPLITS
from .methods import methods_of, usual_methods
from .pairing import GRADIENT_MEASURES, summarise
from .setting import MAIN, OF_DOMAINS, SHAPES, VARIABLE, Setting, Shape
from .training import Row, run_task

Job = Callable[[], list[Row]]
DEFAULT_SHAPES = [str(shape) for shape in (*MAIN, VARIABLE, OF_DOMAINS)]
USUAL_TABLES = ("learning", "gradients", "timing")
TABLES = (*USUAL_TABLES, "pareto")


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, prints a line per finished task and the tables, writes the rows; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    strangers = _fitting_nowhere(options)
    if strangers:
        parser.error(f"argument --methods: {', '.join(strangers)}: not for the shapes {', '.join(options.shapes)}")
    if options.figure is not None and "pareto" not in options.tables and not options.show:
        parser.error("argument --figure: it shows the table pareto, which --tables leaves out")
    if options.show:
        lines = [line for path in options.show for line in path.read_text(encoding="utf-8").splitlines()]
        _report([json.loads(line) for line in lines], options.figure)
        return 0
    jobs = _jobs(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    with options.out.open("w", encoding="utf-8") as out:
        for done, found in enumerate(_finished(jobs, options.processes), 1):
            rows += found
            out.writelines(json.dumps(row) + "\n" for row in found)
            out.flush()
            print(f"{done}/{len(jobs)}  {found[0]['table']}, {found[0]['shape']}, seed {found[0]['seed']}", flush=True)
    _report(rows, options.figure)
    print(f"rows in {options.out}")
    return 0


def _report(rows: Sequence[Row], figure: Path | None) -> None:
    show(rows)
    if figure is not None:
        from .drawing import draw_pareto  # needs matplotlib

        draw_pareto(pareto_summary.summarise(row for row in rows if row["table"] == "pareto"), figure)
        print(f"figure in {figure}")


def show(rows: Sequence[Row]) -> None:
    """All tables that there are rows for, whatever order tasks finished in; a task's methods keep theirs."""
    order = [*SHAPES, *gradients.SHAPES, *SPLITS]
    ordered = sorted(rows, key=lambda row: (order.index(row["shape"]), row.get("size", ""), row["seed"]))
    of_table = {name: [row for row in ordered if row["table"] == name] for name in TABLES}
    report.show_learning(summarise(of_table["learning"]))
    report.show_gradients(summarise(of_table["gradients"], "cosine", GRADIENT_MEASURES))
    report.show_timing(of_table["timing"])
    report.show_pareto(pareto_summary.summarise(of_table["pareto"]))


def _jobs(options: argparse.Namespace) -> list[Job]:
    """What there is to do, in tasks that need nothing of one another; the longest come first."""
    setting = Setting() if options.steps is None else Setting(steps=options.steps)
    shapes = sorted((SHAPES[name] for name in dict.fromkeys(options.shapes)), key=lambda shape: -shape.experts)
    jobs: list[Job] = []
    if "learning" in options.tables:
        for shape in shapes:
            names = _chosen(shape, options.methods)
            jobs += [partial(run_task, shape, names, seed, setting) for seed in range(options.seeds)]
    if "gradients" in options.tables:
        jobs += [partial(gradients.run, name, seed) for name in gradients.SHAPES for seed in range(options.seeds)]
    if "timing" in options.tables:
        timed = [str(shape) for shape in shapes if shape.kind == "fixed"]
        jobs += [partial(timing.run, name, size) for name in timed for size in timing.SIZES]
    if "pareto" in options.tables:
        jobs += pareto.jobs(options.seeds, LAYERED if options.steps is None else replace(LAYERED, steps=options.steps))
    return jobs


def _fitting_nowhere(options: argparse.Namespace) -> list[str]:
    """The methods that were asked for and that none of the shapes has."""
    known = {name for shape in options.shapes for name in methods_of(SHAPES[shape])}
    return [name for name in options.methods or () if name not in known]


def _chosen(shape: Shape, asked: Sequence[str] | None) -> list[str]:
    """The methods to run in a shape, the baseline first whether asked for or not."""
    baseline, *others = methods_of(shape)
    chosen = usual_methods(shape) if asked is None else [name for name in others if name in asked]
    return [baseline, *(name for name in chosen if name != baseline)]


def _finished(jobs: Sequence[Job], processes: int) -> Iterator[list[Row]]:
    if processes == 1:
        yield from (job() for job in jobs)
        return
    # Fresh interpreters: a fork of a process with torch's threads may hang.
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        for future in as_completed([pool.submit(job) for job in jobs]):
            yield future.result()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="routing_testbed", description=sys.modules[__package__].__doc__)
    known = sorted({name for shape in SHAPES.values() for name in methods_of(shape)})
    parser.add_argument("--seeds", type=_positive, default=5, help="teachers and students (default: 5)")
    parser.add_argument(
        "--steps", type=_positive, help=f"default: {Setting.steps}, for the table pareto {LAYERED.steps}"
    )
    parser.add_argument(
        "--shapes", nargs="+", choices=SHAPES, default=DEFAULT_SHAPES, metavar="SHAPE", help=_list(SHAPES)
    )
    parser.add_argument("--methods", nargs="+", choices=known, metavar="METHOD", help=_list(known))
    parser.add_argument(
        "--tables", nargs="+", choices=TABLES, default=USUAL_TABLES, help="which to make (default: all but pareto)"
    )
    parser.add_argument("--show", nargs="+", type=Path, metavar="FILE", help="of rows from before: trains nothing")
    parser.add_argument("--figure", type=Path, help="an SVG file for the figure of the table pareto")
    parser.add_argument("--processes", type=_positive, default=2, help="of one thread each (default: 2)")
    parser.add_argument("--out", type=Path, default=Path("runs/routing-testbed.jsonl"), help="the file for the rows")
    return parser


def _list(names: Sequence[str] | dict[str, Shape]) -> str:
    return f"some of {', '.join(names)}".replace("%", "%%")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
