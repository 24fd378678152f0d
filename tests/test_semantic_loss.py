"""Semantic loss against its definition: the coins' probability of every world, summed over those that are allowed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import circuitroute as cr
from tests.truth import enumerate_worlds

# torch's own, when it takes derivatives in forward mode for the first time.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")

INF, NAN = math.inf, math.nan
N, T = 7, 24
CONSTRAINTS: dict[str, cr.Constraint] = {
    "exactly": cr.Exactly(3),
    "all": cr.Exactly(7),
    "at most": cr.AtMost(2),
    "between": cr.Between(1, 4),
    "far apart": cr.CountIn([0, 6]),
    "composed": cr.Exactly(1).over([0, 2, 3]) & cr.AtMost(3),
    "logic": cr.Logic("x0 >> x1") & cr.Logic("x2 | x3 | ~x4"),
    "negated": ~cr.Exactly(3),
    "anything": cr.AtMost(7),
}
every_constraint = pytest.mark.parametrize("constraint", CONSTRAINTS.values(), ids=CONSTRAINTS)
SCALES = (0.1, 1.0, 10.0, 100.0, 1e4)


def coin_scores(logits: Any) -> Any:
    """[T, W] log-probability of every world under coins, in long double; 0 for what a certain coin agrees with."""
    theta = np.asarray(logits, dtype=np.longdouble)[:, None, :]
    worlds = enumerate_worlds(theta.shape[-1])
    signed = np.where(worlds, theta, -theta)
    with np.errstate(over="ignore"):
        each = np.where(signed > 0, -np.log1p(np.exp(-np.abs(signed))), signed - np.log1p(np.exp(-np.abs(signed))))
    return np.where(signed == np.inf, 0, each).sum(-1)


def log_sum(scores: Any) -> Any:
    """log of the sum over worlds."""
    top = scores.max(-1, keepdims=True)
    return (top + np.log(np.exp(scores - np.where(np.isfinite(top), top, 0)).sum(-1, keepdims=True)))[..., 0]


def truth(circuit: cr.Circuit, logits: Tensor) -> Any:
    """[T] -log P(constraint)."""
    allowed = circuit.satisfies(torch.from_numpy(enumerate_worlds(circuit.n))).numpy()
    scores = coin_scores(logits.detach().double().numpy())
    if allowed.all():
        return np.zeros(len(scores))
    return -np.minimum(log_sum(np.where(allowed, scores, -np.inf)), 0)


def engines_of(circuit: cr.Circuit) -> list[str]:
    return ["naive", "torch", "numba"] if circuit.op == "subset" else ["naive", "torch"]


def rows(scale: float, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(T, N, generator=generator, dtype=torch.float64) * scale).to(dtype)


@every_constraint
@pytest.mark.parametrize("scale", SCALES)
def test_the_value_is_that_of_the_definition(constraint: cr.Constraint, scale: float) -> None:
    circuit = cr.compile(constraint, N)
    for dtype, bound in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        logits = rows(scale, dtype)
        expected = truth(circuit, logits)
        for engine in engines_of(circuit):
            loss = cr.losses.semantic_loss(circuit.with_engine(engine)(logits))
            assert loss.dtype == dtype
            assert loss.shape == (T,)
            assert bool((loss >= 0).all())
            np.testing.assert_allclose(loss, expected, rtol=bound, atol=bound)


@every_constraint
@pytest.mark.parametrize("level", [-800.0, -40.0, 40.0, 800.0])
def test_an_offset_of_all_logits_costs_nothing(constraint: cr.Constraint, level: float) -> None:
    circuit = cr.compile(constraint, N)
    logits = rows(1.0) + level
    for engine in engines_of(circuit):
        loss = cr.losses.semantic_loss(circuit.with_engine(engine)(logits))
        np.testing.assert_allclose(loss, truth(circuit, logits), rtol=1e-12, atol=1e-13)


@every_constraint
def test_the_gradient_is_the_coins_less_the_marginals(constraint: cr.Constraint) -> None:
    circuit = cr.compile(constraint, N)
    for scale in (1.0, 30.0):
        logits = rows(scale).requires_grad_()
        distribution = circuit(logits)
        (gradient,) = torch.autograd.grad(cr.losses.semantic_loss(distribution).sum(), logits)
        expected = torch.sigmoid(logits) - distribution.marginals
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["exactly", "composed"])
def test_gradients_of_both_orders(name: str) -> None:
    circuit = cr.compile(CONSTRAINTS[name], N)
    logits = rows(1.0)[:2].requires_grad_()
    loss = lambda x: cr.losses.semantic_loss(circuit(x))  # noqa: E731
    assert torch.autograd.gradcheck(loss, logits)
    assert torch.autograd.gradgradcheck(loss, logits)
    hessian = torch.func.hessian(lambda x: loss(x))(logits[0].detach())
    coins = torch.sigmoid(logits[0].detach())
    expected = torch.diag(coins * (1 - coins)) - circuit(logits[0].detach()).covariance_matrix
    torch.testing.assert_close(hessian, expected, rtol=1e-9, atol=1e-12)


def test_where_coins_are_as_good_as_certain_it_is_exactly_zero() -> None:
    for scale in (1e4, 1e8, 1e30):
        for dtype in (torch.float32, torch.float64):
            circuit = cr.compile(cr.Exactly(3), N)
            logits = torch.tensor([1.0, -1.1, 1.2, -1.3, 1.4, -1.5, -1.6], dtype=dtype) * scale
            for engine in engines_of(circuit):
                assert cr.losses.semantic_loss(circuit.with_engine(engine)(logits)).item() == 0


@every_constraint
def test_infinite_logits_are_certain_coins(constraint: cr.Constraint) -> None:
    circuit = cr.compile(constraint, N)
    allowed = circuit.satisfies(torch.from_numpy(enumerate_worlds(N)))
    worlds = torch.from_numpy(enumerate_worlds(N))[allowed]
    generator = torch.Generator().manual_seed(1)
    world = worlds[torch.randint(len(worlds), (T,), generator=generator)]
    known = torch.rand(T, N, generator=generator) < 0.5
    logits = torch.where(known, torch.where(world, INF, -INF), rows(3.0)).requires_grad_()
    for engine in engines_of(circuit):
        loss = cr.losses.semantic_loss(circuit.with_engine(engine)(logits))
        np.testing.assert_allclose(loss.detach(), truth(circuit, logits), rtol=1e-12, atol=1e-12)
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert bool((gradient[known] == 0).all())
        # As good as infinite is the same.
        near = torch.where(known, torch.where(world, 1e5, -1e5), logits.detach())
        torch.testing.assert_close(cr.losses.semantic_loss(circuit(near)), loss.detach(), rtol=1e-9, atol=1e-9)
    decided = torch.where(world, INF, -INF)
    assert bool((cr.losses.semantic_loss(circuit(decided)) == 0).all())


@pytest.mark.parametrize("name", ["exactly", "composed"])
def test_evidence_against_the_constraint_is_refused_or_infinite_and_nan_stays_in_its_row(name: str) -> None:
    circuit = cr.compile(CONSTRAINTS[name], N)
    logits = rows(1.0)[:4].clone()
    logits[1], logits[2, 3] = INF, NAN
    with pytest.raises(ValueError, match="NaN in row 2"):
        circuit(logits)
    with pytest.raises(ValueError, match=r"no subset.*row 1\b"):
        circuit(logits[:2])
    for engine in engines_of(circuit):
        given = logits.clone().requires_grad_()
        loss = cr.losses.semantic_loss(circuit.with_engine(engine)(given, validate_args=False))
        assert loss[1] == INF
        assert bool(loss[2].isnan())
        np.testing.assert_allclose(loss[[0, 3]].detach(), truth(circuit, logits[[0, 3]]), rtol=1e-12)
        (gradient,) = torch.autograd.grad(loss[[0, 3]].sum(), given)
        assert bool(gradient[[0, 3]].isfinite().all())


@pytest.mark.parametrize("name", ["exactly", "composed"])
def test_one_value_per_row_of_any_batch(name: str) -> None:
    circuit = cr.compile(CONSTRAINTS[name], N)
    logits = rows(1.0)
    all_rows = cr.losses.semantic_loss(circuit(logits))
    assert cr.losses.semantic_loss(circuit(logits[0])).shape == ()
    assert cr.losses.semantic_loss(circuit(logits[:0])).shape == (0,)
    folded = cr.losses.semantic_loss(circuit(logits.reshape(2, 3, 4, N)))
    torch.testing.assert_close(folded, all_rows.reshape(2, 3, 4), rtol=0, atol=0)
    torch.testing.assert_close(cr.losses.semantic_loss(circuit(logits).expand((2, T))), all_rows.expand(2, T))
    torch.testing.assert_close(
        cr.losses.semantic_loss(circuit(logits).tempered(0.5)), cr.losses.semantic_loss(circuit(logits * 2))
    )


def test_one_variable() -> None:
    logits = torch.tensor([[-2.0], [3.0]], dtype=torch.float64)
    one, none, either = (cr.compile(rule, 1) for rule in (cr.Exactly(1), cr.Exactly(0), cr.AtMost(1)))
    torch.testing.assert_close(cr.losses.semantic_loss(one(logits)), -torch.nn.functional.logsigmoid(logits[:, 0]))
    torch.testing.assert_close(cr.losses.semantic_loss(none(logits)), -torch.nn.functional.logsigmoid(-logits[:, 0]))
    torch.testing.assert_close(cr.losses.semantic_loss(either(logits)), torch.zeros(2).double(), rtol=0, atol=1e-15)


def test_low_precision_is_float32_inside_autocast_or_not() -> None:
    circuit = cr.compile(cr.Exactly(3), N)
    logits = rows(1.0, torch.bfloat16).requires_grad_()
    loss = cr.losses.semantic_loss(circuit(logits))
    assert loss.dtype == torch.float32
    assert torch.autograd.grad(loss.sum(), logits)[0].dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cr.losses.semantic_loss(circuit(logits)), loss)


def test_transformed_and_traced_it_is_the_same() -> None:
    for name in ("between", "composed"):
        circuit = cr.compile(CONSTRAINTS[name], N)
        logits = rows(2.0, torch.float32)
        loss = lambda x, circuit=circuit: cr.losses.semantic_loss(circuit(x))  # noqa: E731
        expected = loss(logits)
        torch.testing.assert_close(torch.func.vmap(loss)(logits), expected)
        torch.testing.assert_close(torch.compile(loss, backend="eager", fullgraph=True)(logits), expected)
        direction = rows(1.0, torch.float32, seed=2)
        leaf = logits.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf).sum(), leaf)
        _, tangent = torch.func.jvp(loss, (logits,), (direction,))
        torch.testing.assert_close(tangent, (gradient * direction).sum(-1), rtol=1e-4, atol=1e-5)


def test_following_it_teaches_a_network_the_constraint() -> None:
    circuit = cr.compile(cr.Exactly(2), 5)
    logits = torch.zeros(5, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=5.0)
    start = torch.tensor([0.3, 0.2, 0.1, 0.0, -0.1])
    for _ in range(400):
        optimizer.zero_grad()
        loss = cr.losses.semantic_loss(circuit(logits + start))
        loss.backward()
        optimizer.step()
    assert loss < 0.02
    assert bool(circuit.satisfies(logits + start > 0))


def test_what_it_is_not_of_is_refused() -> None:
    circuit = cr.compile(cr.Between(1, 3), N)
    with pytest.raises(ValueError, match=r"distribution has a count potential.*circuit\(logits\)"):
        cr.losses.semantic_loss(circuit(rows(1.0), torch.zeros(4)))
    with pytest.raises(TypeError, match=r"(?s)distribution=tensor.*expected a cr.SubsetDistribution"):
        cr.losses.semantic_loss(rows(1.0)[0])  # type: ignore[arg-type]
    mixture = cr.nn.ConstraintLayer(circuit, components=T)(rows(1.0))
    with pytest.raises(TypeError, match="give its component_distribution"):
        cr.losses.semantic_loss(mixture)
    assert cr.losses.semantic_loss(mixture.component_distribution).shape == (T,)
