"""DeepSeek's greedy rule of groups: held to transformers' routers and to a rule in plain Python."""

import copy
import math
import pickle
from types import SimpleNamespace

import pytest
import torch

import circuitroute as cr
from circuitroute.integrations import serving
from tests.integrations.served import H, T, assert_same_bits, call, logits_of, scattered


def by_hand(scores, groups, active, k, group_score):
    """Ids of one token, by sorting in Python."""
    size = len(scores) // groups
    members = [list(range(g * size, (g + 1) * size)) for g in range(groups)]
    best = [sorted((scores[i] for i in group), reverse=True) for group in members]
    worth = [values[0] + values[1] if group_score == "top2" else values[0] for values in best]
    kept = sorted(range(groups), key=lambda g: (-worth[g], g))[:active]
    inside = [i for g in sorted(kept) for i in members[g]]
    return sorted(inside, key=lambda i: (-scores[i], i))[:k]


@pytest.mark.parametrize("group_score", ["top2", "max"])
@pytest.mark.parametrize("groups", [1, 3, 6, 12])
def test_it_is_the_rule(groups, group_score):
    """Ties too: of eighths, float32 sums are exact."""
    if group_score == "top2" and groups == 12:
        groups = 4
    active = max(1, groups // 2)
    k = min(3, active * 12 // groups)
    logits = (logits_of() * 4).round() / 8
    function = serving.greedy_groups(
        12, k, groups=groups, active=active, group_score=group_score, score="logits", combine="softmax"
    )
    weights, ids = call(function, logits, k)
    assert ids.tolist() == [by_hand(row, groups, active, k, group_score) for row in logits.tolist()]
    assert (weights.dtype, ids.dtype) == (torch.float32, torch.int32)
    torch.testing.assert_close(weights, torch.softmax(logits, -1).gather(-1, ids.long()))
    assert (
        cr.compile(cr.ActiveGroups(cr.Groups(groups), at_most=active) & cr.Exactly(k), 12)
        .satisfies(scattered(torch.ones_like(weights), ids, 12))
        .all()
    )


@pytest.mark.parametrize("renormalize", [False, True])
def test_it_is_the_router_of_deepseek_v3(renormalize):
    modeling = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    config = SimpleNamespace(
        num_experts_per_tok=8, num_local_experts=256, hidden_size=16, routed_scaling_factor=2.5, n_group=8,
        topk_group=4, norm_topk_prob=renormalize,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    router = modeling.DeepseekV3TopkRouter(config)
    with torch.no_grad():
        router.weight.normal_(generator=generator)
        router.e_score_correction_bias.normal_(std=0.3, generator=generator)
        hidden = torch.randn(500, 16, generator=generator)
        logits, weights, ids = router(hidden)
    bias = router.e_score_correction_bias
    found = call(serving.greedy_groups(256, 8, bias=bias, scaling=2.5), logits, 8, renormalize)
    assert torch.equal(ids.sort(-1).values, found[1].long().sort(-1).values)
    expected = scattered(weights, ids, 256)
    if renormalize:  # divided by the same sum in another order
        torch.testing.assert_close(scattered(*found, 256), expected, rtol=1e-6, atol=0)
    else:
        assert torch.equal(scattered(*found, 256), expected)


def test_it_is_the_router_of_deepseek_v2():
    modeling = pytest.importorskip("transformers.models.deepseek_v2.modeling_deepseek_v2")
    config = SimpleNamespace(
        num_experts_per_tok=6, num_experts=160, hidden_size=16, routed_scaling_factor=16.0, n_group=8, topk_group=3,
        topk_method="group_limited_greedy",
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    router = modeling.DeepseekV2TopkRouter(config)
    with torch.no_grad():
        router.weight.normal_(std=0.4, generator=generator)
        logits, weights, ids = router(torch.randn(500, 16, generator=generator))
    function = serving.greedy_groups(
        160, 6, groups=8, active=3, group_score="max", score="softmax", combine="softmax", scaling=16.0
    )
    assert torch.equal(scattered(*call(function, logits, 6), 160), scattered(weights, ids, 160))


def test_it_is_not_the_optimum():
    """The group of the two best experts has no good third; the constraint's own function finds the other group."""
    logits = torch.tensor([[9.0, 2.0, 0.0, 5.0, 5.0, 5.0]])
    greedy = serving.greedy_groups(6, 3, groups=2, active=1, score="logits")
    exact = serving.routing_function(cr.ActiveGroups(cr.Groups(2), at_most=1) & cr.Exactly(3), 6)
    assert [call(function, logits, 3)[1].tolist() for function in (greedy, exact)] == [[[0, 1, 2]], [[3, 4, 5]]]


def test_more_slots_nan_and_infinities():
    logits = logits_of()
    logits[1, 0], logits[2], logits[3, 4:] = math.nan, math.inf, -math.inf
    logits[4], logits[5, 3], logits[5, :3] = -math.inf, math.inf, -math.inf
    function = serving.greedy_groups(12, 3, groups=3, active=1, score="logits", combine="sigmoid")
    weights, ids = call(function, logits, 5)
    bad = weights.isnan().any(-1)
    assert bad.nonzero()[:, 0].tolist() == [1, 4, 5]  # NaN; nothing; the group of the forced one has no third
    assert bool((weights[~bad, :3] > 0).all())
    assert bool((weights[~bad, 3:] == 0).all())
    assert ids[3, :3].sort().values.tolist() == sorted(logits[3, :4].topk(3).indices.tolist())
    assert all(len(set(row)) == 5 for row in ids.tolist())
    keep = torch.tensor([0, *range(6, T)])
    assert_same_bits(call(function, logits[keep], 5), (weights[keep], ids[keep]))
    assert call(function, logits[:0], 3)[0].shape == (0, 3)


def test_a_bias_moves_the_choice_only():
    bias = torch.zeros(12)
    bias[4:8] = 10.0
    weights, ids = call(serving.greedy_groups(12, 2, groups=3, active=1, bias=bias), logits_of(), 2)
    assert bool(((ids >= 4) & (ids < 8)).all())
    torch.testing.assert_close(weights, logits_of().sigmoid().gather(-1, ids.long()))


def test_it_has_no_state_and_moves():
    bias = torch.linspace(-1, 1, 12)
    function = serving.greedy_groups(12, 3, groups=4, active=2, bias=bias)
    expected = call(function, logits_of(), 3, True)
    assert function.state_dict() == {}
    for other in (copy.deepcopy(function), pickle.loads(pickle.dumps(function)), function.bfloat16()):
        assert_same_bits(call(other, logits_of(), 3, True), expected)
    assert "greedy_groups(k=3, groups=4, active=2, group_score='top2'), num_experts=12, combine='sigmoid'" in repr(
        function
    )
    elsewhere = serving.greedy_groups(12, 3, groups=4, active=2, bias=bias, device="meta")
    assert {table.device.type for table in elsewhere.buffers()} == {"meta"}
    with pytest.raises(ValueError, match="function is on the meta device"):
        serving.export(elsewhere, topk=3, renormalize=True)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_experts": 0}, ValueError, "num_experts=0"),
        ({"k": 0}, ValueError, "k=0"),
        ({"k": 2.0}, TypeError, "k=2.0"),
        ({"groups": 5}, ValueError, "groups=5: they are of equal size, and num_experts=12 is no multiple"),
        ({"groups": cr.Groups(4)}, TypeError, "groups=Groups"),
        ({"active": 5}, ValueError, "active=5: there are only groups=4"),
        ({"active": 0}, ValueError, "active=0"),
        ({"k": 7}, ValueError, "k=7: 2 groups of 3 experts have only 6; keep more groups active"),
        ({"groups": 12}, ValueError, "group_score='top2': the 12 groups have one expert each; give group_score='max'"),
        ({"group_score": "sum"}, ValueError, "group_score='sum': choose one of 'top2', 'max'"),
        ({"score": "tanh"}, ValueError, "score='tanh': choose one of 'logits', 'sigmoid', 'softmax'"),
        ({"combine": "marginal"}, ValueError, "combine='marginal'"),
        ({"scaling": math.nan}, ValueError, "scaling=nan"),
        ({"bias": torch.zeros(3)}, ValueError, r"bias has shape \(3,\)"),
    ],
)
def test_errors_of_the_maker(arguments, error, message):
    given = {"num_experts": 12, "k": 2, "groups": 4, "active": 2, **arguments}
    with pytest.raises(error, match=message):
        serving.greedy_groups(**given)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"topk": 2}, ValueError, r"topk=2: greedy_groups\(k=3, .* chooses up to 3 experts per token"),
        ({"topk": 13}, ValueError, "topk=13: there are only 12 experts"),
        ({"gating_output": torch.zeros(T, 11)}, ValueError, r"expected \[tokens, num_experts=12\]"),
        ({"gating_output": torch.zeros(T, 12, device="meta")}, ValueError, r"is on meta .* \.to\('meta'\)"),
    ],
)
def test_errors_of_a_call(arguments, error, message):
    function = serving.greedy_groups(12, 3, groups=4, active=2)
    given = {"hidden_states": torch.zeros(T, H), "gating_output": torch.zeros(T, 12), "topk": 3, "renormalize": True}
    with pytest.raises(error, match=message):
        function(**{**given, **arguments})
