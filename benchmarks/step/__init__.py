"""The ops ``step`` and ``evaluation``: what a router costs beside what deployed ones do, by what is read of it."""

from benchmarks.step import deployed, readings, workload

__all__ = ["deployed", "readings", "workload"]
