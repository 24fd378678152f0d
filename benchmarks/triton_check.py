"""The engine ``triton`` on a GPU: right first, then free of waiting, then fast. What ``benchmarks/gpu.sh`` runs.

``python -m benchmarks.triton_check --sizes 64:8 --out rows.jsonl`` compares marginals, log Z, samples and gradients
with the naive engine, makes sure that no call waits for the GPU and that sweeps can be captured in a CUDA graph, and
writes a row of times per call, of replayed graphs, so that launching does not count. On a CPU (``--device cpu``, with
``TRITON_INTERPRET=1``) it compares only.

Shapes: T tokens, N variables, J = K + 1 counts.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import circuitroute as cr
from benchmarks.rows import Row, append, environment
from circuitroute.engines.subset import NaiveSubset, TritonSubset

# What float32 is held to.
BOUNDS = {"marginals": 1e-6, "log_partition": 1e-5, "gradient": 1e-5}
CHECKED_TOKENS = 2048


def main(arguments: Sequence[str] | None = None) -> int:
    """Check and time the sizes of the command line; returns 1 if any is wrong."""
    options = _parser().parse_args(arguments)
    device = torch.device(options.device)
    wrong = 0
    for n, k in options.sizes:
        errors = check(n, k, min(options.tokens, CHECKED_TOKENS), device)
        row = {"op": "subset-kernels", "n": n, "k": k, "T": options.tokens, **errors, **environment(device)}
        failed = [name for name, bound in BOUNDS.items() if not errors[f"{name}_error"] <= bound]
        failed += ["samples"] if errors["samples_that_differ"] else []
        wrong += bool(failed)
        print(f"({n}, {k}) {'WRONG: ' + ', '.join(failed) if failed else 'right'} {errors}", flush=True)
        if device.type == "cuda" and not failed:
            calls = calls_of(n, k, options.tokens, device)
            check_waiting(calls)
            row |= {f"{name}_us": time_of(call) for name, call in calls.items()}
            print(f"({n}, {k}) { ({name: value for name, value in row.items() if name.endswith('_us')}) }", flush=True)
            if options.profile:
                profile(calls, options.profile / f"profile-{n}-{k}.txt")
        append(options.out, [row])
    return int(wrong > 0)


def check(n: int, k: int, tokens: int, device: torch.device) -> Row:
    """The largest errors against the naive engine, over logits of all scales."""
    scale = torch.logspace(-1, 4, tokens)[:, None]
    logits = (torch.randn(tokens, n, generator=torch.Generator().manual_seed(n)) * scale).to(device)
    phi, key = exactly(k, device), cr.random_key(1, torch.arange(tokens, device=device))
    upstream = torch.randn(tokens, n, generator=torch.Generator().manual_seed(1)).to(device)
    found = TritonSubset().infer(logits, phi, key)
    slope, _ = TritonSubset().second_derivative(logits, phi, found, upstream, None)
    exact = logits.double().requires_grad_()
    log_partition, marginals, _ = NaiveSubset().moments(exact, phi.double())
    (expected,) = torch.autograd.grad(marginals, exact, upstream.double())
    off = (found.log_partition - log_partition).abs() / log_partition.abs().clamp(min=1)
    drawn = NaiveSubset().sample(logits, phi, key)
    return {
        "marginals_error": _largest(found.marginals - marginals),
        "log_partition_error": _largest(off),
        "gradient_error": _largest(slope - expected),
        "samples_that_differ": int((drawn != found.mask).any(1).sum()),
        "rows_swept_again": int(getattr(found, "count", torch.zeros(1))),
    }


def exactly(k: int, device: torch.device) -> Tensor:
    """The potential [J] that allows the count k alone."""
    phi = torch.full((k + 1,), -math.inf)
    phi[k] = 0.0
    return phi.to(device)


def _largest(difference: Tensor) -> float:
    return float(difference.detach().abs().max())


def calls_of(n: int, k: int, tokens: int, device: torch.device) -> dict[str, Callable[[], Any]]:
    """What is timed: the calls of one routing step, on ordinary logits, and a copy of them for scale."""
    logits, upstream = (torch.randn(tokens, n, device=device) for _ in range(2))
    phi, key = exactly(k, device), cr.random_key(1, torch.arange(tokens, device=device))
    engine = TritonSubset()
    known = engine.infer(logits, phi, key)
    return {
        "forward": lambda: engine.infer(logits, phi),
        "forward_and_sample": lambda: engine.infer(logits, phi, key),
        "sample": lambda: engine.sample(logits, phi, key),
        "backward": lambda: engine.second_derivative(logits, phi, known, upstream, None),
        "copy": logits.clone,
    }


@contextmanager
def _no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_waiting(calls: dict[str, Callable[[], Any]]) -> None:
    """Raise if a call waits for the GPU; the first call of each, which compiles, may."""
    for call in calls.values():
        call()
        torch.cuda.synchronize()
        with _no_waiting():
            call()


def time_of(call: Callable[[], Any]) -> float:
    """Median microseconds of a call replayed from a CUDA graph, ten to the graph."""
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(10):
            call()
    times = []
    for _ in range(30):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(100 * start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def profile(calls: dict[str, Callable[[], Any]], path: Path) -> None:
    """A table of the kernels that each call launches."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for name, call in calls.items():
            with profiled(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
                for _ in range(10):
                    call()
                torch.cuda.synchronize()
            file.write(f"{name}, ten times\n{seen.key_averages().table(sort_by='cuda_time_total', row_limit=12)}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.triton_check", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--sizes", type=_sizes, default=_sizes("64:8,128:8,256:8,512:10"), help="n:k,n:k,...")
    parser.add_argument("--tokens", type=int, default=65536, help="rows T that are timed (default: 65536)")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu under the interpreter (default: cuda)")
    parser.add_argument("--profile", type=Path, help="a folder for tables of kernels")
    parser.add_argument("--out", type=Path, required=True, help="the JSONL file to append to")
    return parser


def _sizes(text: str) -> list[tuple[int, int]]:
    return [(int(n), int(k)) for n, k in (pair.split(":") for pair in text.split(","))]


if __name__ == "__main__":
    sys.exit(main())
