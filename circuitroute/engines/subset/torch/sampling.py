"""Sampling in float32 with every decision checked, so that the outcome is the float64 one.

Legend: T tokens, N variables; m nodes at a level, d their degree.

A count is split between two children by inversion: how many cumulative weights lie below u times the total.
Float32 weights are right to about 1e-6. Where a threshold falls within MARGIN of a cumulative weight, rounding
could decide, and the token is reported as *uncertain*: the caller draws it again with the naive engine. All other
decisions are the ones float64 would make, so a sample does not depend on batch, device or engine. (The device
of exact geometric predicates: filter in fast arithmetic, decide the doubtful few exactly.)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from circuitroute.keys import uniform

MARGIN = {torch.float32: 3e-5, torch.float64: 1e-11}


def draw_count(probs_JT: Tensor, key_T: Tensor) -> tuple[Tensor, Tensor]:
    """A count from each token's posterior: ([1, T] int64, [T] bool uncertain)."""
    u = uniform(key_T, 0, 1, probs_JT.dtype)
    count, uncertain = _invert(probs_JT.unsqueeze(1), u)
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
    """How many of each node's ``counts`` [m/2, T] go to its left child, and where that is in doubt."""
    half, d = level.shape[1] // 2, level.shape[0] - 1
    # A zero row on either side of the right child's coefficients serves the impossible splits.
    right = F.pad(level[:, half:], (0, 0, 0, 0, 1, 1))
    take = torch.arange(d + 1, device=counts.device)[:, None, None]
    weights = right.gather(0, (counts + 1 - take).clamp_(0, d + 2)).mul_(level[:, :half])
    return _invert(weights, u)


def _invert(weights: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Index drawn along dim 0 by inversion at ``u``, and whether rounding could have changed it."""
    for i in range(1, weights.shape[0]):
        weights[i] += weights[i - 1]
    total = weights[-1]
    gaps = weights[:-1] - u * total
    chosen = (gaps <= 0).sum(0)
    if gaps.shape[0] == 0:
        return chosen, torch.zeros_like(chosen, dtype=torch.bool)
    return chosen, gaps.abs_().amin(0) <= MARGIN[weights.dtype] * total


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
