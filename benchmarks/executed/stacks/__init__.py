"""What runs mixture-of-experts layers, a module each; :mod:`benchmarks.executed` says what such a module has."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def names() -> tuple[str, ...]:
    """The stacks, whether or not what they need is installed."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def stack(name: str) -> ModuleType:
    """The stack of that name.

    Raises:
        ImportError: it needs something that is not installed.
    """
    return importlib.import_module(f"{__name__}.{name}")
