"""`circuitroute demo`: its options, and a run, or a study, from start to report."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import checkpoint
from .config import ALL_ROUTERS, ROUTERS, DemoConfig, DemoError
from .corpus import load_corpus
from .evaluation import Interrupted, Stop
from .extras import optional, require_extras
from .options import (
    CHECKPOINTS,
    INTERRUPTED,
    OPTIONS,
    RUN_FILE,
    clear,
    damaged,
    device_of,
    given,
    refuse_changes,
    run_file,
)
from .process import interruptible, threads
from .progress import progress_on
from .report import write_report
from .study import CPU_BUDGETS, STUDIES
from .study_options import processes_for, refuse_study_options, study_announcement, study_from
from .study_progress import study_progress_on
from .study_report import write_study_report
from .study_run import execute
from .trainee import Setting, start
from .training import train

ROUTERS_HELP = f"which to compare, of {', '.join(ALL_ROUTERS)} (default {' '.join(ROUTERS)}; all in a study)"
DEFAULT_OUT = Path("runs")
DEFAULT_MINUTES = 3.0  # of the default run on 2 cores
# The model is too small to gain much from more, and busy machines slow several threads far more than one. One also
# gives the same numbers whatever the number of cores.
THREADS = 1


def main(argv: Sequence[str], prog: str = "circuitroute demo") -> int:
    """Runs the demo, or a study; returns the exit code. Raises SystemExit for arguments that argparse refuses."""
    options = _parser(prog).parse_args(argv)
    return run(options, shlex.join(["circuitroute", "demo", *argv]))


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Trains a small mixture-of-experts language model on the sources of Python's "
        "standard library, once per router, and compares the routers in a table and figures. "
        "Ctrl-C stops a run and keeps what there is.",
    )
    for name, kind, text in OPTIONS:
        default = getattr(DemoConfig, name.replace("-", "_"))
        suffix = "" if default is None else f" (default {default})"
        parser.add_argument(f"--{name}", type=kind, metavar="FILE" if kind is str else "N", help=text + suffix)
    parser.add_argument("--routers", nargs="+", metavar="NAME", help=ROUTERS_HELP)
    parser.add_argument("--out", type=Path, help="where results go (default runs/demo, or runs/ and the study's name)")
    parser.add_argument("--device", default="cpu", help="a torch device (default cpu)")
    parser.add_argument("--threads", type=int, default=THREADS, metavar="N", help=f"CPU threads (default {THREADS})")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, with its options")
    study = parser.add_argument_group("studies")
    study.add_argument("--study", metavar="NAME", help=f"run a study instead: {', '.join(STUDIES)}")
    study.add_argument(
        "--budgets",
        nargs="+",
        type=int,
        metavar="K",
        help=f"experts per token and layer, one set of runs for each (default {' '.join(map(str, CPU_BUDGETS))})",
    )
    study.add_argument("--seeds", type=int, metavar="N", help="how many seeds, from --seed on (default 3)")
    study.add_argument(
        "--processes", type=int, metavar="N", help="runs at a time, each with --threads (default 2, on a GPU 1)"
    )
    return parser


def run(options: argparse.Namespace, command: str) -> int:
    """Runs the demo; returns the exit code: 0, 1 (failed), 2 (a bad argument) or 130 (interrupted).

    command: the command line, for the record.
    """
    try:
        require_extras()
        with threads(options.threads), interruptible() as stop:
            return _run_study(options, command, stop) if options.study is not None else _run(options, command, stop)
    except DemoError as error:
        option = f"argument --{error.argument.replace('_', '-')}: " if error.argument else ""
        return _fail(f"{option}{error}", 2)
    except (ImportError, OSError) as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        return INTERRUPTED


def _fail(message: str, code: int) -> int:
    print(f"circuitroute demo: error: {message}", file=sys.stderr)
    return code


def _console() -> Any:
    console = optional("rich.console").Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)  # nothing is gained by folding a table in a file
    return console


def _say(console: Any, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _run(options: argparse.Namespace, command: str, stop: Stop) -> int:
    out = options.out or DEFAULT_OUT / "demo"
    setting, console = _prepare(options, out), _console()
    _say(console, announcement(setting))
    interrupted = False
    try:
        with progress_on(console) as progress:
            for router in setting.config.routers:
                train(start(setting, router, options.resume), progress, stop)
    except (Interrupted, KeyboardInterrupt):
        interrupted = True
    write_report(setting, out, command, console)
    if interrupted:
        _say(console, f"Interrupted. To go on: circuitroute demo --resume --out {shlex.quote(str(out))}")
    return INTERRUPTED if interrupted else 0


def _run_study(options: argparse.Namespace, command: str, stop: Stop) -> int:
    out = options.out or DEFAULT_OUT / str(options.study)
    study, console = study_from(options, out), _console()
    processes = processes_for(options, study)
    runs, steps = len(study.config.runs()), study.config.base.steps
    _say(console, study_announcement(study, processes))
    interrupted = False
    try:
        with study_progress_on(console, runs, steps) as tell:
            execute(study, processes, tell, stop)
    except (Interrupted, KeyboardInterrupt):
        interrupted = True
    write_study_report(study, out, command, processes, console)
    if interrupted:
        place = shlex.quote(str(out))
        _say(console, f"Interrupted. To go on: circuitroute demo --study {options.study} --resume --out {place}")
    return INTERRUPTED if interrupted else 0


def announcement(setting: Setting) -> str:
    """What is about to happen, and for how long."""
    config, text = setting.config, setting.corpus
    return (
        f"Training {len(config.routers)} small MoE language models, one per router "
        f"({', '.join(config.routers)}): {config.layers} layers x {config.experts} experts, "
        f"{config.steps} steps of {config.batch_size} x {config.seq_len} bytes.\n"
        f"Text: {text.source}, {text.train.numel() / 1e6:.1f} MB, "
        f"and {text.valid.numel() / 1e6:.1f} MB held out.\n"
        f"This takes {_duration(config)} on 2 CPU cores. Ctrl-C stops it and keeps what there is; "
        "--resume goes on."
    )


def _duration(config: DemoConfig) -> str:
    """A rough forecast, in proportion to the default run."""
    minutes = DEFAULT_MINUTES * _work(config) / _work(DemoConfig())
    return "under a minute" if minutes < 1 else f"about {minutes:.0f} min"


def _work(config: DemoConfig) -> float:
    return float(len(config.routers) * config.steps * config.tokens_per_step * config.layers * config.hidden)


def _prepare(options: argparse.Namespace, out: Path) -> Setting:
    """Checks all that can be checked before training, and makes the output directory a place for this run."""
    refuse_study_options(options)
    device = device_of(options.device)
    config = _resumed_config(options, out) if options.resume else DemoConfig(**given(options))
    corpus = load_corpus(config)
    setting = Setting(config, corpus, device, out / CHECKPOINTS)
    if not options.resume:
        clear(out)
        checkpoint.write_json(out / RUN_FILE, {"format": checkpoint.FORMAT, **setting.identity})
    return setting


def _resumed_config(options: argparse.Namespace, out: Path) -> DemoConfig:
    """The configuration of the run in --out. Raises DemoError when there is none or an option contradicts
    it."""
    try:
        config = DemoConfig.from_json(run_file(out, study=None)["config"])
    except (KeyError, TypeError) as error:
        raise damaged(out, error) from None
    refuse_changes(out, vars(config), given(options))
    return config
