"""Auxiliary losses against their closed forms, gradients included, and at the edges."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import circuitroute as cr
from circuitroute.routing import losses
from tests.truth import world_truth

INF = float("inf")
T, E = 12, 6
LOSSES: dict[str, Callable[[cr.Routing], Tensor]] = {
    "load balance": losses.load_balance,
    "stock load balance": lambda routing: losses.load_balance(routing, "softmax"),
    "z loss": losses.z_loss,
    "expected count": losses.expected_count,
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)

CASES: dict[str, tuple[cr.Constraint, Callable[[Any], bool]]] = {
    "exactly": (cr.Exactly(2), lambda z: z.sum() == 2),
    "between": (cr.Between(1, 4), lambda z: 1 <= z.sum() <= 4),
    "atmost": (cr.AtMost(2), lambda z: z.sum() <= 2),
    "over": (cr.Exactly(1).over([0, 2, 5]), lambda z: z[[0, 2, 5]].sum() == 1),
}
every_case = pytest.mark.parametrize(("constraint", "accept"), CASES.values(), ids=CASES)


def _logits(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def _routed(logits: Tensor, constraint: cr.Constraint, **options: Any) -> cr.Routing:
    return cr.route(
        logits, cr.compile(constraint, logits.shape[-1]), key=cr.random_key(0, torch.arange(len(logits))), **options
    )


# ---------------------------------------------------------------------------------------------- load balance


@every_case
def test_load_balance_is_executed_share_times_marginal_share(
    constraint: cr.Constraint, accept: Callable[[Any], bool]
) -> None:
    logits = _logits(T, E)
    routing = _routed(logits, constraint)
    truth = world_truth(logits, accept)
    f = routing.mask.sum(0).numpy() / max(1, int(routing.mask.sum()))
    mass = truth.marginals.sum(0)
    expected = E * (f * mass / mass.sum()).sum()
    loss = losses.load_balance(routing)
    assert loss.shape == ()
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-10)
    # d loss / d m_te = E (f_e - sum_e f P) / M, and dm/dtheta = Cov(z).
    upstream = E * (f - (f * mass).sum() / mass.sum()) / mass.sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    np.testing.assert_allclose(gradient, truth.covariance @ upstream, rtol=1e-8, atol=1e-12)


def test_the_stock_form_is_the_switch_transformers_loss() -> None:
    """Fedus et al. 2021, eq. 4 to 6, for one expert per token: N sum f_i P_i with means over tokens."""
    logits = _logits(T, E)
    routing = _routed(logits, cr.Exactly(1))
    probabilities = torch.softmax(logits, -1)
    expected = E * (routing.mask.double().mean(0) * probabilities.mean(0)).sum()
    loss = losses.load_balance(routing, "softmax")
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad(expected, logits)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], wanted, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("probabilities", ["marginal", "softmax"])
def test_load_balance_is_one_when_balanced_and_grows_to_the_number_of_experts(probabilities: Any) -> None:
    balanced = torch.eye(E).repeat(2, 1)
    circuit = cr.compile(cr.Exactly(1), E)
    even = cr.route(torch.zeros(2 * E, E), circuit, replay=balanced)
    torch.testing.assert_close(losses.load_balance(even, probabilities), torch.tensor(1.0))
    collapsed = torch.zeros(2 * E, E)
    collapsed[:, 2] = 40.0
    one = cr.route(collapsed, circuit, training=False)
    torch.testing.assert_close(losses.load_balance(one, probabilities), torch.tensor(float(E)))


@pytest.mark.parametrize("probabilities", ["marginal", "softmax"])
def test_following_the_load_balance_gradient_balances_the_load(probabilities: Any) -> None:
    bias = torch.tensor([2.0, 1.0, 0.0, 0.0, 0.0, -1.0], requires_grad=True)
    noise = torch.randn(400, E, generator=torch.Generator().manual_seed(0))
    for step in range(60):
        routing = cr.route(noise + bias, cr.compile(cr.Exactly(2), E), key=cr.random_key(step, torch.arange(400)))
        loss = losses.load_balance(routing, probabilities)
        if step == 0:
            assert loss > 1.2
        (gradient,) = torch.autograd.grad(loss, bias)
        bias = (bias - 2.0 * gradient).detach().requires_grad_()
    assert loss < 1.01


def test_unknown_probabilities_are_refused() -> None:
    with pytest.raises(ValueError, match="probabilities='router': choose one of"):
        losses.load_balance(_routed(_logits(T, E), cr.Exactly(2)), "router")  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------- z loss


def test_z_loss_is_the_mean_squared_log_sum_of_the_logits() -> None:
    logits = _logits(T, E)
    loss = losses.z_loss(_routed(logits, cr.Exactly(2)))
    log_sum = torch.logsumexp(logits, -1)
    torch.testing.assert_close(loss, log_sum.square().mean(), rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(loss, logits)
    expected = 2 / T * log_sum[:, None] * torch.softmax(logits, -1)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-14)


def test_z_loss_is_over_finite_logits() -> None:
    finite = _logits(4, E)
    logits = finite.detach().clone()
    logits[0, 1], logits[1, 2] = -INF, INF
    logits[2] = torch.tensor([INF, INF, -INF, -INF, -INF, -INF])
    logits.requires_grad_()
    loss = losses.z_loss(_routed(logits, cr.Exactly(2)))
    kept = [finite[0, [0, 2, 3, 4, 5]], finite[1, [0, 1, 3, 4, 5]], finite[3]]
    # A row that is all evidence has nothing to keep small, but counts as a token.
    expected = torch.stack([torch.logsumexp(row, -1).square() for row in kept]).sum() / 4
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert bool((gradient[torch.isinf(logits)] == 0).all())
    wanted = torch.autograd.grad(expected, finite)[0]
    torch.testing.assert_close(gradient, torch.where(torch.isinf(logits), 0.0, wanted), rtol=1e-10, atol=1e-14)


# ---------------------------------------------------------------------------------------------- expected count


@every_case
def test_expected_count_is_the_mean_sum_of_the_marginals(
    constraint: cr.Constraint, accept: Callable[[Any], bool]
) -> None:
    logits = _logits(T, E)
    truth = world_truth(logits, accept)
    loss = losses.expected_count(_routed(logits, constraint))
    np.testing.assert_allclose(loss.item(), (truth.count_probs @ np.arange(E + 1)).mean(), rtol=1e-10)
    (gradient,) = torch.autograd.grad(loss, logits)
    np.testing.assert_allclose(gradient, truth.covariance.sum(-1) / T, rtol=1e-8, atol=1e-12)


def test_expected_count_depends_on_the_logits_not_on_the_sample() -> None:
    logits, circuit = _logits(T, E), cr.compile(cr.Between(1, 4), E)
    values = {losses.expected_count(cr.route(logits, circuit, key=key)).item() for key in range(5)}
    assert len(values) == 1


# ---------------------------------------------------------------------------------------------- edges


@every_loss
@pytest.mark.parametrize("constraint", [cr.Exactly(2), cr.Exactly(2).over([0, 1, 2])], ids=str)
def test_no_tokens_give_zero(loss: Callable[[cr.Routing], Tensor], constraint: cr.Constraint) -> None:
    logits = _logits(0, E)
    value = loss(_routed(logits, constraint))
    assert value.shape == ()
    assert value.item() == 0
    assert torch.autograd.grad(value, logits)[0].shape == (0, E)


@every_loss
def test_no_experts_give_a_finite_loss_and_gradient(loss: Callable[[cr.Routing], Tensor]) -> None:
    logits = _logits(T, E)
    for constraint, replay in ((cr.Exactly(0), None), (cr.AtMost(2), torch.zeros(T, E))):
        routing = _routed(logits, constraint, replay=replay)
        value = loss(routing)
        assert bool(torch.isfinite(value))
        (gradient,) = torch.autograd.grad(value, logits)
        assert bool(torch.isfinite(gradient).all())
        if loss is losses.load_balance:
            assert value.item() == 0


@pytest.mark.parametrize("level", [-40.0, -80.0, -100.0, -1e4])
def test_load_balance_has_a_finite_gradient_when_every_expert_dies_out(level: float) -> None:
    logits = torch.full((T, 256), level, requires_grad=True)
    replay = torch.zeros(T, 256)
    replay[:, 3] = 1
    loss = losses.load_balance(_routed(logits, cr.AtMost(2), replay=replay))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert bool(torch.isfinite(gradient).all())


@every_loss
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_losses_are_float32_for_low_precision_logits(loss: Callable[[cr.Routing], Tensor], dtype: torch.dtype) -> None:
    logits = _logits(T, E).detach().to(dtype).requires_grad_()
    value = loss(_routed(logits, cr.Between(1, 3)))
    assert value.dtype == torch.float32
    assert torch.autograd.grad(value, logits)[0].dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(_routed(logits, cr.Between(1, 3))), value)


@every_loss
@pytest.mark.parametrize("scale", [1e4, 1e8])
def test_extreme_logits_give_finite_gradients(loss: Callable[[cr.Routing], Tensor], scale: float) -> None:
    logits = (_logits(T, E).detach().float() * scale).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(_routed(logits, cr.Between(1, 3))), logits)
    assert bool(torch.isfinite(gradient).all())


@every_loss
def test_losses_do_not_depend_on_the_order_of_tokens(loss: Callable[[cr.Routing], Tensor]) -> None:
    logits, key = _logits(T, E), cr.random_key(0, torch.arange(T))
    circuit, order = cr.compile(cr.Between(1, 3), E), torch.arange(T).flip(0)
    forward, backward = cr.route(logits, circuit, key=key), cr.route(logits[order], circuit, key=key[order])
    torch.testing.assert_close(loss(forward), loss(backward), rtol=1e-12, atol=1e-12)


def test_the_softmax_form_is_finite_with_forced_and_forbidden_experts() -> None:
    logits = torch.tensor([[math.inf, 0.0, -math.inf, 1.0], [0.0, 1.0, 2.0, 3.0]], requires_grad=True)
    routing = cr.route(logits, cr.compile(cr.Exactly(2), 4), key=cr.random_key(0, torch.arange(2)))
    loss = cr.losses.load_balance(routing, probabilities="softmax")
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite()
    assert grad.isfinite().all()
