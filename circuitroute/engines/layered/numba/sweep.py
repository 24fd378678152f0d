"""The compiled sweep of any circuit: rows of logits to moments and a sample, and the derivative of the moments.

Legend: T tokens, N variables, R rows (one per node), J the counts that the root tells apart (1 where it does not).

The mathematics is that of :mod:`circuitroute.engines.layered.torch.sweep`, a few tokens (``WIDTH``) at a time, so that
the values of all nodes stay in the cache. The last block is filled up with copies of the last row. Shift, coins and
root are those of :mod:`circuitroute.engines.subset.numba`: the literals lie as the leaves of its tree do, and the
root's coefficients as those of its root.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from circuitroute.engines import logspace
from circuitroute.engines.layered.numba.sampling import draw
from circuitroute.engines.layered.numba.tree import down, dual_down, dual_up, up
from circuitroute.engines.subset.numba.coins import coins, log_normaliser
from circuitroute.engines.subset.numba.root import weigh, weigh_tangent
from circuitroute.engines.subset.numba.shift import fill_aim, find_evidence, solve_shift
from circuitroute.engines.subset.numba.simd.lanes import WIDTH, as_double, as_kind_of, fill, store
from circuitroute.engines.subset.numba.simd.rows import read, write
from circuitroute.engines.subset.numba.sweep import (
    kernel,
    leaf_tangents,
    marginal_tangents,
    put_marginals,
    read_line,
    room,
    source_digest,
    write_line,
)
from circuitroute.engines.subset.numba.tree import put_root


def digest() -> int:
    """Of all that is compiled: numba's cache on disk looks at the file of a kernel only, not at what it calls."""
    paths = [*sorted(Path(__file__).parent.rglob("*.py")), Path(logspace.__file__)]
    own = b"".join(path.read_bytes() for path in paths)
    return source_digest() ^ int(hashlib.sha256(own).hexdigest()[:12], 16)


def _forward_kernel(digest):
    """Logits to moments and a sample."""

    @kernel
    def circuit_forward(rows, circuit, shifted, logits_TN, limits, key_T, lines, marginals_TN, probs_TJ, mask_TN):
        """Fill ``rows`` = (start, stop) of the results.

        Args:
            circuit: (elements, uses, number, root, shape, log_weights), see :mod:`circuitroute.engines.layered.flat`.
            shifted: whether nodes have definite counts, so that a shift can be given back.
            limits: (floor, negligible, margin).
            key_T: [T] int64, or empty for no sample.
            lines: (log_partition, log_root, shift) [T], and the flags (underflow, uncertain) [T] bool.
            marginals_TN, probs_TJ: without rows if they are not wanted.
            mask_TN: filled if there are keys.
        """
        _ = digest  # part of what the cache on disk knows this function by
        elements, uses, number, root, shape, log_weights = circuit
        n, R, J = logits_TN.shape[1], len(elements[0]) - 1, log_weights.shape[1]
        kind, wide = logits_TN.dtype, log_weights.dtype
        log_partition_T, log_root_T, shift_T, underflow_T, uncertain_T = lines
        x, present, values = room(n, kind), room(n, kind), room(R, kind)
        adjoints = room(R if len(marginals_TN) else 1, kind)
        aim, phi, adjoint, probs, line = room(3, kind), room(J, wide), room(J, wide), room(J, wide), room(1, wide)
        sampled = len(key_T) > 0
        counts, stack = room(n if sampled else 1, np.int32), np.empty(R + 2 if sampled else 1, np.int32)
        last = rows[1] - 1
        read(log_weights, 0, 0, phi)
        fill_aim(log_weights, 0, 0, aim)
        for first in range(rows[0], rows[1], WIDTH):
            read(logits_TN, first, last, x)
            evidence = find_evidence(x, n)
            high, low, forced = fill(x, 0.0), fill(x, 0.0), as_double(fill(x, 0.0))
            if shifted:
                high, low, _ = solve_shift(x, n, evidence, aim, values, present)
                forced = as_double(evidence[0])
            else:
                coins(x, n, high, low, values, present)
            s = as_double(high) + as_double(low)
            normaliser, _ = log_normaliser(x, n, s, values, line)
            up(elements, values, n)
            log_root, underflow = weigh(values, shape, phi, s, forced, limits, adjoint, probs, line)
            write_line(s, first, last, line, shift_T)
            write_line(log_root, first, last, line, log_root_T)
            write_line(log_root + normaliser, first, last, line, log_partition_T)
            write_line(underflow, first, last, line, underflow_T)
            if sampled:
                draw(values, elements, number, root, adjoint, key_T, first, last, limits[2], counts, stack, uncertain_T)
                write(counts, first, last, mask_TN)
            if len(marginals_TN):
                put_root(adjoints, shape, adjoint)
                down(uses, values, adjoints, n, shape[0, 0])
                put_marginals(adjoints, x, present, n)
                write(x, first, last, marginals_TN)
                if len(probs_TJ):
                    write(probs, first, last, probs_TJ)

    return circuit_forward


def _derivative_kernel(digest):
    """The derivative of the moments along a direction."""

    @kernel
    def circuit_derivative(rows, circuit, logits_TN, limits, shift_T, u_TN, v_TJ, dm_TN, dq_TJ):
        """Fill ``rows`` of the derivative (dm, dq) of (marginals, count posterior) along (u, v).

        The derivation stands in :meth:`circuitroute.engines.subset.torch.sweep._Block.derivative`.

        Args:
            circuit, limits: as in the forward kernel.
            v_TJ, dq_TJ: without rows where there are no counts.
        """
        _ = digest  # part of what the cache on disk knows this function by
        elements, uses, _, _, shape, log_weights = circuit
        n, R, J = logits_TN.shape[1], len(elements[0]) - 1, log_weights.shape[1]
        kind, wide, top = logits_TN.dtype, log_weights.dtype, shape[0, 0]
        x, u, present = room(n, kind), room(n, kind), room(n, kind)
        values, tangents, adjoints, moved = room(R, kind), room(R, kind), room(R, kind), room(R, kind)
        phi, v, adjoint, probs, line = room(J, wide), room(J, wide), room(J, wide), room(J, wide), room(1, wide)
        last, unforced = rows[1] - 1, fill(line, 0.0)  # or any number: a factor e^(-s forced) of all weights cancels
        read(log_weights, 0, 0, phi)
        for first in range(rows[0], rows[1], WIDTH):
            read(logits_TN, first, last, x)
            read(u_TN, first, last, u)
            for j in range(J):
                store(v, j * WIDTH, unforced)
            if len(v_TJ):
                read(v_TJ, first, last, v)
            s = read_line(shift_T, first, last, line)
            high = as_kind_of(x, s)
            coins(x, n, high, as_kind_of(x, s - as_double(high)), values, present)
            leaf_tangents(values, tangents, present, u, n)
            dual_up(elements, values, tangents, n)
            weigh(values, shape, phi, s, unforced, limits, adjoint, probs, line)
            weigh_tangent(tangents, shape, v, adjoint, probs)
            put_root(adjoints, shape, adjoint)
            put_root(moved, shape, probs)
            dual_down(uses, values, tangents, adjoints, moved, n, top)
            marginal_tangents(adjoints, moved, present, u, n)
            write(u, first, last, dm_TN)
            if len(dq_TJ):
                write(v, first, last, dq_TJ)

    return circuit_derivative


_digest = digest()
forward = _forward_kernel(_digest)
derivative = _derivative_kernel(_digest)
