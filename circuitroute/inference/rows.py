"""The rows of a batch: arguments checked, and what is known of their values found once and carried.

Looking at values costs a pass over the logits, on a GPU a wait, and in a traced program cannot be done. So it happens
here, when a distribution is made, and nowhere else: whether all logits are finite, and which rows hold NaN.

Legend: T rows (all leading dimensions), N variables, K the largest allowed count, J = K + 1.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Size, Tensor

from circuitroute._tensors import cannot_look, plain, traced, tracked, transformed
from circuitroute._validate import as_real, present
from circuitroute.circuit import Compiled
from circuitroute.engines import certainly_finite
from circuitroute.inference.evidence import rows_text, unsatisfiable_rows


@dataclass(frozen=True, eq=False)
class Rows:
    """Logits and count potential of a batch, and what is known of them.

    Attributes:
        circuit: what they are for.
        logits: [..., N] float32 or float64.
        count_potential: [J] or [..., J], or None.
        batch_shape: the leading dimensions of both together.
        finite: whether all logits are known to be finite: no evidence, no NaN. Never known where looking is ruled out.
    """

    circuit: Compiled
    logits: Tensor
    count_potential: Tensor | None
    batch_shape: Size
    finite: bool
    _nan: list[Tensor | None]  # what is known of NaN: one entry, or none yet

    @staticmethod
    def of(circuit: Compiled, logits: Tensor, count_potential: Tensor | None, validate: bool) -> Rows:
        """Rows of checked shapes and dtypes and, with ``validate``, checked values.

        Raises:
            TypeError, ValueError: see :class:`circuitroute.SubsetDistribution`.
        """
        logits = as_logits(logits, circuit.n)
        batch_shape = logits.shape[:-1]
        if count_potential is not None:
            count_potential = _as_potential(count_potential, circuit, logits)
            batch_shape = _common_batch(batch_shape, count_potential.shape[:-1])
            logits = logits.expand(*batch_shape, circuit.n)
        blind = not validate and cannot_look(logits)
        finite = not blind and certainly_finite(logits)
        rows = Rows(circuit, logits, count_potential, batch_shape, finite, [])
        if finite and count_potential is None:
            rows._nan.append(None)
        elif not blind:
            bad = _nan_rows(logits, count_potential, batch_shape)
            rows._nan.append(bad if bool(bad.any()) else None)
        if validate:
            rows.check()
        return rows

    @property
    def nan(self) -> Tensor | None:
        """[T] bool, rows with NaN in logits or potential; None where there are none.

        Where looking is ruled out it is found when it is asked for: an engine's fused step finds out by itself.
        """
        if not self._nan:
            self._nan.append(_nan_rows(self.logits, self.count_potential, self.batch_shape))
        return self._nan[0]

    def check(self) -> None:
        """Refuse NaN, +inf in the potential, and rows that are left without a subset, by name."""
        for name, values in (("logits hold", self.logits), ("count_potential holds", self.count_potential)):
            if self.nan is not None and values is not None and bool((bad := values.isnan().any(-1)).any()):
                raise ValueError(f"{name} NaN in {rows_text(bad)}")
        if self.count_potential is not None and bool((self.count_potential == math.inf).any()):
            raise ValueError("count_potential holds +inf; give -inf to all other counts to force one")
        empty = self.unsatisfiable()
        if empty is not None and bool(empty.any()):
            raise ValueError(
                f"no subset that satisfies {self.circuit.constraint!r} is left by the infinite logits (or the "
                f"count potential) in {rows_text(empty)}"
            )

    def unsatisfiable(self) -> Tensor | None:
        """[...] bool, rows whose evidence leaves no subset; None where there is no evidence."""
        if self.finite and (self.count_potential is None or self.circuit.counts is None):
            return None
        return unsatisfiable_rows(self.circuit, self.logits, self.count_potential, self.finite)

    def given(self) -> tuple[Tensor, Tensor]:
        """What a fused step is given, NaN in the logits of rows that have any: ([T, N], [J] or [T, J])."""
        logits = self._flat()
        potential = present(self._potential(), "only count constraints, which have a potential, have a fused step")
        if self.count_potential is None or (not cannot_look(logits) and self.nan is None):
            return logits, potential
        # A step looks for NaN in logits alone.
        bad = potential.isnan()
        return torch.where(bad.any(-1, keepdim=True), math.nan, logits), torch.where(bad, 0.0, potential)

    def inputs(self) -> tuple[Tensor, Tensor | None]:
        """What engines are given, as functions of logits and potential: ([T, N], [J] or [T, J]).

        The potential is -inf where the constraint forbids a count, and None for circuits without counts. Rows with NaN
        are replaced, so that they cannot affect others.
        """
        logits, potential = self._flat(), self._potential()
        if self.nan is None:
            return logits, potential
        logits = torch.where(self.nan[:, None], 0.0, logits)
        if potential is not None and potential.dim() > 1:
            potential = torch.where(self.nan[:, None], 0.0, potential)
        elif potential is not None:
            potential = torch.where(potential.isnan(), 0.0, potential)
        return logits, potential

    def _flat(self) -> Tensor:
        """[T, N] the logits."""
        return self.logits if self.logits.dim() == 2 else self.logits.reshape(-1, self.circuit.n)

    def _potential(self) -> Tensor | None:
        """[J] or [T, J] log potentials with -inf where the constraint forbids a count."""
        if self.circuit.counts is None:
            return None
        # A tensor of a trace, or of a transform, must not outlive it.
        allowed = _allowed.__wrapped__ if traced(self.logits) or transformed() else _allowed
        base: Tensor = allowed(self.circuit.counts, self.logits.dtype, self.logits.device)
        if self.count_potential is None:
            return base
        given = self.count_potential
        if given.dim() > 1 or tracked(given):
            given = given.expand(*self.batch_shape, -1).reshape(-1, given.shape[-1])
        return torch.where(base == 0.0, given, base)

    def needs_grad(self) -> bool:
        """Whether results are to be functions of logits or potential."""
        return tracked(self.logits, self.count_potential)

    def as_batch(self, values: Tensor) -> Tensor:
        """[T, ...] as [*batch_shape, ...]."""
        if len(self.batch_shape) == 1 and values.requires_grad:
            return values  # a function of its inputs; bare numbers, which are kept, are given away as views alone
        return values.reshape(self.batch_shape + values.shape[1:])


def _nan_rows(logits: Tensor, potential: Tensor | None, batch_shape: Size) -> Tensor:
    """[T] bool, rows with NaN anywhere."""
    bad = logits.isnan().any(-1)
    if potential is not None:
        bad = bad | potential.isnan().any(-1)
    return bad.expand(batch_shape).reshape(-1)


@functools.lru_cache(maxsize=256)
def _allowed(counts: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[J] a count constraint's potential: 0 where allowed, else -inf. Kept, since sending it to a GPU waits for it."""
    with torch.inference_mode(False):
        potential = torch.full((max(counts) + 1,), -math.inf, dtype=dtype, device="cpu")
        potential[list(counts)] = 0.0
        return potential.to(device)


# ---------------------------------------------------------------------------------------------- shapes and dtypes


def as_logits(logits: Tensor, n: int) -> Tensor:
    """Logits [..., n] in float32, or float64 if they are; any floating dtype is taken."""
    logits = plain("logits", logits)
    if not logits.dtype.is_floating_point:
        raise TypeError(f"logits have dtype {logits.dtype}: expected a floating-point dtype")
    if logits.dim() == 0 or logits.shape[-1] != n:
        raise ValueError(f"logits have shape {tuple(logits.shape)}: the last dimension must be n={n}")
    return logits if logits.dtype == torch.float64 else logits.float()


def _as_potential(potential: Tensor, circuit: Compiled, logits: Tensor) -> Tensor:
    """Count potential [..., J] in the dtype and on the device of the logits."""
    if circuit.counts is None:
        raise ValueError(
            f"count_potential is for count constraints over all variables; {circuit.constraint!r} is not one"
        )
    potential = as_real("count_potential", potential)
    J = circuit.max_count + 1
    if potential.dim() == 0 or potential.shape[-1] != J:
        raise ValueError(
            f"count_potential has shape {tuple(potential.shape)}: its last dimension must be max_count + 1 = {J}"
        )
    return potential.to(logits)


def _common_batch(logits_batch: Size, potential_batch: Size) -> Size:
    """The batch shape of logits and count potential together."""
    try:
        return Size(torch.broadcast_shapes(logits_batch, potential_batch))
    except RuntimeError:
        raise ValueError(
            f"count_potential has batch shape {tuple(potential_batch)}, which does not broadcast with that of the "
            f"logits, {tuple(logits_batch)}"
        ) from None
