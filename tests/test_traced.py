"""Traced programs: torch.compile without graph breaks and torch.export give what untraced ones give."""

import itertools
import math

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch.utils.checkpoint import checkpoint

import circuitroute as cr
from circuitroute.circuit.compiled import of_handle
from circuitroute.engines import ops
from circuitroute.engines.step import Rule
from circuitroute.routing import traced as traced_step

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


COMBINES = ("softmax", "normalized", "sigmoid", "marginal")
# Every circuit and every rule is in the ordinary run, every pair of them among the slow tests.
ORDINARY = {("count", "softmax"), ("range", "normalized"), ("composed", "sigmoid"), ("composed", "marginal")}
PAIRS = [
    pytest.param(*pair, marks=[] if pair in ORDINARY else pytest.mark.slow)
    for pair in itertools.product(CIRCUITS, COMBINES)
]


@pytest.mark.parametrize(("name", "combine"), PAIRS)
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


@pytest.mark.parametrize("engine", ["numba", "torch"])
def test_a_step_is_one_operator(engine):
    """Whoever takes it, with all that is read of it; what the untraced program gives, gradients included."""
    if engine == "numba":
        pytest.importorskip("numba")
    circuit = cr.compile(cr.Between(2, 4), 12).with_engine(engine)
    key, bias = cr.random_key(0, torch.arange(T)), torch.linspace(-1, 1, 12)
    graphs = []

    def step(logits, temperature):
        routing = cr.route(logits, circuit, key=key, temperature=temperature, bias=bias, decide=0.5)
        return routing.padded()[0], routing.gates, routing.marginals, routing.log_prob, routing.distribution.entropy()

    def keep(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return make_boxed_func(graph)

    inputs = logits_of(12).requires_grad_(), torch.full((T,), 0.7).requires_grad_()
    backend = torch._dynamo.backends.common.aot_autograd(fw_compiler=keep)
    expected, found = step(*inputs), torch.compile(step, backend=backend, fullgraph=True)(*inputs)
    operators = [target for graph in graphs for target in graph if "circuitroute" in target]
    assert sum("circuitroute.step.default" in target for target in operators) == 1
    assert not any("infer" in target or "sample" in target for target in operators)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    upstream = [logits_of(*x.shape[1:], seed=2) if x.dim() > 1 else torch.linspace(-1, 1, T) for x in expected]
    gradients = [torch.autograd.grad(results, inputs, upstream) for results in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


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


@pytest.mark.parametrize("engine", ["numba", "torch"])
def test_bad_rows_of_a_step_are_lost_alone(engine):
    if engine == "numba":
        pytest.importorskip("numba")
    circuit = cr.compile(cr.Exactly(3), 12).with_engine(engine)
    logits = logits_of(12)
    logits[1, 0], logits[2] = math.nan, -math.inf
    logits.requires_grad_()

    def read(x):
        routing = cr.route(x, circuit, key=3, validate_args=False)
        return routing.padded()[0], routing.mask, routing.gates, routing.log_prob, routing.marginals

    expected, found = read(logits), traced(read)(logits)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert not found[1][1:3].any()
    assert found[3].isnan().nonzero().flatten().tolist() == [1, 2]
    gradients = [torch.autograd.grad(weights.square().sum(), logits)[0] for weights, *_ in (expected, found)]
    torch.testing.assert_close(*gradients)
    assert not gradients[1][1:3].any()


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


# torch 2.14 warns of what its own check does.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("name", CIRCUITS)
def test_operators_keep_their_promises(name):
    circuit = circuit_of(name)
    logits, key = logits_of(circuit.n), cr.random_key(0, torch.arange(T))
    potential = circuit(logits).rows.inputs()[1]
    mask = circuit(logits).mode.bool()
    for differentiable in (False, True):
        x = logits.clone().requires_grad_(differentiable)
        for keys, counting in ((key, False), (None, False), (None, True)):
            torch.library.opcheck(ops._infer, (x, potential, keys, circuit.handle, counting))
    shift, fallback = torch.zeros(T, dtype=torch.float64), torch.zeros(T, dtype=torch.bool)
    us, vs = [logits, logits], [torch.zeros(T, circuit.max_count + 1)] * 2
    for order in (1, 2):
        given = (logits, potential, shift, fallback, vs[0], us[:order], vs[:order], circuit.handle, True)
        torch.library.opcheck(ops._derivative, given)
    if circuit.counts is not None:
        for simple in (False, True):
            x, rule = logits.clone().requires_grad_(simple), Rule("softmax", 1.0, simple)
            torch.library.opcheck(traced_step._step, (x, None, None, potential, key, circuit.handle, 0.5, *rule))
    torch.library.opcheck(ops._sample, (logits, potential, key, circuit.handle))
    torch.library.opcheck(ops._mode, (logits, potential, circuit.handle))
    torch.library.opcheck(ops._satisfies, (mask, circuit.handle))


def test_a_circuit_that_is_gone_is_named():
    handle = cr.Circuit(circuit_of("count").graph, cr.Exactly(3)).handle
    with pytest.raises(KeyError, match="keep the circuit that was traced alive"):
        of_handle(handle)


def _gradients(module, run, hidden):
    module.zero_grad()
    leaf = hidden.clone().requires_grad_()
    output = run(leaf)
    output.square().sum().backward()
    return [output.detach(), leaf.grad, *(parameter.grad.clone() for parameter in module.parameters())]


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "autocast"])
def test_a_layer_compiles_under_autocast_and_checkpointing(dtype, recomputed):
    """As untraced, with the same keys: routing stays float32, and a recomputed layer draws the same subsets."""
    torch.manual_seed(0)
    router, key = cr.Router(8, 12, cr.Between(2, 4)), cr.random_key(0, torch.arange(T))
    experts = nn.Linear(8, 12 * 8)

    def layer(hidden):
        gates = router(hidden, key).gates
        return torch.einsum("te,teh->th", gates.to(hidden.dtype), experts(hidden).view(-1, 12, 8).to(hidden.dtype))

    def run(hidden):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            return checkpoint(layer, hidden, use_reentrant=False) if recomputed else layer(hidden)

    module, hidden = nn.ModuleList([router, experts]), torch.randn(T, 8)
    expected = _gradients(module, run, hidden)
    found = _gradients(module, traced(run), hidden)
    plain = _gradients(module, layer, hidden)
    assert all(float(gradient.abs().max()) > 0 for gradient in expected)
    for a, b, c in zip(expected, found, plain, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(a.float(), c, rtol=0.05 if dtype else 0, atol=0.1 if dtype else 0)


def test_a_budget_over_layers_compiles_in_one_graph():
    torch.manual_seed(0)
    budget = cr.BudgetRouter(8, 6, 3, cr.Between(1, 4), cr.Between(5, 8), per_token=True)
    keys = [cr.random_key(layer, torch.arange(T)) for layer in range(3)]

    def walk(hidden):
        state, gates = budget.begin(hidden), []
        for key in keys:
            routing, state = budget(hidden, state, key=key)
            gates.append(routing.gates)
        return torch.stack(gates), state.spent

    hidden = torch.randn(T, 8)
    (expected, spent), (found, traced_spent) = walk(hidden), traced(walk)(hidden)
    assert torch.equal(spent, traced_spent)
    torch.testing.assert_close(found, expected)
    expected_gradients = torch.autograd.grad(expected.square().sum(), list(budget.parameters()))
    found_gradients = torch.autograd.grad(found.square().sum(), list(budget.parameters()))
    for ours, theirs in zip(found_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", CIRCUITS)
def test_one_graph_for_any_number_of_tokens(name, training):
    """0 and 1 too, if they are marked as not to be guessed: no question about sizes is asked on the way."""
    torch.manual_seed(0)
    router = cr.Router(6, 12, circuit_of(name)).train(training)
    counters = torch._dynamo.utils.counters
    counters.clear()
    decide = torch.compile(lambda h, k: router(h, key=k).gates, backend="aot_eager", fullgraph=True)
    for tokens in (5, 64, 1, 0):
        hidden = torch.randn(tokens, 6, requires_grad=True)
        key = cr.random_key(0, torch.arange(tokens))
        for x in (hidden, key):
            torch._dynamo.decorators.mark_unbacked(x, 0)
        found, expected = decide(hidden, key), router(hidden, key=key).gates
        torch.testing.assert_close(found, expected)
        gradients = [torch.autograd.grad(gates.square().sum(), hidden)[0] for gates in (found, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 1
