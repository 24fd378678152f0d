"""What a student has learned, against its teacher.

Legend: T tokens, E experts, D domains.
"""

from __future__ import annotations

import torch
from torch import Tensor

import circuitroute as cr

from .task import Batch

DEAD = 0.01  # of the mean load


def measure(output: Tensor, routing: cr.Routing, batch: Batch) -> dict[str, float | None]:
    """All measures of a student's output and decision on held-out inputs; None where one has no meaning."""
    return {
        "error": normalised_error(output, batch.target).item(),
        "agreement": agreement(routing.mask, batch.mask),
        "dead": float(dead_experts(routing.mask)),
        "load_entropy": cr.metrics.load_entropy(routing),
        "executed": cr.metrics.active_experts(routing),
        "count_correlation": count_correlation(routing.mask, batch.mask),
        "purity": None if batch.domain is None else purity(routing.mask, batch.domain),
    }


def normalised_error(output: Tensor, target: Tensor) -> Tensor:
    """Squared error over the squared norm of the target: 1 for an output of zeros."""
    return (output - target).square().sum() / target.square().sum()


def agreement(student: Tensor, teacher: Tensor) -> float | None:
    """Share of choices [T, E] in common, experts matched one to one such that it is largest.

    Twice the common ones over the sum of both: the share of the teacher's where the counts are the same. None without
    scipy, which finds the matching.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        return None
    common = student.double().t() @ teacher.double()
    rows, columns = linear_sum_assignment(common.numpy(), maximize=True)
    return 2 * float(common[rows, columns].sum()) / float(student.sum() + teacher.sum())


def dead_experts(mask: Tensor) -> int:
    """How many experts have less than a hundredth of the mean load."""
    load = mask.sum(0).double()
    return int((load < DEAD * load.mean()).sum())


def count_correlation(student: Tensor, teacher: Tensor) -> float | None:
    """Correlation over tokens of how many experts they use; None where either count is constant."""
    counts = torch.stack([student.sum(-1), teacher.sum(-1)]).double()
    if bool((counts.std(-1) == 0).any()):
        return None
    return float(torch.corrcoef(counts)[0, 1])


def purity(mask: Tensor, domain: Tensor) -> float:
    """Of the choices [T, E], the share that comes from the domain its expert sees most."""
    of_domain = torch.nn.functional.one_hot(domain).double().t() @ mask.double()
    return float(of_domain.amax(0).sum() / of_domain.sum())
