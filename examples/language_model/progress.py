"""How training shows: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .evaluation import Evaluation
from .extras import optional
from .training import Progress


class PlainProgress:
    """A line per validation: for log files and pipes."""

    def __init__(self, console: Any) -> None:
        self._console = console
        self._router = ""
        self._total = 0
        self._rate = ""

    def begin(self, router: str, done: int, total: int) -> None:
        self._router, self._total = router, total
        note = f"from step {done}" if done else f"{total} steps"
        self._console.print(f"{router}: {note}", highlight=False)

    def step(self, step: int, loss: float, tokens_per_second: float) -> None:
        self._rate = f"loss {loss:.3f}, {tokens_per_second:,.0f} tokens/s"

    def validated(self, evaluation: Evaluation) -> None:
        self._console.print(
            f"{self._router}: step {evaluation.step}/{self._total}, {self._rate}, "
            f"validation {evaluation.bits_per_byte:.3f} bits/byte",
            highlight=False,
        )

    def measuring_swaps(self) -> None:
        self._console.print(f"{self._router}: swap oracle", highlight=False)

    def finished(self) -> None: ...


class BarProgress:
    """One bar per router, in a terminal; no wider than 80 columns."""

    def __init__(self, bars: Any) -> None:
        self._bars = bars
        self._task: Any = None

    def begin(self, router: str, done: int, total: int) -> None:
        self._task = self._bars.add_task(router, completed=done, total=total, note="", validation="")

    def step(self, step: int, loss: float, tokens_per_second: float) -> None:
        note = f"loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s"
        self._bars.update(self._task, completed=step, note=note)

    def validated(self, evaluation: Evaluation) -> None:
        self._bars.update(self._task, validation=f"valid {evaluation.bits_per_byte:.3f}")

    def measuring_swaps(self) -> None:
        self._bars.update(self._task, note="swap oracle")

    def finished(self) -> None:
        self._bars.update(self._task, note="done")


@contextmanager
def progress_on(console: Any) -> Iterator[Progress]:
    """The progress of a demo run that suits a rich.console.Console."""
    if not console.is_terminal:
        yield PlainProgress(console)
        return
    rich = optional("rich.progress")
    columns = (
        rich.TextColumn("{task.description:8}"),
        rich.BarColumn(bar_width=10),
        rich.MofNCompleteColumn(),
        rich.TimeRemainingColumn(),
        rich.TextColumn("{task.fields[note]}  {task.fields[validation]}"),
    )
    with rich.Progress(*columns, console=console) as bars:
        yield BarProgress(bars)
