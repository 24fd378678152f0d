"""One router for all mixture-of-experts layers of a model, under a budget: see :mod:`circuitroute.layers.budget`.

Legend: T tokens, L layers, H hidden size, J counts 0..K of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from circuitroute._tensors import without_autocast
from circuitroute._validate import as_flag, as_real, int_at_least, plain_option, plain_word
from circuitroute.compilation import compile as compile_constraint
from circuitroute.inference.temperature import as_temperature
from circuitroute.layers.budget import Budget, BudgetState, Rule
from circuitroute.layers.routers import LogitMap, put_back, start_of
from circuitroute.routing import choice
from circuitroute.routing.choice import Decide
from circuitroute.routing.decision import Routing
from circuitroute.routing.estimators import Estimator
from circuitroute.routing.records import RoutingRecord
from circuitroute.routing.route import routed
from circuitroute.routing.weights import Combine, as_combine


class BudgetLayer(LogitMap):
    """One layer of a :class:`BudgetRouter`: its linear map, and the circuit of what it allows.

    How it decides, and with what weights, is said once for all layers, by the attributes of the BudgetRouter.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        constraint: Rule,
        *,
        bias: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(hidden_size, num_experts, bias=bias, device=device, dtype=dtype)
        self.circuit = compile_constraint(constraint, self.num_experts)
        self.reset_parameters()

    def forward(self, *_: Any, **__: Any) -> NoReturn:
        """There is no decision without the state of the budget.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "a layer of a BudgetRouter decides nothing by itself: call the BudgetRouter, with the state of its budget"
        )

    def extra_repr(self) -> str:
        """What repr() shows."""
        return f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, constraint={self.circuit.constraint!r}"


class CountHead(nn.Linear):
    """What a token adds to the preferences of a layer; nothing at first, by whomever modules are reset."""

    def reset_parameters(self) -> None:
        """No preference."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class BudgetRouter(Budget):
    """One router for all mixture-of-experts layers of a model: the experts of every token add up to ``total``.

    ::

        budget = cr.BudgetRouter(hidden_size, 16, layers=4, per_layer=cr.Between(1, 8), total=cr.AtMost(16))
        state = budget.begin(hidden)  # once per forward pass
        routing, state = budget(hidden, state, key=key)  # once per layer, in order

    Training samples a subset, layer by layer, from the distribution described in :mod:`circuitroute.layers.budget`;
    evaluation takes the most probable number of experts under what is left, and the most probable subset of that size.
    (The plain mode would take as few experts as it may in early layers: it compares single subsets of this layer with
    sums over all subsets of the later ones.)

    Learned, next to the layers' linear maps: ``preferences`` [L, J], phi, and ``estimates`` [L, J], which stand for the
    log count polynomials of layers that have not run yet. Both get gradients through every decision that looks ahead;
    :meth:`estimation_loss` also draws the estimates to the true polynomials.

    Args:
        hidden_size: H.
        num_experts: E, of every layer.
        layers: L, the number of layers that route; other layers of the model do not count.
        per_layer: what one layer allows: a constraint on the count, such as ``Between(1, 8)``, or one per layer; or
            circuits of such constraints.
        total: the budget, on the sum over all layers, such as ``AtMost(16)`` or ``Between(12, 16)``.
        combine, estimator, decide, temperature: as for :class:`Router`, attributes of this module, for all its layers;
            ``decide="mode"`` is the rule of evaluation.
        bias: whether the linear maps have one.
        per_token: whether a small linear head on the hidden state adds to the count preferences of its own layer.

    Raises:
        InfeasibleError: the layers' counts cannot add up to any allowed total.
        TypeError, ValueError: arguments of the wrong kind; ``per_layer`` of another length than ``layers``.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        layers: int,
        per_layer: Rule | Sequence[Rule],
        total: Rule,
        *,
        combine: Combine = "softmax",
        estimator: str | Estimator = "simple",
        decide: Decide | float | None = None,
        temperature: float | Tensor = 1.0,
        per_token: bool = False,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_experts, layers, per_layer, total, device=device)
        self.hidden_size = int_at_least("hidden_size", hidden_size, 1)
        self.routers = nn.ModuleList(
            BudgetLayer(self.hidden_size, self.num_experts, constraint, bias=bias, device=device, dtype=dtype)
            for constraint in self.per_layer
        )
        # What is wrong is refused here, not in the first forward.
        choice.as_share(decide, estimator)
        self.combine, self.estimator = as_combine(combine), plain_word(estimator)
        self.decide: Any = plain_option("decide", decide)
        self.temperature = as_temperature(temperature)
        self._initial_temperature = start_of(temperature)
        J, heads = self.preferences.shape[1], self.layers if as_flag("per_token", per_token) else 0
        self.heads = nn.ModuleList(CountHead(self.hidden_size, J, device=device, dtype=dtype) for _ in range(heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """No preference among counts, and the count polynomials of logits that are all zero.

        Linear maps are drawn anew, and a learned temperature is put back to its start.

        Raises:
            ValueError: the temperature was given on the meta device, so that nothing is known of where it started.
        """
        if isinstance(self.temperature, nn.Parameter):
            put_back("temperature", self.temperature, self._initial_temperature)
        for layer in range(self.layers):
            self.router(layer).reset_parameters()
        for head in self.heads:
            cast(CountHead, head).reset_parameters()
        super().reset_parameters()

    def router(self, layer: int) -> BudgetLayer:
        """The linear map and the circuit of one layer; it decides nothing by itself."""
        return cast(BudgetLayer, self.routers[layer])

    def without_routers(self) -> Budget:
        """The budget alone, for layers with routers of their own: preferences and estimates are the same parameters.

        Raises:
            ValueError: with ``per_token``, whose heads look at hidden states.
        """
        if len(self.heads):
            raise ValueError("per_token=True: a budget without routers has no heads on hidden states")
        part = Budget(self.num_experts, self.layers, self.per_layer, self.total, device=self.preferences.device)
        part.preferences, part.estimates = self.preferences, self.estimates
        return part

    def begin(self, hidden: Tensor, estimates: Tensor | None = None) -> BudgetState:
        """See :meth:`Budget.begin`; ``hidden`` is checked to be [..., hidden_size]."""
        self._check_hidden(hidden)
        return super().begin(hidden, estimates)

    def forward(
        self,
        hidden: Tensor,
        state: BudgetState,
        key: Tensor | int | None = None,
        replay: Tensor | RoutingRecord | None = None,
        layer: int | None = None,
        decide: Decide | float | None = None,
        temperature: float | Tensor | None = None,
        price: float | Tensor | None = None,
        bias: Tensor | None = None,
    ) -> tuple[Routing, BudgetState]:
        """Route the next layer.

        Args:
            hidden: [..., H].
            state: from :meth:`begin`, or from the layer before.
            key, replay: as in :func:`circuitroute.route`; give every layer keys of its own.
            layer: which layer this is meant to be; only checked.
            decide, temperature: in place of the router's own.
            price, bias: of this layer, as in :func:`circuitroute.route`: they move the choice within the budget.

        Returns:
            (routing, state for the next layer).

        Raises:
            ValueError: all layers have run, ``layer`` is not the next one, or ``hidden`` has other tokens.
        """
        self._check_turn(hidden, state, layer)
        router = self.router(state.layer)
        rows = hidden.reshape(-1, self.hidden_size)
        share = choice.as_share(self.decide if decide is None else decide, self.estimator)
        logits = router.logits(rows)
        if isinstance(price, Tensor):
            price = choice.per_token("price", price, hidden.shape[:-1])
        batch = choice.Batch.of(
            logits,
            router.circuit,
            shift=choice.shift_of(price, bias, logits, self.num_experts),
            temperature=self.temperature if temperature is None else temperature,
            key=key if not isinstance(key, Tensor) or key.dim() == 0 else key.reshape(-1),
            count_potential=self.potential(state, rows),
        )
        weights: dict[str, Any] = {"combine": self.combine, "estimator": self.estimator}
        routing = routed(batch, share if self.training else 0.0, rule="count", replay=replay, **weights)
        return routing, self.spend(state, routing)

    def extra_repr(self) -> str:
        """What repr() shows."""
        return (
            f"{super().extra_repr()}, combine={self.combine!r}, estimator={self.estimator!r}, decide={self.decide!r}, "
            f"temperature={self.temperature!r}"
        )

    def _more_preferences(self, layer: int, hidden: Tensor | None) -> Tensor | None:
        if not len(self.heads):
            return None
        if hidden is None:
            raise ValueError("hidden=None: with per_token=True the preferences depend on hidden states")
        head = cast(nn.Linear, self.heads[layer])
        with without_autocast(hidden):
            return F.linear(hidden.double(), head.weight.double(), head.bias.double())

    def _check_hidden(self, hidden: Tensor) -> None:
        hidden = as_real("hidden", hidden, floating=True)
        if hidden.dim() == 0 or hidden.shape[-1] != self.hidden_size:
            raise ValueError(
                f"hidden has shape {tuple(hidden.shape)}: the last dimension must be hidden_size={self.hidden_size}"
            )

    def _check_turn(self, hidden: Tensor, state: BudgetState, layer: int | None) -> None:
        self._check_hidden(hidden)
        self._check_layer(state.layer)
        if layer is not None and layer != state.layer:
            raise ValueError(
                f"layer={layer}: the next one is layer {state.layer}; pass the state that the previous layer returned"
            )
        if state.messages.dtype != torch.float64:
            raise ValueError(
                f"state.messages is {state.messages.dtype}: begin() made it float64, and budgets need that; mixed "
                f"precision that casts what modules are given, such as FSDP2's, must leave it alone "
                f"(cast_forward_inputs=False)"
            )
        tokens = hidden.shape[:-1].numel()
        per_token = state.messages.shape[0] if state.messages.dim() == 3 else tokens
        if not tokens == len(state.spent) == per_token:
            raise ValueError(
                f"hidden has {tokens} tokens and state {len(state.spent)} (messages of {per_token}): begin() with these"
            )
