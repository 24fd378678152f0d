"""The command line: `measure` writes the rows, `draw` the pictures."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
ROWS = ROOT / "examples" / "rows" / "gallery.jsonl"
LOG = ROOT / "examples" / "rows" / "gallery-run.jsonl"
IMAGES = ROOT / "docs" / "images"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures or draws; returns the exit status."""
    parser = argparse.ArgumentParser(prog="gallery", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure", help="train and count (minutes of CPU time)")
    measuring.add_argument("--seeds", type=int, default=5)
    measuring.add_argument("--steps", type=int, help="of training (default: those of the testbed)")
    drawing = commands.add_parser("draw", help="draw the rows that there are (needs the extra `plot`)")
    drawing.add_argument("--images", type=Path, default=IMAGES, help="the folder for the pictures")
    for command in (measuring, drawing):
        command.add_argument("--rows", type=Path, default=ROWS, help="learning, balance and budgets, as JSON lines")
        command.add_argument("--log", type=Path, default=LOG, help="the log of a training run")
    options = parser.parse_args(arguments)
    if options.command == "measure":
        from . import measure

        measure.write(options.rows, options.log, options.seeds, options.steps)
    else:
        from . import draw  # needs matplotlib

        for path in draw.write(options.rows, options.log, options.images):
            print(path)
    return 0
