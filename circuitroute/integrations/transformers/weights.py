"""How models turn router logits into choices and weights, for the rules that :func:`circuitroute.route` lacks.

Legend: T tokens, E experts; g the estimator's 0/1 mask of the chosen experts, which carries its gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from circuitroute.integrations.hosted import divided_by_sum

# (g, mask, logits, most experts per token) -> gates, all [T, E]; the logits are those of the router, unshifted. Rules
# that give unchosen experts a weight take dense=True: gates with DenseMixer's gradient.
Weigh: TypeAlias = Callable[..., Tensor]

# Where a shifted score is close to 0 or below, its logarithm is continued by a signed one.
TINY_SIGMOID = 1e-4
TINY_SOFTMAX = 1e-6


def sigmoid_weigh(
    g: Tensor, mask: Tensor, logits: Tensor, most: int, *, normalized: bool, scale: float, dense: bool = False
) -> Tensor:
    """DeepSeek-V3's rule: sigmoid scores of the chosen experts, divided by their sum if ``normalized``, scaled."""
    gates = _scored(g, mask, torch.sigmoid(logits), dense)
    return (divided_by_sum(gates, mask if dense else None) if normalized else gates) * scale


def softmax_weigh(g: Tensor, mask: Tensor, logits: Tensor, most: int, *, scale: float, dense: bool = False) -> Tensor:
    """LongCat-Flash's rule: softmax probabilities of the chosen experts, scaled."""
    return _scored(g, mask, torch.softmax(logits, -1), dense) * scale


def clamped_weigh(g: Tensor, mask: Tensor, logits: Tensor, most: int, *, least: float, dense: bool = False) -> Tensor:
    """ERNIE's rule: softmax probabilities of the chosen experts, divided by their sum, or by ``least`` if larger."""
    gates = _scored(g, mask, torch.softmax(logits, -1), dense)
    summed = torch.where(mask, gates, 0.0) if dense else gates
    return gates / summed.sum(-1, keepdim=True).clamp(min=least)


def _scored(g: Tensor, mask: Tensor, scores: Tensor, dense: bool) -> Tensor:
    """g times the scores; ``dense`` as DenseMixer has it: in value those of the chosen, in gradient everyone's own."""
    return torch.where(mask, scores, scores - scores.detach()) if dense else g * scores


def successive_weigh(g: Tensor, mask: Tensor, logits: Tensor, most: int, *, jitter: float) -> Tensor:
    """Phi-MoE's rule (SparseMixer-v2, arXiv:2409.12136): the chosen experts in turn, the largest first.

    Each is weighted by a softmax over the experts not taken before it, without those that are smaller than the largest
    by more than ``2 * jitter`` in relative terms. A chosen expert itself always takes part.
    """
    chosen = torch.where(mask, logits.detach(), -torch.inf)
    taken = torch.zeros_like(mask)
    weights = torch.zeros_like(logits)
    for _ in range(most):
        here = F.one_hot(chosen.argmax(-1), logits.shape[-1]).bool() & mask & ~taken
        near = _near(logits.detach(), taken, jitter) | here
        share = torch.softmax(torch.where(near & ~taken, logits, -torch.inf), -1)
        weights = torch.where(here, share, weights)
        taken = taken | here
        chosen = torch.where(here, -torch.inf, chosen)
    return g * weights


def _near(logits: Tensor, taken: Tensor, jitter: float) -> Tensor:
    """[T, E] bool, the experts close enough to the largest one not taken."""
    largest = torch.where(taken, -torch.inf, logits).amax(-1, keepdim=True)
    return (largest - logits) / torch.maximum(logits.abs(), largest) <= 2 * jitter


def shifted_sigmoid(logits: Tensor, bias: Tensor) -> Tensor:
    """[T, E] logits in the order of sigmoid(logits) + bias; the logits themselves if all biases are equal.

    They are logit(sigmoid(x) + b), so that sigmoid(x) + b is the probability of an expert's coin. The mean of the
    biases does not affect the choice, and is subtracted first. For p outside (0, 1), log p becomes asinh(p / 2 tiny),
    which is increasing everywhere. The gradient is that of a constant shift.
    """
    share = torch.sigmoid(logits.detach()) + (bias - bias.mean())
    coin = _signed_log(share, TINY_SIGMOID) - _signed_log(1 - share, TINY_SIGMOID)
    return _shifted(logits, coin, bias)


def shifted_softmax(logits: Tensor, bias: Tensor) -> Tensor:
    """[T, E] logits in the order of softmax(logits) + bias; see :func:`shifted_sigmoid`."""
    share = torch.softmax(logits.detach(), -1) + (bias - bias.mean())
    normalizer = torch.logsumexp(logits.detach(), -1, keepdim=True)
    return _shifted(logits, _signed_log(share, TINY_SOFTMAX) + normalizer, bias)


def _signed_log(share: Tensor, tiny: float) -> Tensor:
    """log(share) for shares well above ``tiny``, up to a constant; increasing everywhere."""
    return torch.asinh(share / (2 * tiny)) + math.log(tiny)


def _shifted(logits: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    shifted = values + (logits - logits.detach())
    return torch.where(bias.amax() > bias.amin(), shifted, logits)
