"""What is measured for the front page alone: errors while training, loads while balancing, budgets in use, a log."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from routing_testbed import pareto
from routing_testbed.layered_student import LayeredStudent
from routing_testbed.layered_task import LAYERED, LayeredTask
from routing_testbed.measures import normalised_error
from routing_testbed.setting import SHAPES, Setting
from routing_testbed.student import Student
from routing_testbed.task import Batch, Task
from routing_testbed.training import keys, new_student, one_thread, train

import circuitroute as cr

Row = dict[str, Any]

LEARNERS = ("top-k", "sampled-1", "densemixer", "probe-balance")
EVERY, LOGGED = 25, 20  # steps between two points of a curve, and between two lines of the log
SPLIT, MEAN = "rising", 2.5  # experts per token and layer of the teacher of four layers
TOTALS = ("range-probe", "budget-mode")


@one_thread()
def write(rows: Path, log: Path, seeds: int, steps: int | None) -> None:
    """All rows, and the log of one of the runs."""
    shape, layered = (each if steps is None else replace(each, steps=steps) for each in (Setting(), LAYERED))
    log.unlink(missing_ok=True)
    with rows.open("w", encoding="utf-8") as out:
        for row in (*_loads(seeds), *_errors(shape, seeds), *_totals(layered, seeds, log)):
            out.write(json.dumps(row) + "\n")


def _errors(setting: Setting, seeds: int) -> Iterator[Row]:
    """Held-out error while training, a row for each point: one of 16 experts per token."""
    for seed in range(seeds):
        task = Task(SHAPES["16x1"], setting, seed)
        batches, held_out = list(task.batches()), task.held_out()
        for name in LEARNERS:
            student = new_student(task, name)
            errors = _watched(student, held_out, seed)
            train(student, task, batches)
            yield {"op": "errors", "method": name, "seed": seed, "every": EVERY, "errors": errors}


def _watched(student: Student, held_out: Batch, seed: int) -> list[float]:
    """The list that training will fill with an error every so many steps."""
    errors: list[float] = []
    after, steps = student.after, itertools.count(1)

    def measured(routing: cr.Routing) -> None:
        after(routing)
        step = next(steps)
        if step % EVERY == 0:
            student.eval()
            with torch.no_grad():
                output, _ = student(held_out.hidden, keys(seed, step, len(held_out.hidden)))
            student.train()
            errors.append(normalised_error(output, held_out.target).item())

    student.after = measured  # type: ignore[method-assign]
    return errors


def _loads(seeds: int) -> Iterator[Row]:
    """Max violation of a batch's modes before the controller has seen it; the stream of `examples/balance.py`."""
    controllers = {
        "none": (None, 100),
        "LossFree": (cr.balance.LossFree(16, 1e-2), 300),
        "Quantile": (cr.balance.Quantile(16), 100),
        "ExactBalance": (cr.balance.ExactBalance(16, temperature=0.25), 30),
    }
    circuit = cr.compile(cr.Exactly(2), 16)
    for seed in range(min(seeds, 3)):
        for name, (controller, steps) in controllers.items():
            generator = torch.Generator().manual_seed(seed)
            preference, violations = torch.randn(16, generator=generator), []
            state = None if controller is None else controller.init()
            for _ in range(steps):
                logits = torch.randn(8192, 16, generator=generator) + preference
                routing = cr.route(logits, circuit, training=False, bias=None if state is None else state.bias)
                violations.append(cr.metrics.max_violation(routing))
                state = None if controller is None else controller.update(state, routing)
            yield {"op": "loads", "controller": name, "seed": seed, "violations": violations}


def _totals(setting: Setting, seeds: int, log: Path) -> Iterator[Row]:
    """Tokens by how many experts they execute in all layers of a trained student; the first one writes its log."""
    for seed in range(min(seeds, 3)):
        task = LayeredTask(SPLIT, setting, seed)
        batches, held_out = list(task.batches()), task.held_out()
        for name in TOTALS:
            build, _ = pareto.METHODS[name]
            torch.manual_seed(seed)
            student = build(SPLIT, MEAN, setting).train()
            if name == TOTALS[0] and seed == 0:
                _logged(student, cr.metrics.RunLog(log, "range, one probe, four layers"))
            pareto._train(student, task, batches)
            student.eval()
            with torch.no_grad():
                _, routings = student(held_out.hidden, keys(seed, len(batches), len(held_out.hidden)))
            totals = torch.stack([routing.counts for routing in routings]).sum(0)
            yield {"op": "totals", "method": name, "seed": seed, "tokens": torch.bincount(totals).tolist()}


def _logged(student: LayeredStudent, log: cr.metrics.RunLog) -> None:
    """From here on training writes a line every so many steps."""
    after, steps = student.after, itertools.count()

    def written(routings: Sequence[cr.Routing]) -> None:
        after(routings)
        step = next(steps)
        if step % LOGGED == 0:
            log.append(step, cr.metrics.summary(routings))

    student.after = written  # type: ignore[method-assign]
