"""The root, where the way up ends and the way down starts: its coefficients, weighed by potential and shift.

Legend: B tokens of one block, J counts the root tells apart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from circuitroute.engines.shift import Evidence, Shift

# Root coefficients below SMALLEST_COEFFICIENT may have lost factors to underflow on the way up. That is harmless for
# counts whose share of Z is then below e^-NEGLIGIBLE.
SMALLEST_COEFFICIENT = {torch.float32: 1e-25, torch.float64: 1e-250}
NEGLIGIBLE = {torch.float32: 23.0, torch.float64: 42.0}


@dataclass(frozen=True)
class Root:
    """The weighed root.

    Attributes:
        adjoint: [J, B] weight of each count over the total, d log Z / d coefficient.
        probs: [J, B] count posterior.
        log_total: [B] float64.
        underflow: [B] bool, a count that matters may have lost its coefficient.
    """

    adjoint: Tensor
    probs: Tensor
    log_total: Tensor
    underflow: Tensor


def weigh(
    coefficients_JB: Tensor,
    counts_J: Tensor,
    phi_JB: Tensor,
    shift: Shift,
    evidence: Evidence | None,
    ceiling_JB: Tensor | None = None,
) -> Root:
    """Weigh count j by exp(potential_j + s (j - forced)), in log space, since the weights may span any range.

    Coefficients too small to trust are left out. A count that is left out is negligible, or its row underflows.

    Args:
        counts_J: [J] float64, the counts.
        ceiling_JB: bounds on the logs of the counts' shares; by default what the smallest trusted coefficient gives.
    """
    dtype, floor = coefficients_JB.dtype, SMALLEST_COEFFICIENT[coefficients_JB.dtype]
    lost = coefficients_JB < floor
    count = counts_J[:, None]
    free = count if evidence is None else count - evidence.forced
    log_weights = phi_JB.double() + shift.exact() * free
    scores = (log_weights + coefficients_JB.double().log()).masked_fill_(lost, -math.inf)
    largest = scores.amax(0)
    shares = (scores - largest).exp_()
    total = shares.sum(0)
    log_total = largest + total.log()
    bound = log_weights + math.log(floor) if ceiling_JB is None else ceiling_JB
    hidden = lost & (bound > log_total - NEGLIGIBLE[dtype])
    probs = (shares / total).to(dtype)
    return Root(
        adjoint=torch.where(lost, 0.0, probs / coefficients_JB),
        probs=probs,
        log_total=log_total,
        underflow=hidden.any(0) | ~torch.isfinite(log_total),
    )
