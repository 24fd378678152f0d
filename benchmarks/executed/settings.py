"""What is timed: the tokens, the router that steers how many experts they get, and what a stack makes of them.

Shapes: T tokens, H hidden size, I inner size of an expert, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import circuitroute as cr

# A token gets at least so many.
LEAST = 1
# Deviation of the router's logits: enough for tokens to differ in how many experts they get.
SPREAD = 1.0


class UnavailableError(Exception):
    """This way cannot run here; the message says why."""


@dataclass(frozen=True)
class Sizes:
    """T, E, H, I and the largest number of experts of a token."""

    tokens: int = 2048
    experts: int = 64
    hidden: int = 256
    inner: int = 128
    k: int = 8


@dataclass(frozen=True)
class Setting:
    """One layer to be timed.

    Attributes:
        sizes: of the layer.
        asked: the mean number of experts per token; None for the stack's own top-k.
        padded: whether every token is to pay for k slots, the unused ones with weight 0.
        hidden: [T, H], 1 in the first place.
        router: [E, H], the router's weight without any price.
        price: what an expert costs; it is subtracted from every logit.
    """

    sizes: Sizes
    asked: float | None
    padded: bool
    hidden: Tensor
    router: Tensor
    price: float

    @property
    def constraint(self) -> cr.Constraint:
        """The subsets of experts that a token may get."""
        return cr.Exactly(self.sizes.k) if self.asked is None else cr.Between(LEAST, self.sizes.k)

    @property
    def priced_router(self) -> Tensor:
        """[E, H] the router's weight with the price in it."""
        priced = self.router.clone()
        priced[:, 0] -= self.price
        return priced


@dataclass(frozen=True)
class Layer:
    """What a stack makes of a setting.

    Attributes:
        module: whose parameters learn, and which is told of ``train()`` and ``eval()``.
        run: [T, H] -> [T, H].
        executed: the mean number of experts per token in the last run that were chosen, whatever else was computed.
    """

    module: nn.Module
    run: Callable[[Tensor], Tensor]
    executed: Callable[[], float]


def settings(sizes: Sizes, means: tuple[float, ...], padded: tuple[float, ...], seed: int = 0) -> Iterator[Setting]:
    """Fixed top-k first, then the means, then those means at which every token pays for k slots.

    Raises:
        ValueError: a mean that no token could have.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(sizes.tokens, sizes.hidden, generator=generator)
    hidden[:, 0] = 1.0
    router = torch.randn(sizes.experts, sizes.hidden, generator=generator) * SPREAD * sizes.hidden**-0.5
    router[:, 0] = 0.0
    yield Setting(sizes, None, False, hidden, router, 0.0)
    for pays, wanted in ((False, means), (True, padded)):
        for mean in wanted:
            yield Setting(sizes, mean, pays, hidden, router, price_for(hidden @ router.t(), mean, sizes.k))


def price_for(logits: Tensor, mean: float, k: int) -> float:
    """The price at which tokens with ``logits`` [T, E] get ``mean`` experts on average, from 1 to k each.

    The mode of ``Between(1, k)`` has the experts whose logits exceed the price, clipped: a count that falls as the
    price rises, so that bisection finds it.

    Raises:
        ValueError: a mean outside of 1 to k.
    """
    if not LEAST <= mean <= k:
        raise ValueError(f"mean={mean}: tokens get from {LEAST} to {k} experts")
    low, high = float(logits.min()) - 1.0, float(logits.max()) + 1.0
    if mean == k:
        return low
    if mean == LEAST:
        return high
    for _ in range(60):
        price = (low + high) / 2
        counts = (logits > price).sum(-1).clamp(LEAST, k)
        low, high = (price, high) if counts.double().mean() > mean else (low, price)
    return high
