"""Calling route: what is refused, and the surroundings that must not matter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import circuitroute as cr
from tests.routing_cases import (
    CASES,
    INF,
    NAN,
    Case,
    every_combine,
    every_estimator,
    gradient_of,
    keys_of,
    randn,
    some_cases,
)

# ---------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("name", ["exactly", "over"])
def test_rows_without_an_answer_are_named(name: str) -> None:
    case = CASES[name]
    logits = randn(5, case.n)
    logits[1, 2], logits[4, 0] = NAN, NAN
    with pytest.raises(ValueError, match=r"logits hold NaN in rows 1, 4$"):
        cr.route(logits, case.circuit)
    logits = randn(2, 3, case.n)
    logits[1, 1] = -INF
    with pytest.raises(ValueError, match=r"no subset that satisfies .* in row 4$"):
        cr.route(logits, case.circuit)


@some_cases
@every_combine
@every_estimator
def test_without_validation_rows_without_an_answer_are_nan_and_alone(case: Case, combine: Any, estimator: str) -> None:
    clean = randn(4, case.n)
    logits = clean.clone()
    logits[1, 2], logits[3] = NAN, INF  # all forced is too many for each of the constraints
    leaf, clean = logits.requires_grad_(), clean.requires_grad_()
    options: dict[str, Any] = {"combine": combine, "estimator": estimator}
    routing = cr.route(leaf, case.circuit, key=keys_of(4), validate_args=False, **options)
    expected = cr.route(clean, case.circuit, key=keys_of(4), **options)
    assert not routing.mask[[1, 3]].any()
    for values in (routing.gates, routing.log_prob, routing.marginals):
        assert bool(values[[1, 3]].isnan().all())
    for rows in ([0], [2]):
        assert torch.equal(routing.mask[rows], expected.mask[rows])
        assert torch.equal(routing.gates[rows], expected.gates[rows])
    upstream = randn(2, case.n, seed=1)
    (gradient,) = gradient_of(routing.gates[[0, 2]], upstream, leaf)
    (wanted,) = gradient_of(expected.gates[[0, 2]], upstream, clean)
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
    assert repr(cr.route(randn(4, 6), CASES["exactly"].circuit)) == "Routing(4 tokens, 6 experts, Exactly(3))"


# ---------------------------------------------------------------------------------------------- surroundings


@some_cases
@every_combine
def test_the_callers_tensors_are_left_alone(case: Case, combine: Any) -> None:
    logits, key = randn(6, case.n), keys_of(6)
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
    logits, key = randn(6, case.n), keys_of(6)
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
    logits = randn(6, 6).requires_grad_()
    with torch.no_grad():
        routing = cr.route(logits, CASES["exactly"].circuit)
    assert not routing.gates.requires_grad


@some_cases
@every_combine
def test_autocast_does_not_touch_the_routing(case: Case, combine: Any) -> None:
    results = []
    for enabled in (False, True):
        logits = randn(6, case.n).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            routing = cr.route(logits, case.circuit, combine=combine, key=keys_of(6))
            parts = (routing.gates, routing.log_prob, routing.marginals)
            assert all(x.dtype == torch.float32 for x in parts)
            loss = (parts[0] * randn(6, case.n, seed=1)).sum() + parts[1].sum() + parts[2].square().sum()
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
    key, weight = keys_of(16), randn(16, case.n, seed=1)

    def block(logits: Tensor) -> Tensor:
        routing = cr.route(logits * 1.5, case.circuit, combine="normalized", key=key)
        token, expert, gate = routing.ragged()
        return (gate * weight[token, expert]).sum().reshape(1)

    plain = randn(16, case.n).requires_grad_()
    (expected,) = torch.autograd.grad(block(plain).sum(), plain)
    saved = randn(16, case.n).requires_grad_()
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

    logits = randn(16, 6).requires_grad_()
    output = checkpoint(block, logits, use_reentrant=use_reentrant)
    torch.rand(3)
    output.sum().backward()
    assert len(masks) == 2
    assert torch.equal(*masks)


def test_routing_twice_backward_separately() -> None:
    """Gates and auxiliary terms of one decision may be differentiated one by one."""
    logits = randn(6, 6).requires_grad_()
    routing = cr.route(logits, CASES["exactly"].circuit, key=keys_of(6))
    parts = [routing.gates.square().sum(), routing.marginals.square().sum(), routing.log_prob.sum()]
    apart = sum(torch.autograd.grad(part, logits, retain_graph=True)[0] for part in parts)
    together = torch.autograd.grad(sum(parts), logits)[0]
    torch.testing.assert_close(apart, together)
