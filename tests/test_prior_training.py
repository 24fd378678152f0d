"""Priors in training: expectation maximisation and gradients, held to sums over all latent states."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import circuitroute as cr
from circuitroute.priors import expectation


def data(n, rows=200, seed=0):
    """Masks with a hidden cause: one of three sets of likely variables."""
    generator = torch.Generator().manual_seed(seed)
    likely = torch.rand(3, n, generator=generator)
    return torch.rand(rows, n, generator=generator) < likely[torch.randint(3, (rows,), generator=generator)]


def plain_step(prior, masks):
    """The next weights by adding up, mask by mask, over all latent states of the tree, in plain probabilities."""
    root, mixtures, coins = (each.detach().exp() for each in prior.log_weights())
    n, S, vtree = prior.n, prior.states, prior.vtree
    counts = [torch.zeros_like(each) for each in (root, mixtures, coins)]
    inner = range(n, vtree.num_nodes)
    for mask in masks.tolist():
        joint = {}
        # A term of every inner node's mixture: with "cp" it is the latent state of both halves.
        for terms in itertools.product(range(S), repeat=n - 1):
            latent = dict.fromkeys([vtree.num_nodes - 1])
            for v, k in zip(inner, terms, strict=True):
                latent |= dict.fromkeys(vtree.halves[v - n], k)
            probability = 1.0
            for v, k in zip(inner, terms, strict=True):
                probability *= float(root[k] if v == vtree.num_nodes - 1 else mixtures[v - n, latent[v], k])
            for v in range(n):
                probability *= float(coins[v, latent[v], int(mask[v])])
            joint[terms] = probability, latent
        total = sum(probability for probability, _ in joint.values())
        for terms, (probability, latent) in joint.items():
            share = probability / total
            for v, k in zip(inner, terms, strict=True):
                if v == vtree.num_nodes - 1:
                    counts[0][k] += share
                else:
                    counts[1][v - n, latent[v], k] += share
            for v in range(n):
                counts[2][v, latent[v], int(mask[v])] += share
    return [each / each.sum(-1, keepdim=True) for each in counts]


def test_a_step_is_that_of_the_textbook():
    prior = cr.SubsetPrior(4, 2, dtype=torch.float64)
    masks = data(4, 12)
    expected = plain_step(prior, masks)
    before = prior.log_prob(masks).mean()
    mean = prior.em_step(masks)
    torch.testing.assert_close(mean, before)
    for found, other in zip(prior.log_weights(), expected, strict=True):
        torch.testing.assert_close(found.exp(), other)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 7), st.integers(1, 4), st.sampled_from(["cp", "tucker"]), st.integers(0, 1000))
def test_no_step_lowers_the_likelihood(n, states, layers, seed):
    prior = cr.SubsetPrior(n, states, layers=layers, seed=seed, dtype=torch.float64)
    masks = data(n, 40, seed)
    means = [prior.em_step(masks).item() for _ in range(6)]
    assert all(later >= earlier - 1e-10 for earlier, later in itertools.pairwise(means))
    assert prior.log_prob(torch.tensor(list(itertools.product([0, 1], repeat=n)))).exp().sum().item() == pytest.approx(
        1
    )


def test_weights_count_masks():
    masks = torch.tensor([[1, 0, 0], [0, 1, 1], [1, 1, 1]])
    one, other = cr.SubsetPrior(3, 2), cr.SubsetPrior(3, 2)
    one.em_step(masks, weights=torch.tensor([3, 1, 0]))
    other.em_step(masks[[0, 0, 0, 1]])
    for found, expected in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_small_step_goes_a_part_of_the_way():
    prior, whole = cr.SubsetPrior(3, 2, dtype=torch.float64), cr.SubsetPrior(3, 2, dtype=torch.float64)
    before, masks = [w.exp().detach() for w in prior.log_weights()], data(3)
    whole.em_step(masks)
    prior.em_step(masks, step_size=0.25)
    for found, start, end in zip(prior.log_weights(), before, whole.log_weights(), strict=True):
        torch.testing.assert_close(found.exp(), 0.75 * start + 0.25 * end.exp())


def test_smoothing_adds_equal_counts():
    prior = cr.SubsetPrior(1, 1, dtype=torch.float64)
    prior.em_step(torch.tensor([[1], [1], [1]]), smoothing=2.0)
    assert prior.log_prob(torch.tensor([1])).exp().item() == pytest.approx((3 + 1) / (3 + 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_smoothing_weights_stay_finite(dtype):
    """What never happened has a probability of nearly 0, and trains on."""
    prior = cr.SubsetPrior(4, 2, dtype=dtype)
    masks = torch.tensor([[True, False, True, False]] * 3)
    for _ in range(4):
        prior.em_step(masks)
    assert all(bool(parameter.isfinite().all()) for parameter in prior.parameters())
    assert prior.log_prob(masks[0]).item() == pytest.approx(0.0, abs=1e-5)
    (-prior.log_prob(~masks).mean()).backward()
    assert all(bool(parameter.grad.isfinite().all()) for parameter in prior.parameters())


def test_states_that_are_never_used_stay():
    prior = cr.SubsetPrior(3, 2, dtype=torch.float64)
    with torch.no_grad():
        prior.root_logits.copy_(torch.tensor([0.0, -1e5]))
        before = prior.coin_logits[2, 1].item()  # variable 2 is a half of the root
    prior.em_step(data(3))
    assert prior.coin_logits[2, 1].item() == pytest.approx(before)


def test_many_masks_go_in_pieces(monkeypatch):
    masks = data(5, 60)
    whole, pieces = cr.SubsetPrior(5, 2, dtype=torch.float64), cr.SubsetPrior(5, 2, dtype=torch.float64)
    whole.em_step(masks)
    monkeypatch.setattr(expectation, "MAX_VALUES", 200)
    pieces.em_step(masks)
    for found, expected in zip(pieces.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(found, expected)


def test_more_states_learn_more():
    """A hidden cause that independent coins cannot express; EM and gradients find it, the constraint adds to both."""
    masks = data(6, 400)
    masks = masks[masks.sum(-1) >= 2]
    fitted = {}
    for states in (1, 4):
        prior = cr.SubsetPrior(6, states, seed=1)
        for _ in range(30):
            prior.em_step(masks, smoothing=0.1)
        constrained = prior.constrained(cr.AtLeast(2)).log_prob(masks).mean().item()
        fitted[states] = prior.log_prob(masks).mean().item(), constrained
        assert constrained > fitted[states][0]
    assert fitted[4][0] > fitted[1][0] + 0.05
    prior = cr.SubsetPrior(6, 4, seed=1)
    optimizer = torch.optim.Adam(prior.parameters(), lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        (-prior.constrained(cr.AtLeast(2)).log_prob(masks).mean()).backward()
        optimizer.step()
    assert prior.constrained(cr.AtLeast(2)).log_prob(masks).mean().item() > fitted[1][1] + 0.05


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"step_size": 0.0}, ValueError, r"step_size=0.0: must be in \(0, 1\]"),
        ({"step_size": 1.5}, ValueError, "step_size=1.5"),
        ({"step_size": True}, TypeError, "step_size=True: expected a number"),
        ({"smoothing": -1.0}, ValueError, "smoothing=-1.0: must be at least 0, and finite"),
        ({"smoothing": float("nan")}, ValueError, "smoothing=nan"),
        ({"masks": torch.ones(0, 3)}, ValueError, r"masks has shape \(0, 3\): give at least one mask"),
        ({"masks": torch.ones(2, 2)}, ValueError, r"masks has shape \(2, 2\): its last dimension must be n=3"),
        ({"masks": torch.full((2, 3), 0.5)}, ValueError, "masks holds 0.5"),
        ({"weights": torch.zeros(2)}, ValueError, "give at least one mask of positive weight"),
        ({"weights": torch.ones(3)}, ValueError, r"weights has shape \(3,\): it must be that of the masks, \(2,\)"),
        ({"weights": torch.tensor([1.0, -1.0])}, ValueError, "weights holds a value that is negative"),
        ({"weights": torch.ones(2, dtype=torch.complex64)}, TypeError, "weights has dtype torch.complex64"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    prior = cr.SubsetPrior(3, 2)
    before = prior.coin_logits.clone()
    with pytest.raises(error, match=message):
        prior.em_step(**{"masks": torch.ones(2, 3), **arguments})
    assert torch.equal(prior.coin_logits, before)
