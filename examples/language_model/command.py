"""`circuitroute demo`: its options. What they set going is in `runs`."""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from .config import ALL_ROUTERS, REGIMES, ROUTERS, STUDIES, DemoConfig, DemoError
from .process import Interrupted

EXTRAS = ("matplotlib", "rich", "safetensors")
INTERRUPTED = 130  # what shells report for a program that SIGINT ended
# The model is too small to gain much from more, and busy machines slow several threads far more than one. One also
# gives the same numbers whatever the number of cores.
THREADS = 1
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
ROUTERS_HELP = f"which to compare, of {', '.join(ALL_ROUTERS)} (default {' '.join(ROUTERS)}; more in a study)"


def main(argv: Sequence[str], prog: str = "circuitroute demo") -> int:
    """Runs the demo, or a study; returns the exit code: 0, 1 (failed), 2 (a bad argument) or 130 (interrupted). Raises
    SystemExit for arguments that argparse refuses."""
    options = _parser(prog).parse_args(argv)
    try:
        _require_extras()
        from .runs import run  # imports the extras

        run(options, shlex.join(["circuitroute", "demo", *argv]))
    except DemoError as error:
        option = f"argument --{error.argument.replace('_', '-')}: " if error.argument else ""
        return _fail(f"{option}{error}", 2)
    except (ImportError, OSError) as error:
        return _fail(str(error), 1)
    except (Interrupted, KeyboardInterrupt):
        return INTERRUPTED
    return 0


def _require_extras() -> None:
    for name in EXTRAS:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(f"the demo needs {name} ({error}): pip install 'circuitroute[demo]'") from error


def _fail(message: str, code: int) -> int:
    print(f"circuitroute demo: error: {message}", file=sys.stderr)
    return code


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
    study.add_argument("--seeds", type=int, metavar="N", help="how many seeds, from --seed on")
    study.add_argument(
        "--processes", type=int, metavar="N", help="runs at a time, each with --threads (default 2, on a GPU 1)"
    )
    study.add_argument(
        "--budgets", nargs="+", type=int, metavar="K", help="of budgets: experts per token and layer, runs for each"
    )
    study.add_argument("--regimes", nargs="+", metavar="NAME", help=f"of learning: some of {', '.join(REGIMES)}")
    study.add_argument(
        "--minutes",
        type=float,
        metavar="M",
        help="of learning: time some steps first, and train for fewer where all would take longer (on a GPU 8)",
    )
    return parser
