"""The study of balance: what a loss, a bias by three rules, and nothing at all do to the load and to the text's loss.

Runs differ in router and seed; a configuration is a `BudgetsConfig` of one budget.
"""

from __future__ import annotations

from typing import Any

import torch

from ..config import DemoConfig
from .budgets import MEASURED, SEEDS, BudgetsConfig

ROUTERS = (
    "top-k",
    "top-k-free",
    "top-k-bias",
    "top-k-quantile",
    "top-k-exact",
    "mode",
    "mode-free",
    "mode-bias",
    "mode-quantile",
    "mode-exact",
)
CPU: dict[str, Any] = {"steps": 200, "hidden": 64, "k": 2, "validation_batches": 20, **MEASURED}
# Sized for a few minutes of a large GPU.
CUDA: dict[str, Any] = {
    "steps": 1000,
    "layers": 8,
    "experts": 64,
    "k": 8,
    "hidden": 256,
    "batch_size": 32,
    "seq_len": 256,
    "learning_rate": 2e-3,
    "validation_batches": 20,
    **MEASURED,
}


def preset(device: torch.device, given: dict[str, Any], seeds: int | None = None) -> BudgetsConfig:
    """The study for a device, with what the command line sets instead."""
    sizes = CUDA if device.type == "cuda" else CPU
    base = DemoConfig(**{"routers": ROUTERS, **sizes, **given})
    return BudgetsConfig(base, (base.k,), SEEDS if seeds is None else seeds)
