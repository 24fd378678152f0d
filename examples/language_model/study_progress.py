"""How a study shows: bars for all runs and for those under way in a terminal, a line per finished run elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .extras import optional
from .study import Run
from .study_run import Event, Tell


class PlainStudyProgress:
    """A line per finished run: for log files and pipes."""

    def __init__(self, console: Any, total: int) -> None:
        self._console, self._total = console, total
        self._finished = 0

    def __call__(self, event: Event) -> None:
        if event.kind != "finished":
            return
        self._finished += 1
        self._console.print(
            f"{self._finished}/{self._total}  {event.run}: {event.bits:.3f} bits/byte", highlight=False, markup=False
        )


class BarStudyProgress:
    """One bar for the study, one for each run under way; no wider than 80 columns."""

    def __init__(self, bars: Any, runs: int, steps: int) -> None:
        self._bars, self._steps = bars, steps
        self._all = bars.add_task("all runs", total=runs * steps, note="")
        self._done: dict[Run, int] = {}
        self._tasks: dict[Run, Any] = {}
        self._ended: set[Run] = set()

    def __call__(self, event: Event) -> None:
        run = event.run
        if run in self._ended:  # workers' events may come late
            return
        self._done[run] = event.step
        self._bars.update(self._all, completed=sum(self._done.values()))
        if event.kind == "finished":
            self._ended.add(run)
            if run in self._tasks:
                self._bars.remove_task(self._tasks.pop(run))
            self._bars.console.print(f"{run}: {event.bits:.3f} bits/byte", highlight=False, markup=False)
            self._bars.update(self._all, note=f"{len(self._ended)} finished")
            return
        if run not in self._tasks:
            self._tasks[run] = self._bars.add_task(str(run), total=self._steps, note="")
        note = {} if event.bits is None else {"note": f"valid {event.bits:.3f}"}
        self._bars.update(self._tasks[run], completed=event.step, **note)


@contextmanager
def study_progress_on(console: Any, runs: int, steps: int) -> Iterator[Tell]:
    """The progress that suits a rich.console.Console."""
    if not console.is_terminal:
        yield PlainStudyProgress(console, runs)
        return
    rich = optional("rich.progress")
    columns = (
        rich.TextColumn("{task.description:28}"),
        rich.BarColumn(bar_width=10),
        rich.MofNCompleteColumn(),
        rich.TimeRemainingColumn(),
        rich.TextColumn("{task.fields[note]}"),
    )
    with rich.Progress(*columns, console=console) as bars:
        yield BarStudyProgress(bars, runs, steps)
