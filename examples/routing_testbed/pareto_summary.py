"""What rows of the Pareto table say together: means over seeds, and differences to top-k at the same number of experts.

Legend: L layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from statistics import fmean

from .pairing import Row, mean_of_known, pair, spread
from .pareto import BASELINE, METHODS

Curve = Sequence[tuple[float, float]]  # (experts executed, error), from the fewest experts on


def summarise(rows: Iterable[Row]) -> list[Row]:
    """One row per teacher, method and budget, in the order of the methods and from the smallest budget on.

    ``paired`` compares the error with top-k's of the same seed at the same number of executed experts. Seeds for which
    top-k is missing, or that execute fewer or more than it did anywhere, are left out there; None where none is left.
    """
    ordered = sorted(rows, key=lambda row: (row["shape"], list(METHODS).index(row["method"]), row["budget"]))
    groups: dict[tuple[str, str, float], list[Row]] = {}
    for row in ordered:
        groups.setdefault((row["shape"], row["method"], row["budget"]), []).append(row)
    curves = _curves(ordered)
    found = [
        {"shape": shape, "method": method, "budget": budget, **_summary(group, curves)}
        for (shape, method, budget), group in groups.items()
    ]
    for row in found:
        row["front"] = not any(_beats(other, row) for other in found if other["shape"] == row["shape"])
    return found


def at(curve: Curve, executed: float) -> float | None:
    """The error along straight lines between the points of a curve; None beyond its ends."""
    for (left, higher), (right, lower) in pairwise(curve):
        if left <= executed <= right:
            return higher + (lower - higher) * (executed - left) / (right - left)
    return None


def _curves(rows: Iterable[Row]) -> dict[tuple[str, int], list[tuple[float, float]]]:
    """Top-k's, for each teacher and seed."""
    curves: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for row in rows:
        if row["method"] == BASELINE:
            curves.setdefault((row["shape"], row["seed"]), []).append((row["executed"], row["error"]))
    return {key: sorted(curve) for key, curve in curves.items()}


def _summary(group: Sequence[Row], curves: dict[tuple[str, int], list[tuple[float, float]]]) -> Row:
    errors = [row["error"] for row in group]
    later = [row["layers"][-1] - row["layers"][0] for row in group]
    beside = [(row["error"], at(curves.get((row["shape"], row["seed"]), []), row["executed"])) for row in group]
    pairs = [(error, other) for error, other in beside if other is not None]
    isolated = not pairs or group[0]["method"] == BASELINE
    return {
        "seeds": len(group),
        "error": fmean(errors),
        "error_spread": spread(errors),
        "executed": fmean(row["executed"] for row in group),
        "executed_spread": spread([row["executed"] for row in group]),
        "paired": None if isolated else pair([one for one, _ in pairs], [other for _, other in pairs]),
        "pairs": len(pairs),
        "layers": _by_layer(group, "layers"),
        "teacher_layers": _by_layer(group, "teacher_layers"),
        "later": fmean(later),
        "later_spread": spread(later),
        "count_correlation": mean_of_known([row["count_correlation"] for row in group]),
    }


def _by_layer(group: Sequence[Row], name: str) -> list[float]:
    """[L] means over seeds."""
    return [fmean(layer) for layer in zip(*(row[name] for row in group), strict=True)]


def _beats(one: Row, other: Row) -> bool:
    """Whether one has less error, in the mean, with no more experts."""
    return bool(one["error"] < other["error"] and one["executed"] <= other["executed"])
