"""What a run borrows from its process and gives back: torch's threads and the handling of Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from .config import require_at_least

Stop = Callable[[], bool]


class Interrupted(Exception):  # noqa: N818  the user's request, not an error
    """Raised where work can stop with nothing half done."""


def stop_if(stop: Stop) -> None:
    if stop():
        raise Interrupted


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Sets the number of threads for torch's kernels. Raises DemoError below 1."""
    require_at_least(1, count, "threads")
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def interruptible() -> Iterator[Stop]:
    """Yields a function that turns true with the first Ctrl-C, so that work stops where its state is whole. A second
    Ctrl-C raises KeyboardInterrupt at once. Outside the main thread, where Python delivers no signals, nothing changes.
    """
    asked = threading.Event()

    def on_interrupt(_signal: int, _frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Ctrl-C waits until the end of the block. Processes started within inherit the mask, so they never receive it, not
    even while they start. Nothing changes where there are no signal masks, as on Windows."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
