"""Literals as log-probabilities of independent coins, in float64, for the naive engines.

Legend: T tokens, N variables.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

# A finite stand-in for log 0: sums of a few do not overflow, and the gradient of their logsumexp is not NaN.
LOG_ZERO = -1e300


def is_zero(log_values: Tensor) -> Tensor:
    """Whether log values stand for zero."""
    return log_values < LOG_ZERO / 2


def as_input(x: Tensor) -> Tensor:
    """``x`` in float64, such that autograd can differentiate by it; the caller's graph is kept."""
    if x.is_inference():
        x = x.clone()
    return x.double() if x.requires_grad else x.detach().double().requires_grad_()


def _finite(logits: Tensor) -> Tensor:
    """Zero in place of infinite logits, for branches that are masked out afterwards."""
    return torch.where(torch.isinf(logits), 0.0, logits)


def log_coins(logits_TN: Tensor, shift_T: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (absent, present) of coins with logits theta - s, each [N, T]; evidence is certain."""
    centred = (_finite(logits_TN) - shift_T[:, None]).t()
    forced, forbidden = (logits_TN == math.inf).t(), (logits_TN == -math.inf).t()
    absent = torch.where(forced, LOG_ZERO, torch.where(forbidden, 0.0, F.logsigmoid(-centred)))
    present = torch.where(forbidden, LOG_ZERO, torch.where(forced, 0.0, F.logsigmoid(centred)))
    return absent, present


def log_weights(logits_TN: Tensor) -> tuple[Tensor, Tensor]:
    """Log weights (absent, present) of the literals, each [N, T], for the mode: -max(theta, 0) and min(theta, 0).

    Up to a constant of the row this is the sum of the chosen logits, as accurate as coins when one logit dwarfs the
    others, and without logarithms. Float64 sums of bfloat16 logits are exact, so ties are ties on every machine.
    """
    theta = logits_TN.t()
    return (-theta).clamp(LOG_ZERO, 0.0), theta.clamp(LOG_ZERO, 0.0)


def log_coin_flips(centred: Tensor, selected: Tensor) -> Tensor:
    """log p of coins with logits ``centred`` falling as ``selected``, to the last digit of its dtype.

    Not by softplus as torch has it: from 20 on that is the identity, 2e-9 less than it should be.
    """
    return F.logsigmoid(torch.where(selected, centred, -centred))


def log_normaliser(logits_TN: Tensor, shift_T: Tensor) -> Tensor:
    """[T] log normaliser of these coins; decided variables contribute nothing."""
    each = F.softplus(_finite(logits_TN) - shift_T[:, None], threshold=50)
    return torch.where(torch.isinf(logits_TN), 0.0, each).sum(1)


def nan_rows(empty_T: Tensor, values: Tensor) -> Tensor:
    """``values`` [T, ...] with NaN in the rows that nothing satisfies."""
    return torch.where(empty_T.reshape(-1, *[1] * (values.dim() - 1)), math.nan, values)
