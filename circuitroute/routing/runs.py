"""The log of a training run, a line of JSON per logged step, which ``circuitroute report`` turns into pictures.

The first line says what run it is, ``{"circuitroute": "run", "version": 1, "run": "..."}``; it may be missing in files
of other writers. Every other line is a step: ``{"step": 10, "loss": 2.3, "layer0/load_entropy": 0.98, ...}``, with the
keys of :func:`circuitroute.metrics.summary`. A step stands in place of all lines before it that are of the same step or
later ones: so a run that goes on from a checkpoint goes on writing.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from circuitroute._files import as_path
from circuitroute._validate import as_number, int_at_least
from circuitroute.errors import CircuitFileError

VERSION = 1
KIND = "run"
# What keys of a Trainer's logs begin with.
PREFIX = "routing/"
# Keys are names: of a layer, a stroke, and of a quantity.
_QUANTITY = re.compile(r"[^\x00-\x1f]+/[A-Za-z_]\w*")
_RESERVED = ("step", "loss")


class RunLog:
    """A file to which a training loop appends what :func:`circuitroute.metrics.summary` found.

    ::

        log = cr.metrics.RunLog("run.jsonl", run="olmoe, seed 0")
        for step in range(steps):
            ...
            if step % 10 == 0:
                log.append(step, cr.metrics.summary(routings), loss=float(loss))

    A line is written in one piece and is in the file when ``append`` returns. Of several processes one writes. The file
    of a run that was interrupted is gone on with; a line that was being written then is taken away first.

    Args:
        path: of the file; made if there is none, in a folder that exists.
        run: what tells this run from others.

    Raises:
        CircuitFileError: the file holds another run, or is none of this kind; nothing is changed then.
        OSError: it cannot be written.
        TypeError, ValueError: what is no path, or no text.
    """

    def __init__(self, path: str | os.PathLike[str], run: str = "") -> None:
        self.path = as_path("path", path)
        if not isinstance(run, str):
            raise TypeError(f"run={run!r}: expected a text that tells this run from others")
        self.run = str(run)
        head = {"circuitroute": KIND, "version": VERSION, "run": self.run}
        if self.path.exists() and self.path.stat().st_size:
            _cut(self.path, _found_run(self.path, self.run))
        else:
            _write(self.path, head)

    def append(self, step: int, summary: Mapping[str, float], *, loss: float | None = None, **more: float) -> None:
        """Write a step.

        Args:
            step: its number, from 0; may go back to that of a checkpoint.
            summary: as :func:`circuitroute.metrics.summary` makes it.
            loss: of the step, or of those since the last one written. What is not finite is written as null.
            more: further numbers to keep, such as a learning rate.

        Raises:
            TypeError, ValueError: a negative step; a key of the summary that is not ``"layer/quantity"``; what is not
                a number.
        """
        row: dict[str, Any] = {"step": int_at_least("step", step, 0)}
        if loss is not None:
            row["loss"] = _finite("loss", loss)
        row |= {name: _finite(name, value) for name, value in more.items()}
        for key, value in summary.items():
            if not isinstance(key, str) or not _QUANTITY.fullmatch(key):
                raise ValueError(f"summary has the key {key!r}: expected 'layer/quantity', such as 'all/load_entropy'")
            row[key] = _finite(f"summary[{key!r}]", value)
        _write(self.path, row)

    def __repr__(self) -> str:
        return f"RunLog({str(self.path)!r}, run={self.run!r})"


@dataclass(frozen=True)
class Step:
    """A line of a log.

    Attributes:
        step: its number.
        loss: None where none was written, or it was not finite.
        values: by layer and quantity, as in a summary.
    """

    step: int
    loss: float | None
    values: Mapping[tuple[str, str], float]


@dataclass(frozen=True)
class RunRecord:
    """What is in a log.

    Attributes:
        run: what it is the log of; empty where the file does not say.
        steps: in increasing order.
        notes: what was left out, and why.
    """

    run: str
    steps: tuple[Step, ...]
    notes: tuple[str, ...] = field(default=())


def read_run(path: str | os.PathLike[str]) -> RunRecord:
    """Read what :class:`RunLog` wrote, or another writer of such lines; keys may begin with ``routing/``.

    Raises:
        CircuitFileError: there is no such file, a line that is not a step (named by its number), no step at all, or
            none with a number. A
            last line that breaks off was being written: it is left out, with a note.
    """
    source = as_path("path", path)
    try:
        lines = source.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise CircuitFileError(f"cannot read {str(source)!r}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise CircuitFileError(f"{source} is not a log of a run: it is not text, but a line of JSON per step") from None
    run, steps, notes = "", list[Step](), list[str]()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = _row(line)
            if number == 1 and "circuitroute" in row:
                run = _run_of(row)
                continue
            step = _step(row)
        except ValueError as error:
            if 1 < number == len(lines) and _is_cut(line):
                notes.append(f"line {number}, the last one, is half written and was left out")
                continue
            raise CircuitFileError(f"{source}, line {number}: {error}") from None
        steps = _without_later(steps, step)
        steps.append(step)
    if not steps:
        raise CircuitFileError(
            f"{source} holds no steps: expected lines such as " + '{"step": 0, "all/load_entropy": 1}'
        )
    if not any(step.values or step.loss is not None for step in steps):
        raise CircuitFileError(f"{source} has steps and no numbers: expected keys such as 'all/load_entropy' or 'loss'")
    return RunRecord(run, tuple(steps), tuple(notes))


def _without_later(steps: list[Step], step: Step) -> list[Step]:
    """The steps before ``step``; usually all."""
    if not steps or steps[-1].step < step.step:
        return steps
    return [earlier for earlier in steps if earlier.step < step.step]


def _row(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply: expected an object with numbers") from None
    except ValueError as error:
        raise ValueError(f"it is not JSON ({error}): expected an object per line, with numbers") from None
    if not isinstance(row, dict):
        raise ValueError(f"it is a JSON {type(row).__name__}: expected an object, such as {{...}}")
    return row


def _is_cut(line: str) -> bool:
    """Whether a line begins as a row does and has no end."""
    try:
        json.loads(line)
    except RecursionError:
        return False
    except ValueError:
        return line.startswith("{")
    return False


def _run_of(row: Mapping[str, Any]) -> str:
    """The name of the run in a first line."""
    if row["circuitroute"] != KIND or not isinstance(row.get("run"), str):
        raise ValueError(f"it says circuitroute={row['circuitroute']!r}: expected the log of a run")
    if row.get("version") != VERSION:
        raise ValueError(f"it is of version {row.get('version')!r}, and this circuitroute reads {VERSION}: update it")
    return str(row["run"])


def _step(row: Mapping[str, Any]) -> Step:
    step = row.get("step")
    step = int(step) if isinstance(step, float) and step.is_integer() else step
    if type(step) is not int or step < 0:
        raise ValueError(f"its step is {step!r}: expected a whole number from 0")
    loss = None if row.get("loss") is None else _number("loss", row["loss"])
    values = {}
    for name, value in row.items():
        key = name.removeprefix(PREFIX)
        if name in _RESERVED or value is None or not _QUANTITY.fullmatch(key):
            continue
        number = _number(name, value)
        if number is not None:
            layer, _, quantity = key.rpartition("/")
            values[layer, quantity] = number
    return Step(step, loss, values)


def _number(name: str, value: Any) -> float | None:
    """A finite number, or None for one that is not finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"its {name} is {value!r}: expected a number")
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _finite(name: str, value: float) -> float | None:
    number = as_number(name, value)
    return number if math.isfinite(number) else None


# ---------------------------------------------------------------------------------------------- files


def _found_run(path: Path, run: str) -> int:
    """How many bytes of a log are whole lines, if it is that of ``run``."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    try:
        found = _run_of(_row(content.split(b"\n", 1)[0].decode("utf-8")))
    except (ValueError, KeyError) as error:
        what = "it has no first line that says so" if isinstance(error, KeyError) else f"line 1: {error}"
        raise CircuitFileError(f"path={str(path)!r} is not the log of a run ({what}): give another path") from None
    if found != run:
        raise CircuitFileError(
            f"path={str(path)!r} is the log of run={found!r}, not of {run!r}: give another path, or remove it"
        )
    return whole


def _cut(path: Path, size: int) -> None:
    """Take away what follows the last whole line."""
    if size < path.stat().st_size:
        os.truncate(path, size)


def _write(path: Path, row: Mapping[str, Any]) -> None:
    """Append a line in one piece."""
    line = (json.dumps(row, allow_nan=False) + "\n").encode("utf-8")
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0), 0o666)
    try:
        os.write(file, line)
    finally:
        os.close(file)
