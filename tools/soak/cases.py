"""Cases: everything that a check needs, as a function of a number.

Legend: T rows, N variables, J = K + 1 counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import circuitroute as cr
from tools.soak import rules
from tools.soak.rules import Rng, Rule

DTYPES = (torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16)
LAYOUTS = ("contiguous", "strided", "transposed", "expanded", "empty", "one row", "more dimensions")
ENGINES = ("numba", "torch", "naive")
# Cases whose numbers share this quotient share a constraint, so that threads compile and use one circuit at once.
SHARING = 8


@dataclass(frozen=True, eq=False)
class Case:
    """One case.

    Attributes:
        number: what it is a function of, with ``seed``.
        rule: the constraint and its meaning.
        engine: a preference among :data:`ENGINES`; the first that can run the circuit, from there on.
        logits: [..., N], a leaf that requires a gradient, or a view of one; in some dtype and layout.
        leaf: the leaf.
        potential: [J] or [T, J] by :meth:`potential_for`, or None.
        validate: None, or False where rows may be bad.
        key: [...] int64.
        rng: what checks draw from.
    """

    number: int
    rule: Rule
    engine: int
    dtype: torch.dtype
    layout: str
    leaf: Tensor
    logits: Tensor
    potential_kind: str
    validate: bool | None
    key: Tensor
    rng: Rng

    def __str__(self) -> str:
        shown = repr(self.rule.constraint)
        return (
            f"case {self.number}: {shown if len(shown) < 300 else shown[:300] + '...'} over {self.rule.n}, "
            f"{self.dtype}, {self.layout}, potential {self.potential_kind}, validate_args={self.validate}"
        )

    def potential_for(self, circuit: cr.Circuit) -> Tensor | None:
        """A leaf [J] or [..., J] for count constraints, with some counts forbidden in some rows; or None."""
        if self.potential_kind == "none" or circuit.counts is None:
            return None
        rng = np.random.default_rng([self.number, 7])
        J = circuit.max_count + 1
        shape = (J,) if self.potential_kind == "shared" else (*self.logits.shape[:-1], J)
        phi = rng.normal(size=shape) * float(rng.choice([0.5, 3.0, 30.0]))
        if self.potential_kind == "by row, some forbidden":
            phi = np.where(rng.random(size=shape) < 0.2, -math.inf, phi)
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        return torch.from_numpy(np.asarray(phi)).to(wide).requires_grad_()


def case(number: int, seed: int = 0) -> Case:
    """The case of that number."""
    rng = np.random.default_rng([seed, number // SHARING, 1])
    rule = rules.draw_wide(rng) if rng.random() < 0.2 else rules.draw(rng, 8)
    rng = np.random.default_rng([seed, number, 2])
    layout = str(rng.choice(LAYOUTS))
    dtype = DTYPES[rng.integers(len(DTYPES))]
    bad = bool(rng.random() < 0.3)
    potential = str(rng.choice(["none", "none", "shared", "by row", "by row, some forbidden"]))
    leaf, logits = _logits(rng, rule.n, dtype, layout, bad)
    forbidding = potential == "by row, some forbidden"
    key = cr.random_key(number, torch.arange(math.prod(logits.shape[:-1]))).reshape(logits.shape[:-1])
    return Case(
        number=number,
        rule=rule,
        engine=int(rng.integers(len(ENGINES))),
        dtype=dtype,
        layout=layout,
        leaf=leaf,
        logits=logits,
        potential_kind=potential,
        validate=False if bad or forbidding else None,
        key=key,
        rng=rng,
    )


def _logits(rng: Rng, n: int, dtype: torch.dtype, layout: str, bad: bool) -> tuple[Tensor, Tensor]:
    """(leaf, view): rows of ordinary and extreme scales, ties, and where ``bad`` also evidence and NaN."""
    rows = int(rng.integers(2, 7))
    scales = rng.choice([0.1, 1.0, 10.0, 100.0], size=(rows, 1))
    values = rng.normal(size=(rows, n)) * scales + rng.choice([0.0, 0.0, 30.0, -300.0], size=(rows, 1))
    tied = rng.random(size=(rows, 1)) < 0.25
    values = np.where(tied, np.round(values), values)
    if bad:
        infinite = (rng.random(size=(rows, n)) < 0.2) & (rng.random(size=(rows, 1)) < 0.5)
        values = np.where(infinite, np.where(rng.random(size=(rows, n)) < 0.5, math.inf, -math.inf), values)
        unknown = (rng.random(size=(rows, n)) < 0.2) & (rng.random(size=(rows, 1)) < 0.3)
        values = np.where(unknown, math.nan, values)
    given = torch.from_numpy(values).to(dtype)
    leaves: dict[str, Callable[[], Tensor]] = {
        "strided": lambda: torch.stack([given, torch.zeros_like(given)], -1).reshape(rows, 2 * n),
        "transposed": lambda: given.t().contiguous(),
        "expanded": lambda: given[:1].clone(),
        "empty": lambda: given[:0].clone(),
        "one row": lambda: given[0].clone(),
        "more dimensions": lambda: torch.stack([given, given.flip(0)]),
    }
    leaf = leaves.get(layout, given.clone)().requires_grad_()
    views: dict[str, Callable[[], Tensor]] = {
        "strided": lambda: leaf[:, ::2],
        "transposed": lambda: leaf.t(),
        "expanded": lambda: leaf.expand(rows, n),
        "more dimensions": lambda: leaf.transpose(0, 1),
    }
    return leaf, views.get(layout, lambda: leaf)()


def engines_of(circuit: cr.Circuit) -> dict[str, cr.Circuit]:
    """The circuit on every engine that can run it here."""
    found = {}
    for name in ENGINES:
        try:
            found[name] = circuit.with_engine(name)
        except cr.EngineError:
            continue
    return found
