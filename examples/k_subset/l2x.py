"""Learning to explain: an explainer picks k of 10 features for every example, a predictor sees those alone.

The three synthetic sets of L2X (Chen et al. 2018, arXiv:1802.07814), made from their definitions; P(Y = 1 | X) is
known, and is what is explained. The functions are those of the code its authors publish, whose constants differ from
the paper's in the additive set.

Legend: T examples, N features, S subsets per example.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import circuitroute as cr

from .estimators import METHODS, build
from .estimators.registry import Settings
from .fitting import Budget, minimise, network, one_thread

Row = dict[str, Any]

N, WIDTH = 10, 64
TRAIN, HELD_OUT = 20_000, 10_000
BUDGET = Budget(steps=600)
TUNING_SEED = 100
USUAL = tuple(name for name in METHODS if name != "sfess")  # without a baseline it is there for the gradients alone


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
    methods: Sequence[str] = USUAL,
    seeds: Sequence[int] = range(5),
    budget: Budget = BUDGET,
    tune: bool = True,
) -> Iterator[list[Row]]:
    """A row per set, method and seed, in groups as they are found; settings are chosen by the held-out loss of one
    fit with a seed of its own."""
    for name in names:
        for method in methods:
            settings, fits = tuned(name, method, budget) if tune else (METHODS[method].few[0], 0)
            yield [{**fit(name, method, settings, seed, budget), "tuning_fits": fits} for seed in seeds]


def tuned(name: str, method: str, budget: Budget) -> tuple[Settings, int]:
    """The settings with the least held-out loss, and how many fits it took to find them."""
    grid = METHODS[method].few
    if len(grid) == 1:
        return grid[0], 0
    losses = [fit(name, method, settings, TUNING_SEED, budget)["loss"] for settings in grid]
    return grid[losses.index(min(losses))], len(grid)


@one_thread()
def fit(name: str, method: str, settings: Settings, seed: int, budget: Budget) -> Row:
    """Explainer and predictor, trained together and measured on examples that neither has seen."""
    task, train, test = TASKS[name], make_data(name, TRAIN, 2 * seed), make_data(name, HELD_OUT, 2 * seed + 1)
    torch.manual_seed(seed)
    explainer, predictor = network(N, WIDTH, WIDTH, N), network(N, WIDTH, WIDTH, 1)
    circuit = cr.compile(cr.Exactly(task.k), N)
    estimator = build(method, circuit, settings)

    def loss(indices: Tensor) -> Tensor:
        features, probability = train.features[indices], train.probability[indices]

        def cost(mask: Tensor) -> Tensor:
            return cross_entropy(predictor(mask * features)[..., 0], probability)

        return estimator(explainer(features), cost, budget.evaluations)

    seconds = minimise([*explainer.parameters(), *predictor.parameters()], TRAIN, loss, budget)
    with torch.no_grad():
        logits = explainer(test.features)
        mask = circuit(logits).mode
        prediction = predictor(mask * test.features)[..., 0]
    return {
        "table": "l2x",
        "set": name,
        "method": method,
        "seed": seed,
        "settings": settings,
        **measures(logits, mask, prediction, test.probability, task.k),
        "cpu_seconds": seconds,
    }


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
