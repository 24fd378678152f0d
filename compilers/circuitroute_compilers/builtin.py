"""The built-in compiler: any constraint that is built in, defines a machine, or is composed of such.

A constraint that comes down to one count over all variables gets the balanced tree of truncated convolutions of counts
(Poisson-binomial polynomials) and, marked with its allowed counts, runs on the fused ``subset`` engines. Everything
else is lowered to terms and merged along a tree that keeps its scopes together.
"""

from __future__ import annotations

from dataclasses import replace

from circuitroute import Circuit, CircuitTooLargeError, Constraint, InfeasibleError, register_compiler
from circuitroute.circuit import Graph
from circuitroute.compilation import Prediction
from circuitroute.constraints import And, Count, CountIn, Not, Or
from circuitroute_compilers.associativity import check_associative
from circuitroute_compilers.blame import contradiction, too_large
from circuitroute_compilers.lowering import allowed_counts, count_of, lower
from circuitroute_compilers.machine import UnhashableStateError, build_graph, most_states
from circuitroute_compilers.plans import simple_parts
from circuitroute_compilers.prediction import Choice, choose, is_foreign
from circuitroute_compilers.terms import Machine

# The limit that predictions are made for: that of circuitroute.compile.
USUAL_NODES = 1_000_000


def predict_builtin(constraint: Constraint, n: int) -> Prediction:
    """What :func:`compile_builtin` will build; see :func:`circuitroute.compilation.predict`."""
    simple = _simplest(constraint, n, _only_counts(constraint, n))
    predicted = _chosen(simple, n, USUAL_NODES).prediction
    return replace(predicted, culprit=constraint) if predicted.culprit == simple else predicted


@register_compiler(Constraint, predict=predict_builtin)
def compile_builtin(constraint: Constraint, n: int, max_nodes: int) -> Circuit:
    """Compile a constraint over ``n`` variables; see :func:`circuitroute.compile` for the errors."""
    counts = _only_counts(constraint, n)
    simple = _simplest(constraint, n, counts)
    try:
        return Circuit(_graph(simple, n, max_nodes), constraint, counts)
    except InfeasibleError as error:
        raise InfeasibleError(contradiction(constraint, n, _is_feasible) or str(error)) from None


def _graph(constraint: Constraint, n: int, max_nodes: int) -> Graph:
    choice = _chosen(constraint, n, max_nodes)
    if choice.certain > most_states(max_nodes, n):
        raise too_large(constraint, n, max_nodes, choice, f"at least {choice.certain} reachable states")
    try:
        graph = build_graph(constraint, choice.term, choice.tree, max_nodes)
    except CircuitTooLargeError as error:
        raise too_large(constraint, n, max_nodes, choice, str(error)) from None
    for part in simple_parts(choice.plan):
        if isinstance(part, Machine) and is_foreign(part):
            check_associative(part)
    return graph


def _chosen(constraint: Constraint, n: int, max_nodes: int) -> Choice:
    try:
        return choose(constraint, lower(constraint, tuple(range(n))), n, max_nodes)
    except UnhashableStateError as error:
        raise TypeError(f"{constraint!r}: states must be hashable, such as integers and tuples ({error})") from None


def _is_feasible(constraint: Constraint, n: int) -> bool | None:
    """Whether any subset satisfies a constraint; None if finding out takes too large a circuit."""
    try:
        _graph(constraint, n, USUAL_NODES)
    except InfeasibleError:
        return False
    except CircuitTooLargeError:
        return None
    return True


def _simplest(constraint: Constraint, n: int, counts: list[int] | None) -> Constraint:
    """One count over all variables, however it was said, as such; anything else as it is."""
    if counts == []:
        raise InfeasibleError(f"{constraint!r} over {n} variables: none of the counts 0 to {n} is allowed")
    return constraint if counts is None or isinstance(constraint, Count) else CountIn(counts)


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
