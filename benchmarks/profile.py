"""``python -m benchmarks.profile``: what the time of a routing step goes to, by engine.

Legend: T tokens, N variables, J = K + 1 counts.

Of the engine ``numba``, whose kernels are one loop each, the stages are timed as prefixes: kernels that stop after
reading, after the shift, after the tree, ... on the same rows, one thread, process CPU time, rounds interleaved; a
stage's share is the difference of two prefixes. The prefixes are built from the functions that the engine's own kernel
is built from. Of the engine ``torch`` it is torch's profiler, by operator.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch

import circuitroute as cr
from benchmarks import rows
from benchmarks.measure import ProcessClock, quiet
from circuitroute.engines import engine_of
from circuitroute.engines.step import Inputs, Rule, Upstream
from circuitroute.engines.subset.numba import coins, root, sampling, shift, tree
from circuitroute.engines.subset.numba.engine import _shape
from circuitroute.engines.subset.numba.simd import lanes
from circuitroute.engines.subset.numba.simd.lanes import WIDTH
from circuitroute.engines.subset.numba.simd.rows import read, write

ROWS = Path(__file__).parent / "rows" / "cpu-profile.jsonl"
STAGES = ("read and transpose", "shift", "tree up", "weigh the root", "sample")
LIMITS = (1e-25, 20.0, 3e-6)  # what is decided by them costs the same whatever they are


@numba.njit(nogil=True, error_model="numpy")
def _prefix(stages, shape, logits_TN, phi_PJ, key_T, mask_TN):  # type: ignore[no-untyped-def]
    """The engine's loop over blocks of tokens, up to a stage; returns a number that depends on all it did."""
    T, n = logits_TN.shape
    J = phi_PJ.shape[1]
    kind = logits_TN.dtype
    nodes, x, present = np.empty(tree.size(shape) * WIDTH, kind), np.empty(n * WIDTH, kind), np.empty(n * WIDTH, kind)
    spare, aim = np.empty((shape[-1, 2] + 2) * WIDTH, kind), np.empty(3 * WIDTH, kind)
    phi, adjoint, probs = np.empty(J * WIDTH), np.empty(J * WIDTH), np.empty(J * WIDTH)
    counts, words, line = np.empty(shape[0, 1] * WIDTH, np.int32), np.empty(2 * WIDTH, np.int32), np.empty(WIDTH)
    read(phi_PJ, 0, 0, phi)
    shift.fill_aim(phi_PJ, 0, 0, aim)
    total = 0.0
    for first in range(0, T, WIDTH):
        last = T - 1
        read(logits_TN, first, last, x)
        total += x[0]
        if stages > 1:
            evidence = shift.find_evidence(x, n)
            high, low, _ = shift.solve_shift(x, n, evidence, aim, nodes, present)
            s = lanes.as_double(high) + lanes.as_double(low)
            normaliser, _ = coins.log_normaliser(x, n, s, nodes, line)
            total += nodes[0]
            if stages > 2:
                tree.up(nodes, shape, n)
                total += nodes[tree.root(shape)[0]]
                if stages > 3:
                    forced = lanes.as_double(evidence[0])
                    log_root, _ = root.weigh(nodes, shape, phi, s, forced, LIMITS, adjoint, probs, line)
                    lanes.store(line, 0, log_root + normaliser)
                    total += line[0]
                    if stages > 4:
                        sampling.draw(nodes, shape, probs, key_T, first, last, LIMITS[2], counts, words, spare)
                        write(counts, first, last, mask_TN)
    return total


def main(arguments: list[str] | None = None) -> int:
    """Profile the sizes that the command line asks for; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", default="64:8,256:8", help="n:k,n:k,... (default: 64:8,256:8)")
    parser.add_argument("--tokens", type=int, default=4096, help="rows T (default: 4096)")
    parser.add_argument("--repeats", type=int, default=40, help="timed rounds (default: 40)")
    parser.add_argument("--out", type=Path, default=ROWS, help="the JSONL file to append to")
    options = parser.parse_args(arguments)
    for text in options.sizes.split(","):
        n, k = map(int, text.split(":"))
        with quiet(1):
            found = [*numba_stages(options.tokens, n, k, options.repeats), *torch_operators(options.tokens, n, k)]
        common = {"op": "profile", "T": options.tokens, "n": n, "k": k, **rows.environment(torch.device("cpu"))}
        rows.append(options.out, [row | common for row in found])
        for row in found:
            print(f"{n:5}:{k:<3} {row['engine']:6} {row['stage']:42} {row['median_ms']:8.3f} ms {row['share']:6.1%}")
    return 0


def numba_stages(T: int, n: int, k: int, repeats: int) -> list[rows.Row]:
    """Milliseconds and share of each stage of one routing step that is read for its gates and marginals."""
    logits = torch.randn(T, n, generator=torch.Generator().manual_seed(0))
    circuit = cr.compile(cr.Exactly(k), n).with_engine("numba")
    key, upstream = cr.random_key(0, torch.arange(T)), torch.randn(T, n)
    phi = torch.full((1, k + 1), -torch.inf, dtype=torch.float64)
    phi[0, k] = 0.0
    arrays = (_shape(n, k), logits.numpy(), phi.numpy(), key.numpy(), np.empty((T, n), np.bool_))
    engine: Any = engine_of(circuit, logits.device)
    inputs, rule = Inputs(logits, logits, 1.0, phi[0].float(), key), Rule("softmax", 1.0, True)
    taken, arrived = engine.step(inputs, rule, True), Upstream(gates=upstream, marginals=upstream)
    marginals = torch.empty_like(logits)

    def step() -> None:
        leaf = logits.clone().requires_grad_()
        routing = cr.route(leaf, circuit, key=key)
        torch.autograd.grad((routing.gates, routing.marginals), leaf, (upstream, upstream))

    runs: dict[str, Callable[[], object]] = {
        name: lambda stage=stage: _prefix(stage + 1, *arrays) for stage, name in enumerate(STAGES)
    }
    runs["forward"] = lambda: engine.step(inputs, rule, True)
    runs["marginals, when they are read"] = lambda: engine.step_marginals(inputs, taken, marginals)
    runs["the way back"] = lambda: engine.step_gradient(inputs, rule, taken, arrived)
    runs["whole step"] = step
    medians = _interleaved(runs, repeats)
    prefixes = [medians[name] for name in STAGES]
    parts = dict(zip(STAGES, np.diff([0.0, *prefixes]).tolist(), strict=True))
    parts["weights, slots, log p, doubtful rows"] = medians["forward"] - prefixes[-1]
    for name in ("marginals, when they are read", "the way back"):
        parts[name] = medians[name]
    parts["gates, autograd, checks, in torch"] = medians["whole step"] - sum(parts.values())
    whole = medians["whole step"]
    return [
        {"engine": "numba", "stage": name, "median_ms": value, "share": value / whole} for name, value in parts.items()
    ]


def _interleaved(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each."""
    clock, taken = ProcessClock(), {name: [] for name in runs}  # type: ignore[var-annotated]
    for round_number in range(repeats + 2):
        for name, run in runs.items():
            start = clock.mark()
            run()
            if round_number > 1:  # the first ones compile and warm up
                taken[name].append(clock.mark() - start)
    return {name: float(np.median(values)) for name, values in taken.items()}


def torch_operators(T: int, n: int, k: int, steps: int = 10, most: int = 8) -> list[rows.Row]:
    """Milliseconds per step and share of the operators that take the most time, on the engine ``torch``."""
    from torch.profiler import ProfilerActivity, profile

    circuit = cr.compile(cr.Exactly(k), n).with_engine("torch")
    logits, upstream, key = torch.randn(T, n), torch.randn(T, n), cr.random_key(0, torch.arange(T))
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            leaf = logits.clone().requires_grad_()
            torch.autograd.grad(cr.route(leaf, circuit, key=key).gates, leaf, upstream)
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    whole = sum(event.self_cpu_time_total for event in events)
    rest = sum(event.self_cpu_time_total for event in events[most:])
    parts = [(event.key, event.self_cpu_time_total) for event in events[:most]] + [("all others", rest)]
    return [
        {"engine": "torch", "stage": name, "median_ms": us / 1e3 / steps, "share": us / whole} for name, us in parts
    ]


if __name__ == "__main__":
    sys.exit(main())
