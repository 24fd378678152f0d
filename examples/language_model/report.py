"""The end of a run, or what there is of it: a table, figures and results.json, all made from the checkpoints."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import circuitroute as cr

from . import figures
from .checkpoint import FORMAT, write_json
from .command import EXTRAS
from .corpus import Corpus
from .trainee import Record, Setting, saved_record

RESULTS = "results.json"
FIGURES = ("validation_curves.png", "utilization.png", "executed_experts.png")
COLUMNS = (
    # heading, key of the row, format
    ("bits/\nbyte", "validation_bits_per_byte", ".3f"),
    ("experts/\ntoken", "executed_experts_per_token", ".2f"),
    ("load\nentropy", "load_entropy", ".3f"),
    ("max\nviolation", "max_violation", ".2f"),
    ("agree-\nment", "mode_agreement", ".2f"),
    ("swap\noracle", "swap_oracle_correlation", "+.2f"),
    ("tokens/\nsecond", "tokens_per_second", ",.0f"),
    ("seconds", "seconds", ".0f"),
)


def write_report(setting: Setting, out: Path, command: str, console: Console) -> None:
    """Prints the table and writes figures and results.json below `out`, for all that has been measured so far. A router
    without a checkpoint is left out."""
    found = [saved_record(setting, router) for router in setting.config.routers]
    records = [record for record in found if record is not None]
    rows = [row_of(record, setting) for record in records]
    results = {
        "complete": len(records) == len(found) and all(record.finished for record in records),
        "config": setting.config.to_json(),
        "rows": rows,
        "runs": [record.to_json() for record in records],
        **circumstances(setting.device, {"": setting.corpus}, command),
    }
    figures = draw_figures([record for record in records if record.evaluations], out)
    publish(out, results, figures, table_of(rows, setting.config.steps), console)


def publish(out: Path, results: dict[str, Any], figures: Sequence[Path], table: Table, console: Console) -> None:
    """Writes results.json and prints the table, where it has rows, and which files there are."""
    publish_tables(out, results, figures, [table] if table.rows else [], console)


def publish_tables(
    out: Path, results: dict[str, Any], figures: Sequence[Path], tables: Sequence[Table], console: Console
) -> None:
    """The same with any number of tables."""
    write_json(out / RESULTS, {"format": FORMAT, **results, "figures": [path.name for path in figures]})
    for table in tables:
        console.print(table)
    for path in (*figures, out / RESULTS):
        console.out(f"  {path}")


def circumstances(device: torch.device, corpora: Mapping[str, Corpus], command: str) -> dict[str, Any]:
    """How and where the results came about. corpora: by regime; the text of what has none is called ""."""
    texts = {regime: _of_text(corpus) for regime, corpus in corpora.items()}
    versions = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "circuitroute": cr.__version__,
        "torch": torch.__version__,
        **{name: metadata.version(name) for name in EXTRAS},
    }
    return {
        "command": command,
        "versions": versions,
        "device": str(device),
        "threads": torch.get_num_threads(),
        **({"text": texts[""]} if "" in texts else {"texts": texts}),
    }


def _of_text(corpus: Corpus) -> dict[str, Any]:
    return {
        "source": corpus.source,
        "sha256": corpus.digest,
        "training_bytes": corpus.train.numel(),
        "held_out_bytes": corpus.valid.numel(),
        **({"test_bytes": corpus.test.numel()} if corpus.test.numel() else {}),
    }


def row_of(record: Record, setting: Setting) -> dict[str, Any]:
    """One router's line of the table; None where nothing has been measured."""
    last = record.last
    return {
        "router": record.router,
        "steps": record.step,
        "finished": record.finished,
        "validation_bits_per_byte": last and last.bits_per_byte,
        "executed_experts_per_token": last and last.executed,
        "load_entropy": last and last.load_entropy,
        "max_violation": last and last.max_violation,
        "mode_agreement": last and last.mode_agreement,
        "swap_oracle_correlation": record.swap_correlation,
        "tokens_per_second": record.tokens_per_second(setting.config),
        "seconds": record.seconds,
    }


def mean_and_spread(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """The mean and sample standard deviation of what is known; None where there is nothing, or one value."""
    known = [value for value in values if value is not None]
    if not known:
        return None, None
    return fmean(known), stdev(known) if len(known) > 1 else None


def new_table(title: str, texts: Sequence[str], numbers: Sequence[str]) -> Table:
    """An empty table: columns of text, then columns of numbers."""
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for heading in texts:
        table.add_column(heading, no_wrap=True)
    for heading in numbers:
        table.add_column(heading, justify="right")
    return table


def table_of(rows: Sequence[dict[str, Any]], steps: int) -> Table:
    """A router that was stopped early says after how many steps."""
    table = new_table("Validation, by router", ["router"], [heading for heading, _, _ in COLUMNS])
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
        figures.validation_curves(curves, curves_png, ylabel="validation bits per byte"),
        figures.utilization_heatmaps({r.router: r.evaluations[-1].utilization for r in records}, utilization_png),
        figures.executed_histogram({r.router: r.evaluations[-1].executed_counts for r in records}, executed_png),
    ]
