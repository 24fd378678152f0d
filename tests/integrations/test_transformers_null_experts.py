"""LongCat-Flash, patched: the null experts of its router cost nothing, whatever the constraint says of them.

Shapes: B batch, S sequence, T = B S tokens, H hidden size, E real experts, Z null experts, K slots.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'circuitroute[transformers]'")

import transformers

import circuitroute as cr
from circuitroute.integrations import transformers as adapter
from tests.integrations.models import COMMON, LATENT, tokens
from tests.integrations.support import SEED, assert_same, block_of, logits_of, train_once

pytestmark = [
    pytest.mark.integrations,
    # Of transformers, about itself.
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]

E, Z, TOP_K, SCALE = 5, 3, 3, 1.5
REAL_BUDGET = cr.Exactly(4) & cr.Between(1, 2).over(range(E))


def longcat(**changes: Any) -> Any:
    """A tiny model with weights of a seed, and biases that change the choice."""
    settings = {name: value for name, value in COMMON.items() if name not in ("num_hidden_layers",)}
    settings |= {"num_layers": 2, "num_key_value_heads": 4, "num_experts_per_tok": TOP_K, **LATENT, "head_dim": 4}
    settings |= {"n_routed_experts": E, "zero_expert_num": Z, "ffn_hidden_size": 16, "expert_ffn_hidden_size": 16}
    torch.manual_seed(0)
    config = transformers.LongcatFlashConfig(**settings, routed_scaling_factor=SCALE, **changes)
    model = transformers.LongcatFlashForCausalLM(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in model.model.layers:
            router = layer.mlp.router
            router.classifier.weight.copy_(torch.randn(router.classifier.weight.shape, generator=generator) * 0.5)
            bias = router.e_score_correction_bias
            bias.copy_(torch.randn(bias.shape, generator=generator) * 0.01 + 7.0)
            for parameter in layer.mlp.experts.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def without_null_experts() -> Any:
    """The same model with a router over the real experts alone."""
    model = longcat()
    model.config.zero_expert_num = 0
    other = type(model)(model.config)
    state = model.state_dict()
    for name, value in state.items():
        if "router" in name or name.endswith("gate_up_proj"):
            state[name] = value[:E]
    other.load_state_dict(state)
    return other


def counting(model: Any) -> list[int]:
    """A list that fills with the numbers of rows that experts compute."""
    rows: list[int] = []
    for layer in model.model.layers:
        layer.mlp.experts.act_fn.register_forward_hook(lambda *a: rows.append(len(a[2])))
    return rows


def test_own_constraints_and_names() -> None:
    assert adapter.own_constraints(longcat()) == {0: cr.Exactly(TOP_K), 1: cr.Exactly(TOP_K)}
    assert adapter.supported()["LongCat-Flash"] == ("LongcatFlashTopkRouter",)


def test_its_own_rule_evaluates_as_the_stock_model_to_the_bit() -> None:
    model = longcat()
    before = logits_of(model)
    handle = adapter.patch(model, adapter.own_constraints(model), seed=SEED)
    assert torch.equal(logits_of(model), before)
    assert handle.routings[0].mask.shape == (18, E + Z)
    handle.unpatch()
    handle = adapter.patch(model, cr.Exactly(TOP_K), eval="mode")
    torch.testing.assert_close(logits_of(model), before, rtol=1e-5, atol=1e-6)
    assert bool(torch.stack([routing.mask[:, E:].any() for routing in handle.routings]).any())
    handle.unpatch()
    assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize(
    "constraint",
    [cr.Between(1, 4), REAL_BUDGET, cr.Cost([1] * E + [0] * Z, at_most=2), cr.AtMost(1), cr.Exactly(1), cr.AtMost(0)],
    ids=repr,
)
def test_only_chosen_real_experts_are_computed(constraint: cr.Constraint) -> None:
    model = longcat()
    handle = adapter.patch(model, constraint, padding="distinct", seed=SEED)
    loss, expected = train_once(model, handle)
    for padding in ("auto", "sentinel"):
        model = longcat()
        handle = adapter.patch(model, constraint, padding=padding, seed=SEED)
        rows = counting(model)
        again, found = train_once(model, handle)
        torch.testing.assert_close(again, loss)
        # An expert that nobody chose may have no gradient, where a padded slot would give it one of 0.
        untouched = {name: torch.zeros_like(g) for name, g in expected.items() if name not in found}
        assert_same({**found, **untouched}, expected, rtol=1e-4, atol=1e-6)
        real = [routing.mask[:, :E] for routing in handle.routings]
        assert sum(rows) == int(torch.stack(real).sum())
        satisfies = handle.routings[0].distribution.circuit.satisfies
        assert all(bool(satisfies(routing.mask).all()) for routing in handle.routings)


def test_a_budget_of_real_experts_is_kept() -> None:
    model = longcat()
    handle = adapter.patch(model, REAL_BUDGET, seed=SEED)
    for run in (lambda: train_once(model, handle), lambda: logits_of(model)):
        run()
        for routing in handle.routings:
            assert set(routing.counts.tolist()) == {4}
            assert set(routing.mask[:, :E].sum(-1).tolist()) <= {1, 2}


def marginals(logits: Tensor, constraint: cr.Constraint) -> Tensor:
    worlds = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * logits.shape[-1])
    subsets = worlds[cr.compile(constraint, logits.shape[-1]).satisfies(worlds.bool())]
    return torch.softmax(logits @ subsets.T, -1) @ subsets


@pytest.mark.parametrize("constraint", [cr.Exactly(TOP_K), cr.Between(1, 4), REAL_BUDGET], ids=repr)
@pytest.mark.parametrize("probes", [0, "all"])
def test_gradients_are_those_of_a_dense_computation(constraint: cr.Constraint, probes: Any) -> None:
    """Every expert and null expert on every token, marginals by enumeration, plain autograd."""
    model = longcat()
    handle = adapter.patch(model, constraint, seed=SEED, probes=probes)
    block = block_of(model).train()
    router, experts = block.router, block.experts
    hidden = torch.randn(1, 11, 32, generator=torch.Generator().manual_seed(2)) * 0.4
    upstream = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(4))

    def outcome(run: Any) -> list[Tensor]:
        leaf = hidden.clone().requires_grad_()
        output = run(leaf)
        inputs = [leaf, router.classifier.weight, experts.gate_up_proj, experts.down_proj]
        return [output.detach(), *torch.autograd.grad((output * upstream).sum(), inputs)]

    found = outcome(block)
    mask = handle.routings[0].mask.clone()

    def dense(leaf: Tensor) -> Tensor:
        x = leaf.reshape(-1, 32)
        logits = F.linear(x, router.classifier.weight)
        bias = router.e_score_correction_bias
        shift = torch.log(torch.softmax(logits, -1) + bias - bias.mean()) - torch.log_softmax(logits, -1)
        m = marginals(logits + shift.detach(), constraint)
        gates = (mask + m - m.detach()) * torch.softmax(logits, -1) * SCALE
        up = torch.einsum("th,eih->tei", x, experts.gate_up_proj[:E])
        gate, up = up.chunk(2, -1)
        real = torch.einsum("tei,ehi->teh", F.silu(gate) * up, experts.down_proj)
        outputs = torch.cat([real, x[:, None].expand(-1, Z, -1)], 1)
        total = (torch.where(mask, gates, 0.0)[..., None] * outputs).sum(1)
        if probes:
            total = total + (torch.where(mask, 0.0, gates)[..., None] * outputs.detach()).sum(1)
        return total.reshape(leaf.shape)

    for ours, expected in zip(found, outcome(dense), strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("constraint", [cr.Exactly(1), cr.Between(1, 3)], ids=repr)
def test_a_model_without_null_experts_pads_with_others(constraint: cr.Constraint) -> None:
    """Its loop fails on the index E, and on one slot."""
    model = without_null_experts()
    before = logits_of(model)
    handle = adapter.patch(model, adapter.own_constraints(model))
    assert torch.equal(logits_of(model), before)
    handle.unpatch()
    handle = adapter.patch(model, constraint, seed=SEED)
    loss, found = train_once(model, handle)
    assert bool(torch.isfinite(loss))
    assert all(bool(gradient.isfinite().all()) for gradient in found.values())
    handle.unpatch()
    with pytest.raises(ValueError, match="padding='sentinel' would be wrong for LongcatFlashExperts"):
        adapter.patch(model, cr.Between(1, 3), padding="sentinel")
    with pytest.raises(ValueError, match="padding='ragged' would be wrong for LongcatFlashExperts"):
        adapter.patch(model, cr.Between(1, 3), padding="ragged")


def test_it_generates_saves_and_checkpoints(tmp_path: Path) -> None:
    model = longcat().eval()
    adapter.patch(model, REAL_BUDGET, seed=SEED)
    arguments = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    written = model.generate(tokens(1), **arguments)
    before = logits_of(model)
    model.save_pretrained(tmp_path)
    again = adapter.load(tmp_path)
    assert torch.equal(logits_of(again), before)
    assert torch.equal(again.generate(tokens(1), **arguments), written)
    handle = adapter.get_handle(again)
    loss, expected = train_once(again, handle)
    again.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    repeated, found = train_once(again, handle)
    assert torch.equal(repeated, loss)
    assert_same(found, expected, rtol=0.0, atol=0.0)


def test_router_logits_are_the_stock_ones() -> None:
    model = longcat().eval()
    routers = [layer.mlp.router for layer in model.model.layers]
    hidden = torch.randn(6, 32)
    with torch.no_grad():
        before = [router(hidden)[0] for router in routers]
        adapter.patch(model, REAL_BUDGET, eval="mode")
        after = [router(hidden)[0] for router in routers]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert before[0].shape == (6, E + Z)
