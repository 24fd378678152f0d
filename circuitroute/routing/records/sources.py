"""What records are made of: decisions, masks, what servers report, and router logits.

Legend: T tokens, L layers, E experts of a layer, K slots (the largest number of experts any token has in a layer).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from circuitroute._tensors import plain
from circuitroute._validate import as_items, as_real, int_at_least
from circuitroute.compilation import compile as compile_constraint
from circuitroute.constraints import Constraint
from circuitroute.inference.circuit import Circuit
from circuitroute.inference.evidence import rows_text
from circuitroute.routing.decision import Routing
from circuitroute.routing.records.layers import LayerRecord

Rule: TypeAlias = Constraint | Circuit

# Temperatures that differ by less are the same: a number may have been a float32 tensor on the way.
_SAME_TEMPERATURE = 1e-6
# Longer texts of constraints are kept as their beginning and a digest, which tell them apart as well.
_LONGEST = 400


# ---------------------------------------------------------------------------------------------- decisions


def each_of(name: str, decisions: Any) -> list[Routing | Tensor]:
    """The decisions of all layers; one of a single layer alone."""
    if isinstance(decisions, Routing):
        return [decisions]
    if isinstance(decisions, Tensor):
        return [plain(name, decisions)]
    if not isinstance(decisions, Iterable):
        kind = type(decisions).__name__
        raise TypeError(f"{name} is a {kind}: expected a Routing or a mask [tokens, experts], or one per layer")
    return list(decisions)


def mask_of(name: str, decision: Routing | Tensor) -> Tensor:
    """[T, E] bool."""
    mask = decision.mask if isinstance(decision, Routing) else decision
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} is a {type(mask).__name__}: expected a Routing or a mask [tokens, experts]")
    mask = plain(name, mask)
    if mask.dtype != torch.bool or mask.dim() != 2 or mask.shape[1] == 0:
        raise ValueError(
            f"{name} has shape {tuple(mask.shape)} and dtype {mask.dtype}: expected [tokens, experts] bool"
        )
    return mask.detach()


def same_temperature(a: float, b: float) -> bool:
    """Whether two temperatures are one, but for the rounding of a float32."""
    return math.isclose(a, b, rel_tol=_SAME_TEMPERATURE)


def temperatures_of(temperature: float | Tensor) -> list[float]:
    """The lowest and the highest of a number, or of a tensor [] or [T]; none where there are no tokens."""
    if not isinstance(temperature, Tensor):
        return [temperature]
    return [float(bound) for bound in temperature.detach().aminmax()] if temperature.numel() else []


def only_temperature(routings: Sequence[Routing]) -> float:
    """The temperature of all tokens in all layers; 1 where there are no routings."""
    found = [bound for routing in routings for bound in temperatures_of(routing.temperature)] or [1.0]
    if not all(same_temperature(bound, found[0]) for bound in found):
        raise ValueError(
            f"decisions were made at temperatures from {min(found):g} to {max(found):g}: a record has one temperature "
            "for all tokens and layers, so make one record for each"
        )
    return found[0]


# ---------------------------------------------------------------------------------------------- constraints by name


def rule_of(decision: Routing | Tensor) -> Rule | None:
    """What a decision was made under; masks and soft decisions do not say."""
    distribution = getattr(decision, "untempered", None)
    return None if distribution is None else distribution.circuit.constraint


def rule_text(rule: object) -> str | None:
    """A constraint, or that of a circuit, as a text that tells it from others; None where its repr tells nothing."""
    if isinstance(rule, Circuit):
        rule = rule.constraint
    text = str.__str__(rule) if isinstance(rule, str) else None if rule is None else repr(rule)
    if text is None or " at 0x" in text:  # an address says nothing in another process
        return None
    if len(text) <= _LONGEST:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return f"{text[: _LONGEST // 2]}... (sha256 {digest})"


def rule_texts(name: str, rules: object, layers: int) -> tuple[str | None, ...] | None:
    """One text per layer; None where no layer has any.

    Raises:
        TypeError: something else than texts, constraints and circuits.
        ValueError: another number of them.
    """
    if rules is None:
        return None
    given = as_items(name, rules, "one constraint, or its text, per layer")
    for i, rule in enumerate(given):
        if rule is not None and not isinstance(rule, (str, Constraint, Circuit)):
            raise TypeError(f"{name}[{i}]={rule!r}: expected a constraint, a circuit, its text, or None")
    if len(given) != layers:
        raise ValueError(f"{name} has {len(given)} entries: expected one per layer, {layers}")
    texts = tuple(map(rule_text, given))
    return None if texts.count(None) == layers else texts


def model_label(model: object) -> str | None:
    """A text as it is, or None.

    Raises:
        TypeError: something else.
    """
    if model is not None and not isinstance(model, str):
        raise TypeError(f"model={model!r}: expected a text, or None, got {type(model).__name__}")
    return None if model is None else str.__str__(model)


# ---------------------------------------------------------------------------------------------- what servers report


def layers_of_indices(indices: Any, num_experts: Any, weights: Any) -> list[LayerRecord]:
    """See :meth:`RoutingRecord.of_indices`; one layer after the other, so that one is in memory at a time."""
    each = _by_layer("indices", indices)
    sizes = _sizes(num_experts, len(each))
    weighed: list[Tensor | None] = [None] * len(each)
    if weights is not None:
        weighed = [as_real(f"weights[{i}]", of_layer) for i, of_layer in enumerate(_by_layer("weights", weights))]
    if len(weighed) != len(each):
        raise ValueError(f"weights has {len(weighed)} layers: expected those of indices, {len(each)}")
    return [
        LayerRecord.of_rows(_rows(i, _integers(f"indices[{i}]", given), size, weight), size)
        for i, (given, size, weight) in enumerate(zip(each, sizes, weighed, strict=True))
    ]


def _by_layer(name: str, given: Any) -> Sequence[Any]:
    """[T, K] of every layer."""
    if isinstance(given, Tensor):
        given = plain(name, given)
        if given.dim() != 3:
            remedy = "; log-probabilities are handed over as log_probs=" if name == "weights" else ""
            raise ValueError(f"{name} has shape {tuple(given.shape)}: expected [tokens, layers, slots]{remedy}")
        return list(given.unbind(1))
    if not isinstance(given, Sequence) or isinstance(given, (str, bytes)):
        kind = type(given).__name__
        raise TypeError(
            f"{name} is a {kind}: expected a tensor [tokens, layers, slots], or one [tokens, slots] per layer"
        )
    return given


def _sizes(num_experts: Any, layers: int) -> list[int]:
    several = isinstance(num_experts, Iterable) and getattr(num_experts, "ndim", 1) > 0
    sizes: list[Any] = as_items("num_experts", num_experts, "E") if several else [num_experts] * layers
    if len(sizes) != layers:
        raise ValueError(f"num_experts has {len(sizes)} entries: expected one per layer, {layers}")
    return [int_at_least("num_experts", size, 1) for size in sizes]


def _integers(name: str, given: Any) -> Tensor:
    """[T, K] int64 on the CPU."""
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} is not a tensor of integers [tokens, slots] but a {type(given).__name__}")
    indices = plain(name, given)
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise TypeError(f"{name} is not a tensor of integers: its dtype is {indices.dtype}")
    if indices.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(indices.shape)}: expected [tokens, slots]")
    return indices.detach().cpu().long()


def _rows(layer: int, at: Tensor, experts: int, weights: Tensor | None) -> Tensor:
    """[T, K] int64: the chosen experts, increasing, then E for slots outside 0..E-1 and those of weight 0."""
    used = (at >= 0) & (at < experts)
    if weights is not None:
        used = used & (_checked_weights(f"weights[{layer}]", weights, used) > 0)
    rows = torch.where(used, at, experts).sort(-1).values
    twice = ((rows[:, 1:] == rows[:, :-1]) & (rows[:, 1:] < experts)).any(-1)
    if bool(twice.any()):
        remedy = "" if weights is not None else "; where unused slots repeat one, give -1 there, or the slots' weights"
        raise ValueError(f"indices[{layer}] names an expert twice in {rows_text(twice)}{remedy}")
    return rows


def _checked_weights(name: str, weights: Tensor, used: Tensor) -> Tensor:
    """[T, K] on the CPU; what stands in slots that are unused anyway is not looked at."""
    given = weights.detach().cpu()
    if given.shape != used.shape:
        raise ValueError(
            f"{name} has shape {tuple(given.shape)}: expected one weight per slot of indices, {tuple(used.shape)}"
        )
    given = given if given.dtype == torch.float64 else given.float()
    wrong = used & ~((given >= 0) & (given < math.inf))
    if bool(wrong.any()):
        found = float(given[wrong][0])
        raise ValueError(
            f"{name} holds {found:g} in {rows_text(wrong.any(-1))}: weights are finite and at least 0; give weight 0, "
            "or index -1, to unused slots"
        )
    return given


# ---------------------------------------------------------------------------------------------- router logits


def modes_of(
    router_logits: Any, constraint: Any, temperature: float, log_probs: bool
) -> tuple[list[LayerRecord], Tensor | None, list[Rule]]:
    """See :meth:`RoutingRecord.of_router_logits`: the layers, [T, L] log-probabilities, and the circuits."""
    each = _logits_by_layer(router_logits)
    circuits = _circuits(constraint, [logits.shape[1] for logits in each])
    layers, known = [], []
    with torch.no_grad():
        for i, (logits, circuit) in enumerate(zip(each, circuits, strict=True)):
            try:
                untempered = circuit(logits)
            except ValueError as error:
                raise ValueError(f"router_logits[{i}]: {error}") from None
            mask = untempered.mode_mask()
            layers.append(LayerRecord.of(mask))
            if log_probs:
                known.append(untempered.tempered(temperature).log_prob(mask).float().cpu())
    return layers, torch.stack(known, dim=1) if log_probs else None, list(circuits)


def _logits_by_layer(router_logits: Any) -> list[Tensor]:
    """[T, E] of every layer, of the same tokens."""
    given = [router_logits] if isinstance(router_logits, Tensor) else router_logits
    items = as_items("router_logits", given, "a tensor [tokens, experts] per layer")
    if not items:
        raise ValueError(
            "router_logits is empty: call the model with output_router_logits=True; some models report none even then"
        )
    each = [_logits(f"router_logits[{i}]", logits) for i, logits in enumerate(items)]
    tokens = [len(logits) for logits in each]
    if len(set(tokens)) > 1:
        raise ValueError(f"router_logits are of {tokens} tokens: all layers must have the same")
    return each


def _circuits(constraint: Any, experts: list[int]) -> list[Circuit]:
    rules = [constraint] * len(experts) if isinstance(constraint, (Constraint, Circuit)) else constraint
    rules = as_items("constraint", rules, "a constraint or circuit, or one per layer")
    if len(rules) != len(experts):
        raise ValueError(
            f"constraint has {len(rules)} entries: expected one per layer of router_logits, {len(experts)}"
        )
    for i, (rule, size) in enumerate(zip(rules, experts, strict=True)):
        if isinstance(rule, Circuit) and rule.n != size:
            raise ValueError(
                f"router_logits[{i}] is over {size} experts: expected {rule.n}, as {rule!r} is; give a circuit over "
                f"{size}, or a constraint"
            )
    given: list[Any] = rules  # compile refuses others
    return [compile_constraint(rule, size) for rule, size in zip(given, experts, strict=True)]


def _logits(name: str, logits: Any) -> Tensor:
    """[T, E] of [..., E]."""
    given = as_real(name, logits, floating=True).detach()
    if given.dim() < 2 or given.shape[-1] == 0:
        raise ValueError(
            f"{name} has shape {tuple(given.shape)}: expected [tokens, experts], or [batch, length, experts]"
        )
    return given.reshape(-1, given.shape[-1])
