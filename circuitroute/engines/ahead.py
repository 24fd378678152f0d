"""Compiling ahead of time."""

from __future__ import annotations

from circuitroute.engines.layered.numba import engine as layered
from circuitroute.engines.subset.numba import engine as subset


def warmup() -> None:
    """Compile all loops of the engines ``numba``, for both dtypes, or read them from numba's cache."""
    subset.warmup()
    layered.warmup()
