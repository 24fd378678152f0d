"""The engine ``torch`` of the count family: batched eager tensor operations, any device.

Per block of tokens, laid out tokens last: solve the shift, multiply the tree of Poisson-binomial polynomials up,
weigh the root by potential and shift, and send the adjoint down (:mod:`.sweep`). The backward pass is dual numbers
through the same sweep, no N x N matrix: that of the SIMPLE estimator (Ahmed et al. 2023, arXiv:2210.01941).

Rows that underflow are swept again around the count of their mode; for all else see :mod:`circuitroute.engines.sweep`.
"""

from __future__ import annotations

from torch import Tensor

from circuitroute.engines.subset.naive import NaiveSubset
from circuitroute.engines.subset.torch import sweep
from circuitroute.engines.sweep import Inputs, Sweep, SweepEngine


class TorchSubset(SweepEngine):
    """Eager torch inference for the count family; float32 for float32 logits, float64 for float64."""

    name = "torch"
    naive = NaiveSubset()

    def sweep(self, rows: Inputs, key_T: Tensor | None, moments: bool) -> Sweep:
        """See :class:`circuitroute.engines.sweep.SweepEngine`."""
        return sweep.forward(rows, key_T, moments)

    def sweep_again(self, rows: Inputs, key_T: Tensor | None, moments: bool) -> Sweep:
        """See :class:`circuitroute.engines.sweep.SweepEngine`; around the count of the mode."""
        return sweep.forward(rows, key_T, moments, sweep.Centre.at_mode(rows))

    def derivative(self, rows: Inputs, shift_T: Tensor, u_TN: Tensor, v_TJ: Tensor | None) -> tuple[Tensor, Tensor]:
        """See :class:`circuitroute.engines.sweep.SweepEngine`."""
        return sweep.second_derivative(rows, shift_T, u_TN, v_TJ)
