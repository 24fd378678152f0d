"""What a budget over the tokens of a sequence leaves to each of them: the algebra of layers, along tokens.

Legend: S sequences, E experts, J counts 0..K of a token, L tokens of a block, W = L K + 1 counts that a block can
spend; c experts spent, R tokens to come.

As over layers (:mod:`circuitroute.layers.budget`), a token decides under the count potential V(c + j): the log weight
of all ways in which the tokens after it can go on. Their logits are not known yet. One vector q stands for the count of
every token to come, so that

    V_R(c) = log P(c + n_1 + ... + n_R is an allowed total),    n_r independent, of law q.

For the tokens within reach, V is found by the backward recursion V_R(c) = log sum_j q(j) e^V_{R-1}(c + j), exactly.
At the end of what is in reach, if that is not the end, it is Chernoff's bound, the smallest exponential one, which is
exact to a term of order log R:

    V_R(c) = -R max_s (s x - log sum_j q(j) e^(s j)),    x R the nearest total to R mean(q) that c leaves.

Whatever q holds, the -inf of V are exact: from there no allowed total is reached, by any counts that a token may have.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from circuitroute._validate import as_int, int_at_least
from circuitroute.constraints import Constraint
from circuitroute.constraints.counts import AtMost, Count
from circuitroute.errors import InfeasibleError

# In place of -inf inside sums of exponentials; beyond any sum of logits.
DEAD = -1e30
# Slopes within which Chernoff's bound is looked for, and by how many halvings.
STEEPEST = 512.0
HALVINGS = 44
# Of totals and counts with gaps, what is reachable is kept for every so many tokens.
STRIDE = 32


class Total(NamedTuple):
    """How many experts the tokens of a sequence may have in all.

    Attributes:
        constraint: as it was given; a number is at most that many.
        length: how many tokens it is for.
        counts: what a token may have, increasing.
        allowed: the totals that it allows and that so many tokens can have, increasing.
    """

    constraint: Constraint
    length: int
    counts: tuple[int, ...]
    allowed: tuple[int, ...]

    @staticmethod
    def of(total: int | Constraint, length: int, counts: tuple[int, ...]) -> Total:
        """Of unchecked ones.

        Raises:
            TypeError: neither a number nor a constraint on a count.
            InfeasibleError: no total of so many tokens is allowed.
        """
        constraint = (
            total if isinstance(total, Constraint) else AtMost(int_at_least("total", as_int("total", total), 0))
        )
        if not isinstance(constraint, Count):
            raise TypeError(f"total={total!r}: expected a number of experts, or a count such as cr.Between(90, 128)")
        low, high = length * counts[0], length * counts[-1]
        allowed = _allowed(constraint, low, high)
        found = Total(constraint, length, counts, allowed)
        if not allowed or not bool(found.open(length, torch.zeros(1, dtype=torch.int64)).all()):
            raise InfeasibleError(
                f"total={total!r} cannot be met: {length} tokens of {_shown(counts)} experts each have between {low} "
                f"and {high}; change total, or what the circuit allows a token"
            )
        return found

    def open(self, left: int, spent: Tensor) -> Tensor:
        """Whether an allowed total can still be met from what is spent, with so many tokens left: bool, its shape."""
        if not self.allowed:
            return torch.zeros_like(spent, dtype=torch.bool)
        if self._dense:
            least, most = self.allowed[0] - left * self.counts[-1], self.allowed[-1] - left * self.counts[0]
            return (spent >= least) & (spent <= most)
        bits = _reachable(self, left)
        digits = bin(bits)[2:][::-1] + "0"
        table = torch.from_numpy(np.frombuffer(digits.encode(), np.uint8) == ord("1"))
        return table.to(spent.device)[spent.clamp(max=len(table) - 1)]

    @property
    def _dense(self) -> bool:
        """Whether neither counts nor totals have gaps."""
        return all(numbers[-1] - numbers[0] == len(numbers) - 1 for numbers in (self.counts, self.allowed))


def _shown(counts: tuple[int, ...]) -> str:
    return f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])


@functools.lru_cache(maxsize=64)
def _allowed(constraint: Count, low: int, high: int) -> tuple[int, ...]:
    """The counts in low..high that a constraint allows; kept, since a sequence is decided in many calls."""
    return tuple(c for c in range(low, high + 1) if constraint.allows(c))


@functools.lru_cache(maxsize=4096)
def _reachable(total: Total, left: int) -> int:
    """Bit c tells whether an allowed total is met from c spent with so many tokens left."""
    steps = min(left, STRIDE)
    bits = _reachable(total, left - steps) if left > steps else sum(1 << c for c in total.allowed)
    for _ in range(steps):
        bits = functools.reduce(int.__or__, (bits >> count for count in total.counts))
    return bits


def block_at(position: int, block: int) -> tuple[int, int]:
    """The block [start, end) that a position lies in: of 1, 1, 2, 4, ... tokens at first, then of ``block`` each."""
    if position >= block:
        start = position - position % block
        return start, start + block
    start = 1 << position.bit_length() - 1 if position else 0
    return start, min(max(1, 2 * start), block)


def messages(total: Total, left: int, reach: int, tokens: int, spent: Tensor, log_q: Tensor) -> Tensor:
    """V of a block: [S, L + 1, W] float64; entry [s, i, w] after i of its tokens, which spent w; ``DEAD`` where closed.

    Args:
        left: how many tokens are to come, those of the block among them.
        reach: for how many of them the recursion is exact; L at least.
        tokens: L.
        spent: [S] int64, before the block.
        log_q: [S, J] float64, log q, -inf for counts that no token may have.
    """
    J = log_q.shape[-1]
    at = spent[:, None] + torch.arange(reach * (J - 1) + 1, device=spent.device)
    later = torch.where(total.open(left - reach, at), _far(total, left - reach, at, log_q), DEAD)
    weights = log_q.clamp(min=DEAD)[:, None, :]
    found = [later]
    for _ in range(reach):
        windows = F.pad(later, (0, J - 1), value=DEAD).unfold(-1, J, 1)
        later = (windows + weights).logsumexp(-1).clamp(min=DEAD)
        later = torch.where(later > 0.5 * DEAD, later, DEAD)
        found.append(later)
    return torch.stack(found[: -tokens - 2 : -1], dim=1)[..., : tokens * (J - 1) + 1].contiguous()


def _far(total: Total, left: int, spent_SW: Tensor, log_q: Tensor) -> Tensor:
    """[S, W] Chernoff's bound on log P(the tokens left add up to an allowed total); 0 where none are left."""
    if not left:
        return torch.zeros_like(spent_SW, dtype=torch.float64)
    count = torch.arange(log_q.shape[-1], device=log_q.device, dtype=torch.float64)
    mean = (log_q.softmax(-1) * count).sum(-1, keepdim=True)
    lowest, highest = ((bound - spent_SW) / left for bound in (total.allowed[0], total.allowed[-1]))
    x = mean.maximum(lowest).minimum(highest).clamp(total.counts[0], total.counts[-1])
    low, high = torch.full_like(x, -STEEPEST), torch.full_like(x, STEEPEST)
    weights = log_q.log_softmax(-1)[:, None, :]
    for _ in range(HALVINGS):
        slope = 0.5 * (low + high)
        tilted = ((weights + slope[..., None] * count).softmax(-1) * count).sum(-1)
        low, high = torch.where(tilted < x, slope, low), torch.where(tilted < x, high, slope)
    slope = 0.5 * (low + high)
    rate = slope * x - (weights + slope[..., None] * count).logsumexp(-1)
    # At the mean the bound is 1: the halvings' error would be multiplied.
    return -left * torch.where(x == mean, 0.0, rate.clamp(min=0))


def ahead(messages_SLW: Tensor, after: int, spent_S: Tensor, J: int) -> Tensor:
    """[S, J] what each count of the token before leaves: V after so many tokens of the block, ``DEAD`` where closed.

    Args:
        spent_S: [S] int64, in this block before that token.
    """
    at = spent_S[:, None] + torch.arange(J, device=spent_S.device)
    return messages_SLW[:, after].gather(1, at)
