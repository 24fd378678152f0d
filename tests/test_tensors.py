"""Tensors that are not plain: each kind gives the right value, its shape, or words that name argument and remedy.

Derivatives are held to central differences in float64, transforms to loops, traced programs to untraced ones on inputs
that they were not traced with.
"""

import functools
import os
import subprocess
import sys

import pytest
import torch
import torch.autograd.forward_ad as fwad
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.functional import jacobian
from torch.fx.experimental.proxy_tensor import make_fx

import circuitroute as cr
from circuitroute.engines import transforms

N, T = 8, 2
X = torch.linspace(-1.3, 1.6, T * N, dtype=torch.float64).sin().reshape(T, N)
V = torch.linspace(0.2, 3.0, T * N, dtype=torch.float64).cos().reshape(T, N)
MASK = torch.arange(N) % 3 == 1
variables = cr.variables(N)

CONSTRAINTS = {
    "count": cr.Exactly(3),
    "range": cr.Between(1, 4),
    "groups": cr.ActiveGroups(cr.Groups(4), at_most=3) & cr.Exactly(3),  # whose root tells counts apart
    "logic": cr.Logic(variables[0] | variables[1]) & cr.Logic(variables[3] >> variables[5]),  # whose root does not
}
ENGINES = {"count": ("numba", "torch", "naive"), "range": ("numba", "torch"), "groups": ("numba", "torch", "naive")}
ENGINES["logic"] = ("numba", "torch", "naive")
CIRCUITS = [pytest.param(name, engine, id=f"{name}-{engine}") for name in CONSTRAINTS for engine in ENGINES[name]]
# Which torch gives where it uses what it deprecates, in forward mode.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
warned = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.*:DeprecationWarning")


def circuit_of(name, engine=None):
    circuit = cr.compile(CONSTRAINTS[name], N)
    return circuit if engine is None else circuit.with_engine(engine)


def keys():
    return cr.random_key(0, torch.arange(T))


def moments(circuit):
    """What a distribution says, as functions of logits."""
    mask = circuit(torch.zeros(N)).mode.bool()
    other = circuit(torch.linspace(-1, 1, N, dtype=torch.float64))
    return {
        "log_partition": lambda x: circuit(x).log_partition,
        "marginals": lambda x: circuit(x).marginals,
        "count_probs": lambda x: circuit(x).count_probs,
        "entropy": lambda x: circuit(x).entropy(),
        "log_prob": lambda x: circuit(x).log_prob(mask),
        "divergence": lambda x: torch.distributions.kl_divergence(circuit(x), other),
        "tempered": lambda x: circuit(x).tempered(0.7).marginals,
        "conditioned": lambda x: circuit(x).condition(include=[1]).marginals,
        "covariance": lambda x: circuit(x).covariance_matrix,
    }


def routings(circuit):
    """What a routing step says, for rules whose gradient is that of their value."""
    route = functools.partial(cr.route, circuit=circuit, key=keys(), estimator="none")
    return {
        "softmax": lambda x: route(x, combine="softmax").gates,
        "normalized": lambda x: route(x, combine="normalized").gates,
        "sigmoid": lambda x: route(x, combine="sigmoid").gates,
        "marginal": lambda x: route(x, combine="marginal").gates,
        "padded": lambda x: route(x).padded()[0],
        "log_prob": lambda x: route(x, temperature=0.8).log_prob,
        "balance": lambda x: cr.losses.load_balance(route(x)),
    }


def summed(f):
    return lambda x: f(x).sum()


def slope(f, x, v, h=1e-5):
    """The derivative of f along v by central differences."""
    return (f(x + h * v) - f(x - h * v)) / (2 * h)


def along(jacobian_of_f, like):
    """A Jacobian by [T, N] logits, times V."""
    return (jacobian_of_f.reshape(-1, T * N) @ V.reshape(T * N)).reshape(like.shape)


def dual(f, x, v):
    with fwad.dual_level():
        return fwad.unpack_dual(f(fwad.make_dual(x, v))).tangent


WAYS = {
    "torch.func.jvp": lambda f: torch.func.jvp(f, (X,), (V,))[1],
    "forward_ad": lambda f: dual(f, X, V),
    "backward": lambda f: along(jacobian(f, X), f(X)),
    "batched gradients": lambda f: along(jacobian(f, X, vectorize=True), f(X)),
    "jacrev": lambda f: along(torch.func.jacrev(f)(X), f(X)),
    "jacfwd": lambda f: along(torch.func.jacfwd(f)(X), f(X)),
}


@pytest.mark.parametrize(("name", "engine"), CIRCUITS)
def test_first_derivatives_in_every_way(name, engine):
    circuit = circuit_of(name, engine)
    for what, f in [*moments(circuit).items(), *routings(circuit).items()]:
        expected = slope(f, X, V)
        for way, derivative in WAYS.items():
            torch.testing.assert_close(
                derivative(f), expected, rtol=1e-6, atol=1e-7, msg=lambda m, what=what, way=way: f"{what} {way}: {m}"
            )


@pytest.mark.parametrize(("name", "engine"), [("count", "numba"), ("groups", "numba"), ("logic", "torch")])
def test_second_derivatives_in_every_way(name, engine):
    circuit = circuit_of(name, engine)
    for what, f in moments(circuit).items():

        def total(x, f=f):
            return f(x).square().sum()

        def twice_backward(x, v, total=total):
            leaf = x.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(total(leaf), leaf, create_graph=True)
            return torch.autograd.grad((gradient * v).sum(), leaf)[0]

        expected = slope(torch.func.grad(total), X, V)
        hessian = torch.func.hessian(total)(X).reshape(T * N, T * N) @ V.reshape(-1)
        found = {
            "forward over backward": torch.func.jvp(torch.func.grad(total), (X,), (V,))[1],
            "hessian": hessian.reshape(T, N),
            "backward over backward": twice_backward(X, V),
            "backward over forward": torch.func.grad(lambda x, t=total: torch.func.jvp(t, (x,), (V,))[1])(X),
            "forward over forward": torch.func.jvp(lambda x, t=total: torch.func.jvp(t, (x,), (V,))[1], (X,), (V,))[1],
        }
        along_v = (expected * V).sum()
        for way, value in found.items():
            right = along_v if value.dim() == 0 else expected
            torch.testing.assert_close(
                value, right, rtol=1e-5, atol=1e-5, msg=lambda m, what=what, way=way: f"{what} {way}: {m}"
            )


def test_third_derivatives():
    """Of log Z: the third cumulants of independent coins, where counts are free."""
    circuit = cr.compile(cr.Between(0, N), N)
    third = torch.func.jacfwd(torch.func.jacrev(torch.func.jacfwd(lambda x: circuit(x).log_partition)))(X[0])
    m = torch.sigmoid(X[0])
    expected = torch.zeros(N, N, N, dtype=torch.float64)
    expected[range(N), range(N), range(N)] = m * (1 - m) * (1 - 2 * m)
    torch.testing.assert_close(third, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("outer", ["jacfwd", "jacrev"])
@pytest.mark.parametrize("middle", ["jacfwd", "jacrev"])
def test_third_derivatives_along_directions_that_depend_on_the_logits(outer, middle):
    """Of sum over i of m_i^2, whose gradient is D_1 along m: independent coins again, by the chain rule."""
    circuit, x = cr.compile(cr.Between(0, 3), 3), X[0, :3]

    def total(x):
        return circuit(x).marginals.square().sum()

    third = getattr(torch.func, outer)(getattr(torch.func, middle)(torch.func.grad(total)))(x)
    m = torch.sigmoid(x)
    slope = m * (1 - m)
    curvature, change = slope * (1 - 2 * m), slope * (1 - 6 * slope)
    expected = torch.zeros(3, 3, 3, dtype=torch.float64)
    expected[range(3), range(3), range(3)] = 6 * slope * curvature + 2 * m * change
    torch.testing.assert_close(third, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["count", "groups"])
def test_float32_and_gates_of_the_default_estimator(name):
    """SIMPLE's tangent is that of the marginals, whichever way; in float32, which engines fuse."""
    circuit, x, v = circuit_of(name), X.float(), V.float()
    for combine in ("softmax", "normalized", "sigmoid", "marginal"):

        def gates(x, combine=combine):
            return cr.route(x, circuit, combine=combine, key=keys()).gates

        expected = along(jacobian(gates, x).double(), gates(x)).float()
        for found in (torch.func.jvp(gates, (x,), (v,))[1], dual(gates, x, v)):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(jacobian(gates, x, vectorize=True), jacobian(gates, x), rtol=1e-4, atol=1e-5)
        each = [torch.func.grad(lambda row, f=gates: f(row).square().sum())(row) for row in (x, 2 * x)]
        batch = torch.func.vmap(torch.func.grad(lambda row, f=gates: f(row).square().sum()))(torch.stack([x, 2 * x]))
        torch.testing.assert_close(batch, torch.stack(each), rtol=1e-4, atol=1e-5)


def test_derivatives_by_potential_and_temperature():
    circuit = circuit_of("range")
    phi, change = torch.linspace(-1, 1, 5, dtype=torch.float64), torch.linspace(1, -2, 5, dtype=torch.float64)
    for potential, direction in ((phi, change), (phi.expand(T, -1), change.expand(T, -1))):

        def both(x, p):
            found = circuit(x, count_potential=p)
            return torch.cat([found.log_partition, found.marginals.sum(0), found.count_probs[:, 1], found.entropy()])

        expected = (
            both(X + 1e-5 * V, potential + 1e-5 * direction) - both(X - 1e-5 * V, potential - 1e-5 * direction)
        ) / 2e-5
        found = torch.func.jvp(both, (X, potential), (V, direction))[1]
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)
    many = torch.stack([phi, 2 * phi])
    found = torch.func.vmap(lambda p: circuit(X, count_potential=p).marginals)(many)
    torch.testing.assert_close(found, torch.stack([circuit(X, count_potential=p).marginals for p in many]))

    def tempered(t):
        return cr.route(X, circuit, key=keys(), temperature=t, estimator="none").log_prob

    t = torch.tensor([0.7, 1.3], dtype=torch.float64)
    found = torch.func.jvp(tempered, (t,), (torch.ones_like(t),))[1]
    torch.testing.assert_close(found, slope(tempered, t, torch.ones_like(t)), rtol=1e-7, atol=1e-8)


def test_moments_by_a_potential_of_all_rows():
    """Distributions give a potential per row where it is differentiated; Moments takes one for all, [J], too."""
    circuit = circuit_of("range", "torch")
    phi, change = torch.linspace(-1, 1, 5, dtype=torch.float64), torch.linspace(1, -2, 5, dtype=torch.float64)

    def asked(p):
        found = transforms.infer(circuit, X, p, None)
        return torch.cat([found.log_partition, found.marginals.sum(0), found.count_probs[:, 1]])

    def gradient(p):
        return torch.func.grad(lambda p: asked(p).square().sum())(p)

    def twice(p):
        return torch.func.jvp(asked, (p,), (change,))[1].square().sum()

    expected = slope(asked, phi, change)
    torch.testing.assert_close(torch.func.jvp(asked, (phi,), (change,))[1], expected, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(gradient(phi) @ change, 2 * asked(phi) @ expected, rtol=1e-7, atol=1e-8)
    expected = slope(gradient, phi, change)
    torch.testing.assert_close(torch.func.jvp(gradient, (phi,), (change,))[1], expected, rtol=1e-7, atol=1e-8)
    found = torch.func.grad(twice)(phi) @ change
    torch.testing.assert_close(found, slope(twice, phi, change), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_evidence_has_no_derivative(name):
    circuit, x = circuit_of(name), X.clone()
    x[0, 1], x[1, 2] = torch.inf, -torch.inf
    found = torch.func.jacfwd(lambda x: circuit(x).marginals)(x)
    assert not found[0, :, 0, 1].any()
    assert not found[1, :, 1, 2].any()
    torch.testing.assert_close(found, jacobian(lambda x: circuit(x).marginals, x), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("name", "engine"), CIRCUITS)
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_vmap_is_a_loop(name, engine, dim):
    circuit, batch = circuit_of(name, engine), torch.stack([X, 0.5 * X, V])
    asked = {**moments(circuit), **routings(circuit), "mode": lambda x: circuit(x).mode}
    asked["sample"] = lambda x: circuit(x).sample((3,), key=keys())
    for what, f in asked.items():
        found = torch.func.vmap(f, in_dims=dim)(batch.movedim(0, dim))
        torch.testing.assert_close(
            found, torch.stack([f(x) for x in batch]), rtol=1e-9, atol=1e-9, msg=lambda m, what=what: f"{what}: {m}"
        )


def test_vmap_over_anything_but_logits():
    circuit = circuit_of("count")
    masks = torch.func.vmap(lambda x, k: circuit(x).sample(key=k))(X, keys())
    assert torch.equal(masks, circuit(X).sample(key=keys()))
    assert torch.equal(torch.func.vmap(circuit.satisfies)(masks.bool()), torch.ones(T, dtype=torch.bool))
    assert torch.equal(torch.func.vmap(lambda i: cr.random_key(0, i))(torch.arange(T)), keys())
    found = torch.func.vmap(lambda mask: circuit(X[0]).log_prob(mask))(masks)
    torch.testing.assert_close(found, torch.stack([circuit(X[0]).log_prob(mask) for mask in masks]))
    include = torch.eye(N, dtype=torch.bool)[:T]
    found = torch.func.vmap(lambda x, m: circuit(x).condition(include=m).marginals)(X, include)
    torch.testing.assert_close(found, circuit(X).condition(include=include).marginals)


def test_rows_that_cannot_be_checked_are_nan_alone():
    x = X.clone()
    x[1, 3] = torch.nan
    found = torch.func.vmap(lambda x: circuit_of("count")(x).marginals)(x)
    torch.testing.assert_close(found[0], circuit_of("count")(X[0]).marginals)
    assert found[1].isnan().all()
    with pytest.raises(ValueError, match="logits hold NaN in row 1"):
        torch.func.jvp(lambda x: circuit_of("count")(x).marginals, (x,), (x,))


# ---------------------------------------------------------------------------------------------- traced programs


TRACED = ("log_partition", "marginals", "count_probs", "entropy", "conditioned")


@warned
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_jit_trace_is_right_for_other_inputs_and_sizes(name):
    circuit, longer = circuit_of(name), torch.cat([X, V, 2 * X])
    for what in TRACED:
        f = moments(circuit)[what]
        traced = torch.jit.trace(f, X, check_trace=False)
        torch.testing.assert_close(traced(longer), f(longer), msg=lambda m, what=what: f"{what}: {m}")
    module = nn.Sequential(nn.Linear(N, N), _Gates(circuit)).double()
    torch.testing.assert_close(torch.jit.trace(module, X, check_trace=False)(V), module(V))


class _Gates(nn.Module):
    def __init__(self, circuit):
        super().__init__()
        self.circuit = circuit

    def forward(self, logits):
        return cr.route(logits, self.circuit, key=cr.random_key(0, torch.arange(T))).gates


@pytest.mark.parametrize("mode", ["real", "fake", pytest.param("symbolic", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_make_fx_is_right_for_other_inputs(name, mode):
    circuit = circuit_of(name)
    for what in TRACED[:4]:
        f = moments(circuit)[what]
        found = make_fx(f, tracing_mode=mode)(X)(V)
        torch.testing.assert_close(found, f(V), msg=lambda m, what=what: f"{what}: {m}")
        gradient = torch.func.grad(summed(f))
        torch.testing.assert_close(make_fx(gradient, tracing_mode=mode)(X)(V), gradient(V))
        torch.testing.assert_close(torch.func.functionalize(f)(V), f(V))
    many = torch.stack([X, V])
    batched = torch.func.vmap(moments(circuit)["marginals"])
    torch.testing.assert_close(make_fx(batched)(many)(2 * many), batched(2 * many))


def test_compiled_programs_take_transforms_or_say_so():
    circuit, x, v = circuit_of("count", "torch"), X.float(), V.float()

    def marginals(x):
        return circuit(x).marginals

    torch._dynamo.reset()
    batched = torch.compile(torch.func.vmap(marginals), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(batched(x), marginals(x))
    forward = torch.compile(lambda x: torch.func.jvp(marginals, (x,), (v,))[1], backend="aot_eager")
    torch.testing.assert_close(forward(x), torch.func.jvp(marginals, (x,), (v,))[1])
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="infer"):
        torch.compile(lambda x: torch.func.jvp(marginals, (x,), (v,))[1], backend="aot_eager", fullgraph=True)(x)
    torch._dynamo.reset()


def test_compiled_batches_of_potentials():
    """A potential of all rows is, in a compiled batch of calls, one per call."""
    circuit, x = circuit_of("range", "torch"), X.float()
    many = torch.tensor([[0.0, 1.0, -1.0, 2.0, -2.0], [1.0, -2.0, 3.0, 0.5, 0.0], [-3.0, 0.0, 0.0, 2.0, 5.0]])

    def asked(x, p):
        found = circuit(x, count_potential=p)
        return found.marginals, found.count_probs, found.sample(key=keys()), found.mode

    expected = [torch.stack(each) for each in zip(*(asked(x, p) for p in many), strict=True)]
    torch._dynamo.reset()
    by_potential = torch.compile(torch.func.vmap(asked, in_dims=(None, 0)), backend="aot_eager", fullgraph=True)
    for found, right in zip(by_potential(x, many), expected, strict=True):
        torch.testing.assert_close(found, right)
    by_column = torch.compile(torch.func.vmap(asked, in_dims=(None, 1)), backend="aot_eager", fullgraph=True)
    for found, right in zip(by_column(x, many.T), expected, strict=True):
        torch.testing.assert_close(found, right)
    torch._dynamo.reset()


def test_functionalize_with_another_transform_is_refused():
    circuit = circuit_of("count")
    with pytest.raises(NotImplementedError, match="functionalize together with other transforms"):
        torch.func.functionalize(torch.func.vmap(lambda x: circuit(x).marginals))(X)


# ---------------------------------------------------------------------------------------------- without numbers


def routed(router, hidden):
    found = router(hidden)
    return found[0] if isinstance(found, tuple) else found.gates


def budgeted(budget, hidden):
    total, state = 0, budget.begin(hidden)
    for _ in range(budget.layers):
        routing, state = budget(hidden, state)
        total = total + routing.gates
    return total


MODULES = {
    "router": lambda: cr.Router(6, N, cr.Exactly(2)),
    "groups": lambda: cr.Router(6, N, CONSTRAINTS["groups"]),
    "logic": lambda: cr.Router(6, N, CONSTRAINTS["logic"], combine="marginal"),
    "topk": lambda: cr.TopKRouter(6, N, 2),
    "soft": lambda: cr.SoftTopKRouter(6, N, 2, 0.1),
    "stacked": lambda: cr.MoE(cr.DynamicKRouter(6, N, 1, 3), cr.StackedExperts(N, 6, 4)),
    "experts": lambda: cr.MoE(cr.Router(6, N, cr.Exactly(2)), [nn.Linear(6, 6) for _ in range(N)]),
    "probes": lambda: cr.MoE(cr.Router(6, N, cr.Exactly(2)), cr.StackedExperts(N, 6, 4), probes=1),
    "dense": lambda: cr.MoE(
        cr.Router(6, N, cr.Exactly(2), estimator="dense"), cr.StackedExperts(N, 6, 4), probes="all"
    ),
    "budget": lambda: cr.BudgetRouter(6, N, layers=2, per_layer=cr.Between(1, 3), total=cr.AtMost(4)),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("where", ["meta", "fake"])
@pytest.mark.parametrize("name", MODULES)
def test_tensors_without_numbers_have_shapes(name, where, training):
    run = budgeted if name == "budget" else routed
    with torch.device("meta") if where == "meta" else FakeTensorMode():
        module = MODULES[name]().train(training)
        hidden = torch.randn(4, 6, requires_grad=True)
        found = run(module, hidden)
        found.sum().backward()
    real = MODULES[name]().train(training)
    expected = run(real, torch.randn(4, 6, requires_grad=True))
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert hidden.grad.shape == hidden.shape
    expected.sum().backward()  # and what is kept between calls holds numbers, still
    assert not expected.isnan().any()


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_a_distribution_without_numbers(name):
    circuit = circuit_of(name)
    for what, f in moments(circuit).items():
        if what in ("log_prob", "divergence"):  # which also take tensors with numbers, here
            continue
        leaf = X.to("meta").requires_grad_()
        found = f(leaf)
        assert found.is_meta
        assert found.shape == f(X).shape
        found.sum().backward()
        assert leaf.grad.shape == X.shape
        with FakeTensorMode():
            assert f(torch.empty(T, N)).shape == found.shape
        torch.testing.assert_close(f(X), f(X.clone()))
    assert circuit(X.to("meta")).sample((3,)).shape == (3, T, N)
    assert circuit(X.to("meta")).mode.shape == (T, N)
    assert circuit.satisfies(MASK.to("meta")).shape == ()


def test_what_depends_on_values_is_refused():
    routing = cr.route(X.to("meta"), circuit_of("range"))
    with pytest.raises(NotImplementedError, match=r"use padded\(\)"):
        routing.ragged()
    with pytest.raises(ValueError, match=r"width=2.*give max_count=4"):
        torch.func.vmap(lambda x: cr.route(x, circuit_of("range"), key=keys()).padded(2)[0])(torch.stack([X, V]))


# ---------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize("experts", ["stacked", "experts", "soft"])
def test_layers_under_transforms(experts):
    torch.manual_seed(0)
    made = [nn.Linear(6, 6) for _ in range(N)] if experts == "experts" else cr.StackedExperts(N, 6, 4)
    router = cr.SoftTopKRouter(6, N, 2, 0.1) if experts == "soft" else cr.Router(6, N, cr.Between(1, 3))
    layer = cr.MoE(router, made).double()
    hidden = torch.randn(3, T, 6, dtype=torch.float64)

    def run(h):
        return layer(h, key=None if experts == "soft" else keys())[0]

    def loss(h):
        return run(h).square().sum()

    leaf = hidden.clone().requires_grad_()
    sum(loss(h) for h in leaf).backward()
    torch.testing.assert_close(torch.func.vmap(run)(hidden), torch.stack([run(h) for h in hidden]))
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(hidden), leaf.grad)
    full = jacobian(run, hidden[0])
    found = torch.func.jvp(run, (hidden[0],), (hidden[1],))[1]
    torch.testing.assert_close(found, torch.tensordot(full, hidden[1], 2))
    torch.testing.assert_close(jacobian(run, hidden[0], vectorize=True), full)
    torch.testing.assert_close(make_fx(run)(hidden[0])(hidden[1]), run(hidden[1]))
    torch.testing.assert_close(torch.func.functionalize(run)(hidden[1]), run(hidden[1]))


@warned
def test_a_traced_layer_is_right_for_other_tokens():
    """Which experts run depends on the tokens, so nothing of that may be written down by a tracer."""
    torch.manual_seed(0)
    layer = cr.MoE(cr.Router(6, N, cr.Exactly(2)), cr.StackedExperts(N, 6, 4)).eval()
    hidden = torch.randn(2, 5, 6)
    traced = torch.jit.trace(_Output(layer), hidden[0], check_trace=False)
    torch.testing.assert_close(traced(hidden[1]), layer(hidden[1])[0])


class _Output(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden):
        return self.layer(hidden)[0]


def test_probes_have_no_transforms():
    layer = cr.MoE(cr.Router(6, N, cr.Exactly(2)), cr.StackedExperts(N, 6, 4), probes=1)
    with pytest.raises(NotImplementedError, match=r"probes=1.*set probes=0"):
        torch.func.grad(lambda h: layer(h)[0].sum())(torch.randn(4, 6))


def test_soft_top_k_in_every_way():
    k, alpha = torch.tensor([2.3, 1.6], dtype=torch.float64), torch.tensor([0.3, 0.5], dtype=torch.float64)

    def weights(x):
        return cr.soft_topk(x, k, alpha)

    def loss(x):
        return weights(x).pow(3).sum()

    for derivative in WAYS.values():
        torch.testing.assert_close(derivative(weights), slope(weights, X, V), rtol=1e-7, atol=1e-8)
    hessian = torch.func.hessian(loss)(X).reshape(T * N, T * N) @ V.reshape(-1)
    torch.testing.assert_close(hessian.reshape(T, N), slope(torch.func.grad(loss), X, V), rtol=1e-6, atol=1e-7)
    by_both = torch.func.jvp(lambda k, a: cr.soft_topk(X, k, a), (k, alpha), (alpha, k))[1]
    h = 1e-6
    moved = [cr.soft_topk(X, k + s * alpha, alpha + s * k) for s in (h, -h)]
    expected = (moved[0] - moved[1]) / (2 * h)
    torch.testing.assert_close(by_both, expected, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(torch.func.vmap(cr.soft_topk)(X, k, alpha), weights(X))
    torch.testing.assert_close(make_fx(weights)(X)(V), weights(V))
    assert cr.soft_topk(X.to("meta"), k.to("meta"), alpha.to("meta")).shape == X.shape


# ---------------------------------------------------------------------------------------------- other kinds


class Named(torch.Tensor):
    """A subclass that adds a name, and no way of its own to keep numbers."""


class Wrapping(torch.Tensor):
    """One that has such a way."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError("nothing must be asked of it")


def test_what_is_nearly_plain_is_made_plain():
    circuit = circuit_of("count")
    for f in (
        lambda x: circuit(x).marginals,
        lambda x: cr.soft_topk(x, 2, 0.1),
        lambda x: cr.route(x, circuit, key=1).gates,
    ):
        assert torch.equal(f(torch._neg_view(X)), f(-X))
        found = f(X.as_subclass(Named))
        assert type(found) is torch.Tensor
        assert torch.equal(found, f(X))
        leaf = X.clone().requires_grad_()
        expected = jacobian(f, X).sum((0, 1))
        f(leaf.as_subclass(Named)).sum().backward()
        torch.testing.assert_close(leaf.grad, expected)
    assert torch.equal(circuit(X).sample(key=torch._neg_view(keys())), circuit(X).sample(key=-keys()))


ODD = {
    "sparse": (lambda: X.to_sparse(), r"sparse_coo; give {name}\.to_dense\(\)"),
    "compressed": (lambda: X.to_sparse_csr(), r"sparse_csr; give {name}\.to_dense\(\)"),
    "mkldnn": (lambda: X.float().to_mkldnn(), r"mkldnn; give {name}\.to_dense\(\)"),
    "nested": (
        lambda: torch.nested.nested_tensor([X, X]),
        r"nested one; give torch\.nested\.to_padded_tensor\({name}, 0\)",
    ),
    "quantized": (lambda: torch.quantize_per_tensor(X.float(), 0.1, 0, torch.qint8), r"give {name}\.dequantize\(\)"),
    "masked": (lambda: torch.masked.masked_tensor(X, X > 0), r"MaskedTensor, .* such as {name}\.get_data\(\)"),
    "wrapping": (lambda: X.as_subclass(Wrapping), r"{name}: expected a plain torch\.Tensor, got a .*Wrapping"),
    "lazy": (lambda: nn.UninitializedParameter(), "{name} is an UninitializedParameter.*run the lazy module"),
    "complex": (lambda: X.to(torch.complex64), None),
    "numbers": (lambda: X.tolist(), r"{name}=.*expected a tensor, got list"),
    "array": (lambda: X.numpy(), r"(?s){name}=.*expected a tensor, got ndarray"),
}


@pytest.mark.filterwarnings("ignore")  # prototypes, all of them
@pytest.mark.parametrize("kind", ODD)
def test_what_is_not_computed_on_is_refused(kind):
    make, words = ODD[kind]
    circuit = circuit_of("range")
    asked = {
        "logits": [lambda x: circuit(x), lambda x: cr.route(x, circuit), lambda x: cr.soft_topk(x, 2, 0.1)],
        "count_potential": [lambda x: circuit(X, count_potential=x)],
        "mask": [circuit.satisfies],
        "value": [circuit(X).log_prob],
    }
    if kind == "complex":
        asked = {"logits": asked["logits"]}
    for name, calls in asked.items():
        for call in calls:
            with pytest.raises(TypeError, match="dtype" if words is None else words.format(name=name)):
                call(make())


@pytest.mark.filterwarnings("ignore")
def test_distributed_tensors_are_refused():
    """In a process of its own, since it makes a process group."""
    script = """
import torch, torch.distributed as dist, circuitroute as cr
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.distributed.tensor import Replicate, distribute_tensor, init_device_mesh
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
logits = distribute_tensor(torch.randn(4, 8), init_device_mesh("cpu", (1,)), [Replicate()])
try:
    cr.compile(cr.Exactly(2), 8)(logits)
except TypeError as error:
    print(error)
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, env=env)
    assert "logits: expected a plain torch.Tensor, got a torch.distributed.tensor.DTensor" in found.stdout, found.stderr
    assert "logits.to_local()" in found.stdout
