"""Batched products of states: out[o] += x[i] * y[j] over a list of triples, in few tensor operations.

Legend: m blocks that are alike, B tokens; a *slab* is the values [m, B] of one state in all of them.

A table of a count circuit says (a, b) -> a + b: for each a, the slabs of all b are multiplied by that of a and added
to consecutive slabs, one truncated convolution. So triples are cut into *runs*, along which each of the three
indices stands still or moves by one, and a run is one operation on slices. Adjoints are the same contraction with the
roles exchanged, d x[i] += d out[o] * y[j], cut into runs of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from torch import Tensor

IntArray: TypeAlias = npt.NDArray[np.int64]

# Steps (x, y, out) along a run. Where out stands still the run is a sum of products.
DIRECTIONS = ((0, 1, 1), (1, 0, 1), (1, 1, 1), (1, -1, 0), (1, 1, 0), (0, 1, 0), (1, 0, 0))


@dataclass(frozen=True)
class Run:
    """``length`` triples from (x, y, out) on, each index moving by its step."""

    x: int
    y: int
    out: int
    length: int
    step: tuple[int, int, int]

    def slices(self) -> tuple[slice, slice, slice]:
        """Where x, y and out lie; y in increasing order even if it steps down."""
        starts = (self.x, self.y - (self.length - 1 if self.step[1] < 0 else 0), self.out)
        x, y, out = (slice(at, at + (self.length if step else 1)) for at, step in zip(starts, self.step, strict=True))
        return x, y, out


@dataclass(frozen=True)
class Contraction:
    """out[o] += x[i] * y[j] over all triples of a table."""

    runs: tuple[Run, ...]

    @staticmethod
    def of(x: IntArray, y: IntArray, out: IntArray) -> Contraction:
        """Cut into runs along the direction that needs fewest."""
        return Contraction(_best_cut(x, y, out).runs())

    @staticmethod
    def count(x: IntArray, y: IntArray, out: IntArray) -> int:
        """How many runs :meth:`of` would make."""
        return len(_best_cut(x, y, out).starts)

    def add(self, out: Tensor, x: Tensor, y: Tensor) -> None:
        """In place on ``out`` [o, m, B], from ``x`` [i, m, B] and ``y`` [j, m, B]."""
        for run in self.runs:
            i, j, o = run.slices()
            if run.step[2] or run.length == 1:
                out[o].addcmul_(x[i], y[j])
            elif run.step[1] < 0:
                out[run.out].add_((x[i] * y[j].flip(0)).sum(0))
            elif run.step[:2] == (1, 1):
                out[run.out].add_((x[i] * y[j]).sum(0))
            else:  # one of the factors is common
                out[run.out].addcmul_(x[i].sum(0), y[j].sum(0))


class LargestSum:
    """The same triples in (max, +): out[o] = max(out[o], x[i] + y[j]), for the mode."""

    def __init__(self, contraction: Contraction) -> None:
        self._runs = contraction.runs

    def update(self, out: Tensor, x: Tensor, y: Tensor) -> None:
        """In place on ``out``; shapes as in :meth:`Contraction.add`."""
        for run in self._runs:
            i, j, o = run.slices()
            if run.step[2] or run.length == 1:
                found = x[i] + y[j]
                out[o].copy_(out[o].maximum(found))
                continue
            found = (x[i] + (y[j].flip(0) if run.step[1] < 0 else y[j])).amax(0)
            out[run.out].copy_(out[run.out].maximum(found))


@dataclass(frozen=True)
class _Cut:
    """The maximal runs along ``step``: sorted by the line they lie on, triples ``starts`` to the next start are one."""

    triples: tuple[IntArray, IntArray, IntArray]
    starts: IntArray
    step: tuple[int, int, int]

    def runs(self) -> tuple[Run, ...]:
        """The runs themselves."""
        lengths = np.diff(np.append(self.starts, len(self.triples[0])))
        firsts = zip(*(index[self.starts].tolist() for index in self.triples), lengths.tolist(), strict=True)
        return tuple(Run(x, y, out, length, self.step if length > 1 else (0, 0, 0)) for x, y, out, length in firsts)


def _best_cut(x: IntArray, y: IntArray, out: IntArray) -> _Cut:
    cuts = [_cut((x, y, out), step) for step in DIRECTIONS]
    return min(cuts, key=lambda cut: len(cut.starts))


def _cut(triples: tuple[IntArray, IntArray, IntArray], step: tuple[int, int, int]) -> _Cut:
    at = triples[next(k for k in (2, 0, 1) if step[k] == 1)]
    lines = [index - s * at for index, s in zip(triples, step, strict=True)]
    # One number per line and one per place on it, so that a single sort finds the runs.
    line, size = np.zeros_like(at), 1
    for index in lines:
        line, size = line + (index - index.min()) * size, size * int(index.max() - index.min() + 1)
    place = line * int(at.max() + 2) + at
    order = np.argsort(place, kind="stable")
    starts = np.flatnonzero(np.diff(place[order], prepend=-2) != 1)
    return _Cut((triples[0][order], triples[1][order], triples[2][order]), starts, step)
