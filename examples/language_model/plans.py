"""The routers that are compared, each as a plan for a whole model: what every layer gets, and what its layers share.

Shapes: B sequences, S positions, T = B S tokens, H hidden size, E experts, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

from torch import Tensor, nn

import circuitroute as cr

from .config import DemoConfig

LayerRouter: TypeAlias = cr.Router | cr.SoftTopKRouter
State: TypeAlias = Any  # the plan's own; passed from layer to layer, never kept by a module


class Plan(nn.Module):
    """How the layers of a model get their routings; here, from each layer's own router.

    A forward pass starts with `begin`, then calls `route` once per layer, in order, with the state that the previous
    call returned.
    """

    soft = False  # whether routers spread soft mass and execute what exceeds a threshold, which needs calibration

    def begin(self, hidden_BSH: Tensor) -> State:
        """The state before the first layer."""
        return None

    def route(
        self, router: LayerRouter | None, hidden_BSH: Tensor, layer: int, state: State, key_T: Tensor | None
    ) -> tuple[cr.Routing, State]:
        """The decision of one layer, and the state for the next. `router` is the layer's own, where it has one."""
        assert router is not None
        return router(hidden_BSH, key=key_T), state

    def calibrate(self, router: LayerRouter | None, hidden_BSH: Tensor, layer: int, state: State) -> None:
        """Sets what a layer reads off training text instead of learning it by gradient: nothing here."""

    def loss(self, routings: list[cr.Routing]) -> Tensor | None:
        """What the plan adds to the loss, if anything: a scalar."""
        return None


class SoftPlan(Plan):
    """Soft top-k routers: the same soft mass in every layer, or a learned split of the total.

    Soft mass is not what a layer executes. Its threshold is set such that, on training text, it executes as many
    experts per token as its soft mass: all layers together then execute the budget.
    """

    soft = True

    def __init__(self, config: DemoConfig, learned: bool) -> None:
        super().__init__()
        total = config.layers * config.k
        self.k = float(config.k)
        self.allocation = cr.LayerAllocation(config.layers, total, *config.k_range) if learned else None

    def begin(self, hidden_BSH: Tensor) -> State:
        """The soft mass of every layer: [L], or None where it is uniform."""
        return None if self.allocation is None else self.allocation()

    def route(
        self, router: LayerRouter | None, hidden_BSH: Tensor, layer: int, state: State, key_T: Tensor | None
    ) -> tuple[cr.Routing, State]:
        """See Plan; soft top-k draws nothing."""
        soft = cast(cr.SoftTopKRouter, router)
        return soft(hidden_BSH, k=self._mass(state, layer)), state

    def calibrate(self, router: LayerRouter | None, hidden_BSH: Tensor, layer: int, state: State) -> None:
        """The threshold of this layer."""
        mass = self._mass(state, layer)
        cast(cr.SoftTopKRouter, router).calibrate(hidden_BSH, executed=float(mass), k=mass)

    def _mass(self, state: State, layer: int) -> Any:
        return self.k if state is None else state[layer]


class BudgetPlan(Plan):
    """One `cr.BudgetRouter` for all layers: every token executes exactly L k experts in all."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.budget = cr.BudgetRouter(
            config.hidden,
            config.experts,
            config.layers,
            per_layer=cr.Between(*config.k_range),
            total=cr.Exactly(config.layers * config.k),
        )

    def begin(self, hidden_BSH: Tensor) -> State:
        """A cr.BudgetState."""
        return self.budget.begin(hidden_BSH)

    def route(
        self, router: LayerRouter | None, hidden_BSH: Tensor, layer: int, state: State, key_T: Tensor | None
    ) -> tuple[cr.Routing, State]:
        """See Plan."""
        routing, state = self.budget(hidden_BSH, state, key=key_T, layer=layer)
        return routing, state

    def loss(self, routings: list[cr.Routing]) -> Tensor | None:
        """How far off the router is about the layers to come."""
        return self.budget.estimation_loss(routings)


@dataclass(frozen=True)
class RouterKind:
    """One router of the comparison: how to build it, and which auxiliary losses suit it."""

    layer: Callable[[DemoConfig], LayerRouter | None]  # each layer's own router; None where the plan has them all
    probabilities: Literal["marginal", "softmax"] = "marginal"  # what the balance loss averages: top-k has no marginals
    free_count: bool = False  # whether the router chooses how many, so that its expected count needs a price
    plan: Callable[[DemoConfig], Plan] = lambda config: Plan()


def _soft(config: DemoConfig) -> cr.SoftTopKRouter:
    # The threshold is calibrated before the first step.
    return cr.SoftTopKRouter(config.hidden, config.experts, config.k, config.soft_alpha, threshold=0.5)


KINDS = {
    "top-k": RouterKind(lambda c: cr.TopKRouter(c.hidden, c.experts, c.k), "softmax"),
    "exact-k": RouterKind(lambda c: cr.ExactKRouter(c.hidden, c.experts, c.k)),
    "range-k": RouterKind(lambda c: cr.DynamicKRouter(c.hidden, c.experts, *c.k_range), free_count=True),
    "soft-uniform": RouterKind(_soft, plan=lambda c: SoftPlan(c, learned=False)),
    "soft-learned": RouterKind(_soft, plan=lambda c: SoftPlan(c, learned=True)),
    "budget": RouterKind(lambda c: None, plan=BudgetPlan),
}
