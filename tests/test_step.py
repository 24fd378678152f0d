"""Decisions on a step: all that is read of them is what the parts give, in value and in gradient, to any order.

The step under test is composed of the parts, so that what is tested is what joins a step to autograd and to a
:class:`~circuitroute.Routing`. Each engine's own steps are held to the same in its own tests.
"""

import gc
import itertools
import math
import weakref

import pytest
import torch

import circuitroute as cr
from circuitroute.routing import step as steps
from circuitroute.routing.composed import ComposedSteps
from circuitroute.routing.decision import Routing

T, E = 7, 6
COUNTS = {"exactly": cr.Exactly(2), "range": cr.Between(0, 3)}
RULES = ("softmax", "normalized", "sigmoid", "marginal")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def circuit_of(name):
    return cr.compile(COUNTS[name], E).with_engine("torch")


@pytest.fixture
def stepping(monkeypatch):
    """Routing takes steps from here on."""

    def start():
        monkeypatch.setattr(steps, "engine_of", lambda circuit, device: ComposedSteps(circuit))

    return start


def read(routing):
    weights, indices = routing.padded()
    distribution = routing.distribution
    return {
        "gates": routing.gates,
        "weights": weights,
        "marginals": routing.marginals,
        "log_prob": routing.log_prob,
        "log_partition": distribution.log_partition,
        "count_probs": distribution.count_probs,
        "entropy": distribution.entropy(),
    }, (indices, routing.mask, routing.counts)


def both(stepping, call, inputs):
    """What is read, from the parts and from a step, each a function of the inputs."""
    plain = call(*inputs)
    assert type(plain) is Routing
    stepping()
    stepped = call(*inputs)
    assert isinstance(stepped, steps.StepRouting)
    return plain, stepped


OPTIONS = {
    "sampled": {},
    "cold": {"temperature": 0.5},
    "mode": {"decide": "mode", "temperature": 2.0},
    "shared": {"decide": 0.5},
    "biased": {"bias": randn(E, seed=3), "price": 0.25},
    "without": {"estimator": "none"},
    "evaluation": {"training": False},
}


@pytest.mark.parametrize(("name", "combine", "option"), list(itertools.product(COUNTS, RULES, OPTIONS)))
def test_a_step_is_what_its_parts_are(stepping, name, combine, option):
    circuit, key = circuit_of(name), torch.arange(T)
    logits = (2 * randn(T, E)).requires_grad_()
    phi = randn(T, circuit.max_count + 1, seed=1).requires_grad_()
    temperature = (1 + randn(T, seed=2).abs()).requires_grad_()

    def call(logits, phi, temperature):
        settings = {"temperature": temperature, **OPTIONS[option]}
        return cr.route(logits, circuit, combine=combine, key=key, count_potential=phi, **settings)

    inputs = (logits, phi, temperature)
    plain, stepped = both(stepping, call, inputs)
    (expected, sets), (found, same_sets) = read(plain), read(stepped)
    assert all(torch.equal(a, b) for a, b in zip(sets, same_sets, strict=True))
    for value in expected:
        torch.testing.assert_close(found[value], expected[value], msg=value)
        upstream = randn(*found[value].shape, seed=4)
        for x in inputs:
            ours, theirs = (
                torch.autograd.grad(r[value], x, upstream, allow_unused=True, retain_graph=True)[0]
                if r[value].requires_grad
                else None
                for r in (found, expected)
            )
            ours, theirs = (torch.zeros_like(x) if g is None else g for g in (ours, theirs))
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=5e-6, msg=value)


def test_gradients_of_gradients(stepping):
    circuit, logits = circuit_of("range"), randn(T, E).requires_grad_()
    plain, stepped = both(stepping, lambda x: cr.route(x, circuit, key=torch.arange(T), temperature=0.7), (logits,))
    seconds = []
    for routing in (plain, stepped):
        total = routing.gates.square().sum() + routing.log_prob.sum() + routing.marginals.square().sum()
        (first,) = torch.autograd.grad(total, logits, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), logits)[0])
    assert float(seconds[0].abs().max()) > 0.1
    torch.testing.assert_close(*seconds)


def test_gradients_are_recorded_where_they_are_wanted(stepping):
    circuit, logits = circuit_of("exactly"), randn(T, E).requires_grad_()
    stepping()
    with torch.no_grad():
        blind = cr.route(logits, circuit, key=torch.arange(T))
        assert not any(value.requires_grad for value in read(blind)[0].values())
    recorded = cr.route(logits, circuit, key=torch.arange(T))
    assert all(value.requires_grad for value in read(recorded)[0].values())
    with torch.no_grad():
        assert not any(value.requires_grad for value in read(recorded)[0].values())


def test_rows_that_nothing_satisfies_are_lost_alone(stepping):
    circuit, logits = circuit_of("exactly"), randn(T, E)
    logits[1], logits[3, :5] = -math.inf, math.inf
    logits.requires_grad_()
    plain, stepped = both(stepping, lambda x: cr.route(x, circuit, key=torch.arange(T), validate_args=False), (logits,))
    torch.testing.assert_close(stepped.gates, plain.gates, equal_nan=True)
    assert stepped.gates.isnan().all(-1).tolist() == [i in (1, 3) for i in range(T)]
    assert stepped.counts[[1, 3]].tolist() == [0, 0]
    weights, _ = stepped.padded()
    assert torch.equal(weights[[1, 3]], torch.zeros(2, 2))
    (gradient,) = torch.autograd.grad(weights.square().sum(), logits)
    assert gradient.isfinite().all()
    assert not gradient[[1, 3]].any()


@pytest.mark.parametrize("shared", [False, True])
def test_nan_in_a_potential_is_nan_in_its_rows(stepping, shared):
    circuit, logits = circuit_of("range"), randn(T, E).requires_grad_()
    phi = randn(T, circuit.max_count + 1, seed=1)
    phi[2, 1] = math.nan
    phi = phi[2] if shared else phi
    plain, stepped = both(
        stepping,
        lambda x: cr.route(x, circuit, count_potential=phi, key=torch.arange(T), validate_args=False),
        (logits,),
    )
    lost = [shared or i == 2 for i in range(T)]
    for name in ("gates", "log_prob", "marginals"):
        ours, theirs = getattr(stepped, name), getattr(plain, name)
        torch.testing.assert_close(ours, theirs, equal_nan=True)
        assert ours.reshape(T, -1).isnan().all(-1).tolist() == lost
    (gradient,) = torch.autograd.grad(stepped.gates.nan_to_num().sum(), logits)
    assert gradient.isfinite().all()


def test_slots_are_cut_filled_and_refused(stepping):
    circuit, logits = circuit_of("range"), randn(T, E)
    plain, stepped = both(stepping, lambda x: cr.route(x, circuit, key=torch.arange(T)), (logits,))
    for width, pad in itertools.product((None, 3, 5), ("distinct", "sentinel", "minus_one")):
        for ours, theirs in zip(stepped.padded(width, pad), plain.padded(width, pad), strict=True):
            torch.testing.assert_close(ours, theirs)
    with pytest.raises(ValueError, match="width=1: a token has 3 experts"):
        stepped.padded(1)


def test_what_has_no_step_is_composed(stepping):
    stepping()
    circuit, logits = circuit_of("exactly"), randn(T, E)
    custom = cr.route(logits, circuit, estimator=lambda mask, distribution: mask)
    groups = cr.route(logits, cr.compile(cr.EachGroup(cr.Groups(2), cr.Exactly(1)), E))
    assert {type(r) for r in (cr.route(logits, circuit, estimator="dense"), custom, groups)} == {Routing}


def test_a_replay_is_checked_and_then_a_step(stepping):
    circuit, logits = circuit_of("exactly"), randn(T, E)
    mask = circuit(logits).sample(key=5).bool()
    plain, stepped = both(stepping, lambda x: cr.route(x, circuit, replay=mask), (logits,))
    torch.testing.assert_close(read(stepped)[0], read(plain)[0])
    assert torch.equal(stepped.mask, mask)
    with pytest.raises(ValueError, match=r"replay holds a subset that Exactly\(2\).*exclude, in row 1"):
        cr.route(logits, circuit, replay=mask | (torch.arange(T) == 1)[:, None])


def test_a_decision_goes_with_its_last_reference(stepping):
    """No circle keeps a step's memory until the next collection."""
    circuit, logits = circuit_of("exactly"), randn(T, E).requires_grad_()
    stepping()
    gc.disable()
    try:
        routing = cr.route(logits, circuit, key=torch.arange(T))
        read(routing)
        taken = weakref.ref(routing._found.taken)
        del routing
        assert taken() is None
    finally:
        gc.enable()
