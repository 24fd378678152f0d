"""How gradients cross a sample: estimators turn a sampled mask into a differentiable one.

Legend: T tokens, E experts; z the sampled 0/1 mask, m the exact marginals.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from circuitroute._tensors import batchable, traced, tracked, transformed
from circuitroute._validate import as_real
from circuitroute.inference.distribution import SubsetDistribution


@runtime_checkable
class Estimator(Protocol):
    """Anything with this method can be passed as ``estimator`` to :func:`circuitroute.route`."""

    def __call__(self, mask: Tensor, distribution: SubsetDistribution) -> Tensor:
        """A tensor [T, E] equal to ``mask`` in value, with the estimator's gradient in the logits."""
        ...


class Simple:
    """SIMPLE (Ahmed et al. 2023, arXiv:2210.01941): forward z, backward the exact marginals m.

    g = z + m - stopgrad(m). ProbMoE routes with g * softmax(logits) (arXiv:2606.01509).
    """

    def __call__(self, mask: Tensor, distribution: SubsetDistribution) -> Tensor:
        """See :class:`Estimator`."""
        if not tracked(distribution.logits, distribution.count_potential):
            return mask
        marginals = distribution.marginals
        if traced(marginals) or transformed():
            return mask + (marginals - marginals.detach())
        through: Tensor = _StraightThrough.apply(mask, marginals)  # type: ignore[no-untyped-call]
        return through

    def __repr__(self) -> str:
        return "Simple()"


class _StraightThrough(torch.autograd.Function):
    """z + m - stopgrad(m) without the arithmetic, which a compiler would fuse: three passes over memory."""

    @staticmethod
    def forward(ctx: Any, mask: Tensor, marginals: Tensor) -> Tensor:
        return mask.view_as(mask)

    @staticmethod
    @batchable
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor]:
        return None, upstream


class Score:
    """Score function (REINFORCE): the mask itself carries no gradient; the loss gets a term that does.

    The gates are differentiable through their weights only. Add :func:`score_function_loss` of the routing's
    ``log_prob`` and the per-token cost to the loss to make up for it.
    """

    def __call__(self, mask: Tensor, distribution: SubsetDistribution) -> Tensor:
        """See :class:`Estimator`."""
        return mask

    def __repr__(self) -> str:
        return "Score()"


class NoEstimator(Score):
    """No gradient crosses the sample: the usual top-k router's rule."""

    def __repr__(self) -> str:
        return "NoEstimator()"


class Dense(NoEstimator):
    """DenseMixer's (Yao et al. 2025): forward the decision, backward as if every expert were used with its weight.

    It replaces the weights' gradient rather than the mask's, see :func:`circuitroute.routing.weights.weigh`, and wants
    every expert to be run: ``cr.MoE(..., probes="all")``.
    """

    def __repr__(self) -> str:
        return "Dense()"


_BY_NAME: dict[str, Estimator] = {"simple": Simple(), "score": Score(), "none": NoEstimator(), "dense": Dense()}


def as_estimator(estimator: str | Estimator) -> Estimator:
    """The estimator of that name, or the one given.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a name nor callable.
    """
    if isinstance(estimator, str):
        if estimator not in _BY_NAME:
            raise ValueError(f"estimator={estimator!r}: choose one of {', '.join(map(repr, _BY_NAME))}")
        return _BY_NAME[estimator]
    if not callable(estimator):
        raise TypeError(f"estimator={estimator!r}: expected a name or a callable (mask, distribution) -> mask")
    return estimator


def name_of(estimator: str | Estimator) -> str | None:
    """The name that :func:`as_estimator` knows it by; None for one of the user's own, a subclass of ours included."""
    if isinstance(estimator, str):
        return estimator
    return next((name for name, known in _BY_NAME.items() if type(known) is type(estimator)), None)


def score_function_loss(log_prob: Tensor, cost: Tensor, dim: int = 0) -> Tensor:
    """A scalar whose gradient is the score-function estimate of that of the expected cost.

    Per entry (cost - baseline) * log_prob, averaged; the baseline is the mean cost of the *other* entries along
    ``dim`` (leave-one-out; Kool, van Hoof & Welling 2019, "Buy 4 REINFORCE samples, get a baseline for free"),
    which leaves the estimate unbiased when those entries were sampled independently of this one and their costs do
    not depend on its subset. With several samples of the same tokens stacked along ``dim`` that always holds;
    with ``dim`` running over tokens it holds where tokens do not influence one another's cost.

    Use it beside the loss that trains the rest::

        routing = cr.route(logits, circuit, estimator="score")
        loss_per_token = ...                                 # [T], from the model
        loss = loss_per_token.mean() + score_function_loss(routing.log_prob, loss_per_token)

    Args:
        log_prob: [...] log-probability of the sampled subsets, differentiable in the logits.
        cost: the same shape; taken as constant.
        dim: the dimension along which samples are independent; at least two entries.

    Raises:
        ValueError: shapes differ, or ``dim`` has fewer than two entries.
    """
    log_prob, cost = as_real("log_prob", log_prob, floating=True), as_real("cost", cost, floating=True)
    if log_prob.shape != cost.shape:
        raise ValueError(f"cost has shape {tuple(cost.shape)}: it must be that of log_prob, {tuple(log_prob.shape)}")
    count = cost.shape[dim] if cost.dim() else 1
    if count < 2:
        raise ValueError(f"cost has {count} entries along dim={dim}: a leave-one-out baseline needs at least two")
    cost = cost.detach()
    baseline = (cost.sum(dim, keepdim=True) - cost) / (count - 1)
    return ((cost - baseline) * log_prob).mean()
