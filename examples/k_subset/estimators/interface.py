"""What every estimator is: one call, whose value and whose gradient estimate those of an expected loss.

Legend: S subsets per row, T rows (examples), N variables; z masks, m exact marginals.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

# Masks [S, T, N] -> losses [S, T]. Differentiable in the masks, and in whatever parameters it closes over. It may be
# handed fractional masks, by relaxations and by expansions about the marginals.
Loss = Callable[[Tensor], Tensor]


class Estimator(Protocol):
    """How a gradient crosses the choice of a subset."""

    def __call__(self, logits: Tensor, loss: Loss, evaluations: int) -> Tensor:
        """A scalar, the mean over rows of an estimate of E[loss(z)], z ~ p(logits).

        Its gradient in ``logits`` is the estimator's; in the loss's own parameters, the usual one. Randomness comes
        from torch's global generator.

        Args:
            logits: [T, N].
            loss: see :data:`Loss`.
            evaluations: how many subsets per row the loss may be evaluated on: the budget that methods share.
        """
        ...


def relative_to_the_others(cost: Tensor) -> Tensor:
    """[S, T] each cost less the mean of the other samples' of its row; itself where there are no others.

    The leave-one-out baseline (Kool, van Hoof and Welling 2019): independent of the sample it is taken from, so that
    the score function stays unbiased.
    """
    samples = cost.shape[0]
    return cost if samples == 1 else (cost - cost.mean(0)) * (samples / (samples - 1))


def score_term(cost: Tensor, log_prob: Tensor) -> Tensor:
    """[S, T] of zeros, with the gradient cost * d log_prob; the cost is taken as constant."""
    return cost.detach() * (log_prob - log_prob.detach())
