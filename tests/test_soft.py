"""Soft top-k against bisection in long double: sums, weights, both gradients, evidence and edges; allocations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from circuitroute.layers.allocation import LayerAllocation
from circuitroute.routing.soft_topk import laplace_cdf, soft_topk

INF = float("inf")


def _logits(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype) * scale


def _with_ties(logits: Tensor) -> Tensor:
    logits = logits.clone()
    logits[::4] = logits[::4].round()
    logits[1] = 0
    logits[2] = logits[2, :1]
    logits[3, : logits.shape[1] // 2] = logits[3, -1]
    return logits


# ---------------------------------------------------------------------------------------------- the truth


def _cdf(x: NDArray[Any]) -> NDArray[Any]:
    tail = np.exp(-np.abs(x)) / 2
    return np.where(x < 0, tail, 1 - tail)


def truth(logits: Tensor, k: float, alpha: float) -> NDArray[Any]:
    """[T, N] float64 weights, the threshold of every row found by bisection in long double."""
    rows = logits.double().numpy()
    forced, free = rows == INF, np.isfinite(rows)
    left = k - forced.sum(-1, keepdims=True)
    x = np.where(free, rows, 0).astype(np.longdouble) / np.longdouble(alpha)
    low, high = x.min(-1, keepdims=True) - 800, x.max(-1, keepdims=True) + 800
    for _ in range(100):
        middle = (low + high) / 2
        more = np.where(free, _cdf(x - middle), 0).sum(-1, keepdims=True) > left
        low, high = np.where(more, middle, low), np.where(more, high, middle)
    weights = np.where(left <= 0, 0.0, np.where(left >= free.sum(-1, keepdims=True), 1.0, _cdf(x - high)))
    return np.where(free, weights, forced).astype(np.float64)


def test_the_truth_is_one() -> None:
    """Sums to k, with weights whose quantiles differ from x by one number."""
    logits = _logits(20, 7, dtype=torch.float64)
    weights = truth(logits, 2.3, 0.7)
    np.testing.assert_allclose(weights.sum(-1), 2.3, atol=1e-14)
    quantiles = torch.distributions.Laplace(0.0, 1.0).icdf(torch.from_numpy(weights)).numpy()
    shift = logits.numpy() / 0.7 - quantiles
    np.testing.assert_allclose(shift, shift[:, :1].repeat(7, 1), atol=1e-12)


# ---------------------------------------------------------------------------------------------- weights


def _ks(n: int) -> list[float]:
    some = {0.0, 1e-30, 1e-6, 0.3, 1.0, 1.5, n / 2, n // 2, n - 1, n - 0.5, n - 1e-3, float(n)}
    return sorted(k for k in some if 0 <= k <= n)


@pytest.mark.parametrize("alpha", [0.01, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0, 1e4])
@pytest.mark.parametrize("n", [1, 2, 7, 64, 512])
def test_weights_sum_to_k_at_any_scale(n: int, scale: float, alpha: float) -> None:
    exact = _with_ties(_logits(12, n, scale=scale, dtype=torch.float64))
    k = torch.tensor(_ks(n), dtype=torch.float64)[:, None].expand(-1, len(exact))
    weights = soft_topk(exact.expand(*k.shape, n), k, alpha)
    assert bool(((weights >= 0) & (weights <= 1)).all())
    torch.testing.assert_close(weights.sum(-1), k, atol=1e-9, rtol=0)
    assert bool((weights[0] == 0).all())
    assert bool((weights[-1] == 1).all())
    single = soft_topk(exact.float().expand(*k.shape, n), k.float(), alpha)
    assert single.dtype == torch.float32
    assert bool(((single.double().sum(-1) - k.float()).abs() <= 1e-5 * k).all())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-6)], ids=str)
@pytest.mark.parametrize(("scale", "alpha"), [(1.0, 1.0), (0.01, 10.0), (100.0, 0.1), (1e4, 0.01), (3.0, 0.3)])
@pytest.mark.parametrize("n", [1, 2, 9, 130])
def test_weights_are_the_true_ones(n: int, scale: float, alpha: float, dtype: torch.dtype, tolerance: float) -> None:
    logits = _with_ties(_logits(8, n, scale=scale, dtype=dtype))
    alpha = float(torch.tensor(alpha, dtype=dtype))
    for k in _ks(n):
        rounded = float(torch.tensor(k, dtype=dtype))
        found = soft_topk(logits, rounded, alpha).double().numpy()
        np.testing.assert_allclose(found, truth(logits, rounded, alpha), atol=tolerance, rtol=0)


def test_small_weights_keep_their_digits() -> None:
    """A weight of 1e-20 is a number too, not what is left of 1."""
    logits = torch.tensor([[0.0, -20.0, -45.0, 3.0]], dtype=torch.float64)
    np.testing.assert_allclose(soft_topk(logits, 1.3, 1.0).numpy(), truth(logits, 1.3, 1.0), rtol=1e-12)
    single = soft_topk(logits.float(), 1.3, 1.0).double().numpy()
    np.testing.assert_allclose(single, truth(logits, float(torch.tensor(1.3)), 1.0), rtol=1e-5)


def test_weights_are_laplace_probabilities_of_shifted_logits() -> None:
    logits = _logits(50, 9, dtype=torch.float64)
    weights = soft_topk(logits, 3, 0.7)
    reference = torch.distributions.Laplace(0.0, 1.0)
    shift = logits / 0.7 - reference.icdf(weights)
    torch.testing.assert_close(shift, shift[:, :1].expand_as(shift), atol=1e-9, rtol=0)
    torch.testing.assert_close(laplace_cdf(logits), reference.cdf(logits))
    assert laplace_cdf(torch.tensor([-90.0, -0.0, 0.0, 90.0])).tolist() == [0.0, 0.5, 0.5, 1.0]


def test_cold_weights_are_the_mask_of_the_largest() -> None:
    logits = _logits(20, 10)
    mask = torch.zeros_like(logits).scatter(-1, logits.topk(4).indices, 1.0)
    for alpha in (1e-6, 1e-30, 1e-38):
        torch.testing.assert_close(soft_topk(logits, 4, alpha), mask)


def test_equal_logits_share_k() -> None:
    torch.testing.assert_close(soft_topk(torch.zeros(3, 6), 2, 1.0), torch.full((3, 6), 1 / 3))


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("alpha", [0.01, 1.0])
def test_evidence_leaves_the_soft_top_k_of_the_others(scale: float, alpha: float) -> None:
    free = _logits(6, 5, scale=scale, dtype=torch.float64) + scale
    fixed = free.new_tensor([INF, -INF, INF]).expand(6, 3)
    logits = torch.cat([fixed[:, :1], free[:, :2], fixed[:, 1:], free[:, 2:]], -1)
    for left in (0.0, 1e-6, 0.5, 1.0, 2.5, 4.0, 5.0 - 1e-6, 5.0):
        weights = soft_topk(logits, 2 + left, alpha)
        assert bool((weights[:, [0, 3, 4]] == torch.tensor([1.0, 0.0, 1.0])).all())
        np.testing.assert_allclose(weights.numpy(), truth(logits, 2 + left, alpha), atol=1e-10, rtol=0)
        others = weights[:, [1, 2, 5, 6, 7]]
        torch.testing.assert_close(others, soft_topk(free, (2 + left) - 2, alpha), atol=1e-10, rtol=0)
        assert left not in (0, 5) or bool((others == left / 5).all())


rows = st.lists(st.floats(-50, 50) | st.sampled_from([-INF, INF, 0.0, 1.0, -1e4, 1e4]), min_size=1, max_size=9)


@settings(max_examples=150, deadline=None)
@given(rows, st.floats(0, 1) | st.sampled_from([0.0, 0.5, 1.0]), st.floats(0.01, 10), st.booleans())
def test_any_row_gets_its_true_weights(row: list[float], part: float, alpha: float, whole: bool) -> None:
    logits = torch.tensor([row], dtype=torch.float64)
    low, high = row.count(INF), len(row) - row.count(-INF)
    k = low + part * (high - low)
    k = round(k) if whole else k
    weights = soft_topk(logits, k, alpha)
    np.testing.assert_allclose(weights.numpy(), truth(logits, k, alpha), atol=1e-10, rtol=0)
    assert float(weights.sum()) == pytest.approx(k, abs=1e-9)
    assert bool((weights[logits == INF] == 1).all())
    assert bool((weights[logits == -INF] == 0).all())
    order = logits[0].argsort()
    assert bool((weights[0, order].diff() >= 0).all())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 8), st.floats(0, 1), st.floats(-1e4, 1e4), st.floats(0.1, 10))
def test_what_does_not_matter(seed: int, n: int, part: float, shift: float, factor: float) -> None:
    """Where the zero of the logits is, their unit where the temperature has the same, their order, and their sign."""
    logits, k = _logits(4, n, dtype=torch.float64, seed=seed), part * n
    weights = soft_topk(logits, k, 0.5)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    close: Callable[..., None] = lambda a: torch.testing.assert_close(a, weights, atol=1e-9, rtol=0)  # noqa: E731
    close(soft_topk(logits + shift, k, 0.5))
    close(soft_topk(logits * factor, k, 0.5 * factor))
    close(soft_topk(logits[:, order], k, 0.5)[:, order.argsort()])
    close(1 - soft_topk(-logits, n - k, 0.5))


# ---------------------------------------------------------------------------------------------- gradients


def _arguments(k: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    alpha = torch.tensor([0.3, 0.5, 0.8, 1.0, 1.5, 2.0], dtype=torch.float64, requires_grad=True)
    free = _logits(6, 7, dtype=torch.float64).requires_grad_()
    return free, torch.tensor(k, dtype=torch.float64, requires_grad=True), alpha


def _with_evidence(free: Tensor, k: Tensor, alpha: Tensor) -> Tensor:
    fixed = free.new_tensor([[INF, -INF]]).expand(len(free), 2)
    return soft_topk(torch.cat([fixed[:, :1], free[:, :3], fixed[:, 1:], free[:, 3:]], -1), k, alpha)


def test_gradients_in_logits_k_and_alpha_of_both_orders() -> None:
    arguments = _arguments([1.0, 2.0, 3.5, 0.2, 6.7, 4.0])
    assert torch.autograd.gradcheck(soft_topk, arguments)
    assert torch.autograd.gradgradcheck(soft_topk, arguments)


def test_gradients_beside_evidence_of_both_orders() -> None:
    arguments = _arguments([2.0, 3.0, 4.5, 1.2, 7.7, 5.0])
    assert torch.autograd.gradcheck(_with_evidence, arguments)
    assert torch.autograd.gradgradcheck(_with_evidence, arguments)
    free, k, alpha = arguments
    torch.testing.assert_close(_with_evidence(*arguments)[:, 5:], soft_topk(free, k - 1, alpha)[:, 3:])


def test_infinite_logits_get_no_gradient() -> None:
    logits = torch.tensor([[INF, 0.3, -INF, 1.0, -0.4]], requires_grad=True)
    k, alpha = torch.tensor(2.2, requires_grad=True), torch.tensor(0.7, requires_grad=True)
    gradients = torch.autograd.grad(soft_topk(logits, k, alpha), (logits, k, alpha), _logits(1, 5))
    assert gradients[0][0, [0, 2]].tolist() == [0.0, 0.0]
    assert all(bool(g.isfinite().all()) and bool((g != 0).any()) for g in gradients)


@pytest.mark.parametrize("scale", [1e-30, 0.01, 1.0, 1e4, 1e38])
@pytest.mark.parametrize("alpha", [1e-30, 0.01, 1.0, 1e30])
def test_gradients_are_finite_whatever_the_scale(scale: float, alpha: float) -> None:
    logits = _with_ties(_logits(9, 16)).mul_(scale).clamp(-3e38, 3e38)
    logits[4, :3], logits[4, 3:5] = INF, -INF
    logits[5] = torch.linspace(-3, 3, 16) * 1e38
    for number in (3.0, 3.5, 8.0, 13.99, 14.0):
        inputs = [logits.clone(), torch.tensor(number), torch.tensor(alpha)]
        for value in inputs:
            value.requires_grad_()
        weights = soft_topk(*inputs)
        assert bool(weights.isfinite().all())
        # A gradient of 1 / alpha is what the smallest temperatures have.
        upstream = _logits(9, 16, seed=1) * min(1.0, alpha)
        assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(weights, inputs, upstream))


@pytest.mark.parametrize("k", [0.0, 7.0])
def test_nothing_and_everything_have_the_gradients_of_their_limits(k: float) -> None:
    logits, upstream = _logits(5, 7, dtype=torch.float64).requires_grad_(), _logits(5, 7, dtype=torch.float64, seed=1)
    mass = torch.tensor(k, dtype=torch.float64, requires_grad=True)
    to_logits, to_k = torch.autograd.grad(soft_topk(logits, mass, 0.5), (logits, mass), upstream)
    step = 1e-7 if k == 0 else -1e-7
    change = soft_topk(logits, k + step, 0.5) - soft_topk(logits, k, 0.5)
    assert bool((to_logits == 0).all())
    assert float(to_k) == pytest.approx(float((change * upstream).sum().detach() / step), rel=1e-6)


def test_wide_gaps_keep_gradients_finite() -> None:
    """Every density underflows: nothing moves with the logits, and k moves somebody all the same."""
    logits = torch.tensor([[1e4, 1e4, 0.0, -1e4]], requires_grad=True)
    k = torch.tensor(2.0, requires_grad=True)
    weights = soft_topk(logits, k, 0.1)
    to_logits, to_k = torch.autograd.grad(weights, (logits, k), torch.tensor([[1.0, 2.0, 5.0, 100.0]]))
    assert torch.equal(weights.detach(), torch.tensor([[1.0, 1.0, 0.0, 0.0]]))
    assert torch.equal(to_logits, torch.zeros(1, 4))
    # Half of it goes to the two that are nearest above the gap, half to the one below.
    assert float(to_k) == pytest.approx(0.25 * 1 + 0.25 * 2 + 0.5 * 5, rel=1e-2)


def test_k_has_no_gradient_where_no_variable_is_free() -> None:
    logits = torch.tensor([[INF, -INF, -INF]], requires_grad=True)
    k = torch.tensor(1.0, requires_grad=True)
    weights = soft_topk(logits, k, 1.0)
    assert weights.tolist() == [[1.0, 0.0, 0.0]]
    to_logits, to_k = torch.autograd.grad(weights, (logits, k), torch.tensor([[1.0, 2.0, 3.0]]))
    assert bool((to_logits == 0).all())
    assert float(to_k) == 0


def test_single_precision_gradients_are_those_of_double_precision() -> None:
    single = _logits(40, 33).requires_grad_()
    double = single.detach().double().requires_grad_()
    found, expected = (
        torch.autograd.grad(soft_topk(x, 5.5, 0.5), x, _logits(40, 33, seed=1).to(x))[0] for x in (single, double)
    )
    torch.testing.assert_close(found.double(), expected, atol=2e-6, rtol=0)


# ---------------------------------------------------------------------------------------------- tensors


def test_numbers_and_leading_dimensions_broadcast() -> None:
    logits = _logits(2, 3, 5)
    k, alpha = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[0.5], [2.0]])
    weights = soft_topk(logits, k, alpha)
    torch.testing.assert_close(weights[1, 2], soft_topk(logits[1, 2], 3, 2.0))
    torch.testing.assert_close(soft_topk(logits, torch.tensor(2), 0.5), soft_topk(logits, 2.0, torch.tensor(0.5)))
    assert soft_topk(torch.zeros(2, 0, 3), 1, 1.0).shape == (2, 0, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_any_dtype_is_computed_in_float32_or_wider(dtype: torch.dtype) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    logits, k = _logits(4, 6).to(dtype).requires_grad_(), torch.tensor(2.5, dtype=torch.float64, requires_grad=True)
    weights = soft_topk(logits, k, 1.0)
    assert weights.dtype == wide
    assert torch.equal(weights, soft_topk(logits.to(wide), 2.5, 1.0))
    weights.square().sum().backward()
    assert logits.grad is not None
    assert logits.grad.dtype == dtype
    assert k.grad is not None
    assert k.grad.dtype == torch.float64


def test_arguments_are_left_alone_and_views_are_fine() -> None:
    base = _logits(7, 5)
    before = base.clone()
    view = base.t().expand(3, 5, 7)[..., ::2]
    torch.testing.assert_close(soft_topk(view, 2, 1.0), soft_topk(view.contiguous(), 2, 1.0))
    assert torch.equal(base, before)
    with torch.inference_mode():
        assert torch.equal(soft_topk(base, 2, 1.0), soft_topk(before, 2, 1.0))


def test_autocast_changes_nothing() -> None:
    logits = _logits(7, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(soft_topk(logits, 2, 1.0), soft_topk(logits.clone(), 2, 1.0))
        assert soft_topk(logits, 2, 1.0).dtype == torch.float32


def test_a_traced_program_computes_the_same_in_one_graph() -> None:
    traced = torch.compile(soft_topk, fullgraph=True, backend="aot_eager")
    logits = torch.stack([_logits(5), torch.tensor([INF, 0.3, -INF, 1.0, -0.4]), torch.tensor([INF] * 3 + [-INF] * 2)])
    results = []
    for run in (soft_topk, traced):
        inputs = [logits.clone(), torch.tensor([1.5, 2.0, 3.0]), torch.tensor(0.7)]
        for value in inputs:
            value.requires_grad_()
        weights = run(*inputs)
        results.append([weights, *torch.autograd.grad((weights * _logits(3, 5)).sum(), inputs)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)
    unchecked = traced(logits, torch.tensor([9.0, 2.0, 3.0]).requires_grad_(), inputs[2])
    torch.testing.assert_close(unchecked[1:], results[0][0][1:])


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("logits", "k", "alpha", "error", "says"),
    [
        ([0.0], 1, 1.0, TypeError, r"logits=\[0.0\]: expected a tensor, got list"),
        (torch.zeros(3, dtype=torch.int64), 1, 1.0, TypeError, "logits have dtype torch.int64: expected a floating"),
        (torch.tensor(1.0), 1, 1.0, ValueError, r"logits have shape \(\): the last dimension must hold a variable"),
        (torch.zeros(2, 0), 0, 1.0, ValueError, r"logits have shape \(2, 0\)"),
        (torch.zeros(5), True, 1.0, TypeError, "k=True: expected a number, got a bool"),
        (torch.zeros(5), "2", "hot", TypeError, "alpha='hot': expected a number, got str"),
        (torch.zeros(5), None, 1.0, TypeError, "k=None: expected a number, got NoneType"),
        (torch.zeros(5), torch.tensor(True), 1.0, TypeError, "k has dtype torch.bool: expected real numbers"),
        (torch.zeros(5), 2, torch.tensor(1j), TypeError, "alpha has dtype torch.complex64: expected real numbers"),
        (torch.zeros(4, 5), torch.ones(3), 1.0, ValueError, r"k has shape \(3,\): it must broadcast to .* \(4,\)"),
        (torch.zeros(5), 2, torch.ones(2), ValueError, r"alpha has shape \(2,\): it must broadcast to .* \(\)"),
        (torch.zeros(5), -0.1, 1.0, ValueError, "k=-0.1.* in the only row: .* here 0 and 5"),
        (torch.zeros(2, 5), 5.1, 1.0, ValueError, "k=5.0999.* in rows 0, 1: k must lie between .* here 0 and 5"),
        (torch.zeros(3, 5), torch.tensor([0.0, 6.0, 5.0]), 1.0, ValueError, "k=6.0 in row 1: "),
        (torch.zeros(5), float("nan"), 1.0, ValueError, "k=nan in the only row"),
        (torch.zeros(5), 2, 0.0, ValueError, "alpha=0.0 in the only row: the temperature must be positive"),
        (torch.zeros(5), 2, 1e-50, ValueError, "alpha=0.0 .* positive and finite in torch.float32"),
        (torch.zeros(3, 5), 2, torch.tensor([1.0, -1.0, INF]), ValueError, "alpha=-1.0 in rows 1, 2"),
        (torch.tensor([[0.0, 1.0], [0.0, float("nan")]]), 1, 1.0, ValueError, "logits hold NaN in row 1"),
        (torch.tensor([[0.0, 1.0], [INF, INF]]), 1, 1.0, ValueError, "k=1.0 in row 1: .* here 2 and 2"),
        (torch.tensor([[0.0, -INF, INF]]), 2.5, 1.0, ValueError, "k=2.5 in row 0: .* here 1 and 2"),
    ],
)
def test_bad_arguments(logits: Any, k: Any, alpha: Any, error: type[Exception], says: str) -> None:
    if k == "2":
        k = 2
    with pytest.raises(error, match=says):
        soft_topk(logits, k, alpha)


# ---------------------------------------------------------------------------------------------- allocations


@pytest.mark.parametrize("maximum", [None, 8.0])
def test_an_allocation_starts_even_and_keeps_the_total_and_the_limits(maximum: float | None) -> None:
    allocation = LayerAllocation(5, 13, maximum=maximum)
    torch.testing.assert_close(allocation(), torch.full((5,), 2.6))
    for seed in range(20):
        with torch.no_grad():
            allocation.eta.copy_(_logits(5, seed=seed, scale=10.0))
        k = allocation().detach()
        assert float(k.sum()) == pytest.approx(13, rel=1e-5)
        assert float(k.min()) >= 1
        assert maximum is None or float(k.max()) <= maximum
        assert bool((k[allocation.eta.argsort()].diff() >= 0).all())


def test_an_allocation_is_the_softmax_of_soft_moe() -> None:
    allocation = LayerAllocation(4, 10.0, minimum=0.5, dtype=torch.float64)
    with torch.no_grad():
        allocation.eta.copy_(_logits(4))
    torch.testing.assert_close(allocation(), allocation.eta.softmax(0) * 8 + 0.5)
    capped = LayerAllocation(4, 10.0, minimum=0.5, maximum=4.0, dtype=torch.float64)
    capped.load_state_dict(allocation.state_dict())
    torch.testing.assert_close(capped(), soft_topk(capped.eta, 8 / 3.5, 1.0) * 3.5 + 0.5)
    assert torch.autograd.gradcheck(lambda eta: torch.func.functional_call(capped, {"eta": eta}, ()), (capped.eta,))


@pytest.mark.parametrize(("total", "each"), [(3, 1.0), (24, 8.0)])
def test_an_allocation_without_room_gives_every_layer_its_limit(total: float, each: float) -> None:
    allocation = LayerAllocation(3, total, maximum=8)
    with torch.no_grad():
        allocation.eta.copy_(_logits(3))
    assert allocation().tolist() == [each] * 3
    allocation().sum().backward()
    assert allocation.eta.grad is not None
    assert bool(allocation.eta.grad.isfinite().all())


def test_limits_hold_in_spite_of_rounding() -> None:
    for tenths in range(1, 60):
        allocation = LayerAllocation(3, 2 * 8 + tenths / 10, minimum=tenths / 10, maximum=8)
        with torch.no_grad():
            allocation.eta.copy_(torch.tensor([1e3, 1e3, -1e3]))
        k = allocation().detach()
        assert float(k.max()) <= 8
        assert float(k.min()) >= float(torch.tensor(tenths / 10))


def test_an_allocation_is_an_ordinary_module() -> None:
    allocation = LayerAllocation(3, 7.5, dtype=torch.bfloat16)
    assert [name for name, _ in allocation.named_parameters()] == ["eta"]
    assert allocation.eta.dtype == torch.bfloat16
    assert allocation().dtype == torch.float32
    with torch.no_grad():
        allocation.eta.fill_(1.0)
    twin = copy.deepcopy(allocation)
    twin.reset_parameters()
    assert twin.eta.tolist() == [0.0] * 3
    assert allocation.eta.tolist() == [1.0] * 3
    assert repr(allocation) == "LayerAllocation(layers=3, total=7.5, minimum=1.0, maximum=None)"
    assert LayerAllocation(3, 7.5, device="meta").eta.is_meta


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((0, 5), ValueError, "layers=0: must be at least 1"),
        ((2.5, 5), TypeError, "layers=2.5: expected an integer"),
        ((2, "many"), TypeError, "total='many': expected a number, got str"),
        ((2, 5, True), TypeError, "minimum=True: expected a number, got a bool"),
        ((2, 5, 1, "all"), TypeError, "maximum='all': expected a number"),
        ((2, 5, -1), ValueError, "minimum=-1.0: must be at least 0, and finite"),
        ((2, 5, INF), ValueError, "minimum=inf: must be at least 0, and finite"),
        ((2, 1.5), ValueError, "total=1.5: 2 layers of at least minimum=1.0 need 2.0 or more"),
        ((2, INF), ValueError, "total=inf: .* finite"),
        ((2, float("nan")), ValueError, "total=nan"),
        ((2, 3, 1, 1), ValueError, "maximum=1.0: must be greater than minimum=1.0"),
        ((2, 3, 1, INF), ValueError, "maximum=inf: .* or None"),
        ((2, 17, 1, 8), ValueError, "total=17.0: 2 layers of at most maximum=8.0 add up to 16.0; lower the total"),
    ],
)
def test_allocations_that_cannot_be(arguments: tuple[Any, ...], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        LayerAllocation(*arguments)
