"""Labels under a hierarchy of classes: whoever has a class has its parents, of which some have two.

The classes are a tree with some parents added, a directed acyclic graph, as in the Gene Ontology. A row belongs to a
few of them at any depth, and so to all that are above; its features are a hidden function of these, with noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

import circuitroute as cr

from .task import Task

BRANCHES = (4, 3, 3)  # 4 roots, 3 children each, 3 of these each: 52 classes


def parents_of_classes(seed: int = 2026, second_parents: int = 6) -> tuple[tuple[int, ...], ...]:
    """The parents of every class, depth first, so that parents come before children and families stay together.

    A class of the last level may get a second parent, a sibling of its first one.
    """
    found: list[tuple[int, ...]] = []

    def grow(parents: tuple[int, ...], depth: int) -> None:
        me = len(found)
        found.append(parents)
        for _ in range(BRANCHES[depth + 1] if depth + 1 < len(BRANCHES) else 0):
            grow((me,), depth + 1)

    for _ in range(BRANCHES[0]):
        grow((), 0)
    generator = torch.Generator().manual_seed(seed)
    leaves = [c for c in range(len(found)) if not any(c in up for up in found)]
    for c in torch.tensor(leaves)[torch.randperm(len(leaves), generator=generator)].tolist():
        (parent,) = found[c]
        before = [s for s in range(parent) if found[s] == found[parent]]  # sooner siblings of the parent
        if before and second_parents:
            found[c] = (parent, before[-1])
            second_parents -= 1
    return tuple(found)


def hierarchy_constraint(parents: tuple[tuple[int, ...], ...]) -> cr.Constraint:
    """Every class implies its parents."""
    x = cr.variables(len(parents))
    rules = [cr.Logic(x[c] >> x[p]) for c, up in enumerate(parents) for p in up]
    rule: cr.Constraint = rules[0]
    for other in rules[1:]:
        rule = rule & other
    return rule


def hierarchical_labels(
    train: int, validation: int, test: int, seed: int, known: float = 1.0, features: int = 32, noise: float = 0.7
) -> Task:
    """Rows of 1 to 3 classes and all that are above them; features a hidden function of the labels, plus noise.

    Args:
        known: the share of the labels to learn from that are known, each by itself.
    """
    parents = parents_of_classes()
    circuit = cr.compile(hierarchy_constraint(parents), len(parents))
    n = circuit.n
    above = _closure(parents)
    hidden = torch.Generator().manual_seed(2026)
    # A class looks like its parents, with a part of its own.
    own = torch.randn(n, features, generator=hidden)
    first = torch.randn(features, features, generator=hidden) / features**0.5
    generator = torch.Generator().manual_seed(seed)
    rows = train + validation + test
    chosen = torch.zeros(rows, n)
    some = torch.randint(1, 4, (rows,), generator=generator)
    for i in range(3):
        drawn = torch.randint(n, (rows,), generator=generator)
        chosen[torch.arange(rows), drawn] += (some > i).float()
    labels = (chosen @ above.float()) > 0
    x = torch.tanh(labels.float() @ own @ first * 0.5)
    x = x + noise * torch.randn(x.shape, generator=generator) * x.std()
    name = "hierarchy" if known == 1 else f"hierarchy, {100 * known:.0f}% of labels"
    mask = torch.rand(train, n, generator=generator) < known
    return Task.split(name, circuit, x, labels, train, validation, mask)


def _closure(parents: tuple[tuple[int, ...], ...]) -> Tensor:
    """[N, N] bool: row c holds class c and all that are above it."""
    above = torch.eye(len(parents), dtype=torch.bool)
    for c, up in enumerate(parents):  # parents come first
        for p in up:
            above[c] |= above[p]
    return above
