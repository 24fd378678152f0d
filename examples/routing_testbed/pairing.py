"""Means over seeds, and differences to the baseline with the same seed, which leave out what a seed has in common."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

Row = dict[str, Any]
MEASURES = ("agreement", "dead", "load_entropy", "executed", "count_correlation", "purity", "cpu_ratio")
GRADIENT_MEASURES = ("bias", "variance", "cosine_seen", "bias_seen")


class Paired(NamedTuple):
    """Over seeds: the mean of (a method's value - the baseline's), its standard deviation (NaN for one seed), the mean
    and standard deviation of the same as a share of the baseline's, and with how many seeds the value is smaller."""

    difference: float
    spread: float
    relative: float
    relative_spread: float
    wins: int


def pair(values: Sequence[float], baselines: Sequence[float]) -> Paired:
    """Two methods, seed by seed."""
    differences = [value - baseline for value, baseline in zip(values, baselines, strict=True)]
    shares = [difference / baseline for difference, baseline in zip(differences, baselines, strict=True)]
    wins = sum(difference < 0 for difference in differences)
    return Paired(fmean(differences), spread(differences), fmean(shares), spread(shares), wins)


def summarise(rows: Iterable[Row], measure: str = "error", others: Sequence[str] = MEASURES) -> list[Row]:
    """One row per shape and method, in the order they came in, with ``measure`` paired with the first method's.

    Seeds that the first method of a shape lacks are left out.
    """
    groups: dict[tuple[str, str], dict[int, Row]] = {}
    for row in rows:
        groups.setdefault((row["shape"], row["method"]), {})[row["seed"]] = row
    baselines: dict[str, dict[int, Row]] = {}
    for (shape, _), found in groups.items():
        baselines.setdefault(shape, found)
    return [
        {"shape": shape, "method": method, **_summary(found, baselines[shape], measure, others)}
        for (shape, method), found in groups.items()
    ]


def _summary(found: dict[int, Row], baseline: dict[int, Row], measure: str, others: Sequence[str]) -> Row:
    seeds = sorted(found.keys() & baseline.keys())
    values = [found[seed][measure] for seed in seeds]
    paired = pair(values, [baseline[seed][measure] for seed in seeds])
    return {
        "seeds": len(seeds),
        measure: fmean(values),
        f"{measure}_spread": spread(values),
        "paired": None if found is baseline else paired,
        **{name: mean_of_known([found[seed][name] for seed in seeds]) for name in others},
    }


def mean_of_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def spread(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else math.nan
