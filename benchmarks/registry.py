"""Ops and their providers, filled by decorators on import.

Shapes: T tokens, N variables, K largest count.
"""

from __future__ import annotations

import importlib
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from torch import Tensor

# Imported on first use; each registers one op and its providers.
MODULES = ("benchmarks.subset", "benchmarks.step", "benchmarks.layered", "benchmarks.budget", "benchmarks.circuits")


# What is timed: a pass's name in the rows.
FORWARD, BOTH = "forward", "forward+backward"
PASSES = (FORWARD, BOTH)


class UnavailableError(Exception):
    """This provider cannot run this case here; the message says why."""


@dataclass(frozen=True)
class Outputs:
    """What a forward pass leaves: the tensor that the loss sees, or several, and the values to check."""

    result: Tensor
    values: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)  # row fields where this provider departs from the case
    more: tuple[Tensor, ...] = ()  # what else the loss sees

    @property
    def results(self) -> tuple[Tensor, ...]:
        """All that the loss sees."""
        return (self.result, *self.more)


Forward = Callable[[Tensor], Outputs]


class Case(Protocol):
    """One problem: its input, the gradient that arrives from above, and what its rows say of it."""

    @property
    def logits(self) -> Tensor: ...

    def upstream(self, result: Tensor) -> Tensor:
        """The gradient of the loss in ``result``."""

    def describe(self) -> dict[str, Any]:
        """The row fields that identify the case."""


class Op(Protocol):
    """A workload."""

    name: str
    baseline: str  # the provider that ratios refer to; always timed

    def add_arguments(self, parser: ArgumentParser) -> None:
        """Add the op's own options."""

    def cases(self, options: Namespace) -> Sequence[Case]:
        """The problems that the options ask for."""

    def errors(self, case: Any, outputs: Outputs, gradient: Tensor) -> dict[str, float | None]:
        """The largest absolute error of each pass against the truth; None where there is nothing to check."""


@dataclass(frozen=True)
class Provider:
    """One way to do an op: ``build(case)`` returns the forward pass, or raises ``UnavailableError``.

    ``note`` says in its rows, the table and the plots what it does less or otherwise than the op asks for.
    """

    op: str
    name: str
    engine: str
    build: Callable[[Any], Forward]
    by_default: bool
    note: str | None = None


_ops: dict[str, Op] = {}
_providers: dict[tuple[str, str], Provider] = {}

OpClass = TypeVar("OpClass", bound=type)
Build = TypeVar("Build", bound=Callable[[Any], Forward])


def op(cls: OpClass) -> OpClass:
    """Class decorator: register an op."""
    instance = cls()
    if instance.name in _ops:
        raise ValueError(f"there is an op named {instance.name!r} already")
    _ops[instance.name] = instance
    return cls


def provider(
    op: str, name: str, *, engine: str = "eager", by_default: bool = True, note: str | None = None
) -> Callable[[Build], Build]:
    """Decorator for ``build(case) -> forward``; ``by_default=False`` runs it only when it is named."""

    def register(build: Build) -> Build:
        if (op, name) in _providers:
            raise ValueError(f"op {op!r} has a provider named {name!r} already")
        _providers[op, name] = Provider(op, name, engine, build, by_default, note)
        return build

    return register


def get_op(name: str) -> Op:
    """The op of that name."""
    return ops()[name]


def ops() -> dict[str, Op]:
    """All ops by name."""
    for module in MODULES:
        importlib.import_module(module)
    return dict(_ops)


def providers(op_name: str, names: Sequence[str] | None = None) -> list[Provider]:
    """The op's providers, baseline first: those named, or those that run by default.

    Raises:
        ValueError: an unknown name.
    """
    baseline = get_op(op_name).baseline
    known = {name: found for (of, name), found in _providers.items() if of == op_name}
    wanted = [name for name, found in known.items() if found.by_default] if names is None else names
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ValueError(f"no provider {', '.join(unknown)} for op {op_name!r}; there are {', '.join(known)}")
    return [known[name] for name in dict.fromkeys([baseline, *wanted])]
