"""Recorded decisions replayed by patched models of transformers: what is decided, what is refused, and for how long.

Shapes: B batch, S sequence, T = B S tokens, E experts.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'circuitroute[transformers]'")

import circuitroute as cr
from circuitroute.integrations import transformers as adapter
from tests.integrations.models import ALWAYS, FAMILIES, dynamic, tiny, tokens
from tests.integrations.support import SEED, assert_same, block_of, gradients, logits_of, router_of

pytestmark = [
    pytest.mark.integrations,
    # Of transformers, about themselves.
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]
T = tokens().numel()


def forward(handle: adapter.Handle, step: int = 0, training: bool = True, ids: Any = None) -> torch.Tensor:
    """The loss of a forward pass."""
    handle.set_step(step)
    ids = tokens() if ids is None else ids
    return handle.model.train(training)(ids, labels=ids, use_cache=False).loss


def rollout(handle: adapter.Handle, step: int = 0, training: bool = True, ids: Any = None) -> cr.RoutingRecord:
    with torch.no_grad():
        forward(handle, step, training, ids)
    return cr.RoutingRecord.of(handle.routings)


def replays(handle: adapter.Handle, record: cr.RoutingRecord) -> bool:
    return cr.replay.mismatch(record, handle.routings).subsets == 0.0


def budget(total: cr.Constraint | None = None) -> cr.Budget:
    made = cr.Budget(8, layers=2, per_layer=cr.Between(1, 4), total=cr.AtMost(5) if total is None else total)
    with torch.no_grad():
        made.preferences.add_(torch.linspace(0, 1, made.preferences.numel()).view_as(made.preferences))
    return made


# ---------------------------------------------------------------------------------------------- what is decided


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("family", [f if f in ALWAYS else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES])
def test_a_record_is_replayed_until_it_is_taken_back(family: str, training: bool) -> None:
    handle = adapter.patch(tiny(family), dynamic(family), seed=SEED)
    record = rollout(handle, step=7)
    forward(handle, training=training)
    own = cr.RoutingRecord.of(handle.routings)
    handle.replay(record)
    assert handle.replaying is record
    for step in (0, 1):
        forward(handle, step, training).backward()
        assert replays(handle, record)
        for layer, routing in enumerate(handle.routings):
            expected = routing.distribution.log_prob(record.masks()[layer])
            torch.testing.assert_close(routing.log_prob, expected)
            assert torch.equal(routing.gates != 0, routing.mask)
        assert bool((router_of(handle.model).weight.grad.abs().sum(-1) > 0).all())
    handle.replay(None)
    assert handle.replaying is None
    forward(handle, training=training)
    assert cr.replay.mismatch(own, handle.routings).subsets == 0.0
    assert not replays(handle, record)


@pytest.mark.parametrize("family", ["OLMoE", "DeepSeek-V3", "Phi-MoE"])
def test_replaying_what_is_decided_anyway_changes_nothing(family: str) -> None:
    """Loss and every gradient, to the bit: the same gates of the same decision."""
    handle = adapter.patch(tiny(family), dynamic(family), seed=SEED)
    loss = forward(handle, 3)
    record = cr.RoutingRecord.of(handle.routings)
    loss.backward()
    expected = gradients(handle.model)
    handle.model.zero_grad()
    handle.replay(record)
    again = forward(handle, 11)
    again.backward()
    torch.testing.assert_close(again, loss)
    assert_same(gradients(handle.model), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("family", ALWAYS)
def test_evaluation_by_the_models_own_rule_replays_too(family: str) -> None:
    """Where the stock router would choose, and without gradients would do all of it."""
    model = tiny(family)
    handle = adapter.patch(model, adapter.own_constraints(model), seed=SEED)
    stock = logits_of(model)
    chosen = cr.RoutingRecord.of(handle.routings)
    record = rollout(handle, step=1)
    handle.replay(record)
    assert not torch.allclose(logits_of(model), stock)
    assert replays(handle, record)
    handle.replay(chosen)
    torch.testing.assert_close(logits_of(model), stock, rtol=1e-5, atol=1e-6)
    handle.replay(None)
    assert torch.equal(logits_of(model), stock)


def test_a_rollout_in_bfloat16_is_trained_on_in_float32() -> None:
    trained = tiny("OLMoE")
    acting = copy.deepcopy(trained).bfloat16()
    constraint = cr.Between(1, 4)
    actor = adapter.patch(acting, constraint, seed=SEED, temperature=0.5)
    learner = adapter.patch(trained, constraint, seed=SEED, temperature=0.5)
    ids = tokens(8, 40)
    record = rollout(actor, 5, ids=ids)
    forward(learner, 5, ids=ids)
    assert cr.replay.mismatch(record, learner.routings).subsets > 0
    learner.replay(record)
    forward(learner, 5, ids=ids)
    assert replays(learner, record)
    ratio = cr.replay.importance_ratio(cr.replay.path_log_prob(learner.routings), record.path_log_prob)
    assert ratio.shape == (320,)
    assert 0.5 < float(ratio.min()) < 1 < float(ratio.max()) < 2
    ratio.mean().backward()
    assert float(router_of(trained).weight.grad.abs().max()) > 0


@pytest.mark.parametrize(
    ("padding", "implementation"),
    [
        ("distinct", "grouped_mm"),
        ("sentinel", "eager"),
        ("ragged", "grouped_mm"),
        ("ragged", "eager"),
        ("auto", "batched_mm"),
    ],
)
def test_every_padding_computes_the_replayed_experts(padding: Any, implementation: str) -> None:
    """And as many of them: the record holds from one to four experts, at the edges all tokens the same number."""
    handle = adapter.patch(tiny("OLMoE", implementation), cr.Between(1, 4), seed=SEED, padding=padding)
    reference = adapter.patch(tiny("OLMoE", "eager"), cr.Between(1, 4), seed=SEED, padding="distinct")
    expert = torch.arange(8).expand(T, 8)
    fewest, most = expert < 1, expert >= 4
    for record in (rollout(handle), cr.RoutingRecord.of([fewest, most]), cr.RoutingRecord.of([most, fewest])):
        losses = []
        for each in (handle, reference):
            each.model.zero_grad()
            each.replay(record)
            losses.append(forward(each))
            losses[-1].backward()
            assert replays(each, record)
        torch.testing.assert_close(*losses)
        assert_same(gradients(handle.model), gradients(reference.model), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("probes", [1, "all"])
def test_probes_are_run_beside_replayed_decisions(probes: Any) -> None:
    """They are among what the record did not choose, and change nothing in value."""
    losses = []
    for options in ({}, {"probes": probes}):
        handle = adapter.patch(tiny("OLMoE"), cr.Between(1, 3), seed=SEED, **options)
        record = cr.RoutingRecord.of([torch.arange(8).expand(T, 8) % 4 == layer for layer in range(2)])
        handle.replay(record)
        losses.append(forward(handle))
        losses[-1].backward()
        assert replays(handle, record)
    assert torch.equal(*losses)


@pytest.mark.slow
def test_a_traced_block_replays() -> None:
    handle = adapter.patch(tiny("OLMoE"), cr.Between(1, 3), padding="distinct", seed=SEED)
    record = rollout(handle)
    handle.replay(record)
    block, hidden = block_of(handle.model).train(), torch.randn(2, 9, 32)
    eager = block(hidden)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)(hidden)
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
    assert torch.equal(handle.routings[0].mask, record.masks()[0])
    torch.compiler.reset()


def test_some_layers_are_routed_and_some_are_not() -> None:
    handle = adapter.patch(tiny("OLMoE"), {1: cr.Exactly(3)}, seed=SEED)
    record = rollout(handle)
    assert len(record.layers) == 1
    handle.replay(record)
    forward(handle, 1)
    assert replays(handle, record)


# ---------------------------------------------------------------------------------------------- recomputation


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("rule", ["range", "budget"])
def test_recomputed_layers_replay_what_they_replayed(rule: str, reentrant: bool) -> None:
    """Several forward passes wait for their backward passes, and the record changes, or goes, in between."""

    def patched(checkpointing: bool) -> adapter.Handle:
        made = adapter.patch(tiny("OLMoE"), budget() if rule == "budget" else cr.Between(1, 4), seed=SEED)
        if checkpointing:
            made.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            made.model.enable_input_require_grads()
        return made

    found = []
    records: list[cr.RoutingRecord] = []
    for checkpointing in (False, True):
        handle = patched(checkpointing)
        records = records or [rollout(handle, step) for step in (1, 2)]
        losses = []
        for record in [*records, None]:
            handle.replay(record)
            losses.append(forward(handle, 5))
            assert record is None or replays(handle, record)
        handle.set_step(6)
        handle.replay(None)
        torch.stack(losses).sum().backward()
        found.append(gradients(handle.model))
    assert_same(*found, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("change", ["step", "temperature", "probes"])
def test_recomputed_layers_decide_with_the_setting_of_their_first_run(change: str) -> None:
    """Whatever is set between a forward pass and its backward pass."""
    changes: dict[str, Callable[[adapter.Handle], None]] = {
        "step": lambda handle: handle.set_step(9),
        "temperature": lambda handle: setattr(handle, "temperature", 5.0),
        "probes": lambda handle: setattr(handle, "probes", 2),
    }
    found = []
    for change_between in (False, True):
        handle = adapter.patch(tiny("OLMoE"), cr.Between(1, 4), seed=SEED, probes=1)
        handle.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss = forward(handle, 1) + forward(handle, 2)
        if change_between:
            changes[change](handle)
        loss.backward()
        found.append(gradients(handle.model))
    assert_same(*found, rtol=0.0, atol=0.0)


def test_checkpointing_of_other_makers_replays_the_last_pass() -> None:
    from torch.utils.checkpoint import checkpoint

    found = []
    for checkpointing in (False, True):
        handle = adapter.patch(tiny("OLMoE"), cr.Between(1, 4), seed=SEED)
        block, hidden = (
            block_of(handle.model).train(),
            torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0)),
        )
        handle.replay(cr.RoutingRecord.of([torch.arange(8).expand(T, 8) < 2] * 2))
        hidden.requires_grad_()
        output = checkpoint(block, hidden, use_reentrant=False) if checkpointing else block(hidden)
        handle.replay(None)
        output.square().sum().backward()
        found.append({"hidden": hidden.grad, **gradients(handle.model)})
    assert_same(*found, rtol=1e-6, atol=1e-8)


# ---------------------------------------------------------------------------------------------- budgets


def test_a_budget_replays_paths_that_it_allows() -> None:
    handle = adapter.patch(tiny("OLMoE"), budget(), seed=SEED)
    record = rollout(handle, 2)
    handle.replay(record)
    forward(handle, 3).backward()
    assert replays(handle, record)
    spent = torch.stack([routing.counts for routing in handle.routings]).sum(0)
    assert int(spent.max()) <= 5
    assert float(handle.budget.preferences.grad.abs().max()) > 0  # of what lay ahead
    torch.testing.assert_close(cr.replay.path_log_prob(handle.routings), record.path_log_prob, rtol=1e-4, atol=1e-4)
    logits_of(handle.model)
    assert replays(handle, record)


def test_a_path_over_the_budget_is_refused_before_anything_changes() -> None:
    handle = adapter.patch(tiny("OLMoE"), budget(), seed=SEED)
    good = rollout(handle)
    masks = good.masks()
    for mask in masks:
        mask[4] = torch.arange(8) < 3
    handle.replay(good)
    with pytest.raises(ValueError, match=r"record: over all layers .* the budget, AtMost\(5\), forbids, in row.* 4"):
        handle.replay(cr.RoutingRecord.of(masks))
    assert handle.replaying is good
    forward(handle)
    assert replays(handle, good)
    handle = adapter.patch(tiny("OLMoE"), budget(cr.CountIn({4, 6})), seed=SEED)
    five = [torch.arange(8).expand(T, 8) < count for count in (2, 3)]
    with pytest.raises(ValueError, match=r"the budget, CountIn\(\{4, 6\}\), forbids"):
        handle.replay(cr.RoutingRecord.of(five))


# ---------------------------------------------------------------------------------------------- refusals


def one_layer(record: cr.RoutingRecord) -> cr.RoutingRecord:
    return cr.RoutingRecord(record.layers[:1])


def of_nine(record: cr.RoutingRecord) -> cr.RoutingRecord:
    return cr.RoutingRecord.of([torch.nn.functional.pad(mask, (0, 1)) for mask in record.masks()])


def hotter(record: cr.RoutingRecord) -> cr.RoutingRecord:
    return cr.RoutingRecord(record.layers, temperature=2.0)


def forbidden(record: cr.RoutingRecord) -> cr.RoutingRecord:
    masks = record.masks()
    masks[1][3] = True
    return cr.RoutingRecord.of(masks)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (one_layer, r"record has layers of \[8\] experts, and the model's routers \[8, 8\]"),
        (of_nine, r"record has layers of \[9, 9\] experts"),
        (hotter, r"record was made at temperature 2, and layer 0 decides at 1"),
        (forbidden, r"record: layer 1 has subsets that Between\(1, 4\) forbids, in row.* 3"),
    ],
)
def test_what_does_not_fit_is_refused_at_once(damage: Any, message: str) -> None:
    handle = adapter.patch(tiny("OLMoE"), cr.Between(1, 4), seed=SEED)
    good = rollout(handle)
    for before in (None, good):
        handle.replay(before)
        with pytest.raises(ValueError, match=message):
            handle.replay(damage(good))
        assert handle.replaying is before
    forward(handle, 1)
    assert replays(handle, good)


def test_what_is_no_record_is_refused() -> None:
    handle = adapter.patch(tiny("OLMoE"), cr.Between(1, 4))
    for given in ([torch.ones(T, 8, dtype=torch.bool)] * 2, "record", False):
        with pytest.raises(TypeError, match=r"record is a \w+: expected a RoutingRecord"):
            handle.replay(given)  # type: ignore[arg-type]
    handle.unpatch()
    with pytest.raises(RuntimeError, match="is not patched: it has no layers that are routed"):
        handle.replay(cr.RoutingRecord.of([torch.ones(T, 8, dtype=torch.bool)] * 2))


@pytest.mark.parametrize("training", [True, False])
def test_other_numbers_of_tokens_are_refused_in_the_forward_pass(training: bool) -> None:
    handle = adapter.patch(tiny("OLMoE"), cr.Exactly(2), seed=SEED)
    record = rollout(handle)
    handle.replay(record)
    with pytest.raises(ValueError, match=r"given a record of 18 tokens, and the router of layer 0 9:"):
        forward(handle, training=training, ids=tokens(1))
    handle.replay(record[:9])
    forward(handle, training=training, ids=tokens(1))
    assert replays(handle, record[:9])


def test_cached_generation_is_refused_with_the_remedy() -> None:
    handle = adapter.patch(tiny("OLMoE").eval(), cr.Exactly(2))
    handle.replay(rollout(handle, training=False, ids=tokens(1)))
    with pytest.raises(ValueError, match=r"given a record of 9 tokens, and the router of layer 0 1: .* token by token"):
        handle.model.generate(tokens(1), max_new_tokens=3, do_sample=False, eos_token_id=None)


def test_no_tokens_are_replayed() -> None:
    handle = adapter.patch(tiny("OLMoE"), cr.Exactly(2), seed=SEED)
    handle.replay(cr.RoutingRecord.of([torch.zeros(0, 8, dtype=torch.bool)] * 2))
    _, weights, indices = router_of(handle.model).train()(torch.zeros(0, 32))
    assert weights.shape == indices.shape == (0, 2)


def test_the_temperature_is_that_of_the_record_while_it_is_replayed() -> None:
    handle = adapter.patch(tiny("OLMoE"), cr.Exactly(2), seed=SEED, temperature=0.5)
    handle.replay(rollout(handle))
    with pytest.raises(ValueError, match=r"temperature=0\.25: a record made at 0\.5 is replayed"):
        handle.temperature = 0.25
    assert handle.temperature == handle.model.config.circuitroute["temperature"] == 0.5
    handle.temperature = 0.5
    handle.probes = 1
    handle.replay(None)
    handle.temperature = 0.25
    assert handle.temperature == 0.25


# ---------------------------------------------------------------------------------------------- copies


@pytest.mark.parametrize("way", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_copy_replays_nothing(way: Callable[[Any], Any]) -> None:
    """A record is of one model's tokens; the copy decides in all its layers for itself."""
    handle = adapter.patch(tiny("OLMoE"), cr.Between(1, 4), seed=SEED)
    forward(handle, 3)
    own = cr.RoutingRecord.of(handle.routings)
    record = rollout(handle, 1)
    handle.replay(record)
    forward(handle, 3)
    twin = adapter.get_handle(way(handle.model))
    assert twin.replaying is None
    forward(twin, 3)
    assert cr.replay.mismatch(own, twin.routings).subsets == 0.0
    forward(handle, 3)
    assert replays(handle, record)


def test_unpatching_ends_it() -> None:
    model = tiny("OLMoE")
    stock = logits_of(model)
    handle = adapter.patch(model, cr.Exactly(2), seed=SEED)
    model.gradient_checkpointing_enable()
    handle.replay(rollout(handle))
    handle.unpatch()
    assert handle.replaying is None
    assert torch.equal(logits_of(model), stock)
    assert not any("Keeper" in type(vars(m).get("_gradient_checkpointing_func")).__name__ for m in model.modules())
    again = adapter.patch(model, cr.Exactly(2), seed=SEED)
    assert again.replaying is None
