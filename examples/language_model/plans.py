"""Plans: how the layers of a model get their routings, and what they share. Which router has which plan, `kinds` says.

Shapes: B sequences, S positions, T = B S tokens, H hidden size, E experts, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

import circuitroute as cr

from .config import DemoConfig

LayerRouter: TypeAlias = cr.Router | cr.SoftTopKRouter
BalanceRule: TypeAlias = cr.balance.LossFree | cr.balance.Quantile | cr.balance.ExactBalance
AGREEMENT = 0.75  # of a sample with the mode, in expectation
BIAS_STEP = 3e-3  # per step; three times what its authors use, for runs that are far shorter
COLD = 0.25  # the temperature where nothing else is said
PRICE_GAIN = 0.05  # of a controller, per step and expert too many

State: TypeAlias = Any  # the plan's own; passed from layer to layer, never kept by a module


class Plan(nn.Module):
    """How the layers of a model get their routings; here, from each layer's own router.

    A forward pass starts with `begin`, then calls `route` once per layer, in order, with the state that the previous
    call returned.
    """

    soft = False  # whether routers spread soft mass and execute what exceeds a threshold
    calibrated = False  # whether there is something to set that is read off training text

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

    def after(self, routings: list[cr.Routing]) -> None:
        """What follows from the decisions of a step, once it is done: nothing here."""


class AgreementPlan(Plan):
    """Every layer samples at the temperature at which a sample is expected to share AGREEMENT of the mode."""

    calibrated = True
    temperatures: Tensor

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.register_buffer("temperatures", torch.ones(config.layers))  # a checkpoint holds them

    def route(
        self, router: LayerRouter | None, hidden_BSH: Tensor, layer: int, state: State, key_T: Tensor | None
    ) -> tuple[cr.Routing, State]:
        """See Plan."""
        routing = cast(cr.Router, router)(hidden_BSH, key=key_T, temperature=self.temperatures[layer])
        return routing, state

    def calibrate(self, router: LayerRouter | None, hidden_BSH: Tensor, layer: int, state: State) -> None:
        """The temperature of this layer."""
        self.temperatures[layer] = cast(cr.Router, router).calibrate_temperature(hidden_BSH, AGREEMENT)


class ControlledPlan(Plan):
    """One price for all layers, moved after every step such that they execute k experts on average."""

    price: Tensor

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.controller = cr.CountController(config.k, gain=PRICE_GAIN / config.layers)
        self.register_buffer("price", self.controller.init().price)

    def route(
        self, router: LayerRouter | None, hidden_BSH: Tensor, layer: int, state: State, key_T: Tensor | None
    ) -> tuple[cr.Routing, State]:
        """See Plan."""
        return cast(cr.Router, router)(hidden_BSH, key=key_T, price=self.price), state

    def after(self, routings: list[cr.Routing]) -> None:
        """The price of the next step."""
        state = self.controller.init()._replace(price=self.price)
        for routing in routings:
            state = self.controller.update(state, routing)
        self.price.copy_(state.price)


class BalancePlan(Plan):
    """Balance without a loss: a bias on every expert's choice, moved after every step by a rule of `cr.balance`.
    Weights are left alone."""

    bias: Tensor

    def __init__(self, config: DemoConfig, rule: Callable[[int], BalanceRule]) -> None:
        super().__init__()
        self.rule = rule(config.experts)
        self.register_buffer("bias", torch.zeros(config.layers, config.experts))  # a checkpoint holds it

    def route(
        self, router: LayerRouter | None, hidden_BSH: Tensor, layer: int, state: State, key_T: Tensor | None
    ) -> tuple[cr.Routing, State]:
        """See Plan."""
        return cast(cr.Router, router)(hidden_BSH, key=key_T, bias=self.bias[layer]), state

    def after(self, routings: list[cr.Routing]) -> None:
        """The bias of the next step."""
        start = self.rule.init(self.bias.device)
        for bias_E, routing in zip(self.bias, routings, strict=True):
            bias_E.copy_(self.rule.update(start._replace(bias=bias_E), routing).bias)


class SoftPlan(Plan):
    """Soft top-k routers: the same soft mass in every layer, or a learned split of the total.

    Soft mass is not what a layer executes. Its threshold is set such that, on training text, it executes as many
    experts per token as its soft mass: all layers together then execute the budget.
    """

    soft = True
    calibrated = True

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
        routing, state = self.budget(hidden_BSH, state, key=key_T, layer=layer, temperature=self._temperature(layer))
        return routing, state

    def loss(self, routings: list[cr.Routing]) -> Tensor | None:
        """How far off the router is about the layers to come."""
        return self.budget.estimation_loss(routings)

    def _temperature(self, layer: int) -> Tensor | None:
        return None


class AgreementBudgetPlan(BudgetPlan):
    """The same, each layer at the temperature at which an exact-k router with its logits would agree by AGREEMENT: it
    executes k experts on average."""

    calibrated = True
    temperatures: Tensor

    def __init__(self, config: DemoConfig) -> None:
        super().__init__(config)
        self.exact = partial(cr.Router, config.hidden, config.experts, cr.Exactly(config.k), device="meta")
        self.register_buffer("temperatures", torch.ones(config.layers))

    def calibrate(self, router: LayerRouter | None, hidden_BSH: Tensor, layer: int, state: State) -> None:
        """The temperature of this layer."""
        exact = self.exact()
        exact.weight = self.budget.router(layer).weight
        self.temperatures[layer] = exact.calibrate_temperature(hidden_BSH, AGREEMENT)

    def _temperature(self, layer: int) -> Tensor | None:
        return self.temperatures[layer]
