"""``python -m benchmarks``: time, append rows, print the table."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import registry, rows
from benchmarks.registry import UnavailableError
from benchmarks.runner import run_case

ROWS = Path(__file__).parent / "rows"


def main(arguments: Sequence[str] | None = None, prog: str = "python -m benchmarks") -> int:
    """Run the benchmarks that the command line asks for; returns the exit status."""
    parser = _parser(prog)
    options = parser.parse_args(arguments)
    op = registry.get_op(options.op)
    try:
        providers = registry.providers(op.name, options.providers)
        cases = op.cases(options)
    except ValueError as error:
        parser.error(str(error))
    out = options.out or ROWS / f"{options.device}-{op.name}.jsonl"
    try:
        rows.prepare(out)
    except OSError as error:
        parser.error(f"argument --out: cannot write {str(out)!r}: {error.strerror}")
    for case in cases:
        title = " ".join(f"{name}={value}" for name, value in case.describe().items())
        print(f"timing {op.name} {title}", flush=True)
        try:
            measured = run_case(
                op,
                case,
                providers,
                repeats=options.repeats,
                threads=options.threads,
                skip_unavailable=options.providers is None,
            )
        except UnavailableError as reason:
            parser.error(str(reason))
        rows.append(out, measured)
        rows.show(title, measured)
    print(f"rows appended to {out}")
    return 0


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description="Time, append rows, print the table.")
    ops = registry.ops()
    parser.add_argument("--op", choices=sorted(ops), default="subset", help="the workload (default: subset)")
    parser.add_argument("--providers", type=_names, help="only these, by name, separated by commas")
    parser.add_argument("--threads", type=_positive, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--repeats", type=_positive, default=20, help="timed rounds (default: 20)")
    parser.add_argument("--device", type=_device, default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--out", type=Path, help="the JSONL file to append to (default: benchmarks/rows/...)")
    for op in ops.values():
        op.add_arguments(parser)
    return parser


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _device(text: str) -> str:
    """The name of a device that is there."""
    try:
        torch.empty(1, device=torch.device(text)).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not usable here: {str(error).splitlines()[0]}") from None
    return text


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
