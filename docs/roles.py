"""Docstrings are written for ``help()`` first; for the reference pages their roles and ``::`` become Markdown here."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":[a-z]+:`~?([^`]+)`")
LITERAL_BLOCK = re.compile(r"::\n(?=\n)")


class Roles(griffe.Extension):
    """Rewrites ``:class:`Circuit``` to `Circuit` in code, and the ``::`` that opens a block of code to a colon."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every module, class, function and attribute once it is complete."""
        if obj.docstring is not None:
            obj.docstring.value = LITERAL_BLOCK.sub(":\n", ROLE.sub(r"`\1`", obj.docstring.value))
