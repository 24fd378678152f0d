"""The compiled sweeps: rows of logits to moments and a sample, and the derivative of the moments along a direction.

Legend: T tokens, N variables, J = K + 1 counts; P is 1 where all tokens share a potential, else T.

The mathematics is that of :mod:`..torch.engine`, a few tokens (``WIDTH``) at a time, so that their
whole tree stays in the cache. The last block is filled up with copies of the last row.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np

from circuitroute.engines.subset.numba.root import weigh
from circuitroute.engines.subset.numba.sampling import draw_count, mix64, split_counts
from circuitroute.engines.subset.numba.shift import evidence, log_normaliser, solve, toss
from circuitroute.engines.subset.numba.simd.lanes import (
    WIDTH,
    as_double,
    as_kind_of,
    fill,
    inlined,
    load,
    minimum,
    store,
    where,
)
from circuitroute.engines.subset.numba.simd.rows import read, write
from circuitroute.engines.subset.numba.tree import down, dual_down, dual_up, fill_padding, root, up

_log = logging.getLogger("circuitroute")


@inlined
def _aim(phi_PJ, first, last, aim):
    """Fill ``aim`` [3]: smallest and largest count of finite potential, and the potential's mean slope between them."""
    for lane in range(WIDTH):
        row = min(first + lane, last) if len(phi_PJ) > 1 else 0
        low, high = 0, 0
        for j in range(phi_PJ.shape[1] - 1, -1, -1):
            low = j if math.isfinite(phi_PJ[row, j]) else low
        for j in range(phi_PJ.shape[1]):
            high = j if math.isfinite(phi_PJ[row, j]) else high
        slope = (phi_PJ[row, high] - phi_PJ[row, low]) / (high - low) if high > low else 0.0
        aim[lane], aim[WIDTH + lane] = low, high
        aim[2 * WIDTH + lane] = slope if math.isfinite(slope) else 0.0


@inlined
def _keys(key_T, first, last, words):
    """Fill ``words`` [2] int32 with the mixed keys."""
    for lane in range(WIDTH):
        words[lane], words[WIDTH + lane] = mix64(key_T[min(first + lane, last)])


@inlined
def _size(shape):
    """Numbers that the tree of a block takes."""
    return (shape[-1, 0] + shape[-1, 1] * (shape[-1, 2] + 1)) * WIDTH


@inlined
def _start_down(adjoint, J, shape, tree):
    """The root's adjoints in the place of its coefficients."""
    for j in range(shape[-1, 2] + 1):
        value = as_kind_of(tree, load(adjoint, j * WIDTH)) if j < J else fill(tree, 0.0)
        store(tree, root(shape) + j * WIDTH, value)


@inlined
def _write_line(values, first, last, line, rows_T):
    store(line, 0, values)
    for lane in range(min(WIDTH, last + 1 - first)):
        rows_T[first + lane] = line[lane]


@inlined
def _write_flag(mask, first, last, line, rows_T):
    store(line, 0, as_kind_of(line, mask))
    for lane in range(min(WIDTH, last + 1 - first)):
        rows_T[first + lane] = line[lane] != 0.0


@inlined
def _root_tangent(tangents, shape, j):
    """Tangent of the root's coefficient j in float64."""
    return as_double(load(tangents, root(shape) + j * WIDTH)) if j <= shape[-1, 2] else as_double(fill(tangents, 0.0))


def _source_digest() -> int:
    """Of everything that is compiled. Numba's cache on disk looks at the file of a function, not at what it calls."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return int(hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12], 16)


def _kernel(function: Callable[..., None]) -> Any:
    """Compiled on first use, without the interpreter's lock, and kept on disk where there is a place for it."""
    compiled = numba.njit(nogil=True, error_model="numpy")(function)
    try:
        compiled.enable_caching()
    except RuntimeError as reason:  # neither the package nor the user's cache directory can be written to
        _log.info("%s: compiled kernels last for this process only; NUMBA_CACHE_DIR can name a directory", reason)
    return compiled


def _moments_kernel(digest):
    """Logits to moments and a sample."""

    @_kernel
    def moments(rows, shape, logits_TN, phi_PJ, key_T, limits, results, marginals_TN, probs_TJ, mask_TN):
        """Fill ``rows`` = (start, stop) of the results.

        Args:
            shape: see :mod:`circuitroute.engines.subset.numba.tree`.
            key_T: [T] int64, or empty for no sample.
            limits: (floor, negligible, margin).
            results: (log_partition, log_root, shift) [T] float64, and the flags (underflow, uncertain) [T] bool.
            marginals_TN, probs_TJ: without rows if they are not wanted.
            mask_TN: filled if there are keys.
        """
        _ = digest  # part of what the cache on disk knows this function by
        n, J = logits_TN.shape[1], phi_PJ.shape[1]
        floor, negligible, margin = limits
        log_partition_T, log_root_T, shift_T, underflow_T, uncertain_T = results
        kind = logits_TN.dtype
        tree, x, present = np.empty(_size(shape), kind), np.empty(n * WIDTH, kind), np.empty(n * WIDTH, kind)
        spare, aim = np.empty((shape[-1, 2] + 2) * WIDTH, kind), np.empty(3 * WIDTH, kind)
        phi, adjoint, probs = np.empty(J * WIDTH), np.empty(J * WIDTH), np.empty(J * WIDTH)
        counts, words, line = (
            np.empty(max(2, shape[0, 1]) * WIDTH, np.int32),
            np.empty(2 * WIDTH, np.int32),
            np.empty(WIDTH),
        )
        first_row, last = rows[0], rows[1] - 1
        for first in range(first_row, rows[1], WIDTH):
            read(logits_TN, first, last, x)
            if first == first_row or len(phi_PJ) > 1:
                read(phi_PJ, first if len(phi_PJ) > 1 else 0, last if len(phi_PJ) > 1 else 0, phi)
                _aim(phi_PJ, first, last, aim)
            forced, finite, largest, smallest = evidence(x, n)
            fewest, most, tilt = load(aim, 0), load(aim, WIDTH), load(aim, 2 * WIDTH)
            high, low = solve(x, n, forced, finite, largest, smallest, fewest, most, tilt, tree, present)
            log_coins = log_normaliser(x, n, high, low, tree, line)
            fill_padding(tree, shape, n, 1.0)
            up(tree, shape)
            s = as_double(high) + as_double(low)
            log_root, underflow = weigh(
                tree, root(shape), shape[-1, 2], phi, s, as_double(forced), floor, negligible, adjoint, probs, line
            )
            _write_line(s, first, last, line, shift_T)
            _write_line(log_root, first, last, line, log_root_T)
            _write_line(log_root + log_coins, first, last, line, log_partition_T)
            _write_flag(underflow, first, last, line, underflow_T)
            if len(key_T):
                _keys(key_T, first, last, words)
                key_low, key_high = load(words, 0), load(words, WIDTH)
                count, doubtful = draw_count(probs, J, key_low, key_high, margin)
                store(counts, 0, count)
                doubtful = doubtful | split_counts(tree, shape, counts, key_low, key_high, margin, spare)
                _write_flag(doubtful, first, last, line, uncertain_T)
                write(counts, first, last, mask_TN)
            if len(marginals_TN):
                _start_down(adjoint, J, shape, tree)
                down(tree, shape, spare)
                for i in range(n):
                    m = load(tree, (2 * i + 1) * WIDTH) * load(present, i * WIDTH)
                    m = minimum(m, fill(x, 1.0))
                    store(x, i * WIDTH, where(load(x, i * WIDTH) == math.inf, fill(x, 1.0), m))
                write(x, first, last, marginals_TN)
                write(probs, first, last, probs_TJ)

    return moments


def _second_derivative_kernel(digest):
    """The derivative of the moments along a direction."""

    @_kernel
    def second_derivative(rows, shape, logits_TN, phi_PJ, shift_T, limits, u_TN, v_TJ, dm_TN, dq_TJ):
        """Fill ``rows`` of the derivative (dm, dq) of (marginals, count posterior) along (u, v).

        The derivation stands in :func:`circuitroute.engines.subset.torch.engine._second_derivative_block`.
        """
        _ = digest  # part of what the cache on disk knows this function by
        n, J = logits_TN.shape[1], phi_PJ.shape[1]
        floor, negligible, _ = limits
        kind = logits_TN.dtype
        tree, tangents = np.empty(_size(shape), kind), np.empty(_size(shape), kind)
        x, u, present = np.empty(n * WIDTH, kind), np.empty(n * WIDTH, kind), np.empty(n * WIDTH, kind)
        spare, spare_tangent = np.empty((shape[-1, 2] + 2) * WIDTH, kind), np.empty((shape[-1, 2] + 2) * WIDTH, kind)
        phi, v, adjoint, probs = np.empty(J * WIDTH), np.empty(J * WIDTH), np.empty(J * WIDTH), np.empty(J * WIDTH)
        line = np.empty(WIDTH)
        first_row, last = rows[0], rows[1] - 1
        for first in range(first_row, rows[1], WIDTH):
            read(logits_TN, first, last, x)
            read(u_TN, first, last, u)
            read(v_TJ, first, last, v)
            if first == first_row or len(phi_PJ) > 1:
                read(phi_PJ, first if len(phi_PJ) > 1 else 0, last if len(phi_PJ) > 1 else 0, phi)
            for lane in range(WIDTH):
                line[lane] = shift_T[min(first + lane, last)]
            s = load(line, 0)
            high = as_kind_of(x, s)
            low = as_kind_of(x, s - as_double(high))
            toss(x, n, high, low, tree, present)
            none_forced = fill(line, 0.0)  # or any other number: a factor e^(-s forced) of all weights cancels
            for i in range(n):
                store(tangents, 2 * i * WIDTH, fill(x, 0.0))
                store(tangents, (2 * i + 1) * WIDTH, load(present, i * WIDTH) * load(u, i * WIDTH))
            fill_padding(tree, shape, n, 1.0)
            fill_padding(tangents, shape, n, 0.0)
            dual_up(tree, tangents, shape)
            weigh(tree, root(shape), shape[-1, 2], phi, s, none_forced, floor, negligible, adjoint, probs, line)
            slope = fill(line, 0.0)
            for j in range(J):
                d_root = _root_tangent(tangents, shape, j)
                slope += load(adjoint, j * WIDTH) * d_root + load(probs, j * WIDTH) * load(v, j * WIDTH)
            for j in range(J):
                excess = load(v, j * WIDTH) - slope
                d_root = _root_tangent(tangents, shape, j)
                dq = load(adjoint, j * WIDTH) * d_root + load(probs, j * WIDTH) * excess
                store(v, j * WIDTH, dq)
                store(probs, j * WIDTH, load(adjoint, j * WIDTH) * excess)
            _start_down(adjoint, J, shape, tree)
            _start_down(probs, J, shape, tangents)
            dual_down(tree, tangents, shape, spare, spare_tangent)
            for i in range(n):
                p, a, da = (
                    load(present, i * WIDTH),
                    load(tree, (2 * i + 1) * WIDTH),
                    load(tangents, (2 * i + 1) * WIDTH),
                )
                store(u, i * WIDTH, p * (da + a * load(u, i * WIDTH)))
            write(u, first, last, dm_TN)
            write(v, first, last, dq_TJ)

    return second_derivative


_digest = _source_digest()
moments = _moments_kernel(_digest)
second_derivative = _second_derivative_kernel(_digest)
