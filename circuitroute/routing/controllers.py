"""Control of a router from outside: states are the caller's, explicit, and go into checkpoints as plain tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from circuitroute._validate import as_number
from circuitroute.routing.control import (
    Routings,
    checked_state,
    checked_values,
    decided_rows,
    distributions_of,
    routings_of,
    summed,
)
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

    A soft budget beside the hard one: every token keeps the router's constraint, and their mean keeps the target. The
    price stays where it can matter: beyond the range of the logits, where every token has the fewest or the most
    experts it may, a longer wait does not carry it further (no windup).

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
    def update(self, state: CountState, routing: Routings, group: dist.ProcessGroup | None = None) -> CountState:
        """The state for the next step, from the counts of this one: price += gain (mean count - target).

        Args:
            state: from :meth:`init` or the step before.
            routing: T decisions, made with ``price=state.price``; or several, of micro-batches, or of layers that share
                the price. Rows without a decision (NaN) count for nothing, and a step without tokens moves nothing.
            group: processes whose tokens count together, all of which must call this; they agree on the price.

        Raises:
            TypeError: a state of another controller, or a price of another dtype; a soft routing, which takes no price.
            ValueError: a price that is not one finite number, or a target that the constraint has no subsets for.
        """
        checked_state(state, CountState, "cr.CountController")
        price = checked_values("state.price", state.price, (), "one price for all experts", narrow=True)
        routings = routings_of(routing)
        distributions_of(routings, "cr.CountController")
        for each in routings:
            self._check_reach(each)
        device = routings[0].mask.device
        counted = [torch.stack([each.counts.sum(), decided_rows(each).sum()]) for each in routings]
        total = summed(torch.stack(counted).to(device).sum(0).double(), group)
        error = torch.where(total[1] > 0, total[0] / total[1].clamp(min=1) - self.target, 0.0)
        low, high = _useful_prices(routings, price, group)
        moved = price.to(device, torch.float64) + self.gain * error
        # A price that is out of range already, as one of another run may be, is only kept from going further out.
        now = price.to(device, torch.float64)
        kept = torch.where(moved > now, moved.minimum(high.maximum(now)), moved.maximum(low.minimum(now)))
        # In float32 at least: a step of the price is small, and would be rounded off in less.
        wide = torch.promote_types(price.dtype, torch.float32)
        return CountState(torch.where(error == 0, now, kept).to(price.device, wide))

    def _check_reach(self, routing: Routing) -> None:
        circuit = routing.untempered.circuit
        if not circuit.min_count <= self.target <= circuit.max_count:
            low, high = circuit.min_count, circuit.max_count
            counts = f"exactly {low}" if low == high else f"from {low} to {high}"
            raise ValueError(
                f"target={self.target}: no price gets there, since every subset that {circuit.constraint!r} allows has "
                f"{counts} experts; another target, or a wider constraint"
            )

    def __repr__(self) -> str:
        return f"CountController({self.target}, gain={self.gain})"


def _useful_prices(
    routings: Sequence[Routing], price: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """The prices between which a decision can depend on the price, [] and [] float64.

    Subsets A and B with d = |A| - |B| > 0 change places at the price (sum over A - sum over B) / d. With all logits in
    [a, b], and K the most experts, that lies in [a - K (b - a), b + K (b - a)], for counts of all experts in [a, b].
    Samples at temperature t need t times a log-odds more, of which 20 and a log 2 for every expert are plenty.
    """
    lowest, highest = [], []
    for routing in routings:
        distribution, moved = routing.untempered, routing.untempered.logits.detach().double()
        finite = moved.isfinite() & decided_rows(routing)[:, None]
        unpriced = moved + price.to(moved)
        top = torch.where(finite, unpriced, -math.inf).reshape(-1)
        bottom = torch.where(finite, unpriced, math.inf).reshape(-1)
        empty = top.new_zeros(1)
        a, b = torch.cat([bottom, empty + math.inf]).amin(), torch.cat([top, empty - math.inf]).amax()
        temperature = routing.temperature
        warmth = temperature.detach().amax().double() if isinstance(temperature, Tensor) else a.new_tensor(temperature)
        circuit = distribution.circuit
        margin = warmth * (20 + circuit.n * math.log(2))
        if circuit.counts is None:
            margin = margin + circuit.max_count * (b - a).clamp(min=0)
        if distribution.count_potential is not None:
            potential = distribution.count_potential.detach().double()
            bounded = torch.where(potential.isfinite(), potential, 0.0)
            margin = margin + bounded.amax() - bounded.amin()
        lowest.append(a - margin)
        highest.append(b + margin)
    device = lowest[0].device
    bounds = torch.stack(
        [-torch.stack([x.to(device) for x in lowest]).amin(), torch.stack([x.to(device) for x in highest]).amax()]
    )
    if group is not None:
        dist.all_reduce(bounds, dist.ReduceOp.MAX, group=group)
    return -bounds[0], bounds[1]
