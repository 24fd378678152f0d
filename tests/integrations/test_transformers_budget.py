"""A budget over the layers of transformers' models: what every token spends, recomputation, saving, refusals.

Shapes: B batch, S sequence, T = B S tokens, E experts, L layers, J counts.
"""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'circuitroute[transformers]'")

from torch.utils.checkpoint import checkpoint

import circuitroute as cr
from circuitroute.integrations import transformers as adapter
from circuitroute.integrations.transformers.recomputation import CHECKPOINTING
from tests.integrations.models import NO_GROUPS, tiny, tokens
from tests.integrations.support import SEED, assert_same, block_of, gradients, logits_of, train_once

pytestmark = [
    pytest.mark.integrations,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]
LAYERS, EXPERTS = 3, 8
PER_LAYER, TOTAL = cr.Between(1, 5), cr.Between(5, 7)


def three(family: str, **changes: Any) -> Any:
    return tiny(family, num_hidden_layers=LAYERS, **changes)


def budget_of(seed: int = 0, scale: float = 0.5) -> cr.Budget:
    """Preferences and estimates that matter."""
    budget = cr.Budget(EXPERTS, LAYERS, PER_LAYER, TOTAL)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in budget.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return budget


def patched(family: str = "OLMoE", seed: int | None = SEED, **changes: Any) -> tuple[Any, adapter.Handle]:
    model = three(family, **changes)
    return model, adapter.patch(model, budget_of(), seed=seed)


def totals(handle: adapter.Handle) -> torch.Tensor:
    """[T] experts over all layers."""
    assert len(handle.routings) == LAYERS
    return torch.stack([routing.counts for routing in handle.routings]).sum(0)


def masks(handle: adapter.Handle) -> list[torch.Tensor]:
    return [routing.mask.clone() for routing in handle.routings]


def kept(handle: adapter.Handle) -> bool:
    total = totals(handle)
    counts = torch.stack([routing.counts for routing in handle.routings])
    return bool(((total >= 5) & (total <= 7) & (counts >= 1).all(0) & (counts <= 5).all(0)).all())


# ---------------------------------------------------------------------------------------------- what every token spends


@pytest.mark.parametrize("decide", ["mode", "sample", 0.5])
@pytest.mark.parametrize("temperature", [0.1, 10.0])
def test_every_token_keeps_the_budget_at_any_temperature(decide: Any, temperature: float) -> None:
    model = three("OLMoE")
    handle = adapter.patch(model, budget_of(), seed=SEED, decide=decide, temperature=temperature)
    model.train()(tokens(5, 40), use_cache=False)
    assert kept(handle)
    trained = masks(handle)
    model.eval()(tokens(5, 40), use_cache=False)
    assert kept(handle)
    same = all(torch.equal(one, other) for one, other in zip(trained, masks(handle), strict=True))
    assert same == (decide == "mode")  # which is the rule of evaluation


@pytest.mark.parametrize("family", ["OLMoE", "Mixtral", "DeepSeek-V3", "ERNIE 4.5", "GPT-OSS", "Phi-MoE"])
def test_every_token_keeps_the_budget(family: str) -> None:
    model, handle = patched(family, **(NO_GROUPS if family == "DeepSeek-V3" else {}))
    ids = tokens(5, 40)
    model.train()
    for step in range(2):
        handle.set_step(step)
        loss = model(ids, labels=ids, use_cache=False).loss
        assert len(totals(handle)) == 200
        assert kept(handle)
    assert int(totals(handle).unique().numel()) > 1
    loss.backward()
    budget = handle.budget
    assert budget is model.circuitroute_budget
    for parameter in budget.parameters():
        assert parameter.grad is not None
        assert bool(parameter.grad.isfinite().all())
        assert float(parameter.grad.abs().max()) > 0
    logits_of(model, ids)
    assert kept(handle)
    for routing in handle.routings:
        assert torch.equal(routing.counts, routing.distribution.count_probs.argmax(-1))
        top = routing.logits.argsort(-1, descending=True)
        rank = torch.arange(EXPERTS) < routing.counts[:, None]
        assert torch.equal(torch.zeros_like(routing.mask).scatter(1, top, rank), routing.mask)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("family", ["OLMoE", "Mixtral"])
def test_decisions_are_those_of_a_budget_router(family: str, training: bool) -> None:
    """One that is walked by hand: the same logits, the same keys."""
    model, handle = patched(family)
    model.train(training)
    handle.set_step(4)
    with torch.no_grad():
        model(tokens())
    reference = cr.BudgetRouter(EXPERTS, EXPERTS, LAYERS, PER_LAYER, TOTAL)
    reference.load_state_dict(model.circuitroute_budget.state_dict(), strict=False)
    reference.train(training)
    for layer in range(LAYERS):
        reference.router(layer).weight.data.copy_(torch.eye(EXPERTS))
    state = reference.begin(handle.routings[0].logits)
    for layer, routing in enumerate(handle.routings):
        key = cr.random_key(SEED, 4, layer, torch.arange(len(routing.mask)))
        expected, state = reference(routing.logits, state, key=key, layer=layer)
        assert torch.equal(expected.mask, routing.mask)
        torch.testing.assert_close(expected.log_prob, routing.log_prob)
    assert torch.equal(state.spent, totals(handle))


def test_generation_keeps_the_budget_with_a_cache() -> None:
    model, handle = patched()
    model.eval()
    seen = []
    model.register_forward_hook(lambda *_: seen.append((len(totals(handle)), kept(handle))))
    arguments: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(tokens(2, 6), **arguments)
    assert seen == [(12, True), (2, True), (2, True), (2, True)]
    assert torch.equal(model.generate(tokens(2, 6), use_cache=False, **arguments), cached)


def test_a_budget_routers_part_is_taken() -> None:
    router = cr.BudgetRouter(4, EXPERTS, LAYERS, PER_LAYER, TOTAL)
    model = three("OLMoE")
    count = sum(p.numel() for p in model.parameters())
    handle = adapter.patch(model, router, seed=SEED)
    assert model.circuitroute_budget.preferences is router.preferences
    assert model.circuitroute_budget.estimates is router.estimates
    assert sum(p.numel() for p in model.parameters()) == count + 2 * router.estimates.numel()
    train_once(model, handle)
    assert router.estimates.grad is not None
    loss = model.circuitroute_budget.estimation_loss(handle.routings)
    assert float(loss) > 0


# ---------------------------------------------------------------------------------------------- recomputation


def checkpointed(model: Any, reentrant: bool) -> Any:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("seed", [None, SEED])
@pytest.mark.parametrize("family", ["OLMoE", "Mixtral"])
def test_recomputed_layers_decide_the_same(family: str, seed: int | None, reentrant: bool) -> None:
    model, handle = patched(family, seed)
    loss, expected = train_once(model, handle)
    decided = masks(handle)
    assert {"circuitroute_budget.preferences", "circuitroute_budget.estimates"} <= set(expected)
    checkpointed(model, reentrant)
    for _ in range(2):  # the second time all layers keep their turns
        again, found = train_once(model, handle)
        assert torch.equal(again, loss)
        assert all(torch.equal(a, b) for a, b in zip(masks(handle), decided, strict=True))
        # Reentrant layers have messages of their own: their gradients are added up in another order.
        budgets = {name for name in found if name.startswith("circuitroute_budget.")}
        exact = set(found) - (budgets if reentrant else set())
        assert_same({n: found[n] for n in exact}, {n: expected[n] for n in exact}, rtol=0.0, atol=0.0)
        assert_same({n: found[n] for n in budgets}, {n: expected[n] for n in budgets}, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reentrant", [False, True])
def test_forward_passes_may_wait_for_their_backward_passes(reentrant: bool) -> None:
    """Two in training, of other texts, and one without gradients after them."""
    results = []
    for recomputed in (False, True):
        model, handle = patched(seed=None)
        if recomputed:
            train_once(checkpointed(model, reentrant), handle)
            model.zero_grad()
        model.train()
        torch.manual_seed(5)
        losses = [model(ids, labels=ids, use_cache=False).loss for ids in (tokens(seed=1), tokens(seed=2))]
        with torch.no_grad():
            model(tokens(seed=3), use_cache=False)
            model(tokens(1, 4), use_cache=False)
        sum(losses).backward()
        results.append(gradients(model))
    assert_same(*results, rtol=1e-5, atol=1e-7)


def test_some_layers_checkpointed() -> None:
    results = []
    for chosen in ((), (0,), (1,), (2,), (0, 2)):
        for reentrant in (False, True) if chosen else (False,):
            model, handle = patched()
            train_once(checkpointed(model, reentrant), handle)
            for number, layer in enumerate(model.model.layers):
                layer.gradient_checkpointing = number in chosen
            results.append(train_once(model, handle)[1])
    for found in results[1:]:
        assert_same(found, results[0], rtol=1e-5, atol=1e-7)


def test_checkpointing_of_other_makers() -> None:
    model, handle = patched()
    _, expected = train_once(model, handle)
    for layer in model.model.layers:
        forward = layer.forward
        layer.forward = lambda *args, f=forward, **kw: checkpoint(f, *args, use_reentrant=False, **kw)
    _, found = train_once(model, handle)
    assert_same(found, expected, rtol=0.0, atol=0.0)
    ids = tokens()
    loss = model(ids, labels=ids, use_cache=False).loss
    model(tokens(1, 4), use_cache=False)
    with pytest.raises(RuntimeError, match="the backward pass before the next forward pass"):
        loss.backward()


def test_layers_run_in_order() -> None:
    model, _ = patched()
    with pytest.raises(RuntimeError, match="layer 1 runs before layer 0"):
        block_of(model, 1)(torch.randn(1, 3, 32))
    block_of(model, 0)(torch.randn(1, 3, 32))
    with pytest.raises(RuntimeError, match="layer 1 has 4 tokens, but the forward pass it belongs to has 3"):
        block_of(model, 1)(torch.randn(1, 4, 32))


def test_a_layer_cannot_run_for_the_first_time_in_a_backward_pass() -> None:
    model, _ = patched()
    model.train()
    leaf = torch.zeros(1, requires_grad=True)
    leaf.register_hook(lambda gradient: block_of(model, 1)(torch.randn(1, 3, 32)) and None)
    with pytest.raises(RuntimeError, match=r"layer 1 runs in a backward pass.*run a forward pass of the model first"):
        leaf.sum().backward()


# ---------------------------------------------------------------------------------------------- in and out


@pytest.mark.parametrize("family", ["OLMoE", "Mixtral"])
@pytest.mark.parametrize("shard", ["5GB", "40KB"])
def test_a_budget_is_saved_and_loaded(family: str, shard: str, tmp_path: Path) -> None:
    model, handle = patched(family)
    before = logits_of(model)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    again = adapter.load(tmp_path)
    assert torch.equal(logits_of(again), before)
    assert again.config.circuitroute == model.config.circuitroute
    assert again.config.circuitroute["total"] == "Between(5, 7)"
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert kept(adapter.get_handle(again))
    handle.unpatch()
    plain = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits_of(plain), logits_of(model))
    assert list(plain.state_dict()) == list(model.state_dict())


def test_a_budget_that_was_not_saved_is_missed(tmp_path: Path) -> None:
    model, handle = patched()
    settings = model.config.circuitroute
    handle.unpatch()
    model.config.circuitroute = settings
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lack the parameters of the budget, circuitroute_budget"):
        adapter.load(tmp_path)


@pytest.mark.parametrize("family", ["OLMoE", "Mixtral"])
def test_unpatching_takes_the_budget_away(family: str) -> None:
    model = three(family)
    before, keys, config = logits_of(model), list(model.state_dict()), model.config.to_dict()
    handle = adapter.patch(model, budget_of())
    assert sorted(set(model.state_dict()) - set(keys)) == [
        "circuitroute_budget.estimates",
        "circuitroute_budget.preferences",
    ]
    assert not torch.equal(logits_of(model), before)
    train_once(checkpointed(model, False), handle)
    model.zero_grad()
    handle.unpatch()
    assert handle.budget is None
    assert torch.equal(logits_of(model), before)
    assert list(model.state_dict()) == keys
    assert model.config.to_dict() == config
    assert not any("circuitroute" in name for m in model.modules() for name in [*vars(m), *m._modules])
    assert not any("circuitroute" in str(type(vars(m).get(CHECKPOINTING))) for m in model.modules())
    adapter.patch(model, budget_of())


def test_a_copy_has_a_budget_of_its_own() -> None:
    model, handle = patched()
    train_once(checkpointed(model, False), handle)
    expected = masks(handle)
    twin = copy.deepcopy(model)
    other = adapter.get_handle(twin)
    assert other.budget is twin.circuitroute_budget
    assert other.budget is not handle.budget
    with torch.no_grad():
        handle.budget.preferences.add_(torch.randn(handle.budget.preferences.shape))  # type: ignore[union-attr]
    train_once(twin, other)
    assert all(torch.equal(a, b) for a, b in zip(masks(other), expected, strict=True))


def test_peft_freezes_a_budget_that_can_be_trained() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"])
    model, handle = patched()
    wrapped = peft.get_peft_model(model, settings)
    assert not any("budget" in name for name in train_once(wrapped, handle)[1])
    handle.budget.requires_grad_()  # type: ignore[union-attr]
    assert sum("budget" in name for name in train_once(wrapped, handle)[1]) == 2
    assert kept(handle)
    wrapped = peft.get_peft_model(three("OLMoE"), settings)
    handle = adapter.patch(wrapped, budget_of(), seed=SEED)
    assert sum("budget" in name for name in train_once(wrapped, handle)[1]) == 2
    handle.unpatch()
    assert not any("budget" in name for name, _ in wrapped.named_parameters())


def test_nothing_is_kept_of_passes_that_are_over() -> None:
    model, handle = patched()
    checkpointed(model, False)

    def states() -> int:
        gc.collect()
        return sum(isinstance(thing, cr.BudgetState) for thing in gc.get_objects())

    train_once(model, handle)
    train_once(model, handle)
    first = states()
    for _ in range(3):
        train_once(model, handle)
    assert states() == first


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("family", "budget", "message"),
    [
        (
            "OLMoE",
            cr.Budget(8, 2, PER_LAYER, TOTAL),
            r"layers=2, but the model has 3 mixture-of-experts layers, \[0, 1",
        ),
        ("OLMoE", cr.Budget(6, 3, PER_LAYER, TOTAL), "num_experts=6, but layer 0 has 8"),
        ("OLMoE", cr.BudgetRouter(32, 8, 3, PER_LAYER, TOTAL, per_token=True), "per_token=True"),
        ("DeepSeek-V3", cr.Budget(8, 3, PER_LAYER, TOTAL), "layer 0 chooses by .*ActiveGroups.*without a budget"),
    ],
)
def test_budgets_that_do_not_fit_are_refused(family: str, budget: cr.Budget, message: str) -> None:
    model = three(family)
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        adapter.patch(model, budget)
    assert [type(m) for m in model.modules()] == kinds
