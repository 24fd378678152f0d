"""Carrying out a study's runs: one after another in this process, or shared by several worker processes.

Every run has its own checkpoint and is a pure function of the configuration: which process trains it, and after which
other run, changes nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from queue import Empty
from typing import Any, NamedTuple, Protocol

import torch

from ..config import DemoConfig, DemoError, Run
from ..corpus import Corpus
from ..process import Stop, interrupts_held, stop_if
from ..trainee import Record, Setting, saved_record, start
from ..training import Event, Tell, ended, train

POLL = 0.2  # seconds between looks at workers and at Ctrl-C


class StudyConfig(Protocol):
    """Everything that decides a study's numbers, except device, threads and processes."""

    def runs(self) -> list[Run]:
        """In the order in which they are to be carried out, as far as they need not wait."""

    def config_of(self, run: Run) -> DemoConfig:
        """The configuration of one of them."""

    def pretraining(self, run: Run) -> Run | None:
        """The run whose final weights another one starts from; it is one of the study's."""

    def to_json(self) -> dict[str, Any]:
        """All of it."""


@dataclass(frozen=True)
class Study:
    """A study's configuration, texts, device and place on disk.

    corpora: the text of every regime; that of a study without regimes is called "".
    """

    config: StudyConfig
    corpora: Mapping[str, Corpus]
    device: torch.device
    checkpoints: Path

    def setting(self, run: Run) -> Setting:
        """What a run shares with the others of its regime, budget and seed."""
        before = self.config.pretraining(run)
        start = None if before is None else self.setting(before).checkpoint(before.router)
        folder = self.checkpoints / run.regime / f"k{run.k}-seed{run.seed}"
        return Setting(self.config.config_of(run), self.corpora[run.regime], self.device, folder, start, run.regime)

    def record(self, run: Run) -> Record | None:
        """What the checkpoint of a run holds; None where there is none yet. Raises DemoError when it is damaged."""
        return saved_record(self.setting(run), run.router)


def execute(study: Study, processes: int, tell: Tell, stop: Stop) -> None:
    """Brings every run of the study to its end, from where its checkpoint left it.

    Raises Interrupted soon after `stop()` turns true, with checkpoints written; DemoError when a checkpoint is damaged
    or a worker dies: every run then has the last checkpoint it wrote.
    """
    pending = []
    for run in study.config.runs():
        record = study.record(run)
        if record is not None and record.finished:
            tell(ended(run, record))
        else:
            pending.append(run)
    ready = [run for run in pending if study.config.pretraining(run) is None]
    waiting = [run for run in pending if study.config.pretraining(run) is not None]
    for stage in (ready, waiting):
        if min(processes, len(stage)) > 1:
            _in_workers(study, stage, processes, tell, stop)
            continue
        for run in stage:
            stop_if(stop)
            tell(_train(study, run, tell, stop))


def _train(study: Study, run: Run, tell: Tell, stop: Stop) -> Event:
    return train(start(study.setting(run), run.router, resume=True), tell, stop)


# SEVERAL PROCESSES


def _in_workers(study: Study, pending: Sequence[Run], processes: int, tell: Tell, stop: Stop) -> None:
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    worker = _Worker(study, context.Event(), context.Queue())
    workers = ProcessPoolExecutor(min(processes, len(pending)), context, _enter, (worker, torch.get_num_threads()))
    try:
        with interrupts_held():  # submitting starts the workers
            futures = {workers.submit(_work, run) for run in pending}
        while futures:
            stop_if(stop)
            done, futures = wait(futures, POLL, FIRST_COMPLETED)
            _pass_on(worker.events, tell)
            for future in done:
                tell(future.result())
    except BrokenProcessPool:
        stop_if(stop)  # without signal masks, Ctrl-C reaches a worker that is not ready for it
        raise DemoError(
            "a worker process died, perhaps for lack of memory: --resume goes on, with fewer processes", "processes"
        ) from None
    finally:
        worker.halt.set()
        workers.shutdown(cancel_futures=True)  # waits for their checkpoints


def _pass_on(events: Any, tell: Tell) -> None:
    while True:
        try:
            tell(events.get_nowait())
        except Empty:
            return


class _Worker(NamedTuple):
    """What a worker process is given when it starts. The text is in memory that all of them share."""

    study: Study
    halt: Any  # a multiprocessing.Event
    events: Any  # a multiprocessing.Queue


_worker: _Worker  # of a worker process, which serves one study


def _enter(worker: _Worker, threads: int) -> None:
    """Prepares a worker process."""
    global _worker
    _worker = worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it, and says when to stop
    torch.set_num_threads(threads)
    worker.events.cancel_join_thread()  # at the end nobody reads them any more
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Without a parent there is nobody to hand out runs; the last checkpoint stands."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(run: Run) -> Event:
    """One run, in a worker process."""
    return _train(_worker.study, run, _worker.events.put, _worker.halt.is_set)
