"""The experts of a patched model: what pads the places of a dynamic number of them, and in which dtypes they run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: pip install 'circuitroute[transformers]'")


import circuitroute as cr
from circuitroute.integrations import transformers as adapter
from circuitroute.integrations.transformers import routers as routers_module
from circuitroute.integrations.transformers.experts import implementation_of
from circuitroute.integrations.transformers.routers import CircuitRouting
from tests.integrations import support
from tests.integrations.models import ALWAYS, tiny, tokens
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


@pytest.mark.parametrize(
    ("probes", "dtype"),
    [
        (1, torch.float32),
        pytest.param(0, torch.float32, marks=pytest.mark.slow),
        pytest.param(0, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(1, torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_a_compiled_block_multiplies_no_unused_slot(probes: int, dtype: torch.dtype) -> None:
    """NaN in an expert that nobody chooses, which fills unused slots of programs that know no better, goes unseen."""
    results = []
    for padding in ("ragged", "distinct"):
        model = tiny("OLMoE").to(dtype)
        rule = cr.Between(0, 3) & cr.Exactly(0).over([7])
        handle = adapter.patch(model, rule, padding=padding, seed=SEED, probes=probes)
        block = block_of(model).train()
        if padding == "ragged":
            with torch.no_grad():
                for parameter in block.experts.parameters():
                    parameter[7] = torch.nan
            block = torch.compile(block, backend="aot_eager", fullgraph=True)
        leaf = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
        output = block(leaf)
        output.float().square().sum().backward()
        results.append([output, leaf.grad, block.gate.weight.grad])
        assert int(handle.routings[0].counts.min()) < 3
        assert block.experts._is_expert_parallel is False
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=tolerance, atol=tolerance)
    torch.compiler.reset()


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


def test_a_wrong_number_of_rows_is_noticed_by_the_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of ragged execution can fail: padding that is computed shows in the number of rows."""
    monkeypatch.setattr(routers_module, "choose_padding", lambda *_: "distinct")
    with pytest.raises(AssertionError):
        support.runs_ragged("OLMoE")


def test_experts_without_a_choice_of_implementation_run_their_own_loop() -> None:
    assert implementation_of(torch.nn.Linear(2, 2)) == "eager"
