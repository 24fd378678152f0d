"""Sampling in serving: a subset of every token from the exact distribution, by keys that are handed in.

Legend: T tokens, E experts.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from circuitroute._tensors import traced, transformed
from circuitroute._validate import as_int, as_number, int_at_least
from circuitroute.engines import engine_of, ops, transforms
from circuitroute.engines.layered import evaluated
from circuitroute.engines.layered.torch import unrolled
from circuitroute.engines.layered.torch.unrolled_sampling import UnrolledSample
from circuitroute.engines.subset.unrolled import UnrolledCount, products
from circuitroute.engines.tables import Tables
from circuitroute.inference.circuit import Circuit
from circuitroute.inference.temperature import MIN_TEMPERATURE
from circuitroute.keys import random_key


class Sampling(nn.Module):
    """Draws from the distribution over subsets that scores / temperature give.

    Every engine draws the same subset of the same scores and keys, and so does the program of plain operations
    ``unrolled``. So what runs is what suits: the device's engine, or the plain operations where they are traced, or
    captured in a CUDA graph, since engines look at values to find the rows that want more accuracy.

    Args:
        circuit: what is allowed.
        temperature, head, layer: see :func:`circuitroute.integrations.serving.routing_function`.

    Attributes:
        unrolled: the plain operations; None if there are too many.
        products: how many products they have.
    """

    def __init__(self, circuit: Circuit, temperature: object, head: object, layer: object) -> None:
        super().__init__()
        self.circuit = circuit
        self.temperature = _as_temperature(temperature)
        self.head = 0 if head is None else int_at_least("head", head, 0)
        if self.head > circuit.max_count:
            raise ValueError(
                f"head={self.head}: {circuit.constraint!r} chooses at most {circuit.max_count} experts, so no more of "
                "them can be forced"
            )
        self.layer = None if layer is None else as_int("layer", layer)
        self.unrolled: nn.Module | None = None
        if circuit.counts is None:
            graph = evaluated(circuit.graph)
            self.products = graph.num_edges
            self.tables = Tables({})
            if unrolled.can_unroll(graph):
                self.unrolled = UnrolledSample(graph)
            return
        allowed = np.isin(np.arange(circuit.max_count + 1), circuit.counts)
        self.products = products(circuit.n, circuit.max_count)
        self.tables = Tables({"potential": np.where(allowed, 0.0, -np.inf).astype(np.float32)})
        if self.products <= unrolled.MAX_UNROLLED:
            self.unrolled = UnrolledCount(circuit.n, allowed)

    def key(self, seed: Tensor, position: Tensor) -> Tensor:
        """[T] int64 ``cr.random_key(seed, position)``, or with the layer as a third number."""
        return random_key(seed, position, *(() if self.layer is None else (self.layer,))).expand(position.shape)

    def forced(self, score: Tensor, mode: Tensor) -> Tensor:
        """[T, E] the scores with +inf at the head: the best members of the ``mode`` [T, E] bool, all of a small one."""
        ids = torch.where(mode, score, -math.inf).sort(dim=-1, descending=True, stable=True).indices[:, : self.head]
        return score.scatter(-1, ids, torch.where(mode.gather(-1, ids), math.inf, score.gather(-1, ids)))

    def forward(self, score: Tensor, key: Tensor) -> Tensor:
        """[T, E] bool; none in rows that nothing satisfies."""
        if self.temperature != 1.0:
            score = score / self.temperature  # infinite scores stay as they are
        potential = self.tables.on(score.device)["potential"] if len(self.tables) else None
        found: Tensor
        if transformed():
            found = transforms.sample(self.circuit, score, potential, key)
            return found
        plain = traced(score, key) or (score.is_cuda and torch.cuda.is_current_stream_capturing())
        if plain:
            run = self.unrolled
            found = ops.sample(self.circuit, score, potential, key) if run is None else run(score, key)
            return found
        return engine_of(self.circuit, score.device).sample(score, potential, key)


def _as_temperature(temperature: object) -> float:
    number = as_number("temperature", temperature)
    if not MIN_TEMPERATURE <= number < math.inf:
        raise ValueError(
            f"temperature={number}: must be positive and finite, {MIN_TEMPERATURE} at least; sample=False is the limit "
            "of cold"
        )
    return number
