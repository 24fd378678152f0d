"""A circuit laid out along a vtree: at every vtree node its states, and which pairs of the halves' states make each.

A state is what a circuit's node says about the variables below one vtree node. Nodes that mention fewer are widened by
what is true of the rest, sums over the same variables are written into one another, and states of the same pairs are
the same. So a circuit of anyone's, smoothed in any way, becomes a table per vtree node that a second circuit on that
vtree can be multiplied with, pair of nodes by pair of nodes.

Legend: C states of one vtree node, E pairs of one vtree node.
"""

from __future__ import annotations

import functools
from typing import TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from circuitroute._tensors import untraced
from circuitroute.circuit.compiled import Compiled
from circuitroute.circuit.graph import Graph, NodeKind
from circuitroute.circuit.separation import essential, names
from circuitroute.circuit.vtree import Vtree
from circuitroute.constraints import shown
from circuitroute.deadline import tick, within
from circuitroute.engines.tables import Tables
from circuitroute.errors import CircuitTooLargeError

IntArray: TypeAlias = npt.NDArray[np.int64]
# What a state is made of: pairs of the halves' states; of a leaf one pair, whether it may be (absent, present).
Content: TypeAlias = tuple[tuple[int, int], ...]

ABSENT: Content = ((1, 0),)
PRESENT: Content = ((0, 1),)
EITHER: Content = ((1, 1),)
# Pairs of all vtree nodes together.
MAX_PAIRS = 1 << 24
# What a message shows of a constraint whose text may be long.
SHOWN = 400


class States:
    """The states of a circuit at every node of a vtree; the root has one, number 0.

    Attributes:
        vtree: the tree.
        counts: C of every vtree node.
        num_pairs: pairs of all vtree nodes together.
        tables: of leaf v ``allows{v}`` [C, 2], whether a state allows the variable (absent, present); of inner node v
            ``left{v}``, ``right{v}``, ``owner{v}`` [E], the pairs by the state they belong to, and ``padded{v}``
            [C, most], the pairs of each state by number, filled up with -1.
    """

    def __init__(self, vtree: Vtree, contents: list[list[Content]]) -> None:
        self.vtree = vtree
        self.counts = tuple(len(some) for some in contents)
        self.num_pairs = sum(len(pairs) for some in contents[vtree.n :] for pairs in some)
        arrays: dict[str, npt.NDArray[np.int64] | npt.NDArray[np.bool_]] = {}
        for v, some in enumerate(contents):
            if v < vtree.n:
                arrays[f"allows{v}"] = np.array([content[0] for content in some], dtype=np.bool_)
            else:
                arrays |= {f"{name}{v}": array for name, array in _pairs(some).items()}
        self.tables = Tables(arrays)


def _pairs(contents: list[Content]) -> dict[str, IntArray]:
    """The arrays of one inner node."""
    flat = [(a, b, owner) for owner, pairs in enumerate(contents) for a, b in pairs]
    left, right, owner = np.array(flat, dtype=np.int64).reshape(-1, 3).T.copy()
    sizes = np.bincount(owner, minlength=len(contents))
    padded = np.full((len(contents), int(sizes.max())), -1, dtype=np.int64)
    padded[owner, np.arange(len(owner)) - (np.cumsum(sizes) - sizes)[owner]] = np.arange(len(owner))
    return {"left": left, "right": right, "owner": owner, "padded": padded}


_kept: WeakKeyDictionary[Compiled, dict[Vtree, States]] = WeakKeyDictionary()


@untraced  # type: ignore[untyped-decorator]
def states_of(circuit: Compiled, vtree: Vtree) -> States:
    """The states of a circuit along a vtree; found once.

    Raises:
        ValueError: the circuit does not respect the vtree, or is over another number of variables.
        CircuitTooLargeError: it takes too long, or more than sixteen million pairs.
    """
    if circuit.n != vtree.n:
        raise ValueError(
            f"constraint: a circuit over {circuit.n} variables was given to a prior over {vtree.n}: compile the "
            f"constraint for n={vtree.n}"
        )
    known = _kept.setdefault(circuit, {})
    if vtree not in known:
        text = shown(circuit.constraint, SHOWN)
        with within(doing=lambda: f"laying {text} out along a vtree", remedy="take a smaller circuit"):
            if circuit.counts is not None:
                known[vtree] = _counting(circuit.counts, vtree)
            else:
                known[vtree] = _Layout(circuit.graph, vtree, text).states()
    return known[vtree]


@untraced  # type: ignore[untyped-decorator]
@functools.lru_cache(maxsize=64)
def everything(vtree: Vtree) -> States:
    """No constraint: one state everywhere."""
    return States(vtree, [[EITHER if v < vtree.n else ((0, 0),)] for v in range(vtree.num_nodes)])


def _counting(counts: tuple[int, ...], vtree: Vtree) -> States:
    """A count constraint, along any vtree: the states of a node are the counts that its variables can have."""
    layout = _Contents(vtree)
    most = counts[-1]
    by_count = [[layout.number(v, ABSENT), *([layout.number(v, PRESENT)] if most else [])] for v in range(vtree.n)]
    for v, (left, right) in enumerate(vtree.halves, start=vtree.n):
        a, b = by_count[left], by_count[right]
        wanted = counts if v == vtree.num_nodes - 1 else range(min(most, len(a) + len(b) - 2) + 1)
        ways = [[(a[i], b[j - i]) for i in range(len(a)) if 0 <= j - i < len(b)] for j in wanted]
        if v == vtree.num_nodes - 1:
            ways = [[pair for some in ways for pair in some]]
        by_count.append([layout.number(v, tuple(some)) for some in ways])
    if vtree.n == 1:
        return layout.below(layout.number(0, ((int(0 in counts), int(1 in counts)),)))
    return layout.below(by_count[-1][0])


class _Contents:
    """The states met so far at every vtree node, by what they are made of."""

    def __init__(self, vtree: Vtree) -> None:
        self.vtree = vtree
        self._numbers: list[dict[Content, int]] = [{} for _ in range(vtree.num_nodes)]
        self._contents: list[list[Content]] = [[] for _ in range(vtree.num_nodes)]
        self._pairs = 0
        # Of every vtree node the state that allows everything.
        self.either = [self.number(v, EITHER) for v in range(vtree.n)]
        for v, (left, right) in enumerate(vtree.halves, start=vtree.n):
            self.either.append(self.number(v, ((self.either[left], self.either[right]),)))

    def number(self, v: int, content: Content) -> int:
        """The number of a state of vtree node v, new or met before."""
        content = tuple(sorted(set(content)))
        known = self._numbers[v].get(content)
        if known is None:
            known = self._numbers[v][content] = len(self._contents[v])
            self._contents[v].append(content)
            self._pairs += len(content)
            tick(1 + len(content) // 4)
            if self._pairs > MAX_PAIRS:
                raise CircuitTooLargeError(f"the circuit has more than {MAX_PAIRS} pairs of states along the vtree")
        return known

    def content(self, v: int, state: int) -> Content:
        """What a state is made of."""
        return self._contents[v][state]

    def widened(self, v: int, state: int, to: int) -> int:
        """A state of vtree node v as one of a node above it, all other variables free."""
        while v != to:
            parent = self.vtree.parents[v]
            left, right = self.vtree.halves[parent - self.vtree.n]
            pair = (state, self.either[right]) if v == left else (self.either[left], state)
            v, state = parent, self.number(parent, (pair,))
        return state

    def below(self, root: int) -> States:
        """The states that the root is made of, numbered anew."""
        n, last = self.vtree.n, self.vtree.num_nodes - 1
        used: list[dict[int, int]] = [{} for _ in range(last + 1)]
        used[last][root] = 0
        chosen: list[list[Content]] = [[] for _ in range(last + 1)]
        for v in range(last, -1, -1):
            for state in used[v]:
                content = self._contents[v][state]
                if v < n:
                    chosen[v].append(content)
                    continue
                tick(1 + len(content) // 4)
                left, right = (used[half] for half in self.vtree.halves[v - n])
                chosen[v].append(
                    tuple((left.setdefault(a, len(left)), right.setdefault(b, len(right))) for a, b in content)
                )
        return States(self.vtree, chosen)


class _Layout(_Contents):
    """A graph, node by node, children first: the state that each is, at the smallest vtree node for it."""

    def __init__(self, graph: Graph, vtree: Vtree, name: str) -> None:
        super().__init__(vtree)
        self._graph, self._name = graph, name
        self._essential = essential(graph)
        self._places: dict[int, int] = {}
        self._state: list[int] = []

    def states(self) -> States:
        """All of it."""
        root = self.vtree.num_nodes - 1
        for node in range(self._graph.num_nodes):
            self._state.append(self._own(node))
        scope = self._essential[-1]
        return self.below(self.widened(self._place(scope), self._state[-1], root) if scope else self.either[root])

    def _place(self, scope: int) -> int:
        if scope not in self._places:
            self._places[scope] = self.vtree.place(scope)
        return self._places[scope]

    def _own(self, node: int) -> int:
        """The state of a node where it stands; of no interest where it is true whatever its variables are."""
        graph, scope = self._graph, self._essential[node]
        if not scope:
            return -1
        if graph.kind[node] != NodeKind.SUM:
            return self.number(int(graph.variable[node]), PRESENT if graph.kind[node] == NodeKind.PRESENT else ABSENT)
        v = self._place(scope)
        pairs: list[tuple[int, int]] = []
        for e in range(int(graph.first[node]), int(graph.first[node + 1])):
            pairs += self._element(node, int(graph.left[e]), int(graph.right[e]), v)
        if v < self.vtree.n:  # one literal again, since a sum of both would be true whatever the variable is
            pairs = pairs[:1]
        return self.number(v, tuple(pairs))

    def _element(self, node: int, a: int, b: int, v: int) -> Content:
        """What a product adds to a state of vtree node v."""
        scopes = self._essential[a], self._essential[b]
        if scopes[0] and scopes[1]:
            place = self._place(scopes[0] | scopes[1])
            state = self.number(place, (self._split(node, a, b, place),))
        else:
            factor = a if scopes[0] else b
            place, state = self._place(scopes[0] | scopes[1]), self._state[factor]
        return self.content(v, self.widened(place, state, v))

    def _split(self, node: int, a: int, b: int, v: int) -> tuple[int, int]:
        """The pair of states of the halves of v that two factors are."""
        left, right = self.vtree.halves[v - self.vtree.n]
        for x, y in ((a, b), (b, a)):
            first, second = self._essential[x], self._essential[y]
            if not first & ~self.vtree.scopes[left] and not second & ~self.vtree.scopes[right]:
                return (
                    self.widened(self._place(first), self._state[x], left),
                    self.widened(self._place(second), self._state[y], right),
                )
        raise ValueError(
            f"constraint: the circuit of {self._name} does not respect the prior's vtree, which splits "
            f"{names(self.vtree.scopes[left])} from {names(self.vtree.scopes[right])}: its node {node} multiplies "
            f"factors over {names(self._essential[a])} and over {names(self._essential[b])}; make the prior on the "
            "circuit's own, SubsetPrior(n, vtree=Vtree.of_circuit(circuit))"
        )
