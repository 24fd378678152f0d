"""With what weights: the chosen experts' gates, which carry the estimator's gradient.

Legend: T tokens, E experts; z the 0/1 mask of the chosen experts, g the estimator's version of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from circuitroute._tensors import cannot_look, without_autocast
from circuitroute._validate import one_of
from circuitroute.engines import certainly_finite
from circuitroute.engines.combine import evidence_log_softmax, evidence_softmax, relative
from circuitroute.engines.step import COMBINES as COMBINES
from circuitroute.engines.step import Combine as Combine
from circuitroute.routing.decision import Decision
from circuitroute.routing.estimators import Dense, Estimator, as_estimator


def weigh(
    decision: Decision, *, combine: Combine, estimator: str | Estimator = "simple", logits: Tensor | None = None
) -> Tensor:
    """[T, E] the gates of a decision: 0 off the chosen set, NaN in invalid rows.

    Args:
        decision: which experts; see :func:`circuitroute.routing.choice.decide`.
        combine, estimator: see :func:`circuitroute.route`.
        logits: [T, E], what to weigh by, where that is not what was decided on: a host that shifts its logits for the
            choice weighs by the unshifted ones.
    """
    with without_autocast(decision.mask):
        g = estimated_mask(decision, estimator)
        # Not a property of the decision: torch 2.6 cannot trace those of a named tuple.
        finite = logits is None and decision.untempered.rows.finite
        logits = decision.logits if logits is None else logits.to(g.dtype)
        if decision.invalid is not None:  # a gradient of 0 times NaN would be NaN
            logits = torch.where(decision.invalid[:, None], 0.0, logits)
        if isinstance(as_estimator(estimator), Dense):
            gates = _dense(decision, logits, combine)
        elif combine == "marginal":
            gates = g * decision.distribution.marginals
        else:
            gates = weigh_by_logits(g, decision.mask, logits, combine, finite)
    return gates if decision.invalid is None else torch.where(decision.invalid[:, None], torch.nan, gates)


def estimated_mask(decision: Decision, estimator: str | Estimator) -> Tensor:
    """[T, E] g: the mask in value, with the estimator's gradient."""
    distribution = decision.distribution
    return as_estimator(estimator)(decision.mask.to(distribution.logits.dtype), distribution)


def as_combine(combine: Combine) -> Combine:
    """``combine``, or a ValueError that lists the known ones."""
    return one_of("combine", combine, COMBINES)


def weigh_by_logits(g: Tensor, mask: Tensor, logits: Tensor, combine: Combine, finite: bool = False) -> Tensor:
    """[T, E] g times each expert's weight, for the rules that take it from the logits.

    Args:
        finite: whether all logits are known to be finite.
    """
    if combine == "softmax":
        return g * (torch.softmax(logits, -1) if finite else expert_softmax(logits))
    if combine == "sigmoid":
        return g * torch.sigmoid(logits)
    return _normalized(g, mask, logits)


def expert_softmax(logits: Tensor) -> Tensor:
    """[T, E] softmax over all experts; forced ones (+inf) share all of it, and a row of -inf is left uniform."""
    if not cannot_look(logits) and certainly_finite(logits):
        return torch.softmax(logits, -1)
    return evidence_softmax(logits)


def _dense(decision: Decision, logits: Tensor, combine: Combine) -> Tensor:
    """The gates with DenseMixer's gradient: every expert's own weight, which in value only the chosen ones have.

    Normalised over the chosen, the others' weights are over the same sum, taken as constant (its "partscale" rule).
    """
    mask = decision.mask
    if combine == "normalized":
        return _dense_normalized(mask, logits)
    if combine == "marginal":
        weights = decision.distribution.marginals
    elif combine == "sigmoid":
        weights = torch.sigmoid(logits)
    else:
        weights = expert_softmax(logits)
    return torch.where(mask, weights, weights - weights.detach())


def _dense_normalized(mask: Tensor, logits: Tensor) -> Tensor:
    """[T, E] w / sum of the chosen w, w the softmax over all experts; of the unchosen, the gradient alone.

    The chosen may have next to none of the softmax, so it is not divided by what they have: the chosen are relative to
    their largest, and an unchosen w / sum is its value, taken as constant, times exp(log w - stopgrad(log w)). Nor is
    log w taken of w, which underflows where an unchosen expert is as unlikely as the chosen: w / sum is not small then.
    """
    log_weights = evidence_log_softmax(logits)
    with torch.no_grad():
        ratio = relative(mask, logits)
        total = torch.where(mask, ratio, 0.0).sum(-1, keepdim=True)
        ratio = torch.where(total > 0, ratio / total.clamp(min=1.0), log_weights.exp())
    possible = ~mask & torch.isfinite(log_weights) & torch.isfinite(logits)
    log_weights = torch.where(possible, log_weights, 0.0)
    through = ratio * (log_weights - log_weights.detach()).exp() - ratio
    return torch.where(possible, through, _normalized(mask.to(logits.dtype), mask, logits))


def _normalized(g: Tensor, mask: Tensor, logits: Tensor) -> Tensor:
    """Softmax over the chosen experts, written with g so that its gradient reaches the unchosen ones."""
    weights = g * relative(mask, logits)
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total > 0, total, 1.0)
