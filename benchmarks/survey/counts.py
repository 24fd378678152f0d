"""``python -m benchmarks.survey.counts``: the law of a count beside scipy's and fast-poibin's, in accuracy and time.

All probabilities of the counts of N coins, whose own are drawn from U(0, 1). The truth is a plain recursion over the
coins in long double, which adds positive numbers alone. The largest relative error is over the counts whose probability
float64 can hold, above 1e-300, and over those above 1e-10, up to 20,000 coins. Every measurement is a process of its
own, in turns, in CPU seconds of one thread; what takes more than the limit, or more memory, is said to.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import circuitroute as cr
from benchmarks import rows
from benchmarks.registry import UnavailableError
from circuitroute.statistics.wide import Array

FILE = Path(__file__).parent.parent / "rows" / "cpu-survey.jsonl"
BYTES = 8 << 30
LEAST = 0.1  # seconds of a measurement
CHECKED = 20_000  # coins up to which there is a truth; beyond, long double ends too


def ours(p: Array) -> Array:
    """``cr.PoissonBinomial``."""
    found: Array = cr.PoissonBinomial(probs=torch.from_numpy(p)).pmf().numpy()
    return found


def scipys(p: Array) -> Array:
    """``scipy.stats.poisson_binom``."""
    from scipy.stats import poisson_binom

    found: Array = poisson_binom(p).pmf(np.arange(len(p) + 1))
    return found


def fast_poibins(p: Array) -> Array:
    """``fast_poibin.PoiBin``.

    Raises:
        UnavailableError: it is not installed.
    """
    try:
        from fast_poibin import PoiBin
    except ImportError as reason:
        raise UnavailableError("fast-poibin is not installed: pip install fast-poibin") from reason
    found: Array = np.asarray(PoiBin(p).pmf)
    return found


PROVIDERS: dict[str, Callable[[Array], Array]] = {"circuitroute": ours, "scipy": scipys, "fast-poibin": fast_poibins}


def coins(n: int) -> Array:
    """[n] the probabilities."""
    return np.random.default_rng(n).random(n)


def truth(p: Array) -> Any:
    """[n + 1] in long double."""
    found = np.zeros(len(p) + 1, dtype=np.longdouble)
    found[0] = 1
    for size, x in enumerate(p.astype(np.longdouble), start=1):
        below = found[:size] * x
        found[: size + 1] *= 1 - x
        found[1 : size + 1] += below
    return found


def measured(name: str, n: int, repeats: int) -> dict[str, float | None]:
    """Seconds, and errors where there is a truth beside."""
    p = coins(n)
    PROVIDERS[name](coins(10))
    spent = []
    for _ in range(repeats):
        start, runs = time.process_time(), 0
        while time.process_time() - start < LEAST:  # the clock has steps
            found, runs = PROVIDERS[name](p), runs + 1
        spent.append((time.process_time() - start) / runs)
    errors: dict[str, float | None] = {"error": None, "error_above_1e-10": None}
    if n > CHECKED:
        return {"seconds": statistics.median(spent), **errors}
    exact = truth(p)
    for label, least in (("error", 1e-300), ("error_above_1e-10", 1e-10)):
        held = exact > least
        errors[label] = float((np.abs(found[held].astype(np.longdouble) / exact[held] - 1)).max())
    return {"seconds": statistics.median(spent), **errors}


def main() -> int:
    """Run the sizes and providers that are asked for."""
    parser = argparse.ArgumentParser(prog="benchmarks.survey.counts", description=__doc__)
    parser.add_argument("--sizes", default="10,100,1000,10000,100000", help="numbers of coins, with commas")
    parser.add_argument("--providers", default=",".join(PROVIDERS), help="with commas")
    parser.add_argument("--repeats", type=int, default=3, help="of every measurement")
    parser.add_argument("--limit", type=int, default=90, help="CPU seconds of a measurement, its truth included")
    parser.add_argument("--out", type=Path, default=FILE, help="the file that rows are appended to")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one:
        resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (options.limit, options.limit))
        print(json.dumps(measured(options.one, int(options.sizes), options.repeats)))
        return 0
    for n in map(int, options.sizes.split(",")):
        for name in options.providers.split(","):
            row = run(name, n, options.repeats, options.limit)
            rows.append(options.out, [row])
            print("{n:>7} {provider:13} {seconds!s:>22} s  {error!s:>24}  {outcome}".format(**row), flush=True)
    return 0


def run(name: str, n: int, repeats: int, limit: int) -> rows.Row:
    """The row of a measurement, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.survey.counts", "--one", name, "--sizes", str(n)]
    command += ["--repeats", str(repeats if n < 100_000 else 1), "--limit", str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found: dict[str, Any] = {"seconds": None, "error": None, "error_above_1e-10": None}
    last = (done.stderr.strip().splitlines() or [f"more than {limit} s of CPU time"])[-1][:200]
    outcome = "done" if done.returncode == 0 else last
    found |= json.loads(done.stdout) if done.returncode == 0 else {}
    row = {"op": "poisson-binomial", "provider": name, "n": n, **found, "outcome": outcome, "limit": limit}
    return row | rows.environment(torch.device("cpu"))


if __name__ == "__main__":
    sys.exit(main())
