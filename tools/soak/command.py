"""The command line of the soak; see :mod:`tools.soak`."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from tools.soak.work import Tally, in_child, in_threads, resident_mib, run_case

MIB_OF_GROWTH = 64.0


def main(arguments: list[str] | None = None) -> int:
    """Run; 1 where there were faults."""
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    if options.case is not None:
        outcome = run_case(options.case, options.seed)
        print(json.dumps(vars(outcome), indent=1))
        return int(outcome.fault is not None)
    context = multiprocessing.get_context("spawn")
    lines: Any = context.Queue()
    workers = [context.Process(target=_process, args=(index, options, lines)) for index in range(options.processes)]
    for worker in workers:
        worker.start()
    with Path(options.log).open("w", encoding="utf-8") as log:
        reports, faults = _collect(workers, lines, log)
        faults += [fault for report in reports.values() for fault in _memory_faults(report["rss"], options)]
        missing = [i for i in range(options.processes) if i not in reports]
        faults += [{"about": f"process {i}", "message": f"ended with {workers[i].exitcode}"} for i in missing]
        summary = _summary(reports, faults)
        log.write(json.dumps({"summary": summary}) + "\n")
    _show(summary, faults, options.log)
    return int(bool(faults))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--case", type=int, help="run this case alone, and show what it gave")
    parser.add_argument("--log", default="soak.jsonl")
    parser.add_argument("--ceiling", type=float, default=4096.0, help="MiB of resident memory of one process")
    return parser


def _process(index: int, options: argparse.Namespace, lines: Any) -> None:
    """Rounds of threads, and a worker in between; then a report."""
    torch.set_num_threads(1)
    tally = Tally(lambda line: lines.put({"process": index, **line}))
    start = time.monotonic()
    end = start + 60 * options.minutes
    number, rounds, rss = options.first + index, 0, [(0.0, resident_mib())]
    while (now := time.monotonic()) < end:
        until = min(end, now + max(3.0, 0.6 * options.minutes))
        following = in_threads(number, options.processes, options.threads, until, options.seed, tally)
        recent = list(range(number, following, options.processes))[-2:]
        number, rounds = following, rounds + 1
        if rounds % 5 == 0 and recent:
            in_child("fork" if rounds % 10 else "spawn", recent, options.seed, tally)
        rss.append((time.monotonic() - start, resident_mib()))
        lines.put({"process": index, "seconds": round(rss[-1][0]), "rss_mib": round(rss[-1][1]), "cases": tally.cases})
        if rss[-1][1] > options.ceiling:
            tally.fault("memory", f"{rss[-1][1]:.0f} MiB are resident: more than {options.ceiling:.0f}")
            break
    lines.put({"process": index, "report": {"cases": tally.cases, "covered": dict(tally.covered), "rss": rss}})


def _collect(workers: list[Any], lines: Any, log: Any) -> tuple[dict[int, Any], list[dict[str, Any]]]:
    """Write down what the processes say until all have reported or ended."""
    reports: dict[int, Any] = {}
    faults: list[dict[str, Any]] = []
    while len(reports) < len(workers):
        try:
            line = lines.get(timeout=5)
        except Exception:  # queue.Empty of another process's queue
            if not any(worker.is_alive() for worker in workers):
                break
            continue
        if "report" in line:
            reports[line["process"]] = line["report"]
            continue
        log.write(json.dumps(line) + "\n")
        log.flush()
        if "fault" in line:
            faults.append(line["fault"])
            print(f"FAULT {line['fault']['about']}\n  {line['fault']['message'][:500]}", flush=True)
    for worker in workers:
        worker.join()
    return reports, faults


def _memory_faults(rss: list[tuple[float, float]], options: argparse.Namespace) -> list[dict[str, str]]:
    """Growth from when all is warm, a third of the time, to the end."""
    early, late = growth(rss)
    if options.minutes < 5 or late - early <= MIB_OF_GROWTH:
        return []
    return [{"about": "memory", "message": f"resident memory grew from {early:.0f} to {late:.0f} MiB"}]


def growth(rss: list[tuple[float, float]]) -> tuple[float, float]:
    """(MiB in the second fifth of the time, MiB in the last), medians."""
    end = rss[-1][0]

    def median(low: float, high: float) -> float:
        found = sorted(mib for seconds, mib in rss if low * end <= seconds <= high * end)
        return found[len(found) // 2] if found else rss[-1][1]

    return median(0.2, 0.4), median(0.8, 1.0)


def _summary(reports: dict[int, Any], faults: list[dict[str, Any]]) -> dict[str, Any]:
    covered = Counter[str]()
    for report in reports.values():
        covered.update(report["covered"])
    return {
        "cases": sum(report["cases"] for report in reports.values()),
        "faults": len(faults),
        "covered": dict(sorted(covered.items())),
        "rss_mib": {index: [(round(s), round(m)) for s, m in report["rss"]] for index, report in reports.items()},
        "growth_mib": {index: [round(x) for x in growth(report["rss"])] for index, report in reports.items()},
    }


def _show(summary: dict[str, Any], faults: list[dict[str, Any]], log: str) -> None:
    for name, times in summary["covered"].items():
        print(f"{times:9,}  {name}")
    for index, (early, late) in summary["growth_mib"].items():
        print(f"process {index}: resident {early} MiB after a fifth of the time, {late} MiB at the end")
    print(f"{summary['cases']:,} cases, {len(faults)} faults; {log}")
