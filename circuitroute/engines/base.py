"""What engines are asked and what they answer, the same for every op.

Legend: T tokens, N variables, K the largest allowed count, J = K + 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Inference:
    """What an engine finds in rows of logits.

    Attributes:
        log_partition: [T] log Z.
        marginals: [T, N] P(i in S).
        count_probs: [T, J] P(|S| = j); None where the engine gives none.
        shift: [T] float64, the constant s that was subtracted from the logits; no gradient.
        log_root: [T] float64, log of the sum over allowed S of exp(potential) P_s(S) e^(s |S|), where P_s draws
            variables as independent coins with logits theta - s; no gradient. log Z is log_root plus the coins'
            log normaliser. Written relative to it, log-probabilities keep their accuracy at any scale.
        mask: [T, N] bool, the sample, if a key was given.
        fallback: [T] bool, rows that the fast sweep could not settle, see :mod:`circuitroute.engines.sweep`; None for
            engines without such rows.
    """

    log_partition: Tensor
    marginals: Tensor
    count_probs: Tensor | None
    shift: Tensor
    log_root: Tensor
    mask: Tensor | None = None
    fallback: Tensor | None = None


class Engine(Protocol):
    """Runs one circuit on rows of logits. Rows nothing satisfies come back as NaN (masks as all False)."""

    name: str

    def infer(self, logits_TN: Tensor, potential: Tensor | None, key_T: Tensor | None = None) -> Inference:
        """Log-partition, marginals and count posterior, with a sample when ``key_T`` [T] int64 is given.

        The results carry no gradient; see :meth:`attach`.

        Args:
            logits_TN: [T, N] float32 or float64 without NaN; infinite values are evidence.
            potential: [J] or [T, J] log potentials of the counts (-inf where not allowed); None for circuits
                that are not pure count constraints.
        """
        ...

    def attach(
        self, inference: Inference, logits_TN: Tensor, potential: Tensor | None, finite: bool = False
    ) -> Inference:
        """The same results as functions of logits and potential, for autograd.

        Each call makes graph nodes of its own, so results can be differentiated one by one.

        Args:
            finite: whether all logits are known to be finite, so that there is no evidence for gradients to leave out.
        """
        ...

    def second_derivative(
        self, logits_TN: Tensor, potential: Tensor | None, inference: Inference, u_TN: Tensor, v_TJ: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """([T, N], [T, J]) the derivative of (marginals, count posterior) along u in the logits and v in the potential.

        Where the circuit has no potential but its root tells counts apart, v is in one of 0; None for the count
        posterior where there is none. Of the inference, ``shift``, ``fallback`` and ``count_probs`` are known. See
        :mod:`circuitroute.engines.autograd`.
        """
        ...

    def naive_moments(self, logits_TN: Tensor, potential: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """(log Z, marginals, count posterior) by plain autograd, differentiable to any order."""
        ...

    def sample(self, logits_TN: Tensor, potential: Tensor | None, key_T: Tensor) -> Tensor:
        """[T, N] bool, the subset that is a pure function of each row's logits, potential and key."""
        ...


class LayeredEngine(Engine, Protocol):
    """An engine of one circuit that is not a pure count constraint."""

    gives_counts: bool  # whether :meth:`infer` gives the count posterior

    def mode(self, logits_TN: Tensor) -> Tensor:
        """[T, N] bool, the most probable subset; ties: :mod:`circuitroute.engines.layered.precedence`.

        All False in rows that nothing satisfies.
        """
        ...

    def counting(self) -> Engine:
        """This engine if its moments hold the count posterior, else one of the same circuit whose moments do."""
        ...


def certainly_finite(values: Tensor) -> bool:
    """Whether one sum, which infinities and NaN survive, shows that all values are finite.

    A cheap way to skip masks that are nearly always empty. False may also mean that the sum of finite values overflows.
    """
    return math.isfinite(values.detach().sum().item())


def given(potential: Tensor | None) -> Tensor:
    """The count potential, which every engine of the count family needs."""
    if potential is None:
        raise ValueError("potential=None: the count family needs the log potentials of its counts")
    return potential
