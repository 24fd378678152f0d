"""Patch a model, and read a patched one back."""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

from torch import Tensor, nn

from circuitroute._validate import as_int
from circuitroute.compilation import compile as compile_constraint
from circuitroute.constraints import Constraint
from circuitroute.integrations.transformers.experts import (
    Padding,
    as_padding,
    choose_padding,
    ragged_form,
    register,
)
from circuitroute.integrations.transformers.extra import transformers
from circuitroute.integrations.transformers.families import Found, find_layers
from circuitroute.integrations.transformers.handle import BUDGET, SETTINGS, Handle, patched_routers
from circuitroute.integrations.transformers.routers import Eval, Plan, Session, exchange_class
from circuitroute.integrations.transformers.walk import Walk
from circuitroute.interop.reprs import parse_constraint
from circuitroute.layers.budget import Budget
from circuitroute.layers.budget_router import BudgetRouter
from circuitroute.routing.estimators import Estimator, as_estimator
from circuitroute.routing.weights import Combine, as_combine

FORMAT = 1
# Arguments of from_pretrained that say where files are.
WHERE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def patch(
    model: nn.Module,
    constraint: Constraint | Sequence[Constraint] | Mapping[int, Constraint] | Budget,
    *,
    combine: Combine | None = None,
    estimator: str | Estimator = "simple",
    padding: Padding = "auto",
    eval: Eval = "auto",
    seed: int | None = None,
) -> Handle:
    """Route the mixture-of-experts layers of a transformers model by circuitroute, in place.

    In training, every token's experts are sampled from the exact distribution over the allowed subsets, and gradients
    reach all logits through the estimator. In evaluation they are the mode.

    Args:
        model: of one of the families in :func:`supported`, wrapped by PEFT or not.
        constraint: one for all layers, a sequence with one per mixture-of-experts layer, or a mapping from the number
            of a layer in the model to its constraint; layers that it does not name stay as they are.
            :func:`own_constraints` gives those of the model. Or a :class:`circuitroute.Budget` over all of them (of a
            :class:`circuitroute.BudgetRouter` its preferences and estimates, shared with it): the experts of every
            token over all layers keep its total. It becomes ``model.circuitroute_budget``, in front of optimizers.
        combine: how chosen experts are weighted, see :func:`circuitroute.route`; None keeps the model's own rule
            with all its factors.
        estimator: see :func:`circuitroute.route`.
        padding: what unused slots hold where a token may have fewer experts than another: ``"distinct"``,
            ``"sentinel"`` or ``"ragged"`` (:mod:`circuitroute.integrations.transformers.experts`); ``"auto"`` takes
            the cheapest that is right with the experts implementation in force.
        eval: what to choose in evaluation: the ``"mode"``; ``"auto"`` leaves the choice to the stock router where the
            constraint is the model's own, so that outputs are those of the stock model: bit for bit without gradients,
            up to rounding with them. (DeepSeek-V3 picks groups greedily, by their two best experts, which is not always
            the mode.) With a budget both take the most probable number of experts under what is left of it, then the
            best subset of that size, whatever the model's own rule.
        seed: of the sampling keys, see :meth:`Handle.set_step`; None draws them from torch's global generator, which
            activation checkpointing winds back unless it is told not to (``preserve_rng_state=False``).

    Raises:
        ValueError: the model is patched already, or has no mixture-of-experts layers; constraints that do not fit
            them; a budget over another number of layers or experts, or in a model whose own rule is more than a count;
            an unknown option, or a padding that would be wrong here.
        TypeError: a router that is not supported, named; a constraint that is none.
        InfeasibleError: no subset of a layer's experts satisfies its constraint.
        ImportError: transformers is missing or too old.
    """
    transformers()
    _check_options(combine, estimator, padding, eval, seed)
    if next(patched_routers(model), None) is not None:
        raise ValueError(f"model={type(model).__name__} is patched already: call unpatch() of its handle first")
    layers = find_layers(model)
    numbers = _numbers(layers)
    budget = _budget(constraint, layers, numbers) if isinstance(constraint, Budget) else None
    constraints = _by_position(constraint if budget is None else budget.per_layer, numbers)
    session = Session(weakref.ref(model), seed)
    plans = {
        position: Plan(
            session=session,
            position=position,
            layer=numbers[position],
            family=layers[position].family,
            circuit=compile_constraint(wanted, _count_experts(layers[position])),
            own=budget is None and wanted == layers[position].family.constraint(layers[position].routers[0]),
            combine=combine,
            estimator=estimator,
            padding=padding,
            eval=eval,
            experts=layers[position].experts,
        )
        for position, wanted in constraints.items()
    }
    _set_implementations(list(plans.values()))
    for position, plan in plans.items():
        for router in layers[position].routers:
            exchange_class(router, plan)
    if budget is not None:
        model.add_module(BUDGET, budget)
        session.walk = Walk(budget, session.model)
    settings = _settings(len(layers), constraints, combine, estimator, padding, eval, seed)
    if budget is not None:
        settings["total"] = repr(budget.total)
    setattr(model.config, SETTINGS, settings)
    return Handle(model, session)


def _budget(given: Budget, layers: Sequence[Found], numbers: Sequence[int]) -> Budget:
    """The budget without routers of its own, where the model's are; checked to fit them."""
    if given.layers != len(layers):
        raise ValueError(
            f"constraint is a budget over layers={given.layers}, but the model has {len(layers)} mixture-of-experts "
            f"layers, {list(numbers)}"
        )
    for layer, number in zip(layers, numbers, strict=True):
        experts = _count_experts(layer)
        if given.num_experts != experts:
            raise ValueError(
                f"constraint is a budget with num_experts={given.num_experts}, but layer {number} has {experts}"
            )
        own = layer.family.constraint(layer.routers[0])
        if compile_constraint(own, experts).counts is None:
            raise ValueError(
                f"constraint is a budget, which is for counts, but layer {number} chooses by {own!r}: give constraints "
                f"without a budget"
            )
    budget = given.without_routers() if isinstance(given, BudgetRouter) else given
    first = next(layers[0].routers[0].parameters())
    return budget.to(first.device)


def _count_experts(layer: Found) -> int:
    router: Any = layer.routers[0]
    return int(router.num_experts)


def _set_implementations(plans: Sequence[Plan]) -> None:
    """Switch to ragged experts where padding asks for it; checks all layers before it changes one."""
    forms = {}
    for plan in plans:
        if plan.circuit.min_count < plan.circuit.max_count:
            form = ragged_form(plan.experts, plan.padding, plan.family)
            choose_padding(plan.experts, "distinct" if form else plan.padding, plan.family)
            if form is not None:
                config: Any = plan.experts.config
                forms[id(config)] = (config, form)
    if forms:
        register()
    for config, form in forms.values():
        config._experts_implementation = form


def get_handle(model: nn.Module) -> Handle:
    """The handle of a patched model, also of a copy of one.

    Raises:
        ValueError: the model is not patched.
    """
    router = next(patched_routers(model), None)
    if router is None:
        raise ValueError(f"model={type(model).__name__} is not patched: call patch() first")
    return Handle(model, router.circuitroute_plan.session)


def own_constraints(model: nn.Module) -> dict[int, Constraint]:
    """By number of the layer, the subsets that the routers of a stock model choose from.

    Raises:
        TypeError, ValueError: as :func:`patch`.
    """
    layers = find_layers(model)
    rules = (found.family.constraint(found.routers[0]) for found in layers)
    return dict(zip(_numbers(layers), rules, strict=True))


def load(path: Any, *, model_class: Any = None, **kwargs: Any) -> Any:
    """A patched model that was saved with ``save_pretrained``: loaded, and patched as it was.

    Plain ``from_pretrained`` loads the same weights with stock routers.

    Args:
        path: a directory or the name of a repository, as for ``from_pretrained``.
        model_class: what to load it as; by default the class that it was saved as.
        kwargs: for ``from_pretrained``.

    Returns:
        The model; :func:`get_handle` gives its handle.

    Raises:
        ValueError: it was not saved patched, or with a constraint or an estimator that cannot be read back.
        ImportError: transformers is missing or too old.
    """
    package = transformers()
    config = kwargs.pop("config", None) or package.AutoConfig.from_pretrained(path)
    constraints, total, options = _read_settings(path, getattr(config, SETTINGS, None))
    if model_class is None:
        names = getattr(config, "architectures", None) or ["AutoModelForCausalLM"]
        model_class = getattr(package, names[0], package.AutoModelForCausalLM)
    model = model_class.from_pretrained(path, config=config, **kwargs)
    numbers = _numbers(find_layers(model))
    if len(numbers) != len(constraints):
        raise ValueError(
            f"path={str(path)!r}: saved with {len(constraints)} mixture-of-experts layers, but the model has "
            f"{len(numbers)}"
        )
    named = {number: wanted for number, wanted in zip(numbers, constraints, strict=True) if wanted is not None}
    if total is None:
        patch(model, named, **options)
        return model
    budget = Budget(_count_experts(find_layers(model)[0]), len(named), list(named.values()), total)
    budget.load_state_dict(_saved_budget(path, kwargs))
    patch(model, budget, **options)
    return model


def _saved_budget(path: Any, kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The parameters of the budget among those of a saved model, which ``from_pretrained`` leaves out."""
    from safetensors import safe_open

    where = {name: kwargs[name] for name in WHERE if name in kwargs}
    find = partial(transformers().utils.cached_file, path, _raise_exceptions_for_missing_entries=False, **where)
    index = find("model.safetensors.index.json")
    if index is not None:
        weights = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        names = sorted({file for key, file in weights.items() if key.startswith(f"{BUDGET}.")})
    else:
        names = ["model.safetensors"]
    found: dict[str, Tensor] = {}
    for name in names:
        file = find(name)
        if file is not None:
            with safe_open(file, framework="pt") as tensors:
                prefixed = [key for key in tensors.keys() if key.startswith(f"{BUDGET}.")]  # noqa: SIM118
                found |= {key.removeprefix(f"{BUDGET}."): tensors.get_tensor(key) for key in prefixed}
    if not found:
        raise ValueError(
            f"path={str(path)!r}: the parameters of the budget, {BUDGET}.*, are not in its safetensors files"
        )
    return found


# ---------------------------------------------------------------------------------------------- arguments


def _check_options(
    combine: Combine | None, estimator: str | Estimator, padding: Padding, eval: Eval, seed: int | None
) -> None:
    if combine is not None:
        as_combine(combine)
    as_estimator(estimator)
    as_padding(padding)
    if eval not in get_args(Eval):
        raise ValueError(f"eval={eval!r}: choose one of {', '.join(map(repr, get_args(Eval)))}")
    if seed is not None:
        as_int("seed", seed)


def _numbers(layers: Sequence[Found]) -> list[int]:
    """The layers' numbers in the model, or their positions where those are not told by the names, or not unique."""
    found = [re.search(r"(?:^|\.)(\d+)(?=\.|$)", layer.name) for layer in layers]
    numbers = [int(match[1]) for match in found if match is not None]
    return numbers if len(set(numbers)) == len(layers) else list(range(len(layers)))


def _by_position(constraint: Any, numbers: Sequence[int]) -> dict[int, Constraint]:
    """What was asked for, by position among the mixture-of-experts layers."""
    if isinstance(constraint, Mapping):
        given = _mapped(constraint, numbers)
    elif isinstance(constraint, Sequence) and not isinstance(constraint, str):
        if len(constraint) != len(numbers):
            raise ValueError(
                f"constraint has {len(constraint)} entries, but the model has {len(numbers)} mixture-of-experts "
                f"layers, {list(numbers)}"
            )
        given = dict(enumerate(constraint))
    else:
        given = dict.fromkeys(range(len(numbers)), constraint)
    for position, wanted in given.items():
        if not isinstance(wanted, Constraint):
            raise TypeError(
                f"constraint for layer {numbers[position]} is {wanted!r}: expected a circuitroute Constraint, got "
                f"{type(wanted).__name__}"
            )
    return given


def _mapped(constraint: Mapping[int, Constraint], numbers: Sequence[int]) -> dict[int, Constraint]:
    unknown = [number for number in constraint if number not in numbers]
    if unknown or not constraint:
        raise ValueError(
            f"constraint names layers {unknown}, of which none is a mixture-of-experts layer; those are {list(numbers)}"
            if unknown
            else f"constraint={{}}: name at least one of the mixture-of-experts layers {list(numbers)}"
        )
    return {numbers.index(number): constraint[number] for number in sorted(constraint)}


# ---------------------------------------------------------------------------------------------- settings


def _settings(
    layers: int,
    constraints: Mapping[int, Constraint],
    combine: Combine | None,
    estimator: str | Estimator,
    padding: Padding,
    eval: Eval,
    seed: int | None,
) -> dict[str, Any]:
    """What ``save_pretrained`` keeps: plain JSON, with one entry for every mixture-of-experts layer."""
    return {
        "format": FORMAT,
        "constraints": [repr(constraints[i]) if i in constraints else None for i in range(layers)],
        "combine": combine,
        "estimator": estimator if isinstance(estimator, str) else repr(estimator),
        "padding": padding,
        "eval": eval,
        "seed": seed,
    }


def _read_settings(path: Any, settings: Any) -> tuple[list[Constraint | None], Constraint | None, dict[str, Any]]:
    """The constraints by position, the total of a budget, and the options of :func:`patch`."""
    place = f"path={str(path)!r}"
    if not isinstance(settings, dict) or not isinstance(settings.get("constraints"), list):
        raise ValueError(f"{place} was not saved from a patched model: load it with from_pretrained, and call patch()")
    if settings.get("format") != FORMAT:
        raise ValueError(f"{place} has settings of format {settings.get('format')!r}: this release reads {FORMAT}")
    options = {name: settings[name] for name in ("combine", "estimator", "padding", "eval", "seed") if name in settings}
    try:
        _check_options(**options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{place}: {error}. Load it with from_pretrained, and call patch()") from None
    constraints = [None if text is None else _read_constraint(place, text) for text in settings["constraints"]]
    total = settings.get("total")
    return constraints, None if total is None else _read_constraint(place, total), options


def _read_constraint(place: str, text: Any) -> Constraint:
    found = parse_constraint(text) if isinstance(text, str) else None
    if found is None:
        raise ValueError(
            f"{place}: the constraint {text!r} is not made of built-in constraints. Load it with from_pretrained, and "
            "call patch() with yours"
        )
    return found
