"""The engine ``numba`` of the count family: compiled loops on the CPU.

Legend: T tokens, N variables, K the largest allowed count.

The steps of the engine ``torch``, fused: a few tokens at a time go from logits to marginals, posterior and sample while
their tree is in the cache. Results depend neither on the number of threads nor on a row's neighbours. Rows that
underflow are swept again by the engine ``torch``, and before that those that do not fit a narrow tree (:mod:`.narrow`)
by this one with a whole tree; for all else see :mod:`circuitroute.engines.sweep`.

Where the tree of a token has more than ``MAX_TREE`` numbers (each thread holds sixteen such trees, for gradients twice
that) the engine ``torch`` is preferred.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from circuitroute._validate import present
from circuitroute.engines.base import given
from circuitroute.engines.compiled import NO_KEYS, NO_MASKS, array, in_threads
from circuitroute.engines.root import NEGLIGIBLE, SMALLEST_COEFFICIENT
from circuitroute.engines.sampling import MARGIN
from circuitroute.engines.step import COMBINES, Rule, Slopes, Step, Upstream
from circuitroute.engines.step import Inputs as StepInputs
from circuitroute.engines.subset.naive import NaiveSubset
from circuitroute.engines.subset.torch.sweep import Centre, forward
from circuitroute.engines.subset.torch.tree import even
from circuitroute.engines.sweep import Inputs, Sweep, SweepEngine
from circuitroute.errors import EngineError

MAX_TREE = 1 << 24
# The largest count and row of a fused step: it inserts every logit into a list of as many as are chosen.
MAX_STEP = (64, 4096)


def fits(n: int, K: int) -> bool:
    """Whether the tree of a token is small enough for this engine to be preferred."""
    return _numbers(_shape(n, K)) <= MAX_TREE


def _numbers(shape: NDArray[np.int64]) -> int:
    """How many numbers a tree has."""
    return int(shape[:, 1] @ (shape[:, 2] + 1))


@functools.lru_cache(maxsize=256)
def _shape(n: int, K: int) -> NDArray[np.int64]:
    """[levels, 4]: see :mod:`circuitroute.engines.subset.numba.tree`, leaves first; the whole tree."""
    levels = n.bit_length() + (n & (n - 1) > 0)
    return _laid_out(n, [K] * levels, [n] * levels)


@functools.lru_cache(maxsize=256)
def _narrow_shape(n: int, k: int, dtype: str) -> NDArray[np.int64]:
    """The same for exactly k of n, with only the coefficients that matter: :mod:`.narrow`."""
    from circuitroute.engines.subset.numba.narrow import degrees

    return _laid_out(n, *degrees(n, k, dtype, len(_shape(n, k))))


def _laid_out(n: int, degrees: Sequence[int], most: Sequence[int]) -> NDArray[np.int64]:
    """The shape of a tree with nodes of these degrees at most, level by level."""
    levels, first, nodes, degree = [], 0, n, 1
    for level, (limit, mean) in enumerate(zip(degrees, most, strict=True)):
        degree = min(2 * degree, limit) if level else 1
        levels.append((first, even(nodes), degree, mean))
        first, nodes = first + even(nodes) * (degree + 1), even(nodes) // 2
    return np.array(levels, dtype=np.int64)


class NumbaSubset(SweepEngine):
    """Compiled inference for the count family on the CPU; float32 for float32 logits, float64 for float64."""

    name = "numba"
    naive = NaiveSubset()

    def sweep(self, rows: Inputs, key_T: Tensor | None, moments: bool) -> Sweep:
        """See :class:`circuitroute.engines.sweep.SweepEngine`."""
        arrays = _Arrays.of(rows, narrow=True)
        found = self._swept(rows, arrays, key_T, moments)
        strayed = found.fallback.nonzero().squeeze(1)
        if arrays.is_narrow and len(strayed):
            few = rows.at(strayed)
            key = None if key_T is None else key_T[strayed]
            found.put(strayed, self._swept(few, _Arrays.of(few), key, moments))
        return found

    def _swept(self, rows: Inputs, arrays: _Arrays, key_T: Tensor | None, moments: bool) -> Sweep:
        """One sweep; the fallback of a narrow tree are the rows that need a whole one, too."""
        found = Sweep.empty(rows.logits, arrays.phi.shape[1], moments, key_T is not None)
        key = NO_KEYS if key_T is None else array(key_T)
        mask = NO_MASKS if found.mask is None else array(found.mask)
        probs = present(found.count_probs, "the count family has a count posterior")
        lines = (found.log_partition, found.log_root, found.shift, found.fallback, found.uncertain)
        arguments = (key, tuple(map(array, lines)), array(found.marginals), array(probs), mask)
        _in_threads(_kernels().forward, arrays, arguments)
        return found

    def sweep_again(self, rows: Inputs, key_T: Tensor | None, moments: bool) -> Sweep:
        """See :class:`circuitroute.engines.sweep.SweepEngine`; by the engine ``torch``."""
        return forward(rows, key_T, moments, Centre.at_mode(rows))

    def derivative(self, rows: Inputs, shift_T: Tensor, u_TN: Tensor, v_TJ: Tensor | None) -> tuple[Tensor, Tensor]:
        """See :class:`circuitroute.engines.sweep.SweepEngine`."""
        arrays = _Arrays.of(rows, narrow=True)
        v = rows.logits.new_zeros(len(u_TN), arrays.phi.shape[1]) if v_TJ is None else v_TJ
        dm, dq, strayed_T = self._derived(rows, arrays, shift_T, u_TN, v)
        strayed = strayed_T.nonzero().squeeze(1)
        if len(strayed):
            few = rows.at(strayed)
            dm[strayed], dq[strayed], _ = self._derived(
                few, _Arrays.of(few), shift_T[strayed], u_TN[strayed], v[strayed]
            )
        return dm, dq

    def _derived(
        self, rows: Inputs, arrays: _Arrays, shift_T: Tensor, u_TN: Tensor, v_TJ: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The derivative, and the rows that need a whole tree."""
        dm, dq = (torch.empty(x.shape, dtype=rows.logits.dtype, device="cpu") for x in (u_TN, v_TJ))
        strayed_T = torch.empty(len(u_TN), dtype=torch.bool, device="cpu")
        tensors = (shift_T, u_TN, v_TJ, dm, dq, strayed_T)
        _in_threads(_kernels().second_derivative, arrays, tuple(map(array, tensors)))
        return dm, dq, strayed_T

    # ------------------------------------------------------------------ steps

    def steps(self, inputs: StepInputs) -> bool:
        """See :class:`circuitroute.engines.step.Stepper`."""
        n, K = inputs.logits.shape[1], inputs.potential.shape[-1] - 1
        (most, widest), small = MAX_STEP, fits(n, K)
        tensors = (inputs.logits, inputs.choice)
        taken = all(x.device.type == "cpu" and x.dtype == torch.float32 for x in tensors)
        return taken and small and n <= widest and min(n, most) >= K

    @torch.no_grad()
    def step(self, inputs: StepInputs, rule: Rule, moments: bool) -> Step:
        """See :class:`circuitroute.engines.step.Stepper`."""
        moments = moments or rule.combine == "marginal"
        found, underflow, uncertain = _step(inputs, rule, moments)
        doubtful = (underflow | uncertain).nonzero().squeeze(1)
        if len(doubtful):
            under = underflow[doubtful]
            if under.any():
                self._settle_step(inputs, rule, moments, found, doubtful[under])
                doubtful = doubtful[~under]
        if len(doubtful):
            self._redraw_step(inputs, rule, moments, found, doubtful)
        return found

    def _redraw_step(self, inputs: StepInputs, rule: Rule, moments: bool, found: Step, rows: Tensor) -> None:
        """The decision of a few sampled rows, drawn in float64, with its weights and slots; their moments are right."""
        from circuitroute.engines.subset.numba import unsettled

        few = unsettled.at(inputs, rows)
        given = Inputs(unsettled.divided(few), few.potential)
        mask = self._exact(given).sample(*given.double(), _given(few.key))
        again, _, _ = _step(few._replace(mask=mask), rule, moments)
        found.weights[rows], found.indices[rows], found.mask[rows] = again.weights, again.indices, mask
        if found.log_prob is not None and again.log_prob is not None:
            found.log_prob[rows] = again.log_prob

    def _settle_step(self, inputs: StepInputs, rule: Rule, moments: bool, found: Step, rows: Tensor) -> None:
        """A few rows that underflow, right nowhere yet: decision and moments by the policy, then weights and slots."""
        from circuitroute.engines.subset.numba import unsettled

        few = unsettled.at(inputs, rows)
        exact = self._settled(Inputs(unsettled.divided(few), few.potential), few.key, moments)
        mask = found.mask[rows]
        if exact.mask is not None:
            mask = torch.where(unsettled.drawn(few, rule.share)[:, None], exact.mask, mask)
        again, _, _ = _step(few._replace(mask=mask), rule, moments)
        weights = again.weights
        if rule.combine == "marginal":
            used = mask.gather(-1, again.indices)
            weights = torch.where(used, exact.marginals.gather(-1, again.indices), 0.0)
        found.weights[rows], found.indices[rows], found.mask[rows] = weights, again.indices, mask
        if not moments:
            return
        for name in ("count_probs", "log_partition", "shift", "log_root", "fallback"):
            getattr(found, name)[rows] = getattr(exact, name)
        score = unsettled.log_prob(few, mask, exact.shift, exact.log_root)
        _given(found.log_prob)[rows] = score.to(inputs.logits.dtype)

    @torch.no_grad()
    def step_marginals(self, inputs: StepInputs, step: Step, out_TN: Tensor) -> None:
        """See :class:`circuitroute.engines.step.Stepper`."""
        arrays = _Arrays.of(Inputs(inputs.choice, inputs.potential))
        room = out_TN if out_TN.is_contiguous() else torch.empty_like(inputs.choice)
        lines = (array(_given(step.shift)), array(step.invalid))
        _in_threads(_step_kernels().step_marginals, arrays, (_temperatures(inputs), *lines, array(room)))
        if room is not out_TN:
            out_TN.copy_(room)
        under = _given(step.fallback).nonzero().squeeze(1)
        if len(under):
            from circuitroute.engines.subset.numba import unsettled

            few = unsettled.at(inputs, under)
            out_TN[under] = self.infer(unsettled.divided(few), few.potential).marginals

    @torch.no_grad()
    def step_gradient(self, inputs: StepInputs, rule: Rule, step: Step, upstream: Upstream) -> Slopes:
        """See :class:`circuitroute.engines.step.Stepper`."""
        weighs = upstream.weights is not None or upstream.gates is not None
        others = (upstream.marginals, upstream.log_partition, upstream.log_prob, upstream.count_probs)
        crosses = weighs and (rule.simple or rule.combine == "marginal")
        sweeps = crosses or any(x is not None for x in others)
        arrays, theta = _Arrays.of(Inputs(inputs.logits, inputs.potential)), inputs.logits
        one = inputs.choice is inputs.logits
        by_logits = torch.empty_like(theta, memory_format=torch.contiguous_format)
        by_choice = theta.new_zeros(0 if one else len(theta), theta.shape[1])
        by_potential = theta.new_empty(len(theta), inputs.potential.shape[-1])
        shift = _given(step.shift) if sweeps else _optional(step.shift, 1, torch.float64)
        known = (array(step.mask), array(shift), array(step.invalid))
        slots = (array(step.indices), array(_optional(upstream.weights)))
        lines = tuple(array(_optional(x, 1)) for x in (upstream.log_partition, upstream.log_prob))
        arguments = (
            array(theta[:0] if one else inputs.choice),
            _temperatures(inputs),
            known,
            (COMBINES.index(rule.combine), rule.simple, sweeps),
            slots,
            *(array(_optional(x)) for x in (upstream.gates, upstream.marginals)),
            lines,
            array(_optional(upstream.count_probs)),
            (array(by_logits), array(by_choice)),
            array(by_potential),
        )
        _in_threads(_gradient_kernel(), arrays, arguments)
        found = Slopes(by_logits, None if one else by_choice, by_potential)
        under = theta.new_zeros(0).long() if step.fallback is None else step.fallback.nonzero().squeeze(1)
        if sweeps and len(under):
            self._settle_slopes(inputs, rule, step, upstream, found, under)
        return found

    def _settle_slopes(
        self, inputs: StepInputs, rule: Rule, step: Step, upstream: Upstream, found: Slopes, rows: Tensor
    ) -> None:
        from circuitroute.engines.subset.numba import unsettled

        few = Step(step.weights[rows], step.indices[rows], step.mask[rows], step.invalid[rows])
        arrived = Upstream(*(None if x is None else x[rows] for x in upstream))
        exact = unsettled.slopes(self, unsettled.at(inputs, rows), rule, few, arrived)
        for ours, theirs in zip(found, exact, strict=True):
            if ours is not None and theirs is not None:
                ours[rows] = theirs.to(ours.dtype)


def _step(inputs: StepInputs, rule: Rule, moments: bool) -> tuple[Step, Tensor, Tensor]:
    """(the step, rows that underflow, rows whose sample is uncertain), in float32."""
    arrays, theta = _Arrays.of(Inputs(inputs.logits, inputs.potential)), inputs.logits
    (T, n), J = theta.shape, inputs.potential.shape[-1]
    rows, S = T if moments else 0, max(1, J - 1)
    weights, indices = theta.new_empty(T, S), torch.empty(T, S, dtype=torch.int64, device="cpu")
    chosen, probs = torch.empty(T, n, dtype=torch.bool, device="cpu"), theta.new_empty(rows, J)
    log_partition, log_prob = theta.new_empty(rows), theta.new_empty(rows)
    log_root, shift = (theta.new_empty(rows, dtype=torch.float64) for _ in range(2))
    invalid, underflow, uncertain = (torch.empty(T, dtype=torch.bool, device="cpu") for _ in range(3))
    key = torch.empty(0, dtype=torch.int64, device="cpu") if inputs.key is None else inputs.key
    arguments = (
        array(theta[:0] if inputs.choice is theta else inputs.choice),
        _temperatures(inputs),
        array(key),
        array(chosen[:0] if inputs.mask is None else inputs.mask),
        (COMBINES.index(rule.combine), float(rule.share), moments),
        tuple(map(array, (log_partition, log_prob, log_root, shift, invalid, underflow, uncertain))),
        (array(weights), array(indices)),
        array(chosen),
        array(probs),
    )
    _in_threads(_step_kernels().step, arrays, arguments)
    known = (probs, log_partition, log_prob, shift, log_root, underflow) if moments else ()
    return Step(weights, indices, chosen, invalid, *known), underflow, uncertain


def _temperatures(inputs: StepInputs) -> NDArray[np.float32]:
    """[T] or [1]."""
    t = inputs.temperature
    return array(t.float().reshape(-1)) if isinstance(t, Tensor) else np.array([t], dtype=np.float32)


def _optional(x: Tensor | None, dims: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    """x, or nothing at all in as many dimensions."""
    return torch.empty((0,) * dims, dtype=dtype, device="cpu") if x is None else x.to(dtype)


def _given(x: Tensor | None) -> Tensor:
    if x is None:
        raise ValueError("step: it was taken without moments, and these are asked for now; take it with moments=True")
    return x


class _Arrays(NamedTuple):
    """What all kernels read, sharing the memory of tensors."""

    shape: NDArray[np.int64]
    logits: NDArray[Any]
    phi: NDArray[np.float64]
    limits: tuple[float, float, float]

    @staticmethod
    def of(rows: Inputs, narrow: bool = False) -> _Arrays:
        """The arrays of logits and potential; with a ``narrow`` tree, if asked for and possible.

        Raises:
            EngineError: tensors that are not in the CPU's memory.
        """
        logits, phi = rows.logits, given(rows.potential).double()
        if logits.device.type != "cpu":
            raise EngineError(
                f"engine='numba' runs on CPU tensors and these are on {logits.device}: move them, or use the "
                f"engine 'torch' (with_engine('torch')), which runs anywhere"
            )
        phi = phi if phi.dim() == 2 else phi[None]
        limits = (SMALLEST_COEFFICIENT[logits.dtype], NEGLIGIBLE[logits.dtype], MARGIN[logits.dtype])
        n, K, weights = logits.shape[1], phi.shape[1] - 1, array(phi)
        if narrow and _may_be_narrow(weights):
            shape = _narrow_shape(n, K, str(logits.dtype).removeprefix("torch."))
        else:
            shape = _shape(n, K)
        return _Arrays(shape, array(logits), weights, limits)

    @property
    def is_narrow(self) -> bool:
        """Whether coefficients are left out, so that some rows may need the whole tree."""
        return bool((self.shape[:, 3] < self.logits.shape[1]).any())


def _may_be_narrow(phi_PJ: NDArray[np.float64]) -> bool:
    from circuitroute.engines.subset.numba.narrow import may_be_narrow

    return may_be_narrow(phi_PJ)


# ---------------------------------------------------------------------------------------------- running kernels


def _kernels() -> Any:
    from circuitroute.engines.subset.numba import sweep

    return sweep


def _step_kernels() -> Any:
    from circuitroute.engines.subset.numba import step

    return step


def _gradient_kernel() -> Any:
    from circuitroute.engines.subset.numba.step_gradient import step_gradient

    return step_gradient


def _in_threads(kernel: Any, rows: _Arrays, arguments: tuple[Any, ...]) -> None:
    """Run the kernel on all rows."""
    in_threads(kernel, rows.logits, _numbers(rows.shape), (*rows, *arguments))


def warmup() -> None:
    """Compile all kernels, for both dtypes, or read them from numba's cache."""
    engine, zeros = NumbaSubset(), partial(torch.zeros, device="cpu")
    for dtype in (torch.float32, torch.float64):
        logits, potential, key = zeros(1, 2, dtype=dtype), zeros(2, dtype=dtype), zeros(1, dtype=torch.int64)
        inference = engine.infer(logits, potential, key)
        engine.second_derivative(logits, potential, inference, logits, None)
    logits, potential = zeros(1, 2, dtype=torch.float32), zeros(2, dtype=torch.float32)
    inputs, rule = StepInputs(logits, logits, 1.0, potential, key), Rule("softmax", 1.0, True)
    step = engine.step(inputs, rule, moments=True)
    engine.step_marginals(inputs, step, zeros(1, 2, dtype=torch.float32))
    engine.step_gradient(inputs, rule, step, Upstream(weights=step.weights))
