"""The end of the study of learning, or what there is of it: a table for every regime, figures and results.json.

All differences are in bits per byte of the second held-out part, to top-k with the same regime and seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from .. import figures
from ..config import DemoConfig, Run
from ..evaluation import Evaluation
from ..report import circumstances, mean_and_spread, new_table, publish_tables
from ..trainee import Record
from .execution import Study
from .learning import AGAIN, PRETRAINING, REFERENCE, LearningConfig

LEARNING_FIGURES = ("learning_differences.png", "learning_curves.png")
CURVES = (REFERENCE, "exact-k", "exact-k-0.5", "exact-k-0.25", "probe", "dropout-0.2")  # more would hide one another


class Moment(NamedTuple):
    """When a run is looked at: `key` of its row, and a heading."""

    key: str
    heading: str


LAST, HALF, BEST = Moment("last", "last step"), Moment("half", "half way"), Moment("best", "best step")
MEASURES = ("executed", "load_entropy", "max_violation", "mode_agreement", "tokens_per_second")


def write_learning_report(study: Study, out: Path, command: str, processes: int, console: Console) -> None:
    """Prints the tables and writes figures and results.json below `out`, for all runs that have ended so far."""
    runs = [(run, study.record(run)) for run in study.config.runs()]
    known = [(run, record) for run, record in runs if record is not None]
    rows = [row_of(run, record, study.config.config_of(run)) for run, record in known]
    summary = summarise(rows)
    results = {
        "study": "learning",
        "complete": len(known) == len(runs) and all(record.finished for _, record in known),
        "processes": processes,
        "config": study.config.to_json(),
        "summary": summary,
        "rows": rows,
        **circumstances(study.device, study.corpora, command),
    }
    assert isinstance(study.config, LearningConfig)
    tables = [table_of(name, summary, study.config) for name in dict.fromkeys(row["regime"] for row in summary)]
    publish_tables(out, results, draw_learning(summary, out), tables, console)


# NUMBERS


def row_of(run: Run, record: Record, config: DemoConfig) -> dict[str, Any]:
    """One run as a flat row; None where nothing has been measured.

    `last`, `half` and `best` are bits per byte of the second held-out part at the end, half way, and at the step that
    is best on the first.
    """
    row: dict[str, Any] = {**run._asdict(), "steps": record.step, "finished": record.finished}
    row["passes"] = config.passes
    curve = record.evaluations
    row["curve"] = [[found.step, found.bits_per_byte, found.test_bits_per_byte] for found in curve]
    best = min(curve, key=lambda found: found.bits_per_byte, default=None)
    row["last"] = record.last and record.last.test_bits_per_byte
    row["half"] = _test_bits(next((found for found in curve if 2 * found.step >= config.steps), None))
    row["best"] = _test_bits(best)
    row["best_step"] = best and best.step
    for name in MEASURES[:-1]:
        row[name] = record.last and getattr(record.last, name)
    row["tokens_per_second"] = record.tokens_per_second(config)
    row["seconds"] = record.seconds
    return row


def _test_bits(found: Evaluation | None) -> float | None:
    return None if found is None else found.test_bits_per_byte


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per regime and router, in the order they first appear, over the finished runs: means and sample standard
    deviations (None for a single seed) of every moment, of its difference to top-k, and of the other measures."""
    finished = [row for row in rows if row["finished"] and row["regime"] != PRETRAINING]
    reference = {(row["regime"], row["seed"]): row for row in finished if row["router"] == REFERENCE}
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in finished:
        groups.setdefault((row["regime"], row["router"]), []).append(row)
    return [_summary(regime, router, found, reference) for (regime, router), found in groups.items()]


def _summary(
    regime: str, router: str, rows: Sequence[dict[str, Any]], reference: dict[tuple[str, int], dict[str, Any]]
) -> dict[str, Any]:
    summary: dict[str, Any] = {"regime": regime, "router": router, "seeds": len(rows), "passes": rows[0]["passes"]}
    for key, _ in (LAST, HALF, BEST):
        pairs = [(row[key], reference.get((regime, row["seed"]), {}).get(key)) for row in rows]
        differences = [own - base for own, base in pairs if base is not None]
        summary[key], summary[f"{key}_spread"] = mean_and_spread([own for own, _ in pairs])
        summary[f"{key}_difference"], summary[f"{key}_difference_spread"] = mean_and_spread(differences)
        summary[f"{key}_better"] = sum(difference < 0 for difference in differences)
        summary[f"{key}_pairs"] = len(differences)
    for name in (*MEASURES, "best_step"):
        summary[name], summary[f"{name}_spread"] = mean_and_spread([row[name] for row in rows])
    steps, _, tested = zip(*(zip(*row["curve"], strict=True) for row in rows), strict=True)
    summary["curve"] = [list(steps[0]), [fmean(values) for values in zip(*tested, strict=True)]]
    return summary


# TABLES AND FIGURES


def table_of(regime: str, summary: Sequence[dict[str, Any]], config: LearningConfig) -> Table:
    """Mean ± standard deviation over the seeds. What is read at other steps than the last is for runs that read their
    text several times."""
    rows = [row for row in summary if row["regime"] == regime]
    seeds = config.regime(regime).seeds
    moments = (HALF, LAST, BEST) if rows[0]["passes"] else (LAST,)
    title = f"{regime}: test bits per byte, mean ± standard deviation over {seeds} seed{'s' * (seeds > 1)}"
    differences = [f"{moment.heading},\nminus {REFERENCE} (better)" for moment in moments]
    headings = ("bits/\nbyte", *differences, "executed", "load\nentropy", "agree-\nment", "tokens/\nsecond")
    table = new_table(title, ("router",), headings)
    for row in rows:
        name = row["router"] if row["seeds"] == seeds else f"{row['router']} ({row['seeds']} of {seeds} seeds)"
        cells = [_cell(row["last"], row["last_spread"], ".3f")]
        for key, _ in moments:
            own = row["router"] == REFERENCE or row[f"{key}_difference"] is None
            difference = _cell(row[f"{key}_difference"], row[f"{key}_difference_spread"], "+.3f")
            cells.append("-" if own else f"{difference} ({row[f'{key}_better']}/{row[f'{key}_pairs']})")
        for key, form in (("executed", ".2f"), ("load_entropy", ".3f"), ("mode_agreement", ".2f")):
            cells.append(_cell(row[key], None, form))
        table.add_row(name, *cells, _cell(row["tokens_per_second"], None, ",.0f"))
    return table


def _cell(mean: float | None, spread: float | None, form: str) -> str:
    if mean is None:
        return "-"
    return format(mean, form) if spread is None else f"{format(mean, form)} ± {format(spread, form.lstrip('+'))}"


def draw_learning(summary: Sequence[dict[str, Any]], out: Path, suffix: str = ".png") -> list[Path]:
    """The two figures, as far as the summary goes; also as ".svg", as the documentation shows them."""
    if not summary:
        return []
    forest, curves = ((out / name).with_suffix(suffix) for name in LEARNING_FIGURES)
    differences: dict[str, dict[str, tuple[float, float]]] = {}
    lines: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for row in summary:
        if row["router"] in CURVES:
            lines.setdefault(row["regime"], {})[row["router"]] = (row["curve"][0], row["curve"][1])
        if row["router"] == REFERENCE:
            continue
        for key, heading in (HALF, LAST) if row["passes"] else (LAST,):
            panel = f"{row['regime']}, {heading}" if row["passes"] else row["regime"]
            found = (row[f"{key}_difference"], row[f"{key}_difference_spread"])
            if found[0] is not None:
                mean, spread = (math.nan if value is None else value for value in found)
                differences.setdefault(panel, {})[row["router"]] = (mean, spread)
    drawn = []
    if differences:
        xlabel = f"test bits per byte minus those of {REFERENCE}, paired by seed"
        drawn.append(figures.differences(differences, forest, xlabel=xlabel, noise=AGAIN))
    if lines:
        drawn.append(figures.curve_panels(lines, curves, ylabel="test bits per byte"))
    return drawn
