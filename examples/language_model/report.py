"""The end of a run, or what there is of it: a table, figures and results.json, all made from the
checkpoints."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import circuitroute as cr
from circuitroute import plots

from .checkpoint import FORMAT, write_json
from .corpus import Corpus
from .extras import REQUIRED, optional
from .trainee import Record, Setting, record_of, saved_state

RESULTS = "results.json"
FIGURES = ("validation_curves.png", "utilization.png", "executed_experts.png")
COLUMNS = (
    # heading, key of the row, format
    ("bits/\nbyte", "validation_bits_per_byte", ".3f"),
    ("experts/\ntoken", "executed_experts_per_token", ".2f"),
    ("load\nentropy", "load_entropy", ".3f"),
    ("max\nviolation", "max_violation", ".2f"),
    ("swap\noracle", "swap_oracle_correlation", "+.2f"),
    ("tokens/\nsecond", "tokens_per_second", ",.0f"),
    ("seconds", "seconds", ".0f"),
)


def read_records(setting: Setting) -> list[Record]:
    """What the checkpoints hold, in the configuration's order: a router that has none is left out."""
    states = [saved_state(setting, router) for router in setting.config.routers]
    return [record_of(state) for state in states if state is not None]


def row_of(record: Record, tokens_per_step: int) -> dict[str, Any]:
    """One router's line of the table; None where nothing has been measured."""
    last = record.evaluations[-1] if record.evaluations else None
    tokens = record.step * tokens_per_step
    return {
        "router": record.router,
        "steps": record.step,
        "finished": record.finished,
        "validation_bits_per_byte": last and last.bits_per_byte,
        "executed_experts_per_token": last and last.executed,
        "load_entropy": last and last.load_entropy,
        "max_violation": last and last.max_violation,
        "swap_oracle_correlation": record.swap_correlation,
        "tokens_per_second": tokens / record.training_seconds if record.training_seconds else None,
        "seconds": record.seconds,
    }


def write_report(setting: Setting, out: Path, command: str, console: Any) -> None:
    """Prints the table and writes figures and results.json below `out`, for all that has been measured so
    far."""
    records = read_records(setting)
    rows = [row_of(record, setting.config.tokens_per_step) for record in records]
    figures = draw_figures([record for record in records if record.evaluations], out)
    write_json(out / RESULTS, _results(setting, command, records, rows, figures))
    if rows:
        console.print(table_of(rows, setting.config.steps))
    for path in (*figures, out / RESULTS):
        console.print(f"  {path}", highlight=False, markup=False, soft_wrap=True)


def table_of(rows: Sequence[dict[str, Any]], steps: int) -> Any:
    """A rich.table.Table; a router that was stopped early says after how many steps."""
    table = optional("rich.table").Table(
        title="Validation, by router", box=optional("rich.box").SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    table.add_column("router")
    for heading, _, _ in COLUMNS:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        name = row["router"] if row["steps"] == steps else f"{row['router']} (step {row['steps']}/{steps})"
        cells = ["-" if row[key] is None else format(row[key], form) for _, key, form in COLUMNS]
        table.add_row(name, *cells)
    return table


def draw_figures(records: Sequence[Record], out: Path) -> list[Path]:
    """The three figures, for records with at least one evaluation each."""
    if not records:
        return []
    curves = {r.router: ([e.step for e in r.evaluations], [e.bits_per_byte for e in r.evaluations]) for r in records}
    curves_png, utilization_png, executed_png = (out / name for name in FIGURES)
    return [
        plots.validation_curves(curves, curves_png, ylabel="validation bits per byte"),
        plots.utilization_heatmaps({r.router: r.evaluations[-1].utilization for r in records}, utilization_png),
        plots.executed_histogram({r.router: r.evaluations[-1].executed_counts for r in records}, executed_png),
    ]


def _results(
    setting: Setting,
    command: str,
    records: Sequence[Record],
    rows: list[dict[str, Any]],
    figures: Sequence[Path],
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "complete": len(records) == len(setting.config.routers) and all(r.finished for r in records),
        "command": command,
        "versions": versions(),
        "device": str(setting.device),
        "threads": torch.get_num_threads(),
        "config": setting.config.to_json(),
        "text": text_of(setting.corpus),
        "rows": rows,
        "figures": [path.name for path in figures],
        "runs": [record.to_json() for record in records],
    }


def text_of(corpus: Corpus) -> dict[str, Any]:
    """Which text it was."""
    return {
        "source": corpus.source,
        "sha256": corpus.digest,
        "training_bytes": corpus.train.numel(),
        "held_out_bytes": corpus.valid.numel(),
    }


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "circuitroute": cr.__version__,
        "torch": torch.__version__,
        **{name: metadata.version(name) for name in REQUIRED},
    }
