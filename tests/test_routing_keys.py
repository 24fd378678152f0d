"""Routing by keys, and replay: what a decision depends on, and how it is made again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import circuitroute as cr
from tests.routing_cases import (
    CASES,
    INF,
    Case,
    every_case,
    every_combine,
    keys_of,
    randn,
    some_cases,
)
from tests.truth import enumerate_worlds

# ---------------------------------------------------------------------------------------------- keys


@some_cases
@settings(max_examples=12, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**40), tokens=st.integers(1, 8), split=st.integers(0, 8))
def test_a_decision_depends_on_its_own_row_and_key_alone(case: Case, seed: int, tokens: int, split: int) -> None:
    logits, key = randn(tokens, case.n, seed=seed), keys_of(tokens, seed)

    def decide(rows: Tensor) -> Tensor:
        return cr.route(logits[rows], case.circuit, key=key[rows]).mask

    everything = decide(torch.arange(tokens))
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(decide(order), everything[order])
    parts = [decide(torch.arange(0, min(split, tokens))), decide(torch.arange(min(split, tokens), tokens))]
    assert torch.equal(torch.cat(parts), everything)
    assert torch.equal(torch.cat([decide(torch.tensor([t])) for t in range(tokens)]), everything)
    assert torch.equal(decide(order.repeat(2))[:tokens], everything[order])


@every_case
def test_a_decision_does_not_depend_on_strides_or_gradients(case: Case) -> None:
    logits, key = randn(33, case.n), keys_of(33)
    expected = cr.route(logits, case.circuit, key=key)
    apart = torch.zeros(33, 2 * case.n)
    apart[:, ::2] = logits
    for same in (logits.t().contiguous().t(), apart[:, ::2], logits.clone().requires_grad_()):
        routing = cr.route(same, case.circuit, key=key)
        assert torch.equal(routing.mask, expected.mask)
        assert torch.equal(routing.gates, expected.gates)
    assert torch.equal(cr.route(logits, case.circuit, key=torch.stack([key, key], 1)[:, 0]).mask, expected.mask)


@every_case
def test_rows_that_share_key_and_logits_share_the_decision(case: Case) -> None:
    logits = randn(1, case.n).expand(20, -1)
    for key in (
        11,
        torch.tensor(11),
        torch.full((20,), 11),
        torch.tensor([11]),
        torch.full((20,), 11, dtype=torch.int32),
    ):
        mask = cr.route(logits, case.circuit, key=key).mask
        assert bool((mask == mask[0]).all())
        assert torch.equal(mask[:1], cr.route(logits[:1], case.circuit, key=11).mask)


def test_distinct_keys_give_distinct_decisions() -> None:
    logits = torch.zeros(200, 16)
    mask = cr.route(logits, cr.compile(cr.Exactly(8), 16), key=keys_of(200)).mask
    assert len(torch.unique(mask, dim=0)) > 150  # of 12870 subsets; a few meet


@every_case
def test_no_key_means_torchs_global_generator(case: Case) -> None:
    logits = randn(64, case.n, scale=0.3)

    def decide(seed: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        return cr.route(logits, case.circuit).mask, cr.route(logits, case.circuit).mask

    first, second = decide(0)
    again = decide(0)
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])
    if case.circuit.model_count() > 1:
        assert not torch.equal(first, second)
        assert not torch.equal(first, decide(1)[0])


def test_a_key_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    cr.route(randn(4, 6), CASES["exactly"].circuit, key=3)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("shape", "key_shape", "error", "says"),
    [
        ((4, 6), (3,), ValueError, r"key has shape \(3,\)"),
        ((4, 6), (2, 4), ValueError, r"key has shape \(2, 4\)"),
        ((2, 4, 6), (2,), ValueError, r"key has shape \(2,\): it must broadcast to \(2, 4\)"),
        ((2, 4, 6), (4, 2), ValueError, r"key has shape \(4, 2\): it must broadcast to \(2, 4\)"),
    ],
)
def test_keys_of_the_wrong_shape_are_refused(
    shape: tuple[int, ...], key_shape: tuple[int, ...], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        cr.route(randn(*shape), CASES["exactly"].circuit, key=torch.zeros(key_shape, dtype=torch.int64))


@pytest.mark.parametrize("key", [torch.zeros(4), torch.zeros(4, dtype=torch.bool)], ids=["float", "bool"])
def test_keys_that_are_no_integers_are_refused(key: Tensor) -> None:
    with pytest.raises(TypeError, match="key has dtype"):
        cr.route(randn(4, 6), CASES["exactly"].circuit, key=key)


# ---------------------------------------------------------------------------------------------- replay


@every_case
@every_combine
def test_replay_is_the_original_decision_to_the_last_bit(case: Case, combine: Any) -> None:
    upstream = randn(7, case.n, seed=4)
    results = []
    recorded = None
    for _ in range(2):
        logits = randn(7, case.n).requires_grad_()
        # Neither the key nor the mode has a say in a replay.
        options: dict[str, Any] = {"key": keys_of(7)} if recorded is None else {"replay": recorded, "training": False}
        routing = cr.route(logits, case.circuit, combine=combine, **options)
        recorded = routing.mask
        loss = (routing.gates * upstream).sum() + routing.log_prob.sum()
        results.append((routing.mask, routing.gates, routing.log_prob, *torch.autograd.grad(loss, logits)))
    for original, replayed in zip(*results, strict=True):
        assert torch.equal(original, replayed)


@pytest.mark.parametrize("convert", [Tensor.float, Tensor.double, Tensor.long, Tensor.bool], ids=str)
def test_a_recorded_mask_may_be_of_any_dtype(convert: Callable[[Tensor], Tensor]) -> None:
    logits, circuit = randn(6, 6), CASES["exactly"].circuit
    routing = cr.route(logits, circuit, key=keys_of(6))
    again = cr.route(logits, circuit, replay=convert(routing.mask))
    assert again.mask.dtype == torch.bool
    assert torch.equal(again.gates, routing.gates)


def test_replay_reproduces_any_allowed_subset() -> None:
    """Also those a sample would hardly ever give: the log-probability says how hardly."""
    case = CASES["between"]
    worlds = torch.from_numpy(enumerate_worlds(case.n))
    worlds = worlds[case.circuit.satisfies(worlds)]
    logits = randn(1, case.n, scale=5.0).expand(len(worlds), -1)
    routing = cr.route(logits, case.circuit, replay=worlds)
    assert torch.equal(routing.mask, worlds)
    torch.testing.assert_close(routing.log_prob.exp().sum(), torch.tensor(1.0))


def _bad_replays() -> list[Any]:
    good = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]])
    too_many, forbidden, unforced = good.clone(), good.clone(), good.clone()
    too_many[1] = 1
    logits_forbidden, logits_forced = torch.zeros(3, 4), torch.zeros(3, 4)
    logits_forbidden[2, 3], logits_forced[0, 2] = -INF, INF
    return [
        pytest.param(torch.zeros(3, 4), too_many, "in row 1$", id="constraint"),
        pytest.param(torch.zeros(3, 4), 1 - good * 0, "in rows 0, 1, 2$", id="every row"),
        pytest.param(logits_forbidden, forbidden, "in row 2$", id="forbidden expert"),
        pytest.param(logits_forced, unforced, "in row 0$", id="forced expert missing"),
        pytest.param(torch.zeros(3, 4), good[:2], r"replay has shape \(2, 4\)", id="tokens"),
        pytest.param(torch.zeros(3, 4), good[:, :3], r"replay has shape \(3, 3\)", id="experts"),
        pytest.param(torch.zeros(3, 4), good * 2, "replay holds 2", id="values"),
    ]


@pytest.mark.parametrize(("logits", "replay", "says"), _bad_replays())
def test_a_replay_that_cannot_have_happened_is_refused(logits: Tensor, replay: Tensor, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        cr.route(logits, cr.compile(cr.Exactly(2), 4), replay=replay)


def test_a_replay_the_count_potential_excludes_is_refused() -> None:
    potential = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, -INF]])
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0]])
    with pytest.raises(ValueError, match="count potential exclude, in row 1"):
        cr.route(torch.zeros(2, 4), cr.compile(cr.AtMost(2), 4), replay=mask, count_potential=potential)


def test_a_replay_that_is_no_tensor_is_refused() -> None:
    with pytest.raises(TypeError, match="replay="):
        cr.route(torch.zeros(1, 4), cr.compile(cr.Exactly(2), 4), replay=[[1, 1, 0, 0]])  # type: ignore[arg-type]
