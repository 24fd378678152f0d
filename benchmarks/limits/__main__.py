"""``python -m benchmarks.limits``: run the bad cases, each in a process of its own; append rows and print the table."""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks import rows
from benchmarks.limits.cases import CASES

FILE = Path(__file__).parent.parent / "rows" / "cpu-limits.jsonl"
# What is cut off by force, having neither come to an end nor been refused.
CPU_SECONDS = 40
BYTES = 8 << 30


def main() -> int:
    """Run the chosen cases."""
    parser = argparse.ArgumentParser(prog="benchmarks.limits", description=__doc__)
    parser.add_argument("--cases", default=",".join(CASES), help="names, with commas; all of them by default")
    parser.add_argument("--out", type=Path, default=FILE, help="the file that rows are appended to")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measured(options.cases)))
        return 0
    for name in options.cases.split(","):
        row = run(name)
        rows.append(options.out, [row])
        print("{case:30} {cpu_seconds!s:>6} s {peak_mib!s:>6} MiB  {outcome:24} {message}".format(**row), flush=True)
    return 0


def run(name: str) -> rows.Row:
    """The row of a case, run in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.limits", "--one", "--cases", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    killed = {"outcome": "killed", "cpu_seconds": None, "peak_mib": None, "message": done.stderr.strip()[-200:]}
    measurements = json.loads(done.stdout) if done.returncode == 0 else killed
    return {"op": "limits", "case": name, **measurements, **rows.environment(torch.device("cpu"))}


def measured(name: str) -> rows.Row:
    """CPU seconds, memory that the case adds, and how it ended."""
    action = CASES[name]()
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    used = int(time.process_time()) + CPU_SECONDS
    resource.setrlimit(resource.RLIMIT_CPU, (used, used))
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    outcome, message = "done", ""
    try:
        action()
    except Exception as error:  # whatever comes out is the result
        outcome, message = type(error).__name__, str(error)
    spent = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "outcome": outcome,
        "cpu_seconds": round(spent, 2),
        "peak_mib": peak >> 10,
        "message": re.sub(r"/\S*/", "", message)[:300],
    }


if __name__ == "__main__":
    sys.exit(main())
