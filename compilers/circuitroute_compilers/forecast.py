"""How many merges a user's machine will take, told from samples before any of its tables is built.

A machine that never leads two pairs of states to the same state keeps one per subset: its states double with every
variable, and the circuit's size is known only once all of them are merged. So a few states per block are merged upward;
as long as no two pairs of them coincide, a block has as many states as live pairs, and these are counted from the share
of the sample that is not dead. From the first coincidence on, the machine forgets something and nothing is foretold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from circuitroute.constraints import State
from circuitroute.deadline import tick
from circuitroute_compilers.graph import distinct, leaf_states, most_states
from circuitroute_compilers.terms import FALSE, Term
from circuitroute_compilers.trees import Vtree, nodes

# States of a block that are merged with as many of its sibling's.
SAMPLED = 32
# Merges that are affordable whatever the limit on nodes: a state per subset of 20 variables, two seconds or three.
LEAST_LIMIT = (1 << 20) + (1 << 16)


@dataclass(frozen=True)
class _Block:
    """Some of a block's states, and about how many there are."""

    states: Sequence[State]
    count: int


@dataclass(frozen=True)
class Explosion:
    """A block with a state per subset: its variables, and how many merges it and all below it take, about."""

    variables: int
    merges: int


def explosion(term: Term, tree: Vtree, max_nodes: int) -> Explosion | None:
    """The first block at which more merges are foretold than the states that may be built; None if there is none."""
    limit = max(LEAST_LIMIT, most_states(max_nodes, tree.scope.bit_count()))
    found: dict[int, _Block | None] = {}
    merges = 0
    for node in nodes(tree):
        if node.halves is None:
            states = distinct([state for state in leaf_states(term, node.first) if state is not FALSE])
            found[id(node)] = _Block(states, len(states))
            continue
        left, right = (found.pop(id(half)) for half in node.halves)
        found[id(node)] = None
        if left is None or right is None:
            continue
        merged = [state for a in left.states for b in right.states if (state := _merged(term, a, b)) is not FALSE]
        sampled = len(left.states) * len(right.states)
        live = left.count * right.count * len(merged) // max(sampled, 1)
        merges += live
        if merges > limit:
            return Explosion(node.scope.bit_count(), merges)
        if len(distinct(merged)) == len(merged):
            kept = [state for a in merged if (state := term.settle(a, node.scope)) is not FALSE]
            found[id(node)] = _Block(_spread(kept), live)
    return None


def _merged(term: Term, left: State, right: State) -> State:
    tick()
    return term.merge(left, right)


def _spread(states: Sequence[State]) -> Sequence[State]:
    """At most SAMPLED of the states, evenly spaced; not the first, which tends to be special, such as the empty set."""
    if len(states) <= SAMPLED:
        return states
    return [states[(2 * i + 1) * len(states) // (2 * SAMPLED)] for i in range(SAMPLED)]
