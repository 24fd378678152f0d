"""The intermediate representation: a circuit as flat arrays, children before parents.

Legend: M nodes, E elements (products), L levels.

A node is the constant true, a literal (variable ``v`` absent or present) or a sum. A sum adds up its
*elements*; an element is the product of two earlier nodes, ``left`` and ``right`` (the constant true when
there is only one factor). The last node is the root. This is the "decision node with elements" form of
structured circuits: the memory an evaluation needs is one value per node, never one per element.
"""

from __future__ import annotations

import enum
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from circuitroute._validate import as_int
from circuitroute.deadline import DEFAULT_SECONDS, tick, within
from circuitroute.errors import CircuitTooLargeError

IntArray: TypeAlias = npt.NDArray[np.int64]
Array: TypeAlias = npt.NDArray[Any]

# Numbers of any size: how many products are taken at once, and how many bits all values may have together.
EXACT_CHUNK = 1 << 12
MAX_EXACT_BITS = 1 << 32
# The most that enumerated models may take, all nodes together.
MAX_MODEL_BYTES = 1 << 30


class NodeKind(enum.IntEnum):
    """What a node is; the values stand in :attr:`Graph.kind`."""

    TRUE = 0
    ABSENT = 1
    PRESENT = 2
    SUM = 3


@dataclass(frozen=True)
class Level:
    """The sums of one level: all their children lie in earlier levels.

    Attributes:
        nodes: [m] node indices, increasing.
        left, right: [e] children of the elements, grouped by sum.
        starts: [m] where each sum's elements begin in ``left`` and ``right``.
        segment: [e] which of the ``m`` sums an element belongs to.
    """

    nodes: IntArray
    left: IntArray
    right: IntArray
    starts: IntArray
    segment: IntArray

    def pieces(self, most: int) -> Iterator[tuple[slice, slice]]:
        """Ranges of sums, and of their elements: of at most so many elements, unless one sum has more."""
        ends = [*self.starts[1:].tolist(), len(self.left)]
        begin = 0
        while begin < len(ends):
            start = int(self.starts[begin])
            end = max(begin + 1, bisect_right(ends, start + most))
            yield slice(begin, end), slice(start, ends[end - 1])
            begin = end


@dataclass(frozen=True, eq=False)
class Graph:
    """A circuit as arrays.

    Attributes:
        n: number of variables.
        kind: [M] uint8, a :class:`NodeKind` each.
        variable: [M] int32, the literal's variable, -1 for other nodes.
        first: [M + 1] int64; the elements of node i are ``first[i]`` to ``first[i + 1]``.
        left, right: [E] int32, the factors of each element; both smaller than the element's sum.
    """

    n: int
    kind: npt.NDArray[np.uint8]
    variable: npt.NDArray[np.int32]
    first: IntArray
    left: npt.NDArray[np.int32]
    right: npt.NDArray[np.int32]

    @staticmethod
    def of(
        n: int, kinds: Sequence[int], variables: Sequence[int], elements: Sequence[Sequence[tuple[int, int]]]
    ) -> Graph:
        """The graph whose node i is of kind ``kinds[i]``, with its elements as pairs (left, right)."""
        pairs = np.array([pair for some in elements for pair in some], dtype=np.int32).reshape(-1, 2)
        return Graph(
            n=n,
            kind=np.array(kinds, dtype=np.uint8),
            variable=np.array(variables, dtype=np.int32),
            first=np.cumsum([0, *map(len, elements)], dtype=np.int64),
            left=pairs[:, 0].copy(),
            right=pairs[:, 1].copy(),
        )

    def __post_init__(self) -> None:
        object.__setattr__(self, "n", as_int("n", self.n))
        for array in (self.kind, self.variable, self.first, self.left, self.right):
            array.setflags(write=False)

    @property
    def num_nodes(self) -> int:
        """Literals, constants and sums: the values an evaluation holds."""
        return len(self.kind)

    @property
    def num_edges(self) -> int:
        """Elements, i.e. products of two nodes: the multiply-adds of an evaluation."""
        return len(self.left)

    @cached_property
    def level_of(self) -> IntArray:
        """[M] 0 for literals and constants, else one more than the deepest child."""
        level = np.zeros(self.num_nodes, dtype=np.int64)
        first = self.first.tolist()
        for node in np.flatnonzero(self.kind == NodeKind.SUM).tolist():
            span = slice(first[node], first[node + 1])
            tick(4)
            if span.start < span.stop:
                level[node] = 1 + max(level[self.left[span]].max(), level[self.right[span]].max())
        return level

    @cached_property
    def levels(self) -> tuple[Level, ...]:
        """The sums, level by level, from the literals up."""
        sums = np.flatnonzero(self.kind == NodeKind.SUM)
        depth = self.level_of[sums]
        order = np.argsort(depth, kind="stable")
        ends = np.cumsum(np.bincount(depth, minlength=1)[1:])
        return tuple(self._level(nodes) for nodes in np.split(sums[order], ends[:-1]) if len(nodes))

    def _level(self, nodes: IntArray) -> Level:
        sizes = self.first[nodes + 1] - self.first[nodes]
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
        segment = np.repeat(np.arange(len(nodes)), sizes)
        elements = np.arange(len(segment)) - starts[segment] + self.first[nodes][segment]
        return Level(
            nodes=nodes,
            left=self.left[elements].astype(np.int64),
            right=self.right[elements].astype(np.int64),
            starts=starts,
            segment=segment,
        )

    def fold(
        self,
        leaves: Array,
        multiply: Callable[[Array, Array], Array],
        add: np.ufunc,
    ) -> Array:
        """Evaluate bottom-up in any semiring.

        Args:
            leaves: [M] values; those of literals and constants are read.
            multiply: the product of two arrays of values, elementwise.
            add: the ufunc whose ``reduceat`` adds up the elements of a sum.

        Returns:
            [M] the value of every node.

        Raises:
            CircuitTooLargeError: the values are Python ints, and take more than half a gibibyte.
        """
        values = leaves.copy()
        bits = 0
        for level in self.levels:
            for sums, elements in level.pieces(EXACT_CHUNK) if values.dtype == object else level.pieces(1 << 62):
                tick(1 + len(level.left[elements]) // 4)
                products = multiply(values[level.left[elements]], values[level.right[elements]])
                found = add.reduceat(products, level.starts[sums] - elements.start)
                values[level.nodes[sums]] = found
                if values.dtype == object:
                    bits += sum(int(value).bit_length() for value in found)
                    _allow_bits(bits)
        return values


class DeferredGraph(Graph):
    """A graph whose size is known and whose arrays are built when one of them is first read.

    Engines of the op ``subset`` need a count's allowed counts and no graph, so a large one is built only for what reads
    it: files, pictures, checks. Pickles as a plain :class:`Graph`.

    Args:
        n: number of variables.
        num_nodes, num_edges: the size of what ``build`` returns.
        build: makes the graph; called once.
    """

    def __init__(self, n: int, num_nodes: int, num_edges: int, build: Callable[[], Graph]) -> None:
        sizes = {
            "n": as_int("n", n),
            "_nodes": as_int("num_nodes", num_nodes),
            "_edges": as_int("num_edges", num_edges),
        }
        for name, value in {**sizes, "_build": build}.items():
            object.__setattr__(self, name, value)  # the class is frozen

    @property
    def num_nodes(self) -> int:
        return int(self.__dict__["_nodes"])

    @property
    def num_edges(self) -> int:
        return int(self.__dict__["_edges"])

    @cached_property
    def _built(self) -> Graph:
        graph: Graph = self.__dict__["_build"]()
        if (graph.num_nodes, graph.num_edges) != (self.num_nodes, self.num_edges):
            raise ValueError(
                f"num_nodes={self.num_nodes} and num_edges={self.num_edges} are not the size of what build returned, "
                f"{graph.num_nodes} nodes and {graph.num_edges} elements: give the graph's own"
            )
        return graph

    @property
    def kind(self) -> npt.NDArray[np.uint8]:
        return self._built.kind

    @property
    def variable(self) -> npt.NDArray[np.int32]:
        return self._built.variable

    @property
    def first(self) -> IntArray:
        return self._built.first

    @property
    def left(self) -> npt.NDArray[np.int32]:
        return self._built.left

    @property
    def right(self) -> npt.NDArray[np.int32]:
        return self._built.right

    def __reduce__(self) -> tuple[type[Graph], tuple[Any, ...]]:
        return Graph, (self.n, self.kind, self.variable, self.first, self.left, self.right)


def _allow_bits(bits: int) -> None:
    if bits > MAX_EXACT_BITS:
        raise CircuitTooLargeError(
            f"counting takes numbers of more than {MAX_EXACT_BITS} bits, all together: too large for memory"
        )


def model_count(graph: Graph, max_seconds: float | None = DEFAULT_SECONDS) -> int:
    """Number of satisfying assignments, as a Python int of any size (needs a smooth, deterministic graph).

    Raises:
        CircuitTooLargeError: it takes more than ``max_seconds`` CPU seconds (None: no limit), or the numbers of subsets
            of all nodes more than half a gibibyte.
    """
    with within(max_seconds, lambda: f"counting the subsets of {graph.num_nodes} nodes", "count a smaller circuit"):
        ones = np.ones(graph.num_nodes, dtype=object)
        return int(graph.fold(ones, np.multiply, np.add)[-1])


def weighted_count(graph: Graph, weights: Mapping[int, Fraction]) -> Fraction:
    """The sum over all satisfying assignments of the products of their literals' weights, exactly.

    ``weights`` maps literals, v + 1 where variable v is present and -v - 1 where it is absent, to weights; the others
    have the weight 1. As in :func:`model_count`; both weights of a variable are brought to one denominator, which every
    assignment has once, so that only integers are added and multiplied.

    Raises:
        CircuitTooLargeError: the numbers of all nodes take more than half a gibibyte.
    """
    leaves = np.ones(graph.num_nodes, dtype=object)
    whole = {}
    denominator = 1
    for v in {abs(literal) for literal in weights}:
        present, absent = weights.get(v, Fraction(1)), weights.get(-v, Fraction(1))
        common = math.lcm(present.denominator, absent.denominator)
        whole[v], whole[-v] = int(present * common), int(absent * common)
        denominator *= common
    for kind, sign in ((NodeKind.PRESENT, 1), (NodeKind.ABSENT, -1)):
        for node in np.flatnonzero(graph.kind == kind).tolist():
            leaves[node] = whole.get(sign * (int(graph.variable[node]) + 1), 1)
    return Fraction(int(graph.fold(leaves, np.multiply, np.add)[-1]), denominator)


def count_ranges(graph: Graph) -> tuple[IntArray, IntArray]:
    """([M], [M]): the smallest and largest number of selected variables among what satisfies each node."""
    present = (graph.kind == NodeKind.PRESENT).astype(np.int64)
    return graph.fold(present, np.add, np.minimum), graph.fold(present, np.add, np.maximum)


def count_range(graph: Graph) -> tuple[int, int]:
    """Smallest and largest number of selected variables in any satisfying assignment."""
    fewest, most = count_ranges(graph)
    return int(fewest[-1]), int(most[-1])


def enumerate_models(graph: Graph) -> npt.NDArray[np.bool_]:
    """All satisfying assignments, [model_count, n], in lexicographic order of (z_0, z_1, ...).

    Raises:
        CircuitTooLargeError: they take more than a gibibyte, counting those of all nodes on the way, or too many
            CPU seconds.
    """
    with within(
        doing=lambda: f"enumerating the subsets of {graph.num_nodes} nodes", remedy="enumerate a smaller circuit"
    ):
        return _enumerated(graph)


def _enumerated(graph: Graph) -> npt.NDArray[np.bool_]:
    size = graph.n * float(graph.fold(np.ones(graph.num_nodes), np.multiply, np.add).sum())
    if size > MAX_MODEL_BYTES:
        raise CircuitTooLargeError(
            f"enumerating the subsets of {graph.num_nodes} nodes over {graph.n} variables takes {size / 2**30:.3g} "
            f"GiB, more than {MAX_MODEL_BYTES / 2**30:g}: draw samples instead, or enumerate a smaller circuit"
        )
    none = np.zeros((1, graph.n), dtype=np.bool_)
    worlds: list[npt.NDArray[np.bool_]] = []
    for node in range(graph.num_nodes):
        tick(8)
        if graph.kind[node] != NodeKind.SUM:
            world = none.copy()
            if graph.kind[node] == NodeKind.PRESENT:
                world[0, graph.variable[node]] = True
            worlds.append(world)
            continue
        span = range(int(graph.first[node]), int(graph.first[node + 1]))
        parts = [_cross(worlds[graph.left[e]], worlds[graph.right[e]]) for e in span]
        worlds.append(np.concatenate(parts))
    models = worlds[-1]
    return models[np.lexsort(models.T[::-1])]


def _cross(a: npt.NDArray[np.bool_], b: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    tick(1 + len(a) * len(b) * a.shape[1] // 1000)
    return (a[:, None, :] | b[None, :, :]).reshape(-1, a.shape[1])
