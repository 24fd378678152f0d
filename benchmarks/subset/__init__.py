"""The op ``subset``: one routing step under a count constraint, and its providers."""

from benchmarks.subset import engines, sequential_dp, topk, workload

__all__ = ["engines", "sequential_dp", "topk", "workload"]
