"""Term -> circuit: merge states up a tree, keep the useful ones, write the arrays.

Legend: a *block* is the set of variables under one tree node; its *states* are what the term can reach on it; a
*table* lists, for two sibling blocks, every live pair (a, b) and the state it merges into.

Blocks with equal state lists share one table, so a machine that treats all variables alike, such as a count,
merges each pair of states once per tree level and not once per tree node. Three passes: up (states and
tables), down (which states some accepted whole makes use of), and emission of one sum per useful state.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from circuitroute import CircuitTooLargeError, Constraint, InfeasibleError
from circuitroute.circuit import Graph, NodeKind
from circuitroute.constraints import State
from circuitroute_compilers.terms import FALSE, Term
from circuitroute_compilers.vtree import Vtree

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
    try:
        root = builder.up(tree)
    except _UnhashableStateError as error:
        raise TypeError(f"{constraint!r}: states must be hashable, such as integers and tuples ({error})") from None
    accepted = np.ones(len(builder.states[root.states]), dtype=np.bool_)  # whole scopes settle to TRUE or are dead
    if not accepted.any():
        raise InfeasibleError(f"no subset of {builder.n} variables satisfies {constraint!r}")
    builder.down(root, accepted)
    builder.check_size()
    return _Emitter(builder).emit(root)


@dataclass(frozen=True, eq=False)
class _Table:
    """Live pairs of states of two neighbouring blocks: (left[i], right[i]) merges into result[i]."""

    left: IntArray
    right: IntArray
    result: IntArray
    states: int  # id of the list of resulting states


@dataclass(eq=False)
class _Block:
    """A tree node, its state list, and for an inner one its table and halves."""

    tree: Vtree
    states: int
    table: _Table | None = None
    halves: tuple[_Block, _Block] | None = None
    useful: BoolArray = field(default_factory=lambda: np.zeros(0, dtype=np.bool_))


class _UnhashableStateError(Exception):
    """A state cannot be hashed; carries Python's own words."""


def _distinct(states: Sequence[State]) -> tuple[State, ...]:
    """The different states, in order of first appearance."""
    try:
        return tuple(dict.fromkeys(states))
    except TypeError as error:
        raise _UnhashableStateError(str(error)) from None


class _Builder:
    """Passes one and two: reachable states upward, useful states downward."""

    def __init__(self, constraint: Constraint, term: Term, n: int, max_nodes: int) -> None:
        self.constraint = constraint
        self.term = term
        self.n = n
        self.max_nodes = max_nodes
        self.states: list[tuple[State, ...]] = []
        self._ids: dict[tuple[State, ...], int] = {}
        self._tables: dict[tuple[int, int, Hashable], _Table] = {}
        self._useful: dict[tuple[int, bytes], tuple[BoolArray, BoolArray]] = {}
        self.nodes = 0
        self.edges = 0
        self.width = 0
        self._reachable = 0

    def up(self, tree: Vtree) -> _Block:
        """The block of a tree node with everything below it."""
        if tree.halves is None:
            leaf = _distinct([s for s in self.leaf(tree) if s is not FALSE])
            return self._counted(_Block(tree, self._intern(leaf)))
        left, right = self.up(tree.halves[0]), self.up(tree.halves[1])
        table = self._table(left.states, right.states, tree)
        return self._counted(_Block(tree, table.states, table, (left, right)))

    def leaf(self, tree: Vtree) -> tuple[State, State]:
        """Settled states of a variable when (absent, present)."""
        absent, present = self.term.leaf(tree.first)
        return self.term.settle(absent, tree.scope), self.term.settle(present, tree.scope)

    def _counted(self, block: _Block) -> _Block:
        width = len(self.states[block.states])
        self.width = max(self.width, width)
        self._reachable += width
        # Unpruned states bound the useful ones from above; stop early only when hopelessly over.
        if self._reachable > 4 * self.max_nodes + 4 * self.n:
            raise self._too_large(f"at least {self._reachable} reachable states")
        return block

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
        if len(lefts) * len(rights) > 4 * EDGES_PER_NODE * self.max_nodes:
            raise self._too_large(f"{len(lefts)} x {len(rights)} pairs of states at one tree node")
        merged = [
            (a, b, state)
            for a, left in enumerate(lefts)
            for b, right in enumerate(rights)
            if (state := self.term.settle(self.term.merge(left, right), tree.scope)) is not FALSE
        ]
        states = _distinct([state for _, _, state in merged])
        index = {state: i for i, state in enumerate(states)}
        array = np.array([(a, b, index[state]) for a, b, state in merged], dtype=np.int64).reshape(-1, 3)
        return _Table(array[:, 0], array[:, 1], array[:, 2], self._intern(states))

    def down(self, block: _Block, useful: BoolArray) -> None:
        """Mark the states that take part in some accepted assignment of all variables."""
        block.useful = useful
        if block.table is None or block.halves is None:
            self.nodes += self._leaf_nodes(block)
            return
        self.nodes += int(useful.sum())
        self.edges += int(useful[block.table.result].sum())
        left, right = block.halves
        use_left, use_right = self._useful_halves(block.table, left, right, useful)
        self.down(left, use_left)
        self.down(right, use_right)

    def _useful_halves(
        self, table: _Table, left: _Block, right: _Block, useful: BoolArray
    ) -> tuple[BoolArray, BoolArray]:
        key = (id(table), useful.tobytes())
        if key not in self._useful:
            live = useful[table.result]
            use_left = np.zeros(len(self.states[left.states]), dtype=np.bool_)
            use_right = np.zeros(len(self.states[right.states]), dtype=np.bool_)
            use_left[table.left[live]] = True
            use_right[table.right[live]] = True
            self._useful[key] = (use_left, use_right)
        return self._useful[key]

    def _leaf_nodes(self, block: _Block) -> int:
        absent, present = self.leaf(block.tree)
        return 3 if absent == present and absent is not FALSE else int(block.useful.sum())

    def check_size(self) -> None:
        """Refuse a circuit over the limits before any array is made."""
        if self.nodes > self.max_nodes:
            raise self._too_large(f"{self.nodes} nodes")
        if self.edges > EDGES_PER_NODE * self.max_nodes:
            raise self._too_large(f"{self.edges} elements (the limit is {EDGES_PER_NODE} per node)")

    def _too_large(self, what: str) -> CircuitTooLargeError:
        return CircuitTooLargeError(
            f"{self.constraint!r} over {self.n} variables needs {what}, more than max_nodes={self.max_nodes} allows; "
            f"estimated width {self.width} states at one tree node, caused by {self.constraint!r}. "
            "Lower its largest count or split its scope, or raise max_nodes"
        )


class _Emitter:
    """Pass three: write nodes and elements, children before parents."""

    def __init__(self, builder: _Builder) -> None:
        self._builder = builder
        self._count = 0
        self._kind: list[IntArray] = []
        self._variable: list[IntArray] = []
        self._sizes: list[IntArray] = []
        self._left: list[IntArray] = []
        self._right: list[IntArray] = []
        self._true: int | None = None

    def emit(self, root: _Block) -> Graph:
        """The whole graph; the root has one state and becomes the last node."""
        self._block(root)
        first = np.concatenate([[0], np.cumsum(np.concatenate(self._sizes))])
        empty = [np.zeros(0, dtype=np.int64)]
        return Graph(
            n=self._builder.n,
            kind=np.concatenate(self._kind).astype(np.uint8),
            variable=np.concatenate(self._variable).astype(np.int32),
            first=first.astype(np.int64),
            left=np.concatenate(self._left or empty).astype(np.int32),
            right=np.concatenate(self._right or empty).astype(np.int32),
        )

    def _block(self, block: _Block) -> IntArray:
        """Emit a block; returns the node of each state, -1 for useless ones."""
        if block.table is None:
            return self._leaf(block)
        return self._inner(block, np.where(block.useful, np.cumsum(block.useful) - 1, -1))

    def _inner(self, block: _Block, sum_of_state: IntArray) -> IntArray:
        """One sum per value of ``sum_of_state`` that is not -1, made of the table's pairs that lead there."""
        if block.table is None or block.halves is None:
            raise RuntimeError("an inner block has a table and two halves")  # cannot happen: _block decides
        left, right = self._block(block.halves[0]), self._block(block.halves[1])
        owner = sum_of_state[block.table.result]
        order = np.flatnonzero(owner >= 0)
        order = order[np.argsort(owner[order], kind="stable")]
        sizes = np.bincount(owner[order])
        self._left.append(left[block.table.left[order]])
        self._right.append(right[block.table.right[order]])
        first = self._add(np.full(len(sizes), int(NodeKind.SUM)), np.full(len(sizes), -1), sizes)
        return np.where(sum_of_state >= 0, sum_of_state + first, -1)

    def _leaf(self, block: _Block) -> IntArray:
        """Emit the useful literals of one variable; two of the same state become one sum."""
        states = self._builder.states[block.states]
        nodes = np.full(len(states), -1, dtype=np.int64)
        literals: dict[int, list[int]] = {}
        for kind, state in zip((NodeKind.ABSENT, NodeKind.PRESENT), self._builder.leaf(block.tree), strict=True):
            position = states.index(state) if state is not FALSE else -1
            if position >= 0 and block.useful[position]:
                node = self._add(np.array([int(kind)]), np.array([block.tree.first]), np.array([0]))
                literals.setdefault(position, []).append(node)
        for position, found in literals.items():
            nodes[position] = found[0] if len(found) == 1 else self._either(found)
        return nodes

    def _either(self, literals: list[int]) -> int:
        """The sum of both literals of a variable that is left free."""
        if self._true is None:
            self._true = self._add(np.array([int(NodeKind.TRUE)]), np.array([-1]), np.array([0]))
        self._left.append(np.array(literals))
        self._right.append(np.array([self._true, self._true]))
        return self._add(np.array([int(NodeKind.SUM)]), np.array([-1]), np.array([2]))

    def _add(self, kind: IntArray, variable: IntArray, sizes: IntArray) -> int:
        first = self._count
        self._kind.append(kind)
        self._variable.append(variable)
        self._sizes.append(sizes)
        self._count += len(kind)
        return first
