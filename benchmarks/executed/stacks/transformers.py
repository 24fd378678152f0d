"""transformers: the block of an OLMoE layer by experts implementation, and one of LongCat-Flash with null experts.

A fixed top-k is the stock block. What executes only what was chosen is ``padding="auto"``; where every token pays it is
``padding="distinct"``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor

import circuitroute as cr
from benchmarks.executed.settings import LEAST, Layer, Setting, Sizes, UnavailableError
from circuitroute.integrations import transformers as adapter

PACKAGES = ("transformers",)
BATCHED, COMPILED, LONGCAT = "batched_mm", "grouped_mm, compiled", "LongCat-Flash"
WAYS = ("eager", BATCHED, "grouped_mm", COMPILED, LONGCAT)
# batched_mm gathers the matrices of every pair of token and expert; it is made for few tokens, as in decoding.
GATHERED_GIB = 1.0
# The backend of torch.compile: one graph, without generating code for it.
BACKEND = "aot_eager"
# Of a null expert where none is to be chosen; what is left of float32 beside it does not matter.
NEVER = -1e4


def build(way: str, setting: Setting) -> Layer | None:
    """The block with its model, patched unless it is stock.

    Raises:
        UnavailableError: more memory than is reasonable.
    """
    sizes = setting.sizes
    gathered = sizes.tokens * sizes.k * 3 * sizes.hidden * sizes.inner * 4 / 2**30
    if way == BATCHED and gathered > GATHERED_GIB:
        raise UnavailableError(f"it would gather {gathered:.1f} GiB of weights: give fewer --tokens")
    torch.manual_seed(0)
    return _longcat(setting) if way == LONGCAT else _olmoe(way, setting)


def _olmoe(way: str, setting: Setting) -> Layer:
    sizes = setting.sizes
    config = transformers.OlmoeConfig(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.inner,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_experts=sizes.experts,
        num_experts_per_tok=sizes.k,
        vocab_size=8,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = transformers.OlmoeForCausalLM(config)
    model.set_experts_implementation("grouped_mm" if way == COMPILED else way)
    block = model.model.layers[0].mlp
    _fill(block.experts)
    with torch.no_grad():
        block.gate.weight.copy_(setting.priced_router)
    padding = "distinct" if setting.padded else "auto"
    handle = None if setting.asked is None else adapter.patch(model, setting.constraint, padding=padding, decide="mode")
    run: Callable[[Tensor], Tensor] = partial(_output, block)
    if way == COMPILED:
        torch._dynamo.config.recompile_limit = 64  # every layer is a program of its own, in training and evaluation
        run = torch.compile(run, backend=BACKEND, fullgraph=True, dynamic=False)
    return Layer(model, run, _executed(handle, sizes))


def _longcat(setting: Setting) -> Layer | None:
    """Exactly k of the experts and k - 1 null experts, all with the price as their logit: the choice of the range.

    A fixed top-k chooses none of them.
    """
    sizes, null = setting.sizes, setting.sizes.k - LEAST
    if setting.padded:
        return None
    config = transformers.LongcatFlashConfig(
        hidden_size=sizes.hidden,
        expert_ffn_hidden_size=sizes.inner,
        ffn_hidden_size=8,
        num_layers=1,
        num_attention_heads=2,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        moe_topk=sizes.k,
        n_routed_experts=sizes.experts,
        zero_expert_num=null,
        vocab_size=8,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = transformers.LongcatFlashForCausalLM(config)
    block = model.model.layers[0].mlp
    _fill(block.experts)
    with torch.no_grad():
        weight = block.router.classifier.weight.zero_()
        weight[: sizes.experts] = setting.router
        weight[sizes.experts :, 0] = NEVER if setting.asked is None else setting.price
    handle = None if setting.asked is None else adapter.patch(model, cr.Exactly(sizes.k), eval="mode", decide="mode")
    return Layer(model, partial(_output, block), _executed(handle, sizes))


@torch.no_grad()
def _fill(experts: torch.nn.Module) -> None:
    for parameter in experts.parameters():
        parameter.normal_(std=parameter.shape[-1] ** -0.5)


def _executed(handle: adapter.Handle | None, sizes: Sizes) -> Callable[[], float]:
    """Experts per token in the last pass, null experts not among them; k where the stock router chose."""
    if handle is None:
        return lambda: float(sizes.k)
    return lambda: cr.metrics.active_experts(handle.routings[0].mask[:, : sizes.experts])


def _output(block: Callable[[Tensor], Any], hidden: Tensor) -> Tensor:
    found = block(hidden.unsqueeze(0))
    output: Tensor = found[0] if isinstance(found, tuple) else found
    return output.reshape(hidden.shape)
