"""The op ``circuits``: log Z and marginals of circuits that other compilers wrote, and its providers."""

from benchmarks.circuits import engines, klay, pysdd, workload

__all__ = ["engines", "klay", "pysdd", "workload"]
