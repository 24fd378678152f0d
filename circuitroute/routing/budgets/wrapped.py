"""A decision that is another one, with more told about it."""

from __future__ import annotations

from torch import Tensor

from circuitroute.inference.distribution import SubsetDistribution
from circuitroute.routing.decision import Pad, Routing


class WrappedRouting(Routing):
    """The numbers of another :class:`Routing`, which is made as it is: its gates and moments when they are read."""

    def __init__(self, decided: Routing) -> None:
        self.decided = decided
        self.mask = decided.mask
        self.temperature = decided.temperature

    @property
    def gates(self) -> Tensor:
        """See :class:`Routing`."""
        return self.decided.gates

    @property
    def distribution(self) -> SubsetDistribution:
        """See :class:`Routing`."""
        return self.decided.distribution

    @property
    def untempered(self) -> SubsetDistribution:
        """See :class:`Routing`."""
        return self.decided.untempered

    @property
    def logits(self) -> Tensor:
        """See :class:`Routing`."""
        return self.decided.logits

    def weighed(self, gates: Tensor, logits: Tensor | None = None) -> Routing:
        """See :class:`Routing`; what is told about the decision stays."""
        twin = self.__copy__()
        assert isinstance(twin, WrappedRouting)  # of its own type
        twin.decided = self.decided.weighed(gates, logits)
        return twin

    def padded(self, width: int | None = None, pad: Pad = "distinct") -> tuple[Tensor, Tensor]:
        """See :class:`Routing`."""
        return self.decided.padded(width, pad)
