"""Literals as independent coins around a shift: what every sweep in linear arithmetic starts from.

Legend: B tokens of one block, N variables.
"""

from __future__ import annotations

import torch
from torch import Tensor

from circuitroute.engines.shift import Evidence, Shift

# Largest exponent that does not overflow; a coin with larger odds is certain.
MAX_EXPONENT = {torch.float32: 83.0, torch.float64: 700.0}


def coins(logits_NB: Tensor, shift: Shift, evidence: Evidence | None) -> tuple[Tensor, Tensor]:
    """Probabilities (absent, present) of coins with logits theta - s, each [N, B]."""
    centred = shift.centred(logits_NB)
    odds_against = centred.neg().clamp_(max=MAX_EXPONENT[centred.dtype]).exp_()
    present = (odds_against + 1.0).reciprocal_()
    absent = odds_against.mul_(present)
    if evidence is not None:
        present.masked_fill_(centred == -torch.inf, 0.0)
    return absent, present


def log_normaliser(
    logits_NB: Tensor, shift: Shift, absent: Tensor, present: Tensor, evidence: Evidence | None
) -> Tensor:
    """[B] float64 log normaliser of the coins, the sum of max(x, 0) - log(max(sigmoid(x), sigmoid(-x))).

    The first part is the sum of the logits above s, less s times their number: the logits are exact, and most of s
    cancels against the root's s |S|, whereas a sum of rounded differences would keep their errors.
    """
    above = present > absent
    if evidence is not None:
        above &= torch.isfinite(logits_NB)
    excess = torch.where(above, logits_NB, 0.0).sum(0, dtype=torch.float64) - shift.exact() * above.sum(0)
    return excess - torch.maximum(present, absent).log_().sum(0, dtype=torch.float64)
