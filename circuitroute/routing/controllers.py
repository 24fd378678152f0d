"""Control of a router from outside: states are the caller's, explicit, and go into checkpoints as plain tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from circuitroute._validate import as_number, as_real
from circuitroute.routing.decision import Routing


class CountState(NamedTuple):
    """What a :class:`CountController` knows.

    Attributes:
        price: [] float32, what the next decisions are to pay per expert; for a router's ``price=``.
    """

    price: Tensor


class CountController:
    """A price that holds the mean number of experts of a range router at a target: integral control.

    ::

        controller = cr.CountController(2.5)
        state = controller.init()
        for hidden in batches:
            routing = router(hidden, price=state.price)
            state = controller.update(state, routing)

    Args:
        target: the mean count to hold.
        gain: how much the price moves per expert too many, in units of logits; 0.02 settles in a few hundred steps.

    Raises:
        ValueError: a target or gain that is not positive.
    """

    def __init__(self, target: float, gain: float = 0.02) -> None:
        self.target, self.gain = as_number("target", target), as_number("gain", gain)
        for name, value in (("target", self.target), ("gain", self.gain)):
            if not 0 < value < float("inf"):
                raise ValueError(f"{name}={value}: must be positive and finite")

    def init(self, device: torch.device | str | None = None) -> CountState:
        """The state before the first step: no price."""
        return CountState(torch.zeros((), device=device))

    @torch.no_grad()
    def update(self, state: CountState, routing: Routing, group: dist.ProcessGroup | None = None) -> CountState:
        """The state for the next step, from the counts of this one: price += gain (mean count - target).

        Args:
            state: from :meth:`init` or the step before.
            routing: T decisions.
            group: processes whose tokens count together, all of which must call this; they agree on the price.
        """
        price = as_real("state.price", state.price, floating=True)
        total = torch.stack([routing.counts.sum().double(), routing.counts.new_tensor(len(routing.mask)).double()])
        if group is not None:
            dist.all_reduce(total, group=group)
        mean = total[0] / total[1].clamp(min=1)
        step = torch.where(total[1] > 0, mean - self.target, 0.0)
        return CountState(price + self.gain * step.to(price))

    def __repr__(self) -> str:
        return f"CountController({self.target}, gain={self.gain})"
