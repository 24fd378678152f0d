"""``python -m benchmarks.plots``: a picture per family of rows, as SVG files whose bytes depend on the rows alone.

A *family* is what can be compared: rows of one op, device, number of tokens and threads, and of exactly k or of a
range of counts. Files of rows only grow: the last row of a provider, case and pass counts. Rows of earlier versions
lack fields; what a picture cannot know from them it leaves out.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import rows as row_files
from benchmarks.circuits.picture import circuits_figure
from benchmarks.registry import BOTH, FORWARD
from benchmarks.rows import Row
from circuitroute.plots import COLORS, MARKERS, new_figure

ROOT = Path(__file__).resolve().parent.parent
ROWS = ROOT / "benchmarks" / "rows"
IMAGES = ROOT / "docs" / "images"

BASELINE = "topk"
BASELINE_LABEL = "softmax + topk + gather"
# Of each baseline: what it does, by the provider's name.
YARDSTICKS = {BASELINE: BASELINE_LABEL, "deployed": "softmax + topk + gather + renormalise"}
FLOOR_LABEL = "memory floor (a copy)"
GREY = "#666666"
MAX_MARKS = 5  # sizes that a picture tells apart by their marks; more are points of a line
SIZE = 52.0  # of a marker, in points squared


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the pictures of row files; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description="Draw the rows of benchmarks.")
    parser.add_argument("rows", nargs="*", type=Path, help="JSONL files (default: benchmarks/rows/*.jsonl)")
    parser.add_argument("--out", type=Path, default=IMAGES, help="the folder of the pictures (default: docs/images)")
    parser.add_argument("--format", choices=("svg", "png"), default="svg", help="of the pictures (default: svg)")
    options = parser.parse_args(arguments)
    files = options.rows or sorted(ROWS.glob("*.jsonl"))
    try:
        # What was predicted, and not timed, has no place beside measurements.
        measured = [row for file in files for row in row_files.read(file) if not row.get("predicted")]
        found = [row for row in measured if row["op"] in DRAW]
    except OSError as error:
        parser.error(str(error))
    options.out.mkdir(parents=True, exist_ok=True)
    for name, family in families(found).items():
        path = options.out / f"{name}.{options.format}"
        save(DRAW[family[0]["op"]](family), path)
        print(path)
    return 0


# ---------------------------------------------------------------------------------------------- families of rows


def families(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The newest rows by the name of their family, which is the name of its picture."""
    newest: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        newest[family_name(row), row["provider"], row["pass"], _case(row)] = row
    found: dict[str, list[Row]] = {}
    for name, *_ in newest:
        found[str(name)] = []
    for (name, *_), row in newest.items():
        found[str(name)].append(row)
    return dict(sorted(found.items()))


def family_name(row: Row) -> str:
    """Such as bench-subset-cpu-exactly-T4096; circuits from files have one picture."""
    if row["op"] == "circuits":
        return "circuit-benchmarks"
    device = re.sub(r"[^a-z0-9]+", "-", str(row["device"]).lower()).strip("-")
    kind = [] if row["op"] == "layered" else ["exactly" if row["kmin"] == row["k"] else "range"]
    threads = [] if row.get("threads", 1) == 1 else [f"{row['threads']}-threads"]
    return "-".join(["bench", row["op"], device, *kind, f"T{row['T']}", *threads])


def _case(row: Row) -> tuple[Any, ...]:
    """What tells cases of a family apart."""
    return tuple(row.get(field) for field in ("n", "kmin", "k", "constraint", "collection", "T"))


def _setting(row: Row) -> str:
    threads = row.get("threads", 1)
    where = f"{threads} CPU thread{'s' if threads > 1 else ''}" if row["device"] == "cpu" else row["device"]
    return f"{row['T']:,} tokens, {row.get('dtype', 'float32')}, {where}"


# ---------------------------------------------------------------------------------------------- the op subset


def subset_figure(rows: Sequence[Row]) -> Any:
    """Providers by the ratio of their time to top-k's, and by their peak memory; a marker per size.

    Open markers are forward alone, filled ones forward and backward.
    """
    cases = sorted({_case(row) for row in rows})
    if len(cases) > MAX_MARKS:
        return scaling_figure(rows)
    yardstick = next(name for name in YARDSTICKS if any(row["provider"] == name for row in rows))
    floors = [row for row in rows if row["provider"] == yardstick and "floor_ms" in row]
    lines = [*_by_time(rows), *([FLOOR_LABEL] if floors else [])]
    figure = new_figure(9.0, 1.6 + 0.34 * len(lines))
    time, memory = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    unit = BASELINE_LABEL if yardstick == BASELINE else "what is deployed"
    _lay_lines(time, lines, xlabel=f"time, in units of {unit}")
    _lay_lines(memory, lines, xlabel="peak memory, MiB")
    time.axvline(1, color=GREY, linewidth=1.0, zorder=0.5)
    time.invert_yaxis()

    def mark(axes: Any, x: float, line: str, row: Row) -> None:
        case = cases.index(_case(row))
        # Side by side within a line, so that equal values do not hide one another.
        shift = 0.2 * (case - (len(cases) - 1) / 2)
        _mark(axes, x, lines.index(line) + shift, case, filled=row["pass"] == BOTH)

    for row in rows:
        mark(time, row["ratio_to_topk"], _label(row), row)
        if row.get("peak_mib"):
            mark(memory, row["peak_mib"], _label(row), row)
    for row in floors:
        mark(time, row["floor_ms"] / row["median_ms"], FLOOR_LABEL, row)
    _explain_marks(figure, time, cases)
    figure.suptitle(f"A routing step, {_setting(rows[0])}", fontsize=11)
    return figure


def scaling_figure(rows: Sequence[Row]) -> Any:
    """Where a family has many sizes: time and memory per token against n, a line per provider, at one k.

    That k is the one with the most sizes; rows of another are left to the table.
    """
    k = max(sorted({row["k"] for row in rows}), key=lambda k: len({row["n"] for row in rows if row["k"] == k}))
    both = [row for row in rows if row["pass"] == BOTH and row["k"] == k]
    both.sort(key=lambda row: int(row["n"]))
    figure = new_figure(10.0, 4.6)
    time, memory = figure.subplots(1, 2)
    for axes, value in ((time, _us_per_token), (memory, _kib_per_token)):
        for i, label in enumerate(_by_time(both)):
            style = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}
            style |= {"color": GREY, "linestyle": ":"} if label == BASELINE_LABEL else {}
            _line(axes, [row for row in both if _label(row) == label], value, size="n", **style)
        axes.set(xscale="log", yscale="log", xlabel="variables n")
        axes.grid(alpha=0.3)
        sizes = sorted({row["n"] for row in both})
        axes.set_xticks(sizes, [str(n) for n in sizes], minor=False)
        axes.xaxis.minorticks_off()
        _plain_ticks(axes.yaxis)
    time.set_ylabel("microseconds per token")
    memory.set_ylabel("peak memory, KiB per token")
    figure.legend(*time.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(f"A routing step, {k} of n, forward+backward, {_setting(rows[0])}", fontsize=11)
    return figure


def _by_time(rows: Sequence[Row]) -> list[str]:
    """The providers' labels, by their slowest case, slowest first."""
    slowest: dict[str, float] = {}
    for row in rows:
        slowest[_label(row)] = max(slowest.get(_label(row), 0.0), row["ratio_to_topk"])
    return sorted(slowest, key=lambda label: (-slowest[label], label))


def _lay_lines(axes: Any, lines: Sequence[str], xlabel: str) -> None:
    axes.set(xscale="log", xlabel=xlabel)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    _plain_ticks(axes.xaxis)
    for line in range(len(lines)):
        axes.axhline(line, color="#e6e6e6", linewidth=0.8, zorder=0)
    axes.set_yticks(range(len(lines)), lines)


def _mark(axes: Any, x: float, y: float, case: int, filled: bool) -> None:
    color, marker = COLORS[case % len(COLORS)], MARKERS[case % len(MARKERS)]
    axes.scatter([x], [y], s=SIZE, marker=marker, facecolor=color if filled else "none", edgecolor=color, linewidth=1.3)


def _explain_marks(figure: Any, axes: Any, cases: Sequence[tuple[Any, ...]]) -> None:
    """The legend, of marks that are nowhere in the picture."""
    for i, case in enumerate(cases):
        style = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}
        axes.scatter([], [], s=SIZE, label=_case_label(case), **style)
    for name, facecolor in ((FORWARD, "none"), (BOTH, GREY)):
        axes.scatter([], [], s=SIZE, marker="o", facecolor=facecolor, edgecolor=GREY, label=name)
    figure.legend(loc="outside lower center", ncols=min(6, len(cases) + 2), frameon=False, fontsize=9)


def _label(row: Row) -> str:
    name = YARDSTICKS.get(row["provider"], str(row["provider"]))
    return f"{name}\n({row['note']})" if row.get("note") else name


def _case_label(case: tuple[Any, ...]) -> str:
    n, kmin, k, *_ = case
    return f"{k} of {n}" if kmin == k else f"{kmin} to {k} of {n}"


# ---------------------------------------------------------------------------------------------- the op layered


def layered_figure(rows: Sequence[Row]) -> Any:
    """Edges against time and memory per token, both logarithmic; a line per provider, a point per circuit."""
    both = sorted((row for row in rows if row["pass"] == BOTH), key=lambda row: int(row["edges"]))
    baseline = [row for row in both if row["provider"] == BASELINE]
    figure = new_figure(10.0, 4.8)
    time, memory = figure.subplots(1, 2)
    for axes, value in ((time, _us_per_token), (memory, _kib_per_token)):
        for i, provider in enumerate(sorted({row["provider"] for row in both} - {BASELINE})):
            style = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}
            _line(axes, [row for row in both if row["provider"] == provider], value, **style)
        _line(axes, baseline, value, color=GREY, linestyle=":", marker="x")
        axes.set(xscale="log", yscale="log", xlabel="edges of the circuit")
        axes.grid(alpha=0.3)
        _plain_ticks(axes.xaxis)
        _plain_ticks(axes.yaxis)
        _name_circuits(axes, baseline)
    time.set_ylabel("microseconds per token")
    memory.set_ylabel("peak memory, KiB per token")
    figure.legend(*time.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle(f"log Z and marginals of composed constraints, forward+backward, {_setting(rows[0])}", fontsize=11)
    return figure


def _us_per_token(row: Row) -> float:
    return float(1e3 * row["median_ms"] / row["T"])


def _kib_per_token(row: Row) -> float | None:
    peak: float | None = row.get("peak_mib")
    return 1024 * peak / row["T"] if peak else None


def _line(
    axes: Any, rows: Sequence[Row], value: Callable[[Row], float | None], size: str = "edges", **style: Any
) -> None:
    points = [(row[size], value(row)) for row in rows]
    known = [(x, y) for x, y in points if y is not None]
    if known:
        axes.plot(*zip(*known, strict=True), label=_label(rows[0]), linewidth=1.4, markersize=6, **style)


def _name_circuits(axes: Any, rows: Sequence[Row]) -> None:
    """Which circuit has how many edges, along the top."""
    top = axes.secondary_xaxis("top")
    top.set_xticks([row["edges"] for row in rows], [f"{row['constraint']}:{row['n']}" for row in rows])
    top.minorticks_off()
    top.tick_params(axis="x", rotation=60, labelsize=8)
    for label in top.get_xticklabels():
        label.set_horizontalalignment("left")


# Of an op that is not here the table tells all.
DRAW: dict[str, Callable[[Sequence[Row]], Any]] = {
    "subset": subset_figure,
    "step": subset_figure,
    "layered": layered_figure,
    "circuits": circuits_figure,
}


# ---------------------------------------------------------------------------------------------- files


def _plain_ticks(axis: Any) -> None:
    """1, 10, 1,000,000 rather than powers of ten; between them 3, 30, ... where there is room."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    steps = (1.0, 3.0) if high < 1e3 * low else (1.0,)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}" if x >= 1 else f"{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def save(figure: Any, path: Path) -> None:
    """The same bytes for the same figure: no date, and identifiers that are no random numbers."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "circuitroute"}):
        figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    sys.exit(main())
