"""Routers: a linear map from hidden states to logits, then :func:`circuitroute.route`.

Legend: T tokens (all leading dimensions), H hidden size, E experts.

Modules hold parameters and nothing that changes during forward: a router that is run again, as under activation
checkpointing, must decide the same. :class:`SoftTopKRouter` is the one that decides by a relaxation, not by a circuit.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from circuitroute._tensors import without_autocast
from circuitroute._validate import as_flag, as_real, int_at_least, plain_option, plain_word
from circuitroute.compilation import compile as compile_constraint
from circuitroute.constraints import Between, Constraint, Exactly
from circuitroute.inference.circuit import Circuit
from circuitroute.inference.temperature import as_temperature
from circuitroute.routing.choice import Decide, as_share
from circuitroute.routing.decision import Routing
from circuitroute.routing.estimators import Estimator
from circuitroute.routing.metrics import temperature_for
from circuitroute.routing.records import RoutingRecord
from circuitroute.routing.route import route
from circuitroute.routing.weights import Combine, as_combine


def start_of(value: object) -> list[float] | None:
    """What a tensor that a module was given holds at first; None of anything else, and of one without memory."""
    if not isinstance(value, Tensor) or value.is_meta:
        return None
    start: list[float] = value.detach().double().reshape(-1).tolist()
    return start


@torch.no_grad()
def put_back(name: str, value: object, start: list[float] | None) -> None:
    """Let a tensor hold again what it held at first; nothing is done to numbers, and to tensors without memory.

    Raises:
        ValueError: it had no memory at first.
    """
    if not isinstance(value, Tensor) or value.is_meta:
        return
    if start is None:
        raise ValueError(
            f"{name} was given as a tensor on the meta device, so there is no value to reset it to: make it outside "
            f"of the meta device, as by torch.tensor(0.5, device='cpu'), or load a state dict in place of "
            f"reset_parameters()"
        )
    value.copy_(torch.tensor(start, dtype=torch.float64, device=value.device).reshape(value.shape))


class LogitMap(nn.Module):
    """What routers have in common: a linear map from hidden states [..., H] to the logits of E experts.

    Subclasses end their construction with ``reset_parameters()``.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.hidden_size = int_at_least("hidden_size", hidden_size, 1)
        self.num_experts = int_at_least("num_experts", num_experts, 1)
        self.weight = nn.Parameter(torch.empty(self.num_experts, self.hidden_size, device=device, dtype=dtype))
        biased = as_flag("bias", bias)
        self.bias = nn.Parameter(torch.empty(self.num_experts, device=device, dtype=dtype)) if biased else None

    def reset_parameters(self) -> None:
        """Draw the weight as torch.nn.Linear does; the bias starts at zero."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def logits(self, hidden: Tensor) -> Tensor:
        """[T, E] float32 logits of hidden states [..., H], for inputs of any dtype, also under autocast.

        Raises:
            TypeError: hidden states that are no plain tensor of real numbers.
            ValueError: hidden states of another size.
        """
        hidden = as_real("hidden", hidden)
        if hidden.dim() == 0 or hidden.shape[-1] != self.hidden_size:
            raise ValueError(
                f"hidden has shape {tuple(hidden.shape)}: the last dimension must be hidden_size={self.hidden_size}"
            )
        rows = hidden.reshape(-1, self.hidden_size)
        wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
        with without_autocast(rows):
            bias = None if self.bias is None else self.bias.to(wide)
            return F.linear(rows.to(wide), self.weight.to(wide), bias)


class LinearRouter(LogitMap):
    """A linear map and how chosen experts are weighted.

    Subclasses decide on the logits in ``forward(hidden, key=None, replay=None) -> Routing``.
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
        super().__init__(hidden_size, num_experts, bias=bias, device=device, dtype=dtype)
        self.combine = as_combine(combine)


class Router(LinearRouter):
    """Routes every token to a subset of experts that satisfies ``constraint``.

    In training mode the subset is decided as ``decide`` says, sampled by default, and gradients reach all logits
    through the estimator; in evaluation mode it is the mode of the distribution. ``decide`` and ``temperature`` are
    plain attributes, which a training loop may set by a schedule (:mod:`circuitroute.schedules`); :meth:`forward`
    takes others for one call.

    Args:
        hidden_size: H.
        num_experts: E.
        constraint: what is allowed, over E variables; or a circuit, compiled already or read from a file.
        combine, estimator, decide, temperature: see :func:`circuitroute.route`.
        bias: whether the linear map has one.

    Raises:
        InfeasibleError: no subset of E experts satisfies the constraint.
        ValueError: a size below 1, an unknown ``combine`` or ``estimator``, or a circuit over another number of
            experts.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        constraint: Constraint | Circuit,
        *,
        combine: Combine = "softmax",
        estimator: str | Estimator = "simple",
        decide: Decide | float | None = None,
        temperature: float | Tensor = 1.0,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(hidden_size, num_experts, combine=combine, bias=bias, device=device, dtype=dtype)
        self.circuit = compile_constraint(constraint, self.num_experts)
        # What is wrong is refused here, not in the first forward.
        as_share(decide, estimator)
        self.estimator: str | Estimator = plain_word(estimator)
        self.decide: Any = plain_option("decide", decide)
        self.temperature = as_temperature(temperature)
        self._initial_temperature = start_of(temperature)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight as torch.nn.Linear does, the bias at zero; a learned temperature is put back to its start.

        Raises:
            ValueError: the temperature was given on the meta device, so that nothing is known of where it started.
        """
        super().reset_parameters()
        if isinstance(self.temperature, nn.Parameter):
            put_back("temperature", self.temperature, self._initial_temperature)

    def forward(
        self,
        hidden: Tensor,
        key: Tensor | int | None = None,
        replay: Tensor | RoutingRecord | None = None,
        decide: Decide | float | None = None,
        temperature: float | Tensor | None = None,
        price: float | Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Routing:
        """Route hidden states [..., H]; the other arguments as in :func:`circuitroute.route`, [...] or [T].

        ``decide`` and ``temperature`` take the place of the router's own.
        """
        return route(
            self.logits(hidden).reshape(*hidden.shape[:-1], self.num_experts),
            self.circuit,
            combine=self.combine,
            estimator=self.estimator,
            training=self.training,
            key=key,
            replay=replay,
            decide=self.decide if decide is None else decide,
            temperature=self.temperature if temperature is None else temperature,
            price=price,
            bias=bias,
        )

    @torch.no_grad()
    def calibrate_temperature(self, hidden: Tensor, agreement: float = 0.75) -> float:
        """Find the temperature at which samples agree with the mode so far, set it, and return it.

        By bisection on the exact expected agreement, :func:`circuitroute.metrics.mode_agreement`, which falls as the
        temperature rises; sampling far from the mode trains experts on tokens they will not see again.

        Args:
            hidden: [..., H], such as those of a batch of training text.
            agreement: the mean over tokens of (sum of the marginals over the mode) / its size, to get.

        Raises:
            ValueError: no tokens, or an agreement that no temperature gives on these hidden states.
        """
        self.temperature = temperature_for(self.logits(hidden), self.circuit, agreement)
        return self.temperature

    def extra_repr(self) -> str:
        """What repr() shows."""
        return (
            f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, constraint={self.circuit.constraint!r}, "
            f"combine={self.combine!r}, estimator={self.estimator!r}, decide={self.decide!r}, "
            f"temperature={self.temperature!r}"
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
        decide: Decide | float | None = None,
        temperature: float | Tensor = 1.0,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            hidden_size,
            num_experts,
            Exactly(k),
            combine=combine,
            estimator=estimator,
            decide=decide,
            temperature=temperature,
            bias=bias,
            device=device,
            dtype=dtype,
        )


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
        decide: Decide | float | None = None,
        temperature: float | Tensor = 1.0,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            hidden_size,
            num_experts,
            Between(kmin, kmax),
            combine=combine,
            estimator=estimator,
            decide=decide,
            temperature=temperature,
            bias=bias,
            device=device,
            dtype=dtype,
        )


class TopKRouter(Router):
    """The deterministic baseline: the ``k`` largest logits, in training too; gradients through the weights only."""

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        k: int,
        *,
        combine: Combine = "softmax",
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            hidden_size,
            num_experts,
            Exactly(k),
            combine=combine,
            estimator="none",
            decide="mode",
            bias=bias,
            device=device,
            dtype=dtype,
        )

    def forward(
        self,
        hidden: Tensor,
        key: Tensor | int | None = None,
        replay: Tensor | RoutingRecord | None = None,
        decide: Decide | float | None = None,
        temperature: float | Tensor | None = None,
        price: float | Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Routing:
        """Route hidden states [..., H]; ``key`` is accepted and not used, since nothing is drawn.

        Raises:
            ValueError: ``decide``, here or as an attribute, is anything but ``"mode"``, or 0, which is the same.
        """
        given = self.decide if decide is None else decide
        if as_share(given, self.estimator) != 0:
            raise ValueError(f"decide={given!r}: a TopKRouter takes the mode only; ExactKRouter samples")
        return super().forward(hidden, key, replay, given, temperature, price, bias)
