"""Down from the root, choosing an element of every sum that is reached: at random for a sample, the best for the mode.

Legend: B tokens, m blocks of one step, F the most elements any of their sums has.

A subset is a tree inside the circuit with one element per sum. It meets every scope at most once, so at most one sum
per token and block is reached, and only its elements are looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from circuitroute.engines.layered.torch.plan import Plan
from circuitroute.engines.logspace import is_zero
from circuitroute.engines.sampling import invert
from circuitroute.keys import uniform_at

# (weights or scores [F, m, B], the reached rows [m, B]) -> which element [m, B]
Choice: TypeAlias = Callable[[Tensor, Tensor], Tensor]

# Entries of [F, m, B] at once.
MAX_ENTRIES = 1 << 22


class Draw:
    """Choice by inversion at the uniform that belongs to the sum; collects the tokens whose outcome is uncertain."""

    def __init__(self, plan: Plan, key_B: Tensor, margin: float) -> None:
        self._number = plan.tensor("number", plan.number)
        self._key = key_B
        self._margin = margin
        self.uncertain = torch.zeros(len(key_B), dtype=torch.bool, device=key_B.device)

    def __call__(self, weights: Tensor, row: Tensor) -> Tensor:
        return self.invert(weights, _take(self._number, row))

    def invert(self, weights: Tensor, number: Tensor) -> Tensor:
        """How many cumulative ``weights`` [F, m, B] lie below the uniforms ``number`` [m, B] of the tokens."""
        cumulative = weights.cumsum(0)
        index, doubt = invert(cumulative, uniform_at(self._key, number, weights.dtype), self._margin)
        self.uncertain |= (doubt & (cumulative[-1] > 0)).any(0)
        return index


class Best:
    """Choice of the first element with the largest score; collects the tokens where others have it too."""

    def __init__(self, tokens: int, device: torch.device) -> None:
        self.tied = torch.zeros(tokens, dtype=torch.bool, device=device)

    def __call__(self, scores: Tensor, row: Tensor) -> Tensor:
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


def walk(
    plan: Plan, rows: Tensor, multiply: Callable[[Tensor, Tensor], Tensor], nothing: float, choose: Choice, root: Tensor
) -> Tensor:
    """[B, N] bool: the subset reached from the root's element number ``root`` [B], -1 for none.

    Args:
        multiply: an element's weight from its children's values, in place on the first.
        nothing: the weight of no element.
    """
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
            weights = multiply(_values(rows, _take(left, element)), _values(rows, _take(right, element)))
            picked = (start_of + choose(torch.where(inside, weights, nothing), at)).clamp_(max=len(left) - 1)
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
    return rows.gather(0, at.view(-1, at.shape[-1])).view(at.shape)
