"""Carrying out a study's runs: one after another in this process, or shared by several worker processes.

Every run is a checkpoint of its own and a pure function of the configuration: which process trains it, and after
which other run, changes nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from pathlib import Path
from queue import Empty
from typing import Any, NamedTuple

import torch

from .config import DemoError
from .corpus import load_corpus
from .evaluation import Evaluation, Interrupted, Stop, stop_if
from .process import interrupts_held
from .study import Run, Study, StudyConfig
from .trainee import Record, start
from .training import train

POLL = 0.2  # seconds between looks at workers and at Ctrl-C


class Event(NamedTuple):
    """Where a run stands."""

    run: Run
    kind: str  # "begin", "step", "validated" or "finished"
    step: int
    bits: float | None = None  # per held-out byte, once known


Tell = Callable[[Event], Any]


def execute(study: Study, processes: int, tell: Tell, stop: Stop) -> None:
    """Brings every run of the study to its end, from where its checkpoint left it.

    Raises Interrupted soon after `stop()` turns true, with checkpoints written; DemoError when a checkpoint is damaged
    or a worker dies, after the other workers have written theirs.
    """
    pending = []
    for run in study.config.runs():
        record = study.record(run)
        if record is not None and record.finished:
            tell(_finished(run, record))
        else:
            pending.append(run)
    if min(processes, len(pending)) > 1:
        _in_workers(study, pending, processes, tell, stop)
        return
    for run in pending:
        stop_if(stop)
        tell(train_run(study, run, tell, stop))


def train_run(study: Study, run: Run, tell: Tell, stop: Stop) -> Event:
    """Trains one run to its end, told of by the event returned, or until `stop`, then raising Interrupted."""
    trainee = start(study.setting(run), run.router, resume=True)
    train(trainee, _Told(run, tell), stop)
    return _finished(run, trainee.record)


def _finished(run: Run, record: Record) -> Event:
    return Event(run, "finished", record.step, record.evaluations[-1].bits_per_byte)


class _Told:
    """A training.Progress that passes on what is worth telling."""

    def __init__(self, run: Run, tell: Tell) -> None:
        self._run, self._tell = run, tell

    def begin(self, router: str, done: int, total: int) -> None:
        self._tell(Event(self._run, "begin", done))

    def step(self, step: int, loss: float, tokens_per_second: float) -> None:
        self._tell(Event(self._run, "step", step))

    def validated(self, evaluation: Evaluation) -> None:
        self._tell(Event(self._run, "validated", evaluation.step, evaluation.bits_per_byte))

    def measuring_swaps(self) -> None: ...

    def finished(self) -> None: ...


# ---------------------------------------------------------------------------------------------- several processes


def _in_workers(study: Study, pending: Sequence[Run], processes: int, tell: Tell, stop: Stop) -> None:
    # Not forked: threads of torch's do not survive it.
    context = multiprocessing.get_context("spawn")
    halt, events = context.Event(), context.Queue()
    shared = _Shared(study.config, study.corpus.digest, study.device, study.checkpoints, halt, events)
    arguments = (shared, torch.get_num_threads())
    workers = ProcessPoolExecutor(min(processes, len(pending)), context, _enter, arguments)
    with workers:  # which waits for them at the end, whatever happens
        futures: set[Future[Event]] = set()
        try:
            with interrupts_held():  # submitting starts the workers
                futures = {workers.submit(_work, run) for run in pending}
            while futures:
                if stop():
                    _halt(halt, futures)
                done, _ = wait(futures, timeout=POLL, return_when=FIRST_COMPLETED)
                _pass_on(events, tell)
                for future in done:
                    if not future.cancelled():
                        tell(future.result())
                futures = {future for future in futures - done if not future.cancelled()}
            stop_if(stop)
        except BrokenProcessPool:
            if stop():  # without signal masks, Ctrl-C reaches a worker that is not ready for it
                raise Interrupted from None
            raise DemoError(
                "a worker process died, perhaps for want of memory: --resume goes on, with fewer processes", "processes"
            ) from None
        finally:
            _halt(halt, futures)


def _halt(halt: Any, futures: set[Future[Event]]) -> None:
    halt.set()
    for future in futures:
        future.cancel()


def _pass_on(events: Any, tell: Tell) -> None:
    while True:
        try:
            tell(events.get_nowait())
        except Empty:
            return


class _Shared(NamedTuple):
    """What a worker process is told when it starts. It reads the text itself."""

    config: StudyConfig
    digest: str
    device: torch.device
    checkpoints: Path
    halt: Any
    events: Any


_shared: _Shared | None = None  # of a worker process, which serves one study


def _enter(shared: _Shared, threads: int) -> None:
    """Readies a worker process."""
    global _shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it, and says when to stop
    torch.set_num_threads(threads)
    _shared = shared


@cache
def _study() -> Study:
    """The study of this worker process."""
    assert _shared is not None
    corpus = load_corpus(_shared.config.base)
    if corpus.digest != _shared.digest:
        raise DemoError("the text changed while the study ran: start again without --resume", "text")
    return Study(_shared.config, corpus, _shared.device, _shared.checkpoints)


def _work(run: Run) -> Event:
    """One run, in a worker process."""
    assert _shared is not None
    halt, events = _shared.halt, _shared.events
    try:
        return train_run(_study(), run, events.put, lambda: halt.is_set() or _orphaned())
    finally:
        if _orphaned():
            os._exit(1)  # nobody is left to hand out runs, and waiting for one would never end


def _orphaned() -> bool:
    parent = multiprocessing.parent_process()
    return parent is not None and not parent.is_alive()
