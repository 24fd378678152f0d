"""Train every method on every task, or make the table and the picture of rows that are there.

python examples/logic_layers run --seeds 5 --rows examples/rows/logic-layers.jsonl
python examples/logic_layers show --rows examples/rows/logic-layers.jsonl --picture docs/images/logic-layers.svg
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from .hierarchy import hierarchical_labels
from .learning import Setting, run
from .paths import shortest_paths
from .report import draw, table
from .task import Task

SHARE_KNOWN = 0.2


def tasks(sizes: tuple[int, int, int], seed: int) -> list[Task]:
    """Rows to learn from, to choose by and to be judged by, of all tasks."""
    return [
        shortest_paths(*sizes, seed),
        hierarchical_labels(*sizes, seed),
        hierarchical_labels(*sizes, seed, known=SHARE_KNOWN),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs, or shows what was run."""
    parser = argparse.ArgumentParser(
        prog="logic_layers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("run", "show"))
    parser.add_argument("--rows", type=Path, required=True, help="a file of JSON lines, written or read")
    parser.add_argument("--picture", type=Path, help="an SVG file to draw")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs=3, default=(1000, 500, 2000), metavar=("LEARN", "CHOOSE", "JUDGE"))
    parser.add_argument("--epochs", type=int, default=Setting.epochs)
    options = parser.parse_args(arguments)
    if options.what == "run":
        setting, rows = Setting(epochs=options.epochs), []
        for seed in range(options.seeds):
            for task in tasks(tuple(options.sizes), seed):
                rows += run(task, seed, setting)
        options.rows.parent.mkdir(parents=True, exist_ok=True)
        options.rows.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    rows = [json.loads(line) for line in options.rows.read_text(encoding="utf-8").splitlines()]
    rows.sort(key=lambda row: row["task"] == "paths", reverse=True)
    print(table(rows))
    if options.picture is not None:
        draw(rows, options.picture)
    return 0
