"""What the tests of routing share: constraints said twice, and the documented formulas of the gates.

References are float64 formulas over exact marginals and covariances from enumeration (:mod:`tests.truth`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import circuitroute as cr
from tests.truth import world_truth

INF, NAN = float("inf"), float("nan")
COMBINES = ("softmax", "normalized", "sigmoid", "marginal")
# "score" routes as "none" does; what it adds is a loss, see test_estimators.py.
ESTIMATORS = ("simple", "none")


class Case(NamedTuple):
    """A constraint over ``n`` experts, and the same said in NumPy."""

    constraint: cr.Constraint
    n: int
    accept: Callable[[Any], bool]

    @property
    def circuit(self) -> cr.Circuit:
        return cr.compile(self.constraint, self.n)


CASES = {
    "exactly": Case(cr.Exactly(3), 6, lambda z: z.sum() == 3),
    "one": Case(cr.Exactly(1), 5, lambda z: z.sum() == 1),
    "all": Case(cr.Exactly(4), 4, lambda z: z.all()),
    "between": Case(cr.Between(1, 3), 7, lambda z: 1 <= z.sum() <= 3),
    "atmost": Case(cr.AtMost(2), 6, lambda z: z.sum() <= 2),
    "atleast": Case(cr.AtLeast(4), 6, lambda z: z.sum() >= 4),
    "gap": Case(cr.CountIn({1, 4}), 6, lambda z: z.sum() in (1, 4)),
    "over": Case(cr.Exactly(1).over([0, 2, 3]), 5, lambda z: z[[0, 2, 3]].sum() == 1),
}
SOME = ("exactly", "atmost", "over")
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
# A fixed count, a free one that may be zero, and another engine: where every constraint would take long.
some_cases = pytest.mark.parametrize("case", [CASES[name] for name in SOME], ids=SOME)
every_combine = pytest.mark.parametrize("combine", COMBINES)
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def keys_of(tokens: int, seed: int = 0) -> Tensor:
    return cr.random_key(seed, torch.arange(tokens))


def reference_gates(logits: Tensor, mask: Tensor, case: Case, combine: str, estimator: str) -> Tensor:
    """The documented formulas in float64, the marginals given by their exact values and Jacobian."""
    theta = logits.double()
    truth = world_truth(theta, case.accept)
    step = theta - theta.detach()  # zero, and what the gradient flows through
    m = torch.from_numpy(truth.marginals) + torch.einsum("tij,tj->ti", torch.from_numpy(truth.covariance), step)
    g = mask.double()
    if estimator == "simple":
        g = g - m.detach() + m
    if combine == "softmax":
        return g * torch.softmax(theta, -1)
    if combine == "sigmoid":
        return g * torch.sigmoid(theta)
    if combine == "marginal":
        return g * m
    weights = g * torch.exp(theta)
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(mask.any(-1, keepdim=True), total, 1.0)


def gradient_of(output: Tensor, upstream: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((output * upstream.to(output)).sum(), inputs)
