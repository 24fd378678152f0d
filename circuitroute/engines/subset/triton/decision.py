"""Which variables a row chooses, and their order, for kernels: the mode, the sampled tokens, and sorted slots.

Shapes as in :mod:`.coins`: x is one tensor [rows, lanes] or [slots, rows, lanes], what belongs to a row [rows, 1].

A variable's key is an integer that orders a row as ``routing.decision.chosen_first`` does: chosen before others, by
decreasing logit, by increasing index. All keys of a row differ, so each next one is the largest of those below. From
the lowest bit on it holds 16 bits of the index, counted down, 32 bits of the logit, and whether the variable is chosen.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from circuitroute.engines.step import SHARE
from circuitroute.engines.subset.triton.coins import INFINITY, along
from circuitroute.engines.subset.triton.sampling import mixed
from circuitroute.keys import _GOLDEN64, mix64

LAST_INDEX = tl.constexpr(0xFFFF)
# fold_in(key, SHARE) but for the row's key.
SHARE_MIX = tl.constexpr(mix64(torch.tensor(SHARE, device="cpu")).item() % 2**64)
GOLDEN = tl.constexpr(_GOLDEN64)

# ---------------------------------------------------------------------------------------------- rows


@triton.jit
def row_max(x):
    """[rows, 1]."""
    return tl.max(tl.max(x, axis=0) if len(x.shape) == 3 else x, axis=1, keep_dims=True)


@triton.jit
def row_any(x):
    """[rows, 1] bool."""
    return row_max(x.to(tl.int32)) > 0


@triton.jit
def row_count(x):
    """[rows, 1] int32, how many hold."""
    return _row_sum(x.to(tl.int32))


@triton.jit
def _row_sum(x):
    return tl.sum(tl.sum(x, axis=0) if len(x.shape) == 3 else x, axis=1, keep_dims=True)


# ---------------------------------------------------------------------------------------------- who is sampled


@triton.jit
def is_sampled(key, below):
    """Whether a row is one of the sampled ones, as :func:`circuitroute.engines.step.Rule` says.

    Args:
        key: int64.
        below: int32, the largest word, as a signed one, whose uniform lies below the share.
    """
    x = (key.to(tl.uint64, bitcast=True) ^ SHARE_MIX) + GOLDEN
    low, high = mixed(mixed64(x).to(tl.int64, bitcast=True))
    x = low  # uniform 0
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = x ^ high
    x = (x ^ (x >> 15)) * 0x846CA68B
    x = x ^ (x >> 16)
    return x.to(tl.int32, bitcast=True) <= below


@triton.jit
def mixed64(x):
    """:func:`circuitroute.keys.mix64` of uint64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


# ---------------------------------------------------------------------------------------------- keys


@triton.jit
def ordered(x):
    """Int32 that order as these floats do; the two zeros are one."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def keys_of(x, index, chosen):
    """Keys of logits without NaN; -1 where there is no variable: its index is negative. ``chosen`` may be None."""
    key = ((ordered(x).to(tl.int64) + 0x80000000) << 16) | (index ^ LAST_INDEX).to(tl.int64)
    if chosen is not None:
        key = key | (chosen.to(tl.int64) << 48)
    return tl.where(index < 0, -1, key)


@triton.jit
def index_of(key):
    """The variable that a key belongs to."""
    return (key & LAST_INDEX) ^ LAST_INDEX


@triton.jit
def logit_of(key):
    """Its logit."""
    bits = (((key >> 16) & 0xFFFFFFFF) - 0x80000000).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


# ---------------------------------------------------------------------------------------------- order and mode


@triton.jit
def _next(keys, best):
    """The largest key of a row below its ``best``."""
    return row_max(tl.where(keys < along(best, keys), keys, -1))


@triton.jit
def in_order(keys, slot, S: tl.constexpr):
    """The largest S keys of a row: that of rank ``slot`` where one is wanted."""
    best = _above_all(keys)
    found = along(best, slot) + tl.zeros_like(slot)
    for rank in tl.range(S):
        best = _next(keys, best)
        found = tl.where(slot == rank, along(best, slot), found)
    return found


@triton.jit
def mode(keys, POTENTIAL, slot, J: tl.constexpr, S: tl.constexpr):
    """(chosen, keys by rank, whether any subset is left) of a most probable subset, at the lower count among equals.

    See :func:`circuitroute.engines.subset.mode.mode`, and :func:`in_order` for the keys by rank. A row that nothing
    satisfies chooses nothing.

    Args:
        keys: of the logits at temperature 1, with nothing chosen.
        POTENTIAL: [rows, 1], pointers to each row's potential.
        slot: numbers of slots.
    """
    forced = row_count((keys >= 0) & (logit_of(keys) == INFINITY))
    potential = tl.load(POTENTIAL).to(tl.float64)
    top = tl.where((forced == 0) & (potential > -INFINITY), potential, -INFINITY)
    best = _above_all(keys)
    last, total = best, tl.zeros_like(top)
    found = along(best, slot) + tl.zeros_like(slot)
    for rank in tl.range(S):
        best = _next(keys, best)
        found = tl.where(slot == rank, along(best, slot), found)
        gain = logit_of(best)
        total += tl.where(gain == INFINITY, 0.0, gain.to(tl.float64))
        if J > 1:
            score = total + tl.load(POTENTIAL + rank + 1).to(tl.float64)
            better = (score > top) & (forced <= rank + 1)
            top = tl.where(better, score, top)
            last = tl.where(better, best, last)
    return keys >= along(last, keys), found, top > -INFINITY


@triton.jit
def _above_all(keys):
    """[rows, 1], a number above all keys."""
    return row_max(keys) * 0 + (1 << 62)
