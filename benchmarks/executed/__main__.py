"""``python -m benchmarks.executed``: time the stacks that are installed, append rows, print the table."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import torch.distributed as dist

from benchmarks import rows
from benchmarks.executed.settings import Sizes, UnavailableError, settings
from benchmarks.executed.stacks import names, stack
from benchmarks.executed.table import table
from benchmarks.executed.timing import run_way

OUT = Path(__file__).parent.parent / "rows" / "cpu-executed.jsonl"
MEANS = (8.0, 6.0, 4.0, 2.0, 1.0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what the command line asks for; returns the exit status."""
    options = _options(arguments)
    if options.table:
        print(table([row for path in options.table for row in rows.read(path)]))
        return 0
    several = "WORLD_SIZE" in os.environ
    if several:
        dist.init_process_group("gloo")
    try:
        measured = _measured(options)
    finally:
        if several:
            dist.destroy_process_group()
    if measured and int(os.environ.get("RANK", "0")) == 0:
        rows.append(options.out, measured)
        print(table(measured))
        print(f"rows appended to {options.out}")
    return 0 if measured else 1


def _measured(options: argparse.Namespace) -> list[rows.Row]:
    sizes = Sizes(**{field.name: getattr(options, field.name) for field in fields(Sizes)})
    cases = list(settings(sizes, options.means, options.padded))
    found: list[rows.Row] = []
    for name in options.stacks:
        try:
            module = stack(name)
        except ImportError as reason:
            print(f"skipped {name}: {reason}", flush=True)
            continue
        for way in module.WAYS:
            if options.ways and way not in options.ways:
                continue
            print(f"timing {name}, {way}", flush=True)
            try:
                found += run_way(module, name, way, cases, repeats=options.repeats, threads=options.threads)
            except UnavailableError as reason:
                print(f"skipped {name}, {way}: {reason}", flush=True)
    return found


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.executed", description=__doc__)
    for field in fields(Sizes):
        parser.add_argument(f"--{field.name}", type=int, default=field.default)
    parser.add_argument("--means", type=_numbers, help="executed experts per token, with commas")
    parser.add_argument("--padded", type=_numbers, help="the means at which tokens pay for k slots too")
    parser.add_argument("--stacks", type=_words, default=names(), help="with commas; all of them by default")
    parser.add_argument("--ways", nargs="+", default=(), help="all of them by default")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OUT, help="the file that rows are appended to")
    parser.add_argument("--table", type=Path, nargs="+", help="print the table of these rows instead")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.stacks if name not in names()]
    if unknown:
        parser.error(f"argument --stacks: no stack {', '.join(unknown)}; there are {', '.join(names())}")
    possible = tuple(mean for mean in MEANS if mean <= options.k)
    options.means = possible if options.means is None else options.means
    options.padded = possible if options.padded is None else options.padded
    outside = [mean for mean in (*options.means, *options.padded) if not 1 <= mean <= options.k]
    if outside:
        parser.error(f"argument --means, --padded: {outside[0]:g} is not from 1 to k={options.k}")
    return options


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(",") if part)


def _words(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


if __name__ == "__main__":
    sys.exit(main())
