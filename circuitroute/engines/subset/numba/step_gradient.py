"""The way back of a routing step in one compiled loop: see :mod:`circuitroute.engines.step` for what it computes.

Legend: T tokens, N variables, J = K + 1 counts, S slots; what is [N] or [J] has a number for each token of a block, as
Lanes.
"""

from __future__ import annotations

import math

import numpy as np

from circuitroute.engines.subset.numba.coins import coins
from circuitroute.engines.subset.numba.decision import (
    MARGINAL,
    NORMALIZED,
    SIGMOID,
    SOFTMAX,
    clean,
    weigh_all,
)
from circuitroute.engines.subset.numba.root import weigh, weigh_tangent
from circuitroute.engines.subset.numba.simd.lanes import (
    WIDTH,
    as_double,
    as_kind_of,
    fill,
    inlined,
    load,
    magnitude,
    store,
    where,
    whole,
)
from circuitroute.engines.subset.numba.simd.rows import read, write
from circuitroute.engines.subset.numba.step import divided, read_shared
from circuitroute.engines.subset.numba.sweep import (
    kernel,
    leaf_tangents,
    marginal_tangents,
    put_marginals,
    read_line,
    room,
    source_digest,
)
from circuitroute.engines.subset.numba.tree import down, dual_down, dual_up, put_root, size, up


@inlined
def _reaching(first, last, z, slots, gates_TN, v, n):
    """v [N], the gradient that reaches the gates: that of the gates, and of every used slot at its expert."""
    indices_TS, by_slots_TS = slots
    if len(gates_TN):
        read(gates_TN, first, last, v)
    else:
        for i in range(n):
            store(v, i * WIDTH, fill(v, 0.0))
    if len(by_slots_TS):
        for lane in range(min(WIDTH, last + 1 - first)):
            for slot in range(indices_TS.shape[1]):
                at = indices_TS[first + lane, slot] * WIDTH + lane
                v[at] += by_slots_TS[first + lane, slot] * z[at]


@inlined
def _inner(v, z, w, n):
    """<v, z w>."""
    total = fill(v, 0.0)
    for i in range(n):
        total += where(load(z, i * WIDTH) == 1, load(v, i * WIDTH) * load(w, i * WIDTH), fill(v, 0.0))
    return total


@inlined
def _by_weights(theta, z, v, w, n, combine, slope):
    """The gradient of theta through the weights."""
    zero, inner = fill(v, 0.0), fill(v, 0.0)
    if combine != SIGMOID:
        inner = _inner(v, z, w, n)
    for i in range(n):
        chosen, share = load(z, i * WIDTH) == 1, load(w, i * WIDTH)
        mine = where(chosen, load(v, i * WIDTH), zero)
        if combine == SOFTMAX:
            slide = share * (mine - inner)
        elif combine == NORMALIZED:
            slide = where(chosen, share * (mine - inner), zero)
        else:
            slide = mine * share * (1.0 - share)
        store(slope, i * WIDTH, where(magnitude(load(theta, i * WIDTH)) < math.inf, slide, zero))


@inlined
def _direction(z, v, w, n, rule, by_marginals):
    """u [N], what reaches the marginals, added to ``by_marginals``."""
    combine, simple, _ = rule
    inner = fill(v, 0.0)
    if combine == NORMALIZED:
        inner = _inner(v, z, w, n)
    for i in range(n):
        u, mine = load(by_marginals, i * WIDTH), load(v, i * WIDTH)
        if simple:
            u += load(w, i * WIDTH) * (mine - inner)
        if combine == MARGINAL:
            u += where(load(z, i * WIDTH) == 1, mine, fill(v, 0.0))
        store(by_marginals, i * WIDTH, u)


def _gradient_kernel(digest):
    """The way back."""

    @kernel
    def step_gradient(
        rows,
        shape,
        theta_TN,
        phi_PJ,
        limits,
        choice_TN,
        t_P,
        known,
        rule,
        slots,
        gates_TN,
        marginals_TN,
        lines,
        by_probs_TJ,
        slopes,
        potential_TJ,
    ):
        """Fill ``rows`` of the gradients.

        Args:
            choice_TN: without rows where it is theta.
            known: (mask [T, N], shift [T], invalid [T]).
            rule: (number of the rule of the weights, whether SIMPLE's gradient crosses, whether p matters at all).
            slots: (indices, their weights' gradient) [T, S].
            gates_TN, marginals_TN, lines, by_probs_TJ: the other gradients that arrive, lines those of log_partition
                and log_prob [T]; all without rows where there are none.
            slopes: (those of theta, of the choice) [T, N]; the second without rows where they are one.
        """
        _ = digest  # part of what the cache on disk knows this function by
        n, (P, J), kind, wide = theta_TN.shape[1], phi_PJ.shape, theta_TN.dtype, phi_PJ.dtype
        mask_TN, shift_T, invalid_T = known
        combine, _simple, sweeps = rule
        theta_slope_TN, choice_slope_TN = slopes
        moved, split = len(choice_TN) > 0, len(choice_slope_TN) > 0
        theta, other, x, present, short = room(n, kind), room(n, kind), room(n, kind), room(n, kind), room(1, kind)
        choice = other if moved else theta
        v, w, u, slope = room(n, kind), room(n, kind), room(n, kind), room(n, kind)
        tree, tangents, spare = room(size(shape), kind), room(size(shape), kind), room(shape[-1, 2] + 2, kind)
        phi, dq, q, adjoint, probs = room(J, wide), room(J, wide), room(J, wide), room(J, wide), room(J, wide)
        z, line = room(n, np.int32), room(1, wide)
        last, unforced = rows[1] - 1, fill(line, 0.0)
        for first in range(rows[0], rows[1], WIDTH):
            read(theta_TN, first, last, theta)
            clean(theta, n)
            if moved:
                read(choice_TN, first, last, other)
                clean(other, n)
            read(mask_TN, first, last, z)
            invalid = read_line(invalid_T, first, last, line) > 0.0
            lost = as_kind_of(theta, invalid) > 0.0
            _reaching(first, last, z, slots, gates_TN, v, n)
            if combine == MARGINAL:
                for i in range(n):
                    store(slope, i * WIDTH, fill(slope, 0.0))
            else:
                weigh_all(theta, z, n, combine, w)
                _by_weights(theta, z, v, w, n, combine, slope)
            for j in range(J):
                store(dq, j * WIDTH, fill(dq, 0.0))
            if sweeps:
                t = read_shared(t_P, first, last, short)
                divided(choice, n, t_P, t, x)
                inverse = 1.0 / t
                if first == rows[0] or P > 1:
                    read(phi_PJ, min(first, P - 1), min(last, P - 1), phi)
                s = read_line(shift_T, first, last, line)
                s = where(invalid, unforced, s)
                high = as_kind_of(x, s)
                low = as_kind_of(x, s - as_double(high))
                coins(x, n, high, low, tree, present)
                if combine == MARGINAL:
                    for i in range(n):
                        store(w, i * WIDTH, load(x, i * WIDTH))
                    up(tree, shape, n)
                    weigh(tree, shape, phi, s, unforced, limits, adjoint, probs, line)
                    put_root(tree, shape, adjoint)
                    down(tree, shape, spare)
                    put_marginals(tree, w, present, n)
                    coins(x, n, high, low, tree, present)
                if len(marginals_TN):
                    read(marginals_TN, first, last, u)
                else:
                    for i in range(n):
                        store(u, i * WIDTH, fill(u, 0.0))
                _direction(z, v, w, n, rule, u)
                if len(by_probs_TJ):
                    read(by_probs_TJ, first, last, dq)
                leaf_tangents(tree, tangents, present, u, n)
                dual_up(tree, tangents, shape, n)
                weigh(tree, shape, phi, s, unforced, limits, adjoint, probs, line)
                for j in range(J):
                    store(q, j * WIDTH, load(probs, j * WIDTH))
                weigh_tangent(tangents, shape, dq, adjoint, probs)
                put_root(tree, shape, adjoint)
                put_root(tangents, shape, probs)
                dual_down(tree, tangents, shape, spare)
                marginal_tangents(tree, tangents, present, u, n)
                whole_c, through = _score(lines, first, last, line)
                c, less = as_kind_of(x, whole_c), as_kind_of(x, through)
                count, zero = whole(0), fill(x, 0.0)
                for i in range(n):
                    m, value = load(tree, (2 * i + 1) * WIDTH) * load(present, i * WIDTH), load(x, i * WIDTH)
                    chosen = load(z, i * WIDTH)
                    count += chosen
                    total = load(u, i * WIDTH) + less * m + where(chosen == 1, c, zero)
                    total = where((magnitude(value) < math.inf) & ~lost, total * inverse, zero)
                    if split:
                        store(u, i * WIDTH, total)
                    else:
                        store(slope, i * WIDTH, load(slope, i * WIDTH) + total)
                for j in range(J):
                    total = load(dq, j * WIDTH) + through * load(q, j * WIDTH) + where(count == j, whole_c, unforced)
                    store(dq, j * WIDTH, where(invalid, unforced, total))
                if split:
                    write(u, first, last, choice_slope_TN)
            for i in range(n):
                store(slope, i * WIDTH, where(lost, fill(slope, 0.0), load(slope, i * WIDTH)))
            write(slope, first, last, theta_slope_TN)
            write(dq, first, last, potential_TJ)

    return step_gradient


@inlined
def _score(lines, first, last, line):
    """(c, w0 - c), float64."""
    w0_T, c_T = lines
    c, w0 = fill(line, 0.0), fill(line, 0.0)
    if len(c_T):
        c = read_line(c_T, first, last, line)
    if len(w0_T):
        w0 = read_line(w0_T, first, last, line)
    return c, w0 - c


_digest = source_digest()
step_gradient = _gradient_kernel(_digest)
