"""The routing function of inference servers: what they expect, and what routers decide."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import circuitroute as cr
from circuitroute.integrations import serving
from tests.integrations.served import CONSTRAINTS, H, T, assert_same, call, logits_of

by_constraint = pytest.mark.parametrize("name", CONSTRAINTS)


# ---------------------------------------------------------------------------------------------- what it decides


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_exactly_k_is_what_servers_do_anyway(dtype, renormalize):
    """softmax, then topk: the same ids in the same order, wherever topk is not left to choose among equals."""
    logits = (
        torch.stack([torch.randperm(64, generator=torch.Generator().manual_seed(i)) for i in range(T)]).to(dtype) / 8
    )
    weights, ids = call(serving.routing_function(cr.Exactly(8), 64), logits, 8, renormalize)
    expected, places = torch.softmax(logits.float(), -1).topk(8, -1)
    if renormalize:
        expected = expected / expected.sum(-1, keepdim=True)
    assert (weights.dtype, ids.dtype) == (torch.float32, torch.int32)
    assert torch.equal(ids.long(), places)
    torch.testing.assert_close(weights, expected)


def test_equal_logits_go_by_id():
    logits = torch.tensor([[1.0, 3.0, 3.0, 1.0, 3.0, 1.0], [2.0] * 6])
    ids = call(serving.routing_function(cr.Exactly(4), 6), logits, 4)[1]
    assert ids.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3]]


@pytest.mark.parametrize("combine", ["softmax", "normalized", "sigmoid"])
@by_constraint
def test_it_decides_as_routers_do_in_evaluation(name, combine):
    constraint, n, topk = CONSTRAINTS[name]
    router = cr.Router(H, n, constraint, combine=combine).eval()
    with torch.no_grad():
        router.weight.mul_(6)
        hidden = torch.randn(T, H, generator=torch.Generator().manual_seed(0))
        expected = router(hidden).padded(topk)
        found = serving.routing_function(constraint, n, combine=combine)(hidden, router.logits(hidden), topk, False)
    assert found[1].dtype == torch.int32
    assert_same(found, (expected[0], expected[1].int()))


@by_constraint
def test_unused_slots_are_other_experts_of_weight_zero(name):
    constraint, n, _ = CONSTRAINTS[name]
    weights, ids = call(serving.routing_function(constraint, n), logits_of(), 7)
    used = weights > 0
    counts = used.sum(-1)
    assert (counts == cr.compile(constraint, n)(logits_of()).mode.sum(-1)).all()
    assert (used == (torch.arange(7) < counts[:, None])).all()
    assert all(len(set(row)) == 7 and 0 <= min(row) <= max(row) < n for row in ids.tolist())


def test_weights_add_up_where_the_server_asks():
    logits = logits_of()
    for name, (constraint, n, topk) in CONSTRAINTS.items():
        for combine in ("softmax", "normalized", "sigmoid"):
            function = serving.routing_function(constraint, n, combine=combine, scaling=2.5)
            plain, whole = (call(function, logits, topk, renormalize)[0] for renormalize in (False, True))
            some = (plain > 0).any(-1)
            torch.testing.assert_close(whole.sum(-1)[some], torch.full((int(some.sum()),), 2.5))
            torch.testing.assert_close(whole, plain / plain.sum(-1, keepdim=True).clamp(min=1e-9) * 2.5)
            assert bool((whole[~some] == 0).all())
            assert name == "both" or bool(some.all())
            assert torch.equal(plain, whole) == (combine == "normalized")


def test_weights_survive_a_constraint_that_excludes_the_largest():
    """The chosen experts' share of the softmax is 0 in float32; among themselves they have weights."""
    logits = torch.tensor([[500.0, 0.0, 1.0, 2.0]])
    function = serving.routing_function(cr.Exactly(2), 4, bias=torch.tensor([-math.inf, 0.0, 0.0, 0.0]))
    weights, ids = call(function, logits, 2, renormalize=True)
    assert ids.tolist() == [[3, 2]]
    torch.testing.assert_close(weights, torch.softmax(torch.tensor([[2.0, 1.0]]), -1))


def test_a_correction_bias_moves_the_choice_only():
    """DeepSeek-V3's rule without groups (so Moonlight's, Kimi-K2's and GLM-4.5's): sigmoid, bias, top-k, scaling."""
    logits, bias = logits_of(64), torch.randn(64, generator=torch.Generator().manual_seed(1)) * 0.2
    function = serving.routing_function(cr.Exactly(6), 64, combine="sigmoid", score="sigmoid", bias=bias, scaling=2.446)
    scores = logits.sigmoid()
    expected_ids = (scores + bias).topk(6, -1).indices
    expected = scores.gather(-1, expected_ids)
    expected = expected / (expected.sum(-1, keepdim=True) + 1e-20) * 2.446
    assert_same(call(function, logits, 6, renormalize=True), (expected, expected_ids.int()))
    assert (expected_ids != scores.topk(6, -1).indices).any()


def test_infinite_biases_forbid_and_force():
    bias = torch.zeros(12)
    bias[[2, 3]], bias[7] = -math.inf, math.inf
    for constraint, n, topk in CONSTRAINTS.values():
        weights, ids = call(serving.routing_function(constraint, n, bias=bias), logits_of(), topk)
        chosen = torch.zeros(T, n).scatter_add_(1, ids.long(), (weights > 0).float())
        assert chosen.sum(0)[[2, 3, 7]].tolist() == [0, 0, T]
        assert cr.compile(constraint, n).satisfies(chosen).all()


def test_composed_constraints_get_the_best_of_all_subsets():
    """DeepSeek's groups and count, with the sum of biased sigmoids, against every subset there is."""
    constraint, n, topk = CONSTRAINTS["groups"]
    bias = torch.linspace(-0.3, 0.3, n)
    weights, ids = call(serving.routing_function(constraint, n, score="sigmoid", bias=bias), logits_of(), topk)
    theta = (logits_of().sigmoid() + bias).double()
    subsets = cr.compile(constraint, n)(theta[:1]).enumerate_support()[:, 0]
    best = (theta @ subsets.t()).amax(-1)
    torch.testing.assert_close(theta.gather(1, ids.long()).sum(-1), best)
    assert bool((weights > 0).all())


@by_constraint
def test_bad_rows_are_nan_alone(name):
    constraint, n, topk = CONSTRAINTS[name]
    logits = logits_of()
    logits[1, 0], logits[2], logits[3, 5], logits[4] = math.nan, math.inf, math.inf, -math.inf
    empty = [False, True, True, False, name != "both"]  # no expert at all is fine where the constraint says so
    function = serving.routing_function(constraint, n, score="logits")
    weights, ids = call(function, logits, topk)
    assert weights.isnan().all(-1)[:5].tolist() == empty
    assert weights.isnan().any(-1)[5:].tolist() == [False] * (T - 5)
    assert all(len(set(row)) == topk and 0 <= min(row) <= max(row) < n for row in ids.tolist())
    assert_same((weights[5:], ids[5:]), call(function, logits[5:], topk))


def test_it_is_a_function_of_its_arguments():
    """No state, no randomness, no gradient, and the same for a token in any batch; whatever becomes of the model."""
    constraint, n, topk = CONSTRAINTS["both"]
    function = serving.routing_function(constraint, n, bias=torch.full((n,), 1e-3))
    before, logits = torch.get_rng_state(), logits_of().requires_grad_()
    expected = call(function, logits, topk)
    assert torch.equal(torch.get_rng_state(), before)
    assert not expected[0].requires_grad
    assert function.state_dict() == {}
    assert not list(function.parameters())
    for rows in (slice(0, 1), slice(7, 30), slice(0, 0)):
        assert_same(call(function, logits[rows], topk), (expected[0][rows], expected[1][rows]))
    for other in (copy.deepcopy(function), pickle.loads(pickle.dumps(function)), nn.Sequential(function).bfloat16()[0]):
        assert_same(call(other, logits, topk), expected)
    torch.set_default_dtype(torch.bfloat16)  # as servers do while they build a model
    try:
        other = serving.routing_function(constraint, n, bias=torch.full((n,), 1e-3, dtype=torch.float32))
        assert_same(call(other, logits, topk), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@by_constraint
def test_its_tables_lie_where_they_are_wanted(name):
    constraint, n, _ = CONSTRAINTS[name]
    bias = torch.zeros(n)
    elsewhere = serving.routing_function(constraint, n, bias=bias, device="meta")
    with torch.device("meta"):  # as servers build a model on their device
        default = serving.routing_function(constraint, n, bias=bias)
    for function in (elsewhere, default, serving.routing_function(constraint, n).to("meta")):
        assert {table.device.type for table in function.buffers()} == {"meta"}


def test_a_circuit_may_come_from_a_file(tmp_path):
    constraint, n, topk = CONSTRAINTS["both"]
    cr.compile(constraint, n).save(tmp_path / "rule.circuit")
    function = serving.routing_function(cr.load(tmp_path / "rule.circuit"), n)
    assert_same(call(function, logits_of(), topk), call(serving.routing_function(constraint, n), logits_of(), topk))
    assert repr(function).startswith("RoutingFunction(")
    assert "num_experts=12, combine='softmax', score='logits', scaling=1.0" in repr(function)


# ---------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_experts": 0}, ValueError, "num_experts=0"),
        ({"constraint": cr.Exactly(13)}, cr.InfeasibleError, r"Exactly\(13\)"),
        ({"constraint": "Exactly(3)"}, TypeError, "Exactly"),
        ({"constraint": cr.compile(cr.Exactly(2), 8)}, ValueError, "it is over 8 variables, and there are to be n=12"),
        ({"combine": "marginal"}, ValueError, "combine='marginal': choose one of 'softmax', 'normalized', 'sigmoid'"),
        ({"score": "softmax"}, ValueError, "score='softmax': choose one of 'logits', 'sigmoid'"),
        ({"scaling": math.inf}, ValueError, "scaling=inf"),
        ({"scaling": "2"}, ValueError, "scaling='2'"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias has shape \(3,\): expected a tensor of shape \(12,\)"),
        ({"bias": [0.0] * 12}, ValueError, "bias is a list"),
        ({"bias": torch.full((12,), math.nan)}, ValueError, "bias holds NaN"),
    ],
)
def test_errors_of_the_maker(arguments, error, message):
    with pytest.raises(error, match=message):
        serving.routing_function(**{"constraint": cr.Exactly(3), "num_experts": 12, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"topk": 3}, ValueError, r"topk=3: Between\(2, 4\) chooses up to 4 experts per token; give the server topk=4"),
        ({"topk": 13}, ValueError, "topk=13: there are only 12 experts"),
        ({"topk": 4.0}, TypeError, "topk=4.0: expected an integer"),
        ({"gating_output": [[0.0] * 12]}, TypeError, "gating_output is list: expected a floating-point tensor"),
        ({"gating_output": torch.zeros(T, 12).long()}, TypeError, "gating_output is torch.int64"),
        ({"gating_output": torch.zeros(T, 11)}, ValueError, r"\(40, 11\): expected \[tokens, num_experts=12\]"),
        ({"gating_output": torch.zeros(2, T, 12)}, ValueError, r"gating_output has shape \(2, 40, 12\)"),
        ({"gating_output": torch.zeros(3, 12)}, ValueError, r"hidden_states have shape \(40, 5\) and gating_output"),
        ({"gating_output": torch.zeros(T, 12, device="meta")}, ValueError, r"is on meta .* \.to\('meta'\)"),
    ],
)
def test_errors_of_a_call(arguments, error, message):
    function = serving.routing_function(cr.Between(2, 4), 12)
    given = {"hidden_states": torch.zeros(T, H), "gating_output": torch.zeros(T, 12), "topk": 4, "renormalize": True}
    with pytest.raises(error, match=message):
        function(**{**given, **arguments})
