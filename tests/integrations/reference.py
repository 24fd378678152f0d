"""What stock routers of transformers do, written down plainly.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch.nn import functional as F


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
