"""From options to results: all that can be checked before anything is trained, the training, and the report."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console

from . import checkpoint
from .config import ALL_ROUTERS, STUDIES, DemoConfig, DemoError, StudyConfig, preset, require, require_at_least
from .corpus import Corpus, load_corpus
from .process import Interrupted, Stop, interruptible, threads
from .progress import make_console, progress_on, study_progress_on
from .report import FIGURES, RESULTS, write_report
from .study import Study, execute
from .study_report import STUDY_FIGURES, write_study_report
from .trainee import Setting, start
from .training import train

DEFAULT_OUT = Path("runs")
RUN_FILE = "run.json"
CHECKPOINTS = "checkpoints"
FIELDS = tuple(field.name for field in dataclasses.fields(DemoConfig))
CPU_PROCESSES = 2
DEMO_MINUTES = 3.0  # of the default run on 2 cores
STUDY_MINUTES = 20.0  # of the default study on 2 cores
KEEPS = "Ctrl-C stops it and keeps what there is; --resume goes on."
Config = TypeVar("Config", DemoConfig, StudyConfig)


def run(options: argparse.Namespace, command: str) -> None:
    """Runs the demo, or a study, from start to report. Raises DemoError naming the option to change; Interrupted or
    KeyboardInterrupt after reporting what there is.

    command: the command line, for the record.
    """
    with threads(options.threads), interruptible() as stop:
        (_demo if options.study is None else _study)(options, command, stop)


def _demo(options: argparse.Namespace, command: str, stop: Stop) -> None:
    out, console = options.out or DEFAULT_OUT / "demo", make_console()
    setting = _setting(options, out)
    console.out(_demo_announcement(setting))
    report = partial(write_report, setting, out, command, console)
    with _reported(report, console, options, out), progress_on(console, setting.config.steps) as tell:
        for router in setting.config.routers:
            tell(train(start(setting, router, options.resume), tell, stop))


def _study(options: argparse.Namespace, command: str, stop: Stop) -> None:
    out, console = options.out or DEFAULT_OUT / str(options.study), make_console()
    study = _study_of(options, out)
    usual = CPU_PROCESSES if study.device.type == "cpu" else 1
    processes = usual if options.processes is None else options.processes
    runs, steps = len(study.config.runs()), study.config.base.steps
    console.out(_study_announcement(study, processes))
    report = partial(write_study_report, study, out, command, processes, console)
    with _reported(report, console, options, out), study_progress_on(console, runs, steps) as tell:
        execute(study, processes, tell, stop)


@contextmanager
def _reported(report: Callable[[], None], console: Console, options: argparse.Namespace, out: Path) -> Iterator[None]:
    """Reports at the end of the block, and after an interrupt, but not after errors."""
    try:
        yield
    except (Interrupted, KeyboardInterrupt):
        report()
        study = "" if options.study is None else f"--study {options.study} "
        console.out(f"Interrupted. To go on: circuitroute demo {study}--resume --out {shlex.quote(str(out))}")
        raise
    report()


# WHAT IS ABOUT TO HAPPEN, AND FOR HOW LONG


def _demo_announcement(setting: Setting) -> str:
    config = setting.config
    takes = _duration(DEMO_MINUTES * _work(config) / _work(DemoConfig()))
    return (
        f"Training {len(config.routers)} small MoE language models, one per router "
        f"({', '.join(config.routers)}): {_sizes(config)}.\n"
        f"{_source(setting.corpus)}\n{takes} {KEEPS}"
    )


def _study_announcement(study: Study, processes: int) -> str:
    config, base = study.config, study.config.base
    takes = ""
    if study.device.type == "cpu":
        usual = preset(study.device, {})
        work, usual_work = (len(c.runs()) * _work(c.base) / len(c.base.routers) for c in (config, usual))
        takes = _duration(STUDY_MINUTES * work / usual_work) + " "
    return (
        f"Training {len(config.runs())} small MoE language models: {len(base.routers)} routers "
        f"({', '.join(base.routers)}) x {' and '.join(map(str, config.budgets))} executed experts per token and layer "
        f"x {config.seeds} seeds; {_sizes(base)}.\n"
        f"{_source(study.corpus)}\n{processes} run{'s' * (processes > 1)} at a time. {takes}{KEEPS}"
    )


def _sizes(config: DemoConfig) -> str:
    text = f"{config.steps} steps of {config.batch_size} x {config.seq_len} bytes"
    return f"{config.layers} layers x {config.experts} experts, {text}"


def _source(text: Corpus) -> str:
    train, valid = (part.numel() / 1e6 for part in (text.train, text.valid))
    return f"Text: {text.source}, {train:.1f} MB, and {valid:.1f} MB held out."


def _duration(minutes: float) -> str:
    """A rough forecast, in proportion to the default run."""
    return f"This takes {'under a minute' if minutes < 1 else f'about {minutes:.0f} min'} on 2 CPU cores."


def _work(config: DemoConfig) -> float:
    return float(len(config.routers) * config.steps * config.tokens_per_step * config.layers * config.hidden)


# CHECKS, AND THE DIRECTORY


def _setting(options: argparse.Namespace, out: Path) -> Setting:
    """Checks all that can be checked before training, and prepares the output directory for this run."""
    for name in ("budgets", "seeds", "processes"):
        unset = getattr(options, name) is None
        require(unset, f"belongs to studies: add --study {STUDIES[0]}, or leave it out", name)
    device = _device(options.device)
    if options.resume:
        config = _recorded(options, out, DemoConfig)
        _refuse_changes(out, vars(config), _given(options, FIELDS))
    else:
        config = DemoConfig(**_given(options, FIELDS))
    setting = Setting(config, load_corpus(config), device, out / CHECKPOINTS)
    _occupy(options, out, setting.identity)
    return setting


def _study_of(options: argparse.Namespace, out: Path) -> Study:
    """Likewise for a study."""
    require(options.study in STUDIES, f"must be one of {', '.join(STUDIES)}, got {options.study!r}", "study")
    require(options.k is None, f"a study takes several: --budgets {options.k}", "k")
    if options.processes is not None:
        require_at_least(1, options.processes, "processes")
    device = _device(options.device)
    if options.resume:
        config = _recorded(options, out, StudyConfig)
        recorded = {**vars(config.base), "budgets": config.budgets, "seeds": config.seeds}
        _refuse_changes(out, recorded, _given(options, (*FIELDS, "budgets", "seeds")))
    else:
        config = preset(device, _given(options, FIELDS), options.budgets, options.seeds)
    study = Study(config, load_corpus(config.base), device, out / CHECKPOINTS)
    _occupy(options, out, {"study": options.study, "config": config.to_json(), "text": study.corpus.digest})
    return study


def _given(options: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Those of the names that the command line sets, as a configuration holds them."""
    found = {name: getattr(options, name, None) for name in names}
    return {name: tuple(v) if isinstance(v, list) else v for name, v in found.items() if v is not None}


def _device(name: str) -> torch.device:
    """Raises DemoError where it is not usable."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise DemoError(f"{name!r} is not usable here: {str(error).splitlines()[0]}", "device") from None
    return device


def _occupy(options: argparse.Namespace, out: Path, identity: dict[str, Any]) -> None:
    """Prepares the directory for a new run, or checks that the recorded one read the same text."""
    if not options.resume:
        _clear(out)
        checkpoint.write_json(out / RUN_FILE, {"format": checkpoint.FORMAT, **identity})
    elif _run_file(out, options.study).get("text") != identity["text"]:
        raise DemoError(f"the run in {out} has another text: start again without --resume", "resume")


def _clear(out: Path) -> None:
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


def _run_file(out: Path, study: str | None) -> dict[str, Any]:
    """What is recorded of the run, or study, in `out`. Raises DemoError where there is none, or one of another kind."""
    path = out / RUN_FILE
    require(path.exists(), f"there is no run in {out} to go on with: leave --resume out", "resume")
    found = checkpoint.read_json(path)
    held = found.get("study")
    kind = "a run of the demo: leave --study out" if held is None else f"the study {held!r}: add --study {held}"
    require(held == study, f"{out} holds {kind}", "resume")
    return found


def _recorded(options: argparse.Namespace, out: Path, kind: type[Config]) -> Config:
    """The configuration of the run, or study, in `out`. Raises DemoError where there is none or it is damaged."""
    try:
        return kind.from_json(_run_file(out, options.study)["config"])
    except (KeyError, TypeError) as error:
        raise DemoError(f"{out / RUN_FILE} is damaged ({error!r}): start again without --resume", "resume") from None


def _refuse_changes(out: Path, recorded: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises DemoError when the command line would continue a run as another."""
    remedy = "leave the option out, or start again without --resume"
    for name, value in wanted.items():
        found = recorded[name]
        require(found == value, f"the run in {out} has {found!r}, not {value!r}: {remedy}", name)
