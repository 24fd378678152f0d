"""Prices and biases that move the choices of a patched model's layers, and not its weights: one of each per layer.

Legend: L routed layers, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from circuitroute._validate import as_number, as_real

# What all layers have, or one for each.
Prices: TypeAlias = "float | Tensor | Sequence[float | Tensor | None] | None"
Biases: TypeAlias = "Tensor | Sequence[Tensor | None] | None"


class Control(NamedTuple):
    """What moves the choice of a layer.

    Attributes:
        price: [] float32, what an expert costs.
        bias: [E] float32, added to the logits.
    """

    price: Tensor | None = None
    bias: Tensor | None = None


class Place(NamedTuple):
    """A routed layer: its number in the model, how many experts it has, and where its router is."""

    layer: int
    experts: int
    device: torch.device


def as_prices(given: Prices, places: Sequence[Place]) -> list[Tensor | None]:
    """[] float32 per layer.

    Raises:
        TypeError: something that is no number, or that requires a gradient.
        ValueError: not finite, or not one per layer.
    """
    return [
        None if value is None else _finite(name, torch.as_tensor(as_number(name, _constant(name, value))), place)
        for name, value, place in _each("price", given, places, dimensions=0)
    ]


def as_biases(given: Biases, places: Sequence[Place]) -> list[Tensor | None]:
    """[E] float32 per layer.

    Raises:
        TypeError: something that is no tensor of real numbers, or that requires a gradient.
        ValueError: a layer's is not [E] or not finite, or there is not one per layer.
    """
    return [
        None if value is None else _bias(name, value, place)
        for name, value, place in _each("bias", given, places, dimensions=1)
    ]


def _bias(name: str, value: Any, place: Place) -> Tensor:
    bias = as_real(name, _constant(name, value))
    if bias.shape != (place.experts,):
        raise ValueError(
            f"{name} has shape {tuple(bias.shape)}: layer {place.layer} has {place.experts} experts, and a number for "
            f"each is expected, ({place.experts},)"
        )
    return _finite(name, bias, place)


def as_plain(values: Iterable[Tensor | None]) -> list[Any] | None:
    """Numbers as JSON keeps them; None where there are none."""
    found = [None if value is None else value.tolist() for value in values]
    return None if all(value is None for value in found) else found


def from_plain(kept: Any) -> list[Tensor | None] | None:
    """What :func:`as_plain` made, as tensors.

    Raises:
        TypeError, ValueError: it is something else.
    """
    if kept is None:
        return None
    if not isinstance(kept, list):
        raise TypeError(f"{kept!r} are no numbers of layers")
    return [None if value is None else torch.tensor(value, dtype=torch.float32, device="cpu") for value in kept]


def _each(name: str, given: Any, places: Sequence[Place], dimensions: int) -> Iterable[tuple[str, Any, Place]]:
    """(name, value, place) of every layer; one value of so many dimensions is for all."""
    several = isinstance(given, Tensor) and given.dim() == dimensions + 1
    if not several and (isinstance(given, (str, Mapping, Tensor)) or not isinstance(given, Iterable)):
        return [(name, given, place) for place in places]
    values = list(given)
    if len(values) != len(places):
        layers = [place.layer for place in places]
        raise ValueError(f"{name} has {len(values)} entries: expected one per routed layer, {layers}")
    return [(f"{name}[{i}]", value, place) for i, (value, place) in enumerate(zip(values, places, strict=True))]


def _constant(name: str, value: Any) -> Any:
    if isinstance(value, Tensor) and value.requires_grad:
        raise TypeError(f"{name} requires a gradient: it moves choices, which have none; give {name}.detach()")
    return value


def _finite(name: str, value: Tensor, place: Place) -> Tensor:
    """A copy, which nobody else changes."""
    if not bool(value.isfinite().all()):
        raise ValueError(f"{name}={value.tolist()}: must be finite")
    return value.detach().to(place.device, torch.float32, copy=True)
