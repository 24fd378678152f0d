"""`circuitroute demo`: its options, and a run from start to report."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from . import checkpoint
from .config import ROUTERS, DemoConfig, DemoError
from .corpus import load_corpus
from .evaluation import Interrupted, Stop
from .extras import optional, require_extras
from .process import interruptible, threads
from .progress import progress_on
from .report import FIGURES, RESULTS, write_report
from .trainee import Setting, start
from .training import train

RUN_FILE = "run.json"
CHECKPOINTS = "checkpoints"
DEFAULT_MINUTES = 3.0  # of the default run on 2 cores
# The model is too small to gain much from more, and busy machines slow several threads far more than one. One also
# gives the same numbers whatever the number of cores.
THREADS = 1
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


def add_parser(commands: Any) -> None:
    """Adds `demo` to an argparse subparsers object."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "demo",
        help="train three small MoE language models and compare their routers",
        description="Trains a small mixture-of-experts language model on the sources of Python's "
        "standard library, once per router, and compares the routers in a table and figures. "
        "Ctrl-C stops a run and keeps what there is.",
    )
    for name, kind, text in OPTIONS:
        default = getattr(DemoConfig, name.replace("-", "_"))
        suffix = "" if default is None else f" (default {default})"
        parser.add_argument(f"--{name}", type=kind, metavar="FILE" if kind is str else "N", help=text + suffix)
    parser.add_argument("--routers", nargs="+", metavar="NAME", help=f"which to compare (default {' '.join(ROUTERS)})")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="where results go (default runs/demo)")
    parser.add_argument("--device", default="cpu", help="a torch device (default cpu)")
    parser.add_argument("--threads", type=int, default=THREADS, metavar="N", help=f"CPU threads (default {THREADS})")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, with its options")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace, command: str) -> int:
    """Runs the demo; returns the exit code: 0, 1 (failed), 2 (a bad argument) or 130 (interrupted).

    command: the command line, for the record.
    """
    try:
        require_extras()
        with threads(options.threads), interruptible() as stop:
            return _run(options, command, stop)
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


def _run(options: argparse.Namespace, command: str, stop: Stop) -> int:
    setting = _prepare(options)
    console = optional("rich.console").Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)  # nothing is gained by folding a table in a file
    console.print(announcement(setting), highlight=False, markup=False, soft_wrap=True)
    interrupted = False
    try:
        with progress_on(console) as progress:
            for router in setting.config.routers:
                train(start(setting, router, options.resume), progress, stop)
    except (Interrupted, KeyboardInterrupt):
        interrupted = True
    write_report(setting, options.out, command, console)
    if interrupted:
        hint = f"circuitroute demo --resume --out {shlex.quote(str(options.out))}"
        console.print(f"Interrupted. To go on: {hint}", highlight=False, markup=False, soft_wrap=True)
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


def _prepare(options: argparse.Namespace) -> Setting:
    """Checks all that can be checked before training, and makes the output directory a place for this run."""
    device = _device(options.device)
    config = _resumed_config(options) if options.resume else DemoConfig(**_given(options))
    corpus = load_corpus(config)
    setting = Setting(config, corpus, device, options.out / CHECKPOINTS)
    if not options.resume:
        _clear(options.out)
        checkpoint.write_json(options.out / RUN_FILE, {"format": checkpoint.FORMAT, **setting.identity})
    return setting


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """The configuration's fields that the command line sets."""
    names = [name.replace("-", "_") for name, _, _ in OPTIONS]
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return given if options.routers is None else {**given, "routers": tuple(options.routers)}


def _resumed_config(options: argparse.Namespace) -> DemoConfig:
    """The configuration of the run in --out. Raises DemoError when there is none or an option contradicts
    it."""
    path = options.out / RUN_FILE
    if not path.exists():
        raise DemoError(f"there is no run in {options.out} to go on with: leave --resume out", "resume")
    try:
        config = DemoConfig.from_json(checkpoint.read_json(path)["config"])
    except (KeyError, TypeError) as error:
        raise DemoError(f"{path} is damaged ({error!r}): start again without --resume", "resume") from None
    for name, value in _given(options).items():
        if getattr(config, name) != value:
            raise DemoError(
                f"the run in {options.out} has {getattr(config, name)!r}, not {value!r}: "
                "leave the option out, or start again without --resume",
                name,
            )
    return config


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise DemoError(f"{name!r} is not usable here: {str(error).splitlines()[0]}", "device") from None
    return device


def _clear(out: Path) -> None:
    """Removes an earlier run's files, and only those: the directory may hold other things."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"cannot make the directory {str(out)!r}: {error.strerror or error}", "out") from None
    for path in (out / name for name in (RESULTS, *FIGURES)):
        path.unlink(missing_ok=True)
    for router in ROUTERS:
        for path in (out / CHECKPOINTS).glob(f"{router}*"):
            path.unlink()
