"""``python -m benchmarks.circuits.table``: the rows of op circuits as the tables of docs/circuit-benchmarks.md.

A line per circuit of one collection and batch: milliseconds of forward and backward. "KLay" is the fastest of its ways
for that very circuit and batch, vmap aside.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median

from benchmarks import rows as row_files
from benchmarks.registry import BOTH
from benchmarks.rows import Row

ROWS = Path(__file__).resolve().parent.parent / "rows" / "cpu-circuits.jsonl"

OURS, EAGER, VMAP, POST_ORDER = "circuitroute:numba", "circuitroute:torch", "klay:vmap", "pysdd"
BATCHED = ("klay", "klay:real")
NAMES = {"klay": "log", "klay:real": "real"}

# By provider, the rows of one circuit and batch, forward and backward.
Case = dict[str, Row]


def cases(rows: Iterable[Row]) -> dict[tuple[str, int, str], Case]:
    """(collection, batch, circuit) -> provider -> the newest row of forward and backward."""
    found: dict[tuple[str, int, str], Case] = {}
    for row in rows:
        if row["op"] == "circuits" and row["pass"] == BOTH:
            found.setdefault((row["collection"], row["T"], row["constraint"]), {})[row["provider"]] = row
    return dict(sorted(found.items()))


def best_of_klay(case: Case) -> Row | None:
    """KLay's fastest way, vmap aside; None where it was not run."""
    ways = [case[name] for name in BATCHED if name in case]
    return min(ways, key=lambda row: float(row["median_ms"]), default=None)


def times(case: Case, name: str) -> float | None:
    """How many times longer than ours another one took: the ratio of the medians of interleaved rounds."""
    other = best_of_klay(case) if name == "klay" else case.get(name)
    return None if other is None or OURS not in case else float(other["median_ms"] / case[OURS]["median_ms"])


def by_circuit(found: Sequence[Case]) -> list[str]:
    """Times and memory, a line per circuit."""
    heads = (
        "circuit",
        "n",
        "nodes: ours, KLay's",
        "ours, ms",
        "ours, torch",
        "KLay, ms",
        "times",
        "KLay vmap, ms",
        "times",
    )
    lines = [_line((*heads, "PySDD, ms", "MiB: ours, KLay")), _line(["---", *["---:"] * 10])]
    for case in found:
        ours, klay = case[OURS], best_of_klay(case)
        way = "" if klay is None else f"{_ms(klay)} ({NAMES[klay['provider']]})"
        nodes = f"{ours['nodes']:,}, {'' if klay is None else format(klay['nodes'], ',')}"
        memory = f"{_mib(ours)}, {_mib(klay)}"
        vmap = (_ms(case.get(VMAP)), _times(times(case, VMAP)))
        cells = (
            ours["constraint"],
            ours["n"],
            nodes,
            _ms(ours),
            _ms(case.get(EAGER)),
            way,
            _times(times(case, "klay")),
        )
        lines.append(_line((*cells, *vmap, _ms(case.get(POST_ORDER)), memory)))
    return lines


def over_seeds(found: dict[tuple[str, int, str], Case]) -> list[str]:
    """A line per collection, size and batch: medians over the circuits, and the range of the paired ratios."""
    groups: dict[tuple[str, int, int], list[Case]] = {}
    for (collection, batch, _), case in found.items():
        groups.setdefault((collection, case[OURS]["n"], batch), []).append(case)
    heads = (
        "collection",
        "n",
        "batch",
        "circuits",
        "edges",
        "ours, ms",
        "ours, torch",
        "KLay, ms",
        "times",
        "vmap, times",
    )
    lines = [_line((*heads, "PySDD, ms")), _line(["---", *["---:"] * 10])]
    for (collection, n, batch), some in groups.items():
        edges = f"{median(case[OURS]['edges'] for case in some):,.0f}"
        columns = (
            _middle(case[OURS]["median_ms"] for case in some),
            _middle(case[EAGER]["median_ms"] for case in some if EAGER in case),
            _middle(klay["median_ms"] for case in some if (klay := best_of_klay(case)) is not None),
            _spread(times(case, "klay") for case in some),
            _spread(times(case, VMAP) for case in some),
            _middle(case[POST_ORDER]["median_ms"] for case in some if POST_ORDER in case),
        )
        lines.append(_line((collection, n, batch, len(some), edges, *columns)))
    return lines


def _line(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _ms(row: Row | None) -> str:
    return "" if row is None else _figure(row["median_ms"])


def _mib(row: Row | None) -> str:
    return "" if row is None or row["peak_mib"] is None else f"{row['peak_mib']:.0f}"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else _figure(ratio)


def _figure(x: float) -> str:
    return f"{x:,.0f}" if x >= 99.5 else f"{x:.1f}" if x >= 9.95 else f"{x:.2f}"


def _middle(values: Iterable[float]) -> str:
    known = list(values)
    return _figure(median(known)) if known else ""


def _spread(ratios: Iterable[float | None]) -> str:
    known = [ratio for ratio in ratios if ratio is not None]
    return f"{_figure(median(known))} ({_figure(min(known))} to {_figure(max(known))})" if known else ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables of a file of rows; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.circuits.table", description="Tables of op circuits.")
    parser.add_argument("rows", nargs="?", type=Path, default=ROWS, help="a JSONL file (default: the repository's)")
    parser.add_argument("--each", default="spl,nesy", help="collections with a line per circuit (default: spl,nesy)")
    options = parser.parse_args(arguments)
    found = cases(row_files.read(options.rows))
    each = options.each.split(",")
    groups = dict.fromkeys((collection, batch) for collection, batch, _ in found if collection in each)
    show: Callable[[str], None] = print
    for collection, batch in groups:
        show(f"{collection}, batch {batch:,}:\n")
        show("\n".join(by_circuit([case for key, case in found.items() if key[:2] == (collection, batch)])) + "\n")
    others = {key: case for key, case in found.items() if key[0] not in each}
    if others:
        show("\n".join(over_seeds(others)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
