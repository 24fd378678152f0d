"""How a contract finds its cases, compiles them and reports failures."""

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
E = TypeVar("E", bound=Exception)


def require(condition: object, message: str) -> None:
    """``AssertionError`` with ``message`` unless ``condition``; unlike a bare assert it survives ``python -O``."""
    __tracebackhide__ = True  # pytest then shows the check that failed, not this line
    if not condition:
        raise AssertionError(message)


def require_close(case: Case, what: str, got: Tensor, expected: npt.ArrayLike, tolerance: float) -> None:
    """Require rows [T, ...] to agree within ``tolerance`` x (1 + |expected|); infinities must be equal."""
    __tracebackhide__ = True
    wanted = torch.as_tensor(expected, dtype=torch.float64)
    found = got.detach().double()
    require(found.shape == wanted.shape, f"{case}: {what} has shape {tuple(found.shape)}, not {tuple(wanted.shape)}")
    close = (found - wanted).abs() <= tolerance * (1 + wanted.abs())
    close |= found == wanted  # infinities, whose difference is NaN
    if not close.all():
        t = int((~close.reshape(len(close), -1)).any(1).nonzero()[0])
        raise AssertionError(f"{case}: {what}, row {t} of the logits: expected {wanted[t]}, got {found[t]}")


def require_error(kind: type[E], call: Callable[[], object], what: str) -> E:
    """The error of type ``kind`` that ``call`` raises; anything else is a failure."""
    __tracebackhide__ = True
    try:
        found = call()
    except kind as error:
        return error
    except Exception as error:
        raise AssertionError(f"{what}: expected {kind.__name__}, got {type(error).__name__}: {error}") from error
    raise AssertionError(f"{what}: expected {kind.__name__}, got {found!r}")


def has_machine(constraint: Constraint) -> bool:
    """Whether the constraint's type defines the three methods of a state machine."""
    kind = type(constraint)
    return all(getattr(kind, name) is not getattr(Constraint, name) for name in ("leaf", "merge", "accepts"))


def check(method: Callable[[S, Case], None]) -> Callable[..., None]:
    """Mark a check of a suite: unexpected exceptions become failures that name the case."""

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

    A method ``test_*(self, case)`` runs on every case that allows some subset; ``test_*(self, any_case)`` runs on all.
    """

    namespace: Mapping[str, Any] | None = MappingProxyType({})
    """Names that evaluating a ``repr`` needs, apart from those of circuitroute, of the types it is made of and of their
    modules; None if the ``repr`` is not an expression."""

    def cases(self) -> Iterable[Case]:
        """The constraints to check, with their meaning; to be defined by the subclass.

        Choose small, revealing sizes: a single variable, an odd number, one at which nothing is allowed.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define cases(): yield Case(constraint, n, allows)")

    def gathered(self) -> list[Case]:
        """The cases, checked.

        Raises:
            TypeError: an entry is not a :class:`Case`.
            ValueError: every case allows nothing.
        """
        found = list(self.cases())
        for case in found:
            if not isinstance(case, Case):
                raise TypeError(f"cases() of {type(self).__name__} gave {case!r}: expected circuitroute.testing.Case")
        if not any(case.allowed.any() for case in found):
            raise ValueError(f"cases() of {type(self).__name__} gave no case that allows any subset: give at least one")
        return found

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """pytest's hook, found by name: parametrizes every check with its cases."""
        wanted = {"case", "any_case"}.intersection(metafunc.fixturenames)
        for argument in wanted:
            cases = [case for case in self.gathered() if argument == "any_case" or case.allowed.any()]
            metafunc.parametrize(argument, cases, ids=list(map(str, cases)))

    def circuit(self, case: Case) -> Circuit:
        """The compiled case; an error in compiling is a failure."""
        try:
            return compile_constraint(case.constraint, case.n)
        except Exception as error:
            raise AssertionError(
                f"{case}: expected a circuit, but compiling raised {type(error).__name__}: {error}"
            ) from error
