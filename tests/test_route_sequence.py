"""Totals of a sequence: held to the joint law of all tokens, to causality, and to the total whatever comes."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import circuitroute as cr
from circuitroute.routing.budgets.sequence_budget import Total, block_at, messages

INF = math.inf


def normal(*shape, seed=0, spread=1.0, dtype=torch.float32):
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def keys(*shape, seed=0):
    return cr.random_key(seed, torch.arange(math.prod(shape))).view(shape)


TOTALS = [8, cr.Exactly(9), cr.Between(7, 9), cr.AtLeast(13), cr.CountIn({6, 11, 12})]


# ---------------------------------------------------------------------------------------------- the law


@pytest.mark.parametrize("total", TOTALS, ids=repr)
@pytest.mark.parametrize("rule", [cr.Between(1, 3), cr.CountIn({1, 2, 4})], ids=repr)
def test_of_true_estimates_it_is_the_joint_law_of_all_tokens(rule, total):
    """Tokens of equal logits, whose counts are known: log P is that of one circuit over all tokens and experts."""
    T, E = 5, 4
    logits = normal(E, dtype=torch.float64).expand(T, E)
    circuit = cr.compile(rule, E)
    estimate = cr.log_count_polynomial(logits[0], circuit.max_count)
    joint = cr.compile(cr.LayerBudget(T, E, rule, cr.AtMost(total) if isinstance(total, int) else total), T * E)
    law = joint(logits.flatten())
    for seed in range(4):
        options = {"total": total, "key": keys(T, seed=seed), "estimate": estimate}
        routing = cr.route_sequence(logits, circuit, **options)
        assert torch.allclose(routing.log_prob.sum(), law.log_prob(routing.mask.flatten()), atol=1e-9)
    one = cr.route_sequence(logits, circuit, total=total, key=keys(T))  # what is learned of equal tokens is true
    assert torch.allclose(one.log_prob.sum(), law.log_prob(one.mask.flatten()), atol=1e-9)


@pytest.mark.parametrize("engine", ["naive", "torch", "numba"])
def test_a_token_is_decided_by_its_law_under_its_potential(engine):
    circuit = cr.compile(cr.Between(1, 4), 8).with_engine(engine)
    logits, key = normal(2, 20, 8), keys(2, 20)
    for options in ({}, {"temperature": 0.5}, {"price": 0.3, "bias": normal(8, seed=4)}):
        routing = cr.route_sequence(logits, circuit, total=45, key=key, **options)
        potential = routing.distribution.count_potential.view(2, 20, 5)
        again = cr.route(logits, circuit, key=key, count_potential=potential, **options)
        assert torch.equal(routing.mask, again.mask)
        assert torch.allclose(routing.log_prob, again.log_prob, atol=1e-5)
        assert torch.allclose(routing.gates, again.gates, atol=1e-6)
    other = cr.compile(cr.Between(1, 4), 8).with_engine("naive")
    assert torch.equal(routing.mask, cr.route_sequence(logits, other, total=45, key=key, **options).mask)


def test_counts_are_drawn_with_their_probability():
    """Pearson's statistic of 4000 sequences over paths of counts; wrong once in 10,000 keys, and these are fixed."""
    circuit, total = cr.compile(cr.Between(0, 2), 3), 3
    logits = normal(3, 3).expand(4000, 3, 3)
    routing = cr.route_sequence(logits, circuit, total=total, key=keys(4000, 3, seed=8))
    paths = routing.counts.view(4000, 3)
    assert int(paths.sum(-1).max()) <= total
    found = dict(zip(*(x.tolist() for x in (paths @ torch.tensor([9, 3, 1])).unique(return_counts=True)), strict=True))
    expected = {}
    for path in itertools.product(range(3), repeat=3):
        if sum(path) > total:
            continue
        count = torch.tensor(path)
        masks = [[m for m in itertools.product((0, 1), repeat=3) if sum(m) == n] for n in path]
        whole = [torch.tensor(mask) for mask in itertools.product(*masks)]
        records = torch.stack(whole).bool()
        replayed = cr.route_sequence(logits[: len(whole)], circuit, total=total, replay=records)
        log_prob = replayed.log_prob.double().view(len(whole), 3).sum(-1)
        expected[int(count @ torch.tensor([9, 3, 1]))] = 4000 * float(log_prob.exp().sum())
    assert sum(expected.values()) == pytest.approx(4000, rel=1e-4)
    assert set(found) <= set(expected)
    statistic = sum((found.get(path, 0) - n) ** 2 / n for path, n in expected.items())
    assert len(expected) == 17
    assert statistic < 44.3  # 16 degrees of freedom


def test_what_is_ahead_is_exact_within_reach_and_bounded_beyond():
    log_q = torch.tensor([[0.0, 0.2, 0.5, 0.3]], dtype=torch.float64).log()
    total = Total.of(40, 24, (1, 2, 3))
    spent = torch.tensor([5])
    exact = messages(total, 20, 20, 4, spent, log_q)
    assert exact.shape == (1, 5, 13)
    sums = {0: 1.0}
    for _ in range(20):
        nexts = {}
        for n, p in sums.items():
            for j in (1, 2, 3):
                nexts[n + j] = nexts.get(n + j, 0.0) + p * float(log_q[0, j].exp())
        sums = nexts
    truth = math.log(sum(p for n, p in sums.items() if 5 + n <= 40))
    assert float(exact[0, 0, 0]) == pytest.approx(truth, rel=1e-9)
    near = messages(total, 20, 8, 4, spent, log_q)
    assert truth <= float(near[0, 0, 0]) <= truth + 0.5 * math.log(2 * math.pi * 20 * 3)
    assert [block_at(p, 8) for p in (0, 1, 2, 3, 5, 8, 15, 16)] == [
        (0, 1), (1, 2), (2, 4), (2, 4), (4, 8), (8, 16), (8, 16), (16, 24)
    ]  # fmt: skip
    assert [block_at(p, 6) for p in (3, 4, 5, 6, 7)] == [(2, 4), (4, 6), (4, 6), (6, 12), (6, 12)]
    assert [block_at(p, 1) for p in (0, 1, 2)] == [(0, 1), (1, 2), (2, 3)]


# ---------------------------------------------------------------------------------------------- causal, and in parts


@pytest.mark.parametrize(
    "options", [{}, {"decide": "mode"}, {"decide": 0.5}, {"training": False}, {"block": 5}], ids=str
)
@pytest.mark.parametrize("total", [75, cr.CountIn({40, 90})], ids=repr)
def test_a_token_knows_nothing_of_those_after_it_and_parts_are_the_whole(total, options):
    circuit, logits, key = cr.compile(cr.Between(1, 4), 8), normal(2, 36, 8), keys(2, 36)
    whole = cr.route_sequence(logits, circuit, total=total, key=key, **options)
    mask = whole.mask.view(2, 36, 8)
    for at in (1, 7, 33):
        changed = logits.clone()
        changed[:, at:] = normal(2, 36 - at, 8, seed=9, spread=4.0)
        other = cr.route_sequence(changed, circuit, total=total, key=key, **options)
        assert torch.equal(other.mask.view(2, 36, 8)[:, :at], mask[:, :at])
        assert torch.equal(other.log_prob.view(2, 36)[:, :at], whole.log_prob.view(2, 36)[:, :at])
    state, parts = None, []
    for begin, end in itertools.pairwise((0, 1, 2, 3, 9, 9, 10, 32, 35, 36)):
        part = cr.route_sequence(
            logits[:, begin:end], circuit, total=total, key=key[:, begin:end], state=state, length=36, **options
        )
        state = pickle.loads(pickle.dumps(part.state))
        parts.append(part)
    assert torch.equal(torch.cat([p.mask.view(2, -1, 8) for p in parts], 1), mask)
    log_prob = torch.cat([p.log_prob.view(2, -1) for p in parts], 1)
    assert torch.allclose(log_prob, whole.log_prob.view(2, 36), atol=1e-5)
    assert torch.equal(state.spent, whole.state.spent)
    assert (state.position, state.length) == (36, 36)


def test_sequences_do_not_know_each_other():
    circuit, logits, key = cr.compile(cr.Between(1, 3), 6), normal(3, 12, 6), keys(3, 12)
    both = cr.route_sequence(logits, circuit, total=20, key=key)
    for s in range(3):
        alone = cr.route_sequence(logits[s], circuit, total=20, key=key[s])
        assert torch.equal(alone.mask, both.mask.view(3, 12, 6)[s])
        assert torch.equal(alone.state.spent, both.state.spent[s : s + 1])


# ---------------------------------------------------------------------------------------------- never over the total


@st.composite
def sequences(draw):
    rule = draw(st.sampled_from([cr.Exactly(2), cr.Between(0, 3), cr.Between(1, 4), cr.CountIn({0, 3}), cr.AtMost(1)]))
    T = draw(st.integers(0, 9))
    spread = draw(st.sampled_from([0.0, 1.0, 30.0, 1e4]))
    low = draw(st.integers(0, 20))
    total = draw(
        st.sampled_from([low, cr.Between(low, low + 3), cr.Exactly(low), cr.AtLeast(low), cr.CountIn({low, 6})])
    )
    return rule, T, spread, total, draw(st.integers(0, 99)), draw(st.sampled_from(["sample", "mode", 0.5]))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(sequences())
def test_the_total_is_kept_whatever_comes(case):
    rule, T, spread, total, seed, decide = case
    circuit, logits = cr.compile(rule, 5), normal(T, 5, seed=seed, spread=spread)
    limit = cr.AtMost(total) if isinstance(total, int) else total
    sums = {0}
    for _ in range(T):
        sums = {a + b for a in sums for b in circuit.counts}
    if not any(limit.allows(n) for n in sums):
        with pytest.raises(cr.InfeasibleError, match=r"total=.* cannot be met"):
            cr.route_sequence(logits, circuit, total=total, key=seed, decide=decide)
        return
    routing = cr.route_sequence(logits, circuit, total=total, key=keys(T, seed=seed), decide=decide, block=4)
    assert limit.allows(int(routing.counts.sum()))
    assert bool(circuit.satisfies(routing.mask).all())
    assert bool(routing.log_prob.isfinite().all())
    assert int(routing.state.spent) == int(routing.counts.sum())


def test_a_total_is_spent_evenly_where_tokens_are_alike():
    """Of tokens that would all take 8, four each: quarters of the sequence have between 3.5 and 4.5."""
    circuit, logits = cr.compile(cr.Between(1, 8), 32), normal(256, 32)
    for options in ({"key": keys(256)}, {"decide": "mode"}):
        counts = cr.route_sequence(logits, circuit, total=1024, **options).counts
        assert int(counts.sum()) <= 1024
        means = counts.view(4, 64).double().mean(-1)
        assert bool(((means > 3.5) & (means < 4.5)).all()), means


def test_without_a_binding_total_it_is_cr_route():
    circuit, logits, key = cr.compile(cr.Between(1, 3), 6), normal(30, 6), keys(30)
    routing = cr.route_sequence(logits, circuit, total=90, key=key)
    assert torch.equal(routing.mask, cr.route(logits, circuit, key=key).mask)
    assert torch.allclose(routing.log_prob, cr.route(logits, circuit, key=key).log_prob, atol=1e-5)


def test_evaluation_takes_the_likeliest_count_and_its_best_subset():
    circuit, logits = cr.compile(cr.Between(1, 4), 8), normal(20, 8)
    routing = cr.route_sequence(logits, circuit, total=45, training=False)
    probs = routing.untempered.count_probs
    assert torch.equal(routing.counts, probs.argmax(-1))
    for row, n in zip(range(20), routing.counts.tolist(), strict=True):
        assert set(logits[row].topk(n).indices.tolist()) == set(routing.mask[row].nonzero()[:, 0].tolist())


# ---------------------------------------------------------------------------------------------- gradients, replay


@pytest.mark.parametrize("combine", ["softmax", "normalized", "sigmoid", "marginal"])
def test_gradients_are_those_of_cr_route_under_the_potential(combine):
    circuit, key = cr.compile(cr.Between(1, 3), 6), keys(10)
    logits = normal(10, 6).requires_grad_()
    routing = cr.route_sequence(logits, circuit, total=16, key=key, combine=combine)
    potential = routing.distribution.count_potential
    assert not potential.requires_grad
    plain = cr.route(logits, circuit, key=key, count_potential=potential, combine=combine)
    upstream = normal(10, 6, seed=3)
    for of in (lambda r: (r.gates * upstream).sum(), lambda r: r.log_prob.sum(), lambda r: (r.marginals**2).sum()):
        (found,) = torch.autograd.grad(of(routing), logits, retain_graph=True)
        (wanted,) = torch.autograd.grad(of(plain), logits, retain_graph=True)
        assert torch.allclose(found, wanted, atol=1e-5)


def test_a_count_potential_of_ones_own_is_added_and_learns():
    circuit, logits = cr.compile(cr.Between(0, 3), 6), normal(2, 8, 6)
    own = torch.tensor([0.0, 2.0, -INF, 0.5]).requires_grad_()
    routing = cr.route_sequence(logits, circuit, total=10, key=keys(2, 8), count_potential=own)
    assert not bool((routing.counts == 2).any())
    routing.log_prob.sum().backward()
    assert bool(own.grad.isfinite().all())
    assert float(own.grad.abs().sum()) > 0


def test_a_recorded_sequence_is_replayed_and_one_over_the_total_refused():
    circuit, logits, key = cr.compile(cr.Between(1, 3), 6), normal(2, 12, 6), keys(2, 12)
    routing = cr.route_sequence(logits, circuit, total=20, key=key)
    again = cr.route_sequence(logits, circuit, total=20, replay=routing.mask.view(2, 12, 6))
    assert torch.equal(again.mask, routing.mask)
    assert torch.allclose(again.log_prob, routing.log_prob, atol=1e-5)
    assert torch.equal(again.gates, routing.gates)
    over = torch.zeros(2, 12, 6, dtype=torch.bool)
    over[..., :2] = True
    with pytest.raises(ValueError, match=r"replay leaves the total=20 at rows 8, 9, 10, 11, 20, "):
        cr.route_sequence(logits, circuit, total=20, replay=over)
    with pytest.raises(ValueError, match=r"replay holds a subset that Between\(1, 3\)"):
        cr.route_sequence(logits, circuit, total=20, replay=torch.zeros_like(over))


# ---------------------------------------------------------------------------------------------- what it hands on


def test_pickled_and_copied_and_weighed():
    circuit, logits = cr.compile(cr.Between(1, 3), 6), normal(2, 5, 6).requires_grad_()
    routing = cr.route_sequence(logits, circuit, total=9, key=keys(2, 5))
    for twin in (pickle.loads(pickle.dumps(routing)), copy.deepcopy(routing), copy.copy(routing)):
        assert isinstance(twin, cr.SequenceRouting)
        assert torch.equal(twin.state.spent, routing.state.spent)
        for name in ("mask", "gates", "log_prob", "marginals", "logits"):
            assert torch.allclose(getattr(twin, name), getattr(routing, name))
    assert torch.equal(routing.weighed(2 * routing.gates).state.spent, routing.state.spent)
    assert torch.allclose(routing.padded()[0].sum(-1), routing.gates.sum(-1))
    assert repr(routing) == "SequenceRouting(10 tokens, 5 of 5 decided, 6 experts, Between(1, 3))"
    assert not any(x.requires_grad for x in routing.state if isinstance(x, torch.Tensor))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_floating_dtype_and_layout(dtype):
    circuit, logits = cr.compile(cr.Between(1, 3), 6), normal(2, 7, 6).to(dtype)
    routing = cr.route_sequence(logits, circuit, total=12, key=1)
    assert bool((routing.counts.view(2, 7).sum(-1) <= 12).all())
    assert routing.gates.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    strided = logits.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(cr.route_sequence(strided, circuit, total=12, key=1).mask, routing.mask)


def test_the_smallest_sequences():
    circuit = cr.compile(cr.AtMost(2), 4)
    for shape in ((0, 4), (1, 4), (0, 3, 4), (2, 0, 4), (2, 1, 3, 4)):
        for options in ({"key": 1}, {"decide": "mode"}):
            routing = cr.route_sequence(torch.zeros(shape), circuit, total=1, **options)
            assert routing.mask.shape == (math.prod(shape[:-1]), 4)
            assert routing.state.spent.shape == (math.prod(shape[:-2]),)
            assert bool((routing.state.spent <= 1).all())
    none = cr.route_sequence(torch.zeros(3, 4), cr.compile(cr.Exactly(0), 4), total=0, key=1)
    assert not bool(none.mask.any())
    assert torch.allclose(none.log_prob, torch.zeros(3), atol=1e-6)
    alone = cr.route_sequence(torch.zeros(3, 1), cr.compile(cr.AtMost(1), 1), total=cr.Exactly(2), key=1)
    assert int(alone.counts.sum()) == 2


def test_torch_compile_leaves_it_alone():
    circuit, logits = cr.compile(cr.Between(1, 2), 4), normal(3, 4)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: cr.route_sequence(2 * x, circuit, total=5, key=1).gates + 1, backend="eager")
    assert torch.equal(compiled(logits), cr.route_sequence(2 * logits, circuit, total=5, key=1).gates + 1)


# ---------------------------------------------------------------------------------------------- refusals


def test_evidence_that_the_total_leaves_no_room_for_is_named():
    circuit, logits = cr.compile(cr.Between(1, 3), 5), torch.zeros(2, 3, 5)
    logits[1, 2, :3] = INF
    logits[1, :2, 0] = 50.0
    with pytest.raises(ValueError, match=r"total=4 leaves no room for the infinite logits .* of row 5, given"):
        cr.route_sequence(logits, circuit, total=4, decide="mode")
    routing = cr.route_sequence(logits, circuit, total=4, decide="mode", validate_args=False)
    assert routing.gates.isnan().all(-1).tolist() == [False] * 5 + [True]
    assert not bool(routing.mask[5].any())
    assert bool((routing.state.spent <= 4).all())
    nan = torch.zeros(1, 3, 5).index_fill(1, torch.tensor([1]), math.nan)
    routing = cr.route_sequence(nan, circuit, total=6, key=1, validate_args=False)
    assert routing.gates.isnan().all(-1).tolist() == [False, True, False]
    with pytest.raises(ValueError, match="logits hold NaN in row 1"):
        cr.route_sequence(nan, circuit, total=6, key=1)


def test_bad_arguments():
    circuit, logits = cr.compile(cr.Between(1, 3), 6), normal(4, 6)
    state = cr.route_sequence(logits, circuit, total=20, length=8, key=1).state
    route = lambda **options: cr.route_sequence(logits, circuit, **{"total": 8, "key": 1, **options})  # noqa: E731
    for options, error, message in (
        ({"total": 3}, cr.InfeasibleError, "total=3 cannot be met: 4 tokens of 1 to 3 experts each have between 4 and"),
        ({"total": -1}, ValueError, "total=-1: must be at least 0"),
        ({"total": 2.5}, TypeError, "total=2.5: expected an integer"),
        ({"total": True}, TypeError, "total=True: expected an integer, got a bool"),
        ({"total": cr.Exactly(2).over([0, 1])}, TypeError, r"total=.*expected a number of experts, or a count"),
        ({"block": 0}, ValueError, "block=0: must be at least 1"),
        ({"length": -1}, ValueError, "length=-1"),
        ({"length": 3}, ValueError, "logits hold 4 tokens of each sequence, and 3 of length=3 are left"),
        ({"state": state, "length": 9, "total": 20}, ValueError, "length=9: the state is of sequences of 8 tokens"),
        ({"state": state, "total": 4}, cr.InfeasibleError, "total=4 cannot be met"),
        ({"state": state._replace(spent=state.spent + 18), "total": 20}, ValueError,
         "state: total=AtMost.20. cannot be met any more by row 0 of its sequences, with 4 tokens left"),
        ({"state": state._replace(seen=state.seen.repeat(2, 1)), "total": 20}, ValueError,
         "state is of 2 sequences, 3 experts per token at most; logits and circuit have 1 and 3"),
        ({"state": state._replace(position=8), "total": 20}, ValueError, "and 0 of length=8 are left"),
        ({"estimate": torch.zeros(3)}, ValueError, r"estimate has shape \(3,\): its last dimension must be max_count"),
        ({"estimate": torch.zeros(2, 4)}, ValueError, r"estimate has shape \(2, 4\): it must broadcast to"),
        ({"estimate": torch.full((4,), INF)}, ValueError, "estimate: expected finite log weights"),
        ({"combine": "mean"}, ValueError, "combine='mean'"),
        ({"decide": 2}, ValueError, "decide=2"),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            route(**options)
    with pytest.raises(TypeError, match=r"circuit=Between.*expected a circuit"):
        cr.route_sequence(logits, cr.Between(1, 3), total=8)
    grouped = cr.compile(cr.EachGroup(cr.Groups(2), cr.Exactly(1)), 6)
    with pytest.raises(TypeError, match=r"circuit of EachGroup.*needs a constraint on the count of all experts"):
        cr.route_sequence(logits, grouped, total=8)
    with pytest.raises(ValueError, match=r"logits have shape \(6,\): expected \[..., tokens, experts\]"):
        cr.route_sequence(logits[0], circuit, total=8)
    with pytest.raises(NotImplementedError, match=r"logits: route_sequence\(\) decides token by token"):
        torch.func.vmap(lambda x: cr.route_sequence(x, circuit, total=8, decide="mode").gates)(logits[None])
