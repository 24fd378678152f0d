"""Sizes, shared by all methods, and the shapes that are compared."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["fixed", "variable", "domains"]


@dataclass(frozen=True)
class Setting:
    """What all methods share; none of it was tuned for one of them.

    Attributes:
        hidden, inner: sizes of the experts.
        steps, batch, rate: of Adam, whose learning rate falls to 0 as half a cosine.
        held_out: tokens to measure on.
        sharpness: standard deviation of the teacher's logits.
        gain: by how much the teacher's expert matrices exceed their usual initial size, so that experts differ.
    """

    hidden: int = 16
    inner: int = 32
    steps: int = 600
    batch: int = 512
    rate: float = 3e-3
    held_out: int = 8192
    sharpness: float = 4.0
    gain: float = 3.0


@dataclass(frozen=True)
class Shape:
    """How many experts there are, and how many the teacher uses.

    Attributes:
        k: experts per token; of a variable count, the mean.
        kind: "fixed", k for every token; "variable", ``LEAST`` to ``MOST``; "domains", k, and inputs from hidden tasks.
    """

    experts: int
    k: float
    kind: Kind = "fixed"

    @property
    def count(self) -> int:
        """Experts per token of a student whose count is fixed; the next larger whole number."""
        return -int(-self.k // 1)

    def __str__(self) -> str:
        return self.kind if self.kind != "fixed" else f"{self.experts}x{self.k:g}"


LEAST, MOST = 1, 6
DOMAINS, DOMAINS_PER_BATCH = 8, 3

THOROUGH = (Shape(16, 1), Shape(16, 2))  # with all methods; the others with some, unless asked for
MAIN = (*THOROUGH, Shape(64, 4))
FURTHER = (Shape(16, 4), Shape(64, 1), Shape(64, 2))
VARIABLE, OF_DOMAINS = Shape(16, 2.5, "variable"), Shape(16, 2, "domains")
SHAPES = {str(shape): shape for shape in (*MAIN, *FURTHER, VARIABLE, OF_DOMAINS)}
