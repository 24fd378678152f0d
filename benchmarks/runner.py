"""Time the providers of a case side by side and make rows of it.

One round runs every provider once, in an order that rotates, and copies for the memory floor, so that drift of the
machine touches all alike.
A run is a training step's worth: forward with the graph that backward needs, then backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import Clock, Copies, clock_for, peak_mib, quiet
from benchmarks.registry import BOTH, FORWARD, PASSES, Case, Forward, Op, Outputs, Provider, UnavailableError
from benchmarks.rows import Row, environment, versions

WARM_UP = 2


@dataclass
class Entry:
    """A provider made ready for a case, and the milliseconds it took so far."""

    provider: Provider
    forward: Forward
    samples_ms: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in PASSES})

    def median_ms(self, name: str) -> float:
        return float(np.median(self.samples_ms[name]))


def run_case(
    op: Op,
    case: Case,
    providers: Sequence[Provider],
    *,
    repeats: int = 20,
    threads: int = 1,
    skip_unavailable: bool = True,
    report: Callable[[str], None] = print,
) -> list[Row]:
    """Rows of every provider for one case, the baseline's first.

    Raises:
        UnavailableError: a provider cannot run here and ``skip_unavailable`` is false.
    """
    entries = _prepare(case, providers, skip_unavailable, report)
    device = case.logits.device
    clock = clock_for(device, threads)
    with quiet(threads):
        for entry in entries:
            for _ in range(WARM_UP):
                _run(entry.forward, case)
        floor_ms = _time_rounds(entries, case, clock, repeats)
        common = {"floor_ms": floor_ms, **environment(device)}
        common |= {"threads": threads, "repeats": repeats, "clock": clock.name}
        baseline = next(entry for entry in entries if entry.provider.name == op.baseline)
        return [row | common for entry in entries for row in _rows(op, case, entry, baseline, floor_ms)]


def _prepare(
    case: Case, providers: Sequence[Provider], skip_unavailable: bool, report: Callable[[str], None]
) -> list[Entry]:
    """The providers that can run; those that cannot are reported, reason by reason, or raise."""
    entries: list[Entry] = []
    skipped: dict[str, list[str]] = {}
    for provider in providers:
        try:
            entries.append(Entry(provider, provider.build(case)))
        except UnavailableError as reason:
            if not skip_unavailable:
                raise
            skipped.setdefault(str(reason), []).append(provider.name)
    for why, names in skipped.items():
        report(f"skipped {', '.join(names)}: {why}")
    return entries


def _time_rounds(entries: list[Entry], case: Case, clock: Clock, repeats: int) -> float:
    """Fill the entries' samples; returns the median milliseconds of a copy, the memory floor."""
    copies = Copies(case.logits)
    copies.time(clock)  # the first pass warms up
    floors_ms = []
    for round_number in range(repeats):
        _time_round(entries, case, clock, first=round_number % len(entries))
        floors_ms.append(copies.time(clock))
    return float(np.median(floors_ms))


def _time_round(entries: list[Entry], case: Case, clock: Clock, first: int) -> None:
    for entry in entries[first:] + entries[:first]:
        leaf = _leaf(case)
        start = clock.mark()
        outputs = entry.forward(leaf)
        middle = clock.mark()
        _backward(outputs, leaf, case)
        end = clock.mark()
        entry.samples_ms[FORWARD].append(middle - start)
        entry.samples_ms[BOTH].append(end - start)


def _leaf(case: Case) -> Tensor:
    return case.logits.detach().clone().requires_grad_()


def _backward(outputs: Outputs, leaf: Tensor, case: Case) -> Tensor:
    """The gradient of the logits; zeros where nothing was to be differentiated."""
    if not outputs.result.requires_grad:
        return torch.zeros_like(leaf)
    upstream = [case.upstream(result) for result in outputs.results]
    (gradient,) = torch.autograd.grad(outputs.results, leaf, upstream)
    return gradient


def _run(forward: Forward, case: Case) -> tuple[Outputs, Tensor]:
    leaf = _leaf(case)
    outputs = forward(leaf)
    return outputs, _backward(outputs, leaf, case)


def _rows(op: Op, case: Case, entry: Entry, baseline: Entry, floor_ms: float) -> list[Row]:
    errors, about, passes = _judged(op, case, entry)
    peaks = {
        FORWARD: peak_mib(lambda: entry.forward(_leaf(case)), case.logits.device),
        BOTH: peak_mib(lambda: _run(entry.forward, case), case.logits.device),
    }
    return [
        {
            **about,
            "pass": name,
            **_timings(entry.samples_ms[name]),
            "ratio_to_topk": entry.median_ms(name) / baseline.median_ms(name),
            "ratio_to_floor": entry.median_ms(name) / floor_ms,
            "peak_mib": peaks[name],
            "max_abs_error": errors[name],
        }
        for name in passes
    ]


def _judged(op: Op, case: Case, entry: Entry) -> tuple[dict[str, float | None], Row, tuple[str, ...]]:
    """The errors of one more run, what the rows say of the provider and the case, and which passes there are."""
    outputs, gradient = _run(entry.forward, case)
    errors = _checked(entry, op.errors(case, outputs, gradient))
    about = {
        "op": op.name,
        "provider": entry.provider.name,
        "engine": entry.provider.engine,
        "note": entry.provider.note,
        **versions(entry.provider.engine),
        **case.describe(),
        **outputs.about,
    }
    return errors, about, PASSES if outputs.result.requires_grad else (FORWARD,)


def _checked(entry: Entry, errors: dict[str, float | None]) -> dict[str, float | None]:
    """Timings of a provider that returns no numbers would mean nothing."""
    for name, error in errors.items():
        if error is not None and not math.isfinite(error):
            raise ValueError(f"{entry.provider.name}, {name}: its error against the truth is {error}")
    return errors


def _timings(samples_ms: list[float]) -> Row:
    p20, median, p80 = np.percentile(samples_ms, [20, 50, 80]).tolist()
    return {"median_ms": median, "p20_ms": p20, "p80_ms": p80}
