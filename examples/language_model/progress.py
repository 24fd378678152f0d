"""How training shows: bars in a terminal, a line now and then elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from .config import Run
from .training import Event, Tell


def make_console() -> Console:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 120)  # nothing is gained by folding a table in a file
    return console


@contextmanager
def progress_on(console: Console, steps: int) -> Iterator[Tell]:
    """The progress of a demo run, of so many steps per router, in the form that suits the console."""
    if not console.is_terminal:
        yield PlainProgress(console, steps)
        return
    with _bars(console, 8, "{task.fields[note]}  {task.fields[validation]}") as bars:
        yield BarProgress(bars, steps)


@contextmanager
def study_progress_on(console: Console, steps: Mapping[Run, int]) -> Iterator[Tell]:
    """The progress of a study, in the form that suits the console. steps: of every run."""
    if not console.is_terminal:
        yield PlainStudyProgress(console, len(steps))
        return
    with _bars(console, 28, "{task.fields[note]}") as bars:
        yield BarStudyProgress(bars, steps)


def _bars(console: Console, name_width: int, note: str) -> Progress:
    """No wider than 80 columns."""
    name = TextColumn(f"{{task.description:{name_width}}}")
    return Progress(
        name, BarColumn(bar_width=10), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn(note), console=console
    )


class PlainProgress:
    """A line per validation: for log files and pipes."""

    def __init__(self, console: Console, steps: int) -> None:
        self._console, self._steps = console, steps
        self._latest = ""

    def __call__(self, event: Event) -> None:
        match event.kind:
            case "begin":
                note = f"from step {event.step}" if event.step else f"{self._steps} steps"
            case "step":
                self._latest = f"loss {event.loss:.3f}, {event.speed:,.0f} tokens/s, "
                return
            case "validated":
                note = f"step {event.step}/{self._steps}, {self._latest}validation {event.bits:.3f} bits/byte"
            case "swaps":
                note = "swap oracle"
            case "finished":
                return
        self._console.out(f"{event.run.router}: {note}")


class BarProgress:
    """One bar per router."""

    def __init__(self, bars: Progress, steps: int) -> None:
        self._bars, self._steps = bars, steps
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, event: Event) -> None:
        router = event.run.router
        if event.kind == "begin":
            self._tasks[router] = self._bars.add_task(router, total=self._steps, note="", validation="")
        shown: dict[str, Any] = {}
        match event.kind:
            case "step":
                shown["note"] = f"loss {event.loss:.3f}  {event.speed:,.0f} tokens/s"
            case "validated":
                shown["validation"] = f"valid {event.bits:.3f}"
            case "swaps":
                shown["note"] = "swap oracle"
            case "finished":
                shown["note"] = "done"
        self._bars.update(self._tasks[router], completed=event.step, **shown)


class PlainStudyProgress:
    """A line per finished run: for log files and pipes."""

    def __init__(self, console: Console, total: int) -> None:
        self._console, self._total = console, total
        self._finished = 0

    def __call__(self, event: Event) -> None:
        if event.kind == "finished":
            self._finished += 1
            self._console.out(f"{self._finished}/{self._total}  {event.run}: {event.bits:.3f} bits/byte")


class BarStudyProgress:
    """One bar for the study, one for each run under way."""

    def __init__(self, bars: Progress, steps: Mapping[Run, int]) -> None:
        self._bars, self._steps = bars, steps
        self._all = bars.add_task("all runs", total=sum(steps.values()), note="")
        self._done: dict[Run, int] = {}
        self._tasks: dict[Run, TaskID] = {}
        self._ended: set[Run] = set()

    def __call__(self, event: Event) -> None:
        run = event.run
        if run in self._ended:  # workers' events may come late
            return
        self._done[run] = event.step
        self._bars.update(self._all, completed=sum(self._done.values()))
        if event.kind == "finished":
            self._end(event)
            return
        if run not in self._tasks:
            self._tasks[run] = self._bars.add_task(str(run), total=self._steps[run], note="")
        note: dict[str, Any] = {} if event.bits is None else {"note": f"valid {event.bits:.3f}"}
        self._bars.update(self._tasks[run], completed=event.step, **note)

    def _end(self, event: Event) -> None:
        self._ended.add(event.run)
        if event.run in self._tasks:
            self._bars.remove_task(self._tasks.pop(event.run))
        self._bars.console.out(f"{event.run}: {event.bits:.3f} bits/byte")
        self._bars.update(self._all, note=f"{len(self._ended)} finished")
