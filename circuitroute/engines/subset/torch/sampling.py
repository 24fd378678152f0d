"""The sample: a count from the posterior, split between the children of every node down to the leaves.

Legend: T tokens, N variables; m nodes at a level, d their degree.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from circuitroute.engines.sampling import MARGIN, invert
from circuitroute.keys import uniform


def draw_count(probs_JT: Tensor, key_T: Tensor) -> tuple[Tensor, Tensor]:
    """A count from each token's posterior: ([1, T] int64, [T] bool uncertain)."""
    u = uniform(key_T, 0, 1, probs_JT.dtype)
    count, uncertain = invert(_add_up(probs_JT.unsqueeze(1).clone()), u, MARGIN[u.dtype])
    return count, uncertain[0]


def split_counts(levels: list[Tensor], count_1T: Tensor, key_T: Tensor) -> tuple[Tensor, Tensor]:
    """Split the root's count down to the leaves: ([even(N), T] bool, [T] bool uncertain)."""
    counts = count_1T
    uncertain = torch.zeros_like(counts[0], dtype=torch.bool)
    number = 1
    for level in levels[-2::-1]:
        half = level.shape[1] // 2
        counts = counts[:half]
        u = uniform(key_T, number, half, level.dtype)
        number += half
        if level is levels[0]:
            return _split_pairs(level, counts, u, uncertain)
        left, doubt = _split_level(level, counts, u)
        uncertain |= doubt.any(0)
        counts = torch.cat([left, counts - left])
    return counts > 0, uncertain


def _split_level(level: Tensor, counts: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """How many of each node's ``counts`` [m/2, T] go to its left child, and where that is uncertain."""
    half, d = level.shape[1] // 2, level.shape[0] - 1
    # A zero row on either side of the right child's coefficients serves the impossible splits.
    right = F.pad(level[:, half:], (0, 0, 0, 0, 1, 1))
    take = torch.arange(d + 1, device=counts.device)[:, None, None]
    weights = right.gather(0, (counts + 1 - take).clamp_(0, d + 2)).mul_(level[:, :half])
    return invert(_add_up(weights), u, MARGIN[u.dtype])


def _add_up(weights: Tensor) -> Tensor:
    """Cumulative weights along dim 0, in place: for the few there are, faster than cumsum."""
    for i in range(1, len(weights)):
        weights[i] += weights[i - 1]
    return weights


def _split_pairs(level: Tensor, counts: Tensor, u: Tensor, uncertain: Tensor) -> tuple[Tensor, Tensor]:
    """The last split, between two variables: only a count of one leaves a choice.

    Weights are at most 1, so adding 4 (1 - count) to both gaps settles counts of zero and two.
    """
    half = level.shape[1] // 2
    in_right = level[0, :half] * level[1, half:]
    total = in_right + level[1, :half] * level[0, half:]
    gap = in_right.addcmul_(total, u, value=-1.0)
    settled = counts.to(level.dtype).sub_(1.0).mul_(-4.0)
    mask = torch.cat([gap + settled <= 0, settled - gap < 0])
    clearance = gap.add_(settled).abs_().sub_(total, alpha=MARGIN[level.dtype]).amin(0)
    return mask, uncertain | (clearance <= 0)
