"""What patching costs: a mixture-of-experts layer of transformers, patched over stock, forward and backward.

``python -m benchmarks.transformers_layer`` times an OLMoE layer as transformers has it and under circuitroute, side by
side in one process, and appends rows with their ratios to benchmarks/rows/cpu-transformers.jsonl. Gradients are those
of all parameters and of the input, as in training. Needs transformers.

Shapes: T tokens.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

import circuitroute as cr
from benchmarks import rows
from benchmarks.measure import MIB, clock_for, peak_mib, quiet
from circuitroute.integrations import transformers as adapter
from circuitroute.integrations.transformers.handle import patched_routers

OUT = Path(__file__).parent / "rows" / "cpu-transformers.jsonl"
STOCK = "stock"


def layer(options: argparse.Namespace, constraint: cr.Constraint | None) -> torch.nn.Module:
    """The block of router and experts, stock where there is no constraint; the same weights each time."""
    import transformers

    config = transformers.OlmoeConfig(
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=options.experts,
        num_experts_per_tok=options.k,
        vocab_size=256,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = transformers.OlmoeForCausalLM(config).train()
    block = model.model.layers[0].mlp
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(std=options.hidden**-0.5)
    if constraint is not None:
        adapter.patch(model, constraint, seed=0)
    block.owner = (model,)  # in a tuple, so that it is no part of the block
    return block


def executed(block: Any, options: argparse.Namespace) -> float:
    """Experts per token in the last pass."""
    (model,) = block.owner
    if next(patched_routers(model), None) is None:
        return float(options.k)
    (routing,) = adapter.get_handle(model).routings
    return cr.metrics.active_experts(routing)


def step(block: torch.nn.Module, hidden: torch.Tensor) -> Callable[[], None]:
    """One forward and backward pass."""

    def run() -> None:
        block.zero_grad()
        leaf = hidden.clone().requires_grad_()
        block(leaf).square().mean().backward()

    return run


def measure(options: argparse.Namespace) -> list[rows.Row]:
    """Rows of the stock layer and of the patched ones, timed in turns."""
    constraints = {STOCK: None, "exact": cr.Exactly(options.k), "range": cr.Between(options.k // 2, options.k)}
    hidden = torch.randn(1, options.tokens, options.hidden, generator=torch.Generator().manual_seed(1))
    blocks = {name: layer(options, constraint) for name, constraint in constraints.items()}
    runs = {name: step(block, hidden) for name, block in blocks.items()}
    clock = clock_for(hidden.device, options.threads)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    with quiet(options.threads):
        for run in runs.values():
            run()
            run()
        for turn in range(options.repeats):
            names = list(runs)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                start = clock.mark()
                runs[name]()
                samples[name].append(clock.mark() - start)
        peaks = {name: peak_mib(run, hidden.device) for name, run in runs.items()}
        allocated = {name: allocated_mib(run) for name, run in runs.items()}
    common = {**rows.environment(hidden.device), "threads": options.threads, "repeats": options.repeats}
    common |= {"clock": clock.name, "transformers": sys.modules["transformers"].__version__}
    return [
        row(options, name, samples, allocated)
        | {"peak_mib": peaks[name]}
        | {"executed": executed(blocks[name], options)}
        | common
        for name in runs
    ]


def allocated_mib(run: Callable[[], None]) -> float:
    """Peak of what torch's allocator gave out in a run, in MiB: exact, where resident memory is a matter of luck too.

    Memory that is not torch's (a compiled engine's scratch space) is not in it; that shows in ``peak_mib``.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    results = profiler.profiler.kineto_results
    changes = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    return float(np.cumsum([size for _, size in changes]).max()) / MIB


def row(
    options: argparse.Namespace, name: str, samples: dict[str, list[float]], allocated: dict[str, float]
) -> rows.Row:
    """The row of one way to route; ratios are medians over those of the stock layer."""
    p20, median, p80 = np.percentile(samples[name], [20, 50, 80]).tolist()
    sizes: dict[str, Any] = {"T": options.tokens, "n": options.experts, "k": options.k, "hidden": options.hidden}
    return {
        "op": "transformers-layer",
        "provider": name,
        **sizes,
        "intermediate": options.intermediate,
        "pass": "forward+backward",
        "median_ms": median,
        "p20_ms": p20,
        "p80_ms": p80,
        "ratio_to_stock": median / float(np.median(samples[STOCK])),
        "allocated_mib": allocated[name],
        "allocated_to_stock": allocated[name] / allocated[STOCK],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, append, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transformers_layer")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    measured = measure(options)
    rows.append(options.out, measured)
    for line in measured:
        time = f"{line['median_ms']:>8.1f} ms ({line['ratio_to_stock']:.3f})"
        memory = f"{line['allocated_mib']:.1f} MiB ({line['allocated_to_stock']:.3f})"
        print(f"{line['provider']:<8} {line['executed']:.2f} experts/token {time} {memory}")
    print(f"rows appended to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
