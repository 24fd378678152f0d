"""Evaluating a constraint's ``repr`` where its author would: the names it may use, whatever they are defined in."""

from __future__ import annotations

import enum
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import circuitroute as cr


def evaluated(value: object, more: Mapping[str, Any], suite: type) -> Any:
    """What ``repr(value)`` evaluates to.

    Known are the names of circuitroute, of the modules that define the suite and the types that ``value`` is made of,
    and these types themselves, also where they are defined in a class or a function: dataclasses write
    ``test.<locals>.Odd()``, which no Python reads.

    Args:
        more: names that come before all others.
        suite: the test class.

    Raises:
        Exception: whatever evaluating it raises.
    """
    kinds = {type(part): None for part in _parts(value, set())}
    modules = [vars(sys.modules[kind.__module__]) for kind in (*kinds, suite) if kind.__module__ in sys.modules]
    names: dict[str, Any] = {name: found for module in modules for name, found in module.items()}
    names |= vars(cr) | {kind.__name__: kind for kind in kinds if kind.__module__ != "builtins"}
    text = repr(value)
    dotted = {kind.__qualname__: kind for kind in kinds if "." in kind.__qualname__}
    for i, name in enumerate(sorted(dotted, key=len, reverse=True)):
        names[f"_local_{i}"] = dotted[name]
        text = re.sub(rf"(?<![\w.]){re.escape(name)}(?!\w)", f"_local_{i}", text)
    return eval(text, names | dict(more))


def _parts(value: object, seen: set[int]) -> Iterator[object]:
    """The value and, through attributes and containers, all that it holds."""
    if id(value) in seen or isinstance(value, type):
        return
    seen.add(id(value))
    yield value
    if isinstance(value, Mapping):
        inside = [*value.keys(), *value.values()]
    elif isinstance(value, (tuple, list, set, frozenset)):
        inside = list(value)
    elif isinstance(value, enum.Enum) or type(value).__module__ == "builtins":
        inside = []
    else:
        slots = [name for kind in type(value).__mro__ for name in _slots(kind)]
        inside = [getattr(value, name) for name in slots if hasattr(value, name)] + list(
            getattr(value, "__dict__", {}).values()
        )
    for part in inside:
        yield from _parts(part, seen)


def _slots(kind: type) -> tuple[str, ...]:
    names = vars(kind).get("__slots__", ())
    return tuple(name for name in ((names,) if isinstance(names, str) else names) if not name.startswith("__"))
