"""What metrics of decisions are made of: executed experts, and how much of its mode a distribution samples.

Legend: T tokens, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from circuitroute._tensors import cannot_look
from circuitroute._validate import as_real
from circuitroute.inference.distribution import SubsetDistribution
from circuitroute.routing.decision import Routing


def executed(decisions: Routing | Tensor, name: str = "decisions") -> Tensor:
    """[T, E] bool of decisions or of their mask.

    Raises:
        TypeError, ValueError: something else, or a mask of another shape.
    """
    mask = decisions.mask if isinstance(decisions, Routing) else as_real(name, decisions)
    if mask.dim() != 2:
        raise ValueError(f"{name} have shape {tuple(mask.shape)}: expected [tokens, experts]")
    return mask.detach() != 0


def expected_agreement(distribution: SubsetDistribution, mode: Tensor) -> Tensor:
    """[T] the share of ``mode`` [T, E] that a sample is expected to choose; of an empty one, its probability."""
    size = mode.sum(-1)
    shared = torch.where(mode, distribution.marginals, 0.0).sum(-1) / size.clamp(min=1)
    if not cannot_look(size) and bool((size > 0).all()):
        return shared
    return torch.where(size > 0, shared, distribution.log_prob(mode).exp())
