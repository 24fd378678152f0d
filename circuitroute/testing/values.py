"""The constraint as a value: circuits are cached by it, so equality and hash decide which one routes."""

from __future__ import annotations

import copy

import numpy as np

from circuitroute.testing.case import Case
from circuitroute.testing.names import evaluated
from circuitroute.testing.suite import Suite, check, require


class ValueChecks(Suite):
    """Hash, equality, ``repr``."""

    @check
    def test_equal_constraints_hash_alike(self, any_case: Case) -> None:
        """A copy is equal and has the same hash; an unrelated object is not equal."""
        constraint, again = any_case.constraint, copy.copy(any_case.constraint)
        try:
            same_hash = hash(again) == hash(constraint)
        except TypeError as error:
            raise AssertionError(f"{any_case}: expected a hash, got {error}; make it a frozen dataclass") from error
        require(again == constraint, f"{any_case}: expected a copy to be equal; define __eq__ by value")
        require(same_hash, f"{any_case}: expected equal constraints to have equal hashes")
        require(constraint != object(), f"{any_case}: expected to differ from any other object, but equals one")

    @check
    def test_different_constraints_are_not_equal(self, any_case: Case) -> None:
        """Cases of one size with different meanings must not share a circuit."""
        for other in self.gathered():
            if other.n != any_case.n or np.array_equal(other.allowed, any_case.allowed):
                continue
            require(
                other.constraint != any_case.constraint,
                f"{any_case} and {other.constraint!r} allow different subsets, but compare equal: expected __eq__ to "
                "tell them apart",
            )

    @check
    def test_repr_evaluates_back(self, any_case: Case) -> None:
        """``eval(repr(constraint))`` is an equal constraint, unless :attr:`namespace` is None."""
        if self.namespace is None:
            return
        try:
            again = evaluated(any_case.constraint, self.namespace, type(self))
        except Exception as error:
            raise AssertionError(
                f"{any_case}: expected repr to evaluate back, got {type(error).__name__}: {error}; add what it needs "
                "to `namespace`, or set that to None"
            ) from error
        require(again == any_case.constraint, f"{any_case}: expected repr to evaluate to an equal one, got {again!r}")
