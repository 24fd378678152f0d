"""Constraint -> circuit: the registry of compilers, the cache, and the errors.

A compiler is a function ``(constraint, n, max_nodes) -> Circuit`` registered for a *type* of constraint::

    @cr.register_compiler(Parity)
    def compile_parity(constraint: Parity, n: int, max_nodes: int) -> cr.Circuit: ...

The core imports no compiler. The entry-point group ``circuitroute.compilers`` names modules; they are
imported when a type is met that nothing registered handles yet, and register themselves on import.
"""

from __future__ import annotations

import importlib
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, TypeAlias, TypeVar

from circuitroute._validate import int_at_least
from circuitroute.constraints import Constraint
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

ENTRY_POINT_GROUP = "circuitroute.compilers"
# The compilers that ship with the library, for checkouts that were never installed (no entry points there).
BUILT_IN_MODULE = "circuitroute_compilers"
CACHE_SIZE = 256

_compilers: dict[type, Compiler] = {}
_predictors: dict[Compiler, Predictor] = {}
_cache: OrderedDict[tuple[Constraint, int], Circuit] = OrderedDict()
_lock = threading.RLock()
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


def compile(constraint: Constraint, n: int, max_nodes: int = 1_000_000) -> Circuit:
    """Compile ``constraint`` over ``n`` variables to a :class:`Circuit`; memoised on (constraint, n).

    Args:
        constraint: what is allowed.
        n: number of variables (experts), at least 1.
        max_nodes: the largest circuit to build, in nodes (values held per token).

    Raises:
        InfeasibleError: no subset of ``n`` variables satisfies the constraint.
        CircuitTooLargeError: the circuit needs more than ``max_nodes`` nodes.
        UnsupportedConstraintError: no compiler is registered for the constraint's type.
    """
    n = int_at_least("n", n, 1)
    max_nodes = int_at_least("max_nodes", max_nodes, 1)
    _check_constraint(constraint)
    with _lock:
        circuit = _lookup(constraint, n)
        if circuit is None:
            circuit = _compiler_for(constraint)(constraint, n, max_nodes)
            _remember(constraint, n, circuit)
    if circuit.num_nodes > max_nodes:
        raise CircuitTooLargeError(
            f"{constraint!r} over {n} variables has {circuit.num_nodes} nodes, more than max_nodes={max_nodes}, "
            f"with width {circuit.width}; raise max_nodes"
        )
    return circuit


def predict(constraint: Constraint, n: int) -> Prediction | None:
    """The size of a constraint's circuit over ``n`` variables, estimated without building; None if its compiler cannot.

    Raises:
        InfeasibleError: no subset of ``n`` variables satisfies the constraint, if that can be seen without building.
        UnsupportedConstraintError: no compiler is registered for the constraint's type.
    """
    n = int_at_least("n", n, 1)
    _check_constraint(constraint)
    with _lock:
        predictor = _predictors.get(_compiler_for(constraint))
    return None if predictor is None else predictor(constraint, n)


def _check_constraint(constraint: object) -> None:
    if not isinstance(constraint, Constraint):
        raise UnsupportedConstraintError(
            f"constraint={constraint!r}: {type(constraint).__name__} is not a constraint; "
            "pass one such as cr.Exactly(8), or subclass cr.Constraint"
        )


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
