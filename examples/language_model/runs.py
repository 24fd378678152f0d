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

import circuitroute as cr

from . import checkpoint
from .config import ALL_ROUTERS, STUDIES, DemoConfig, DemoError, require, require_at_least
from .corpus import Corpus
from .process import Interrupted, Stop, interruptible, threads
from .progress import make_console, progress_on, study_progress_on
from .report import FIGURES, RESULTS, write_report
from .studies import kinds
from .studies.execution import Study, execute
from .studies.kinds import StudyKind
from .texts import load_corpus
from .trainee import Setting, start
from .training import train

DEFAULT_OUT = Path("runs")
RUN_FILE = "run.json"
CHECKPOINTS = "checkpoints"
FIELDS = tuple(field.name for field in dataclasses.fields(DemoConfig))
CPU_PROCESSES = 2
CUDA_MINUTES = 8.0
_NO_OPTIONS = argparse.Namespace(k=None, budgets=None, regimes=None, seeds=None)  # of a study's default
DEMO_MINUTES = 2.0  # of the default run on 2 cores
KEEPS = "Ctrl-C stops it and keeps what there is; --resume goes on."
STUDY_OPTIONS = ("budgets", "regimes", "minutes")  # of some studies
Config = TypeVar("Config")


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
            trainee = start(setting, router, options.resume)
            trainee.log = _log_of(setting, router, out)
            tell(train(trainee, tell, stop))


def _log_of(setting: Setting, router: str, out: Path) -> cr.metrics.RunLog:
    """The log of a router's run, gone on with where the run is. Raises DemoError when it is another run's."""
    try:
        return cr.metrics.RunLog(out / f"{router}.jsonl", f"{router}, seed {setting.config.seed}")
    except cr.CircuitFileError as error:
        raise DemoError(str(error), "resume") from None


def _study(options: argparse.Namespace, command: str, stop: Stop) -> None:
    out, console = options.out or DEFAULT_OUT / str(options.study), make_console()
    kind = _kind(options)
    study, processes, minutes = _study_of(kind, options, out, console)
    runs = study.config.runs()
    console.out(_study_announcement(kind, study, processes, minutes))
    report = partial(kind.report, study, out, command, processes, console)
    steps = {run: study.config.config_of(run).steps for run in runs}
    with _reported(report, console, options, out), study_progress_on(console, steps) as tell:
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


def _study_announcement(kind: StudyKind, study: Study, processes: int, minutes: float | None) -> str:
    takes = ""
    if minutes is not None:
        takes = f"This takes about {max(1, minutes):.0f} min, as timed here. "
    elif study.device.type == "cpu":
        usual = kind.configure(study.device, {}, _NO_OPTIONS)
        takes = _duration(kind.minutes * kinds.work(study.config) / kinds.work(usual)) + " "
    sources = "\n".join(dict.fromkeys(_source(text) for text in study.corpora.values()))
    runs = study.config.runs()
    return (
        f"Training {len(runs)} small MoE language models. {kind.describe(study.config)}. "
        f"{_sizes(study.config.config_of(runs[0]))}.\n"
        f"{sources}\n{processes} run{'s' * (processes > 1)} at a time. {takes}{KEEPS}"
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
    for name in ("seeds", "processes", *STUDY_OPTIONS):
        unset = getattr(options, name) is None
        require(unset, f"belongs to studies: add --study {_study_with(name)}, or leave it out", name)
    device = _device(options.device)
    if options.resume:
        config = _recorded(options, out, DemoConfig.from_json)
        _refuse_changes(out, vars(config), _given(options, FIELDS))
    else:
        config = DemoConfig(**_given(options, FIELDS))
    setting = Setting(config, load_corpus(config), device, out / CHECKPOINTS)
    _occupy(options, out, setting.identity)
    return setting


def _kind(options: argparse.Namespace) -> StudyKind:
    """Raises DemoError for a study that there is not, or an option of another one."""
    require(options.study in STUDIES, f"must be one of {', '.join(STUDIES)}, got {options.study!r}", "study")
    kind = kinds.KINDS[options.study]
    for name in STUDY_OPTIONS:
        fits = name in kind.options or getattr(options, name) is None
        require(fits, f"belongs to the study of {_study_with(name)}: leave it out", name)
    return kind


def _study_with(option: str) -> str:
    return next((name for name, kind in kinds.KINDS.items() if option in kind.options), STUDIES[0])


def _study_of(
    kind: StudyKind, options: argparse.Namespace, out: Path, console: Console
) -> tuple[Study, int, float | None]:
    """Likewise for a study; with the runs at a time, and the minutes that it takes where that was timed."""
    if options.processes is not None:
        require_at_least(1, options.processes, "processes")
    device = _device(options.device)
    usual = CPU_PROCESSES if device.type == "cpu" else 1
    processes = usual if options.processes is None else options.processes
    minutes = (
        CUDA_MINUTES if options.minutes is None and device.type == "cuda" and not options.resume else options.minutes
    )
    if options.resume:
        config = _recorded(options, out, kind.restore)
        _refuse_changes(out, kind.recorded(config), _given(options, (*FIELDS, "budgets", "regimes", "seeds")))
        texts = kind.texts(config)
    else:
        config = kind.configure(device, _given(options, FIELDS), options)
        texts = kind.texts(config)
        if minutes is not None and kind.fit is not None:
            console.out("Timing some steps of every router.")
            config, minutes = kind.fit(config, texts, device, minutes, processes)
    study = Study(config, texts, device, out / CHECKPOINTS)
    digests = {regime: text.digest for regime, text in texts.items()}
    _occupy(options, out, {"study": options.study, "config": config.to_json(), "text": digests.get("", digests)})
    return study, processes, minutes if kind.fit is not None else None


def _given(options: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Those of the names that the command line sets, as a configuration holds them."""
    found = {name: getattr(options, name, None) for name in names}
    return {name: tuple(v) if isinstance(v, list) else v for name, v in found.items() if v is not None}


def _device(name: str) -> torch.device:
    """Raises DemoError where it is not usable."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()  # "meta" has no values
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
    drawn = [name for kind in kinds.KINDS.values() for name in kind.figures]
    for path in (out / name for name in (RESULTS, *FIGURES, *drawn)):
        path.unlink(missing_ok=True)
    for router in ALL_ROUTERS:
        (out / f"{router}.jsonl").unlink(missing_ok=True)
        for pattern in (f"{router}.*", f"k*-seed*/{router}.*", f"*/k*-seed*/{router}.*"):
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


def _recorded(options: argparse.Namespace, out: Path, restore: Callable[[Any], Config]) -> Config:
    """The configuration of the run, or study, in `out`. Raises DemoError where there is none or it is damaged."""
    try:
        return restore(_run_file(out, options.study)["config"])
    except (KeyError, TypeError) as error:
        raise DemoError(f"{out / RUN_FILE} is damaged ({error!r}): start again without --resume", "resume") from None


def _refuse_changes(out: Path, recorded: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises DemoError when the command line would continue a run as another."""
    remedy = "leave the option out, or start again without --resume"
    for name, value in wanted.items():
        found = recorded[name]
        require(found == value, f"the run in {out} has {found!r}, not {value!r}: {remedy}", name)
