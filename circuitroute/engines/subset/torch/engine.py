"""The engine ``torch`` of the count family: batched eager tensor operations, any device.

Legend: T tokens, B tokens of one block, N variables, K the largest allowed count, J = K + 1.

Per block of tokens, laid out tokens last: solve the shift, multiply the tree of Poisson-binomial polynomials up,
weigh the root by potential and shift, and send the adjoint down. With theta the logits and phi the count
potential,

    m = d log Z / d theta,    q = d log Z / d phi,

and for upstream gradients (u, v) of (m, q) the backward pass is the second derivative of log Z applied to them,
i.e. the derivative of (m, q) along (u, v): dual numbers through the same sweep, no N x N matrix. In particular
dm/dtheta is Cov(z). That is the SIMPLE estimator's backward pass (Ahmed et al. 2023, arXiv:2210.01941).

Tokens whose weight underflows are swept again around the count of their mode, and tokens whose sample float32 cannot
decide are drawn again in float64; the naive engine takes what is left. All of this is a property of the row alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from circuitroute.engines.autograd import attach
from circuitroute.engines.base import Inference, given
from circuitroute.engines.coins import coins, log_normaliser
from circuitroute.engines.root import Root, weigh
from circuitroute.engines.shift import Evidence, Shift, solve_shift
from circuitroute.engines.subset.mode import best_count, best_scores, count_ceilings
from circuitroute.engines.subset.naive import NaiveSubset, allowed_range
from circuitroute.engines.subset.torch import sampling, tree

# Logits per block of tokens: few enough to stay near the cache, enough to drown the cost of launching operations.
BLOCK_ELEMENTS = {"cpu": 1 << 18}
BLOCK_ELEMENTS_ELSEWHERE = 1 << 24


class TorchSubset:
    """Eager torch inference for the count family; float32 for float32 logits, float64 for float64."""

    name = "torch"

    @torch.no_grad()
    def infer(self, logits_TN: Tensor, potential: Tensor | None, key_T: Tensor | None = None) -> Inference:
        """See :class:`circuitroute.engines.base.Engine`."""
        potential = given(potential)
        sweep = _Sweep.empty(logits_TN, potential, with_marginals=True, with_sample=key_T is not None)
        for rows in _blocks(logits_TN):
            _forward_block(sweep, rows, logits_TN, potential, key_T)
        _mend(sweep, logits_TN, potential, key_T)
        return sweep.inference()

    def attach(self, inference: Inference, logits_TN: Tensor, potential: Tensor | None) -> Inference:
        """See :class:`circuitroute.engines.base.Engine`."""
        return attach(self, inference, logits_TN, given(potential))

    def second_derivative(
        self, logits_TN: Tensor, potential: Tensor | None, inference: Inference, u_TN: Tensor, v_TJ: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See :class:`circuitroute.engines.autograd.Differentiable`."""
        potential = given(potential)
        v = logits_TN.new_zeros(len(logits_TN), potential.shape[-1]) if v_TJ is None else v_TJ
        dm, dq = torch.empty_like(u_TN), torch.empty_like(v)
        for rows in _blocks(logits_TN):
            shift = Shift.from_exact(inference.shift[rows], logits_TN.dtype)
            _second_derivative_block(logits_TN, potential, shift, u_TN, v, rows, dm, dq)
        under = None if inference.fallback is None else inference.fallback.nonzero().squeeze(1)
        if under is not None and len(under):
            phi = _rows_of(potential, under)
            dm[under], dq[under] = _naive_second_derivative(logits_TN[under], phi, u_TN[under], v[under])
        return dm, dq

    def naive_moments(self, logits_TN: Tensor, potential: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`circuitroute.engines.autograd.Differentiable`."""
        return NaiveSubset().moments(logits_TN, given(potential))

    @torch.no_grad()
    def sample(self, logits_TN: Tensor, potential: Tensor | None, key_T: Tensor) -> Tensor:
        """See :class:`circuitroute.engines.base.Engine`."""
        potential = given(potential)
        sweep = _Sweep.empty(logits_TN, potential, with_marginals=False, with_sample=True)
        for rows in _blocks(logits_TN):
            _forward_block(sweep, rows, logits_TN, potential, key_T)
        _mend(sweep, logits_TN, potential, key_T)
        return sweep.drawn()


@dataclass
class _Sweep:
    """The results of a sweep as they are filled in, block by block."""

    log_partition: Tensor
    marginals: Tensor | None
    count_probs: Tensor | None
    log_root: Tensor
    shift: Shift
    mask: Tensor | None
    underflow: Tensor
    uncertain: Tensor

    @staticmethod
    def empty(logits_TN: Tensor, potential: Tensor, with_marginals: bool, with_sample: bool) -> _Sweep:
        T = logits_TN.shape[0]
        row = logits_TN.new_empty(T)
        flags = torch.zeros(T, dtype=torch.bool, device=logits_TN.device)
        return _Sweep(
            log_partition=row,
            marginals=torch.empty_like(logits_TN, memory_format=torch.contiguous_format) if with_marginals else None,
            count_probs=logits_TN.new_empty(T, potential.shape[-1]) if with_marginals else None,
            log_root=torch.empty_like(row, dtype=torch.float64),
            shift=Shift(torch.empty_like(row), torch.empty_like(row)),
            mask=torch.empty_like(logits_TN, dtype=torch.bool, memory_format=torch.contiguous_format)
            if with_sample
            else None,
            underflow=flags,
            uncertain=flags.clone(),
        )

    def put(self, rows: Tensor, other: _Sweep) -> None:
        """Replace ``rows`` by those of another sweep."""
        self._put_moments(rows, (other.log_partition, other.marginals, other.count_probs, other.log_root), other.shift)
        self.underflow[rows], self.uncertain[rows] = other.underflow, other.uncertain
        if self.mask is not None and other.mask is not None:
            self.mask[rows] = other.mask

    def put_exact(self, rows: Tensor, exact: Inference) -> None:
        """Replace the moments of ``rows`` by those another engine computed."""
        moments = (exact.log_partition, exact.marginals, exact.count_probs, exact.log_root)
        self._put_moments(rows, moments, Shift.from_exact(exact.shift, self.log_partition.dtype))

    def _put_moments(self, rows: Tensor, moments: tuple[Tensor | None, ...], shift: Shift) -> None:
        ours = (self.log_partition, self.marginals, self.count_probs, self.log_root)
        for mine, other in zip(ours, moments, strict=True):
            if mine is not None and other is not None:
                mine[rows] = other
        self.shift.high[rows], self.shift.low[rows] = shift.high, shift.low

    def drawn(self) -> Tensor:
        """[T, N] bool, the samples."""
        if self.mask is None:
            raise RuntimeError("this sweep draws no sample")  # cannot happen: asked for at its creation
        return self.mask

    def inference(self) -> Inference:
        """The finished results."""
        if self.marginals is None:
            raise RuntimeError("this sweep has no marginals")  # cannot happen: only sample() goes without
        return Inference(
            self.log_partition,
            self.marginals,
            self.count_probs,
            self.shift.exact(),
            self.log_root,
            self.mask,
            self.underflow,
        )


@dataclass(frozen=True)
class _Aim:
    """Where to centre a second sweep: ``counts`` [T], and ``ceilings`` [T, J] on the log of a count's share in Z."""

    counts: Tensor
    ceilings: Tensor

    @staticmethod
    def at_mode(logits_TN: Tensor, potential: Tensor) -> _Aim:
        scores, _ = best_scores(logits_TN, potential)
        return _Aim(best_count(scores).to(logits_TN.dtype), count_ceilings(scores, logits_TN.shape[1]))


def _blocks(logits_TN: Tensor) -> list[slice]:
    T, N = logits_TN.shape
    size = max(1, BLOCK_ELEMENTS.get(logits_TN.device.type, BLOCK_ELEMENTS_ELSEWHERE) // N)
    return [slice(i, min(i + size, T)) for i in range(0, T, size)]


def _forward_block(
    sweep: _Sweep,
    rows: slice,
    logits_TN: Tensor,
    potential: Tensor,
    key_T: Tensor | None,
    aim: _Aim | None = None,
) -> None:
    """Fill ``rows`` of the sweep, centred where ``aim`` says, or on the allowed count nearest to the natural one."""
    logits_NB = logits_TN[rows].t().contiguous()
    phi_JB = _potential_block(potential, rows)
    evidence = Evidence.of(logits_NB)
    shift = _solve(logits_NB, phi_JB, evidence, None if aim is None else aim.counts[rows])
    absent, present = coins(logits_NB, shift, evidence)
    levels = tree.up(tree.leaves(absent, present), phi_JB.shape[0] - 1)
    log_coins = log_normaliser(logits_NB, shift, absent, present, evidence)
    ceiling_JB = None if aim is None else aim.ceilings[rows].t() - log_coins
    root = _weigh_root(levels, phi_JB, shift, evidence, ceiling_JB)

    sweep.shift.high[rows], sweep.shift.low[rows] = shift.high, shift.low
    sweep.underflow[rows] = root.underflow
    sweep.log_root[rows] = root.log_total
    sweep.log_partition[rows] = (root.log_total + log_coins).to(logits_NB.dtype)
    if sweep.marginals is not None and sweep.count_probs is not None:
        below = tree.down(levels, root.adjoint.unsqueeze(1))[: present.shape[0]]
        marginals = below.mul_(present).clamp_(max=1.0)  # rounding may go an ulp beyond
        if evidence is not None:
            marginals.masked_fill_(logits_NB == math.inf, 1.0)
        sweep.marginals[rows] = marginals.t()
        sweep.count_probs[rows] = root.probs.t()
    if sweep.mask is not None and key_T is not None:
        mask_NB, sweep.uncertain[rows] = _sample_block(levels, root.probs, key_T[rows])
        sweep.mask[rows] = mask_NB[: present.shape[0]].t()


def _sample_block(levels: list[Tensor], probs_JB: Tensor, key_B: Tensor) -> tuple[Tensor, Tensor]:
    counts, uncertain = sampling.draw_count(probs_JB.clone(), key_B)
    if len(levels) == 1:  # a single variable: its count is its mask
        return counts > 0, uncertain
    mask, doubt = sampling.split_counts(levels, counts, key_B)
    return mask, uncertain | doubt


def _potential_block(potential: Tensor, rows: slice) -> Tensor:
    """[J, B], or [J, 1] where all tokens share it."""
    return potential[:, None] if potential.dim() == 1 else potential[rows].t()


def _solve(logits_NB: Tensor, phi_JB: Tensor, evidence: Evidence | None, centre_B: Tensor | None) -> Shift:
    if centre_B is not None:
        return solve_shift(logits_NB, evidence, centre_B, centre_B, torch.zeros_like(centre_B))
    low, high = allowed_range(phi_JB.t())
    B = logits_NB.shape[1]
    if bool((low == high).all()):
        low = low.expand(B)
        return solve_shift(logits_NB, evidence, low, low, torch.zeros_like(low))
    at_low = phi_JB.gather(0, low.long()[None])[0]
    at_high = phi_JB.gather(0, high.long()[None])[0]
    slope = (at_high - at_low) / (high - low)
    slope = torch.where(torch.isfinite(slope), slope, 0.0)
    return solve_shift(logits_NB, evidence, low.expand(B), high.expand(B), slope.expand(B))


def _weigh_root(
    levels: list[Tensor],
    phi_JB: Tensor,
    shift: Shift,
    evidence: Evidence | None,
    ceiling_JB: Tensor | None = None,
) -> Root:
    coefficients = levels[-1][: phi_JB.shape[0], 0]
    counts = torch.arange(len(coefficients), device=phi_JB.device, dtype=torch.float64)
    return weigh(coefficients, counts, phi_JB, shift, evidence, ceiling_JB)


def _mend(sweep: _Sweep, logits_TN: Tensor, potential: Tensor, key_T: Tensor | None) -> None:
    """Redo the rows that underflowed, and redraw those whose sample is in doubt."""
    under = sweep.underflow.nonzero().squeeze(1)
    if len(under):
        _mend_underflow(sweep, under, logits_TN, potential, key_T)
    if sweep.mask is not None and key_T is not None:
        doubtful = (sweep.uncertain | sweep.underflow).nonzero().squeeze(1)
        if len(doubtful):
            phi = _rows_of(potential, doubtful)
            sweep.mask[doubtful] = _redraw(logits_TN[doubtful], phi, key_T[doubtful])


def _mend_underflow(sweep: _Sweep, under: Tensor, logits_TN: Tensor, potential: Tensor, key_T: Tensor | None) -> None:
    """Far-apart allowed counts, or potentials that fight the logits, put the weight where the first shift does not
    look. A second sweep centred on the count of the mode mends nearly all of them, the naive engine the rest."""
    logits, phi, key = logits_TN[under], _rows_of(potential, under), None if key_T is None else key_T[under]
    again = _Sweep.empty(logits, phi, sweep.marginals is not None, sweep.mask is not None)
    aim = _Aim.at_mode(logits, phi)
    for rows in _blocks(logits):
        _forward_block(again, rows, logits, phi, key, aim)
    sweep.put(under, again)
    still = sweep.underflow.nonzero().squeeze(1)
    if len(still):
        sweep.put_exact(still, NaiveSubset().infer(logits_TN[still], _rows_of(potential, still)))


def _redraw(logits_TN: Tensor, potential: Tensor, key_T: Tensor) -> Tensor:
    """[T, N] bool: the samples in float64, and by the naive engine where even that is in doubt."""
    logits, phi = logits_TN.double(), potential.double()
    again = _Sweep.empty(logits, phi, with_marginals=False, with_sample=True)
    for rows in _blocks(logits):
        _forward_block(again, rows, logits, phi, key_T)
    mask, doubtful = again.drawn(), (again.uncertain | again.underflow).nonzero().squeeze(1)
    if len(doubtful):
        mask[doubtful] = NaiveSubset().sample(logits[doubtful], _rows_of(phi, doubtful), key_T[doubtful])
    return mask


def _rows_of(potential: Tensor, rows: Tensor) -> Tensor:
    return potential if potential.dim() == 1 else potential[rows]


def _second_derivative_block(
    logits_TN: Tensor,
    potential: Tensor,
    shift: Shift,
    u_TN: Tensor,
    v_TJ: Tensor,
    rows: slice,
    dm_TN: Tensor,
    dq_TJ: Tensor,
) -> None:
    """Fill ``rows`` of the derivative of (m, q) along (u, v).

    With weights w_i = exp(theta_i - s), d w_i = w_i u_i; a leaf (absent, present) is (1, w_i) up to a constant that
    cancels, so its tangent is (0, present_i u_i). The root's adjoint is A_j = g_j / Z with g_j the weight of count
    j; dg_j = g_j v_j, hence dA_j = A_j (v_j - d log Z).
    """
    logits_NB = logits_TN[rows].t().contiguous()
    phi_JB = _potential_block(potential, rows)
    N, J = logits_NB.shape[0], phi_JB.shape[0]
    evidence = Evidence.of(logits_NB)
    absent, present = coins(logits_NB, shift, evidence)
    levels = tree.up(tree.leaves(absent, present), J - 1)
    tangent = torch.zeros_like(levels[0])
    torch.mul(present, u_TN[rows].t(), out=tangent[1, :N])
    moved_NB = tangent[1, :N].clone()
    tangents = tree.dual_up(levels, tangent)
    root = _weigh_root(levels, phi_JB, shift, evidence)
    d_root = tangents[-1][:J, 0]
    v_JB = v_TJ[rows].t()
    d_log_partition = (root.adjoint * d_root + root.probs * v_JB).sum(0)
    d_adjoint = root.adjoint * (v_JB - d_log_partition)
    a, da = tree.dual_down(levels, tangents, root.adjoint.unsqueeze(1), d_adjoint.unsqueeze(1))
    dm_TN[rows] = (da[:N] * present).addcmul_(a[:N], moved_NB).t()
    dq_TJ[rows] = (root.adjoint * d_root + root.probs * (v_JB - d_log_partition)).t()


def _naive_second_derivative(logits: Tensor, potential: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The same by autograd through the naive engine, for the few rows that underflow."""
    with torch.enable_grad():
        logits = logits.detach().double().requires_grad_()
        phi = potential.detach().double().expand(len(logits), -1).contiguous().requires_grad_()
        _, marginals, count_probs = NaiveSubset().moments(logits, phi)
        dm, dq = torch.autograd.grad((marginals * u).sum() + (count_probs * v).sum(), (logits, phi))
    return dm.to(u.dtype), dq.to(u.dtype)
