"""A layer that learns, and what is adjusted after each of its steps.

Legend: T tokens, H hidden size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import circuitroute as cr

from .task import Batch


class Student(nn.Module):
    """A :class:`circuitroute.MoE` as it is."""

    def __init__(self, moe: cr.MoE) -> None:
        super().__init__()
        self.moe = moe

    @property
    def router(self) -> cr.Router:
        router = self.moe.router
        assert isinstance(router, cr.Router)
        return router

    def options(self) -> dict[str, Any]:
        """What the router is told besides, in training as in evaluation."""
        return {}

    def forward(self, hidden: Tensor, key: Tensor) -> tuple[Tensor, cr.Routing]:
        """Outputs [T, H] and the decision."""
        output, routing = self.moe(hidden, key=key, **self.options())
        return output, routing

    def penalty(self, routing: cr.Routing, batch: Batch) -> Tensor | float:
        """What is added to the loss of a training step."""
        return 0.0

    def after(self, routing: cr.Routing) -> None:
        """Called after each training step with its decision."""


class RangeStudent(Student):
    """A range router with a price that holds its mean count."""

    def hold(self, target: float) -> None:
        self._controller = cr.CountController(target)
        self._state = self._controller.init()

    def options(self) -> dict[str, Any]:
        return {"price": self._state.price}

    def after(self, routing: cr.Routing) -> None:
        self._state = self._controller.update(self._state, routing)
