"""Compilation: the circuits against all 2^n worlds, the registry, the cache, and every error."""

import math
import pickle
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import circuitroute as cr
from circuitroute import compilation
from circuitroute.engines import choice
from tests.test_constraints import allowed, count_constraints
from tests.truth import enumerate_worlds


@dataclass(frozen=True)
class Parity(cr.Constraint):
    """An even number of selected variables: a user's constraint, by the protocol alone."""

    def leaf(self, var):
        return 0, 1

    def merge(self, left, right):
        return (left + right) % 2

    def accepts(self, state):
        return state == 0


@dataclass(frozen=True)
class NoNeighbours(cr.Constraint):
    """No two neighbouring variables both selected: the order of merges matters, and states are tuples."""

    def leaf(self, var):
        return (False, False), (True, True)

    def merge(self, left, right):
        return None if left[1] and right[0] else (left[0], right[1])

    def accepts(self, state):
        return True


def compile_or_check_infeasible(constraint, n, accept):
    if accept.any():
        return cr.compile(constraint, n)
    with pytest.raises(cr.InfeasibleError, match=repr(constraint).split("(")[0]):
        cr.compile(constraint, n)
    return None


def hold_to_worlds(circuit, accept, n):
    worlds = torch.from_numpy(enumerate_worlds(n))
    assert circuit.model_count() == int(accept.sum())
    assert torch.equal(circuit.satisfies(worlds), torch.from_numpy(accept))
    chosen = enumerate_worlds(n)[accept].sum(1)
    assert (circuit.min_count, circuit.max_count) == (chosen.min(), chosen.max())
    circuit.check()


@settings(max_examples=60, deadline=None)
@given(count_constraints(), st.integers(1, 9))
def test_count_circuits_are_the_constraint(constraint, n):
    accept = np.array([allowed(constraint, int(w.sum())) for w in enumerate_worlds(n)])
    circuit = compile_or_check_infeasible(constraint, n, accept)
    if circuit is not None:
        assert circuit.op == "subset"
        hold_to_worlds(circuit, accept, n)


@settings(max_examples=60, deadline=None)
@given(count_constraints(), st.data())
def test_scoped_circuits_are_the_constraint(constraint, data):
    n = data.draw(st.integers(1, 8))
    scope = sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1)))
    worlds = enumerate_worlds(n)
    accept = np.array([allowed(constraint, int(w[scope].sum())) for w in worlds])
    circuit = compile_or_check_infeasible(constraint.over(scope), n, accept)
    if circuit is not None:
        assert circuit.op == ("subset" if len(scope) == n else "layered")
        hold_to_worlds(circuit, accept, n)


@pytest.mark.parametrize("n", [1, 2, 3, 6, 9])
@pytest.mark.parametrize("constraint", [Parity(), NoNeighbours(), NoNeighbours().over([0, 2, 1]), Parity().over([0])])
def test_user_defined_machines_compile(constraint, n):
    if isinstance(constraint, cr.constraints.Over) and max(constraint.indices) >= n:
        with pytest.raises(ValueError, match=f"but n={n}"):
            cr.compile(constraint, n)
        return
    inner = constraint.constraint if isinstance(constraint, cr.constraints.Over) else constraint
    scope = sorted(constraint.indices) if inner is not constraint else list(range(n))
    worlds = enumerate_worlds(n)[:, scope]
    if isinstance(inner, Parity):
        accept = worlds.sum(1) % 2 == 0
    else:
        accept = ~(worlds[:, 1:] & worlds[:, :-1]).any(1)
    hold_to_worlds(cr.compile(constraint, n), accept, n)


@pytest.mark.parametrize(("n", "k"), [(64, 8), (60, 4), (257, 100), (512, 32)])
def test_large_model_counts_are_binomial(n, k):
    circuit = cr.compile(cr.Exactly(k), n)
    assert circuit.model_count() == math.comb(n, k)
    assert circuit.depth == math.ceil(math.log2(n))
    assert circuit.max_count == circuit.min_count == k


def test_wide_ranges_count_right():
    assert cr.compile(cr.AtLeast(3), 40).model_count() == sum(math.comb(40, j) for j in range(3, 41))
    assert cr.compile(cr.Between(0, 30), 30).model_count() == 2**30


def test_memoised_on_constraint_and_size():
    circuit = cr.compile(cr.Exactly(3), 17)
    assert cr.compile(cr.Exactly(3), 17) is circuit
    assert cr.compile(cr.Exactly(3), 18) is not circuit
    compilation.clear_cache()
    assert cr.compile(cr.Exactly(3), 17) is not circuit


@pytest.mark.parametrize("constraint", [cr.Exactly(9), cr.AtLeast(9), cr.Between(9, 20), cr.CountIn({10, 11})])
def test_more_than_there_are_is_infeasible(constraint):
    with pytest.raises(cr.InfeasibleError, match="8"):
        cr.compile(constraint, 8)


def test_infeasible_scope_and_machine():
    with pytest.raises(cr.InfeasibleError, match="0 to 2"):
        cr.compile(cr.Exactly(3).over([1, 5]), 8)

    @dataclass(frozen=True)
    class Never(Parity):
        def accepts(self, state):
            return False

    with pytest.raises(cr.InfeasibleError, match="Never"):
        cr.compile(Never(), 4)


def test_too_large_names_width_and_culprit_and_leaves_the_cache_usable():
    with pytest.raises(cr.CircuitTooLargeError, match=r"Exactly\(8\) over 64.*max_nodes=100.*width 9"):
        cr.compile(cr.Exactly(8), 64, max_nodes=100)
    circuit = cr.compile(cr.Exactly(8), 64)
    with pytest.raises(cr.CircuitTooLargeError, match="max_nodes=100"):
        cr.compile(cr.Exactly(8), 64, max_nodes=100)
    assert cr.compile(cr.Exactly(8), 64, max_nodes=circuit.num_nodes) is circuit


def test_a_machine_that_explodes_is_stopped_early():
    @dataclass(frozen=True)
    class Remember(cr.Constraint):
        def leaf(self, var):
            return (0,), (1,)

        def merge(self, left, right):
            return left + right

        def accepts(self, state):
            return True

    with pytest.raises(cr.CircuitTooLargeError, match="Remember"):
        cr.compile(Remember(), 64, max_nodes=1000)


@dataclass(frozen=True)
class Chosen(cr.Constraint):
    """At most ``most`` variables, by a machine whose state is the set itself; variable 0 is not kept."""

    most: int
    calls: list = field(default_factory=list, compare=False, repr=False)

    def leaf(self, var):
        return frozenset(), frozenset([var] if var else [])

    def merge(self, left, right):
        self.calls.append(None)
        both = left | right
        return both if len(both) <= self.most else None

    def accepts(self, state):
        return True


@pytest.mark.parametrize("n", [24, 40, 48, 300])
@pytest.mark.parametrize("also", [None, cr.AtMost(20)])
def test_a_state_per_subset_is_refused_before_it_is_built(n, also):
    machine = Chosen(n)
    with pytest.raises(cr.CircuitTooLargeError) as caught:
        cr.compile(machine if also is None else machine & also, n)
    for words in ("keeps a state for every subset of ", "width ", "max_nodes=1000000", "Chosen(", "fewer states"):
        assert words in str(caught.value)
    # 12 variables to a block take 4,096 merges, of which there are few; the rest are samples.
    assert len(machine.calls) < 80_000


@pytest.mark.parametrize(("n", "most"), [(12, 12), (15, 15), (32, 2), (28, 3)])
def test_a_state_per_subset_compiles_where_there_are_few(n, most):
    circuit = cr.compile(Chosen(most), n, max_nodes=5_000)
    assert circuit.model_count() == 2 * sum(math.comb(n - 1, j) for j in range(most + 1))


def test_scope_beyond_n_is_named():
    with pytest.raises(ValueError, match="uses variable 9, but n=8"):
        cr.compile(cr.Exactly(1).over([0, 9]), 8)


@pytest.mark.parametrize(("n", "error"), [(0, ValueError), (-1, ValueError), (2.5, TypeError), ("8", TypeError)])
def test_bad_n(n, error):
    with pytest.raises(error, match="n="):
        cr.compile(cr.Exactly(1), n)


def test_bad_max_nodes():
    with pytest.raises(ValueError, match="max_nodes=0"):
        cr.compile(cr.Exactly(1), 4, max_nodes=0)


def test_unhashable_constraints_and_states_are_refused_with_a_remedy():
    class Unhashable(Parity):
        __hash__ = None

    with pytest.raises(TypeError, match="frozen dataclass"):
        cr.compile(Unhashable(), 4)

    @dataclass(frozen=True)
    class ListStates(Parity):
        def leaf(self, var):
            return [0], [1]

    with pytest.raises(TypeError, match=r"ListStates.*hashable"):
        cr.compile(ListStates(), 4)


def test_unsupported_constraint_says_what_to_write():
    @dataclass(frozen=True)
    class Odd(cr.Constraint):
        pass

    for constraint in (Odd(), Odd().over([0, 1])):
        with pytest.raises(cr.UnsupportedConstraintError, match=r"@cr.register_compiler\(.*Odd\)") as caught:
            cr.compile(constraint, 4)
        assert "leaf(var)" in str(caught.value)
    with pytest.raises(cr.UnsupportedConstraintError, match="int is not a constraint"):
        cr.compile(3, 4)


def test_register_compiler_by_type_and_subclass():
    @dataclass(frozen=True)
    class Mine(cr.Constraint):
        k: int

    class MineToo(Mine):
        pass

    @cr.register_compiler(Mine)
    def compile_mine(constraint, n, max_nodes):
        return cr.compile(cr.Exactly(constraint.k), n, max_nodes)

    assert cr.compile(Mine(2), 6).model_count() == 15
    assert cr.compile(MineToo(2), 7).model_count() == 21
    with pytest.raises(
        ValueError, match=r"Mine already has a compiler, .*compile_mine: register this one for a subclass"
    ):
        cr.register_compiler(Mine)(compile_mine)
    with pytest.raises(TypeError, match="expected a subclass"):
        cr.register_compiler(int)


def test_without_any_compiler_it_is_said_what_to_write(monkeypatch):
    """As where the built-in plug-in could not be imported: not even the general machine has a compiler then."""
    monkeypatch.setattr(compilation, "_compilers", {})
    monkeypatch.setattr(compilation, "_loaded", True)
    monkeypatch.setattr(compilation, "_failed_modules", {compilation.BUILT_IN_MODULE: "ImportError: no numpy"})
    with pytest.raises(cr.UnsupportedConstraintError) as caught:
        compilation.predict(Parity(), 4)
    assert "no compiler for Parity" in str(caught.value)
    assert "@cr.register_compiler(Parity)" in str(caught.value)
    assert f"The plug-in {compilation.BUILT_IN_MODULE} could not be imported: ImportError: no numpy" in str(
        caught.value
    )


def test_a_circuit_without_any_count_is_infeasible():
    graph = cr.compile(cr.Exactly(2), 4).graph
    with pytest.raises(
        cr.InfeasibleError, match=r"Exactly\(2\) over 4 variables: no allowed count in 0\.\.4; counts=\(\)"
    ):
        cr.Circuit(graph, cr.Exactly(2), counts=())


def test_all_errors_share_a_base():
    for name in ("InfeasibleError", "CircuitTooLargeError", "UnsupportedConstraintError", "EngineError"):
        assert issubclass(getattr(cr, name), cr.CircuitRouteError)


def test_a_broken_plugin_is_named_where_it_is_missed():
    code = """
    import importlib.metadata as metadata, warnings
    import circuitroute as cr
    from circuitroute import compilation
    class Entry:
        module = "no_such_plugin_module"
    compilation.entry_points = lambda group: [Entry()]
    class Odd(cr.Constraint):
        pass
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            cr.compile(Odd(), 3)
        except cr.UnsupportedConstraintError as error:
            assert "no_such_plugin_module could not be imported" in str(error)
        else:
            raise SystemExit("no error")
    assert any("no_such_plugin_module" in str(w.message) for w in caught)
    assert cr.compile(cr.Exactly(1), 3).model_count() == 3
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, env=_env())


def _env():
    import os

    import circuitroute_compilers

    import circuitroute

    paths = [os.path.dirname(os.path.dirname(m.__file__)) for m in (circuitroute, circuitroute_compilers)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def test_circuits_travel_between_processes_without_what_they_cached():
    circuit = cr.compile(cr.Exactly(2).over([0, 1, 3]), 6)
    marginals = circuit(torch.zeros(6)).marginals
    again = pickle.loads(pickle.dumps(circuit))
    assert circuit in choice._LAYERED
    assert again not in choice._LAYERED
    assert torch.equal(again(torch.zeros(6)).marginals, marginals)
    assert pickle.loads(pickle.dumps(cr.compile(cr.Exactly(2), 6).with_engine("naive"))).engine_for("cpu") == "naive"


def test_width_tells_large_scopes_apart():
    """A scope is the bits of an int, whose hash is modulo 2^61 - 1: scopes 61 variables apart would collide."""
    assert cr.compile(cr.Exactly(8), 122).width == 9
    assert cr.compile(cr.Exactly(8), 61).width == 9
