"""The study: which distribution needs how many bits for a routing decision that it has not seen.

Every row is one fitted distribution of one layer (``layer``; -1 is all layers of a token together) of one model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch

import circuitroute as cr

from .decisions import ROUTERS, Decisions, recorded
from .models import BATCH, EM_STEPS, GRADIENT_STEPS, RATE, STEP_SIZE, Trained, baselines, bits, train_prior

Row: TypeAlias = dict[str, Any]

STATES = (2, 4, 8, 16)
TRAINING_STEPS, BATCHES = 200, 24  # of the demo's model; and of held-out text
GRADIENT_STATES = 8
CURVE_ROUTER, CURVE_STATES, CURVE_EVERY, CURVE_STEPS = "exact-k-0.25", 8, 10, 150
CURVE_LAYERS, CHOICE_LAYERS = (0,), (0, 1)
METHODS = ("em", "em-batches", "adam", "adam-batches")
ALL_LAYERS = -1
JOINT_STATES, JOINT_STEPS = 16, 100


def rows(
    seeds: Sequence[int], routers: Sequence[str], steps: int = TRAINING_STEPS, batches: int = BATCHES
) -> Iterator[Row]:
    """All rows, model by model."""
    for seed in seeds:
        for router in routers:
            with tempfile.TemporaryDirectory() as scratch:
                decisions = recorded(router, seed, steps, batches, Path(scratch))
            common = {"router": router, "seed": seed, "fitted": len(decisions.fit), "judged": len(decisions.test)}
            for row in _of_model(router, seed, decisions):
                yield {**common, **row}


def _of_model(router: str, seed: int, decisions: Decisions) -> Iterator[Row]:
    for layer in range(decisions.fit.shape[1]):
        one = Decisions(decisions.fit[:, layer], decisions.test[:, layer])
        circuit = cr.compile(ROUTERS[router], one.fit.shape[1])
        yield from _of_layer(layer, seed, one, circuit)
        if router == CURVE_ROUTER and layer in CHOICE_LAYERS:
            yield from _choices(layer, seed, one, circuit)
        if router == CURVE_ROUTER and layer in CURVE_LAYERS:
            yield from _curves(layer, seed, one, circuit)
    if router == CURVE_ROUTER:
        yield from _of_all_layers(seed, decisions)


def _of_layer(layer: int, seed: int, one: Decisions, circuit: cr.Circuit) -> Iterator[Row]:
    distinct = len(torch.unique(one.fit, dim=0))
    for name, fit in baselines(one.fit, circuit):
        row = {"part": "models", "layer": layer, "model": name, "states": None, "distinct": distinct}
        yield {**row, "bits": bits(fit.log_prob, one.test), "seconds": fit.seconds}
    for states in STATES:
        trained = train_prior(one.fit, "em", EM_STEPS, states=states, seed=seed)
        yield from _judged("models", layer, "em", states, trained, one, circuit)
    trained = train_prior(one.fit, "adam", GRADIENT_STEPS, states=GRADIENT_STATES, seed=seed)
    yield from _judged("models", layer, "adam", GRADIENT_STATES, trained, one, circuit)
    trained = train_prior(one.fit, "adam", GRADIENT_STEPS, circuit=circuit, states=GRADIENT_STATES, seed=seed)
    yield list(_judged("models", layer, "adam under the constraint", GRADIENT_STATES, trained, one, circuit))[1]


def _judged(
    part: str, layer: int, method: str, states: int, trained: Trained, one: Decisions, circuit: cr.Circuit, **more: Any
) -> Iterator[Row]:
    """The prior by itself, and times the constraint."""
    row = {"part": part, "layer": layer, "states": states, "method": method, "seconds": trained.seconds, **more}
    yield {**row, "model": "prior", "bits": bits(trained.prior.log_prob, one.test)}
    constrained = trained.prior.constrained(circuit)
    yield {**row, "model": "prior times constraint", "bits": bits(constrained.log_prob, one.test)}


def _choices(layer: int, seed: int, one: Decisions, circuit: cr.Circuit) -> Iterator[Row]:
    """Which layers, and which vtree."""
    for tree, vtree in (("balanced", None), ("clustered", cr.Vtree.clustered(one.fit))):
        for layers, states in (("cp", 4), ("tucker", 4), ("cp", 8), ("tucker", 8)):
            trained = train_prior(one.fit, "em", EM_STEPS, states=states, layers=layers, vtree=vtree, seed=seed)
            more = {"layers": layers, "vtree": tree}
            yield from _judged("choices", layer, "em", states, trained, one, circuit, **more)


def _curves(layer: int, seed: int, one: Decisions, circuit: cr.Circuit) -> Iterator[Row]:
    """Bits over steps and seconds: EM against gradient, on all data and on mini-batches."""
    for method in METHODS:
        found: list[Row] = []

        def watch(step: int, seconds: float, prior: cr.SubsetPrior, found: list[Row] = found) -> None:
            if step == 1 or step % CURVE_EVERY == 0:
                alone, times = (bits(each.log_prob, one.test) for each in (prior, prior.constrained(circuit)))
                found.append({"steps": step, "seconds": seconds, "bits": alone, "constrained": times})

        train_prior(one.fit, method, CURVE_STEPS, watch, states=CURVE_STATES, seed=seed)
        setting = {"rate": RATE, "step_size": STEP_SIZE, "batch": BATCH}
        yield from (
            {"part": "curves", "layer": layer, "method": method, "states": CURVE_STATES, **setting, **row}
            for row in found
        )


def _of_all_layers(seed: int, decisions: Decisions) -> Iterator[Row]:
    """One prior over all layers of a token, times every layer's constraint."""
    both = Decisions(*(part.flatten(1) for part in decisions))
    layers, experts = decisions.fit.shape[1:]
    rule = cr.EachGroup(cr.Groups(layers), ROUTERS[CURVE_ROUTER])
    circuit = cr.compile(rule, layers * experts)
    vtree = cr.Vtree.of_circuit(circuit)
    trained = train_prior(both.fit, "em-batches", JOINT_STEPS, states=JOINT_STATES, vtree=vtree, seed=seed)
    yield from _judged("models", ALL_LAYERS, "em-batches", JOINT_STATES, trained, both, circuit)
