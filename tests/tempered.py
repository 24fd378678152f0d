"""What the tests of temperature, decisions and prices share.

Legend: T tokens, E experts.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import circuitroute as cr

T, E = 40, 6

CONSTRAINTS = {
    "exactly": cr.Exactly(2),
    "between": cr.Between(1, 4),
    "any": cr.Between(0, E),
    "counts": cr.CountIn({1, 4}),
    "groups": cr.EachGroup(cr.Groups(2), cr.Exactly(1)),
    "costs": cr.Cost([1, 2, 3, 1, 2, 3], at_most=5),
}
every_constraint = pytest.mark.parametrize("constraint", CONSTRAINTS.values(), ids=CONSTRAINTS)
INF = math.inf


def logits_of(tokens: int = T, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(tokens, E, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2


def with_evidence(dtype: torch.dtype = torch.float32) -> Tensor:
    logits = logits_of(dtype=dtype)
    logits[1, 0], logits[2, 3], logits[3, 5], logits[3, 2] = INF, -INF, INF, -INF
    return logits


def key_of(tokens: int = T, seed: int = 5) -> Tensor:
    return cr.random_key(seed, torch.arange(tokens))


def compiled(constraint: cr.Constraint) -> cr.Circuit:
    return cr.compile(constraint, E)


def hidden_of(*lead: int) -> Tensor:
    return torch.randn(*lead, 4, generator=torch.Generator().manual_seed(2))
