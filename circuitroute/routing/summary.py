"""What a training run looks at: the decisions of a step in a few numbers per layer.

Legend: T tokens, E experts, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from circuitroute._validate import int_at_least
from circuitroute.routing.agreement import executed, expected_agreement
from circuitroute.routing.decision import Routing, SoftRouting

Decisions: TypeAlias = "Routing | Tensor"

# The name under which the means over the layers are.
ALL = "all"
# What a distribution adds, as sums over the tokens whose distribution exists, in the order in which they are summed.
_OF_DISTRIBUTIONS = ("decision_entropy", "mode_agreement", "mode_distance", "soft_mass")


@runtime_checkable
class OverLayers(Protocol):
    """A budget over layers, as :class:`circuitroute.Budget` is one."""

    @property
    def layers(self) -> int:
        """L."""
        ...

    @property
    def feasible(self) -> Tensor:
        """[L + 1, C] bool, whose last row says which totals are allowed."""
        ...


def summary(
    routings: Decisions | Iterable[Decisions] | Mapping[str, Decisions],
    *,
    budget: int | OverLayers | None = None,
    group: dist.ProcessGroup | None = None,
) -> dict[str, float]:
    """The decisions of a step in a few numbers: by layer, as ``"layer0/load_entropy"``, and over all, as ``"all/..."``.

    Plain floats, all finite, for TensorBoard, W&B, a JSON line or a Trainer's logs. ``"all/..."`` is the mean over the
    layers that have a quantity; of ``experts_per_path`` and, given a ``budget``, of ``budget_use`` it is that of whole
    paths.

    | key | value | of |
    | --- | --- | --- |
    | `tokens` | T | everything |
    | `load_entropy` | see :func:`~circuitroute.metrics.load_entropy`: 1 when balanced | everything |
    | `max_violation` | see :func:`~circuitroute.metrics.max_violation`: 0 when balanced | everything |
    | `dead_experts` | share of the experts that no token uses | everything |
    | `experts_per_token` | mean number of executed experts | everything |
    | `experts_per_token_std` | its standard deviation over the tokens | everything |
    | `budget_use` | executed experts over the most that the constraint allows | routings |
    | `soft_mass` | mean sum of the marginals, or of soft weights | routings |
    | `decision_entropy` | mean exact entropy, in nats, of what decisions are drawn from | distributions |
    | `mode_agreement` | mean of :func:`~circuitroute.metrics.mode_agreement` | distributions |
    | `mode_distance` | mean size of (S xor M) over the sizes of S and M, S the decision, M the mode | distributions |
    | `invalid_tokens` | share with NaN, or with infinite logits that leave no subset | distributions |
    | `all/experts_per_path` | mean number of experts of a token over all layers; `..._std` | layers of equal T |

    What does not exist has no key, and nothing is NaN: masks have no budget and no distribution, and a
    :class:`SoftRouting` has no distribution. A layer without tokens has ``tokens`` only. Invalid tokens choose no
    expert; the means over distributions leave them out. For a layer under a budget M is the mode of its distribution.

    No graph is kept, and the host waits for the device once.

    Args:
        routings: of one layer, of each layer in turn, or by name; each a :class:`Routing` or a mask [T, E] of the
            executed experts.
        budget: what all layers together may use: a :class:`circuitroute.Budget`, or the largest number of experts of a
            token. ``"all/budget_use"`` is then what the tokens' paths use of it.
        group: processes whose tokens count together, all of which must call this, for the same layers.

    Raises:
        TypeError: something that is no decision; a name that is no text.
        ValueError: no layers; a mask that is not [T, E]; the name ``"all"``; with a budget, layers of different numbers
            of tokens, or not as many as it has.
    """
    layers = _named(routings)
    total = _total_of(budget, len(layers))
    masks = {name: _mask_of(f"routings[{name!r}]", decision) for name, decision in layers.items()}
    parts = [_sums(decision, masks[name]) for name, decision in layers.items()]
    numbers = _gathered([*parts, _path_sums(list(masks.values()), total is not None)], group)
    each = {name: _of_layer(layers[name], sums) for (name, sums) in zip(layers, numbers, strict=False)}
    return {
        **{f"{name}/{key}": value for name, found in each.items() for key, value in found.items()},
        **{f"{ALL}/{key}": value for key, value in _over_all(list(each.values()), numbers[-1], total).items()},
    }


def _named(routings: Any) -> dict[str, Decisions]:
    """The decisions by the name of their layer."""
    if isinstance(routings, Mapping):
        named = dict(routings)
    elif isinstance(routings, (Routing, Tensor)):
        named = {"layer0": routings}
    elif isinstance(routings, Iterable) and not isinstance(routings, (str, bytes)):
        named = {f"layer{i}": decision for i, decision in enumerate(routings)}
    else:
        raise TypeError(
            f"routings is a {type(routings).__name__}: expected a Routing or a mask [tokens, experts], one per layer, "
            "or a mapping from names to these"
        )
    if not named:
        raise ValueError("routings is empty: give the decisions of one layer at least, after a forward pass")
    for name in named:
        if not isinstance(name, str):
            raise TypeError(f"routings has the name {name!r}: expected a text, such as 'layer0'")
        if name == ALL:
            raise ValueError(f"routings has the name {ALL!r}: that of the means over all layers; choose another")
    return named


def _mask_of(name: str, decision: Decisions) -> Tensor:
    """[T, E] bool."""
    mask = executed(decision, name)
    if mask.shape[1] == 0:
        raise ValueError(f"{name} have shape {tuple(mask.shape)}: expected [tokens, experts] with an expert at least")
    return mask


def _total_of(budget: int | OverLayers | None, layers: int) -> int | None:
    """The most experts that a token may use over all layers."""
    if not isinstance(budget, OverLayers):
        return None if budget is None else int_at_least("budget", budget, 1)
    if budget.layers != layers:
        raise ValueError(f"budget is over {budget.layers} layers, and routings are of {layers}: give all of its layers")
    return int(budget.feasible[-1].nonzero().max())


def _sums(decision: Decisions, mask: Tensor) -> Tensor:
    """Sums over the tokens, float64: [T, counts, squared counts], then loads [E], then what a distribution adds."""
    counts = mask.sum(-1).double()
    parts = [torch.stack([counts.new_tensor(len(mask)), counts.sum(), counts.square().sum()]), mask.sum(0).double()]
    if isinstance(decision, Routing):
        # What was made in inference mode can only be filled in in it.
        with torch.inference_mode(decision.mask.is_inference()), torch.no_grad():
            soft = isinstance(decision, SoftRouting)
            parts.append(decision.marginals.double().sum()[None] if soft else _distribution_sums(decision, mask))
    return torch.cat(parts)


def _distribution_sums(routing: Routing, mask: Tensor) -> Tensor:
    """The number of valid tokens, and the sums of ``_OF_DISTRIBUTIONS`` over them."""
    distribution, mode = routing.distribution, routing.untempered.mode_mask()
    distance = (mask ^ mode).sum(-1).double() / (mask.sum(-1) + mode.sum(-1)).clamp(min=1)
    mass = distribution.marginals.double().sum(-1)
    # Rounding may take the entropy of a single subset below 0.
    entropy, agreement = distribution.entropy().double().clamp(min=0), expected_agreement(distribution, mode).double()
    values = [entropy, agreement, distance, mass]
    invalid = distribution.invalid_rows()
    valid = torch.ones_like(distance, dtype=torch.bool) if invalid is None else ~invalid
    return torch.stack([valid.sum().double(), *(torch.where(valid, value, 0.0).sum() for value in values)])


def _path_sums(masks: Sequence[Tensor], needed: bool) -> Tensor:
    """[T, experts, their squares] of whole paths, summed over the tokens; zeros where layers have different ones."""
    tokens = [len(mask) for mask in masks]
    if len(set(tokens)) > 1:
        if needed:
            raise ValueError(f"routings have {tokens} tokens: a budget is used by tokens that pass all layers")
        return torch.zeros(3, dtype=torch.float64, device=masks[0].device)
    spent = torch.stack([mask.sum(-1).to(masks[0].device) for mask in masks]).sum(0).double()
    return torch.stack([spent.new_tensor(tokens[0]), spent.sum(), spent.square().sum()])


def _gathered(parts: Sequence[Tensor], group: dist.ProcessGroup | None) -> list[list[float]]:
    """The sums of all processes as numbers, by way of one vector."""
    together = torch.cat([part.to(parts[0].device) for part in parts])
    if group is not None:
        dist.all_reduce(together, group=group)
    return [part.tolist() for part in together.cpu().split([len(part) for part in parts])]


def _of_layer(decision: Decisions, sums: Sequence[float]) -> dict[str, float]:
    """The quantities of a layer."""
    experts = (decision.mask if isinstance(decision, Routing) else decision).shape[-1]
    tokens, counted, squares = sums[:3]
    loads, rest = sums[3 : 3 + experts], sums[3 + experts :]
    found = {"tokens": tokens}
    if not tokens:
        return found
    mean, spread = _moments(tokens, counted, squares)
    found |= {
        "load_entropy": _load_entropy(loads),
        "max_violation": max(loads) * len(loads) / counted - 1.0 if counted else 0.0,
        "dead_experts": sum(load == 0 for load in loads) / len(loads),
        "experts_per_token": mean,
        "experts_per_token_std": spread,
    }
    if not isinstance(decision, Routing):
        return found
    found["budget_use"] = mean / decision.max_count
    if isinstance(decision, SoftRouting):
        return {**found, "soft_mass": rest[0] / tokens}
    valid, *values = rest
    found["invalid_tokens"] = 1.0 - valid / tokens
    if valid:
        found |= {name: value / valid for name, value in zip(_OF_DISTRIBUTIONS, values, strict=True)}
    return found


def _over_all(layers: Sequence[Mapping[str, float]], path: Sequence[float], total: int | None) -> dict[str, float]:
    """Means over the layers that have a quantity, and what is of whole paths."""
    names = dict.fromkeys(name for layer in layers for name in layer)
    known = {name: [layer[name] for layer in layers if name in layer] for name in names}
    found = {name: math.fsum(values) / len(values) for name, values in known.items()}
    tokens, spent, squares = path
    if tokens:
        found["experts_per_path"], found["experts_per_path_std"] = _moments(tokens, spent, squares)
        if total is not None:
            found["budget_use"] = found["experts_per_path"] / total
    return found


def _load_entropy(loads: Sequence[float]) -> float:
    """As :func:`circuitroute.metrics.load_entropy` has it."""
    if len(loads) == 1:
        return 1.0
    total = math.fsum(loads)
    return -math.fsum(load / total * math.log(load / total) for load in loads if load) / math.log(len(loads))


def _moments(tokens: float, counted: float, squares: float) -> tuple[float, float]:
    """Mean and standard deviation: counts are integers, whose sums are exact in float64."""
    variance = max(0.0, tokens * squares - counted * counted) / (tokens * tokens)
    return counted / tokens, math.sqrt(variance)
