"""The end of a study of balance, or what there is of it: a table, a figure and results.json, from the checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from .. import figures
from ..config import Run
from ..report import circumstances, mean_and_spread, new_table, publish
from ..trainee import Record
from .execution import Study

BALANCE_FIGURES = ("violation.png",)
REFERENCE = "top-k"  # with the balance loss: what differences are taken to, run by run of the same seed
LATE = 0.5  # of training, over which the load of the batches is averaged: the rest is the way there
# What is averaged over the seeds: heading, key of a row, format.
COLUMNS = (
    ("bits/byte", "bits_per_byte", ".3f"),
    (f"minus\n{REFERENCE}", "difference", "+.3f"),
    ("max violation,\nheld-out text", "max_violation", ".2f"),
    (f"minus\n{REFERENCE}", "violation_difference", "+.2f"),
    ("max violation,\ntraining batches", "training_violation", ".2f"),
    ("load\nentropy", "load_entropy", ".3f"),
    ("steps/\nsecond", "steps_per_second", ".1f"),
)


def write_balance_report(study: Study, out: Path, command: str, processes: int, console: Console) -> None:
    """Prints the table and writes the figure and results.json below `out`, for all runs that have ended so far."""
    runs = [(run, study.record(run)) for run in study.config.runs()]
    known = [(run, record) for run, record in runs if record is not None]
    rows = with_differences([row_of(run, record) for run, record in known])
    summary = summarise(rows)
    results = {
        "study": "balance",
        "complete": len(known) == len(runs) and all(record.finished for _, record in known),
        "processes": processes,
        "config": study.config.to_json(),
        "summary": summary,
        "rows": rows,
        **circumstances(study.device, study.corpora, command),
    }
    seeds = len({run.seed for run in study.config.runs()})
    publish(out, results, draw_balance([record for _, record in known], out), table_of(summary, seeds), console)


def row_of(run: Run, record: Record) -> dict[str, Any]:
    """One run as a flat row; None where nothing has been measured. Violations are means over the layers."""
    last = record.last
    late = record.violations[int(len(record.violations) * (1 - LATE)) :]
    return {
        **run._asdict(),
        "steps": record.step,
        "finished": record.finished,
        "seconds": record.seconds,
        "bits_per_byte": last and last.bits_per_byte,
        "executed": last and last.executed,
        "load_entropy": last and last.load_entropy,
        "max_violation": last and last.max_violation,
        "training_violation": fmean(late) if late else None,
        "steps_per_second": record.step / record.training_seconds if record.training_seconds else None,
    }


def with_differences(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same rows with their differences to the reference of the same seed, where both have finished."""
    reference = {row["seed"]: row for row in rows if row["router"] == REFERENCE and row["finished"]}
    found = []
    for row in rows:
        base = reference.get(row["seed"]) if row["finished"] else None
        of = {"difference": "bits_per_byte", "violation_difference": "max_violation"}
        found.append({**row, **{name: None if base is None else row[key] - base[key] for name, key in of.items()}})
    return found


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per router, in the order they first appear: means and sample standard deviations over the finished runs,
    of which those of differences leave out what the seeds have in common."""
    finished = [row for row in rows if row["finished"]]
    summary = []
    for router in dict.fromkeys(row["router"] for row in finished):
        own = [row for row in finished if row["router"] == router]
        line: dict[str, Any] = {"router": router, "seeds": len(own)}
        for _, key, _ in COLUMNS:
            line[key], line[f"{key}_spread"] = mean_and_spread([row[key] for row in own])
        summary.append(line)
    return summary


def table_of(summary: Sequence[dict[str, Any]], seeds: int) -> Table:
    """Mean ± standard deviation over the seeds."""
    title = f"Balance, mean ± standard deviation over {seeds} seed{'s' * (seeds > 1)}"
    table = new_table(title, ["router"], [heading for heading, _, _ in COLUMNS])
    for row in summary:
        name = row["router"] if row["seeds"] == seeds else f"{row['router']} ({row['seeds']} of {seeds} seeds)"
        table.add_row(name, *(_cell(row, key, form) for _, key, form in COLUMNS))
    return table


def _cell(row: dict[str, Any], key: str, form: str) -> str:
    mean, spread = row[key], row[f"{key}_spread"]
    if mean is None or (key.endswith("difference") and row["router"] == REFERENCE):
        return "-"
    return format(mean, form) if spread is None else f"{format(mean, form)} ± {format(spread, form.lstrip('+'))}"


def draw_balance(records: Sequence[Record], out: Path, suffix: str = ".png") -> list[Path]:
    """The violation of training batches, step by step, of every router's first seed; also as ".svg"."""
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for record in records:
        steps = list(range(len(record.violations)))
        if steps and record.router not in curves:
            curves[record.router] = (steps, record.violations)
    if not curves:
        return []
    path = (out / BALANCE_FIGURES[0]).with_suffix(suffix)
    return [figures.validation_curves(curves, path, ylabel="max violation of a training batch")]
