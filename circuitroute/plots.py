"""What figures share: colours, and a figure without pyplot. Needs the `plot` extra."""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Okabe and Ito's colours, distinct under every common colour blindness; markers for print.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")
DPI = 150


def new_figure(width: float, height: float) -> Any:
    """A figure made without pyplot, whose backend and list of open figures stay untouched."""
    try:
        figure = import_module("matplotlib.figure")
    except ImportError as error:
        remedy = f"circuitroute.plots needs matplotlib ({error}): pip install 'circuitroute[plot]'"
        raise ImportError(remedy, name="matplotlib") from error
    return figure.Figure(figsize=(width, height), layout="constrained")
