"""Means over seeds, and differences to the baseline with the same seed, which leave out what a seed has in common."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

Row = dict[str, Any]
MEASURES = (
    "agreement",
    "dead",
    "load_entropy",
    "executed",
    "count_correlation",
    "purity",
    "cpu_ratio",
)


class Paired(NamedTuple):
    """Over seeds: the mean of (error - baseline's), its standard deviation (NaN for one seed), the mean and standard
    deviation of the same as a share of the baseline's, and with how many seeds the error is smaller."""

    difference: float
    spread: float
    relative: float
    relative_spread: float
    wins: int


def pair(errors: Sequence[float], baselines: Sequence[float]) -> Paired:
    """Errors of two methods, seed by seed."""
    differences = [error - baseline for error, baseline in zip(errors, baselines, strict=True)]
    shares = [difference / baseline for difference, baseline in zip(differences, baselines, strict=True)]
    wins = sum(difference < 0 for difference in differences)
    return Paired(fmean(differences), _spread(differences), fmean(shares), _spread(shares), wins)


def summarise(rows: Iterable[Row]) -> list[Row]:
    """One row per shape and method, in the order they came in; the first method of a shape is its baseline.

    Seeds that the baseline lacks are left out.
    """
    groups: dict[tuple[str, str], dict[int, Row]] = {}
    for row in rows:
        groups.setdefault((row["shape"], row["method"]), {})[row["seed"]] = row
    baselines: dict[str, dict[int, Row]] = {}
    for (shape, _), found in groups.items():
        baselines.setdefault(shape, found)
    return [_summary(shape, method, found, baselines[shape]) for (shape, method), found in groups.items()]


def _summary(shape: str, method: str, found: dict[int, Row], baseline: dict[int, Row]) -> Row:
    seeds = sorted(found.keys() & baseline.keys())
    errors = [found[seed]["error"] for seed in seeds]
    paired = pair(errors, [baseline[seed]["error"] for seed in seeds])
    means = {name: _mean([found[seed][name] for seed in seeds]) for name in MEASURES}
    return {
        "shape": shape,
        "method": method,
        "seeds": len(seeds),
        "error": fmean(errors),
        "error_spread": _spread(errors),
        "paired": None if found is baseline else paired,
        **means,
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _spread(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else math.nan
