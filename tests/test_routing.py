"""Routing: gates and their gradients, keys, replay, the three projections, and everything that must not matter.

References are float64 formulas over exact marginals and covariances from enumeration (:mod:`tests.truth`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import circuitroute as cr
from circuitroute.routing.weights import MAX_RELATIVE_LOGIT
from tests.truth import count_gradient, count_truth, counts_in, enumerate_worlds, world_truth

INF, NAN = float("inf"), float("nan")
COMBINES = ("softmax", "normalized", "sigmoid", "marginal")
# "score" routes as "none" does; what it adds is a loss, see test_estimators.py.
ESTIMATORS = ("simple", "none")


class Case(NamedTuple):
    """A constraint over ``n`` experts, and the same said in NumPy."""

    constraint: cr.Constraint
    n: int
    accept: Callable[[Any], bool]

    @property
    def circuit(self) -> cr.Circuit:
        return cr.compile(self.constraint, self.n)


CASES = {
    "exactly": Case(cr.Exactly(3), 6, lambda z: z.sum() == 3),
    "one": Case(cr.Exactly(1), 5, lambda z: z.sum() == 1),
    "all": Case(cr.Exactly(4), 4, lambda z: z.all()),
    "between": Case(cr.Between(1, 3), 7, lambda z: 1 <= z.sum() <= 3),
    "atmost": Case(cr.AtMost(2), 6, lambda z: z.sum() <= 2),
    "atleast": Case(cr.AtLeast(4), 6, lambda z: z.sum() >= 4),
    "gap": Case(cr.CountIn({1, 4}), 6, lambda z: z.sum() in (1, 4)),
    "over": Case(cr.Exactly(1).over([0, 2, 3]), 5, lambda z: z[[0, 2, 3]].sum() == 1),
}
SOME = ("exactly", "atmost", "over")
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
# A fixed count, a free one that may be zero, and another engine: where every constraint would take long.
some_cases = pytest.mark.parametrize("case", [CASES[name] for name in SOME], ids=SOME)
every_combine = pytest.mark.parametrize("combine", COMBINES)
every_estimator = pytest.mark.parametrize("estimator", ESTIMATORS)


def _randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale: float = 1.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def _keys(tokens: int, seed: int = 0) -> Tensor:
    return cr.random_key(seed, torch.arange(tokens))


def reference_gates(logits: Tensor, mask: Tensor, case: Case, combine: str, estimator: str) -> Tensor:
    """The documented formulas in float64, the marginals given by their exact values and Jacobian."""
    theta = logits.double()
    truth = world_truth(theta, case.accept)
    step = theta - theta.detach()  # zero, and what the gradient flows through
    m = torch.from_numpy(truth.marginals) + torch.einsum("tij,tj->ti", torch.from_numpy(truth.covariance), step)
    g = mask.double()
    if estimator == "simple":
        g = g - m.detach() + m
    if combine == "softmax":
        return g * torch.softmax(theta, -1)
    if combine == "sigmoid":
        return g * torch.sigmoid(theta)
    if combine == "marginal":
        return g * m
    weights = g * torch.exp(theta)
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(mask.any(-1, keepdim=True), total, 1.0)


def _gradient(output: Tensor, upstream: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((output * upstream.to(output)).sum(), inputs)


# ---------------------------------------------------------------------------------------------- gates


@every_case
@every_combine
@pytest.mark.parametrize(
    ("estimator", "dtype", "tolerance"),
    [("simple", torch.float32, 2e-5), ("simple", torch.float64, 1e-10), ("none", torch.float64, 1e-10)],
)
def test_gates_and_their_gradient_are_those_of_the_dense_formula(
    case: Case, combine: Any, estimator: str, dtype: torch.dtype, tolerance: float
) -> None:
    logits = _randn(9, case.n, dtype=dtype).requires_grad_()
    upstream = _randn(9, case.n, seed=1, scale=1.0)
    routing = cr.route(logits, case.circuit, combine=combine, estimator=estimator, key=_keys(9))
    expected = reference_gates(logits, routing.mask, case, combine, estimator)
    assert routing.gates.dtype == dtype
    torch.testing.assert_close(routing.gates.double(), expected, rtol=tolerance, atol=tolerance)
    (got,) = _gradient(routing.gates, upstream, logits)
    (wanted,) = _gradient(expected, upstream, logits)
    torch.testing.assert_close(got.double(), wanted.double(), rtol=tolerance, atol=tolerance)


@every_case
@every_combine
@every_estimator
@pytest.mark.parametrize("training", [True, False])
def test_gates_are_exactly_zero_off_the_chosen_set_and_positive_on_it(
    case: Case, combine: Any, estimator: str, training: bool
) -> None:
    logits = _randn(40, case.n, scale=4.0).requires_grad_()
    routing = cr.route(
        logits, case.circuit, combine=combine, estimator=estimator, training=training, key=_keys(40, seed=3)
    )
    assert routing.mask.dtype == torch.bool
    assert bool(case.circuit.satisfies(routing.mask).all())
    assert torch.equal(routing.gates != 0, routing.mask)
    assert bool((routing.gates >= 0).all())


@every_case
def test_normalized_gates_sum_to_one_wherever_something_is_chosen(case: Case) -> None:
    routing = cr.route(_randn(50, case.n, scale=5.0), case.circuit, combine="normalized", key=_keys(50))
    torch.testing.assert_close(routing.gates.sum(-1), routing.mask.any(-1).float())


@every_case
def test_simple_gradient_reaches_the_experts_that_were_not_chosen(case: Case) -> None:
    """What sets SIMPLE apart: loss weights on the chosen gates alone still move the logits of all experts."""
    for estimator, reaches in (("simple", True), ("none", False)):
        logits = _randn(30, case.n).requires_grad_()
        routing = cr.route(logits, case.circuit, combine="sigmoid", estimator=estimator, key=_keys(30))
        (gradient,) = _gradient(routing.gates[routing.mask], _randn(int(routing.mask.sum()), seed=2), logits)
        off = gradient[~routing.mask & routing.mask.any(-1, keepdim=True)]
        # An expert outside the scope of the constraint is independent of the others; none is left if all are chosen.
        assert bool((off != 0).any()) == (reaches and len(off) > 0)


@every_case
def test_log_prob_marginals_and_counts_are_exact(case: Case) -> None:
    logits = _randn(8, case.n).requires_grad_()
    routing = cr.route(logits, case.circuit, key=_keys(8))
    truth = world_truth(logits, case.accept)
    world = (routing.mask.numpy() @ (1 << np.arange(case.n))).astype(int)
    np.testing.assert_allclose(routing.log_prob.detach(), truth.log_probs[np.arange(8), world], atol=1e-5)
    np.testing.assert_allclose(routing.marginals.detach(), truth.marginals, atol=1e-6)
    assert routing.counts.tolist() == routing.mask.sum(1).tolist()
    # d log p(z) = z - m; reading the property twice makes two graphs, each usable.
    for _ in range(2):
        (gradient,) = torch.autograd.grad(routing.log_prob.sum(), logits)
        np.testing.assert_allclose(gradient, routing.mask.numpy() - truth.marginals, atol=1e-6)


@every_case
def test_decisions_follow_the_distribution(case: Case) -> None:
    """8000 keyed decisions; each frequency lies within 4.5 standard errors (error rate below 1e-4 in all)."""
    logits = _randn(1, case.n, seed=5)
    mask = cr.route(logits.expand(8000, -1), case.circuit, key=_keys(8000)).mask.double()
    truth = world_truth(logits, case.accept)
    m = torch.from_numpy(truth.marginals[0])
    error = (m * (1 - m) / 8000).sqrt()
    assert bool(((mask.mean(0) - m).abs() <= 4.5 * error + 1e-9).all())
    world = (mask.long() @ (1 << torch.arange(case.n))).bincount(minlength=2**case.n) / 8000
    p = torch.from_numpy(np.exp(truth.log_probs[0]))
    assert bool(((world - p).abs() <= 4.5 * (p * (1 - p) / 8000).sqrt() + 1e-9).all())


# ---------------------------------------------------------------------------------------------- evaluation


@some_cases
@every_combine
def test_evaluation_takes_the_mode_whatever_the_key(case: Case, combine: Any) -> None:
    logits = _randn(12, case.n, seed=7)
    first = cr.route(logits, case.circuit, combine=combine, training=False)
    np.testing.assert_array_equal(first.mask, world_truth(logits, case.accept).mode == 1)
    for key in (None, 3, _keys(12)):
        torch.manual_seed(0)
        again = cr.route(logits, case.circuit, combine=combine, training=False, key=key)
        assert torch.equal(again.mask, first.mask)
        assert torch.equal(again.gates, first.gates)


def test_evaluation_draws_nothing_from_the_global_generator() -> None:
    before = torch.get_rng_state()
    cr.route(_randn(4, 6), CASES["exactly"].circuit, training=False)
    assert torch.equal(before, torch.get_rng_state())


@some_cases
def test_ties_in_the_mode_are_broken_alike_for_every_token(case: Case) -> None:
    mask = cr.route(torch.zeros(5, case.n), case.circuit, training=False).mask
    assert bool((mask == mask[0]).all())
    if case.circuit.op == "subset":
        assert mask[0].nonzero().flatten().tolist() == list(range(case.circuit.min_count))


# ---------------------------------------------------------------------------------------------- keys


@some_cases
@settings(max_examples=12, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**40), tokens=st.integers(1, 8), split=st.integers(0, 8))
def test_a_decision_depends_on_its_own_row_and_key_alone(case: Case, seed: int, tokens: int, split: int) -> None:
    logits, key = _randn(tokens, case.n, seed=seed), _keys(tokens, seed)

    def decide(rows: Tensor) -> Tensor:
        return cr.route(logits[rows], case.circuit, key=key[rows]).mask

    everything = decide(torch.arange(tokens))
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(decide(order), everything[order])
    parts = [decide(torch.arange(0, min(split, tokens))), decide(torch.arange(min(split, tokens), tokens))]
    assert torch.equal(torch.cat(parts), everything)
    assert torch.equal(torch.cat([decide(torch.tensor([t])) for t in range(tokens)]), everything)
    assert torch.equal(decide(order.repeat(2))[:tokens], everything[order])


@every_case
def test_a_decision_does_not_depend_on_strides_or_gradients(case: Case) -> None:
    logits, key = _randn(33, case.n), _keys(33)
    expected = cr.route(logits, case.circuit, key=key)
    apart = torch.zeros(33, 2 * case.n)
    apart[:, ::2] = logits
    for same in (logits.t().contiguous().t(), apart[:, ::2], logits.clone().requires_grad_()):
        routing = cr.route(same, case.circuit, key=key)
        assert torch.equal(routing.mask, expected.mask)
        assert torch.equal(routing.gates, expected.gates)
    assert torch.equal(cr.route(logits, case.circuit, key=torch.stack([key, key], 1)[:, 0]).mask, expected.mask)


@every_case
def test_rows_that_share_key_and_logits_share_the_decision(case: Case) -> None:
    logits = _randn(1, case.n).expand(20, -1)
    for key in (
        11,
        torch.tensor(11),
        torch.full((20,), 11),
        torch.tensor([11]),
        torch.full((20,), 11, dtype=torch.int32),
    ):
        mask = cr.route(logits, case.circuit, key=key).mask
        assert bool((mask == mask[0]).all())
        assert torch.equal(mask[:1], cr.route(logits[:1], case.circuit, key=11).mask)


def test_distinct_keys_give_distinct_decisions() -> None:
    logits = torch.zeros(200, 16)
    mask = cr.route(logits, cr.compile(cr.Exactly(8), 16), key=_keys(200)).mask
    assert len(torch.unique(mask, dim=0)) > 150  # of 12870 subsets; a few meet


@every_case
def test_no_key_means_torchs_global_generator(case: Case) -> None:
    logits = _randn(64, case.n, scale=0.3)

    def decide(seed: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        return cr.route(logits, case.circuit).mask, cr.route(logits, case.circuit).mask

    first, second = decide(0)
    again = decide(0)
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])
    if case.circuit.model_count() > 1:
        assert not torch.equal(first, second)
        assert not torch.equal(first, decide(1)[0])


def test_a_key_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    cr.route(_randn(4, 6), CASES["exactly"].circuit, key=3)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("shape", "key_shape", "error", "says"),
    [
        ((4, 6), (3,), ValueError, r"key has shape \(3,\)"),
        ((4, 6), (2, 4), ValueError, r"key has shape \(2, 4\)"),
        ((2, 4, 6), (2,), ValueError, r"key has shape \(2,\): it must broadcast to \(2, 4\)"),
        ((2, 4, 6), (4, 2), ValueError, r"key has shape \(4, 2\): it must broadcast to \(2, 4\)"),
    ],
)
def test_keys_of_the_wrong_shape_are_refused(
    shape: tuple[int, ...], key_shape: tuple[int, ...], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        cr.route(_randn(*shape), CASES["exactly"].circuit, key=torch.zeros(key_shape, dtype=torch.int64))


@pytest.mark.parametrize("key", [torch.zeros(4), torch.zeros(4, dtype=torch.bool)], ids=["float", "bool"])
def test_keys_that_are_no_integers_are_refused(key: Tensor) -> None:
    with pytest.raises(TypeError, match="key has dtype"):
        cr.route(_randn(4, 6), CASES["exactly"].circuit, key=key)


# ---------------------------------------------------------------------------------------------- replay


@every_case
@every_combine
def test_replay_is_the_original_decision_to_the_last_bit(case: Case, combine: Any) -> None:
    upstream = _randn(7, case.n, seed=4)
    results = []
    recorded = None
    for _ in range(2):
        logits = _randn(7, case.n).requires_grad_()
        # Neither the key nor the mode has a say in a replay.
        options: dict[str, Any] = {"key": _keys(7)} if recorded is None else {"replay": recorded, "training": False}
        routing = cr.route(logits, case.circuit, combine=combine, **options)
        recorded = routing.mask
        loss = (routing.gates * upstream).sum() + routing.log_prob.sum()
        results.append((routing.mask, routing.gates, routing.log_prob, *torch.autograd.grad(loss, logits)))
    for original, replayed in zip(*results, strict=True):
        assert torch.equal(original, replayed)


@pytest.mark.parametrize("convert", [Tensor.float, Tensor.double, Tensor.long, Tensor.bool], ids=str)
def test_a_recorded_mask_may_be_of_any_dtype(convert: Callable[[Tensor], Tensor]) -> None:
    logits, circuit = _randn(6, 6), CASES["exactly"].circuit
    routing = cr.route(logits, circuit, key=_keys(6))
    again = cr.route(logits, circuit, replay=convert(routing.mask))
    assert again.mask.dtype == torch.bool
    assert torch.equal(again.gates, routing.gates)


def test_replay_reproduces_any_allowed_subset() -> None:
    """Also those a sample would hardly ever give: the log-probability says how hardly."""
    case = CASES["between"]
    worlds = torch.from_numpy(enumerate_worlds(case.n))
    worlds = worlds[case.circuit.satisfies(worlds)]
    logits = _randn(1, case.n, scale=5.0).expand(len(worlds), -1)
    routing = cr.route(logits, case.circuit, replay=worlds)
    assert torch.equal(routing.mask, worlds)
    torch.testing.assert_close(routing.log_prob.exp().sum(), torch.tensor(1.0))


def _bad_replays() -> list[Any]:
    good = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]])
    too_many, forbidden, unforced = good.clone(), good.clone(), good.clone()
    too_many[1] = 1
    logits_forbidden, logits_forced = torch.zeros(3, 4), torch.zeros(3, 4)
    logits_forbidden[2, 3], logits_forced[0, 2] = -INF, INF
    return [
        pytest.param(torch.zeros(3, 4), too_many, "in row 1$", id="constraint"),
        pytest.param(torch.zeros(3, 4), 1 - good * 0, "in rows 0, 1, 2$", id="every row"),
        pytest.param(logits_forbidden, forbidden, "in row 2$", id="forbidden expert"),
        pytest.param(logits_forced, unforced, "in row 0$", id="forced expert missing"),
        pytest.param(torch.zeros(3, 4), good[:2], r"replay has shape \(2, 4\)", id="tokens"),
        pytest.param(torch.zeros(3, 4), good[:, :3], r"replay has shape \(3, 3\)", id="experts"),
        pytest.param(torch.zeros(3, 4), good * 2, "replay holds 2", id="values"),
    ]


@pytest.mark.parametrize(("logits", "replay", "says"), _bad_replays())
def test_a_replay_that_cannot_have_happened_is_refused(logits: Tensor, replay: Tensor, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        cr.route(logits, cr.compile(cr.Exactly(2), 4), replay=replay)


def test_a_replay_the_count_potential_excludes_is_refused() -> None:
    potential = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, -INF]])
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0]])
    with pytest.raises(ValueError, match="count potential exclude, in row 1"):
        cr.route(torch.zeros(2, 4), cr.compile(cr.AtMost(2), 4), replay=mask, count_potential=potential)


def test_a_replay_that_is_no_tensor_is_refused() -> None:
    with pytest.raises(TypeError, match="replay="):
        cr.route(torch.zeros(1, 4), cr.compile(cr.Exactly(2), 4), replay=[[1, 1, 0, 0]])  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------- count potential


def test_a_count_potential_tilts_the_decision_and_gets_its_gradient() -> None:
    """Even where the logits need none, as under a frozen router with a learned budget."""
    circuit, n = cr.compile(cr.Between(1, 3), 6), 6
    logits, potential = _randn(4, n), _randn(4, 4, seed=8).requires_grad_()
    full = np.where(
        np.isfinite(counts_in({1, 2, 3}, n)), np.pad(potential.detach().double().numpy(), ((0, 0), (0, 3))), -INF
    )
    routing = cr.route(logits, circuit, combine="sigmoid", count_potential=potential, key=_keys(4))
    np.testing.assert_allclose(routing.marginals.detach(), count_truth(logits, full).marginals, atol=1e-6)

    upstream, direction = _randn(4, n, seed=9), _randn(4, 4, seed=10)
    (gradient,) = _gradient(routing.gates, upstream, potential)
    v = np.pad(direction.double().numpy(), ((0, 0), (0, 3)))
    slope = count_gradient(logits, full, np.zeros(n), v).marginals
    expected = (upstream.double() * torch.sigmoid(logits.double()) * torch.from_numpy(slope)).sum()
    torch.testing.assert_close((gradient * direction).sum().double(), expected, rtol=1e-5, atol=1e-5)


def test_a_count_potential_can_fix_the_count_of_every_token() -> None:
    potential = torch.full((3, 4), -INF)
    potential[torch.arange(3), torch.tensor([1, 3, 2])] = 0.0
    routing = cr.route(_randn(3, 6), cr.compile(cr.Between(1, 3), 6), count_potential=potential)
    assert routing.counts.tolist() == [1, 3, 2]


@pytest.mark.parametrize(
    ("shape", "potential_shape"),
    [((4, 6), (2, 4, 3)), ((6,), (4, 3)), ((1, 6), (4, 3)), ((2, 3, 6), (2, 3)), ((4, 6), (4, 5)), ((4, 6), ())],
)
def test_count_potentials_of_the_wrong_shape_are_refused(
    shape: tuple[int, ...], potential_shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="count_potential has shape"):
        cr.route(_randn(*shape), cr.compile(cr.AtMost(2), 6), count_potential=torch.zeros(potential_shape))


def test_leading_dimensions_of_a_count_potential_become_tokens() -> None:
    circuit, logits, potential = cr.compile(cr.AtMost(2), 6), _randn(2, 3, 6), _randn(2, 1, 3)
    flat = cr.route(
        logits.reshape(6, 6), circuit, count_potential=potential.expand(2, 3, 3).reshape(6, 3), key=_keys(6)
    )
    deep = cr.route(logits, circuit, count_potential=potential, key=_keys(6))
    assert torch.equal(deep.gates, flat.gates)
    assert torch.equal(deep.log_prob, flat.log_prob)


# ---------------------------------------------------------------------------------------------- projections


@every_case
@pytest.mark.parametrize("pad", ["distinct", "sentinel", "minus_one"])
def test_padded_slots_hold_the_chosen_experts_by_falling_logit_and_then_the_padding(case: Case, pad: Any) -> None:
    logits = _randn(60, case.n).requires_grad_()
    routing = cr.route(logits, case.circuit, key=_keys(60))
    for width in (None, *range(int(routing.counts.max()) or 1, case.n + 1)):
        weights, indices = routing.padded(width, pad)
        slots = max(1, case.circuit.max_count) if width is None else width
        assert weights.shape == indices.shape == (60, slots)
        assert weights.dtype == torch.float32
        assert indices.dtype == torch.int64
        for t in range(60):
            used = int(routing.counts[t])
            chosen = indices[t, :used]
            assert sorted(chosen.tolist()) == routing.mask[t].nonzero().flatten().tolist()
            assert bool((logits[t, chosen].diff() <= 0).all())
            assert torch.equal(weights[t, :used], routing.gates[t, chosen])
            assert (weights[t, used:] == 0).all()
            padding = indices[t, used:].tolist()
            if pad == "distinct":
                assert len(set(indices[t].tolist())) == slots
                assert set(padding) <= set(range(case.n)) - set(chosen.tolist())
            else:
                assert padding == [case.n if pad == "sentinel" else -1] * len(padding)


@pytest.mark.parametrize("pad", ["distinct", "sentinel", "minus_one"])
def test_padding_sends_no_gradient(pad: Any) -> None:
    logits = _randn(30, 6, scale=0.5).requires_grad_()
    routing = cr.route(logits, CASES["atmost"].circuit, key=_keys(30))
    weights, _ = routing.padded(4, pad)
    unused = torch.arange(4) >= routing.counts[:, None]
    assert bool(unused.any())
    (gradient,) = torch.autograd.grad(weights[unused].sum(), logits)
    assert bool((gradient == 0).all())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"width": 0}, "width=0: must be at least 1"),
        ({"width": 7}, "width=7: there are only 6 experts"),
        ({"width": 2}, "width=2: a token has 3 experts; widen it"),
        ({"pad": "zeros"}, "pad='zeros': choose one of 'distinct', 'sentinel', 'minus_one'"),
    ],
)
def test_bad_padding_is_refused(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        cr.route(_randn(5, 6), CASES["exactly"].circuit).padded(**arguments)


def test_a_width_below_the_largest_allowed_count_is_enough_if_no_token_needs_more() -> None:
    routing = cr.route(torch.full((4, 7), -30.0), CASES["between"].circuit, training=False)
    assert routing.padded(1)[0].shape == (4, 1)


@every_case
def test_ragged_lists_every_chosen_pair_once_in_both_orders(case: Case) -> None:
    routing = cr.route(_randn(25, case.n), case.circuit, key=_keys(25))
    for by in ("token", "expert"):
        token, expert, weight = routing.ragged(by=by)
        assert token.dtype == expert.dtype == torch.int64
        rebuilt = torch.zeros_like(routing.mask)
        rebuilt[token, expert] = True
        assert torch.equal(rebuilt, routing.mask)
        assert len(token) == int(routing.mask.sum())
        assert torch.equal(weight, routing.gates[token, expert])
        rank = token * case.n + expert if by == "token" else expert * 25 + token
        assert bool((rank.diff() > 0).all())


def test_an_unknown_order_is_refused() -> None:
    with pytest.raises(ValueError, match="by='size': choose 'token' or 'expert'"):
        cr.route(_randn(5, 6), CASES["exactly"].circuit).ragged(by="size")  # type: ignore[arg-type]


def _by_mask(routing: cr.Routing, x: Tensor, experts: Tensor) -> Tensor:
    outputs = torch.einsum("th,ehd->ted", x, experts)
    return (torch.where(routing.mask, routing.gates, 0.0).unsqueeze(-1) * outputs).sum(1)


def _by_slots(pad: Any) -> Callable[[cr.Routing, Tensor, Tensor], Tensor]:
    def run(routing: cr.Routing, x: Tensor, experts: Tensor) -> Tensor:
        weights, indices = routing.padded(pad=pad)
        if pad != "distinct":  # consumers of these paddings skip such slots; index 0 stands in for "nothing"
            indices = torch.where((indices >= 0) & (indices < len(experts)), indices, 0)
        return torch.einsum("tk,th,tkhd->td", weights, x, experts[indices])

    return run


def _by_pairs(by: Any) -> Callable[[cr.Routing, Tensor, Tensor], Tensor]:
    def run(routing: cr.Routing, x: Tensor, experts: Tensor) -> Tensor:
        token, expert, weight = routing.ragged(by)
        rows = weight.unsqueeze(-1) * torch.einsum("sh,shd->sd", x[token], experts[expert])
        return torch.zeros(len(x), experts.shape[-1], dtype=rows.dtype).index_add(0, token, rows)

    return run


@some_cases
@every_combine
def test_all_projections_describe_one_decision_with_one_gradient(case: Case, combine: Any) -> None:
    projections = [
        _by_mask,
        *map(_by_slots, ("distinct", "sentinel", "minus_one")),
        *map(_by_pairs, ("token", "expert")),
    ]
    results = []
    for project in projections:
        logits = _randn(11, case.n, dtype=torch.float64).requires_grad_()
        x = _randn(11, 3, seed=1, dtype=torch.float64).requires_grad_()
        experts = _randn(case.n, 3, 2, seed=2, dtype=torch.float64).requires_grad_()
        routing = cr.route(logits, case.circuit, combine=combine, key=_keys(11))
        output = project(routing, x, experts)
        results.append((output, *_gradient(output, _randn(11, 2, seed=3), logits, x, experts)))
    for other in results[1:]:
        for got, wanted in zip(other, results[0], strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------------------------- shapes and dtypes


@every_case
def test_leading_dimensions_become_tokens(case: Case) -> None:
    flat, key = _randn(12, case.n), _keys(12)
    expected = cr.route(flat, case.circuit, key=key)
    deep = flat.reshape(2, 3, 2, case.n).requires_grad_()
    for shaped in (key, key.reshape(2, 3, 2)):
        routing = cr.route(deep, case.circuit, key=shaped)
        assert torch.equal(routing.gates, expected.gates)
        assert routing.logits.shape == (12, case.n)
    replayed = cr.route(deep, case.circuit, replay=expected.mask.reshape(2, 3, 2, case.n))
    assert torch.equal(replayed.gates, expected.gates)
    assert torch.autograd.grad(replayed.gates.sum(), deep)[0].shape == deep.shape
    broadcast = cr.route(deep, case.circuit, key=key[:6].reshape(3, 2))
    assert torch.equal(broadcast.mask, cr.route(flat, case.circuit, key=key[:6].repeat(2)).mask)


def test_a_single_row_is_one_token() -> None:
    routing = cr.route(_randn(6), CASES["exactly"].circuit, key=5)
    assert routing.mask.shape == (1, 6)
    assert torch.equal(routing.mask, cr.route(_randn(6).reshape(1, 6), CASES["exactly"].circuit, key=5).mask)


@some_cases
@every_combine
@pytest.mark.parametrize("shape", [(0,), (2, 0)], ids=str)
def test_no_tokens_are_no_problem(case: Case, combine: Any, shape: tuple[int, ...]) -> None:
    logits = torch.zeros(*shape, case.n, requires_grad=True)
    for training in (True, False):
        routing = cr.route(logits, case.circuit, combine=combine, training=training)
        assert routing.mask.shape == routing.gates.shape == routing.marginals.shape == (0, case.n)
        assert routing.log_prob.shape == routing.counts.shape == (0,)
        weights, indices = routing.padded()
        assert weights.shape == indices.shape == (0, max(1, case.circuit.max_count))
        assert [len(part) for part in routing.ragged()] == [0, 0, 0]
        (gradient,) = torch.autograd.grad(routing.gates.sum() + routing.log_prob.sum(), logits)
        assert gradient.shape == logits.shape
    assert cr.route(logits, case.circuit, replay=torch.zeros(*shape, case.n)).mask.shape == (0, case.n)


@some_cases
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_low_precision_logits_are_routed_in_float32(case: Case, dtype: torch.dtype) -> None:
    logits = _randn(10, case.n).to(dtype).requires_grad_()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    routing = cr.route(logits, case.circuit, key=_keys(10))
    for values in (routing.logits, routing.gates, routing.marginals, routing.log_prob, routing.padded()[0]):
        assert values.dtype == wide
    (gradient,) = _gradient(routing.gates, _randn(10, case.n, seed=1), logits)
    assert gradient.dtype == dtype
    same = cr.route(logits.detach().to(wide), case.circuit, key=_keys(10))
    assert torch.equal(routing.gates, same.gates)


def test_no_experts_are_a_decision_too() -> None:
    logits = _randn(5, 4).requires_grad_()
    for combine in COMBINES:
        routing = cr.route(logits, cr.compile(cr.Exactly(0), 4), combine=combine)  # type: ignore[arg-type]
        assert not routing.mask.any()
        assert bool((routing.gates == 0).all())
        torch.testing.assert_close(routing.log_prob, torch.zeros(5))
        weights, indices = routing.padded()
        assert weights.shape == (5, 1)
        assert bool((weights == 0).all())
        assert bool(((indices >= 0) & (indices < 4)).all())
        assert bool((torch.autograd.grad(routing.gates.sum(), logits)[0] == 0).all())


# ---------------------------------------------------------------------------------------------- evidence, extremes


@every_combine
def test_infinite_logits_condition_the_decision(combine: Any) -> None:
    """Forbidding 0 and forcing 1 leaves the same problem with one expert less to choose among four."""
    free = _randn(20, 4, dtype=torch.float64).requires_grad_()
    logits = torch.cat([torch.full((20, 1), -INF), torch.full((20, 1), INF), free], 1)
    routing = cr.route(logits, cr.compile(cr.Exactly(3), 6), combine=combine, key=_keys(20))
    assert routing.mask[:, :2].tolist() == [[False, True]] * 20
    torch.testing.assert_close(routing.gates[:, 1], torch.ones(20, dtype=torch.float64))
    assert bool((routing.gates[:, 0] == 0).all())
    small = Case(cr.Exactly(2), 4, lambda z: z.sum() == 2)
    if combine in ("softmax", "normalized"):  # an infinite weight leaves nothing for the others
        wanted = torch.zeros_like(free)
    else:
        wanted = reference_gates(free, routing.mask[:, 2:], small, combine, "simple")
        upstream = _randn(20, 4, seed=1)
        (gradient,) = _gradient(routing.gates[:, 2:], upstream, free)
        torch.testing.assert_close(gradient, _gradient(wanted, upstream, free)[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(routing.gates[:, 2:], wanted, rtol=1e-9, atol=1e-9)


@every_combine
def test_forbidden_experts_are_as_good_as_absent(combine: Any) -> None:
    free = _randn(20, 4, dtype=torch.float64).requires_grad_()
    logits = torch.cat([free[:, :2], torch.full((20, 2), -INF), free[:, 2:]], 1)
    routing = cr.route(logits, cr.compile(cr.Exactly(2), 6), combine=combine, key=_keys(20))
    keep = [0, 1, 4, 5]
    small = Case(cr.Exactly(2), 4, lambda z: z.sum() == 2)
    wanted = reference_gates(free, routing.mask[:, keep], small, combine, "simple")
    torch.testing.assert_close(routing.gates[:, keep], wanted, rtol=1e-9, atol=1e-9)
    upstream = _randn(20, 4, seed=1)
    (gradient,) = _gradient(routing.gates[:, keep], upstream, free)
    torch.testing.assert_close(gradient, _gradient(wanted, upstream, free)[0], rtol=1e-9, atol=1e-9)


@every_case
@every_combine
@pytest.mark.parametrize(("scale", "training"), [(1.0, True), (1e4, True), (1e4, False)])
def test_extreme_and_infinite_logits_give_finite_gates_and_gradients(
    case: Case, combine: Any, scale: float, training: bool
) -> None:
    logits = _randn(12, case.n, scale=scale)
    needed = int(case.circuit.min_count)
    if case.constraint != cr.Exactly(case.n):
        logits[0, 1] = -INF
        logits[1, case.n - 1] = -INF
    logits[2, 0] = INF
    logits[3, :] = -INF
    logits[3, :needed] = INF  # nothing left to choose
    logits[4] = 0.0
    logits[5] = scale * 100
    logits[6] = -scale * 100
    if case.circuit.min_count == 0:
        logits[7] = -INF
    leaf = logits.clone().requires_grad_()
    routing = cr.route(leaf, case.circuit, combine=combine, training=training, key=_keys(12))
    assert bool(case.circuit.satisfies(routing.mask).all())
    assert bool(torch.isfinite(routing.gates).all())
    assert bool((routing.gates[~routing.mask] == 0).all())
    assert bool(torch.isfinite(routing.log_prob).all())
    (gradient,) = _gradient(routing.gates, _randn(12, case.n, seed=1), leaf)
    assert bool(torch.isfinite(gradient).all())
    assert bool((gradient[torch.isinf(logits)] == 0).all())


def test_the_gradient_of_an_overlooked_giant_is_capped() -> None:
    """A replayed expert e^200 times lighter than one left out: the normalised weight stands at its cap."""
    logits = torch.tensor([[0.0, 200.0, 0.0]], dtype=torch.float64, requires_grad=True)
    routing = cr.route(logits, cr.compile(cr.Exactly(1), 3), combine="normalized", replay=torch.tensor([[1, 0, 0]]))
    assert routing.gates.tolist() == [[1.0, 0.0, 0.0]]
    (gradient,) = torch.autograd.grad(routing.gates[0, 1], logits)
    assert bool(torch.isfinite(gradient).all())
    assert float(gradient.abs().max()) <= np.exp(MAX_RELATIVE_LOGIT)


# ---------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("name", ["exactly", "over"])
def test_rows_without_an_answer_are_named(name: str) -> None:
    case = CASES[name]
    logits = _randn(5, case.n)
    logits[1, 2], logits[4, 0] = NAN, NAN
    with pytest.raises(ValueError, match=r"logits hold NaN in rows 1, 4$"):
        cr.route(logits, case.circuit)
    logits = _randn(2, 3, case.n)
    logits[1, 1] = -INF
    with pytest.raises(ValueError, match=r"no subset that satisfies .* in row 4$"):
        cr.route(logits, case.circuit)


@some_cases
@every_combine
@every_estimator
def test_without_validation_rows_without_an_answer_are_nan_and_alone(case: Case, combine: Any, estimator: str) -> None:
    clean = _randn(4, case.n)
    logits = clean.clone()
    logits[1, 2], logits[3] = NAN, INF  # all forced is too many for each of the constraints
    leaf, clean = logits.requires_grad_(), clean.requires_grad_()
    options: dict[str, Any] = {"combine": combine, "estimator": estimator}
    routing = cr.route(leaf, case.circuit, key=_keys(4), validate_args=False, **options)
    expected = cr.route(clean, case.circuit, key=_keys(4), **options)
    assert not routing.mask[[1, 3]].any()
    for values in (routing.gates, routing.log_prob, routing.marginals):
        assert bool(values[[1, 3]].isnan().all())
    for rows in ([0], [2]):
        assert torch.equal(routing.mask[rows], expected.mask[rows])
        assert torch.equal(routing.gates[rows], expected.gates[rows])
    upstream = _randn(2, case.n, seed=1)
    (gradient,) = _gradient(routing.gates[[0, 2]], upstream, leaf)
    (wanted,) = _gradient(expected.gates[[0, 2]], upstream, clean)
    assert torch.equal(gradient[[0, 2]], wanted[[0, 2]])
    again = cr.route(leaf, case.circuit, replay=routing.mask, validate_args=False, **options)
    assert torch.equal(again.mask, routing.mask)
    torch.testing.assert_close(again.gates, routing.gates, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (
            {"combine": "mean"},
            ValueError,
            "combine='mean': choose one of 'softmax', 'normalized', 'sigmoid', 'marginal'",
        ),
        ({"estimator": "gumbel"}, ValueError, "estimator='gumbel': choose one of 'simple', 'score', 'none'"),
        ({"estimator": 3}, TypeError, "estimator=3: expected a name or a callable"),
        ({"logits": torch.zeros(4, 5)}, ValueError, r"logits have shape \(4, 5\)"),
        ({"logits": torch.tensor(1.0)}, ValueError, r"logits have shape \(\)"),
        ({"logits": torch.zeros(4, 6, dtype=torch.int64)}, TypeError, "logits have dtype torch.int64"),
        ({"logits": [[0.0] * 6]}, TypeError, "logits="),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        cr.route(**{"logits": torch.zeros(4, 6), "circuit": CASES["exactly"].circuit, **arguments})


def test_a_routing_says_what_it_is() -> None:
    assert repr(cr.route(_randn(4, 6), CASES["exactly"].circuit)) == "Routing(4 tokens, 6 experts, Exactly(3))"


# ---------------------------------------------------------------------------------------------- surroundings


@some_cases
@every_combine
def test_the_callers_tensors_are_left_alone(case: Case, combine: Any) -> None:
    logits, key = _randn(6, case.n), _keys(6)
    tensors = [logits, key, cr.route(logits, case.circuit, key=key).mask]
    copies = [x.clone() for x in tensors]
    versions = [x._version for x in tensors]
    for options in ({"key": key}, {"replay": tensors[2]}, {"training": False}):
        routing = cr.route(logits, case.circuit, combine=combine, **options)
        routing.padded()
        routing.ragged()
        assert not routing.gates.requires_grad
    assert not logits.requires_grad
    assert [x._version for x in tensors] == versions
    assert all(torch.equal(x, copy) for x, copy in zip(tensors, copies, strict=True))


@some_cases
@every_combine
def test_inference_mode_changes_nothing(case: Case, combine: Any) -> None:
    logits, key = _randn(6, case.n), _keys(6)
    expected = cr.route(logits, case.circuit, combine=combine, key=key)
    with torch.inference_mode():
        for same in (logits, logits.clone()):
            routing = cr.route(same, case.circuit, combine=combine, key=key)
            assert torch.equal(routing.gates, expected.gates)
            assert torch.equal(routing.log_prob, expected.log_prob)
            assert torch.equal(routing.padded()[1], expected.padded()[1])
            mode = cr.route(same, case.circuit, combine=combine, training=False)
        assert bool(case.circuit.satisfies(mode.mask).all())


def test_no_grad_makes_no_graph() -> None:
    logits = _randn(6, 6).requires_grad_()
    with torch.no_grad():
        routing = cr.route(logits, CASES["exactly"].circuit)
    assert not routing.gates.requires_grad


@some_cases
@every_combine
def test_autocast_does_not_touch_the_routing(case: Case, combine: Any) -> None:
    results = []
    for enabled in (False, True):
        logits = _randn(6, case.n).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            routing = cr.route(logits, case.circuit, combine=combine, key=_keys(6))
            parts = (routing.gates, routing.log_prob, routing.marginals)
            assert all(x.dtype == torch.float32 for x in parts)
            loss = (parts[0] * _randn(6, case.n, seed=1)).sum() + parts[1].sum() + parts[2].square().sum()
        results.append((*parts, *torch.autograd.grad(loss, logits)))
    for plain, cast in zip(*results, strict=True):
        assert torch.equal(plain, cast)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("preserve_rng_state", [True, False])
@some_cases
def test_keyed_routing_is_recomputed_alike_under_activation_checkpointing(
    case: Case, use_reentrant: bool, preserve_rng_state: bool
) -> None:
    """Even without the random state preserved, and whatever happened to it in between."""
    key, weight = _keys(16), _randn(16, case.n, seed=1)

    def block(logits: Tensor) -> Tensor:
        routing = cr.route(logits * 1.5, case.circuit, combine="normalized", key=key)
        token, expert, gate = routing.ragged()
        return (gate * weight[token, expert]).sum().reshape(1)

    plain = _randn(16, case.n).requires_grad_()
    (expected,) = torch.autograd.grad(block(plain).sum(), plain)
    saved = _randn(16, case.n).requires_grad_()
    output = checkpoint(block, saved, use_reentrant=use_reentrant, preserve_rng_state=preserve_rng_state)
    torch.rand(3)
    output.sum().backward()
    assert saved.grad is not None
    assert torch.equal(saved.grad, expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_unkeyed_routing_is_recomputed_alike_where_the_random_state_is_preserved(use_reentrant: bool) -> None:
    circuit, masks = CASES["exactly"].circuit, []

    def block(logits: Tensor) -> Tensor:
        routing = cr.route(logits, circuit)
        masks.append(routing.mask)
        return routing.gates.square().sum(-1)

    logits = _randn(16, 6).requires_grad_()
    output = checkpoint(block, logits, use_reentrant=use_reentrant)
    torch.rand(3)
    output.sum().backward()
    assert len(masks) == 2
    assert torch.equal(*masks)


def test_routing_twice_backward_separately() -> None:
    """Gates and auxiliary terms of one decision may be differentiated one by one."""
    logits = _randn(6, 6).requires_grad_()
    routing = cr.route(logits, CASES["exactly"].circuit, key=_keys(6))
    parts = [routing.gates.square().sum(), routing.marginals.square().sum(), routing.log_prob.sum()]
    apart = sum(torch.autograd.grad(part, logits, retain_graph=True)[0] for part in parts)
    together = torch.autograd.grad(sum(parts), logits)[0]
    torch.testing.assert_close(apart, together)
