"""Which subset: logits to a decision, before any weights.

Legend: T tokens, E experts.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, float32, promote_types

from circuitroute._tensors import batched, cannot_look, plain, traced, transformed
from circuitroute._validate import as_mask, as_number, as_real
from circuitroute.circuit import Compiled, boolean
from circuitroute.engines.step import SHARE
from circuitroute.inference.distribution import SubsetDistribution, validating
from circuitroute.inference.evidence import rows_text
from circuitroute.inference.temperature import as_temperature
from circuitroute.keys import fold_in, uniform
from circuitroute.routing.decision import Decision
from circuitroute.routing.estimators import Estimator, Score, as_estimator
from circuitroute.routing.records import RoutingRecord, check_constraint, same_temperature, temperatures_of

Decide: TypeAlias = Literal["sample", "mode"]
Rule: TypeAlias = Literal["mode", "count"]

# What each word means as a share of sampled tokens; nothing said is "sample".
SHARES = {None: 1.0, "sample": 1.0, "mode": 0.0}


class Batch(NamedTuple):
    """Checked arguments of a decision.

    Attributes:
        untempered: what is decided on, at temperature 1, over the flattened tokens [T, E].
        logits: [T, E] as given, in float32 or float64; the same tensor as that of ``untempered`` where nothing moves
            the choice.
        temperature: a number, or a tensor [] or [T].
        key: as given, or [T].
        unchecked: whether values are still to be checked: on a GPU that is left to who decides.
    """

    untempered: SubsetDistribution
    logits: Tensor
    temperature: float | Tensor
    key: Tensor | int | None
    unchecked: bool = False

    @staticmethod
    def of(
        logits: Tensor,
        circuit: Compiled,
        *,
        key: Tensor | int | None = None,
        temperature: float | Tensor = 1.0,
        shift: Tensor | None = None,
        count_potential: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> Batch:
        """Of unchecked ones, see :func:`circuitroute.route`.

        Args:
            shift: [E], [T, 1] or [T, E]: added to the logits for the choice alone.
        """
        if isinstance(logits, Tensor):
            logits = plain("logits", logits)
        batch = logits.shape[:-1] if isinstance(logits, Tensor) else torch.Size()
        if isinstance(logits, Tensor) and logits.dim() > 0:
            logits, count_potential, key = _flatten(logits, count_potential, key)
        moved = logits if shift is None else logits + shift.to(logits.device, promote_types(logits.dtype, float32))
        unchecked = (
            isinstance(moved, Tensor) and moved.is_cuda and not transformed() and validating(validate_args, moved)
        )
        untempered = SubsetDistribution(circuit, moved, count_potential, False if unchecked else validate_args)
        temperature = temperature_of(temperature, batch)
        given = untempered.logits if shift is None else logits.to(untempered.logits.dtype)
        return Batch(untempered, given, temperature, key, unchecked)


def decide(
    batch: Batch, *, share: float, rule: Rule = "mode", replay: Tensor | RoutingRecord | None = None
) -> Decision:
    """Which subset: the first half of a routing step; :func:`~circuitroute.routing.weights.weigh` is the other.

    Args:
        share: how many of the tokens are sampled, from 0 to 1, which ones being a function of their keys.
        rule: what the others take: the ``"mode"``, or, for count constraints, ``"count"``: the most probable number of
            experts (the lower among equals), then the most probable subset of that size.
        replay: see :func:`circuitroute.route`.
    """
    untempered, temperature = batch.untempered, batch.temperature
    if batch.unchecked:
        untempered.check()
    distribution = untempered.tempered(temperature)
    if replay is None:
        mask = _chosen(distribution, untempered, share, rule, batch.key)
        invalid = distribution.invalid_rows()
    else:
        invalid = distribution.invalid_rows()
        mask = replayed(batch, replay, invalid)
    mask = mask if invalid is None else mask & ~invalid[:, None]
    return Decision(distribution, mask, invalid, untempered, batch.logits, temperature)


def as_share(decide: Decide | float | None, estimator: str | Estimator) -> float:
    """The share of tokens to sample in training, or an error that says what is wrong with ``decide``."""
    scores = type(as_estimator(estimator)) is Score
    if isinstance(decide, str) and decide not in SHARES:
        raise ValueError(f"decide={decide!r}: choose 'sample', 'mode', or a share of sampled tokens from 0 to 1")
    share = SHARES[decide] if decide is None or isinstance(decide, str) else as_number("decide", decide)
    if not 0 <= share <= 1:
        raise ValueError(f"decide={decide!r}: a share of sampled tokens must lie in 0..1")
    if scores and share < 1:
        raise ValueError(
            f"decide={decide!r} with estimator='score': a token that takes the mode has nothing to score; sample all "
            "tokens, or use the estimator 'simple'"
        )
    return share


def shift_of(price: float | Tensor | None, bias: Tensor | None, logits: Tensor, experts: int) -> Tensor | None:
    """What price and bias together add to the logits of a choice: [E], [1], [T, 1] or [T, E]; None for neither.

    Raises:
        ValueError: a bias that is not [E] or holds NaN, or a price that is not a finite number, [] or [T].
    """
    bias = None if bias is None else as_real("bias", bias)
    if bias is not None and bias.shape != (experts,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}: expected one number per expert, ({experts},)")
    if bias is not None and not cannot_look(bias) and bool(bias.isnan().any()):
        raise ValueError("bias holds NaN: give one number per expert, such as the state of a cr.balance rule holds")
    if price is None:
        return bias
    # Filled where it is wanted: a copy to a GPU would wait for it.
    given = torch.full((), as_number("price", price), device=logits.device) if not isinstance(price, Tensor) else price
    given = as_real("price", given)
    if given.dtype == torch.bool:
        raise TypeError("price has dtype torch.bool: expected numbers")
    given = given if given.dtype == torch.float64 else given.float()  # which has a sign, and arithmetic
    if not cannot_look(given) and not bool(given.isfinite().all()):
        raise ValueError(f"price={price}: must be finite")
    lower = per_token("price", given, logits.shape[:-1])[..., None]
    return -lower if bias is None else bias - lower.to(bias)


def temperature_of(temperature: float | Tensor, batch: torch.Size) -> float | Tensor:
    """A positive number, or a tensor [] or [T] of them, from one that fits the dimensions of the tokens.

    Raises:
        TypeError, ValueError: anything else; see :func:`circuitroute.inference.temperature.as_temperature`.
    """
    given = per_token("temperature", temperature, batch) if isinstance(temperature, Tensor) else temperature
    return as_temperature(given)


def _flatten(
    logits: Tensor, count_potential: Tensor | None, key: Tensor | int | None
) -> tuple[Tensor, Tensor | None, Tensor | int | None]:
    """All leading dimensions become one of tokens; a key may come with them or flattened already."""
    batch = logits.shape[:-1]
    count_potential = None if count_potential is None else as_real("count_potential", count_potential)
    if count_potential is not None and count_potential.dim() > 1:
        last = count_potential.shape[-1]
        count_potential = _expand("count_potential", count_potential, torch.Size([*batch, last])).reshape(-1, last)
    if isinstance(key, Tensor):
        key = per_token("key", key, batch)
    return logits.reshape(-1, logits.shape[-1]), count_potential, key


def per_token(name: str, value: Tensor, batch: torch.Size) -> Tensor:
    """[T], or a scalar as it is: ``value`` broadcast to the leading dimensions, unless it is flattened already."""
    value = plain(name, value)
    if value.dim() == 0:
        return value
    if len(batch) == 1:  # without a question about sizes, which a traced program may not know
        return _expand(name, value, batch)
    return value if value.shape == (batch.numel(),) else _expand(name, value, batch).reshape(-1)


def _expand(name: str, value: Tensor, shape: torch.Size) -> Tensor:
    try:
        return value.expand(shape)
    except RuntimeError:
        raise ValueError(f"{name} has shape {tuple(value.shape)}: it must broadcast to {tuple(shape)}") from None


def _chosen(
    distribution: SubsetDistribution,
    untempered: SubsetDistribution,
    share: float,
    rule: Rule,
    key: Tensor | int | None,
) -> Tensor:
    """[T, E] bool. Only samples feel the temperature: the rule looks at the logits themselves."""
    if share == 1:
        return distribution.sample_in_sweep(key)
    ruled = untempered.mode_mask(likeliest(untempered.count_probs.detach()) if rule == "count" else None)
    if share == 0:
        return ruled
    keys = distribution.keys(key)
    return torch.where(sampled_tokens(keys, share)[:, None], distribution.sample_in_sweep(keys), ruled)


def sampled_tokens(keys: Tensor, share: float) -> Tensor:
    """[T] bool, which of the tokens with these keys are sampled."""
    return uniform(fold_in(keys, keys.new_tensor(SHARE)), 0, 1, torch.float64)[0] < share


def likeliest(count_probs: Tensor) -> Tensor:
    """[T] int64, the most probable count, the lower among equals; what rounding tells apart is equal."""
    largest = count_probs.amax(-1, keepdim=True)
    return (count_probs >= largest * (1 - 16 * torch.finfo(count_probs.dtype).eps)).to(torch.uint8).argmax(-1)


def replayed(batch: Batch, replay: Tensor | RoutingRecord, invalid: Tensor | None) -> Tensor:
    """[T, E] bool, the recorded decision; invalid rows had none to check.

    Raises:
        ValueError: a record of another temperature or constraint, or a subset that is not allowed, named by row.
    """
    distribution = batch.untempered
    mask = recorded_mask(replay, distribution.logits, batch.temperature)
    if isinstance(replay, RoutingRecord):
        check_constraint(replay, 0, distribution.circuit.constraint)
    # Nobody wants values checked, for which the host would wait; or they cannot be.
    if (mask.is_cuda and not batch.unchecked) or batched() or traced(mask):
        return mask
    allowed = boolean.satisfies(distribution.circuit, mask)
    if not distribution.rows.finite:
        infinite = torch.isinf(distribution.logits)
        allowed = allowed & (((distribution.logits > 0) == mask) | ~infinite).all(-1)
    if distribution.count_potential is not None:
        potential = distribution.count_potential.expand(len(mask), -1)
        count = mask.sum(-1, keepdim=True).clamp(max=potential.shape[-1] - 1)
        allowed = allowed & (potential.gather(-1, count).squeeze(-1) > -torch.inf)
    if invalid is not None:
        allowed = allowed | invalid
    if not bool(allowed.all()):
        raise ValueError(
            f"replay holds a subset that {distribution.circuit.constraint!r}, the infinite logits or the count "
            f"potential exclude, in {rows_text(~allowed)}"
        )
    return mask


def recorded_mask(replay: Tensor | RoutingRecord, logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """[T, E] bool on the device of the logits [T, E].

    Args:
        replay: a mask with any leading dimensions of T tokens in all; or a record of one layer, made at this
            temperature.
    """
    if isinstance(replay, RoutingRecord):
        replay = _only_layer(replay, temperature)
    mask = as_mask("replay", replay, logits.shape[-1]).to(logits.device)
    mask = mask.reshape(-1, mask.shape[-1])
    if mask.shape != logits.shape:
        raise ValueError(f"replay has shape {tuple(mask.shape)}: it must be that of the logits, {tuple(logits.shape)}")
    return mask


def _only_layer(record: RoutingRecord, temperature: float | Tensor) -> Tensor:
    """[T, E] bool, the decisions of a record of one layer."""
    if len(record.layers) != 1:
        raise ValueError(
            f"replay is a record of {len(record.layers)} layers: give this layer its own mask, one of record.masks()"
        )
    for given in temperatures_of(temperature):
        if not same_temperature(given, record.temperature):
            raise ValueError(
                f"replay was recorded at temperature={record.temperature:g}, and this decision is at {given:g}: its "
                "log-probability would be another one. Replay it at the temperature of the record, or give its mask"
            )
    return record.masks()[0]
