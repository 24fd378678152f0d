"""Joint inclusion probabilities: against enumeration, and the closed form against sweeps."""

import math

import pytest
import torch

import circuitroute as cr
from circuitroute.inference import pairs

D = torch.float64


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "constraint",
    [cr.Exactly(2), cr.Between(1, 3), cr.CountIn({0, 4}), cr.EachGroup(cr.Groups(2), cr.Exactly(1)), cr.Exactly(1)],
    ids=repr,
)
def test_enumeration(constraint):
    circuit = cr.compile(constraint, 4)
    distribution = circuit(drawn(2, 3, 4))
    masks = circuit(torch.zeros(4, dtype=D)).enumerate_support()
    p = distribution.log_prob(masks[:, None, None].expand(-1, 2, 3, -1)).exp()
    expected = torch.einsum("mab,mi,mj->abij", p, masks, masks)
    assert torch.allclose(distribution.joint_marginals, expected, atol=1e-14)
    assert distribution.joint_marginals.diagonal(dim1=-2, dim2=-1).equal(distribution.marginals)


def test_evidence_and_gradients():
    logits = torch.tensor([math.inf, -math.inf, 0.3, -0.2, 0.1], dtype=D)
    joint = cr.compile(cr.Exactly(2), 5)(logits).joint_marginals
    assert torch.allclose(joint[0], joint.diagonal())
    assert joint[1].tolist() == [0] * 5
    x = drawn(4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: cr.compile(cr.Exactly(2), 4)(x).joint_marginals, (x,), fast_mode=True)


CASES = {
    "exactly": (cr.Exactly(20), 160),
    "most": (cr.Exactly(140), 160),
    "one": (cr.Exactly(1), 160),
    "a range": (cr.Between(10, 40), 160),
    "at least": (cr.AtLeast(90), 160),
    "any": (cr.AtLeast(0), 160),
}


@pytest.mark.parametrize("scale", [0.3, 3.0])
@pytest.mark.parametrize("name", CASES)
def test_the_closed_form_is_what_sweeps_find(name, scale, monkeypatch):
    """To 1e-12, near pairs included: some logits are equal, and some 1e-9 apart."""
    constraint, n = CASES[name]
    logits = drawn(2, n) * scale
    logits[:, 1] = logits[:, 0]
    logits[:, 2] = logits[:, 0] + 1e-9
    distribution = cr.compile(constraint, n)(logits)
    assert pairs.in_closed_form(distribution.circuit, logits, None)
    found = distribution.joint_marginals
    monkeypatch.setattr(pairs, "in_closed_form", lambda *_: False)
    expected = distribution.joint_marginals
    assert (found - expected).abs().max() < 1e-12
    assert found.equal(found.mT)
    single = cr.compile(constraint, n)(logits.float())
    monkeypatch.undo()
    assert single.joint_marginals.dtype == torch.float32
    assert (single.joint_marginals.double() - expected).abs().max() < 1e-5


def test_when_the_closed_form_is_used():
    circuit = cr.compile(cr.Exactly(20), 160)
    logits = drawn(160)
    assert pairs.in_closed_form(circuit, logits, None)
    assert not pairs.in_closed_form(circuit, torch.zeros(160, dtype=D), None)  # all pairs are near
    assert not pairs.in_closed_form(circuit, logits.masked_fill(logits > 2, math.inf), None)
    assert not pairs.in_closed_form(circuit, logits, torch.zeros(21, dtype=D))
    assert not pairs.in_closed_form(circuit, logits.clone().requires_grad_(), None)
    assert not pairs.in_closed_form(cr.compile(cr.CountIn({2, 90}), 160), logits, None)
    assert not pairs.in_closed_form(cr.compile(cr.Exactly(2), 16), logits[:16], None)
    assert circuit(torch.zeros(0, 160, dtype=D)).joint_marginals.shape == (0, 160, 160)
