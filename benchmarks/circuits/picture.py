"""The picture of docs/circuit-benchmarks.md: milliseconds of one batch on every public circuit, by library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.circuits.table import OURS, VMAP, Case, best_of_klay, cases
from benchmarks.rows import Row
from circuitroute.plots import COLORS, new_figure

COLLECTION, BATCH = "spl", 256
GREY = "#8a8a8a"
LETTERS = 11.0  # in points, of a picture that is 360 points wide


def circuits_figure(rows: Sequence[Row]) -> Any:
    """A line per circuit: our time, KLay's best and KLay under vmap, on a logarithmic axis; forward and backward."""
    found = [case for (collection, batch, _), case in cases(rows).items() if (collection, batch) == (COLLECTION, BATCH)]
    found = sorted((case for case in found if OURS in case), key=lambda case: -float(case[OURS]["edges"]))
    figure = new_figure(5.0, 1.5 + 0.3 * len(found))
    axes = figure.subplots()
    axes.set_xscale("log")
    for line, case in enumerate(found):
        marks = [row["median_ms"] for row in _providers(case) if row is not None]
        axes.plot([min(marks), max(marks)], [line, line], color="#dddddd", linewidth=2.5, zorder=1)
    for i, (label, marker) in enumerate((("circuitroute", "o"), ("KLay, its best", "s"), ("KLay, vmap", "^"))):
        points = [
            (row["median_ms"], line) for line, case in enumerate(found) if (row := _providers(case)[i]) is not None
        ]
        if points:
            axes.scatter(*zip(*points, strict=True), s=60, marker=marker, color=COLORS[i], label=label, zorder=2)
    axes.set_yticks(range(len(found)), [_short(case[OURS]["constraint"]) for case in found], fontsize=LETTERS)
    axes.margins(y=0.08)
    axes.invert_yaxis()
    ticks = [0.3, 1, 3, 10, 30, 100, 300, 1000, 3000]
    axes.set_xticks(ticks, [f"{tick:,g}" for tick in ticks], fontsize=LETTERS)
    axes.minorticks_off()
    axes.set_xlabel(f"ms for a batch of {BATCH}, forward and backward", fontsize=LETTERS)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(
        loc="outside upper center", ncols=3, frameon=False, fontsize=LETTERS, handletextpad=0.1, columnspacing=1.0
    )
    return figure


def _providers(case: Case) -> tuple[Row | None, Row | None, Row | None]:
    return case.get(OURS), best_of_klay(case), case.get(VMAP)


def _short(name: str) -> str:
    return name.removesuffix("-all-pairs-sd").split("_")[0]
