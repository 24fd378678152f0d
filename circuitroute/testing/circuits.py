"""The compiled circuit against all 2^n worlds, the cache and the limits."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import torch

from circuitroute import Circuit, CircuitPropertyError, CircuitTooLargeError, InfeasibleError
from circuitroute import compile as compile_constraint
from circuitroute.circuit import boolean
from circuitroute.compilation import clear_cache
from circuitroute.testing.case import BoolArray, Case, worlds
from circuitroute.testing.suite import Suite, check, require, require_error


class CircuitChecks(Suite):
    """What :func:`circuitroute.compile` returns."""

    @check
    def test_feasibility(self, any_case: Case) -> None:
        """A circuit if any subset is allowed, :class:`InfeasibleError` otherwise."""
        if any_case.allowed.any():
            self.circuit(any_case)
        else:
            compiled = partial(compile_constraint, any_case.constraint, any_case.n)
            require_error(InfeasibleError, compiled, f"{any_case} allows nothing")

    @check
    def test_circuit_is_of_this_constraint(self, case: Case) -> None:
        """A :class:`Circuit` over n variables that records the constraint it was compiled from."""
        circuit = self.circuit(case)
        require(isinstance(circuit, Circuit), f"{case}: expected a circuitroute.Circuit, got {circuit!r}")
        require(circuit.n == case.n, f"{case}: expected circuit.n == {case.n}, got {circuit.n}")
        require(
            circuit.constraint == case.constraint,
            f"{case}: expected circuit.constraint to be what was compiled, got {circuit.constraint!r}",
        )

    @check
    def test_model_count(self, case: Case) -> None:
        """As many models as allowed worlds."""
        expected, got = int(case.allowed.sum()), self.circuit(case).model_count()
        require(got == expected, f"{case}: expected model_count() == {expected}, got {got}")

    @check
    def test_satisfies(self, case: Case) -> None:
        """``satisfies`` and the arrays of the graph, on every world."""
        require_same_worlds(str(case), self.circuit(case), case.allowed)

    @check
    def test_count_range(self, case: Case) -> None:
        """``min_count``, ``max_count`` and, if not None, ``counts``."""
        circuit, sizes = self.circuit(case), worlds(case.n)[case.allowed].sum(1)
        expected, got = (sizes.min(), sizes.max()), (circuit.min_count, circuit.max_count)
        require(got == expected, f"{case}: expected counts from {expected[0]} to {expected[1]}, got {got}")
        if circuit.counts is not None:
            every = tuple(np.unique(sizes).tolist())
            require(circuit.counts == every, f"{case}: expected counts {every}, got {circuit.counts}")

    @check
    def test_smooth_decomposable_deterministic(self, case: Case) -> None:
        """The properties that make inference exact; see :meth:`Circuit.check`."""
        try:
            self.circuit(case).check()
        except CircuitPropertyError as error:
            raise AssertionError(
                f"{case}: expected a smooth, decomposable, deterministic circuit, got: {error}"
            ) from error

    @check
    def test_memoised(self, case: Case) -> None:
        """Equal constraints share one circuit."""
        circuit, again = self.circuit(case), compile_constraint(copy.copy(case.constraint), case.n)
        require(again is circuit, f"{case}: expected an equal constraint to get the same circuit, got another one")

    @check
    def test_compiles_the_same_again(self, case: Case) -> None:
        """The arrays depend on the constraint alone, so keyed samples are the same in every process."""
        before = self.circuit(case).graph
        clear_cache()
        after = self.circuit(case).graph
        for name in ("kind", "variable", "first", "left", "right"):
            require(
                np.array_equal(getattr(before, name), getattr(after, name)),
                f"{case}: expected the same circuit when compiled again, but {name} differs: {getattr(before, name)} "
                f"and {getattr(after, name)}",
            )

    @check
    def test_max_nodes_is_respected(self, case: Case) -> None:
        """:class:`CircuitTooLargeError` that names ``max_nodes``, unless a single node is enough."""
        if self.circuit(case).num_nodes == 1:
            return
        clear_cache()
        compiled = partial(compile_constraint, case.constraint, case.n, max_nodes=1)
        error = require_error(CircuitTooLargeError, compiled, f"{case} with max_nodes=1")
        require("max_nodes" in str(error), f"{case}: expected the error to name max_nodes, got: {error}")


def require_same_worlds(what: str, circuit: Circuit, allowed: BoolArray) -> None:
    """Require a circuit to allow exactly the worlds ``allowed`` [W]."""
    masks = torch.from_numpy(worlds(circuit.n))
    for method, got in (
        ("satisfies", circuit.satisfies(masks)),
        ("its graph", boolean.holds(circuit.graph, ~masks, masks)),
    ):
        wrong = np.flatnonzero(got.numpy() != allowed)
        if len(wrong):
            selected = np.flatnonzero(worlds(circuit.n)[wrong[0]]).tolist()
            raise AssertionError(
                f"{what}: {method} is wrong on {len(wrong)} of {len(allowed)} worlds, such as the selection {selected}"
                f": expected {bool(allowed[wrong[0]])}, got {bool(got[int(wrong[0])])}"
            )
