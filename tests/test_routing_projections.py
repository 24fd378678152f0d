"""The three projections of a routing, mask, padded slots and ragged pairs: one decision, one gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import circuitroute as cr
from tests.routing_cases import (
    CASES,
    Case,
    every_case,
    every_combine,
    gradient_of,
    keys_of,
    randn,
    some_cases,
)

# ---------------------------------------------------------------------------------------------- projections


@every_case
@pytest.mark.parametrize("pad", ["distinct", "sentinel", "minus_one"])
def test_padded_slots_hold_the_chosen_experts_by_falling_logit_and_then_the_padding(case: Case, pad: Any) -> None:
    logits = randn(60, case.n).requires_grad_()
    routing = cr.route(logits, case.circuit, key=keys_of(60))
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e30])
def test_every_padding_has_the_chosen_experts_in_one_order(dtype: torch.dtype, scale: float) -> None:
    """Ties and infinite logits included: among equals the lower index comes first."""
    logits = (torch.randint(-2, 3, (200, 9), generator=torch.Generator().manual_seed(1)) * scale).to(dtype)
    logits[:, 0] = torch.inf
    logits[::2, 4] = torch.inf
    logits[:, 7] = -torch.inf
    routing = cr.route(logits, cr.compile(cr.Between(2, 5), 9), key=keys_of(200))
    weights, distinct = routing.padded()
    unused = torch.arange(5) >= routing.counts[:, None]
    for pad, filling in (("sentinel", 9), ("minus_one", -1)):
        others, indices = routing.padded(pad=pad)  # type: ignore[arg-type]
        assert torch.equal(indices, distinct.masked_fill(unused, filling))
        assert torch.equal(others, weights)
        # A mask that the logits would not give: an expert of logit -inf is listed all the same, last.
        odd = cr.Routing(routing.distribution, routing.mask.clone(), torch.ones_like(routing.gates))
        odd.mask[:] = False
        odd.mask[:, [2, 7]] = True
        assert odd.padded(pad=pad)[1].tolist() == [[2, 7, *[filling] * 3]] * 200  # type: ignore[arg-type]


@pytest.mark.parametrize("pad", ["distinct", "sentinel", "minus_one"])
def test_padding_sends_no_gradient(pad: Any) -> None:
    logits = randn(30, 6, scale=0.5).requires_grad_()
    routing = cr.route(logits, CASES["atmost"].circuit, key=keys_of(30))
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
        cr.route(randn(5, 6), CASES["exactly"].circuit).padded(**arguments)


def test_a_width_below_the_largest_allowed_count_is_enough_if_no_token_needs_more() -> None:
    routing = cr.route(torch.full((4, 7), -30.0), CASES["between"].circuit, training=False)
    assert routing.padded(1)[0].shape == (4, 1)


@every_case
def test_ragged_lists_every_chosen_pair_once_in_both_orders(case: Case) -> None:
    routing = cr.route(randn(25, case.n), case.circuit, key=keys_of(25))
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
        cr.route(randn(5, 6), CASES["exactly"].circuit).ragged(by="size")  # type: ignore[arg-type]


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
        logits = randn(11, case.n, dtype=torch.float64).requires_grad_()
        x = randn(11, 3, seed=1, dtype=torch.float64).requires_grad_()
        experts = randn(case.n, 3, 2, seed=2, dtype=torch.float64).requires_grad_()
        routing = cr.route(logits, case.circuit, combine=combine, key=keys_of(11))
        output = project(routing, x, experts)
        results.append((output, *gradient_of(output, randn(11, 2, seed=3), logits, x, experts)))
    for other in results[1:]:
        for got, wanted in zip(other, results[0], strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
