"""How probable a constraint is under independent coins, one per variable: what semantic loss is made of.

Legend: T tokens, N variables; theta the logits, C the constraint, e evidence; P_0 the coins' probabilities, each
variable present with sigmoid(theta_i), and certain where its logit is infinite.

The circuit's distribution is P_0 given C, so two values of P_0 say everything about evidence:

    P_0(C) = Z / prod_i (1 + exp(theta_i))            P(e) = P_0(e | C) = P_0(e) P_0(C | e) / P_0(C)

with products over the variables whose logits are finite. Written so, no term grows with the logits unless the result
does: log Z and the sum of the softplus(theta_i), both as large as the logits, are never subtracted. What a sweep finds
is relative to coins around a shift s (:class:`circuitroute.engines.base.Inference`), whose own part cancels exactly.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from circuitroute._tensors import cannot_look
from circuitroute.engines import Inference
from circuitroute.engines.logspace import log_coin_flips, nan_rows
from circuitroute.inference.rows import Rows


def log_satisfied(rows: Rows, sweep: Inference) -> Tensor:
    """[...] float64 log P_0(C), without gradient; at most 0 where there is no count potential.

    -inf in rows whose evidence leaves no subset; NaN in those with NaN. Of a count potential phi it is the log of the
    coins' expectation of exp(phi(|S|)) over allowed S.
    """
    with torch.no_grad():
        logits, _ = rows.inputs()
        log_root, shift = sweep.log_root, sweep.shift
        found = log_root
        if cannot_look(shift) or bool(shift.any()):  # around 0 there is nothing to do
            found = log_root - _shift_of_normaliser(logits.double(), shift)
        if rows.count_potential is None:
            found = found.clamp(max=0.0)  # which rounding may exceed
        found = torch.where(log_root.isnan(), -math.inf, found)
        return rows.as_batch(found if rows.nan is None else nan_rows(rows.nan, found))


def _shift_of_normaliser(logits_TN: Tensor, shift_T: Tensor) -> Tensor:
    """[T] the sum over finite logits of softplus(theta) - softplus(theta - s); exactly s times a number of coins where
    all of them are as good as certain."""
    s = shift_T[:, None]
    free = torch.isfinite(logits_TN)
    theta = torch.where(free, logits_TN, 0.0)
    # max(theta, 0) - max(theta - s, 0), by cases: s where theta is above both, 0 where it is below both.
    low, high = s.clamp(max=0.0), s.clamp(min=0.0)
    above = free & (theta >= high)
    between = torch.where(free & ~above & (theta > low), torch.where(s > 0, theta, s - theta), 0.0)
    tails = _tail(theta) - _tail(theta - s)
    rest = between + torch.where(free, tails, 0.0)
    return shift_T * above.sum(-1) + rest.sum(-1)


def _tail(x: Tensor) -> Tensor:
    """softplus(x) - max(x, 0)."""
    return torch.exp(-x.abs()).log1p()


def log_normaliser(rows: Rows) -> Tensor:
    """[...] the sum of softplus(theta) over finite logits: minus the log-probability that no free coin falls.

    Differentiable any number of times, with the gradient sigmoid(theta).
    """
    logits, _ = rows.inputs()
    free = torch.isfinite(logits)
    # F.softplus is the identity from 20 on, with slope 1.
    each = -F.logsigmoid(-torch.where(free, logits, 0.0))
    return rows.as_batch(torch.where(free, each, 0.0).sum(-1))


def log_flips(logits: Tensor, chosen: Tensor, banned: Tensor) -> Tensor:
    """[...] float64 log P_0 of the coins of ``chosen`` falling on present and those of ``banned`` on absent.

    Certain coins, those of infinite logits, count for nothing: that they agree is for the caller to see.
    """
    with torch.no_grad():
        asked = (chosen | banned) & torch.isfinite(logits)
        each = log_coin_flips(torch.where(asked, logits, 0.0).double(), chosen)
        return torch.where(asked, each, 0.0).sum(-1)
