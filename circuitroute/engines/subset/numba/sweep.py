"""The compiled sweep: rows of logits to moments and a sample, and the derivative of the moments along a direction.

Legend: T tokens, N variables, J = K + 1 counts; P is 1 where all tokens share a potential, else T.

The mathematics is that of :mod:`circuitroute.engines.subset.torch.sweep`, a few tokens (``WIDTH``) at a time, so that
their whole tree stays in the cache. The last block is filled up with copies of the last row. What is [N] or [J] below
has a number for each of these tokens, as Lanes.
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

from circuitroute.engines import shift as constants
from circuitroute.engines import step as contract
from circuitroute.engines.subset.numba.coins import coins, log_normaliser
from circuitroute.engines.subset.numba.root import weigh, weigh_tangent
from circuitroute.engines.subset.numba.sampling import draw
from circuitroute.engines.subset.numba.shift import fill_aim, find_evidence, solve_shift
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
from circuitroute.engines.subset.numba.tree import down, dual_down, dual_up, is_narrow, put_root, size, strayed, up

_log = logging.getLogger("circuitroute")


@inlined
def room(numbers, kind):
    return np.empty(numbers * WIDTH, kind)


@inlined
def read_line(rows_T, first, last, line):
    for lane in range(WIDTH):
        line[lane] = rows_T[min(first + lane, last)]
    return load(line, 0)


@inlined
def write_line(values, first, last, line, rows_T):
    store(line, 0, as_kind_of(line, values))
    for lane in range(min(WIDTH, last + 1 - first)):
        rows_T[first + lane] = line[lane]


@inlined
def put_marginals(tree, x, present, n):
    """P(i in S) = A_i p_i, with A_i the adjoint of the leaf's present weight, in the place of the logits."""
    one = fill(x, 1.0)
    for i in range(n):
        m = minimum(load(tree, (2 * i + 1) * WIDTH) * load(present, i * WIDTH), one)  # rounding may go an ulp beyond
        store(x, i * WIDTH, where(load(x, i * WIDTH) == math.inf, one, m))


@inlined
def leaf_tangents(tree, tangents, present, u, n):
    """Up to a factor that cancels, a leaf (q, p) is a coin: along u it moves by (-w, w), with w = p q u, for u's."""
    for i in range(n):
        w = load(present, i * WIDTH) * load(tree, 2 * i * WIDTH) * load(u, i * WIDTH)
        store(tangents, 2 * i * WIDTH, -w)
        store(tangents, (2 * i + 1) * WIDTH, w)
        store(u, i * WIDTH, w)


@inlined
def marginal_tangents(tree, tangents, present, u, n):
    """d(A_i p_i) = p_i dA_i + A_i w_i, in the place of w."""
    for i in range(n):
        A, dA = load(tree, (2 * i + 1) * WIDTH), load(tangents, (2 * i + 1) * WIDTH)
        store(u, i * WIDTH, load(present, i * WIDTH) * dA + A * load(u, i * WIDTH))


def sources() -> list[Path]:
    """All that is compiled. Numba's cache on disk looks at the file of a kernel only, not at what it calls."""
    return [*sorted(Path(__file__).parent.rglob("*.py")), Path(constants.__file__), Path(contract.__file__)]


def source_digest() -> int:
    return int(hashlib.sha256(b"".join(path.read_bytes() for path in sources())).hexdigest()[:12], 16)


def kernel(function: Callable[..., None]) -> Any:
    """Compiled on first use, without the interpreter's lock, and kept on disk where there is a place for it."""
    compiled = numba.njit(nogil=True, error_model="numpy")(function)
    try:
        compiled.enable_caching()
    except RuntimeError as reason:  # neither the package nor the user's cache directory can be written to
        _log.info("%s: compiled kernels last for this process only; NUMBA_CACHE_DIR can name a directory", reason)
    return compiled


def _forward_kernel(digest):
    """Logits to moments and a sample."""

    @kernel
    def forward(rows, shape, logits_TN, phi_PJ, limits, key_T, lines, marginals_TN, probs_TJ, mask_TN):
        """Fill ``rows`` = (start, stop) of the results.

        Args:
            shape: see :mod:`circuitroute.engines.subset.numba.tree`.
            limits: (floor, negligible, margin).
            key_T: [T] int64, or empty for no sample.
            lines: (log_partition, log_root, shift) [T], and the flags (underflow, uncertain) [T] bool; rows that need
                more than a narrow tree count as underflow.
            marginals_TN, probs_TJ: without rows if they are not wanted.
            mask_TN: filled if there are keys.
        """
        _ = digest  # part of what the cache on disk knows this function by
        n, (P, J), kind, wide = logits_TN.shape[1], phi_PJ.shape, logits_TN.dtype, phi_PJ.dtype
        log_partition_T, log_root_T, shift_T, underflow_T, uncertain_T = lines
        x, present = room(n, kind), room(n, kind)
        tree, spare = room(size(shape), kind), room(shape[-1, 2] + 2, kind)
        aim, phi, adjoint, probs, line = room(3, kind), room(J, wide), room(J, wide), room(J, wide), room(1, wide)
        counts, words = room(max(2, shape[0, 1]), np.int32), room(2, np.int32)
        narrow = is_narrow(shape, n)
        means = room(n if narrow else 1, kind)
        last = rows[1] - 1
        for first in range(rows[0], rows[1], WIDTH):
            read(logits_TN, first, last, x)
            if first == rows[0] or P > 1:
                read(phi_PJ, min(first, P - 1), min(last, P - 1), phi)
                fill_aim(phi_PJ, first, last, aim)
            evidence = find_evidence(x, n)
            high, low, _ = solve_shift(x, n, evidence, aim, tree, present)
            s = as_double(high) + as_double(low)
            normaliser, _ = log_normaliser(x, n, s, tree, line)
            up(tree, shape, n)
            log_root, underflow = weigh(tree, shape, phi, s, as_double(evidence[0]), limits, adjoint, probs, line)
            if narrow:
                underflow = underflow | strayed(tree, shape, present, n, means)
            write_line(s, first, last, line, shift_T)
            write_line(log_root, first, last, line, log_root_T)
            write_line(log_root + normaliser, first, last, line, log_partition_T)
            write_line(underflow, first, last, line, underflow_T)
            if len(key_T):
                uncertain = draw(tree, shape, probs, key_T, first, last, limits[2], counts, words, spare)
                write_line(uncertain, first, last, line, uncertain_T)
                write(counts, first, last, mask_TN)
            if len(marginals_TN):
                put_root(tree, shape, adjoint)
                down(tree, shape, spare)
                put_marginals(tree, x, present, n)
                write(x, first, last, marginals_TN)
                write(probs, first, last, probs_TJ)

    return forward


def _second_derivative_kernel(digest):
    """The derivative of the moments along a direction."""

    @kernel
    def second_derivative(rows, shape, logits_TN, phi_PJ, limits, shift_T, u_TN, v_TJ, dm_TN, dq_TJ, strayed_T):
        """Fill ``rows`` of the derivative (dm, dq) of (marginals, count posterior) along (u, v).

        Rows that need more than a narrow tree are marked.

        The derivation stands in :meth:`circuitroute.engines.subset.torch.sweep._Block.derivative`.
        """
        _ = digest  # part of what the cache on disk knows this function by
        n, (P, J), kind, wide = logits_TN.shape[1], phi_PJ.shape, logits_TN.dtype, phi_PJ.dtype
        x, u, present = room(n, kind), room(n, kind), room(n, kind)
        tree, tangents, spare = room(size(shape), kind), room(size(shape), kind), room(shape[-1, 2] + 2, kind)
        phi, v, adjoint, probs, line = room(J, wide), room(J, wide), room(J, wide), room(J, wide), room(1, wide)
        narrow = is_narrow(shape, n)
        means = room(n if narrow else 1, kind)
        last, unforced = rows[1] - 1, fill(line, 0.0)  # or any number: a factor e^(-s forced) of all weights cancels
        for first in range(rows[0], rows[1], WIDTH):
            read(logits_TN, first, last, x)
            read(u_TN, first, last, u)
            read(v_TJ, first, last, v)
            if first == rows[0] or P > 1:
                read(phi_PJ, min(first, P - 1), min(last, P - 1), phi)
            s = read_line(shift_T, first, last, line)
            high = as_kind_of(x, s)
            coins(x, n, high, as_kind_of(x, s - as_double(high)), tree, present)
            leaf_tangents(tree, tangents, present, u, n)
            dual_up(tree, tangents, shape, n)
            beyond = unforced > 0.0
            if narrow:
                beyond = strayed(tree, shape, present, n, means)
            write_line(beyond, first, last, line, strayed_T)
            weigh(tree, shape, phi, s, unforced, limits, adjoint, probs, line)
            weigh_tangent(tangents, shape, v, adjoint, probs)
            put_root(tree, shape, adjoint)
            put_root(tangents, shape, probs)
            dual_down(tree, tangents, shape, spare)
            marginal_tangents(tree, tangents, present, u, n)
            write(u, first, last, dm_TN)
            write(v, first, last, dq_TJ)

    return second_derivative


_digest = source_digest()
forward = _forward_kernel(_digest)
second_derivative = _second_derivative_kernel(_digest)
