"""The figure of the Pareto table; needs matplotlib, the extra `plot`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from circuitroute.plots import COLORS, MARKERS, new_figure

from .pairing import Row
from .pareto import BASELINE

PANELS = {
    "a range with a price, and a budget": (
        "range-mode",
        "range-probe",
        "range-sampled",
        "budget-mode",
        "budget-sampled",
    ),
    "soft top-k": ("softmoe", "softmoe-learned", "calibrated", "calibrated-learned"),
}


def draw_pareto(summary: Sequence[Row], path: Path, split: str = "rising") -> None:
    """Error against executed experts with standard deviations, top-k in every panel; as SVG.

    Raises ValueError where there is nothing of that teacher to draw.
    """
    rows = [row for row in summary if row["shape"] == split]
    if not rows:
        raise ValueError(f"split={split!r}: there are no rows of it")
    figure = new_figure(10.0, 4.6)
    all_axes = figure.subplots(1, len(PANELS), sharex=True, sharey=True)
    for axes, (title, methods) in zip(all_axes, PANELS.items(), strict=True):
        for place, name in enumerate((BASELINE, *methods)):
            _draw(axes, [row for row in rows if row["method"] == name], place, name)
        axes.set(title=title, xlabel="experts executed per token and layer")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    all_axes[0].set_ylabel("held-out error")
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "circuitroute"}):
        figure.savefig(path, format="svg", metadata={"Date": None})  # the same rows are the same file


def _draw(axes: Any, rows: Sequence[Row], place: int, name: str) -> None:
    if not rows:
        return
    columns = {key: [row[key] for row in rows] for key in ("executed", "error", "executed_spread", "error_spread")}
    axes.errorbar(
        columns["executed"],
        columns["error"],
        xerr=columns["executed_spread"],
        yerr=columns["error_spread"],
        color=COLORS[(place - 1) % len(COLORS)] if place else "black",
        marker=MARKERS[place],
        label=name,
        linewidth=1,
        elinewidth=0.7,
        capsize=2,
        markersize=5,
        alpha=0.85,
    )
