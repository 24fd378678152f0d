"""Figures of runs and studies from arrays: each function draws one, saves it and returns its path.

Shapes: L layers, E experts, K the largest count, P points.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .checkpoint import write_bytes

# Okabe and Ito's colours, distinct under every common colour blindness; markers for print.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
_BARS = {"linewidth": 1, "capsize": 2}
Array = npt.ArrayLike


def validation_curves(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    path: str | os.PathLike[str],
    *,
    ylabel: str = "validation loss",
    title: str | None = None,
) -> Path:
    """One line per name, name -> (steps, values). Raises ValueError when there are none or lengths differ."""
    _require_some(curves, "curves")
    figure = new_figure(7.0, 4.2)
    axes = figure.subplots()
    for i, (name, (steps, values)) in enumerate(curves.items()):
        if len(steps) != len(values):
            raise ValueError(f"curves[{name!r}] has {len(steps)} steps and {len(values)} values")
        axes.plot(steps, values, markersize=4, **_style(i, name))
    axes.set(xlabel="training step", ylabel=ylabel, title=title or "")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return save(figure, path)


def utilization_heatmaps(
    utilization: Mapping[str, Array], path: str | os.PathLike[str], *, title: str | None = None
) -> Path:
    """One panel per name, name -> [L, E], the fraction of tokens that use each expert, on one colour scale.

    Raises ValueError when it is empty or one is not a matrix.
    """
    _require_some(utilization, "utilization")
    panels_LE = {name: np.asarray(values, dtype=float) for name, values in utilization.items()}
    for name, values_LE in panels_LE.items():
        if values_LE.ndim != 2:
            raise ValueError(f"utilization[{name!r}] must have shape [layers, experts], got {list(values_LE.shape)}")
    layers, experts = np.max([values_LE.shape for values_LE in panels_LE.values()], axis=0)
    figure = new_figure(2.0 + 0.38 * max(experts, 8), len(panels_LE) * (0.9 + 0.3 * layers) + 0.6)
    all_axes = figure.subplots(len(panels_LE), 1, squeeze=False)[:, 0]
    top = max(float(values_LE.max(initial=0.0)) for values_LE in panels_LE.values())
    for axes, (name, values_LE) in zip(all_axes, panels_LE.items(), strict=True):
        image = axes.imshow(values_LE, vmin=0.0, vmax=top or 1.0, aspect="auto", cmap="viridis")
        axes.set(title=name, ylabel="layer")
        _integer_ticks(axes.xaxis, values_LE.shape[1])
        _integer_ticks(axes.yaxis, values_LE.shape[0])
    all_axes[-1].set_xlabel("expert")
    figure.colorbar(image, ax=list(all_axes), label="fraction of tokens")
    figure.suptitle(title or "Utilization of the experts")
    return save(figure, path)


def executed_histogram(counts: Mapping[str, Array], path: str | os.PathLike[str], *, title: str | None = None) -> Path:
    """How many experts tokens execute, a group of bars per count: name -> [K + 1], the tokens with 0, 1, ..., K.

    Raises ValueError when there are none or one is not a vector of non-negative numbers with a positive sum.
    """
    _require_some(counts, "counts")
    shares = {name: _shares(name, values) for name, values in counts.items()}
    figure = new_figure(7.0, 4.2)
    axes = figure.subplots()
    width = 0.8 / len(shares)
    for i, (name, share_K) in enumerate(shares.items()):
        offset = (i - (len(shares) - 1) / 2) * width
        axes.bar(np.arange(share_K.size) + offset, share_K, width, label=name, color=COLORS[i % len(COLORS)])
    used = [np.flatnonzero(share_K) for share_K in shares.values()]
    axes.set_xlim(max(-0.5, min(u[0] for u in used) - 1.5), max(u[-1] for u in used) + 1.5)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="experts executed", ylabel="fraction of tokens", title=title or "Executed experts per token")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(frameon=False)
    return save(figure, path)


def pareto(
    fronts: Mapping[str, Sequence[Array]],
    path: str | os.PathLike[str],
    *,
    xlabel: str = "experts executed per token and layer",
    ylabel: str = "validation loss",
    title: str | None = None,
) -> Path:
    """Points with error bars, those of one name connected: name -> (x [P], y [P], spread of x [P], spread of y [P]).

    An unknown spread is NaN and is not drawn. Raises ValueError when there are none or lengths differ.
    """
    _require_some(fronts, "fronts")
    figure = new_figure(7.0, 4.6)
    axes = figure.subplots()
    for i, (name, values) in enumerate(fronts.items()):
        columns = [np.atleast_1d(np.asarray(column, dtype=float)) for column in values]
        if len(columns) != 4 or len({column.shape for column in columns}) > 1 or columns[0].ndim != 1:
            raise ValueError(f"fronts[{name!r}] must be four vectors of one length: x, y and their spreads")
        order = np.argsort(columns[0], kind="stable")
        x_P, y_P, x_spread_P, y_spread_P = (column[order] for column in columns)
        spreads = {"xerr": np.nan_to_num(x_spread_P), "yerr": np.nan_to_num(y_spread_P)}
        axes.errorbar(x_P, y_P, **spreads, **_BARS, markersize=5, elinewidth=1, alpha=0.9, **_style(i, name))
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title or "")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return save(figure, path)


def experts_per_layer(
    panels: Mapping[str, Mapping[str, Sequence[Array]]], path: str | os.PathLike[str], *, title: str | None = None
) -> Path:
    """How many experts each layer executes, one panel per first name: panel -> name -> (mean [L], spread [L]).

    An unknown spread is NaN and is not drawn. Raises ValueError when there are none or lengths differ.
    """
    _require_some(panels, "panels")
    figure = new_figure(1.0 + 3.6 * len(panels), 3.8)
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (panel, layers) in zip(all_axes, panels.items(), strict=True):
        for i, (name, (means, spreads)) in enumerate(layers.items()):
            mean_L, spread_L = np.asarray(means, dtype=float), np.asarray(spreads, dtype=float)
            if mean_L.ndim != 1 or mean_L.shape != spread_L.shape:
                raise ValueError(f"panels[{panel!r}][{name!r}] must be two vectors of one length: means and spreads")
            # Side by side, since routers without a choice all have the same numbers.
            places = np.arange(mean_L.size) + (i - (len(layers) - 1) / 2) * 0.6 / len(layers)
            axes.errorbar(places, mean_L, yerr=np.nan_to_num(spread_L), **_BARS, markersize=4, **_style(i, name))
        axes.set(title=panel, xlabel="layer")
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    all_axes[0].set_ylabel("experts executed per token")
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(title or "")
    return save(figure, path)


def budget_use(
    panels: Mapping[str, tuple[int, Mapping[str, Array]]], path: str | os.PathLike[str], *, title: str | None = None
) -> Path:
    """What tokens use of a budget: panel -> (budget, name -> [K + 1], the tokens that use 0, 1, ..., K experts in all).

    One column per panel with a line at its budget, one row per name; tokens above the budget have another colour, and
    their share is written beside them. Raises ValueError when there are none, names differ between panels, or one is
    not a vector of non-negative numbers with a positive sum.
    """
    _require_some(panels, "panels")
    names = list(next(iter(panels.values()))[1])
    _require_some(dict.fromkeys(names), "panels")
    if any(list(uses) != names for _, uses in panels.values()):
        raise ValueError(f"panels must all have the same names: {', '.join(names)}")
    figure = new_figure(1.0 + 3.4 * len(panels), 0.8 + 1.05 * len(names))
    all_axes = figure.subplots(len(names), len(panels), squeeze=False, sharex="col")
    for column, (panel, (budget, uses)) in enumerate(panels.items()):
        shares = {name: _shares(name, values) for name, values in uses.items()}
        used = [np.flatnonzero(share_K) for share_K in shares.values()]
        for row, (name, share_K) in enumerate(shares.items()):
            axes, totals = all_axes[row, column], np.flatnonzero(share_K)
            colors = [COLORS[1] if total > budget else COLORS[0] for total in totals]
            axes.bar(totals, share_K[totals], 0.9, color=colors)
            axes.axvline(budget + 0.5, color="black", linestyle="--", linewidth=1)
            over = f"{share_K[budget + 1 :].sum():.0%} over"
            axes.text(0.99, 0.9, over, transform=axes.transAxes, ha="right", va="top", fontsize="small")
            axes.set_ylim(0, 1.45 * share_K.max())  # room for the text
            if column == 0:
                axes.set_ylabel(name, rotation=0, ha="right", va="center")
        low, high = min(u[0] for u in used), max(u[-1] for u in used)
        all_axes[0, column].set_title(panel)
        all_axes[0, column].set_xlim(min(low, budget) - 1.5, max(high, budget) + 1.5)
        all_axes[-1, column].set_xlabel("experts a token executes in all layers")
        all_axes[-1, column].xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(title or "")
    return save(figure, path)


def differences(
    panels: Mapping[str, Mapping[str, tuple[float, float]]],
    path: str | os.PathLike[str],
    *,
    xlabel: str,
    noise: str | None = None,
    title: str | None = None,
) -> Path:
    """Differences to a reference, below 0 where better: panel -> name -> (mean, spread), a line per name.

    An unknown spread is NaN and is not drawn. `noise` names the line that shows what differences mean nothing. Raises
    ValueError when there are none.
    """
    _require_some(panels, "panels")
    # In the order of the longest panel, which has them in theirs.
    longest_first = sorted(panels.values(), key=len, reverse=True)
    names = list(dict.fromkeys(name for values in longest_first for name in values))
    figure = new_figure(1.8 + 2.6 * len(panels), 1.2 + 0.26 * len(names))
    all_axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (panel, values) in zip(all_axes, panels.items(), strict=True):
        axes.axvline(0, color="black", linewidth=1)
        for place, name in enumerate(names):
            mean, spread = values.get(name, (np.nan, np.nan))
            color = "#888888" if name == noise else COLORS[0] if mean + np.nan_to_num(spread) < 0 else COLORS[1]
            color = "#888888" if abs(mean) <= np.nan_to_num(spread) else color
            axes.errorbar(mean, place, xerr=np.nan_to_num(spread), **_BARS, color=color, marker="o", markersize=5)
        axes.set(title=panel)
        axes.grid(axis="x", alpha=0.3)
    all_axes[0].set_yticks(range(len(names)), names)
    all_axes[0].set_ylim(len(names) - 0.5, -0.5)
    figure.supxlabel(xlabel, fontsize="medium")
    figure.suptitle(title or "")
    return save(figure, path)


def curve_panels(
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]],
    path: str | os.PathLike[str],
    *,
    ylabel: str,
    title: str | None = None,
) -> Path:
    """Curves, a panel each: panel -> name -> (steps, values). Raises ValueError when there are none or lengths
    differ."""
    _require_some(panels, "panels")
    styles = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    figure = new_figure(1.0 + 3.6 * len(panels), 4.2)
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (panel, curves) in zip(all_axes, panels.items(), strict=True):
        for name, (steps, values) in curves.items():
            if len(steps) != len(values):
                raise ValueError(f"panels[{panel!r}][{name!r}] has {len(steps)} steps and {len(values)} values")
            axes.plot(steps, values, markersize=3, **_style(styles.index(name), name))
        axes.set(title=panel, xlabel="training step")
        axes.grid(alpha=0.3)
    all_axes[0].set_ylabel(ylabel)
    handles = {
        label: handle for axes in all_axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title or "")
    return save(figure, path)


def _style(i: int, name: str) -> dict[str, Any]:
    return {"label": name, "color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}


def _shares(name: str, values: Array) -> npt.NDArray[np.float64]:
    values_K = np.asarray(values, dtype=np.float64)
    if values_K.ndim != 1 or not np.all(values_K >= 0) or values_K.sum() <= 0:
        raise ValueError(f"counts[{name!r}] must be a vector of numbers of tokens, not all 0, got {values!r}")
    shares_K: npt.NDArray[np.float64] = values_K / values_K.sum()
    return shares_K


def _integer_ticks(axis: Any, size: int) -> None:
    axis.set_ticks(np.arange(0, size, max(1, -(-size // 16))))


def _require_some(mapping: Mapping[str, Any], name: str) -> None:
    if not mapping:
        raise ValueError(f"{name} is empty: there is nothing to draw")


def new_figure(width: float, height: float) -> Any:
    """A figure made without pyplot, whose backend and list of open figures stay untouched."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Any, path: str | os.PathLike[str]) -> Path:
    """As SVG if the path ends in .svg, otherwise as PNG."""
    import matplotlib

    target, content = Path(path), io.BytesIO()
    if target.suffix.lower() != ".svg":
        figure.savefig(content, dpi=150, format="png")
    else:
        with matplotlib.rc_context({"svg.hashsalt": "circuitroute"}):
            figure.savefig(content, format="svg", metadata={"Date": None})  # the same figure is the same file
    write_bytes(target, content.getvalue())
    return target
