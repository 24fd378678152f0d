"""The tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .pairing import Paired, Row

LEARNING = ("error", "minus the first", "percent", "better", "agreement", "dead", "load", "executed", "cpu")
OPTIONAL = {"count_correlation": "counts", "purity": "purity"}
GRADIENTS = ("cosine", "minus the first", "bias", "variance", "cosine, seen", "bias, seen")
PARETO = (
    "budget", "executed", "error", "front", "minus top-k", "percent", "better", "layers", "last - first", "counts"
)  # fmt: skip
TIMING = ("over top-k", "over mode", "limit for one probe")


def show_learning(summary: Sequence[Row]) -> None:
    for shape, group in groupby(summary, key=lambda row: str(row["shape"])):
        rows = list(group)
        optional = [key for key in OPTIONAL if any(row[key] is not None for row in rows)]
        table = _table(f"{shape}: held-out error", [*LEARNING, *(OPTIONAL[key] for key in optional)])
        for row in rows:
            table.add_row(row["method"], *_learning_cells(row), *(_number(row[key], ".2f") for key in optional))
        _print(table)


def _learning_cells(row: Row) -> list[str]:
    return [
        with_spread(row["error"], row["error_spread"], ".3f"),
        *_paired_cells(row["paired"], row["seeds"]),
        _number(row["agreement"], ".3f"),
        _number(row["dead"], ".1f"),
        _number(row["load_entropy"], ".3f"),
        _number(row["executed"], ".2f"),
        _number(row["cpu_ratio"], ".2f"),
    ]


def _paired_cells(paired: Paired | None, seeds: int) -> list[str]:
    if paired is None:
        return ["", "", ""]
    return [
        with_spread(paired.difference, paired.spread, "+.3f"),
        with_spread(100 * paired.relative, 100 * paired.relative_spread, "+.1f"),
        f"{paired.wins}/{seeds}",
    ]


def show_gradients(summary: Sequence[Row]) -> None:
    for shape, group in groupby(summary, key=lambda row: str(row["shape"])):
        table = _table(f"{shape}: gradients in the logits", GRADIENTS)
        for row in group:
            paired = row["paired"]
            table.add_row(
                row["method"],
                with_spread(row["cosine"], row["cosine_spread"], ".3f"),
                "" if paired is None else with_spread(paired.difference, paired.spread, "+.3f"),
                *(_number(row[key], ".3f") for key in ("bias", "variance", "cosine_seen", "bias_seen")),
            )
        _print(table)


def show_timing(rows: Iterable[Row]) -> None:
    for (shape, size), group in groupby(rows, key=lambda row: (str(row["shape"]), str(row["size"]))):
        table = _table(f"{shape}, {size}: CPU time of a training step", TIMING)
        for row in group:
            table.add_row(row["method"], *(f"{row[key]:.2f}" for key in ("over_top_k", "over_mode", "limit")))
        _print(table)


def show_pareto(summary: Sequence[Row]) -> None:
    for shape, group in groupby(summary, key=lambda row: str(row["shape"])):
        rows = list(group)
        teacher = _layers(rows[0]["teacher_layers"])
        table = _table(f"{shape}: error against executed experts; the teacher's layers take {teacher}", PARETO)
        for row in rows:
            table.add_row(
                row["method"],
                f"{row['budget']:g}",
                with_spread(row["executed"], row["executed_spread"], ".2f"),
                with_spread(row["error"], row["error_spread"], ".3f"),
                "*" if row["front"] else "",
                *_paired_cells(row["paired"], row["pairs"]),
                _layers(row["layers"]),
                with_spread(row["later"], row["later_spread"], "+.2f"),
                _number(row["count_correlation"], ".2f"),
            )
        _print(table)


def _layers(means: Sequence[float]) -> str:
    return " ".join(format(mean, ".2f") for mean in means)


def with_spread(mean: float, spread: float, form: str) -> str:
    """The mean, and the spread where there is one."""
    return format(mean, form) if math.isnan(spread) else f"{mean:{form}} ± {spread:{form.lstrip('+')}}"


def _number(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)


def _table(title: str, numbers: Sequence[str]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("method", no_wrap=True)
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _print(table: Table) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160  # nothing is gained by folding a table in a file
    console.print(table)
