"""What the demo and its studies share of a command line, and of the directory that they write to."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from . import checkpoint
from .config import ALL_ROUTERS, DemoError
from .report import FIGURES, RESULTS
from .study_report import STUDY_FIGURES

RUN_FILE = "run.json"
CHECKPOINTS = "checkpoints"
INTERRUPTED = 130  # what shells report for a program that SIGINT ended
OPTIONS: tuple[tuple[str, type, str], ...] = (
    ("steps", int, "training steps per router"),
    ("seed", int, "decides the initial weights, the order of the text and the routers' samples"),
    ("experts", int, "experts per layer"),
    ("k", int, "experts per token; the range router may take from half to twice as many"),
    ("layers", int, "transformer layers"),
    ("hidden", int, "hidden size"),
    ("batch-size", int, "sequences per step"),
    ("seq-len", int, "bytes per sequence"),
    ("text", str, "a file to train on instead of the standard library's sources"),
)


def given(options: argparse.Namespace) -> dict[str, Any]:
    """The configuration's fields that the command line sets."""
    names = [name.replace("-", "_") for name, _, _ in OPTIONS]
    found = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return found if options.routers is None else {**found, "routers": tuple(options.routers)}


def device_of(name: str) -> torch.device:
    """Raises DemoError where it is not usable."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise DemoError(f"{name!r} is not usable here: {str(error).splitlines()[0]}", "device") from None
    return device


def clear(out: Path) -> None:
    """Removes the files of an earlier run or study, and only those: the directory may hold other things."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"cannot make the directory {str(out)!r}: {error.strerror or error}", "out") from None
    for path in (out / name for name in (RESULTS, *FIGURES, *STUDY_FIGURES)):
        path.unlink(missing_ok=True)
    for router in ALL_ROUTERS:
        for pattern in (f"{router}*", f"k*-seed*/{router}*"):
            for path in (out / CHECKPOINTS).glob(pattern):
                path.unlink()


def run_file(out: Path, study: str | None) -> dict[str, Any]:
    """What is recorded of the run, or study, in `out`. Raises DemoError where there is none, or one of another kind."""
    path = out / RUN_FILE
    if not path.exists():
        raise DemoError(f"there is no run in {out} to go on with: leave --resume out", "resume")
    found = checkpoint.read_json(path)
    held = found.get("study")
    if held != study:
        remedy = "leave --study out" if held is None else f"add --study {held}"
        kind = "a run of the demo" if held is None else f"the study {held!r}"
        raise DemoError(f"{out} holds {kind}: {remedy}", "resume")
    return found


def damaged(out: Path, error: Exception) -> DemoError:
    """For a record of a run that cannot be read."""
    return DemoError(f"{out / RUN_FILE} is damaged ({error!r}): start again without --resume", "resume")


def refuse_changes(out: Path, recorded: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises DemoError when the command line asks a run to go on as another."""
    for name, value in wanted.items():
        if recorded[name] != value:
            raise DemoError(
                f"the run in {out} has {recorded[name]!r}, not {value!r}: "
                "leave the option out, or start again without --resume",
                name,
            )
