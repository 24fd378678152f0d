"""One case after the other: in threads, in processes, and in workers that are forked and spawned in between."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.context import ForkContext, SpawnContext
from typing import Any

from tools.soak import checks, routes
from tools.soak.cases import case as case_of
from tools.soak.checks import Fault, Run

CONTEXTS: dict[str, ForkContext | SpawnContext] = {
    "fork": multiprocessing.get_context("fork"),
    "spawn": multiprocessing.get_context("spawn"),
}


@dataclass
class Outcome:
    """What became of a case."""

    number: int
    covered: list[str] = field(default_factory=list)
    digest: str = ""
    fault: dict[str, Any] | None = None


def run_case(number: int, seed: int = 0) -> Outcome:
    """Everything of one case; whatever goes wrong is its fault."""
    outcome, about = Outcome(number), f"case {number}"
    run: Run | None = None
    try:
        case = case_of(number, seed)
        about = str(case)
        run = Run(case)
        circuit = checks.circuit_of(case.rule)
        if circuit is None:
            outcome.covered = [*checks.describe(case), "infeasible"]
            return outcome
        engine = checks.check(run, circuit)
        routes.check(run, circuit.with_engine(engine))
        outcome.covered = [f"{circuit.op} {engine}", *checks.describe(case), *run.covered]
        outcome.digest = checks.seen(run)
    except Exception as error:
        last = run.covered[-1] if run is not None and run.covered else None
        outcome.fault = {
            "case": number, "about": about, "kind": type(error).__name__, "message": str(error)[:2000],
            "after": last, "trace": "" if isinstance(error, Fault) else traceback.format_exc()[-3000:],
        }  # fmt: skip
    return outcome


class Tally:
    """Outcomes of several threads."""

    def __init__(self, report: Callable[[dict[str, Any]], None]) -> None:
        self.cases, self.faults, self.covered = 0, 0, Counter[str]()
        self._lock, self._report = threading.Lock(), report

    def add(self, outcome: Outcome) -> None:
        """One more case."""
        with self._lock:
            self.cases += 1
            self.covered.update(outcome.covered)
            if outcome.fault is not None:
                self.faults += 1
                self._report({"fault": outcome.fault})

    def fault(self, about: str, message: str) -> None:
        """Something that is no single case's fault."""
        with self._lock:
            self.faults += 1
            self._report({"fault": {"case": None, "about": about, "message": message}})


def in_threads(first: int, step: int, threads: int, until: float, seed: int, tally: Tally) -> int:
    """Cases first, first + step, ..., taken by several threads in turn until the time is up; the next number."""
    lock, upcoming = threading.Lock(), first

    def work() -> None:
        nonlocal upcoming
        while time.monotonic() < until:
            with lock:
                number, upcoming = upcoming, upcoming + step
            tally.add(run_case(number, seed))

    every = [threading.Thread(target=work) for _ in range(threads)]
    for thread in every:
        thread.start()
    for thread in every:
        thread.join()
    return upcoming


def _child(numbers: list[int], seed: int, to_parent: Any) -> None:
    to_parent.send([run_case(number, seed) for number in numbers])


def in_child(method: str, numbers: list[int], seed: int, tally: Tally, patience: float = 300.0) -> None:
    """The same cases in a process that is forked or spawned: they must give the same there, to the bit."""
    context = CONTEXTS[method]
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(numbers, seed, there))
    child.start()
    there.close()
    try:
        found = here.recv() if here.poll(patience) else None
    except EOFError:
        found = None
    if found is None:
        child.kill()
        child.join()
        tally.fault(f"{method} of cases {numbers}", f"no answer within {patience} s, exit code {child.exitcode}")
        return
    child.join()
    for theirs in found:
        ours = run_case(theirs.number, seed)
        tally.add(theirs)
        tally.add(ours)
        if ours.digest != theirs.digest:
            tally.fault(f"{method} of case {ours.number}", "other values than in the parent process")
    tally.covered[f"{method}ed workers"] += 1


def resident_mib() -> float:
    """Resident memory of this process."""
    with open("/proc/self/statm", encoding="ascii") as status:
        return int(status.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
