"""Figures from arrays: each function draws one, saves it and returns its path. Needs the `plot` extra.

Shapes: L layers, E experts, K the largest count.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

# Okabe and Ito's colours, told apart under every common colour blindness; markers for print.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
DPI = 150
Array = npt.ArrayLike


def validation_curves(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    path: str | os.PathLike[str],
    *,
    ylabel: str = "validation loss",
    title: str | None = None,
) -> Path:
    """One line per name, name -> (steps, values). Raises ValueError when there is none or lengths differ."""
    _require_some(curves, "curves")
    figure = new_figure(7.0, 4.2)
    axes = figure.subplots()
    for i, (name, (steps, values)) in enumerate(curves.items()):
        if len(steps) != len(values):
            raise ValueError(f"curves[{name!r}] has {len(steps)} steps and {len(values)} values")
        axes.plot(
            steps,
            values,
            label=name,
            color=COLORS[i % len(COLORS)],
            marker=MARKERS[i % len(MARKERS)],
            markersize=4,
        )
    axes.set(xlabel="training step", ylabel=ylabel, title=title or "")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return _save(figure, path)


def utilization_heatmaps(
    utilization: Mapping[str, Array], path: str | os.PathLike[str], *, title: str | None = None
) -> Path:
    """One panel per name, name -> [L, E], the fraction of tokens that use each expert, on one colour scale.

    Raises ValueError when there is none or one is not a matrix.
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
    return _save(figure, path)


def executed_histogram(counts: Mapping[str, Array], path: str | os.PathLike[str], *, title: str | None = None) -> Path:
    """How many experts tokens execute, a group of bars per count: name -> [K + 1], the tokens with 0, 1, ...,
    K.

    Raises ValueError when there is none or one is not a vector of non-negative numbers with a positive sum.
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
    axes.set(
        xlabel="experts executed",
        ylabel="fraction of tokens",
        title=title or "Executed experts per token",
    )
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(frameon=False)
    return _save(figure, path)


def _shares(name: str, values: Array) -> npt.NDArray[np.float64]:
    values_K = np.asarray(values, dtype=np.float64)
    if values_K.ndim != 1 or not np.all(values_K >= 0) or values_K.sum() <= 0:
        raise ValueError(f"counts[{name!r}] must be a vector of numbers of tokens, not all 0, got {values!r}")
    shares_K: npt.NDArray[np.float64] = values_K / values_K.sum()
    return shares_K


def _integer_ticks(axis: Any, size: int) -> None:
    axis.set_ticks(np.arange(0, size, max(1, -(-size // 16))))


def new_figure(width: float, height: float) -> Any:
    """A figure of its own: no pyplot, so neither its backend nor its list of open figures is touched."""
    try:
        figure = import_module("matplotlib.figure")
    except ImportError as error:
        raise ImportError(
            f"circuitroute.plots needs matplotlib ({error}): pip install 'circuitroute[plot]'",
            name="matplotlib",
        ) from error
    return figure.Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    figure.savefig(target, dpi=DPI, format="png")
    return target


def _require_some(mapping: Mapping[str, Any], name: str) -> None:
    if not mapping:
        raise ValueError(f"{name} is empty: there is nothing to draw")
