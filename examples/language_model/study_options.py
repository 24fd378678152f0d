"""The options of a study: checked before anything runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from . import checkpoint
from .config import DemoConfig, DemoError
from .corpus import load_corpus
from .options import CHECKPOINTS, RUN_FILE, clear, damaged, device_of, given, refuse_changes, run_file
from .study import STUDIES, Study, StudyConfig, preset

ONLY_IN_STUDIES = ("budgets", "seeds", "processes")
CPU_PROCESSES = 2
DEFAULT_MINUTES = 20.0  # of the default study on 2 cores


def refuse_study_options(options: argparse.Namespace) -> None:
    """Raises DemoError where an option of studies stands without one."""
    for name in ONLY_IN_STUDIES:
        if getattr(options, name) is not None:
            raise DemoError(f"belongs to studies: add --study {STUDIES[0]}, or leave it out", name)


def study_from(options: argparse.Namespace, out: Path) -> Study:
    """Checks all that can be checked before training, and makes the output directory a place for this study."""
    if options.study not in STUDIES:
        raise DemoError(f"must be one of {', '.join(STUDIES)}, got {options.study!r}", "study")
    if options.k is not None:
        raise DemoError(f"a study takes several: --budgets {options.k}", "k")
    if options.processes is not None and options.processes < 1:
        raise DemoError(f"must be at least 1, got {options.processes}", "processes")
    device = device_of(options.device)
    if options.resume:
        config = _resumed(options, out)
    else:
        config = preset(device, given(options), options.budgets, options.seeds)
    study = Study(config, load_corpus(config.base), device, out / CHECKPOINTS)
    identity = {"study": options.study, "config": config.to_json(), "text": study.corpus.digest}
    if options.resume:
        if run_file(out, options.study).get("text") != study.corpus.digest:
            raise DemoError(f"the study in {out} has another text: start again without --resume", "resume")
        return study
    clear(out)
    checkpoint.write_json(out / RUN_FILE, {"format": checkpoint.FORMAT, **identity})
    return study


def processes_for(options: argparse.Namespace, study: Study) -> int:
    """How many runs at a time."""
    if options.processes is not None:
        return int(options.processes)
    return CPU_PROCESSES if study.device.type == "cpu" else 1


def _resumed(options: argparse.Namespace, out: Path) -> StudyConfig:
    try:
        config = StudyConfig.from_json(run_file(out, options.study)["config"])
    except (KeyError, TypeError) as error:
        raise damaged(out, error) from None
    wanted: dict[str, Any] = given(options)
    if options.budgets is not None:
        wanted["budgets"] = tuple(options.budgets)
    if options.seeds is not None:
        wanted["seeds"] = options.seeds
    refuse_changes(out, {**vars(config.base), "budgets": config.budgets, "seeds": config.seeds}, wanted)
    return config


def study_announcement(study: Study, processes: int) -> str:
    """What is about to happen, and for how long."""
    config, text, base = study.config, study.corpus, study.config.base
    runs = config.runs()
    return (
        f"Training {len(runs)} small MoE language models: {len(base.routers)} routers ({', '.join(base.routers)}) x "
        f"{' and '.join(map(str, config.budgets))} executed experts per token and layer x {config.seeds} seeds; "
        f"{base.layers} layers x {base.experts} experts, "
        f"{base.steps} steps of {base.batch_size} x {base.seq_len} bytes.\n"
        f"Text: {text.source}, {text.train.numel() / 1e6:.1f} MB, and {text.valid.numel() / 1e6:.1f} MB held out.\n"
        f"{processes} run{'s' * (processes > 1)} at a time. {_duration(study)}Ctrl-C stops it and keeps what there is; "
        "--resume goes on."
    )


def _duration(study: Study) -> str:
    """A rough forecast for CPUs, in proportion to the default study."""
    if study.device.type != "cpu":
        return ""
    usual = preset(torch.device("cpu"), {})
    minutes = DEFAULT_MINUTES * _work(study.config) / _work(usual)
    return f"This takes {'under a minute' if minutes < 1 else f'about {minutes:.0f} min'} on 2 CPU cores. "


def _work(config: StudyConfig) -> float:
    base: DemoConfig = config.base
    return float(len(config.runs()) * base.steps * base.tokens_per_step * base.layers * base.hidden)
