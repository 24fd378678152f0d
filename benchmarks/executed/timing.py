"""Time the layers of a way side by side, and make rows of it.

A round runs every layer once, in an order that rotates, so that drift of the machine touches all alike. With several
processes all of them run the same rounds.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.executed.settings import Layer, Setting
from benchmarks.measure import Clock, clock_for, quiet
from benchmarks.registry import BOTH, FORWARD, PASSES
from benchmarks.rows import Row, environment

WARM_UP = 2
# How far the executed mean may be from the one that was asked for: steering is exact up to single tokens.
TOLERANCE = 0.02


def run_way(
    stack: Any, name: str, way: str, settings: Sequence[Setting], *, repeats: int = 10, threads: int = 1
) -> list[Row]:
    """Rows of one way of a stack: for every setting that it has, one per pass; ratios refer to the first.

    Raises:
        UnavailableError: the way cannot run here.
        RuntimeError: a layer executed another number of experts than its setting asks for.
    """
    built = [(setting, stack.build(way, setting)) for setting in settings]
    cases, layers = zip(*((setting, layer) for setting, layer in built if layer is not None), strict=True)
    hidden = settings[0].hidden
    clock = clock_for(hidden.device, threads)
    upstream = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    common = {**environment(hidden.device), **_versions(stack.PACKAGES)}
    common |= {"threads": threads, "repeats": repeats, "clock": clock.name, "processes": _processes()}
    found: list[Row] = []
    with quiet(threads):
        for name_of_pass in PASSES:
            samples, executed = _timed(layers, hidden, upstream, name_of_pass, clock, repeats)
            for setting, times, count in zip(cases, samples, executed, strict=True):
                _check(name, way, setting, count)
                row = {"op": "executed", "stack": name, "way": way, **_described(setting), "executed": count}
                found.append({**row, "pass": name_of_pass, **_timings(times, samples[0]), **common})
    return found


def _timed(
    layers: Sequence[Layer], hidden: Tensor, upstream: Tensor, name_of_pass: str, clock: Clock, repeats: int
) -> tuple[list[list[float]], list[float]]:
    """Milliseconds of every layer and round, and the mean number of experts that every layer executed."""
    for layer in layers:
        layer.module.train(name_of_pass == BOTH)
        for _ in range(WARM_UP):
            _run(layer, hidden, upstream, name_of_pass)
    samples: list[list[float]] = [[] for _ in layers]
    for turn in range(repeats):
        order = range(len(layers))
        for index in [*order[turn % len(layers) :], *order[: turn % len(layers)]]:
            start = clock.mark()
            _run(layers[index], hidden, upstream, name_of_pass)
            samples[index].append(clock.mark() - start)
    return _slowest(samples), [layer.executed() for layer in layers]


def _run(layer: Layer, hidden: Tensor, upstream: Tensor, name_of_pass: str) -> None:
    """One pass; with backward, gradients of all parameters and of the input, as in training."""
    if name_of_pass == FORWARD:
        with torch.no_grad():
            layer.run(hidden)
        return
    layer.module.zero_grad(set_to_none=True)
    layer.run(hidden.clone().requires_grad_()).backward(upstream)


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _slowest(samples: list[list[float]]) -> list[list[float]]:
    """Of every round, the time of the process that took longest: the others wait for it."""
    if _processes() == 1:
        return samples
    together = torch.tensor(samples, dtype=torch.float64)
    dist.all_reduce(together, dist.ReduceOp.MAX)
    return together.tolist()


def _check(name: str, way: str, setting: Setting, executed: float) -> None:
    wanted = setting.sizes.k if setting.asked is None else setting.asked
    if abs(executed - wanted) > max(TOLERANCE, 1 / setting.sizes.tokens):
        raise RuntimeError(
            f"{name}, {way}: {executed} experts per token were executed where {wanted} were asked for: let the layer "
            "route with setting.priced_router under setting.constraint, with decide='mode'"
        )


def _described(setting: Setting) -> Row:
    sizes = setting.sizes
    case = {"T": sizes.tokens, "n": sizes.experts, "k": sizes.k, "hidden": sizes.hidden, "inner": sizes.inner}
    return {**case, "asked": setting.asked, "padded": setting.padded}


def _timings(times: list[float], fixed: list[float]) -> Row:
    """In milliseconds, and as ratios to the fixed top-k of the same round."""
    p20, median, p80 = np.percentile(times, [20, 50, 80]).tolist()
    low, ratio, high = np.percentile(np.divide(times, fixed), [20, 50, 80]).tolist()
    ratios = {"ratio_to_fixed": ratio, "ratio_p20": low, "ratio_p80": high}
    return {"median_ms": median, "p20_ms": p20, "p80_ms": p80, **ratios}


def _versions(packages: Sequence[str]) -> Row:
    return {package: str(getattr(sys.modules[package], "__version__", "unknown")) for package in packages}
