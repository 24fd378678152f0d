"""Term and tree -> profile: how many states the term has on each block, counted part by part without building.

A part matters on the blocks that hold some of its scope but not all, and on the one that completes it. There its states
are counted: those of counts in closed form, those of other machines by merging them, up to a limit of work. The states
of several parts together are bounded by the product over the parts, and by the number of assignments.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from circuitroute.constraints import Cost, State
from circuitroute.deadline import tick
from circuitroute_compilers.graph import distinct, leaf_states
from circuitroute_compilers.lowering import Capped
from circuitroute_compilers.terms import FALSE, FREE, TRUE, Complement, HowMany, Machine, Scope, Term, variables
from circuitroute_compilers.trees import Vtree, nodes

# Merges tried per tree node; machines with more states get bounds.
MERGES_PER_NODE = 20_000


@dataclass(frozen=True)
class Profile:
    """The states of a term on a block: ``open`` undecided ones, and whether it may be ``true`` or ``false``. ``pairs``
    of states of the halves are not dead; ``exact`` if all of this is counted, not bounded."""

    open: int
    true: bool = False
    false: bool = False
    pairs: int = 0
    exact: bool = True

    @property
    def live(self) -> int:
        """States that are not dead."""
        return self.open + self.true

    @property
    def states(self) -> int:
        """All states, the dead one included."""
        return self.open + self.true + self.false


UNTOUCHED = Profile(open=1, pairs=1)
Profiles = dict[int, Profile]


class Tree:
    """A tree's nodes by number, halves before wholes."""

    def __init__(self, tree: Vtree) -> None:
        self.nodes = nodes(tree)
        number = {id(node): i for i, node in enumerate(self.nodes)}
        self.halves = [tuple(number[id(half)] for half in node.halves or ()) for node in self.nodes]
        self._parent = {half: whole for whole, halves in enumerate(self.halves) for half in halves}
        self._leaf = {node.first: i for i, node in enumerate(self.nodes) if node.halves is None}

    def touched(self, scope: Scope) -> list[int]:
        """The nodes that hold some of a scope, up to the first that holds all of it, in order."""
        found: set[int] = set()
        for v in variables(scope):
            here = self._leaf[v]
            tick()
            while here not in found:
                found.add(here)
                if not scope & ~self.nodes[here].scope:
                    break
                here = self._parent[here]
        return sorted(found)


def profiles(term: Term, tree: Tree) -> Profiles:
    """The states of a term on the nodes of a tree that touch its scope."""
    match term:
        case Machine(constraint=Capped() as count):
            return _counts(count, term.scope, tree)
        case Complement(term=inner):
            return _negated(profiles(inner, tree), tree)
        case HowMany(terms=terms):
            return together(term, [profiles(part, tree) for part in terms], tree)
    return _merged(term, tree)


def _counts(count: Capped, scope: Scope, tree: Tree) -> Profiles:
    """A count's states are the numbers from 0 up to its cap."""
    found: Profiles = {}
    known: dict[tuple[int, int, bool], Profile] = {}
    for node in tree.touched(scope):
        tick()
        whole = not scope & ~tree.nodes[node].scope
        halves = [found[half].open if half in found else 1 for half in tree.halves[node]] or [2, 1]
        key = (halves[0], halves[1], whole)
        if key not in known:
            known[key] = counted(count, *key)
        size = (scope & tree.nodes[node].scope).bit_count()
        found[node] = replace(known[key], false=whole or count.state(size) is None)
    return found


def counted(count: Capped, left: int, right: int, whole: bool) -> Profile:
    """The profile of a count on a block whose halves are in so many states, 0, 1, ... on either side."""
    ways = np.minimum(np.arange(left + right - 1), np.arange(left + right - 1)[::-1])  # of each sum, but one
    ways = np.minimum(ways, min(left, right) - 1) + 1
    states = [count.state(j) for j in range(left + right - 1)]
    useful = [state is not None and (count.accepts(state) or not whole) for state in states]
    different = {state for state, use in zip(states, useful, strict=True) if use}
    pairs = int(ways[np.array(useful)].sum())
    return Profile(0, bool(different), False, pairs) if whole else Profile(len(different), pairs=pairs)


def _negated(inner: Profiles, tree: Tree) -> Profiles:
    return {
        node: Profile(
            p.open, p.false, p.true, math.prod(inner.get(h, UNTOUCHED).states for h in tree.halves[node]), p.exact
        )
        for node, p in inner.items()
    }


def _merged(term: Term, tree: Tree) -> Profiles:
    """States found by merging, shared between nodes as when circuits are built; bounds where merging takes too long."""
    found: Profiles = {}
    states: dict[int, tuple[State, ...]] = {}
    known: dict[tuple[Hashable, ...], tuple[tuple[State, ...], Profile]] = {}
    for node in tree.touched(term.scope):
        tick()
        block = tree.nodes[node].scope
        if not tree.halves[node]:
            leaf = leaf_states(term, tree.nodes[node].first)
            states[node] = distinct([s for s in leaf if s is not FALSE])
            found[node] = _listed(states[node], FALSE in leaf, 0)
            continue
        left, right = (states.get(h, (FREE,) if h not in found else None) for h in tree.halves[node])
        if left is None or right is None or len(left) * len(right) > MERGES_PER_NODE:
            found[node] = _bounded(term, block, [found.get(h, UNTOUCHED) for h in tree.halves[node]])
            continue
        key = (left, right, term.signature(block))
        if key not in known:
            known[key] = _merge_all(term, left, right, block)
        states[node], found[node] = known[key]
    return found


def _merge_all(
    term: Term, lefts: Sequence[State], rights: Sequence[State], block: Scope
) -> tuple[tuple[State, ...], Profile]:
    merged = [_settled(term, a, b, block) for a in lefts for b in rights]
    live = [state for state in merged if state is not FALSE]
    states = distinct(live)
    return states, _listed(states, len(live) < len(merged), len(live))


def _settled(term: Term, left: State, right: State, block: Scope) -> State:
    tick()
    return term.settle(term.merge(left, right), block)


def _listed(states: Sequence[State], false: bool, pairs: int) -> Profile:
    return Profile(len(states) - (TRUE in states), TRUE in states, false, pairs)


def _bounded(term: Term, block: Scope, halves: list[Profile]) -> Profile:
    """At most as many states as pairs, as assignments and, for a cost, as sums up to its limit."""
    inside = (term.scope & block).bit_count()
    pairs = halves[0].live * halves[1].live
    most = min(pairs, 1 << inside)
    if isinstance(term, Machine) and isinstance(term.constraint, Cost):
        limit = term.constraint.at_least if term.constraint.at_most is None else term.constraint.at_most
        most = min(most, limit + 1)
    whole = not term.scope & ~block
    return Profile(0 if whole else most, True, True, min(pairs, 1 << inside), exact=False)


def together(term: HowMany, parts: Sequence[Profiles], tree: Tree) -> Profiles:
    """Several parts at once: the product of their states, times the tallies of the completed ones that hold."""
    present: dict[int, list[tuple[Term, Profile]]] = {}
    wholes: dict[int, list[Profile]] = {}
    for part, known in zip(term.terms, parts, strict=True):
        for node, profile in known.items():
            present.setdefault(node, []).append((part, profile))
        wholes.setdefault(max(known), []).append(known[max(known)])
    done: dict[int, _Done] = {}
    found: Profiles = {}
    for node in tree.touched(term.scope):
        tick(1 + len(present.get(node, ())))
        block = tree.nodes[node].scope
        done[node] = _Done.of(wholes.get(node, []), [done[h] for h in tree.halves[node] if h in done])
        halves = [found.get(half, UNTOUCHED) for half in tree.halves[node]]
        here = present.get(node, [])
        free = _independent(here, block) if term.all_must else [profile for _, profile in here]
        found[node] = _joint(term, free, done[node], halves, 1 << (term.scope & block).bit_count())
    return found


def _independent(here: Sequence[tuple[Term, Profile]], block: Scope) -> list[Profile]:
    """Profiles of parts that must all hold, those that vary together as one: counts of the same variables are one
    number, dead where it is dead to any of them."""
    found: list[Profile] = []
    counts: dict[Scope, list[Profile]] = {}
    for part, profile in here:
        if isinstance(part, Machine) and isinstance(part.constraint, Capped) and not part.constraint.goes_on:
            counts.setdefault(part.scope & block, []).append(profile)
        else:
            found.append(profile)
    for same in counts.values():
        fewest = min((p.open for p in same if p.open), default=0)
        false, pairs = any(p.false for p in same), min(p.pairs for p in same)
        found.append(Profile(fewest, False, false, pairs, exact=len(same) == 1))
    return found


@dataclass(frozen=True)
class _Done:
    """How many parts are completed in a block, and the least and most of them that may hold."""

    count: int
    least: int
    most: int

    @staticmethod
    def of(here: Sequence[Profile], below: Sequence[_Done]) -> _Done:
        return _Done(
            len(here) + sum(d.count for d in below),
            sum(not p.false for p in here) + sum(d.least for d in below),
            sum(p.true for p in here) + sum(d.most for d in below),
        )


def _joint(term: HowMany, here: Sequence[Profile], done: _Done, halves: Sequence[Profile], assignments: int) -> Profile:
    """The profile of several parts on one block; ``here`` are those that straddle it or are completed by it."""
    most = min(_joint_pairs(term, here, halves), assignments) if halves else assignments
    complete = done.count == len(term.terms)
    return Profile(
        open=min(_undecided(term, done) * _combinations(term, here), most),
        true=complete or not term.all_must,
        false=complete or not term.one_suffices or any(p.false for p in here),
        pairs=most if halves else 0,
        exact=len(here) == 1 and here[0].exact and not done.count,
    )


def _undecided(term: HowMany, done: _Done) -> int:
    """How many tallies of the completed parts leave the verdict to the others."""
    rest = len(term.terms) - done.count
    outcomes = (term.verdicts[held : held + rest + 1] for held in range(done.least, done.most + 1))
    return sum(len(set(verdicts)) > 1 for verdicts in outcomes)


def _combinations(term: HowMany, here: Sequence[Profile]) -> int:
    """How many combinations of states the open parts can be in without deciding the term on their own."""
    return math.prod(
        p.open + (p.true and not term.one_suffices) + (p.false and not term.all_must) for p in here if p.open
    )


def _joint_pairs(term: HowMany, here: Sequence[Profile], halves: Sequence[Profile]) -> int:
    """How many pairs of states of the halves are live: of a conjunction, those that are live to every part."""
    pairs = math.prod(half.live for half in halves)
    return min(pairs, math.prod(p.pairs for p in here)) if term.all_must else pairs
