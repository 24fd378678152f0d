"""Survey sampling with unequal probabilities: the Horvitz-Thompson estimator and its exact variance.

A made population of N units has a size x, which is known, and a value y, nearly in proportion to it, whose total is
asked for. Samples of exactly n units, with inclusion probabilities pi in proportion to x and otherwise as random as can
be (maximum entropy: the conditional Poisson design), estimate the total by the sum of y / pi over the sample (Horvitz &
Thompson 1952). Its variance is known exactly, from the joint inclusion probabilities (Sen 1953; Yates & Grundy 1953):

    V = 1/2 sum_{i != j} (pi_i pi_j - pi_ij) (y_i / pi_i - y_j / pi_j)^2.

Printed beside what simulation finds, and beside Poisson sampling (independent draws, so a sample of any size) and
simple random sampling (equal probabilities, n units).

    python examples/horvitz_thompson.py --sample 40
    python examples/horvitz_thompson.py --sample 10,20,40,80 --out examples/rows/horvitz_thompson.jsonl
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import circuitroute as cr


@dataclass(frozen=True)
class Design:
    """How a sample is drawn.

    Attributes:
        name: for the table.
        distribution: over subsets of the population.
    """

    name: str
    distribution: cr.SubsetDistribution

    def variance(self, y: Tensor) -> float:
        """Of the Horvitz-Thompson estimator of the total of y, exactly; for samples of fixed size, the formula of Sen,
        Yates and Grundy says the same."""
        pi = self.distribution.marginals
        covariance = self.distribution.joint_marginals - pi[:, None] * pi
        return float((y / pi) @ covariance @ (y / pi))

    def estimates(self, y: Tensor, samples: int, seed: int) -> Tensor:
        """[samples] of the total, a sample each."""
        mask = self.distribution.sample((samples,), key=cr.random_key(seed))
        return mask @ (y / self.distribution.marginals)


def population(N: int, seed: int) -> tuple[Tensor, Tensor]:
    """([N], [N]) float64: sizes, from 1 to about 20, and values."""
    generator = torch.Generator().manual_seed(seed)
    size = 1 + torch.randn(N, dtype=torch.float64, generator=generator).exp()
    noise = torch.randn(N, dtype=torch.float64, generator=generator)
    return size, 10 * size + 3 * size.sqrt() * noise


def designs(size: Tensor, n: int) -> list[Design]:
    """The three that are compared."""
    N, pi = len(size), inclusion_probabilities(size, n)
    fixed, any_size = cr.compile(cr.Exactly(n), N), cr.compile(cr.AtLeast(0), N)
    return [
        Design("maximum entropy", fixed(cr.logits_for_marginals(pi, fixed))),
        Design("Poisson", any_size(cr.logits_for_marginals(pi, any_size))),
        Design("simple random", fixed(torch.zeros(N, dtype=torch.float64))),
    ]


def inclusion_probabilities(size: Tensor, n: int) -> Tensor:
    """[N] in proportion to size, adding up to n; units that would have more than 1 are taken for certain."""
    pi = n * size / size.sum()
    while bool((pi > 1).any()):
        certain = pi >= 1
        rest = torch.where(certain, 0.0, size)
        pi = torch.where(certain, 1.0, (n - int(certain.sum())) * rest / rest.sum())
    return pi


def sen_yates_grundy(pi: Tensor, joint: Tensor, y: Tensor) -> float:
    """The variance of the Horvitz-Thompson estimator for samples of fixed size."""
    expanded = y / pi
    return float(0.5 * ((pi[:, None] * pi - joint) * (expanded[:, None] - expanded) ** 2).sum())


def compared(units: int, n: int, samples: int, seed: int) -> list[dict[str, Any]]:
    """A row for every design: the standard error of the estimator, exact and simulated, and more."""
    size, y = population(units, seed)
    found = []
    for design in designs(size, n):
        exact = design.variance(y) ** 0.5
        estimates = design.estimates(y, samples, seed)
        counts = design.distribution.count_probs
        likely = (counts > 1e-3).nonzero().flatten()
        found.append(
            {
                "design": design.name,
                "units": units,
                "sample": n,
                "samples": samples,
                "total": float(y.sum()),
                "standard_error": exact,
                "simulated": float(estimates.std()),
                # For estimates that are nearly normal.
                "simulated_spread": exact / (2 * samples) ** 0.5,
                "bias_in_errors": float((estimates.mean() - y.sum()) / (exact / samples**0.5)),
                "sizes": [int(likely[0]), int(likely[-1])],
            }
        )
    pi, joint = (getattr(designs(size, n)[0].distribution, name) for name in ("marginals", "joint_marginals"))
    return [found[0] | {"sen_yates_grundy": sen_yates_grundy(pi, joint, y) ** 0.5}, *found[1:]]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=200, help="N, of the population")
    parser.add_argument("--sample", default="40", help="n, units of a sample; several with commas")
    parser.add_argument("--samples", type=int, default=20_000, help="of the simulation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a file of rows to write")
    options = parser.parse_args()
    print("    n  design            s.e. exact          simulated  mean, in s.e.   sample sizes")
    rows = []
    for n in map(int, options.sample.split(",")):
        for row in compared(options.units, n, options.samples, options.seed):
            rows.append(row)
            print(
                "{sample:5}  {design:16} {standard_error:11.3f} {simulated:10.3f} +-{simulated_spread:6.3f} "
                "{bias_in_errors:14.2f}   {sizes[0]} to {sizes[1]}".format(**row)
            )
            if "sen_yates_grundy" in row:
                print(f"       by Sen, Yates and Grundy {row['sen_yates_grundy']:10.3f}")
    if options.out is not None:
        options.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
