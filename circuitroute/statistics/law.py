"""The law of the number of successes as a function of the coins: a tensor with its gradient.

Legend: T rows, N coins; theta log-odds, p probabilities; L [T, N + 1] the log-probabilities of the counts.

    d L_j / d theta_i = P(coin i | count j) - p_i.

Values and gradients are :mod:`circuitroute.statistics.counting`'s. Second derivatives, transforms of torch.func, traces
and logits beyond 10^6 go through the same tree in plain differentiable log space, in O(N^2).
"""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from circuitroute._tensors import batchable, batched, traced, transformed
from circuitroute.engines.logspace import is_zero
from circuitroute.engines.subset.naive import tree_up
from circuitroute.statistics import counting
from circuitroute.statistics.wide import scaled

Given: TypeAlias = Literal["logits", "probs"]


def log_pmf(values: Tensor, given: Given) -> Tensor:
    """[T, N + 1] float64, -inf for impossible counts and NaN in rows with NaN.

    Args:
        values: [T, N] float64, logits or probabilities, as ``given`` says; infinite logits are certain coins.
    """
    if traced(values) or batched() or transformed() or not values.shape[-1]:
        return _plain(values, given)
    bad = values.isnan().any(-1, keepdim=True)
    known = torch.where(bad, 0.5, values)
    if given == "logits" and bool((known.isfinite() & (known.abs() > counting.LARGEST)).any()):
        found = _plain(known, given)
    else:
        found = _LogPmf.apply(known, given)  # type: ignore[no-untyped-call]
    return torch.where(bad, math.nan, found)


def _plain(values: Tensor, given: Given) -> Tensor:
    """The same by autograd's own means."""
    if not values.shape[-1]:
        return values.new_zeros(len(values), 1) * values.sum(-1, keepdim=True)
    bad = values.isnan().any(-1, keepdim=True)
    values = torch.where(bad, 0.5, values)
    theta = values if given == "logits" else _log_odds(values)
    found = tree_up(theta, torch.zeros_like(theta[:, 0]), theta.shape[-1])[-1][:, 0].t()[:, : theta.shape[-1] + 1]
    # Rounding may leave a certain count an ulp above.
    return torch.where(bad, math.nan, torch.where(is_zero(found), -math.inf, found))


def _log_odds(probs: Tensor) -> Tensor:
    """The logits of probabilities, without a gradient at 0 and 1."""
    inside = (probs > 0) & (probs < 1)
    safe = torch.where(inside, probs, 0.5)
    ends = torch.where(probs <= 0, -math.inf, math.inf).to(probs)
    return torch.where(inside, safe.log() - (-safe).log1p(), ends)


def _coins(values: Tensor, given: Given) -> counting.Coins:
    array = values.detach().cpu().numpy()
    return counting.Coins.of_logits(array) if given == "logits" else counting.Coins.of_probs(array)


class _LogPmf(torch.autograd.Function):
    """L as a function of logits or probabilities."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, given: Given) -> Tensor:
        ctx.given = given
        result = torch.from_numpy(counting.log_pmf(_coins(values, given))).to(values)
        ctx.save_for_backward(values, result)
        return result

    @staticmethod
    @batchable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        values, result = ctx.saved_tensors
        given: Given = ctx.given
        recorded = torch.is_grad_enabled()
        if recorded or batched():  # to be differentiated again, or many at once
            with torch.enable_grad():
                values = values if values.requires_grad else values.detach().requires_grad_()
                again = _plain(values, given)
                # What is impossible has no gradient, and one would be NaN.
                possible = torch.where(again.isinf(), 0.0, again)
                (found,) = torch.autograd.grad(possible, values, upstream, create_graph=recorded)
            return found, None
        coins = _coins(values, given)
        weights = torch.where(result.isinf(), 0.0, upstream)
        by_q, by_p = counting.log_gradients(coins, weights.cpu().numpy())
        p, q = (scaled(x.m, x.e).astype(np.float64) for x in (coins.p, coins.q))
        if given == "logits":
            return torch.from_numpy(by_p * q - by_q * p).to(values), None
        with np.errstate(divide="ignore", invalid="ignore"):
            slope = torch.from_numpy(by_p / p - by_q / q).to(values)
        return torch.where((values > 0) & (values < 1), slope, _at_ends(values, result, weights)), None


def _at_ends(probs: Tensor, log_pmf: Tensor, weights: Tensor) -> Tensor:
    """The one-sided derivatives at probabilities of 0 and 1, where the law without the coin is known: it is the law
    itself, one count lower for a coin that is certain.

    d log P_j / dp = P_{j-1} / P_j - 1 at 0, and 1 - P_{j+1} / P_j at 1, for the counts that are possible.
    """
    possible = log_pmf > -math.inf
    impossible = torch.full_like(log_pmf[:, :1], -math.inf)
    lower, upper = torch.cat([impossible, log_pmf[:, :-1]], 1), torch.cat([log_pmf[:, 1:], impossible], 1)
    base = torch.where(possible, log_pmf, 0.0)
    at_zero = (weights * torch.where(possible, (lower - base).exp() - 1, 0.0)).sum(1, keepdim=True)
    at_one = (weights * torch.where(possible, 1 - (upper - base).exp(), 0.0)).sum(1, keepdim=True)
    return torch.where(probs <= 0, at_zero, at_one)
