"""A block of tokens through the six steps and the derivative, and the mode, in batched tensor operations.

Legend: T tokens, B tokens of one block, N variables, M rows (one per node), J the counts that the root tells apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from circuitroute.engines.coins import coins
from circuitroute.engines.layered.torch import tree
from circuitroute.engines.layered.torch.plan import Plan
from circuitroute.engines.layered.torch.sampling import Best, Draw, walk
from circuitroute.engines.layered.torch.unrolled import UnrolledMode
from circuitroute.engines.logspace import LOG_ZERO, is_zero, log_weights
from circuitroute.engines.root import weigh
from circuitroute.engines.shift import Evidence, Shift, solve_shift
from circuitroute.engines.sweep import Block, Sweep

# Values per block of tokens, and fewest tokens: near the cache, yet enough to drown the cost of launching operations.
BLOCK_VALUES = {"cpu": 1 << 21}
BLOCK_VALUES_ELSEWHERE = 1 << 27
MIN_BLOCK = 32
# Rounding grows with depth; so does the margin within which a choice counts as undecided. Circuits may have any shape,
# so it is wider than that of balanced trees.
MARGIN = {torch.float32: 3e-5, torch.float64: 1e-11}
DEPTH_OF_MARGIN = 32


def forward(plan: Plan, logits_TN: Tensor, J: int | None, key_T: Tensor | None, moments: bool) -> Sweep:
    """A sweep; with the posterior of ``J`` counts, which the root must tell apart, unless that is None."""
    sweep = Sweep.empty(logits_TN, J, moments, key_T is not None)
    for part in _blocks(logits_TN, plan.rows):
        sweep.fill(part, _Block.up(plan, logits_TN[part]), key_T)
    return sweep


def second_derivative(
    plan: Plan, logits_TN: Tensor, J: int, shift_T: Tensor, u_TN: Tensor, v_TJ: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The derivative of (m, q) along u in the logits and v in a potential on the counts; None for q as in forward."""
    dm = torch.empty_like(u_TN)
    dq = logits_TN.new_zeros(len(u_TN), J) if plan.counts else None
    for part in _blocks(logits_TN, plan.rows):
        block = _Block.up(plan, logits_TN[part], Shift.from_exact(shift_T[part], logits_TN.dtype))
        dm_NB, dq_JB = block.derivative(u_TN[part].t(), None if v_TJ is None else v_TJ[part].t())
        dm[part] = dm_NB.t()
        if dq is not None:
            dq[part, block.counts] = dq_JB.t()
    return dm, dq


def mode(plan: Plan, by_rank: Callable[[], UnrolledMode], logits_TN: Tensor) -> Tensor:
    """[T, N] bool, the most probable subset; see :mod:`circuitroute.engines.layered.precedence` for ties.

    In float64, where each value is the very number the naive engine computes: a sum of logits. Where the walk down
    meets no equals there is a single best subset; the other tokens are decided again, ``by_rank``.
    """
    mask = torch.zeros_like(logits_TN, dtype=torch.bool, memory_format=torch.contiguous_format)
    tied = torch.zeros(len(mask), dtype=torch.bool, device=mask.device)
    for part in _blocks(logits_TN, plan.rows):
        mask[part], tied[part] = _mode_block(plan, logits_TN[part].double())
    decide_ties(mask, tied, by_rank, logits_TN)
    return mask


def decide_ties(mask: Tensor, tied: Tensor, by_rank: Callable[[], UnrolledMode], logits_TN: Tensor) -> None:
    """Replace the rows of ``mask`` that are ``tied`` [T], by the ranks of their variables."""
    again = tied.nonzero()[:, 0]
    if len(again):
        decide = by_rank()
        for part in _blocks(again, decide.values_per_token):
            mask[again[part]] = decide(logits_TN[again[part]])


def _blocks(tokens: Tensor, values_per_token: int) -> list[slice]:
    values = BLOCK_VALUES.get(tokens.device.type, BLOCK_VALUES_ELSEWHERE)
    size = max(MIN_BLOCK, values // values_per_token)
    return [slice(i, min(i + size, len(tokens))) for i in range(0, len(tokens), size)]


@dataclass(frozen=True)
class _Block(Block):
    """A block of tokens swept upward, with the values of all nodes."""

    plan: Plan
    rows: Tensor  # [M, B]

    @staticmethod
    def up(plan: Plan, logits_BN: Tensor, shift: Shift | None = None) -> _Block:
        """Shift (unless it is known), coins, the circuit up, root."""
        logits = logits_BN.t().contiguous()
        evidence = Evidence.of(logits)
        shift = _solve(plan, logits, evidence) if shift is None else shift
        absent, present = coins(logits, shift, evidence)
        rows = logits.new_zeros(plan.rows, logits.shape[1])
        _set_leaves(plan, rows, absent, present, 1.0)
        tree.up(plan.steps, rows)
        counts = torch.tensor(plan.counts or (0,), dtype=torch.float64, device=logits.device)
        coefficients = rows[_coefficients(plan)]
        potential = torch.zeros_like(coefficients[:, :1])
        root = weigh(coefficients, counts, potential, shift, evidence if plan.counts else None)
        return _Block(logits, evidence, shift, absent, present, root, list(plan.counts or ()), plan, rows)

    def sample(self, key_B: Tensor) -> tuple[Tensor, Tensor]:
        """See :class:`circuitroute.engines.sweep.Block`."""
        plan = self.plan
        draw = Draw(plan, key_B, MARGIN[self.rows.dtype] * max(1.0, len(plan.steps) / DEPTH_OF_MARGIN))
        chosen = torch.zeros_like(key_B)
        if plan.root is not None:
            left, right, slot = (plan.tensor(f"root {i}", array) for i, array in enumerate(plan.root))
            weights = (self.rows[left] * self.rows[right]).mul_(self.root.adjoint[slot])
            chosen = draw.invert(weights[:, None], key_B.new_full((1, len(key_B)), plan.nodes - 1))[0]
        mask = walk(plan, self.rows, torch.Tensor.mul_, 0.0, draw, chosen)
        return mask, draw.uncertain

    def down(self) -> Tensor:
        """See :class:`circuitroute.engines.sweep.Block`."""
        adjoints = torch.zeros_like(self.rows)
        adjoints[_coefficients(self.plan)] = self.root.adjoint
        tree.down(self.plan.steps, self.rows, adjoints)
        return adjoints[self.plan.present]

    def derivative(self, u_NB: Tensor, v_JB: Tensor | None) -> tuple[Tensor, Tensor]:
        """([N, B], [J, B]) the derivative of (m, q) along (u, v): dual numbers through the same circuit.

        The derivation stands in :meth:`circuitroute.engines.subset.torch.sweep._Block.derivative`.
        """
        plan, coefficients, adjoint = self.plan, _coefficients(self.plan), self.root.adjoint
        tangents, adjoints, moved = (torch.zeros_like(self.rows) for _ in range(3))
        tangents[plan.present] = self.present * torch.where(torch.isinf(self.logits), 0.0, u_NB)
        tree.dual_up(plan.steps, self.rows, tangents)
        slope = torch.zeros_like(adjoint) if v_JB is None or not plan.counts else v_JB[self.counts]
        by_coefficients = adjoint * tangents[coefficients]
        slope = slope - (by_coefficients + self.root.probs * slope).sum(0)
        adjoints[coefficients] = adjoint
        moved[coefficients] = adjoint * slope
        tree.dual_down(plan.steps, self.rows, tangents, adjoints, moved)
        dm = (moved[plan.present] * self.present).addcmul_(adjoints[plan.present], tangents[plan.present])
        return dm, by_coefficients + self.root.probs * slope


def _mode_block(plan: Plan, logits_BN: Tensor) -> tuple[Tensor, Tensor]:
    """([B, N], [B] bool): a most probable subset, and whether there may be others."""
    rows = logits_BN.new_full((plan.rows, len(logits_BN)), 2 * LOG_ZERO)
    _set_leaves(plan, rows, *log_weights(logits_BN), 0.0)
    tree.largest_up(plan.steps, rows)
    choose = Best(len(logits_BN), logits_BN.device)
    chosen = torch.zeros(len(logits_BN), dtype=torch.int64, device=logits_BN.device)
    best = rows[_coefficients(plan)].amax(0)
    if plan.root is not None:
        left, right = (plan.tensor(f"root {i}", plan.root[i]) for i in (0, 1))
        chosen = choose((rows[left] + rows[right])[:, None], chosen[None])[0]
    root = torch.where(is_zero(best), -1, chosen)
    return walk(plan, rows, torch.Tensor.add_, -math.inf, choose, root), choose.tied


def _set_leaves(plan: Plan, rows: Tensor, absent_NB: Tensor, present_NB: Tensor, true: float) -> None:
    rows[: plan.n], rows[plan.present], rows[2 * plan.n] = absent_NB, present_NB, true


def _coefficients(plan: Plan) -> Tensor:
    return plan.tensor("coefficients", plan.coefficients)


def _solve(plan: Plan, logits_NB: Tensor, evidence: Evidence | None) -> Shift:
    zero = torch.zeros_like(logits_NB[0])
    if plan.counts is None:
        return Shift(zero, zero)
    return solve_shift(logits_NB, evidence, zero + plan.counts[0], zero + plan.counts[-1], zero)
