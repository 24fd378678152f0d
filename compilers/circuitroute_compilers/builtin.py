"""The built-in compiler: any constraint that is built in, defines a machine, or is composed of such.

The path of a constraint through this package, a module per step::

    lowering   constraint -> Plan    sizes checked, counts of one scope joined; rules: formulas gathered
    trees      scopes -> Vtrees      a few trees over the variables that keep scopes together
    plans      Plan, order -> Term   a state machine that knows its scope (terms; diagram and bdd: formulas)
    profile    Term, Vtree -> sizes  the states on each block, counted without building
    forecast   Term, Vtree -> merges of a user's machine, from samples: a state per subset is refused
    choice     the Vtree, and with it the Term, of smallest predicted cost
    graph      Term, Vtree -> Graph  states merged from the variables up, and written as arrays

A constraint that comes down to one count over all variables takes the same path as that count: its circuit is the
balanced tree of truncated convolutions of counts (Poisson-binomial polynomials) and, marked with its allowed counts,
runs on the fused ``subset`` engines. These need no graph, so that it is built when something asks for it; its size is
known at once (``counted``). Clauses that no narrow order of variables fits take another path (``clauses``).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import combinations, islice

from circuitroute import Circuit, CircuitTooLargeError, Constraint, InfeasibleError, register_compiler
from circuitroute.circuit import DeferredGraph, Graph
from circuitroute.compilation import SHOWN, Prediction
from circuitroute.constraints import And, Cost, Count, CountIn, Logic, Over, shown
from circuitroute.deadline import OutOfTimeError, note
from circuitroute_compilers.choice import Choice, choose, is_foreign, seconds_to_build
from circuitroute_compilers.clauses import decided, expected_states, wide_clauses
from circuitroute_compilers.counted import CountSize
from circuitroute_compilers.forecast import explosion
from circuitroute_compilers.graph import UnhashableStateError, build_graph, most_states
from circuitroute_compilers.lowering import Capped, flattened, joined, lower, only_counts
from circuitroute_compilers.plans import simple_parts
from circuitroute_compilers.terms import Machine, check_associative
from circuitroute_compilers.trees import MAX_VARIABLES

# The limit that predictions are made for: that of circuitroute.compile.
USUAL_NODES = 1_000_000
# How many combinations of parts are tried to name the smallest contradiction.
MAX_BLAMED = 200


def predict_builtin(constraint: Constraint, n: int) -> Prediction:
    """What :func:`compile_builtin` will build; see :func:`circuitroute.compilation.predict`."""
    simple = _simplest(constraint, n, only_counts(constraint, n))
    clauses = wide_clauses(constraint, n)
    if clauses is not None:
        states, widest = expected_states(clauses)
        return Prediction(widest, 2 * states, 2 * states, seconds_to_build(2 * states, 2 * states), constraint)
    predicted = _chosen(simple, n, USUAL_NODES).prediction
    return replace(predicted, culprit=constraint) if predicted.culprit == simple else predicted


@register_compiler(Constraint, predict=predict_builtin)
def compile_builtin(constraint: Constraint, n: int, max_nodes: int) -> Circuit:
    """Compile a constraint over ``n`` variables; see :func:`circuitroute.compile` for the errors."""
    counts = only_counts(constraint, n)
    simple = _simplest(constraint, n, counts)
    clauses = wide_clauses(constraint, n)
    if clauses is not None:
        graph = decided(clauses, n, max_nodes, f"{shown(constraint, SHOWN)} over {n} variables")
        if graph is None:
            raise InfeasibleError(f"no subset of {n} variables satisfies {shown(constraint, SHOWN)}")
        return Circuit(graph, constraint)
    if counts is not None:
        size = CountSize(counts, n, Capped(CountIn(counts), counts, n).cap)
        needs = _count_needs(size, max_nodes)
        if needs is not None:
            raise _too_large(simple, n, max_nodes, size.prediction(simple), needs)
        if not size.mergeable(max_nodes):
            needs = f"{size.largest_table} pairs of states at one tree node"
            raise _too_large(simple, n, max_nodes, size.prediction(simple), needs)
        build = partial(_graph, simple, n, max_nodes)
        return Circuit(DeferredGraph(n, size.nodes, size.edges, build), constraint, counts)
    try:
        return Circuit(_graph(simple, n, max_nodes), constraint, counts)
    except InfeasibleError as error:
        raise InfeasibleError(_blame(constraint, n) or str(error)) from None


def _count_needs(size: CountSize, max_nodes: int) -> str | None:
    """What is too large about a count's circuit, as building would say it; None if it may be built."""
    if size.certain > most_states(max_nodes, size.n):
        return f"at least {size.certain} reachable states"
    return size.excess(max_nodes) if size.mergeable(max_nodes) else None


def _graph(constraint: Constraint, n: int, max_nodes: int) -> Graph:
    choice = _chosen(constraint, n, max_nodes)
    if choice.certain > most_states(max_nodes, n):
        raise _too_large(constraint, n, max_nodes, choice.prediction, f"at least {choice.certain} reachable states")
    foreign = [part for part in simple_parts(choice.plan) if isinstance(part, Machine) and is_foreign(part)]
    exploding = explosion(choice.term, choice.tree, max_nodes) if foreign else None
    if exploding is not None:
        raise _too_large(
            constraint,
            n,
            max_nodes,
            choice.prediction,
            f"about {_about(exploding.merges)} merges, since its machine keeps a state for every subset of "
            f"{exploding.variables} variables",
        )
    note(lambda: f"building its circuit; {_most(choice.prediction)}")
    try:
        graph = build_graph(constraint, choice.term, choice.tree, max_nodes)
    except OutOfTimeError:
        raise
    except CircuitTooLargeError as error:
        raise _too_large(constraint, n, max_nodes, choice.prediction, str(error)) from None
    for part in foreign:
        check_associative(part)
    return graph


def _chosen(constraint: Constraint, n: int, max_nodes: int) -> Choice:
    if n > MAX_VARIABLES:
        raise CircuitTooLargeError(
            f"{shown(constraint, SHOWN)} over {n} variables: only counts over all variables are compiled for more than "
            f"{MAX_VARIABLES}; compile other rules over fewer"
        )
    try:
        return choose(constraint, lower(constraint, tuple(range(n))), n, max_nodes)
    except UnhashableStateError as error:
        raise TypeError(f"{constraint!r}: states must be hashable, such as integers and tuples ({error})") from None


def _simplest(constraint: Constraint, n: int, counts: list[int] | None) -> Constraint:
    """A constraint that amounts to one count over all variables as that count; any other unchanged."""
    if counts == []:
        raise InfeasibleError(f"{constraint!r} over {n} variables: none of the counts 0 to {n} is allowed")
    return constraint if counts is None or isinstance(constraint, Count) else CountIn(counts)


# ---------------------------------------------------------------------------------------------- why it cannot be built


def _blame(constraint: Constraint, n: int) -> str | None:
    """What contradicts what, if that is found in the time that is left."""
    try:
        return _contradiction(constraint, n)
    except OutOfTimeError:
        return None


def _contradiction(constraint: Constraint, n: int) -> str | None:
    """A sentence that names the smallest set of contradictory parts of a conjunction; None if none is found."""
    parts = joined(flattened(constraint, n), n)
    tried = (some for size in range(1, len(parts)) for some in combinations(parts, size))
    for some in islice(tried, MAX_BLAMED):
        if _is_impossible(And(some), n):
            named = " and ".join(map(repr, some))
            verb = "is impossible" if len(some) == 1 else "contradict each other"
            return f"{named} {verb} over {n} variables, so {shown(constraint, SHOWN)} has no solution"
    return None


def _is_impossible(constraint: Constraint, n: int) -> bool:
    """Whether nothing satisfies a constraint; False, too, where finding out takes too large a circuit."""
    try:
        _graph(constraint, n, USUAL_NODES)
    except InfeasibleError:
        return True
    except OutOfTimeError:
        raise
    except CircuitTooLargeError:
        pass
    return False


def _too_large(
    constraint: Constraint, n: int, max_nodes: int, predicted: Prediction, needs: str
) -> CircuitTooLargeError:
    """The error for a circuit over the limits: what it would take, which part costs most, and what would help."""
    return CircuitTooLargeError(
        f"{shown(constraint, SHOWN)} over {n} variables needs {needs}, more than max_nodes={max_nodes} allows; "
        f"estimated without building: width {_about(predicted.width)}, at most {_about(predicted.nodes)} nodes and "
        f"{_about(predicted.edges)} elements, about {predicted.seconds:.2g} seconds. {_most(predicted)}, "
        "or raise max_nodes"
    )


def _most(predicted: Prediction) -> str:
    return f"{shown(predicted.culprit, SHOWN)} costs most: {_remedy(predicted.culprit)}"


def _about(number: int) -> str:
    return str(number) if number < 10**7 else f"10^{int(number.bit_length() * 0.30103)}"


def _remedy(culprit: Constraint) -> str:
    inner = culprit.constraint if isinstance(culprit, Over) else culprit
    if isinstance(inner, Count):
        return "lower its largest count, or give it a scope that lies inside or apart from those of the other parts"
    if isinstance(inner, Cost):
        return "lower its limit, use coarser costs, or give it a smaller scope"
    if isinstance(inner, Logic):
        return "split it into rules over fewer variables"
    return "give its machine fewer states, or a scope that lies inside or apart from those of the other parts"
