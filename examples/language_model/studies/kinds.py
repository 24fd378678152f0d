"""Which studies there are: their defaults, what of the command line is theirs, and how they report."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..config import DemoConfig, require
from ..corpus import Corpus
from ..texts import load_corpus
from . import balance, budgets, learning
from .balance_report import BALANCE_FIGURES, write_balance_report
from .budgets import BudgetsConfig
from .budgets_report import BUDGETS_FIGURES, write_budgets_report
from .execution import Study, StudyConfig
from .learning import LearningConfig
from .learning_report import LEARNING_FIGURES, write_learning_report

AnyConfig = BudgetsConfig | LearningConfig


@dataclass(frozen=True)
class StudyKind:
    """One study.

    Attributes:
        options: options of the command line that only some studies take, of those this one takes.
        configure: (device, what the command line sets of DemoConfig's fields, all options) -> configuration.
        restore: the inverse of its to_json.
        recorded: a configuration's values by the names of options, which resuming must not change.
        texts: the text of every regime.
        fit: (configuration, texts, device, minutes, processes) -> one that takes no longer, and the minutes it takes.
        minutes: that the default takes on 2 CPU cores.
        describe: a line on what is compared.
        report: prints and writes what there is.
        figures: the files that the report draws.
    """

    options: tuple[str, ...]
    configure: Callable[[torch.device, dict[str, Any], argparse.Namespace], AnyConfig]
    restore: Callable[[Any], AnyConfig]
    recorded: Callable[[Any], dict[str, Any]]
    texts: Callable[[Any], Mapping[str, Corpus]]
    fit: Callable[..., tuple[AnyConfig, float]] | None
    minutes: float
    describe: Callable[[Any], str]
    report: Callable[[Study, Path, str, int, Console], None]
    figures: tuple[str, ...]


def _budgets(device: torch.device, given: dict[str, Any], options: argparse.Namespace) -> BudgetsConfig:
    require(options.k is None, f"this study takes several: --budgets {options.k}", "k")
    return budgets.preset(device, given, options.budgets, options.seeds)


def _recorded_budgets(config: BudgetsConfig) -> dict[str, Any]:
    return {**vars(config.base), "budgets": config.budgets, "seeds": config.seeds}


def _describe_budgets(config: BudgetsConfig) -> str:
    return (
        f"{len(config.base.routers)} routers ({', '.join(config.base.routers)}) x "
        f"{' and '.join(map(str, config.budgets))} executed experts per token and layer x {config.seeds} seeds"
    )


def _learning(device: torch.device, given: dict[str, Any], options: argparse.Namespace) -> LearningConfig:
    return learning.preset(device, given, options.regimes, options.seeds)


def _recorded_learning(config: LearningConfig) -> dict[str, Any]:
    """What differs between regimes, such as the steps, is not the command line's to repeat."""
    shared = config.regimes[-1].config
    names = tuple(regime.name for regime in config.regimes if regime.name != learning.PRETRAINING)
    scratch = {regime.config.steps for regime in config.regimes if regime.name == "scratch"}
    steps = scratch.pop() if scratch else config.regimes[0].config.steps // learning.LONGER
    return {**vars(shared), "steps": steps, "regimes": names, "seeds": config.regimes[-1].seeds}


def _describe_learning(config: LearningConfig) -> str:
    parts = [
        f"{regime.name}: {len(regime.config.routers)} routers x {regime.seeds} seeds x {regime.config.steps} steps"
        for regime in config.regimes
    ]
    return "; ".join(parts)


def _balance(device: torch.device, given: dict[str, Any], options: argparse.Namespace) -> BudgetsConfig:
    return balance.preset(device, given, options.seeds)


def _recorded_balance(config: BudgetsConfig) -> dict[str, Any]:
    return {**vars(config.base), "seeds": config.seeds}


def _describe_balance(config: BudgetsConfig) -> str:
    return f"{len(config.base.routers)} routers ({', '.join(config.base.routers)}) x {config.seeds} seeds"


KINDS = {
    "balance": StudyKind(
        options=(),
        configure=_balance,
        restore=BudgetsConfig.from_json,
        recorded=_recorded_balance,
        texts=lambda config: {"": load_corpus(config.base)},
        fit=None,
        minutes=10.0,
        describe=_describe_balance,
        report=write_balance_report,
        figures=BALANCE_FIGURES,
    ),
    "budgets": StudyKind(
        options=("budgets",),
        configure=_budgets,
        restore=BudgetsConfig.from_json,
        recorded=_recorded_budgets,
        texts=lambda config: {"": load_corpus(config.base)},
        fit=None,
        minutes=13.0,
        describe=_describe_budgets,
        report=write_budgets_report,
        figures=BUDGETS_FIGURES,
    ),
    "learning": StudyKind(
        options=("regimes", "minutes"),
        configure=_learning,
        restore=LearningConfig.from_json,
        recorded=_recorded_learning,
        texts=LearningConfig.load_texts,
        fit=learning.fitted,
        minutes=40.0,
        describe=_describe_learning,
        report=write_learning_report,
        figures=LEARNING_FIGURES,
    ),
}


def work(config: StudyConfig) -> float:
    """In tokens x layers x hidden size, to compare with the default's."""
    total = 0.0
    for run in config.runs():
        own: DemoConfig = config.config_of(run)
        total += own.steps * own.tokens_per_step * own.layers * own.hidden
    return total
