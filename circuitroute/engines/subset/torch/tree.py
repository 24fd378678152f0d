"""The balanced tree of polynomials behind the count family, in linear space, tokens last.

Legend: T tokens, N variables, K the largest count; m nodes at a level, d their degree.

Variable i is the polynomial ``absent_i + present_i x``; a node is the product of its two children, truncated
at x^K, so coefficient j of a node is the weight of selecting j of its variables. A level is a tensor
[d + 1, m, T]; its node i is paired with node i + m/2, and an odd level ends in the constant polynomial 1.
The root's coefficients are elementary symmetric polynomials, i.e. the Poisson-binomial probabilities when
absent_i + present_i = 1 (Chen & Liu 1997); everything is a sum of positive terms.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F


def even(m: int) -> int:
    """Slots of a level with ``m`` nodes: the root stands alone, other levels are padded to pairs."""
    return m if m == 1 else m + m % 2


def leaves(absent_NT: Tensor, present_NT: Tensor) -> Tensor:
    """[2, even(N), T] the first level."""
    n, tokens = absent_NT.shape
    level = absent_NT.new_empty(2, even(n), tokens)
    level[0, :n] = absent_NT
    level[1, :n] = present_NT
    level[0, n:] = 1.0
    level[1, n:] = 0.0
    return level


def _empty_parent(level: Tensor, K: int) -> Tensor:
    """An uninitialised parent level, its padding filled in."""
    m = level.shape[1] // 2
    degree = min(2 * (level.shape[0] - 1), K)
    parent = level.new_empty(degree + 1, even(m), level.shape[2])
    if even(m) > m:
        parent[:, m:] = 0.0
        parent[0, m:] = 1.0
    return parent


def _multiply_into(out: Tensor, a: Tensor, b: Tensor, accumulate: bool = False) -> None:
    """out[j] = sum_i a[i] b[j - i], truncated at out's degree; added to ``out`` if ``accumulate``."""
    top = out.shape[0] - 1
    if not accumulate:
        width = min(b.shape[0], top + 1)
        torch.mul(b[:width], a[0], out=out[:width])
        out[width:] = 0.0
    for i in range(0 if accumulate else 1, min(a.shape[0] - 1, top) + 1):
        width = min(b.shape[0], top + 1 - i)
        out[i : i + width].addcmul_(b[:width], a[i])


def _correlate_into(out: Tensor, a: Tensor, b: Tensor, accumulate: bool = False) -> None:
    """out[j] = sum_i a[j + i] b[i], the transpose of :func:`_multiply_into`."""
    if not accumulate:
        width = min(out.shape[0], a.shape[0])
        torch.mul(a[:width], b[0], out=out[:width])
        out[width:] = 0.0
    for i in range(0 if accumulate else 1, b.shape[0]):
        width = min(out.shape[0], a.shape[0] - i)
        if width > 0:
            out[:width].addcmul_(a[i : i + width], b[i])


def up(level: Tensor, K: int) -> list[Tensor]:
    """All levels from the leaves to the root [K + 1, 1, T] (at most K + 1: degree is also at most 2^levels)."""
    levels = [level]
    while level.shape[1] > 1:
        half = level.shape[1] // 2
        parent = _empty_parent(level, K)
        _multiply_into(parent[:, :half], level[:, :half], level[:, half:])
        levels.append(parent)
        level = parent
    return levels


def _send_down(out: Tensor, adjoint: Tensor, level: Tensor, accumulate: bool = False) -> None:
    """Adjoints of both children of every node: each is the parent's, correlated with the sibling."""
    half = level.shape[1] // 2
    _correlate_into(out[:, :half], adjoint[:, :half], level[:, half:], accumulate)
    _correlate_into(out[:, half:], adjoint[:, :half], level[:, :half], accumulate)


def down(levels: list[Tensor], adjoint: Tensor) -> Tensor:
    """Adjoint of every leaf's ``present`` weight, [even(N), T], from the root's adjoint [K + 1, 1, T]."""
    for level in levels[-2:0:-1]:
        below = torch.empty_like(level)
        _send_down(below, adjoint, level)
        adjoint = below
    if len(levels) == 1:  # K may be 0
        return F.pad(adjoint, (0, 0, 0, 0, 0, 1))[1]
    present = torch.empty_like(levels[0][:1])
    _send_down(present, adjoint[1:], levels[0])  # of the leaves, only the second coefficient is wanted
    return present[0]


def dual_up(levels: list[Tensor], tangent: Tensor) -> list[Tensor]:
    """Tangents of all levels, given the leaves' [2, even(N), T]: d(ab) = da b + a db."""
    tangents = [tangent]
    for level, parent in pairwise(levels):
        half = level.shape[1] // 2
        below, out = tangents[-1], torch.zeros_like(parent)
        _multiply_into(out[:, :half], below[:, :half], level[:, half:])
        _multiply_into(out[:, :half], below[:, half:], level[:, :half], accumulate=True)
        tangents.append(out)
    return tangents


def dual_down(
    levels: list[Tensor], tangents: list[Tensor], adjoint: Tensor, d_adjoint: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`down` on dual numbers: the adjoints of the ``present`` weights and their tangents."""
    for level, tangent in zip(levels[-2:0:-1], tangents[-2:0:-1], strict=True):
        below, d_below = torch.empty_like(level), torch.empty_like(level)
        _send_down(below, adjoint, level)
        _send_down(d_below, d_adjoint, level)
        _send_down(d_below, adjoint, tangent, accumulate=True)
        adjoint, d_adjoint = below, d_below
    if len(levels) == 1:
        adjoint, d_adjoint = (F.pad(x, (0, 0, 0, 0, 0, 1)) for x in (adjoint, d_adjoint))
        return adjoint[1], d_adjoint[1]
    present, d_present = torch.empty_like(levels[0][:1]), torch.empty_like(levels[0][:1])
    _send_down(present, adjoint[1:], levels[0])
    _send_down(d_present, d_adjoint[1:], levels[0])
    _send_down(d_present, adjoint[1:], tangents[0], accumulate=True)
    return present[0], d_present[0]
