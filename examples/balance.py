"""How many steps each controller of the load takes, and how much it swings once it is there: a table, and rows of JSON.

    python examples/balance.py --seeds 3 --rows rows.jsonl

Every step has a new batch of T tokens from a router whose logits prefer some experts: normal, plus a preference
per expert that is normal times ``--skew``. Max violation, (largest load - mean load) / mean load, is that of a batch's
modes, before the controller has seen it. It has settled where no mean of ``WINDOW`` later steps in a row is above 0.1.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

import circuitroute as cr

E, K = 16, 2
GOAL, WINDOW = 0.1, 5


def controllers() -> dict[str, Any]:
    """By name, with what is said of them."""
    return {
        "none": None,
        "LossFree, step 1e-3": cr.balance.LossFree(E, 1e-3),
        "LossFree, step 1e-2": cr.balance.LossFree(E, 1e-2),
        "LossFree, step 1e-1": cr.balance.LossFree(E, 1e-1),
        "Quantile": cr.balance.Quantile(E),
        "Quantile, rate 0.5": cr.balance.Quantile(E, rate=0.5),
        "ExactBalance, T = 1": cr.balance.ExactBalance(E, temperature=1.0),
        "ExactBalance, T = 0.25": cr.balance.ExactBalance(E, temperature=0.25),
        "ExactBalance, T = 0.25, 1 step": cr.balance.ExactBalance(E, temperature=0.25, steps=1),
        "ExactBalance, T = 0.05": cr.balance.ExactBalance(E, temperature=0.05),
    }


def run(name: str, seed: int, tokens: int, skew: float, steps: int) -> dict[str, Any]:
    """One controller on one stream of batches."""
    controller, circuit = controllers()[name], cr.compile(cr.Exactly(K), E)
    generator = torch.Generator().manual_seed(seed)
    preference = skew * torch.randn(E, generator=generator)
    state = None if controller is None else controller.init()
    violations, seconds = [], 0.0
    for _ in range(steps):
        logits = torch.randn(tokens, E, generator=generator) + preference
        routing = cr.route(logits, circuit, training=False, bias=None if state is None else state.bias)
        violations.append(cr.metrics.max_violation(routing))
        began = time.process_time()
        state = None if controller is None else controller.update(state, routing)
        seconds += time.process_time() - began
    means = [fmean(violations[i : i + WINDOW]) for i in range(len(violations) - WINDOW + 1)]
    settled = next((i for i in range(len(means)) if max(means[i:]) < GOAL), None)
    late = violations[len(violations) // 2 :]
    return {
        "controller": name,
        "seed": seed,
        "tokens": tokens,
        "skew": skew,
        "steps": steps,
        "first": violations[0],
        "settled": settled,
        "late": fmean(late),
        "swing": stdev(late),
        "milliseconds": 1000 * seconds / steps,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown: mean ± standard deviation over the seeds."""
    lines = [
        f"| controller | steps until max violation < {GOAL} | max violation, later half | its swing | ms per update |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name in dict.fromkeys(row["controller"] for row in rows):
        own = [row for row in rows if row["controller"] == name]
        settled = [row["settled"] for row in own if row["settled"] is not None]
        steps = _spread(settled, ".0f") if len(settled) == len(own) else f"never in {own[0]['steps']}"
        late = [_spread([row[key] for row in own], ".3f") for key in ("late", "swing")]
        lines.append(f"| {name} | {steps} | {' | '.join(late)} | {fmean(row['milliseconds'] for row in own):.1f} |")
    return "\n".join(lines)


def _spread(values: list[float], form: str) -> str:
    return format(fmean(values), form) + (f" ± {format(stdev(values), form)}" if len(values) > 1 else "")


def main() -> None:
    """Measures, prints, and keeps the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--skew", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--slow-steps", type=int, default=400, help="of LossFree")
    parser.add_argument("--rows", type=Path, help="a file of JSON lines to write")
    options = parser.parse_args()
    rows = []
    for name in controllers():
        steps = options.slow_steps if name.startswith("LossFree") else options.steps
        rows += [run(name, seed, options.tokens, options.skew, steps) for seed in range(options.seeds)]
    print(table(rows))
    if options.rows is not None:
        options.rows.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
