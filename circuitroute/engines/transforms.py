"""Engines inside transforms: torch.func, forward-mode derivatives, batches of gradients.

Legend: T tokens, N variables, J = K + 1 counts.

The same questions that :mod:`circuitroute.engines.ops` answers for traced programs, as functions of autograd that know
how they are differentiated in both modes, to any order, and how they are batched: inside them tensors are plain again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from circuitroute._tensors import traced, untraced
from circuitroute._validate import present
from circuitroute.circuit import Compiled, boolean
from circuitroute.engines import ops
from circuitroute.engines.autograd import Batch, Direct, Moments, Source, inference_of
from circuitroute.engines.base import Inference
from circuitroute.engines.choice import counting_engine, engine_of, layered_engine
from circuitroute.engines.ops import Operators
from circuitroute.engines.subset.mode import mode as subset_mode


@untraced  # type: ignore[untyped-decorator]
def infer(
    circuit: Compiled, logits_TN: Tensor, potential: Tensor | None, key_T: Tensor | None, counting: bool = False
) -> Inference:
    """One sweep, differentiable in any way; see :func:`circuitroute.engines.ops.infer`."""
    found = Moments.apply(logits_TN, potential, key_T, Either(circuit, counting), None)  # type: ignore[no-untyped-call]
    return inference_of(found, sampled=key_T is not None)


@untraced  # type: ignore[untyped-decorator]
def sample(circuit: Compiled, logits_TN: Tensor, potential: Tensor | None, key_T: Tensor) -> Tensor:
    """[T, N] bool."""
    found: Tensor = _ByRow.apply(_Sample(circuit), logits_TN, potential, key_T)  # type: ignore[no-untyped-call]
    return found


@untraced  # type: ignore[untyped-decorator]
def mode(circuit: Compiled, logits_TN: Tensor, potential: Tensor | None) -> Tensor:
    """[T, N] bool."""
    found: Tensor = _ByRow.apply(_Mode(circuit), logits_TN, potential, None)  # type: ignore[no-untyped-call]
    return found


@untraced  # type: ignore[untyped-decorator]
def satisfies(circuit: Compiled, mask: Tensor) -> Tensor:
    """[...] bool, of masks [..., N] bool."""
    rows = mask.reshape(-1, mask.shape[-1])
    found: Tensor = _ByRow.apply(_Satisfies(circuit), rows, None, None)  # type: ignore[no-untyped-call]
    return found.reshape(mask.shape[:-1])


@dataclass(frozen=True)
class Either:
    """Moments and derivatives by the engine where tensors are plain, else by operators."""

    circuit: Compiled
    counting: bool = False

    def _source(self, logits: Tensor) -> Source:
        if traced(logits):
            return Operators(self.circuit, self.counting)
        made = counting_engine if self.counting else engine_of
        return Direct(made(self.circuit, logits.device))

    def infer(self, logits: Tensor, *rest: Any) -> Inference:
        """See :class:`circuitroute.engines.autograd.Source`."""
        return self._source(logits).infer(logits, *rest)

    def derivative(self, logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor | None]:
        """See :class:`circuitroute.engines.autograd.Source`."""
        return self._source(logits).derivative(logits, *rest)


class _Question(Protocol):
    """Something to find for every row, that has no derivatives."""

    def __call__(self, rows: Tensor, potential: Tensor | None, key_T: Tensor | None) -> Tensor:
        """[T, ...]."""
        ...


@dataclass(frozen=True)
class _Sample:
    circuit: Compiled

    def __call__(self, rows: Tensor, potential: Tensor | None, key_T: Tensor | None) -> Tensor:
        key_T = present(key_T, "a sample has a key")
        if traced(rows):
            return ops.sample(self.circuit, rows, potential, key_T)
        return engine_of(self.circuit, rows.device).sample(rows, potential, key_T)


@dataclass(frozen=True)
class _Mode:
    circuit: Compiled

    def __call__(self, rows: Tensor, potential: Tensor | None, key_T: Tensor | None) -> Tensor:
        if traced(rows):
            return ops.mode(self.circuit, rows, potential)
        if potential is not None:
            return subset_mode(rows, potential)
        return layered_engine(self.circuit, rows.device).mode(rows)


@dataclass(frozen=True)
class _Satisfies:
    circuit: Compiled

    def __call__(self, rows: Tensor, potential: Tensor | None, key_T: Tensor | None) -> Tensor:
        return ops.satisfies(self.circuit, rows) if traced(rows) else boolean.satisfies(self.circuit, rows)


class _ByRow(torch.autograd.Function):
    """(question, rows, potential, keys) -> its answer: constant in both modes, and batches are more rows."""

    @staticmethod
    def forward(question: _Question, rows: Tensor, potential: Tensor | None, key_T: Tensor | None) -> Tensor:
        return question(rows, potential, key_T)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, ...]:
        return None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        return None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], question: Any, *inputs: Any) -> tuple[Tensor, int]:
        rows, potential, key = inputs
        _, of_rows, of_potential, of_key = in_dims
        batch = Batch(info.batch_size, of_rows, rows)
        given = (batch(rows, of_rows), batch(potential, of_potential, shared=True), batch(key, of_key))
        return batch.apart(_ByRow.apply(question, *given)), 0  # type: ignore[no-untyped-call]
