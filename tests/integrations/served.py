"""What the tests of serving functions share: constraints, logits, and a call as servers make it."""

import math

import torch

import circuitroute as cr

T, H = 40, 5
GROUPS = cr.ActiveGroups(cr.Groups(4), at_most=2)
CONSTRAINTS = {
    "count": (cr.Exactly(3), 12, 3),
    "range": (cr.Between(2, 4), 12, 5),
    "groups": (GROUPS & cr.Exactly(3), 12, 3),
    "both": (GROUPS & cr.Between(0, 4), 12, 5),
}


def logits_of(n=12, seed=0, rows=T):
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(seed)) * 2


def of_every_scale(rows, n=12, seed=0):
    """From all equal to differences of 10,000, with ties."""
    logits = torch.randn(rows, n, generator=torch.Generator().manual_seed(seed))
    logits = logits * torch.tensor([0.0, 0.1, 3.0, 1e2, 1e4])[torch.arange(rows) % 5][:, None]
    logits[1::10] = logits[1::10].round()
    return logits


def keys_of(rows=T):
    """Requests of seven tokens each."""
    return {"seed": torch.arange(rows) // 7 + 100, "position": torch.arange(rows) % 7}


def call(function, logits, topk, renormalize=False, **keys):
    """As vLLM and SGLang do."""
    return function(
        hidden_states=logits.new_zeros(len(logits), H),
        gating_output=logits,
        topk=topk,
        renormalize=renormalize,
        **keys,
    )


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], equal_nan=True)
    assert torch.equal(found[1], expected[1])


def assert_same_bits(found, expected):
    assert torch.equal(found[0].nan_to_num(nan=math.pi), expected[0].nan_to_num(nan=math.pi))
    assert torch.equal(found[1], expected[1])


def scattered(weights, ids, n):
    """[T, n] the weights at their experts."""
    return torch.zeros(len(weights), n).scatter(-1, ids.long(), weights)


def traced(function):
    return torch.compile(function, backend="aot_eager", fullgraph=True)
