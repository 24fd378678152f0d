"""Patched models of transformers with probes: what they teach the gates is what all experts would, and nothing else.

Shapes: T tokens, H hidden size, E experts, K slots.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'circuitroute[transformers]'")

from torch.nn import functional as F

import circuitroute as cr
from circuitroute.integrations import transformers as adapter
from circuitroute.integrations.transformers import routers as routers_module
from circuitroute.routing.probes import draw_probes
from tests.integrations.models import ALWAYS, FAMILIES, TOP_K, dynamic, tiny, tokens, ungrouped
from tests.integrations.reference import enumerated_marginals, reference_choice, reference_weights
from tests.integrations.support import (
    SEED,
    assert_same,
    block_of,
    gradients,
    logits_of,
    router_of,
    train_once,
)

pytestmark = [
    pytest.mark.integrations,
    # Of transformers and peft, about themselves.
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]

PROBED = [family for family in FAMILIES if family != "Phi-MoE"]
# Its own rule gives no weight to what is not chosen.
COMBINE: dict[str, Any] = {"Phi-MoE": "normalized"}
every_family = pytest.mark.parametrize("family", FAMILIES)
every_probe = pytest.mark.parametrize("probes", [1, 2, "all"])


def probed(family: str, constraint: Any, probes: Any, implementation: str = "grouped_mm", **options: Any) -> Any:
    """A patched tiny model's handle."""
    model = ungrouped(family, implementation)
    combine = options.pop("combine", COMBINE.get(family))
    return adapter.patch(model, constraint, combine=combine, probes=probes, **{"seed": SEED, **options})


def block_outcome(handle: adapter.Handle, run: Callable[[Tensor], Any] | None = None) -> list[Tensor]:
    """Output of the first block, or of ``run`` in its place, and gradients of its input, router and experts."""
    block, router = block_of(handle.model).train(), router_of(handle.model)
    generator = torch.Generator().manual_seed(2)
    leaf = (torch.randn(1, 11, handle.model.config.hidden_size, generator=generator) * 0.4).requires_grad_()
    output = (block if run is None else run)(leaf)
    output = output[0] if isinstance(output, tuple) else output
    upstream = torch.randn(output.shape, generator=generator)
    parameters = [leaf, router.weight, *block.experts.parameters()]
    return [output.detach(), *torch.autograd.grad((output * upstream).sum(), parameters)]


def every_output(block: Any, rows: Tensor) -> Tensor:
    """[T, E, H] every expert on every token, by the model's own loop."""
    loop, one = type(block.experts).forward.__wrapped__, torch.ones(len(rows), 1)
    each = [loop(block.experts, rows, torch.full((len(rows), 1), e), one) for e in range(block.experts.num_experts)]
    return torch.stack(each, 1)


def with_shared(block: Any, leaf: Tensor, total: Tensor) -> Tensor:
    """[T, H] of the routed experts, with what the block adds to it."""
    total = total.reshape(leaf.shape)
    if hasattr(block, "shared_expert"):
        return total + torch.sigmoid(block.shared_expert_gate(leaf)) * block.shared_expert(leaf)
    shared = getattr(block, "shared_experts", None)
    return total if shared is None else total + shared(leaf)


def weights_drawn(routing: cr.Routing, probes: Any) -> Tensor:
    """[T, E] what each probe of the first layer counts, drawn with the keys that the page names."""
    weights = torch.zeros_like(routing.gates)
    if probes == "all":
        return weights.masked_fill(~routing.mask, 1.0)
    drawn = draw_probes(routing, probes, cr.random_key(SEED, 0, 0, torch.arange(len(weights))))
    weights[drawn.token, drawn.expert] = drawn.weight
    return weights


# ---------------------------------------------------------------------------------------------- what is learnt


@every_family
@every_probe
def test_gradients_are_those_of_a_dense_computation(family: str, probes: Any) -> None:
    """Every expert on every token, of which the probes count for the gates alone; enumerated marginals, autograd."""
    handle = probed(family, cr.Exactly(TOP_K), probes)
    block, router = block_of(handle.model), router_of(handle.model)
    # Small enough for every share to stay a probability.
    if family == "ERNIE 4.5":
        router.moe_statics.e_score_correction_bias.data.sub_(7.0).mul_(0.02)
    if hasattr(router, "e_score_correction_bias"):
        router.e_score_correction_bias.data.sub_(7.0).mul_(0.2).add_(7.0)
    found = block_outcome(handle)
    (routing,) = handle.routings
    mask, weight = routing.mask, weights_drawn(routing, probes)

    def dense(counted: Tensor) -> Callable[[Tensor], Tensor]:
        def run(leaf: Tensor) -> Tensor:
            rows = leaf.reshape(-1, leaf.shape[-1])
            logits = F.linear(rows, router.weight, getattr(router, "bias", None))
            m = enumerated_marginals(reference_choice(family, router, logits), TOP_K)
            rule = family if family in PROBED else "normalised"
            gates = reference_weights(rule, router, mask + m - m.detach(), mask, logits)
            outputs = every_output(block, rows)
            chosen = torch.where(mask, gates, 0.0)[..., None] * outputs
            return with_shared(block, leaf, (chosen + (gates * counted)[..., None] * outputs.detach()).sum(1))

        return run

    expected = block_outcome(handle, dense(weight))
    for ours, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=2e-4, atol=2e-5)
    without = block_outcome(handle, dense(torch.zeros_like(weight)))
    assert not torch.allclose(without[2], expected[2], rtol=0.05)
    for ours, wanted in zip(found[3:], without[3:], strict=True):  # experts learn nothing from probes
        torch.testing.assert_close(ours, wanted, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("family", PROBED)
def test_all_probes_with_the_estimator_dense_are_densemixer(family: str) -> None:
    """Each expert's own weight, over the sum of the chosen ones, which the others take as a constant."""
    handle = probed(family, cr.Exactly(TOP_K), "all", estimator="dense", decide="mode")
    block, router = block_of(handle.model), router_of(handle.model)
    found = block_outcome(handle)
    mask = handle.routings[0].mask

    def mixed(leaf: Tensor) -> Tensor:
        rows = leaf.reshape(-1, leaf.shape[-1])
        logits = F.linear(rows, router.weight, getattr(router, "bias", None))
        sigmoid = family in ("DeepSeek-V3", "GLM4-MoE")
        scores = torch.sigmoid(logits) if sigmoid else torch.softmax(logits, -1)
        total = (scores * mask).sum(-1, keepdim=True)
        if family in ("OLMoE", "FlexOLMo", "Qwen2-MoE"):  # not normalised
            total = torch.ones_like(total)
        weights = torch.where(mask, scores / total, scores / total.detach()) * (2.5 if sigmoid else 1.0)
        outputs = every_output(block, rows)
        outputs = torch.where(mask[..., None], outputs, outputs.detach())
        # The backward pass of the mixture of all, the value of the chosen.
        unchosen = (torch.where(mask, 0.0, weights)[..., None] * outputs).sum(1)
        return with_shared(block, leaf, (weights[..., None] * outputs).sum(1) - unchosen.detach())

    for ours, wanted in zip(found, block_outcome(handle, mixed), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=2e-4, atol=2e-5)


# ---------------------------------------------------------------------------------------------- what stays as it was


@every_family
@pytest.mark.parametrize("kind", ["exactly", "between"])
def test_the_loss_is_the_same_to_the_bit(family: str, kind: str) -> None:
    """And so are decisions, their losses, and the gradients of the last layer's experts."""
    constraint = cr.Exactly(2) if kind == "exactly" else cr.Between(1, 3)
    found = []
    for probes in (0, 1, "all"):
        handle = probed(family, constraint, probes)
        loss, every = train_once(handle.model, handle)
        last = [gradient for name, gradient in every.items() if ".1." in name and ".experts." in name]
        decided = [part for routing in handle.routings for part in (routing.mask, routing.gates, routing.marginals)]
        assert len(last) > 1
        found.append(([loss, handle.load_balance_loss(), *decided, *last], every))
    for values, every in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0][0], values, strict=True))
        name = next(n for n, p in handle.model.named_parameters() if p is router_of(handle.model, 1).weight)
        assert not torch.allclose(found[0][1][name], every[name], rtol=0.01)


@pytest.mark.parametrize("probes", [1, 3])
def test_without_a_seed_decisions_are_the_same_too(probes: int) -> None:
    losses = []
    for count in (0, probes):
        handle = probed("OLMoE", cr.Between(1, 4), count, seed=None)
        losses.append(train_once(handle.model, handle)[0])
    assert torch.equal(*losses)


def test_stock_router_logits_and_auxiliary_loss_see_no_probes() -> None:
    outputs = []
    for probes in (0, 1):
        handle = probed("OLMoE", cr.Exactly(2), probes)
        outputs.append(handle.model.train()(tokens(), labels=tokens(), output_router_logits=True))
    assert torch.equal(outputs[0].aux_loss, outputs[1].aux_loss)
    for one, other in zip(outputs[0].router_logits, outputs[1].router_logits, strict=True):
        assert torch.equal(one, other)


def test_nothing_is_probed_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a probe was drawn")

    monkeypatch.setattr(routers_module, "probe_weights", refuse)
    handle = probed("OLMoE", cr.Exactly(2), 1)
    with pytest.raises(AssertionError, match="a probe was drawn"):
        handle.model.train()(tokens())
    with torch.no_grad():
        handle.model(tokens())
    handle.model.eval()(tokens())
    # Gates without a gradient, of a frozen router with a frozen input.
    router, hidden = router_of(handle.model).train().requires_grad_(False), torch.randn(5, 32)
    assert router(hidden)[2].shape == (5, 2)
    with pytest.raises(AssertionError, match="a probe was drawn"):
        router(hidden.requires_grad_())


def test_evaluation_is_that_of_the_stock_model() -> None:
    model = tiny("OLMoE")
    before = logits_of(model)
    handle = adapter.patch(model, adapter.own_constraints(model), probes=1, seed=SEED)
    assert torch.equal(logits_of(model), before)
    handle.unpatch()
    assert model.config._experts_implementation == "grouped_mm"
    assert torch.equal(logits_of(model), before)


# ---------------------------------------------------------------------------------------------- how experts run them


@pytest.mark.parametrize("constraint", [cr.Exactly(2), cr.Between(1, 4), cr.Between(1, 8), cr.AtMost(2)], ids=repr)
@pytest.mark.parametrize("family", [*ALWAYS, "GPT-OSS"])
@pytest.mark.parametrize("probes", [1, 3])
def test_all_ways_to_run_them_agree(family: str, constraint: cr.Constraint, probes: int) -> None:
    """Also where slots and probes are more than there are experts, and where some tokens have no experts."""
    expected: list[Tensor] = []
    for padding, implementation in (
        ("ragged", "grouped_mm"),
        ("ragged", "eager"),
        ("ragged", "batched_mm"),
        ("distinct", "grouped_mm"),
        ("distinct", "eager"),
        ("distinct", "batched_mm"),
        ("sentinel", "eager"),
    ):
        if padding == "sentinel" and family == "GPT-OSS":
            continue
        handle = probed(family, constraint, probes, implementation, padding=padding)
        found = block_outcome(handle)
        expected = expected or found
        for ours, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
        width = router_of(handle.model)(torch.randn(5, 32))[2].shape[-1]
        slots = max(1, handle.routings[0].max_count)
        spare = 8 - handle.routings[0].distribution.circuit.min_count
        assert width == (slots + min(probes, spare) if padding == "ragged" else min(slots + probes, 8))


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("probes", [1, 2, "all"])
def test_each_costs_a_row_without_gradient(implementation: str, probes: Any) -> None:
    handle = probed("OLMoE", cr.Between(1, 4), probes, implementation)
    experts, rows = block_of(handle.model).experts, []
    gate = experts._apply_gate
    experts._apply_gate = lambda x: rows.append((len(x), torch.is_grad_enabled())) or gate(x)
    block_outcome(handle)
    counts = handle.routings[0].counts
    unchosen = 8 * len(counts) - int(counts.sum())
    assert rows == [(int(counts.sum()), True), (unchosen if probes == "all" else probes * len(counts), False)]


@pytest.mark.parametrize("constraint", [cr.Exactly(2), cr.Between(1, 3)], ids=repr)
def test_a_probe_that_is_not_finite_is_left_out(constraint: cr.Constraint) -> None:
    """An expert that the constraint forbids, which probes='all' runs all the same."""
    found = []
    for broken in (False, True):
        handle = probed("OLMoE", constraint & cr.Exactly(0).over([3]), "all")
        with torch.no_grad():
            block_of(handle.model).experts.down_proj[3] = torch.inf if broken else 0.0
        found.append(block_outcome(handle))
        assert not bool(handle.routings[0].mask[:, 3].any())
    for finite, infinite in zip(*found, strict=True):
        assert torch.equal(finite, infinite)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", [*ALWAYS, "Mixtral"])
def test_narrow_dtypes_and_autocast(family: str, dtype: torch.dtype) -> None:
    losses = []
    for probes in (0, 1):
        handle = probed(family, cr.Exactly(2), probes)
        model = handle.model.to(dtype).train()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            loss = model(tokens(), labels=tokens()).loss
        loss.backward()
        assert all(bool(gradient.isfinite().all()) for gradient in gradients(model).values())
        losses.append((loss, gradients(model)))
    assert torch.equal(losses[0][0], losses[1][0])
    name = next(n for n, p in model.named_parameters() if p is router_of(model, 1).weight)
    assert not torch.allclose(losses[0][1][name], losses[1][1][name], rtol=0.05)


@pytest.mark.parametrize("padding", ["ragged", "distinct"])
def test_compiled_blocks_run_them(padding: Any) -> None:
    handle = probed("OLMoE", cr.Between(1, 3), 1, padding=padding)
    block = block_of(handle.model)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for ours, wanted in zip(block_outcome(handle, compiled), block_outcome(handle), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


# ---------------------------------------------------------------------------------------------- surroundings


@pytest.mark.parametrize("seed", [SEED, None])
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("family", ALWAYS)
def test_checkpointing_probes_the_same(family: str, use_reentrant: bool, seed: int | None) -> None:
    handle = probed(family, dynamic(family), 1, seed=seed)
    model = handle.model
    loss, expected = train_once(model, handle)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    again, found = train_once(model, handle)
    assert torch.equal(loss, again)
    assert_same(found, expected, rtol=0.0, atol=0.0)


def test_a_recomputation_of_two_layers_decides_the_same_without_a_seed() -> None:
    """Reentrant: the first run has no gradient and no probes, the second has both, and the same generator after it."""
    results = []
    for recompute in (False, True):
        handle = probed("OLMoE", cr.Between(1, 4), 1, seed=None)
        blocks = [block_of(handle.model, layer).train() for layer in (0, 1)]
        leaf = torch.randn(1, 11, 32, generator=torch.Generator().manual_seed(2)).requires_grad_()
        run = lambda x, blocks=blocks: blocks[1](x + blocks[0](x))  # noqa: E731
        torch.manual_seed(5)
        output = torch.utils.checkpoint.checkpoint(run, leaf, use_reentrant=True) if recompute else run(leaf)
        output.square().sum().backward()
        results.append([output, leaf.grad, *gradients(torch.nn.ModuleList(blocks)).values()])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def test_a_budget_is_kept_and_probed() -> None:
    found = []
    for probes in (0, 1):
        budget = cr.Budget(8, layers=2, per_layer=cr.Between(1, 4), total=cr.AtMost(5))
        handle = probed("OLMoE", budget, probes)
        loss, every = train_once(handle.model, handle)
        assert int(sum(routing.counts for routing in handle.routings).max()) <= 5
        found.append((loss, [routing.mask for routing in handle.routings], every))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(one, other) for one, other in zip(found[0][1], found[1][1], strict=True))
    name = next(name for name in found[0][2] if ".1." in name and ".gate." in name)
    assert not torch.allclose(found[0][2][name], found[1][2][name], rtol=0.05)


def test_probes_are_saved_with_the_model(tmp_path: Path) -> None:
    handle = probed("OLMoE", cr.Between(1, 4), 1, probe_weights=2.5)
    handle.probes = 2
    handle.model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["circuitroute"]
    assert (saved["probes"], saved["probe_weights"]) == (2, 2.5)
    again = adapter.get_handle(adapter.load(tmp_path))
    assert again.probes == 2
    (loss, expected), (reloaded, found) = (train_once(h.model, h) for h in (handle, again))
    assert torch.equal(loss, reloaded)
    assert_same(found, expected, rtol=0.0, atol=0.0)


def test_settings_without_probes_have_none(tmp_path: Path) -> None:
    """As earlier versions saved them."""
    handle = probed("OLMoE", cr.Exactly(2), 1)
    handle.model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["circuitroute"]["probes"], config["circuitroute"]["probe_weights"]
    path.write_text(json.dumps(config))
    assert adapter.get_handle(adapter.load(tmp_path)).probes == 0


def test_a_schedule_sets_their_number() -> None:
    """From none on, which changes how experts are run, and back; copies have a number of their own."""
    handle = probed("OLMoE", cr.Exactly(2), 0)
    expected = {probes: train_once((h := probed("OLMoE", cr.Exactly(2), probes)).model, h) for probes in (0, 1, "all")}
    for probes in (0, 1, "all", 0):
        handle.probes = probes
        loss, found = train_once(handle.model, handle)
        assert torch.equal(loss, expected[probes][0])
        assert_same(found, expected[probes][1], rtol=0.0, atol=0.0)
    copied = adapter.get_handle(copy.deepcopy(handle.model))
    copied.probes = 3
    assert (handle.probes, copied.probes) == (0, 3)
    assert handle.model.config.circuitroute["probes"] == 0
    with pytest.raises(ValueError, match="probes=-1: must be at least 0"):
        handle.probes = -1
    assert handle.probes == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"probes": -1}, ValueError, "probes=-1: must be at least 0"),
        ({"probes": 1.5}, TypeError, "probes=1.5: expected an integer"),
        ({"probes": "some"}, TypeError, "probes='some': expected an integer"),
        ({"probes": 1, "probe_weights": "both"}, ValueError, "probe_weights='both': choose 'importance'"),
        ({"probes": 1, "probe_weights": -1.0}, ValueError, r"probe_weights=-1\.0: a cap must be positive"),
        ({"probes": 1, "estimator": "none"}, ValueError, "probes=1 with estimator='none': no gradient crosses"),
        ({"probes": "all", "estimator": "score"}, ValueError, "probes='all' with estimator='score': no gradient"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(options: Any, error: type[Exception], message: str) -> None:
    model = tiny("OLMoE")
    with pytest.raises(error, match=message):
        adapter.patch(model, cr.Exactly(2), **options)
    assert not hasattr(model.config, "circuitroute")


def test_a_rule_without_weights_for_the_unchosen_is_refused() -> None:
    model = tiny("Phi-MoE")
    refusal = "probes=1 would be run in vain with the own rule of Phi-MoE.*combine='normalized'"
    with pytest.raises(ValueError, match=refusal):
        adapter.patch(model, cr.Exactly(2), probes=1)
    handle = adapter.patch(model, cr.Exactly(2))
    with pytest.raises(ValueError, match=refusal):
        handle.probes = 1
    assert handle.probes == 0


def test_a_padding_that_would_be_wrong_is_refused() -> None:
    """With probes also where every token has the same number of experts."""
    with pytest.raises(ValueError, match="padding='sentinel' would be wrong"):
        probed("OLMoE", cr.Exactly(2), 1, padding="sentinel")
    model = tiny("OLMoE")
    block_of(model).experts._is_expert_parallel = True
    with pytest.raises(ValueError, match="padding='ragged' would be wrong"):
        adapter.patch(model, cr.Exactly(2), probes=1, padding="ragged")
