"""Clocks and memory meters: what one run costs, on the CPU or on a GPU."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

MIB = 2**20

# Copies go round a ring of buffers, so that each finds its bytes in memory rather than in a cache: this much in all,
# short of it where the buffers are tiny.
RING_MIB = 128
RING_MAX = 64


class Clock(Protocol):
    """Marks points in time; differences are in milliseconds."""

    name: str

    def mark(self) -> float:
        """Now, in milliseconds."""


class ProcessClock:
    """CPU time of this process: what other processes do does not count. Right for one thread only."""

    name = "process"

    def mark(self) -> float:
        return time.process_time_ns() / 1e6


class WallClock:
    """Elapsed time."""

    name = "wall"

    def mark(self) -> float:
        return time.perf_counter_ns() / 1e6


class DeviceClock:
    """Elapsed time, with the GPU's queue emptied first."""

    name = "wall, synchronized"

    def mark(self) -> float:
        torch.cuda.synchronize()
        return time.perf_counter_ns() / 1e6


def clock_for(device: torch.device, threads: int) -> Clock:
    """The clock that disturbances move least."""
    if device.type == "cuda":
        return DeviceClock()
    return ProcessClock() if threads == 1 else WallClock()


@contextmanager
def quiet(threads: int) -> Iterator[None]:
    """A fixed number of threads and no garbage collection meanwhile."""
    before, collecting = torch.get_num_threads(), gc.isenabled()
    torch.set_num_threads(threads)
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if collecting:
            gc.enable()


class Copies:
    """The memory floor: what a copy of an input of this size takes, one read and one write of its bytes.

    Reading the logits and writing the marginals cannot take less. The copies of a pass over the ring are timed
    together, so that neither the clock's steps nor starting a kernel counts for much.
    """

    def __init__(self, like: Tensor) -> None:
        count = min(RING_MAX, max(1, RING_MIB * MIB // (2 * like.nbytes)))
        # Written once here: memory that was never touched is given out on the first write, which takes time.
        self._pairs = [(torch.ones_like(like), torch.ones_like(like)) for _ in range(count)]

    def time(self, clock: Clock) -> float:
        """Milliseconds of one copy."""
        start = clock.mark()
        for source, target in self._pairs:
            target.copy_(source)
        return (clock.mark() - start) / len(self._pairs)


def peak_mib(run: Callable[[], object], device: torch.device) -> float | None:
    """Peak memory above the start while ``run`` runs, in MiB; None where the system does not tell."""
    if device.type == "cuda":
        return _cuda_peak(run)
    return _resident_peak(run) if sys.platform == "linux" else None


def _cuda_peak(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - start) / MIB


def _resident_peak(run: Callable[[], object]) -> float | None:
    """From the kernel's high-water mark, after giving freed memory back so that using it again shows."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):  # another C library, or a kernel that does not allow it
        return None
    start = _status("VmRSS")
    run()
    return (_status("VmHWM") - start) / 1024


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) if found else 0
