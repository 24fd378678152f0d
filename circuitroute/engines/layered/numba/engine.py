"""The engine ``numba`` of arbitrary circuits: compiled loops on the CPU.

Legend: T tokens, N variables, K the largest allowed count.

The steps of the engine ``torch``, fused: a few tokens at a time go from logits to marginals, posterior and sample while
the values of all nodes are in the cache (:mod:`.sweep`, :mod:`.mode`). Results depend neither on the number of threads
nor on a row's neighbours. Rows that one sweep does not settle: :mod:`circuitroute.engines.sweep`. Where the mode meets
equals, the engine ``torch`` decides between them.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from circuitroute.circuit.counting import split_by_count
from circuitroute.circuit.graph import Graph, NodeKind
from circuitroute.engines.compiled import NO_KEYS, NO_MASKS, array, in_threads
from circuitroute.engines.layered.flat import Flat, flatten
from circuitroute.engines.layered.torch import sweep as of_torch
from circuitroute.engines.layered.torch.engine import TorchLayered
from circuitroute.engines.root import NEGLIGIBLE, SMALLEST_COEFFICIENT
from circuitroute.engines.sweep import Inputs, Sweep
from circuitroute.errors import EngineError


class NumbaLayered(TorchLayered):
    """Compiled inference for any smooth, decomposable, deterministic circuit on the CPU; float32 for float32 logits.

    Args:
        graph: the circuit.
        max_count: K, the largest number of variables an allowed subset selects.
        drawn: as for the engine ``torch``.
    """

    name = "numba"

    @cached_property
    def _moving(self) -> _Compiled:
        """For moments alone, and their derivative."""
        return _Compiled(flatten(self._graph, self._max_count))

    @cached_property
    def _drawing(self) -> _Compiled:
        """For samples, too."""
        same = self._drawn is self._graph
        return self._moving if same else _Compiled(flatten(self._drawn, self._max_count))

    @cached_property
    def _counter(self) -> NumbaLayered:
        return NumbaLayered(split_by_count(self._drawn), self._max_count)

    def sweep(self, rows: Inputs, key_T: Tensor | None, moments: bool) -> Sweep:
        """See :class:`circuitroute.engines.sweep.SweepEngine`."""
        logits, circuit = _on_cpu(rows.logits), self._moving if key_T is None else self._drawing
        flat, J = circuit.flat, self._max_count + 1 if self.gives_counts else None
        found = Sweep.empty(rows.logits, J, moments, key_T is not None)
        logits_TN, held = array(logits), (2 if moments else 1) * flat.rows
        key = NO_KEYS if key_T is None else array(key_T)
        mask = NO_MASKS if found.mask is None else array(found.mask)
        probs = logits_TN[:0] if found.count_probs is None else array(found.count_probs)
        lines = (found.log_partition, found.log_root, found.shift, found.fallback, found.uncertain)
        outputs = (tuple(map(array, lines)), array(found.marginals), probs, mask)
        given = (circuit.arrays, flat.counts is not None, logits_TN, circuit.limits(logits.dtype), key)
        in_threads(_kernels().forward, logits_TN, held, (*given, *outputs), flat.rows)
        return found

    def derivative(
        self, rows: Inputs, shift_T: Tensor, u_TN: Tensor, v_TJ: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """See :class:`circuitroute.engines.sweep.SweepEngine`."""
        logits, circuit, flat = _on_cpu(rows.logits), self._moving, self._moving.flat
        T, J = len(logits), flat.log_weights.shape[1]
        dm = torch.empty(u_TN.shape, dtype=logits.dtype, device="cpu")
        dq = None if not self.gives_counts else torch.empty(T, J, dtype=logits.dtype, device="cpu")
        none = logits.new_empty(0, 0)
        v = none if dq is None or v_TJ is None else v_TJ
        logits_TN = array(logits)
        given = (circuit.arrays, logits_TN, circuit.limits(logits.dtype))
        tensors = (shift_T, u_TN, v, dm, none if dq is None else dq)
        in_threads(_kernels().derivative, logits_TN, 4 * flat.rows, (*given, *map(array, tensors)), flat.rows)
        return dm, dq

    @torch.no_grad()
    def mode(self, logits_TN: Tensor) -> Tensor:
        """See :class:`circuitroute.engines.base.LayeredEngine`."""
        logits, circuit = _on_cpu(logits_TN).double(), self._moving
        mask = torch.empty(logits.shape, dtype=torch.bool, device="cpu")
        tied = torch.empty(len(logits), dtype=torch.bool, device="cpu")
        elements, _, _, root, shape, _ = circuit.arrays
        arguments = (elements, root, shape[0, 0], *map(array, (logits, mask, tied)))
        in_threads(_mode_kernel(), array(logits), circuit.flat.rows, arguments, circuit.flat.rows)
        of_torch.decide_ties(mask, tied, lambda: self._by_rank(logits.device), logits_TN)
        return mask


class _Compiled:
    """A circuit as the kernels read it."""

    def __init__(self, flat: Flat) -> None:
        self.flat = flat
        elements, uses = (flat.first, flat.left, flat.right), (flat.first_use, flat.parent, flat.sibling)
        root = (flat.root_left, flat.root_right, flat.root_count)
        self.arrays = (elements, uses, flat.number, root, flat.shape, flat.log_weights)

    def limits(self, dtype: torch.dtype) -> tuple[float, float, float]:
        """(smallest coefficient to trust, -log of a share that does not matter, margin of a choice)."""
        margin = of_torch.MARGIN[dtype] * max(1.0, self.flat.depth / of_torch.DEPTH_OF_MARGIN)
        return SMALLEST_COEFFICIENT[dtype], NEGLIGIBLE[dtype], margin


def _on_cpu(logits: Tensor) -> Tensor:
    if logits.device.type != "cpu":
        raise EngineError(
            f"engine='numba' runs on CPU tensors and these are on {logits.device}: move them, or use the "
            f"engine 'torch' (with_engine('torch')), which runs anywhere"
        )
    return logits


def warmup() -> None:
    """Compile all kernels, for both dtypes, or read them from numba's cache."""
    engine = NumbaLayered(Graph.of(1, [NodeKind.PRESENT], [0], [[]]), 1)
    for dtype in (torch.float32, torch.float64):
        logits, key = torch.zeros(1, 1, dtype=dtype, device="cpu"), torch.zeros(1, dtype=torch.int64, device="cpu")
        engine.second_derivative(logits, None, engine.infer(logits, None, key), logits, None)
    engine.mode(logits)


def _kernels() -> Any:
    from circuitroute.engines.layered.numba import sweep

    return sweep


def _mode_kernel() -> Any:
    from circuitroute.engines.layered.numba.mode import mode

    return mode
