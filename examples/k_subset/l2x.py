"""Learning to explain: an explainer picks k of 10 features for every example, a predictor sees those alone.

The three synthetic sets of L2X (Chen et al. 2018, arXiv:1802.07814), made from their definitions; P(Y = 1 | X) is
known, and is what is explained. The functions are those of the code its authors publish, whose constants differ from
the paper's in the additive set.

Legend: R seeds, T examples, N features, S subsets per example.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import circuitroute as cr

from .estimators import METHODS, build
from .estimators.registry import Settings
from .fitting import Budget, Networks, minibatches, minimise, one_thread, rows_of

Row = dict[str, Any]

N, WIDTH = 10, 64
TRAIN, HELD_OUT = 20_000, 10_000
BUDGET = Budget(steps=600)
TUNING_SEED = 100
MOST_SUBSETS = 100  # that the exact gradient is asked to evaluate, where nobody asks for it


class Task(NamedTuple):
    """How many of the first features matter, and the logit of P(Y = 1 | X)."""

    k: int
    logit: Callable[[Tensor], Tensor]


TASKS = {
    "xor": Task(2, lambda x: -x[:, 0] * x[:, 1]),
    "orange-skin": Task(4, lambda x: 4 - x[:, :4].square().sum(-1)),
    "additive": Task(
        4, lambda x: 100 * (0.2 * x[:, 0]).sin() - x[:, 1].abs() - x[:, 2] - (-x[:, 3]).exp() + 2.4
    ),
}  # fmt: skip


class Data(NamedTuple):
    """Standard normal features [T, N] and the probabilities [T] of Y = 1."""

    features: Tensor
    probability: Tensor


def make_data(name: str, rows: int, seed: int) -> Data:
    features = torch.randn(rows, N, generator=torch.Generator().manual_seed(seed))
    return Data(features, TASKS[name].logit(features).sigmoid())


def run(
    names: Sequence[str] = tuple(TASKS),
    methods: Sequence[str] | None = None,
    seeds: Sequence[int] = range(5),
    budget: Budget = BUDGET,
    tune: bool = True,
) -> Iterator[list[Row]]:
    """A row per set, method and seed, in groups as they are found; settings are chosen by the held-out loss of one
    fit with a seed of its own."""
    for name in names:
        for method in usual_methods(name) if methods is None else methods:
            settings, tries = tuned(name, method, budget) if tune else (METHODS[method].few[0], 0)
            yield [{**row, "settings_tried": tries} for row in fit(name, method, settings, seeds, budget)]


def usual_methods(name: str) -> list[str]:
    """All but SFESS without a baseline, which is there for the gradients alone, and enumeration of many subsets."""
    left_out = {"sfess"} if math.comb(N, TASKS[name].k) <= MOST_SUBSETS else {"sfess", "exact"}
    return [method for method in METHODS if method not in left_out]


def tuned(name: str, method: str, budget: Budget) -> tuple[Settings, int]:
    """The settings with the least held-out loss, and among how many they were found."""
    grid = METHODS[method].few
    if len(grid) == 1:
        return grid[0], 0
    losses = [fit(name, method, settings, [TUNING_SEED], budget)[0]["loss"] for settings in grid]
    return grid[losses.index(min(losses))], len(grid)


@one_thread()
def fit(name: str, method: str, settings: Settings, seeds: Sequence[int], budget: Budget) -> list[Row]:
    """Explainers and predictors, trained together and measured on examples that neither has seen: a row for each
    seed."""
    k = TASKS[name].k
    features, probability = _stacked(name, TRAIN, [2 * seed for seed in seeds])
    explainer = Networks(seeds, N, WIDTH, WIDTH, N)
    predictor = Networks([1000 + seed for seed in seeds], N, WIDTH, WIDTH, 1)  # not the explainer's own weights
    circuit = cr.compile(cr.Exactly(k), N)
    estimator = build(method, circuit, settings)

    def loss(indices: Tensor) -> Tensor:
        seen, truth = rows_of(features, indices), rows_of(probability, indices)

        def cost(mask: Tensor) -> Tensor:
            prediction = predictor(mask.unflatten(1, truth.shape) * seen)[..., 0]
            return cross_entropy(prediction, truth).flatten(1)

        return estimator(explainer(seen).flatten(0, 1), cost, budget.evaluations)

    seconds = minimise([explainer, predictor], loss, minibatches(seeds, TRAIN, budget), budget)
    features, probability = _stacked(name, HELD_OUT, [2 * seed + 1 for seed in seeds])
    with torch.no_grad():
        logits = explainer(features)
        mask = circuit(logits).mode
        prediction = predictor(mask * features)[..., 0]
    head = {"table": "l2x", "set": name, "method": method, "settings": settings, "cpu_seconds": seconds / len(seeds)}
    return [
        {**head, "seed": seed, **measures(logits[at], mask[at], prediction[at], probability[at], k)}
        for at, seed in enumerate(seeds)
    ]


def _stacked(name: str, rows: int, seeds: Sequence[int]) -> Data:
    """[R, T, N] and [R, T], a set for each seed."""
    sets = [make_data(name, rows, seed) for seed in seeds]
    return Data(torch.stack([data.features for data in sets]), torch.stack([data.probability for data in sets]))


def cross_entropy(logit: Tensor, probability: Tensor) -> Tensor:
    """[...] nats, -E log q(Y), with Y of its true probability."""
    return F.binary_cross_entropy_with_logits(logit, probability.expand_as(logit), reduction="none")


def measures(logits: Tensor, mask: Tensor, prediction: Tensor, probability: Tensor, k: int) -> Row:
    """``recovery``, the share of the true features among the selected; ``median_rank`` of the true ones by logit
    (L2X's; (k + 1) / 2 is the best), the mean over examples; ``loss``, held-out cross-entropy less the entropy of Y
    given all features, in nats; ``accuracy`` of the likelier label against that of the truth."""
    ranks = logits.argsort(-1, descending=True).argsort(-1)[:, :k].double() + 1
    entropy = cross_entropy(probability.logit(eps=1e-6), probability)
    return {
        "recovery": float(mask[:, :k].mean()),
        "median_rank": float(ranks.quantile(0.5, -1).mean()),
        "loss": float((cross_entropy(prediction, probability) - entropy).mean()),
        "accuracy": float(((prediction > 0) == (probability > 0.5)).double().mean()),
    }
