"""The engine ``torch`` of arbitrary circuits: batched eager tensor operations, any device.

Legend: T tokens, B tokens of one block, N variables, M rows (one per node), J = K + 1 counts.

Per block of tokens: the literals as independent coins, the circuit's plan upward, the root weighed, the adjoint down.
The values are probabilities, sums of products of positive terms without logarithms. Where all nodes below the root
have definite counts the coins are centred by a shift as on the count family's engine, and the posterior of |S| comes
along; other circuits take the coins as they are. The gradient of the marginals is their derivative along the upstream
direction: dual numbers through the same steps.

A block is recomputed when its gradient is asked for. Nothing is kept between, so memory is one value per node and
token of a single block, whatever the batch.

Tokens whose root is too small to trust in float32 are swept again in float64, and by the naive engine if that is not
enough; tokens whose sample rounding could decide are drawn again likewise. All of this is a property of the row alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from circuitroute.circuit.counting import has_definite_counts, split_by_count
from circuitroute.circuit.graph import Graph
from circuitroute.engines.autograd import attach
from circuitroute.engines.base import Inference
from circuitroute.engines.coins import coins, log_normaliser
from circuitroute.engines.layered.naive import NaiveLayered
from circuitroute.engines.layered.torch import sweeps
from circuitroute.engines.layered.torch.plan import Plan, lay_out
from circuitroute.engines.layered.torch.walk import Draw, first_best, walk
from circuitroute.engines.logspace import LOG_ZERO, is_zero, log_weights
from circuitroute.engines.root import Root, weigh
from circuitroute.engines.shift import Evidence, Shift, solve_shift
from circuitroute.engines.subset.torch.sampling import MARGIN

# Values per block of tokens, and fewest tokens: near the cache, yet enough to drown the cost of launching operations.
BLOCK_VALUES = {"cpu": 1 << 21}
BLOCK_VALUES_ELSEWHERE = 1 << 27
MIN_BLOCK = 32
# Rounding grows with depth; so does the margin within which a choice counts as undecided.
DEPTH_OF_MARGIN = 32


class TorchLayered:
    """Eager torch inference for any smooth, decomposable, deterministic circuit; float32 for float32 logits.

    Args:
        graph: the circuit.
        max_count: K, the largest number of variables an allowed subset selects.
    """

    name = "torch"

    def __init__(self, graph: Graph, max_count: int) -> None:
        self._graph = graph
        self._max_count = max_count
        self._naive = NaiveLayered(graph)
        self._plans: dict[torch.device, Plan] = {}
        self.gives_counts = has_definite_counts(graph)

    def _plan(self, device: torch.device) -> Plan:
        if device not in self._plans:
            self._plans[device] = lay_out(self._graph, device)
        return self._plans[device]

    # ------------------------------------------------------------------ moments

    @torch.no_grad()
    def infer(self, logits_TN: Tensor, potential: Tensor | None, key_T: Tensor | None = None) -> Inference:
        """See :class:`circuitroute.engines.base.Engine`."""
        results = _Results.empty(logits_TN, self._plan(logits_TN.device), self._max_count, key_T is not None)
        self._fill(results, logits_TN, key_T)
        self._mend(results, logits_TN, key_T)
        return results.inference()

    def attach(self, inference: Inference, logits_TN: Tensor, potential: Tensor | None) -> Inference:
        """See :class:`circuitroute.engines.base.Engine`."""
        return attach(self, inference, logits_TN, None)

    def naive_moments(self, logits_TN: Tensor, potential: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """See :class:`circuitroute.engines.autograd.Differentiable`."""
        log_partition, marginals = self._naive.moments(logits_TN)
        if self._plan(logits_TN.device).counts is None:
            return log_partition, marginals, None
        return log_partition, marginals, self._naive.count_probs(logits_TN, self._max_count)

    def _fill(self, results: _Results, logits_TN: Tensor, key_T: Tensor | None) -> None:
        plan = self._plan(logits_TN.device)
        for rows in _blocks(logits_TN, plan):
            block = _Block.up(plan, logits_TN[rows])
            results.put_root(rows, block)
            if results.marginals is not None:
                results.marginals[rows] = block.marginals().t()
            if results.mask is not None and key_T is not None:
                results.mask[rows], results.uncertain[rows] = block.sample(key_T[rows])

    def _mend(self, results: _Results, logits_TN: Tensor, key_T: Tensor | None) -> None:
        """Redo the rows that underflowed, and redraw those whose sample is in doubt."""
        under = results.underflow.nonzero().squeeze(1)
        if len(under):
            results.put(under, self._exact(logits_TN[under]))
        if results.mask is not None and key_T is not None:
            doubtful = (results.uncertain | results.underflow).nonzero().squeeze(1)
            if len(doubtful):
                results.mask[doubtful] = self._redraw(logits_TN[doubtful], key_T[doubtful])

    def _exact(self, logits_TN: Tensor) -> Inference:
        """Moments in float64, and those of the rows that underflow even there by the naive engine."""
        if logits_TN.dtype == torch.float64:
            exact = self._naive.infer(logits_TN, None)
            counts = self.naive_moments(logits_TN, None)[2]
            return _with_counts(exact, counts)
        return self.infer(logits_TN.double(), None)

    @torch.no_grad()
    def sample(self, logits_TN: Tensor, potential: Tensor | None, key_T: Tensor) -> Tensor:
        """See :class:`circuitroute.engines.base.Engine`."""
        results = _Results.empty(logits_TN, self._plan(logits_TN.device), None, with_sample=True)
        self._fill(results, logits_TN, key_T)
        doubtful = (results.uncertain | results.underflow).nonzero().squeeze(1)
        mask = results.drawn()
        if len(doubtful):
            mask[doubtful] = self._redraw(logits_TN[doubtful], key_T[doubtful])
        return mask

    def _redraw(self, logits_TN: Tensor, key_T: Tensor) -> Tensor:
        """[T, N] bool: the samples in float64, and by the naive engine where even that is in doubt."""
        if logits_TN.dtype == torch.float64:
            return self._naive.sample(logits_TN, None, key_T)
        return self.sample(logits_TN.double(), None, key_T)

    @torch.no_grad()
    def mode(self, logits_TN: Tensor) -> Tensor:
        """[T, N] bool, a most probable subset; ties go to the first element of a sum, as on the naive engine.

        In float64, where each value is the very number the naive engine computes: a sum of logits.
        """
        plan = self._plan(logits_TN.device)
        mask = torch.zeros_like(logits_TN, dtype=torch.bool, memory_format=torch.contiguous_format)
        for rows in _blocks(logits_TN, plan):
            mask[rows] = _mode_block(plan, logits_TN[rows].double())
        return mask

    def count_probs(self, logits_TN: Tensor, K: int) -> Tensor:
        """[T, K + 1] P(|S| = j), differentiable, for circuits whose nodes have no definite counts.

        From the product of the circuit with a counter, which is made on first use.
        """
        counter = self._counter
        probs = counter.infer(logits_TN.detach(), None)
        if torch.is_grad_enabled() and logits_TN.requires_grad:
            probs = counter.attach(probs, logits_TN, None)
        if probs.count_probs is None:
            raise RuntimeError("nodes split by their count have definite counts")  # cannot happen
        return probs.count_probs

    @cached_property
    def _counter(self) -> TorchLayered:
        return TorchLayered(split_by_count(self._graph), self._max_count)

    # ------------------------------------------------------------------ gradients

    def second_derivative(
        self, logits_TN: Tensor, potential: Tensor | None, inference: Inference, u_TN: Tensor, v_TJ: Tensor | None
    ) -> tuple[Tensor, None]:
        """See :class:`circuitroute.engines.autograd.Differentiable`; there is no potential to differentiate by."""
        plan = self._plan(logits_TN.device)
        dm = torch.empty_like(u_TN)
        for rows in _blocks(logits_TN, plan):
            shift = Shift.from_exact(inference.shift[rows], logits_TN.dtype)
            block = _Block.up(plan, logits_TN[rows], shift)
            dm[rows] = block.moved_marginals(u_TN[rows].t(), None if v_TJ is None else v_TJ[rows].t()).t()
        under = None if inference.fallback is None else inference.fallback.nonzero().squeeze(1)
        if under is not None and len(under):
            dm[under] = self._exact_second_derivative(
                logits_TN[under], u_TN[under], None if v_TJ is None else v_TJ[under]
            )
        return dm, None

    def _exact_second_derivative(self, logits_TN: Tensor, u_TN: Tensor, v_TJ: Tensor | None) -> Tensor:
        """The same for the few rows that underflow: in float64, or by autograd through the naive engine."""
        if logits_TN.dtype == torch.float64:
            with torch.enable_grad():
                logits = logits_TN.detach().requires_grad_()
                _, marginals, counts = self.naive_moments(logits, None)
                inner = (marginals * u_TN).sum()
                inner = inner if counts is None or v_TJ is None else inner + (counts * v_TJ).sum()
                return torch.autograd.grad(inner, logits)[0]
        logits, u, v = logits_TN.double(), u_TN.double(), None if v_TJ is None else v_TJ.double()
        return self.second_derivative(logits, None, self.infer(logits, None), u, v)[0].to(u_TN.dtype)


@dataclass
class _Results:
    """The results of a sweep as they are filled in, block by block."""

    plan: Plan
    log_partition: Tensor
    marginals: Tensor | None
    count_probs: Tensor | None
    log_root: Tensor
    shift: Tensor
    mask: Tensor | None
    underflow: Tensor
    uncertain: Tensor

    @staticmethod
    def empty(logits_TN: Tensor, plan: Plan, max_count: int | None, with_sample: bool) -> _Results:
        """Room for all rows; for moments if ``max_count`` is given."""
        T = len(logits_TN)
        row = logits_TN.new_empty(T)
        flags = torch.zeros(T, dtype=torch.bool, device=logits_TN.device)
        counted = max_count is not None and plan.counts is not None
        return _Results(
            plan=plan,
            log_partition=row,
            marginals=None if max_count is None else logits_TN.new_empty(logits_TN.shape),
            count_probs=logits_TN.new_zeros(T, (max_count or 0) + 1) if counted else None,
            log_root=torch.empty_like(row, dtype=torch.float64),
            shift=torch.empty_like(row, dtype=torch.float64),
            mask=torch.empty(logits_TN.shape, dtype=torch.bool, device=logits_TN.device) if with_sample else None,
            underflow=flags,
            uncertain=flags.clone(),
        )

    def put_root(self, rows: slice, block: _Block) -> None:
        """What a block's root tells."""
        self.shift[rows] = block.shift.exact()
        self.underflow[rows] = block.root.underflow
        self.log_root[rows] = block.root.log_total
        self.log_partition[rows] = (block.root.log_total + block.log_coins).to(self.log_partition.dtype)
        if self.count_probs is not None and self.plan.counts is not None:
            self.count_probs[rows, list(self.plan.counts)] = block.root.probs.t()

    def put(self, rows: Tensor, exact: Inference) -> None:
        """Replace the moments of ``rows`` by those another engine computed."""
        theirs = (exact.log_partition, exact.marginals, exact.count_probs, exact.log_root, exact.shift)
        ours = (self.log_partition, self.marginals, self.count_probs, self.log_root, self.shift)
        for mine, other in zip(ours, theirs, strict=True):
            if mine is not None and other is not None:
                mine[rows] = other.to(mine.dtype)

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
            self.shift,
            self.log_root,
            self.mask,
            self.underflow,
        )


@dataclass
class _Block:
    """One block of tokens swept upward."""

    plan: Plan
    logits: Tensor  # [N, B]
    evidence: Evidence | None
    shift: Shift
    rows: Tensor  # [M, B]
    root: Root
    log_coins: Tensor  # [B] float64

    @staticmethod
    def up(plan: Plan, logits_BN: Tensor, shift: Shift | None = None) -> _Block:
        logits = logits_BN.t().contiguous()
        evidence = Evidence.of(logits)
        shift = _solve(plan, logits, evidence) if shift is None else shift
        absent, present = coins(logits, shift, evidence)
        rows = logits.new_zeros(plan.rows, logits.shape[1])
        rows[: plan.n], rows[plan.n : 2 * plan.n], rows[2 * plan.n] = absent, present, 1.0
        sweeps.up(plan.steps, rows)
        counts = torch.tensor(plan.counts or (0,), dtype=torch.float64, device=logits.device)
        coefficients = rows[_coefficients(plan)]
        potential = torch.zeros_like(coefficients[:, :1])
        root = weigh(coefficients, counts, potential, shift, evidence if plan.counts else None)
        return _Block(
            plan, logits, evidence, shift, rows, root, log_normaliser(logits, shift, absent, present, evidence)
        )

    @property
    def _present(self) -> Tensor:
        return self.rows[self.plan.n : 2 * self.plan.n]

    def marginals(self) -> Tensor:
        """[N, B]."""
        adjoints = torch.zeros_like(self.rows)
        adjoints[_coefficients(self.plan)] = self.root.adjoint
        sweeps.down(self.plan.steps, self.rows, adjoints)
        marginals = (adjoints[self.plan.n : 2 * self.plan.n] * self._present).clamp_(max=1.0)
        return marginals if self.evidence is None else marginals.masked_fill_(self.logits == math.inf, 1.0)

    def moved_marginals(self, u_NB: Tensor, v_JB: Tensor | None) -> Tensor:
        """[N, B] derivative of the marginals along u in the logits and v in a potential on the counts.

        A leaf (absent, present) is (1, exp(theta - s)) up to a constant that cancels, so its tangent is
        (0, present u). The root's adjoint is A_j = g_j / Z with g_j the weight of count j: dA_j = A_j (v_j - d log Z).
        """
        plan, coefficients = self.plan, _coefficients(self.plan)
        tangents, adjoints, moved = (torch.zeros_like(self.rows) for _ in range(3))
        direction = torch.where(torch.isinf(self.logits), 0.0, u_NB)
        tangents[plan.n : 2 * plan.n] = self._present * direction
        sweeps.tangent_up(plan.steps, self.rows, tangents)
        adjoint = self.root.adjoint
        slope = torch.zeros_like(adjoint) if v_JB is None or not plan.counts else v_JB[list(plan.counts)]
        d_log_partition = (adjoint * tangents[coefficients] + self.root.probs * slope).sum(0)
        adjoints[coefficients] = adjoint
        moved[coefficients] = adjoint * (slope - d_log_partition)
        sweeps.tangent_down(plan.steps, self.rows, tangents, adjoints, moved)
        present = slice(plan.n, 2 * plan.n)
        return (moved[present] * self._present).addcmul_(adjoints[present], tangents[present])

    def sample(self, key_B: Tensor) -> tuple[Tensor, Tensor]:
        """([B, N] bool, [B] bool in doubt)."""
        plan = self.plan
        draw = Draw(plan, key_B, MARGIN[self.rows.dtype] * max(1.0, len(plan.steps) / DEPTH_OF_MARGIN))
        chosen = torch.zeros_like(key_B)
        if plan.root is not None:
            left, right, slot = (plan.tensor(f"root {i}", array) for i, array in enumerate(plan.root))
            weights = (self.rows[left] * self.rows[right]).mul_(self.root.adjoint[slot])
            last = key_B.new_full((1, len(key_B)), self.plan.nodes - 1)
            chosen = draw.invert(weights[:, None], last)[0]
        mask = walk(plan, self.rows, torch.Tensor.mul_, 0.0, draw, chosen)
        return mask, draw.uncertain


def _mode_block(plan: Plan, logits_BN: Tensor) -> Tensor:
    absent, present = log_weights(logits_BN)
    rows = absent.new_full((plan.rows, len(logits_BN)), 2 * LOG_ZERO)
    rows[: plan.n], rows[plan.n : 2 * plan.n], rows[2 * plan.n] = absent, present, 0.0
    sweeps.largest_up(plan.steps, rows)
    chosen = torch.zeros(len(logits_BN), dtype=torch.int64, device=logits_BN.device)
    best = rows[_coefficients(plan)].amax(0)
    if plan.root is not None:
        left, right = (plan.tensor(f"root {i}", plan.root[i]) for i in (0, 1))
        chosen = first_best(rows[left] + rows[right], chosen)
    return walk(plan, rows, torch.Tensor.add_, -math.inf, first_best, torch.where(is_zero(best), -1, chosen))


def _coefficients(plan: Plan) -> Tensor:
    return plan.tensor("coefficients", plan.coefficients)


def _solve(plan: Plan, logits_NB: Tensor, evidence: Evidence | None) -> Shift:
    zero = torch.zeros_like(logits_NB[0])
    if plan.counts is None:
        return Shift(zero, zero)
    return solve_shift(logits_NB, evidence, zero + plan.counts[0], zero + plan.counts[-1], zero)


def _with_counts(exact: Inference, counts: Tensor | None) -> Inference:
    return Inference(exact.log_partition, exact.marginals, counts, exact.shift, exact.log_root)


def _blocks(logits_TN: Tensor, plan: Plan) -> list[slice]:
    values = BLOCK_VALUES.get(logits_TN.device.type, BLOCK_VALUES_ELSEWHERE)
    size = max(MIN_BLOCK, values // plan.rows)
    return [slice(i, min(i + size, len(logits_TN))) for i in range(0, len(logits_TN), size)]
