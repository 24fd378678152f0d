"""Decisions to record, and records of them."""

import json

import numpy as np
import torch

import circuitroute as cr
from circuitroute.routing.records import archive as files
from circuitroute.routing.replay import RoutingRecord

T = 30


def logits_of(n, seed=0, rows=T):
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(seed)) * 2


def routings_of(constraint, n, layers=3, rows=T, shift=0.0):
    circuit = cr.compile(constraint, n).with_engine("torch")
    return [
        cr.route(logits_of(n, i, rows) + shift, circuit, key=cr.random_key(i, torch.arange(rows)))
        for i in range(layers)
    ]


def record_of(constraint=cr.Between(1, 4), n=12, **options):  # noqa: B008 - constraints are immutable
    return RoutingRecord.of(routings_of(constraint, n, **options))


def arrays_of(record, **changes):
    header = {"kind": files.KIND, "version": 1, "experts": [12], "forms": ["indices"], **changes}
    return {
        "layer_0": record.layers[0].data.numpy(),
        "header": np.frombuffer(json.dumps(header).encode(), dtype=np.uint8),
    }


def policy(logits, circuit):
    """Every allowed subset [M, N], and its exact log-probability [T, M] in float64."""
    subsets = circuit(logits[:1]).enumerate_support()[:, 0].double()
    return subsets, (logits.double() @ subsets.t()).log_softmax(-1)
