"""The built-in compiler: any constraint that is built in, defines a machine, or is composed of such.

A constraint that comes down to one count over all variables gets the balanced tree of truncated convolutions of counts
(Poisson-binomial polynomials) and, marked with its allowed counts, runs on the fused ``subset`` engines. Everything
else is lowered to terms and merged along a tree that keeps its scopes together.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, islice

from circuitroute import Circuit, CircuitTooLargeError, Constraint, InfeasibleError, register_compiler
from circuitroute.circuit import Graph
from circuitroute.constraints import And, Cost, Count, CountIn, Not, Or
from circuitroute_compilers.associativity import check_associative
from circuitroute_compilers.lowering import Capped, allowed_counts, count_of, flattened, joined, lower
from circuitroute_compilers.machine import build_graph
from circuitroute_compilers.terms import Complement, HowMany, Machine, Term
from circuitroute_compilers.vtree import Vtree, around, keeps_order, natural

# How many combinations of parts are tried to name the smallest contradiction, or the costliest part.
MAX_BLAMED = 200


@register_compiler(Constraint)
def compile_builtin(constraint: Constraint, n: int, max_nodes: int) -> Circuit:
    """Compile a constraint over ``n`` variables; see :func:`circuitroute.compile` for the errors."""
    counts = _only_counts(constraint, n)
    if counts == []:
        raise InfeasibleError(f"{constraint!r} over {n} variables: none of the counts 0 to {n} is allowed")
    try:
        # One count over all variables, however it was said, is built as such.
        simple = constraint if counts is None or isinstance(constraint, Count) else CountIn(counts)
        return Circuit(_graph(simple, n, max_nodes), constraint, counts)
    except InfeasibleError as error:
        raise InfeasibleError(_contradiction(constraint, n, max_nodes) or str(error)) from None
    except CircuitTooLargeError as error:
        raise CircuitTooLargeError(f"{error}{_culprit(constraint, n, max_nodes)}") from None


def _graph(constraint: Constraint, n: int, max_nodes: int) -> Graph:
    term = lower(constraint, tuple(range(n)))
    graph = build_graph(constraint, term, _tree(term, n), max_nodes)
    for machine in machines(term):
        if _is_foreign(machine):
            check_associative(machine)
    return graph


def _only_counts(constraint: Constraint, n: int) -> list[int] | None:
    """The allowed counts, increasing, if the constraint comes down to a count of all variables."""
    found = _count_set(constraint, n)
    return None if found is None else sorted(found)


def _count_set(constraint: Constraint, n: int) -> set[int] | None:
    if isinstance(constraint, Not):
        inner = _count_set(constraint.part, n)
        return None if inner is None else set(range(n + 1)) - inner
    if isinstance(constraint, (And, Or)):
        parts = [_count_set(part, n) for part in constraint.parts]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        return set.intersection(*known) if isinstance(constraint, And) else set.union(*known)
    count, over = count_of(constraint, n)
    return None if count is None or len(over) != n else set(allowed_counts(count, n))


def machines(term: Term) -> Iterator[Machine]:
    """The machines a term is made of."""
    match term:
        case Machine():
            yield term
        case Complement(term=inner):
            yield from machines(inner)
        case HowMany(terms=inner):
            for each in inner:
                yield from machines(each)


def _is_foreign(machine: Machine) -> bool:
    """Whether the machine is a user's: it may be wrong, and it may depend on the order of its variables."""
    return not isinstance(machine.constraint, (Capped, Cost))


def _tree(term: Term, n: int) -> Vtree:
    """A tree around the scopes, unless that would show some user's machine its variables out of order."""
    found = list(machines(term))
    tree = around((machine.scope for machine in found), n)
    if all(keeps_order(tree, machine.scope) for machine in found if _is_foreign(machine)):
        return tree
    return natural(n)


def _contradiction(constraint: Constraint, n: int, max_nodes: int) -> str | None:
    """The smallest set of parts of a conjunction that nothing satisfies, in words."""
    parts = joined(flattened(constraint, n), n)
    tried = (some for size in range(1, len(parts)) for some in combinations(parts, size))
    for some in islice(tried, MAX_BLAMED):
        try:
            _graph(And(some), n, max_nodes)
        except InfeasibleError:
            named = " and ".join(map(repr, some))
            verb = "is impossible" if len(some) == 1 else "contradict each other"
            return f"{named} {verb} over {n} variables, so {constraint!r} has no solution"
        except CircuitTooLargeError:
            continue
    return None


def _culprit(constraint: Constraint, n: int, max_nodes: int) -> str:
    """Which part of a conjunction is the costliest on its own, in words."""
    parts = joined(flattened(constraint, n), n)
    if len(parts) == 1:
        return ""
    sizes: list[tuple[int, str]] = []
    for part in parts[:MAX_BLAMED]:
        try:
            sizes.append((_graph(part, n, max_nodes).num_nodes, f"{part!r}"))
        except CircuitTooLargeError:
            return f" (its part {part!r} alone is too large)"
        except InfeasibleError:
            continue
    if not sizes:
        return ""
    nodes, name = max(sizes)
    return f" (of its parts, {name} costs most on its own: {nodes} nodes)"
