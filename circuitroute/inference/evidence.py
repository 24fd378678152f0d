"""Infinite logits as evidence: which rows they leave without a subset, and how conditioning writes them.

Legend: N variables; leading dimensions are a batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from circuitroute._tensors import batched, plain, traced
from circuitroute._validate import as_int, as_items
from circuitroute.circuit import Compiled, boolean


def rows_text(bad: Tensor, limit: int = 8) -> str:
    """The indices of the true entries of a bool tensor, for an error message."""
    if bad.dim() == 0:
        return "the only row"
    rows = bad.nonzero().tolist()
    shown = ", ".join(str(r[0] if len(r) == 1 else tuple(r)) for r in rows[:limit])
    more = f" and {len(rows) - limit} more" if len(rows) > limit else ""
    return f"row{'s' if len(rows) > 1 else ''} {shown}{more}"


def unsatisfiable_rows(circuit: Compiled, logits: Tensor, count_potential: Tensor | None, finite: bool) -> Tensor:
    """[...] bool: rows whose infinite logits (and count potential) leave no allowed subset.

    Args:
        finite: whether all logits are known to be finite, so that there is no evidence.
    """
    if circuit.counts is None:
        return ~_satisfiable(circuit, logits == math.inf, logits == -math.inf)
    counts = torch.tensor(circuit.counts, device=logits.device)
    possible = torch.ones(len(counts), dtype=torch.bool, device=logits.device)
    if not finite:
        low = (logits == math.inf).sum(-1, keepdim=True)
        high = circuit.n - (logits == -math.inf).sum(-1, keepdim=True)
        possible = (counts >= low) & (counts <= high)
    if count_potential is not None:
        possible = possible & (count_potential[..., counts] > -math.inf)
    return (~possible.any(-1)).expand(logits.shape[:-1])


def _satisfiable(circuit: Compiled, forced: Tensor, forbidden: Tensor) -> Tensor:
    """Whether some allowed subset agrees with the evidence: the circuit on literals that are still possible."""
    n = circuit.n
    possible = boolean.holds(circuit.graph, ~forced.reshape(-1, n), ~forbidden.reshape(-1, n))
    return possible.reshape(forced.shape[:-1])


def condition_logits(
    n: int,
    logits: Tensor,
    include: Tensor | Iterable[int] | None,
    exclude: Tensor | Iterable[int] | None,
) -> tuple[Tensor, Tensor]:
    """Logits [..., n], +inf at ``include`` and -inf at ``exclude``, and which rows [...] contradict their own logits.

    Such rows include what the logits forbid, or exclude what they force; their logits become NaN. So do those of rows
    that include what they exclude, where that cannot be seen and refused.
    """
    chosen, banned = as_selections(n, include, exclude, logits.device)
    result = torch.where(chosen, math.inf, torch.where(banned, -math.inf, logits))
    lost = ((chosen & (logits == -math.inf)) | (banned & ((logits == math.inf) | chosen))).any(-1)
    return torch.where(lost.unsqueeze(-1), math.nan, result), lost


def as_selections(
    n: int, include: Tensor | Iterable[int] | None, exclude: Tensor | Iterable[int] | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Masks [..., N] bool of what is included and what is excluded.

    Raises:
        TypeError, ValueError: neither masks nor indices of variables, or, where it can be seen, a variable in both.
    """
    chosen, banned = _as_selection("include", include, n, device), _as_selection("exclude", exclude, n, device)
    unseen = batched() or traced(chosen, banned)  # whose values cannot be branched on
    if not unseen and bool((chosen & banned).any()):
        both = (chosen & banned).nonzero()[:, -1].unique().tolist()
        raise ValueError(f"include and exclude share the variables {both}: give each in one of them only")
    return chosen, banned


def _as_selection(name: str, value: Tensor | Iterable[int] | None, n: int, device: torch.device) -> Tensor:
    """[..., N] bool from a mask, from indices, or from nothing."""
    if value is None:
        return torch.zeros(n, dtype=torch.bool, device=device)
    value = plain(name, value) if isinstance(value, Tensor) else value
    unseen = isinstance(value, Tensor) and (batched() or traced(value))
    if isinstance(value, Tensor) and (value.dtype == torch.bool or value.dtype.is_floating_point):
        if value.dim() == 0 or value.shape[-1] != n:
            raise ValueError(f"{name} has shape {tuple(value.shape)}: the last dimension of a mask must be n={n}")
        wrong = (value != 0) & (value != 1)
        if not unseen and bool(wrong.any()):
            raise ValueError(
                f"{name} holds {value[wrong][0].item()}: every value of a mask must be 0 or 1; pass integers to give "
                "indices"
            )
        return value.to(device) == 1
    if isinstance(value, Tensor) and unseen:
        return (value.reshape(-1, 1).to(device) == torch.arange(n, device=device)).any(0)
    entries: list[Any] = value.reshape(-1).tolist() if isinstance(value, Tensor) else _listed(name, value)
    if len(entries) == n and all(isinstance(v, bool) for v in entries):
        return torch.tensor(entries, device=device)
    selection = torch.zeros(n, dtype=torch.bool, device=device)
    for entry in entries:
        index = as_int(name, entry)
        if not 0 <= index < n:
            raise ValueError(f"{name} holds index {index}: indices must lie in 0..{n - 1}")
        selection[index] = True
    return selection


def _listed(name: str, values: Iterable[int]) -> list[Any]:
    """The entries of a collection, NumPy's numbers and bools as Python's."""
    items = as_items(name, values, "a mask or a sequence of variable indices")
    return [item.item() if isinstance(item, (np.generic, Tensor)) else item for item in items]
