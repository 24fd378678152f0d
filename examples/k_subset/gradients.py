"""Bias, variance and direction of every estimator's gradient, against the exact one by enumeration.

The problems are those of SIMPLE's own experiment: n = 10, k = 5, theta and b standard normal numbers of numpy's
RandomState(seed), b by absolute value, with the paper's ten seeds, and the loss ||z - b||^2; beside them two more
losses, and theta scaled, which makes the distribution flatter or more certain.

Legend: D draws, S subsets per draw, N variables.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import circuitroute as cr

from .estimators import METHODS, Estimator, Loss, build
from .estimators.registry import Settings

Row = dict[str, Any]

N, K = 10, 5
SEEDS = (1234, 1067, 9198, 9453, 6240, 7044, 1755, 7898, 3131, 1277)
TUNING_SEEDS = (1, 2, 3)  # problems that settings are chosen on, and nothing else
SCALES = (0.5, 1.0, 2.0, 4.0)
HIDDEN = 32
BUDGET_OF_SCALES = 4
DRAWN = tuple(name for name in METHODS if name != "exact")  # which is the truth
DRAWS = {1: 10_000, 4: 2_500, 32: 500}  # by how many evaluations a draw may use


class Problem(NamedTuple):
    """A distribution and a loss over its subsets."""

    logits: Tensor  # [N]
    loss: Loss


def problem(family: str, scale: float, seed: int) -> Problem:
    """Of the family ``linear`` (b'z), ``quadratic`` (||z - b||^2) or ``network`` (a random network of one layer)."""
    random = np.random.RandomState(seed)
    logits = torch.from_numpy(scale * random.randn(N)).float()
    target = torch.from_numpy(abs(random.randn(N))).float()
    weights = torch.from_numpy(random.randn(N, HIDDEN) / N**0.5 * 2).float()
    readout = torch.from_numpy(random.randn(HIDDEN) / HIDDEN**0.5).float()
    losses: dict[str, Loss] = {
        "linear": lambda mask: mask @ target,
        "quadratic": lambda mask: (mask - target).square().sum(-1),
        "network": lambda mask: ((mask - 0.5) @ weights).tanh() @ readout,
    }
    return Problem(logits, losses[family])


FAMILIES = ("linear", "quadratic", "network")


def exact_gradient(given: Problem) -> Tensor:
    """[N] float64."""
    leaf = given.logits.double().requires_grad_()
    circuit = cr.compile(cr.Exactly(K), N)
    cost = given.loss(circuit(given.logits).enumerate_support()).double()  # [M]
    expected = (circuit(leaf).log_prob(circuit(leaf).enumerate_support()).exp() * cost).sum()
    return torch.autograd.grad(expected, leaf)[0]


def drawn_gradients(given: Problem, estimator: Estimator, evaluations: int, draws: int) -> Tensor:
    """[D, N] float64: each row is a problem of its own, so that one call makes all draws."""
    leaf = given.logits.repeat(draws, 1).requires_grad_()
    (gradient,) = torch.autograd.grad(estimator(leaf, given.loss, evaluations), leaf)
    return draws * gradient.double()


def quality(draws: Tensor, exact: Tensor) -> Row:
    """The paper's three measures by direction, and bias and variance by length, relative to the exact gradient.

    Returns: ``bias``, 1 - cosine of the mean with the exact gradient; ``variance``, of the draws' cosine with the mean;
    ``error``, the mean of 1 - cosine of a draw with the exact gradient, and ``error_spread``, its standard deviation;
    ``relative_bias`` |mean - exact| / |exact|, of which noise of the mean is left out; ``relative_variance``, E|draw
    - mean|^2 / |exact|^2. A draw of zero has cosine 0, as in torch.
    """
    mean, size = draws.mean(0), float(exact.square().sum())
    noise = float(draws.var(0).sum())
    error = 1 - _cosine(draws, exact)
    squared = float((mean - exact).square().sum()) - noise / len(draws)
    return {
        "bias": float(1 - _cosine(mean[None], exact)),
        "variance": float(_cosine(draws, mean).var()),
        "error": float(error.mean()),
        "error_spread": float(error.std()),
        "relative_bias": (max(squared, 0.0) / size) ** 0.5,
        "relative_variance": noise / size,
    }


def _cosine(draws: Tensor, reference: Tensor) -> Tensor:
    return torch.cosine_similarity(draws, reference[None], dim=-1)


def tuned(name: str, family: str, scale: float, evaluations: int, draws: int) -> Settings:
    """The settings with the least mean error on the tuning problems."""
    grid = METHODS[name].grid
    if len(grid) == 1:
        return grid[0]
    return min(grid, key=lambda settings: _tuning_error(name, settings, family, scale, evaluations, draws))


def _tuning_error(name: str, settings: Settings, family: str, scale: float, evaluations: int, draws: int) -> float:
    estimator = build(name, cr.compile(cr.Exactly(K), N), settings)
    errors = []
    for seed in TUNING_SEEDS:
        given = problem(family, scale, seed)
        torch.manual_seed(seed)
        errors.append(quality(drawn_gradients(given, estimator, evaluations, draws), exact_gradient(given))["error"])
    return fmean(errors)


def run(
    families: Sequence[str] = FAMILIES,
    methods: Sequence[str] = DRAWN,
    scales: Sequence[float] = SCALES,
    seeds: Sequence[int] = SEEDS,
    draws: Mapping[int, int] = DRAWS,
) -> Iterator[list[Row]]:
    """A row per family, scale, budget of evaluations, method and seed, in groups as they are found.

    All budgets at scale 1; one at the others, without the linear loss, where scale makes no difference.
    """
    for family in families:
        for scale in scales:
            for budget, count in draws.items():
                if scale == 1 or (family != "linear" and budget == BUDGET_OF_SCALES):
                    for name in methods:
                        if METHODS[name].least <= budget:
                            yield _study(name, family, scale, budget, seeds, count)


def _study(name: str, family: str, scale: float, budget: int, seeds: Sequence[int], draws: int) -> list[Row]:
    settings = tuned(name, family, scale, budget, max(draws // 10, 2))
    estimator = build(name, cr.compile(cr.Exactly(K), N), settings)
    found = []
    for seed in seeds:
        given = problem(family, scale, seed)
        torch.manual_seed(seed)
        began = time.process_time()
        gradients = drawn_gradients(given, estimator, budget, draws)
        seconds = time.process_time() - began
        head = {"table": "gradients", "family": family, "scale": scale, "evaluations": budget, "method": name}
        tail = {"seed": seed, "settings": settings, "draws": draws, "cpu_seconds": seconds}
        found.append({**head, **tail, **quality(gradients, exact_gradient(given))})
    return found
