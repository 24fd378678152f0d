"""The end of a study, or what there is of it: a table, figures and results.json, all made from the checkpoints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from circuitroute import plots

from .checkpoint import FORMAT, write_json
from .extras import optional
from .report import RESULTS, text_of, versions
from .study import REFERENCE, Study, row_of, summarise

STUDY_FIGURES = ("pareto.png", "experts_per_layer.png", "budget_use.png")
COLUMNS = (
    # heading, key of the summary, format
    ("bits/byte", "bits_per_byte", ".3f"),
    (f"minus\n{REFERENCE}", "difference", "+.3f"),
    ("executed/\nlayer", "executed", ".2f"),
    ("soft mass/\nlayer", "soft_mass", ".2f"),
)


def write_study_report(study: Study, out: Path, command: str, processes: int, console: Any) -> None:
    """Prints the table and writes figures and results.json below `out`, for all runs that have ended so far."""
    runs = [(run, study.record(run)) for run in study.config.runs()]
    known = [(run, record) for run, record in runs if record is not None]
    rows = [row_of(run, record, study.config.config(run.k, run.seed)) for run, record in known]
    summary = summarise(rows)
    figures = draw_study(summary, out)
    results = {
        "format": FORMAT,
        "study": "budgets",
        "complete": len(known) == len(runs) and all(record.finished for _, record in known),
        "command": command,
        "versions": versions(),
        "device": str(study.device),
        "threads": torch.get_num_threads(),
        "processes": processes,
        "config": study.config.to_json(),
        "text": text_of(study.corpus),
        "summary": summary,
        "rows": rows,
        "figures": [path.name for path in figures],
    }
    write_json(out / RESULTS, results)
    if summary:
        console.print(table_of(summary, study.config.seeds))
    for path in (*figures, out / RESULTS):
        console.print(f"  {path}", highlight=False, markup=False, soft_wrap=True)


def table_of(summary: Sequence[dict[str, Any]], seeds: int) -> Any:
    """A rich.table.Table of mean ± standard deviation over the seeds."""
    table = optional("rich.table").Table(
        title=f"Validation by budget and router, mean ± standard deviation over {seeds} seed{'s' * (seeds > 1)}",
        box=optional("rich.box").SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for heading in ("k", "router"):
        table.add_column(heading)
    last = ("spread of a\ntoken's total", "tokens\nover budget", "tokens/\nsecond")
    for heading in (*(heading for heading, _, _ in COLUMNS), *last):
        table.add_column(heading, justify="right", no_wrap=True)
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


def draw_study(summary: Sequence[dict[str, Any]], out: Path, suffix: str = ".png") -> list[Path]:
    """The three figures of a summary with a row at least."""
    if not summary:
        return []
    paths = [(out / name).with_suffix(suffix) for name in STUDY_FIGURES]
    routers = list(dict.fromkeys(row["router"] for row in summary))
    budgets = list(dict.fromkeys(row["k"] for row in summary))
    of = {(row["k"], row["router"]): row for row in summary}
    keys = ("executed", "bits_per_byte", "executed_spread", "bits_per_byte_spread")
    rows_of = {router: [row for row in summary if row["router"] == router] for router in routers}
    fronts = {router: [[_number(row[key]) for row in rows] for key in keys] for router, rows in rows_of.items()}
    layers = {
        f"k = {k}": {
            router: [list(map(_number, of[k, router][f"executed_per_layer{which}"])) for which in ("", "_spread")]
            for router in routers
            if (k, router) in of
        }
        for k in budgets
    }
    # A study that was stopped early may lack some routers for a budget: panels must agree.
    everywhere = [router for router in routers if all((k, router) in of for k in budgets)]
    uses = {
        f"k = {k}: {of[k, everywhere[0]]['budget']} experts per token": (
            of[k, everywhere[0]]["budget"],
            {router: of[k, router]["totals"] for router in everywhere},
        )
        for k in budgets
        if everywhere
    }
    plots.pareto(fronts, paths[0], ylabel="held-out bits per byte")
    plots.experts_per_layer(layers, paths[1], title="Experts per layer")
    if not uses:
        return paths[:2]
    plots.budget_use(uses, paths[2], title="Use of the budget, fraction of tokens")
    return paths


def _number(value: float | None) -> float:
    return math.nan if value is None else value
