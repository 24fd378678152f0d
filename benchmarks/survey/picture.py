"""``python -m benchmarks.survey.picture``: the picture of docs/survey-sampling.md, from the rows of its example.

python examples/horvitz_thompson.py --sample 10,20,40,80 --out examples/rows/horvitz_thompson.jsonl
python -m benchmarks.survey.picture
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import rows
from benchmarks.plots import IMAGES, save
from circuitroute.plots import COLORS, MARKERS, new_figure

ROWS = Path(__file__).resolve().parents[2] / "examples" / "rows" / "horvitz_thompson.jsonl"


def figure(found: Sequence[rows.Row]) -> Any:
    """Standard errors of the three designs by the size of the sample: lines exact, marks simulated."""
    drawn = new_figure(5.4, 4.0)
    axes = drawn.subplots()
    for name, color, marker in zip(dict.fromkeys(row["design"] for row in found), COLORS, MARKERS, strict=False):
        own = [row for row in found if row["design"] == name]
        n, percent = [row["sample"] for row in own], [100 / row["total"] for row in own]
        exact = [row["standard_error"] * share for row, share in zip(own, percent, strict=True)]
        simulated = [row["simulated"] * share for row, share in zip(own, percent, strict=True)]
        axes.plot(n, exact, color=color, linewidth=2.2, label=name)
        axes.plot(n, simulated, marker, color=color, markersize=9, markerfacecolor="none", markeredgewidth=1.8)
    axes.set(xscale="log", yscale="log", ylim=(0.5, 40))
    axes.set_xticks(n, [str(size) for size in n])
    axes.set_yticks([1, 2, 5, 10, 20, 30], ["1", "2", "5", "10", "20", "30"])
    axes.minorticks_off()
    axes.tick_params(labelsize=14)
    axes.set_xlabel("units in the sample, of 200", fontsize=15)
    axes.set_ylabel("standard error, % of total", fontsize=15)
    axes.set_title("Exact (lines) and simulated (marks)", fontsize=15)
    axes.legend(fontsize=13, frameon=False)
    axes.grid(color="#dddddd", linewidth=0.8)
    return drawn


def main() -> None:
    """Draw it."""
    parser = argparse.ArgumentParser(prog="benchmarks.survey.picture", description=__doc__)
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--out", type=Path, default=IMAGES / "survey-sampling.svg")
    options = parser.parse_args()
    save(figure(rows.read(options.rows)), options.out)
    print(options.out)


if __name__ == "__main__":
    main()
