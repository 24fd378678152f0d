"""The routers of transformers' models, patched: what they compute, and what of transformers goes on working.

Shapes: B batch, S sequence, T = B S tokens, H hidden size, E experts, K slots.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
import types
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'circuitroute[transformers]'")

import transformers
from torch.nn import functional as F

import circuitroute as cr
from circuitroute.integrations import transformers as adapter
from circuitroute.integrations.transformers import routers as routers_module
from circuitroute.integrations.transformers import weights as weights_module
from circuitroute.integrations.transformers.experts import implementation_of
from circuitroute.integrations.transformers.routers import CircuitRouting
from tests.integrations import support
from tests.integrations.models import ALWAYS, FAMILIES, TOP_K, dynamic, own_count, tiny, tokens
from tests.integrations.support import (
    CHECKS,
    SEED,
    assert_same,
    block_of,
    gradients,
    logits_of,
    router_of,
    table,
    train_once,
)

pytestmark = [
    pytest.mark.integrations,
    # Of transformers and peft, about themselves.
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]
PAGE = Path(__file__).parents[2] / "docs" / "transformers.md"
NO_GROUPS = {"n_group": 1, "topk_group": 1}


def ungrouped(family: str, implementation: str = "grouped_mm", **changes: Any) -> Any:
    """A tiny model of 8 experts whose own rule is a plain top-2."""
    if family in ("DeepSeek-V3", "GLM4-MoE"):
        changes |= NO_GROUPS
    if family == "Qwen2-MoE":
        changes |= {"num_experts": 8, "num_experts_per_tok": TOP_K}
    return tiny(family, implementation, **changes)


# What every test run checks of every family; the other cells of the table take most of the time and differ least.
ALWAYS_CHECKED = ("forward, backward", "save, load", "ragged")
CELLS = [
    pytest.param(
        family,
        check,
        marks=[] if family in ALWAYS or check in ALWAYS_CHECKED else pytest.mark.slow,
        id=f"{family}-{check}",
    )
    for family in FAMILIES
    for check in CHECKS
]


@pytest.mark.parametrize(("family", "check"), CELLS)
def test_every_cell_of_the_table(family: str, check: str) -> None:
    if check == "PEFT":
        pytest.importorskip("peft", reason="peft is not installed")
    CHECKS[check](family)


def test_the_cells_have_names() -> None:
    assert set(ALWAYS_CHECKED) < set(CHECKS)
    assert set(ALWAYS) < set(FAMILIES)


def test_the_page_shows_the_table_that_is_run() -> None:
    assert table(lambda family, check: "yes") in PAGE.read_text(encoding="utf-8")


def test_supported_families_are_those_of_the_tests() -> None:
    assert set(adapter.supported()) == set(FAMILIES)


# ---------------------------------------------------------------------------------------------- what is computed


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mode_is_the_stock_choice(family: str) -> None:
    """Without the stock router's help: same experts, same weights, whatever the family's bias and scale."""
    model = ungrouped(family)
    before = logits_of(model)
    adapter.patch(model, cr.Exactly(TOP_K), eval="mode")
    torch.testing.assert_close(logits_of(model), before, rtol=1e-5, atol=1e-6)


def test_the_mode_is_at_least_as_good_as_the_greedy_choice_of_groups() -> None:
    model = tiny("DeepSeek-V3")
    handle = adapter.patch(model, adapter.own_constraints(model))
    logits_of(model)
    for routing in handle.routings:
        assert bool(routing.distribution.circuit.satisfies(routing.mask).all())
        score = (routing.logits * routing.mask).sum(-1)
        best = (routing.logits * routing.distribution.mode).sum(-1)
        assert bool((best >= score - 1e-5).all())
        assert bool((best > score + 1e-3).any())  # or this test compares nothing


@pytest.mark.parametrize("family", FAMILIES)
def test_router_logits_are_the_stock_ones(family: str) -> None:
    model = tiny(family).eval()
    with torch.no_grad():
        before = model(tokens(), output_router_logits=True).router_logits
        handle = adapter.patch(model, adapter.own_constraints(model), eval="mode" if own_count(family) > 2 else "auto")
        after = model(tokens(), output_router_logits=True).router_logits
    assert len(before) == len(after) == len(handle.routings) == 2
    assert torch.equal(before[0], after[0])


def reference_weights(family: str, router: Any, g: torch.Tensor, mask: torch.Tensor, logits: torch.Tensor) -> Any:
    """[T, E] weights, written down from what the stock routers do."""
    if family in ("OLMoE", "FlexOLMo", "Qwen2-MoE"):
        return g * F.softmax(logits, -1)
    if family in ("DeepSeek-V3", "GLM4-MoE"):
        scores = g * torch.sigmoid(logits)
        return 2.5 * scores / scores.sum(-1, keepdim=True)
    if family == "Phi-MoE":
        first = torch.where(mask, logits, -torch.inf).argmax(-1)
        rest = mask.scatter(-1, first[:, None], False)
        rows = []
        for t in range(len(logits)):
            a = int(first[t])
            near = (logits[t, a] - logits[t]) / torch.maximum(logits[t].abs(), logits[t, a]) <= 0.02
            near = (logits[t].max() - logits[t]) / torch.maximum(logits[t].abs(), logits[t].max()) <= 0.02
            near[a] = True
            row = torch.zeros_like(logits[t])
            row[a] = logits[t, a].exp() / (logits[t].exp() * near).sum()
            left = torch.ones_like(near)
            left[a] = False
            top = logits[t][left].max()
            near = ((top - logits[t]) / torch.maximum(logits[t].abs(), top) <= 0.02) & left
            (b,) = rest[t].nonzero()[:, 0].tolist()
            near[b] = True
            row[b] = logits[t, b].exp() / (logits[t].exp() * near).sum()
            rows.append(row)
        return g * torch.stack(rows)
    scores = g * logits.exp()
    return scores / scores.sum(-1, keepdim=True)


def enumerated_marginals(logits: torch.Tensor, k: int) -> torch.Tensor:
    """[T, E] by going through all subsets of size k."""
    subsets = torch.tensor(
        [[float(e in s) for e in range(logits.shape[-1])] for s in itertools.combinations(range(logits.shape[-1]), k)],
        dtype=logits.dtype,
    )
    return torch.softmax(logits @ subsets.T, -1) @ subsets


def reference_choice(family: str, router: Any, logits: torch.Tensor) -> torch.Tensor:
    """[T, E] the logits of the distribution over subsets."""
    if family in ("DeepSeek-V3", "GLM4-MoE"):
        bias = router.e_score_correction_bias
        shift = torch.logit(torch.sigmoid(logits) + bias - bias.mean()) - logits
        return logits + shift.detach()
    if family == "ERNIE 4.5":
        bias = router.moe_statics.e_score_correction_bias.squeeze()
        shift = torch.log(torch.softmax(logits, -1) + bias - bias.mean()) - torch.log_softmax(logits, -1)
        return logits + shift.detach()
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_a_dense_computation(family: str) -> None:
    """Every expert on every token, straight-through weights with marginals by enumeration, plain autograd."""
    changes = {"router_jitter_noise": 0.01} if family == "Phi-MoE" else {}
    model = ungrouped(family, "eager", **changes)
    handle = adapter.patch(model, cr.Exactly(TOP_K), seed=SEED)
    block, router = block_of(model).train(), router_of(model)
    # Small enough for every share to stay a probability.
    if family == "ERNIE 4.5":
        router.moe_statics.e_score_correction_bias.data.sub_(7.0).mul_(0.02)
    if hasattr(router, "e_score_correction_bias"):
        router.e_score_correction_bias.data.sub_(7.0).mul_(0.2).add_(7.0)
    hidden = torch.randn(1, 11, model.config.hidden_size, generator=torch.Generator().manual_seed(2)) * 0.4
    upstream = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(4))

    def outcome(run: Any) -> list[torch.Tensor]:
        leaf = hidden.clone().requires_grad_()
        parameters = [router.weight, *block.experts.parameters()]
        output = run(leaf)
        output = output[0] if isinstance(output, tuple) else output
        return [output.detach(), *torch.autograd.grad((output * upstream).sum(), [leaf, *parameters])]

    found = outcome(block)
    (routing,) = handle.routings
    mask = routing.mask.clone()
    loop = type(block.experts).forward.__wrapped__

    def dense(leaf: torch.Tensor) -> torch.Tensor:
        rows = leaf.reshape(-1, leaf.shape[-1])
        logits = F.linear(rows, router.weight, getattr(router, "bias", None))
        m = enumerated_marginals(reference_choice(family, router, logits), TOP_K)
        g = mask + m - m.detach()
        weights = reference_weights(family, router, g, mask, logits)
        one = torch.ones(len(rows), 1)
        total = torch.zeros_like(rows)
        for e in range(mask.shape[-1]):
            result = loop(block.experts, rows, torch.full((len(rows), 1), e), one)
            # Experts that a token is not sent to are not computed: their weight has no gradient there.
            total = total + torch.where(mask[:, e], weights[:, e], 0.0)[:, None] * result
        total = total.reshape(leaf.shape)
        if hasattr(block, "shared_expert"):
            return total + torch.sigmoid(block.shared_expert_gate(leaf)) * block.shared_expert(leaf)
        shared = getattr(block, "shared_experts", None)
        return total if shared is None else total + shared(leaf)

    for ours, expected in zip(found, outcome(dense), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [0.3, 3.0, 30.0])
@pytest.mark.parametrize("spread", [0.0, 0.01, 0.3, 3.0])
def test_shifted_logits_choose_as_the_scores_and_their_bias_do(scale: float, spread: float) -> None:
    logits = (torch.randn(200, 16, generator=torch.Generator().manual_seed(0)) * scale).double().requires_grad_()
    bias = (torch.randn(16, generator=torch.Generator().manual_seed(1)) * spread + 14.0).double()
    for shift, share in (
        (weights_module.shifted_sigmoid, torch.sigmoid(logits)),
        (weights_module.shifted_softmax, torch.softmax(logits, -1)),
    ):
        shifted, score = shift(logits, bias), share + bias
        order = score.argsort(-1)
        ranked = shifted.gather(-1, order)
        clear = score.gather(-1, order).diff(dim=-1) > 1e-12
        assert bool((ranked.diff(dim=-1)[clear] > 0).all())
        # What all biases have in common does not matter.
        torch.testing.assert_close(shifted, shift(logits, bias - 14.0), rtol=1e-6, atol=1e-6)
        if spread > 0.0:  # however far the bias goes, logits stay where sampling still explores
            assert float((shifted.amax(-1) - shifted.amin(-1)).max()) < 60
        (gradient,) = torch.autograd.grad(shifted.sum(), logits)
        assert torch.equal(gradient, torch.ones_like(gradient))
        if spread == 0.0:
            assert torch.equal(shifted, logits)


# ---------------------------------------------------------------------------------------------- padding


@pytest.mark.parametrize("constraint", [cr.Between(1, 4), cr.AtMost(2)], ids=repr)
@pytest.mark.parametrize("padding", ["auto", "distinct", "sentinel", "ragged"])
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", [*ALWAYS, "GPT-OSS"])
def test_paddings_are_right_or_refused(family: str, implementation: str, padding: Any, constraint: Any) -> None:
    model = tiny(family, "eager")
    handle = adapter.patch(model, constraint, padding="distinct", seed=SEED)
    loss, expected = train_once(model, handle)
    counts = torch.cat([routing.counts for routing in handle.routings])
    assert counts.min() < counts.max()
    model = tiny(family, implementation)
    if padding == "sentinel" and (implementation != "eager" or family == "GPT-OSS"):
        with pytest.raises(ValueError, match=r"padding='sentinel' would be wrong for \w+Experts"):
            adapter.patch(model, constraint, padding=padding, seed=SEED)
        assert not any(isinstance(module, CircuitRouting) for module in model.modules())
        return
    handle = adapter.patch(model, constraint, padding=padding, seed=SEED)
    again, found = train_once(model, handle)
    torch.testing.assert_close(again, loss)
    assert_same(found, expected, rtol=1e-4, atol=1e-6)
    handle.unpatch()
    assert model.config._experts_implementation == implementation


def test_auto_takes_the_cheapest_that_is_right() -> None:
    def indices(family: str, implementation: str, parallel: bool = False) -> tuple[str, bool]:
        model = tiny(family, implementation)
        block_of(model).experts._is_expert_parallel = parallel
        adapter.patch(model, cr.Between(1, 4), seed=SEED)
        found = router_of(model).train()(torch.randn(20, model.config.hidden_size))[2]
        return model.config._experts_implementation, bool((found == 8).any())

    assert indices("OLMoE", "grouped_mm") == ("circuitroute", True)
    assert indices("OLMoE", "batched_mm") == ("circuitroute:batched_mm", True)
    assert indices("OLMoE", "eager") == ("eager", True)
    assert indices("GPT-OSS", "eager") == ("circuitroute:eager", True)
    assert indices("OLMoE", "deepgemm") == ("deepgemm", False)
    assert indices("OLMoE", "eager", parallel=True)[1] is False
    assert indices("OLMoE", "grouped_mm", parallel=True)[1] is False


def test_a_fixed_count_needs_no_padding() -> None:
    for padding in ("auto", "ragged", "sentinel"):
        model = tiny("OLMoE")
        adapter.patch(model, cr.Exactly(3), padding=padding)
        assert model.config._experts_implementation == "grouped_mm"
        assert int(router_of(model).train()(torch.randn(20, 32))[2].max()) < 8


def test_an_implementation_changed_after_patching_is_noticed() -> None:
    model = tiny("OLMoE").train()
    adapter.patch(model, cr.Between(1, 4), padding="ragged")
    model.set_experts_implementation("grouped_mm")
    with pytest.raises(ValueError, match="'grouped_mm' in one process: it needs the implementation that patch"):
        model(tokens())
    model = tiny("OLMoE").train()
    handle = adapter.patch(model, cr.Between(1, 4), seed=SEED)
    loss, expected = train_once(model, handle)
    model.set_experts_implementation("batched_mm")  # auto turns to distinct
    again, found = train_once(model, handle)
    torch.testing.assert_close(again, loss)
    assert_same(found, expected, rtol=1e-4, atol=1e-6)


def test_tokens_without_experts_get_nothing() -> None:
    model = tiny("OLMoE")
    handle = adapter.patch(model, cr.AtMost(0))
    block = block_of(model).train()
    hidden = torch.randn(1, 5, 32, requires_grad=True)
    output = block(hidden)
    assert torch.equal(output, torch.zeros_like(output))
    assert handle.routings[0].counts.tolist() == [0] * 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_narrow_dtypes_and_autocast(dtype: torch.dtype) -> None:
    model = tiny("OLMoE").to(dtype)
    before = logits_of(model)
    handle = adapter.patch(model, cr.Exactly(2))
    assert torch.equal(logits_of(model), before)
    model.train()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        model(tokens(), labels=tokens()).loss.backward()
    assert all(routing.logits.dtype == torch.float32 for routing in handle.routings)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients(model).values())


# ---------------------------------------------------------------------------------------------- temperature


def _trained(handle: adapter.Handle) -> tuple[cr.Routing, ...]:
    handle.model.train()
    handle.set_step(0)
    handle.model(tokens(), use_cache=False)
    return handle.routings


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_mode_in_training_has_the_same_weights_at_any_temperature(family: str) -> None:
    """Each family's own rule weighs by the logits themselves; only the distribution is tempered."""
    found = []
    for temperature in (1.0, 0.25):
        model = tiny(family)
        handle = adapter.patch(model, dynamic(family), seed=SEED, decide="mode", temperature=temperature)
        found.append(_trained(handle))
    for plain, tempered in zip(*found, strict=True):
        assert torch.equal(plain.mask, tempered.mask)
        assert torch.equal(plain.gates, tempered.gates)
        assert torch.equal(plain.logits, tempered.logits)
        expected = plain.distribution.circuit(plain.logits / 0.25)
        torch.testing.assert_close(tempered.marginals, expected.marginals)
        assert not torch.allclose(tempered.marginals, plain.marginals)
        assert torch.equal(tempered.mask, plain.distribution.mode == 1)


def test_temperature_1_changes_no_decision() -> None:
    routings = []
    for options in ({}, {"temperature": 1, "decide": "sample"}):
        handle = adapter.patch(tiny("OLMoE"), cr.Between(1, 4), seed=SEED, **options)
        routings.append(_trained(handle))
    for plain, given in zip(*routings, strict=True):
        assert torch.equal(plain.mask, given.mask)
        assert torch.equal(plain.gates, given.gates)


def test_a_schedule_sets_the_temperature() -> None:
    handle = adapter.patch(tiny("OLMoE"), cr.Exactly(2), seed=SEED, decide=0.5)
    schedule = cr.schedules.geometric(4.0, 0.01, 10)
    agreements = []
    for step in (0, 5, 10):
        handle.temperature = schedule(step)
        routings = _trained(handle)
        assert all(routing.temperature == schedule(step) for routing in routings)
        agreements.append(float(torch.stack([cr.metrics.mode_agreement(r) for r in routings]).mean()))
    assert agreements == sorted(agreements)
    with pytest.raises(ValueError, match=r"temperature=0\.0: must be positive"):
        handle.temperature = 0.0
    assert handle.temperature == pytest.approx(0.01)


@pytest.mark.parametrize("constraint", [cr.Exactly(2), cr.Between(1, 4)], ids=repr)
def test_evaluation_is_the_mode_at_any_temperature(constraint: cr.Constraint) -> None:
    model = tiny("OLMoE")
    handle = adapter.patch(model, constraint, temperature=0.5)
    expected = logits_of(model)
    for routing in handle.routings:
        torch.testing.assert_close(routing.marginals, routing.distribution.circuit(routing.logits / 0.5).marginals)
    handle.temperature = 5.0
    assert torch.equal(logits_of(model), expected)


def test_the_temperature_is_saved_with_the_model(tmp_path: Path) -> None:
    model = tiny("OLMoE")
    handle = adapter.patch(model, cr.Exactly(2), seed=SEED, decide=0.25, temperature=0.75)
    handle.temperature = 0.5
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["circuitroute"]
    assert (saved["decide"], saved["temperature"]) == (0.25, 0.5)
    again = adapter.get_handle(adapter.load(tmp_path))
    assert again.temperature == 0.5
    for one, other in zip(_trained(again), _trained(handle), strict=True):
        assert torch.equal(one.mask, other.mask)


def test_settings_without_a_temperature_are_at_1(tmp_path: Path) -> None:
    """As version 0.1 saved them."""
    model = tiny("OLMoE")
    adapter.patch(model, cr.Exactly(2))
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["circuitroute"]["temperature"], config["circuitroute"]["decide"]
    path.write_text(json.dumps(config))
    assert adapter.get_handle(adapter.load(tmp_path)).temperature == 1.0


def test_a_copy_has_a_temperature_of_its_own() -> None:
    handle = adapter.patch(tiny("OLMoE"), cr.Exactly(2), temperature=0.5)
    copied = adapter.get_handle(copy.deepcopy(handle.model))
    copied.temperature = 2.0
    assert (handle.temperature, copied.temperature) == (0.5, 2.0)
    assert handle.model.config.circuitroute["temperature"] == 0.5
    assert copied.model.config.circuitroute["temperature"] == 2.0


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


# ---------------------------------------------------------------------------------------------- in and out


@pytest.mark.parametrize("family", ALWAYS)
def test_unpatching_restores_everything(family: str) -> None:
    model = tiny(family)
    before, keys, kinds = logits_of(model), list(model.state_dict()), [type(m) for m in model.modules()]
    config = model.config.to_dict()
    handle = adapter.patch(model, dynamic(family), seed=1)
    assert list(model.state_dict()) == keys
    assert not torch.equal(logits_of(model), before)
    handle.unpatch()
    assert torch.equal(logits_of(model), before)
    assert [type(m) for m in model.modules()] == kinds
    assert model.config.to_dict() == config
    assert not any("circuitroute" in name for m in model.modules() for name in vars(m))
    with pytest.raises(RuntimeError, match="is not patched"):
        handle.unpatch()
    adapter.patch(model, dynamic(family))


def test_layers_that_are_not_named_stay_stock() -> None:
    model = tiny("OLMoE", num_hidden_layers=3)
    handle = adapter.patch(model, {2: cr.Exactly(1), 0: cr.Between(1, 3)})
    assert handle.layers == (0, 2)
    assert not isinstance(router_of(model, 1), CircuitRouting)
    logits_of(model)
    assert [routing.distribution.circuit.constraint for routing in handle.routings] == [cr.Between(1, 3), cr.Exactly(1)]
    assert model.config.circuitroute["constraints"] == ["Between(1, 3)", None, "Exactly(1)"]


def test_layers_are_numbered_as_in_the_model() -> None:
    model = tiny("DeepSeek-V3", first_k_dense_replace=1, num_hidden_layers=3)
    assert list(adapter.own_constraints(model)) == [1, 2]
    assert adapter.patch(model, [cr.Exactly(1), cr.Exactly(2)]).layers == (1, 2)


def test_a_copy_is_a_model_of_its_own() -> None:
    model = tiny("OLMoE").train()
    handle = adapter.patch(model, cr.Between(1, 4), seed=SEED)
    handle.set_step(3)
    model(tokens())
    twin = copy.deepcopy(model)
    other = adapter.get_handle(twin)
    assert other.routings == ()
    twin(tokens())
    assert torch.equal(other.routings[0].mask, handle.routings[0].mask)
    other.set_step(4)
    twin(tokens())
    assert handle._session.step == 3
    assert not torch.equal(other.routings[0].mask, handle.routings[0].mask)
    other.unpatch()
    assert isinstance(router_of(model), CircuitRouting)
    assert twin.config._experts_implementation == "grouped_mm"
    assert model.config._experts_implementation == "circuitroute"


def test_a_copied_router_stays_with_its_model() -> None:
    """As PEFT makes them: what the copy decides is the model's decision."""
    model = tiny("OLMoE").train()
    handle = adapter.patch(model, cr.Exactly(2), seed=SEED)
    block_of(model).gate = copy.deepcopy(block_of(model).gate)
    handle.set_step(9)
    model(tokens())
    assert len(handle.routings) == 2


def test_patching_after_peft() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = tiny("OLMoE")
    before = logits_of(model)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["gate"])
    ).eval()
    handle = adapter.patch(wrapped, cr.Exactly(2), seed=SEED)
    assert torch.equal(logits_of(wrapped), before)
    _, found = train_once(wrapped, handle)
    assert sum(".gate." in name for name in found) == 2
    handle.unpatch()
    assert torch.equal(logits_of(wrapped), before)


def test_hooks_of_accelerate_are_kept() -> None:
    """Offloading keeps the forward it found as a bound method."""
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = tiny("OLMoE")
    before = logits_of(model)
    accelerate.hooks.add_hook_to_module(router_of(model), accelerate.hooks.AlignDevicesHook("cpu"))
    handle = adapter.patch(model, cr.Exactly(1))
    assert not torch.equal(logits_of(model), before)
    assert handle.routings[0].counts.tolist() == [1] * 18
    handle.unpatch()
    assert torch.equal(logits_of(model), before)


def test_a_plain_load_has_stock_routers(tmp_path: Path) -> None:
    model = tiny("OLMoE")
    before = logits_of(model)
    adapter.patch(model, {1: cr.Exactly(2) & cr.AtMost(3).over([0, 1])}, combine="marginal", estimator="score", seed=5)
    model.save_pretrained(tmp_path)
    plain = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(plain), before)
    with pytest.raises(ValueError, match="is not patched: call patch"):
        adapter.get_handle(plain)
    again = adapter.load(tmp_path, dtype=torch.float64)
    assert again.dtype == torch.float64
    assert adapter.get_handle(again).layers == (1,)
    options = router_of(again, 1).circuitroute_plan.session.options
    assert (options.combine, options.estimator, options.seed) == ("marginal", "score", 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "was not saved from a patched model"),
        ({"format": 2}, "has settings of format 2: this release reads 1"),
        ({"constraints": ["__import__('os').getcwd()", None]}, "is not made of built-in constraints"),
        ({"constraints": ["Exactly(2)"]}, "saved with 1 mixture-of-experts layers, but the model has 2"),
        ({"estimator": "<mine>"}, "estimator='<mine>': choose one of"),
        ({"padding": "zeros"}, "padding='zeros': choose one of"),
        ({"temperature": -1.0}, "temperature=-1.0: must be positive"),
    ],
)
def test_settings_that_cannot_be_read_are_refused(tmp_path: Path, change: Any, message: str) -> None:
    model = tiny("OLMoE")
    adapter.patch(model, cr.Exactly(2))
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["circuitroute"] = None if change is None else {**config["circuitroute"], **change}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=re.escape(message)):
        adapter.load(tmp_path)


# ---------------------------------------------------------------------------------------------- refusals


def small(name: str, **settings: Any) -> Any:
    return getattr(transformers, f"{name}Config")(
        **{"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64, **settings}
    )


@pytest.mark.parametrize(
    ("build", "router"),
    [
        (
            lambda: transformers.Llama4ForCausalLM(
                transformers.Llama4TextConfig(
                    hidden_size=32,
                    num_hidden_layers=1,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    head_dim=8,
                    vocab_size=64,
                    intermediate_size=16,
                    intermediate_size_mlp=16,
                    num_local_experts=4,
                    interleave_moe_layer_step=1,
                    pad_token_id=0,
                )
            ),
            "Llama4Router",
        ),
        (
            lambda: transformers.SwitchTransformersForConditionalGeneration(
                transformers.SwitchTransformersConfig(
                    d_model=32,
                    d_kv=8,
                    d_ff=16,
                    num_layers=2,
                    num_decoder_layers=2,
                    num_sparse_encoder_layers=1,
                    num_sparse_decoder_layers=1,
                    num_heads=4,
                    num_experts=4,
                    vocab_size=64,
                )
            ),
            "SwitchTransformersTop1Router",
        ),
        (
            lambda: transformers.JetMoeForCausalLM(
                small("JetMoe", num_key_value_heads=2, kv_channels=8, num_local_experts=4, intermediate_size=16)
            ),
            "JetMoeTopKGating",
        ),
        (
            lambda: transformers.DbrxForCausalLM(
                transformers.DbrxConfig(
                    d_model=32,
                    n_heads=4,
                    n_layers=1,
                    vocab_size=64,
                    max_seq_len=16,
                    ffn_config={"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
                    attn_config={"kv_n_heads": 2, "rope_theta": 1e4},
                )
            ),
            "DbrxRouter",
        ),
    ],
    ids=["Llama4", "Switch", "JetMoe", "Dbrx"],
)
def test_other_routers_are_refused_by_name(build: Any, router: str) -> None:
    model = build()
    with pytest.raises(
        TypeError, match=rf"is a {router}, which routes in a way that is not supported.*OlmoeTopKRouter"
    ):
        adapter.patch(model, cr.Exactly(1))


def test_a_model_without_experts_is_refused() -> None:
    model = transformers.LlamaForCausalLM(small("Llama", num_key_value_heads=2, intermediate_size=16, pad_token_id=0))
    with pytest.raises(ValueError, match="model=LlamaForCausalLM has no mixture-of-experts layer"):
        adapter.patch(model, cr.Exactly(1))


def test_a_router_with_a_forward_of_its_own_is_refused() -> None:
    model = tiny("OLMoE")
    stock = type(router_of(model))
    router_of(model).__class__ = type("Mine", (stock,), {"forward": lambda self, hidden: None})
    with pytest.raises(TypeError, match="is a Mine, which routes in a way"):
        adapter.patch(model, cr.Exactly(1))


def test_patching_twice_is_refused() -> None:
    model = tiny("OLMoE")
    adapter.patch(model, {0: cr.Exactly(1)})
    with pytest.raises(ValueError, match="is patched already: call unpatch"):
        adapter.patch(model, {1: cr.Exactly(1)})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"constraint": 2}, TypeError, "constraint=2: int is not a constraint"),
        ({"constraint": "Exactly(2)"}, TypeError, "str is not a constraint"),
        ({"constraint": [cr.Exactly(1)]}, ValueError, "constraint has 1 entries, but the model has 2"),
        ({"constraint": {5: cr.Exactly(1)}}, ValueError, r"constraint names layers \[5\].*those are \[0, 1\]"),
        ({"constraint": {}}, ValueError, "name at least one"),
        ({"constraint": cr.Exactly(9)}, cr.InfeasibleError, "over 8 variables"),
        ({"combine": "sum"}, ValueError, "combine='sum': choose one of"),
        ({"estimator": "magic"}, ValueError, "estimator='magic': choose one of"),
        ({"padding": "zeros"}, ValueError, "padding='zeros': choose one of 'auto', 'distinct'"),
        ({"eval": "sample"}, ValueError, "eval='sample': choose one of 'auto', 'mode'"),
        ({"seed": 0.5}, TypeError, "seed=0.5: expected an integer"),
        ({"temperature": 0}, ValueError, r"temperature=0\.0: must be positive"),
        ({"temperature": "hot"}, TypeError, "temperature='hot': expected a number"),
        ({"decide": "greedy"}, ValueError, "decide='greedy': choose 'sample', 'mode', or a share"),
        ({"decide": "mode", "estimator": "score"}, ValueError, "decide='mode' with estimator='score'"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments: Any, error: type[Exception], message: str) -> None:
    model = tiny("OLMoE")
    with pytest.raises(error, match=message):
        adapter.patch(model, **{"constraint": cr.Exactly(2), **arguments})
    assert not any(isinstance(module, CircuitRouting) for module in model.modules())
    assert model.config._experts_implementation == "grouped_mm"


def test_steps_are_integers() -> None:
    handle = adapter.patch(tiny("OLMoE"), cr.Exactly(2))
    with pytest.raises(TypeError, match=r"step=0\.5: expected an integer"):
        handle.set_step(0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"token_offset has dtype torch\.float32"):
        handle.set_step(0, torch.zeros(()))


@pytest.mark.parametrize("family", ALWAYS)
@pytest.mark.parametrize("combine", ["softmax", "normalized", "sigmoid", "marginal"])
def test_another_rule_for_weights_replaces_the_models_own(family: str, combine: Any) -> None:
    model = tiny(family)
    handle = adapter.patch(model, cr.Exactly(2), combine=combine)
    logits, weights, indices = router_of(model).train()(torch.randn(30, 32))
    (routing,) = handle.routings
    expected = {
        "softmax": lambda: torch.softmax(logits, -1),
        "normalized": lambda: torch.softmax(torch.where(routing.mask, logits, -torch.inf), -1),
        "sigmoid": lambda: torch.sigmoid(logits),
        "marginal": lambda: routing.marginals,
    }[combine]()
    torch.testing.assert_close(weights, expected.gather(-1, indices), rtol=1e-5, atol=1e-6)


def test_an_estimator_can_be_given() -> None:
    """No gradient crosses the sample: the router learns through the weights only, as with the usual top-k."""
    results = []
    for estimator in ("simple", "none"):
        model = tiny("OLMoE")
        handle = adapter.patch(model, cr.Exactly(2), estimator=estimator, seed=SEED)
        results.append(train_once(model, handle))
    torch.testing.assert_close(results[0][0], results[1][0])
    name = next(name for name in results[0][1] if ".gate." in name)
    assert not torch.allclose(results[0][1][name], results[1][1][name])


def test_a_wrong_number_of_rows_is_noticed_by_the_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of ragged execution can fail: padding that is computed shows in the number of rows."""
    monkeypatch.setattr(routers_module, "choose_padding", lambda *_: "distinct")
    with pytest.raises(AssertionError):
        support.runs_ragged("OLMoE")


def test_experts_without_a_choice_of_implementation_run_their_own_loop() -> None:
    assert implementation_of(torch.nn.Linear(2, 2)) == "eager"
