"""Means over seeds, and differences to the best peer with the same seed, which leave out what a seed has in common."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from statistics import fmean, stdev
from typing import Any

from .estimators import METHODS

Row = dict[str, Any]


class Spread(float):
    """A mean over seeds that remembers its standard deviation."""

    spread: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        found = cls(fmean(values))
        found.spread = stdev(values) if len(values) > 1 else math.nan
        return found

    def text(self, form: str) -> str:
        mean = format(float(self), form)
        return mean if math.isnan(self.spread) else f"{mean} ± {format(self.spread, form.lstrip('+'))}"


def by_method(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of every method by seed, methods in the order of tables; the peers' usual divergence is one more."""
    order = list(METHODS)

    def place(row: Row) -> tuple[int, bool]:
        return order.index(row["method"]), row.get("divergence") == "categorical"

    ordered = sorted(rows, key=lambda row: (*place(row), row["seed"]))
    return {_label(group[0]): group for group in (list(found) for _, found in groupby(ordered, key=place))}


def _label(row: Row) -> str:
    return f"{row['method']}, categorical KL" if row.get("divergence") == "categorical" else str(row["method"])


def best_peer(groups: dict[str, list[Row]], measure: str, sign: int = 1) -> str | None:
    """The method of other papers with the least mean (the largest with sign -1); None where there is none."""
    peers = [name for name, rows in groups.items() if not METHODS[rows[0]["method"]].ours]
    return min(peers, key=lambda name: sign * fmean(row[measure] for row in groups[name]), default=None)


def paired(rows: Sequence[Row], others: Sequence[Row], measure: str) -> Spread:
    """The mean difference, seed by seed."""
    other = {row["seed"]: row[measure] for row in others}
    return Spread.of([row[measure] - other[row["seed"]] for row in rows])
