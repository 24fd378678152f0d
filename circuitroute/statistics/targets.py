"""Which marginals a constraint can have: targets by row, and what is wrong with others.

Legend: T rows, N variables; a target [T, N] is a row of inclusion probabilities.

A target of exactly 0 or 1 is evidence: the variable is forbidden or forced. What the others may be is decided by what
that leaves: their marginals lie in a polytope, whose affine hull is where all fixed directions
(:mod:`circuitroute.inference.hull`) agree. For a count constraint that is known in closed form: if the free variables
have one possible number, their marginals add up to it, and otherwise to a number strictly between the ends.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from circuitroute.circuit import Compiled
from circuitroute.inference.distribution import SubsetDistribution
from circuitroute.inference.evidence import rows_text, unsatisfiable_rows
from circuitroute.inference.hull import fixed_directions, readable

# How far a target may be from what is fixed, relative to the sum it enters: rounding, which is then taken off.
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
SHOWN = 6  # variables that a message names


@dataclass(frozen=True, eq=False)
class Targets:
    """Rows that were found to agree with what is fixed.

    Attributes:
        circuit: over N variables.
        target: [T, N] float64, rounding taken off.
        row: [T, N] float64, the evidence: 0 where a variable is free, else infinite.
        single: [T] bool, rows whose free variables always have the same number, for count constraints; such rows have
            no other fixed direction.
        basis: [N, r] float64, the fixed directions, for all other circuits; the same in all rows. None for count
            constraints.
        constant: [T, N] bool, free variables that the constraint leaves no choice; their logit is 0.
    """

    circuit: Compiled
    target: Tensor
    row: Tensor
    single: Tensor
    basis: Tensor | None
    constant: Tensor

    @property
    def moving(self) -> Tensor:
        """[T, N] bool: the variables whose logits do something."""
        return torch.isfinite(self.row) & ~self.constant

    def at(self, rows: Tensor) -> Targets:
        """Some of the rows."""
        return Targets(
            self.circuit, self.target[rows], self.row[rows], self.single[rows], self.basis, self.constant[rows]
        )

    def project(self, values: Tensor) -> Tensor:
        """[T, N] without a part along what is fixed, and 0 where no logit does anything."""
        moving = self.moving
        values = torch.where(moving, values, 0.0)
        if self.basis is not None:
            return torch.where(moving, values - (values @ self.basis) @ self.basis.t(), 0.0)
        mean = values.sum(-1, keepdim=True) / moving.sum(-1, keepdim=True).clamp(min=1)
        return torch.where(moving & self.single[:, None], values - mean, values)


def check_entries(marginals: Tensor) -> None:
    """Refuse what is no probability.

    Raises:
        ValueError: NaN, or entries outside [0, 1], named by row.
    """
    unknown = marginals.isnan().any(-1)
    if bool(unknown.any()):
        raise ValueError(f"marginals hold NaN in {rows_text(unknown)}: give a probability for every variable")
    outside = (marginals < 0) | (marginals > 1)
    if bool(outside.any()):
        bad = outside.any(-1)
        raise ValueError(
            f"marginals hold {float(marginals[outside][0]):.6g} in {rows_text(bad)}: inclusion probabilities lie in "
            "[0, 1]; where sizes ask for more than 1, set those to exactly 1 and share out the rest"
        )


def targets_of(circuit: Compiled, target: Tensor, dtype: torch.dtype, names: Tensor) -> list[tuple[Tensor, Targets]]:
    """Rows [T, N] float64, checked, and in parts that share their fixed directions: (which rows, targets) each.

    Args:
        circuit: over N variables.
        target: entries in [0, 1].
        dtype: of what was given, which says how much of a disagreement is rounding.
        names: [T, ...] the place of every row in the batch, for messages.

    Raises:
        ValueError: rows that no member of the family has, named, with the reason.
    """
    row = torch.where(target == 1, math.inf, torch.where(target == 0, -math.inf, 0.0)).to(target)
    lost = unsatisfiable_rows(circuit, row, None, finite=False)
    if bool(lost.any()):
        raise ValueError(
            f"marginals in {named_rows(names, lost)}: no subset that {circuit.constraint!r} allows has all variables "
            "whose target is 1 and none whose target is 0"
        )
    if circuit.counts is None:
        patterns, which = row.unique(dim=0, return_inverse=True)
        rows = [(which == i).nonzero().squeeze(1) for i in range(len(patterns))]
        return [(r, _general(circuit, target[r], row[r], dtype, names[r])) for r in rows]
    return _counted(circuit, target, row, dtype, names)


def named_rows(names: Tensor, bad: Tensor) -> str:
    """The names of marked rows; those of a batch without dimensions have none."""
    if names.shape[-1] == 0:
        return "the only row"
    shown = [str(name[0] if len(name) == 1 else tuple(name)) for name in names[bad].tolist()]
    more = f" and {len(shown) - 8} more" if len(shown) > 8 else ""
    return f"row{'s' if len(shown) > 1 else ''} {', '.join(shown[:8])}{more}"


# ---------------------------------------------------------------------------------------------- count constraints


def _counted(
    circuit: Compiled, target: Tensor, row: Tensor, dtype: torch.dtype, names: Tensor
) -> list[tuple[Tensor, Targets]]:
    counts = torch.tensor(circuit.counts, device=row.device)
    forced, free = (row == math.inf).sum(-1), torch.isfinite(row)
    size = free.sum(-1)
    possible = (counts >= forced[:, None]) & (counts <= (forced + size)[:, None])
    low = torch.where(possible, counts, circuit.n).amin(-1)
    high = torch.where(possible, counts, 0).amax(-1)
    single, extreme = low == high, (possible.sum(-1) == 2) & (low == forced) & (high == forced + size) & (size > 1)
    total = target.sum(-1)
    slack = ROUNDING[dtype] * total.clamp(min=1)
    wrong = single & ((total - low).abs() > slack)
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        raise ValueError(
            f"marginals in {named_rows(names, wrong)} sum to {float(total[first]):.10g}: every subset that "
            f"{circuit.constraint!r} allows has {int(low[first])} variables; multiply by {int(low[first])} / sum "
            f"(tolerance {float(slack[first]):.0e})"
        )
    edge = 4 * torch.finfo(torch.float64).eps * total
    wrong = ~single & ((total <= low + edge) | (total >= high - edge))
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        raise ValueError(
            f"marginals in {named_rows(names, wrong)} sum to {float(total[first]):.10g}: that must lie strictly "
            f"between {int(low[first])} and {int(high[first])}, the sizes that {circuit.constraint!r} allows; for all "
            "subsets of the size at an end take Exactly"
        )
    # All or none of the free variables: they have one marginal, which is no closed form's business.
    parts = []
    if bool(extreme.any()):
        for i in extreme.nonzero().flatten():
            only = i[None]
            parts.append((only, _general(circuit, target[only], row[only], dtype, names[only])))
    rest = (~extreme).nonzero().squeeze(1)
    if len(rest):
        constant = free & (single & ((low == forced) | (low == forced + size)))[:, None]
        _check_constant(circuit, target, constant, (low > forced)[:, None].to(target).expand_as(target), slack, names)
        found = Targets(circuit, target, row, single, None, constant).at(rest)
        off = found.target.sum(-1) - low[rest]
        moving = found.moving
        share = torch.where(found.single, off, 0.0) / moving.sum(-1).clamp(min=1)
        # Rounding is taken off the larger ones, so that what is nearly 0 or 1 stays inside.
        spread = found.target * (1 - found.target) * moving
        weight = spread / spread.sum(-1, keepdim=True).clamp(min=1e-300)
        shift = weight * (share * moving.sum(-1))[:, None]
        parts.append((rest, Targets(circuit, found.target - shift, found.row, found.single, None, found.constant)))
    return parts


def _check_constant(
    circuit: Compiled, target: Tensor, constant: Tensor, always: Tensor, slack: Tensor, names: Tensor
) -> None:
    """Refuse targets that a variable without a choice does not have."""
    wrong = constant & ((target - always).abs() > slack[:, None])
    if bool(wrong.any()):
        row, variable = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"marginals in {named_rows(names, wrong.any(-1))}: {circuit.constraint!r} and the targets of 0 and 1 leave "
            f"variable {variable} no choice: it is always {float(always[row, variable]):.0f}, and the target is "
            f"{float(target[row, variable]):.6g}"
        )


# ---------------------------------------------------------------------------------------------- all other circuits


def _general(circuit: Compiled, target: Tensor, row: Tensor, dtype: torch.dtype, names: Tensor) -> Targets:
    """Rows with the same evidence."""
    basis, still = fixed_directions(circuit, row[0])
    free = torch.isfinite(row)
    with torch.no_grad():
        always = SubsetDistribution(circuit, row, validate_args=False).marginals
    constant = free & still
    total = target.sum(-1).clamp(min=1)
    _check_constant(circuit, target, constant, always, ROUNDING[dtype] * total, names)
    for direction in readable(basis):
        wanted, fixed = target @ direction, always @ direction
        slack = ROUNDING[dtype] * (target @ direction.abs()).clamp(min=1)
        wrong = (wanted - fixed).abs() > slack
        if bool(wrong.any()):
            first = int(wrong.nonzero()[0])
            raise ValueError(
                f"marginals in {named_rows(names, wrong)}: {_sum_text(direction)} {float(wanted[first]):.10g}, and "
                f"every subset that {circuit.constraint!r} allows has {float(fixed[first]):.6g} there (tolerance "
                f"{float(slack[first]):.0e})"
            )
    agreed = target - ((target - always) @ basis) @ basis.t()
    single = torch.zeros(len(row), dtype=torch.bool, device=row.device)
    return Targets(circuit, torch.where(free, agreed, target), row, single, basis, constant)


def _sum_text(direction: Tensor) -> str:
    """What a direction adds up, in words."""
    variables = direction.nonzero().flatten().tolist()
    values = direction[variables]
    shown = f"{variables[:SHOWN]}" if len(variables) <= SHOWN else f"{str(variables[:SHOWN])[:-1]}, ...]"
    if bool((values == values[0]).all()):
        return f"those of the variables {shown} sum to"
    terms = " + ".join(f"{float(v):.4g} marginals[{i}]" for v, i in zip(values[:SHOWN], variables, strict=False))
    return f"{terms}{' + ...' if len(variables) > SHOWN else ''} is"
