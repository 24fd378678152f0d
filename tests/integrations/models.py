"""Tiny random models of the families that circuitroute patches.

Shapes: B batch, S sequence, T = B S tokens, E experts.
"""

from __future__ import annotations

from typing import Any

import torch

import circuitroute as cr

HIDDEN, LAYERS, EXPERTS, TOP_K, VOCABULARY = 32, 2, 8, 2, 64
B, S = 2, 9

COMMON: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DEEPSEEK = {
    "n_routed_experts": EXPERTS,
    "n_group": 4,
    "topk_group": 2,
    "moe_intermediate_size": 16,
    "intermediate_size": 16,
    "first_k_dense_replace": 0,
    "routed_scaling_factor": 2.5,
    "num_key_value_heads": 4,
}
NO_GROUPS = {"n_group": 1, "topk_group": 1}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
SHARED = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "intermediate_size": 16}

# name of the family -> (class, what its configuration differs in)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "OLMoE": ("Olmoe", {"num_experts": EXPERTS, "intermediate_size": 16}),
    "DeepSeek-V3": ("DeepseekV3", {**DEEPSEEK, **LATENT}),
    "FlexOLMo": ("FlexOlmo", {"num_experts": EXPERTS, "intermediate_size": 16}),
    "Qwen2-MoE": ("Qwen2Moe", {**SHARED, "num_experts": 60, "num_experts_per_tok": 4}),
    "Qwen3-MoE": ("Qwen3Moe", {**SHARED, "num_experts": EXPERTS, "norm_topk_prob": True, "head_dim": 8}),
    "Qwen3-Next": (
        "Qwen3Next",
        {
            **SHARED,
            "num_experts": EXPERTS,
            "head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    "Mixtral": ("Mixtral", {"num_local_experts": EXPERTS, "intermediate_size": 16}),
    "MiniMax": ("MiniMax", {"num_local_experts": EXPERTS, "intermediate_size": 16, "head_dim": 8, "block_size": 16}),
    "GLM4-MoE": ("Glm4Moe", {**DEEPSEEK, "head_dim": 8, "n_shared_experts": 1}),
    "GPT-OSS": (
        "GptOss",
        {"num_local_experts": EXPERTS, "intermediate_size": 16, "head_dim": 8, "sliding_window": 8},
    ),
    "Granite-MoE": ("GraniteMoe", {"num_local_experts": EXPERTS, "intermediate_size": 16}),
    "Phi-MoE": ("Phimoe", {"num_local_experts": EXPERTS, "intermediate_size": 16}),
    "ERNIE 4.5": (
        "Ernie4_5_Moe",
        {
            "moe_num_experts": EXPERTS,
            "moe_k": TOP_K,
            "moe_intermediate_size": 16,
            "intermediate_size": 16,
            "moe_layer_start_index": 0,
            "moe_num_shared_experts": 1,
        },
    ),
}
ALWAYS = ("OLMoE", "DeepSeek-V3")


def tiny(family: str, implementation: str = "grouped_mm", **changes: Any) -> Any:
    """A model of the family with weights of a seed, biases that matter, and logits far enough apart to choose by."""
    import transformers

    name, own = FAMILIES[family]
    settings = {**COMMON, **own, **changes}
    config = getattr(transformers, f"{name}Config")(**settings)
    config._experts_implementation = implementation
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for label, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if label.endswith("e_score_correction_bias"):
                # A common part, as trained models have it, and parts that change the choice.
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.05 + 7.0)
            elif ".gate.weight" in label or ".router.weight" in label:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.5)
            elif tensor.dim() == 3 or label.endswith(".router.bias"):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
    return model


def tokens(batch: int = B, length: int = S, seed: int = 0) -> torch.Tensor:
    """[B, S] token ids."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def own_count(family: str) -> int:
    """How many experts a token of the stock model uses."""
    return int({**COMMON, **FAMILIES[family][1]}["num_experts_per_tok"])


def dynamic(family: str) -> cr.Constraint:
    """Fewer and more experts than the stock model uses."""
    return cr.Between(1, own_count(family) + 1)


def ungrouped(family: str, implementation: str = "grouped_mm", **changes: Any) -> Any:
    """A tiny model of 8 experts whose own rule is a plain top-2."""
    if family in ("DeepSeek-V3", "GLM4-MoE"):
        changes |= NO_GROUPS
    if family == "Qwen2-MoE":
        changes |= {"num_experts": 8, "num_experts_per_tok": TOP_K}
    return tiny(family, implementation, **changes)
