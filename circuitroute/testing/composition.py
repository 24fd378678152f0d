"""Constraints composed with ``&``, ``|``, ``~`` and ``over``, each checked on all worlds."""

from __future__ import annotations

import numpy as np

import circuitroute as cr
from circuitroute.testing.case import BoolArray, Case, worlds
from circuitroute.testing.circuits import require_same_worlds
from circuitroute.testing.suite import Suite, check, has_machine, require


class CompositionChecks(Suite):
    """What a state machine gives for free, and what a type with a compiler alone must refuse with a clear error."""

    @check
    def test_and(self, case: Case) -> None:
        """With a count; the result may allow nothing."""
        half = case.n // 2
        self.composed(case, case.constraint & cr.AtMost(half), case.allowed & (worlds(case.n).sum(1) <= half))

    @check
    def test_or(self, case: Case) -> None:
        """With a count."""
        half = case.n // 2
        self.composed(case, case.constraint | cr.Exactly(half), case.allowed | (worlds(case.n).sum(1) == half))

    @check
    def test_not(self, case: Case) -> None:
        """The complement; it allows nothing if everything was allowed."""
        self.composed(case, ~case.constraint, ~case.allowed)

    @check
    def test_contradiction(self, case: Case) -> None:
        """With its own complement: infeasible."""
        self.composed(case, case.constraint & ~case.constraint, np.zeros_like(case.allowed))

    @check
    def test_over(self, case: Case) -> None:
        """On the last n of n + 1 variables; the first is free."""
        shifted = case.constraint.over(range(1, case.n + 1))
        self.composed(case, shifted, np.repeat(case.allowed, 2))

    def composed(self, case: Case, constraint: cr.Constraint, allowed: BoolArray) -> None:
        """Require a composed constraint to allow exactly the worlds ``allowed``.

        A type without a state machine may be refused, if the error says how to define one.
        """
        n = len(allowed).bit_length() - 1
        try:
            circuit = cr.compile(constraint, n)
        except cr.UnsupportedConstraintError as error:
            require(
                "leaf(var)" in str(error) and not has_machine(case.constraint),
                f"{case}: expected {constraint!r} to compile, or an error that says to define leaf(var), merge(left, "
                f"right) and accepts(state), got: {error}",
            )
        except Exception as error:
            if allowed.any() or not isinstance(error, cr.InfeasibleError):
                found = f"{type(error).__name__}: {error}"
                raise AssertionError(f"{case}: expected a circuit for {constraint!r}, got {found}") from error
        else:
            require(allowed.any(), f"{case}: {constraint!r} allows nothing: expected InfeasibleError, got {circuit!r}")
            require_same_worlds(f"{case}, as {constraint!r}", circuit, allowed)
