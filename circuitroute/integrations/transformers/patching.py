"""Patch a model."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from circuitroute._validate import as_int, present
from circuitroute.compilation import compile as compile_constraint
from circuitroute.constraints import Constraint, CountIn
from circuitroute.inference.circuit import Circuit
from circuitroute.integrations.hosted import one_per_layer
from circuitroute.integrations.transformers.experts import Padding
from circuitroute.integrations.transformers.extra import transformers
from circuitroute.integrations.transformers.families import Found, find_layers
from circuitroute.integrations.transformers.handle import BUDGET, Handle, patched_routers
from circuitroute.integrations.transformers.routers import OWNER, Plan, exchange_class, use_ragged_experts
from circuitroute.integrations.transformers.session import Owner, Session
from circuitroute.integrations.transformers.settings import SETTINGS, Eval, Options, as_json, as_rule
from circuitroute.integrations.transformers.walk import Walk
from circuitroute.interop.reprs import rebuilt
from circuitroute.layers.budget import Budget
from circuitroute.layers.budget_router import BudgetRouter
from circuitroute.routing.choice import Decide
from circuitroute.routing.estimators import Estimator
from circuitroute.routing.probes import ProbeCount, ProbeWeights, plain_probe_weights
from circuitroute.routing.weights import Combine, as_combine


def patch(
    model: nn.Module,
    constraint: Constraint | Circuit | Sequence[Constraint | Circuit] | Mapping[int, Constraint | Circuit] | Budget,
    *,
    combine: Combine | None = None,
    estimator: str | Estimator = "simple",
    padding: Padding = "auto",
    eval: Eval = "auto",
    seed: int | None = None,
    decide: Decide | float | None = None,
    temperature: float = 1.0,
    probes: ProbeCount = 0,
    probe_weights: ProbeWeights = "importance",
) -> Handle:
    """Let circuitroute route the mixture-of-experts layers of a transformers model, in place.

    In training, every token's experts are sampled from the exact distribution over the allowed subsets, and gradients
    reach all logits through the estimator. In evaluation they are the mode.

    Args:
        model: of one of the families in :func:`supported`; it may be wrapped by PEFT.
        constraint: one for all layers, a sequence with one per mixture-of-experts layer, or a mapping from the numbers
            of layers in the model to constraints; layers that it does not name stay as they are.
            :func:`own_constraints` returns those of the model. Circuits, compiled already or read from files, are taken
            wherever constraints are; a saved model holds them. Or a :class:`circuitroute.Budget` over all layers, to
            which the experts of every token keep. It becomes ``model.circuitroute_budget``: patch before optimizers
            are made. Of a :class:`circuitroute.BudgetRouter`, the preferences and estimates are taken, and shared.
        combine: how chosen experts are weighted, see :func:`circuitroute.route`; None keeps the model's own rule
            with all its factors.
        estimator: see :func:`circuitroute.route`.
        padding: what fills unused slots where tokens may have different numbers of experts: ``"distinct"``,
            ``"sentinel"`` or ``"ragged"`` (:mod:`circuitroute.integrations.transformers.experts`); ``"auto"`` takes
            the cheapest that is correct with the current experts implementation.
        eval: what evaluation chooses: ``"mode"``, or ``"auto"``, which leaves the choice to the stock router where the
            constraint is the model's own. Outputs are then those of the stock model, bit for bit without gradients and
            up to rounding with them. (DeepSeek-V3 picks groups greedily, by their two best experts, which is not always
            the mode.) With a budget, both take the most probable number of experts under what is left of it, then the
            best subset of that size, whatever the model's own rule.
        seed: of the sampling keys, see :meth:`Handle.set_step`; None draws from torch's global generator, which
            activation checkpointing restores unless ``preserve_rng_state=False``.
        decide: how, in training, see :func:`circuitroute.route`; with a budget ``"mode"`` is the rule of evaluation.
        temperature: of decisions in training, see :func:`circuitroute.route`; :attr:`Handle.temperature` changes it.
        probes, probe_weights: in training, how many unchosen experts every token runs besides, or ``"all"``, and how
            much each counts in the gradient of the gates: see :class:`circuitroute.MoE`. In value they weigh 0, and
            they take no gradient themselves. None are run in evaluation, or where gates have no gradient, as under
            ``torch.no_grad()``. :attr:`Handle.probes` changes their number.

    Raises:
        ValueError: the model is already patched, or has no mixture-of-experts layers; constraints that do not fit
            them; a budget over another number of layers or experts, or for a model whose own rule is not a count;
            an unknown option, or a padding that would be wrong here; probes where unchosen experts' gates have no
            gradient (the estimators ``"none"`` and ``"score"``, Phi-MoE's own rule).
        TypeError: a router that is not supported, or a constraint of the wrong kind.
        InfeasibleError: no subset of a layer's experts satisfies its constraint.
        ImportError: transformers is missing or too old.
    """
    transformers()
    seed = None if seed is None else as_int("seed", seed)
    combine = None if combine is None else as_combine(combine)
    probe_weights = plain_probe_weights(probe_weights)
    options = Options(combine, estimator, padding, eval, seed, decide, temperature, probes, probe_weights)
    if next(patched_routers(model), None) is not None:
        raise ValueError(f"model={type(model).__name__} is patched already: call unpatch() of its handle first")
    layers = find_layers(model)
    budget = _fitted(constraint, layers) if isinstance(constraint, Budget) else None
    constraints = _by_position(constraint if budget is None else budget.per_layer, layers)
    session = Session(weakref.ref(model), options)
    plans = {position: _plan(session, position, layers[position], rule) for position, rule in constraints.items()}
    use_ragged_experts(plans.values(), options)
    for position, plan in plans.items():
        for router in layers[position].routers:
            exchange_class(router, plan)
    if budget is not None:
        model.add_module(BUDGET, budget)
        session.walk = Walk(budget, session.recomputation)
    setattr(model, OWNER, Owner(session))
    rules = [as_rule(constraints[i], plans[i].circuit) if i in plans else None for i in range(len(layers))]
    total = None if budget is None else _kept_total(budget)
    setattr(model.config, SETTINGS, as_json(options, rules, total))
    return Handle(model, session)


def get_handle(model: nn.Module) -> Handle:
    """The handle of a patched model, or of a copy of one.

    Raises:
        ValueError: the model is not patched.
    """
    router = next(patched_routers(model), None)
    if router is None:
        raise ValueError(f"model={type(model).__name__} is not patched: call patch() first")
    return Handle(model, router.circuitroute_plan.session)


def own_constraints(model: nn.Module) -> dict[int, Constraint]:
    """The subsets that the routers of a stock model choose from, by the number of the layer.

    Raises:
        TypeError, ValueError: as :func:`patch`.
    """
    return {layer.number: layer.own_constraint for layer in find_layers(model)}


def _by_position(constraint: Any, layers: Sequence[Found]) -> dict[int, Constraint | Circuit]:
    """The constraints of the layers to patch, by position among the mixture-of-experts layers."""
    if not isinstance(constraint, Mapping):
        return dict(enumerate(one_per_layer(constraint, len(layers))))
    numbers = [layer.number for layer in layers]
    if not constraint or not set(constraint).issubset(numbers):
        raise ValueError(
            f"constraint names layers {list(constraint)}: name at least one mixture-of-experts layer, and no other "
            f"layers; those are {numbers}"
        )
    return {position: constraint[number] for position, number in enumerate(numbers) if number in constraint}


def _fitted(given: Budget, layers: Sequence[Found]) -> Budget:
    """The budget without its routers, on the device of the model; refused unless it fits the layers."""
    if given.layers != len(layers):
        raise ValueError(
            f"constraint is a budget over layers={given.layers}, but the model has {len(layers)} mixture-of-experts "
            f"layers, {[layer.number for layer in layers]}"
        )
    for layer in layers:
        if given.num_experts != layer.num_experts:
            raise ValueError(
                f"constraint is a budget with num_experts={given.num_experts}, but layer {layer.number} has "
                f"{layer.num_experts}"
            )
        if compile_constraint(layer.own_constraint, layer.num_experts).counts is None:
            raise ValueError(
                f"constraint is a budget, which bounds counts, but layer {layer.number} chooses by "
                f"{layer.own_constraint!r}: give constraints without a budget"
            )
    budget = given.without_routers() if isinstance(given, BudgetRouter) else given
    return budget.to(next(layers[0].routers[0].parameters()).device)


def _kept_total(budget: Budget) -> Constraint:
    """The total as a constraint that its text tells all of: of others, the counts are what matters."""
    if isinstance(budget.total, Constraint) and rebuilt(budget.total) is not None:
        return budget.total
    counts = compile_constraint(budget.total, budget.layers * budget.num_experts).counts
    return CountIn(present(counts, "a budget's total is a count"))


def _plan(session: Session, position: int, layer: Found, constraint: Constraint | Circuit) -> Plan:
    circuit = compile_constraint(constraint, layer.num_experts)
    return Plan(
        session=session,
        position=position,
        layer=layer.number,
        family=layer.family,
        circuit=circuit,
        own=circuit.constraint == layer.own_constraint,
        experts=layer.experts,
    )
