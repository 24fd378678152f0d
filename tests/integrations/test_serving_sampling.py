"""Sampling in serving: the library's own decision for (logits row, seed, position), with the head forced."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import circuitroute as cr
from circuitroute.integrations import serving
from tests.integrations.served import (
    CONSTRAINTS,
    H,
    T,
    assert_same_bits,
    call,
    keys_of,
    logits_of,
    of_every_scale,
    scattered,
)

x = cr.variables(12)
RULES = {
    "exactly": cr.Exactly(3),
    "between": cr.Between(2, 4),
    "count in": cr.CountIn({2, 5}),
    "at most": cr.AtMost(3),
    "groups": cr.ActiveGroups(cr.Groups(4), at_most=2) & cr.Exactly(3),
    "groups and range": cr.ActiveGroups(cr.Groups(4), at_most=2) & cr.Between(0, 4),
    "each group": cr.EachGroup(cr.Groups(3), cr.CountIn({0, 2})),
    "logic": cr.Logic((x[3] >> x[5]) & ~(x[0] & x[11])),
    "cost": cr.Cost(range(1, 13), at_most=20) & cr.AtLeast(2),
}
by_rule = pytest.mark.parametrize("rule", RULES)
ROWS = 200


def engines_of(circuit):
    names = ("numba", "torch", "naive") if circuit.counts is not None else ("torch", "naive")
    return [circuit.with_engine(name) for name in names if name != "numba" or numba_is_here()]


def numba_is_here():
    return cr.compile(cr.Exactly(1), 2).engine_for("cpu") == "numba"


def key_of(seed, position):
    return cr.random_key(seed, position)


# ---------------------------------------------------------------------------------------------- the library's decision


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@by_rule
def test_it_decides_as_route_does_with_the_same_keys(rule, dtype):
    """On every engine; the weights bit for bit as the engine torch has them."""
    circuit = cr.compile(RULES[rule], 12)
    logits, keys = of_every_scale(ROWS).to(dtype), keys_of(ROWS)
    for temperature, combine in ((1.0, "softmax"), (0.5, "normalized"), (3.0, "sigmoid")):
        function = serving.routing_function(RULES[rule], 12, sample=True, temperature=temperature, combine=combine)
        weights, ids = call(function, logits, circuit.max_count, **keys)
        for each in engines_of(circuit):
            routing = cr.route(logits, each, key=key_of(**keys), temperature=temperature, combine=combine)
            chosen = torch.arange(circuit.max_count) < routing.counts[:, None]
            assert torch.equal(scattered(chosen.float(), ids, 12).bool(), routing.mask)
            found = scattered(weights, ids, 12)
            torch.testing.assert_close(found, routing.gates)
            if each.engine == "torch":
                assert torch.equal(found, routing.gates)


def test_evidence_and_extreme_logits_are_sampled_as_route_does():
    """Rows without any subset are NaN alone, and so are rows with NaN."""
    for rule, constraint in RULES.items():
        circuit = cr.compile(constraint, 12)
        logits, keys = of_every_scale(ROWS), keys_of(ROWS)
        logits[5::7, 2], logits[6::11, 4], logits[7::50], logits[8::50], logits[9, 1] = (
            math.inf, -math.inf, math.inf, -math.inf, math.nan,
        )  # fmt: skip
        function = serving.routing_function(constraint, 12, sample=True)
        weights, ids = call(function, logits, 12, **keys)
        routing = cr.route(logits, circuit.with_engine("torch"), key=key_of(**keys), validate_args=False)
        bad = routing.gates.isnan().any(-1)
        assert torch.equal(weights.isnan().any(-1), bad)
        assert bool(bad[9])
        assert 1 <= int(bad.sum()) <= 20, rule
        assert torch.equal(scattered(weights, ids, 12)[~bad], routing.gates[~bad])
        assert all(sorted(row) == list(range(12)) for row in ids.tolist())


def test_scores_biases_and_temperatures_make_the_distribution():
    """exp(sum of scores / temperature), over allowed subsets; weights are those of the logits."""
    bias = torch.linspace(-1, 1, 12)
    bias[3], bias[7] = -math.inf, math.inf
    logits, keys = logits_of(), keys_of()
    for name in ("range", "groups"):
        constraint, n, topk = CONSTRAINTS[name]
        circuit = cr.compile(constraint, n)
        for score in ("logits", "sigmoid"):
            function = serving.routing_function(
                constraint, n, sample=True, score=score, bias=bias, temperature=0.25, combine="sigmoid", scaling=2.5
            )
            weights, ids = call(function, logits, topk, renormalize=True, **keys)
            theta = (logits.sigmoid() if score == "sigmoid" else logits) + bias
            mask = circuit(theta / 0.25).sample(key=key_of(**keys)).bool()
            expected = torch.where(mask, logits.sigmoid(), 0.0)
            expected = expected / expected.sum(-1, keepdim=True) * 2.5
            torch.testing.assert_close(scattered(weights, ids, n), expected)
            assert torch.equal(scattered(weights, ids, n) > 0, mask)


def test_frequencies_are_the_exact_marginals():
    """40,000 draws of one row; five standard errors, of 24 numbers: fails by chance once in 70,000 seeds."""
    for constraint in (RULES["between"], RULES["groups"]):
        row = logits_of(rows=1)
        draws = 40_000
        function = serving.routing_function(constraint, 12, sample=True, temperature=2.0)
        weights, ids = call(function, row.expand(draws, 12), 4, seed=torch.tensor(11), position=torch.arange(draws))
        share = (scattered(weights, ids, 12) > 0).double().mean(0)
        exact = cr.compile(constraint, 12)(row.double() / 2).marginals[0]
        assert bool(((share - exact).abs() < 5 * (exact * (1 - exact) / draws).sqrt()).all())


# --------------------------------------------------------------------------------------------- what it is a function of


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_a_token_is_sampled_alike_in_any_batch(name):
    constraint, n, topk = CONSTRAINTS[name]
    function = serving.routing_function(constraint, n, sample=True, head=1)
    logits, keys, state = logits_of(), keys_of(), torch.get_rng_state()
    expected = call(function, logits, topk, **keys)
    assert torch.equal(torch.get_rng_state(), state)
    order = torch.randperm(T, generator=torch.Generator().manual_seed(2))
    for rows in (order, torch.arange(1), torch.arange(0), torch.tensor([7, 7, 3])):
        found = call(function, logits[rows], topk, **{key: value[rows] for key, value in keys.items()})
        assert_same_bits(found, (expected[0][rows], expected[1][rows]))
    for odd in (torch.stack([logits, logits], -1)[..., 0], logits.t().contiguous().t()):
        assert not odd.is_contiguous()
        assert_same_bits(call(function, odd, topk, **keys), expected)
    for other in (copy.deepcopy(function), pickle.loads(pickle.dumps(function)), nn.Sequential(function).bfloat16()[0]):
        assert_same_bits(call(other, logits, topk, **keys), expected)
    assert function.state_dict() == {}
    assert not expected[0].requires_grad
    assert not call(function, logits.requires_grad_(), topk, **keys)[0].requires_grad


def test_seeds_positions_and_layers_all_count():
    constraint, n, topk = CONSTRAINTS["range"]
    logits, keys = torch.zeros(T, n), keys_of()
    made = [serving.routing_function(constraint, n, sample=True, layer=layer) for layer in (None, 0, 1)]
    found = [call(function, logits, topk, **keys) for function in made]
    found += [call(made[0], logits, topk, **{**keys, name: keys[name] + 1}) for name in keys]
    assert len({tuple(ids.flatten().tolist()) for _, ids in found}) == 5
    mask = cr.route(logits, cr.compile(constraint, n), key=cr.random_key(keys["seed"], keys["position"], 1)).mask
    assert torch.equal(scattered(*found[2], n) > 0, mask)


def test_a_seed_may_be_of_all_tokens_and_of_any_integers():
    constraint, n, topk = CONSTRAINTS["groups"]
    function, position = serving.routing_function(constraint, n, sample=True), torch.arange(T)
    expected = call(function, logits_of(), topk, seed=torch.full((T,), 9), position=position)
    for seed in (9, torch.tensor(9), torch.tensor(9, dtype=torch.int32), torch.full((T,), 9, dtype=torch.uint8)):
        assert_same_bits(call(function, logits_of(), topk, seed=seed, position=position.int()), expected)
    large = call(function, logits_of(), topk, seed=2**64 - 1, position=position)
    assert_same_bits(large, call(function, logits_of(), topk, seed=torch.tensor(-1), position=position))


# ---------------------------------------------------------------------------------------------- the head


@pytest.mark.parametrize("head", [1, 2, 3])
@pytest.mark.parametrize("rule", ["exactly", "between", "groups", "groups and range", "at most", "logic"])
def test_the_head_is_forced_and_the_rest_drawn_given_it(rule, head):
    """By hand: the best members of the mode are evidence for the same keys."""
    circuit = cr.compile(RULES[rule], 12)
    logits, keys = of_every_scale(ROWS), keys_of(ROWS)
    function = serving.routing_function(RULES[rule], 12, sample=True, head=head, temperature=2.0)
    weights, ids = call(function, logits, circuit.max_count, **keys)
    mode = circuit(logits).mode.bool()
    forced = torch.zeros_like(mode)
    for row in range(ROWS):
        best = sorted(mode[row].nonzero()[:, 0].tolist(), key=lambda i, row=row: (-float(logits[row, i]), i))
        forced[row, best[:head]] = True
    evidence = torch.where(forced, math.inf, logits)
    mask = cr.route(evidence, circuit, key=key_of(**keys), temperature=2.0).mask
    chosen = torch.arange(circuit.max_count) < mask.sum(-1)[:, None]
    assert torch.equal(scattered(chosen.float(), ids, 12).bool(), mask)
    assert bool((mask | ~forced).all())
    assert circuit.satisfies(mask).all()
    gates = cr.route(logits, circuit, replay=mask).gates  # the weights know nothing of what is forced
    torch.testing.assert_close(scattered(weights, ids, 12), gates)


def test_a_head_that_the_groups_forbid_together_is_never_forced():
    """The two best experts lie in groups of which one may be active."""
    constraint = cr.ActiveGroups(cr.Groups(2), at_most=1) & cr.Exactly(2)
    logits = torch.tensor([[9.0, 0.0, 0.0, 8.0, 7.0, 0.0]]).expand(200, 6)
    function = serving.routing_function(constraint, 6, sample=True, head=2, temperature=5.0)
    _, ids = call(function, logits, 2, seed=1, position=torch.arange(200))
    assert {tuple(row) for row in ids.tolist()} == {(3, 4)}
    one = serving.routing_function(constraint, 6, sample=True, head=1, temperature=5.0)
    _, ids = call(one, logits, 2, seed=1, position=torch.arange(200))
    assert {tuple(row) for row in ids.tolist()} == {(3, 4), (3, 5)}


@pytest.mark.parametrize("name", ["count", "groups"])
def test_the_whole_head_and_the_cold_are_the_mode(name):
    constraint, n, topk = CONSTRAINTS[name]
    expected = call(serving.routing_function(constraint, n), logits_of(), topk)
    for settings in ({"head": topk}, {"temperature": 1e-3}):
        function = serving.routing_function(constraint, n, sample=True, **settings)
        assert_same_bits(call(function, logits_of(), topk, **keys_of()), expected)
    free = serving.routing_function(constraint, n, sample=True)
    assert not torch.equal(call(free, logits_of(), topk, **keys_of())[1], expected[1])
    assert_same_bits(
        call(serving.routing_function(constraint, n, sample=True, head=0), logits_of(), topk, **keys_of()),
        call(free, logits_of(), topk, **keys_of()),
    )


# ---------------------------------------------------------------------------------------------- odd tensors


@pytest.mark.parametrize("name", ["range", "groups"])
def test_it_is_batched_traced_and_drawn_of_nothing(name):
    """vmap, make_fx and tensors without numbers, as everywhere."""
    constraint, n, topk = CONSTRAINTS[name]
    function, keys = serving.routing_function(constraint, n, sample=True, head=1), keys_of()
    batch = torch.stack([logits_of(seed=seed) for seed in range(3)])
    weights, ids = torch.func.vmap(lambda rows: call(function, rows, topk, **keys))(batch)
    for i, rows in enumerate(batch):
        assert_same_bits((weights[i], ids[i]), call(function, rows, topk, **keys))
    program = make_fx(lambda rows, seed, position: call(function, rows, topk, seed=seed, position=position))(
        batch[0], *keys.values()
    )
    assert_same_bits(program(batch[1], *keys.values()), call(function, batch[1], topk, **keys))
    nowhere = {name: value.to("meta") for name, value in keys.items()}
    assert call(function.to("meta"), logits_of().to("meta"), topk, **nowhere)[1].shape == (T, topk)


# ---------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"head": 4}, ValueError, r"head=4: Exactly\(3\) chooses at most 3 experts"),
        ({"head": -1}, ValueError, "head=-1: must be at least 0"),
        ({"head": 1.5}, TypeError, "head=1.5: expected an integer"),
        (
            {"temperature": 0},
            ValueError,
            r"temperature=0.0: must be positive and finite, .*; sample=False is the limit",
        ),
        ({"temperature": math.inf}, ValueError, "temperature=inf"),
        ({"temperature": math.nan}, ValueError, "temperature=nan"),
        ({"temperature": "1"}, TypeError, "temperature='1': expected a number"),
        ({"temperature": torch.ones(3)}, TypeError, "temperature=tensor"),
        ({"layer": 0.5}, TypeError, "layer=0.5: expected an integer"),
        ({"sample": 1}, TypeError, "sample=1: expected True or False"),
        ({"sample": False, "temperature": 2.0}, ValueError, "temperature=2.0: this is of samples.*give sample=True"),
        ({"sample": False, "head": 0}, ValueError, "head=0: this is of samples"),
        ({"sample": False, "layer": 0}, ValueError, "layer=0: this is of samples"),
    ],
)
def test_errors_of_the_maker(arguments, error, message):
    with pytest.raises(error, match=message):
        serving.routing_function(**{"constraint": cr.Exactly(3), "num_experts": 12, "sample": True, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"seed": None}, TypeError, "seed is missing: this function samples, .*; give seed=, the request's, an int64"),
        ({"position": None}, TypeError, "position is missing: this function samples"),
        ({"seed": torch.zeros(T)}, TypeError, "seed has dtype torch.float32: expected an integer tensor"),
        ({"seed": torch.zeros(T, dtype=torch.bool)}, TypeError, "seed has dtype torch.bool"),
        ({"seed": "a"}, TypeError, "seed='a': expected an integer"),
        ({"seed": torch.zeros(T + 1).long()}, ValueError, r"seed has shape \[41\]: expected \[\] or \[tokens=40\]"),
        ({"seed": torch.zeros(1).long()}, ValueError, r"seed has shape \[1\]: expected \[\] or \[tokens=40\]"),
        ({"position": torch.zeros(T)}, TypeError, "position has dtype torch.float32"),
        ({"position": torch.zeros(3).long()}, ValueError, r"position has shape \[3\]: expected \[tokens=40\]"),
        ({"position": torch.tensor(3)}, ValueError, r"position has shape \[\]: expected \[tokens=40\]"),
        ({"position": 3}, ValueError, r"position has shape \[\]: expected \[tokens=40\]"),
        ({"seed": torch.zeros(T, device="meta").long()}, ValueError, r"seed is on meta .* \.to\('cpu'\)"),
        ({"topk": 2}, ValueError, "topk=2"),
    ],
)
def test_errors_of_a_call(arguments, error, message):
    function = serving.routing_function(cr.Exactly(3), 12, sample=True)
    given = {"hidden_states": torch.zeros(T, H), "gating_output": logits_of(), "topk": 3, "renormalize": True}
    with pytest.raises(error, match=message):
        function(**{**given, **keys_of(), **arguments})


@pytest.mark.parametrize("name", ["seed", "position"])
def test_a_function_without_samples_wants_no_keys(name):
    function = serving.routing_function(cr.Exactly(3), 12)
    with pytest.raises(
        TypeError, match=rf"{name} was given, but .* draws nothing: leave it out, or make .*sample=True"
    ):
        call(function, logits_of(), 3, **{name: keys_of()[name]})


def test_what_it_shows():
    function = serving.routing_function(cr.Exactly(3), 12, sample=True, temperature=0.5, head=1, layer=7)
    assert "scaling=1.0, temperature=0.5, head=1, layer=7" in repr(function)
    assert function.portable
