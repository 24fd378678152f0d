"""The op ``budget``: the routers of all layers of a model for one batch, with and without a budget over the layers."""

from benchmarks.budget import routers, workload

__all__ = ["routers", "workload"]
