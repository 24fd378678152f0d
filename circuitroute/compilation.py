"""Constraint -> circuit: the registry of compilers, the cache, and the errors.

A compiler is a function ``(constraint, n, max_nodes) -> Circuit`` registered for a *type* of constraint::

    @cr.register_compiler(Parity)
    def compile_parity(constraint: Parity, n: int, max_nodes: int) -> cr.Circuit: ...

The core imports no compiler. The entry-point group ``circuitroute.compilers`` names modules; they are
imported when a type is met that nothing registered handles yet, and register themselves on import.

A compiler may have a name, ``@cr.register_compiler(cr.CNF, name="mine")``, and is then used by those who ask for it:
``cr.compile(constraint, n, compiler="mine")``.

Compiling is under a budget of CPU seconds (:mod:`circuitroute.deadline`), and holds up only those who want the same
circuit: the cache is locked while it is looked at, and each constraint by itself while it is compiled.
"""

from __future__ import annotations

import importlib
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import entry_points
from typing import Any, TypeAlias, TypeVar

from circuitroute._validate import int_at_least, plain_word
from circuitroute.constraints import Constraint, known_variables, shown
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
# A constraint, its number of variables, and the name of the compiler, None where the type of the constraint decides.
_Key: TypeAlias = tuple[Constraint, int, str | None]


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
_named: dict[str, dict[type, Compiler]] = {}
_predictors: dict[Compiler, Predictor] = {}
_cache: OrderedDict[_Key, Circuit] = OrderedDict()
_lock = threading.RLock()  # of all of these
_busy: dict[_Key, _Turn] = {}
_loaded = False
_failed_modules: dict[str, str] = {}


def register_compiler(
    constraint_type: type[Constraint], predict: Predictor | None = None, *, name: str | None = None
) -> Callable[[C], C]:
    """Decorator: the function compiles constraints of ``constraint_type`` and of its subclasses.

    The function is called as ``function(constraint, n, max_nodes)`` and returns a :class:`Circuit`. The most
    specific registered type in the constraint's method resolution order wins. ``predict``, if there is one, is called
    as ``predict(constraint, n)`` and returns a :class:`Prediction`. With a ``name``, the function is used only where
    :func:`compile` is asked for the compiler of that name; several types may have compilers of one name.

    Raises:
        TypeError: ``constraint_type`` is not a subclass of ``cr.Constraint``, or ``name`` is not a text.
        ValueError: that very type has a compiler already, of that name or without; an empty name.
    """
    if not (isinstance(constraint_type, type) and issubclass(constraint_type, Constraint)):
        raise TypeError(f"constraint_type={constraint_type!r}: expected a subclass of circuitroute.Constraint")
    name = _as_name("name", name)

    def register(function: C) -> C:
        with _lock:
            compilers = _compilers if name is None else _named.setdefault(name, {})
            if constraint_type in compilers:
                known = compilers[constraint_type]
                raise ValueError(
                    f"{constraint_type.__qualname__} already has a compiler{'' if name is None else f' {name!r}'}, "
                    f"{known.__module__}.{known.__qualname__}: register this one for a subclass"
                )
            compilers[constraint_type] = function
            if predict is not None:
                _predictors[function] = predict
        return function

    return register


def _as_name(argument: str, name: object) -> str | None:
    if name is not None and not isinstance(name, str):
        raise TypeError(f"{argument}={name!r}: expected the name of a compiler or None, got {type(name).__name__}")
    if name == "":
        raise ValueError(f"{argument}='': give a name, or None")
    return plain_word(name)


def compile(
    constraint: Constraint | Circuit,
    n: int | None = None,
    max_nodes: int = 1_000_000,
    max_seconds: float | None = DEFAULT_SECONDS,
    compiler: str | None = None,
) -> Circuit:
    """Compile ``constraint`` over ``n`` variables to a :class:`Circuit`; memoised on (constraint, n, compiler).

    Args:
        constraint: what is allowed; or a circuit over ``n`` variables, such as a loaded one, which is handed back: what
            takes a constraint takes a circuit in its place.
        n: number of variables (experts), at least 1. May be left out where the constraint says it: clauses
            (:class:`circuitroute.CNF`), costs, given groups, layers, what is composed with these, and a circuit.
        max_nodes: the largest circuit to build, in nodes (values held per token).
        max_seconds: how long compiling may take, in CPU seconds of this thread; None for no limit. The circuit does not
            depend on it. A constraint's own methods are not interrupted: time is looked at between their calls. A
            compiler that compiles parts is under the budget of the outermost call (:mod:`circuitroute.deadline`).
        compiler: the name of a compiler: "sdd" (PySDD, the extra ``sdd``: sentential decision diagrams of clauses,
            rules, counts and what is composed of them), or one that :func:`register_compiler` was given; None: the one
            for the constraint's type.

    Raises:
        ImportError: the compiler needs a package that is not installed; names the extra.
        InfeasibleError: no subset of ``n`` variables satisfies the constraint.
        CircuitTooLargeError: the circuit needs more than ``max_nodes`` nodes or ``max_seconds`` seconds, or the
            constraint is nested deeper than Python calls functions.
        TypeError: no ``n``, and the constraint does not say it.
        UnsupportedConstraintError: no compiler, or none of that name, is registered for the constraint's type.
        ValueError: a circuit over another number of variables; a compiler that does not exist.
    """
    n = None if n is None else int_at_least("n", n, 1)
    max_nodes = int_at_least("max_nodes", max_nodes, 1)
    compiler = _known_name(compiler)
    if isinstance(constraint, Circuit):
        return _checked(constraint, constraint.n if n is None else n, max_nodes)
    _check_constraint(constraint)
    n = _number_of_variables(constraint) if n is None else n
    with within(max_seconds, partial(_doing, "compiling", constraint, n), _REMEDY), _not_too_deep(n):
        key = constraint, n, compiler
        circuit = _found(key) or _compiled(key, max_nodes)
    if circuit.num_nodes > max_nodes:
        raise CircuitTooLargeError(
            f"{constraint!r} over {n} variables has {circuit.num_nodes} nodes, more than max_nodes={max_nodes}, "
            f"with width {circuit.width}; raise max_nodes"
        )
    return circuit


def _known_name(compiler: object) -> str | None:
    name = _as_name("compiler", compiler)
    if name is None:
        return None
    with _lock:
        if name not in _named:
            _load_plugins()
        if name not in _named:
            known = ", ".join(map(repr, sorted(_named))) or "none"
            failed = "".join(
                f"; the plug-in {module} could not be imported: {why}" for module, why in _failed_modules.items()
            )
            raise ValueError(
                f"compiler={name!r}: there is no compiler of that name; the named ones are {known}{failed}"
            )
    return name


def _number_of_variables(constraint: Constraint) -> int:
    """What ``n`` is where it was left out."""
    n = known_variables(constraint)
    if n is None:
        raise TypeError(
            f"n=None: {shown(constraint, SHOWN)} does not say how many variables there are; give n, their number"
        )
    if n < 1:
        raise ValueError(
            f"n={n}: {shown(constraint, SHOWN)} is over no variables, and a circuit has one at least; give n"
        )
    return n


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


def _compiled(key: _Key, max_nodes: int) -> Circuit:
    """The circuit, by the first thread that wants it; the others wait, and look again."""
    constraint, n, name = key
    with _turn(key):
        circuit = _found(key)
        if circuit is None:
            circuit = _compiler(constraint, name)(constraint, n, max_nodes)
            with _lock:
                _remember(key, circuit)
    return circuit


@contextmanager
def _turn(key: _Key) -> Iterator[None]:
    """The lock of one constraint, kept while anyone wants it."""
    with _lock:
        turn = _busy.setdefault(key, _Turn(threading.RLock()))
        turn.wanted += 1
    try:
        with turn.lock:
            yield
    finally:
        with _lock:
            turn.wanted -= 1
            if not turn.wanted:
                del _busy[key]


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


def _found(key: _Key) -> Circuit | None:
    with _lock:
        return _lookup(key)


def _compiler(constraint: Constraint, name: str | None = None) -> Compiler:
    with _lock:
        return _compiler_for(constraint, name)


def _lookup(key: _Key) -> Circuit | None:
    try:
        circuit = _cache.get(key)
    except TypeError as error:
        raise TypeError(
            f"{type(key[0]).__qualname__} is not hashable ({error}); circuits are memoised on the constraint: "
            "make it a frozen dataclass with hashable fields"
        ) from None
    if circuit is not None:
        _cache.move_to_end(key)
    return circuit


def _remember(key: _Key, circuit: Circuit) -> None:
    _cache[key] = circuit
    while len(_cache) > CACHE_SIZE:
        _cache.popitem(last=False)


def clear_cache() -> None:
    """Forget all compiled circuits."""
    with _lock:
        _cache.clear()


def _compiler_for(constraint: Constraint, name: str | None) -> Compiler:
    if name is not None:
        return _named_for(constraint, name)
    found = _registered(type(constraint), _compilers)
    if found is None or found is _compilers.get(Constraint):
        _load_plugins()  # one of them may know this type, or know it better than the general machine
        found = _registered(type(constraint), _compilers)
    if found is None:
        raise unsupported(constraint)
    return found


def _named_for(constraint: Constraint, name: str) -> Compiler:
    """The compiler of a name for a constraint's type; plug-ins are loaded, since one may know the type better."""
    _load_plugins()
    compilers = _named[name]
    found = _registered(type(constraint), compilers)
    if found is None:
        known = ", ".join(sorted(kind.__qualname__ for kind in compilers))
        raise UnsupportedConstraintError(
            f"compiler={name!r} does not compile {type(constraint).__qualname__}, only {known}; leave out compiler, or "
            f"register one: @cr.register_compiler({type(constraint).__qualname__}, name={name!r})"
        )
    return found


def _registered(constraint_type: type, compilers: Mapping[type, Compiler]) -> Compiler | None:
    return next((compilers[base] for base in constraint_type.__mro__ if base in compilers), None)


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
