"""Research code on circuits: a balanced tree over the experts in log space, level by level, in eager torch.

Shapes: T tokens, N variables, B blocks of a level, A counts of a block, J counts of two blocks together.

What SIMPLE (Ahmed, Zeng, Niepert & Van den Broeck, ICLR 2023) and the routers built on it do: each block of experts
holds the log weights of its counts, and a level joins neighbours by a logsumexp over the pairs of counts that add
up. log Z is the root; the marginals are its gradient (``create_graph=True``), and their own gradient is a backward
pass through that backward pass; the sample splits the count from the root down. As in published circuit code nodes
come first and tokens last, and what cannot be is a large negative number, because -inf would make autograd's
gradients NaN. Kinder than published code: a level has as many pairs as its counts need, not as many as the widest
level.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from benchmarks.registry import Forward, Outputs, provider
from benchmarks.subset.workload import SubsetCase

# Finite, so that differences of impossible counts are 0 rather than NaN; beyond any sum of logits.
IMPOSSIBLE = -1e30


@provider("subset", "tree_circuit")
def build(case: SubsetCase) -> Forward:
    """Float32, eager."""

    def forward(logits_TN: Tensor) -> Outputs:
        levels, root_JT = build_up(logits_TN.t(), case.k)
        log_partition_T = torch.logsumexp(root_JT[case.kmin :], dim=0)
        (marginals_TN,) = torch.autograd.grad(log_partition_T.sum(), logits_TN, create_graph=True)
        with torch.no_grad():
            mask_TN = sample(levels, root_JT, case.kmin)[: case.n].t().to(logits_TN.dtype)
        straight_through_TN = (mask_TN - marginals_TN).detach() + marginals_TN
        gates_TN = torch.softmax(logits_TN, dim=-1) * straight_through_TN
        values = {"marginals": marginals_TN, "log_partition": log_partition_T, "mask": mask_TN}
        return Outputs(result=gates_TN, values=values)

    return forward


def build_up(logits_NT: Tensor, k: int) -> tuple[list[Tensor], Tensor]:
    """The pairs [B, J, A, T] of each level from the leaves up, and the root's log weights of the counts up to k."""
    n = len(logits_NT)
    # Up to a power of two with experts that nobody can choose.
    padded_NT = pad(logits_NT, (0, 0, 0, 2 ** (n - 1).bit_length() - n), value=IMPOSSIBLE)
    counts_BAT = torch.stack([torch.zeros_like(padded_NT), padded_NT], dim=1)
    levels = []
    while len(counts_BAT) > 1:
        levels.append(join(counts_BAT[0::2], counts_BAT[1::2], k))
        counts_BAT = torch.logsumexp(levels[-1], dim=2)
    return levels, counts_BAT[0]


def join(left_BAT: Tensor, right_BAT: Tensor, k: int) -> Tensor:
    """The log weights [B, J, A, T] of the pairs of counts (a, j - a) of neighbours, for j up to k."""
    size = left_BAT.shape[1]
    j_J1 = torch.arange(min(2 * size - 2, k) + 1, device=left_BAT.device)[:, None]
    partner_JA = j_J1 - torch.arange(size, device=left_BAT.device)
    # One more count, which is impossible, stands for the partners that do not exist.
    counts_BAT = torch.cat([right_BAT, torch.full_like(right_BAT[:, :1], IMPOSSIBLE)], dim=1)
    partner_JA = torch.where((partner_JA >= 0) & (partner_JA < size), partner_JA, size)
    partners_BJAT: Tensor = counts_BAT.index_select(1, partner_JA.flatten()).unflatten(1, partner_JA.shape)
    return left_BAT[:, None] + partners_BJAT


def sample(levels: list[Tensor], root_JT: Tensor, kmin: int) -> Tensor:
    """An exact sample [N, T], of whole numbers 0 and 1: the count first, then a split of it at every block."""
    count_BT = kmin + _choice(root_JT[None, kmin:])
    for pairs_BJAT in reversed(levels):
        blocks, _, size, tokens = pairs_BJAT.shape
        chosen_B1AT = count_BT[:, None, None].expand(blocks, 1, size, tokens)
        left_BT = _choice(pairs_BJAT.gather(1, chosen_B1AT)[:, 0])
        count_BT = torch.stack([left_BT, count_BT - left_BT], dim=1).flatten(0, 1)
    return count_BT


def _choice(log_weights_BAT: Tensor) -> Tensor:
    """An index of each A, drawn in proportion to the weights: the largest after adding Gumbel noise."""
    noise_BAT = -torch.empty_like(log_weights_BAT).exponential_().log()
    return (log_weights_BAT + noise_BAT).argmax(1)
