"""What there is to learn in several layers: the sum of what a teacher's layers add to a residual stream.

The teacher's layers take different numbers of experts, on average and from token to token, and which layer takes how
many is known.

Legend: T tokens, H hidden size, L layers, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import circuitroute as cr

from .setting import LEAST, MOST, Setting
from .task import TEACHERS

EXPERTS = 16
# The mean number of experts of the teacher's layers; each layer's own number varies from LEAST to MOST.
SPLITS = {"rising": (1.25, 2.0, 2.75, 4.0), "falling": (4.0, 2.75, 2.0, 1.25)}
# With the sharper logits of the single layer an expert after the first would hardly count; with its larger experts
# later layers would depend on earlier ones too much to be learned.
LAYERED = replace(Setting(), steps=400, sharpness=2.0, gain=2.0)


class LayeredBatch(NamedTuple):
    """Inputs [T, H], what the teacher adds to them [T, H], and how many experts its layers take [T, L]."""

    hidden: Tensor
    target: Tensor
    counts: Tensor


class LayeredTask:
    """A teacher of several layers. A function of split, setting and seed."""

    def __init__(self, split: str, setting: Setting, seed: int) -> None:
        self.split, self.setting, self.seed = split, setting, seed
        torch.manual_seed(TEACHERS + seed)
        stream = torch.randn(setting.held_out, setting.hidden)
        self._layers: list[tuple[cr.MoE, float]] = []
        for mean in SPLITS[split]:
            layer = _layer(setting)
            price = _price(layer, normalised(stream), mean)
            stream = stream + layer(normalised(stream), price=price)[0].detach()
            self._layers.append((layer, price))

    def batches(self) -> Iterator[LayeredBatch]:
        """The training data: the same for all methods."""
        generator = torch.Generator().manual_seed(2 * self.seed)
        for _ in range(self.setting.steps):
            yield self._batch(self.setting.batch, generator)

    def held_out(self) -> LayeredBatch:
        """New inputs."""
        return self._batch(self.setting.held_out, torch.Generator().manual_seed(2 * self.seed + 1))

    @torch.no_grad()
    def _batch(self, size: int, generator: torch.Generator) -> LayeredBatch:
        hidden = torch.randn(size, self.setting.hidden, generator=generator)
        stream, counts = hidden, []
        for layer, price in self._layers:
            added, routing = layer(normalised(stream), price=price)
            stream = stream + added
            counts.append(routing.counts)
        return LayeredBatch(hidden, stream - hidden, torch.stack(counts, -1))


def normalised(stream: Tensor) -> Tensor:
    """What a layer sees of the residual stream [T, H]: rows of mean square 1."""
    return F.rms_norm(stream, stream.shape[-1:])


@torch.no_grad()
def _layer(setting: Setting) -> cr.MoE:
    router = cr.DynamicKRouter(setting.hidden, EXPERTS, LEAST, MOST)
    router.weight.normal_(std=setting.sharpness / math.sqrt(setting.hidden))
    experts = cr.StackedExperts(EXPERTS, setting.hidden, setting.inner)
    experts.up.mul_(setting.gain)
    experts.down.mul_(setting.gain)
    return cr.MoE(router, experts).eval()


@torch.no_grad()
def _price(layer: cr.MoE, hidden: Tensor, mean: float) -> float:
    """What an expert costs, such that the layer takes so many on average, by bisection."""
    assert layer.router is not None
    low, high = -100.0, 100.0
    while high - low > 1e-4:
        price = (low + high) / 2
        many = layer.router(hidden, price=price).counts.double().mean() > mean
        low, high = (price, high) if many else (low, price)
    return low
