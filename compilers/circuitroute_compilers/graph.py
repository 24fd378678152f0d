"""Term and tree -> Graph: merge states up the tree, distinguish only what matters, write the arrays.

Legend: a *block* is the set of variables under one tree node; its *states* are what the term can reach on it; a
*table* lists, for two sibling blocks, every live pair (a, b) and the state it merges into; a *class* is a set of states
that every completion treats alike.

Blocks with equal state lists share one table, so a machine that treats all variables alike, such as a count,
merges each pair of states once per tree level and not once per tree node. Three passes: up (states and
tables), down (classes), and emission of one sum per class. The second makes the circuit the smallest that the tree
allows, however the constraint was written and however many states its machines have: it is the minimisation of a
deterministic automaton (Moore 1956) carried over to trees, where a state's context is its siblings.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from circuitroute import CircuitTooLargeError, Constraint, InfeasibleError
from circuitroute.circuit import Graph, NodeKind
from circuitroute.compilation import SHOWN
from circuitroute.constraints import State, shown
from circuitroute.deadline import tick
from circuitroute_compilers.terms import FALSE, Term
from circuitroute_compilers.trees import Vtree, nodes

IntArray: TypeAlias = npt.NDArray[np.int64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]

# Elements are two 32-bit indices; a circuit may have this many of them per allowed node.
EDGES_PER_NODE = 16


def build_graph(constraint: Constraint, term: Term, tree: Vtree, max_nodes: int) -> Graph:
    """The circuit of ``term``, what ``constraint`` was lowered to, merged along ``tree``.

    Raises:
        InfeasibleError: no subset is accepted.
        CircuitTooLargeError: more than ``max_nodes`` nodes, or 16 times as many elements.
    """
    builder = _Builder(constraint, term, tree.scope.bit_count(), max_nodes)
    builder.up(tree)
    if not builder.states[builder.blocks[-1].states]:  # whole scopes settle to TRUE or are dead
        raise InfeasibleError(f"no subset of {builder.n} variables satisfies {shown(constraint, SHOWN)}")
    builder.down()
    builder.check_size()
    return _Emitter(builder).emit()


@dataclass(frozen=True, eq=False)
class _Table:
    """Live pairs of states of two neighbouring blocks: (left[i], right[i]) merges into result[i]."""

    left: IntArray
    right: IntArray
    result: IntArray
    states: int  # id of the list of resulting states


@dataclass(frozen=True, eq=False)
class _Classes:
    """The class of each state of a block, -1 if no completion accepts it, and whether it is the first of its class."""

    of: IntArray
    first: BoolArray

    @property
    def count(self) -> int:
        return int(self.first.sum())


@dataclass(eq=False)
class _Block:
    """A tree node, its state list, and for an inner one its table and two halves."""

    tree: Vtree
    states: int
    inner: tuple[_Table, _Block, _Block] | None = None
    classes: _Classes = field(default_factory=lambda: _Classes(np.zeros(1, np.int64), np.ones(1, np.bool_)))


class UnhashableStateError(Exception):
    """A state cannot be hashed; carries Python's message."""


def distinct(states: Sequence[State]) -> tuple[State, ...]:
    """The different states, in order of first appearance; integers, such as counts and costs, in increasing order.

    Then neighbouring states lead to neighbouring ones, and engines can treat tables as convolutions.
    """
    try:
        found = tuple(dict.fromkeys(states))
    except TypeError as error:
        raise UnhashableStateError(str(error)) from None
    return tuple(sorted(found)) if all(type(state) is int for state in found) else found  # type: ignore[type-var]


def _number(met: dict[State, int], state: State) -> int:
    """The number of a state among those met."""
    try:
        return met.setdefault(state, len(met))
    except TypeError as error:
        raise UnhashableStateError(str(error)) from None


def leaf_states(term: Term, variable: int) -> tuple[State, State]:
    """Settled states of a variable when (absent, present)."""
    absent, present = term.leaf(variable)
    return term.settle(absent, 1 << variable), term.settle(present, 1 << variable)


class _Builder:
    """Passes one and two: reachable states upward, classes of them downward."""

    def __init__(self, constraint: Constraint, term: Term, n: int, max_nodes: int) -> None:
        self.constraint = constraint
        self.term = term
        self.n = n
        self.max_nodes = max_nodes
        self.states: list[tuple[State, ...]] = []
        self.blocks: list[_Block] = []
        self._ids: dict[tuple[State, ...], int] = {}
        self._tables: dict[tuple[int, int, Hashable], _Table] = {}
        self._split: dict[tuple[int, bytes], tuple[_Classes, _Classes, int]] = {}
        self.nodes = 0
        self.edges = 0
        self.width = 0
        self._reachable = 0

    def up(self, tree: Vtree) -> None:
        """Find the states of every block, halves before wholes."""
        block_of: dict[int, _Block] = {}
        for node in nodes(tree):
            tick()
            if node.halves is None:
                states = distinct([s for s in leaf_states(self.term, node.first) if s is not FALSE])
                block = _Block(node, self._intern(states))
            else:
                left, right = (block_of[id(half)] for half in node.halves)
                table = self._table(left.states, right.states, node)
                block = _Block(node, table.states, (table, left, right))
            block_of[id(node)] = block
            self._count(block)
            self.blocks.append(block)

    def _count(self, block: _Block) -> None:
        width = len(self.states[block.states])
        self.width = max(self.width, width)
        self._reachable += width
        # Only some of the reachable states are useful, so the limit leaves room.
        if self._reachable > most_states(self.max_nodes, self.n):
            raise self._too_large(f"at least {self._reachable} reachable states")

    def _intern(self, states: tuple[State, ...]) -> int:
        known = self._ids.setdefault(states, len(self.states))
        if known == len(self.states):
            self.states.append(states)
        return known

    def _table(self, left: int, right: int, tree: Vtree) -> _Table:
        key = (left, right, self.term.signature(tree.scope))
        if key not in self._tables:
            self._tables[key] = self._merge_all(self.states[left], self.states[right], tree)
        return self._tables[key]

    def _merge_all(self, lefts: Sequence[State], rights: Sequence[State], tree: Vtree) -> _Table:
        if len(lefts) * len(rights) > most_pairs(self.max_nodes):
            raise self._too_large(f"{len(lefts)} x {len(rights)} pairs of states at one tree node")
        merge, settle, scope = self.term.merge, self.term.settle, tree.scope
        met: dict[State, int] = {}
        live = array("q")  # left, right, result: 24 bytes a pair, where a tuple takes a hundred
        for a, left in enumerate(lefts):
            for b, right in enumerate(rights):
                tick()
                state = settle(merge(left, right), scope)
                if state is not FALSE:
                    live.extend((a, b, _number(met, state)))
        states = distinct(list(met))
        place = {state: i for i, state in enumerate(states)}
        renumbered = np.array([place[state] for state in met], dtype=np.int64)
        pairs = np.frombuffer(live, dtype=np.int64).reshape(-1, 3) if live else np.zeros((0, 3), dtype=np.int64)
        return _Table(pairs[:, 0], pairs[:, 1], renumbered[pairs[:, 2]], self._intern(states))

    def down(self) -> None:
        """Find the classes of every block, from the root, whose only state is accepted, down to the variables."""
        for block in reversed(self.blocks):
            tick()
            if block.inner is None:
                self.nodes += self._leaf_nodes(block)
                continue
            table, left, right = block.inner
            left.classes, right.classes, edges = self._halves(table, left, right, block.classes)
            self.nodes += block.classes.count
            self.edges += edges

    def _halves(self, table: _Table, left: _Block, right: _Block, whole: _Classes) -> tuple[_Classes, _Classes, int]:
        """The classes of two halves, and how many elements the sums of the whole have."""
        key = (id(table), whole.of.tobytes())
        if key not in self._split:
            shape = (len(self.states[left.states]), len(self.states[right.states]))
            self._split[key] = _split(table, whole.of, shape)
        return self._split[key]

    def _leaf_nodes(self, block: _Block) -> int:
        """Literals that some completion accepts, and a sum if both lead to the same."""
        states = self.states[block.states]
        absent, present = leaf_states(self.term, block.tree.first)
        classes = [block.classes.of[states.index(s)] for s in (absent, present) if s is not FALSE]
        literals = [c for c in classes if c >= 0]
        return len(literals) + (len(literals) > len(set(literals)))

    def check_size(self) -> None:
        """Refuse a circuit over the limits before any array is made."""
        needs = excess(self.nodes, self.edges, self.width, self.max_nodes)
        if needs is not None:
            raise CircuitTooLargeError(needs)

    def _too_large(self, what: str) -> CircuitTooLargeError:
        return CircuitTooLargeError(_at_width(what, self.width))


def excess(nodes: int, edges: int, width: int, max_nodes: int) -> str | None:
    """What of a circuit is over the limits; None where nothing is."""
    if nodes > max_nodes:
        return _at_width(f"{nodes} nodes", width)
    if edges > EDGES_PER_NODE * max_nodes:
        return _at_width(f"{edges} elements (the limit is {EDGES_PER_NODE} per node)", width)
    return None


def _at_width(what: str, width: int) -> str:
    return f"{what}, with width {width} states at one tree node"


def most_states(max_nodes: int, n: int) -> int:
    """How many reachable states are built before giving up; some of them will turn out to be useless."""
    return 4 * max_nodes + 4 * n


def most_pairs(max_nodes: int) -> int:
    """How many pairs of states are merged at one tree node before giving up."""
    return 4 * EDGES_PER_NODE * max_nodes


def _split(table: _Table, whole: IntArray, shape: tuple[int, int]) -> tuple[_Classes, _Classes, int]:
    """Classes of the halves: states are alike if they lead to the same class, or nowhere, with every sibling."""
    live = whole[table.result] >= 0
    rows, columns, result = table.left[live], table.right[live], whole[table.result[live]]
    left, right = _alike(rows, columns, result, shape[0]), _alike(columns, rows, result, shape[1])
    return left, right, int((left.first[rows] & right.first[columns]).sum())


def _alike(own: IntArray, siblings: IntArray, result: IntArray, count: int) -> _Classes:
    """Classes of ``count`` states by where each leads with which sibling."""
    order = np.lexsort((siblings, own))
    behaviour = np.stack([siblings[order], result[order]], axis=1)
    ends = np.cumsum(np.bincount(own, minlength=count))
    of = np.full(count, -1, dtype=np.int64)
    first = np.zeros(count, dtype=np.bool_)
    known: dict[bytes, int] = {}
    for state, (start, end) in enumerate(zip(np.concatenate([[0], ends[:-1]]).tolist(), ends.tolist(), strict=True)):
        tick()
        if start < end:
            fresh = len(known)
            of[state] = known.setdefault(behaviour[start:end].tobytes(), fresh)
            first[state] = of[state] == fresh
    return _Classes(of, first)


class _Emitter:
    """Pass three: write nodes and elements, children before parents."""

    def __init__(self, builder: _Builder) -> None:
        self._builder = builder
        self._kind: list[int] = []
        self._variable: list[int] = []
        self._sizes: list[int] = []
        self._left = [np.zeros(0, dtype=np.int64)]
        self._right = [np.zeros(0, dtype=np.int64)]
        self._true: int | None = None

    def emit(self) -> Graph:
        """The whole graph; the root has one class and becomes the last node."""
        node_of_class: dict[int, IntArray] = {}
        for block in self._builder.blocks:
            tick()
            if block.inner is None:
                node_of_class[id(block)] = self._leaf(block)
            else:
                halves = [node_of_class.pop(id(half)) for half in block.inner[1:]]
                node_of_class[id(block)] = self._inner(block.classes, *block.inner, *halves)
        return Graph(
            n=self._builder.n,
            kind=np.array(self._kind, dtype=np.uint8),
            variable=np.array(self._variable, dtype=np.int32),
            first=np.cumsum([0, *self._sizes], dtype=np.int64),
            left=np.concatenate(self._left).astype(np.int32),
            right=np.concatenate(self._right).astype(np.int32),
        )

    def _inner(
        self, whole: _Classes, table: _Table, left: _Block, right: _Block, left_nodes: IntArray, right_nodes: IntArray
    ) -> IntArray:
        """One sum per class of the whole, made of the pairs of classes that lead there; returns the nodes."""
        owner = whole.of[table.result]
        # The first state of a class stands for all of it.
        order = np.flatnonzero((owner >= 0) & left.classes.first[table.left] & right.classes.first[table.right])
        order = order[np.argsort(owner[order], kind="stable")]
        sizes = np.bincount(owner[order])
        self._left.append(left_nodes[left.classes.of[table.left[order]]])
        self._right.append(right_nodes[right.classes.of[table.right[order]]])
        return self._add(NodeKind.SUM, -1, sizes.tolist()) + np.arange(len(sizes))

    def _leaf(self, block: _Block) -> IntArray:
        """Emit the useful literals of one variable, those of one class as a sum; returns a node per class."""
        states = self._builder.states[block.states]
        literals: list[list[int]] = [[] for _ in range(block.classes.count)]
        both = leaf_states(self._builder.term, block.tree.first)
        for kind, state in zip((NodeKind.ABSENT, NodeKind.PRESENT), both, strict=True):
            found = int(block.classes.of[states.index(state)]) if state is not FALSE else -1
            if found >= 0:
                literals[found].append(self._add(kind, block.tree.first, [0]))
        return np.array([some[0] if len(some) == 1 else self._either(some) for some in literals], dtype=np.int64)

    def _either(self, literals: list[int]) -> int:
        """The sum of both literals of a variable that is left free."""
        if self._true is None:
            self._true = self._add(NodeKind.TRUE, -1, [0])
        self._left.append(np.array(literals))
        self._right.append(np.array([self._true, self._true]))
        return self._add(NodeKind.SUM, -1, [2])

    def _add(self, kind: NodeKind, variable: int, sizes: list[int]) -> int:
        """Nodes of one kind with so many elements each, which the caller adds; returns the first node."""
        first = len(self._kind)
        self._kind += [int(kind)] * len(sizes)
        self._variable += [variable] * len(sizes)
        self._sizes += sizes
        return first
