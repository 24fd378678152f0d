"""The law of the number of successes of independent coins: every probability, to the relative precision of float64.

Legend: R rows, N coins, n degree; h, the gradient in log-coefficients.

Coins are sorted and multiplied up a balanced tree. The lower levels, ``LEAF`` coins, are products of all nodes at once:
in plain float64, by powers of 2 that make the coins of a leaf fair, where those keep all coefficients in range, and
else with exponents. The upper levels are :func:`circuitroute.statistics.convolution.multiply`. Positive numbers are
added and multiplied, and nothing else, so every coefficient has a relative error of some units per level, in the far
tails as in the middle.

Coins and leaves are in long double, where there is one: what rounds alike in 10^5 equal coins adds up.

The gradient goes down the same tree as d/d log: of every node, how much of the upstream gradient is with each count of
it. At a coin that is h_0, h_1 of log q and log p; and d log p / d theta = q, d log q / d theta = -p.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from circuitroute.statistics import convolution
from circuitroute.statistics.wide import UNDERFLOW, ZERO, Array, Wide, scaled

LEAF = 64  # coins of a leaf
WHOLE = 256  # coins up to which there is one leaf
PLAIN = 900  # bits that the coins of a leaf may be unfair by, all together
LARGEST = 1e6  # logits, in absolute value, beyond which slopes have too few bits


@dataclass(frozen=True, eq=False)
class Coins:
    """Probabilities of absence and presence, [R, N] each, none of them exactly 0 in both."""

    q: Wide
    p: Wide

    @staticmethod
    def of_logits(logits: Array) -> Coins:
        """Of log-odds, infinite ones included."""
        logits = logits.astype(np.longdouble)
        small = Wide.exp(np.where(np.isinf(logits), 0.0, -np.abs(logits)))
        small = Wide(np.where(np.isinf(logits), 0.0, small.m), np.where(np.isinf(logits), ZERO, small.e))
        large = 1 / (1 + scaled(small.m, small.e))
        less, more = Wide.of(small.m * large, small.e), Wide.of(large)
        up = logits > 0
        return Coins(
            Wide(np.where(up, less.m, more.m), np.where(up, less.e, more.e)),
            Wide(np.where(up, more.m, less.m), np.where(up, more.e, less.e)),
        )

    @staticmethod
    def of_probs(probs: Array) -> Coins:
        """Of probabilities, 0 and 1 included."""
        probs = probs.astype(np.longdouble)
        return Coins(Wide.of(1 - probs), Wide.of(probs))

    def odds(self) -> Array:
        """[R, N] of which power of 2 the odds are, about."""
        found: Array = self.p.e - self.q.e
        return found

    def sorted(self) -> tuple[Coins, Array]:
        """By their odds, and the order."""
        key = np.where(self.p.m == 0, -np.inf, self.odds() + self.p.m - self.q.m)
        order = np.argsort(key, axis=-1, kind="stable")
        take = [Wide(*(np.take_along_axis(x, order, -1) for x in side)) for side in (self.q, self.p)]
        return Coins(*take), order


def log_pmf(coins: Coins) -> Array:
    """[R, N + 1] log-probabilities of the counts 0..N, -inf of those that are impossible."""
    tree = _Tree(coins.sorted()[0])
    found = np.full((len(tree.levels), tree.size + 1), -np.inf)
    for row, root in zip(found, tree.roots, strict=True):
        row[root.offset : root.offset + len(root.values.m)] = root.values.log()
    return found


def log_gradients(coins: Coins, upstream: Array) -> tuple[Array, Array]:
    """([R, N], [R, N]) the gradients in log q and log p, of log-probabilities with an upstream gradient [R, N + 1]."""
    ordered, order = coins.sorted()
    found = _Tree(ordered).down(upstream)
    back = np.empty_like(order)
    np.put_along_axis(back, order, np.broadcast_to(np.arange(order.shape[-1]), order.shape), -1)
    return np.take_along_axis(found[0], back, -1), np.take_along_axis(found[1], back, -1)


class _Sequence:
    """Coefficients without the zeros at their ends, of a node over one row."""

    def __init__(self, values: Wide, offset: int) -> None:
        self.values, self.offset = values, offset

    @staticmethod
    def trimmed(values: Wide) -> _Sequence:
        places = np.flatnonzero(values.m)
        first, last = int(places[0]), int(places[-1])
        return _Sequence(values.at(slice(first, last + 1)), first)


class _Tree:
    """All nodes of sorted coins: leaves of all rows together, and above them a list of levels per row."""

    def __init__(self, coins: Coins) -> None:
        rows, self.size = coins.p.m.shape
        per_leaf = _even(self.size) if self.size <= WHOLE else LEAF
        self.blocks = -(-self.size // per_leaf)
        missing = self.blocks * per_leaf - self.size
        shape = (rows * self.blocks, per_leaf)
        # What is missing are coins that are never present.
        self.leaves = _Leaves(_padded(coins.q, missing, 1.0, shape), _padded(coins.p, missing, 0.0, shape))
        self.levels: list[list[list[_Sequence]]] = []
        for row in range(rows):
            own = range(row * self.blocks, (row + 1) * self.blocks)
            levels = [[_Sequence.trimmed(self.leaves.root.at(i)) for i in own]]
            while len(levels[-1]) > 1:
                levels.append([_joined(*pair) for pair in _pairs(levels[-1])])
            self.levels.append(levels)

    @property
    def roots(self) -> list[_Sequence]:
        """The coefficients of every row."""
        return [levels[-1][0] for levels in self.levels]

    def down(self, upstream: Array) -> tuple[Array, Array]:
        """The gradients in log q and log p of the coins."""
        per_leaf = self.leaves.q.m.shape[1]
        by_leaf = np.zeros((len(self.levels) * self.blocks, per_leaf + 1))
        for row, levels in enumerate(self.levels):
            root = levels[-1][0]
            gradients = [upstream[row, root.offset : root.offset + len(root.values.m)]]
            for below, above in zip(levels[-2::-1], levels[:0:-1], strict=True):
                found: list[Array] = []
                for pair, parent, gradient in zip(_pairs(below), above, gradients, strict=True):
                    found += _shared(pair, parent, gradient)
                gradients = found
            for block, (leaf, gradient) in enumerate(zip(levels[0], gradients, strict=True)):
                by_leaf[row * self.blocks + block, leaf.offset : leaf.offset + len(gradient)] = gradient
        by_q, by_p = self.leaves.down(by_leaf)
        shape = (len(self.levels), self.blocks * per_leaf)
        return by_q.reshape(shape)[:, : self.size], by_p.reshape(shape)[:, : self.size]


def _pairs(nodes: list[_Sequence]) -> list[tuple[_Sequence, ...]]:
    return [tuple(nodes[i : i + 2]) for i in range(0, len(nodes), 2)]


def _joined(a: _Sequence, b: _Sequence | None = None) -> _Sequence:
    if b is None:
        return a
    return _Sequence(convolution.multiply(a.values, b.values), a.offset + b.offset)


def _shared(pair: tuple[_Sequence, ...], parent: _Sequence, gradient: Array) -> list[Array]:
    if len(pair) == 1:
        return [gradient]
    return list(convolution.shares(pair[0].values, pair[1].values, parent.values, gradient))


# ---------------------------------------------------------------------------------------------- leaves


def _padded(x: Wide, missing: int, value: float, shape: tuple[int, int]) -> Wide:
    """With further coins, and in another shape."""
    extra = Wide.of(np.full((len(x.m), missing), value))
    return Wide(*(np.concatenate(pair, -1).reshape(shape) for pair in zip(x, extra, strict=True)))


def _even(count: int) -> int:
    """The next power of 2."""
    return 1 << max(0, count - 1).bit_length()


class _Leaves:
    """Leaves [B, n] of n coins each, multiplied up; n a power of 2."""

    def __init__(self, q: Wide, p: Wide) -> None:
        self.q, self.p = q, p
        B, n = q.m.shape
        both = (q.m > 0) & (p.m > 0)
        odds = np.where(both, p.e - q.e, 0)
        middle = np.where(both.any(-1), np.take_along_axis(odds, np.full((B, 1), n // 2), -1)[:, 0], 0)
        unfair = np.where(both, np.abs(odds - middle[:, None]), 0).sum(-1)
        self.plain = np.flatnonzero(unfair <= PLAIN)
        self.wide = np.flatnonzero(unfair > PLAIN)
        self.root = Wide(np.zeros((B, n + 1)), np.full((B, n + 1), ZERO, dtype=np.int64))
        self.levels, scale = self._plain_levels(middle)
        top = Wide.of(self.levels[-1][:, 0], scale[:, None] + middle[self.plain, None] * np.arange(n + 1))
        self.root.m[self.plain], self.root.e[self.plain] = top
        self.wide_levels = self._wide_levels()
        self.root.m[self.wide], self.root.e[self.wide] = self.wide_levels[-1].at(np.s_[:, 0])

    def _plain_levels(self, middle: Array) -> tuple[list[Array], Array]:
        """[b, m, d + 1] for m nodes of degree d, from the coins up; and the exponent that was taken off each leaf."""
        q, p = self.q.at(self.plain), self.p.at(self.plain)
        p_e = np.where(p.m == 0, ZERO, p.e - middle[self.plain, None])
        top = np.maximum(q.e, p_e)
        levels = [np.stack([scaled(q.m, q.e - top), scaled(p.m, p_e - top)], -1)]
        while levels[-1].shape[1] > 1:
            a, b = levels[-1][:, 0::2], levels[-1][:, 1::2]
            d = a.shape[-1] - 1
            c = np.zeros((*a.shape[:2], 2 * d + 1), dtype=a.dtype)
            for i in range(d + 1):
                c[..., i : i + d + 1] += a[..., i : i + 1] * b
            levels.append(c)
        return levels, top.sum(-1)

    def _wide_levels(self) -> list[Wide]:
        """The same with exponents."""
        q, p = self.q.at(self.wide), self.p.at(self.wide)
        levels = [Wide(np.stack([q.m, p.m], -1), np.stack([q.e, p.e], -1))]
        while levels[-1].m.shape[1] > 1:
            levels.append(_wide_product(*_halves(levels[-1])))
        return levels

    def down(self, gradient: Array) -> tuple[Array, Array]:
        """[B, n] each: the gradients in log q and log p, from that in the log-coefficients of the roots."""
        found = np.zeros((*self.q.m.shape, 2))
        by = gradient[self.plain][:, None]
        for below, above in zip(self.levels[-2::-1], self.levels[:0:-1], strict=True):
            weight = np.divide(by, above, out=np.zeros_like(by), where=above > 0)
            a, b = below[:, 0::2], below[:, 1::2]
            d = a.shape[-1] - 1
            by = np.zeros_like(below)
            for i in range(d + 1):
                seen = weight[..., i : i + d + 1]
                by[:, 0::2, i] = a[..., i] * (seen * b).sum(-1)
                by[:, 1::2] += (seen * a[..., i : i + 1]) * b
        found[self.plain] = by
        found[self.wide] = self._wide_down(gradient[self.wide][:, None])
        return found[..., 0], found[..., 1]

    def _wide_down(self, by: Array) -> Array:
        for below, above in zip(self.wide_levels[-2::-1], self.wide_levels[:0:-1], strict=True):
            a, b = _halves(below)
            d = a.m.shape[-1] - 1
            weight = np.divide(by, above.m, out=np.zeros_like(by), where=above.m > 0)
            by = np.zeros_like(below.m)
            for i in range(d + 1):
                part = slice(i, i + d + 1)
                term = (
                    scaled(a.m[..., i : i + 1] * b.m, a.e[..., i : i + 1] + b.e - above.e[..., part])
                    * weight[..., part]
                )
                by[:, 0::2, i] = term.sum(-1)
                by[:, 1::2] += term
        return by


def _halves(level: Wide) -> tuple[Wide, Wide]:
    """The first and the second of every pair of nodes."""
    return level.at(np.s_[:, 0::2]), level.at(np.s_[:, 1::2])


def _wide_product(a: Wide, b: Wide) -> Wide:
    """Products of polynomials [B, m, d + 1] with exponents: the largest first, then all relative to it."""
    d = a.m.shape[-1] - 1
    shape = (*a.m.shape[:2], 2 * d + 1)
    top = np.full(shape, 2 * ZERO, dtype=np.int64)
    for i in range(d + 1):
        shifted = top[..., i : i + d + 1]
        np.maximum(shifted, a.e[..., i : i + 1] + b.e, out=shifted)
    total = np.zeros(shape, dtype=a.m.dtype)
    for i in range(d + 1):
        part = slice(i, i + d + 1)
        exponent = np.maximum(a.e[..., i : i + 1] + b.e - top[..., part], UNDERFLOW)
        total[..., part] += scaled(a.m[..., i : i + 1] * b.m, exponent)
    return Wide.of(total, top)
