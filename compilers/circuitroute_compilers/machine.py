"""State machine -> circuit: merge states up a balanced tree, keep the useful ones, write the arrays.

Legend: a *block* is a range of variables under one tree node; its *states* are what the machine can reach on
it; a *table* lists, for two neighbouring blocks, every live pair (a, b) and the state it merges into.

Blocks with equal state lists share one table, so a machine that treats all variables alike, such as a count,
merges each pair of states once per tree level and not once per tree node. Three passes: up (states and
tables), down (which states some accepted whole makes use of), and emission of one sum per useful state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from circuitroute import Circuit, CircuitTooLargeError, Constraint, InfeasibleError, register_compiler
from circuitroute.circuit import Graph, NodeKind
from circuitroute.compilation import unsupported
from circuitroute.constraints import Over, State

IntArray: TypeAlias = npt.NDArray[np.int64]
BoolArray: TypeAlias = npt.NDArray[np.bool_]

# Elements are two 32-bit indices; a circuit may have this many of them per allowed node.
EDGES_PER_NODE = 16


@register_compiler(Constraint)
def compile_machine(constraint: Constraint, n: int, max_nodes: int) -> Circuit:
    """Compile any constraint that defines leaf, merge and accepts."""
    return Circuit(build_graph(constraint, n, max_nodes), constraint)


def build_graph(constraint: Constraint, n: int, max_nodes: int) -> Graph:
    """The circuit of a state machine over the variables 0..n-1.

    Raises:
        UnsupportedConstraintError: the constraint's type does not define the machine.
        InfeasibleError: no subset is accepted.
        CircuitTooLargeError: more than ``max_nodes`` nodes, or 16 times as many elements.
    """
    _require_machine(constraint)
    builder = _Builder(constraint, n, max_nodes)
    try:
        root = builder.up(0, n)
    except _UnhashableStateError as error:
        raise TypeError(f"{constraint!r}: states must be hashable, such as integers and tuples ({error})") from None
    accepted = np.array([bool(constraint.accepts(s)) for s in builder.states[root.states]], dtype=np.bool_)
    if not accepted.any():
        raise InfeasibleError(f"no subset of {n} variables satisfies {constraint!r}")
    builder.down(root, accepted)
    builder.check_size()
    return _Emitter(n, builder).emit(root, accepted)


def _require_machine(constraint: Constraint) -> None:
    if isinstance(constraint, Over):
        _require_machine(constraint.constraint)
    kind = type(constraint)
    if any(getattr(kind, name) is getattr(Constraint, name) for name in ("leaf", "merge", "accepts")):
        raise unsupported(constraint)


@dataclass(frozen=True, eq=False)
class _Table:
    """Live pairs of states of two neighbouring blocks: (left[i], right[i]) merges into result[i]."""

    left: IntArray
    right: IntArray
    result: IntArray
    states: int  # id of the list of resulting states


@dataclass(eq=False)
class _Block:
    """A tree node: its variables [low, high), its state list, and for an inner one its table and halves."""

    low: int
    high: int
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

    def __init__(self, constraint: Constraint, n: int, max_nodes: int) -> None:
        self.constraint = constraint
        self.n = n
        self.max_nodes = max_nodes
        self.states: list[tuple[State, ...]] = []
        self._ids: dict[tuple[State, ...], int] = {}
        self._tables: dict[tuple[int, int], _Table] = {}
        self._useful: dict[tuple[int, int, bytes], tuple[BoolArray, BoolArray]] = {}
        self.nodes = 0
        self.edges = 0
        self.width = 0
        self._reachable = 0

    def up(self, low: int, high: int) -> _Block:
        """The block of variables [low, high) with everything below it."""
        if high - low == 1:
            leaf = _distinct([s for s in self.constraint.leaf(low) if s is not None])
            return self._counted(_Block(low, high, self._intern(leaf)))
        middle = (low + high + 1) // 2
        left, right = self.up(low, middle), self.up(middle, high)
        table = self._table(left.states, right.states)
        return self._counted(_Block(low, high, table.states, table, (left, right)))

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

    def _table(self, left: int, right: int) -> _Table:
        if (left, right) not in self._tables:
            self._tables[left, right] = self._merge_all(self.states[left], self.states[right])
        return self._tables[left, right]

    def _merge_all(self, lefts: Sequence[State], rights: Sequence[State]) -> _Table:
        if len(lefts) * len(rights) > 4 * EDGES_PER_NODE * self.max_nodes:
            raise self._too_large(f"{len(lefts)} x {len(rights)} pairs of states at one tree node")
        merged = [
            (a, b, state)
            for a, left in enumerate(lefts)
            for b, right in enumerate(rights)
            if (state := self.constraint.merge(left, right)) is not None
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
        key = (left.states, right.states, useful.tobytes())
        if key not in self._useful:
            live = useful[table.result]
            use_left = np.zeros(len(self.states[left.states]), dtype=np.bool_)
            use_right = np.zeros(len(self.states[right.states]), dtype=np.bool_)
            use_left[table.left[live]] = True
            use_right[table.right[live]] = True
            self._useful[key] = (use_left, use_right)
        return self._useful[key]

    def _leaf_nodes(self, block: _Block) -> int:
        absent, present = self.constraint.leaf(block.low)
        return 3 if absent == present and absent is not None else int(block.useful.sum())

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

    def __init__(self, n: int, builder: _Builder) -> None:
        self._n = n
        self._builder = builder
        self._count = 0
        self._kind: list[IntArray] = []
        self._variable: list[IntArray] = []
        self._sizes: list[IntArray] = []
        self._left: list[IntArray] = []
        self._right: list[IntArray] = []
        self._true: int | None = None

    def emit(self, root: _Block, accepted: BoolArray) -> Graph:
        """The whole graph; the accepted states of the root become one sum."""
        if root.table is None:
            self._leaf(root, merge_states=True)
        else:
            self._inner(root, np.where(accepted, 0, -1))
        first = np.concatenate([[0], np.cumsum(np.concatenate(self._sizes))])
        empty = [np.zeros(0, dtype=np.int64)]
        return Graph(
            n=self._n,
            kind=np.concatenate(self._kind).astype(np.uint8),
            variable=np.concatenate(self._variable).astype(np.int32),
            first=first.astype(np.int64),
            left=np.concatenate(self._left or empty).astype(np.int32),
            right=np.concatenate(self._right or empty).astype(np.int32),
        )

    def _block(self, block: _Block) -> IntArray:
        """Emit a block; returns the node of each state, -1 for useless ones."""
        if block.table is None:
            return self._leaf(block, merge_states=False)
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

    def _leaf(self, block: _Block, merge_states: bool) -> IntArray:
        """Emit the useful literals of one variable; equal states of both, or a root, become one sum."""
        states = self._builder.states[block.states]
        nodes = np.full(len(states), -1, dtype=np.int64)
        literals: list[int] = []
        leaf = self._builder.constraint.leaf(block.low)
        for kind, state in zip((NodeKind.ABSENT, NodeKind.PRESENT), leaf, strict=True):
            position = states.index(state) if state is not None else -1
            if position >= 0 and block.useful[position]:
                nodes[position] = self._add(np.array([int(kind)]), np.array([block.low]), np.array([0]))
                literals.append(int(nodes[position]))
        if len(literals) == 2 and (merge_states or len(states) == 1):
            nodes[block.useful] = self._either(literals)
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
