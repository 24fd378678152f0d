"""LapSum's soft top-k: sums, limits, gradients in all three arguments."""

from __future__ import annotations

import pytest
import torch

from benchmarks.lapsum import laplace_cdf, soft_topk


def _logits(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype) * scale


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0, 1e4])
@pytest.mark.parametrize(("n", "k"), [(64, 8), (5, 2), (7, 6.5), (64, 0.3), (64, 63.9), (2, 1)])
def test_weights_sum_to_k(n: int, k: float, scale: float) -> None:
    logits = _logits(300, n, scale=scale)
    logits[::3] = logits[::3].round()  # ties
    weights = soft_topk(logits, k, 1.0)
    assert ((weights >= 0) & (weights <= 1)).all()
    torch.testing.assert_close(weights.sum(-1), torch.full((300,), float(k)), atol=1e-5, rtol=0)


def test_weights_are_laplace_probabilities_of_shifted_logits() -> None:
    logits = _logits(50, 9, dtype=torch.float64)
    weights = soft_topk(logits, 3, 0.7)
    reference = torch.distributions.Laplace(0.0, 1.0)
    shift = logits / 0.7 - reference.icdf(weights)
    torch.testing.assert_close(shift, shift[:, :1].expand_as(shift), atol=1e-9, rtol=0)
    torch.testing.assert_close(laplace_cdf(logits), reference.cdf(logits))


def test_cold_weights_are_the_mask_of_the_largest() -> None:
    logits = _logits(20, 10)
    mask = torch.zeros_like(logits).scatter(-1, logits.topk(4).indices, 1.0)
    torch.testing.assert_close(soft_topk(logits, 4, 1e-6), mask)


def test_equal_logits_share_k() -> None:
    torch.testing.assert_close(soft_topk(torch.zeros(3, 6), 2, 1.0), torch.full((3, 6), 1 / 3))


def test_gradients_in_logits_k_and_alpha() -> None:
    logits = _logits(6, 9, dtype=torch.float64).requires_grad_()
    k = torch.tensor([1.0, 2.0, 3.5, 0.2, 8.7, 4.0], dtype=torch.float64, requires_grad=True)
    alpha = torch.tensor([0.3, 0.5, 0.8, 1.0, 1.5, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(soft_topk, (logits, k, alpha))


def test_numbers_and_leading_dimensions_broadcast() -> None:
    logits, k = _logits(2, 3, 5), torch.tensor([1.0, 2.0, 3.0])
    weights = soft_topk(logits, k, 0.5)
    torch.testing.assert_close(weights[1, 2], soft_topk(logits[1, 2], 3, 0.5))


def test_wide_gaps_keep_gradients_finite() -> None:
    """Every density underflows: nothing moves with the logits, and k moves somebody all the same."""
    logits = torch.tensor([[1e4, 1e4, 0.0, -1e4]], requires_grad=True)
    k = torch.tensor(2.0, requires_grad=True)
    weights = soft_topk(logits, k, 0.1)
    to_logits, to_k = torch.autograd.grad(weights, (logits, k), torch.ones_like(weights))
    assert torch.equal(weights.detach(), torch.tensor([[1.0, 1.0, 0.0, 0.0]]))
    assert torch.equal(to_logits, torch.zeros(1, 4))
    assert to_k == pytest.approx(1.0)


def test_a_second_derivative_is_refused() -> None:
    logits = _logits(2, 5).requires_grad_()
    (gradient,) = torch.autograd.grad(soft_topk(logits, 2, 1.0).square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("k", "alpha", "message"),
    [(0, 1.0, "k must be"), (5, 1.0, "k must be strictly between 0 and 5, got 5"), (2, 0.0, "alpha must be positive")],
)
def test_bad_arguments(k: float, alpha: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        soft_topk(torch.zeros(5), k, alpha)
    with pytest.raises(ValueError, match=message.split(",")[0]):
        soft_topk(torch.zeros(3, 5), torch.tensor([1.0, 2.0, k]), torch.tensor(alpha))
