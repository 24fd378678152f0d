"""What a training step costs: methods take turns, so that whatever else the machine does meets all of them alike."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import cycle, islice
from statistics import median

import torch

from .methods import methods_of
from .setting import SHAPES, Setting
from .task import Batch, Task
from .training import Row, keys, new_student, one_thread, training_step

METHODS = ("top-k", "mode", "probe", "probe-none", "probes-2", "probes-all", "densemixer")
ROUNDS = 100
SIZES = {"small": Setting(), "wide": Setting(hidden=128, inner=256)}  # the tables' size, and one where experts dominate


@one_thread()
def run(name: str, size: str, rounds: int = ROUNDS) -> list[Row]:
    """A row for each method: the median over rounds of its CPU time over top-k's, and over that of the mode."""
    shape = SHAPES[name]
    assert set(METHODS) <= set(methods_of(shape))
    task = Task(shape, SIZES[size], 0)
    seconds = _seconds(task, list(islice(task.batches(), 8)), rounds)
    return [
        {
            "table": "timing",
            "shape": name,
            "size": size,
            "method": method,
            "seed": 0,
            "over_top_k": _ratio(seconds[method], seconds["top-k"]),
            "over_mode": _ratio(seconds[method], seconds["mode"]),
            "limit": (shape.k + 1.3) / shape.k,
        }
        for method in METHODS
    ]


def _seconds(task: Task, batches: Sequence[Batch], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each method's steps. The first round, in which kernels may have to be compiled, is not kept."""
    students = {name: new_student(task, name) for name in METHODS}
    optimizers = {name: torch.optim.Adam(student.parameters()) for name, student in students.items()}
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    for step, batch in enumerate(islice(cycle(batches), rounds + 1)):
        for name, student in students.items():
            began = time.process_time()
            training_step(student, optimizers[name], batch, keys(0, step, len(batch.hidden)))
            seconds[name].append(time.process_time() - began)
    return {name: found[1:] for name, found in seconds.items()}


def _ratio(times: Sequence[float], others: Sequence[float]) -> float:
    return median(one / other for one, other in zip(times, others, strict=True))
