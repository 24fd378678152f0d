"""Verification of circuits: every property that is broken is found, and what holds is seen to hold."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import circuitroute as cr
from circuitroute.circuit import Graph
from circuitroute.circuit.verify import bitsets, conflicts, overlaps, worlds
from circuitroute.circuit.verify.conflicts import UnverifiedError
from circuitroute.circuit.verify.properties import check
from circuitroute.inference.circuit import Circuit

T, A, P, S = range(4)  # true, absent, present, sum


def graph(n, *nodes):
    """Nodes as (kind, variable) or, for sums, a list of pairs of earlier nodes."""
    sums = [node if isinstance(node, list) else [] for node in nodes]
    pairs = np.array([pair for node in sums for pair in node], dtype=np.int32).reshape(-1, 2)
    return Graph(
        n=n,
        kind=np.array([S if isinstance(node, list) else node[0] for node in nodes], dtype=np.uint8),
        variable=np.array([-1 if isinstance(node, list) else node[1] for node in nodes], dtype=np.int32),
        first=np.cumsum([0, *map(len, sums)]).astype(np.int64),
        left=pairs[:, 0].copy(),
        right=pairs[:, 1].copy(),
    )


TRUE = (T, -1)
LITERALS = (TRUE, (A, 0), (P, 0), (A, 1), (P, 1), (A, 2), (P, 2))  # nodes 0 to 6


@pytest.mark.parametrize(
    ("n", "nodes", "message"),
    [
        (1, [*LITERALS, []], "node 7 is a sum without elements"),
        (2, [*LITERALS, [(1, 8)]], "node 7 comes before its child 8: not topologically ordered"),
        (1, [*LITERALS, [(1, 2)]], r"not decomposable: node 7 multiplies node 1 and node 2, both over \[0\]"),
        (2, [*LITERALS, [(1, 3), (2, 0)]], r"not smooth: elements of node 7 differ in variables \[1\]"),
        (3, [*LITERALS, [(1, 3)]], r"not smooth: the root does not mention variables \[2\]"),
        (30, [TRUE], r"not smooth: .* variables \[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...\]"),
        (1, [*LITERALS, [(1, 0), (1, 0)]], "not deterministic: two elements of node 7 can both hold"),
        (1, [*LITERALS, [(1, 0), (2, 0)], [(7, 0), (1, 0)]], "not deterministic: two elements of node 8"),
        (2, [*LITERALS, [(1, 3), (1, 3)]], "not deterministic: two elements of node 7"),
        (2, [*LITERALS, [(1, 3), (3, 1)]], "not deterministic: two elements of node 7"),
        (2, [*LITERALS, [(3, 0), (4, 0)], [(1, 7), (1, 3)]], "not deterministic: two elements of node 8"),
        (1, [TRUE, (A, 0), [(0, 0), (0, 0)], [(1, 2)]], "not deterministic: two elements of node 2"),
        # Not structured: three variables split in two ways, and both elements allow 0, 1 and 2 absent.
        (3, [*LITERALS, [(1, 3)], [(3, 5)], [(7, 5), (1, 8)]], "not deterministic: two elements of node 9"),
    ],
)
def test_what_is_wrong_is_named(n, nodes, message):
    with pytest.raises(cr.CircuitPropertyError, match=message):
        Circuit(graph(n, *nodes), cr.Exactly(1)).check()


def test_nodes_are_called_what_the_caller_says():
    with pytest.raises(cr.CircuitPropertyError, match="two elements of <7> can both hold"):
        check(graph(2, *LITERALS, [(1, 3), (1, 3)]), lambda node: f"<{node}>")


# ---------------------------------------------------------------------------------------------- random circuits


class RandomCircuit:
    """A smooth and decomposable circuit that may be deterministic or not; structured if asked for."""

    def __init__(self, seed, structured):
        self.rng = random.Random(seed)
        self.structured = structured
        self.n = self.rng.randint(1, 6)
        self.nodes = [TRUE]
        self.tables = [(1 << 2**self.n) - 1]  # a bit per world
        self.pool = {}
        self.halves = {}
        self.deterministic = True
        self.root = self.node(tuple(range(self.n)), 0)

    def add(self, node, table):
        self.nodes.append(node)
        self.tables.append(table)
        return len(self.nodes) - 1

    def node(self, scope, depth):
        """A node over a scope; often one that is there already."""
        known = self.pool.setdefault(scope, [])
        if len(known) > self.rng.randint(1, 5):
            return self.rng.choice(known)
        made = self.leaf(scope[0]) if len(scope) == 1 else self.sum(scope, depth)
        known.append(made)
        return made

    def leaf(self, variable):
        present = sum(1 << world for world in range(2**self.n) if world >> variable & 1)
        tables = {A: self.tables[0] ^ present, P: present}
        made = [self.add((kind, variable), tables[kind]) for kind in self.rng.sample([A, P], 2)]
        return self.rng.choice([made[0], made[1], self.add([(made[0], 0), (made[1], 0)], self.tables[0])])

    def split(self, scope):
        order = self.rng.sample(scope, len(scope)) if not self.structured else list(scope)
        cut = self.rng.randint(1, len(scope) - 1)
        if self.structured:
            cut = self.halves.setdefault(scope, cut)
        return tuple(sorted(order[:cut])), tuple(sorted(order[cut:]))

    def sum(self, scope, depth):
        count = self.rng.choice([1, 2, 2, 3])
        elements = []
        for _ in range(count):
            left, right = self.split(scope)
            elements.append((self.node(left, depth + 1), self.node(right, depth + 1)))
            if self.rng.random() < 0.5:
                elements[-1] = elements[-1][::-1]
        return self.add(elements, 0)  # judged by judge()

    def judge(self):
        """Whether every sum below the root is deterministic, by truth tables."""
        reached = {self.root}
        for node in range(self.root, -1, -1):
            if node in reached and isinstance(self.nodes[node], list):
                reached |= {child for pair in self.nodes[node] for child in pair}
        fine = True
        for node, elements in enumerate(self.nodes):
            if isinstance(elements, list):
                seen = 0
                for a, b in elements:
                    table = self.tables[a] & self.tables[b]
                    fine = fine and not (node in reached and seen & table)
                    seen |= table
                self.tables[node] = seen
        return fine

    def graph(self):
        return graph(self.n, *self.nodes[: self.root + 1])


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**40), st.booleans())
def test_determinism_is_decided_exactly(seed, structured):
    circuit = RandomCircuit(seed, structured)
    fine = circuit.judge()
    if fine:
        check(circuit.graph())
    else:
        with pytest.raises(cr.CircuitPropertyError, match="not deterministic"):
            check(circuit.graph())


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**40))
def test_both_ways_to_decide_agree(seed):
    """Structured circuits by overlaps, and by implied literals and enumeration."""
    circuit = RandomCircuit(seed, True)
    fine, made = circuit.judge(), circuit.graph()
    if fine:
        conflicts.check_conflicts(made, str)
    else:
        with pytest.raises(cr.CircuitPropertyError, match="not deterministic"):
            conflicts.check_conflicts(made, str)


# ---------------------------------------------------------------------------------------------- limits


def test_more_pairs_than_allowed_are_judged_by_literals(monkeypatch):
    monkeypatch.setattr(overlaps, "MAX_PAIRS", 0)
    # On either side some nodes overlap, so that pairs must be compared.
    made = graph(2, *LITERALS, [(1, 0), (2, 0)], [(3, 0), (4, 0)], [(1, 8), (2, 3)])
    check(made)
    monkeypatch.setattr(conflicts, "MAX_PAIRS", 0)
    with pytest.raises(UnverifiedError, match=r"it has 2 elements, .* more than 0 comparisons.*structured"):
        check(made)


@pytest.mark.parametrize("listed", [1, 4, 1 << 22])
def test_large_sums_are_judged_by_listing_models(monkeypatch, listed):
    """However few models may be listed and however few pairs make a sum large, the answers are right."""
    monkeypatch.setattr(overlaps, "MANY_PAIRS", 0)
    monkeypatch.setattr(worlds, "MAX_LISTED", listed)
    for seed in range(300):
        circuit = RandomCircuit(seed, True)
        if circuit.judge():
            check(circuit.graph())
        else:
            with pytest.raises(cr.CircuitPropertyError, match="not deterministic"):
                check(circuit.graph())


def primes(n):
    """All assignments of n variables but one, each with "variable n is present": a sum with many left factors."""
    nodes = [TRUE, *((kind, v) for v in range(n + 1) for kind in (A, P)), [(1, 0), (2, 0)]]
    elements = []
    for world in range(2**n - 1):
        node = 1 + (world & 1)
        for v in range(1, n):
            nodes.append([(node, 1 + 2 * v + (world >> v & 1))])
            node = len(nodes) - 1
        elements.append((node, 2 + 2 * n))
    return nodes, elements


def test_sums_of_thousands_of_elements_are_no_trouble(monkeypatch):
    monkeypatch.setattr(overlaps, "MAX_PAIRS", 1000)
    monkeypatch.setattr(conflicts, "MAX_PAIRS", 0)
    nodes, elements = primes(8)
    check(graph(9, *nodes, elements))
    with pytest.raises(cr.CircuitPropertyError, match=r"cannot verify|not deterministic"):
        check(graph(9, *nodes, [*elements, elements[7]]))
    monkeypatch.setattr(worlds, "MAX_ALL_LISTED", 100)
    with pytest.raises(UnverifiedError, match="structured, but comparing the factors of its sums takes more than 1000"):
        check(graph(9, *nodes, elements))


def test_enumeration_is_bounded(monkeypatch):
    equal, unequal = [(1, 3), (2, 4)], [(2, 3), (1, 4)]
    nodes = [*LITERALS, (A, 3), (P, 3), equal, unequal, [(5, 7)], [(3, 5)], [(1, 7)]]
    # (0 and 1 alike, 2 and 3 absent) or (0 and 1 unlike, 2 absent, 3 absent), split in two ways.
    made = graph(4, *nodes, [(9, 11)], [(10, 5)], [(14, 0), (15, 7)])
    check(made)
    monkeypatch.setattr(conflicts, "MAX_TABLE_WORDS", 0)
    with pytest.raises(UnverifiedError, match=r"cannot verify that node 16 is deterministic: enumerating .* too long"):
        check(made)
    monkeypatch.setattr(conflicts, "MAX_ENUMERATED", 1)
    with pytest.raises(UnverifiedError, match=r"node 16 .* depend on 4 variables, too many to enumerate"):
        check(made)


def test_a_wrong_sum_is_named_before_one_that_cannot_be_judged(monkeypatch):
    monkeypatch.setattr(conflicts, "MAX_ENUMERATED", 3)
    equal, unequal = [(1, 3), (2, 4)], [(2, 3), (1, 4)]
    nodes = [*LITERALS, (A, 3), (P, 3), equal, unequal, [(5, 7)], [(9, 11)], [(10, 5)]]
    doubtful = [(12, 0), (13, 7)]
    wrong = [(1, 3), (3, 1)]
    made = graph(4, *nodes, doubtful, wrong, [(15, 11), (14, 0)])
    with pytest.raises(cr.CircuitPropertyError, match="not deterministic: two elements of node 15 can both hold"):
        check(made)


def test_many_elements_are_split_on_the_variables_they_decide(monkeypatch):
    """A sum over all assignments of 8 variables, unstructured at the top: no pair need be compared."""
    n = 9
    nodes = [TRUE, *((kind, v) for v in range(n) for kind in (A, P))]
    elements = []
    for world in range(2**n):
        at = [1 + 2 * v + (world >> v & 1) for v in range(n)]
        order = at if world % 2 else at[::-1]
        node = order[0]
        for literal in order[1:-1]:
            nodes.append([(node, literal)])
            node = len(nodes) - 1
        elements.append((node, order[-1]))
    monkeypatch.setattr(conflicts, "MAX_PAIRS", 2**n)
    check(graph(n, *nodes, elements))


def test_scopes_that_do_not_fit_are_refused(monkeypatch):
    monkeypatch.setattr(bitsets, "MAX_BYTES", 10)
    with pytest.raises(cr.CircuitTooLargeError, match="different sets of variables"):
        cr.compile(cr.Exactly(2), 90).check()
