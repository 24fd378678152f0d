"""The figure: how far estimates are from the exact gradient; needs matplotlib, the extra `plot`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

from circuitroute.plots import COLORS, new_figure

from .estimators import METHODS
from .pairing import by_method

Row = dict[str, Any]

OURS, THEIRS = COLORS[0], COLORS[1]
MARKS = {1: "o", 4: "s", 32: "^"}


def draw(rows: Sequence[Row], path: Path) -> None:
    """1 - cosine with the exact gradient by method, at each budget, on the problem of SIMPLE's paper; as SVG.

    Letters are of a size that stays readable where the figure is shown 360 pixels wide.
    """
    found = [row for row in rows if (row.get("family"), row.get("scale")) == ("quadratic", 1.0)]
    if not found:
        raise ValueError("rows: there are none of the gradients of the quadratic loss at scale 1 to draw")
    with matplotlib.rc_context({"svg.hashsalt": "circuitroute", "font.size": 15, "axes.linewidth": 0.8}):
        figure = new_figure(6.0, 6.0)
        axes = figure.subplots()
        groups = by_method(found)
        for place, (name, group) in enumerate(reversed(groups.items())):
            _draw_method(axes, place, group, OURS if METHODS[name].ours else THEIRS)
        axes.set_yticks(range(len(groups)), list(reversed(groups)))
        for tick, name in zip(axes.get_yticklabels(), reversed(groups), strict=True):
            tick.set_color(OURS if METHODS[name].ours else THEIRS)
        axes.set(xscale="log", xlabel="1 - cosine with the exact gradient")
        axes.set_xticks([0.02, 0.05, 0.1, 0.2, 0.5, 1.0], ["0.02", "0.05", "0.1", "0.2", "0.5", "1"])
        axes.minorticks_off()
        axes.grid(axis="x", alpha=0.3)
        budgets = sorted({row["evaluations"] for row in found})
        for budget in budgets:
            axes.scatter([], [], marker=MARKS.get(budget, "D"), s=70, color="0.35", label=_samples(budget))
        figure.legend(
            loc="outside upper center", frameon=False, ncols=len(budgets), columnspacing=0.9, handletextpad=0.1
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None})  # the same rows are the same file


def _samples(budget: int) -> str:
    return f"{budget} sample" + ("" if budget == 1 else "s")


def _draw_method(axes: Any, place: int, rows: Sequence[Row], color: str) -> None:
    means = {
        budget: fmean(row["error"] for row in rows if row["evaluations"] == budget)
        for budget in sorted({row["evaluations"] for row in rows})
    }
    axes.plot(list(means.values()), [place] * len(means), color=color, linewidth=1.2, alpha=0.6)
    for budget, mean in means.items():
        axes.scatter([mean], [place], marker=MARKS.get(budget, "D"), s=70, color=color)
