"""Temperatures: what logits are divided by."""

from __future__ import annotations

import math

from torch import Size, Tensor

from circuitroute._tensors import cannot_look
from circuitroute._validate import as_number, as_real
from circuitroute.inference.evidence import rows_text

# Below it finite logits might overflow when they are divided, and pass for evidence.
MIN_TEMPERATURE = 1e-30
POSITIVE = f"must be positive and finite, {MIN_TEMPERATURE} at least; decide='mode' is the limit of cold"


def as_temperature(temperature: float | Tensor) -> float | Tensor:
    """A positive number, or a tensor of them. Values on a GPU, or in a traced program, are not looked at; on the meta
    device there are none.

    Raises:
        TypeError, ValueError: anything else.
    """
    if not isinstance(temperature, Tensor):
        if callable(temperature):
            raise TypeError(
                f"temperature={temperature!r}: expected a number, got a function; give what a schedule returns for the "
                "step, temperature=schedule(step)"
            )
        number = as_number("temperature", temperature)
        if not MIN_TEMPERATURE <= number < math.inf:
            raise ValueError(f"temperature={number}: {POSITIVE}")
        return number
    temperature = as_real("temperature", temperature, floating=True)
    if not (cannot_look(temperature) or temperature.is_meta):
        wrong = ~((temperature >= MIN_TEMPERATURE) & (temperature < math.inf)).detach()
        if bool(wrong.any()):
            place = f" in {rows_text(wrong)}" if wrong.dim() else ""
            raise ValueError(f"temperature={float(temperature[wrong][0])}{place}: {POSITIVE}")
    return temperature


def fits_batch(shape: Size, batch: Size) -> bool:
    """Whether a tensor broadcasts to the batch, without making it larger."""
    pairs = zip(reversed(shape), reversed(batch), strict=False)
    return len(shape) <= len(batch) and all(size in (1, whole) for size, whole in pairs)
