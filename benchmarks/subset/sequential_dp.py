"""The usual research code: a loop over the experts in log space, differentiated twice by autograd.

Shapes: T tokens, N variables, K largest count, J = K + 1 counts.

log Z by a forward recursion over the experts; the marginals are its gradient (``create_graph=True``), and
their own gradient is a backward pass through that backward pass; the sample walks the experts in reverse.

* ``sequential_dp`` keeps the layout that published code has: tokens first, every count at every step, and a
  large negative number for what cannot be, because -inf would make autograd's gradients NaN.
* ``sequential_dp:tuned`` is the same recursion as well as eager PyTorch can do it: tokens last, so that each
  operation is on contiguous rows, and no storage for counts that a prefix cannot hold.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import softplus

from benchmarks.registry import Forward, Outputs, provider
from benchmarks.subset.workload import SubsetCase

# Finite, so that differences of impossible counts are 0 rather than NaN; beyond any sum of logits.
IMPOSSIBLE = -1e30

LogCounts = Callable[[Tensor, int], list[Tensor]]


@provider("subset", "sequential_dp")
def build_plain(case: SubsetCase) -> Forward:
    """Float32, eager, tokens first."""
    return _forward(case, log_counts_tokens_first)


@provider("subset", "sequential_dp:tuned")
def build_tuned(case: SubsetCase) -> Forward:
    """Float32, eager, tokens last."""
    return _forward(case, log_counts_tokens_last)


def _forward(case: SubsetCase, log_counts: LogCounts) -> Forward:
    def forward(logits_TN: Tensor) -> Outputs:
        prefixes = log_counts(logits_TN, case.k)
        log_partition_T = torch.logsumexp(prefixes[-1][case.kmin :], dim=0)
        (marginals_TN,) = torch.autograd.grad(log_partition_T.sum(), logits_TN, create_graph=True)
        with torch.no_grad():
            mask_TN = sample(prefixes, logits_TN.t(), case.kmin).t().to(logits_TN.dtype)
        straight_through_TN = (mask_TN - marginals_TN).detach() + marginals_TN
        gates_TN = torch.softmax(logits_TN, dim=-1) * straight_through_TN
        values = {"marginals": marginals_TN, "log_partition": log_partition_T, "mask": mask_TN}
        return Outputs(result=gates_TN, values=values)

    return forward


def log_counts_tokens_first(logits_TN: Tensor, k: int) -> list[Tensor]:
    """For each prefix of experts, the log weights [J, T] (views of [T, J]) of its subsets by their count."""
    impossible_T1 = torch.full_like(logits_TN[:, :1], IMPOSSIBLE)
    start_TJ = torch.cat([torch.zeros_like(impossible_T1), impossible_T1.expand(-1, k)], dim=1)
    prefixes = [start_TJ]
    for logit_T in logits_TN.unbind(1):
        shifted_TJ = torch.cat([impossible_T1, prefixes[-1][:, :-1]], dim=1)
        prefixes.append(_log_add(prefixes[-1], shifted_TJ + logit_T[:, None]))
    return [prefix_TJ.t() for prefix_TJ in prefixes]


def _log_add(a: Tensor, b: Tensor) -> Tensor:
    """log(e^a + e^b); torch.logaddexp has NaN second derivatives where one of them is impossible."""
    return torch.maximum(a, b) + softplus(-(a - b).abs())


def log_counts_tokens_last(logits_TN: Tensor, k: int) -> list[Tensor]:
    """The same for counts up to min(i, k) after i experts: [i + 1, T], then [J, T]."""
    logits_NT = logits_TN.t().contiguous()
    prefixes = [torch.zeros_like(logits_NT[:1])]
    for logit_T in logits_NT.unbind(0):
        last_JT = prefixes[-1]
        taken_JT = last_JT + logit_T
        parts = [last_JT[:1], torch.logaddexp(last_JT[1:], taken_JT[:-1])]
        if len(last_JT) <= k:
            parts.append(taken_JT[-1:])
        prefixes.append(torch.cat(parts))
    return prefixes


def sample(prefixes: list[Tensor], logits_NT: Tensor, kmin: int) -> Tensor:
    """An exact sample [N, T], bool: the count first, then expert by expert from the last to the first."""
    left_T = _sample_count(prefixes[-1], kmin)
    log_uniforms_NT = torch.rand_like(logits_NT).log()
    mask_NT = torch.empty_like(logits_NT, dtype=torch.bool)
    for i in reversed(range(len(logits_NT))):
        before_JT, after_JT = prefixes[i], prefixes[i + 1]
        one_less_T = (left_T - 1).clamp(0, len(before_JT) - 1)
        taken_T = before_JT.gather(0, one_less_T[None])[0] + logits_NT[i]
        log_share_T = taken_T - after_JT.gather(0, left_T[None])[0]
        # More are left than the experts before can hold: this one is taken, whatever rounding says.
        must_T = left_T >= len(before_JT)
        mask_NT[i] = (must_T | (log_uniforms_NT[i] < log_share_T)) & (left_T > 0)
        left_T = left_T - mask_NT[i].long()
    return mask_NT


def _sample_count(log_weights_JT: Tensor, kmin: int) -> Tensor:
    allowed_JT = log_weights_JT[kmin:]
    if len(allowed_JT) == 1:
        return torch.full_like(allowed_JT[0], kmin, dtype=torch.long)
    return kmin + torch.multinomial(torch.softmax(allowed_JT, dim=0).t(), 1)[:, 0]
