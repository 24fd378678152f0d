"""Metrics against closed forms, and the swap oracle against problems whose answer is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

import circuitroute as cr
from circuitroute.routing import metrics
from circuitroute.routing.metrics import rank_correlation, swap_oracle

INF = float("inf")
T, E = 24, 8


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------------------------------------- load

LOADS = {
    # mask, utilization, entropy / log E, max violation, active experts, diversity
    "balanced": (torch.eye(4), [0.25] * 4, 1.0, 0.0, 1.0, 4.0),
    "collapsed": (torch.tensor([[0, 1, 0, 0]] * 3), [0, 1, 0, 0], 0.0, 3.0, 1.0, 1.0),
    "half": (torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0]]), [1, 1, 0, 0], 0.5, 1.0, 2.0, 1.0),
    "skewed": (
        torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]]),
        [1, 0.5, 0, 0],
        (2 / 3 * math.log(3 / 2) + 1 / 3 * math.log(3)) / math.log(4),
        2 / 0.75 - 1,
        1.5,
        2.0,
    ),
    "nothing chosen": (torch.zeros(3, 4), [0] * 4, 0.0, 0.0, 0.0, 1.0),
    "no tokens": (torch.zeros(0, 4), [0] * 4, 0.0, 0.0, 0.0, 0.0),
    "one expert": (torch.ones(5, 1), [1], 1.0, 0.0, 1.0, 1.0),
}


@pytest.mark.parametrize(
    ("mask", "utilization", "entropy", "violation", "active", "diversity"), LOADS.values(), ids=LOADS
)
def test_load_metrics_of_small_examples(
    mask: Tensor, utilization: list[float], entropy: float, violation: float, active: float, diversity: float
) -> None:
    for same in (mask, mask.bool(), mask.float(), mask.long()):
        found = metrics.utilization(same)
        assert found.dtype == torch.float64
        assert found.tolist() == utilization
        assert metrics.load_entropy(same) == pytest.approx(entropy, abs=1e-12)
        assert metrics.max_violation(same) == pytest.approx(violation, abs=1e-12)
        assert metrics.active_experts(same) == pytest.approx(active)
        assert metrics.subset_diversity(same) == pytest.approx(diversity)


def test_diversity_weighs_subsets_by_their_frequency() -> None:
    """exp(entropy): between the number of subsets in use and 1."""
    mask = torch.tensor([[1, 0, 0]] * 6 + [[0, 1, 1]] * 3 + [[0, 0, 1]])
    expected = math.exp(scipy.stats.entropy([0.6, 0.3, 0.1]))
    assert metrics.subset_diversity(mask) == pytest.approx(expected)
    assert metrics.subset_diversity(mask[torch.randperm(10)]) == pytest.approx(expected)


def test_a_routing_is_measured_by_its_mask() -> None:
    logits = _randn(T, E).requires_grad_()
    routing = cr.route(logits, cr.compile(cr.Between(1, 4), E), key=cr.random_key(0, torch.arange(T)))
    assert torch.equal(metrics.utilization(routing), metrics.utilization(routing.mask))
    assert not metrics.utilization(routing).requires_grad
    for metric in (metrics.load_entropy, metrics.max_violation, metrics.active_experts, metrics.subset_diversity):
        assert metric(routing) == metric(routing.mask)
        assert isinstance(metric(routing), float)
    assert metrics.active_experts(routing) == routing.counts.double().mean().item()


@pytest.mark.parametrize(
    "metric",
    [
        metrics.utilization,
        metrics.load_entropy,
        metrics.max_violation,
        metrics.active_experts,
        metrics.subset_diversity,
    ],
)
@pytest.mark.parametrize("shape", [(4,), (2, 3, 4)], ids=str)
def test_masks_of_another_shape_are_refused(metric: Callable[[Tensor], object], shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \[tokens, experts\]"):
        metric(torch.zeros(shape))


# ---------------------------------------------------------------------------------------------- rank correlation


@pytest.mark.parametrize("size", [2, 3, 17, 200])
@pytest.mark.parametrize("levels", [None, 2, 5], ids=["no ties", "two levels", "five levels"])
def test_rank_correlation_is_spearmans(size: int, levels: int | None) -> None:
    rng = np.random.default_rng(size)
    for _ in range(5):
        x, y = (rng.normal(size=size) if levels is None else rng.integers(levels, size=size) for _ in range(2))
        if len(set(x)) == 1 or len(set(y)) == 1:
            continue
        expected = scipy.stats.spearmanr(x, y).statistic
        for dtype in (torch.float32, torch.float64):
            got = rank_correlation(torch.tensor(x, dtype=dtype), torch.tensor(y, dtype=dtype))
            assert got == pytest.approx(expected, abs=1e-12)


def test_rank_correlation_sees_the_order_only() -> None:
    x = _randn(30)
    assert rank_correlation(x, x.exp()) == pytest.approx(1)
    assert rank_correlation(x, -(x**3)) == pytest.approx(-1)


@pytest.mark.parametrize(("x", "y"), [([], []), ([1.0], [2.0]), ([1.0, 1.0], [1.0, 2.0]), ([1.0, 2.0], [0.0, 0.0])])
def test_rank_correlation_with_a_constant_is_undefined(x: list[float], y: list[float]) -> None:
    assert math.isnan(rank_correlation(torch.tensor(x), torch.tensor(y)))


# ---------------------------------------------------------------------------------------------- swap oracle


def _linear(cost: Tensor) -> Callable[[cr.Routing], Tensor]:
    """[T] losses, linear in each token's gates."""
    return lambda routing: (routing.gates * cost).sum(-1)


@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("training", [True, False])
def test_the_gradient_orders_the_swaps_of_a_linear_loss_perfectly(k: int, training: bool) -> None:
    """Equal logits far up make every sigmoid gate 1 and flat, and Cov(z) a multiple of I - 1/E.

    The gradient of the loss sum_e c_e g_e along a swap is then proportional to c_in - c_out, the true change.
    """
    cost = _randn(T, E)
    logits, circuit = torch.full((T, E), 40.0, dtype=torch.float64), cr.compile(cr.Exactly(k), E)
    result = swap_oracle(_linear(cost), logits, circuit, combine="sigmoid", training=training, key=3)
    assert len(result.predicted) == len(result.actual) == 16 * T
    assert result.correlation == pytest.approx(1, abs=1e-12)
    variance = k / E * (1 - k / E) * E / (E - 1)
    torch.testing.assert_close(result.predicted, variance * result.actual, rtol=1e-9, atol=1e-9)


def test_a_negated_gradient_orders_them_the_other_way_round() -> None:
    """The estimator is what is being judged."""

    class Backwards:
        def __call__(self, mask: Tensor, distribution: cr.SubsetDistribution) -> Tensor:
            return mask - distribution.marginals + distribution.marginals.detach()

    logits = torch.full((T, E), 40.0, dtype=torch.float64)
    circuit = cr.compile(cr.Exactly(3), E)
    result = swap_oracle(_linear(_randn(T, E)), logits, circuit, combine="sigmoid", estimator=Backwards())
    assert result.correlation == pytest.approx(-1, abs=1e-12)


def test_a_gradient_that_knows_nothing_does_not_correlate() -> None:
    """Random predictions: |r| sqrt(S - 1) is about normal; below 4 but for an error rate of 6e-5, none at this seed."""
    noise = _randn(T, E, seed=5)

    class Noise:
        def __call__(self, mask: Tensor, distribution: cr.SubsetDistribution) -> Tensor:
            blind = distribution.logits * noise
            return mask + blind - blind.detach()

    logits = torch.full((T, E), 40.0, dtype=torch.float64)
    circuit = cr.compile(cr.Exactly(3), E)
    options: dict[str, Any] = {"combine": "sigmoid", "estimator": Noise(), "rounds": 4}
    result = swap_oracle(_linear(torch.ones(T, E) + _randn(T, E)), logits, circuit, **options)
    assert abs(result.correlation) * (len(result.predicted) - 1) ** 0.5 < 4


@pytest.mark.parametrize("combine", ["softmax", "normalized", "sigmoid", "marginal"])
def test_predictions_and_changes_are_those_of_single_swaps(combine: Any) -> None:
    """Recomputed one by one from the masks that the loss was shown."""
    logits, cost = _randn(T, E), _randn(T, E, seed=1)
    circuit, key = cr.compile(cr.Between(1, 4), E), cr.random_key(0, torch.arange(T))
    masks = []

    def loss_fn(routing: cr.Routing) -> Tensor:
        masks.append(routing.mask)
        return _linear(cost)(routing).square()

    result = swap_oracle(loss_fn, logits, circuit, combine=combine, training=True, key=key, rounds=3)
    base, *swapped = masks
    leaf = logits.clone().requires_grad_()
    original = cr.route(leaf, circuit, combine=combine, key=key)
    assert torch.equal(original.mask, base)
    before = _linear(cost)(original).square()
    (gradient,) = torch.autograd.grad(before.sum(), leaf)
    predicted, actual = [], []
    for mask in swapped:
        after = _linear(cost)(cr.route(logits, circuit, combine=combine, replay=mask)).square()
        for t in range(T):  # one swap per token, since every token is a group
            (into,) = (mask & ~base)[t].nonzero().flatten().tolist()
            (out,) = (base & ~mask)[t].nonzero().flatten().tolist()
            predicted.append(gradient[t, into] - gradient[t, out])
            actual.append(after[t] - before[t])
    torch.testing.assert_close(result.predicted, torch.stack(predicted), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(result.actual, torch.stack(actual).detach(), rtol=1e-9, atol=1e-12)
    expected = scipy.stats.spearmanr(result.predicted, result.actual).statistic
    assert result.correlation == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("groups", [None, 1, 4, T])
def test_one_swap_per_group_and_call(groups: int | None) -> None:
    cost, masks = _randn(T, E), []

    def loss_fn(routing: cr.Routing) -> Tensor:
        masks.append(routing.mask)
        losses = _linear(cost)(routing)
        return losses.sum() if groups is None else losses.reshape(groups, -1).sum(-1)

    result = swap_oracle(loss_fn, _randn(T, E), cr.compile(cr.Exactly(3), E), rounds=5)
    per_call = groups or 1
    assert len(masks) == 6
    assert len(result.predicted) == 5 * per_call
    for mask in masks[1:]:
        changed = (mask != masks[0]).any(-1)
        assert changed.reshape(per_call, -1).sum(-1).tolist() == [1] * per_call
        assert int((mask != masks[0]).sum()) == 2 * per_call


def test_a_groups_change_is_that_of_its_own_swap() -> None:
    """The swaps made in the other groups of the same call have no part in it."""
    cost, logits, circuit, masks = _randn(T, E), _randn(T, E, seed=2), cr.compile(cr.Exactly(3), E), []

    def loss_fn(routing: cr.Routing) -> Tensor:
        masks.append(routing.mask)
        return _linear(cost)(routing).reshape(4, -1).sum(-1)

    result = swap_oracle(loss_fn, logits, circuit, rounds=3)
    base, *swapped = masks[:4]
    alone = []
    for mask in swapped:
        for group in torch.arange(T).chunk(4):
            single = base.clone()
            single[group] = mask[group]
            losses = [_linear(cost)(cr.route(logits, circuit, replay=m)).sum() for m in (single, base)]
            alone.append(losses[0] - losses[1])
    torch.testing.assert_close(result.actual, torch.stack(alone))


@pytest.mark.parametrize(
    "constraint",
    [
        cr.Exactly(1).over([0, 2, 3]),
        cr.AtMost(1).over([1, 4, 5, 6]),
        cr.Exactly(3).over([0, 1, 2, 3, 4, 5]),
        cr.Between(2, 3),
    ],
    ids=str,
)
def test_swaps_that_break_the_constraint_are_never_evaluated(constraint: cr.Constraint) -> None:
    """Half of the swaps here would move an expert across the edge of the scope."""
    circuit, cost, seen = cr.compile(constraint, E), _randn(T, E), []

    def loss_fn(routing: cr.Routing) -> Tensor:
        seen.append(routing.mask)
        assert bool(circuit.satisfies(routing.mask).all())
        return _linear(cost)(routing)

    result = swap_oracle(loss_fn, _randn(T, E), circuit, training=True, key=cr.random_key(0, torch.arange(T)))
    swaps = sum(int((mask != seen[0]).any(-1).sum()) for mask in seen[1:])
    assert len(result.predicted) == swaps > 0
    if isinstance(constraint, cr.Between):
        assert swaps == 16 * T  # a swap keeps the count
    else:
        assert swaps < 16 * T


def test_experts_that_evidence_decides_are_not_swapped() -> None:
    logits = _randn(T, E)
    logits[:, 0], logits[:, 1], logits[3:, 2] = INF, -INF, -INF
    cost, seen = _randn(T, E), []

    def loss_fn(routing: cr.Routing) -> Tensor:
        seen.append(routing.mask)
        return _linear(cost)(routing)

    result = swap_oracle(loss_fn, logits, cr.compile(cr.Exactly(3), E), combine="sigmoid")
    masks = torch.stack(seen)
    assert bool(masks[..., 0].all())
    assert not masks[..., 1].any()
    assert not masks[:, 3:, 2].any()
    assert 0 < len(result.predicted) < 16 * T


def test_the_oracle_is_a_function_of_its_seed() -> None:
    loss_fn, logits, circuit = _linear(_randn(T, E)), _randn(T, E, seed=1), cr.compile(cr.Exactly(3), E)
    before = torch.get_rng_state()
    runs = [swap_oracle(loss_fn, logits, circuit, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(runs[0].predicted, runs[1].predicted)
    assert not torch.equal(runs[0].predicted, runs[2].predicted)
    # More rounds go on where fewer left off.
    longer = swap_oracle(loss_fn, logits, circuit, rounds=20)
    assert torch.equal(longer.predicted[: 16 * T], runs[0].predicted)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_oracle_works_in_any_gradient_mode_and_changes_nothing(context: Callable[[], Any]) -> None:
    logits, circuit = _randn(T, E, seed=1).requires_grad_(), cr.compile(cr.Exactly(3), E)
    copy, loss_fn = logits.detach().clone(), _linear(_randn(T, E))
    expected = swap_oracle(loss_fn, copy, circuit)
    with context():
        result = swap_oracle(loss_fn, logits, circuit)
    assert result.correlation == expected.correlation
    assert logits.grad is None
    assert torch.equal(logits.detach(), copy)
    assert not result.predicted.requires_grad
    assert not result.actual.requires_grad
    assert result.predicted.dtype == result.actual.dtype == torch.float64


def test_swaps_are_drawn_evenly() -> None:
    """2400 swaps, each of one of 2 tokens and one of 3 x 2 pairs: chi-square over 12 cells, p above 1e-4."""
    groups = 300
    logits, circuit = torch.arange(5.0, 0.0, -1.0).expand(2 * groups, 5), cr.compile(cr.Exactly(3), 5)
    cells = torch.zeros(2, 5, 5, dtype=torch.int64)

    def loss_fn(routing: cr.Routing) -> Tensor:
        change = routing.mask ^ torch.tensor([True, True, True, False, False])
        pairs = change[:, :, None] & change[:, None, :]
        cells.add_(pairs.reshape(groups, 2, 5, 5).sum(0))
        return routing.gates.reshape(groups, -1).sum(-1)

    swap_oracle(loss_fn, logits, circuit, rounds=8)
    found = cells[:, :3, 3:].flatten()
    assert int(found.sum()) == 8 * groups
    assert scipy.stats.chisquare(found.numpy()).pvalue > 1e-4


@pytest.mark.parametrize(
    ("loss_fn", "error", "says"),
    [
        (lambda r: r.gates.sum(-1).reshape(2, -1), ValueError, r"losses of shape \(2, 12\): expected a scalar or"),
        (lambda r: r.gates.sum(-1)[:5], ValueError, "5 losses, which does not divide the 24 tokens"),
        (lambda r: r.gates.sum(-1)[:0], ValueError, "0 losses"),
        (lambda r: r.gates.sum() * INF, ValueError, "not finite"),
        (lambda r: r.gates.sum() * float("nan"), ValueError, "not finite"),
        (lambda r: 1.0, TypeError, "loss_fn returned 1.0: expected a tensor"),
        (lambda r: r.mask.sum().float(), ValueError, "not a function of the logits"),
    ],
)
def test_losses_that_do_not_fit_are_refused(loss_fn: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        swap_oracle(loss_fn, _randn(T, E), cr.compile(cr.Exactly(3), E))


@pytest.mark.parametrize("shape", [(0, E), (2, 3, E), (E,)], ids=str)
def test_logits_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \[tokens, experts\] with a token at least"):
        swap_oracle(lambda r: r.gates.sum(), torch.zeros(shape), cr.compile(cr.Exactly(3), E))


@pytest.mark.parametrize("constraint", [cr.Exactly(E), cr.Exactly(0)], ids=str)
def test_no_possible_swap_is_an_error(constraint: cr.Constraint) -> None:
    with pytest.raises(ValueError, match="no swap of a chosen with an unchosen expert satisfies Exactly"):
        swap_oracle(lambda r: r.gates.sum(), _randn(T, E), cr.compile(constraint, E))


@pytest.mark.parametrize(("rounds", "error"), [(0, ValueError), (1.5, TypeError), (True, TypeError)])
def test_bad_rounds_are_refused(rounds: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="rounds="):
        swap_oracle(lambda r: r.gates.sum(), _randn(T, E), cr.compile(cr.Exactly(3), E), rounds=rounds)
