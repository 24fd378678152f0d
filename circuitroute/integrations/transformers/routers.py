"""Routers of transformers that decide through circuitroute: a router's class is replaced by a subclass of it.

So its parameters, names in the state dict, hooks and the recording of router logits remain as they were.

``forward`` is run again under activation checkpointing and must decide the same: it decides with the setting of its
first run (:mod:`circuitroute.integrations.transformers.session`), and changes nothing that a decision depends on. It
leaves a record of its decision, which it never reads, and with a budget over the layers what the pass has spent, for
the layers after it (:mod:`circuitroute.integrations.transformers.walk`).

Legend: T tokens, H hidden size, E experts, K slots.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn

from circuitroute._tensors import without_autocast
from circuitroute.inference.circuit import Circuit
from circuitroute.inference.distribution import SubsetDistribution
from circuitroute.integrations.transformers.controls import Control
from circuitroute.integrations.transformers.experts import (
    choose_padding,
    encoded_probes,
    ragged_form,
    register,
)
from circuitroute.integrations.transformers.families import Family
from circuitroute.integrations.transformers.session import Session, Setting
from circuitroute.integrations.transformers.settings import Options
from circuitroute.routing.choice import Batch, Rule, as_share, decide, shift_of
from circuitroute.routing.decision import Decision, Routing, chosen_first
from circuitroute.routing.estimators import Dense, as_estimator
from circuitroute.routing.probes import padded_with_probes, probe_slots, probe_weights
from circuitroute.routing.route import routed
from circuitroute.routing.weights import estimated_mask

PREFIX = "Circuit"
# The attribute of a patched model that leads to its session.
OWNER = "circuitroute_owner"


@dataclass(frozen=True, eq=False)
class Plan:
    """How one layer routes.

    Attributes:
        session: shared by all layers.
        position: of the layer among the mixture-of-experts layers.
        layer: its number in the model, which enters the sampling keys.
        own: whether the constraint is the model's own rule.
        experts: the module that the decision is for; it determines how unused slots are padded.
    """

    session: Session
    position: int
    layer: int
    family: Family
    circuit: Circuit
    own: bool
    experts: nn.Module

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        """A copied model gets its own session; a copied layer, as PEFT makes them, remains in that of its model."""
        if id(self.session.model()) not in memo:
            return self
        return replace(self, session=copy.deepcopy(self.session, memo), experts=copy.deepcopy(self.experts, memo))

    def evaluates_as_stock(self, setting: Setting) -> bool:
        """Whether evaluation takes the choice of the stock router."""
        free = self.session.walk is None and setting.replay is None and self.position not in setting.controls
        return free and self.own and setting.options.eval == "auto"

    def keys(self, router: nn.Module, logits: Tensor, setting: Setting) -> Tensor | None:
        """[T] what the decision and the probes for router logits [T, E] are drawn with; None outside training."""
        return setting.keys(self.layer, len(logits), logits.device) if router.training else None

    def replayed(self, logits: Tensor, setting: Setting) -> Tensor | None:
        """[T, E] bool, the recorded decision for router logits [T, E]; None where nothing is replayed.

        Raises:
            ValueError: it is of another number of tokens.
        """
        if setting.replay is None:
            return None
        mask = setting.replay.masks[self.position]
        if len(mask) != len(logits):
            raise ValueError(
                f"handle.replay() was given a record of {len(mask)} tokens, and the router of layer {self.layer} "
                f"{len(logits)}: replay one forward pass over all tokens of the batch in order, padding included "
                "(record[...] takes some of them); generation, which runs token by token, wants handle.replay(None)"
            )
        return mask

    def decide(
        self, router: nn.Module, logits: Tensor, setting: Setting, key: Tensor | None, replay: Tensor | None
    ) -> Routing:
        """The decision for router logits [T, E]: ``replay`` if given, else sampled in training, and the mode otherwise.

        With a budget, evaluation takes the most probable count under what is left, then its best subset.
        """
        walk = self.session.walk
        if walk is None:
            return self._decide(router, logits, setting, key, replay, "mode", None)
        if self.position == 0:
            self.session.keep()
        choose = partial(self._decide, router, logits, setting, key, replay, "count")
        return walk.decide(self.position, logits, router.training, choose)

    def _decide(
        self,
        router: nn.Module,
        logits: Tensor,
        setting: Setting,
        key: Tensor | None,
        replay: Tensor | None,
        rule: Rule,
        count_potential: Tensor | None,
    ) -> Routing:
        choice, options = self.family.choice(router, logits), setting.options
        batch = Batch.of(
            choice,
            self.circuit,
            temperature=options.temperature,
            key=key,
            shift=shift_of(*setting.controls.get(self.position, Control()), choice, self.circuit.n),
            count_potential=count_potential,
            validate_args=False,
        )
        given = batch.logits if choice is logits else logits.to(batch.logits.dtype)
        share = as_share(options.decide, options.estimator) if router.training else 0.0
        combine = self.family.combine(router) if options.combine is None else options.combine
        if isinstance(combine, str):
            settings: dict[str, Any] = {"combine": combine, "estimator": options.estimator, "rule": rule}
            decided = routed(batch._replace(logits=given), share, replay=replay, **settings)
            return decided.weighed(decided.gates, batch.logits)
        decision = decide(batch, share=share, rule=rule, replay=replay)
        return decision.routing(self._weigh(decision, combine, given))

    def _weigh(self, decision: Decision, rule: Any, logits: Tensor) -> Tensor:
        """[T, E] gates by a family's own rule, from the router's logits without any shift for the choice."""
        estimator = self.session.options.estimator
        with without_autocast(logits):
            g = estimated_mask(decision, estimator)
            dense = self.family.weighs_unchosen and isinstance(as_estimator(estimator), Dense)
            rule = partial(rule, dense=True) if dense else rule
            gates: Tensor = rule(g, decision.mask, logits, max(1, self.circuit.max_count))
            return gates

    def project(self, routing: Routing) -> tuple[Tensor, Tensor]:
        """Weights and indices [T, K], the chosen experts first and by decreasing logit; no probes."""
        if self.circuit.min_count == self.circuit.max_count > 0:
            indices = chosen_first(routing.mask, routing.logits.detach(), self.circuit.max_count)
            return routing.gates.gather(-1, indices), indices
        distinct = choose_padding(self.experts, self.session.options.padding, self.family) == "distinct"
        return routing.padded(pad="distinct" if distinct else "sentinel")

    def project_with_probes(self, routing: Routing, options: Options, key: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weights and indices with slots for probes, drawn with the key of the decision; at most P per token.

        [T, K + P], encoded for ragged experts; else [T, min(K + P, E)].
        """
        E, slots = self.circuit.n, self.probe_slots(options)
        weight = probe_weights(routing, options.probes, key, options.probe_weights)
        padding = choose_padding(self.experts, options.padding, self.family)
        if padding != "ragged":
            width = min(routing.max_count + slots, E)
            return padded_with_probes(routing, weight, width, "sentinel" if padding == "sentinel" else "distinct")
        probed = weight > 0
        chosen, experts = self.project(routing)
        probes = chosen_first(probed, routing.logits.detach(), slots)
        used = probed.gather(-1, probes)
        worth = torch.where(used, (routing.gates * weight).gather(-1, probes), 0.0)
        encoded = encoded_probes(torch.where(used, probes, E), E)
        return torch.cat([chosen, worth], -1), torch.cat([experts, encoded], -1)

    def probe_slots(self, options: Options) -> int:
        """P, the most probes that a token may have."""
        return probe_slots(self.circuit, options.probes)

    def as_routing(
        self, router: nn.Module, logits: Tensor, indices: Tensor, weights: Tensor, temperature: float
    ) -> Routing:
        """The decision that the stock router made."""
        untempered = SubsetDistribution(self.circuit, self.family.choice(router, logits), validate_args=False)
        mask = as_mask(indices, self.circuit.n)
        gates = torch.zeros_like(untempered.logits).scatter(-1, indices, weights.to(untempered.logits.dtype))
        return Routing(untempered.tempered(temperature), mask, gates, untempered, temperature=temperature)


def as_mask(indices: Tensor, experts: int) -> Tensor:
    """[T, E] bool from indices [T, K]."""
    mask = torch.zeros(len(indices), experts, dtype=torch.bool, device=indices.device)
    return mask.scatter(-1, indices, True)


class CircuitRouting(nn.Module):
    """What a patched router is in addition to its stock class."""

    circuitroute_plan: Plan

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(router logits [T, E], weights [T, K], indices [T, K]) of hidden states [..., H], as in transformers."""
        plan = self.circuitroute_plan
        setting = plan.session.setting(self.training)
        as_stock = plan.evaluates_as_stock(setting) and not self.training
        if as_stock and not _needs_gradient(self, hidden_states):
            logits, weights, indices = super().forward(hidden_states)
            if plan.session.recording:
                made = plan.as_routing(self, logits, indices, weights, setting.options.temperature)
                plan.session.record(plan.position, made)
            return logits, weights, indices
        logits = plan.family.logits(self, hidden_states)
        replay = plan.replayed(logits, setting)
        if as_stock:
            with torch.no_grad():
                replay = as_mask(super().forward(hidden_states)[2], plan.circuit.n)
        key = plan.keys(self, logits, setting)
        routing = plan.decide(self, logits, setting, key, replay)
        plan.session.record(plan.position, routing)
        # Probes are for the gates' gradient: without one there are none.
        probing = self.training and plan.probe_slots(setting.options) > 0 and routing.gates.requires_grad
        found = plan.project_with_probes(routing, setting.options, key) if probing else plan.project(routing)
        weights, indices = plan.family.fitted(plan.experts, *found, plan.circuit.n)
        return logits, weights.to(plan.family.dtype(hidden_states, logits)), indices

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        # The class has no name to be found by: it is made again, of the stock class, which has one.
        if type(self) not in _classes.values():
            return super().__reduce_ex__(protocol)
        return _unpickled, (type(self).__mro__[2],), self.__getstate__()  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        """What repr() shows."""
        return f"constraint={self.circuitroute_plan.circuit.constraint!r}"


def _needs_gradient(router: nn.Module, hidden: Tensor) -> bool:
    return torch.is_grad_enabled() and (hidden.requires_grad or any(p.requires_grad for p in router.parameters()))


def use_ragged_experts(plans: Iterable[Plan], options: Options) -> None:
    """Switch to ragged experts where ``options`` ask for them; all layers are checked before any is changed.

    Raises:
        ValueError: a padding that would be wrong, or probes where unchosen experts have no weight.
    """
    switches = []
    for plan in plans:
        probes, family = bool(options.probes), plan.family
        if probes and options.combine is None and not family.weighs_unchosen:
            raise ValueError(
                f"probes={options.probes!r} would be run in vain with the own rule of {family.name}, by which experts "
                "that are not chosen have no weight: give combine='normalized' or another rule, or probes=0"
            )
        if probes or plan.circuit.min_count < plan.circuit.max_count:
            form = ragged_form(plan.experts, options.padding, family, probes)
            if form is None:
                choose_padding(plan.experts, options.padding, family)  # refuses a padding that would be wrong
            else:
                config: Any = plan.experts.config
                switches.append((config, form))
    if switches:
        register()
    for config, form in switches:
        config._experts_implementation = form


_classes: dict[type[nn.Module], type[CircuitRouting]] = {}


def _class_of(stock: type[nn.Module]) -> type[CircuitRouting]:
    """The class of patched routers of that class."""
    if stock not in _classes:
        _classes[stock] = type(PREFIX + stock.__name__, (CircuitRouting, stock), {"__module__": __name__})
    return _classes[stock]


def _unpickled(stock: type[nn.Module]) -> CircuitRouting:
    """A patched router that is about to be given its state, perhaps in a process that has patched nothing yet."""
    register()
    return object.__new__(_class_of(stock))


def exchange_class(router: nn.Module, plan: Plan) -> None:
    """Let a router decide by ``plan``."""
    router.__class__ = _class_of(type(router))
    router.circuitroute_plan = plan  # type: ignore[assignment]
    _rebind(router)


def restore_class(router: CircuitRouting) -> None:
    """Undo :func:`exchange_class`.

    Raises:
        RuntimeError: a training library has replaced the class in turn, as FSDP does.
    """
    if type(router) not in _classes.values():
        raise RuntimeError(
            f"a router has become a {type(router).__name__} since it was patched: unpatch the model before wrapping it"
        )
    del router.circuitroute_plan
    router.__class__ = type(router).__mro__[2]
    _rebind(router)


def _rebind(router: Any) -> None:
    """accelerate's hooks keep the bound forward that they found, which does not follow the class."""
    if "_old_forward" in router.__dict__:
        router._old_forward = type(router).forward.__get__(router)
