"""Which experts a batch is given: a set U of M, of which every token takes its subset.

Legend: T tokens, E experts, M experts of the batch; p_t(S) a law of token t, m its marginals, Z_t(U) its partition
function when what is outside U is forbidden; w its experts' weights.

Every token has a law by which the set is chosen. *By logits* it is that of its decision. *By weights*, its logits are
32 w: the softmax of its logits, or their sigmoid, where that is how experts are combined. What the set keeps of these
laws is

    F(U) = sum_t log P_t(S within U) = sum_t log Z_t(U) - log Z_t(all),

by weights a smooth version, in units of 1/32, of the weight that the tokens' best subsets within U have. F grows
with U. Sweeps give its exact changes, for any circuit, since Z_t is linear in the weight of every expert:

    F(U) - F(U without i) = -sum_t log(1 - m_ti)           marginals within U
    F(U with j) - F(U)    =  sum_t log(1 + e^c odds_tj)    marginals where what is outside U has its logits less c

the second up to terms e^-c, all j in one sweep. *Greedy*: the M experts of the largest -sum_t log(1 - m_ti), what each
is worth on its own, and from there exchanges: the best j in, then the least i out, which is done if F grows, and else
the next best j is tried.

Where every two experts are negatively correlated whatever else is known (counts within an interval; Borcea, Braenden &
Liggett 2009, "Negative dependence and the geometry of polynomials"), F is submodular.

*Sampled*: U is a subset of exactly M, drawn with the odds 1 / prod_t(1 - m_ti) - 1 of each expert, those that some
token would use it if tokens chose for themselves: a circuit of its own, with an exact log P(U).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from circuitroute._tensors import transformed
from circuitroute.compilation import compile as compile_constraint
from circuitroute.constraints import Exactly
from circuitroute.engines import engine_of
from circuitroute.engines.step import Combine
from circuitroute.inference.circuit import Circuit
from circuitroute.inference.distribution import SubsetDistribution
from circuitroute.keys import fold_in, mix64
from circuitroute.routing.budgets.batch_needs import Needs

# What a weight of 1 is in logits of the law that the set is chosen by.
SHARPNESS = 32.0
# How far down experts outside the set are put to see what each would add.
OUTSIDE = 30.0
# Marginals this close to 1 leave no digits for 1 - m: what it costs to do without is then found by a sweep of its own.
CERTAIN = 1e-6
# An exchange must be worth so much, for rounding would go on for ever.
WORTH = 1e-9
# The least that an expert is worth to a set that is drawn, so that experts that nobody wants can fill it up.
UNWANTED = 1e-26
# Which draw of a batch's keys that of its experts is; tokens' own draws fold in other numbers.
EXPERTS = -2511


class Wanted:
    """What tokens want of experts: their laws in float64, without gradients, invalid rows left out.

    Args:
        distribution: of all tokens, unrestricted.
        most: M, at most E.

    Raises:
        InfeasibleError: M is too small for a token.
    """

    def __init__(self, distribution: SubsetDistribution, most: int) -> None:
        self.circuit: Circuit = distribution.circuit  # type: ignore[assignment]  # of which Compiled is the shape
        self.most = most
        logits, potential = distribution.logits.detach(), distribution.count_potential
        invalid = distribution.invalid_rows()
        tokens = torch.arange(len(logits), device=logits.device)
        if potential is not None:
            potential = potential.detach().double().expand(len(logits), -1)
        if invalid is not None:
            tokens = tokens[~invalid]
            potential = None if potential is None else potential[tokens]
        self.logits = logits[tokens].double()
        self.potential = potential
        self.allowed = _allowed(self.circuit, self.logits)
        self.engine = engine_of(self.circuit, logits.device)
        self.needs = Needs.of(self.circuit, self.logits, potential, tokens)
        self.needs.check(most)

    def sweep(self, logits: Tensor, potential: Tensor | None) -> tuple[Tensor, Tensor]:
        """([T], [T, E]) log Z and marginals of logits [T, E] and of a count potential that goes with them."""
        if transformed():
            law = SubsetDistribution(self.circuit, logits, potential, validate_args=False)
            return law.log_partition, law.marginals
        # Without what a distribution would look for in the logits, which takes longer than a sweep of few tokens.
        if self.allowed is not None:
            potential = self.allowed if potential is None else torch.where(self.allowed == 0, potential, -math.inf)
        found = self.engine.infer(logits, potential)
        return found.log_partition, found.marginals

    def worth(self) -> Tensor:
        """[E] float64, -sum_t log(1 - m_ti): what the batch loses without each expert, all others there."""
        return self.lost(torch.ones_like(self.needs.forced))

    def lost(self, within: Tensor) -> Tensor:
        """[E] float64, F(U) - F(U without i) for i in the set [E] bool; inf where a token then has no subset."""
        logits = torch.where(within, self.logits, -math.inf)
        log_partition, marginals = self.sweep(logits, self.potential)
        absent = 1 - marginals
        costs = -absent.log()
        close = within & (absent < CERTAIN)
        if bool(close.any()):
            token, expert = close.nonzero(as_tuple=True)
            logits = logits[token].scatter(1, expert[:, None], -math.inf)
            without, _ = self.sweep(logits, None if self.potential is None else self.potential[token])
            exact = (log_partition[token] - without).clamp(min=0)
            costs[token, expert] = torch.where(
                exact.isnan() | (self.logits[token, expert] == math.inf), math.inf, exact
            )
        return costs.sum(0).masked_fill(~within, 0.0)

    def gained(self, within: Tensor) -> Tensor:
        """[E] float64, F(U with j) - F(U) for j outside the set [E] bool, of which every token has a subset."""
        _, present = self.sweep(torch.where(within, self.logits, self.logits - OUTSIDE), self.potential)
        return torch.log1p(present / (1 - present).clamp(min=1e-300) * math.exp(OUTSIDE)).sum(0)

    def start(self, worth: Tensor) -> Tensor:
        """[E] bool, the M of the largest worth, what is forced among them; around a small set where those do not do."""
        within = _first(worth, self.needs.forced, self.most)
        if bool(self.needs.unmet(within).any()):
            within = _first(worth, self.base(worth), self.most)
        return within

    def base(self, worth: Tensor) -> Tensor:
        """[E] bool, a small set that meets all tokens, of the larger worth where there are several."""
        rank = worth.argsort(stable=True).argsort().double() / max(1, len(worth))
        return self.needs.smallest(rank, self.most)

    def refined(self, within: Tensor, exchanges: int) -> Tensor:
        """[E] bool, the set after so many tries of an exchange, of which those are made that F grows by."""
        gained, untried = None, ~within
        for _ in range(exchanges if self.most else 0):
            if not bool(untried.any()):
                break
            gained = self.gained(within) if gained is None else gained
            entering = gained.masked_fill(~untried, -math.inf).argmax()
            larger = within.clone()
            larger[entering] = True
            lost = self.lost(larger).masked_fill(~larger, math.inf)
            leaving = lost.argmin()
            if bool(lost[leaving] < lost[entering] - WORTH):
                within = larger
                within[leaving] = False
                gained, untried = None, ~within
            else:
                untried[entering] = False
        return within


def by_weights(distribution: SubsetDistribution, combine: Combine) -> SubsetDistribution:
    """The law by which a set keeps weight, of the same evidence; differentiable."""
    logits = distribution.logits
    if combine == "sigmoid":
        weights = torch.sigmoid(logits)
    else:
        weights = torch.softmax(logits.masked_fill(logits == math.inf, -math.inf), -1).nan_to_num()
    scores = torch.where(torch.isinf(logits), logits, SHARPNESS * weights)
    invalid = distribution.invalid_rows()
    if invalid is not None:
        scores = torch.where(invalid[:, None], math.nan, scores)
    return SubsetDistribution(distribution.circuit, scores, distribution.count_potential, validate_args=False)


def _allowed(circuit: Circuit, logits: Tensor) -> Tensor | None:
    """[J] float64, the potential that a count constraint is; None for other circuits."""
    if circuit.counts is None:
        return None
    allowed = torch.full((circuit.max_count + 1,), -math.inf, dtype=logits.dtype, device=logits.device)
    allowed[list(circuit.counts)] = 0.0
    return allowed


def _first(worth: Tensor, held: Tensor, most: int) -> Tensor:
    """[E] bool: what is held, and others by decreasing worth up to a number; the lower index among equals."""
    order = torch.where(held, math.inf, worth).argsort(descending=True, stable=True)
    # An infinite worth comes after what is held.
    order = order[held[order].to(torch.uint8).argsort(descending=True, stable=True)]
    within = torch.zeros_like(held)
    within[order[:most]] = True
    return within


def greedy(distribution: SubsetDistribution, most: int, exchanges: int) -> Tensor:
    """[E] bool, M experts by the rule of this module."""
    with torch.no_grad():
        wanted = Wanted(distribution, most)
        return wanted.refined(wanted.start(wanted.worth()), exchanges)


def law_of_experts(distribution: SubsetDistribution, most: int) -> SubsetDistribution:
    """What a drawn set of M experts is drawn from; a function of the logits, with gradients where they have some."""
    with torch.no_grad():
        wanted = Wanted(distribution, most)
        held = wanted.needs.forced
        if not wanted.needs.met_by_any(most):
            held = held | wanted.base(wanted.worth())
    marginals = distribution.marginals
    absent = (1 - marginals).clamp(min=0.5 * torch.finfo(marginals.dtype).eps).double()
    invalid = distribution.invalid_rows()
    if invalid is not None:
        absent = torch.where(invalid[:, None], 1.0, absent)
    used = -absent.log().sum(0).clamp(max=-UNWANTED)
    odds = used + (-torch.expm1(-used)).log()
    circuit = compile_constraint(Exactly(most), distribution.circuit.n)
    return SubsetDistribution(circuit, odds.masked_fill(held, math.inf), validate_args=False)


def key_of_batch(keys: Tensor) -> Tensor:
    """[] int64, the key of the batch's own draw, from those of its tokens [T] in any order."""
    return mix64(mix64(fold_in(keys, keys.new_tensor(EXPERTS))).sum())
