"""DeepSeek's greedy rule of groups as a serving function, for checkpoints that were trained with it.

Legend: T tokens, E experts, G groups, K slots per token.

Groups of consecutive experts are scored, by the sum of their two best members (DeepSeek-V3, arXiv:2412.19437, and its
descendants) or by the best one (DeepSeek-V2, arXiv:2405.04434). The best ``active`` groups are kept, and the best ``k``
experts within them are chosen. That is an allowed subset of ``cr.ActiveGroups(cr.Groups(groups), at_most=active) &
cr.Exactly(k)``, but not always the best one, which :func:`circuitroute.integrations.serving.routing_function` takes.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from circuitroute._validate import int_at_least, one_of
from circuitroute.integrations.serving.checks import as_bias, as_scaling
from circuitroute.integrations.serving.served import ServedCombine, ServedFunction, ServedScore, placed

GroupScore: TypeAlias = Literal["top2", "max"]


def greedy_groups(
    num_experts: int,
    k: int,
    *,
    groups: int = 8,
    active: int = 4,
    group_score: GroupScore = "top2",
    score: ServedScore = "sigmoid",
    bias: Tensor | None = None,
    combine: ServedCombine = "sigmoid",
    scaling: float = 1.0,
    device: torch.device | str | None = None,
) -> GreedyGroups:
    """The rule that DeepSeek's models choose experts by; the defaults are those of DeepSeek-V3 but for its bias.

    DeepSeek-V2's is ``group_score="max", score="softmax", combine="softmax"``, with its own numbers of groups.

    Args:
        num_experts: E.
        k: how many experts each token has.
        groups: of E / groups consecutive experts each.
        active: so many groups are kept.
        group_score: what a group is worth: the sum of its two best scores, or its best one.
        score: what experts are chosen by: ``"sigmoid"`` or ``"softmax"`` of the logits, or the ``"logits"``.
        bias: [E], added to the scores for the choice only.
        combine: how chosen experts are weighted, see :func:`circuitroute.integrations.serving.routing_function`.
        scaling: multiplies all weights.
        device: for its tables; torch's default device when None. Move it with ``.to`` like any module.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, E is not a multiple of ``groups``, more groups are to be
            active than there are, they have fewer than ``k`` experts, or ``"top2"`` of groups of one expert.
    """
    experts, k = int_at_least("num_experts", num_experts, 1), int_at_least("k", k, 1)
    groups, active = int_at_least("groups", groups, 1), int_at_least("active", active, 1)
    group_score = one_of("group_score", group_score, get_args(GroupScore))
    if experts % groups:
        raise ValueError(f"groups={groups}: they are of equal size, and num_experts={experts} is no multiple of it")
    if active > groups:
        raise ValueError(f"active={active}: there are only groups={groups}")
    size = experts // groups
    if k > active * size:
        raise ValueError(f"k={k}: {active} groups of {size} experts have only {active * size}; keep more groups active")
    if group_score == "top2" and size == 1:
        raise ValueError(f"group_score='top2': the {groups} groups have one expert each; give group_score='max'")
    made: GreedyGroups = placed(
        GreedyGroups(
            experts,
            k,
            groups,
            active,
            group_score,
            combine=one_of("combine", combine, get_args(ServedCombine)),
            score=one_of("score", score, get_args(ServedScore)),
            bias=None if bias is None else as_bias(bias, experts),
            scaling=as_scaling(scaling),
        ),
        device,
    )
    return made


class GreedyGroups(ServedFunction):
    """``f(hidden_states, gating_output, topk, renormalize) -> (weights, ids)``; made by :func:`greedy_groups`.

    Attributes:
        k, groups, active, group_score: as given.
    """

    def __init__(
        self,
        num_experts: int,
        k: int,
        groups: int,
        active: int,
        group_score: GroupScore,
        *,
        combine: ServedCombine,
        score: ServedScore,
        bias: Tensor | None,
        scaling: float,
    ) -> None:
        super().__init__(
            num_experts,
            combine=combine,
            score=score,
            bias=bias,
            scaling=scaling,
            largest=k,
            rule=f"greedy_groups(k={k}, groups={groups}, active={active}, group_score={group_score!r})",
            tables={},
        )
        self.k, self.groups, self.active, self.group_score = k, groups, active, group_score

    def forward(
        self, hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool
    ) -> tuple[Tensor, Tensor]:
        """Route every token to the best experts of its best groups.

        Among equal scores the lower group, and the lower expert, comes first.

        Args:
            hidden_states: [T, H], not used.
            gating_output: [T, E] logits of any floating dtype; computed in float32.
            topk: K, at least ``k``.
            renormalize: whether the weights should add up to 1 (before ``scaling``).

        Returns:
            (weights [T, K] float32, ids [T, K] int32): the ``k`` chosen experts by decreasing score, then distinct
            others, with weight 0. A token with NaN, or whose infinite scores leave fewer than ``k`` experts in the
            groups that are kept, has weights NaN.

        Raises:
            TypeError, ValueError: shapes, dtypes or devices that do not fit, or ``topk`` is too small.
        """
        topk = self._check(hidden_states, gating_output, topk)
        logits, score, bad = self._scored(gating_output)
        kept = self._kept(score.view(-1, self.groups, self.num_experts // self.groups))
        within = torch.where(kept.repeat_interleave(self.num_experts // self.groups, -1), score, -math.inf)
        order = within.sort(dim=-1, descending=True, stable=True)
        ids = order.indices[:, :topk]
        used = torch.arange(topk, device=ids.device) < self.k
        possible = order.values[:, self.k - 1] > -math.inf
        return self._weighed(logits, ids, used & possible[:, None], possible & ~bad, renormalize)

    def _kept(self, score: Tensor) -> Tensor:
        """[T, G] bool, which groups of the scores [T, G, E / G] are kept."""
        worth = score.amax(-1)
        if self.group_score == "top2":
            worth = score.topk(2, dim=-1).values.sum(-1)
            # A forced expert, of a group with no other: inf - inf.
            worth = torch.where(worth.isnan(), math.inf, worth)
        order = worth.argsort(dim=-1, descending=True, stable=True)
        first = torch.arange(self.groups, device=order.device) < self.active
        return torch.zeros_like(worth, dtype=torch.bool).scatter(-1, order, first.expand_as(order))
