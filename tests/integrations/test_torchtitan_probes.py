"""Probes in torchtitan's layers: what they teach the gates, and what they leave alone.

Shapes: B sequences, L positions, E experts, T = B L tokens.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import circuitroute as cr
from circuitroute.routing.probes import draw_probes
from tests.integrations.test_torchtitan import B, E, L, Stack, build, hidden, layer_config, torchtitan

pytestmark = pytest.mark.integrations


def build_probed(constraint: cr.Constraint, *, seed: int | None = 0, route_norm: bool = True, **options: Any) -> Any:
    config = torchtitan.circuit_moe(layer_config(route_norm=route_norm), constraint, seed=seed, **options)
    layer = build(config)
    torchtitan.begin_step(layer, 0)
    return layer


def gradients_of(layer: Any, output: Tensor, x: Tensor) -> list[Tensor]:
    """Of the input and the parameters, the gate's first."""
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(4))
    parameters = [layer.router.gate.weight, *layer.routed_experts.parameters()]
    return list(torch.autograd.grad(output, [x, *parameters], upstream, retain_graph=True))


@pytest.mark.parametrize("constraint", [cr.Exactly(2), cr.Between(1, 4), cr.Between(0, E - 1)], ids=repr)
@pytest.mark.parametrize("probes", [1, 2, "all"])
@pytest.mark.parametrize("route_norm", [False, True])
def test_probes_teach_the_gates_what_a_dense_layer_would(
    constraint: cr.Constraint, probes: Any, route_norm: bool
) -> None:
    """All experts are run, in a dense layer, but only those drawn count, with their weights; written plainly."""
    layer = build_probed(constraint, probes=probes, temperature=0.7, route_norm=route_norm)
    x = hidden(requires_grad=True)
    with torchtitan.recorded_routings(layer) as routings:
        output = layer(x)
    (routing,) = routings
    weight_TE = torch.zeros(B * L, E)
    if probes == "all":
        weight_TE[~routing.mask] = 1.0
    else:
        drawn = draw_probes(routing, probes, cr.random_key(0, 0, 0, torch.arange(B * L)))
        weight_TE[drawn.token, drawn.expert] = drawn.weight
    experts = layer.routed_experts.inner_experts
    outputs = torch.stack([experts.expert(e, x.flatten(0, 1)) for e in range(E)], 1)
    chosen = (outputs * torch.where(routing.mask, routing.gates, 0.0)[..., None]).sum(1)
    probed = (outputs.detach() * (routing.gates * weight_TE)[..., None]).sum(1)
    torch.testing.assert_close(output, (chosen + probed).view_as(x), atol=1e-5, rtol=1e-5)
    expected = gradients_of(layer, (chosen + probed).view_as(x), x)
    for found, wanted in zip(gradients_of(layer, output, x), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    without = gradients_of(layer, chosen.view_as(x), x)
    assert not torch.allclose(without[1], expected[1], rtol=0.05)


@pytest.mark.parametrize("constraint", [cr.Exactly(2), cr.Between(1, 4)], ids=repr)
def test_all_probes_with_the_estimator_dense_are_densemixer(constraint: cr.Constraint) -> None:
    """Scores of all experts over the sum of the chosen ones, which is a constant to the others."""
    layer = build_probed(constraint, probes="all", estimator="dense", decide="mode")
    x = hidden(requires_grad=True)
    with torchtitan.recorded_routings(layer) as routings:
        output = layer(x)
    mask = routings[0].mask
    experts = layer.routed_experts.inner_experts
    outputs = torch.stack([experts.expert(e, x.flatten(0, 1)) for e in range(E)], 1)
    scores = layer.router.gate(x).flatten(0, 1).sigmoid()
    total = (scores * mask).sum(-1, keepdim=True)
    weights = torch.where(mask, scores / total, scores / total.detach())
    mixed = (torch.where(mask[..., None], outputs, outputs.detach()) * weights[..., None]).sum(1).view_as(x)
    for found, wanted in zip(gradients_of(layer, output, x), gradients_of(layer, mixed, x), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("constraint", [cr.Exactly(2), cr.Between(1, 4)], ids=repr)
@pytest.mark.parametrize("probes", [1, "all"])
@pytest.mark.parametrize("seed", [0, None])
def test_probes_change_no_output_no_decision_and_no_load(
    constraint: cr.Constraint, probes: Any, seed: int | None
) -> None:
    found = []
    for count in (0, probes):
        layer, x = build_probed(constraint, seed=seed, probes=count), hidden(requires_grad=True)
        torch.manual_seed(3)
        with torchtitan.recorded_routings(layer) as routings:
            output = layer(x)
        experts = torch.autograd.grad(output.square().sum(), list(layer.routed_experts.parameters()))
        assert torch.equal(layer.tokens_per_expert_E, routings[0].mask.sum(0).float())
        found.append((routings[0].mask, routings[0].gates, output, *experts))
    for plain, probed in zip(*found, strict=True):
        torch.testing.assert_close(probed, plain, rtol=1e-6, atol=1e-5)
    assert torch.equal(found[0][0], found[1][0])


def test_slots_for_probes_are_there_only_where_probes_are_run() -> None:
    layer, rows = build_probed(cr.Between(1, 4), probes=2, padding="distinct"), []
    layer.routed_experts.inner_experts.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    plain = build_probed(cr.Between(1, 4))
    for training, gradients, slots in ((True, True, 6), (True, False, 4), (False, True, 4), (True, True, 6)):
        with torch.set_grad_enabled(gradients):
            output = layer.train(training)(hidden())
            expected = plain.train(training)(hidden())
        assert rows.pop() == B * L * slots
        torch.testing.assert_close(output, expected)
    assert layer.router.eval()(hidden())[0].shape == (B, L, 4)


def test_tokens_with_most_experts_chosen_have_fewer_probes() -> None:
    """Ids stay distinct where there are fewer experts than slots; a token with all of them has no probe."""
    layer = build_probed(cr.Between(1, E), probes=3)
    with torchtitan.recorded_routings(layer) as routings:
        weights, ids, _ = layer.router(hidden())
    assert ids.shape == (B, L, E)
    assert torch.equal(ids.sort(-1).values, torch.arange(E).expand(B, L, E))
    dense_of = torch.zeros(B, L, E).scatter(-1, ids, weights).flatten(0, 1)
    assert torch.equal(dense_of > 0, routings[0].mask)


@pytest.mark.parametrize("seed", [0, None])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_probes_the_same(seed: int | None, use_reentrant: bool) -> None:
    """Of two layers in one segment: the second decides the same although probes of the first were drawn."""
    gradients = []
    for recompute in (False, True):
        config = Stack.Config(layers=[layer_config(), layer_config()])
        torchtitan.convert(config, cr.Between(1, 4), seed=seed, probes=1)
        model, x = build(config), hidden(requires_grad=True)
        torchtitan.begin_step(model, 0)
        torch.manual_seed(3)
        output = checkpoint(model, x, use_reentrant=use_reentrant) if recompute else model(x)
        output.square().mean().backward()
        gradients.append([output.detach(), x.grad, *[parameter.grad for parameter in model.parameters()]])
    for plain, recomputed in zip(*gradients, strict=True):
        # Without gradients there are no probes, and other batches per expert, which round in another way.
        torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"probes": -1}, ValueError, "probes=-1: must be at least 0"),
        ({"probes": "some"}, TypeError, "probes='some': expected an integer"),
        ({"probes": 1, "probe_weights": "both"}, ValueError, "probe_weights='both': choose 'importance'"),
        ({"probes": 1, "estimator": "none"}, ValueError, r"probes=1 with estimator=.*probes would run in vain"),
    ],
)
def test_probes_that_make_no_sense_are_refused(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        torchtitan.circuit_moe(layer_config(), cr.Exactly(2), **options)
