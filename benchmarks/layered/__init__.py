"""The op ``layered``: log Z and marginals of composed constraints, and its providers."""

from benchmarks.layered import engines, klay, topk, workload

__all__ = ["engines", "klay", "topk", "workload"]
