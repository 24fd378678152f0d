"""What works for which family: the checks behind the table in docs/transformers.md.

``python -m tests.integrations.support`` runs all of them and prints the table; ``test_transformers.py`` beside it runs
each as a test, and holds the table to what was run.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import circuitroute as cr
from circuitroute.integrations import transformers as adapter
from tests.integrations.models import ALWAYS, FAMILIES, dynamic, tiny, tokens

SEED = 3


def gradients(model: Any) -> dict[str, Tensor]:
    """The gradients that the last backward pass left, by name."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def train_once(model: Any, handle: adapter.Handle | None = None, step: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one step in training mode."""
    model.train()
    model.zero_grad()
    if handle is not None:
        handle.set_step(step)
    torch.manual_seed(5)
    ids = tokens()
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.detach(), gradients(model)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], **tolerance: float) -> None:
    """The same gradients, of the same parameters."""
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        torch.testing.assert_close(gradient, other[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def logits_of(model: Any, ids: Tensor | None = None) -> Tensor:
    """The logits in evaluation."""
    model.eval()
    with torch.no_grad():
        return model(tokens() if ids is None else ids, use_cache=False).logits


def router_of(model: Any, layer: int = 0) -> Any:
    """The router of a decoder layer."""
    mlp = next(
        m for n, m in model.named_modules() if n.endswith(f"layers.{layer}") and "." not in n.split("layers.")[1]
    )
    block = next(m for m in mlp.modules() if hasattr(m, "experts"))
    return block.gate if hasattr(block, "gate") else block.router


def block_of(model: Any, layer: int = 0) -> Any:
    """The mixture-of-experts block of a decoder layer."""
    mlp = next(
        m for n, m in model.named_modules() if n.endswith(f"layers.{layer}") and "." not in n.split("layers.")[1]
    )
    return next(m for m in mlp.modules() if hasattr(m, "experts"))


# ---------------------------------------------------------------------------------------------- the checks


def forward_backward(family: str) -> None:
    """Evaluation is the stock model's, bit for bit; training reaches every logit, with a finite gradient."""
    model = tiny(family)
    before = logits_of(model)
    stock = type(router_of(model))
    handle = adapter.patch(model, adapter.own_constraints(model), seed=SEED)
    assert isinstance(router_of(model), stock)
    assert torch.equal(logits_of(model), before)
    loss, found = train_once(model, handle)
    assert bool(torch.isfinite(loss))
    name, parameter = next((n, p) for n, p in model.named_parameters() if p is router_of(model).weight)
    assert found[name].shape == parameter.shape
    assert bool((found[name].abs().sum(-1) > 0).all())  # experts that no token was sent to as well
    assert bool(torch.isfinite(found[name]).all())
    handle.unpatch()
    assert torch.equal(logits_of(model), before)


def generates(family: str) -> None:
    """Greedy decoding with a cache, as the stock model does, and with a dynamic number of experts."""
    model = tiny(family).eval()
    arguments = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    before = model.generate(tokens(1), **arguments)
    handle = adapter.patch(model, adapter.own_constraints(model))
    assert torch.equal(model.generate(tokens(1), **arguments), before)
    handle.unpatch()
    handle = adapter.patch(model, dynamic(family))
    assert model.generate(tokens(1), **arguments).shape == before.shape


def checkpoints(family: str) -> None:
    """Both kinds of activation checkpointing give the gradients of none, with a seed and without."""
    every = tuple(itertools.product((None, SEED), (True, False)))
    for seed, reentrant in every if family in ALWAYS else every[1:3]:
        model = tiny(family)
        handle = adapter.patch(model, dynamic(family), seed=seed)
        _, expected = train_once(model, handle)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        _, found = train_once(model, handle)
        assert_same(found, expected, rtol=0.0, atol=0.0)


def saves_and_loads(family: str) -> None:
    """A patched model that was saved comes back patched, and gives the same numbers."""
    model = tiny(family)
    adapter.patch(model, dynamic(family), seed=SEED)
    before = logits_of(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = adapter.load(folder)
        plain = type(model).from_pretrained(folder)
    assert again.config.circuitroute == model.config.circuitroute
    assert torch.equal(logits_of(again), before)
    assert list(again.state_dict()) == list(plain.state_dict())


def compiles(family: str) -> None:
    """A compiled block with exactly k and with a dynamic number of experts, forward and backward, as the eager one."""
    for constraint in (cr.Between(1, 3), cr.Exactly(2))[: 2 if family in ALWAYS else 1]:
        model = tiny(family, **({"n_group": 1, "topk_group": 1} if family in ("DeepSeek-V3", "GLM4-MoE") else {}))
        handle = adapter.patch(model, constraint, padding="distinct", seed=SEED)
        block = block_of(model).train()
        hidden = torch.randn(2, 5, model.config.hidden_size)
        results = []
        for run in (block, torch.compile(block, backend="aot_eager", fullgraph=True)):
            leaf = hidden.clone().requires_grad_()
            output = run(leaf)
            output = output[0] if isinstance(output, tuple) else output
            output.square().sum().backward()
            (routing,) = handle.routings
            results.append((output.detach(), leaf.grad, handle.load_balance_loss().detach(), routing.mask))
        for eager, compiled in zip(*results, strict=True):
            torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


def adapts(family: str) -> None:
    """PEFT: LoRA on attention, with a trained copy of the router and without."""
    import peft

    targets = ["q_proj", "o_proj"] if family != "DeepSeek-V3" else ["q_a_proj", "o_proj"]
    name = "gate" if hasattr(block_of(tiny(family)), "gate") else "router"
    for trained in (None, [name]):
        model = tiny(family)
        handle = adapter.patch(model, dynamic(family), seed=SEED)
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, modules_to_save=trained))
        _, found = train_once(wrapped, handle)
        routers = [key for key in found if f".{name}." in key]
        assert bool(routers) == bool(trained)
        assert all("modules_to_save" in key for key in routers)
        assert len(handle.routings) == 2
        assert all(bool(gradient.isfinite().all()) for gradient in found.values())


def runs_ragged(family: str) -> None:
    """A dynamic number of experts without computing what is not used: the loss and gradients of padding, fewer rows."""
    model = tiny(family)
    handle = adapter.patch(model, dynamic(family), padding="distinct", seed=SEED)
    loss, expected = train_once(model, handle)
    handle.unpatch()
    handle = adapter.patch(model, dynamic(family), padding="ragged", seed=SEED)
    rows: list[int] = []
    for layer in range(2):
        experts = block_of(model, layer).experts
        gate = experts._apply_gate
        experts._apply_gate = lambda x, gate=gate: rows.append(len(x)) or gate(x)
    again, found = train_once(model, handle)
    torch.testing.assert_close(again, loss)
    assert_same(found, expected, rtol=1e-4, atol=1e-6)
    assert rows == [int(routing.counts.sum()) for routing in handle.routings]


CHECKS: dict[str, Callable[[str], None]] = {
    "forward, backward": forward_backward,
    "generate": generates,
    "checkpointing": checkpoints,
    "save, load": saves_and_loads,
    "compile": compiles,
    "PEFT": adapts,
    "ragged": runs_ragged,
}


def table(cell: Callable[[str, str], str]) -> str:
    """The table, with what ``cell(family, check)`` says."""
    lines = ["| family | " + " | ".join(CHECKS) + " |", "| --- |" + " :---: |" * len(CHECKS)]
    lines += [f"| {family} | " + " | ".join(cell(family, check) for check in CHECKS) + " |" for family in FAMILIES]
    return "\n".join(lines)


def run(family: str, check: str) -> str:
    """What the table says of a check."""
    try:
        CHECKS[check](family)
    except Exception as error:
        sys.stderr.write(f"{family}, {check}: {type(error).__name__}: {str(error)[:400]}\n")
        return "no"
    return "yes"


if __name__ == "__main__":
    sys.stdout.write(table(run) + "\n")
