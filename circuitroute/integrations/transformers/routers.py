"""Routers of transformers that decide through circuitroute: a router's class is exchanged for a subclass of it.

So parameters, names in the state dict, hooks and the recording of router logits stay what they were.

Nothing that a decision depends on changes in ``forward``: it is run again under activation checkpointing, and must
decide the same. What forward leaves behind is a record of its decision, which it never reads, and with a budget over
the layers what the pass has spent, for the layers after it (:mod:`circuitroute.integrations.transformers.walk`).

Legend: T tokens, H hidden size, E experts, K slots.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from circuitroute.inference.circuit import Circuit
from circuitroute.inference.distribution import SubsetDistribution
from circuitroute.integrations.transformers.experts import Padding, choose_padding
from circuitroute.integrations.transformers.families import Family
from circuitroute.integrations.transformers.walk import Walk, in_backward
from circuitroute.keys import random_key
from circuitroute.routing.choice import Rule, decide
from circuitroute.routing.decision import Decision, Routing, chosen_first
from circuitroute.routing.estimators import Estimator
from circuitroute.routing.weights import Combine, estimated_mask, weigh

Eval: TypeAlias = Literal["auto", "mode"]
Stock: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]

PREFIX = "Circuit"


@dataclass(eq=False)
class Session:
    """What the layers of one patched model share.

    Attributes:
        model: the model, so that a copy of it is told from a copy of a layer.
        seed: of the sampling keys; None draws them from torch's global generator.
        step, token_offset: see :meth:`Handle.set_step`.
        recording: whether forward passes leave their decisions behind.
        records: by position of the layer, the decision of the last forward pass.
        walk: where forward passes stand in the budget over the layers; None without one.
    """

    model: weakref.ref[nn.Module]
    seed: int | None
    step: int | Tensor = 0
    token_offset: int | Tensor = 0
    recording: bool = True
    records: dict[int, Routing] = field(default_factory=dict)
    walk: Walk | None = None

    def is_copied(self, memo: dict[int, Any]) -> bool:
        """Whether ``copy.deepcopy`` with this memo is at work on the whole model."""
        return id(self.model()) in memo

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        model = weakref.ref(memo[id(self.model())])
        walk = None if self.walk is None else Walk(copy.deepcopy(self.walk.budget, memo), model)
        copied = replace(self, model=model, records={}, walk=walk)
        memo[id(self)] = copied
        return copied

    def keys(self, layer: int, tokens: int, device: torch.device) -> Tensor | None:
        """[T] int64 sampling keys, None to draw them."""
        if self.seed is None:
            return None
        token = torch.arange(tokens, device=device) + self.token_offset
        return random_key(self.seed, self.step, layer, token)

    def record(self, position: int, routing: Routing) -> None:
        """Keep a decision, unless it is the recomputation of one: that belongs to a graph of the backward pass."""
        if self.recording and (is_compiling() or not in_backward()):
            self.records[position] = routing


@dataclass(frozen=True, eq=False)
class Plan:
    """How one layer routes.

    Attributes:
        session: shared by all layers.
        position: of the layer among the routed ones.
        layer: its number in the model, which goes into the sampling keys.
        experts: the module that the decision is for; it says how unused slots are to be padded.
        own: whether the constraint is the model's own rule.
    """

    session: Session
    position: int
    layer: int
    family: Family
    circuit: Circuit
    own: bool
    combine: Combine | None
    estimator: str | Estimator
    padding: Padding
    eval: Eval
    experts: nn.Module

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        """A copied model has a session of its own; a copied layer, as PEFT makes them, stays in that of its model."""
        if not self.session.is_copied(memo):
            return self
        return replace(self, session=copy.deepcopy(self.session, memo), experts=copy.deepcopy(self.experts, memo))

    def decide(self, router: nn.Module, logits: Tensor, replay: Tensor | None) -> Routing:
        """The decision for router logits [T, E]: sampled in training, else the mode, or ``replay`` if there is one.

        With a budget, evaluation takes the most probable count under what is left, then its best subset.
        """
        walk = self.session.walk
        if walk is None:
            return self._decide(router, logits, replay, "mode", None)
        choose = partial(self._decide, router, logits, replay, "count")
        return walk.decide(self.position, logits, router.training, choose)

    def _decide(
        self, router: nn.Module, logits: Tensor, replay: Tensor | None, rule: Rule, count_potential: Tensor | None
    ) -> Routing:
        choice = self.family.choice(router, logits)
        decision = decide(
            choice,
            self.circuit,
            share=1.0 if router.training else 0.0,
            rule=rule,
            key=self.session.keys(self.layer, len(logits), logits.device) if router.training else None,
            replay=replay,
            count_potential=count_potential,
            validate_args=False,
        )
        return decision.routing(self._weigh(router, decision, None if choice is logits else logits))

    def _weigh(self, router: nn.Module, decision: Decision, logits: Tensor | None) -> Tensor:
        """[T, E] gates by the router's logits, without any shift for the choice; None: those decided on."""
        rule = self.family.combine(router) if self.combine is None else self.combine
        if isinstance(rule, str):
            return weigh(decision, combine=rule, estimator=self.estimator, logits=logits)
        decided = decision.distribution.logits
        with torch.autocast(decided.device.type, enabled=False):
            g = estimated_mask(decision, self.estimator)
            wide = decided if logits is None else logits.to(decided.dtype)
            return rule(g, decision.mask, wide, max(1, self.circuit.max_count))

    def project(self, routing: Routing) -> tuple[Tensor, Tensor]:
        """Weights and indices [T, K], the chosen experts first and by decreasing logit."""
        if self.circuit.min_count == self.circuit.max_count > 0:
            indices = chosen_first(routing.mask, routing.logits.detach(), self.circuit.max_count)
            return routing.gates.gather(-1, indices), indices
        distinct = choose_padding(self.experts, self.padding, self.family) == "distinct"
        return routing.padded(pad="distinct" if distinct else "sentinel")

    def as_routing(self, router: nn.Module, logits: Tensor, indices: Tensor, weights: Tensor) -> Routing:
        """The decision that the stock router made."""
        distribution = SubsetDistribution(self.circuit, self.family.choice(router, logits), validate_args=False)
        mask = as_mask(indices, self.circuit.n)
        gates = torch.zeros_like(distribution.logits).scatter(-1, indices, weights.to(distribution.logits.dtype))
        return Routing(distribution, mask, gates)


def as_mask(indices: Tensor, experts: int) -> Tensor:
    """[T, E] bool from indices [T, K]."""
    mask = torch.zeros(len(indices), experts, dtype=torch.bool, device=indices.device)
    return mask.scatter(-1, indices, True)


class CircuitRouting(nn.Module):
    """What a patched router is besides a router of its own class."""

    circuitroute_plan: Plan

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(router logits [T, E], weights [T, K], indices [T, K]) of hidden states [..., H], as transformers has it."""
        return outputs(self, super().forward, hidden_states)

    def extra_repr(self) -> str:
        """What repr() shows."""
        return f"constraint={self.circuitroute_plan.circuit.constraint!r}"


def outputs(router: CircuitRouting, stock: Stock, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs of a patched router; ``stock`` is the forward of its class."""
    plan = router.circuitroute_plan
    stocks_choice = plan.own and plan.eval == "auto" and not router.training
    if stocks_choice and not _needs_gradient(router, hidden):
        logits, weights, indices = stock(hidden)
        if plan.session.recording:
            plan.session.record(plan.position, plan.as_routing(router, logits, indices, weights))
        return logits, weights, indices
    logits = plan.family.logits(router, hidden)
    replay = None
    if stocks_choice:
        with torch.no_grad():
            replay = as_mask(stock(hidden)[2], plan.circuit.n)
    routing = plan.decide(router, logits, replay)
    plan.session.record(plan.position, routing)
    weights, indices = plan.project(routing)
    return logits, weights.to(plan.family.dtype(hidden, logits)), indices


def _needs_gradient(router: nn.Module, hidden: Tensor) -> bool:
    return torch.is_grad_enabled() and (hidden.requires_grad or any(p.requires_grad for p in router.parameters()))


_classes: dict[type[nn.Module], type[CircuitRouting]] = {}


def exchange_class(router: nn.Module, plan: Plan) -> None:
    """Make a router decide by ``plan``."""
    stock = type(router)
    if stock not in _classes:
        _classes[stock] = type(PREFIX + stock.__name__, (CircuitRouting, stock), {"__module__": __name__})
    router.__class__ = _classes[stock]
    router.circuitroute_plan = plan  # type: ignore[assignment]
    _rebind(router)


def restore_class(router: CircuitRouting) -> None:
    """Make a router the one it was.

    Raises:
        RuntimeError: a training library has exchanged its class in turn, as FSDP does.
    """
    if type(router) not in _classes.values():
        raise RuntimeError(
            f"a router has become a {type(router).__name__} since it was patched: unpatch before the model is wrapped"
        )
    del router.circuitroute_plan
    router.__class__ = type(router).__mro__[2]
    _rebind(router)


def _rebind(router: Any) -> None:
    """accelerate's hooks keep the forward that was there as a bound method, past the class."""
    if "_old_forward" in router.__dict__:
        router._old_forward = type(router).forward.__get__(router)
