"""The size of a count's circuit without building it.

A count treats all variables alike, so on the balanced tree all blocks of one size look the same, and there are at most
two sizes at every depth. On a block of s of the n variables, j and j' selected ones are of one class where every
completion treats them alike: where the allowed counts look the same from j and from j' on, over the n - s variables
that are left. That is what :mod:`.graph` finds by merging states and tables, pair by pair.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from circuitroute.compilation import Prediction
from circuitroute.constraints import Constraint, CountIn
from circuitroute_compilers.choice import seconds_to_build
from circuitroute_compilers.graph import excess, most_pairs, most_states
from circuitroute_compilers.lowering import Capped
from circuitroute_compilers.profile import counted

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class CountSize:
    """The circuit of the allowed ``counts`` (increasing, not empty) of ``n`` variables, with states 0 to ``cap``."""

    counts: Sequence[int]
    n: int
    cap: int

    @property
    def certain(self) -> int:
        """States that are reached on the way to the whole, as :func:`.choice.choose` counts them."""
        return self._reachable - 1

    def prediction(self, constraint: Constraint) -> Prediction:
        """What :func:`.choice.choose` predicts of ``constraint``, the count that this is; by sizes, without a tree."""
        count = Capped(CountIn(self.counts), list(self.counts), self.n)
        width, nodes, edges = self._states(1), 2 * self.n, 0
        for size, number in self._inner():
            left, right = (self._states(half) for half in _halves(size))
            profile = counted(count, left, right, size == self.n)
            width, nodes = max(width, profile.live), nodes + number * max(profile.live, 1)
            edges += number * max(profile.pairs, 1)
        return Prediction(width, nodes, edges, seconds_to_build(nodes, edges), constraint)

    def mergeable(self, max_nodes: int) -> bool:
        """Whether building gets beyond merging states, before which the size of the circuit is not looked at."""
        most = most_states(max_nodes, self.n), most_pairs(max_nodes)
        return self._reachable <= most[0] and self.largest_table <= most[1]

    def excess(self, max_nodes: int) -> str | None:
        """What is over the limits, in the words of :func:`.graph.excess`; None where nothing is."""
        width = max(map(self._states, self._blocks))
        return excess(self._inner_nodes + self._literals, self._inner_edges, width, max_nodes)

    @cached_property
    def nodes(self) -> int:
        """Nodes of the graph; the constant true is one where variables are left free."""
        return self._inner_nodes + self._literals + (self._free > 0)

    @cached_property
    def edges(self) -> int:
        """Elements of the graph; two for each variable that is left free."""
        return self._inner_edges + 2 * self._free

    @cached_property
    def _blocks(self) -> Counter[int]:
        """How many blocks there are of each size."""
        found, level = Counter[int](), Counter({self.n: 1})
        while level:
            found += level
            halves = Counter[int]()
            for size, number in level.items():
                for half in _halves(size):
                    halves[half] += number
            level = halves
        return found

    def _inner(self) -> Iterator[tuple[int, int]]:
        return ((size, number) for size, number in self._blocks.items() if size > 1)

    def _states(self, size: int) -> int:
        return 1 if size == self.n else min(size, self.cap) + 1  # the whole is decided

    @property
    def _reachable(self) -> int:
        return sum(number * self._states(size) for size, number in self._blocks.items())

    @property
    def largest_table(self) -> int:
        """The most pairs of states that are merged at one tree node."""
        halves = [_halves(size) for size, _ in self._inner()]
        return max((self._states(a) * self._states(b) for a, b in halves), default=0)

    @cached_property
    def _inner_nodes(self) -> int:
        return sum(number * int(self._firsts(size).sum()) for size, number in self._inner())

    @cached_property
    def _inner_edges(self) -> int:
        """Of every block the pairs of classes of its halves that some completion accepts."""
        total = 0
        for size, number in self._inner():
            # Counts beyond the cap are the first of no class.
            left, right = (np.trim_zeros(self._firsts(half).astype(np.float64), "b") for half in _halves(size))
            pairs = np.convolve(left, right)  # by their sum; float64 is exact for such numbers, and fast
            total += number * int(pairs[self._useful(size)[: len(pairs)]].sum())
        return total

    @cached_property
    def _literals(self) -> int:
        """Literals that some completion accepts, and a sum for each variable that is left free."""
        return self._blocks[1] * int(self._useful(1).sum()) + self._free

    @cached_property
    def _free(self) -> int:
        both = bool(self._useful(1).all()) and int(self._firsts(1).sum()) == 1
        return self._blocks[1] if both else 0

    # ------------------------------------------------------------------ classes

    def _useful(self, size: int) -> BoolArray:
        """[size + 1]: the numbers of selected variables of a block from which an allowed count can be reached."""
        window, before = self.n - size + 1, self._allowed_before
        useful: BoolArray = before[window:] > before[: size + 1]
        return useful

    def _firsts(self, size: int) -> BoolArray:
        """[size + 1]: those that are the first of their class."""
        window = self.n - size + 1
        ranks = self._ranks[window.bit_length() - 1]  # two stretches of a power of two cover a window
        looks = ranks[: size + 1] * len(self._allowed) + ranks[len(ranks) - size - 1 :]
        first = np.zeros(size + 1, dtype=np.bool_)
        first[np.unique(looks, return_index=True)[1]] = True
        return first & self._useful(size)

    @cached_property
    def _allowed(self) -> IntArray:
        """[n + 1] 1 for allowed counts, else 0."""
        allowed = np.zeros(self.n + 1, dtype=np.int64)
        allowed[list(self.counts)] = 1
        return allowed

    @cached_property
    def _allowed_before(self) -> IntArray:
        """[n + 2] how many counts below each are allowed."""
        return np.concatenate([[0], np.cumsum(self._allowed)])

    @cached_property
    def _ranks(self) -> list[IntArray]:
        """By p: a number for each stretch of 2^p counts, equal for those that look the same.

        Ranks of twice the length come from pairs of ranks, as in suffix arrays (Karp, Miller & Rosenberg 1972).
        """
        ranks = [self._allowed]
        while (step := 1 << (len(ranks) - 1)) < len(ranks[-1]):
            pairs = ranks[-1][:-step] * len(self._allowed) + ranks[-1][step:]
            ranks.append(np.unique(pairs, return_inverse=True)[1].astype(np.int64))
        return ranks


def _halves(size: int) -> tuple[int, ...]:
    """The sizes of a block's halves, as in :func:`.trees.balanced`."""
    return ((size + 1) // 2, size // 2) if size > 1 else ()
