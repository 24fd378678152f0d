"""What there is to learn: a teacher's outputs, for inputs that may come from hidden tasks.

Legend: T tokens, H hidden size, E experts, D domains.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import circuitroute as cr

from .setting import DOMAINS, DOMAINS_PER_BATCH, LEAST, MOST, Setting, Shape

TEACHERS = 1000  # teachers' seeds start here, so that no student starts as its teacher


class Batch(NamedTuple):
    """Inputs [T, H] with the teacher's outputs [T, H] and choice [T, E], and the domains they come from [T], if any."""

    hidden: Tensor
    target: Tensor
    mask: Tensor
    domain: Tensor | None


class Task:
    """A teacher, and where its inputs come from. A function of shape, setting and seed."""

    def __init__(self, shape: Shape, setting: Setting, seed: int) -> None:
        self.shape, self.setting, self.seed = shape, setting, seed
        torch.manual_seed(TEACHERS + seed)
        self.centres = torch.randn(DOMAINS, setting.hidden)
        self._router = _router(shape, setting, self.centres)
        self.teacher = _teacher(self._router, setting)
        self.price = self._price()

    def batches(self) -> Iterator[Batch]:
        """The training data: the same for all methods."""
        generator = torch.Generator().manual_seed(2 * self.seed)
        for _ in range(self.setting.steps):
            domains = torch.randperm(DOMAINS, generator=generator)[:DOMAINS_PER_BATCH]
            yield self._batch(self.setting.batch, domains, generator)

    def held_out(self) -> Batch:
        """New inputs, from all domains alike."""
        generator = torch.Generator().manual_seed(2 * self.seed + 1)
        return self._batch(self.setting.held_out, torch.arange(DOMAINS), generator)

    @torch.no_grad()
    def _batch(self, size: int, domains: Tensor, generator: torch.Generator) -> Batch:
        hidden = torch.randn(size, self.setting.hidden, generator=generator)
        domain = None
        if self.shape.kind == "domains":
            domain = domains[torch.randint(len(domains), (size,), generator=generator)]
            hidden = self.centres[domain] + hidden / 2
        target, routing = self.teacher(hidden, price=self.price)
        return Batch(hidden, target, routing.mask, domain)

    @torch.no_grad()
    def _price(self) -> float | None:
        """What the teacher of a variable count pays per expert, such that its mean count is the shape's k."""
        if self.shape.kind != "variable":
            return None
        hidden = torch.randn(self.setting.held_out, self.setting.hidden)
        low, high = -100.0, 100.0
        while high - low > 1e-4:
            price = (low + high) / 2
            mean = self._router(hidden, price=price).counts.double().mean()
            low, high = (price, high) if mean > self.shape.k else (low, price)
        return low


@torch.no_grad()
def _router(shape: Shape, setting: Setting, centres: Tensor) -> cr.Router:
    router: cr.Router
    if shape.kind == "variable":
        router = cr.DynamicKRouter(setting.hidden, shape.experts, LEAST, MOST)
    else:
        router = cr.TopKRouter(setting.hidden, shape.experts, shape.count)
    router.weight.normal_()
    if shape.kind == "domains":  # every expert belongs to a domain, and leans to its centre
        router.weight.div_(2).add_(centres[torch.arange(shape.experts) % DOMAINS])
    router.weight.mul_(setting.sharpness / math.sqrt(setting.hidden))
    return router.eval()


@torch.no_grad()
def _teacher(router: cr.Router, setting: Setting) -> cr.MoE:
    experts = cr.StackedExperts(router.num_experts, setting.hidden, setting.inner)
    experts.up.mul_(setting.gain)
    experts.down.mul_(setting.gain)
    return cr.MoE(router, experts).eval()
