"""The engine ``numba`` of the count family: compiled loops on the CPU.

Legend: T tokens, N variables, K the largest allowed count, J = K + 1; P is 1 for a shared potential, else T.

The sweeps of :mod:`..torch.engine`, fused: a few tokens at a time go from logits to marginals,
posterior and sample while their tree is in the cache. Results depend neither on the number of threads nor on a row's
neighbours.

What it does not do itself, decided by the row alone:

- rows that underflow go through :class:`TorchSubset`, whose second sweep around the mode, or the naive engine, mends
  them;
- rows whose sample float32 cannot decide are drawn again in float64 by the same kernels, and by the naive engine where
  even that is in doubt.

And by the circuit: where the tree of a token has more than ``MAX_TREE`` numbers (each thread holds sixteen such trees,
for gradients twice that) the engine ``torch`` is preferred.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from circuitroute.engines.autograd import attach
from circuitroute.engines.base import Inference, given
from circuitroute.engines.root import NEGLIGIBLE, SMALLEST_COEFFICIENT
from circuitroute.engines.subset.naive import NaiveSubset
from circuitroute.engines.subset.torch.engine import TorchSubset, _naive_second_derivative, _rows_of
from circuitroute.engines.subset.torch.sampling import MARGIN
from circuitroute.engines.subset.torch.tree import even
from circuitroute.errors import EngineError

MAX_TREE = 1 << 24
# Fewer logits than this are not worth a second thread.
LOGITS_PER_THREAD = 1 << 14
# Compiling that takes longer is told while it lasts.
SLOW_SECONDS = 2.0
COMPILING = (
    "compiling the numba kernel %r: 10 to 20 seconds, once, since numba keeps the result on disk; "
    "circuitroute.engines.warmup() does it ahead of time"
)

# Kernels by name and dtype that this process has compiled, or read from numba's cache.
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


class NumbaSubset:
    """Compiled inference for the count family on the CPU; float32 for float32 logits, float64 for float64."""

    name = "numba"

    @torch.no_grad()
    def infer(self, logits_TN: Tensor, potential: Tensor | None, key_T: Tensor | None = None) -> Inference:
        """See :class:`circuitroute.engines.base.Engine`."""
        rows = _Rows.of(logits_TN, given(potential))
        sweep = _Sweep.run(rows, key_T, with_marginals=True)
        under = sweep.underflow.nonzero().squeeze(1)
        result = Inference(
            log_partition=sweep.log_partition.to(logits_TN.dtype),
            marginals=sweep.marginals,
            count_probs=sweep.count_probs,
            shift=sweep.shift,
            log_root=sweep.log_root,
            mask=None if key_T is None else sweep.mask,
            fallback=torch.zeros_like(sweep.underflow),
        )
        if len(under):
            _put(result, under, TorchSubset().infer(*rows.at(under), None if key_T is None else key_T[under]))
        if key_T is not None:
            _redraw(sweep.mask, (sweep.uncertain & ~sweep.underflow).nonzero().squeeze(1), rows, key_T)
        return result

    def attach(self, inference: Inference, logits_TN: Tensor, potential: Tensor | None) -> Inference:
        """See :class:`circuitroute.engines.base.Engine`."""
        return attach(self, inference, logits_TN, given(potential))

    def second_derivative(
        self, logits_TN: Tensor, potential: Tensor | None, inference: Inference, u_TN: Tensor, v_TJ: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See :class:`circuitroute.engines.autograd.Differentiable`."""
        rows = _Rows.of(logits_TN, given(potential))
        v = logits_TN.new_zeros(len(logits_TN), rows.phi.shape[1]) if v_TJ is None else v_TJ
        dm, dq = torch.empty(logits_TN.shape, dtype=logits_TN.dtype), torch.empty(v.shape, dtype=v.dtype)
        arguments = (_array(inference.shift), rows.limits, _array(u_TN), _array(v), _array(dm), _array(dq))
        _in_threads(_kernels().second_derivative, rows, arguments)
        under = None if inference.fallback is None else inference.fallback.nonzero().squeeze(1)
        if under is not None and len(under):
            logits, phi = rows.at(under)
            dm[under], dq[under] = _naive_second_derivative(logits, phi, u_TN[under], v[under])
        return dm, dq

    def naive_moments(self, logits_TN: Tensor, potential: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`circuitroute.engines.autograd.Differentiable`."""
        return NaiveSubset().moments(logits_TN, given(potential))

    @torch.no_grad()
    def sample(self, logits_TN: Tensor, potential: Tensor | None, key_T: Tensor) -> Tensor:
        """See :class:`circuitroute.engines.base.Engine`."""
        rows = _Rows.of(logits_TN, given(potential))
        sweep = _Sweep.run(rows, key_T, with_marginals=False)
        under = sweep.underflow.nonzero().squeeze(1)
        if len(under):
            sweep.mask[under] = TorchSubset().sample(*rows.at(under), key_T[under])
        _redraw(sweep.mask, (sweep.uncertain & ~sweep.underflow).nonzero().squeeze(1), rows, key_T)
        return sweep.mask


@dataclass(frozen=True)
class _Rows:
    """What the kernels read: tensors and, sharing their memory, arrays."""

    logits: Tensor
    potential: Tensor
    array: NDArray[Any]
    phi: NDArray[np.float64]
    shape: NDArray[np.int64]
    limits: tuple[float, float, float]

    @staticmethod
    def of(logits_TN: Tensor, potential: Tensor) -> _Rows:
        """The arrays of logits and potential.

        Raises:
            EngineError: tensors that are not in the CPU's memory.
        """
        if logits_TN.device.type != "cpu":
            raise EngineError(
                f"engine='numba' runs on CPU tensors and these are on {logits_TN.device}: move them, or use the "
                f"engine 'torch' (with_engine('torch')), which runs anywhere"
            )
        dtype = logits_TN.dtype
        phi = _array(potential.double() if potential.dim() == 2 else potential.double()[None])
        shape = _shape(logits_TN.shape[1], phi.shape[1] - 1)
        limits = (SMALLEST_COEFFICIENT[dtype], NEGLIGIBLE[dtype], MARGIN[dtype])
        return _Rows(logits_TN, potential, _array(logits_TN), phi, shape, limits)

    def at(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and potential of some rows."""
        return self.logits[rows], _rows_of(self.potential, rows)


@dataclass(frozen=True)
class _Sweep:
    """What one run of the kernel fills in."""

    log_partition: Tensor
    log_root: Tensor
    shift: Tensor
    underflow: Tensor
    uncertain: Tensor
    marginals: Tensor
    count_probs: Tensor
    mask: Tensor

    @staticmethod
    def run(rows: _Rows, key_T: Tensor | None, with_marginals: bool) -> _Sweep:
        T, N = rows.logits.shape
        moments = T if with_marginals else 0
        dtype = rows.logits.dtype
        sweep = _Sweep(
            log_partition=torch.empty(T, dtype=torch.float64),
            log_root=torch.empty(T, dtype=torch.float64),
            shift=torch.empty(T, dtype=torch.float64),
            underflow=torch.zeros(T, dtype=torch.bool),
            uncertain=torch.zeros(T, dtype=torch.bool),
            marginals=torch.empty(moments, N, dtype=dtype),
            count_probs=torch.empty(moments, rows.phi.shape[1], dtype=dtype),
            mask=torch.empty(0 if key_T is None else T, N, dtype=torch.bool),
        )
        key = torch.empty(0, dtype=torch.int64) if key_T is None else key_T
        lines = (sweep.log_partition, sweep.log_root, sweep.shift, sweep.underflow, sweep.uncertain)
        outputs = (_array(sweep.marginals), _array(sweep.count_probs), _array(sweep.mask))
        results = tuple(_array(line) for line in lines)
        _in_threads(_kernels().moments, rows, (_array(key), rows.limits, results, *outputs))
        return sweep


def _array(x: Tensor) -> NDArray[Any]:
    """A contiguous array that shares the tensor's memory, or has a copy where the tensor is not contiguous."""
    return x.detach().contiguous().numpy()


def _put(result: Inference, rows: Tensor, other: Inference) -> None:
    """Replace ``rows`` of all that is there by those of another inference."""
    for name in ("log_partition", "marginals", "count_probs", "shift", "log_root", "mask", "fallback"):
        mine, theirs = getattr(result, name), getattr(other, name)
        if mine is not None and theirs is not None:
            mine[rows] = theirs


def _redraw(mask_TN: Tensor, doubtful: Tensor, rows: _Rows, key_T: Tensor) -> None:
    """Draw some rows in float64, and with the naive engine where even that leaves doubt."""
    if not len(doubtful):
        return
    logits, potential = (x.double() for x in rows.at(doubtful))
    key = key_T[doubtful]
    again = _Sweep.run(_Rows.of(logits, potential), key, with_marginals=False)
    still = (again.uncertain | again.underflow).nonzero().squeeze(1)
    if len(still):
        again.mask[still] = NaiveSubset().sample(logits[still], _rows_of(potential, still), key[still])
    mask_TN[doubtful] = again.mask


# ---------------------------------------------------------------------------------------------- running kernels


def _kernels() -> Any:
    from circuitroute.engines.subset.numba import sweep

    return sweep


def _in_threads(kernel: Any, rows: _Rows, arguments: tuple[Any, ...]) -> None:
    """Run the kernel on all rows, split evenly among as many threads as torch uses (kernels hold no lock)."""

    def run(part: tuple[int, int]) -> None:
        kernel(part, rows.shape, rows.array, rows.phi, *arguments)

    ready = (kernel.__name__, rows.array.dtype.name)
    if ready not in _READY:
        _compile(kernel, run)
        _READY.add(ready)
    T, N = rows.array.shape
    threads = max(1, min(torch.get_num_threads(), T * N // LOGITS_PER_THREAD))
    bounds = [T * i // threads for i in range(threads + 1)]
    if threads == 1:
        run((0, T))
        return
    # Threads are made anew: a pool kept for later would not survive a fork, as data loaders do.
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, pairwise(bounds)))


def _compile(kernel: Any, run: Callable[[tuple[int, int]], None]) -> None:
    """Run on no rows, which compiles the kernel or reads it from numba's cache; a line tells who waits for what."""
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
