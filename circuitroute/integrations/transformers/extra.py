"""The optional library itself, imported when it is needed."""

from __future__ import annotations

import importlib
import re
from typing import Any

# What routers return is internal to transformers and has changed: older versions are not supported.
OLDEST = (5, 23)


def transformers(module: str = "transformers") -> Any:
    """The module of that name.

    Raises:
        ImportError: transformers is not installed, or too old.
    """
    remedy = "pip install 'circuitroute[transformers]'"
    try:
        package = importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError(f"this needs transformers ({error}): {remedy}", name="transformers") from error
    found = tuple(int(part) for part in re.findall(r"\d+", package.__version__)[:2])
    if found < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ImportError(f"transformers {package.__version__} is too old, {oldest} is needed: {remedy}")
    return package if module == "transformers" else importlib.import_module(module)
