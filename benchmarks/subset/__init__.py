"""The op ``subset``: one routing step under a count constraint, and its providers."""

from benchmarks.subset import engines, klay, lapsum, sequential_dp, topk, tree_circuit, workload

__all__ = ["engines", "klay", "lapsum", "sequential_dp", "topk", "tree_circuit", "workload"]
