"""The table and the picture of the rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

from circuitroute.plots import COLORS, new_figure

from .learning import Row

BASELINE = "sigmoid"


def table(rows: Sequence[Row]) -> str:
    """In Markdown: mean and standard deviation over the seeds, and differences to the plain net seed by seed."""
    lines = [
        "| task | method | exact match, % | against sigmoid | Hamming loss, % | micro-F1, % | violations, % | CPU |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for task in _in_order(rows, "task"):
        plain = _of(rows, task, BASELINE)
        for method in _in_order(rows, "method"):
            own = _of(rows, task, method)
            cells = [
                _spread([100 * row["exact"] for row in own]),
                "" if method == BASELINE else _signed([100 * (a["exact"] - b["exact"]) for a, b in _pairs(own, plain)]),
                _spread([100 * row["hamming"] for row in own], ".2f"),
                _spread([100 * row["f1"] for row in own]),
                f"{100 * fmean(row['violations'] for row in own):.1f}" if any(r["violations"] for r in own) else "0",
                f"{fmean(a['seconds'] / b['seconds'] for a, b in _pairs(own, plain)):.1f}",
            ]
            lines.append(f"| {task} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Exact match of every method and seed, a panel per task, with the share of predictions that violate the rules."""
    import matplotlib

    tasks, methods = _in_order(rows, "task"), _in_order(rows, "method")
    figure = new_figure(5.0, 1.6 + 1.45 * len(tasks))
    panels = figure.subplots(len(tasks), 1, squeeze=False)[:, 0]
    for axes, task in zip(panels, tasks, strict=True):
        for place, method in enumerate(methods):
            own = _of(rows, task, method)
            exact = [100 * row["exact"] for row in own]
            color = COLORS[place % len(COLORS)]
            axes.barh(place, fmean(exact), color=color, alpha=0.35)
            axes.plot(exact, [place] * len(exact), "o", color=color, markersize=4)
            broken = 100 * fmean(row["violations"] for row in own)
            said = f"{broken:.0f}% break rules" if broken else "0 break rules"
            axes.text(max(exact) + 2.5, place, said, va="center", fontsize=9)
        axes.set_yticks(range(len(methods)), methods, fontsize=9)
        axes.set(title=task, xlim=(0, 84))
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
    panels[-1].set_xlabel("rows predicted exactly right, %")
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "circuitroute"}):
        figure.savefig(path, format="svg", metadata={"Date": None})  # the same rows are the same file


def _in_order(rows: Sequence[Row], key: str) -> list[str]:
    return list(dict.fromkeys(row[key] for row in rows))


def _of(rows: Sequence[Row], task: str, method: str) -> list[Row]:
    return [row for row in rows if row["task"] == task and row["method"] == method]


def _pairs(own: Sequence[Row], plain: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Rows of one seed."""
    by_seed = {row["seed"]: row for row in plain}
    return [(row, by_seed[row["seed"]]) for row in own]


def _spread(values: Sequence[float], form: str = ".1f") -> str:
    return format(fmean(values), form) + (f" ± {format(stdev(values), form)}" if len(values) > 1 else "")


def _signed(values: Sequence[float]) -> str:
    return _spread(values, "+.1f").replace("± +", "± ")
