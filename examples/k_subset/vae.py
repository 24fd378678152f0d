"""A variational autoencoder whose latent is a subset: k of n units are on, on scikit-learn's digits.

The prior is uniform over the k-subsets and the posterior a k-subset distribution with logits from the encoder, so the
divergence between them is exact, log C(n, k) less the entropy.

Legend: R seeds, T images, N latent units, P pixels, S subsets per image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import circuitroute as cr

from .estimators import METHODS, build
from .estimators.registry import Settings
from .fitting import Budget, Networks, minibatches, minimise, one_thread, rows_of

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


def exact_divergence(circuit: cr.Circuit, logits: Tensor) -> Tensor:
    """[T] KL from the uniform distribution over the allowed subsets."""
    return math.log(circuit.model_count()) - circuit(logits).entropy()


def categorical_divergence(circuit: cr.Circuit, logits: Tensor) -> Tensor:
    """[T] what the published code of SFESS trains all methods with: of softmax(logits), one of n, from the uniform."""
    share = logits.log_softmax(-1)
    return math.log(circuit.n) + (share.exp() * share).sum(-1)


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
        settings, tries = tuned(method, budget) if tune else (METHODS[method].few[0], 0)
        for kind in ("exact",) if METHODS[method].ours else ("exact", "categorical"):
            yield [{**row, "settings_tried": tries} for row in fit(method, settings, seeds, budget, kind)]


def tuned(method: str, budget: Budget) -> tuple[Settings, int]:
    """The settings with the largest held-out bound, and among how many they were found."""
    grid = METHODS[method].few
    if len(grid) == 1:
        return grid[0], 0
    bounds = [fit(method, settings, [TUNING_SEED], budget)[0]["elbo"] for settings in grid]
    return grid[bounds.index(max(bounds))], len(grid)


@one_thread()
def fit(method: str, settings: Settings, seeds: Sequence[int], budget: Budget, divergence: str = "exact") -> list[Row]:
    """Encoders and decoders, trained together; a row for each seed, with the bound on held-out images, whose divergence
    is exact however it was trained."""
    train, held_out = (torch.stack(part) for part in zip(*(digits(seed) for seed in seeds), strict=True))
    encoder, decoder = Networks(seeds, PIXELS, WIDTH, N), Networks(seeds, N, WIDTH, PIXELS)
    circuit = cr.compile(cr.Exactly(K), N)
    estimator = build(method, circuit, settings)

    def loss(indices: Tensor) -> Tensor:
        images = rows_of(train, indices)
        logits = encoder(images).flatten(0, 1)

        def cost(mask: Tensor) -> Tensor:
            return misfit(decoder(mask.unflatten(1, indices.shape)), images).flatten(1)

        reconstruction = estimator(logits, cost, budget.evaluations)
        return reconstruction + DIVERGENCES[divergence](circuit, logits).mean()

    seconds = minimise([encoder, decoder], loss, minibatches(seeds, train.shape[1], budget), budget)
    with torch.no_grad():
        logits = encoder(held_out)
        reconstruction = misfit(decoder(circuit(logits).sample((SAMPLES,))), held_out).mean((0, 2))
        apart = exact_divergence(circuit, logits).mean(-1)
    head = {"table": "vae", "method": method, "divergence": divergence, "settings": settings}
    return [
        {
            **head,
            "seed": seed,
            "elbo": -lost - kl,
            "reconstruction": lost,
            "kl": kl,
            "cpu_seconds": seconds / len(seeds),
        }
        for seed, lost, kl in zip(seeds, reconstruction.tolist(), apart.tolist(), strict=True)
    ]


def misfit(logits: Tensor, images: Tensor) -> Tensor:
    """[..., T] nats, -log p(image | z) with a coin per pixel."""
    return F.binary_cross_entropy_with_logits(logits, images.expand_as(logits), reduction="none").sum(-1)
