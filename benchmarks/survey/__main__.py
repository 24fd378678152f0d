"""``python -m benchmarks.survey``: equal to R's package sampling, and how much faster; append rows, print the table.

A population of n with sizes drawn from U(0.05, 1.05), a sample of n / 10 in proportion to them. What is compared:
logits of given marginals (``UPMEpiktildefrompik``), marginals of given logits (``UPMEqfromw``, ``UPMEpikfromq``), joint
inclusion probabilities (``UPMEpik2frompikw``), and a sample from marginals (``UPmaxentropy``). R runs in a process of
its own for each, in turns with ours; both are measured in CPU seconds of one thread.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import circuitroute as cr
from benchmarks import rows
from benchmarks.registry import UnavailableError

FILE = Path(__file__).parent.parent / "rows" / "cpu-survey.jsonl"
SCRIPT = Path(__file__).with_name("sampling.R")
STEPS = ("logits", "marginals", "joint", "sample")
# R's own stopping rule leaves errors of 1e-6 in all: for comparison it is asked for more, which is not timed.
TIGHT = "logits, 1e-12"


def main() -> int:
    """Run the sizes that are asked for."""
    parser = argparse.ArgumentParser(prog="benchmarks.survey", description=__doc__)
    parser.add_argument("--sizes", default="1000,10000", help="of populations, with commas")
    parser.add_argument("--steps", default=",".join(STEPS), help="with commas")
    parser.add_argument("--repeats", type=int, default=3, help="of every step")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds that a step of R may take")
    parser.add_argument("--out", type=Path, default=FILE, help="the file that rows are appended to")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for n in map(int, options.sizes.split(",")):
        for row in compared(n, options.steps.split(","), options.repeats, options.limit):
            rows.append(options.out, [row])
            print(
                "{n:>6} {step:10} R {r_seconds!s:>8} s, ours {seconds:8.3f} s  {difference!s:10} {outcome}".format(
                    **row
                )
            )
    return 0


def require_r() -> str:
    """The path of Rscript.

    Raises:
        UnavailableError: R, or its package sampling, is not installed.
    """
    path = shutil.which("Rscript")
    if path is None:
        raise UnavailableError("R is not installed: Debian's r-base-core and r-cran-sampling")
    found = subprocess.run([path, "-e", "library(sampling)"], capture_output=True, check=False)
    if found.returncode:
        raise UnavailableError("R has no package sampling: Debian's r-cran-sampling")
    return path


def compared(n: int, steps: Sequence[str], repeats: int, limit: float) -> list[rows.Row]:
    """A row for every step."""
    rscript, k = require_r(), n // 10
    sizes = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.05
    target = sizes * (k / sizes.sum())
    constraint = cr.Exactly(k)
    circuit = cr.compile(constraint, n)
    logits = cr.logits_for_marginals(target, constraint)
    circuit(logits).entropy()  # kernels are compiled, once for all
    ours: dict[str, Callable[[], Tensor]] = {
        "logits": lambda: cr.logits_for_marginals(target, constraint),
        "marginals": lambda: circuit(logits).marginals,
        "joint": lambda: circuit(logits).joint_marginals,
        "sample": lambda: circuit(cr.logits_for_marginals(target, constraint)).sample(key=0),
    }
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        target.numpy().tofile(folder / "pik")
        (logits - logits.mean()).exp().numpy().tofile(folder / "w")
        for step in steps:
            theirs, own, outcome, difference = [], [], "done", None
            for _ in range(repeats):
                start = time.process_time()
                result = ours[step]()
                own.append(time.process_time() - start)
                if outcome == "done":
                    seconds, outcome = run(rscript, step, folder, k, limit)
                    theirs += [seconds] if seconds is not None else []
            if outcome == "done" and step != "sample":
                _, outcome = run(rscript, TIGHT, folder, k, limit) if step == "logits" else (None, outcome)
                difference = largest_difference(step, result, folder) if outcome == "done" else None
            found.append(
                {
                    "op": "survey",
                    "provider": "circuitroute",
                    "n": n,
                    "k": k,
                    "step": step,
                    "seconds": statistics.median(own),
                    "r_seconds": statistics.median(theirs) if theirs else None,
                    "ratio": statistics.median(theirs) / statistics.median(own) if theirs else None,
                    "difference": difference,
                    "outcome": outcome,
                    "limit": limit,
                    "repeats": repeats,
                    **rows.environment(torch.device("cpu")),
                }
            )
    return found


def run(rscript: str, step: str, folder: Path, k: int, limit: float) -> tuple[float | None, str]:
    """(CPU seconds, how it ended) of a step in R, its result in the folder."""
    (folder / "out").unlink(missing_ok=True)
    command = [rscript, str(SCRIPT), step, *(str(folder / x) for x in ("pik", "w")), str(k), str(folder / "out")]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit)
    except subprocess.TimeoutExpired:
        return None, f"R took more than {limit:g} s"
    if done.returncode:
        said = " ".join(done.stderr.replace("Execution halted", "").split())
        return None, "R failed: " + said[:200]
    if not np.isfinite(np.fromfile(folder / "out")).all():
        return float(done.stdout), "R gave no numbers"
    return float(done.stdout), "done"


def largest_difference(step: str, ours: Tensor, folder: Path) -> float:
    """Between the two results: of logits that both add up to 0, else of probabilities."""
    theirs = torch.from_numpy(np.fromfile(folder / "out"))
    if step == "logits":
        theirs = theirs.log() - theirs.log().mean()
    return float((ours.flatten() - theirs).abs().max())


if __name__ == "__main__":
    sys.exit(main())
