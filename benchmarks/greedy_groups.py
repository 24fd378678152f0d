"""How far DeepSeek's greedy rule of groups is from the best subset that the same limits allow.

``python -m benchmarks.greedy_groups`` routes random tokens by :func:`circuitroute.integrations.serving.greedy_groups`
and by the exact optimum, ``cr.ActiveGroups(cr.Groups(groups), at_most=active) & cr.Exactly(k)``, on the same scores;
prints a table and appends a row per setting and seed to benchmarks/rows/cpu-greedy-groups.jsonl. Nothing is timed.

Logits are normal with standard deviation ``spread``, of whose variance the share ``correlation`` is common to the
experts of a group. Shapes: T tokens, E experts, K chosen ones.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

import circuitroute as cr
from benchmarks import rows
from circuitroute.integrations import serving

OUT = Path(__file__).parent / "rows" / "cpu-greedy-groups.jsonl"
# What experts and groups are scored by: DeepSeek-V3's rule, and V2's group score on the logits.
RULES = {"top2 of sigmoids": ("top2", "sigmoid"), "max of logits": ("max", "logits")}


def logits_of(options: argparse.Namespace, spread: float, correlation: float, seed: int) -> Tensor:
    """[T, E]."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.randn(options.tokens, options.experts, generator=generator)
    common = torch.randn(options.tokens, options.groups, generator=generator)
    common = common.repeat_interleave(options.experts // options.groups, -1)
    return spread * ((1 - correlation) ** 0.5 * own + correlation**0.5 * common)


def compared(greedy: Tensor, best: Tensor, scores: Tensor) -> rows.Row:
    """What the ids [T, K] of the greedy rule lose to the best ones, by scores [T, E]."""
    masks = [torch.zeros_like(scores, dtype=torch.bool).scatter(-1, ids.long(), True) for ids in (greedy, best)]
    found, optimum = (torch.where(mask, scores.double(), 0.0).sum(-1) for mask in masks)
    other = found < optimum  # ties are no difference; in float64 sums of a few float32 scores are exact
    loss = torch.where(other, (optimum - found) / optimum, 0.0)
    changed = (masks[0] & ~masks[1]).sum(-1)
    return {
        "other_subset": other.double().mean().item(),
        "mean_loss": loss.mean().item(),
        "largest_loss": loss.amax().item(),
        "experts_changed": changed[other].double().mean().item() if bool(other.any()) else 0.0,
    }


def measure(options: argparse.Namespace) -> Iterator[rows.Row]:
    """A row per rule, spread, correlation and seed."""
    k, limits = options.k, {"groups": options.groups, "active": options.active}
    optimum = cr.ActiveGroups(cr.Groups(options.groups), at_most=options.active) & cr.Exactly(k)
    sizes = {"T": options.tokens, "n": options.experts, "k": k, **limits}
    for rule, (group_score, score) in RULES.items():
        greedy = serving.greedy_groups(options.experts, k, **limits, group_score=group_score, score=score)
        exact = serving.routing_function(optimum, options.experts, score=score)
        # Sums of logits scale with them.
        spreads = options.spreads if score == "sigmoid" else [1.0]
        for spread, correlation, seed in product(spreads, options.correlations, range(options.seeds)):
            logits = logits_of(options, spread, correlation, seed)
            greedy_ids, best_ids = (f(logits, logits, k, False)[1] for f in (greedy, exact))
            scores = torch.sigmoid(logits) if score == "sigmoid" else logits
            setting = {"rule": rule, "spread": spread, "correlation": correlation, "seed": seed}
            yield {"op": "greedy-groups", **sizes, **setting, **compared(greedy_ids, best_ids, scores)}


def table(measured: Sequence[rows.Row]) -> list[str]:
    """Lines: the mean over seeds of every setting, with the smallest and the largest of them."""
    lines = ["| rule | spread | correlation | other subset | mean loss | experts changed |"]
    lines.append("| --- | ---: | ---: | --- | --- | ---: |")
    settings = dict.fromkeys((row["rule"], row["spread"], row["correlation"]) for row in measured)
    for rule, spread, correlation in settings:
        of = [
            row for row in measured if (row["rule"], row["spread"], row["correlation"]) == (rule, spread, correlation)
        ]
        other, loss = (_spread([100 * row[name] for row in of]) for name in ("other_subset", "mean_loss"))
        changed = sum(row["experts_changed"] for row in of) / len(of)
        lines.append(f"| {rule} | {spread:g} | {correlation:g} | {other} | {loss} | {changed:.1f} |")
    return lines


def _spread(percent: Sequence[float]) -> str:
    digits = 1 if max(percent) >= 1 else 3
    mean, low, high = (f"{x:.{digits}f}" for x in (sum(percent) / len(percent), min(percent), max(percent)))
    return f"{mean} % ({low} to {high})"


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.greedy_groups")
    made.add_argument("--tokens", type=int, default=2000)
    made.add_argument("--experts", type=int, default=256)
    made.add_argument("--k", type=int, default=8)
    made.add_argument("--groups", type=int, default=8)
    made.add_argument("--active", type=int, default=4)
    made.add_argument("--spreads", type=float, nargs="+", default=[0.5, 1.0, 2.0, 4.0])
    made.add_argument("--correlations", type=float, nargs="+", default=[0.0, 0.2, 0.5])
    made.add_argument("--seeds", type=int, default=5)
    made.add_argument("--out", type=Path, default=OUT)
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, append, print."""
    options = parser().parse_args(arguments)
    common = rows.environment(torch.device("cpu"))
    measured = [row | common for row in measure(options)]
    rows.append(options.out, measured)
    print("\n".join(table(measured)))
    print(f"rows appended to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
