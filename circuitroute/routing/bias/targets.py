"""Which mean loads a bias can reach: targets by default, and what is wrong with others.

Legend: T tokens, E experts, J = K + 1 counts; a target [E] is the fraction of the tokens that choose each expert.

Experts that the evidence forces or forbids in every token, or that every allowed subset has or lacks, are *constant*. A
direction v in which <v, z> is the same for all allowed subsets, such as all ones for exactly k experts or those of a
group, is *fixed*: a bias along it changes nothing, and a target has to agree with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from circuitroute._validate import as_items, as_number, as_real
from circuitroute.circuit import Compiled
from circuitroute.inference.distribution import SubsetDistribution
from circuitroute.inference.hull import fixed_directions, readable
from circuitroute.routing.bias.solver import Part, Solution
from circuitroute.routing.control import summed

ROUNDED = 1e-5  # how far a target may be from what is fixed, as one of float32 is: it is then taken as meant
SHOWN = 4  # experts that a message names


def as_target(target: object, experts: int) -> Tensor | None:
    """[E] float64 on the CPU, fractions of the tokens; None as it is.

    Raises:
        TypeError, ValueError: anything but E numbers from 0 to 1.
    """
    if target is None:
        return None
    if isinstance(target, Tensor):
        values = as_real("target", target).detach()
    else:
        items = as_items("target", target, "one number per expert")
        values = torch.tensor([as_number(f"target[{i}]", item) for i, item in enumerate(items)], dtype=torch.float64)
    if values.shape != (experts,):
        raise ValueError(f"target has shape {tuple(values.shape)}: expected one number per expert, ({experts},)")
    values = values.double().cpu()
    wrong = ~((values >= 0) & (values <= 1))
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        raise ValueError(
            f"target[{first}]={float(values[first])}: a fraction of the tokens, from 0 to 1; they add up to the mean "
            "number of experts per token"
        )
    return values


@dataclass(frozen=True, eq=False)
class Reach:
    """What evidence and constraint leave to a bias, over all processes.

    Attributes:
        circuit: over E experts.
        forced, forbidden: [E] float64, in what share of the tokens each expert is.
        counts: which counts 0..K some token may have.
        row: [E] float64: 0, and the evidence that all tokens have.
        fixed: [E, r] float64, an orthonormal basis of the fixed directions.
        constant: [E] bool.
        same: whether all tokens have the same evidence, and no count potential.
    """

    circuit: Compiled
    forced: Tensor
    forbidden: Tensor
    counts: tuple[int, ...]
    row: Tensor
    fixed: Tensor
    constant: Tensor
    same: bool

    @staticmethod
    def of(parts: Sequence[Part], tokens: int, group: dist.ProcessGroup | None, device: torch.device) -> Reach:
        """Of a batch; every process must have a part, if of no tokens."""
        circuit = parts[0].circuit
        n, J = circuit.n, circuit.max_count + 1
        found = torch.zeros(2 * n + J + 1, dtype=torch.float64, device=device)
        for part in parts:
            found[:n] += (part.base == math.inf).sum(0)
            found[n : 2 * n] += (part.base == -math.inf).sum(0)
            if part.potential is None:
                found[2 * n : -1] += len(part.base)
            else:
                found[2 * n : -1] += (part.potential > -math.inf).expand(len(part.base), -1).sum(0)
                found[-1] += 1
        found = summed(found, group)
        forced, forbidden = found[:n] / tokens, found[n : 2 * n] / tokens
        whole = circuit.counts if circuit.counts is not None else range(J)
        counts = tuple(j for j in whole if j < J and float(found[2 * n + j]) > 0)
        row = torch.zeros_like(forced)
        row = torch.where(forced == 1, math.inf, torch.where(forbidden == 1, -math.inf, row))
        partial = ((forced > 0) & (forced < 1)) | ((forbidden > 0) & (forbidden < 1))
        same = not bool(partial.any()) and float(found[-1]) == 0
        fixed, constant = _fixed(circuit, row, counts)
        return Reach(circuit, forced, forbidden, counts, row, fixed, constant, same)

    def law(self, count: float) -> Tensor:
        """[E] the constraint's own balance at a mean count: the marginals where all logits are equal.

        They are what tilts the uniform distribution over the allowed subsets to that count: k / E for exactly k.
        """
        free = torch.isfinite(self.row)
        if self.circuit.counts is not None:
            forced = float((self.row == math.inf).sum())
            share = (count - forced) / max(1.0, float(free.sum()))
            return torch.where(free, share, (self.row == math.inf).double())
        low, high, tilt = -80.0, 80.0, 0.0
        if self.circuit.min_count < self.circuit.max_count:
            for _ in range(60):
                tilt = (low + high) / 2
                low, high = (tilt, high) if float(self._at(tilt).sum()) < count else (low, tilt)
        return self._at(tilt)

    def _at(self, tilt: float) -> Tensor:
        """[E] marginals of logits that are all the same."""
        return _of_row(self.circuit, torch.where(torch.isfinite(self.row), tilt, self.row)).marginals[0]

    def agreed(self, target: Tensor, mean: Tensor) -> Tensor:
        """[E] the target, rounding taken off.

        Args:
            mean: [E], the mean marginals at any bias.

        Raises:
            ValueError: one that no bias reaches, by what is fixed and by its entries.
        """
        self._check_entries(target, mean)
        self._check_count(target)
        off = target - mean
        for direction in readable(self.fixed):
            wanted, always = float(direction @ target), float(direction @ mean)
            if abs(wanted - always) > ROUNDED * max(1.0, float(direction.abs().sum())):
                raise ValueError(f"{self._sum_text(direction)} {wanted:.6g}, and no bias moves it from {always:.6g}")
        return target - self.fixed @ (self.fixed.t() @ off)

    def _check_entries(self, target: Tensor, mean: Tensor) -> None:
        low, high = self.forced, 1 - self.forbidden
        low, high = torch.where(self.constant, mean, low), torch.where(self.constant, mean, high)
        room = torch.where(self.constant | (low >= high), ROUNDED, 0.0)
        stuck = self.constant | (low >= high)
        wrong = torch.where(stuck, (target - mean).abs() > room, (target <= low) | (target >= high))
        if not bool(wrong.any()):
            return
        first = int(wrong.nonzero()[0])
        given, least, most = float(target[first]), float(low[first]), float(high[first])
        if bool(stuck[first]):
            why = f"the constraint, or the infinite logits, leave expert {first} no choice: it is always {least:.6g}"
        else:
            why = (
                f"no bias reaches that: expert {first} lies between {least:.6g} and {most:.6g}, both excluded, which "
                "infinite logits may narrow; only an infinite bias gets to an end, so force or forbid it by logits "
                "of +inf or -inf"
            )
        raise ValueError(f"target[{first}]={given:.6g}: {why}")

    def _check_count(self, target: Tensor) -> None:
        low, high, total = self.circuit.min_count, self.circuit.max_count, float(target.sum())
        rule = repr(self.circuit.constraint)
        if low == high and abs(total - low) > ROUNDED * max(1, low):
            raise ValueError(
                f"target adds up to {total:.6g}: no bias reaches that, since every subset that {rule} allows has {low} "
                "experts; divide by the sum, and multiply by that"
            )
        if low < high and not low < total < high:
            raise ValueError(
                f"target adds up to {total:.6g}: no bias reaches that, since the subsets that {rule} allows have from "
                f"{low} to {high} experts, and their mean is in between, both excluded"
            )

    def _sum_text(self, direction: Tensor) -> str:
        """What a direction adds up, in words."""
        experts = direction.nonzero().flatten()
        values = direction[experts]
        if bool((values == values[0]).all()):
            return f"target of the experts {experts.tolist()} together, which have a number of their own, is"
        terms = " + ".join(f"{float(v):.4g} target[{int(e)}]" for v, e in zip(values, experts, strict=True))
        return f"target gives {terms} ="

    def proof(self, target: Tensor, bias: Tensor) -> bool:
        """Whether a bias shows that no bias reaches the target: <bias, target> is more than any allowed subset has.

        Only known where all tokens have the same subsets.
        """
        if not self.same:
            return False
        free = torch.isfinite(self.row)
        best = _of_row(self.circuit, torch.where(free, bias, self.row)).mode_mask()[0]
        gain = (bias * (target - best.double()))[free].sum()
        return float(gain) > 1e-9 * float(bias.abs().sum()) + 1e-12

    def unreached(self, target: Tensor, found: Solution) -> ValueError:
        """The error of a solution that is none."""
        order = found.missing.abs().argsort(descending=True, stable=True)[:SHOWN].tolist()
        if float(found.missing.abs().max()) < ROUNDED:  # nothing is missing, but for how far the bias went for it
            order = found.bias.abs().argsort(descending=True, stable=True)[:SHOWN].tolist()
        shown = ", ".join(
            f"{e} ({float(target[e]):.4g} wanted, {float(target[e] - found.missing[e]):.4g} at a bias of "
            f"{float(found.bias[e]):.3g})"
            for e in order
        )
        return ValueError(
            f"target: no bias reaches it. Mean marginals miss it by {float(found.missing.abs().max()):.3g}, and the "
            f"bias grows without end: it lies outside of, or on the boundary of, what {self.circuit.constraint!r} and "
            f"the infinite logits allow on average. Farthest off are the experts {shown}"
        )


def _of_row(circuit: Compiled, row: Tensor) -> SubsetDistribution:
    return SubsetDistribution(circuit, row[None], validate_args=False)


def _fixed(circuit: Compiled, row: Tensor, counts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """([E, r], [E] bool): the fixed directions, and the experts that are constant."""
    free = torch.isfinite(row)
    unit = torch.eye(circuit.n, dtype=torch.float64, device=row.device)
    if circuit.counts is None:
        return fixed_directions(circuit, row)
    forced, size = int((row == math.inf).sum()), int(free.sum())
    left = {count - forced for count in counts if 0 <= count - forced <= size}
    if len(left) <= 1 and left <= {0, size}:
        return unit, torch.ones_like(free)
    constants = unit[:, ~free]
    ones = free.double() / math.sqrt(size)
    if left == {0, size}:  # all or none: only their number is free
        differences = torch.linalg.svd(torch.diag(free.double()) - torch.outer(ones, ones))[0][:, : size - 1]
        return torch.cat([constants, differences], 1), ~free
    return (torch.cat([constants, ones[:, None]], 1) if len(left) == 1 else constants), ~free
