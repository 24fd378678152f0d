"""The pictures, as SVG: a quantity over the steps, for all layers together and layer by layer. Needs `plot`."""

from __future__ import annotations

import io
from importlib import import_module
from typing import Any

import numpy as np

from circuitroute.plots import COLORS, new_figure

from .series import Curves

# Small figures, so that their letters are readable on a narrow screen, too.
WIDTH, HEIGHT, ROW = 4.4, 2.3, 0.09
MOST_HEIGHT = 4.5
MOST_TICKS = 6
RC = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": "#444444",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "axes.formatter.useoffset": False,
    "svg.hashsalt": "circuitroute",  # the same file each time
}


def curve(curves: Curves) -> bytes:
    """All layers together, with the spread, or with the range of the layers where there is none."""
    with _settings():
        figure = new_figure(WIDTH, HEIGHT)
        axes = figure.add_subplot()
        low, high = _band(curves)
        if low is not None:
            axes.fill_between(curves.steps, low, high, color=COLORS[0], alpha=0.18, linewidth=0)
        few = len(curves.steps) <= 25
        axes.plot(
            curves.steps, curves.over_all, color=COLORS[0], linewidth=1.6, marker="o" if few else "", markersize=3
        )
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel("step")
        _few_ticks(axes)
        return _svg(figure)


def _band(curves: Curves) -> tuple[Any, Any]:
    if curves.spread is not None:
        return curves.over_all - curves.spread, curves.over_all + curves.spread
    if len(curves.layers) < 2:
        return None, None
    nothing = np.isnan(curves.each).all(0)
    low, high = (np.where(nothing, 0.0, pick(curves.each, 0)) for pick in (_smallest, _largest))
    return np.where(nothing, np.nan, low), np.where(nothing, np.nan, high)


def _smallest(values: Any, axis: int) -> Any:
    return np.where(np.isnan(values), np.inf, values).min(axis)


def _largest(values: Any, axis: int) -> Any:
    return np.where(np.isnan(values), -np.inf, values).max(axis)


def heat_map(curves: Curves) -> bytes:
    """Layer by layer, the first at the top; grey where nothing was logged."""
    rows = len(curves.layers)
    with _settings():
        figure = new_figure(WIDTH, min(max(1.2, 0.9 + (ROW if rows > 8 else 0.16) * rows), MOST_HEIGHT))
        axes = figure.add_subplot()
        axes.set_facecolor("#cccccc")
        edges = _edges(curves.steps)
        shown = np.ma.masked_invalid(curves.each)
        mesh = axes.pcolormesh(edges, np.arange(rows + 1) - 0.5, shown, cmap="viridis", rasterized=True)
        axes.invert_yaxis()
        every = max(1, -(-rows // 8))
        axes.set_yticks(range(0, rows, every), [_short(name) for name in curves.layers[::every]])
        axes.set_xlabel("step")
        _few_ticks(axes, y=False)
        bar = figure.colorbar(mesh, ax=axes, pad=0.02)
        bar.outline.set_visible(False)
        bar.locator = _locator(4)
        bar.update_ticks()
        return _svg(figure)


def _edges(steps: Any) -> Any:
    """[S + 1] the bounds of the columns."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    between = (steps[1:] + steps[:-1]) / 2
    return np.concatenate([[2 * steps[0] - between[0]], between, [2 * steps[-1] - between[-1]]])


def _short(name: str) -> str:
    return name if len(name) <= 14 else f"{name[:6]}…{name[-7:]}"


def _few_ticks(axes: Any, y: bool = True) -> None:
    axes.xaxis.set_major_locator(_locator(MOST_TICKS, integer=True))
    if y:
        axes.yaxis.set_major_locator(_locator(4))


def _locator(bins: int, integer: bool = False) -> Any:
    return import_module("matplotlib.ticker").MaxNLocator(bins, integer=integer)


def _settings() -> Any:
    # By way of new_figure, which says what to install where matplotlib is missing.
    new_figure(1, 1)
    return import_module("matplotlib").rc_context(RC)


def _svg(figure: Any) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="svg", dpi=100, metadata={"Date": None})
    return content.getvalue()
