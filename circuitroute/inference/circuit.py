"""A compiled constraint: immutable, shared, and callable on logits.

Legend: T tokens (all leading dimensions), N variables, K the largest allowed count, M nodes, E elements.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from circuitroute import engines
from circuitroute._validate import as_int, as_mask, plain_word
from circuitroute.circuit import Graph, compiled
from circuitroute.circuit.graph import count_range, model_count, weighted_count
from circuitroute.circuit.verify.properties import check, widest
from circuitroute.constraints import CNF, Constraint, shown
from circuitroute.constraints.cnf import Number
from circuitroute.deadline import DEFAULT_SECONDS, as_seconds, within
from circuitroute.errors import InfeasibleError
from circuitroute.inference.distribution import SubsetDistribution, satisfies
from circuitroute.interop import drawing, graphs, polynomial, pyjuice_circuit, storage

# What a message shows of a constraint whose text may be long.
SHOWN = 400


class Circuit:
    """A constraint over ``n`` variables, compiled.

    Get one from :func:`circuitroute.compile`; compilers build one from a :class:`Graph`. Calling it on logits
    gives the distribution over the allowed subsets.

    Args:
        graph: the arrays.
        constraint: what was compiled.
        counts: for a pure count constraint over all variables, the allowed counts in 0..n; such a circuit runs
            on the fused ``subset`` engines. None for every other circuit.
        engine: the name of a forced engine, or None to choose by device.

    Raises:
        InfeasibleError: ``counts`` is given and empty.
    """

    def __init__(
        self,
        graph: Graph,
        constraint: Constraint,
        counts: Sequence[int] | None = None,
        engine: str | None = None,
    ) -> None:
        self._graph = graph
        self._constraint = constraint
        self._counts = None if counts is None else tuple(sorted(as_int("counts", count) for count in counts))
        self._engine = plain_word(engine)
        self._known_range = (self._counts[0], self._counts[-1]) if self._counts else None
        self._known_count: int | None = None
        self._handle = compiled.name(self)
        if self._counts == ():
            raise InfeasibleError(
                f"{constraint!r} over {graph.n} variables: no allowed count in 0..{graph.n}; counts=() leaves no "
                "subset, give the graph's counts or None"
            )

    @property
    def graph(self) -> Graph:
        """The arrays behind the circuit."""
        return self._graph

    @property
    def handle(self) -> str:
        """A name for this very object in this process, by which traced programs refer to it."""
        return self._handle

    @property
    def engine(self) -> str | None:
        """The name of the forced engine, or None where it is chosen by device."""
        return self._engine

    @property
    def constraint(self) -> Constraint:
        """What was compiled."""
        return self._constraint

    @property
    def n(self) -> int:
        """Number of variables N."""
        return self._graph.n

    @property
    def num_nodes(self) -> int:
        """Literals, constants and sums: values held per token."""
        return self._graph.num_nodes

    @property
    def num_edges(self) -> int:
        """Products of two nodes: multiply-adds per token in one upward pass."""
        return self._graph.num_edges

    @property
    def depth(self) -> int:
        """Levels of sums between the literals and the root."""
        return len(self._graph.levels)

    @cached_property
    def width(self) -> int:
        """The most nodes that share one scope, i.e. the largest number of states at one tree node."""
        return widest(self._graph)

    @property
    def counts(self) -> tuple[int, ...] | None:
        """The allowed counts of a pure count constraint over all variables, increasing; None otherwise."""
        return self._counts

    @property
    def op(self) -> str:
        """``"subset"`` for a pure count constraint over all variables, else ``"layered"``."""
        return engines.op_of(self)

    @property
    def _count_range(self) -> tuple[int, int]:
        # Not a cached_property, whose lock traced programs cannot enter.
        if self._known_range is None:
            self._known_range = count_range(self._graph)
        return self._known_range

    @property
    def min_count(self) -> int:
        """The smallest number of variables any allowed subset selects."""
        return self._count_range[0]

    @property
    def max_count(self) -> int:
        """The largest number of variables any allowed subset selects (K)."""
        return self._count_range[1]

    def model_count(self, max_seconds: float | None = DEFAULT_SECONDS) -> int:
        """Exact number of allowed subsets, a Python int of any size; counted once.

        Args:
            max_seconds: how long counting may take, in CPU seconds of this thread; None for no limit.

        Raises:
            CircuitTooLargeError: it takes longer, or numbers that do not fit in memory.
        """
        # Not a cached_property, whose lock would hold up other threads in some versions of Python.
        if self._known_count is None:
            with self._budget(max_seconds, "counting the subsets of"):
                self._known_count = model_count(self._graph)
        as_seconds(max_seconds)
        return self._known_count

    def weighted_count(
        self, weights: Mapping[int, Number] | None = None, max_seconds: float | None = DEFAULT_SECONDS
    ) -> Fraction:
        """The exact weighted model count: the sum over the allowed subsets of the products of their literals' weights.

        Args:
            weights: for literals, v + 1 where variable v is selected and -(v + 1) where it is not, their weights, as
                :class:`circuitroute.CNF` takes them: any numbers, zero and negative ones too. Variables without weights
                have 1 for both literals. None: those of the constraint, which is a :class:`circuitroute.CNF`.
            max_seconds: how long counting may take, in CPU seconds of this thread; None for no limit.

        Returns:
            A fraction; its logarithm is ``circuit(cnf.logits).log_partition + cnf.log_constant``, where it has one.

        Raises:
            CircuitTooLargeError: it takes longer, or numbers that do not fit in memory.
            TypeError: no weights, and a constraint that is not a CNF; weights that are not numbers.
            ValueError: a literal of no variable, or the weight of one literal of a variable without the other's.
        """
        known = self._constraint.weights if weights is None and isinstance(self._constraint, CNF) else None
        if weights is None and known is None:
            raise TypeError(
                f"weights=None: {shown(self._constraint, SHOWN)} has no weights of its own; give weights, such as "
                "{1: '0.3', -1: '0.7'}"
            )
        with self._budget(max_seconds, "counting the weighted subsets of"):
            return weighted_count(self._graph, CNF([], self.n, weights).weights if known is None else known)

    def _budget(self, max_seconds: float | None, what: str) -> AbstractContextManager[None]:
        return within(
            max_seconds,
            lambda: f"{what} {shown(self._constraint, SHOWN)} over {self.n} variables, {self.num_nodes} nodes",
            "take a constraint with a smaller circuit",
        )

    def satisfies(self, mask: Tensor) -> Tensor:
        """Whether each subset is allowed.

        Args:
            mask: [..., N] bool, or numbers that are all 0 or 1.

        Returns:
            [...] bool.

        Raises:
            ValueError: the last dimension is not N, or a value is neither 0 nor 1.
        """
        return satisfies(self, as_mask("mask", mask, self.n))

    def check(self, max_seconds: float | None = DEFAULT_SECONDS) -> None:
        """Verify that the circuit is smooth, decomposable and deterministic.

        Args:
            max_seconds: how long that may take, in CPU seconds of this thread; None for no limit.

        Raises:
            CircuitPropertyError: it is not, or a node could not be seen to be deterministic; the message names it.
            CircuitTooLargeError: it takes longer, or the scopes of the nodes do not fit in memory.
        """
        with self._budget(max_seconds, "verifying the circuit of"):
            check(self._graph)

    def summary(self, max_seconds: float | None = DEFAULT_SECONDS) -> str:
        """Sizes, depth, model count, op, engine, and the cost per token in multiply-adds and bytes.

        Args:
            max_seconds: how long finding them may take, in CPU seconds of this thread; None for no limit.

        Raises:
            CircuitTooLargeError: it takes longer.
        """
        with self._budget(max_seconds, "describing the circuit of"):
            rows = describe(self)
        pad = max(map(len, rows))
        return "\n".join(f"{label:<{pad}}  {value}" for label, value in rows.items())

    def draw(self, path: str | os.PathLike[str]) -> Path:
        """Draw a small circuit, level by level, to a .png, .svg or .pdf file; see :mod:`circuitroute.interop.drawing`.

        Raises:
            ValueError: another suffix, or a circuit that is too large to be read from a picture.
            ImportError: matplotlib is not installed.
        """
        return drawing.draw(self, path)

    def to_networkx(self) -> Any:
        """A ``networkx.DiGraph`` of all nodes and products; see :mod:`circuitroute.interop.graphs`."""
        return graphs.to_networkx(self)

    def to_sympy(self) -> Any:
        """The network polynomial as a sympy expression; see :mod:`circuitroute.interop.polynomial`.

        Raises:
            ValueError: the circuit is too large for sympy.
        """
        return polynomial.to_sympy(self)

    def to_pyjuice(self) -> Any:
        """The root of a PyJuice circuit, its inputs given per sample; see :mod:`circuitroute.interop.pyjuice_circuit`.

        Raises:
            ImportError: PyJuice is not installed.
            ValueError: a weight would be too small for PyJuice's float32.
        """
        return pyjuice_circuit.to_pyjuice(self._graph, repr(self._constraint))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the circuit to a file that :func:`circuitroute.load` reads; see :mod:`circuitroute.interop.storage`.

        A file that is there is replaced in one step. A forced engine is not part of the file.

        Raises:
            OSError: the file cannot be written.
        """
        storage.save(self, path)

    def engine_for(self, device: torch.device | str) -> str:
        """The name of the engine that runs this circuit on ``device``."""
        return engines.engine_name(self, torch.device(device))

    def with_engine(self, name: str) -> Circuit:
        """The same circuit with its engine forced; shares all arrays.

        Raises:
            EngineError: there is no such engine, or it cannot run this circuit; says why.
        """
        engines.require(self, name)
        return Circuit(self._graph, self._constraint, self._counts, engine=name)

    def __call__(
        self,
        logits: Tensor,
        count_potential: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> SubsetDistribution:
        """The distribution p(S) ~ exp(sum of the logits of S + count_potential[|S|]) over the allowed subsets.

        Args:
            logits: [..., N] of any floating dtype; -inf forbids a variable, +inf forces it.
            count_potential: [K + 1] or [..., K + 1], log potentials of the counts 0..K, for count constraints.
            validate_args: None follows torch.distributions' default.

        Raises:
            ValueError: wrong shapes, NaN, or (when validating) rows whose evidence leaves nothing.
        """
        return SubsetDistribution(self, logits, count_potential, validate_args=validate_args)

    def __repr__(self) -> str:
        forced = f", engine={self._engine!r}" if self._engine else ""
        return f"Circuit({self._constraint!r}, n={self.n}, nodes={self.num_nodes}, edges={self.num_edges}{forced})"

    def __reduce__(self) -> tuple[type[Circuit], tuple[Graph, Constraint, tuple[int, ...] | None, str | None]]:
        # What is cached on the way (counts, engines with tensors on some device) is not part of a circuit.
        return (Circuit, (self._graph, self._constraint, self._counts, self._engine))

    def __copy__(self) -> Circuit:
        return self

    def __deepcopy__(self, memo: object) -> Circuit:
        return self  # immutable; modules that hold one are copied often


def describe(circuit: Circuit, device: str = "cpu") -> dict[str, str]:
    """What :meth:`Circuit.summary` and ``circuitroute explain`` say about a circuit: label -> value."""
    estimate, count = engines.cost(circuit), circuit.model_count()
    return {
        "constraint": repr(circuit.constraint),
        "variables": f"{circuit.n:,}",
        "models": f"{count:,}" if count < 10**15 else f"about {scientific(count)}",
        "counts": f"{circuit.min_count} to {circuit.max_count}",
        "nodes": f"{circuit.num_nodes:,}",
        "edges": f"{circuit.num_edges:,}",
        "depth": f"{circuit.depth:,}",
        "width": f"{circuit.width:,}",
        "op": circuit.op,
        f"engine on {device}": circuit.engine_for(device),
        "multiply-adds per token": f"{estimate.multiply_adds:,} (marginals), {estimate.backward:,} (their gradient)",
        "bytes per token": f"{estimate.bytes_moved:,} (logits in, marginals out, float32)",
    }


def scientific(count: int) -> str:
    """A large count as "7.161e13": its first digits, cut off. For ints that are too long for ``str``, too."""
    exponent = int(math.log10(count))
    leading = count // 10 ** (exponent - 3)
    if leading >= 10_000:  # the logarithm was rounded down across a power of ten
        exponent, leading = exponent + 1, leading // 10
    elif leading < 1_000:  # or up
        exponent, leading = exponent - 1, count // 10 ** (exponent - 4)
    return f"{leading // 1000}.{leading % 1000:03d}e{exponent}"
