"""Vtrees: made, recovered from circuits, and refused where there is none."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import circuitroute as cr
from circuitroute.circuit import Graph
from circuitroute.circuit.clustering import mutual_information
from circuitroute.inference.circuit import Circuit
from tests.interop.files import BALANCED, TWO_PAIRS_SDD

T, A, P, S = range(4)  # true, absent, present, sum
X = cr.variables(8)


def graph(n, *nodes):
    """Nodes as (kind, variable) or, for sums, a list of pairs of earlier nodes."""
    kinds = [S if isinstance(node, list) else node[0] for node in nodes]
    variables = [-1 if isinstance(node, list) else node[1] for node in nodes]
    return Graph.of(n, kinds, variables, [node if isinstance(node, list) else [] for node in nodes])


def test_the_trees_that_are_made():
    assert cr.Vtree.balanced(5).nested() == (((0, 1), 2), (3, 4))
    assert cr.Vtree.balanced([2, 0, 1]).nested() == ((2, 0), 1)
    assert cr.Vtree.linear(4).nested() == (0, (1, (2, 3)))
    assert cr.Vtree.linear([2, 0, 1]).nested() == (2, (0, 1))
    assert cr.Vtree.balanced(1) == cr.Vtree.linear(1) == cr.Vtree(1, ())
    tree = cr.Vtree.of_nested(((1, 0), [2, 3]))
    assert tree == cr.Vtree(4, ((1, 0), (2, 3), (4, 5)))
    assert tree.nested() == ((1, 0), (2, 3))
    assert tree.num_nodes == 7
    assert tree.scopes == (1, 2, 4, 8, 3, 12, 15)
    assert tree.parents == (4, 4, 5, 5, 6, 6, -1)
    assert [tree.place(scope) for scope in (1, 3, 12, 5, 15)] == [0, 4, 5, 6, 6]
    assert hash(tree) == hash(pickle.loads(pickle.dumps(tree)))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: cr.Vtree(0, ()), ValueError, "n=0: must be at least 1"),
        (lambda: cr.Vtree(2, ()), ValueError, r"a vtree over n=2 variables has 1 inner nodes"),
        (lambda: cr.Vtree(2, ((0, 0),)), ValueError, "every node but the last is a half of exactly one other"),
        (lambda: cr.Vtree(3, ((0, 4), (1, 2))), ValueError, r"halves\[0\]=\(0, 4\): node 3 must come after its halves"),
        (lambda: cr.Vtree(2, ((0, 1, 1),)), ValueError, r"halves\[0\]=\(0, 1, 1\): every inner node has two halves"),
        (lambda: cr.Vtree(2, ((0, "1"),)), TypeError, r"halves\[0\]='1': expected an integer"),
        (lambda: cr.Vtree(2, 3), TypeError, "halves=3: expected pairs of nodes"),
        (lambda: cr.Vtree.of_nested((0, 1, 2)), ValueError, r"nested holds \(0, 1, 2\): every part must be a variable"),
        (lambda: cr.Vtree.of_nested((0, 2)), ValueError, r"nested has the leaves \[0, 2\]: give each of the variables"),
        (lambda: cr.Vtree.of_nested((0, "a")), TypeError, "nested='a': expected an integer"),
        (lambda: cr.Vtree.balanced(0), ValueError, "variables=0: must be at least 1"),
        (lambda: cr.Vtree.balanced(2.0), TypeError, "variables=2.0: expected an integer"),
        (lambda: cr.Vtree.linear([0, 2]), ValueError, r"variables=\[0, 2\]: give each of the variables 0 to 1 once"),
        (lambda: cr.Vtree.clustered(torch.zeros(0, 3)), ValueError, r"masks has shape \(0, 3\): give at least one"),
        (lambda: cr.Vtree.clustered(torch.full((2, 3), 0.5)), ValueError, "masks holds 0.5"),
        (lambda: cr.Vtree.clustered([[1]]), TypeError, "masks=.*: expected a tensor"),
    ],
)
def test_what_is_no_vtree_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("constraint", "n", "nested"),
    [
        (cr.Exactly(3), 8, (((0, 1), (2, 3)), ((4, 5), (6, 7)))),
        (cr.AtMost(1).over([0, 2]), 4, ((0, 1), (2, 3))),  # one split that matters, the rest in balance
        (cr.AtMost(4), 4, ((0, 1), (2, 3))),  # no split matters
        (cr.Logic((X[0] >> X[5]) & (X[1] | X[6])), 8, (((0, 5), (1, 6)), ((2, 3), (4, 7)))),
        (cr.Exactly(1), 1, 0),
    ],
)
def test_recovered_from_what_was_compiled(constraint, n, nested):
    assert cr.Vtree.of_circuit(cr.compile(constraint, n)).nested() == nested


def test_recovered_from_an_sdd(tmp_path):
    (tmp_path / "a.sdd").write_text(TWO_PAIRS_SDD)
    (tmp_path / "a.vtree").write_text(BALANCED)
    circuit = cr.read_sdd(tmp_path / "a.sdd", tmp_path / "a.vtree")
    assert cr.Vtree.of_circuit(circuit).nested() == ((0, 1), (2, 3))


TRUE = (T, -1)
LITERALS = [TRUE, (A, 0), (P, 0), (A, 1), (P, 1), (A, 2), (P, 2)]  # nodes 0 to 6
# x0 == x1, and x2; or x0 != x1 by way of x1 == x2: two ways to split three variables.
TWO_WAYS = graph(3, *LITERALS, [(1, 3), (2, 4)], [(3, 6), (4, 5)], [(7, 6), (1, 8)])
# Four variables in a ring: no product is over all, so no demand settles the top.
RING = graph(
    4, *LITERALS, (A, 3), (P, 3),
    [(1, 3), (2, 4)], [(5, 7), (6, 8)], [(3, 6), (4, 5)], [(7, 2), (8, 1)],
    [(9, 10), (11, 12)],
)  # fmt: skip


@pytest.mark.parametrize("bad", [TWO_WAYS, RING])
def test_a_circuit_that_respects_no_vtree_is_refused_by_name(bad):
    with pytest.raises(cr.CircuitPropertyError, match=r"respects no vtree: .*node \d+ multiplies factors over \["):
        cr.Vtree.of_circuit(Circuit(bad, cr.Exactly(1)))


def test_parts_that_cannot_be_split():
    """No demand is about all four variables, and together they leave nothing to split."""
    cycle = graph(
        4, *LITERALS, (A, 3), (P, 3), *([(2 * v + 1, 0), (2 * v + 2, 0)] for v in range(4)),  # 9 to 12: any value
        [(1, 3), (2, 4)], [(13, 6)],  # x0 == x1, and x2
        [(3, 5), (4, 6)], [(15, 8)],  # x1 == x2, and x3
        [(5, 7), (6, 8)], [(17, 2)],  # x2 == x3, and x0
        [(14, 12), (16, 9), (18, 10)],
    )  # fmt: skip
    message = (
        r"no two halves of the variables \[0, 1, 2, 3\] keep together .*; node 14 multiplies factors over \[0, 1\]"
    )
    with pytest.raises(cr.CircuitPropertyError, match=message):
        cr.Vtree.of_circuit(Circuit(cycle, cr.Exactly(1)))


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 9), st.randoms(use_true_random=False), st.data())
def test_the_tree_of_a_constraint_along_any_tree_is_found_again(n, random, data):
    """A conjunction of parities, one per node of a random tree, can be laid out along no other tree."""
    parts = list(range(n))
    while len(parts) > 1:
        random.shuffle(parts)
        parts.append((parts.pop(), parts.pop()))
    tree = cr.Vtree.of_nested(parts[0])
    nodes, wholes = [TRUE], []
    for v in range(n):
        nodes += [(A, v), (P, v)]
        wholes.append((2 * v + 1, 2 * v + 2))
    for left, right in tree.halves:
        (a, b), (c, d) = wholes[left], wholes[right]
        wholes.append((len(nodes), len(nodes) + 1))
        nodes += [[(a, c), (b, d)], [(a, d), (b, c)]]
    found = cr.Vtree.of_circuit(Circuit(graph(n, *nodes[:-1]), cr.Exactly(1)))
    assert set(found.scopes) == set(tree.scopes)


def test_clustering_joins_what_belongs_together():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.rand(4000, 3, generator=generator) < 0.5
    noise = torch.rand(4000, 3, generator=generator) < torch.tensor([0.05, 0.1, 0.2])
    tree = cr.Vtree.clustered(torch.cat([hidden, hidden ^ noise], 1))
    assert {0b001001, 0b010010, 0b100100} <= set(tree.scopes)
    information = mutual_information((hidden[:, :1] & torch.tensor([True, False])).numpy())
    assert information[0, 1] == pytest.approx(0, abs=1e-3)
    assert information[0, 0] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-2)
