"""The routers of transformers' models: how each computes logits, chooses and weighs.

A family splits the ``forward`` of a router class into logits -> choice -> weights, of which circuitroute replaces the
choice. Everything is read from the module itself, which keeps its parameters.

Legend: T tokens, H hidden size, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from circuitroute._tensors import without_autocast
from circuitroute.constraints import ActiveGroups, Constraint, Exactly, Groups
from circuitroute.integrations.transformers.weights import (
    Weigh,
    clamped_weigh,
    shifted_sigmoid,
    shifted_softmax,
    sigmoid_weigh,
    softmax_weigh,
    successive_weigh,
)
from circuitroute.routing.weights import Combine

MODELING = "transformers.models."
ROUTER_NAMES = ("gate", "router")


def _plain(router: Any, hidden: Tensor) -> Tensor:
    return F.linear(hidden.reshape(-1, hidden.shape[-1]), router.weight, getattr(router, "bias", None))


def _wide(router: Any, hidden: Tensor) -> Tensor:
    return F.linear(hidden.reshape(-1, hidden.shape[-1]).float(), router.weight.float())


def _always_wide(router: Any, hidden: Tensor) -> Tensor:
    """In float32, under autocast too."""
    with without_autocast(hidden):
        return _wide(router, hidden)


def _plain_then_wide(router: Any, hidden: Tensor) -> Tensor:
    return _plain(router, hidden).float()


def _unshifted(router: Any, logits: Tensor) -> Tensor:
    return logits


def _top_k(router: Any) -> Constraint:
    return Exactly(router.top_k)


def _num_experts(router: Any) -> int:
    return int(router.num_experts)


def _no_null_expert(experts: Any) -> None:
    return None


@dataclass(frozen=True)
class Family:
    """Router classes that work the same way.

    Attributes:
        name: of the models.
        routers: class names.
        logits: (router, hidden [..., H]) -> [T, E], bit for bit those of the class.
        combine: router -> its rule for weights, by name or as a function.
        choice: (router, logits) -> [T, E], the scores it chooses by: the logits, or shifted by a bias for the choice.
        constraint: router -> the subsets it chooses from.
        dtype_of: what determines the dtype of the weights it returns.
        skips_sentinel: whether the eager loop over experts skips the index E.
        weighs_unchosen: whether an unchosen expert has a weight that it would be used with, which probes need.
        choices: router -> E, null experts among them.
        null_expert: experts -> the index of one that computes nothing, for unused slots; None if there is none.
        least_slots: the fewest that the experts take.
    """

    name: str
    routers: tuple[str, ...]
    logits: Callable[[Any, Tensor], Tensor]
    combine: Callable[[Any], Combine | Weigh]
    choice: Callable[[Any, Tensor], Tensor] = _unshifted
    constraint: Callable[[Any], Constraint] = _top_k
    dtype_of: Literal["logits", "hidden", "float32"] = "logits"
    skips_sentinel: bool = True
    weighs_unchosen: bool = True
    choices: Callable[[Any], int] = _num_experts
    null_expert: Callable[[Any], int | None] = _no_null_expert
    least_slots: int = 1

    def fitted(self, experts: Any, weights: Tensor, indices: Tensor, choices: int) -> tuple[Tensor, Tensor]:
        """Weights and indices [T, K] as these experts take them: a null expert in place of the index E, enough slots.

        Slots that are added have weight 0 and the null expert; without one, any other expert, computed in vain.
        """
        null = self.null_expert(experts)
        if null is not None:
            indices = indices.masked_fill(indices == choices, null)
        missing = self.least_slots - indices.shape[-1]
        if missing <= 0:
            return weights, indices
        last = indices[:, -1:]
        more = (last + 1) % choices if null is None else torch.full_like(last, null)
        return F.pad(weights, (0, missing)), torch.cat([indices, more.expand(-1, missing)], -1)

    def dtype(self, hidden: Tensor, logits: Tensor) -> torch.dtype:
        """Of the weights."""
        return {"logits": logits.dtype, "hidden": hidden.dtype, "float32": torch.float32}[self.dtype_of]


# ---------------------------------------------------------------------------------------------- softmax


def _softmax_combine(router: Any) -> Combine:
    return "normalized" if router.norm_topk_prob else "softmax"


def _normalized_combine(router: Any) -> Combine:
    return "normalized"


def _softmax(name: str, *routers: str) -> Family:
    """Softmax over all experts, divided by the sum over the chosen ones if so configured."""
    return Family(name, routers, _plain, _softmax_combine)


def _normalized(name: str, *routers: str) -> Family:
    """Softmax over all experts, always divided by the sum over the chosen ones; weights remain in float32."""
    return Family(name, routers, _plain, _normalized_combine, dtype_of="float32")


# ---------------------------------------------------------------------------------------------- sigmoid and groups


def _grouped_constraint(router: Any) -> Constraint:
    """``top_k`` experts, in at most ``topk_group`` groups."""
    if router.topk_group >= router.num_group:
        return Exactly(router.top_k)
    return ActiveGroups(Groups(router.num_group), at_most=router.topk_group) & Exactly(router.top_k)


def _sigmoid_combine(router: Any) -> Weigh:
    return partial(sigmoid_weigh, normalized=bool(router.norm_topk_prob), scale=float(router.routed_scaling_factor))


def _sigmoid_choice(router: Any, logits: Tensor) -> Tensor:
    return shifted_sigmoid(logits, router.e_score_correction_bias)


def _sigmoid(name: str, *routers: str) -> Family:
    """DeepSeek-V3's: sigmoid scores, a bias for the choice only, groups, a scaling factor."""
    return Family(name, routers, _wide, _sigmoid_combine, _sigmoid_choice, _grouped_constraint, "float32")


# ---------------------------------------------------------------------------------------------- the others


def _ernie_combine(router: Any) -> Weigh:
    return partial(clamped_weigh, least=float(router.norm_min))


def _ernie_choice(router: Any, logits: Tensor) -> Tensor:
    return shifted_softmax(logits, router.moe_statics.e_score_correction_bias.squeeze())


def _longcat_logits(router: Any, hidden: Tensor) -> Tensor:
    return _wide(router.classifier, hidden)


def _longcat_combine(router: Any) -> Weigh:
    return partial(softmax_weigh, scale=float(router.routed_scaling_factor))


def _longcat_choice(router: Any, logits: Tensor) -> Tensor:
    return shifted_softmax(logits, router.e_score_correction_bias)


def _longcat_choices(router: Any) -> int:
    return int(router.n_routed_experts)  # its num_experts are those that compute something


def _longcat_null_expert(experts: Any) -> int | None:
    return int(experts.num_routed_experts) if experts.zero_expert_num else None


def _phimoe_combine(router: Any) -> Weigh:
    return partial(successive_weigh, jitter=float(router.router_jitter_noise))


FAMILIES: tuple[Family, ...] = (
    _softmax("OLMoE", "OlmoeTopKRouter"),
    _softmax("FlexOLMo", "FlexOlmoTopKRouter"),
    _softmax("Qwen2-MoE", "Qwen2MoeTopKRouter"),
    _softmax("Qwen3-MoE", "Qwen3MoeTopKRouter"),
    _softmax("Qwen3-Next", "Qwen3NextTopKRouter"),
    _normalized("Mixtral", "MixtralTopKRouter"),
    _normalized("MiniMax", "MiniMaxTopKRouter"),
    _sigmoid("DeepSeek-V3", "DeepseekV3TopkRouter"),
    _sigmoid("GLM4-MoE", "Glm4MoeTopkRouter"),
    # The softmax over the chosen logits is the normalised softmax.
    Family("GPT-OSS", ("GptOssTopKRouter",), _plain, _normalized_combine, skips_sentinel=False),
    Family("Granite-MoE", ("GraniteMoeTopKRouter",), _plain_then_wide, _normalized_combine, dtype_of="hidden"),
    # A weight depends on the experts taken before: those that are not taken have none.
    Family("Phi-MoE", ("PhimoeTopKRouter",), _plain, _phimoe_combine, weighs_unchosen=False),
    Family("ERNIE 4.5", ("Ernie4_5_MoeTopKRouter",), _always_wide, _ernie_combine, _ernie_choice, dtype_of="hidden"),
    # Its loop fails on the index E, and on a single slot.
    Family(
        "LongCat-Flash",
        ("LongcatFlashTopkRouter",),
        _longcat_logits,
        _longcat_combine,
        _longcat_choice,
        skips_sentinel=False,
        choices=_longcat_choices,
        null_expert=_longcat_null_expert,
        least_slots=2,
    ),
)
_BY_ROUTER = {router: family for family in FAMILIES for router in family.routers}


def supported() -> dict[str, tuple[str, ...]]:
    """The router classes of the models that :func:`patch` takes, by name of the model family."""
    return {family.name: family.routers for family in FAMILIES}


def find_family(router: nn.Module) -> Family | None:
    """The family of a router; None for any other module, and for a subclass that overrides ``forward``."""
    kind: Any = type(router)
    for cls in kind.__mro__:
        family = _BY_ROUTER.get(cls.__name__)
        if family is not None and cls.__module__.startswith(MODELING):
            return family if kind.forward is cls.forward else None
    return None


@dataclass(frozen=True)
class Found:
    """A mixture-of-experts layer of a model.

    Attributes:
        number: of the layer in the model.
        routers: usually one; two if a training library has wrapped a copy and keeps the original.
        experts: the module that computes them.
    """

    number: int
    routers: tuple[nn.Module, ...]
    experts: nn.Module
    family: Family

    @property
    def num_experts(self) -> int:
        """E, null experts among them."""
        return self.family.choices(self.routers[0])

    @property
    def own_constraint(self) -> Constraint:
        """The subsets that the stock router chooses from."""
        return self.family.constraint(self.routers[0])


def find_layers(model: nn.Module) -> list[Found]:
    """The mixture-of-experts layers of a model, in order.

    Raises:
        TypeError: a layer routes in a way that is not supported; the message names its class, and those that are.
        ValueError: there is no such layer.
    """
    found = [(name, parts) for name, block in model.named_modules() for parts in _parts(name, block)]
    if not found:
        raise ValueError(f"model={type(model).__name__} has no mixture-of-experts layer with a router. {_known()}")
    matches = [re.search(r"(?:^|\.)(\d+)(?=\.|$)", name) for name, _ in found]
    numbers = [int(match[1]) for match in matches if match is not None]
    if len(set(numbers)) < len(found):  # some names have no number, or the same
        numbers = list(range(len(found)))
    return [Found(number, *parts) for number, (_, parts) in zip(numbers, found, strict=True)]


def _parts(name: str, block: nn.Module) -> Iterator[tuple[tuple[nn.Module, ...], nn.Module, Family]]:
    """Routers, experts and family of a mixture-of-experts block; nothing for other modules."""
    for attribute in ROUTER_NAMES:
        router = getattr(block, attribute, None)
        if not isinstance(router, nn.Module):
            continue
        inner = {module: family for module in router.modules() if (family := find_family(module)) is not None}
        experts = getattr(block, "experts", None)
        if inner and isinstance(experts, nn.Module):
            yield tuple(inner), _innermost(experts), next(iter(inner.values()))
        elif isinstance(experts, nn.Module) or _looks_like_a_router(router):
            raise TypeError(
                f"{name}.{attribute} is a {type(router).__name__}, which routes in a way that is not supported. "
                f"{_known()}"
            )


def _looks_like_a_router(module: nn.Module) -> bool:
    """Judged by the names in transformers; gates of attention are linear maps, or named differently."""
    kind = type(module)
    return kind.__module__.startswith(MODELING) and kind.__name__.endswith(("Router", "TopKGating"))


def _innermost(experts: nn.Module) -> nn.Module:
    """The experts themselves, if a training library has wrapped them."""
    while isinstance(inner := getattr(experts, "base_layer", None), nn.Module):
        experts = inner
    return experts


def _known() -> str:
    classes = ", ".join(router for family in FAMILIES for router in family.routers)
    return f"Supported are {classes}; for others use circuitroute.route, or request support."
