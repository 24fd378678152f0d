"""Kullback-Leibler divergence of two distributions on one circuit, registered with torch.distributions.

Legend: N variables, K the largest allowed count; m marginals, q count posterior.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import register_kl

from circuitroute.inference.distribution import SubsetDistribution, finite


@register_kl(SubsetDistribution, SubsetDistribution)  # type: ignore[untyped-decorator]
def _kl_subset_subset(p: SubsetDistribution, q: SubsetDistribution) -> Tensor:
    """KL(p || q) on one circuit: (theta - theta') . m + (phi - phi') . q - log Z + log Z'; +inf where q excludes
    something that p allows. Differentiable."""
    same = p.circuit is q.circuit or (p.circuit.constraint == q.circuit.constraint and p.circuit.n == q.circuit.n)
    if not same:
        raise NotImplementedError(
            f"KL between distributions on different circuits, {p.circuit!r} and {q.circuit!r}: make both from one"
        )
    m = p.marginals
    difference = finite(p.logits) - finite(q.logits)
    result = (difference * m).sum(-1) - p.log_partition + q.log_partition
    # Infinite where q rules out what p allows; rounding of a certain marginal does not count.
    slack = 16 * torch.finfo(m.dtype).eps
    outside = torch.where(q.logits == math.inf, 1 - m, torch.where(q.logits == -math.inf, m, 0.0)) > slack
    result = torch.where(outside.any(-1), math.inf, result)
    if p.count_potential is not None or q.count_potential is not None:
        result = result + _kl_potentials(p, q)
    return result


def _kl_potentials(p: SubsetDistribution, q: SubsetDistribution) -> Tensor:
    counts = p.count_probs
    ours = p.count_potential if p.count_potential is not None else torch.zeros_like(counts)
    theirs = q.count_potential if q.count_potential is not None else torch.zeros_like(counts)
    excluded = ((theirs == -math.inf) & (counts > 0)).any(-1)
    return torch.where(excluded, math.inf, ((finite(ours) - finite(theirs)) * counts).sum(-1))
