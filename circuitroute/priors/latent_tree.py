"""A latent tree as a PyJuice circuit, with its weights.

Every vtree node becomes a vector of nodes: inputs of PyJuice's Bernoulli distribution for a variable, a vector of sums
over a vector of products for an inner node, one sum for the root. Data are 0 and 1, and PyJuice's own training goes on
from these weights::

    program = pyjuice.compile(prior.to_pyjuice()).to("cuda")
    log_prob = program(masks.cuda())[:, 0]

Legend: S latent states, K terms of a mixture.
"""

from __future__ import annotations

from typing import Any

import torch

from circuitroute.circuit.vtree import Vtree
from circuitroute.interop.pyjuice_circuit import imported
from circuitroute.priors.sweep import Weights


def to_pyjuice(weights: Weights, vtree: Vtree) -> Any:
    """The root of the tree as ``pyjuice`` nodes, for ``pyjuice.compile``.

    Raises:
        ImportError: PyJuice is not installed.
    """
    pyjuice = imported("prior.to_pyjuice")
    root, mixtures, coins = (each.detach().cpu().exp().float() for each in weights)
    S = coins.shape[1]
    vectors = []
    for v in range(vtree.n):
        coin = pyjuice.distributions.Bernoulli()
        vectors.append(pyjuice.inputs(v, num_nodes=S, dist=coin, params=coins[v, :, 1].contiguous()))
    if vtree.n == 1:
        return _sums(pyjuice, vectors[0], root[None])
    a = b = torch.arange(S, device="cpu")
    if weights.all_pairs:
        a, b = a.repeat_interleave(S), b.repeat(S)
    for v, (left, right) in enumerate(vtree.halves, start=vtree.n):
        products = pyjuice.multiply(vectors[left], vectors[right], edge_ids=torch.stack([a, b], 1))
        top = v == vtree.num_nodes - 1
        vectors.append(_sums(pyjuice, products, root[None] if top else mixtures[v - vtree.n]))
    return vectors[-1]


def _sums(pyjuice: Any, terms: Any, weights_SK: torch.Tensor) -> Any:
    """A vector of sums over all terms."""
    S, K = weights_SK.shape
    edges = torch.stack([torch.arange(S, device="cpu").repeat_interleave(K), torch.arange(K, device="cpu").repeat(S)])
    sums = pyjuice.summate(terms, num_nodes=S, edge_ids=edges)
    sums.set_params(weights_SK.reshape(-1), normalize=False)
    return sums
