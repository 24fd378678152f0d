"""Estimators of other papers, as those papers define them; none needs exact inference but the last, for its score.

Legend: S subsets per row, T rows, N variables, k the size of subsets; z masks, f the loss.

Gumbel top-k draws by successive softmaxes without replacement (Plackett and Luce's law), not from the distribution
whose probabilities are proportional to exp(theta' z), which all of ``ours`` sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import circuitroute as cr

from .interface import Loss, relative_to_the_others, score_term

GAMMAS = 10  # terms of the sum-of-gamma noise, as its authors use


class RelaxedGumbel:
    """Relaxed subset sampling (Xie and Ermon 2019, arXiv:1901.10517): the loss of a fractional mask.

    Scores theta + Gumbel noise go through k successive softmaxes at a temperature, each over what the ones before left.
    With ``log_sigmoid`` the weights are the coins' probabilities, log sigmoid(theta), as in the experiments of SIMPLE.
    """

    def __init__(self, circuit: cr.Circuit, temperature: float, log_sigmoid: bool = False) -> None:
        self.k, self.temperature, self.log_sigmoid = circuit.max_count, temperature, log_sigmoid

    def relaxed(self, logits: Tensor, samples: int) -> tuple[Tensor, Tensor]:
        """[S, T, N] each, noisy scores and the fractional masks they make."""
        weights = F.logsigmoid(logits) if self.log_sigmoid else logits
        scores = weights + gumbel(samples, logits)
        return scores, successive_softmaxes(scores, self.k, self.temperature)

    def __call__(self, logits: Tensor, loss: Loss, evaluations: int) -> Tensor:
        return loss(self.relaxed(logits, evaluations)[1]).mean()


class StraightThroughGumbel(RelaxedGumbel):
    """Gumbel top-k forward (Kool, van Hoof and Welling 2019, arXiv:1903.06059), the relaxation backward."""

    def __call__(self, logits: Tensor, loss: Loss, evaluations: int) -> Tensor:
        scores, soft = self.relaxed(logits, evaluations)
        return loss(largest(scores, self.k) + (soft - soft.detach())).mean()


class IMLE:
    """Implicit MLE (Niepert et al. 2021, arXiv:2106.01798): perturb and take the top k, before and after a step of
    theta along the negative gradient, ``step`` times as long; the difference is the gradient.

    Noise: sum of gamma with kappa = k, or Gumbel's as in the experiments of SFESS; temperature 1. The step is taken
    along the gradient of the row's own loss, whatever the batch it is averaged over. ``divided`` by the step, the
    difference tends to the gradient's own length as steps get short; implementations leave it as it is, which matters
    beside other terms of a loss.
    """

    def __init__(self, circuit: cr.Circuit, step: float, divided: bool = True, noise: str = "sum-of-gamma") -> None:
        self.k, self.step, self.length = circuit.max_count, step, step if divided else 1.0
        self.gumbel = noise == "gumbel"

    def __call__(self, logits: Tensor, loss: Loss, evaluations: int) -> Tensor:
        shape = (evaluations, *logits.shape)
        noise = gumbel(evaluations, logits) if self.gumbel else sum_of_gamma(shape, self.k)
        apply: Callable[..., Tensor] = _PerturbAndMap.apply
        return loss(apply(logits.expand_as(noise), noise, self.k, self.step, self.length)).mean()


class _PerturbAndMap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, theta: Tensor, noise: Tensor, k: int, step: float, length: float) -> Tensor:
        mask = largest(theta + noise, k)
        ctx.save_for_backward(theta, noise, mask)
        ctx.k, ctx.step, ctx.length = k, step, length
        return mask

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
        theta, noise, mask = ctx.saved_tensors
        rows = mask.shape[0] * mask.shape[1]  # the loss is a mean over so many
        target = largest(theta - ctx.step * rows * upstream + noise, ctx.k)
        return (mask - target) / (ctx.length * rows), None, None, None, None


class GumbelScore:
    """SFESS (Wijk, Vinuesa and Azizpour 2025, ICLR) as in the code that its authors publish: subsets by Gumbel top-k,
    the score of exp(theta' z) / Z; with the leave-one-out baseline where there is more than one sample, if
    ``baseline``.

    Where subsets are drawn from the distribution itself, as in the paper, it is :class:`k_subset.estimators.Score`.
    """

    def __init__(self, circuit: cr.Circuit, baseline: bool = True) -> None:
        self.circuit, self.baseline = circuit, baseline

    def __call__(self, logits: Tensor, loss: Loss, evaluations: int) -> Tensor:
        mask = largest(logits.detach() + gumbel(evaluations, logits), self.circuit.max_count)
        cost = loss(mask)
        weight = relative_to_the_others(cost) if self.baseline else cost
        return (cost + score_term(weight, self.circuit(logits).log_prob(mask))).mean()


def gumbel(samples: int, logits: Tensor) -> Tensor:
    """[S, T, N]"""
    return -torch.empty(samples, *logits.shape, dtype=logits.dtype).exponential_().log()


def largest(scores: Tensor, k: int) -> Tensor:
    """[..., N] 0/1, the k largest."""
    return torch.zeros_like(scores).scatter(-1, scores.detach().topk(k, -1).indices, 1.0)


def successive_softmaxes(scores: Tensor, k: int, temperature: float) -> Tensor:
    """[..., N] that sums to k: softmaxes of scores / temperature, scores losing log(1 - share) after each."""
    total, tiny = torch.zeros_like(scores), torch.finfo(scores.dtype).tiny
    for _ in range(k):
        share = (scores / temperature).softmax(-1)
        total = total + share
        scores = scores + (1 - share).clamp(min=tiny).log()
    return total


def sum_of_gamma(shape: tuple[int, ...], k: int) -> Tensor:
    """Noise such that the sum of k of it is close to Gumbel's: sum_i Gamma(1/k, scale k/i) - log(terms), over k."""
    concentration = torch.full((GAMMAS, *shape), 1 / k)
    scale = k / torch.arange(1, GAMMAS + 1).reshape(-1, *[1] * len(shape))
    return ((torch._standard_gamma(concentration) * scale).sum(0) - math.log(GAMMAS)) / k
