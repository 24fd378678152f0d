"""What controllers of routers share: which decisions they look at, sums over processes, and checks of states.

Legend: T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from circuitroute._tensors import batched, cannot_look, traced
from circuitroute._validate import as_items, as_real
from circuitroute.routing.decision import Routing, SoftRouting

Routings: TypeAlias = Routing | Sequence[Routing]


def routings_of(routing: object, experts: int | None = None) -> tuple[Routing, ...]:
    """The decisions of a step: one, or several, such as those of micro-batches.

    Raises:
        TypeError: anything else.
        ValueError: none, or decisions over another number of experts.
    """
    if isinstance(routing, Routing):
        items: list[object] = [routing]
    else:
        items = as_items("routing", routing, "the Routing that a router returned, or several of them")
    for item in items:
        if not isinstance(item, Routing):
            raise TypeError(f"routing holds a {type(item).__name__}: expected the Routing that a router returned")
        if experts is not None and item.mask.shape[-1] != experts:
            raise ValueError(
                f"routing is over {item.mask.shape[-1]} experts, and the controller was made for num_experts={experts}"
            )
    if not items:
        raise ValueError("routing=(): give at least one")
    return tuple(item for item in items if isinstance(item, Routing))


def distributions_of(routings: Sequence[Routing], who: str) -> None:
    """Raises TypeError where decisions have no distribution over subsets, which ``who`` needs."""
    for routing in routings:
        if isinstance(routing, SoftRouting):
            raise TypeError(
                f"{who} needs the distribution that a decision was drawn from, and a SoftRouting has none; "
                "cr.balance.LossFree looks at the executed experts alone"
            )


def refuse_traces(who: str, *tensors: Tensor) -> None:
    """Raises NotImplementedError where numbers cannot be looked at."""
    if batched() or traced(*tensors):
        raise NotImplementedError(
            f"{who} decides by values, which a traced program, or torch.func.vmap, does not have; call it outside, "
            "once per step"
        )


def decided_rows(routing: Routing) -> Tensor:
    """[T] bool, rows with a decision; the others, of NaN or without any subset, have gates of NaN."""
    return ~routing.gates.detach().isnan().any(-1)


def summed(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over processes, the same to the bit in all of them."""
    if group is not None:
        dist.all_reduce(values, group=group)
    return values


def checked_state(state: object, kind: type[Any], made_by: str) -> None:
    """Raises TypeError for anything but a state of this kind."""
    if not isinstance(state, kind):
        hint = f"; of what a file holds, make one: {kind.__name__}(**values)" if isinstance(state, dict) else ""
        raise TypeError(
            f"state is a {type(state).__name__}: expected the {kind.__name__} that {made_by}.init() or .update() "
            f"returned{hint}"
        )


def checked_values(name: str, values: object, shape: tuple[int, ...], why: str, *, narrow: bool = False) -> Tensor:
    """A tensor of a state: float32 or float64, of a shape, and finite (which is not looked at on a GPU).

    Args:
        why: what a wrong shape tells.
        narrow: whether floating-point numbers of 16 bits will do, where the next state is wider.

    Raises:
        TypeError, ValueError: anything else.
    """
    tensor = as_real(name, values, floating=narrow)
    if not narrow and tensor.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{name} has dtype {tensor.dtype}: expected torch.float32 or torch.float64, as init() made it; a module "
            "that was cast takes its buffers along, so keep states apart from it"
        )
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}: expected {shape}; {why}")
    if not cannot_look(tensor) and not bool(tensor.isfinite().all()):
        raise ValueError(
            f"{name} holds {tensor[~tensor.isfinite()][0].item()}: a state must be finite; start from init()"
        )
    return tensor
