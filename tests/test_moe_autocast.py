"""The sparse layer in mixed precision, held to a float64 layer that runs every expert on every token.

Legend: T tokens, H hidden size, E experts.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import circuitroute as cr
from circuitroute.routing.probes import draw_probes, every_unchosen
from tests.test_probes import E, H, T, gradients, hidden_of, key_of, layer_of, outputs_of

# Experts round six times to bfloat16, of unit roundoff 2^-9: rows, both matrices, in between, twice, and the output;
# backward as often. So values and gradients are this close to the truth, in units of its largest entry.
ROUNDING = 12 * 2.0**-9


def close(found: Tensor, truth: Tensor) -> bool:
    found, truth = found.detach(), truth.detach()
    return float((found - truth).abs().max()) <= ROUNDING * float(truth.abs().max())


def dense(layer: cr.MoE, hidden: Tensor, routing: cr.Routing, weights: Tensor) -> dict[str, Tensor]:
    """The output and all gradients in float64: gates times outputs of chosen experts, and of probes for the gates."""
    truth = copy.deepcopy(layer).double()
    again = truth.router(hidden.double(), replay=routing.mask)
    each = outputs_of(truth, hidden.double())
    each = torch.where(routing.mask[..., None], each, each.detach())
    output = torch.einsum("te,teh->th", again.gates * weights, each)
    return {"output": output, **gradients(truth, output)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stacked", [False, True], ids=["modules", "stacked"])
@pytest.mark.parametrize("probes", [0, 1, "all"])
@pytest.mark.parametrize("combine", ["softmax", "normalized"])
def test_value_and_every_gradient_are_those_of_float64(
    combine: Any, probes: Any, stacked: bool, dtype: torch.dtype
) -> None:
    layer = layer_of(cr.Exactly(2), combine=combine, probes=probes, stacked=stacked)
    hidden = hidden_of(T).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        output, routing = layer(hidden, key=key_of())
    assert output.dtype == dtype
    found = {"output": output, **gradients(layer, output)}
    weights = routing.mask.double()
    if probes:
        drawn = every_unchosen(routing) if probes == "all" else draw_probes(routing, probes, key_of())
        weights = weights.index_put((drawn.token, drawn.expert), drawn.weight.double())
    truth = dense(layer, hidden, routing, weights)
    for name, value in found.items():
        assert close(value, truth[name]), name
    if probes:  # which the tolerance must not hide
        without = dense(layer, hidden, routing, routing.mask.double())
        assert not close(without["router.weight"], truth["router.weight"])


class Wide(nn.Linear):
    """An expert whose last step is one that mixed precision takes in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


@pytest.mark.parametrize("kind", [nn.Linear, Wide])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_weighs_in_the_wider_of_rows_and_outputs(kind: type[nn.Linear], dtype: torch.dtype) -> None:
    """A gate's gradient is <dL/dy, output of its expert>, and no coarser than the wider of the two."""
    torch.manual_seed(0)
    layer, hidden = cr.MoE(None, [kind(H, H) for _ in range(E)]), hidden_of(T).to(dtype)
    routing = cr.route(torch.randn(T, E).requires_grad_(), cr.compile(cr.Exactly(2), E), key=key_of())
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = layer(hidden, routing=routing)
        each = torch.stack([expert(hidden) for expert in layer.experts], 1).double()
    upstream = torch.randn(T, H).bfloat16().to(dtype)
    (found,) = torch.autograd.grad(output, routing.gates, upstream)
    expected = torch.einsum("th,teh->te", upstream.double(), each) * routing.mask
    wide = dtype == torch.float32 or kind is Wide
    rounding = 1e-6 if wide else 2e-2
    assert output.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=rounding, atol=rounding)
    exact = torch.einsum("te,teh->th", routing.gates.detach().double(), each)
    rounding = 1e-6 if dtype == torch.float32 else 2.0**-8 if wide else 2e-2
    torch.testing.assert_close(output.double(), exact, rtol=rounding, atol=rounding)
