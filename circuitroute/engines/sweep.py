"""Engines that are made of sweeps, and the row policy: what happens to rows that one sweep does not settle.

Legend: T tokens, N variables, J = K + 1 counts.

A sweep takes logits to results in six steps, each named alike in every engine:

    shift      a constant off all logits, so that independent coins show about an allowed count
    coins      the literals' probabilities
    tree up    the probability of every count (or of every node of a circuit)
    root       the counts weighed by potential and shift: log Z and the posterior
    sample     from the root down, by inversion at uniforms that belong to the key
    tree down  the adjoint, which gives the marginals

and the gradient is the second derivative of log Z, the same steps on dual numbers. An engine supplies this arithmetic.
It marks two kinds of rows, each by the row alone: *underflow*, where a count that matters may have lost its
coefficient, and *uncertain*, where rounding could have decided the sample. The policy is the same for all:

1. Rows that underflow are swept again around another centre, where the engine knows one.
2. Those that still underflow are taken over in float64: by the same engine, or by the naive one if the logits are
   float64 already. They are the ``fallback`` of the inference, and their gradients go the same way.
3. Samples of rows that are uncertain or underflow are drawn in float64, likewise.

So a sample is the one that the naive engine draws, whatever the batch, the device and the engine. (The device of exact
geometric predicates: filter in fast arithmetic, decide the doubtful few exactly.)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from circuitroute._validate import present
from circuitroute.engines import autograd
from circuitroute.engines.base import Inference
from circuitroute.engines.coins import log_normaliser
from circuitroute.engines.naive import NaiveEngine
from circuitroute.engines.root import Root
from circuitroute.engines.shift import Evidence, Shift

_MOMENTS = ("log_partition", "marginals", "count_probs", "shift", "log_root")
_MARKS = ("mask", "fallback", "uncertain")


class Inputs(NamedTuple):
    """What an engine is given."""

    logits: Tensor  # [T, N]
    potential: Tensor | None  # [J] or [T, J]

    def at(self, rows: Tensor) -> Inputs:
        """Some of the rows."""
        by_row = self.potential is not None and self.potential.dim() == 2
        return Inputs(self.logits[rows], self.potential[rows] if by_row else self.potential)  # type: ignore[index]

    def double(self) -> Inputs:
        """The same in float64."""
        return Inputs(self.logits.double(), None if self.potential is None else self.potential.double())


@dataclass(frozen=True)
class Block(ABC):
    """Some tokens swept upward, B of them, tokens last: what engines of batched tensor operations make of rows."""

    logits: Tensor  # [N, B]
    evidence: Evidence | None
    shift: Shift
    absent: Tensor  # [N, B], the coins
    present: Tensor
    root: Root
    counts: slice | list[int]  # those that the root tells apart

    @abstractmethod
    def sample(self, key_B: Tensor) -> tuple[Tensor, Tensor]:
        """([B, N] bool, [B] bool uncertain)."""

    @abstractmethod
    def down(self) -> Tensor:
        """[N, B] the adjoints of ``present``."""

    def marginals(self) -> Tensor:
        """[N, B]."""
        marginals = (self.down() * self.present).clamp_(max=1.0)  # rounding may go an ulp beyond
        return marginals if self.evidence is None else marginals.masked_fill_(self.logits == math.inf, 1.0)

    def log_partition(self) -> Tensor:
        """[B] float64."""
        return self.root.log_total + log_normaliser(self.logits, self.shift, self.absent, self.present, self.evidence)


@dataclass(frozen=True)
class Sweep(Inference):
    """What a sweep finds, in tensors that are filled in row by row; the moments have no rows if they are not wanted.

    Attributes:
        fallback: [T] bool, rows that underflow.
        uncertain: [T] bool, rows whose sample rounding could have decided; none if there are no samples.
    """

    fallback: Tensor = field(kw_only=True)
    uncertain: Tensor = field(kw_only=True)

    @staticmethod
    def empty(logits_TN: Tensor, J: int | None, moments: bool, sample: bool) -> Sweep:
        """Room for all rows; for a count posterior if ``J`` is given."""
        T, N = logits_TN.shape
        rows, device = T if moments else 0, logits_TN.device
        return Sweep(
            log_partition=logits_TN.new_empty(T),
            marginals=logits_TN.new_empty(rows, N),
            count_probs=None if J is None else logits_TN.new_zeros(rows, J),
            shift=logits_TN.new_empty(T, dtype=torch.float64),
            log_root=logits_TN.new_empty(T, dtype=torch.float64),
            mask=torch.empty(T, N, dtype=torch.bool, device=device) if sample else None,
            fallback=torch.zeros(T, dtype=torch.bool, device=device),
            uncertain=torch.zeros(T if sample else 0, dtype=torch.bool, device=device),
        )

    def fill(self, part: slice, block: Block, key_T: Tensor | None) -> None:
        """The results of one block, whose root is weighed: the moments need the way down, and a sample the keys."""
        root = block.root
        self.shift[part], self.log_root[part] = block.shift.exact(), root.log_total
        self.log_partition[part] = block.log_partition().to(self.log_partition.dtype)
        self.fallback[part] = root.underflow
        if self.count_probs is not None and len(self.count_probs):
            self.count_probs[part, block.counts] = root.probs.t()
        if len(self.marginals):
            self.marginals[part] = block.marginals().t()
        if self.mask is not None and key_T is not None:
            self.mask[part], self.uncertain[part] = block.sample(key_T[part])

    def put(self, rows: Tensor, other: Inference, names: tuple[str, ...] = _MOMENTS + _MARKS) -> None:
        """Replace ``rows`` of what both have by the results of another sweep or engine."""
        for name in names:
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours is not None and theirs is not None and len(ours):
                ours[rows] = theirs.to(ours.dtype)


class SweepEngine(ABC):
    """An engine, see :class:`circuitroute.engines.base.Engine`, from its arithmetic; all the rest is the row policy."""

    name: str
    naive: NaiveEngine

    @abstractmethod
    def sweep(self, rows: Inputs, key_T: Tensor | None, moments: bool) -> Sweep:
        """One sweep over all rows; a sample if there are keys, moments if they are wanted."""

    @abstractmethod
    def derivative(
        self, rows: Inputs, shift_T: Tensor, u_TN: Tensor, v_TJ: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The derivative of (marginals, count posterior) along (u, v) around known shifts."""

    def sweep_again(self, rows: Inputs, key_T: Tensor | None, moments: bool) -> Sweep | None:
        """A sweep of rows that underflow, around another centre; None where there is none."""
        return None

    @torch.no_grad()
    def infer(self, logits_TN: Tensor, potential: Tensor | None, key_T: Tensor | None = None) -> Inference:
        """See :class:`circuitroute.engines.base.Engine`."""
        return self._settled(Inputs(logits_TN, potential), key_T, moments=True)

    @torch.no_grad()
    def sample(self, logits_TN: Tensor, potential: Tensor | None, key_T: Tensor) -> Tensor:
        """See :class:`circuitroute.engines.base.Engine`."""
        swept = self._settled(Inputs(logits_TN, potential), key_T, moments=False)
        return present(swept.mask, "a sweep that is given keys draws a sample")

    def _settled(self, rows: Inputs, key_T: Tensor | None, moments: bool) -> Sweep:
        """A sweep, and what the policy does about the rows it marks."""
        sweep, exact = self.sweep(rows, key_T, moments), self._exact(rows)
        under = _marked(sweep.fallback)
        if len(under):
            again = self.sweep_again(rows.at(under), None if key_T is None else key_T[under], moments)
            if again is not None:
                sweep.put(under, again)
                under = _marked(sweep.fallback)
        if len(under) and moments:
            sweep.put(under, exact.infer(*rows.at(under).double()), _MOMENTS)
        if key_T is not None and sweep.mask is not None:
            doubtful = _marked(sweep.uncertain | sweep.fallback)
            if len(doubtful):
                sweep.mask[doubtful] = exact.sample(*rows.at(doubtful).double(), key_T[doubtful])
        return sweep

    def _exact(self, rows: Inputs) -> SweepEngine | NaiveEngine:
        """Who takes rows over, in float64."""
        return self.naive if rows.logits.dtype == torch.float64 else self

    def attach(
        self, inference: Inference, logits_TN: Tensor, potential: Tensor | None, finite: bool = False
    ) -> Inference:
        """See :class:`circuitroute.engines.base.Engine`."""
        return autograd.attach(self, inference, logits_TN, potential, finite)

    def second_derivative(
        self, logits_TN: Tensor, potential: Tensor | None, inference: Inference, u_TN: Tensor, v_TJ: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """See :class:`circuitroute.engines.base.Engine`."""
        rows = Inputs(logits_TN, potential)
        dm, dq = self.derivative(rows, inference.shift, u_TN, v_TJ)
        under = u_TN.new_zeros(0).long() if inference.fallback is None else _marked(inference.fallback)
        if len(under):
            exact, given = self._exact(rows), rows.at(under).double()
            v = None if v_TJ is None else v_TJ[under].double()
            by_logits, by_potential = exact.second_derivative(*given, exact.infer(*given), u_TN[under].double(), v)
            dm[under] = by_logits.to(dm.dtype)
            if dq is not None and by_potential is not None:
                dq[under] = by_potential.to(dq.dtype)
        return dm, dq

    def naive_moments(self, logits_TN: Tensor, potential: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """See :class:`circuitroute.engines.base.Engine`."""
        return self.naive.moments(logits_TN, potential)


def _marked(flags_T: Tensor) -> Tensor:
    return flags_T.nonzero().flatten()
