"""Training a patched model: the keys of its samples, the records of its decisions, and its auxiliary loss."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'circuitroute[transformers]'")

import transformers

import circuitroute as cr
from circuitroute.integrations import transformers as adapter
from tests.integrations.models import ALWAYS, dynamic, tiny, tokens
from tests.integrations.support import (
    SEED,
    assert_same,
    gradients,
    logits_of,
    router_of,
)

pytestmark = [
    pytest.mark.integrations,
    # Of transformers and peft, about themselves.
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]


# ---------------------------------------------------------------------------------------------- sampling keys


def test_a_step_is_reproducible_and_steps_differ() -> None:
    model = tiny("OLMoE").train()
    handle = adapter.patch(model, cr.Exactly(2), seed=SEED)

    def masks(*arguments: Any) -> torch.Tensor:
        handle.set_step(*arguments)
        model(tokens())
        return torch.stack([routing.mask for routing in handle.routings])

    first = masks(0)
    assert torch.equal(first, masks(0))
    assert not torch.equal(first, masks(1))
    assert not torch.equal(first, masks(0, 1 << 32))
    assert torch.equal(masks(torch.tensor(1), torch.tensor(4)), masks(1, 4))


def test_each_layer_has_randomness_of_its_own() -> None:
    model = tiny("OLMoE").train()
    handle = adapter.patch(model, cr.Exactly(2), seed=SEED)
    hidden = torch.randn(50, 32)
    router_of(model, 1).weight.data.copy_(router_of(model, 0).weight.data)
    router_of(model, 0)(hidden)
    router_of(model, 1)(hidden)
    one, other = handle.routings
    assert torch.equal(one.logits, other.logits)
    assert not torch.equal(one.mask, other.mask)


def test_decisions_do_not_depend_on_how_a_batch_is_split() -> None:
    model = tiny("OLMoE").train()
    handle = adapter.patch(model, cr.Between(1, 4), seed=SEED)
    ids = tokens(4)
    handle.set_step(7)
    model(ids)
    whole = [routing.mask for routing in handle.routings]
    parts = []
    for half, offset in ((ids[:2], 0), (ids[2:], ids[:2].numel())):
        handle.set_step(7, token_offset=offset)
        model(half)
        parts.append([routing.mask for routing in handle.routings])
    for layer, mask in enumerate(whole):
        assert torch.equal(torch.cat([part[layer] for part in parts]), mask)


def test_without_a_seed_torch_draws() -> None:
    model = tiny("OLMoE").train()
    handle = adapter.patch(model, cr.Exactly(2))
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        model(tokens())
        masks.append(handle.routings[0].mask)
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_evaluation_is_deterministic_and_takes_the_mode() -> None:
    model = tiny("OLMoE")
    handle = adapter.patch(model, cr.Between(1, 4))
    assert torch.equal(logits_of(model), logits_of(model))
    for routing in handle.routings:
        assert torch.equal(routing.mask, routing.distribution.mode != 0)


def test_gradients_in_evaluation_are_those_of_the_estimator() -> None:
    """Also where the stock router chooses: every logit gets one, as in training."""
    model = tiny("DeepSeek-V3")
    own = adapter.own_constraints(model)
    before = logits_of(model)
    handle = adapter.patch(model, own)
    output = model(tokens(), use_cache=False).logits
    torch.testing.assert_close(output, before, rtol=1e-5, atol=1e-6)
    output.square().sum().backward()
    assert bool((router_of(model).weight.grad.abs().sum(-1) > 0).all())
    assert all(routing.gates.requires_grad for routing in handle.routings)


def test_the_trainer_callback_counts() -> None:
    model = tiny("OLMoE")
    handle = adapter.patch(model, cr.Exactly(2), seed=SEED)
    callback = handle.trainer_callback()
    seen = []

    class State:
        global_step = 5

    class Arguments:
        process_index = 3

    callback.on_step_begin(Arguments, State, None)
    seen.append((handle._session.step, handle._session.token_offset))
    callback.on_substep_end(Arguments, State, None)
    seen.append((handle._session.step, handle._session.token_offset))
    assert seen == [(5, 3 << 48), (5, (3 << 48) + (1 << 32))]
    assert isinstance(callback, transformers.TrainerCallback)


@pytest.mark.parametrize(
    ("layout", "shares"),
    [
        ({"tp_size": 2}, [0, 0, 0, 0]),
        ({"fsdp_size": 2}, [0, 1, 0, 1]),
        ({"tp_size": 2, "fsdp_size": 2}, [0, 0, 1, 1]),
    ],
)
def test_processes_that_share_tokens_share_their_keys(layout: dict[str, int], shares: list[int]) -> None:
    """By the rank's place on transformers' mesh, where tensors are the innermost dimension."""
    model = tiny("OLMoE")
    handle = adapter.patch(model, cr.Exactly(2), seed=SEED)
    model.config.distributed_config = transformers.distributed.DistributedConfig(**layout)
    state = types.SimpleNamespace(global_step=0)
    for rank, share in enumerate(shares):
        handle.trainer_callback().on_step_begin(types.SimpleNamespace(process_index=rank), state, None)
        assert handle._session.token_offset == share << 48


# ---------------------------------------------------------------------------------------------- records and losses


def test_a_recomputation_leaves_the_record_alone() -> None:
    for reentrant in (True, False):
        model = tiny("OLMoE").train()
        handle = adapter.patch(model, cr.Exactly(2), seed=SEED)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
        calls: list[int] = []
        router_of(model).register_forward_pre_hook(lambda *_, calls=calls: calls.append(0))
        loss = model(tokens(), labels=tokens(), use_cache=False).loss
        before = handle.routings
        loss.backward()
        assert len(calls) == 2  # it did run again
        assert all(one is other for one, other in zip(before, handle.routings, strict=True))
        assert before[0].gates.requires_grad is not reentrant


def test_records_can_be_released_and_switched_off() -> None:
    model = tiny("OLMoE").train()
    handle = adapter.patch(model, cr.Exactly(2))
    assert handle.routings == ()
    model(tokens())
    assert [len(routing.mask) for routing in handle.routings] == [18, 18]
    handle.release()
    assert handle.routings == ()
    handle.recording = False
    model(tokens())
    assert handle.routings == ()
    model.eval()
    model(tokens())
    with pytest.raises(RuntimeError, match="no routings are recorded"):
        handle.load_balance_loss()


@pytest.mark.parametrize("family", ALWAYS)
def test_the_auxiliary_loss_is_of_the_marginals_and_the_sampled_set(family: str) -> None:
    model = tiny(family).train()
    handle = adapter.patch(model, dynamic(family), seed=SEED)
    model(tokens())
    loss = handle.load_balance_loss()
    expected = []
    for routing in handle.routings:
        load, mass = routing.mask.double().sum(0), routing.marginals.double().sum(0)
        expected.append(8 * (load / load.sum() * mass / mass.sum()).sum())
    torch.testing.assert_close(loss.double(), torch.stack(expected).mean(), rtol=1e-6, atol=1e-6)
    loss.backward()
    assert bool((router_of(model).weight.grad.abs() > 0).any())


def test_the_auxiliary_loss_leaves_masked_tokens_out() -> None:
    model = tiny("OLMoE").train()
    handle = adapter.patch(model, cr.Exactly(2), seed=SEED)
    ids, mask = tokens(), torch.ones(2, 9, dtype=torch.int64)
    mask[1, :4] = 0
    model(ids, attention_mask=mask)
    found = handle.load_balance_loss(attention_mask=mask)
    kept = mask.reshape(-1) != 0
    expected = []
    for routing in handle.routings:
        load, mass = routing.mask[kept].double().sum(0), routing.marginals[kept].double().sum(0)
        expected.append(8 * (load / load.sum() * mass / mass.sum()).sum())
    torch.testing.assert_close(found.double(), torch.stack(expected).mean(), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(found, handle.load_balance_loss())
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 8\): the last forward pass had 18 tokens"):
        handle.load_balance_loss(attention_mask=mask[:, 1:])


def test_the_auxiliary_loss_is_the_same_under_checkpointing_or_refused() -> None:
    results = []
    for reentrant in (None, False, True):
        model = tiny("OLMoE").train()
        handle = adapter.patch(model, cr.Exactly(2), seed=SEED)
        if reentrant is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        loss = model(tokens(), labels=tokens(), use_cache=False).loss
        if reentrant:
            with pytest.raises(RuntimeError, match=r"would have no gradient.*'use_reentrant': False"):
                handle.load_balance_loss()
            continue
        (loss + handle.load_balance_loss()).backward()
        results.append(gradients(model))
    assert_same(*results, rtol=1e-6, atol=1e-8)


def test_the_stock_auxiliary_loss_goes_on_working() -> None:
    model = tiny("OLMoE").train()
    handle = adapter.patch(model, cr.Between(1, 4))
    output = model(tokens(), labels=tokens(), output_router_logits=True)
    assert torch.isfinite(output.aux_loss)
    assert len(output.router_logits) == 2
    (output.loss + handle.load_balance_loss()).backward()
