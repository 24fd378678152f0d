"""The affine hull of the allowed subsets: what linear functions of a subset are the same for all of them.

A direction v in which <v, z> is the same for every allowed subset, such as all ones for exactly k variables or those of
a group that always has as many, is *fixed*: logits along it change nothing, and marginals have to agree with it. A
variable that every allowed subset has, or lacks, is *constant*; its own direction is fixed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from circuitroute.circuit import Compiled
from circuitroute.inference.distribution import SubsetDistribution


def fixed_directions(circuit: Compiled, row: Tensor) -> tuple[Tensor, Tensor]:
    """([N, r] orthonormal, [N] bool): the fixed directions of a circuit, and the variables that are constant.

    The null space of the covariance of a law of which every allowed subset has a part: of tilted uniform ones, since in
    one alone subsets of rare sizes may have next to none.

    Args:
        circuit: over N variables.
        row: [N] float64, 0, and infinite where there is evidence, which some allowed subset agrees with.
    """
    free = torch.isfinite(row)
    scale = math.log(circuit.n + 1)
    rows = torch.stack([torch.where(free, tilt * scale, row) for tilt in (-2.0, -1.0, 0.0, 1.0, 2.0)])
    with torch.no_grad():
        covariance = SubsetDistribution(circuit, rows, validate_args=False).covariance_matrix.sum(0)
    values, vectors = torch.linalg.eigh((covariance + covariance.t()) / 2)
    flat = values <= 1e-10 * max(float(values[-1]), 1e-300)
    constant = covariance.diagonal() <= 1e-12
    return vectors[:, flat], constant


def readable(basis: Tensor) -> list[Tensor]:
    """[N] each: the same directions with as many zeros as possible, by elimination: of groups, their members."""
    rows = basis.t().clone().cpu()
    found = 0
    for column in range(rows.shape[1]):
        if found == len(rows):
            break
        pivot = found + int(rows[found:, column].abs().argmax())
        if float(rows[pivot, column].abs()) < 1e-8:
            continue
        rows[[found, pivot]] = rows[[pivot, found]]
        rows[found] = rows[found] / rows[found, column]
        for other in range(len(rows)):
            if other != found:
                rows[other] -= rows[other, column] * rows[found]
        found += 1
    rows = torch.where(rows.abs() < 1e-8, 0.0, rows)
    rounded = (rows * 840).round() / 840  # small fractions, as what rounding left of them
    rows = torch.where((rows - rounded).abs() < 1e-8, rounded, rows)
    return [row.to(basis.device) for row in rows[:found]]
