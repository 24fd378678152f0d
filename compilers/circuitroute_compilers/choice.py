"""Plan -> tree and term: of a few candidates the one whose circuit is predicted to cost least.

Sizes are those of the reachable states, counted part by part (:mod:`.profile`). The circuit is usually smaller: it
leaves out states that no completion accepts and joins states that every completion treats alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from circuitroute import CircuitTooLargeError, Constraint
from circuitroute.compilation import SHOWN, Prediction
from circuitroute.constraints import Cost, shown
from circuitroute.deadline import OutOfTimeError, note, tick
from circuitroute_compilers.lowering import Capped
from circuitroute_compilers.plans import Number, Plan, Proposition, along, simple_parts
from circuitroute_compilers.profile import UNTOUCHED, Profiles, Tree, profiles, together
from circuitroute_compilers.terms import HowMany, Machine, Scope, Term
from circuitroute_compilers.trees import Vtree, candidates, depth, keeps_order, met, natural

# How long building takes, about.
SECONDS_PER_EDGE = 4e-6
SECONDS_PER_NODE = 2e-5
# Engines run one level after another: a level takes as long as this many elements.
EDGES_PER_LEVEL = 16
# The nodes of a decision diagram may be this many even where the circuit may not.
LEAST_DIAGRAM_NODES = 50_000


@dataclass(frozen=True)
class Choice:
    """A plan, a tree, their term, and the predicted size; at least ``certain`` states are reached."""

    plan: Plan
    tree: Vtree
    term: Term
    prediction: Prediction
    certain: int

    @property
    def cost(self) -> int:
        """The cost of an evaluation of the circuit, in elements."""
        return self.prediction.edges + EDGES_PER_LEVEL * depth(self.tree)


def choose(constraint: Constraint, plan: Plan, n: int, max_nodes: int) -> Choice:
    """The tree of smallest predicted cost among a few.

    Raises:
        CircuitTooLargeError: a formula needs too large a decision diagram in every one of the orders.
    """
    best: Choice | None = None  # the others, and their trees, need not stay in memory
    refusals: list[CircuitTooLargeError] = []
    for tree in _possible(plan, n):
        note(lambda: "looking for a good order of its variables")
        tick()
        try:
            term = along(plan, met(tree), max(max_nodes, LEAST_DIAGRAM_NODES))
            found = _predicted(constraint, plan, term, tree)
        except OutOfTimeError:
            raise
        except CircuitTooLargeError as error:
            refusals.append(error)
        else:
            best = found if best is None or found.cost < best.cost else best
    if best is None:
        raise refusals[-1]
    return best


def _possible(plan: Plan, n: int) -> Iterator[Vtree]:
    """Trees around the scopes, except those in which a user's machine would meet its variables out of order."""
    parts = list(simple_parts(plan))
    ordered = [part.scope for part in parts if isinstance(part, Machine) and is_foreign(part)]
    found = 0
    for tree in candidates(_scopes(parts), n):
        order = met(tree)
        if all(keeps_order(order, scope) for scope in ordered):
            found += 1
            yield tree
    if not found:
        yield natural(n)


def is_foreign(machine: Machine) -> bool:
    """Whether the machine is a user's: it may be wrong, and it may depend on the order of its variables."""
    return not isinstance(machine.constraint, (Capped, Cost))


def _scopes(parts: Sequence[Machine | Proposition]) -> Iterator[Scope]:
    """What should stay together: the scopes of machines, of propositions, and of the formulas inside these."""
    for part in parts:
        yield part.scope
        if isinstance(part, Proposition):
            for formula in part.formulas:
                yield from formula.scopes()


def _predicted(constraint: Constraint, plan: Plan, term: Term, tree: Vtree) -> Choice:
    numbered = Tree(tree)
    if isinstance(plan, Number) and isinstance(term, HowMany):
        parts, names = (
            [_counted(part, name, numbered) for part, name in zip(term.terms, plan.names, strict=True)],
            plan.names,
        )
        whole = together(term, parts, numbered)
    else:
        whole = profiles(term, numbered)
        parts, names = [whole], (constraint,)
    inner = [node for node, halves in enumerate(numbered.halves) if halves]
    at = [whole.get(node, UNTOUCHED) for node in inner]
    free = sum(node not in whole for node, halves in enumerate(numbered.halves) if not halves)
    nodes = sum(max(p.live, 1) for p in at) + 2 * (len(inner) + 1) + free + (free > 0)
    edges = sum(max(p.pairs, 1) for p in at) + 2 * free
    seconds = seconds_to_build(nodes, edges)
    width = max((p.live for p in whole.values()), default=1)
    culprit = names[_costliest(parts, whole)]
    certain = sum(p.open for p in whole.values() if p.exact)
    return Choice(plan, tree, term, Prediction(width, nodes, edges, seconds, culprit), certain)


def _counted(term: Term, name: Constraint, tree: Tree) -> Profiles:
    note(lambda: f"counting the states of {shown(name, SHOWN)}")
    return profiles(term, tree)


def seconds_to_build(nodes: int, edges: int) -> float:
    """How long building takes, about."""
    return min(edges, 10**15) * SECONDS_PER_EDGE + min(nodes, 10**15) * SECONDS_PER_NODE


def _costliest(parts: Sequence[Profiles], whole: Profiles) -> int:
    """The part whose absence would save the most elements."""
    saved = [
        sum(whole[node].pairs * (p.pairs - 1) // p.pairs for node, p in part.items() if p.pairs > 1) for part in parts
    ]
    return max(range(len(parts)), key=saved.__getitem__)
