"""What a batch needs of a set of experts: for every token an allowed subset within the set.

Legend: T tokens, E experts, R kinds of tokens (rows whose evidence is the same), J = K + 1 counts; U a set of experts.

Whether a token has a subset within U is a matter of its infinite logits alone, so tokens of equal evidence are one
row: a batch without evidence is a single one. Larger sets do what smaller ones do. To find a small one is a covering
problem, hard in general; here it is a search that adds the experts of the cheapest missing subset, goes back where that
was wrong, and is bounded below by what the neediest row still lacks.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from circuitroute.errors import InfeasibleError
from circuitroute.inference.circuit import Circuit
from circuitroute.inference.distribution import SubsetDistribution
from circuitroute.inference.evidence import rows_text, unsatisfiable_rows

# Sets that the search looks at before it gives up; ordinary constraints take as many as a token needs experts.
MAX_SETS = 2000


class Needs(NamedTuple):
    """The evidence of a batch, each kind once.

    Attributes:
        evidence: [R, E] float64: infinite as the logits are, else 0.
        potential: [R, J] float64: -inf for counts that the count potential forbids, else 0; None where there is none.
        tokens, kind_of: [T] int64, the number of each token, and the row of its kind.
        forced: [E] bool, the experts that some token is given by +inf.
        plain: whether there is no evidence at all.
    """

    circuit: Circuit
    evidence: Tensor
    potential: Tensor | None
    tokens: Tensor
    kind_of: Tensor
    forced: Tensor
    plain: bool

    @staticmethod
    def of(circuit: Circuit, logits: Tensor, potential: Tensor | None, tokens: Tensor) -> Needs:
        """Of logits [T, E] without NaN and a count potential [T, J], which belong to these token numbers [T]."""
        evidence = torch.where(torch.isinf(logits), logits, 0.0).double()
        kinds = evidence
        if potential is not None:
            potential = torch.where(potential == -math.inf, -math.inf, 0.0).double().expand(len(logits), -1)
            kinds = torch.cat([evidence, potential], -1)
        plain = not bool(kinds.any())
        if plain:
            kinds, kind_of = kinds[:1], torch.zeros_like(tokens)
        else:
            kinds, kind_of = torch.unique(kinds, dim=0, return_inverse=True)
        given = None if potential is None else kinds[:, circuit.n :]
        return Needs(circuit, kinds[:, : circuit.n], given, tokens, kind_of, (logits == math.inf).any(0), plain)

    def unmet(self, within: Tensor) -> Tensor:
        """[R] bool, rows without a subset within the set [E] bool, which holds what is forced."""
        evidence = self.evidence.masked_fill(~within, -math.inf)
        return unsatisfiable_rows(self.circuit, evidence, self.potential, finite=False)

    def met_by_any(self, size: int) -> bool:
        """Whether every set of this size that holds what is forced will do: counts know, other circuits do not."""
        if self.circuit.counts is None:
            return False
        possible = size - (self.evidence == -math.inf).sum(-1)
        return bool((possible >= self._fewest()).all())

    def check(self, most: int) -> None:
        """Refuse a number of experts that some token, or what is forced together, exceeds.

        Raises:
            InfeasibleError: naming the rows and what they need.
        """
        fewest = self._fewest()
        if bool((fewest > most).any()):
            needed = fewest[self.kind_of]
            sizes = sorted(set(fewest[fewest > most].tolist()), reverse=True)
            rows = [f"{self._rows(needed == size)} ({size} experts)" for size in sizes[:4]]
            raise InfeasibleError(
                f"max_distinct={most}: too few for what {self.circuit.constraint!r}, the infinite logits and the count "
                f"potential ask of {', '.join(rows)}; give max_distinct={sizes[0]} at least"
            )
        if int(self.forced.sum()) > most:
            experts = self.forced.nonzero()[:, 0].tolist()
            raise InfeasibleError(
                f"max_distinct={most}: the tokens are given {len(experts)} experts between them by +inf, {experts}; "
                f"give max_distinct={len(experts)} at least, or force fewer"
            )

    def smallest(self, prefer: Tensor, most: int) -> Tensor:
        """[E] bool, a set of at most ``most`` experts that holds what is forced and meets every row.

        Args:
            prefer: [E] in 0..1, what to take first among sets of one size.

        Raises:
            InfeasibleError: there is no such set, or none was found.
        """
        none, stack, seen = torch.zeros_like(self.forced), [(self.forced, self.forced & False)], 0
        while stack and seen < MAX_SETS:
            chosen, banned = stack.pop()
            seen += 1
            cheapest, lacking = self._lacking(chosen, banned, prefer)
            if not len(lacking) or int(lacking.max()) == 0:
                return chosen
            if int(chosen.sum()) + int(lacking.max()) > most:
                continue
            missing = cheapest & ~chosen
            # Of the neediest row's missing experts, the one that most rows want.
            wanted = torch.where(missing[lacking.argmax()], missing.sum(0) + prefer, -1.0)
            expert = none.clone()
            expert[wanted.argmax()] = True
            stack += [(chosen, banned | expert), (chosen | expert, banned)]
        found = "there is no set of so few experts" if not stack else f"none was found among {MAX_SETS} sets"
        raise InfeasibleError(
            f"max_distinct={most}: {found} that holds a subset of {self.circuit.constraint!r} for every token (the "
            f"neediest alone takes {int(self._fewest().max())}, in "
            f"{self._rows(self._fewest()[self.kind_of] == self._fewest().max())}; their infinite logits are of "
            f"{len(self.evidence)} kinds); give a larger max_distinct, or decide on fewer tokens at once"
        )

    def _fewest(self) -> Tensor:
        """[R] int64, the size of each row's smallest subset."""
        if self.plain:
            return self.kind_of.new_full((len(self.evidence),), self.circuit.min_count)
        none = torch.zeros_like(self.forced)
        return self._lacking(none, none, none.double())[1]

    def _rows(self, marked: Tensor) -> str:
        """The numbers of marked tokens [T] bool, in words."""
        rows = torch.zeros(int(self.tokens.max()) + 1, dtype=torch.bool, device=marked.device)
        rows[self.tokens[marked]] = True
        return rows_text(rows)

    def _lacking(self, chosen: Tensor, banned: Tensor, prefer: Tensor) -> tuple[Tensor, Tensor]:
        """([R, E] bool, [R]): each row's subset that adds the fewest experts to a set, and how many: E + 1 for none."""
        E = self.circuit.n
        cost = torch.where(chosen, 0.0, prefer.double() - E)
        evidence = torch.where(torch.isinf(self.evidence), self.evidence, cost).masked_fill(banned, -math.inf)
        rows = SubsetDistribution(self.circuit, evidence, self.potential, validate_args=False)
        cheapest = rows.mode_mask()
        lost = unsatisfiable_rows(self.circuit, evidence, self.potential, finite=False)
        return cheapest, torch.where(lost, E + 1, (cheapest & ~chosen).sum(-1))
