"""Importance ratios at the router, truncated; against enumeration and by hand."""

import math

import pytest
import torch

import circuitroute as cr
from circuitroute.routing.replay import (
    RoutingRecord,
    importance_ratio,
    log_probs,
    path_log_prob,
    router_shift,
    truncated_ratio,
)
from tests.record_cases import T, logits_of, routings_of

# ---------------------------------------------------------------------------------------------- truncated ratios


def replayed_pair(layers=3):
    """Exact log-probabilities of the same decisions under two policies, [T, L] float64, the first with gradients."""
    circuit = cr.compile(cr.Between(1, 3), 8).with_engine("torch")
    record = RoutingRecord.of(
        [cr.route(logits_of(8, i), circuit, key=cr.random_key(i, torch.arange(T))) for i in range(layers)]
    )
    leaf = torch.stack([logits_of(8, i) + logits_of(8, 9 + i) / 4 for i in range(layers)]).requires_grad_()
    routings = [cr.route(x, circuit, replay=mask) for x, mask in zip(leaf, record.masks(), strict=True)]
    return log_probs(routings), record.log_probs


def test_log_probs_are_those_of_every_layer():
    new, old = replayed_pair()
    assert (new.shape, new.dtype, new.requires_grad) == ((T, 3), torch.float64, True)
    routings = routings_of(cr.Exactly(2), 8)
    assert log_probs(routings).equal(torch.stack([r.log_prob.double() for r in routings], 1))
    assert log_probs(routings).sum(1).equal(path_log_prob(routings))
    assert log_probs(routings).float().equal(RoutingRecord.of(routings).log_probs)
    assert importance_ratio(new, old).shape == (T, 3)


def test_truncated_ratios_are_what_they_say():
    new, old = replayed_pair()
    ratios = (new - old.double()).exp().detach()
    path = ratios.prod(1)
    assert float(path.min()) < 0.5 < 2 < float(path.max())

    def found(**options):
        weight = truncated_ratio(new, old, **options)
        assert (weight.dtype, weight.requires_grad, weight.shape) == (torch.float32, False, (T,))
        return weight.double()

    def same(a, b):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)

    same(found(), path.clamp(max=2))
    same(found(low=0.5, high=1.5), path.clamp(0.5, 1.5))
    same(found(high=math.inf), path)
    same(found(per="layer", low=0.8, high=1.2), ratios.clamp(0.8, 1.2).prod(1))
    inside = (path >= 0.5) & (path <= 2)
    same(found(low=0.5, outside="zero"), path * inside)
    same(found(low=0.5, outside="zero", per="layer"), (ratios * ((ratios >= 0.5) & (ratios <= 2))).prod(1))
    shift = (-(new - old.double()).abs().mean(1)).exp().detach()
    same(router_shift(new, old).double(), shift)
    same(router_shift(new, old, floor=0.9).double(), shift.clamp(min=0.9))
    assert not router_shift(new, old).requires_grad
    assert router_shift(old, old).equal(torch.ones(T))


def test_a_truncated_ratio_is_biased_by_what_it_cuts_and_no_more():
    """E_old[min(r, C)] = sum min(p_new, C p_old), against enumeration."""
    circuit = cr.compile(cr.Between(1, 3), 6).with_engine("torch")
    old, new = logits_of(6, 0, 1), logits_of(6, 1, 1)
    subsets = circuit(old).enumerate_support()[:, 0].bool()
    before, after = (cr.route(x.expand(len(subsets), -1), circuit, replay=subsets).log_prob for x in (old, new))
    weight = truncated_ratio(after[:, None], before[:, None], high=1.5)
    expected = torch.minimum(after.exp(), 1.5 * before.exp()).sum()
    torch.testing.assert_close((before.exp() * weight).sum(), expected.detach(), rtol=1e-5, atol=0)
    assert expected < 0.9


@pytest.mark.parametrize("outside", ["clamp", "zero"])
def test_extreme_ratios_stay_bounded(outside):
    new = torch.tensor([[-1000.0, 0.0], [1000.0, 0.0], [-math.inf, 0.0], [1000.0, -1000.0], [math.nan, 0.0]])
    old = torch.zeros(5, 2)
    path = truncated_ratio(new, old, outside=outside, high=2)
    top = 2.0 if outside == "clamp" else 0.0
    assert path[:4].tolist() == [0.0, top, 0.0, 1.0]
    assert path[4].isnan()
    assert truncated_ratio(new, old, outside=outside, per="layer", low=0.5, high=2)[:4].tolist() == (
        [0.5, 2.0, 0.5, 1.0] if outside == "clamp" else [0.0, 0.0, 0.0, 0.0]
    )
    assert router_shift(new, old, floor=0.25)[:4].tolist() == [0.25] * 4
    assert truncated_ratio(new[:0], old[:0], outside=outside).shape == (0,)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"per": "token"}, ValueError, "per='token': choose one of 'path', 'layer'"),
        ({"outside": "drop"}, ValueError, "outside='drop': choose one of 'clamp', 'zero'"),
        ({"low": 2.0}, ValueError, r"low=2\.0 and high=2\.0: expected 0 <= low < high"),
        ({"low": -1}, ValueError, r"low=-1\.0"),
        ({"high": math.nan}, ValueError, "high=nan"),
        ({"high": "2"}, TypeError, "high='2': expected a number"),
    ],
)
def test_bounds_of_ratios_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        truncated_ratio(torch.zeros(2, 3), torch.zeros(2, 3), **options)


@pytest.mark.parametrize("ratio", [truncated_ratio, router_shift])
def test_log_probs_of_ratios_are_checked(ratio):
    for new, old, error, message in [
        (torch.zeros(2), torch.zeros(2), ValueError, r"new_log_probs has shape \(2,\): expected \[tokens, layers\]"),
        (torch.zeros(2, 0), torch.zeros(2, 0), ValueError, r"new_log_probs has shape \(2, 0\)"),
        (torch.zeros(2, 3), torch.zeros(2, 4), ValueError, r"\(2, 3\) and old_log_probs \(2, 4\)"),
        (torch.zeros(2, 3), torch.full((2, 3), -math.inf), ValueError, "old_log_probs is not finite"),
        (torch.zeros(2, 3), None, TypeError, "old_log_probs=None: expected a tensor"),
        (torch.zeros(2, 3).long(), torch.zeros(2, 3), TypeError, "new_log_probs has dtype torch.int64"),
    ]:
        with pytest.raises(error, match=message):
            ratio(new, old)
    with pytest.raises(ValueError, match=r"floor=2\.0: must lie in 0\.\.1"):
        router_shift(torch.zeros(2, 3), torch.zeros(2, 3), floor=2)
