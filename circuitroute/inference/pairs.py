"""Joint inclusion probabilities of large count constraints in closed form, from one sweep.

Legend: N variables, theta logits, w = e^theta, m marginals, m_ij = P(i and j in S); c_j coefficients of the product of
all coins q + p x, r those without coins i and j.

With a_i the sum over the allowed counts of what the others contribute, m_i = w_i a_i, and a_i - a_j is (w_j - w_i)
times what the others but both contribute. So for every constraint on counts

    m_ij = (m_i w_j - m_j w_i) / (w_j - w_i) = m_i - (m_j - m_i) / (e^(theta_j - theta_i) - 1)

(Chen, Dempster & Liu 1994). The difference in it loses what theta_j - theta_i is short of 1. Pairs that are ``NEAR``
are computed by leaving two coins out of the product instead, without loss: c_m = q r_m + p r_{m-1} is solved upward
for r where p < q, where errors decay, and downward where p > q.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from circuitroute._tensors import batched, traced, tracked, transformed
from circuitroute.circuit import Compiled
from circuitroute.deadline import tick

LEAST = 128  # variables from which on it is worth it
NEAR = 1 / 256  # of two logits
SHARE = 1 / 16  # of all pairs, that may be near; beyond, a sweep per variable is faster
ROWS = 1 << 24  # pairs that are made at once


def in_closed_form(circuit: Compiled, logits: Tensor, potential: Tensor | None) -> bool:
    """Whether the closed form is used: for a range of counts of many variables, and where no gradient is recorded.

    Args:
        circuit, logits, potential: of a distribution.
    """
    counts = circuit.counts
    if counts is None or circuit.n < LEAST or counts[-1] - counts[0] + 1 != len(counts) or potential is not None:
        return False
    if traced(logits) or batched() or transformed() or tracked(logits):
        return False
    if not bool(torch.isfinite(logits).all()):
        return False
    return all(_near(row) <= SHARE * circuit.n**2 for row in logits.reshape(-1, circuit.n).double())


def joint(circuit: Compiled, logits_TN: Tensor, marginals_TN: Tensor) -> Tensor:
    """[T, N, N] float64 joint inclusion probabilities, of float64 logits and marginals; rows are independent."""
    found = [_row(circuit, theta, m) for theta, m in zip(logits_TN, marginals_TN, strict=True)]
    return torch.stack(found) if found else logits_TN.new_zeros(0, circuit.n, circuit.n)


def _near(theta: Tensor) -> int:
    """How many pairs i < j are near."""
    ordered = theta.sort().values
    ends = torch.searchsorted(ordered, ordered + NEAR)
    return int((ends - torch.arange(1, len(theta) + 1, device=theta.device)).sum())


def _row(circuit: Compiled, theta: Tensor, m: Tensor) -> Tensor:
    theta, order = theta.sort()
    m, n = m[order], len(theta)
    sorted_joint = torch.empty(n, n, dtype=theta.dtype, device=theta.device)
    for start in range(0, n, max(1, ROWS // n)):
        part = slice(start, start + max(1, ROWS // n))
        tick(1000)
        # The larger of two logits second: what is taken off is then the smaller part.
        apart = (theta[None, :] - theta[part, None]).abs()
        least, most = torch.minimum(m[part, None], m[None, :]), torch.maximum(m[part, None], m[None, :])
        sorted_joint[part] = least - (most - least) / torch.expm1(apart)
    i, j = _near_pairs(theta)
    if len(i):
        close = _without_two(circuit, theta, m, i, j)
        sorted_joint[i, j] = sorted_joint[j, i] = close
    sorted_joint.diagonal().copy_(m)
    back = order.argsort()
    return sorted_joint.clamp_(min=0)[back][:, back]


def _near_pairs(theta: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs i < j of sorted logits that are near."""
    n = len(theta)
    ends = torch.searchsorted(theta, theta + NEAR)
    count = ends - torch.arange(1, n + 1, device=theta.device)
    i = torch.arange(n, device=theta.device).repeat_interleave(count)
    first = (count.cumsum(0) - count).repeat_interleave(count)
    return i, i + 1 + torch.arange(len(i), device=theta.device) - first


def _without_two(circuit: Compiled, theta: Tensor, m: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """m_ij of pairs, by leaving both out of the product of all coins."""
    counts = circuit.counts or ()
    shift = _shift(theta, float(m.sum()))
    p, q = torch.sigmoid(theta - shift), torch.sigmoid(shift - theta)
    c = _product(p, q)
    # The weight of a count: what the shift of its coins took off it. Where it is beyond e^600 the coefficient is as
    # much below all others.
    largest = max(shift * count + _log(float(c[count])) for count in counts)
    wanted = {count: math.exp(min(shift * count - largest, 600.0)) for count in counts}
    total = sum(wanted[count] * float(c[count]) for count in counts)
    found = torch.empty_like(theta[i])
    for rows, up in (((p[i] < q[i]).nonzero()[:, 0], True), ((p[i] >= q[i]).nonzero()[:, 0], False)):
        if len(rows):
            pairs = [x[k[rows]] for k in (i, j) for x in (p, q)]
            found[rows] = _left_out(c.tolist(), pairs, wanted, up)
    return found * p[i] * p[j] / total


def _left_out(c: list[float], pairs: list[Tensor], wanted: dict[int, float], up: bool) -> Tensor:
    """The sum over the counts of weight times r_{count - 2}, for pairs of coins (p, q) each."""
    p_i, q_i, p_j, q_j = pairs
    one, two, total = torch.zeros_like(p_i), torch.zeros_like(p_i), torch.zeros_like(p_i)
    if up:
        ratio_i, ratio_j, both = p_i / q_i, p_j / q_j, 1 / (q_i * q_j)
        for k in range(max(wanted) - 1):
            one = c[k] - ratio_i * one  # q_i times the coefficient without i
            two = one - ratio_j * two  # q_i q_j times that without both
            if k + 2 in wanted:
                total += wanted[k + 2] * two
            tick(len(p_i) // 1000)
    else:
        ratio_i, ratio_j, both = q_i / p_i, q_j / p_j, 1 / (p_i * p_j)
        for k in range(len(c) - 1, min(wanted) - 1, -1):
            one = c[k] - ratio_i * one  # p_i times the coefficient k - 1 without i
            two = one - ratio_j * two  # p_i p_j times the coefficient k - 2 without both
            if k in wanted and k >= 2:
                total += wanted[k] * two
            tick(len(p_i) // 1000)
    return total * both


def _product(p: Tensor, q: Tensor) -> Tensor:
    """[N + 1] the coefficients of the product of all coins."""
    c = torch.zeros(len(p) + 1, dtype=p.dtype, device=p.device)
    c[0] = 1.0
    for size, (present, absent) in enumerate(zip(p.tolist(), q.tolist(), strict=True), start=1):
        below = c[:size] * present
        c[: size + 1] *= absent
        c[1 : size + 1] += below
        tick(1 + size // 1000)
    return c


def _shift(theta: Tensor, count: float) -> float:
    """What to take off all logits so that coins show ``count`` on average, nearly."""
    low, high = float(theta.min()) - 40.0, float(theta.max()) + 40.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if float(torch.sigmoid(theta - middle).sum()) > count else (low, middle)
    return (low + high) / 2


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf
