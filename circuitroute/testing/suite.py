"""How a contract finds its cases, compiles them and says what went wrong."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

import numpy.typing as npt
import torch
from torch import Tensor

from circuitroute import Circuit, Constraint
from circuitroute import compile as compile_constraint
from circuitroute.testing.case import Case

S = TypeVar("S")


def require(condition: object, message: str) -> None:
    """``AssertionError`` with ``message`` unless ``condition``; unlike a bare assert it survives ``python -O``."""
    __tracebackhide__ = True  # pytest then shows the check that failed, not this line
    if not condition:
        raise AssertionError(message)


def require_close(case: Case, what: str, got: Tensor, expected: npt.ArrayLike, tolerance: float) -> None:
    """Rows [T, ...] that agree within ``tolerance`` x (1 + |expected|), infinities and all."""
    __tracebackhide__ = True
    wanted = torch.as_tensor(expected, dtype=torch.float64)
    found = got.detach().double()
    require(found.shape == wanted.shape, f"{case}: {what} has shape {tuple(found.shape)}, not {tuple(wanted.shape)}")
    close = (found - wanted).abs() <= tolerance * (1 + wanted.abs())
    close |= found == wanted  # infinities, whose difference is NaN
    if not close.all():
        t = int((~close.reshape(len(close), -1)).any(1).nonzero()[0])
        raise AssertionError(f"{case}: {what}, row {t} of the logits: expected {wanted[t]}, got {found[t]}")


def has_machine(constraint: Constraint) -> bool:
    """Whether the constraint's type defines the three methods of a state machine."""
    kind = type(constraint)
    return all(getattr(kind, name) is not getattr(Constraint, name) for name in ("leaf", "merge", "accepts"))


def check(method: Callable[[S, Case], None]) -> Callable[..., None]:
    """A check of a suite: an exception that it does not expect becomes a failure that names the case."""

    @functools.wraps(method)  # pytest reads the names of the arguments through it
    def checked(self: S, *positional: Case, **named: Case) -> None:
        (case,) = (*positional, *named.values())
        try:
            method(self, case)
        except AssertionError:
            raise
        except Exception as error:
            raise AssertionError(f"{case}: expected no error, got {type(error).__name__}: {error}") from error

    return checked


class Suite:
    """Cases, and one test per check and case.

    A method ``test_*(self, case)`` is run on every case that allows any subset, one that asks for ``any_case`` on all.
    """

    namespace: Mapping[str, Any] | None = MappingProxyType({})
    """Names, besides those of circuitroute and the constraint's type, that its ``repr`` is evaluated with; None if the
    ``repr`` is no expression."""

    def cases(self) -> Iterable[Case]:
        """The constraints to check, with their meaning; a subclass gives them.

        Small, telling sizes: one variable, an odd number, one whose constraint allows nothing.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define cases(): yield Case(constraint, n, allows)")

    def gathered(self) -> list[Case]:
        """The cases, checked.

        Raises:
            TypeError: something that is no :class:`Case`.
            ValueError: no case that allows any subset.
        """
        found = list(self.cases())
        for case in found:
            if not isinstance(case, Case):
                raise TypeError(f"cases() of {type(self).__name__} gave {case!r}: expected circuitroute.testing.Case")
        if not any(case.allowed.any() for case in found):
            raise ValueError(f"cases() of {type(self).__name__} gave no case that allows any subset: give at least one")
        return found

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """pytest's hook, found by name: hands every check its cases, by name."""
        wanted = {"case", "any_case"}.intersection(metafunc.fixturenames)
        for argument in wanted:
            cases = [case for case in self.gathered() if argument == "any_case" or case.allowed.any()]
            metafunc.parametrize(argument, cases, ids=list(map(str, cases)))

    def circuit(self, case: Case) -> Circuit:
        """The case compiled, or a failure that says why not."""
        try:
            return compile_constraint(case.constraint, case.n)
        except Exception as error:  # whatever it is, the case is at fault and has to be named
            raise AssertionError(
                f"{case}: expected a circuit, but compiling raised {type(error).__name__}: {error}"
            ) from error
