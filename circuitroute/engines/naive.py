"""What naive engines share: given log Z as a differentiable function, plain autograd gives all the rest.

Legend: T tokens, N variables, J = K + 1 counts.

Marginals and count posterior are the derivatives of log Z, taken by autograd in float64, so everything is
differentiable to any order. They are slow and right: all other engines are tested against them, samples included.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import replace

import torch
from torch import Tensor

from circuitroute.engines.autograd import naive_derivative
from circuitroute.engines.base import Inference
from circuitroute.engines.logspace import as_input, is_zero, log_normaliser, nan_rows


class NaiveEngine(ABC):
    """An engine, see :class:`circuitroute.engines.base.Engine`, from a differentiable log root."""

    name = "naive"

    @abstractmethod
    def log_root(self, logits_TN: Tensor, potential_TJ: Tensor | None) -> tuple[Tensor, Tensor]:
        """([T], [T]) log root and shift of float64 rows, see :class:`circuitroute.engines.base.Inference`."""

    @abstractmethod
    def sample(self, logits_TN: Tensor, potential: Tensor | None, key_T: Tensor) -> Tensor:
        """See :class:`circuitroute.engines.base.Engine`."""

    def infer(self, logits_TN: Tensor, potential: Tensor | None, key_T: Tensor | None = None) -> Inference:
        """See :class:`circuitroute.engines.base.Engine`."""
        log_partition, marginals, count_probs = self.moments(logits_TN, potential)
        with torch.no_grad():
            phi_TJ = None if potential is None else potential.double().expand(len(logits_TN), -1)
            log_root, shift = self.log_root(logits_TN.double(), phi_TJ)
            log_root = nan_rows(is_zero(log_root), log_root)
        mask = None if key_T is None else self.sample(logits_TN, potential, key_T)
        count_probs = None if count_probs is None else count_probs.detach()
        return Inference(log_partition.detach(), marginals.detach(), count_probs, shift, log_root, mask)

    def attach(
        self, inference: Inference, logits_TN: Tensor, potential: Tensor | None, finite: bool = False
    ) -> Inference:
        """See :class:`circuitroute.engines.base.Engine`; by computing the moments again, with a graph."""
        log_partition, marginals, count_probs = self.moments(logits_TN, potential)
        return replace(inference, log_partition=log_partition, marginals=marginals, count_probs=count_probs)

    def moments(self, logits_TN: Tensor, potential: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """(log Z, marginals, count posterior), differentiable to any order, in the dtype of the logits."""
        given = [x for x in (logits_TN, potential) if x is not None]
        differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in given)
        # Marginals are taken by autograd, which must be on even where the caller has switched it off.
        with torch.inference_mode(False), torch.enable_grad():
            logits = as_input(logits_TN)
            phi_TJ = None if potential is None else as_input(potential).expand(len(logits), -1)
            log_root, shift = self.log_root(logits, phi_TJ)
            log_partition = log_root + log_normaliser(logits, shift)
            inputs = [x for x in (logits, phi_TJ) if x is not None]
            marginals, *counts = torch.autograd.grad(log_partition.sum(), inputs, create_graph=differentiable)
            # Log Z is conditioned on forced variables, so it is not a function of them.
            marginals = torch.where(logits == math.inf, 1.0, marginals)
            empty = is_zero(log_root.detach())
            log_partition, marginals, *counts = (
                nan_rows(empty, x).to(logits_TN.dtype) for x in (log_partition, marginals, *counts)
            )
        return log_partition, marginals, counts[0] if counts else None

    def naive_moments(self, logits_TN: Tensor, potential: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """See :class:`circuitroute.engines.base.Engine`."""
        return self.moments(logits_TN, potential)

    def second_derivative(
        self, logits_TN: Tensor, potential: Tensor | None, inference: Inference, u_TN: Tensor, v_TJ: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """See :class:`circuitroute.engines.base.Engine`; by autograd, once more."""
        return naive_derivative(self.moments, logits_TN, potential, [(u_TN, v_TJ)])
