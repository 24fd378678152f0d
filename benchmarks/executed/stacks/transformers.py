"""transformers: the block of an OLMoE layer, by experts implementation; a fixed top-k is the stock block.

What executes only what was chosen is ``padding="auto"``; where every token pays it is ``padding="distinct"``.
"""

from __future__ import annotations

import torch
import transformers
from torch import Tensor

import circuitroute as cr
from benchmarks.executed.settings import Layer, Setting, UnavailableError
from circuitroute.integrations import transformers as adapter

PACKAGES = ("transformers",)
BATCHED = "batched_mm"
WAYS = ("eager", BATCHED, "grouped_mm")
# batched_mm gathers the matrices of every pair of token and expert; it is made for few tokens, as in decoding.
GATHERED_GIB = 1.0


def build(way: str, setting: Setting) -> Layer:
    """The block with its model, patched unless it is stock.

    Raises:
        UnavailableError: more memory than is reasonable.
    """
    sizes = setting.sizes
    gathered = sizes.tokens * sizes.k * 3 * sizes.hidden * sizes.inner * 4 / 2**30
    if way == BATCHED and gathered > GATHERED_GIB:
        raise UnavailableError(f"it would gather {gathered:.1f} GiB of weights: give fewer --tokens")
    torch.manual_seed(0)
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
    model.set_experts_implementation(way)
    block = model.model.layers[0].mlp
    with torch.no_grad():
        for parameter in block.experts.parameters():
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        block.gate.weight.copy_(setting.priced_router)
    if setting.asked is None:
        return Layer(model, lambda hidden: _output(block, hidden), lambda: float(sizes.k))
    padding = "distinct" if setting.padded else "auto"
    handle = adapter.patch(model, setting.constraint, padding=padding, decide="mode")

    def executed() -> float:
        return cr.metrics.active_experts(handle.routings[0])

    return Layer(model, lambda hidden: _output(block, hidden), executed)


def _output(block: torch.nn.Module, hidden: Tensor) -> Tensor:
    found = block(hidden.unsqueeze(0))
    output: Tensor = found[0] if isinstance(found, tuple) else found
    return output.reshape(hidden.shape)
