"""The naive engine of the count family: float64, log space, plain autograd. The others are held to it.

Legend: T tokens, N variables, K the largest allowed count, J = K + 1; m nodes at a level, d their degree.

The same balanced tree as :mod:`circuitroute.engines.subset.torch.tree`, with logsumexp for + and + for *. Marginals
and count posterior are the derivatives of log Z, taken by autograd, so everything is differentiable to any
order. Leaves are log-probabilities of independent coins with logits theta - s, which keeps the weights that
matter near zero; the choice of s changes rounding only.

Its samples define what the sample of a (logits row, key row) is: every engine returns the same subset.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from circuitroute.engines.base import Inference, given
from circuitroute.engines.logspace import LOG_ZERO, as_input, is_zero, log_coins, log_literals, nan_rows
from circuitroute.engines.subset.torch.tree import even
from circuitroute.keys import uniform


class NaiveSubset:
    """Float64 log-space inference for the count family; slow, and right."""

    name = "naive"

    def infer(self, logits_TN: Tensor, potential: Tensor | None, key_T: Tensor | None = None) -> Inference:
        """See :class:`circuitroute.engines.base.Engine`."""
        potential = given(potential)
        log_partition, marginals, count_probs = (x.detach() for x in self.moments(logits_TN, potential))
        with torch.no_grad():
            logits, phi_TJ = logits_TN.double(), potential.double().expand(len(logits_TN), -1)
            shift = choose_shift(logits, phi_TJ)
            levels = log_tree(logits, shift, phi_TJ.shape[1] - 1)
            weights = _root_weights(levels, logits, phi_TJ, shift)
            log_root = nan_rows(is_zero(weights.amax(1)), weights.logsumexp(1))
            mask = None if key_T is None else _descend(levels, logits, phi_TJ, shift, key_T)
        return Inference(log_partition, marginals, count_probs, shift, log_root, mask)

    def attach(self, inference: Inference, logits_TN: Tensor, potential: Tensor | None) -> Inference:
        """See :class:`circuitroute.engines.base.Engine`; the graph of the naive engine is its own computation."""
        log_partition, marginals, count_probs = self.moments(logits_TN, given(potential))
        return replace(inference, log_partition=log_partition, marginals=marginals, count_probs=count_probs)

    def moments(self, logits_TN: Tensor, potential: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(log Z, marginals, count posterior), differentiable to any order, in the dtype of the logits."""
        differentiable = torch.is_grad_enabled() and (logits_TN.requires_grad or potential.requires_grad)
        # Marginals are taken by autograd, which must be on even where the caller has switched it off.
        with torch.inference_mode(False), torch.enable_grad():
            logits = as_input(logits_TN)
            phi_TJ = as_input(potential).expand(len(logits), -1)
            shift = choose_shift(logits.detach(), phi_TJ.detach())
            levels = log_tree(logits, shift, phi_TJ.shape[1] - 1)
            log_root = _root_weights(levels, logits, phi_TJ, shift).logsumexp(1)
            log_partition = log_root + log_coins(logits, shift)
            marginals, count_probs = torch.autograd.grad(
                log_partition.sum(), (logits, phi_TJ), create_graph=differentiable
            )
            # Log Z is conditioned on forced variables and no function of them.
            marginals = torch.where(logits == math.inf, 1.0, marginals)
            empty = is_zero(log_root.detach())
            log_partition, marginals, count_probs = (
                nan_rows(empty, x).to(logits_TN.dtype) for x in (log_partition, marginals, count_probs)
            )
        return log_partition, marginals, count_probs

    @torch.no_grad()
    def sample(self, logits_TN: Tensor, potential: Tensor | None, key_T: Tensor) -> Tensor:
        """See :class:`circuitroute.engines.base.Engine`."""
        logits = logits_TN.double()
        phi_TJ = given(potential).double().expand(logits.shape[0], -1)
        shift = choose_shift(logits, phi_TJ)
        return _descend(log_tree(logits, shift, phi_TJ.shape[1] - 1), logits, phi_TJ, shift, key_T)


def log_count_weights(logits_TN: Tensor, K: int) -> Tensor:
    """[T, K + 1] float64, log sum over the subsets of j variables of exp(sum of their logits), for j = 0..K.

    -inf where there is no such subset. Differentiable. Infinite logits are evidence: forced variables are in every
    subset and add nothing to the sum.
    """
    logits = logits_TN.double()
    phi_TJ = logits.new_zeros(len(logits), K + 1)
    shift = choose_shift(logits.detach(), phi_TJ)
    weights = _root_weights(log_tree(logits, shift, K), logits, phi_TJ, shift)
    return torch.where(is_zero(weights), -math.inf, weights + log_coins(logits, shift)[:, None])


def choose_shift(logits_TN: Tensor, phi_TJ: Tensor) -> Tensor:
    """[T] zero where independent coins already show an allowed count, else between two sorted logits."""
    n = logits_TN.shape[1]
    low, high = allowed_range(phi_TJ)
    coins = torch.sigmoid(logits_TN).sum(1)
    target = torch.minimum(torch.maximum(coins, low), high).round().long().clamp(0, n)
    descending = logits_TN.sort(1, descending=True).values
    descending = F.pad(descending, (1, 1))  # so that entry k is the k-th largest
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


def log_tree(logits_TN: Tensor, shift_T: Tensor, K: int) -> list[Tensor]:
    """All levels [d + 1, m, T] of log-polynomials, leaves first."""
    levels = [_pad_to_pairs(torch.stack(log_literals(logits_TN, shift_T)))]
    while levels[-1].shape[1] > 1:
        half = levels[-1].shape[1] // 2
        levels.append(_pad_to_pairs(_log_multiply(levels[-1][:, :half], levels[-1][:, half:], K)))
    return levels


def _pad_to_pairs(level: Tensor) -> Tensor:
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


def _root_weights(levels: list[Tensor], logits_TN: Tensor, phi_TJ: Tensor, shift_T: Tensor) -> Tensor:
    """[T, J] log weight of every count: potential + s (j - forced) + log coefficient."""
    coefficients = levels[-1][:, 0].t()
    J = phi_TJ.shape[1]
    coefficients = F.pad(coefficients, (0, max(0, J - coefficients.shape[1])), value=LOG_ZERO)[:, :J]
    count = torch.arange(J, device=phi_TJ.device, dtype=torch.float64)
    free = count - (logits_TN == math.inf).sum(1, keepdim=True)
    weights = phi_TJ + shift_T[:, None] * free + coefficients
    return torch.where((phi_TJ == -math.inf) | is_zero(coefficients), LOG_ZERO, weights)


def _choose(weights: Tensor, u: Tensor) -> Tensor:
    """Index along dim 0 drawn with log ``weights`` by inversion at ``u``: how many cumulative sums lie below."""
    cumulative = (weights - weights.amax(0)).exp().cumsum(0)
    return (cumulative[:-1] <= u * cumulative[-1]).sum(0)


def _descend(levels: list[Tensor], logits_TN: Tensor, phi_TJ: Tensor, shift_T: Tensor, key_T: Tensor) -> Tensor:
    """Draw the count at the root, then split it between children down to the leaves."""
    weights = _root_weights(levels, logits_TN, phi_TJ, shift_T)
    counts = _choose(weights.t(), uniform(key_T, 0, 1, torch.float64)[0])[None]
    empty = is_zero(weights.amax(1))
    number = 1
    for level in levels[-2::-1]:
        half, d = level.shape[1] // 2, level.shape[0] - 1
        counts = counts[:half]
        take = torch.arange(d + 1, device=counts.device)[:, None, None]
        rest = counts - take
        right = level[:, half:].gather(0, rest.clamp(0, d))
        right = torch.where((rest < 0) | (rest > d), LOG_ZERO, right)
        left = _choose(level[:, :half] + right, uniform(key_T, number, half, torch.float64))
        number += half
        counts = torch.cat([left, counts - left])
    return (counts[: logits_TN.shape[1]].t() > 0) & ~empty[:, None]
