"""Constraints: bad arguments, value semantics, repr, and the state-machine protocol against plain counting."""

import copy
import itertools
import pickle
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import circuitroute as cr

counts = st.integers(0, 12)


@st.composite
def count_constraints(draw):
    low, high = sorted((draw(counts), draw(counts)))
    return draw(
        st.sampled_from(
            [
                cr.Exactly(low),
                cr.AtMost(low),
                cr.AtLeast(low),
                cr.Between(low, high),
                cr.CountIn(draw(st.sets(counts, min_size=1, max_size=5))),
            ]
        )
    )


def allowed(constraint, count):
    """The meaning of each constraint, said once more and independently."""
    match constraint:
        case cr.Exactly(k=k):
            return count == k
        case cr.AtMost(k=k):
            return count <= k
        case cr.AtLeast(k=k):
            return count >= k
        case cr.Between(kmin=low, kmax=high):
            return low <= count <= high
        case cr.CountIn(counts=some):
            return count in some
    raise AssertionError(constraint)


def run_machine(constraint, world, order):
    """Merge the leaves of a world pairwise, at the positions ``order`` picks; None if it dies on the way."""
    states = [constraint.leaf(v)[int(z)] for v, z in enumerate(world)]
    while len(states) > 1 and None not in states:
        i = order % (len(states) - 1)
        states[i : i + 2] = [constraint.merge(states[i], states[i + 1])]
    return not any(s is None for s in states) and constraint.accepts(states[0])


@given(count_constraints(), st.lists(st.booleans(), min_size=1, max_size=7), st.integers(0, 5))
def test_machine_accepts_exactly_the_allowed_counts_along_any_tree(constraint, world, order):
    assert run_machine(constraint, world, order) == allowed(constraint, sum(world))


@given(count_constraints())
def test_repr_evaluates_back_and_equality_is_by_value(constraint):
    again = eval(repr(constraint), vars(cr))
    assert again == constraint
    assert hash(again) == hash(constraint)
    scoped = constraint.over([4, 1])
    assert eval(repr(scoped), vars(cr)) == scoped == constraint.over((1, 4))
    assert pickle.loads(pickle.dumps(scoped)) == scoped == copy.deepcopy(scoped)


def test_different_constraints_differ():
    some = [cr.Exactly(2), cr.AtMost(2), cr.AtLeast(2), cr.Between(2, 3), cr.CountIn({2}), cr.Exactly(2).over([0, 1])]
    assert all(a != b for a, b in itertools.combinations(some, 2))


@pytest.mark.parametrize("constraint", [cr.Exactly(2), cr.CountIn({1, 2}), cr.Exactly(1).over([0, 3])])
def test_immutable(constraint):
    name = next(iter(vars(constraint)))
    with pytest.raises(FrozenInstanceError):
        setattr(constraint, name, 5)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: cr.Exactly(-1), ValueError, "k=-1: must be at least 0"),
        (lambda: cr.Exactly(2.0), TypeError, "k=2.0: expected an integer"),
        (lambda: cr.Exactly(True), TypeError, "k=True"),
        (lambda: cr.AtMost("3"), TypeError, "k='3'"),
        (lambda: cr.AtLeast(-4), ValueError, "k=-4"),
        (lambda: cr.Between(3, 2), ValueError, "kmax=2: must be at least kmin=3"),
        (lambda: cr.Between(-1, 2), ValueError, "kmin=-1"),
        (lambda: cr.CountIn(set()), ValueError, "at least one allowed count"),
        (lambda: cr.CountIn({1, -2}), ValueError, "counts=-2"),
        (lambda: cr.CountIn(3), TypeError, "counts=3: expected a set"),
        (lambda: cr.CountIn("12"), TypeError, "counts='12'"),
        (lambda: cr.Exactly(1).over([]), ValueError, "at least one variable"),
        (lambda: cr.Exactly(1).over([0, 0]), ValueError, "variable 0 is given twice"),
        (lambda: cr.Exactly(1).over([-1]), ValueError, "indices\\[0\\]=-1"),
        (lambda: cr.Exactly(1).over([1.5]), TypeError, "indices\\[0\\]=1.5"),
        (lambda: cr.Exactly(1).over(3), TypeError, "indices=3"),
        (lambda: cr.Exactly(1).over([0, 4]).over([1]), ValueError, "at least 5 indices"),
    ],
)
def test_bad_arguments_are_named_at_construction(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_numpy_integers_are_integers():
    np = pytest.importorskip("numpy")
    assert cr.Exactly(np.int64(3)) == cr.Exactly(3)


def test_scopes_compose():
    assert cr.Exactly(1).over([0, 2]).over([5, 6, 9]) == cr.Exactly(1).over([5, 9])


def test_base_class_says_what_is_missing():
    class Nothing(cr.Constraint):
        pass

    for call in (lambda c: c.leaf(0), lambda c: c.merge(0, 0), lambda c: c.accepts(0)):
        with pytest.raises(NotImplementedError, match="Nothing does not define"):
            call(Nothing())


@pytest.mark.parametrize(
    ("made", "plain"),
    [
        (lambda: cr.Exactly(np.int64(2)), cr.Exactly(2)),
        (lambda: cr.CountIn(np.array([4, 2])), cr.CountIn({2, 4})),
        (lambda: cr.Cost(np.array([1, 2]), at_most=np.int32(3)), cr.Cost([1, 2], at_most=3)),
        (lambda: cr.Exactly(1).over(np.array([1, 2])), cr.Exactly(1).over([1, 2])),
        (lambda: cr.ActiveGroups(cr.Groups(np.int8(4)), at_most=np.int64(2)), cr.ActiveGroups(cr.Groups(4), at_most=2)),
        (
            lambda: cr.EachGroup(cr.Groups(np.array([[0, 1], [2, 3]])), cr.Exactly(1)),
            cr.EachGroup(cr.Groups([[0, 1], [2, 3]]), cr.Exactly(1)),
        ),
        (
            lambda: cr.LayerBudget(np.int64(2), np.int64(3), cr.Exactly(1), cr.AtMost(2)),
            cr.LayerBudget(2, 3, cr.Exactly(1), cr.AtMost(2)),
        ),
    ],
)
def test_numbers_of_numpy_make_the_same_constraint(made, plain):
    """Circuits are memoised by it, and files hold its repr."""
    assert made() == plain
    assert hash(made()) == hash(plain)
    assert repr(made()) == repr(plain)


def test_constraints_of_different_kinds_are_not_equal():
    """Also where they mean the same: the circuit, not the equality, says that."""
    some = [
        cr.Exactly(2),
        cr.Between(2, 2),
        cr.CountIn({2}),
        ~cr.Exactly(2),
        cr.Exactly(2).over([0, 1]),
        2,
        "Exactly(2)",
    ]
    for i, one in enumerate(some):
        assert [one == other for other in some] == [i == j for j in range(len(some))]
