"""Timings as data: every op's providers side by side in one process, written as rows.

``python -m benchmarks --help`` for the options. An *op* is a workload: it makes cases and knows their truth.
A *provider* is one way to do the op. To add either, write a module, register in it with the decorators of
``benchmarks.registry``, and name it in ``benchmarks.registry.MODULES``.
"""
