"""The bias that each token needs to choose an expert, and the bias that a share of the tokens needs at most.

Legend: T tokens, E experts; u_t [E] a token's logits with the bias b they were decided with, S the most probable
subset of u_t and |u_t(S)| its score.

**Needed biases.** A token that does not choose expert e would, were e's bias larger by (score of S) - (score of the
best subset with e); one that does, until it is smaller by (score of S) - (score of the best subset without e): the
max-marginal margins. Where e would take the place of another expert, the least of the token's margins of that kind is
taken off: the marginal expert is let in at the bias it has. For exactly k experts that gives, for both,

    needed bias = (k + 1)-th largest entry of u_t - (u_te - b_e),

which is published as quantile balancing (Su 2026, kexue.fm/archives/11619). Without taking it off, all experts
that are short of tokens would pass one another at once, and oscillate: two experts, one to be chosen, change places
forever. Where e comes in addition, as below the largest count of a range, its own threshold is right as it is.

**Order statistics** of each expert's needed biases over all tokens of all processes are found digit by digit of the
floating-point numbers, from summed histograms: exact, and the same on any number of processes.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from circuitroute.inference.distribution import SubsetDistribution
from circuitroute.routing.control import summed

BITS = 8  # of a digit
ENDS = 0.5  # how far from the only order statistic there is, where a bias is to let all or none in


def needed_bias(distribution: SubsetDistribution, bias: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """([T, E] float32 needed biases of the tokens to keep, [] how many experts their modes have); see the module.

    -inf where the token must choose the expert, whatever its bias, and inf where it cannot.

    Args:
        distribution: of T tokens at temperature 1, as they were decided, bias included.
        bias: [E].
        keep: [T] bool.
    """
    circuit, logits = distribution.circuit, distribution.logits.detach()
    own = bias.to(logits.device, torch.float64)
    moved = logits.double()
    if circuit.min_count == circuit.max_count and circuit.counts is not None:
        needed = _of_exactly(moved, circuit.max_count) + own
        chosen = keep.sum() * circuit.max_count
    else:
        needed = _by_margins(distribution, moved) + own
        chosen = distribution.mode_mask()[keep].sum()
    needed = torch.where(moved == math.inf, -math.inf, torch.where(moved == -math.inf, math.inf, needed))
    return needed[keep].float(), chosen


def _of_exactly(moved: Tensor, k: int) -> Tensor:
    """[T, E] by how much more than it has each expert's bias has to be."""
    if k == 0 or k == moved.shape[-1]:
        return torch.full_like(moved, math.inf if k == 0 else -math.inf)
    cutoff = moved.topk(k + 1, -1).values[:, -1:]
    return torch.where(moved.isfinite(), cutoff - moved, 0.0)


def _by_margins(distribution: SubsetDistribution, moved: Tensor) -> Tensor:
    """The same for any constraint, from the most probable subsets with and without each expert."""
    chosen = distribution.mode_mask()
    best = _score(distribution, moved, chosen)
    needed = torch.empty_like(moved)
    exchanged = torch.full_like(moved, math.inf)
    for e in range(moved.shape[-1]):
        has = chosen[:, e]
        other = _with_evidence(distribution, e, torch.where(has, -math.inf, math.inf).to(moved))
        mask = other.mode_mask()
        possible = ~_unsatisfiable(other) & moved[:, e].isfinite()
        margin = torch.where(possible, best - _score(distribution, moved, mask), math.inf).clamp(min=0)
        needed[:, e] = torch.where(has, -margin, margin)
        exchanged[:, e] = torch.where(~has & (chosen & ~mask).any(-1), margin, math.inf)
    gap = exchanged.amin(-1, keepdim=True)
    return torch.where(exchanged.isfinite(), needed - torch.where(gap.isfinite(), gap, 0.0), needed)


def _score(distribution: SubsetDistribution, moved: Tensor, mask: Tensor) -> Tensor:
    """[T] float64, the log-weight of subsets; what the evidence forces counts for nothing."""
    score = torch.where(mask & moved.isfinite(), moved, 0.0).sum(-1)
    potential = distribution.count_potential
    if potential is None:
        return score
    count = mask.sum(-1, keepdim=True).clamp(max=potential.shape[-1] - 1)
    return score + potential.detach().double().expand(len(mask), -1).gather(-1, count).squeeze(-1)


def _with_evidence(distribution: SubsetDistribution, expert: int, evidence: Tensor) -> SubsetDistribution:
    """The same logits, but for one expert, which is forced or forbidden."""
    logits = distribution.logits.detach().clone()
    logits[:, expert] = evidence.to(logits)
    return SubsetDistribution(distribution.circuit, logits, distribution.count_potential, validate_args=False)


def _unsatisfiable(distribution: SubsetDistribution) -> Tensor:
    """[T] bool."""
    found = distribution.rows.unsatisfiable()
    return torch.zeros_like(distribution.logits[:, 0], dtype=torch.bool) if found is None else found


def quantile_bias(
    needed: Tensor, chosen: Tensor, target: Tensor | None, bias: Tensor, group: dist.ProcessGroup | None
) -> Tensor:
    """[E] float64, between the n-th and the (n + 1)-th smallest needed bias, n = T target.

    Args:
        needed: [T, E] float32.
        chosen: [] how many experts the modes of this process have.
        target: [E], or None for equal parts of what is chosen.
        bias: [E], what remains where the evidence leaves no choice, or no process has tokens.

    Raises:
        ValueError: more tokens are forced to an expert, or fewer may choose it, than the target says.
    """
    device = needed.device
    now = bias.to(device, torch.float64)
    own = [(needed == -math.inf).sum(0), (needed < math.inf).sum(0)]
    sizes = torch.stack([torch.tensor(len(needed), device=device), chosen.to(device)])
    total = summed(torch.cat([*own, sizes]).double(), group)
    (forced, allowed), (tokens, load) = total[:-2].view(2, -1), total[-2:]
    if not float(tokens):
        return now
    share = (load / tokens / len(forced)).expand_as(forced) if target is None else target.to(forced)
    n = (share * tokens).round()
    if target is None:
        n = torch.minimum(torch.maximum(n, forced), allowed)
    _check(n, forced, allowed, int(tokens), share)
    low, high = order_statistics(needed, torch.stack([n, n + 1]), group).double()
    low = torch.where(n <= forced, -math.inf, low)
    high = torch.where(n >= allowed, math.inf, high)
    middle = (low + high) / 2
    middle = torch.where(low.isfinite(), torch.where(high.isfinite(), middle, low + ENDS), high - ENDS)
    return torch.where(low.isfinite() | high.isfinite(), middle, now)


def _check(n: Tensor, forced: Tensor, allowed: Tensor, tokens: int, share: Tensor) -> None:
    wrong = (n < forced) | (n > allowed)
    if bool(wrong.any()):
        e = int(wrong.nonzero()[0])
        raise ValueError(
            f"target[{e}]={float(share[e]):.6g}: no bias reaches that; expert {e} is forced in {int(forced[e])} of "
            f"{tokens} tokens, and allowed in {int(allowed[e])}, by infinite logits or the constraint"
        )


def order_statistics(values: Tensor, ranks: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """[R, E] the values of given ranks, 1 for the smallest, in each column of all processes; of ranks outside, any.

    Args:
        values: [T, E] float32, no NaN.
        ranks: [R, E], whole numbers.
    """
    digits = _sortable(values)
    R, E = ranks.shape
    rank = ranks.long() - 1
    prefix = torch.zeros_like(rank)
    column = torch.arange(E, device=values.device)
    for shift in range(32 - BITS, -1, -BITS):
        counts = torch.zeros(R, E, 1 << BITS, dtype=torch.int64, device=values.device)
        digit = (digits >> shift) & ((1 << BITS) - 1)
        for r in range(R):
            same = (digits >> (shift + BITS)) == prefix[r]
            place = (column * (1 << BITS) + digit)[same]
            counts[r] = torch.bincount(place, minlength=E << BITS).view(E, 1 << BITS)
        below = summed(counts, group).cumsum(-1)
        found = (below <= rank[..., None]).sum(-1).clamp(max=(1 << BITS) - 1)
        before = torch.where(found > 0, below.gather(-1, (found - 1).clamp(min=0)[..., None])[..., 0], 0)
        rank, prefix = rank - before, (prefix << BITS) | found
    return _from_sortable(prefix)


def _sortable(values: Tensor) -> Tensor:
    """int64 in 0..2^32 - 1 in the order of float32 values; -0 is 0."""
    bits = (values.float() + 0.0).contiguous().view(torch.int32).long() & 0xFFFFFFFF
    return torch.where(bits >> 31 == 1, 0xFFFFFFFF - bits, bits + 0x80000000)


def _from_sortable(digits: Tensor) -> Tensor:
    bits = torch.where(digits >> 31 == 1, digits - 0x80000000, 0xFFFFFFFF - digits)
    return torch.where(bits >> 31 == 1, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)
