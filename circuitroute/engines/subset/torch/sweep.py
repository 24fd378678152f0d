"""A block of tokens through the six steps and the derivative, in batched tensor operations.

Legend: T tokens, B tokens of one block, N variables, J = K + 1 counts. Blocks lie tokens last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from circuitroute.engines.base import given
from circuitroute.engines.coins import coins, log_normaliser
from circuitroute.engines.root import weigh
from circuitroute.engines.shift import Evidence, Shift, solve_shift
from circuitroute.engines.subset.mode import best_count, best_scores, count_ceilings
from circuitroute.engines.subset.naive import allowed_range
from circuitroute.engines.subset.torch import sampling, tree
from circuitroute.engines.sweep import Block, Inputs, Sweep

# Logits per block of tokens: few enough to stay near the cache, enough to drown the cost of launching operations.
BLOCK_ELEMENTS = {"cpu": 1 << 18}
BLOCK_ELEMENTS_ELSEWHERE = 1 << 24


class Centre(NamedTuple):
    """Where to centre a sweep: ``counts`` [T], and ``ceilings`` [T, J] on the log of a count's share in Z."""

    counts: Tensor
    ceilings: Tensor

    @staticmethod
    def at_mode(rows: Inputs) -> Centre:
        """On the count of the mode, for rows that underflow.

        Far-apart allowed counts, or potentials that fight the logits, put the weight where the first shift does not
        look.
        """
        scores, _ = best_scores(rows.logits, given(rows.potential))
        return Centre(best_count(scores).to(rows.logits.dtype), count_ceilings(scores, rows.logits.shape[1]))


def forward(rows: Inputs, key_T: Tensor | None, moments: bool, centre: Centre | None = None) -> Sweep:
    """A sweep centred where ``centre`` says, or on the allowed count nearest to the natural one."""
    sweep = Sweep.empty(rows.logits, given(rows.potential).shape[-1], moments, key_T is not None)
    for part in _blocks(rows.logits):
        block = _Block.up(rows, part, None, None if centre is None else Centre(*(x[part] for x in centre)))
        sweep.fill(part, block, key_T)
    return sweep


def second_derivative(rows: Inputs, shift_T: Tensor, u_TN: Tensor, v_TJ: Tensor | None) -> tuple[Tensor, Tensor]:
    """The derivative of (m, q) along (u, v)."""
    v = rows.logits.new_zeros(len(u_TN), given(rows.potential).shape[-1]) if v_TJ is None else v_TJ
    dm, dq = torch.empty_like(u_TN), torch.empty_like(v)
    for part in _blocks(rows.logits):
        block = _Block.up(rows, part, Shift.from_exact(shift_T[part], rows.logits.dtype))
        dm_NB, dq_JB = block.derivative(u_TN[part].t(), v[part].t())
        dm[part], dq[part] = dm_NB.t(), dq_JB.t()
    return dm, dq


def _blocks(logits_TN: Tensor) -> list[slice]:
    T, N = logits_TN.shape
    size = max(1, BLOCK_ELEMENTS.get(logits_TN.device.type, BLOCK_ELEMENTS_ELSEWHERE) // N)
    return [slice(i, min(i + size, T)) for i in range(0, T, size)]


@dataclass(frozen=True)
class _Block(Block):
    """A block of tokens swept upward, with its tree."""

    levels: list[Tensor]

    @staticmethod
    def up(rows: Inputs, part: slice, shift: Shift | None, centre: Centre | None = None) -> _Block:
        """Shift (unless it is known), coins, tree up, root."""
        logits, potential = rows.logits[part].t().contiguous(), given(rows.potential)
        phi_JB = potential[:, None] if potential.dim() == 1 else potential[part].t()  # [J, 1] where it is shared
        evidence = Evidence.of(logits)
        if shift is None:
            shift = _solve(logits, phi_JB, evidence, None if centre is None else centre.counts)
        levels = tree.up(tree.leaves(*coins(logits, shift, evidence)), len(phi_JB) - 1)
        absent, present = levels[0][:, : len(logits)]
        coefficients = levels[-1][: len(phi_JB), 0]
        counts = torch.arange(len(coefficients), device=logits.device, dtype=torch.float64)
        ceilings = None
        if centre is not None:
            ceilings = centre.ceilings.t() - log_normaliser(logits, shift, absent, present, evidence)
        root = weigh(coefficients, counts, phi_JB, shift, evidence, ceilings)
        return _Block(logits, evidence, shift, absent, present, root, slice(None), levels)

    def sample(self, key_B: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`circuitroute.engines.sweep.Block`."""
        counts, uncertain = sampling.draw_count(self.root.probs, key_B)
        mask, doubt = sampling.split_counts(self.levels, counts, key_B)
        return mask[: len(self.logits)].t(), uncertain | doubt

    def down(self) -> Tensor:
        """See :class:`circuitroute.engines.sweep.Block`."""
        return tree.down(self.levels, self.root.adjoint.unsqueeze(1))[: len(self.logits)]

    def derivative(self, u_NB: Tensor, v_JB: Tensor) -> tuple[Tensor, Tensor]:
        """([N, B], [J, B]) the derivative of (m, q) along (u, v): dual numbers through the same tree.

        Up to a factor that cancels, a leaf (absent, present) = (q, p) is a coin with p + q = 1, and its tangent is
        (-w, w) with w = p q u. (0, p u) would do as well, but such tangents add up over the tree, to about the
        expected count times u, and the small covariance would be left of them by cancellation. The root's adjoint is
        A_j = g_j / Z, with g_j = exp(phi_j + s j) the weight of count j and c_j its coefficient: dg_j = g_j v_j, hence
        with q_j = A_j c_j

            d log Z = sum_j A_j dc_j + q_j v_j,    dA_j = A_j (v_j - d log Z),    dq_j = A_j dc_j + c_j dA_j.
        """
        n, (adjoint, probs) = len(self.logits), (self.root.adjoint, self.root.probs)
        tangent = torch.zeros_like(self.levels[0])
        torch.mul(self.present, u_NB, out=tangent[1, :n]).mul_(self.absent)
        torch.neg(tangent[1, :n], out=tangent[0, :n])
        tangents = tree.dual_up(self.levels, tangent)
        moved = adjoint * tangents[-1][: len(v_JB), 0]
        slope = v_JB - (moved + probs * v_JB).sum(0)
        a, da = tree.dual_down(self.levels, tangents, adjoint.unsqueeze(1), (adjoint * slope).unsqueeze(1))
        return (da[:n] * self.present).addcmul_(a[:n], tangent[1, :n]), moved + probs * slope


def _solve(logits_NB: Tensor, phi_JB: Tensor, evidence: Evidence | None, centre_B: Tensor | None) -> Shift:
    """The shift whose expected count is the centre, or lies between the smallest and the largest allowed count."""
    if centre_B is not None:
        return solve_shift(logits_NB, evidence, centre_B, centre_B, torch.zeros_like(centre_B))
    low, high = allowed_range(phi_JB.t())
    B = logits_NB.shape[1]
    if bool((low == high).all()):
        low = low.expand(B)
        return solve_shift(logits_NB, evidence, low, low, torch.zeros_like(low))
    at_low, at_high = (phi_JB.gather(0, count.long()[None])[0] for count in (low, high))
    slope = (at_high - at_low) / (high - low)
    slope = torch.where(torch.isfinite(slope), slope, 0.0)
    return solve_shift(logits_NB, evidence, low.expand(B), high.expand(B), slope.expand(B))
