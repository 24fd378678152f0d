"""Estimators: what crosses a sample, the score-function loss and its unbiasedness, and custom ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import circuitroute as cr
from circuitroute.routing.estimators import NoEstimator, Score, Simple, as_estimator, score_function_loss
from tests.truth import enumerate_worlds, world_truth

E = 5
CASES: dict[str, tuple[cr.Constraint, Callable[[Any], bool]]] = {
    "exactly": (cr.Exactly(2), lambda z: z.sum() == 2),
    "between": (cr.Between(1, 3), lambda z: 1 <= z.sum() <= 3),
    "over": (cr.Exactly(1).over([0, 2, 3]), lambda z: z[[0, 2, 3]].sum() == 1),
}
every_case = pytest.mark.parametrize(("constraint", "accept"), CASES.values(), ids=CASES)


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _cost(mask: Tensor) -> Tensor:
    """A cost of a subset that no function linear in the mask can express."""
    z = mask.double()
    return (z @ torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0], dtype=torch.float64)).sin() + z[..., 0] * z[..., 3]


# ---------------------------------------------------------------------------------------------- as_estimator


@pytest.mark.parametrize(("name", "kind"), [("simple", Simple), ("score", Score), ("none", NoEstimator)])
def test_names_stand_for_estimators(name: str, kind: type) -> None:
    estimator = as_estimator(name)
    assert type(estimator) is kind
    assert isinstance(estimator, cr.Estimator)
    assert repr(estimator) == f"{kind.__name__}()"
    assert as_estimator(estimator) is estimator


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="estimator='gumbel': choose one of 'simple', 'score', 'none'"):
        as_estimator("gumbel")


@pytest.mark.parametrize("value", [None, 3, object()], ids=["none", "number", "object"])
def test_what_cannot_be_called_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="expected a name or a callable"):
        as_estimator(value)


# ---------------------------------------------------------------------------------------------- masks


@every_case
def test_simple_is_the_mask_in_value_and_the_marginals_in_gradient(
    constraint: cr.Constraint, accept: Callable[[Any], bool]
) -> None:
    logits = _randn(6, E).requires_grad_()
    distribution = cr.compile(constraint, E)(logits)
    mask = distribution.sample(key=1)
    g = Simple()(mask, distribution)
    assert torch.equal(g, mask)
    upstream = _randn(6, E, seed=1)
    (gradient,) = torch.autograd.grad((g * upstream).sum(), logits)
    covariance = torch.from_numpy(world_truth(logits, accept).covariance)
    torch.testing.assert_close(gradient, torch.einsum("tij,tj->ti", covariance, upstream), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("estimator", ["score", "none"])
def test_the_others_pass_the_mask_through(estimator: str) -> None:
    distribution = cr.compile(cr.Exactly(2), E)(_randn(6, E).requires_grad_())
    mask = distribution.sample(key=1)
    assert as_estimator(estimator)(mask, distribution) is mask


def test_simple_costs_nothing_where_no_gradient_is_wanted() -> None:
    logits = _randn(6, E)
    distribution = cr.compile(cr.Exactly(2), E)(logits)
    mask = distribution.sample(key=1)
    assert Simple()(mask, distribution) is mask
    differentiable = cr.compile(cr.Exactly(2), E)(logits.requires_grad_())
    with torch.no_grad():
        assert Simple()(mask, differentiable) is mask


def test_simple_reaches_a_count_potential_under_constant_logits() -> None:
    potential = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    distribution = cr.compile(cr.Between(1, 3), E)(_randn(6, E), potential)
    g = Simple()(distribution.sample(key=1), distribution)
    (gradient,) = torch.autograd.grad((g * _randn(6, E, seed=1)).sum(), potential)
    assert bool((gradient[1:] != 0).all())
    assert float(gradient[0]) == 0  # a count that is not allowed


def test_simple_agrees_with_rsample() -> None:
    logits = _randn(6, E).requires_grad_()
    distribution = cr.compile(cr.Between(1, 3), E)(logits)
    upstream, key = _randn(6, E, seed=1), cr.random_key(0, torch.arange(6))
    samples = (distribution.rsample(key=key), Simple()(distribution.sample(key=key), distribution))
    assert torch.equal(*samples)
    assert torch.equal(*(torch.autograd.grad((g * upstream).sum(), logits)[0] for g in samples))


def test_a_custom_estimator_shapes_the_gradient_of_the_gates() -> None:
    """The straight-through estimator of independent coins: any callable of (mask, distribution) will do."""
    seen = []

    class Coins:
        def __call__(self, mask: Tensor, distribution: cr.SubsetDistribution) -> Tensor:
            seen.append((mask.dtype, tuple(mask.shape), distribution.circuit))
            coins = torch.sigmoid(distribution.logits)
            return mask + coins - coins.detach()

    circuit = cr.compile(cr.Exactly(2), E)
    logits, upstream = _randn(6, E).requires_grad_(), _randn(6, E, seed=1)
    routing = cr.route(logits, circuit, combine="sigmoid", estimator=Coins(), key=3)
    assert seen == [(torch.float64, (6, E), circuit)]
    p = torch.sigmoid(logits.detach())
    z = routing.mask.double()
    torch.testing.assert_close(routing.gates, z * p)
    (gradient,) = torch.autograd.grad((routing.gates * upstream).sum(), logits)
    torch.testing.assert_close(gradient, upstream * (p * (1 - p) * p + z * p * (1 - p)), rtol=1e-10, atol=1e-12)
    assert isinstance(Coins(), cr.Estimator)
    as_function = cr.route(logits, circuit, combine="sigmoid", estimator=lambda m, d: Coins()(m, d), key=3)
    assert torch.equal(as_function.gates, routing.gates)


# ---------------------------------------------------------------------------------------------- score function


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_score_function_loss_is_its_leave_one_out_formula(dim: int) -> None:
    log_prob, cost = _randn(4, 3).requires_grad_(), _randn(4, 3, seed=1).requires_grad_()
    loss = score_function_loss(log_prob, cost, dim)
    expected = np.zeros((4, 3))
    values = np.moveaxis(cost.detach().numpy(), dim, 0)
    for index in np.ndindex(values.shape):
        others = np.delete(values[:, index[1]], index[0])
        expected_entry = values[index] - others.mean()
        np.moveaxis(expected, dim, 0)[index] = expected_entry
    np.testing.assert_allclose(loss.item(), (expected * log_prob.detach().numpy()).mean(), rtol=1e-12)
    gradients = torch.autograd.grad(loss, [log_prob, cost], allow_unused=True)
    np.testing.assert_allclose(gradients[0], expected / 12, rtol=1e-12)
    assert gradients[1] is None  # costs are constants here


def test_a_cost_that_is_the_same_for_all_has_no_gradient() -> None:
    log_prob = _randn(7).requires_grad_()
    loss = score_function_loss(log_prob, torch.full((7,), 3.0, dtype=torch.float64))
    np.testing.assert_allclose(torch.autograd.grad(loss, log_prob)[0], 0, atol=1e-15)


@every_case
@pytest.mark.parametrize("samples", [2, 4])
def test_score_function_gradients_are_unbiased(
    constraint: cr.Constraint, accept: Callable[[Any], bool], samples: int
) -> None:
    """Mean over 6000 independent keyed estimates against the exact gradient of the expected cost.

    Each of the 5 components lies within 4 standard errors: an error rate of 6e-5 each, 2e-3 over all six tests, and
    none at this seed.
    """
    repeats = 6000
    theta = _randn(E, seed=3)
    truth = world_truth(theta[None], accept)
    worlds = torch.from_numpy(enumerate_worlds(E))
    p = torch.from_numpy(np.exp(truth.log_probs[0]))
    costs = _cost(worlds)
    # grad E[c] = E[c (z - m)]
    exact = (p * costs) @ (worlds.double() - torch.from_numpy(truth.marginals))

    rows = theta.expand(samples, repeats, E).clone().requires_grad_()
    key = cr.random_key(11, torch.arange(samples)[:, None], torch.arange(repeats))
    routing = cr.route(rows, cr.compile(constraint, E), estimator="score", key=key)
    cost = _cost(routing.mask).reshape(samples, repeats)
    loss = score_function_loss(routing.log_prob.reshape(samples, repeats), cost)
    # The loss averages over everything, so each estimate is its column's gradient times the number of columns.
    (gradient,) = torch.autograd.grad(loss * repeats, rows)
    estimates = gradient.sum(0)
    error = estimates.std(0) / repeats**0.5
    assert bool(((estimates.mean(0) - exact).abs() <= 4 * error + 1e-12).all())
    # The test can tell: without the score function there would be no gradient at all.
    assert bool((exact.abs() > 8 * error).any())


def test_the_baseline_reduces_the_variance() -> None:
    repeats, samples = 2000, 4
    rows = _randn(E, seed=3).expand(samples, repeats, E).clone().requires_grad_()
    key = cr.random_key(5, torch.arange(samples)[:, None], torch.arange(repeats))
    routing = cr.route(rows, cr.compile(cr.Exactly(2), E), estimator="score", key=key)
    cost = _cost(routing.mask).reshape(samples, repeats) + 10.0  # an offset that says nothing
    log_prob = routing.log_prob.reshape(samples, repeats)
    losses = (score_function_loss(log_prob, cost), (cost * log_prob).mean())
    spread = [torch.autograd.grad(loss, rows, retain_graph=True)[0].sum(0).var(0).sum() for loss in losses]
    assert spread[0] < 0.05 * spread[1]


def test_gates_of_the_score_estimator_carry_no_gradient_across_the_sample() -> None:
    """Its gates are the chosen weights; the rest of the gradient is the loss's business."""
    logits, circuit = _randn(6, E).requires_grad_(), cr.compile(cr.Exactly(2), E)
    routing = cr.route(logits, circuit, combine="sigmoid", estimator="score", key=1)
    (gradient,) = torch.autograd.grad(routing.gates.sum(), logits)
    p = torch.sigmoid(logits.detach())
    torch.testing.assert_close(gradient, torch.where(routing.mask, p * (1 - p), 0.0))


@pytest.mark.parametrize(
    ("log_prob", "cost", "dim", "says"),
    [
        (torch.zeros(3), torch.zeros(4), 0, r"cost has shape \(4,\): it must be that of log_prob, \(3,\)"),
        (torch.zeros(3), torch.zeros(3, 1), 0, r"cost has shape \(3, 1\)"),
        (torch.zeros(1), torch.zeros(1), 0, "cost has 1 entries along dim=0"),
        (torch.zeros(5, 1), torch.zeros(5, 1), 1, "cost has 1 entries along dim=1"),
        (torch.zeros(0), torch.zeros(0), 0, "cost has 0 entries along dim=0"),
        (torch.tensor(0.0), torch.tensor(0.0), 0, "a leave-one-out baseline needs at least two"),
    ],
)
def test_costs_that_do_not_fit_are_refused(log_prob: Tensor, cost: Tensor, dim: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        score_function_loss(log_prob, cost, dim)


def test_dense_weights_are_over_the_chosen_however_little_of_the_softmax_they_have():
    """A chosen expert may have 1e-50 of the softmax: nothing is divided by that."""
    circuit, logits = cr.compile(cr.Exactly(1).over([0, 1]), 3), torch.tensor([[-60.0, -61.0, 60.0]])
    replay, gates = torch.tensor([[True, False, False]]), {}
    for estimator in ("dense", "none"):
        leaf = logits.clone().requires_grad_()
        gates[estimator] = cr.route(leaf, circuit, combine="normalized", estimator=estimator, replay=replay).gates
        assert gates[estimator].isfinite().all()
        (gradient,) = torch.autograd.grad(gates[estimator].sum(), leaf)
        assert gradient.isfinite().all()
    assert torch.equal(gates["dense"], gates["none"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lead", [50.0, 121.0, 1000.0])
def test_dense_gradients_do_not_underflow_with_the_softmax(dtype, lead):
    """Experts 1 and 2 have e^-lead of the softmax; yet of the chosen's sum expert 2 would have e times all of it."""
    circuit, replay = cr.compile(cr.Exactly(1), 4), torch.tensor([[False, True, False, False]])
    leaf = torch.tensor([[lead - 31, -31.0, -30.0, -math.inf]], dtype=dtype, requires_grad=True)
    gates = cr.route(leaf, circuit, combine="normalized", estimator="dense", replay=replay, validate_args=False).gates
    assert torch.equal(gates, replay.to(dtype))
    (by_unchosen,) = torch.autograd.grad(gates[0, 2], leaf)
    torch.testing.assert_close(by_unchosen, torch.tensor([[-math.e, 0.0, math.e, 0.0]], dtype=dtype))


@pytest.mark.parametrize("logits", [[math.inf, 1.0, 2.0], [-math.inf, -math.inf, -math.inf], [-math.inf, 1.0, 2.0]])
def test_dense_gradients_of_evidence_are_numbers(logits):
    circuit, mask = cr.compile(cr.AtMost(2), 3), torch.tensor([[logits[0] > 0, False, False]])
    leaf = torch.tensor([logits], requires_grad=True)
    gates = cr.route(leaf, circuit, combine="normalized", estimator="dense", replay=mask, validate_args=False).gates
    assert torch.equal(gates, mask.float())
    (gradient,) = torch.autograd.grad(gates, leaf, torch.tensor([[1.0, 2.0, 3.0]]))
    assert gradient.isfinite().all()
    assert torch.equal(gradient[torch.tensor([logits]).isinf()], torch.zeros(sum(map(math.isinf, logits))))


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_dense_normalized_weights_have_the_gradient_of_the_softmax_over_a_constant_sum(scale):
    torch.manual_seed(0)
    circuit, key = cr.compile(cr.AtMost(2), 5), torch.arange(40)
    leaf = (torch.randn(40, 5, dtype=torch.float64) * scale).requires_grad_()
    routing = cr.route(leaf, circuit, combine="normalized", estimator="dense", key=key)
    weights, chosen = torch.softmax(leaf, -1), routing.mask
    total = torch.where(chosen, weights, 0.0).sum(-1, keepdim=True)
    total = torch.where(total > 0, total, 1.0)
    shares = torch.where(chosen, weights / total, weights / total.detach() - (weights / total).detach())
    u = torch.randn(40, 5, dtype=torch.float64)
    torch.testing.assert_close(routing.gates, shares)
    (ours,) = torch.autograd.grad(routing.gates, leaf, u, create_graph=True)
    (theirs,) = torch.autograd.grad(shares, leaf, u, create_graph=True)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours.square().sum(), leaf), torch.autograd.grad(theirs.square().sum(), leaf)
    )
