"""What a probe is worth goes to the gate alone: 0 in value always, whatever the expert gives, and one gradient.

Legend: T tokens, H hidden size, E experts, S probes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import circuitroute as cr
from circuitroute.routing.probes import draw_probes, every_unchosen, with_worth
from tests.test_probes import E, H, T, gradients, hidden_of, key_of, layer_of, outputs_of, upstream_of

S = 20


@pytest.mark.parametrize("spoilt", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("stacked", [False, True], ids=["modules", "stacked"])
@pytest.mark.parametrize("probes", [1, "all"])
def test_a_probe_that_is_not_finite_adds_nothing_to_output_and_gradient(
    probes: Any, stacked: bool, spoilt: float
) -> None:
    """As if that expert's output had been 0 there; all other probes still teach."""
    layer = layer_of(cr.Exactly(2), probes=probes, stacked=stacked, decide="mode").double()
    logits, hidden = hidden_of(T, dtype=torch.float64) @ torch.randn(H, E).double(), hidden_of(T, dtype=torch.float64)
    logits[:, 3] = -20.0  # never chosen
    routing = cr.route(logits.requires_grad_(), layer.router.circuit, decide="mode", temperature=100.0)
    last = layer.experts.down[3] if stacked else layer.experts[3][2].weight
    with torch.no_grad():
        last[1] = spoilt
    drawn = every_unchosen(routing) if probes == "all" else draw_probes(routing, 1, key_of())
    assert bool((drawn.expert == 3).any())
    each = outputs_of(layer, hidden).detach()
    assert not each[:, 3].isfinite().any(0).all()
    each[:, 3] = 0.0
    weights = routing.mask.double().index_put((drawn.token, drawn.expert), drawn.weight)
    expected = torch.einsum("te,teh->th", routing.gates * weights, each)
    plain, _ = cr.MoE(None, layer.experts)(hidden, routing=routing)
    found, _ = cr.MoE(None, layer.experts, probes)(hidden, routing=routing, key=key_of())
    assert torch.equal(found, plain)
    gradients = [
        torch.autograd.grad((y * upstream_of(y)).sum(), logits, retain_graph=True)[0] for y in (found, expected)
    ]
    assert bool(gradients[0].isfinite().all())
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("narrow", [False, True])
def test_the_gradient_is_that_of_adding_the_probes(dtype: torch.dtype, narrow: bool) -> None:
    """Held to index_add in float64 with gates of 0; outputs may be narrower than what they would be added to."""
    draw = torch.Generator().manual_seed(0)
    combined, gates = torch.randn(T, H, generator=draw).to(dtype).requires_grad_(), torch.zeros(S).requires_grad_()
    outputs = torch.randn(S, H, generator=draw).to(torch.bfloat16 if narrow else dtype)
    token = torch.randint(T, (S,), generator=draw)
    upstream = torch.randn(T, H, generator=draw).to(dtype)
    found = with_worth(combined.clone(), gates, outputs, token)
    exact = combined.double().index_add(0, token, outputs.double() * gates.double()[:, None])
    assert torch.equal(found, combined)
    to_combined, to_gates = torch.autograd.grad(found, (combined, gates), upstream)
    expected = torch.autograd.grad(exact, (combined, gates), upstream.double())
    assert torch.equal(to_combined, upstream)
    assert to_gates.dtype == torch.float32
    torch.testing.assert_close(to_gates, expected[1], rtol=1e-6, atol=1e-6)  # of a sum of 3 products in float32


def test_a_gradient_that_is_not_finite_is_not_hidden() -> None:
    """What goes wrong further up must still be seen, as by a scaler of losses."""
    gates, token = torch.zeros(2, requires_grad=True), torch.tensor([0, 1])
    upstream = torch.tensor([[1.0, torch.inf], [1.0, 1.0]])
    found = with_worth(torch.zeros(2, 2), gates, torch.ones(2, 2), token)
    assert torch.autograd.grad(found, gates, upstream)[0].tolist() == [torch.inf, 2.0]


@pytest.mark.parametrize("stacked", [False, True], ids=["modules", "stacked"])
def test_outputs_may_be_changed_in_place_and_differentiated_once(stacked: bool) -> None:
    found = []
    for in_place in (False, True):
        layer = layer_of(cr.Exactly(2), probes=1, stacked=stacked)
        output, _ = layer(hidden_of(T), key=key_of())
        output = output.mul_(2).add_(1) if in_place else output * 2 + 1
        found.append((output, gradients(layer, output)["router.weight"]))
    torch.testing.assert_close(*found)
    (once,) = torch.autograd.grad(output.square().sum(), layer.router.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        once.sum().backward()


def test_nothing_is_probed_for_a_frozen_router(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a probe was drawn")

    monkeypatch.setattr("circuitroute.layers.moe.draw_probes", refuse)
    layer = layer_of(cr.Exactly(2), probes=2)
    layer.router.requires_grad_(False)
    output, _ = layer(hidden_of(T), key=key_of())
    output.sum().backward()
    assert any(p.grad is not None for p in layer.experts.parameters())
    layer.router.requires_grad_(True)
    with pytest.raises(AssertionError, match="a probe was drawn"):
        layer(hidden_of(T), key=key_of())


def test_without_keys_a_recomputation_of_several_layers_decides_the_same() -> None:
    """Reentrant checkpointing runs the layers first without gradients, then again with: the generator must be left in
    the same place by both."""
    torch.manual_seed(0)
    layers = [cr.MoE(cr.ExactKRouter(8, 6, 2), cr.StackedExperts(6, 8, 4), probes=1) for _ in range(3)]
    seen: list[torch.Tensor] = []

    def run(hidden: torch.Tensor) -> torch.Tensor:
        for layer in layers:
            hidden, routing = layer(hidden)
            seen.append(routing.mask)
        return hidden

    hidden = torch.randn(20, 8, requires_grad=True)
    torch.utils.checkpoint.checkpoint(run, hidden, use_reentrant=True).square().sum().backward()
    assert len(seen) == 6
    for first, again in zip(seen[:3], seen[3:], strict=True):
        assert torch.equal(first, again)


def test_without_keys_probes_leave_the_decision_alone() -> None:
    router, experts = cr.ExactKRouter(8, 6, 2), cr.StackedExperts(6, 8, 4)
    masks = []
    for probes in (0, 1, 2):
        torch.manual_seed(1)
        masks.append(cr.MoE(router, experts, probes)(torch.ones(50, 8))[1].mask)
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])
