"""A sample under a constraint on the count as a fixed list of plain tensor operations, for programs that leave this
process.

Legend: T tokens, N variables, K the largest count; m nodes at a level, d their degree.

The steps are those of the engine ``naive``, so the sample is the one that it draws, and with it every engine. Only
products of polynomials are made at once rather than row by row, since every operation counts when a program is traced.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from circuitroute.engines.logspace import LOG_ZERO, log_coins
from circuitroute.engines.subset.naive import draw_subset, pad_to_pairs, solve_shift
from circuitroute.engines.subset.torch.tree import even
from circuitroute.engines.tables import Tables


def products(n: int, K: int) -> int:
    """Products of coefficients per token, with those that are cut off, in the tree over ``n`` variables up to x^K."""
    return sum(half * (top + 1) * (d + 1) for half, d, top in _shapes(n, K))


class UnrolledCount(nn.Module):
    """Logits [T, N] and keys [T] to a sample [T, N] bool; all False in rows that nothing satisfies.

    Args:
        n: N.
        allowed: [K + 1] bool, the counts that are allowed.

    Attributes:
        tables: the potential, and which coefficients are multiplied, on any device; see
            :mod:`circuitroute.engines.tables`.
    """

    def __init__(self, n: int, allowed: np.ndarray) -> None:
        super().__init__()
        self._shapes = tuple(_shapes(n, len(allowed) - 1))
        tables = {"potential": np.where(allowed, 0.0, -np.inf)}
        for _, d, top in self._shapes:
            # Row j - i of the right factor, for coefficient j and row i of the left one; d + 1 is a row of log 0.
            row = np.arange(top + 1)[:, None] - np.arange(d + 1)
            tables[f"right_{d}_{top}"] = np.where((row < 0) | (row > d), d + 1, row)
        self.tables = Tables(tables)
        self.tables.prepare(torch.device("cpu"))

    def forward(self, logits_TN: Tensor, key_T: Tensor) -> Tensor:
        """[T, N] floating without NaN and [T] int64 to [T, N] bool."""
        logits, tables = logits_TN.double(), self.tables.on(logits_TN.device)
        phi = tables["potential"].expand(logits.shape[0], -1)
        shift = solve_shift(logits, phi)
        levels = [pad_to_pairs(torch.stack(log_coins(logits, shift)))]
        for half, d, top in self._shapes:
            level = levels[-1]
            levels.append(pad_to_pairs(_multiply(level[:, :half], level[:, half:], tables[f"right_{d}_{top}"])))
        return draw_subset(levels, logits, phi, shift, key_T)


def _shapes(n: int, K: int) -> list[tuple[int, int, int]]:
    """(products, degree of the factors, degree of the product) of every level of the tree."""
    found, m, d = [], even(n), 1
    while m > 1:
        top = min(2 * d, K)
        found.append((m // 2, d, top))
        m, d = even(m // 2), top
    return found


def _multiply(a: Tensor, b: Tensor, row: Tensor) -> Tensor:
    """[top + 1, m, T] the product of log-polynomials [d + 1, m, T]."""
    b = F.pad(b, (0, 0, 0, 0, 0, 1), value=LOG_ZERO)
    terms = a + b.index_select(0, row.reshape(-1)).view(*row.shape, *b.shape[1:])
    largest = terms.amax(1)
    return largest + (terms - largest[:, None]).exp().sum(1).log()
