"""One level's worth of sums as a bilinear operation on rows of values, forward and transposed.

Legend: B tokens; *rows* are the values [M, B] of a circuit's nodes in the order of its plan.

Every sweep over a circuit is made of three operations of its steps, on whatever rows (values, tangents, adjoints):

    combine    sums   += left * right
    to_left    left   += sums * right
    to_right   right  += sums * left

:class:`Dense` serves blocks that are alike (the same table of products over different variables), :class:`Pairs` the
rest. Neither holds more than one value per node and token for longer than an operation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from circuitroute.engines.layered.torch.runs import Contraction, IntArray, LargestSum
from circuitroute.engines.tables import constant

# Products that Pairs computes at once, and terms it adds one after the other.
MAX_PRODUCTS = 1 << 20
MAX_ADDED = 32


class Step(Protocol):
    """Some sums whose children are known; see the module."""

    def combine(self, sums: Tensor, left: Tensor, right: Tensor) -> None:
        """Add the products of rows of ``left`` and ``right`` to the step's rows of ``sums``."""
        ...

    def to_left(self, left: Tensor, sums: Tensor, right: Tensor) -> None:
        """Add the products of ``sums`` and ``right`` to the left children's rows of ``left``."""
        ...

    def to_right(self, right: Tensor, sums: Tensor, left: Tensor) -> None:
        """Add the products of ``sums`` and ``left`` to the right children's rows of ``right``."""
        ...

    def largest(self, rows: Tensor) -> None:
        """Raise the step's rows to the largest sum of a left and a right child, in place."""
        ...


class Pool:
    """The rows [A, m] that A states of m alike blocks occupy; a view where they lie at even distances."""

    def __init__(self, rows_Am: IntArray, device: torch.device) -> None:
        self._shape = rows_Am.shape
        self._start = int(rows_Am[0, 0])
        self._strides = _even_strides(rows_Am)
        self._index = constant(rows_Am.reshape(-1), device)

    def read(self, rows: Tensor) -> Tensor:
        """[A, m, B]."""
        return self._copy(rows) if self._strides is None else self._view(rows)

    def opened(self, rows: Tensor) -> Tensor:
        """[A, m, B] to add to; what was added takes effect with :meth:`close`."""
        return rows.new_zeros(*self._shape, rows.shape[1]) if self._strides is None else self._view(rows)

    def close(self, rows: Tensor, opened: Tensor) -> None:
        """Add what was opened as a copy."""
        if self._strides is None:
            rows.index_add_(0, self._index, opened.view(-1, rows.shape[1]))

    def _view(self, rows: Tensor) -> Tensor:
        (a, m), B = self._strides or (0, 0), rows.shape[1]
        return rows.as_strided((*self._shape, B), (a * B, m * B, 1), rows.storage_offset() + self._start * B)

    def _copy(self, rows: Tensor) -> Tensor:
        return rows.index_select(0, self._index).view(*self._shape, rows.shape[1])


def _even_strides(rows_Am: IntArray) -> tuple[int, int] | None:
    """Distances between states and between blocks, if they are constant and no row occurs twice."""
    A, m = rows_Am.shape
    a = int(rows_Am[1, 0] - rows_Am[0, 0]) if A > 1 else 0
    b = int(rows_Am[0, 1] - rows_Am[0, 0]) if m > 1 else 0
    even = rows_Am[0, 0] + a * np.arange(A)[:, None] + b * np.arange(m)
    if min(a, b) < 0 or not np.array_equal(even, rows_Am) or len(np.unique(rows_Am)) < rows_Am.size:
        return None
    return a, b


@dataclass(frozen=True)
class Table:
    """A block's products in the numbers of its own states: sum ``out[e]`` has the element (left[e], right[e])."""

    left: IntArray
    right: IntArray
    out: IntArray


class Dense:
    """Alike blocks, contracted together; their sums occupy the rows from ``first`` on, [states, m]."""

    def __init__(self, table: Table, left: Pool, right: Pool, sums: Pool) -> None:
        self._left, self._right, self._sums = left, right, sums
        self._up = Contraction.of(table.left, table.right, table.out)
        self._to_left = Contraction.of(table.out, table.right, table.left)
        self._to_right = Contraction.of(table.out, table.left, table.right)
        self._largest = LargestSum(self._up)

    def combine(self, sums: Tensor, left: Tensor, right: Tensor) -> None:
        """See :class:`Step`."""
        self._up.add(self._sums.opened(sums), self._left.read(left), self._right.read(right))

    def to_left(self, left: Tensor, sums: Tensor, right: Tensor) -> None:
        """See :class:`Step`."""
        target = self._left.opened(left)
        self._to_left.add(target, self._sums.read(sums), self._right.read(right))
        self._left.close(left, target)

    def to_right(self, right: Tensor, sums: Tensor, left: Tensor) -> None:
        """See :class:`Step`."""
        target = self._right.opened(right)
        self._to_right.add(target, self._sums.read(sums), self._left.read(left))
        self._right.close(right, target)

    def largest(self, rows: Tensor) -> None:
        """See :class:`Step`."""
        self._largest.update(self._sums.opened(rows), self._left.read(rows), self._right.read(rows))


class Pairs:
    """Sums of any shape: gather both factors, multiply, add up. Products exist for a slice of elements at a time."""

    def __init__(self, left: IntArray, right: IntArray, out: IntArray, device: torch.device) -> None:
        self._left, self._right, self._out = (_Ends.of(x, device) for x in (left, right, out))

    def combine(self, sums: Tensor, left: Tensor, right: Tensor) -> None:
        """See :class:`Step`."""
        _multiply_into(sums, self._out, left, self._left, right, self._right)

    def to_left(self, left: Tensor, sums: Tensor, right: Tensor) -> None:
        """See :class:`Step`."""
        _multiply_into(left, self._left, sums, self._out, right, self._right)

    def to_right(self, right: Tensor, sums: Tensor, left: Tensor) -> None:
        """See :class:`Step`."""
        _multiply_into(right, self._right, sums, self._out, left, self._left)

    def largest(self, rows: Tensor) -> None:
        """See :class:`Step`."""
        for some in _slices(len(self._out.rows), rows.shape[1]):
            found = rows.index_select(0, self._left.rows[some]).add_(rows.index_select(0, self._right.rows[some]))
            index = self._out.rows[some][:, None].expand_as(found)
            rows.scatter_reduce_(0, index, found, "amax")


@dataclass(frozen=True)
class _Ends:
    """One end of every product: the row to read, and where to add.

    Added one after the other, thousands of float32 terms would lose two digits, so they go through partial sums:
    ``stages`` lists, from the products on, which of the next stage's ``sizes`` sums each belongs to; the last are rows.
    """

    rows: Tensor
    stages: tuple[Tensor, ...]
    sizes: tuple[int, ...]

    @staticmethod
    def of(rows: IntArray, device: torch.device) -> _Ends:
        stages, sizes, to = [], [], rows
        while np.bincount(to).max(initial=0) > MAX_ADDED:
            partial, to = _partial_sums(to)
            stages.append(partial)
            sizes.append(len(to))
        stages.append(to)
        return _Ends(
            constant(rows, device),
            tuple(constant(stage, device) for stage in stages),
            tuple(sizes),
        )


def _partial_sums(to: IntArray) -> tuple[IntArray, IntArray]:
    """For terms that belong to the sums ``to``: the partial sum of each term, and the sum of each partial sum."""
    order = np.argsort(to, kind="stable")
    starts = np.flatnonzero(np.diff(to[order], prepend=-1))
    rank = np.arange(len(to)) - np.repeat(starts, np.diff(np.append(starts, len(to))))
    begins = rank % MAX_ADDED == 0
    partial = np.empty_like(to)
    partial[order] = np.cumsum(begins) - 1
    return partial, to[order][begins]


def _multiply_into(target: Tensor, to: _Ends, x: Tensor, x_ends: _Ends, y: Tensor, y_ends: _Ends) -> None:
    B = target.shape[1]
    sums = [*(target.new_zeros(size, B) for size in to.sizes), target]
    for some in _slices(len(to.rows), B):
        products = x.index_select(0, x_ends.rows[some]).mul_(y.index_select(0, y_ends.rows[some]))
        sums[0].index_add_(0, to.stages[0][some], products)
    for stage, terms, total in zip(to.stages[1:], sums, sums[1:], strict=False):
        total.index_add_(0, stage, terms)


def _slices(products: int, tokens: int) -> list[slice]:
    size = max(1, MAX_PRODUCTS // max(tokens, 1))
    return [slice(i, i + size) for i in range(0, products, size)]
