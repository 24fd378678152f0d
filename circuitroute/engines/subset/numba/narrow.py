"""Trees of large counts with only the coefficients that matter.

Legend: n variables, k of them selected; a node of a level has s variables below it.

The coins of a row add up to k, and a node pairs variables that lie far apart, so that a node's share of k is about
lambda = k s / n. Its count is a sum of independent coins: that it reaches x has at most the probability

    exp(-(x log(x / mu) - x + mu)),     mu its mean

(Chernoff's bound, as in Hoeffding 1963). Coefficients beyond an x where that is negligible, next to the probability of
k heads at all, are left out: of 512 selected in 16,384, a node of 1,024 variables keeps 140 instead of 512. The bound
holds for every node whose mean is at most ``most``, which lies five standard deviations above lambda. Rows with a node
beyond that (large logits at regular distances) are marked, each by the row alone, and take the whole tree.
"""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.typing import NDArray

# Fewer selected variables than this gain little, and are left as they were.
LEAST = 128
# By dtype, what all coefficients left out may have of the distribution.
SHARE = {"float32": 1e-9, "float64": 1e-14}


@functools.lru_cache(maxsize=256)
def degrees(n: int, k: int, dtype: str, levels: int) -> tuple[list[int], list[int]]:
    """Of each level, leaves first: the degree at which it may be truncated, and the mean up to which that holds."""
    # Coins that add up to k show k heads with probability of about 1 / sqrt(2 pi k) or more; 2n nodes share the error.
    log_share = math.log(SHARE[dtype] * 0.1 / math.sqrt(k) / (2 * n))
    found, most = [], []
    for level in range(levels):
        share = k * 2.0**level / n
        mean = math.floor(share + 5 * math.sqrt(share) + 2)
        degree = _reach(mean, log_share)
        useful = degree < min(2**level, k) and level < levels - 1
        found.append(degree if useful else k)
        most.append(mean if useful else n)
    return found, most


def _reach(mean: int, log_share: float) -> int:
    """The least count that coins of this mean reach with a negligible probability."""
    low, high = mean, 2 * mean + math.ceil(-2 * log_share)  # where x log(x / mean) - x + mean is more than enough
    while low < high:
        x = (low + high) // 2
        enough = x * math.log(x / mean) - x + mean >= -log_share
        low, high = (low, x) if enough else (x + 1, high)
    return low


def may_be_narrow(phi_PJ: NDArray[np.float64]) -> bool:
    """Whether all rows select exactly the largest count, and enough of them that it is worth it."""
    return len(phi_PJ) == 1 and phi_PJ.shape[1] > LEAST and bool(np.isneginf(phi_PJ[0, :-1]).all())
