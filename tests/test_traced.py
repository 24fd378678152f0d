"""Traced programs: torch.compile without graph breaks and torch.export give what untraced ones give."""

import math

import pytest
import torch
from torch import nn

import circuitroute as cr
from circuitroute.engines import ops

CIRCUITS = {
    "count": (cr.Exactly(3), 12),
    "range": (cr.Between(2, 4), 12),
    "composed": (cr.ActiveGroups(cr.Groups(4), at_most=2) & cr.Exactly(3), 12),
}
T = 20


def circuit_of(name):
    return cr.compile(*CIRCUITS[name]).with_engine("torch")


def logits_of(n, seed=0):
    return torch.randn(T, n, generator=torch.Generator().manual_seed(seed)) * 2


def traced(function):
    return torch.compile(function, backend="aot_eager", fullgraph=True)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


@pytest.mark.parametrize("combine", ["softmax", "normalized", "sigmoid", "marginal"])
@pytest.mark.parametrize("name", CIRCUITS)
def test_routing_compiles_in_one_graph(name, combine):
    circuit, key = circuit_of(name), cr.random_key(0, torch.arange(T))

    def decide(logits):
        routing = cr.route(logits, circuit, combine=combine, key=key)
        return routing.gates, routing.mask, routing.marginals, routing.log_prob, *routing.padded()

    logits = logits_of(circuit.n).requires_grad_()
    expected, found = decide(logits), traced(decide)(logits)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    u = logits_of(circuit.n, seed=1)
    gradients = [
        torch.autograd.grad((gates * u).sum() + log_prob.sum(), logits)[0]
        for gates, _, _, log_prob, *_ in (found, expected)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CIRCUITS)
def test_distributions_compile_in_one_graph(name):
    circuit = circuit_of(name)

    def everything(logits):
        dist = circuit(logits)
        sample = dist.sample((2,), key=7)
        return dist.log_partition, dist.marginals, dist.count_probs, dist.entropy(), dist.mode, sample

    logits = logits_of(circuit.n).requires_grad_()
    expected, found = everything(logits), traced(everything)(logits)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(r[0].sum() + r[3].sum() + (r[2] ** 2).sum(), logits)[0] for r in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
    fixed = logits.detach()
    judge = traced(lambda mask: circuit(fixed).log_prob(mask))
    masks = torch.stack([expected[4][0].detach(), torch.ones(circuit.n)]).repeat(T // 2, 1)
    assert judge(masks).isfinite().tolist() == [True, False] * (T // 2)


def test_a_count_potential_gets_its_gradient():
    circuit = circuit_of("range")
    potential = torch.linspace(-1, 1, 5).requires_grad_()
    function = lambda x, phi: circuit(x, phi).log_partition  # noqa: E731
    logits = logits_of(12)
    gradients = [torch.autograd.grad(f(logits, potential).sum(), potential)[0] for f in (traced(function), function)]
    torch.testing.assert_close(*gradients)


def test_bad_rows_are_nan_alone():
    """A traced program cannot raise on values."""
    circuit = circuit_of("composed")
    logits = logits_of(12)
    logits[1, 0], logits[2], logits[3, 5] = math.nan, -math.inf, math.inf
    routing = traced(lambda x: cr.route(x, circuit, key=3))
    gates = routing(logits).gates
    assert gates.isnan().any(1)[:4].tolist() == [False, True, True, False]
    torch.testing.assert_close(gates, cr.route(logits, circuit, key=3, validate_args=False).gates, equal_nan=True)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.router = cr.Router(16, 12, cr.Between(1, 3))

    def forward(self, hidden):
        return self.router(hidden).padded()


def test_routers_compile_and_export():
    torch.manual_seed(0)
    layer, hidden = Layer().eval(), torch.randn(T, 16)
    expected = layer(hidden)
    for found in (traced(layer)(hidden), torch.export.export(layer, (hidden,)).module()(hidden)):
        torch.testing.assert_close(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("name", CIRCUITS)
def test_operators_keep_their_promises(name):
    circuit = circuit_of(name)
    logits, key = logits_of(circuit.n), cr.random_key(0, torch.arange(T))
    potential = circuit(logits)._potential()
    mask = circuit(logits).mode.bool()
    for differentiable in (False, True):
        x = logits.clone().requires_grad_(differentiable)
        torch.library.opcheck(ops._infer, (x, potential, key, circuit.handle))
        torch.library.opcheck(ops._infer, (x, potential, None, circuit.handle))
    torch.library.opcheck(ops._sample, (logits, potential, key, circuit.handle))
    torch.library.opcheck(ops._mode, (logits, potential, circuit.handle))
    torch.library.opcheck(ops._satisfies, (mask, circuit.handle))


def test_a_circuit_that_is_gone_is_named():
    handle = cr.Circuit(circuit_of("count").graph, cr.Exactly(3)).handle
    with pytest.raises(KeyError, match="keep the circuit that was traced alive"):
        cr.Circuit.of_handle(handle)
