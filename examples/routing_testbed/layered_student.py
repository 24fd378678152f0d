"""Students of several layers: what decides, and what their layers have in common.

Legend: T tokens, H hidden size, L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

import circuitroute as cr

from .layered_task import normalised

GAIN = 0.02  # of a controller
ESTIMATION = 0.1  # weight of a budget's estimation loss


class LayeredStudent(nn.Module):
    """Layers on a residual stream, each with a router of its own."""

    def __init__(self, layers: Sequence[cr.MoE]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, hidden: Tensor, key: Tensor) -> tuple[Tensor, list[cr.Routing]]:
        """What the layers add to the hidden states [T, H], and their decisions."""
        stream, state, routings = hidden, self.begin(hidden), []
        for number in range(len(self.layers)):
            added, routing, state = self.step(number, normalised(stream), cr.random_key(number, key), state)
            stream = stream + added
            routings.append(routing)
        return stream - hidden, routings

    def begin(self, hidden: Tensor) -> Any:
        """What is handed from layer to layer."""
        return None

    def step(self, number: int, hidden: Tensor, key: Tensor, state: Any) -> tuple[Tensor, cr.Routing, Any]:
        """One layer: what it adds, its decision, and the state for the next."""
        added, routing = self.moe(number)(hidden, key=key, **self.options(number, state))
        return added, routing, state

    def moe(self, number: int) -> cr.MoE:
        return cast(cr.MoE, self.layers[number])

    def options(self, number: int, state: Any) -> dict[str, Any]:
        """What the router of a layer is told besides, in training as in evaluation."""
        return {}

    def splitting(self) -> list[nn.Parameter]:
        """The parameters that divide a budget among layers, a handful, which learn at a rate of their own."""
        return []

    def more_loss(self, routings: Sequence[cr.Routing]) -> Tensor | float:
        """What is added to the error in training."""
        return 0.0

    def after(self, routings: Sequence[cr.Routing]) -> None:
        """Called after each training step with its decisions."""

    def calibrate(self, hidden: Tensor) -> None:
        """Called now and then with training inputs, and before evaluation."""


class PricedStudent(LayeredStudent):
    """Range routers whose mean count is held by a price: one for all layers, which may then differ, or one for each."""

    def hold(self, targets: Sequence[float]) -> PricedStudent:
        """One target is the mean over the layers; otherwise they are one by one."""
        gain = GAIN if len(targets) > 1 else GAIN / len(self.layers)
        self._controllers = [cr.CountController(target, gain) for target in targets]
        self._states = [controller.init() for controller in self._controllers]
        return self

    def options(self, number: int, state: Any) -> dict[str, Any]:
        return {"price": self._states[number % len(self._states)].price}

    def after(self, routings: Sequence[cr.Routing]) -> None:
        for number, routing in enumerate(routings):
            which = number % len(self._states)
            self._states[which] = self._controllers[which].update(self._states[which], routing)


class BudgetStudent(LayeredStudent):
    """One router for all layers, under a total that every token keeps."""

    def __init__(self, layers: Sequence[cr.MoE], budget: cr.BudgetRouter, fast: bool) -> None:
        super().__init__(layers)
        self.budget, self.fast = budget, fast

    def begin(self, hidden: Tensor) -> cr.BudgetState:
        return self.budget.begin(hidden)

    def step(self, number: int, hidden: Tensor, key: Tensor, state: Any) -> tuple[Tensor, cr.Routing, Any]:
        routing, state = self.budget(hidden, state, key=key, layer=number)
        added, _ = self.moe(number)(hidden, routing=routing)
        return added, routing, state

    def splitting(self) -> list[nn.Parameter]:
        return [self.budget.preferences, self.budget.estimates] if self.fast else []

    def more_loss(self, routings: Sequence[cr.Routing]) -> Tensor | float:
        return ESTIMATION * self.budget.estimation_loss(routings)


class SoftStudent(LayeredStudent):
    """Soft top-k routers, with the same soft mass in every layer or a learned split of the total.

    Calibrated, a layer's threshold is set such that it executes as many experts as it has soft mass.
    """

    def __init__(
        self, layers: Sequence[cr.MoE], mass: float, allocation: cr.LayerAllocation | None, calibrated: bool
    ) -> None:
        super().__init__(layers)
        self.mass, self.allocation, self.calibrated = mass, allocation, calibrated
        self._calibrating = False

    def begin(self, hidden: Tensor) -> Sequence[float] | Tensor:
        """The soft mass of each layer, [L]."""
        return [self.mass] * len(self.layers) if self.allocation is None else self.allocation()

    def step(self, number: int, hidden: Tensor, key: Tensor, state: Any) -> tuple[Tensor, cr.Routing, Any]:
        if self._calibrating:
            router = cast(cr.SoftTopKRouter, self.moe(number).router)
            router.calibrate(hidden, executed=float(state[number]), k=state[number])
        return super().step(number, hidden, key, state)

    def options(self, number: int, state: Any) -> dict[str, Any]:
        return {"k": state[number]}

    def splitting(self) -> list[nn.Parameter]:
        return [] if self.allocation is None else [self.allocation.eta]

    @torch.no_grad()
    def calibrate(self, hidden: Tensor) -> None:
        self._calibrating = self.calibrated
        self(hidden, torch.zeros(len(hidden), dtype=torch.int64))
        self._calibrating = False
