"""The end of a study, or what there is of it: a table, figures and results.json, all made from the checkpoints.

All routers of a study execute k experts per token and layer, or are held near it: see
docs/study-budgets.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from .. import figures
from ..config import DemoConfig, Run
from ..report import circumstances, mean_and_spread, new_table, publish
from ..trainee import Record
from .budgets import BudgetsConfig
from .execution import Study

BUDGETS_FIGURES = ("pareto.png", "experts_per_layer.png", "budget_use.png")
REFERENCE = "top-k"  # what differences are taken to, run by run of the same seed
COLUMNS = (
    # heading, key of the summary, format
    ("bits/byte", "bits_per_byte", ".3f"),
    (f"minus\n{REFERENCE}", "difference", "+.3f"),
    ("executed/\nlayer", "executed", ".2f"),
    ("soft mass/\nlayer", "soft_mass", ".2f"),
)


def write_budgets_report(study: Study, out: Path, command: str, processes: int, console: Console) -> None:
    """Prints the table and writes figures and results.json below `out`, for all runs that have ended so far."""
    runs = [(run, study.record(run)) for run in study.config.runs()]
    known = [(run, record) for run, record in runs if record is not None]
    rows = [row_of(run, record, study.config.config_of(run)) for run, record in known]
    summary = summarise(rows)
    results = {
        "study": "budgets",
        "complete": len(known) == len(runs) and all(record.finished for _, record in known),
        "processes": processes,
        "config": study.config.to_json(),
        "summary": summary,
        "rows": rows,
        **circumstances(study.device, study.corpora, command),
    }
    assert isinstance(study.config, BudgetsConfig)
    publish(out, results, draw_budgets(summary, out), table_of(summary, study.config.seeds), console)


# NUMBERS


def row_of(run: Run, record: Record, config: DemoConfig) -> dict[str, Any]:
    """One run as a flat row; None where nothing has been measured. Totals are a token's, over all layers."""
    last = record.last
    row: dict[str, Any] = {**run._asdict(), "steps": record.step, "finished": record.finished}
    row["seconds"] = record.seconds
    row["tokens_per_second"] = record.tokens_per_second(config)
    row["bits_per_byte"] = last and last.bits_per_byte
    row["executed_per_layer"] = last and [math.fsum(layer) for layer in last.utilization]
    row["soft_mass_per_layer"] = last and last.soft_mass
    row["soft_mass"] = fmean(last.soft_mass) if last and last.soft_mass else None
    row["load_entropy"] = last and last.load_entropy
    row["max_violation"] = last and last.max_violation
    row["budget"] = config.layers * config.k
    row["totals"] = last and last.executed_totals
    row |= _of_totals(last.executed_totals, row["budget"], config.layers) if last else dict.fromkeys(_OF_TOTALS)
    return row


_OF_TOTALS = ("executed", "total_mean", "total_spread", "total_max", "over_budget", "over_budget_share")


def _of_totals(histogram: Sequence[int], budget: int, layers: int) -> dict[str, Any]:
    """Read off the tokens that execute 0, 1, ... experts: the mean per layer, and the total's mean, standard deviation
    over tokens, largest value, and the tokens above the budget."""
    tokens = sum(histogram)
    mean = sum(total * count for total, count in enumerate(histogram)) / tokens
    variance = sum((total - mean) ** 2 * count for total, count in enumerate(histogram)) / tokens
    over = sum(histogram[budget + 1 :])
    largest = max(total for total, count in enumerate(histogram) if count)
    return dict(zip(_OF_TOTALS, (mean / layers, mean, math.sqrt(variance), largest, over, over / tokens), strict=True))


SUMMARISED = (
    "bits_per_byte",
    "difference",
    "executed",
    "soft_mass",
    "total_spread",
    "over_budget_share",
    "load_entropy",
    "max_violation",
    "tokens_per_second",
)


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per budget and router, in the order they first appear: means and spreads over the finished runs.

    A spread is the sample standard deviation, None for a single seed. `difference` is in bits per byte, to top-k with
    the same budget and seed; so `difference_spread` leaves out what the seeds have in common.
    """
    finished = [row for row in rows if row["finished"]]
    reference = {(row["k"], row["seed"]): row["bits_per_byte"] for row in finished if row["router"] == REFERENCE}
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in finished:
        base = reference.get((row["k"], row["seed"]))
        difference = None if base is None else row["bits_per_byte"] - base
        groups.setdefault((row["k"], row["router"]), []).append({**row, "difference": difference})
    # Interrupted studies have groups of any sizes; budgets stay together.
    budgets = list(dict.fromkeys(k for k, _ in groups))
    return [_summary(k, router, groups[k, router]) for b in budgets for k, router in groups if k == b]


def _summary(k: int, router: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    summary: dict[str, Any] = {"router": router, "k": k, "budget": rows[0]["budget"], "seeds": len(rows)}
    for name in SUMMARISED:
        summary[name], summary[f"{name}_spread"] = mean_and_spread([row[name] for row in rows])
    for name in ("executed_per_layer", "soft_mass_per_layer"):
        layers = [row[name] for row in rows if row[name] is not None]
        found = [mean_and_spread(values) for values in zip(*layers, strict=True)]
        summary[name] = [mean for mean, _ in found] or None
        summary[f"{name}_spread"] = [spread for _, spread in found] or None
    summary["over_budget"] = sum(row["over_budget"] for row in rows)
    summary["total_max"] = max(row["total_max"] for row in rows)
    summary["totals"] = [sum(counts) for counts in zip(*(row["totals"] for row in rows), strict=True)]
    return summary


# TABLE AND FIGURES


def table_of(summary: Sequence[dict[str, Any]], seeds: int) -> Table:
    """Mean ± standard deviation over the seeds."""
    title = f"Validation by budget and router, mean ± standard deviation over {seeds} seed{'s' * (seeds > 1)}"
    last = ("spread of a\ntoken's total", "tokens\nover budget", "tokens/\nsecond")
    table = new_table(title, ("k", "router"), (*(heading for heading, _, _ in COLUMNS), *last))
    k = None
    for row in summary:
        if k not in (None, row["k"]):
            table.add_section()
        k = row["k"]
        name = row["router"] if row["seeds"] == seeds else f"{row['router']} ({row['seeds']} of {seeds} seeds)"
        cells = [_with_spread(row, key, form) for _, key, form in COLUMNS]
        over = "0" if row["over_budget"] == 0 else f"{row['over_budget_share']:.1%}"
        speed = "-" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:,.0f}"
        table.add_row(str(k), name, *cells, f"{row['total_spread']:.2f}", over, speed)
    return table


def _with_spread(row: dict[str, Any], key: str, form: str) -> str:
    mean, spread = row[key], row[f"{key}_spread"]
    if mean is None or (key == "difference" and row["router"] == REFERENCE):
        return "-"
    return format(mean, form) if spread is None else f"{format(mean, form)} ± {format(spread, form.lstrip('+'))}"


def draw_budgets(summary: Sequence[dict[str, Any]], out: Path, suffix: str = ".png") -> list[Path]:
    """The three figures, as far as the summary goes; also as ".svg", as the documentation shows them."""
    if not summary:
        return []
    pareto, per_layer, use = ((out / name).with_suffix(suffix) for name in BUDGETS_FIGURES)
    budgets = {row["k"]: row["budget"] for row in summary}
    routers = list(dict.fromkeys(row["router"] for row in summary))
    of = {(row["k"], row["router"]): row for row in summary}
    keys = ("executed", "bits_per_byte", "executed_spread", "bits_per_byte_spread")
    rows = {router: [of[k, router] for k in budgets if (k, router) in of] for router in routers}
    fronts = {router: [[_number(row[key]) for row in found] for key in keys] for router, found in rows.items()}
    layer_keys = ("executed_per_layer", "executed_per_layer_spread")
    layers = {
        f"k = {k}": {r["router"]: [list(map(_number, r[key])) for key in layer_keys] for r in summary if r["k"] == k}
        for k in budgets
    }
    # A study that was stopped early may lack some routers for a budget: panels must agree.
    everywhere = [router for router in routers if len(rows[router]) == len(budgets)]
    uses = {
        f"k = {k}: {budget} experts per token": (budget, {router: of[k, router]["totals"] for router in everywhere})
        for k, budget in budgets.items()
    }
    drawn = [
        figures.pareto(fronts, pareto, ylabel="held-out bits per byte"),
        figures.experts_per_layer(layers, per_layer, title="Experts per layer"),
    ]
    if everywhere:
        drawn.append(figures.budget_use(uses, use, title="Use of the budget, fraction of tokens"))
    return drawn


def _number(value: float | None) -> float:
    return math.nan if value is None else value
