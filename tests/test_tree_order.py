"""The tree of variables: candidates, the choice among them by predicted cost, and how good the predictions are."""

import itertools
import json
import math
import os
import random
import subprocess
import sys
from dataclasses import dataclass

import pytest
from circuitroute_compilers import builtin, choice, graph
from circuitroute_compilers.diagram import diagrams
from circuitroute_compilers.lowering import lower
from circuitroute_compilers.plans import along
from circuitroute_compilers.trees import candidates, depth, leaf, linear, met, natural, nodes
from hypothesis import given, settings
from hypothesis import strategies as st

import circuitroute as cr
from circuitroute import compilation
from tests.test_compile import NoNeighbours

x = cr.variables(64)
SHUFFLED = random.Random(0).sample(range(64), 64)
NEIGHBOURS = list(itertools.pairwise(SHUFFLED[:41]))


def both(parts):
    return cr.constraints.And(parts)


EXCLUSIONS = both([cr.Logic(x[i] >> ~x[j]) for i, j in NEIGHBOURS])
PAIRS = both([cr.AtMost(1).over([i, j]) for i, j in NEIGHBOURS])
WINDOWS = both([cr.AtMost(3).over(SHUFFLED[i : i + 16]) for i in range(0, 56, 8)])
GRID = both([cr.AtMost(2).over(s) for i in range(6) for s in (range(6 * i, 6 * i + 6), range(i, 36, 6))])


def scopes(n):
    return st.lists(st.sets(st.integers(0, n - 1), min_size=1).map(lambda s: sum(1 << v for v in s)), max_size=6)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), scopes(n))))
def test_candidates_are_trees_over_all_variables(drawn):
    n, some = drawn
    for tree in candidates(some, n):
        assert sorted(met(tree)) == list(range(n))
        for node in nodes(tree):
            if node.halves is not None:
                left, right = node.halves
                assert not left.scope & right.scope
                assert node.scope == left.scope | right.scope
                assert node.first == left.first


def test_scopes_that_nest_need_no_other_tree(monkeypatch):
    monkeypatch.setitem(sys.modules, "networkx", None)  # importing it would raise
    nested = [0b1111, 0b11, 0b110000, 0b111111]
    (tree,) = candidates(nested, 8)
    assert set(nested) <= {node.scope for node in nodes(tree)}
    compilation.clear_cache()
    cr.compile(cr.ActiveGroups(cr.Groups(4), at_most=2) & cr.Exactly(3) & cr.AtMost(1).over([0, 1]), 16)


@pytest.mark.parametrize("rules", [EXCLUSIONS, PAIRS], ids=["formulas", "counts"])
def test_exclusions_between_neighbours_of_a_shuffled_order(rules):
    circuit = cr.compile(rules & cr.Exactly(8), 64)
    # 41 variables in a row of which no two neighbours are chosen, 23 free ones.
    ways = [math.comb(41 - j + 1, j) * math.comb(23, 8 - j) for j in range(9)]
    assert circuit.model_count() == sum(ways)
    assert circuit.num_nodes < 800
    circuit.check()


def test_counts_that_cut_across_stay_narrow():
    windows = cr.compile(WINDOWS & cr.Exactly(8), 64)
    windows.check()
    assert windows.num_nodes < 2000
    grid = cr.compile(GRID, 36)
    assert grid.model_count() == _row_by_row()
    assert grid.num_nodes < 20_000


def _row_by_row():
    """6 x 6 grids of 0 and 1 with at most two ones in each row and column, by a program over rows."""
    rows = [r for r in range(64) if r.bit_count() <= 2]
    tallies = {(0,) * 6: 1}
    for _ in range(6):
        after = {}
        for columns, ways in tallies.items():
            for row in rows:
                new = tuple(c + (row >> i & 1) for i, c in enumerate(columns))
                if max(new) <= 2:
                    after[new] = after.get(new, 0) + ways
        tallies = after
    return sum(tallies.values())


@pytest.mark.parametrize("constraint", [EXCLUSIONS & cr.Exactly(4), WINDOWS], ids=["exclusions", "windows"])
def test_the_chosen_tree_is_the_cheapest_of_those_predicted_and_beats_the_usual_one(constraint):
    plan = lower(constraint, tuple(range(64)))
    chosen = choice.choose(constraint, plan, 64, 10**6)
    usual = next(candidates([part.scope for part in choice.simple_parts(plan)], 64))
    with pytest.raises(cr.CircuitTooLargeError):
        graph.build_graph(constraint, along(plan, met(usual), 10**6), usual, 2_000)
    built = graph.build_graph(constraint, chosen.term, chosen.tree, 2_000)
    assert built.num_nodes <= chosen.prediction.nodes


def test_the_choice_does_not_depend_on_hash_seeds():
    code = (
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        "import tests.test_tree_order as t, circuitroute as cr\n"
        "print([cr.compile(c, 64).graph.variable.tolist() for c in (t.EXCLUSIONS, t.PAIRS, t.WINDOWS)])"
    )
    here = [cr.compile(constraint, 64).graph.variable.tolist() for constraint in (EXCLUSIONS, PAIRS, WINDOWS)]
    other = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    environment = {**os.environ, "PYTHONHASHSEED": other}
    there = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True, text=True)
    assert json.loads(there.stdout) == here


def test_a_users_machine_sees_its_variables_in_order_whatever_the_scopes():
    pairs = both([cr.Exactly(1).over([i, j]) for i, j in [(0, 7), (7, 3), (5, 1), (1, 6)]])
    circuit = cr.compile(NoNeighbours() & pairs, 9)
    allowed = [
        w for w in range(512)
        if not w & w >> 1 and all((w >> i ^ w >> j) & 1 for i, j in [(0, 7), (7, 3), (5, 1), (1, 6)])
    ]  # fmt: skip
    assert circuit.model_count() == len(allowed) > 0


def test_trees_may_be_deep():
    tree = linear([leaf(v) for v in range(1500)])
    assert depth(tree) == 1499
    assert depth(natural(1500)) == 11
    term = lower(cr.Exactly(1), tuple(range(1500)))
    circuit = graph.build_graph(cr.Exactly(1), term, tree, 10**6)
    assert cr.Circuit(circuit, cr.Exactly(1)).model_count() == 1500
    chain = both([cr.Logic(f"x{i} >> x{(i + 1) % 700}") for i in range(700)])
    assert cr.compile(chain, 700).model_count() == 2


def test_formulas_are_machines_of_their_own_where_together_they_are_too_large():
    draw = random.Random(1)
    rules = [cr.Logic(" ^ ".join(f"x{v}" for v in draw.sample(range(24), 6))).formula for _ in range(14)]
    found = diagrams(cr.Exactly(1), rules, range(24), 10**6)
    assert 1 < len(found) < len(rules)
    assert all(len(each.bdd.below(each.root)) <= 2_000 for each in found)


# ------------------------------------------------------------------------------------------------- predictions

PREDICTED = [
    (cr.Exactly(8), 64),
    (cr.Exactly(32), 512),
    (cr.CountIn({2, 4, 8}), 60),
    (cr.EachGroup(cr.Groups(8), cr.Between(1, 2)), 64),
    (cr.ActiveGroups(cr.Groups(8), at_most=4) & cr.Exactly(8), 64),
    (cr.ActiveGroups(cr.Groups(8), at_most=4) & cr.Exactly(8), 256),
    (cr.LayerBudget(16, 64, cr.Between(2, 12), cr.AtMost(128)), 1024),
    (cr.Cost([1 + i % 7 for i in range(64)], at_most=30), 64),
    (cr.Cost([1 + i % 7 for i in range(32)], at_most=30) & cr.Exactly(8), 32),
    (~cr.Exactly(3).over(range(5)) | cr.AtLeast(4), 32),
    (cr.Logic(x[63] >> x[1]) & cr.Exactly(8), 64),
    (cr.Logic("x0 & x8 | x1 & x9 | x2 & x10"), 16),
    (NoNeighbours(), 32),
    (EXCLUSIONS, 64),
    (EXCLUSIONS & cr.Exactly(8), 64),
    (PAIRS & cr.Exactly(8), 64),
    (WINDOWS & cr.Exactly(8), 64),
    (GRID, 36),
]


@pytest.mark.parametrize(("constraint", "n"), PREDICTED, ids=[f"{i}" for i in range(len(PREDICTED))])
def test_predictions_are_upper_bounds_within_a_factor(constraint, n):
    """Counts alone exactly; together, at most 8 times the nodes and 25 times the elements."""
    predicted, circuit = compilation.predict(constraint, n), cr.compile(constraint, n)
    assert circuit.num_nodes <= predicted.nodes <= (1 if circuit.counts else 8) * circuit.num_nodes
    assert circuit.num_edges <= predicted.edges <= (1 if circuit.counts else 25) * circuit.num_edges
    assert predicted.seconds > 0


def test_the_culprit_is_the_part_that_costs_most():
    cost = cr.Cost([1 + i % 13 for i in range(64)], at_most=60)
    assert compilation.predict(cost & cr.AtMost(2) & cr.Logic(x[3] >> x[5]), 64).culprit == cost
    assert compilation.predict(cr.Exactly(3) & cr.AtMost(9), 64).culprit == cr.Exactly(3) & cr.AtMost(9)


def test_predict_says_what_it_cannot_tell():
    @dataclass(frozen=True)
    class Silent(cr.Constraint):
        k: int

    class Told(Silent):
        pass

    @cr.register_compiler(Silent)
    def compile_silent(constraint, n, max_nodes):
        return cr.compile(cr.Exactly(constraint.k), n, max_nodes)

    assert compilation.predict(Silent(1), 4) is None
    told = compilation.Prediction(width=1, nodes=2, edges=3, seconds=4.0, culprit=Told(1))
    cr.register_compiler(Told, predict=lambda constraint, n: told)(lambda constraint, n, max_nodes: None)
    assert compilation.predict(Told(1), 4) is told
    with pytest.raises(cr.UnsupportedConstraintError, match="int is not a constraint"):
        compilation.predict(3, 4)
    with pytest.raises(ValueError, match="n=0"):
        compilation.predict(cr.Exactly(1), 0)
    with pytest.raises(cr.InfeasibleError, match="none of the counts"):
        compilation.predict(cr.Exactly(9), 4)


def test_what_cannot_fit_is_refused_before_it_is_built(monkeypatch):
    monkeypatch.setattr(builtin, "build_graph", None)
    with pytest.raises(cr.CircuitTooLargeError) as caught:
        cr.compile(cr.Exactly(100), 1000, max_nodes=1000)
    for words in ("at least ", "max_nodes=1000", "width 101", "Exactly(100) costs most: lower its largest"):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("constraint", "words"),
    [
        (cr.Cost([3**i for i in range(24)], at_most=3**23) & cr.AtMost(4), "use coarser costs"),
        (cr.AtMost(3).over(range(20)) & cr.AtMost(15).over(range(10, 60)), "lower its largest count"),
        (cr.Logic(" ^ ".join(f"(x{i} & x{63 - i})" for i in range(32))) & cr.Exactly(9), "max_nodes=120"),
        (NoNeighbours() & cr.Exactly(20), "lower its largest count"),
    ],
)
def test_refusals_name_the_culprit_and_the_remedy(constraint, words):
    with pytest.raises(cr.CircuitTooLargeError, match=words):
        cr.compile(constraint, 24 if "Cost" in repr(constraint) else 64, max_nodes=120)
