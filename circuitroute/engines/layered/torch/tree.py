"""A circuit up and down, as the count family does with its tree: values, adjoints, and both with their tangents.

Legend: rows are [M, B], one per node and token; see :class:`circuitroute.engines.layered.torch.plan.Plan`.

The value of a node is the probability that independent coins satisfy it; its adjoint the derivative of log Z. Both
sweeps are multilinear, so their derivative along a direction is the same steps with one factor replaced at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from circuitroute.engines.layered.torch.steps import Step


def up(steps: Sequence[Step], rows: Tensor) -> None:
    """Fill the sums' rows, given those of the leaves (all others zero)."""
    for step in steps:
        step.combine(rows, rows, rows)


def dual_up(steps: Sequence[Step], rows: Tensor, tangents: Tensor) -> None:
    """Fill the sums' tangents, given the values and the tangents of the leaves (all others zero)."""
    for step in steps:
        step.combine(tangents, tangents, rows)
        step.combine(tangents, rows, tangents)


def down(steps: Sequence[Step], rows: Tensor, adjoints: Tensor) -> None:
    """Fill all adjoints, given the root's (all others zero)."""
    for step in reversed(steps):
        step.to_left(adjoints, adjoints, rows)
        step.to_right(adjoints, adjoints, rows)


def dual_down(steps: Sequence[Step], rows: Tensor, tangents: Tensor, adjoints: Tensor, moved: Tensor) -> None:
    """Fill the adjoints and their tangents ``moved``, given the root's (all others zero)."""
    down(steps, rows, adjoints)
    for step in reversed(steps):
        step.to_left(moved, moved, rows)
        step.to_left(moved, adjoints, tangents)
        step.to_right(moved, moved, rows)
        step.to_right(moved, adjoints, tangents)


def largest_up(steps: Sequence[Step], rows: Tensor) -> None:
    """The best log value of every sum, given those of the leaves (all others log 0)."""
    for step in steps:
        step.largest(rows)
