"""SoftMoE's learned split of a budget over layers; :mod:`circuitroute.layers.budget` has the one that tokens keep."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from circuitroute._validate import as_number, int_at_least
from circuitroute.routing.soft_topk import soft_topk


class LayerAllocation(nn.Module):
    """SoftMoE's learned split of a network's budget into a soft k for every layer (arXiv:2606.17952).

    The one parameter is ``eta`` [layers], zeros at first: equal shares. Without ``maximum``

        k = softmax(eta) (total - layers * minimum) + minimum,

    and with it the same with a soft top-k in place of the softmax, so that no layer gets more than it has experts:

        k = soft_topk(eta, (total - layers * minimum) / (maximum - minimum), 1) (maximum - minimum) + minimum.

    Hand its entries to :class:`SoftTopKRouter` as ``k``: the loss then decides which layers get more.

    Args:
        layers: how many; at least 1.
        total: what the layers' k add up to.
        minimum: the least that a layer gets.
        maximum: the most, usually the number of experts; None for no such limit.
        device, dtype: of ``eta``.

    Raises:
        TypeError: ``layers`` is no integer, or another argument no number.
        ValueError: a negative minimum, a maximum not above it, or a total that the layers cannot add up to.
    """

    def __init__(
        self,
        layers: int,
        total: float,
        minimum: float = 1.0,
        maximum: float | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.layers = int_at_least("layers", layers, 1)
        self.total, self.minimum = as_number("total", total), as_number("minimum", minimum)
        self.maximum = None if maximum is None else as_number("maximum", maximum)
        self._check()
        self.eta = nn.Parameter(torch.empty(self.layers, device=device, dtype=dtype))
        self.reset_parameters()

    def _check(self) -> None:
        if not 0 <= self.minimum < math.inf:
            raise ValueError(f"minimum={self.minimum}: must be at least 0, and finite")
        least = self.layers * self.minimum
        if not least <= self.total < math.inf:
            raise ValueError(
                f"total={self.total}: {self.layers} layers of at least minimum={self.minimum} need {least} or more, "
                "and it must be finite"
            )
        if self.maximum is None:
            return
        if not self.minimum < self.maximum < math.inf:
            raise ValueError(
                f"maximum={self.maximum}: must be greater than minimum={self.minimum}, and finite; or None"
            )
        most = self.layers * self.maximum
        if self.total > most:
            raise ValueError(
                f"total={self.total}: {self.layers} layers of at most maximum={self.maximum} add up to {most}; lower "
                "the total or raise the maximum"
            )

    def reset_parameters(self) -> None:
        """Back to equal shares."""
        nn.init.zeros_(self.eta)

    def forward(self) -> Tensor:
        """[layers] the k of every layer, float32 (float64 for a float64 ``eta``); their sum is ``total``."""
        eta = self.eta if self.eta.dtype == torch.float64 else self.eta.float()
        spare = self.total - self.layers * self.minimum
        if self.maximum is None:
            return torch.softmax(eta, dim=0) * spare + self.minimum
        width = self.maximum - self.minimum
        return soft_topk(eta, min(spare / width, self.layers), 1.0) * width + self.minimum

    def extra_repr(self) -> str:
        """What repr() shows."""
        return f"layers={self.layers}, total={self.total}, minimum={self.minimum}, maximum={self.maximum}"
