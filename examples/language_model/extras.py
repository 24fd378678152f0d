"""The optional libraries of the demo, imported when needed."""

from __future__ import annotations

import importlib
from typing import Any

REQUIRED = ("matplotlib", "rich", "safetensors")


def optional(name: str) -> Any:
    """The module `name`. Raises ImportError with the remedy where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"the demo needs {name.split('.')[0]} ({error}): pip install 'circuitroute[demo]'", name=name
        ) from error


def require_extras() -> None:
    """Raises ImportError now rather than after minutes of training."""
    for name in REQUIRED:
        optional(name)
