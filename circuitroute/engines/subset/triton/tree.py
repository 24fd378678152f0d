"""A row's tree in the registers of its lanes: polynomials as tuples of tensors, one tensor per coefficient.

The tree is that of :mod:`..torch.tree`, node i of a level times node i + m/2, because that tree defines the sample.
Seen as a binary tree of 2^LE slots in each of 2^LG lanes, its lower LE levels lie within a lane and its upper LG
levels join lanes, each lane exchanging its polynomial with its partner's. An odd level ends in the polynomial 1:
slots below it hold no variable.

A tensor holds one coefficient of all nodes of a level: [nodes of the lane, rows, lanes], or [rows, lanes] where a lane
has one. Nodes come first because the compiler deals out the last dimensions to threads, of which there are as many as
rows times lanes: what is left for each thread are the nodes of its lane, and they are never exchanged. Loops over
coefficients unroll when the kernel is compiled, so that coefficients are registers. A DUAL polynomial is its
coefficients followed by as many tangents.
"""

from __future__ import annotations

import triton
import triton.language as tl

# ---------------------------------------------------------------------------------------------- where nodes lie


@triton.jit
def child(index, valid, side, LEVEL: tl.constexpr, N: tl.constexpr):
    """The left (0) or right (1) child of a node of level LEVEL: node i, or i plus half the level below."""
    index = index + side * nodes(LEVEL, N)
    return index, valid & (index < nodes(LEVEL - 1, N))


@triton.jit
def nodes(LEVEL: tl.constexpr, N: tl.constexpr):
    """How many nodes a level has."""
    return (N + (1 << LEVEL) - 1) >> LEVEL


@triton.jit
def descend(index, valid, path, BITS: tl.constexpr, LEVEL: tl.constexpr, N: tl.constexpr):
    """Follow the bits of ``path``, the highest first, from a node of level LEVEL: (index, whether it exists)."""
    for bit in tl.static_range(BITS):
        index, valid = child(index, valid, (path >> (BITS - 1 - bit)) & 1, LEVEL - bit, N)
    return index, valid


@triton.jit
def lane_nodes(g, inside, LE: tl.constexpr, LG: tl.constexpr, N: tl.constexpr):
    """(index, whether it exists) of the node that each lane holds; the lane's lowest bit decides next to the root."""
    index, valid = g * 0, inside
    for bit in tl.static_range(LG):
        index, valid = child(index, valid, (g >> bit) & 1, LE + LG - bit, N)
    if (N + (2 << LE) - 1) >> (LE + 1) == (1 << LG) >> 1:
        return g, valid  # the same numbers, in a form that the compiler sees to be contiguous
    else:
        return index, valid


@triton.jit
def slots(lane, LEVEL: tl.constexpr, LE: tl.constexpr, N: tl.constexpr):
    """(index, whether it exists) of all nodes of level LEVEL within each lane, [nodes, *, lanes]; siblings are next."""
    path = tl.arange(0, 1 << (LE - LEVEL))[:, None, None]
    return descend(lane[0][None, :, :], lane[1][None, :, :], path, LE - LEVEL, LE, N)


# ---------------------------------------------------------------------------------------------- polynomials


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
def _product(a, b, K: tl.constexpr):
    full: tl.constexpr = len(a) + len(b) - 2
    top: tl.constexpr = full if full < K else K
    out = ()
    for j in tl.static_range(top + 1):
        out = out + (_product_at(a, b, j),)
    return out


@triton.jit
def _correlation_at(a, b, j: tl.constexpr):
    """The sum of a[j + i] b[i]."""
    last: tl.constexpr = len(a) - 1 - j if len(a) - 1 - j < len(b) - 1 else len(b) - 1
    total = a[j] * b[0]
    for i in tl.static_range(1, last + 1):
        total += a[j + i] * b[i]
    return total


@triton.jit
def _correlation(a, b, WIDTH: tl.constexpr):
    out = ()
    for j in tl.static_range(WIDTH):
        out = out + (_correlation_at(a, b, j),)
    return out


@triton.jit
def _add(a, b):
    out = ()
    for j in tl.static_range(len(a)):
        out = out + (a[j] + b[j],)
    return out


@triton.jit
def multiply(a, b, K: tl.constexpr, DUAL: tl.constexpr):
    """a b, truncated at x^K; its tangent is da b + a db."""
    if DUAL:
        m: tl.constexpr = len(a) // 2
        n: tl.constexpr = len(b) // 2
        return _product(a[:m], b[:n], K) + _add(_product(a[m:], b[:n], K), _product(a[:m], b[n:], K))
    else:
        return _product(a, b, K)


@triton.jit
def correlate(a, b, DUAL: tl.constexpr):
    """The transpose of multiplying by b: the adjoint of b's sibling, of as many coefficients, from the product's, a."""
    if DUAL:
        m: tl.constexpr = len(a) // 2
        n: tl.constexpr = len(b) // 2
        return _correlation(a[:m], b[:n], n) + _add(_correlation(a[m:], b[:n], n), _correlation(a[:m], b[n:], n))
    else:
        return _correlation(a, b, len(b))


@triton.jit
def _parent(a, b, K: tl.constexpr, DUAL: tl.constexpr, ONE: tl.constexpr):
    """a b, truncated at x^K, or with ONE its coefficient K alone."""
    if not ONE:
        return multiply(a, b, K, DUAL)
    elif DUAL:
        m: tl.constexpr = len(a) // 2
        n: tl.constexpr = len(b) // 2
        d_product = _product_at(a[m:], b[:n], K) + _product_at(a[:m], b[n:], K)
        return _product_at(a[:m], b[:n], K), d_product
    else:
        return (_product_at(a, b, K),)


@triton.jit
def _backwards(scale, b, K: tl.constexpr):
    """scale b[K - j] for each j of b, zero where there is none."""
    out = ()
    for j in tl.static_range(len(b)):
        out = out + (scale * b[K - j] if j <= K and K - j < len(b) else tl.zeros_like(b[0]),)
    return out


@triton.jit
def _to_child(adjoint, sibling, DUAL: tl.constexpr, ONE: tl.constexpr):
    """A node's adjoint from its parent's; of that, with ONE not 0, all but coefficient ONE is zero and left out."""
    if not ONE:
        return correlate(adjoint, sibling, DUAL)
    elif DUAL:
        n: tl.constexpr = len(sibling) // 2
        value, tangent = sibling[:n], sibling[n:]
        moved = _add(_backwards(adjoint[1], value, ONE), _backwards(adjoint[0], tangent, ONE))
        return _backwards(adjoint[0], value, ONE) + moved
    else:
        return _backwards(adjoint[0], sibling, ONE)


@triton.jit
def _where(condition, a, b):
    """a or b, by lane."""
    out = ()
    for j in tl.static_range(len(a)):
        out = out + (tl.where(condition, a[j], b[j]),)
    return out


@triton.jit
def _partner(a, g, STEP: tl.constexpr):
    """The polynomial that the lane's partner holds."""
    source = tl.zeros_like(a[0]).to(tl.int32) + (g ^ STEP)
    out = ()
    for j in tl.static_range(len(a)):
        out = out + (tl.gather(a[j], source, axis=1),)
    return out


@triton.jit
def siblings(own, g, STEP: tl.constexpr):
    """The polynomials of a lane and its partner: (left, right), the same for both, so that both multiply alike."""
    other = _partner(own, g, STEP)
    is_right = (g & STEP) != 0
    return _where(is_right, other, own), _where(is_right, own, other)


@triton.jit
def _halves(level):
    """The nodes of a level, [m, rows, lanes] per coefficient, as left and right children; these are neighbours."""
    left, right = (), ()
    for j in tl.static_range(len(level)):
        a, b = split(level[j])
        left, right = left + (a,), right + (b,)
    return left, right


@triton.jit
def joined(left, right):
    """The level whose children these are."""
    out = ()
    for j in tl.static_range(len(left)):
        out = out + (join(left[j], right[j]),)
    return out


@triton.jit
def split(x):
    """Even and odd entries along the first of three dimensions, which goes when nothing is left of it."""
    if x.shape[0] == 2:
        return tl.split(tl.permute(x, (1, 2, 0)))
    else:
        pairs = tl.reshape(x, [x.shape[0] // 2, 2, x.shape[1], x.shape[2]])
        return tl.split(tl.permute(pairs, (0, 2, 3, 1)))


@triton.jit
def join(a, b):
    """The inverse of :func:`split`."""
    both = tl.join(a, b)
    if len(a.shape) == 2:
        return tl.permute(both, (2, 0, 1))
    else:
        return tl.reshape(tl.permute(both, (0, 3, 1, 2)), [2 * a.shape[0], a.shape[1], a.shape[2]])


# ---------------------------------------------------------------------------------------------- up and down


@triton.jit
def up(
    left,
    right,
    g,
    LE: tl.constexpr,
    LG: tl.constexpr,
    K: tl.constexpr,
    DUAL: tl.constexpr,
    ONLY: tl.constexpr,
):
    """(within, across): the tree above the leaves, which are each lane's ``left`` and ``right`` ones.

    ``within`` holds the LE levels of a lane as (left, right), from the leaves up; ``across`` what each lane holds at
    every level from there to the root, which all lanes hold. With ONLY, which is 0 or K, the root is coefficient K.
    """
    within = ((left, right),)
    product = _parent(left, right, K, DUAL, ONLY if LE + LG == 1 else 0)
    for level in tl.static_range(LE - 1):
        left, right = _halves(product)
        within = within + ((left, right),)
        product = _parent(left, right, K, DUAL, ONLY if level + 2 == LE + LG else 0)
    across = (product,)
    for level in tl.static_range(LG):
        left, right = siblings(across[level], g, 1 << (LG - 1 - level))
        across = across + (_parent(left, right, K, DUAL, ONLY if level + 1 == LG else 0),)
    return within, across


@triton.jit
def down(
    within,
    across,
    adjoint,
    g,
    LE: tl.constexpr,
    LG: tl.constexpr,
    DUAL: tl.constexpr,
    ONLY: tl.constexpr,
):
    """Adjoints of the left and the right leaves from the root's: at each node, correlated with the sibling.

    With ONLY, the root's is that of coefficient ONLY.
    """
    for above in tl.static_range(LG):
        sibling = _partner(across[LG - 1 - above], g, 1 << above)
        adjoint = _to_child(adjoint, sibling, DUAL, ONLY if above == 0 else 0)
    for above in tl.static_range(LE - 1):
        left, right = within[LE - 1 - above]
        a = _to_child(adjoint, right, DUAL, ONLY if LG + above == 0 else 0)
        b = _to_child(adjoint, left, DUAL, ONLY if LG + above == 0 else 0)
        adjoint = joined(a, b)
    left, right = within[0]
    last: tl.constexpr = ONLY if LG + LE == 1 else 0
    return _to_child(adjoint, right, DUAL, last), _to_child(adjoint, left, DUAL, last)
