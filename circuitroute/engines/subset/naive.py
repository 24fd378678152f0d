"""The naive engine of the count family: float64, log space, plain autograd. All others are tested against it.

Legend: T tokens, N variables, K the largest allowed count, J = K + 1; m nodes at a level, d their degree.

The same balanced tree as :mod:`circuitroute.engines.subset.torch.tree`, with logsumexp for + and + for *. Leaves are
log-probabilities of independent coins with logits theta - s, which keeps the weights that matter near zero; the
choice of s changes rounding only.

Its samples define what the sample of a (logits row, key row) is: every engine returns the same subset.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from circuitroute.engines.base import given
from circuitroute.engines.logspace import LOG_ZERO, is_zero, log_coins, log_normaliser
from circuitroute.engines.naive import NaiveEngine
from circuitroute.engines.subset.torch.tree import even
from circuitroute.keys import uniform


class NaiveSubset(NaiveEngine):
    """Float64 log-space inference for the count family."""

    def log_root(self, logits_TN: Tensor, potential_TJ: Tensor | None) -> tuple[Tensor, Tensor]:
        """See :class:`circuitroute.engines.naive.NaiveEngine`."""
        phi_TJ = given(potential_TJ)
        shift = solve_shift(logits_TN.detach(), phi_TJ.detach())
        levels = tree_up(logits_TN, shift, phi_TJ.shape[1] - 1)
        return weigh(levels, logits_TN, phi_TJ, shift).logsumexp(1), shift

    @torch.no_grad()
    def sample(self, logits_TN: Tensor, potential: Tensor | None, key_T: Tensor) -> Tensor:
        """See :class:`circuitroute.engines.base.Engine`."""
        logits = logits_TN.double()
        phi_TJ = given(potential).double().expand(logits.shape[0], -1)
        shift = solve_shift(logits, phi_TJ)
        return draw_subset(tree_up(logits, shift, phi_TJ.shape[1] - 1), logits, phi_TJ, shift, key_T)


def log_count_weights(logits_TN: Tensor, K: int) -> Tensor:
    """[T, K + 1] float64, log sum over the subsets of j variables of exp(sum of their logits), for j = 0..K.

    -inf where there is no such subset. Differentiable. Infinite logits are evidence: forced variables are in every
    subset and add nothing to the sum.
    """
    logits = logits_TN.double()
    phi_TJ = logits.new_zeros(logits.shape[0], K + 1)
    shift = solve_shift(logits.detach(), phi_TJ)
    weights = weigh(tree_up(logits, shift, K), logits, phi_TJ, shift)
    return torch.where(is_zero(weights), -math.inf, weights + log_normaliser(logits, shift)[:, None])


def solve_shift(logits_TN: Tensor, phi_TJ: Tensor) -> Tensor:
    """[T] zero where independent coins show an allowed count by themselves, else between two sorted logits."""
    n = logits_TN.shape[1]
    low, high = allowed_range(phi_TJ)
    coins = torch.sigmoid(logits_TN).sum(1)
    target = torch.minimum(torch.maximum(coins, low), high).round().long().clamp(0, n)
    descending = logits_TN.sort(1, descending=True).values
    descending = F.pad(descending, (1, 1))  # entry k is the k-th largest
    descending[:, 0], descending[:, -1] = math.inf, -math.inf
    at = descending.gather(1, target[:, None]).squeeze(1)
    after = descending.gather(1, target[:, None] + 1).squeeze(1)
    at = torch.where(torch.isinf(at), after + 2, at)
    after = torch.where(torch.isinf(after), at - 2, after)
    middle = 0.5 * (at + after)
    return torch.where((coins >= low) & (coins <= high) | torch.isinf(middle) | middle.isnan(), 0.0, middle)


def allowed_range(phi_TJ: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest count with a finite potential, [T] each in the potential's dtype."""
    count = torch.arange(phi_TJ.shape[1], device=phi_TJ.device, dtype=phi_TJ.dtype)
    dead = torch.isinf(phi_TJ)
    low = torch.where(dead, math.inf, count).amin(1)
    high = torch.where(dead, -math.inf, count).amax(1)
    return torch.where(torch.isinf(low), 0.0, low), torch.where(torch.isinf(high), 0.0, high)


def tree_up(logits_TN: Tensor, shift_T: Tensor, K: int) -> list[Tensor]:
    """All levels [d + 1, m, T] of log-polynomials, leaves first."""
    levels = [pad_to_pairs(torch.stack(log_coins(logits_TN, shift_T)))]
    while levels[-1].shape[1] > 1:
        half = levels[-1].shape[1] // 2
        levels.append(pad_to_pairs(_log_multiply(levels[-1][:, :half], levels[-1][:, half:], K)))
    return levels


def pad_to_pairs(level: Tensor) -> Tensor:
    missing = even(level.shape[1]) - level.shape[1]
    if not missing:
        return level
    one = level.new_full((level.shape[0], missing, level.shape[2]), LOG_ZERO)
    one[0] = 0.0
    return torch.cat([level, one], 1)


def _log_multiply(a: Tensor, b: Tensor, K: int) -> Tensor:
    """Product of log-polynomials [d + 1, m, T], truncated at x^K: logsumexp over the shifted rows a_i + b."""
    top = min(2 * (a.shape[0] - 1), K)

    def row(i: int) -> Tensor:
        width = min(b.shape[0], top + 1 - i)
        return F.pad(a[i] + b[:width], (0, 0, 0, 0, i, top + 1 - i - width), value=LOG_ZERO)

    rows = range(min(a.shape[0] - 1, top) + 1)
    with torch.no_grad():
        largest = functools.reduce(torch.maximum, map(row, rows))
    total = functools.reduce(torch.add, ((row(i) - largest).exp() for i in rows))
    return largest + total.log()


def weigh(levels: list[Tensor], logits_TN: Tensor, phi_TJ: Tensor, shift_T: Tensor) -> Tensor:
    """[T, J] log weight of every count: potential + s (j - forced) + log coefficient."""
    coefficients = levels[-1][:, 0].t()
    J = phi_TJ.shape[1]
    coefficients = F.pad(coefficients, (0, max(0, J - coefficients.shape[1])), value=LOG_ZERO)[:, :J]
    count = torch.arange(J, device=phi_TJ.device, dtype=torch.float64)
    free = count - (logits_TN == math.inf).sum(1, keepdim=True)
    weights = phi_TJ + shift_T[:, None] * free + coefficients
    return torch.where((phi_TJ == -math.inf) | is_zero(coefficients), LOG_ZERO, weights)


def _invert(weights: Tensor, u: Tensor) -> Tensor:
    """Index along dim 0 drawn with log ``weights`` by inversion at ``u``: how many cumulative sums lie below."""
    cumulative = (weights - weights.amax(0)).exp().cumsum(0)
    return (cumulative[:-1] <= u * cumulative[-1]).sum(0)


def draw_subset(levels: list[Tensor], logits_TN: Tensor, phi_TJ: Tensor, shift_T: Tensor, key_T: Tensor) -> Tensor:
    """Draw the count at the root, then split it between children down to the leaves."""
    weights = weigh(levels, logits_TN, phi_TJ, shift_T)
    # One for the count, and one for every pair of children.
    u = uniform(key_T, 0, 1 + sum(level.shape[1] // 2 for level in levels[:-1]), torch.float64)
    counts = _invert(weights.t(), u[0])[None]
    empty = is_zero(weights.amax(1))
    number = 1
    for level in levels[-2::-1]:
        half, d = level.shape[1] // 2, level.shape[0] - 1
        counts = counts[:half]
        take = torch.arange(d + 1, device=counts.device)[:, None, None]
        rest = counts - take
        right = level[:, half:].gather(0, rest.clamp(0, d))
        right = torch.where((rest < 0) | (rest > d), LOG_ZERO, right)
        left = _invert(level[:, :half] + right, u[number : number + half])
        number += half
        counts = torch.cat([left, counts - left])
    return (counts[: logits_TN.shape[1]].t() > 0) & ~empty[:, None]
