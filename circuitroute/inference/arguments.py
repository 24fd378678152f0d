"""What a distribution is given: checks that name the argument, what is wrong with it and the remedy.

Legend: N variables, K the largest allowed count; leading dimensions are a batch.
"""

from __future__ import annotations

import torch
from torch import Size, Tensor

from circuitroute.circuit import Compiled


def as_logits(logits: Tensor, n: int) -> Tensor:
    """Logits [..., n] in float32, or float64 if they are; any floating dtype is taken."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits={logits!r}: expected a tensor, got {type(logits).__name__}")
    if not logits.dtype.is_floating_point:
        raise TypeError(f"logits have dtype {logits.dtype}: expected a floating-point dtype")
    if logits.dim() == 0 or logits.shape[-1] != n:
        raise ValueError(f"logits have shape {tuple(logits.shape)}: the last dimension must be n={n}")
    return logits if logits.dtype == torch.float64 else logits.float()


def as_potential(potential: Tensor, circuit: Compiled, logits: Tensor) -> Tensor:
    """Count potential [..., K + 1] in the dtype and on the device of the logits."""
    if circuit.counts is None:
        raise ValueError(f"count_potential is for count constraints over all variables; {circuit.constraint!r} is none")
    if not isinstance(potential, Tensor):
        raise TypeError(f"count_potential={potential!r}: expected a tensor, got {type(potential).__name__}")
    J = circuit.max_count + 1
    if potential.dim() == 0 or potential.shape[-1] != J:
        raise ValueError(
            f"count_potential has shape {tuple(potential.shape)}: its last dimension must be max_count + 1 = {J}"
        )
    return potential.to(logits)


def common_batch(logits_batch: Size, potential_batch: Size) -> Size:
    """The batch shape of logits and count potential together."""
    try:
        return Size(torch.broadcast_shapes(logits_batch, potential_batch))
    except RuntimeError:
        raise ValueError(
            f"count_potential has batch shape {tuple(potential_batch)}, which does not broadcast with that of the "
            f"logits, {tuple(logits_batch)}"
        ) from None
