"""Estimators that exact inference allows: each is a few lines of the distribution's own methods.

Legend: S subsets per row, T rows, N variables; z masks, m exact marginals, f the loss.

With the logits theta of an exponential family, d m / d theta = Cov(z) and d log p(z) / d theta = z - m: the first is
what crosses ``marginals``, the second what crosses ``log_prob``.
"""

from __future__ import annotations

import torch
from torch import Tensor

import circuitroute as cr

from .interface import Loss, relative_to_the_others, score_term


class Simple:
    """SIMPLE (Ahmed et al. 2023, arXiv:2210.01941): forward z, backward the exact marginals: Cov(z) f'(z).

    Exact in expectation for losses that are linear in the mask.
    """

    def __init__(self, circuit: cr.Circuit) -> None:
        self.circuit = circuit

    def __call__(self, logits: Tensor, loss: Loss, evaluations: int) -> Tensor:
        return loss(self.circuit(logits).rsample((evaluations,))).mean()


class TemperedSimple:
    """Forward a sample, backward the exact marginals at a temperature of their own."""

    def __init__(self, circuit: cr.Circuit, temperature: float) -> None:
        self.circuit, self.temperature = circuit, temperature

    def __call__(self, logits: Tensor, loss: Loss, evaluations: int) -> Tensor:
        distribution = self.circuit(logits)
        marginals = distribution.tempered(self.temperature).marginals
        return loss(distribution.sample((evaluations,)) + (marginals - marginals.detach())).mean()


class Mode:
    """Forward the most probable subset, backward the exact marginals at a temperature: one evaluation, no noise."""

    def __init__(self, circuit: cr.Circuit, temperature: float) -> None:
        self.circuit, self.temperature = circuit, temperature

    def __call__(self, logits: Tensor, loss: Loss, evaluations: int = 1) -> Tensor:
        distribution = self.circuit(logits)
        marginals = distribution.tempered(self.temperature).marginals
        return loss((distribution.mode + (marginals - marginals.detach()))[None]).mean()


class MeanField:
    """f(m), the loss of the marginals themselves: one evaluation, no noise, of a mask that is no subset."""

    def __init__(self, circuit: cr.Circuit) -> None:
        self.circuit = circuit

    def __call__(self, logits: Tensor, loss: Loss, evaluations: int = 1) -> Tensor:
        return loss(self.circuit(logits).marginals[None]).mean()


class Score:
    """The score function with exact samples, exact log-probabilities and the leave-one-out baseline. Unbiased."""

    def __init__(self, circuit: cr.Circuit) -> None:
        self.circuit = circuit

    def __call__(self, logits: Tensor, loss: Loss, evaluations: int) -> Tensor:
        distribution = self.circuit(logits)
        mask = distribution.sample((evaluations,))
        cost = loss(mask)
        return (cost + score_term(relative_to_the_others(cost), distribution.log_prob(mask))).mean()


class TaylorScore:
    """The score function on what the loss's expansion about the marginals leaves over. Unbiased.

    f(m) + f'(m)(z - m) has the gradient Cov(z) f'(m) in expectation, exactly; it is added, and the rest of the loss is
    left to the score function, with a leave-one-out baseline where there is more than one sample. That is MuProp (Gu et
    al. 2016, arXiv:1511.05176) for subsets. One evaluation, that of the marginals, goes into the expansion.
    """

    def __init__(self, circuit: cr.Circuit) -> None:
        self.circuit = circuit

    def __call__(self, logits: Tensor, loss: Loss, evaluations: int) -> Tensor:
        if evaluations < 2:
            raise ValueError(f"evaluations={evaluations}: one is for the marginals, so that there must be two or more")
        distribution = self.circuit(logits)
        marginals = distribution.marginals
        centre = marginals.detach()
        at_centre, slope = _with_slope(loss, centre[None])
        mask = distribution.sample((evaluations - 1,))
        cost = loss(mask)
        left = cost - at_centre - ((mask - centre) * slope).sum(-1)
        noise = score_term(relative_to_the_others(left), distribution.log_prob(mask))
        exact = ((marginals - centre) * slope).sum(-1)
        return (cost + noise + exact).mean()


class SimpleScore:
    """The score function with SIMPLE for a control variate. Unbiased, and as quiet as SIMPLE where the loss is linear.

    With c a share of the mean slope f'(y) of a row's *other* samples y, c'(z - m) has the exact gradient Cov(z) c,
    which is added, and f(z) - c'(z - m), less its mean over the other samples, is left to the score function. No
    sample's weight depends on itself; the loss is never asked for a mask that is not a subset.
    """

    def __init__(self, circuit: cr.Circuit, share: float = 1.0) -> None:
        self.circuit, self.share = circuit, share

    def __call__(self, logits: Tensor, loss: Loss, evaluations: int) -> Tensor:
        if evaluations < 2:
            raise ValueError(f"evaluations={evaluations}: a sample's control variate is made of others: two or more")
        distribution = self.circuit(logits)
        marginals, mask = distribution.marginals, distribution.sample((evaluations,))
        cost, slope = _with_slope(loss, mask)
        control = self.share * _mean_of_others(slope)
        apart = mask - _mean_of_others(mask)  # the marginals cancel
        left = cost - _mean_of_others(cost) - (apart * control).sum(-1)
        noise = score_term(left, distribution.log_prob(mask))
        exact = ((marginals - marginals.detach()) * control).sum(-1)
        return (cost + noise + exact).mean()


def _with_slope(loss: Loss, mask: Tensor) -> tuple[Tensor, Tensor]:
    """[S, T] the losses, with their gradients in the loss's own parameters; [S, T, N] their slopes, as constants."""
    leaf = mask.detach().requires_grad_()
    cost = loss(leaf)
    (slope,) = torch.autograd.grad(cost.sum(), leaf, retain_graph=True)
    return cost, slope


def _mean_of_others(values: Tensor) -> Tensor:
    """[S, ...], of each sample, over the rest."""
    return (values.sum(0) - values) / (values.shape[0] - 1)
