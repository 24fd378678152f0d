"""A vtree for data: variables that say much about one another meet low in the tree.

Agglomerative clustering by mutual information: at first every variable is a cluster, and again and again the two are
joined whose variables have the largest mutual information on average (average linkage). It is what hidden Chow-Liu
trees (Liu & Van den Broeck, Tractable regularization of probabilistic circuits, 2021) do by a spanning tree.

Legend: T masks, N variables.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from circuitroute.deadline import tick

FloatArray = npt.NDArray[np.float64]


def mutual_information(masks_TN: npt.NDArray[np.bool_]) -> FloatArray:
    """[N, N] in nats, from pairs' frequencies with half a count added to each of their four outcomes."""
    present = masks_TN.astype(np.float64)
    both = present.T @ present
    ones = present.sum(0)
    counts = np.stack([len(present) - ones[:, None] - ones + both, ones - both, ones[:, None] - both, both])
    joint = (counts + 0.5) / (len(present) + 2.0)  # of (i, j) as 00, 01, 10, 11
    first, second = joint[2] + joint[3], joint[1] + joint[3]
    independent = np.stack([(1 - first) * (1 - second), (1 - first) * second, first * (1 - second), first * second])
    found: FloatArray = (joint * np.log(joint / independent)).sum(0)
    return found


def clustered(masks_TN: npt.NDArray[np.bool_]) -> Any:
    """The tree as pairs of pairs of variables; ties are joined in the order of variables."""
    n = masks_TN.shape[1]
    closeness = mutual_information(masks_TN)
    np.fill_diagonal(closeness, -np.inf)
    parts: list[Any] = list(range(n))
    sizes = np.ones(n)
    for _ in range(n - 1):
        tick(1 + n * n // 1000)
        a, b = sorted(int(i) for i in np.unravel_index(closeness.argmax(), closeness.shape))
        merged = (sizes[a] * closeness[a] + sizes[b] * closeness[b]) / (sizes[a] + sizes[b])
        closeness[a], closeness[:, a] = merged, merged
        closeness[b], closeness[:, b], closeness[a, a] = -np.inf, -np.inf, -np.inf
        parts[a] = (parts[a], parts[b])
        sizes[a] += sizes[b]
    return parts[0]
