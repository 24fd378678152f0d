"""What all engines of compiled loops share: whether there is a compiler, and how a loop is run on rows of tokens.

Legend: T tokens, N variables.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# What the threads compute in has at most this many numbers a lane: 4 GiB in float32, for gradients twice that.
MAX_NUMBERS = 1 << 26
# A second thread is not worth it for fewer logits.
LOGITS_PER_THREAD = 1 << 14
# Compiling that takes longer logs a warning meanwhile.
SLOW_SECONDS = 2.0
COMPILING = (
    "compiling the numba kernel %r: 10 to 20 seconds, once, since numba keeps the result on disk; "
    "circuitroute.engines.warmup() does it ahead of time"
)

# What kernels are given where there is nothing to draw.
NO_KEYS = np.empty(0, np.int64)
NO_MASKS = np.empty((0, 0), np.bool_)

# Kernels, by name and dtype, that this process has compiled or read from numba's cache.
_READY: set[tuple[str, str]] = set()

_log = logging.getLogger("circuitroute")


@functools.cache
def missing() -> str | None:
    """Why compiled loops cannot run here, or None if they can."""
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed; pip install 'circuitroute[cpu]'"
    return None


def array(x: Tensor) -> NDArray[Any]:
    """A contiguous array that shares the tensor's memory, or has a copy where the tensor is not contiguous."""
    return (x.detach() if x.requires_grad else x).contiguous().numpy()


@functools.cache
def _name(dtype: np.dtype[Any]) -> str:
    """Such as "float32", which NumPy puts together anew every time."""
    return dtype.name


def width() -> int:
    """How many tokens a block has."""
    from circuitroute.engines.subset.numba.simd.lanes import WIDTH

    return WIDTH


def in_threads(
    kernel: Any, logits_TN: NDArray[Any], numbers: int, arguments: tuple[Any, ...], work: int | None = None
) -> None:
    """Run the kernel on all rows, split among as many threads as torch uses (kernels release the GIL).

    A thread gets whole blocks of tokens: a part of a block takes the time and the memory of a whole one.

    Args:
        kernel: called with (start, stop) of its rows and the arguments.
        numbers: how many numbers of a token the kernel holds.
        work: how many logits a token counts for; N by default.
    """

    def run(part: tuple[int, int]) -> None:
        kernel(part, *arguments)

    ready = (kernel.__name__, _name(logits_TN.dtype))
    if ready not in _READY:
        compile_now(kernel, run)
        _READY.add(ready)
    T, N = logits_TN.shape
    worth = T * (N if work is None else work) // LOGITS_PER_THREAD
    threads = min(torch.get_num_threads(), worth, MAX_NUMBERS // max(1, numbers))
    blocks = -(-T // width()) if threads > 1 else 1
    threads = min(threads, blocks)
    if threads <= 1:
        run((0, T))
        return
    bounds = [min(T, width() * (blocks * i // threads)) for i in range(threads + 1)]
    # New threads each time: a pool that is kept would not survive a fork, such as a data loader's.
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, pairwise(bounds)))


def compile_now(kernel: Any, run: Callable[[tuple[int, int]], None]) -> None:
    """Run on no rows, which compiles the kernel or reads it from numba's cache; a warning if that takes long."""
    notice = threading.Timer(SLOW_SECONDS, _log.warning, [COMPILING, kernel.__name__])
    notice.daemon = True
    notice.start()
    try:
        run((0, 0))
    finally:
        notice.cancel()
