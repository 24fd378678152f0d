"""One student from its first step to its row, and all students of a task, which see the same data."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch

import circuitroute as cr

from .measures import measure, normalised_error
from .methods import methods_of
from .setting import Setting, Shape
from .student import Student
from .task import Batch, Task

Row = dict[str, Any]


@contextmanager
def one_thread() -> Iterator[None]:
    """For torch's kernels, which are too small here to gain from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@one_thread()
def run_task(shape: Shape, names: Sequence[str], seed: int, setting: Setting) -> list[Row]:
    """A row for each method, all in this process and on one thread, so that their CPU times compare.

    ``cpu_ratio`` is the median CPU time of a step over that of the first method.
    """
    task = Task(shape, setting, seed)
    batches, held_out = list(task.batches()), task.held_out()
    rows = [_run(task, name, batches, held_out) for name in names]
    for row in rows:
        row["cpu_ratio"] = row["cpu_per_step"] / rows[0]["cpu_per_step"]
    return rows


def _run(task: Task, name: str, batches: Sequence[Batch], held_out: Batch) -> Row:
    student = new_student(task, name)
    seconds = train(student, task, batches)
    student.eval()
    with torch.no_grad():
        output, routing = student(held_out.hidden, keys(task.seed, len(batches), len(held_out.hidden)))
    return {
        "table": "learning",
        "shape": str(task.shape),
        "method": name,
        "seed": task.seed,
        "steps": len(batches),
        **measure(output, routing, held_out),
        "cpu_per_step": median(seconds),
    }


def new_student(task: Task, name: str) -> Student:
    """The same initial weights for all methods, and the same draws of torch's generator from here on."""
    torch.manual_seed(task.seed)
    return methods_of(task.shape)[name](task.shape, task.setting).train()


def train(student: Student, task: Task, batches: Sequence[Batch]) -> list[float]:
    """Trains, and returns the CPU seconds of each step."""
    optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=task.setting.rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: (1 + math.cos(math.pi * step / len(batches))) / 2
    )
    seconds = []
    for step, batch in enumerate(batches):
        began = time.process_time()
        training_step(student, optimizer, batch, keys(task.seed, step, len(batch.hidden)))
        seconds.append(time.process_time() - began)
        schedule.step()
    return seconds


def training_step(student: Student, optimizer: torch.optim.Optimizer, batch: Batch, key: torch.Tensor) -> None:
    output, routing = student(batch.hidden, key)
    loss = normalised_error(output, batch.target) + student.penalty(routing, batch)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    student.after(routing)


def keys(seed: int, step: int, tokens: int) -> torch.Tensor:
    """[T], one for each token of each step."""
    return cr.random_key(seed, step, torch.arange(tokens))
