"""Routing: gates and their gradients, evaluation, count potentials, shapes and dtypes, evidence and extremes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import circuitroute as cr
from circuitroute.engines.step import MAX_RELATIVE_LOGIT
from circuitroute.routing.choice import Batch, decide
from circuitroute.routing.weights import weigh
from tests.routing_cases import (
    CASES,
    COMBINES,
    INF,
    Case,
    every_case,
    every_combine,
    every_estimator,
    gradient_of,
    keys_of,
    randn,
    reference_gates,
    some_cases,
)
from tests.truth import count_gradient, count_truth, counts_in, world_truth

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
    logits = randn(9, case.n, dtype=dtype).requires_grad_()
    upstream = randn(9, case.n, seed=1, scale=1.0)
    routing = cr.route(logits, case.circuit, combine=combine, estimator=estimator, key=keys_of(9))
    expected = reference_gates(logits, routing.mask, case, combine, estimator)
    assert routing.gates.dtype == dtype
    torch.testing.assert_close(routing.gates.double(), expected, rtol=tolerance, atol=tolerance)
    (got,) = gradient_of(routing.gates, upstream, logits)
    (wanted,) = gradient_of(expected, upstream, logits)
    torch.testing.assert_close(got.double(), wanted.double(), rtol=tolerance, atol=tolerance)


@every_case
@every_combine
@every_estimator
@pytest.mark.parametrize("training", [True, False])
def test_gates_are_exactly_zero_off_the_chosen_set_and_positive_on_it(
    case: Case, combine: Any, estimator: str, training: bool
) -> None:
    logits = randn(40, case.n, scale=4.0).requires_grad_()
    routing = cr.route(
        logits, case.circuit, combine=combine, estimator=estimator, training=training, key=keys_of(40, seed=3)
    )
    assert routing.mask.dtype == torch.bool
    assert bool(case.circuit.satisfies(routing.mask).all())
    assert torch.equal(routing.gates != 0, routing.mask)
    assert bool((routing.gates >= 0).all())


@every_case
def test_normalized_gates_sum_to_one_wherever_something_is_chosen(case: Case) -> None:
    routing = cr.route(randn(50, case.n, scale=5.0), case.circuit, combine="normalized", key=keys_of(50))
    torch.testing.assert_close(routing.gates.sum(-1), routing.mask.any(-1).float())


@every_case
def test_simple_gradient_reaches_the_experts_that_were_not_chosen(case: Case) -> None:
    """What sets SIMPLE apart: loss weights on the chosen gates alone still move the logits of all experts."""
    for estimator, reaches in (("simple", True), ("none", False)):
        logits = randn(30, case.n).requires_grad_()
        routing = cr.route(logits, case.circuit, combine="sigmoid", estimator=estimator, key=keys_of(30))
        (gradient,) = gradient_of(routing.gates[routing.mask], randn(int(routing.mask.sum()), seed=2), logits)
        off = gradient[~routing.mask & routing.mask.any(-1, keepdim=True)]
        # An expert outside the scope of the constraint is independent of the others; none is left if all are chosen.
        assert bool((off != 0).any()) == (reaches and len(off) > 0)


@every_case
def test_log_prob_marginals_and_counts_are_exact(case: Case) -> None:
    logits = randn(8, case.n).requires_grad_()
    routing = cr.route(logits, case.circuit, key=keys_of(8))
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
    logits = randn(1, case.n, seed=5)
    mask = cr.route(logits.expand(8000, -1), case.circuit, key=keys_of(8000)).mask.double()
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
    logits = randn(12, case.n, seed=7)
    first = cr.route(logits, case.circuit, combine=combine, training=False)
    np.testing.assert_array_equal(first.mask, world_truth(logits, case.accept).mode == 1)
    for key in (None, 3, keys_of(12)):
        torch.manual_seed(0)
        again = cr.route(logits, case.circuit, combine=combine, training=False, key=key)
        assert torch.equal(again.mask, first.mask)
        assert torch.equal(again.gates, first.gates)


def test_evaluation_draws_nothing_from_the_global_generator() -> None:
    before = torch.get_rng_state()
    cr.route(randn(4, 6), CASES["exactly"].circuit, training=False)
    assert torch.equal(before, torch.get_rng_state())


@some_cases
def test_ties_in_the_mode_are_broken_alike_for_every_token(case: Case) -> None:
    mask = cr.route(torch.zeros(5, case.n), case.circuit, training=False).mask
    assert bool((mask == mask[0]).all())
    if case.circuit.op == "subset":
        assert mask[0].nonzero().flatten().tolist() == list(range(case.circuit.min_count))


# ---------------------------------------------------------------------------------------------- count potential


def test_a_count_potential_tilts_the_decision_and_gets_its_gradient() -> None:
    """Even where the logits need none, as under a frozen router with a learned budget."""
    circuit, n = cr.compile(cr.Between(1, 3), 6), 6
    logits, potential = randn(4, n), randn(4, 4, seed=8).requires_grad_()
    full = np.where(
        np.isfinite(counts_in({1, 2, 3}, n)), np.pad(potential.detach().double().numpy(), ((0, 0), (0, 3))), -INF
    )
    routing = cr.route(logits, circuit, combine="sigmoid", count_potential=potential, key=keys_of(4))
    np.testing.assert_allclose(routing.marginals.detach(), count_truth(logits, full).marginals, atol=1e-6)

    upstream, direction = randn(4, n, seed=9), randn(4, 4, seed=10)
    (gradient,) = gradient_of(routing.gates, upstream, potential)
    v = np.pad(direction.double().numpy(), ((0, 0), (0, 3)))
    slope = count_gradient(logits, full, np.zeros(n), v).marginals
    expected = (upstream.double() * torch.sigmoid(logits.double()) * torch.from_numpy(slope)).sum()
    torch.testing.assert_close((gradient * direction).sum().double(), expected, rtol=1e-5, atol=1e-5)


def test_a_count_potential_can_fix_the_count_of_every_token() -> None:
    potential = torch.full((3, 4), -INF)
    potential[torch.arange(3), torch.tensor([1, 3, 2])] = 0.0
    routing = cr.route(randn(3, 6), cr.compile(cr.Between(1, 3), 6), count_potential=potential)
    assert routing.counts.tolist() == [1, 3, 2]


@pytest.mark.parametrize(
    ("shape", "potential_shape"),
    [((4, 6), (2, 4, 3)), ((6,), (4, 3)), ((1, 6), (4, 3)), ((2, 3, 6), (2, 3)), ((4, 6), (4, 5)), ((4, 6), ())],
)
def test_count_potentials_of_the_wrong_shape_are_refused(
    shape: tuple[int, ...], potential_shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="count_potential has shape"):
        cr.route(randn(*shape), cr.compile(cr.AtMost(2), 6), count_potential=torch.zeros(potential_shape))


def test_leading_dimensions_of_a_count_potential_become_tokens() -> None:
    circuit, logits, potential = cr.compile(cr.AtMost(2), 6), randn(2, 3, 6), randn(2, 1, 3)
    flat = cr.route(
        logits.reshape(6, 6), circuit, count_potential=potential.expand(2, 3, 3).reshape(6, 3), key=keys_of(6)
    )
    deep = cr.route(logits, circuit, count_potential=potential, key=keys_of(6))
    assert torch.equal(deep.gates, flat.gates)
    assert torch.equal(deep.log_prob, flat.log_prob)


# ---------------------------------------------------------------------------------------------- shapes and dtypes


@every_case
def test_leading_dimensions_become_tokens(case: Case) -> None:
    flat, key = randn(12, case.n), keys_of(12)
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
    routing = cr.route(randn(6), CASES["exactly"].circuit, key=5)
    assert routing.mask.shape == (1, 6)
    assert torch.equal(routing.mask, cr.route(randn(6).reshape(1, 6), CASES["exactly"].circuit, key=5).mask)


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
    logits = randn(10, case.n).to(dtype).requires_grad_()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    routing = cr.route(logits, case.circuit, key=keys_of(10))
    for values in (routing.logits, routing.gates, routing.marginals, routing.log_prob, routing.padded()[0]):
        assert values.dtype == wide
    (gradient,) = gradient_of(routing.gates, randn(10, case.n, seed=1), logits)
    assert gradient.dtype == dtype
    same = cr.route(logits.detach().to(wide), case.circuit, key=keys_of(10))
    assert torch.equal(routing.gates, same.gates)


def test_no_experts_are_a_decision_too() -> None:
    logits = randn(5, 4).requires_grad_()
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
    free = randn(20, 4, dtype=torch.float64).requires_grad_()
    logits = torch.cat([torch.full((20, 1), -INF), torch.full((20, 1), INF), free], 1)
    routing = cr.route(logits, cr.compile(cr.Exactly(3), 6), combine=combine, key=keys_of(20))
    assert routing.mask[:, :2].tolist() == [[False, True]] * 20
    torch.testing.assert_close(routing.gates[:, 1], torch.ones(20, dtype=torch.float64))
    assert bool((routing.gates[:, 0] == 0).all())
    small = Case(cr.Exactly(2), 4, lambda z: z.sum() == 2)
    if combine in ("softmax", "normalized"):  # an infinite weight leaves nothing for the others
        wanted = torch.zeros_like(free)
    else:
        wanted = reference_gates(free, routing.mask[:, 2:], small, combine, "simple")
        upstream = randn(20, 4, seed=1)
        (gradient,) = gradient_of(routing.gates[:, 2:], upstream, free)
        torch.testing.assert_close(gradient, gradient_of(wanted, upstream, free)[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(routing.gates[:, 2:], wanted, rtol=1e-9, atol=1e-9)


@every_combine
def test_forbidden_experts_are_as_good_as_absent(combine: Any) -> None:
    free = randn(20, 4, dtype=torch.float64).requires_grad_()
    logits = torch.cat([free[:, :2], torch.full((20, 2), -INF), free[:, 2:]], 1)
    routing = cr.route(logits, cr.compile(cr.Exactly(2), 6), combine=combine, key=keys_of(20))
    keep = [0, 1, 4, 5]
    small = Case(cr.Exactly(2), 4, lambda z: z.sum() == 2)
    wanted = reference_gates(free, routing.mask[:, keep], small, combine, "simple")
    torch.testing.assert_close(routing.gates[:, keep], wanted, rtol=1e-9, atol=1e-9)
    upstream = randn(20, 4, seed=1)
    (gradient,) = gradient_of(routing.gates[:, keep], upstream, free)
    torch.testing.assert_close(gradient, gradient_of(wanted, upstream, free)[0], rtol=1e-9, atol=1e-9)


@every_case
@every_combine
@pytest.mark.parametrize(("scale", "training"), [(1.0, True), (1e4, True), (1e4, False)])
def test_extreme_and_infinite_logits_give_finite_gates_and_gradients(
    case: Case, combine: Any, scale: float, training: bool
) -> None:
    logits = randn(12, case.n, scale=scale)
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
    routing = cr.route(leaf, case.circuit, combine=combine, training=training, key=keys_of(12))
    assert bool(case.circuit.satisfies(routing.mask).all())
    assert bool(torch.isfinite(routing.gates).all())
    assert bool((routing.gates[~routing.mask] == 0).all())
    assert bool(torch.isfinite(routing.log_prob).all())
    (gradient,) = gradient_of(routing.gates, randn(12, case.n, seed=1), leaf)
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


@pytest.mark.parametrize("combine", ["softmax", "normalized", "sigmoid"])
def test_weights_of_other_logits_than_the_decisions(combine):
    """What is decided on is finite, and what is weighed by is not, in two rows of three; and the other way round."""
    decided_on = randn(3, 5, seed=1)
    weighed_by = randn(3, 5, seed=2)
    weighed_by[1, :2], weighed_by[2, 3] = INF, -INF
    softmax = weighed_by.double().softmax(-1)
    softmax[1] = torch.tensor([0.5, 0.5, 0.0, 0.0, 0.0])
    for a, theta in ((decided_on, weighed_by), (weighed_by, decided_on)):
        decision = decide(Batch.of(a, cr.compile(cr.Exactly(2), 5)), share=0.0)
        z = decision.mask.double()
        assert torch.equal(decision.mask, a.argsort(-1, descending=True).argsort(-1) < 2)
        if combine == "softmax":
            expected = z * (softmax if theta is weighed_by else theta.double().softmax(-1))
        elif combine == "sigmoid":
            expected = z * theta.double().sigmoid()
        else:
            e = z * theta.double().clamp(-1e3, 1e3).sub(theta.double().clamp(-1e3, 1e3).amax(-1, keepdim=True)).exp()
            expected = e / e.sum(-1, keepdim=True)
        found = weigh(decision, combine=combine, estimator="none", logits=theta)
        torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)
