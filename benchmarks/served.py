"""What serving functions cost: the mode, samples and the greedy groups, eagerly and exported.

``python -m benchmarks.served`` times them side by side in one process and appends rows, with their ratios to softmax +
topk, to benchmarks/rows/cpu-served.jsonl. Exported programs run as ``torch.export`` gives them, operator by operator,
uncompiled.

Shapes: T tokens, E experts, K slots.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import circuitroute as cr
from benchmarks import rows
from benchmarks.measure import clock_for, quiet
from circuitroute.integrations import serving

OUT = Path(__file__).parent / "rows" / "cpu-served.jsonl"
TOPK = "softmax + topk"


def functions(options: argparse.Namespace) -> dict[str, serving.ServedFunction]:
    """By name."""
    n, k = options.experts, options.k
    limit = cr.ActiveGroups(cr.Groups(options.groups), at_most=options.active)
    rules = {"exactly": cr.Exactly(k), "range": cr.Between(k // 2, k), "groups": limit & cr.Exactly(k)}
    found: dict[str, serving.ServedFunction] = {
        "greedy groups": serving.greedy_groups(n, k, groups=options.groups, active=options.active)
    }
    for name, rule in rules.items():
        found[f"{name}: mode"] = serving.routing_function(rule, n)
        found[f"{name}: sample"] = serving.routing_function(rule, n, sample=True)
        found[f"{name}: sample, head"] = serving.routing_function(rule, n, sample=True, head=k // 2)
    return found


def runs(options: argparse.Namespace) -> dict[str, Callable[[], Any]]:
    """What is timed: every function, eagerly and exported."""
    logits = torch.randn(options.tokens, options.experts, generator=torch.Generator().manual_seed(0))
    keys = {"seed": torch.full((options.tokens,), 1), "position": torch.arange(options.tokens)}
    given = {"hidden_states": logits, "gating_output": logits, "topk": options.k, "renormalize": True}
    found: dict[str, Callable[[], Any]] = {TOPK: lambda: torch.softmax(logits, -1).topk(options.k, -1)}
    for name, function in functions(options).items():
        arguments = {**given, **(keys if function.keyed else {})}
        program = serving.export(function, topk=options.k, renormalize=True).module()
        for way, run in (("eager", function), ("exported", program)):
            found[f"{name}, {way}"] = lambda run=run, arguments=arguments: run(**arguments)
        for eager, exported in zip(function(**arguments), program(**arguments), strict=True):
            assert torch.equal(eager, exported), f"{name}: the exported program differs"
    return found


def measure(options: argparse.Namespace) -> list[rows.Row]:
    """A row per run, timed in turns."""
    timed = runs(options)
    clock = clock_for(torch.device("cpu"), options.threads)
    samples: dict[str, list[float]] = {name: [] for name in timed}
    with quiet(options.threads):
        for run in timed.values():
            run()
        for _ in range(options.repeats):
            for name, run in timed.items():
                start = clock.mark()
                run()
                samples[name].append(clock.mark() - start)
    common = {"T": options.tokens, "n": options.experts, "k": options.k, "groups": options.groups}
    common |= {"active": options.active, "threads": options.threads, "repeats": options.repeats, "clock": clock.name}
    common |= rows.environment(torch.device("cpu"))
    return [{"op": "served", "provider": name, **_times(samples, name), **common} for name in timed]


def _times(samples: dict[str, list[float]], name: str) -> rows.Row:
    p20, median, p80 = np.percentile(samples[name], [20, 50, 80]).tolist()
    ratio = median / float(np.median(samples[TOPK]))
    return {"pass": "forward", "median_ms": median, "p20_ms": p20, "p80_ms": p80, "ratio_to_topk": ratio}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, append, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.served")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--active", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    measured = measure(options)
    rows.append(options.out, measured)
    for row in measured:
        print(
            "{provider:<32} {median_ms:>8.2f} ms ({p20_ms:.2f} to {p80_ms:.2f})  x topk {ratio_to_topk:.1f}".format(
                **row
            )
        )
    print(f"rows appended to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
