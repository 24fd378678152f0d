"""The engine ``triton`` on a GPU: right first, then fast, then where the time goes. The parts of ``benchmarks/gpu.sh``.

``python -m benchmarks.triton_check smoke 21:17:33 --out results`` runs one part, and appends what it finds as it finds
it to ``rows.jsonl`` and ``summary.txt`` in that folder:

* machine: what there is;
* smoke: a small ragged shape n:k:T, or rows of a kind (``evidence``, ``memory``, ``lost``, ``doubt``);
* wide: n:k or n:lo-k over logits of all scales, at many tokens;
* time: the calls of a step, if every check of the size in ``rows.jsonl`` was right;
* profile: tables of the kernels of a step.

With ``--device cpu`` and ``TRITON_INTERPRET=1`` all of it runs on few tokens under the interpreter, for tests.
Shapes: T tokens, n variables, counts lo..k, J = k + 1.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import circuitroute as cr
from benchmarks import triton_step
from benchmarks.rows import append, environment
from circuitroute.engines.subset import NaiveSubset, TritonSubset
from circuitroute.engines.subset.triton import engine as fused

# What float32 is held to.
BOUNDS = {"marginals": 1e-6, "count_probs": 2e-6, "log_partition": 1e-5, "gradient": 1e-5, "gradient_v": 2e-5}
START = time.perf_counter()


class Report:
    """Where findings go, and where they are made."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device = folder, device
        self.on_gpu = device.type == "cuda"

    def tell(self, text: str, **row: Any) -> None:
        """A line for people, and the row."""
        line = f"{time.perf_counter() - START:6.1f} s  {text}"
        print(line, flush=True)
        with (self.folder / "summary.txt").open("a") as file:
            file.write(line + "\n")
        append(self.folder / "rows.jsonl", [{"op": "subset-kernels", **row, **environment(self.device)}])

    def found_right(self, n: int, lo: int, k: int) -> bool:
        """Whether a size was checked, and never found wrong."""
        path = self.folder / "rows.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        mine = [row["right"] for row in rows if row.get("size") == [n, lo, k] and "right" in row]
        return bool(mine) and all(mine)


# ---------------------------------------------------------------------------------------------- right


def potential(counts: Sequence[int], J: int, device: torch.device) -> Tensor:
    """[J], 0 for what is allowed."""
    phi = torch.full((J,), -math.inf)
    phi[list(counts)] = 0.0
    return phi.to(device)


def spread(T: int, n: int, device: torch.device, scales: tuple[float, float] = (-1.0, 4.0)) -> Tensor:
    """[T, n] logits, of scales 10^a to 10^b."""
    x = torch.randn(T, n, generator=torch.Generator().manual_seed(n)) * torch.logspace(*scales, T)[:, None]
    return x.to(device)


def poison(*like: Tensor) -> None:
    """Leave no zeros in the memory that the next allocations get: an output that is not written shows.

    On the CPU the allocator hands memory on in the same way, though it does not promise to.
    """
    held = [torch.full((3 * t.numel(),), math.nan, device=t.device) for t in like]
    del held


def check(report: Report, title: str, x: Tensor, phi: Tensor, on_cpu: bool = False, **about: Any) -> bool:
    """All results against the naive engine in float64, twice, bit for bit the same; returns whether right."""
    key = cr.random_key(1, torch.arange(len(x), device=x.device))
    g = torch.Generator().manual_seed(5)
    u, v = (torch.randn(len(x), width, generator=g).to(x.device) for width in (x.shape[1], len(phi)))
    found, slopes = _run_poisoned(x, phi, key, u, v)
    again, slopes_again = _run_poisoned(x, phi, key, u, v)
    truth = _truth(*(t.cpu() if on_cpu else t for t in (x, phi, key, u, v)))
    results = {**{name: getattr(found, name) for name in ("marginals", "count_probs", "log_partition")}, **slopes}
    nothing = truth["log_partition"].isnan().to(x.device)
    errors = {}
    for name in BOUNDS:
        expected, scale = truth[name].to(x.device), 1.0
        if name == "log_partition":
            scale = expected.abs().clamp(min=1)
        off = ((results[name] - expected) / scale).abs()[~nothing]
        errors[name] = float(off.amax()) if off.numel() else 0.0
    wrong = [name for name, bound in BOUNDS.items() if not errors[name] <= bound]
    alone = engine_for(phi).sample(x, phi, key)
    drawn = truth["mask"].to(x.device)
    wrong += [name for name, mask in (("mask", found.mask), ("sample alone", alone)) if (mask != drawn).any()]
    wrong += [] if torch.equal(found.log_partition.isnan(), nothing) else ["NaN rows"]
    pairs = [(found.marginals, again.marginals), (found.mask, again.mask), (found.log_partition, again.log_partition)]
    pairs += [(slopes[name], slopes_again[name]) for name in slopes]
    wrong += [] if all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in pairs) else ["unsteady"]
    poison(x, x, u, v, key)
    of_step, wrong_step = triton_step.judge(engine_for(phi), x, phi, key)
    errors, wrong = errors | of_step, wrong + wrong_step
    shown = " ".join(f"{name} {error:.1e}" for name, error in errors.items())
    listed = int(found.length) if isinstance(found, fused.Sweep) and found.length is not None else 0
    verdict = f"WRONG ({', '.join(wrong)})" if wrong else "right"
    errors = {f"{name}_error": error for name, error in errors.items()}
    report.tell(
        f"{verdict} {title}: {shown}, {listed} of {len(x)} rows swept again",
        part="check",
        title=title,
        right=not wrong,
        wrong=wrong,
        rows_swept_again=listed,
        **errors,
        **about,
    )
    return not wrong


def engine_for(phi: Tensor) -> TritonSubset:
    """The engine that circuits with this potential have: one of its own where the largest count is allowed alone."""
    return TritonSubset(exact=phi.dim() == 1 and bool((phi[:-1] == -math.inf).all()))


def _run_poisoned(x: Tensor, phi: Tensor, key: Tensor, u: Tensor, v: Tensor) -> tuple[Any, dict[str, Tensor]]:
    engine = engine_for(phi)
    poison(x, x, u, v, key)
    found = engine.infer(x, phi, key)
    poison(x, x, u, v, key)
    by_u, by_both = (engine.second_derivative(x, phi, found, u, w)[0] for w in (None, v))
    return found, {"gradient": by_u, "gradient_v": by_both}


def _truth(x: Tensor, phi: Tensor, key: Tensor, u: Tensor, v: Tensor) -> dict[str, Tensor]:
    exact = x.double().requires_grad_()
    log_partition, m, q = NaiveSubset().moments(exact, phi.double())
    (by_u,) = torch.autograd.grad(m, exact, u.double(), retain_graph=True)
    (by_both,) = torch.autograd.grad([m, q], exact, [u.double(), v.double()])
    found = {"marginals": m, "count_probs": q, "log_partition": log_partition, "gradient": by_u, "gradient_v": by_both}
    found["mask"] = NaiveSubset().sample(x, phi, key)
    return {name: tensor.detach() for name, tensor in found.items()}


def smoke(report: Report, group: str) -> bool:
    """Every kernel and flag on a small ragged shape, or on rows of a kind, against the CPU."""
    device, few = report.device, not report.on_gpu
    if ":" in group:
        n, k, T = map(int, group.split(":"))
        x, phi = spread(min(T, 3) if few else T, n, device), potential([k], k + 1, device)
        return check(report, f"smoke {group}", x, phi, on_cpu=True)
    x, phi = spread(3 if few else 33, 8, device, (0.0, 0.0)), potential([3], 4, device)
    if group == "evidence":
        x[0, :4], x[1, :6], x[2, 0] = math.inf, -math.inf, math.inf
    elif group == "memory":
        fused.MAX_LANES_COUNT = -1
    elif group == "lost":  # coefficients that float32 loses
        rows = torch.tensor([[90.0, 60.0, -70.0, -80.5], [0.3, -0.2, 1.0, 0.0]])
        x, phi = rows.repeat(17, 1)[: len(x)].to(device), potential([0, 4], 5, device)
    elif group == "doubt":  # draws that float32 cannot decide
        x = spread(64 if few else 4000, 8, device, (0.0, 0.0))
    else:
        raise ValueError(f"smoke {group}: expected n:k:T, evidence, memory, lost or doubt")
    return check(report, f"smoke {group}", x, phi, on_cpu=True)


def wide(report: Report, n: int, lo: int, k: int) -> bool:
    """All scales, then ordinary logits."""
    T = (2048 if n * k <= 32768 else 64) if report.on_gpu else 4
    phi, title = potential(range(lo, k + 1), k + 1, report.device), f"wide n={n} counts={lo}..{k} T={T}"
    right = check(report, title, spread(T, n, report.device), phi, size=[n, lo, k])
    return check(report, f"{title}, ordinary", spread(T, n, report.device, (0.0, 0.0)), phi, size=[n, lo, k]) and right


# ---------------------------------------------------------------------------------------------- fast


def calls_of(n: int, lo: int, k: int, T: int, device: torch.device) -> dict[str, Callable[[Tensor], Callable[[], Any]]]:
    """What is timed: for each name, the call on some logits."""
    phi, key = potential(range(lo, k + 1), k + 1, device), cr.random_key(1, torch.arange(T, device=device))
    engine, circuit = engine_for(phi), cr.compile(cr.Between(lo, k), n).with_engine("triton")
    up = torch.randn(T, n, device=device)
    known = engine.infer(up, phi, key)

    def topk(x: Tensor) -> Tensor:
        chosen = x.topk(k, -1).indices
        return torch.zeros_like(x).scatter(-1, chosen, torch.softmax(x, -1).gather(-1, chosen))

    def route(x: Tensor) -> Tensor:
        return cr.route(x, circuit, key=key, validate_args=False).gates

    def step(f: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Any]:
        leaf = x.detach().requires_grad_()
        return lambda: torch.autograd.grad(f(leaf), leaf, up)

    return {
        "copy": lambda x: x.clone,
        "forward": lambda x: lambda: engine.infer(x, phi),
        "forward_and_sample": lambda x: lambda: engine.infer(x, phi, key),
        "sample": lambda x: lambda: engine.sample(x, phi, key),
        "backward": lambda x: lambda: engine.second_derivative(x, phi, known, up, None),
        "topk": lambda x: lambda: topk(x),
        "topk_step": lambda x: step(topk, x),
        "route": lambda x: lambda: route(x),
        "route_step": lambda x: step(route, x),
    }


def time_of(calls: Sequence[Callable[[], Any]], on_gpu: bool) -> float:
    """Median microseconds of a call in a replayed graph of them all; their inputs differ, so caches do not help."""
    if not on_gpu:
        calls[0]()
        start = time.perf_counter()
        calls[0]()
        return 1e6 * (time.perf_counter() - start)
    graph, side, times = torch.cuda.CUDAGraph(), torch.cuda.Stream(), []
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls[0]()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")  # a call that waits is a fault
    try:
        with torch.cuda.stream(side):
            calls[0]()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(20):
        start_event, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * start_event.elapsed_time(end) / len(calls))
    return sorted(times)[len(times) // 2]


def timed(report: Report, n: int, lo: int, k: int) -> bool:
    """A row per call; one that fails costs no other."""
    if not report.found_right(n, lo, k):
        report.tell(f"({n}, {lo}..{k}) was not found right: not timed", part="time", size=[n, lo, k], timed=False)
        return False
    fine = True
    for T in (4096, 65536) if report.on_gpu else (4,):
        ring = max(2, min(16, 2**28 // (4 * T * n))) if report.on_gpu else 1
        inputs = [torch.randn(T, n, device=report.device) for _ in range(ring)]
        for name, make in calls_of(n, lo, k, T, report.device).items():
            row = {"part": "time", "size": [n, lo, k], "T": T, "call": name}
            try:
                us = time_of([make(x) for x in inputs], report.on_gpu)
            except Exception as error:
                fine = False
                report.tell(f"FAILED {name} ({n}, {lo}..{k}) T={T}: {type(error).__name__} {str(error)[:200]}", **row)
                if "CUDA error" in str(error):  # nothing works after it
                    raise
                continue
            report.tell(f"({n}, {lo}..{k}) T={T} {name:20s} {us:9.1f} us", **row, graph_us=us)
    return fine


def profile(report: Report, n: int, lo: int, k: int) -> bool:
    """Tables of the kernels that each call launches, into ``profile.txt``."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    x = torch.randn(4096 if report.on_gpu else 4, n, device=report.device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if report.on_gpu else [])]
    for name, make in calls_of(n, lo, k, len(x), report.device).items():
        if name in ("route_step", "topk_step"):
            call = make(x)
            call()
            with profiled(activities=activities) as seen:
                call()
            table = seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=60)
            with (report.folder / "profile.txt").open("a") as file:
                file.write(f"{name}, n={n}, counts {lo}..{k}, T={len(x)}\n{table}\n")
    return True


def machine(report: Report) -> bool:
    """What there is."""
    import triton

    about = str(torch.cuda.get_device_properties(report.device)) if report.on_gpu else "interpreted"
    report.tell(f"torch {torch.__version__}, triton {triton.__version__}, {about}", part="machine")
    return True


# ---------------------------------------------------------------------------------------------- command line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one part; returns 1 if something is wrong."""
    options = _parser().parse_args(arguments)
    report = Report(options.out, torch.device(options.device))
    if options.part == "machine":
        fine = machine(report)
    elif options.part == "smoke":
        fine = smoke(report, options.what)
    else:
        fine = {"wide": wide, "time": timed, "profile": profile}[options.part](report, *_size(options.what))
    return int(not fine)


def _size(text: str) -> tuple[int, int, int]:
    """n:k or n:lo-k."""
    n, counts = text.split(":")
    lo, _, k = counts.rpartition("-")
    return int(n), int(lo or k), int(k)


def _parser() -> argparse.ArgumentParser:
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.triton_check", description=about)
    parser.add_argument("part", choices=("machine", "smoke", "wide", "time", "profile"))
    parser.add_argument("what", nargs="?", default="64:8", help="the shape or the kind of rows (default: 64:8)")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu under the interpreter (default: cuda)")
    parser.add_argument("--out", type=Path, required=True, help="the folder to append to")
    return parser


if __name__ == "__main__":
    sys.exit(main())
