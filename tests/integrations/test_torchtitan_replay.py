"""Recorded decisions in torchtitan's layers: what is replayed, what it costs, and what is refused.

Shapes: B sequences, L positions, E experts, T = B L tokens.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import circuitroute as cr
from circuitroute.routing.replay import importance_ratio, path_log_prob
from tests.integrations.test_torchtitan import B, E, L, Stack, build, dense, hidden, layer_config, torchtitan

pytestmark = pytest.mark.integrations

RULE = cr.Between(1, 4)
T, LAYERS = B * L, 2


def build_stack(rule: Any = RULE, **options: Any) -> Any:
    config = Stack.Config(layers=[layer_config(route_norm=True) for _ in range(LAYERS)])
    torchtitan.convert(config, rule, **{"seed": 0, **options})
    return build(config)


def random_record(tokens: int = T, layers: int = LAYERS, seed: int = 5) -> cr.RoutingRecord:
    """Decisions that no model made."""
    logits = torch.randn(layers, tokens, E, generator=torch.Generator().manual_seed(seed))
    keys = [cr.random_key(seed, i, torch.arange(tokens)) for i in range(layers)]
    circuit = cr.compile(RULE, E)
    return cr.RoutingRecord.of([circuit(z).sample(key=k).bool() for z, k in zip(logits, keys, strict=True)])


def routed(model: Any, x: Tensor) -> list[cr.Routing]:
    with torchtitan.recorded_routings(model) as routings:
        model(x)
    return list(routings)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("padding", ["auto", "distinct"])
def test_a_record_comes_back(padding: Any, training: bool) -> None:
    """Of a rollout in evaluation or in training: the same outputs, log-probabilities and load."""
    model = build_stack(padding=padding).train(training)
    torchtitan.begin_step(model, 7)
    with torchtitan.recorded_routings(model) as routings:
        output = model(hidden())
    record = cr.RoutingRecord.of(routings)
    again = build_stack(padding=padding, seed=None)
    torchtitan.replay(again, record)
    for mode in (training, not training):
        for layer in again.layers:
            layer.tokens_per_expert_E.zero_()
        with torchtitan.recorded_routings(again.train(mode)) as replayed:
            torch.testing.assert_close(again(hidden()), output)
        for layer, mask in zip(again.layers, record.masks(), strict=True):
            assert torch.equal(layer.tokens_per_expert_E, mask.sum(0).float() * mode)
        ratio = importance_ratio(path_log_prob(replayed), record.path_log_prob)
        torch.testing.assert_close(ratio, torch.ones(T))


@pytest.mark.parametrize("training", [True, False])
def test_the_layer_and_its_gradients_are_those_of_the_recorded_decision(training: bool) -> None:
    """Held to a dense layer; the bias of balancing moves the distribution, and no recorded decision."""
    layer = build(torchtitan.circuit_moe(layer_config(route_norm=True), RULE)).train(training)
    layer.expert_bias_E.copy_(torch.linspace(-3, 3, E))
    record = random_record(layers=1)
    torchtitan.replay(layer, record)
    x = hidden(requires_grad=True)
    with torchtitan.recorded_routings(layer) as routings:
        output = layer(x)
    (mask,) = record.masks()
    assert torch.equal(routings[0].mask, mask)
    logits = layer.router.gate(x).flatten(0, 1)
    alone = cr.route(logits, cr.compile(RULE, E), replay=mask, combine="sigmoid", training=training)
    gates = torch.where(mask, alone.gates, 0.0)
    weights = gates / gates.sum(-1, keepdim=True)
    torch.testing.assert_close(output, dense(layer, x, weights), atol=1e-5, rtol=1e-5)
    shifted = logits + layer.expert_bias_E
    torch.testing.assert_close(routings[0].log_prob, cr.compile(RULE, E)(shifted).log_prob(mask.float()))
    torch.autograd.grad(routings[0].log_prob.sum(), layer.router.gate.weight, retain_graph=True)
    found = torch.autograd.grad(output.square().sum(), [x, *layer.parameters()], retain_graph=True)
    routing = routings[0]
    reference = dense(layer, x, torch.where(routing.mask, routing.gates, 0.0))
    expected = torch.autograd.grad(reference.square().sum(), [x, *layer.parameters()])
    for own, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(own, wanted, atol=1e-4, rtol=1e-4)
        assert own.any()


def test_experts_run_what_was_recorded_and_probes() -> None:
    rows: list[int] = []
    for probes, expected in ((0, 0), (1, T)):
        model, record = build_stack(probes=probes), random_record()
        for layer in model.layers:
            layer.routed_experts.inner_experts.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
        torchtitan.begin_step(model, 0)
        torchtitan.replay(model, record)
        assert cr.RoutingRecord.of(routed(model, hidden()), log_probs=False) == record
        assert rows == [int(mask.sum()) + expected for mask in record.masks()]
        rows.clear()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputed_layers_replay_the_same(use_reentrant: bool) -> None:
    gradients = []
    for recompute in (False, True):
        model, x = build_stack(seed=None), hidden(requires_grad=True)
        torchtitan.replay(model, random_record())
        output = checkpoint(model, x, use_reentrant=use_reentrant, preserve_rng_state=False) if recompute else model(x)
        output.square().mean().backward()
        gradients.append([output.detach(), x.grad, *[parameter.grad for parameter in model.parameters()]])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(recomputed, plain)


def test_slots_of_a_serving_engine_are_replayed() -> None:
    """[tokens, layers, K] of vLLM and SGLang: the subsets count, not the order of their experts."""
    record = random_record()
    indices = torch.full((T, LAYERS, 4), -1)
    for i, mask in enumerate(record.masks()):
        for token, chosen in enumerate(mask):
            experts = chosen.nonzero().flatten().flip(0)
            indices[token, i, : len(experts)] = experts
    model = build_stack()
    torchtitan.replay(model, cr.RoutingRecord.of_indices(indices, E))
    assert cr.RoutingRecord.of(routed(model, hidden()), log_probs=False) == record


def test_it_ends_with_none() -> None:
    model, record = build_stack(), random_record()
    torchtitan.begin_step(model, 0)
    fresh = routed(model, hidden())
    torchtitan.replay(model, record)
    assert not torch.equal(routed(model, hidden())[0].mask, fresh[0].mask)
    torchtitan.replay(model, None)
    for routing, before in zip(routed(model, hidden()), fresh, strict=True):
        assert torch.equal(routing.mask, before.mask)


def forbidden() -> cr.RoutingRecord:
    masks = random_record().masks()
    masks[1][[2, 9]] = True
    return cr.RoutingRecord.of(masks)


@pytest.mark.parametrize(
    ("record", "error", "message"),
    [
        (random_record(layers=3), ValueError, r"record has layers of \[8, 8, 8\] experts.*routers \[8, 8\]"),
        (cr.RoutingRecord.of([torch.ones(T, 4).bool()] * 2), ValueError, r"record has layers of \[4, 4\] experts"),
        (forbidden(), ValueError, r"layer 1 has subsets that Between\(1, 4\) forbids, in rows 2, 9"),
        (cr.RoutingRecord(random_record().layers, temperature=0.5), ValueError, "was made at temperature 0.5"),
        (random_record().masks(), TypeError, "record is a list: expected a RoutingRecord"),
    ],
    ids=["layers", "experts", "subsets", "temperature", "masks"],
)
def test_wrong_records_are_refused_and_nothing_changes(record: Any, error: type[Exception], message: str) -> None:
    model, before = build_stack(), random_record(seed=6)
    torchtitan.replay(model, before)
    with pytest.raises(error, match=message):
        torchtitan.replay(model, record)
    assert cr.RoutingRecord.of(routed(model, hidden()), log_probs=False) == before


def test_a_record_of_other_tokens_is_refused_where_they_are_routed() -> None:
    model = build_stack()
    torchtitan.replay(model, random_record(T + 1))
    with pytest.raises(ValueError, match=rf"routes {T} tokens, and the record is of {T + 1}"):
        model(hidden())
    with pytest.raises(ValueError, match=r"has no router of circuitroute.integrations"):
        torchtitan.replay(build(layer_config()), random_record())
