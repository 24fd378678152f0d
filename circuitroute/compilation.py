"""Constraint -> circuit: the registry of compilers, the cache, and the errors.

A compiler is a function ``(constraint, n, max_nodes) -> Circuit`` registered for a *type* of constraint::

    @cr.register_compiler(Parity)
    def compile_parity(constraint: Parity, n: int, max_nodes: int) -> cr.Circuit: ...

The core imports no compiler. The entry-point group ``circuitroute.compilers`` names modules; they are
imported when a type is met that nothing registered handles yet, and register themselves on import.

Compiling is under a budget of CPU seconds (:mod:`circuitroute.deadline`), and holds up only those who want the same
circuit: the cache is locked while it is looked at, and each constraint by itself while it is compiled.
"""

from __future__ import annotations

import importlib
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import entry_points
from typing import Any, TypeAlias, TypeVar

from circuitroute._validate import int_at_least
from circuitroute.constraints import Constraint, shown
from circuitroute.deadline import DEFAULT_SECONDS, within
from circuitroute.errors import CircuitTooLargeError, UnsupportedConstraintError
from circuitroute.inference.circuit import Circuit


@dataclass(frozen=True)
class Prediction:
    """The size of a constraint's circuit and the time to compile it, estimated without building.

    Attributes:
        width: the most states at one node of the tree of variables.
        nodes, edges: size of the circuit; usually an upper bound.
        seconds: time to build it, roughly.
        culprit: the part that costs most; the constraint itself if it has no parts.
    """

    width: int
    nodes: int
    edges: int
    seconds: float
    culprit: Constraint


Compiler: TypeAlias = Callable[[Any, int, int], Circuit]
Predictor: TypeAlias = Callable[[Any, int], Prediction]
C = TypeVar("C", bound=Compiler)


@dataclass
class _Turn:
    """The lock of one constraint that is being compiled, and how many threads hold it or wait for it."""

    lock: threading.RLock
    wanted: int = 0


ENTRY_POINT_GROUP = "circuitroute.compilers"
# The compilers that ship with the library, for checkouts that were never installed (no entry points there).
BUILT_IN_MODULE = "circuitroute_compilers"
CACHE_SIZE = 256
# What a message shows of a constraint whose text may be long.
SHOWN = 400
_REMEDY = (
    "give rules fewer variables or scopes that lie inside or apart from one another, and machines fewer states and a "
    "faster merge"
)

_compilers: dict[type, Compiler] = {}
_predictors: dict[Compiler, Predictor] = {}
_cache: OrderedDict[tuple[Constraint, int], Circuit] = OrderedDict()
_lock = threading.RLock()  # of all of these
_busy: dict[tuple[Constraint, int], _Turn] = {}
_loaded = False
_failed_modules: dict[str, str] = {}


def register_compiler(constraint_type: type[Constraint], predict: Predictor | None = None) -> Callable[[C], C]:
    """Decorator: the function compiles constraints of ``constraint_type`` and of its subclasses.

    The function is called as ``function(constraint, n, max_nodes)`` and returns a :class:`Circuit`. The most
    specific registered type in the constraint's method resolution order wins. ``predict``, if there is one, is called
    as ``predict(constraint, n)`` and returns a :class:`Prediction`.

    Raises:
        TypeError: ``constraint_type`` is not a subclass of ``cr.Constraint``.
        ValueError: that very type has a compiler already.
    """
    if not (isinstance(constraint_type, type) and issubclass(constraint_type, Constraint)):
        raise TypeError(f"constraint_type={constraint_type!r}: expected a subclass of circuitroute.Constraint")

    def register(function: C) -> C:
        with _lock:
            if constraint_type in _compilers:
                known = _compilers[constraint_type]
                raise ValueError(
                    f"{constraint_type.__qualname__} already has a compiler, {known.__module__}.{known.__qualname__}: "
                    f"register this one for a subclass"
                )
            _compilers[constraint_type] = function
            if predict is not None:
                _predictors[function] = predict
        return function

    return register


def compile(
    constraint: Constraint | Circuit,
    n: int,
    max_nodes: int = 1_000_000,
    max_seconds: float | None = DEFAULT_SECONDS,
) -> Circuit:
    """Compile ``constraint`` over ``n`` variables to a :class:`Circuit`; memoised on (constraint, n).

    Args:
        constraint: what is allowed; or a circuit over ``n`` variables, such as a loaded one, which is handed back: what
            takes a constraint takes a circuit in its place.
        n: number of variables (experts), at least 1.
        max_nodes: the largest circuit to build, in nodes (values held per token).
        max_seconds: how long compiling may take, in CPU seconds of this thread; None for no limit. The circuit does not
            depend on it. A constraint's own methods are not interrupted: time is looked at between their calls. A
            compiler that compiles parts is under the budget of the outermost call (:mod:`circuitroute.deadline`).

    Raises:
        InfeasibleError: no subset of ``n`` variables satisfies the constraint.
        CircuitTooLargeError: the circuit needs more than ``max_nodes`` nodes or ``max_seconds`` seconds, or the
            constraint is nested deeper than Python calls functions.
        UnsupportedConstraintError: no compiler is registered for the constraint's type.
        ValueError: a circuit over another number of variables.
    """
    n = int_at_least("n", n, 1)
    max_nodes = int_at_least("max_nodes", max_nodes, 1)
    if isinstance(constraint, Circuit):
        return _checked(constraint, n, max_nodes)
    _check_constraint(constraint)
    with within(max_seconds, partial(_doing, "compiling", constraint, n), _REMEDY), _not_too_deep(n):
        circuit = _found(constraint, n) or _compiled(constraint, n, max_nodes)
    if circuit.num_nodes > max_nodes:
        raise CircuitTooLargeError(
            f"{constraint!r} over {n} variables has {circuit.num_nodes} nodes, more than max_nodes={max_nodes}, "
            f"with width {circuit.width}; raise max_nodes"
        )
    return circuit


def _checked(circuit: Circuit, n: int, max_nodes: int | None = None) -> Circuit:
    """A circuit that was given in the place of a constraint over ``n`` variables."""
    if circuit.n != n:
        raise ValueError(
            f"constraint={circuit!r}: it is over {circuit.n} variables, and there are to be n={n}; give a circuit over "
            f"{n}, or a constraint"
        )
    if max_nodes is not None and circuit.num_nodes > max_nodes:
        raise CircuitTooLargeError(
            f"{circuit!r} has {circuit.num_nodes} nodes, more than max_nodes={max_nodes}, with width {circuit.width}; "
            "raise max_nodes"
        )
    return circuit


def _compiled(constraint: Constraint, n: int, max_nodes: int) -> Circuit:
    """The circuit, by the first thread that wants it; the others wait, and look again."""
    with _turn(constraint, n):
        circuit = _found(constraint, n)
        if circuit is None:
            circuit = _compiler(constraint)(constraint, n, max_nodes)
            with _lock:
                _remember(constraint, n, circuit)
    return circuit


@contextmanager
def _turn(constraint: Constraint, n: int) -> Iterator[None]:
    """The lock of one constraint, kept while anyone wants it."""
    with _lock:
        turn = _busy.setdefault((constraint, n), _Turn(threading.RLock()))
        turn.wanted += 1
    try:
        with turn.lock:
            yield
    finally:
        with _lock:
            turn.wanted -= 1
            if not turn.wanted:
                del _busy[constraint, n]


def _doing(what: str, constraint: Constraint, n: int) -> str:
    return f"{what} {shown(constraint, SHOWN)} over {n} variables"


@contextmanager
def _not_too_deep(n: int) -> Iterator[None]:
    try:
        yield
    except RecursionError:
        raise CircuitTooLargeError(
            f"the constraint over {n} variables is nested, or its methods recurse, deeper than Python calls functions: "
            "write it flatter, a & b & c rather than a & ~(~b | ~c), or as one cr.Logic, which may be nested deeply"
        ) from None


def predict(constraint: Constraint | Circuit, n: int, max_seconds: float | None = DEFAULT_SECONDS) -> Prediction | None:
    """The size of a constraint's circuit over ``n`` variables, estimated without building; None if its compiler cannot,
    and where it is a circuit already.

    Args:
        constraint: what is allowed.
        n: number of variables, at least 1.
        max_seconds: how long predicting may take, in CPU seconds of this thread; None for no limit.

    Raises:
        CircuitTooLargeError: predicting takes more than ``max_seconds`` seconds, or a formula in it needs too large a
            decision diagram.
        InfeasibleError: no subset of ``n`` variables satisfies the constraint, if that can be seen without building.
        UnsupportedConstraintError: no compiler is registered for the constraint's type.
        ValueError: a circuit over another number of variables.
    """
    n = int_at_least("n", n, 1)
    if isinstance(constraint, Circuit):
        _checked(constraint, n)
        return None
    _check_constraint(constraint)
    with within(max_seconds, partial(_doing, "predicting the size of", constraint, n), _REMEDY), _not_too_deep(n):
        predictor = _predictors.get(_compiler(constraint))
        return None if predictor is None else predictor(constraint, n)


def _check_constraint(constraint: object) -> None:
    if not isinstance(constraint, Constraint):
        raise UnsupportedConstraintError(
            f"constraint={constraint!r}: {type(constraint).__name__} is not a constraint; "
            "pass one such as cr.Exactly(8), or subclass cr.Constraint"
        )


def _found(constraint: Constraint, n: int) -> Circuit | None:
    with _lock:
        return _lookup(constraint, n)


def _compiler(constraint: Constraint) -> Compiler:
    with _lock:
        return _compiler_for(constraint)


def _lookup(constraint: Constraint, n: int) -> Circuit | None:
    try:
        circuit = _cache.get((constraint, n))
    except TypeError as error:
        raise TypeError(
            f"{type(constraint).__qualname__} is not hashable ({error}); circuits are memoised on the constraint: "
            "make it a frozen dataclass with hashable fields"
        ) from None
    if circuit is not None:
        _cache.move_to_end((constraint, n))
    return circuit


def _remember(constraint: Constraint, n: int, circuit: Circuit) -> None:
    _cache[constraint, n] = circuit
    while len(_cache) > CACHE_SIZE:
        _cache.popitem(last=False)


def clear_cache() -> None:
    """Forget all compiled circuits."""
    with _lock:
        _cache.clear()


def _compiler_for(constraint: Constraint) -> Compiler:
    found = _registered(type(constraint))
    if found is None or found is _compilers.get(Constraint):
        _load_plugins()  # one of them may know this type, or know it better than the general machine
        found = _registered(type(constraint))
    if found is None:
        raise unsupported(constraint)
    return found


def _registered(constraint_type: type) -> Compiler | None:
    return next((_compilers[base] for base in constraint_type.__mro__ if base in _compilers), None)


def _load_plugins() -> None:
    global _loaded
    if _loaded:
        return
    _loaded = True
    modules = [BUILT_IN_MODULE, *(entry.module for entry in entry_points(group=ENTRY_POINT_GROUP))]
    for module in dict.fromkeys(modules):
        try:
            importlib.import_module(module)
        except Exception as error:  # a broken plug-in must not take the others down; it is named when missed
            _failed_modules[module] = f"{type(error).__name__}: {error}"
            warnings.warn(f"circuitroute plug-in {module} could not be imported: {error!r}", stacklevel=4)


def unsupported(constraint: Constraint) -> UnsupportedConstraintError:
    """The error for a constraint that cannot be compiled, or not as part of another: says exactly what to write."""
    name = type(constraint).__qualname__
    if any(base in _compilers for base in type(constraint).__mro__ if base is not Constraint):
        return UnsupportedConstraintError(
            f"{name} has a compiler but no state machine, so it cannot be part of another constraint: give {name} "
            "the three methods leaf(var), merge(left, right) and accepts(state) of cr.Constraint"
        )
    lines = [
        f"no compiler for {name} (from {type(constraint).__module__}).",
        f"Either give {name} the three methods leaf(var), merge(left, right) and accepts(state) of cr.Constraint,",
        "or register one in a module of yours:",
        f"    @cr.register_compiler({name})",
        f"    def compile_{name.lower()}(constraint, n, max_nodes): ...  # returns a cr.Circuit",
        f'and name that module in the entry-point group "{ENTRY_POINT_GROUP}" or import it first.',
    ]
    lines += [f"The plug-in {module} could not be imported: {why}" for module, why in _failed_modules.items()]
    return UnsupportedConstraintError("\n".join(lines))
