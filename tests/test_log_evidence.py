"""The log-probability of evidence, against the sum over all worlds that agree with it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import circuitroute as cr
from tests.truth import enumerate_worlds, world_truth

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")

INF, NAN = math.inf, math.nan
N, T = 6, 32
WORLDS = torch.from_numpy(enumerate_worlds(N))
CONSTRAINTS: dict[str, cr.Constraint] = {
    "exactly": cr.Exactly(3),
    "at most": cr.AtMost(2),
    "far apart": cr.CountIn([0, 5]),
    "composed": cr.Exactly(1).over([0, 2, 3]) & cr.AtMost(3),
    "logic": cr.Logic("x0 >> x1") & cr.Logic("x2 | x3 | ~x4"),
}
every_constraint = pytest.mark.parametrize("constraint", CONSTRAINTS.values(), ids=CONSTRAINTS)
both = pytest.mark.parametrize("name", ["exactly", "composed"])


def rows(scale: float = 1.0, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(T, N, generator=generator, dtype=torch.float64) * scale).to(dtype)


def evidence(seed: int = 0, share: float = 0.4) -> tuple[Tensor, Tensor]:
    """Masks [T, N] of what any world, allowed or not, has and has not."""
    generator = torch.Generator().manual_seed(seed)
    world = WORLDS[torch.randint(len(WORLDS), (T,), generator=generator)]
    known = torch.rand(T, N, generator=generator) < share
    known[0], known[1] = False, True
    return world & known, ~world & known


def agreeing(include: Tensor, exclude: Tensor) -> Any:
    """[T, W] bool, the worlds that agree with each row's evidence."""
    return ((WORLDS | ~include[:, None]) & (~WORLDS | ~exclude[:, None])).all(-1).numpy()


def truth(circuit: cr.Circuit, logits: Tensor, include: Tensor, exclude: Tensor, phi: Any = None) -> Any:
    log_probs = world_truth(logits.detach(), circuit.satisfies(WORLDS).numpy(), phi).log_probs.astype(np.longdouble)
    scores = np.where(agreeing(include, exclude), log_probs, -np.inf)
    top = scores.max(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        return (top + np.log(np.exp(scores - np.where(np.isfinite(top), top, 0)).sum(-1, keepdims=True)))[:, 0]


@every_constraint
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0, 1e4])
def test_it_is_the_sum_over_the_worlds_that_agree(constraint: cr.Constraint, scale: float) -> None:
    circuit = cr.compile(constraint, N)
    include, exclude = evidence()
    for dtype, bound in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        logits = rows(scale, dtype)
        expected = truth(circuit, logits, include, exclude)
        assert np.isinf(expected).any()
        for engine in ("naive", "torch"):
            found = circuit.with_engine(engine)(logits, validate_args=False).log_evidence(include, exclude)
            assert found.dtype == dtype
            assert bool((found <= 0).all())
            np.testing.assert_allclose(found, expected, rtol=bound, atol=bound)
            assert found[0] == 0


@every_constraint
def test_a_world_that_is_all_known_has_its_own_log_probability(constraint: cr.Constraint) -> None:
    circuit = cr.compile(constraint, N)
    worlds = WORLDS[circuit.satisfies(WORLDS)]
    logits = rows(3.0)[0]
    distribution = circuit(logits)
    found = distribution.log_evidence(include=worlds, exclude=~worlds)
    torch.testing.assert_close(found, distribution.log_prob(worlds), rtol=1e-12, atol=1e-12)
    assert distribution.log_evidence().item() == 0
    # Of two halves: P(x) + P(not x) = 1.
    halves = torch.stack([distribution.log_evidence(include=[2]), distribution.log_evidence(exclude=[2])])
    torch.testing.assert_close(halves.logsumexp(0), torch.zeros((), dtype=torch.float64), rtol=0, atol=1e-14)
    torch.testing.assert_close(halves[0].exp(), distribution.marginals[2], rtol=1e-12, atol=1e-13)


@both
def test_infinite_logits_are_evidence_already(name: str) -> None:
    circuit = cr.compile(CONSTRAINTS[name], N)
    logits = rows(2.0)
    logits[:, 0], logits[::2, 1] = INF, -INF
    include, exclude = evidence()
    expected = truth(circuit, logits, include, exclude)
    logits.requires_grad_()
    found = circuit(logits, validate_args=False).log_evidence(include, exclude)
    np.testing.assert_allclose(found.detach(), expected, rtol=1e-12, atol=1e-12)
    assert bool((found[exclude[:, 0]] == -INF).all())
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert bool(gradient.isfinite().all())
    assert bool((gradient[torch.isinf(logits)] == 0).all())
    assert bool((gradient[found == -INF] == 0).all())


def test_a_count_potential_is_part_of_the_distribution() -> None:
    circuit = cr.compile(cr.Between(1, 4), N)
    include, exclude = evidence()
    for phi in (torch.tensor([0.0, 2.0, -1.0, 0.5, 3.0]).double(), rows(2.0, seed=3)[:, :5]):
        given = np.full((T, N + 1), -np.inf)
        given[:, :5] = phi
        expected = truth(circuit, rows(), include, exclude, given)
        found = circuit(rows(), phi, validate_args=False).log_evidence(include, exclude)
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    forbidding = torch.tensor([-INF, -INF, -INF, 0.0, 0.0]).double()
    assert circuit(rows(), forbidding).log_evidence(exclude=[0, 1, 2, 3])[0] == -INF


@both
def test_gradients_of_both_orders(name: str) -> None:
    circuit = cr.compile(CONSTRAINTS[name], N)
    include = torch.tensor([[0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 1]]).bool()
    exclude = torch.tensor([[0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
    logits = rows(1.0)[:2].requires_grad_()
    found = lambda x: circuit(x).log_evidence(include, exclude)  # noqa: E731
    assert torch.autograd.gradcheck(found, logits)
    assert torch.autograd.gradgradcheck(found, logits)
    distribution = circuit(logits)
    (gradient,) = torch.autograd.grad(found(logits).sum(), logits)
    given = distribution.condition(include, exclude).marginals
    torch.testing.assert_close(gradient, given - distribution.marginals, rtol=1e-10, atol=1e-12)


@both
def test_masks_broadcast_and_indices_are_for_all_rows(name: str) -> None:
    circuit = cr.compile(CONSTRAINTS[name], N)
    distribution = circuit(rows())
    mask = torch.zeros(N).index_fill(0, torch.tensor([2]), 1.0)
    expected = distribution.log_evidence(include=[2], exclude=[1])
    torch.testing.assert_close(distribution.log_evidence(include=mask, exclude=[1]), expected)
    several = torch.stack([mask, mask.roll(1)])[:, None]
    found = distribution.log_evidence(include=several, exclude=[1])
    assert found.shape == (2, T)
    torch.testing.assert_close(found[0], expected)
    assert circuit(rows()[:0]).log_evidence(include=[0]).shape == (0,)
    assert circuit(rows()[0]).log_evidence(include=[0]).shape == ()
    folded = circuit(rows().reshape(2, T // 2, N)).log_evidence(include=[2], exclude=[1])
    torch.testing.assert_close(folded, expected.reshape(2, -1))


@both
def test_what_no_subset_agrees_with_is_refused_and_infinite_without_validation(name: str) -> None:
    circuit = cr.compile(CONSTRAINTS[name], N)
    include = torch.zeros(3, N, dtype=torch.bool)
    include[1] = True
    with pytest.raises(ValueError, match=r"include and exclude leave no subset.*row 1$"):
        circuit(rows()[:3]).log_evidence(include)
    found = circuit(rows()[:3], validate_args=False).log_evidence(include)
    assert found.tolist() == [0.0, -INF, 0.0]
    with pytest.raises(ValueError, match=r"share the variables \[2\]"):
        circuit(rows()).log_evidence(include=[2], exclude=[2, 3])
    with pytest.raises(ValueError, match="index 6"):
        circuit(rows()).log_evidence(include=[6])


@both
def test_nan_stays_in_its_row(name: str) -> None:
    circuit = cr.compile(CONSTRAINTS[name], N)
    logits = rows()[:3].clone()
    logits[1, 4] = NAN
    found = circuit(logits, validate_args=False).log_evidence(include=[2])
    assert found.isnan().tolist() == [False, True, False]
    assert bool(circuit(logits, validate_args=False).log_evidence(include=[4])[1].isnan())


def test_transformed_and_traced_it_is_the_same() -> None:
    circuit = cr.compile(CONSTRAINTS["composed"], N)
    include, exclude = evidence(seed=4, share=0.2)
    logits = rows(1.0, torch.float32)
    found = lambda x, a, b: circuit(x, validate_args=False).log_evidence(a, b)  # noqa: E731
    expected = found(logits, include, exclude)
    torch.testing.assert_close(torch.func.vmap(found)(logits, include, exclude), expected)
    torch.testing.assert_close(
        torch.compile(found, backend="eager", fullgraph=True)(logits, include, exclude), expected
    )
