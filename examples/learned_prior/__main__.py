"""Measure, or show what was measured.

cd examples
python -m learned_prior --rows rows/learned-prior.jsonl      # about six CPU minutes
python -m learned_prior --table rows/learned-prior.jsonl
python -m learned_prior --table rows/learned-prior.jsonl --picture ../docs/images/learned-priors.svg
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from language_model.process import threads

from .decisions import ROUTERS
from .report import picture, tables
from .study import rows


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--routers", choices=list(ROUTERS), nargs="+", default=["exact-k-0.25"])
    parser.add_argument("--steps", type=int, default=200, help="of the demo's model")
    parser.add_argument("--batches", type=int, default=24, help="of held-out text, 1,024 tokens each")
    parser.add_argument("--rows", type=Path, help="a file of JSON lines to write")
    parser.add_argument("--table", type=Path, help="a file of JSON lines to show, instead of measuring")
    parser.add_argument("--picture", type=Path, help="an .svg file to draw")
    options = parser.parse_args()
    if options.table is not None:
        found = [json.loads(line) for line in options.table.read_text(encoding="utf-8").splitlines()]
    else:
        found = []
        with threads(1):  # the circuits are too small to gain from more, and the numbers do not depend on the cores
            for row in rows(options.seeds, options.routers, options.steps, options.batches):
                found.append(row)
                print(f"{len(found)}: {row['router']}, seed {row['seed']}, layer {row['layer']}", file=sys.stderr)
                if options.rows is not None:
                    with options.rows.open("a" if len(found) > 1 else "w", encoding="utf-8") as file:
                        file.write(json.dumps(row) + "\n")
    print(tables(found))
    if options.picture is not None:
        picture(found, options.picture)


if __name__ == "__main__":
    main()
