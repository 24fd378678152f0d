"""What is drawn: the quantities of a log as columns of numbers, short enough for a picture.

Legend: S points along the steps, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from circuitroute.routing.runs import RunRecord
from circuitroute.routing.summary import ALL

Array: TypeAlias = npt.NDArray[np.float64]

# More points than a picture has pixels for are averaged.
MOST_POINTS = 400


class Quantity(NamedTuple):
    """A quantity of a summary, in words. `spread`: the quantity that is its standard deviation."""

    name: str
    title: str
    text: str
    spread: str | None = None


QUANTITIES = (
    Quantity("load_entropy", "Load entropy", "1 where all experts of a layer have the same load, 0 where one has all."),
    Quantity("max_violation", "Max violation", "How far the largest load is above the mean load, over the mean load."),
    Quantity(
        "experts_per_token",
        "Experts per token",
        "Executed experts in a layer; the band is one standard deviation over the tokens.",
        "experts_per_token_std",
    ),
    Quantity(
        "experts_per_path",
        "Experts per token, all layers",
        "Executed experts over all layers; the band is one standard deviation over the tokens.",
        "experts_per_path_std",
    ),
    Quantity("budget_use", "Budget use", "Executed experts over the most that the constraint, or the budget, allows."),
    Quantity("decision_entropy", "Entropy of the decision", "Of the distribution over subsets, in nats."),
    Quantity("mode_distance", "Distance of decisions from the mode", "0 where they are the mode, 1 where disjoint."),
    Quantity("mode_agreement", "Agreement with the mode", "The share of the mode that a sample is expected to choose."),
    Quantity("soft_mass", "Sum of the marginals", "The expected number of experts, or a soft router's mass."),
    Quantity("dead_experts", "Dead experts", "The share of the experts of a layer that no token used."),
    Quantity("invalid_tokens", "Invalid tokens", "The share with NaN, or with infinite logits that leave no subset."),
)
# Known, and told otherwise.
UNDRAWN = ("tokens", "experts_per_token_std", "experts_per_path_std")


class Curves(NamedTuple):
    """A quantity over the steps.

    Attributes:
        steps: [S].
        over_all: [S] as logged for all layers together, else the mean of what is logged; NaN where there is nothing.
        spread: [S] the standard deviation that belongs to it, or None.
        layers: the names of those that have it.
        each: [L, S].
    """

    steps: Array
    over_all: Array
    spread: Array | None
    layers: tuple[str, ...]
    each: Array


def quantities_of(record: RunRecord) -> list[Quantity]:
    """What a log has, known quantities first."""
    present = dict.fromkeys(name for step in record.steps for _, name in step.values)
    known = [quantity for quantity in QUANTITIES if quantity.name in present]
    told = {quantity.name for quantity in QUANTITIES} | set(UNDRAWN)
    others = [Quantity(name, name.replace("_", " ").capitalize(), "") for name in present if name not in told]
    # What is zero throughout is no news.
    return [q for q in known + others if q.name != "invalid_tokens" or _any(record, q.name)]


def _any(record: RunRecord, name: str) -> bool:
    return any(value for step in record.steps for (_, other), value in step.values.items() if other == name)


def layers_of(record: RunRecord, name: str | None = None) -> tuple[str, ...]:
    """The layers that have a quantity, or any, in the order in which they are logged."""
    found = (layer for step in record.steps for layer, other in step.values if name in (None, other))
    return tuple(layer for layer in dict.fromkeys(found) if layer != ALL)


def curves_of(record: RunRecord, quantity: Quantity) -> Curves:
    """A quantity over the steps."""
    layers = layers_of(record, quantity.name)
    columns = [_column(record, layer, quantity.name) for layer in layers]
    each = np.stack(columns) if columns else np.empty((0, len(record.steps)))
    over_all = _column(record, ALL, quantity.name)
    if len(layers):
        over_all = np.where(np.isnan(over_all), _mean(each, 0), over_all)
    spread = None if quantity.spread is None else _column(record, ALL, quantity.spread)
    if spread is not None and np.isnan(spread).all():
        spread = None
    steps = np.array([step.step for step in record.steps], dtype=np.float64)
    return Curves(
        _shortened(steps),
        _shortened(over_all),
        None if spread is None else _shortened(spread),
        layers,
        _shortened(each),
    )


def loss_of(record: RunRecord) -> Curves | None:
    """The loss over the steps, where there is one."""
    loss = np.array([np.nan if step.loss is None else step.loss for step in record.steps])
    if np.isnan(loss).all():
        return None
    steps = np.array([step.step for step in record.steps], dtype=np.float64)
    return Curves(_shortened(steps), _shortened(loss), None, (), np.empty((0, 0)))


def _column(record: RunRecord, layer: str, name: str) -> Array:
    return np.array([step.values.get((layer, name), np.nan) for step in record.steps], dtype=np.float64)


def _shortened(values: Array) -> Array:
    """Along the last axis, at most MOST_POINTS means of what is known."""
    count = values.shape[-1]
    if count <= MOST_POINTS:
        return values
    edges: Sequence[Any] = np.linspace(0, count, MOST_POINTS + 1).round().astype(int).tolist()
    parts = [_mean(values[..., start:stop], -1) for start, stop in pairwise(edges)]
    return np.stack(parts, axis=-1)


def _mean(values: Array, axis: int) -> Array:
    """Of what is not NaN; NaN where there is nothing."""
    known = ~np.isnan(values)
    count = known.sum(axis)
    total = np.where(known, values, 0.0).sum(axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
