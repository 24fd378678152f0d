"""The routers of transformers' models, patched: the table of what works, and what is computed.

Shapes: B batch, S sequence, T = B S tokens, H hidden size, E experts, K slots.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'circuitroute[transformers]'")

from torch.nn import functional as F

import circuitroute as cr
from circuitroute.integrations import transformers as adapter
from circuitroute.integrations.transformers import weights as weights_module
from tests.integrations.models import ALWAYS, FAMILIES, TOP_K, own_count, tiny, tokens, ungrouped
from tests.integrations.reference import enumerated_marginals, reference_choice, reference_weights
from tests.integrations.support import (
    CHECKS,
    SEED,
    block_of,
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


# What every test run checks of every family; the other cells of the table take most of the time and differ least.
ALWAYS_CHECKED = ("forward, backward", "save, load", "ragged")


def marks(family: str, check: str) -> list[Any]:
    """Compilation, the slowest check, is held to one family; the rest of the table is in the slow tests."""
    in_every_run = check in ALWAYS_CHECKED or family == ALWAYS[0] or (family in ALWAYS and check != "compile")
    return [] if in_every_run else [pytest.mark.slow]


CELLS = [
    pytest.param(family, check, marks=marks(family, check), id=f"{family}-{check}")
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
    # LongCat-Flash has tests of its own, in test_transformers_null_experts.py.
    assert set(adapter.supported()) == {*FAMILIES, "LongCat-Flash"}


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
