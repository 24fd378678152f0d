"""Which constraint is meant: MODULE:CONSTRAINT, resolved to an object."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import circuitroute as cr

Rule: TypeAlias = cr.Constraint | cr.Circuit


class TargetError(ValueError):
    """MODULE:CONSTRAINT does not name a constraint; says why."""


@contextmanager
def importable_from_here() -> Iterator[None]:
    """The current directory on the path, as with `python -m`."""
    before = list(sys.path)
    sys.path.insert(0, str(Path.cwd()))
    try:
        yield
    finally:
        sys.path[:] = before


def constraint_of(target: str) -> Rule:
    """The constraint that MODULE:CONSTRAINT names, or the circuit.

    MODULE is the dotted name of a module, or the path of a .py file; CONSTRAINT an attribute of it, possibly
    dotted: a constraint, a circuit, or something that returns one when called without arguments.

    Raises:
        TargetError: there is no such module or attribute, it fails to import, or it is not a constraint.
    """
    place, colon, name = target.rpartition(":")
    if not (colon and place and name):
        raise TargetError(f"{target!r}: expected MODULE:CONSTRAINT, such as mypackage.rules:node_limited")
    module = _module(place)
    found: Any = module
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise TargetError(f"{place} has no {name!r}; {_constraints_in(module)}") from None
    if isinstance(found, (cr.Constraint, cr.Circuit)):
        return found  # a circuit can be called, too, on logits
    if not callable(found):
        raise TargetError(f"{target} is of type {type(found).__name__}, not a constraint; {_constraints_in(module)}")
    return _called(found, target)


def _called(function: Any, target: str) -> Rule:
    try:
        made = function()
    except Exception as error:  # whatever the caller's own code raises
        raise TargetError(
            f"calling {target} without arguments failed with {type(error).__name__}: {error}; "
            "name a constraint, or a function of no arguments that returns one"
        ) from error
    if not isinstance(made, (cr.Constraint, cr.Circuit)):
        raise TargetError(f"{target}() returned something of type {type(made).__name__}, not a constraint")
    return made


def _module(place: str) -> ModuleType:
    try:
        return _module_in_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except TargetError:
        raise
    except ModuleNotFoundError as error:
        if error.name is not None and f"{place}.".startswith(f"{error.name}."):
            raise TargetError(
                f"no module named {error.name!r} here or among the installed ones; "
                "give a module that can be imported from this directory, or the path of a .py file"
            ) from None
        raise TargetError(f"importing {place} failed with ModuleNotFoundError: {error}") from error
    except (Exception, SystemExit) as error:  # whatever the module's own code raises
        raise TargetError(f"importing {place} failed with {type(error).__name__}: {error}") from error


def _module_in_file(path: Path) -> ModuleType:
    """Runs a file as a module whose name cannot hide an installed one."""
    if not path.is_file():
        raise TargetError(f"there is no file {str(path)!r}")
    module = ModuleType(f"explained_{path.stem}")
    module.__file__ = str(path)
    sys.path.insert(0, str(path.parent.resolve()))
    sys.modules[module.__name__] = module  # dataclasses look their module up
    exec(compile(path.read_bytes(), str(path), "exec", dont_inherit=True), vars(module))
    return module


def _constraints_in(module: ModuleType) -> str:
    names = sorted(name for name, value in vars(module).items() if isinstance(value, (cr.Constraint, cr.Circuit)))
    return f"its constraints are {', '.join(names)}" if names else "it has no constraints of its own"
