"""Auxiliary losses of routing, from the exact marginals and the set that was actually sampled; and semantic loss.

Legend: T tokens, E experts or N variables; m the exact marginals, z the chosen mask.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from circuitroute._validate import as_real
from circuitroute.inference.coins import log_normaliser, log_satisfied
from circuitroute.inference.distribution import SubsetDistribution, with_gradient_of
from circuitroute.routing.decision import Routing
from circuitroute.routing.weights import expert_softmax

Probabilities = Literal["marginal", "softmax"]


def load_balance(
    routing: Routing, probabilities: Probabilities = "marginal", group: dist.ProcessGroup | None = None
) -> Tensor:
    """E sum_e f_e P_e: f the share of the executed load, P the share of probability; 1 at perfect balance.

    The loss of Switch Transformer (Fedus et al. 2021, eq. 4) with its two shares taken from the decision itself:
    f from the sampled set z (no gradient) and P from the exact marginals m, both normalised over experts. So f is the
    load over the number of experts that were really executed, whatever k is: the factor by which SoftMoE
    (arXiv:2606.17952) scales the loss for soft routers is in it.

    Args:
        routing: T decisions.
        probabilities: ``"marginal"``, or ``"softmax"`` for the stock form that top-k routers use.
        group: processes whose tokens count together, all of which must call this; None for this one alone. See
            :func:`balance`.

    Returns:
        A scalar; zero when there are no tokens, or none of them uses an expert.

    Raises:
        ValueError: ``probabilities`` of another name.
    """
    if probabilities not in get_args(Probabilities):
        raise ValueError(f"probabilities={probabilities!r}: choose one of {get_args(Probabilities)}")
    chosen = routing.mask.to(routing.logits.dtype)
    if probabilities == "marginal":
        expected = routing.marginals
    else:
        expected = expert_softmax(routing.logits)
    return balance(chosen.sum(0), expected.sum(0), group)


def balance(load: Tensor, mass: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """:func:`load_balance` of sums over tokens: E sum_e f_e P_e, with f and P the shares of ``load`` and ``mass``.

    For sums of your own, such as those over the tokens that are not padding.

    Args:
        load: [..., E], how many tokens each expert has; no gradient.
        mass: [..., E], how many it was expected to have; differentiable.
        group: processes whose sums are added up first, in one all-reduce. All of them get the same loss, and gradients
            such that their mean over the processes, which is what DDP and FSDP take, is the gradient of that loss.

    Returns:
        [...].
    """
    if group is not None:
        load, mass = _over_processes(load, mass, group)
    load, mass = as_real("load", load), as_real("mass", mass, floating=True)
    share, total = load / load.sum(-1, keepdim=True).clamp(min=1), mass.sum(-1)
    # Where all probabilities vanish, dividing by their sum would overflow in the gradient.
    vanished = total < torch.finfo(mass.dtype).tiny / torch.finfo(mass.dtype).eps
    return mass.shape[-1] * (share * mass / torch.where(vanished, 1.0, total)[..., None]).sum(-1)


def _over_processes(load: Tensor, mass: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    both = torch.stack([load.to(mass.dtype), mass.detach()])
    dist.all_reduce(both, group=group)
    # Every process computes the same loss, so nothing has to be sent in backward: that the mean over processes undoes
    # the factor is all that its collective would have achieved.
    return both[0], both[1] + group.size() * (mass - mass.detach())


def z_loss(routing: Routing) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2 (ST-MoE, Zoph et al. 2022, eq. 5), over finite logits; a scalar."""
    finite = torch.where(routing.logits == torch.inf, -torch.inf, routing.logits)
    usable = (finite > -torch.inf).any(-1)
    # A token with nothing but evidence has no logits to keep small.
    log_sum = torch.logsumexp(torch.where(usable[:, None], finite, 0.0), -1)
    # By its shape and not its length, which a trace would take for a constant.
    return torch.where(usable, log_sum.square(), 0.0).sum() / max(1, log_sum.shape[0])


def expected_count(routing: Routing) -> Tensor:
    """Mean over tokens of the expected number of experts, sum_e m_e; a differentiable scalar."""
    return routing.marginals.sum() / max(1, routing.mask.shape[0])


def semantic_loss(distribution: SubsetDistribution) -> Tensor:
    """-log of the probability that independent coins satisfy the constraint: sum_i softplus(theta_i) - log Z, per row.

    The loss of Xu et al. 2018 (arXiv:1711.11157, definition 1), by one sweep over the circuit. Coin i is present with
    probability sigmoid(theta_i), theta the logits of the distribution: what a network with N sigmoid outputs predicts.
    The gradient is sigmoid(theta) - m, m the marginals given the constraint. Nothing of the size of the logits is
    subtracted, so the value is right at any scale, to 1e-12 in float64 and about 1e-6 in float32, and 0 where the coins
    are certain to satisfy the constraint.

    Args:
        distribution: ``circuit(logits)`` with logits [..., N]. An infinite logit is a coin that is certain: it adds
            nothing and has no gradient.

    Returns:
        [...] at least 0, one value per row, differentiable any number of times; take ``.mean()`` for a batch. NaN in
        rows with NaN, and +inf in those whose infinite logits contradict the constraint, which a distribution that
        validates refuses.

    Raises:
        TypeError: anything but a distribution over subsets; of a mixture, give its ``component_distribution``.
        ValueError: a distribution with a count potential, which is not one of independent coins given the constraint.
    """
    if not isinstance(distribution, SubsetDistribution):
        raise TypeError(
            f"distribution={distribution!r}: expected a cr.SubsetDistribution, such as circuit(logits); of a mixture, "
            "give its component_distribution"
        )
    if distribution.count_potential is not None:
        raise ValueError(
            "distribution has a count potential: semantic loss is of independent coins; make it of the logits alone, "
            "circuit(logits)"
        )
    sweep = distribution.inference()
    surrogate = log_normaliser(distribution.rows) - distribution.rows.as_batch(sweep.log_partition)
    value = 0.0 - log_satisfied(distribution.rows, sweep)
    found = with_gradient_of(value.to(surrogate.dtype), surrogate)
    # Where nothing satisfies it, log Z is NaN.
    return torch.where(value == torch.inf, torch.inf, found)
