"""Routers: a linear map from hidden states to logits, then :func:`circuitroute.route`.

Legend: T tokens (all leading dimensions), H hidden size, E experts.

Modules hold parameters and nothing that changes during forward: a router that is run again, as under activation
checkpointing, must decide the same. :class:`SoftTopKRouter` is the one that decides by a relaxation, not by a circuit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from circuitroute._validate import int_at_least
from circuitroute.compilation import compile as compile_constraint
from circuitroute.constraints import Between, Constraint, Exactly
from circuitroute.routing.decision import Routing
from circuitroute.routing.estimators import Estimator, as_estimator
from circuitroute.routing.route import route
from circuitroute.routing.weights import Combine, as_combine


class LinearRouter(nn.Module):
    """What routers have in common: a linear map from hidden states [..., H] to the logits of E experts.

    Subclasses decide on the logits in ``forward(hidden, key=None, replay=None) -> Routing``, and end their construction
    with ``reset_parameters()``.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        combine: Combine,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.hidden_size = int_at_least("hidden_size", hidden_size, 1)
        self.num_experts = int_at_least("num_experts", num_experts, 1)
        self.combine = as_combine(combine)
        self.weight = nn.Parameter(torch.empty(self.num_experts, self.hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(self.num_experts, device=device, dtype=dtype)) if bias else None

    def reset_parameters(self) -> None:
        """Draw the weight as torch.nn.Linear does; the bias starts at zero."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """[T, E] float32 logits of hidden states [..., H], for inputs of any dtype, also under autocast."""
        if hidden.shape[-1] != self.hidden_size:
            raise ValueError(
                f"hidden has shape {tuple(hidden.shape)}: the last dimension must be hidden_size={self.hidden_size}"
            )
        rows = hidden.reshape(-1, self.hidden_size)
        wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
        with torch.autocast(rows.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.to(wide)
            return F.linear(rows.to(wide), self.weight.to(wide), bias)


class Router(LinearRouter):
    """Routes every token to a subset of experts that satisfies ``constraint``.

    In training mode the subset is sampled and gradients reach all logits through the estimator; in evaluation mode
    it is the mode of the distribution.

    Args:
        hidden_size: H.
        num_experts: E.
        constraint: what is allowed, over E variables.
        combine, estimator: see :func:`circuitroute.route`.
        bias: whether the linear map has one.

    Raises:
        InfeasibleError: no subset of E experts satisfies the constraint.
        ValueError: a size below 1, or an unknown ``combine`` or ``estimator``.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        constraint: Constraint,
        *,
        combine: Combine = "softmax",
        estimator: str | Estimator = "simple",
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, num_experts, combine=combine, bias=bias, device=device, dtype=dtype)
        self.circuit = compile_constraint(constraint, self.num_experts)
        self.estimator = estimator
        as_estimator(estimator)  # refuse an unknown one here, not in the first forward
        self.reset_parameters()

    def forward(self, hidden: Tensor, key: Tensor | int | None = None, replay: Tensor | None = None) -> Routing:
        """Route hidden states [..., H]; ``key`` and ``replay`` [...] or [T], as in :func:`circuitroute.route`."""
        return route(
            self.logits(hidden).reshape(*hidden.shape[:-1], self.num_experts),
            self.circuit,
            combine=self.combine,
            estimator=self.estimator,
            training=self.training,
            key=key,
            replay=replay,
        )

    def extra_repr(self) -> str:
        """What repr() shows."""
        return (
            f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, constraint={self.circuit.constraint!r}, "
            f"combine={self.combine!r}, estimator={self.estimator!r}"
        )


class ExactKRouter(Router):
    """Exactly ``k`` experts per token, sampled, with SIMPLE gradients (ProbMoE, arXiv:2606.01509)."""

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        k: int,
        *,
        combine: Combine = "softmax",
        estimator: str | Estimator = "simple",
        bias: bool = False,
    ) -> None:
        super().__init__(hidden_size, num_experts, Exactly(k), combine=combine, estimator=estimator, bias=bias)


class DynamicKRouter(Router):
    """Between ``kmin`` and ``kmax`` experts, as many as each token's logits ask for."""

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        kmin: int,
        kmax: int,
        *,
        combine: Combine = "softmax",
        estimator: str | Estimator = "simple",
        bias: bool = False,
    ) -> None:
        constraint = Between(kmin, kmax)
        super().__init__(hidden_size, num_experts, constraint, combine=combine, estimator=estimator, bias=bias)


class TopKRouter(Router):
    """The deterministic baseline: the ``k`` largest logits, in training too; gradients through the weights only."""

    def __init__(
        self, hidden_size: int, num_experts: int, k: int, *, combine: Combine = "softmax", bias: bool = False
    ) -> None:
        super().__init__(hidden_size, num_experts, Exactly(k), combine=combine, estimator="none", bias=bias)

    def forward(self, hidden: Tensor, key: Tensor | int | None = None, replay: Tensor | None = None) -> Routing:
        """Route hidden states [..., H]; ``key`` is accepted and not used, since nothing is drawn."""
        return route(
            self.logits(hidden),
            self.circuit,
            combine=self.combine,
            estimator=self.estimator,
            training=False,
            replay=replay,
        )
