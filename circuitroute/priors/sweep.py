"""A latent tree times the states of a circuit, on one vtree: values upward, and one choice after another downward.

The prior is a latent tree: every vtree node has S latent states, each a distribution over the variables below. Of a
leaf it is a coin; of an inner node a mixture of K products of the halves' latent states: of the pairs (k, k), K = S, or
of all pairs, K = S * S. The root is one mixture.

The value of (c, s) at a vtree node is the total weight of what is below it: prior of the latent state s, times the
literals' weights, over the worlds that state c of the circuit allows. Two circuits on one vtree multiply pair by pair,
so it is the sum over the pairs (l, r) that make c, and over k, of the halves' values: the circuit is deterministic, so
nothing is counted twice, and the prior need not be.

All of it is in float64 and log space, -inf for zero. A mixture is a matrix product relative to the largest term, which
is exact as long as float64 holds the others' sum; where that falls below TINY, the row's logsumexp is written out.

Legend: T rows, N variables, C states of the circuit at a vtree node, E their pairs, S latent states, K terms of a
mixture.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from circuitroute._tensors import cannot_look
from circuitroute.keys import uniform
from circuitroute.priors.states import States

# A mixture's sum, relative to its largest term without weights, below which it is written out.
TINY = 1e-280


class Weights(NamedTuple):
    """Log-probabilities of a latent tree, float64: each distribution is the last dimension.

    Attributes:
        root: [K] the root's mixture.
        mixtures: [N - 2, S, K] those of the other inner nodes, in the vtree's order.
        coins: [N, S, 2] of every variable (absent, present).
    """

    root: Tensor
    mixtures: Tensor
    coins: Tensor

    @property
    def all_pairs(self) -> bool:
        """Whether mixtures are of all pairs of latent states."""
        return len(self.coins) > 1 and len(self.root) != self.coins.shape[1]


class Parameters(NamedTuple):
    """Unnormalised log-weights, of any floating dtype: what a prior learns.

    Attributes:
        root: [K].
        mixtures: [N - 2, S, K].
        coins: [N, S] log-odds.
    """

    root: Tensor
    mixtures: Tensor
    coins: Tensor

    def weights(self) -> Weights:
        """Log-probabilities, as functions of the parameters."""
        coins = self.coins.double()
        return Weights(
            self.root.double().log_softmax(-1),
            self.mixtures.double().log_softmax(-1),
            torch.stack([F.logsigmoid(-coins), F.logsigmoid(coins)], -1),
        )


def literals(logits_TN: Tensor) -> Tensor:
    """[T, N, 2] log-weights (absent, present) = (0, theta), float64; infinite logits are evidence, and weigh 0."""
    theta = logits_TN.double()
    absent = torch.where(theta == math.inf, -math.inf, torch.zeros_like(theta))
    present = torch.where(theta == math.inf, torch.zeros_like(theta), theta)
    return torch.stack([absent, present], -1)


def log_root(states: States, literals_TN2: Tensor, weights: Weights) -> Tensor:
    """[T] log of the total weight of all worlds that the circuit allows; -inf where there are none."""
    return _root(_values(states, literals_TN2, weights, keep=False)[-1], weights)


def _root(top_TCK: Tensor, weights: Weights) -> Tensor:
    return logsumexp(top_TCK[:, 0] + weights.root)


def _values(states: States, literals_TN2: Tensor, weights: Weights, keep: bool) -> list[Tensor]:
    """[T, C, S] of every vtree node; of the root [T, 1, K], the terms of its mixture.

    Args:
        keep: whether all are wanted, and not the root alone.
    """
    tables, vtree = states.tables.on(literals_TN2.device), states.vtree
    root = vtree.num_nodes - 1
    nothing = literals_TN2.new_zeros(0)
    values: list[Tensor] = []
    for v in range(vtree.n):
        forbidden = ~tables[f"allows{v}"][:, None, :]
        values.append(
            logsumexp((literals_TN2[:, v, None, None, :] + weights.coins[v]).masked_fill(forbidden, -math.inf))
        )
    for v, (left, right) in enumerate(vtree.halves, start=vtree.n):
        terms = _products(values[left], values[right], tables[f"left{v}"], tables[f"right{v}"], weights.all_pairs)
        summed = _summed(terms, tables[f"owner{v}"], states.counts[v])
        values.append(summed if v == root else mixed(summed, weights.mixtures[v - vtree.n]))
        if not keep:
            values[left] = values[right] = nothing
    return values


def _products(left: Tensor, right: Tensor, a: Tensor, b: Tensor, all_pairs: bool) -> Tensor:
    """[T, E, K] the products of the halves' latent states, for pairs (a, b) of states."""
    if all_pairs:
        return (left[:, a, :, None] + right[:, b, None, :]).flatten(2)
    return left[:, a] + right[:, b]


def _summed(terms_TEK: Tensor, owner_E: Tensor, counts: int) -> Tensor:
    """[T, C, K] the logsumexp of the pairs of every state."""
    T, E, K = terms_TEK.shape
    if counts == E:  # a pair each, in their order
        return terms_TEK
    index = owner_E[None, :, None].expand(T, E, K)
    largest = terms_TEK.new_full((T, counts, K), -math.inf)
    largest = _finite(largest.scatter_reduce(1, index, terms_TEK.detach(), "amax"))
    terms = (terms_TEK - largest[:, owner_E]).exp()
    return log(terms.new_zeros(T, counts, K).index_add(1, owner_E, terms)) + largest


def mixed(values_TCK: Tensor, log_weights_SK: Tensor) -> Tensor:
    """[T, C, S] the mixtures of K values with these weights."""
    largest = _finite(values_TCK.detach().amax(-1, keepdim=True))
    sums = (values_TCK - largest).exp() @ log_weights_SK.exp().t()
    fast = log(sums) + largest
    if cannot_look(sums):
        return torch.where(sums < TINY, _written_out(values_TCK, log_weights_SK), fast)
    small = (sums.detach() < TINY).any(-1) & (values_TCK.detach() > -math.inf).any(-1)
    if not bool(small.any()):
        return fast
    return fast.index_put((small,), _written_out(values_TCK[small], log_weights_SK))


def _written_out(values: Tensor, log_weights_SK: Tensor) -> Tensor:
    return logsumexp(values.unsqueeze(-2) + log_weights_SK)


def logsumexp(terms: Tensor) -> Tensor:
    """Over the last dimension; of nothing but -inf it is -inf, with gradient 0."""
    largest = _finite(terms.detach().amax(-1, keepdim=True))
    return log((terms - largest).exp().sum(-1)) + largest.squeeze(-1)


def log(values: Tensor) -> Tensor:
    """The logarithm, with gradient 0 at 0."""
    positive = values > 0
    return torch.where(positive, torch.where(positive, values, 1.0).log(), -math.inf)


def _finite(largest: Tensor) -> Tensor:
    """What to subtract: 0 in place of -inf."""
    return torch.where(largest == -math.inf, 0.0, largest)


# ---------------------------------------------------------------------------------------------- downward


def sample(states: States, literals_TN2: Tensor, weights: Weights, row_R: Tensor, key_R: Tensor) -> Tensor:
    """[R, N] bool, a world for every key, of the row that ``row_R`` names; nothing in rows without any.

    From the root down every vtree node draws which pair its state is made of, together with the term of its mixture,
    by inversion at the uniform of its number; leaves draw the variable.
    """
    values = _values(states, literals_TN2, weights, keep=True)

    def draw(number: int, terms: Tensor) -> Tensor:
        probs = (terms - _finite(terms.amax(-1, keepdim=True))).exp()
        running = probs.cumsum(-1)
        threshold = uniform(key_R, number, 1, torch.float64)[0] * running[:, -1]
        # The first that passes it; rounding may leave none, and then the last that has any weight.
        passed = torch.searchsorted(running, threshold[:, None], right=True)[:, 0]
        last = terms.shape[1] - 1 - (probs.flip(1) > 0).to(torch.int64).argmax(1)
        return torch.minimum(passed, last)

    return _downward(states, literals_TN2, weights, values, row_R, draw)


def most_probable(states: States, literals_TN2: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    """([T, N] bool, [T]): the world of the largest term, and its logarithm, among worlds with their latent states."""
    values = _largest_values(states, literals_TN2, weights)
    rows = torch.arange(len(literals_TN2), device=literals_TN2.device)

    def best(number: int, terms: Tensor) -> Tensor:
        return terms.argmax(-1)

    worlds = _downward(states, literals_TN2, weights, values, rows, best)
    return worlds, (values[-1][:, 0] + weights.root).amax(-1)


def _largest_values(states: States, literals_TN2: Tensor, weights: Weights) -> list[Tensor]:
    """As :func:`_values`, of the largest term instead of the sum."""
    tables, vtree = states.tables.on(literals_TN2.device), states.vtree
    values: list[Tensor] = []
    for v in range(vtree.n):
        forbidden = ~tables[f"allows{v}"][:, None, :]
        leaf = literals_TN2[:, v, None, None, :] + weights.coins[v]
        values.append(leaf.masked_fill(forbidden, -math.inf).amax(-1))
    for v, (left, right) in enumerate(vtree.halves, start=vtree.n):
        terms = _products(values[left], values[right], tables[f"left{v}"], tables[f"right{v}"], weights.all_pairs)
        T, E, K = terms.shape
        index = tables[f"owner{v}"][None, :, None].expand(T, E, K)
        best = terms.new_full((T, states.counts[v], K), -math.inf).scatter_reduce(1, index, terms, "amax")
        root = v == vtree.num_nodes - 1
        values.append(best if root else (best.unsqueeze(-2) + weights.mixtures[v - vtree.n]).amax(-1))
    return values


class _Choice(Protocol):
    """Which of the terms [R, ...] each row takes; ``number`` is that of the vtree node."""

    def __call__(self, number: int, terms: Tensor) -> Tensor: ...


def _downward(
    states: States, literals_TN2: Tensor, weights: Weights, values: list[Tensor], row_R: Tensor, choose: _Choice
) -> Tensor:
    """[R, N] bool: from the root, state and latent state of every vtree node, by one choice each."""
    tables, vtree = states.tables.on(literals_TN2.device), states.vtree
    root, S = vtree.num_nodes - 1, weights.coins.shape[1]
    # Of every vtree node the state of the circuit that each row is in, and the latent state: of the root there is one.
    at: list[tuple[Tensor, Tensor | None]] = [(torch.zeros_like(row_R), None)] * (root + 1)
    for v in range(root, vtree.n - 1, -1):
        (state, latent), (left, right) = at[v], vtree.halves[v - vtree.n]
        pairs = tables[f"padded{v}"][state]
        a, b = (tables[f"{side}{v}"][pairs] for side in ("left", "right"))
        rows = row_R[:, None]
        first, second = values[left][rows, a], values[right][rows, b]  # [R, most, S]
        terms = (first[..., :, None] + second[..., None, :]).flatten(2) if weights.all_pairs else first + second
        mixture = weights.root if latent is None else weights.mixtures[v - vtree.n][latent]
        terms = (terms + mixture.reshape(-1, 1, terms.shape[-1])).masked_fill((pairs < 0)[..., None], -math.inf)
        chosen = choose(v, terms.flatten(1))
        pair, term = chosen // terms.shape[-1], chosen % terms.shape[-1]
        k = (term // S, term % S) if weights.all_pairs else (term, term)
        at[left], at[right] = ((x.gather(1, pair[:, None])[:, 0], each) for x, each in zip((a, b), k, strict=True))
    world = []
    for v in range(vtree.n):
        state, latent = at[v]
        leaf = literals_TN2[row_R, v, None, :] + weights.coins[v]  # [R, S, 2]
        leaf = leaf.masked_fill(~tables[f"allows{v}"][state][:, None, :], -math.inf)
        if latent is None:  # the only variable
            latent = choose(vtree.num_nodes, values[v][row_R, state] + weights.root)
        world.append(choose(v, leaf[torch.arange(len(leaf), device=leaf.device), latent]) == 1)
    return torch.stack(world, -1)
