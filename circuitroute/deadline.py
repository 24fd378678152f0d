"""How much CPU time a call may take: the call sets a budget, and the loops below it look at it.

A constraint or a file can be small and cost more than anyone has. So what compiles, reads, verifies or counts opens a
budget of CPU seconds of its thread, 12 by default, and every loop that can run long calls :func:`tick`, which costs a
tenth of a microsecond and looks at the clock now and then. When the budget is spent, it raises
:class:`~circuitroute.CircuitTooLargeError`: nothing half built is kept. What is done in time is the same whatever the
budget.

The budget is ambient, so that a compiler of anyone's, ``function(constraint, n, max_nodes)``, is under it; in loops of
your own call ``tick()``. Of a budget inside another the earlier end counts; one left at its default just joins.
:func:`within` sets a budget for what takes none as an argument::

    with circuitroute.deadline.within(60.0):
        print(circuit.summary())

Python code of others, such as a constraint's ``merge``, is never interrupted: a call that does not return is
waited for.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from circuitroute._validate import as_number
from circuitroute.errors import CircuitTooLargeError

# Freeing what was built takes time, too: with that, a refusal comes within 15 seconds.
DEFAULT_SECONDS = 12.0
# Steps between two looks at the clock, and how far apart the looks are at most, in seconds, where steps are slow.
STRIDE = 128
APART = 0.01

clock: Callable[[], float] = time.thread_time


class OutOfTimeError(CircuitTooLargeError):
    """The budget of CPU seconds is spent."""


class _Budget:
    """When it ends, and what to say then."""

    def __init__(self, seconds: float, doing: Callable[[], str], remedy: str, outer: _Budget | None) -> None:
        self.seconds = seconds
        self.outer = outer
        self.start = clock()
        self.end = self.start + seconds
        self.left = 0
        self.last = self.start
        self.doing = doing
        self.remedy = remedy
        self.note: Callable[[], str] | None = None

    def look(self) -> None:
        """Look at the clock.

        Raises:
            OutOfTimeError: the time is over.
        """
        now = clock()
        if now > self.end:
            raise OutOfTimeError(self.message(now))
        slow = (now - self.last) / APART
        self.left = STRIDE if slow < 1 else int(STRIDE / slow)
        self.last = now

    def message(self, now: float) -> str:
        """What was done for how long, which part took it, and what would help."""
        where = f" ({self.note()})" if self.note is not None else ""
        return (
            f"{self.doing()} took {now - self.start:.3g} seconds of CPU time{where}, more than "
            f"max_seconds={self.seconds:g} allows: raise max_seconds (None: no limit), or {self.remedy}"
        )


class _Here(threading.local):
    """The innermost budget of a thread."""

    budget: _Budget | None = None


_here = _Here()


def tick(steps: int = 1) -> None:
    """Say that a loop goes on, by so many steps of about a microsecond.

    Raises:
        CircuitTooLargeError: the time is over.
    """
    budget = _here.budget
    if budget is not None:
        budget.left -= steps
        if budget.left < 0:
            budget.look()


def remaining() -> float:
    """How many CPU seconds are left; infinite where there is no limit. For what bounds itself, such as a process."""
    budget = _here.budget
    return math.inf if budget is None else budget.end - clock()


def charge(seconds: float) -> None:
    """Count CPU seconds that another process or thread spent for this call.

    Raises:
        CircuitTooLargeError: the time is over.
    """
    budget, inner = _here.budget, _here.budget
    while budget is not None:
        budget.start -= seconds
        budget.end -= seconds
        budget = budget.outer
    if inner is not None:
        inner.look()


def note(what: Callable[[], str]) -> None:
    """Say what is being done, for the message: a function that is called only if time runs out."""
    if _here.budget is not None:
        _here.budget.note = what


def as_seconds(max_seconds: object) -> float:
    """``max_seconds`` as a positive float, infinite for None.

    Raises:
        TypeError: it is not a number.
        ValueError: it is not positive; NaN is not.
    """
    if max_seconds is None:
        return math.inf
    seconds = as_number("max_seconds", max_seconds)
    if not seconds > 0:
        raise ValueError(
            f"max_seconds={max_seconds!r}: must be a positive number of CPU seconds; None or math.inf for no limit"
        )
    return seconds


@contextmanager
def within(
    max_seconds: float | None = DEFAULT_SECONDS,
    doing: Callable[[], str] = lambda: "this",
    remedy: str = "ask for less",
) -> Iterator[None]:
    """A budget of CPU seconds of this thread for what is called inside.

    Args:
        max_seconds: how many; None or infinity for no limit. Inside another budget the earlier end counts, and the
            default adds nothing.
        doing: says what is done, for the message.
        remedy: what would help besides more time, for the message.

    Raises:
        CircuitTooLargeError: the time was over before what is inside was done.
        TypeError: ``max_seconds`` is not a number.
        ValueError: ``max_seconds`` is not positive.
    """
    seconds, outer = as_seconds(max_seconds), _here.budget
    if outer is not None and (seconds == DEFAULT_SECONDS or clock() + seconds >= outer.end):
        before = outer.note
        yield
        outer.note = before
        return
    _here.budget = _Budget(seconds, doing, remedy, outer)
    try:
        yield
    finally:
        _here.budget = outer
        if outer is not None:
            outer.left = 0
