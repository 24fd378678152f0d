"""The most probable subset of the count family: for every count the top logits are best, so only the count is open.

Legend: T tokens, N variables, J = K + 1 counts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def best_scores(logits_TN: Tensor, potential: Tensor) -> tuple[Tensor, Tensor]:
    """The log weight of the best subset of every count, [T, J] float64, and the logits' decreasing order [T, N].

    Args:
        logits_TN: [T, N] without NaN.
        potential: [J] or [T, J] log potentials of the counts, -inf where not allowed.
    """
    order = logits_TN.sort(dim=-1, descending=True, stable=True)
    forced = (logits_TN == math.inf).sum(-1, keepdim=True)
    gains = torch.where(order.values == math.inf, 0.0, order.values.double())
    totals = F.pad(gains.cumsum(-1), (1, 0))[:, : potential.shape[-1]]
    count = torch.arange(totals.shape[-1], device=totals.device)
    return torch.where(count < forced, -math.inf, totals + potential.double()), order.indices


def best_count(scores_TJ: Tensor) -> Tensor:
    """[T] int64, the count with the largest score; the lowest among ties."""
    count = torch.arange(scores_TJ.shape[-1], device=scores_TJ.device)
    best = scores_TJ.amax(-1, keepdim=True)
    return torch.where(scores_TJ == best, count, scores_TJ.shape[-1]).amin(-1)


def count_ceilings(scores_TJ: Tensor, n: int) -> Tensor:
    """[T, J] an upper bound on the log of every count's share in Z: its best subset, times how many there are."""
    count = torch.arange(scores_TJ.shape[-1], device=scores_TJ.device, dtype=torch.float64)
    log_subsets = math.lgamma(n + 1) - torch.lgamma(count + 1) - torch.lgamma(n - count + 1)
    return scores_TJ + log_subsets


def mode(logits_TN: Tensor, potential: Tensor) -> Tensor:
    """[T, N] bool, a most probable subset; all False in rows that nothing satisfies.

    Ties go to the lower count, then to the lower index. Arguments as for :func:`best_scores`.
    """
    scores, indices = best_scores(logits_TN, potential)
    possible = scores.amax(-1, keepdim=True) > -math.inf
    rank = torch.arange(logits_TN.shape[-1], device=logits_TN.device)
    taken = (rank < best_count(scores).unsqueeze(-1)) & possible
    return torch.zeros_like(logits_TN, dtype=torch.bool).scatter(-1, indices, taken)
