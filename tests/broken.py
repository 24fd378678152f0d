"""Constraints, compilers and circuits that are wrong in one way each, and how to run a contract suite on them."""

import inspect
from dataclasses import dataclass

import numpy as np
import torch

import circuitroute as cr
from circuitroute.circuit import Graph, NodeKind
from circuitroute.testing import Case, CompilerContract
from tests.test_compile import Parity

CHECKS = sorted(name for name in dir(CompilerContract) if name.startswith("test_"))


@dataclass(frozen=True)
class Compiled(cr.Constraint):
    """Allows every subset; its compilers below are wrong in one way each."""


def contract(*some, **attributes):
    return type("Contract", (CompilerContract,), {"cases": lambda self: some, **attributes})()


def failures(suite):
    """The checks that fail, and what they say; run as pytest would, without pytest."""
    found = {}
    for name in CHECKS:
        check = getattr(suite, name)
        for case in suite.gathered():
            if "any_case" not in inspect.signature(check).parameters and not case.allowed.any():
                continue
            try:
                check(case)
            except AssertionError as error:
                found.setdefault(name, str(error))
    return found


def literals(n, extra=()):
    """A chain of products of (absent or present) per variable; ``extra`` literals are added again to the first."""
    kind, variable, first, left, right = [NodeKind.TRUE], [-1], [0, 0], [], []

    def add(node, v, elements=()):
        kind.append(node)
        variable.append(v)
        left.extend(a for a, _ in elements)
        right.extend(b for _, b in elements)
        first.append(len(left))
        return len(kind) - 1

    below = 0
    for v in range(n):
        both = [add(NodeKind.ABSENT, v), add(NodeKind.PRESENT, v)]
        again = [both[i] for i in extra] if v == 0 else []
        below = add(NodeKind.SUM, -1, [(literal, below) for literal in [*both, *again]])
    arrays = (np.array(kind, np.uint8), np.array(variable, np.int32), np.array(first, np.int64))
    return Graph(n, *arrays, np.array(left, np.int32), np.array(right, np.int32))


def compiled_by(compiler, allows=lambda selected: True):
    """A suite over a type of its own with this compiler, which is meant to allow every subset."""

    @dataclass(frozen=True)
    class Mine(Compiled):
        pass

    cr.register_compiler(Mine)(compiler)
    return contract(Case(Mine(), 3, allows), Case(Mine(), 2, allows), namespace=None)


class Minus(Parity):
    def merge(self, left, right):
        return (left - right) % 3

    def accepts(self, state):
        return state == 1


class Unhashable(Parity):
    __hash__ = None


class ByIdentity(Parity):
    __eq__ = object.__eq__
    __hash__ = object.__hash__


@dataclass(frozen=True)
class Coarse(Parity):
    odd: bool = False

    def accepts(self, state):
        return state == self.odd

    def __eq__(self, other):
        return isinstance(other, Coarse)

    def __hash__(self):
        return 0


class EqualsAnything(Parity):
    def __eq__(self, other):
        return True

    __hash__ = Parity.__hash__


class HashesByIdentity(Parity):
    __hash__ = object.__hash__


class NoRepr(Parity):
    __repr__ = object.__repr__


class OtherRepr(Parity):
    def __repr__(self):
        return "AtMost(1)"


def even(selected):
    return len(selected) % 2 == 0


def repeated(constraint, n, max_nodes):
    return cr.Circuit(literals(n, extra=[1]), constraint)


def larger(constraint, n, max_nodes):
    return cr.compile(cr.AtLeast(0), n + 1, max_nodes)


def scoped(constraint, n, max_nodes):
    return cr.Circuit(cr.compile(cr.AtLeast(1).over([0]), n, max_nodes).graph, constraint)


def miscounting(constraint, n, max_nodes):
    return cr.Circuit(literals(n), constraint, counts=range(n))


def refusing(constraint, n, max_nodes):
    if max_nodes < 10:
        raise ValueError("no room")
    return cr.Circuit(literals(n), constraint)


def curt(constraint, n, max_nodes):
    if max_nodes < 10:
        raise cr.CircuitTooLargeError("no room")
    return cr.Circuit(literals(n), constraint)


def moody(constraint, n, max_nodes):
    moody.calls += 1
    return cr.Circuit(literals(n), constraint) if moody.calls % 2 else cr.compile(cr.AtLeast(0), n, max_nodes)


moody.calls = 0


class Careless(cr.Circuit):
    """Hands out distributions that check nothing, and that are wrong where ``patch`` says."""

    def __call__(self, logits, count_potential=None, validate_args=None):
        return self.kind(self, logits, validate_args=False)

    class kind(cr.SubsetDistribution):  # noqa: N801 - an attribute that happens to be a class
        pass


class Unkeyed(Careless):
    class kind(cr.SubsetDistribution):  # noqa: N801
        def sample(self, sample_shape=(), key=None):
            return super().sample(sample_shape)


class Constant(Careless):
    class kind(cr.SubsetDistribution):  # noqa: N801
        def sample(self, sample_shape=(), key=None):
            return self.mode.expand(*sample_shape, *self.mode.shape)


class Modeless(Careless):
    class kind(cr.SubsetDistribution):  # noqa: N801
        @property
        def mode(self):
            return torch.zeros_like(self.logits)


class MostOfEquals(Careless):
    """What costs nothing is taken along."""

    class kind(cr.SubsetDistribution):  # noqa: N801
        @property
        def mode(self):
            return super().mode + (self.logits == 0)


class Unconditioned(Careless):
    class kind(cr.SubsetDistribution):  # noqa: N801
        def sample(self, sample_shape=(), key=None):
            return cr.SubsetDistribution(self.circuit, torch.zeros_like(self.logits)).sample(sample_shape, key)


class Inverted(Careless):
    class kind(cr.SubsetDistribution):  # noqa: N801
        def sample(self, sample_shape=(), key=None):
            return 1 - super().sample(sample_shape, key)


class Truncated(Careless):
    class kind(cr.SubsetDistribution):  # noqa: N801
        @property
        def count_probs(self):
            return super().count_probs[..., :-1]


class NeverEmpty(Careless):
    class kind(cr.SubsetDistribution):  # noqa: N801
        @property
        def marginals(self):
            return super().marginals.nan_to_num()


class Halved(Careless):
    class kind(cr.SubsetDistribution):  # noqa: N801
        def sample(self, sample_shape=(), key=None):
            return super().sample(sample_shape, key) / 2


def circuits_of(kind):
    return compiled_by(lambda c, n, max_nodes: kind(literals(n), c))


def at_most_one(kind):
    return compiled_by(
        lambda c, n, max_nodes: kind(cr.compile(cr.AtMost(1), n, max_nodes).graph, c),
        allows=lambda selected: len(selected) <= 1,
    )


@dataclass(frozen=True)
class OnlyCompiledRight(Parity):
    """Its own compiler is right; the machine that composition uses merges lists, which are not hashable."""

    def leaf(self, var):
        return [0], [1]

    def merge(self, left, right):
        return [left[0] + right[0]]

    def accepts(self, state):
        return state[0] % 2 == 0


@cr.register_compiler(OnlyCompiledRight)
def _(constraint, n, max_nodes):
    return cr.Circuit(cr.compile(Parity(), n, max_nodes).graph, constraint)
