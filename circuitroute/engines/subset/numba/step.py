"""The compiled routing step of :mod:`circuitroute.engines.step`: all of it in one loop forward, and in one back.

Legend: T tokens, N variables, J counts, S slots; P is 1 where all tokens share something, else T. Float32 alone.

As in :mod:`circuitroute.engines.subset.numba.sweep`, whose pieces these loops are made of, a few tokens at a time.
"""

from __future__ import annotations

import math

import numpy as np

from circuitroute.engines.subset.numba.coins import coins, log_normaliser
from circuitroute.engines.subset.numba.decision import (
    MARGINAL,
    SOFTMAX,
    best_count,
    clean,
    count_chosen,
    list_all,
    list_slots,
    log_mismatch,
    possible,
    sampled,
    softmax_parts,
    softmax_total,
    take_first,
    weigh_slots,
)
from circuitroute.engines.subset.numba.root import weigh
from circuitroute.engines.subset.numba.sampling import draw
from circuitroute.engines.subset.numba.shift import fill_aim, find_evidence, solve_shift
from circuitroute.engines.subset.numba.simd.lanes import (
    WIDTH,
    as_double,
    as_kind_of,
    fill,
    gather,
    inlined,
    lane_numbers,
    load,
    minimum,
    store,
    where,
    whole,
)
from circuitroute.engines.subset.numba.simd.rows import read, write
from circuitroute.engines.subset.numba.sweep import (
    kernel,
    put_marginals,
    read_line,
    room,
    source_digest,
    write_line,
)
from circuitroute.engines.subset.numba.tree import down, put_root, size, up


@inlined
def divided(a, n, t_P, t, x):
    """x = a / t, t being the lanes of ``t_P``."""
    if len(t_P) == 1 and t_P[0] == 1.0:
        for i in range(n):
            store(x, i * WIDTH, load(a, i * WIDTH))
        return
    for i in range(n):
        store(x, i * WIDTH, load(a, i * WIDTH) / t)


@inlined
def read_shared(rows_P, first, last, line):
    """A number per token, or one for all."""
    P = len(rows_P)
    return read_line(rows_P, min(first, P - 1), min(last, P - 1), line)


@inlined
def _write_known(values, invalid, first, last, line, rows_T):
    """Values, NaN in invalid lanes."""
    write_line(where(invalid, fill(line, math.nan), values), first, last, line, rows_T)


@inlined
def _hide(values, invalid):
    """NaN in invalid lanes."""
    for j in range(len(values) // WIDTH):
        store(values, j * WIDTH, where(invalid, fill(values, math.nan), load(values, j * WIDTH)))


@inlined
def _potential_at(phi, count):
    """phi of a count per lane."""
    return gather(phi, count * WIDTH + lane_numbers())


def _step_kernel(digest):
    """Logits to decision, weights and what is known of them."""

    @kernel
    def step(
        rows, shape, theta_TN, phi_PJ, limits, choice_TN, t_P, key_T, given_TN, rule, lines, slots, mask_TN, probs_TJ
    ):
        """Fill ``rows`` of the results.

        Args:
            choice_TN: without rows where it is theta.
            t_P: float32 temperatures.
            key_T: without rows where no token is sampled.
            given_TN: bool, a decision that was made already; without rows if there is none.
            rule: (number of the rule of the weights, share, whether moments are wanted).
            lines: (log_partition, log_prob, log_root, shift) [T], and the flags (invalid, underflow, uncertain).
            slots: (weights, indices) [T, S].
            probs_TJ: filled, like the first four lines, if there are moments.
        """
        _ = digest  # part of what the cache on disk knows this function by
        n, (P, J), kind, wide = theta_TN.shape[1], phi_PJ.shape, theta_TN.dtype, phi_PJ.dtype
        combine, share, moments = rule
        log_partition_T, log_prob_T, log_root_T, shift_T, invalid_T, underflow_T, uncertain_T = lines
        weights_TS, indices_TS = slots
        S, moved, given = weights_TS.shape[1], len(choice_TN) > 0, len(given_TN) > 0
        theta, other, x, present = room(n, kind), room(n, kind), room(n, kind), room(n, kind)
        choice = other if moved else theta
        tree, spare = room(size(shape), kind), room(shape[-1, 2] + 2, kind)
        aim, phi, adjoint, probs, line = room(3, kind), room(J, wide), room(J, wide), room(J, wide), room(1, wide)
        z, words, weights, short = room(max(2, shape[0, 1]), np.int32), room(2, np.int32), room(S, kind), room(1, kind)
        keys, index, more_keys, more_index = room(S, np.int32), room(S, np.int32), room(S, np.int32), room(S, np.int32)
        last, all_mode = rows[1] - 1, share == 0.0 and not given
        one, tempered = fill(theta, 1.0), len(t_P) > 1 or (len(t_P) == 1 and t_P[0] != 1.0)
        for first in range(rows[0], rows[1], WIDTH):
            read(theta_TN, first, last, theta)
            lost = clean(theta, n)
            if moved:
                read(choice_TN, first, last, other)
                lost = lost | clean(other, n)
            if first == rows[0] or P > 1:
                read(phi_PJ, min(first, P - 1), min(last, P - 1), phi)
                fill_aim(phi_PJ, first, last, aim)
            evidence = find_evidence(choice, n)
            forced = as_double(evidence[0])
            invalid = lost | ~possible(phi, forced, as_double(evidence[1]))
            ruled, doubt, under = ~(lost & ~lost), lost & ~lost, lost & ~lost
            s = log_root = log_partition = log_coins = fill(line, 0.0)
            total = one
            sweeps = moments or not (all_mode or given)
            if sweeps:
                centre = evidence
                if tempered:
                    divided(choice, n, t_P, read_shared(t_P, first, last, short), x)
                    centre = find_evidence(x, n)
                else:
                    divided(choice, n, t_P, one, x)
                high, low, total = solve_shift(x, n, centre, aim, tree, present)
                s = as_double(high) + as_double(low)
                normaliser, log_coins = log_normaliser(x, n, s, tree, line)
                up(tree, shape, n)
                log_root, under = weigh(tree, shape, phi, s, forced, limits, adjoint, probs, line)
                log_partition = log_root + normaliser
            if given:
                read(given_TN, first, last, z)
                ruled = doubt
            elif share > 0.0:
                doubt = draw(tree, shape, probs, key_T, first, last, limits[2], z, words, spare)
                ruled = doubt & ~doubt
                if share < 1.0:
                    ruled = ~sampled(key_T, first, last, share, words, line)
                    doubt = doubt & ~ruled
            if share < 1.0 and not given:
                list_all(choice, n, keys, index)
                take_first(choice, n, best_count(keys, phi, forced), keys, index, ruled, z)
            count = count_chosen(z, n, invalid)
            if moved or not all_mode:
                list_slots(theta, z, n, count, (keys, index, more_keys, more_index))
            if moments:
                fits = where(count < J, count, whole(J - 1))
                log_prob = _potential_at(phi, fits) + s * (as_kind_of(line, count) - forced) - log_root
                log_prob += log_coins + log_mismatch(x, z, tree, s, n)
                log_prob = minimum(log_prob, as_double(fill(theta, 0.0)))  # rounding may go beyond
                _write_known(log_prob, invalid, first, last, line, log_prob_T)
                _write_known(log_root, invalid, first, last, line, log_root_T)
                _write_known(log_partition, invalid, first, last, line, log_partition_T)
                _write_known(s, invalid, first, last, line, shift_T)
                _hide(probs, invalid)
                write(probs, first, last, probs_TJ)
                if combine == MARGINAL:
                    put_root(tree, shape, adjoint)
                    down(tree, shape, spare)
                    put_marginals(tree, x, present, n)
            if combine == SOFTMAX:
                if moved:
                    evidence = find_evidence(theta, n)
                if moved or tempered or not sweeps:
                    total = softmax_total(theta, n, evidence[2])
            parts = softmax_parts(theta, n, evidence, total)
            weigh_slots(theta, parts, count, index, combine, x, weights)
            write(weights, first, last, weights_TS)
            write(index, first, last, indices_TS)
            write(z, first, last, mask_TN)
            write_line(invalid, first, last, line, invalid_T)
            write_line(under & ~invalid, first, last, line, underflow_T)
            write_line(doubt & ~invalid, first, last, line, uncertain_T)

    return step


def _marginals_kernel(digest):
    """The marginals around a shift that is known."""

    @kernel
    def step_marginals(rows, shape, choice_TN, phi_PJ, limits, t_P, shift_T, invalid_T, marginals_TN):
        """Fill ``rows`` of the marginals."""
        _ = digest  # part of what the cache on disk knows this function by
        n, (P, J), kind, wide = choice_TN.shape[1], phi_PJ.shape, choice_TN.dtype, phi_PJ.dtype
        x, present, short = room(n, kind), room(n, kind), room(1, kind)
        tree, spare = room(size(shape), kind), room(shape[-1, 2] + 2, kind)
        phi, adjoint, probs, line = room(J, wide), room(J, wide), room(J, wide), room(1, wide)
        last, unforced = rows[1] - 1, fill(line, 0.0)
        for first in range(rows[0], rows[1], WIDTH):
            read(choice_TN, first, last, x)
            clean(x, n)
            divided(x, n, t_P, read_shared(t_P, first, last, short), x)
            if first == rows[0] or P > 1:
                read(phi_PJ, min(first, P - 1), min(last, P - 1), phi)
            s = read_line(shift_T, first, last, line)
            high = as_kind_of(x, s)
            coins(x, n, high, as_kind_of(x, s - as_double(high)), tree, present)
            up(tree, shape, n)
            weigh(tree, shape, phi, s, unforced, limits, adjoint, probs, line)
            put_root(tree, shape, adjoint)
            down(tree, shape, spare)
            put_marginals(tree, x, present, n)
            _hide(x, read_line(invalid_T, first, last, line) > 0.0)
            write(x, first, last, marginals_TN)

    return step_marginals


_digest = source_digest()
step = _step_kernel(_digest)
step_marginals = _marginals_kernel(_digest)
