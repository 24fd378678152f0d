"""Clauses as graphs: variables decided one after the other along a tree of the primal graph.

The tree is that of an order of elimination (:mod:`.primal`): all variables of a clause stand on one way from the root
down, and what hangs below different children of a variable shares no clause. So, once the variables above are decided,
the formula falls apart, and what is left below a variable depends only on which of the clauses that reach down to it
are not satisfied yet. Each such set that is met makes a node, which decides the variable and multiplies what is below;
nodes of equal parts are one node. This is an AND/OR decision diagram (Dechter & Mateescu 2007), a structured d-DNNF:
its size is at most 2^w per variable, w being the width of the order, and at most 2^c for c clauses that reach below.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from circuitroute import CircuitTooLargeError, Constraint
from circuitroute.circuit import Graph
from circuitroute.constraints import CNF
from circuitroute.constraints.formula import Formula
from circuitroute.deadline import OutOfTimeError, note, tick
from circuitroute.interop.building import Builder
from circuitroute_compilers.primal import Order, best_order, primal_graph
from circuitroute_compilers.rules import formula_of
from circuitroute_compilers.terms import variables
from circuitroute_compilers.trees import MAX_DECOMPOSED_VARIABLES

# How many sets of clauses may be met, per node of the circuit, and where few nodes are allowed.
STATES_PER_NODE, LEAST_STATES = 4, 200_000
# Up to so many variables, and to so many neighbours in an order of elimination, trees of states are the better way.
FEW_VARIABLES, NARROW = 20, 6
REMEDY = 'compile with compiler="sdd" (the extra sdd), whose diagrams are often smaller'


@dataclass(frozen=True)
class Clauses:
    """Clauses, whose literals count from 1, and the order in which their variables are eliminated."""

    clauses: Sequence[Sequence[int]]
    order: Order


def wide_clauses(constraint: Constraint, n: int) -> Clauses | None:
    """The clauses of a constraint that is nothing else, if there are many variables and no order of them is narrow;
    None of any other, for which a tree of states is the better way: it is shallow, and small where the order is narrow.

    Raises:
        ValueError: it uses a variable that does not exist.
    """
    formula = formula_of(constraint, n)
    if formula is None or len(formula.variables) <= FEW_VARIABLES:
        return None
    found = constraint.clauses if isinstance(constraint, CNF) else map(_clause, formula.conjuncts())
    known: list[tuple[int, ...]] = []
    for clause in found:
        if not clause:
            return None
        known.append(clause)
    scopes = _scopes(known)
    if _cut(scopes, formula.variables) <= NARROW:
        return None
    note(lambda: f"looking for an order of the variables of {len(known)} clauses; {REMEDY}")
    order = best_order(primal_graph(scopes))
    narrow = len(formula.variables) <= MAX_DECOMPOSED_VARIABLES and max(order.context.values()) <= NARROW
    return None if narrow else Clauses(known, order)


def _clause(formula: Formula) -> tuple[int, ...] | None:
    """The literals of a disjunction of literals, however it is written; None of any other formula."""
    found: set[int] = set()
    waiting = [(len(formula.steps) - 1, True)]
    while waiting:
        tick()
        here, holds = waiting.pop()
        operator, operands = formula.steps[here]
        match operator, holds:
            case "var", _:
                found.add(operands[0] + 1 if holds else -operands[0] - 1)
            case "not", _:
                waiting.append((operands[0], not holds))
            case ("or", True) | ("and", False):
                waiting += [(i, holds) for i in operands]
            case "implies", True:
                waiting += [(operands[0], False), (operands[1], True)]
            case _:
                return None
    return None if any(-literal in found for literal in found) else tuple(sorted(found, key=abs))


def _cut(scopes: Sequence[int], names: Sequence[int]) -> int:
    """The most variables before a place in their own order that share a formula with one after it."""
    last = dict.fromkeys(names, -1)
    for scope in scopes:
        some = variables(scope)
        tick(len(some))
        for v in some:
            last[v] = max(last[v], some[-1])
    ends = sorted(last.values())
    # Of v variables before a place, those whose last partner comes before it, too, are done.
    return max(number + 1 - bisect_right(ends, v) for number, v in enumerate(names))


def decided(found: Clauses, n: int, max_nodes: int, what: str) -> Graph | None:
    """The graph of clauses over ``n`` variables; None if nothing satisfies them.

    Raises:
        CircuitTooLargeError: more nodes than allowed; ``what`` names the clauses.
    """
    note(lambda: f"deciding the variables of {len(found.clauses)} clauses; {REMEDY}")
    builder = Builder(n, max_nodes, what)
    try:
        root = _Search(found, builder, max(STATES_PER_NODE * max_nodes, LEAST_STATES)).root()
        return None if root is None else builder.finish(root, -1)[0]
    except OutOfTimeError:
        raise
    except CircuitTooLargeError as error:
        raise CircuitTooLargeError(f"{error}; or {REMEDY}") from None


def expected_states(found: Clauses) -> tuple[int, int]:
    """A bound of the sets of clauses that are met, of all variables and of the one that has the most."""
    places = _places(found.clauses, found.order)
    sizes = [1 << min(place.reach.bit_count(), found.order.context[place.variable]) for place in places]
    return sum(sizes), max(sizes)


def _scopes(clauses: Iterable[Sequence[int]]) -> list[int]:
    return [sum(1 << abs(literal) - 1 for literal in clause) for clause in clauses]


@dataclass(frozen=True)
class _Place:
    """A variable in the tree: bit sets of clauses, and its children.

    Attributes:
        variable: from 0.
        begin: the clauses of which it is the topmost variable.
        end: those of which it is the lowest.
        holds: those that its literal satisfies: (absent, present).
        reach: those that have variables here or below, and above.
        children: the places of the variables below it.
    """

    variable: int
    begin: int
    end: int
    holds: tuple[int, int]
    reach: int
    children: tuple[int, ...]


def _places(clauses: Sequence[Sequence[int]], order: Order) -> list[_Place]:
    """The places of all variables, children before parents."""
    number = {v: i for i, v in enumerate(order.variables)}
    begin, end, reach = ([0] * len(number) for _ in range(3))
    holds = [[0, 0] for _ in number]
    for i, clause in enumerate(clauses):
        bit = 1 << i
        at = sorted(number[abs(literal) - 1] for literal in clause)
        end[at[0]] |= bit
        begin[at[-1]] |= bit
        here = at[0]
        while here != at[-1]:
            tick()
            reach[here] |= bit
            here = number[order.parent[order.variables[here]]]
        for literal in clause:
            holds[number[abs(literal) - 1]][literal > 0] |= bit
    children: list[list[int]] = [[] for _ in number]
    for v, above in order.parent.items():
        children[number[above]].append(number[v])
    return [
        _Place(v, begin[i], end[i], (holds[i][0], holds[i][1]), reach[i], tuple(children[i])) for v, i in number.items()
    ]


# A place, and the clauses from above that are not satisfied yet.
_State = tuple[int, int]


class _Search:
    """Meets the states from the roots down, and makes their nodes from the leaves up."""

    def __init__(self, found: Clauses, builder: Builder, max_states: int) -> None:
        order = found.order
        self._places = _places(found.clauses, order)
        self._roots = [i for i, place in enumerate(self._places) if place.variable not in order.parent]
        self._builder = builder
        self._max_states = max_states
        self._node: dict[_State, int | None] = {}
        self._unique: dict[tuple[int, int | None, int | None], int] = {}

    def root(self) -> int | None:
        """The node of all clauses; None if it is false."""
        found: list[int] = []
        for place in self._roots:
            node = self._of((place, 0))
            if node is None:
                return None
            found.append(node)
        return self._builder.node(self._builder.conjunction(found, -1), -1)

    def _of(self, top: _State) -> int | None:
        waiting = [top]
        while waiting:
            tick()
            state = waiting[-1]
            if state in self._node:
                waiting.pop()
                continue
            sides = [self._below(state, side) for side in (0, 1)]
            missing = next((s for side in sides for s in self._unknown(side)), None)
            if missing is not None:
                waiting.append(missing)
                continue
            waiting.pop()
            self._node[state] = self._made(state[0], *map(self._product, sides))
            if len(self._node) > self._max_states:
                raise CircuitTooLargeError(
                    f"deciding the variables of clauses meets more than {self._max_states} sets of open ones, as "
                    f"{self._builder.source} does; raise max_nodes"
                )
        return self._node[top]

    def _below(self, state: _State, side: int) -> list[_State] | None:
        """The states of the children where the variable is absent or present; None if a clause is false there."""
        place = self._places[state[0]]
        left = (state[1] | place.begin) & ~place.holds[side]
        if left & place.end:
            return None
        return [(child, left & self._places[child].reach) for child in place.children]

    def _unknown(self, states: Iterable[_State] | None) -> Iterable[_State]:
        """What has to be known of a product that may still be true."""
        known = [] if states is None else list(states)
        if any(state in self._node and self._node[state] is None for state in known):
            return []
        return [state for state in known if state not in self._node]

    def _product(self, states: list[_State] | None) -> int | None:
        """The node of a product of states; None if one of them is false."""
        if states is None:
            return None
        factors: list[int] = []
        for state in states:
            node = self._node.get(state)
            if node is None:
                return None
            factors.append(node)
        return self._builder.node(self._builder.conjunction(factors, -1), -1)

    def _made(self, number: int, low: int | None, high: int | None) -> int | None:
        if low is None and high is None:
            return None
        key = number, low, high
        if key not in self._unique:
            variable = self._places[number].variable
            literal = self._builder.literal
            sides = [(literal(variable, present), node) for present, node in ((False, low), (True, high))]
            elements = [(test, node) for test, node in sides if node is not None]
            if len(elements) == 1:
                self._unique[key] = self._builder.product(*elements[0], -1)
            else:
                self._unique[key] = self._builder.sum(elements, -1)
        return self._unique[key]
