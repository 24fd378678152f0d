"""Arguments of serving functions, and of their makers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from circuitroute._tensors import plain
from circuitroute._validate import as_number
from circuitroute.keys import as_key

KEYS = (
    "give seed=, the request's, an int64 tensor [tokens] or [], and position=, each token's place in its request, an "
    "int64 tensor [tokens]"
)


def as_scaling(scaling: object) -> float:
    """A finite number."""
    try:
        factor = as_number("scaling", scaling)
    except TypeError:
        factor = math.nan
    if not math.isfinite(factor):
        raise ValueError(f"scaling={scaling!r}: expected a finite number")
    return factor


def as_bias(bias: Tensor, num_experts: int) -> Tensor:
    """[E] float32, a copy."""
    if not isinstance(bias, Tensor) or bias.shape != (num_experts,):
        given = f"has shape {tuple(bias.shape)}" if isinstance(bias, Tensor) else f"is a {type(bias).__name__}"
        raise ValueError(f"bias {given}: expected a tensor of shape ({num_experts},), one number per expert")
    if bias.is_meta:
        raise ValueError("bias is on the meta device, where it holds nothing: make it on the CPU")
    if bool(bias.isnan().any()):
        raise ValueError("bias holds NaN")
    return bias.detach().to(torch.float32, copy=True)


def check_tensors(hidden_states: Tensor, gating_output: Tensor, num_experts: int) -> None:
    """Floating-point logits [T, E], of as many tokens as there are hidden states."""
    if not isinstance(gating_output, Tensor) or not gating_output.is_floating_point():
        kind = gating_output.dtype if isinstance(gating_output, Tensor) else type(gating_output).__name__
        raise TypeError(f"gating_output is {kind}: expected a floating-point tensor of logits")
    plain("gating_output", gating_output)
    if gating_output.dim() != 2 or gating_output.shape[1] != num_experts:
        raise ValueError(
            f"gating_output has shape {tuple(gating_output.shape)}: expected [tokens, num_experts={num_experts}]"
        )
    if isinstance(hidden_states, Tensor) and len(hidden_states) != len(gating_output):
        raise ValueError(
            f"hidden_states have shape {tuple(hidden_states.shape)} and gating_output {tuple(gating_output.shape)}: "
            "they must have the same number of tokens"
        )


def check_place(gating_output: Tensor, place: torch.device) -> None:
    """The logits are where the function's tables are."""
    # A place of no memory is that of a function whose model was made there, and filled by assignment.
    if place not in (gating_output.device, torch.device("meta")):
        raise ValueError(
            f"gating_output is on {gating_output.device} and the routing function on {place}: move "
            f"it there with .to({str(gating_output.device)!r}), once"
        )


def check_keys_given(seed: object, position: object) -> None:
    """Both are there."""
    for name, value in (("seed", seed), ("position", position)):
        if value is None:
            raise TypeError(f"{name} is missing: this function samples, with keys of its arguments; {KEYS}")


def check_no_keys(seed: object, position: object) -> None:
    """Neither is there."""
    for name, value in (("seed", seed), ("position", position)):
        if value is not None:
            raise TypeError(
                f"{name} was given, but this function takes the most probable subset and draws nothing: leave it out, "
                "or make the function with routing_function(..., sample=True)"
            )


def check_keys(seed: object, position: object, gating_output: Tensor) -> None:
    """Integers of the right shapes, on the device of the logits."""
    tokens = len(gating_output)
    for name, value, shapes in (("seed", seed, ((), (tokens,))), ("position", position, ((tokens,),))):
        given = as_key(name, value)  # type: ignore[arg-type]
        if given.shape not in shapes:
            wanted = " or ".join("[]" if shape == () else f"[tokens={tokens}]" for shape in shapes)
            raise ValueError(f"{name} has shape {list(given.shape)}: expected {wanted}; {KEYS}")
        anywhere = given.dim() == 0 and given.device.type == "cpu"
        if given.device != gating_output.device and not anywhere:
            raise ValueError(
                f"{name} is on {given.device} and gating_output on {gating_output.device}: move it there with "
                f".to({str(gating_output.device)!r})"
            )
