"""Polynomials as tuples of tensors, one tensor per coefficient: what :mod:`..torch.tree` does.

A tensor holds one coefficient of all nodes of a level: [rows, lanes, nodes of the lane], or [rows, lanes] where a lane
has one. Loops over coefficients unroll when the kernel is compiled, so that coefficients are registers.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _product_at(a, b, j: tl.constexpr):
    """Coefficient j of a b: the sum of a[i] b[j - i]."""
    first: tl.constexpr = j - len(b) + 1 if j >= len(b) else 0
    last: tl.constexpr = j if j < len(a) else len(a) - 1
    total = a[first] * b[j - first]
    for i in tl.static_range(first + 1, last + 1):
        total += a[i] * b[j - i]
    return total


@triton.jit
def multiply(a, b, K: tl.constexpr):
    """a b, truncated at x^K."""
    full: tl.constexpr = len(a) + len(b) - 2
    top: tl.constexpr = full if full < K else K
    out = ()
    for j in tl.static_range(top + 1):
        out = out + (_product_at(a, b, j),)
    return out


@triton.jit
def dual_multiply(a, da, b, db, K: tl.constexpr):
    """The tangent of a b: da b + a db, truncated at x^K."""
    return add(multiply(da, b, K), multiply(a, db, K))


@triton.jit
def _correlation_at(a, b, j: tl.constexpr):
    """The sum of a[j + i] b[i]."""
    last: tl.constexpr = len(a) - 1 - j if len(a) - 1 - j < len(b) - 1 else len(b) - 1
    total = a[j] * b[0]
    for i in tl.static_range(1, last + 1):
        total += a[j + i] * b[i]
    return total


@triton.jit
def correlate(a, b, WIDTH: tl.constexpr):
    """The transpose of multiplying by b: the adjoint of one factor from the product's adjoint a."""
    out = ()
    for j in tl.static_range(WIDTH):
        out = out + (_correlation_at(a, b, j),)
    return out


@triton.jit
def dual_correlate(a, da, b, db, WIDTH: tl.constexpr):
    """The tangent of that adjoint."""
    return add(correlate(da, b, WIDTH), correlate(a, db, WIDTH))


@triton.jit
def add(a, b):
    """a + b, of the same degree."""
    out = ()
    for j in tl.static_range(len(a)):
        out = out + (a[j] + b[j],)
    return out


@triton.jit
def where(condition, a, b):
    """a or b, by lane."""
    out = ()
    for j in tl.static_range(len(a)):
        out = out + (tl.where(condition, a[j], b[j]),)
    return out


@triton.jit
def from_lane(a, source):
    """The polynomial that another lane of the row holds."""
    out = ()
    for j in tl.static_range(len(a)):
        out = out + (tl.gather(a[j], source, axis=1),)
    return out


@triton.jit
def halves(level):
    """The nodes of a level, [rows, lanes, m] per coefficient, as left and right children; these are neighbours."""
    left, right = (), ()
    for j in tl.static_range(len(level)):
        a, b = split_last(level[j])
        left, right = left + (a,), right + (b,)
    return left, right


@triton.jit
def joined(left, right):
    """The level whose children these are."""
    out = ()
    for j in tl.static_range(len(left)):
        out = out + (join_last(left[j], right[j]),)
    return out


@triton.jit
def split_last(x):
    """Even and odd entries along the last of three dimensions, which goes when nothing is left of it."""
    if x.shape[2] == 2:
        return tl.split(x)
    else:
        return tl.split(tl.reshape(x, [x.shape[0], x.shape[1], x.shape[2] // 2, 2]))


@triton.jit
def join_last(a, b):
    """The inverse of :func:`split_last`."""
    both = tl.join(a, b)
    if len(a.shape) == 2:
        return both
    else:
        return tl.reshape(both, [a.shape[0], a.shape[1], 2 * a.shape[2]])


@triton.jit
def stacked(parts, LEVELS: tl.constexpr):
    """2^LEVELS tensors [rows, lanes] as one [rows, lanes, 2^LEVELS]; one alone stays as it is."""
    for _ in tl.static_range(LEVELS):
        parts = joined(parts[: len(parts) // 2], parts[len(parts) // 2 :])
    return parts[0]


@triton.jit
def _window(right, MAX: tl.constexpr, SIZE: tl.constexpr):
    """right[MAX - i] for i = 0.., zero where there is none."""
    zero = tl.zeros_like(right[0])
    out = ()
    for i in tl.static_range(SIZE):
        out = out + (right[MAX - i] if MAX - i < len(right) and i <= MAX else zero,)
    return out


@triton.jit
def _advance(window, distance, STEP: tl.constexpr, LEFT: tl.constexpr):
    """The window moved on by STEP where that bit of ``distance`` is set, as far as later steps will look."""
    move = (distance & STEP) != 0
    out = ()
    for i in tl.static_range(STEP + LEFT):
        out = out + (tl.where(move, window[i + STEP], window[i]),)
    return out


@triton.jit
def taken_from(right, count, LEFT: tl.constexpr, BITS: tl.constexpr):
    """right[count - a] for a = 0 .. LEFT, where ``count`` differs by row: a barrel shifter of BITS stages."""
    most: tl.constexpr = (1 << BITS) - 1
    window = _window(right, most, most + LEFT + 1)
    for stage in tl.static_range(BITS):
        window = _advance(window, most - count, 1 << (BITS - 1 - stage), LEFT)
    return window


@triton.jit
def split(left, right, count, u, MARGIN: tl.constexpr, BITS: tl.constexpr):
    """How many of ``count`` go to the left factor, drawn by inversion at u, and whether rounding could decide.

    Counts have at most BITS bits.
    """
    rest = taken_from(right, count, len(left) - 1, BITS)
    weights = ()
    for a in tl.static_range(len(left)):
        weights = weights + (left[a] * rest[a],)
    taken, doubt = invert(weights, u, MARGIN)
    # An empty node leaves nothing to decide.
    return taken, doubt & (count > 0)


@triton.jit
def invert(weights, u, MARGIN: tl.constexpr):
    """How many cumulative weights lie at or below u times the total, and whether one lies within the margin."""
    total = weights[0]
    for a in tl.static_range(1, len(weights)):
        total += weights[a]
    threshold = u * total
    chosen = tl.zeros_like(total).to(tl.int32)
    cumulative, nearest = tl.zeros_like(total), total
    for a in tl.static_range(len(weights) - 1):
        cumulative += weights[a]
        gap = cumulative - threshold
        chosen += (gap <= 0.0).to(tl.int32)
        nearest = tl.minimum(nearest, tl.abs(gap))
    return chosen, nearest <= MARGIN * total
