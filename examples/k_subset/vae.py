"""A variational autoencoder whose latent is a subset: k of n units are on, on scikit-learn's digits.

The prior is uniform over the k-subsets and the posterior a k-subset distribution with logits from the encoder, so the
divergence between them is exact, log C(n, k) less the entropy.

Legend: T images, N latent units, P pixels, S subsets per image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Categorical
from torch.nn import functional as F

import circuitroute as cr

from .estimators import METHODS, build
from .estimators.registry import Settings
from .fitting import Budget, minimise, network, one_thread

Row = dict[str, Any]

N, K, PIXELS, WIDTH = 20, 10, 64, 128
HELD_OUT = 360
BUDGET = Budget(steps=700)
TUNING_SEED = 100
SAMPLES = 64  # per image, for the reconstruction of the bound
# An exact gradient would be C(20, 10) = 184,756 evaluations per image.
USUAL = tuple(name for name in METHODS if name not in ("exact", "sfess"))


class Digits(NamedTuple):
    """0/1 images [T, P]."""

    train: Tensor
    held_out: Tensor


def digits(seed: int) -> Digits:
    """1,797 images of 8 x 8 pixels, those above half of the largest intensity on; split at random."""
    from sklearn.datasets import load_digits  # the extra `examples`

    images = (torch.from_numpy(load_digits().data) > 8).float()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return Digits(images[order[HELD_OUT:]], images[order[:HELD_OUT]])


def exact_divergence(distribution: cr.SubsetDistribution) -> Tensor:
    """[T] KL from the uniform distribution over the allowed subsets."""
    return math.log(distribution.circuit.model_count()) - distribution.entropy()


def categorical_divergence(distribution: cr.SubsetDistribution) -> Tensor:
    """[T] what SFESS trains all methods with: the divergence of softmax(logits), one of n, from the uniform."""
    return math.log(N) - Categorical(logits=distribution.logits).entropy()


DIVERGENCES = {"exact": exact_divergence, "categorical": categorical_divergence}


def run(
    methods: Sequence[str] = USUAL,
    seeds: Sequence[int] = range(5),
    budget: Budget = BUDGET,
    tune: bool = True,
) -> Iterator[list[Row]]:
    """A row per method, divergence and seed, in groups as they are found; settings are chosen by the bound of one fit
    with a seed of its own, with the exact divergence. The peers are also trained with the divergence that they
    usually are."""
    for method in methods:
        settings, fits = tuned(method, budget) if tune else (METHODS[method].few[0], 0)
        for kind in ("exact",) if METHODS[method].ours else ("exact", "categorical"):
            yield [{**fit(method, settings, seed, budget, kind), "tuning_fits": fits} for seed in seeds]


def tuned(method: str, budget: Budget) -> tuple[Settings, int]:
    """The settings with the largest held-out bound, and how many fits it took to find them."""
    grid = METHODS[method].few
    if len(grid) == 1:
        return grid[0], 0
    bounds = [fit(method, settings, TUNING_SEED, budget)["elbo"] for settings in grid]
    return grid[bounds.index(max(bounds))], len(grid)


@one_thread()
def fit(method: str, settings: Settings, seed: int, budget: Budget, divergence: str = "exact") -> Row:
    """Encoder and decoder, trained together; the bound on held-out images, always exact in its divergence."""
    data = digits(seed)
    torch.manual_seed(seed)
    encoder, decoder = network(PIXELS, WIDTH, N), network(N, WIDTH, PIXELS)
    circuit = cr.compile(cr.Exactly(K), N)
    estimator = build(method, circuit, settings)

    def loss(indices: Tensor) -> Tensor:
        images = data.train[indices]
        logits = encoder(images)
        reconstruction = estimator(logits, lambda mask: misfit(decoder(mask), images), budget.evaluations)
        return reconstruction + DIVERGENCES[divergence](circuit(logits)).mean()

    seconds = minimise([*encoder.parameters(), *decoder.parameters()], len(data.train), loss, budget)
    with torch.no_grad():
        posterior = circuit(encoder(data.held_out))
        reconstruction = misfit(decoder(posterior.sample((SAMPLES,))), data.held_out).mean()
        apart = exact_divergence(posterior).mean()
    return {
        "table": "vae",
        "method": method,
        "divergence": divergence,
        "seed": seed,
        "settings": settings,
        "elbo": -float(reconstruction + apart),
        "reconstruction": float(reconstruction),
        "kl": float(apart),
        "cpu_seconds": seconds,
    }


def misfit(logits: Tensor, images: Tensor) -> Tensor:
    """[S, T] nats, -log p(image | z) with a coin per pixel."""
    return F.binary_cross_entropy_with_logits(logits, images.expand_as(logits), reduction="none").sum(-1)
