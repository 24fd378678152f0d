"""The engine ``numba`` of the count family: compiled loops on the CPU.

Legend: T tokens, N variables, K the largest allowed count.

The steps of the engine ``torch``, fused: a few tokens at a time go from logits to marginals, posterior and sample while
their tree is in the cache. Results depend neither on the number of threads nor on a row's neighbours. Rows that
underflow are swept again by the engine ``torch``; for all else see :mod:`circuitroute.engines.sweep`.

Where the tree of a token has more than ``MAX_TREE`` numbers (each thread holds sixteen such trees, for gradients twice
that) the engine ``torch`` is preferred.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from circuitroute.engines.base import given
from circuitroute.engines.root import NEGLIGIBLE, SMALLEST_COEFFICIENT
from circuitroute.engines.sampling import MARGIN
from circuitroute.engines.subset.naive import NaiveSubset
from circuitroute.engines.subset.torch.sweep import Centre, forward
from circuitroute.engines.subset.torch.tree import even
from circuitroute.engines.sweep import Inputs, Sweep, SweepEngine
from circuitroute.errors import EngineError

MAX_TREE = 1 << 24
# A second thread is not worth it for fewer logits.
LOGITS_PER_THREAD = 1 << 14
# Compiling that takes longer logs a warning meanwhile.
SLOW_SECONDS = 2.0
COMPILING = (
    "compiling the numba kernel %r: 10 to 20 seconds, once, since numba keeps the result on disk; "
    "circuitroute.engines.warmup() does it ahead of time"
)

# Kernels, by name and dtype, that this process has compiled or read from numba's cache.
_READY: set[tuple[str, str]] = set()

_log = logging.getLogger("circuitroute")


@functools.cache
def missing() -> str | None:
    """Why the engine cannot run here, or None if it can."""
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed; pip install 'circuitroute[cpu]'"
    return None


def fits(n: int, K: int) -> bool:
    """Whether the tree of a token is small enough for this engine to be preferred."""
    shape = _shape(n, K)
    return int(shape[:, 1] @ (shape[:, 2] + 1)) <= MAX_TREE


@functools.lru_cache(maxsize=256)
def _shape(n: int, K: int) -> NDArray[np.int64]:
    """[levels, 3]: each level's first coefficient, its nodes (padded to pairs) and their degree, leaves first."""
    levels, first, nodes, degree = [], 0, n, 1
    while True:
        levels.append((first, even(nodes), degree))
        if nodes == 1:
            return np.array(levels, dtype=np.int64)
        first += even(nodes) * (degree + 1)
        nodes, degree = even(nodes) // 2, min(2 * degree, K)


class NumbaSubset(SweepEngine):
    """Compiled inference for the count family on the CPU; float32 for float32 logits, float64 for float64."""

    name = "numba"
    naive = NaiveSubset()

    def sweep(self, rows: Inputs, key_T: Tensor | None, moments: bool) -> Sweep:
        """See :class:`circuitroute.engines.sweep.SweepEngine`."""
        arrays = _Arrays.of(rows)
        found = Sweep.empty(rows.logits, arrays.phi.shape[1], moments, key_T is not None)
        key = torch.empty(0, dtype=torch.int64) if key_T is None else key_T
        mask = torch.empty(0, 0, dtype=torch.bool) if found.mask is None else found.mask
        lines = (found.log_partition, found.log_root, found.shift, found.fallback, found.uncertain)
        outputs = (found.marginals, found.count_probs, mask)
        arguments = (tuple(map(_array, lines)), *(_array(x) for x in outputs if x is not None))
        _in_threads(_kernels().forward, arrays, (_array(key), *arguments))
        return found

    def sweep_again(self, rows: Inputs, key_T: Tensor | None, moments: bool) -> Sweep:
        """See :class:`circuitroute.engines.sweep.SweepEngine`; by the engine ``torch``."""
        return forward(rows, key_T, moments, Centre.at_mode(rows))

    def derivative(self, rows: Inputs, shift_T: Tensor, u_TN: Tensor, v_TJ: Tensor | None) -> tuple[Tensor, Tensor]:
        """See :class:`circuitroute.engines.sweep.SweepEngine`."""
        arrays = _Arrays.of(rows)
        v = rows.logits.new_zeros(len(u_TN), arrays.phi.shape[1]) if v_TJ is None else v_TJ
        dm, dq = (torch.empty(x.shape, dtype=rows.logits.dtype) for x in (u_TN, v))
        _in_threads(_kernels().second_derivative, arrays, tuple(_array(x) for x in (shift_T, u_TN, v, dm, dq)))
        return dm, dq


class _Arrays(NamedTuple):
    """What all kernels read, sharing the memory of tensors."""

    shape: NDArray[np.int64]
    logits: NDArray[Any]
    phi: NDArray[np.float64]
    limits: tuple[float, float, float]

    @staticmethod
    def of(rows: Inputs) -> _Arrays:
        """The arrays of logits and potential.

        Raises:
            EngineError: tensors that are not in the CPU's memory.
        """
        logits, phi = rows.logits, given(rows.potential).double()
        if logits.device.type != "cpu":
            raise EngineError(
                f"engine='numba' runs on CPU tensors and these are on {logits.device}: move them, or use the "
                f"engine 'torch' (with_engine('torch')), which runs anywhere"
            )
        phi = phi if phi.dim() == 2 else phi[None]
        limits = (SMALLEST_COEFFICIENT[logits.dtype], NEGLIGIBLE[logits.dtype], MARGIN[logits.dtype])
        return _Arrays(_shape(logits.shape[1], phi.shape[1] - 1), _array(logits), _array(phi), limits)


def _array(x: Tensor) -> NDArray[Any]:
    """A contiguous array that shares the tensor's memory, or has a copy where the tensor is not contiguous."""
    return x.detach().contiguous().numpy()


# ---------------------------------------------------------------------------------------------- running kernels


def _kernels() -> Any:
    from circuitroute.engines.subset.numba import sweep

    return sweep


def _in_threads(kernel: Any, rows: _Arrays, arguments: tuple[Any, ...]) -> None:
    """Run the kernel on all rows, split evenly among as many threads as torch uses (kernels release the GIL)."""

    def run(part: tuple[int, int]) -> None:
        kernel(part, *rows, *arguments)

    ready = (kernel.__name__, rows.logits.dtype.name)
    if ready not in _READY:
        _compile(kernel, run)
        _READY.add(ready)
    T, N = rows.logits.shape
    threads = max(1, min(torch.get_num_threads(), T * N // LOGITS_PER_THREAD))
    bounds = [T * i // threads for i in range(threads + 1)]
    if threads == 1:
        run((0, T))
        return
    # New threads each time: a pool that is kept would not survive a fork, such as a data loader's.
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, pairwise(bounds)))


def _compile(kernel: Any, run: Callable[[tuple[int, int]], None]) -> None:
    """Run on no rows, which compiles the kernel or reads it from numba's cache; a warning if that takes long."""
    notice = threading.Timer(SLOW_SECONDS, _log.warning, [COMPILING, kernel.__name__])
    notice.daemon = True
    notice.start()
    try:
        run((0, 0))
    finally:
        notice.cancel()


def warmup() -> None:
    """Compile all kernels, for both dtypes, or read them from numba's cache."""
    engine = NumbaSubset()
    for dtype in (torch.float32, torch.float64):
        logits, potential, key = torch.zeros(1, 2, dtype=dtype), torch.zeros(2, dtype=dtype), torch.zeros(1).long()
        inference = engine.infer(logits, potential, key)
        engine.second_derivative(logits, potential, inference, logits, None)
