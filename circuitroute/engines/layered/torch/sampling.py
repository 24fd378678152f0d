"""Down from the root, choosing an element of every sum that is reached: at random for a sample, the best for the mode.

Legend: B tokens, m blocks of one step, F the most elements any of their sums has.

A subset is a tree inside the circuit with one element per sum. It meets every scope at most once, so at most one sum
per token and block is reached, and only its elements are looked at.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from circuitroute.engines.layered.torch.plan import Plan
from circuitroute.engines.logspace import is_zero
from circuitroute.engines.sampling import invert
from circuitroute.keys import uniform_at

# Entries of [F, m, B] at once.
MAX_ENTRIES = 1 << 22


class Reached(NamedTuple):
    """The sums that are reached in some blocks of one step, and their elements.

    Attributes:
        sums: [m, B] rows.
        left, right: [F, m, B] the rows of their elements' children.
        inside: [F, m, B] bool, which are elements at all.
    """

    sums: Tensor
    left: Tensor
    right: Tensor
    inside: Tensor


class Choice(Protocol):
    """Which element of each sum: [m, B]."""

    def __call__(self, reached: Reached) -> Tensor: ...


class Draw:
    """Choice by inversion at the uniform that belongs to the sum; collects the tokens whose outcome is uncertain."""

    def __init__(self, plan: Plan, rows: Tensor, key_B: Tensor, margin: float) -> None:
        self._rows = rows
        self._number = plan.tensor("number", plan.number)
        self._key = key_B
        self._margin = margin
        self.uncertain = torch.zeros(len(key_B), dtype=torch.bool, device=key_B.device)

    def __call__(self, reached: Reached) -> Tensor:
        weights = _values(self._rows, reached.left).mul_(_values(self._rows, reached.right))
        return self.invert(torch.where(reached.inside, weights, 0.0), _take(self._number, reached.sums))

    def invert(self, weights: Tensor, number: Tensor) -> Tensor:
        """How many cumulative ``weights`` [F, m, B] lie below the uniforms ``number`` [m, B] of the tokens."""
        cumulative = weights.cumsum(0)
        index, doubt = invert(cumulative, uniform_at(self._key, number, weights.dtype), self._margin)
        self.uncertain |= (doubt & (cumulative[-1] > 0)).any(0)
        return index


class Best:
    """Choice of the element with the largest score; collects the tokens where others have it too."""

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows
        self.tied = torch.zeros(rows.shape[1], dtype=torch.bool, device=rows.device)

    def __call__(self, reached: Reached) -> Tensor:
        scores = _values(self._rows, reached.left).add_(_values(self._rows, reached.right))
        scores = torch.where(reached.inside, scores, -math.inf)
        largest = scores.amax(0)
        best = scores == largest
        many = best.sum(0, dtype=torch.uint8 if len(best) < 256 else torch.int32) > 1
        self.tied |= (many & ~is_zero(largest)).any(0)
        return first(best)


def first(candidates: Tensor) -> Tensor:
    """[m, B] int64, the index of the first that holds, of [F, m, B] bool; argmax is many times slower along dim 0."""
    F = candidates.shape[0]
    dtype = torch.uint8 if F < 256 else torch.int32
    falling = torch.arange(F, 0, -1, dtype=dtype, device=candidates.device)
    return F - (candidates.to(dtype) * falling[:, None, None]).amax(0).long()


def root_elements(plan: Plan, tokens: int) -> Reached:
    """The root's elements, the same for every token; a root that is a literal is one element."""
    if plan.root is None:
        left, right = plan.coefficients, plan.coefficients * 0 + 2 * plan.n
    else:
        left, right, _ = plan.root
    rows = [
        plan.tensor(f"root {i}", array)[:, None, None].expand(-1, 1, tokens) for i, array in enumerate((left, right))
    ]
    always = torch.ones(1, 1, 1, dtype=torch.bool, device=plan.device)
    return Reached(rows[0][0], rows[0], rows[1], always)


def walk(plan: Plan, root: Tensor, choose: Choice) -> Tensor:
    """[B, N] bool: the subset reached from the root's element number ``root`` [B], -1 for none."""
    reached = root.new_full((plan.blocks + 1, len(root)), -1)
    _reach_root(plan, reached, root)
    first = plan.tensor("first", plan.elements.first)
    left, right = plan.tensor("left", plan.elements.left), plan.tensor("right", plan.elements.right)
    block_of = plan.tensor("block_of", plan.block_of)
    stop = plan.blocks
    for sums in reversed(plan.sums):
        start, stop = stop - sums.blocks, stop - sums.blocks
        width = max(1, MAX_ENTRIES // max(1, sums.fan_in * len(root)))
        for low in range(start, start + sums.blocks, width):
            row = reached[low : min(low + width, start + sums.blocks)]
            live = row >= 0
            at = row.clamp(min=2 * plan.n + 1)
            start_of, stop_of = _take(first, at), _take(first, at + 1)
            element = start_of + torch.arange(sums.fan_in, device=row.device)[:, None, None]
            inside = (element < stop_of) & live
            element.clamp_(max=len(left) - 1)
            choice = choose(Reached(at, _take(left, element), _take(right, element), inside))
            picked = (start_of + choice).clamp_(max=len(left) - 1)
            for child in (_take(left, picked), _take(right, picked)):
                reached.scatter_(0, torch.where(live, _take(block_of, child), plan.blocks), child)
    present = torch.arange(plan.n, 2 * plan.n, device=root.device)[:, None]
    return (reached[: plan.n] == present).t()


def _reach_root(plan: Plan, reached: Tensor, root: Tensor) -> None:
    live = root >= 0
    if plan.root is None:
        children = [torch.full_like(root, int(plan.coefficients[0]))]
    else:
        children = [plan.tensor(f"root {i}", plan.root[i])[root.clamp(min=0)] for i in (0, 1)]
    for child in children:
        block = torch.where(live, plan.tensor("block_of", plan.block_of)[child], plan.blocks)
        reached.scatter_(0, block[None], child[None])


def _take(array: Tensor, at: Tensor) -> Tensor:
    """array[at]; for one dimension, index_select is several times faster."""
    return array.index_select(0, at.view(-1)).view(at.shape)


def _values(rows: Tensor, at: Tensor) -> Tensor:
    """rows[at[f, m, b], b]."""
    return rows.gather(0, at.reshape(-1, at.shape[-1])).view(at.shape)
