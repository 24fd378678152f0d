"""Logic layers: a constraint as the last layer of a network, and mixtures of several gates over one circuit."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, MixtureSameFamily

import circuitroute as cr
from tests.truth import enumerate_worlds, world_truth

INF, NAN = math.inf, math.nan
N, T, C, H = 6, 20, 3, 5
WORLDS = torch.from_numpy(enumerate_worlds(N))
CONSTRAINTS: dict[str, cr.Constraint] = {
    "exactly": cr.Exactly(3),
    "between": cr.Between(1, 4),
    "composed": cr.Exactly(1).over([0, 2, 3]) & cr.AtMost(3),
}
every_constraint = pytest.mark.parametrize("constraint", CONSTRAINTS.values(), ids=CONSTRAINTS)


def drawn(*shape: int, seed: int = 0, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def allowed_worlds(circuit: cr.Circuit) -> Tensor:
    return WORLDS[circuit.satisfies(WORLDS)]


def mixed_truth(circuit: cr.Circuit, logits: Tensor, weights: Tensor) -> Any:
    """[T, W] log-probability of every world under the mixture."""
    each = world_truth(logits.reshape(-1, N), circuit.satisfies(WORLDS).numpy()).log_probs
    each = each.reshape(*logits.shape[:-1], -1).astype(np.longdouble)
    shares = np.asarray(weights.log_softmax(-1))[..., None]
    with np.errstate(divide="ignore"):
        return np.log((np.exp(each + shares)).sum(-2))


# ---------------------------------------------------------------------------------------------- one distribution


@every_constraint
def test_logits_in_the_distribution_out(constraint: cr.Constraint) -> None:
    circuit = cr.compile(constraint, N)
    logits = drawn(2, T, N)
    for layer in (cr.nn.ConstraintLayer(circuit), cr.nn.ConstraintLayer(constraint, N)):
        assert isinstance(layer(logits), cr.SubsetDistribution)
        assert layer.circuit is circuit
        torch.testing.assert_close(layer(logits).marginals, circuit(logits).marginals, rtol=0, atol=0)
        assert list(layer.parameters()) == []
        assert layer(logits[0, 0]).batch_shape == ()
        assert layer(logits[:, :0]).mode.shape == (2, 0, N)
        assert bool(circuit.satisfies(layer(logits).mode).all())


def test_features_in_by_a_linear_map_of_its_own() -> None:
    torch.manual_seed(0)
    layer = cr.nn.ConstraintLayer(cr.Exactly(3), N, in_features=H)
    assert {name: tuple(x.shape) for name, x in layer.state_dict().items()} == {
        "linear.weight": (N, H),
        "linear.bias": (N,),
    }
    features = drawn(T, H, dtype=torch.float32)
    expected = layer.circuit(nn.functional.linear(features, layer.linear.weight, layer.linear.bias))
    torch.testing.assert_close(layer(features).log_partition, expected.log_partition)
    loss = -layer.log_likelihood(layer(features), layer(features).mode).mean()
    loss.backward()
    assert all(x.grad is not None and bool(x.grad.abs().sum() > 0) for x in layer.parameters())
    assert cr.nn.ConstraintLayer(cr.Exactly(3), N, in_features=H, bias=False).linear.bias is None


def test_a_layer_learns_a_rule_that_the_constraint_leaves_open() -> None:
    """One of the features' signs decides which of two labels holds: 20 steps, and held-out rows are right."""
    torch.manual_seed(0)
    layer = cr.nn.ConstraintLayer(cr.Exactly(1).over([0, 1]) & cr.AtMost(1), 4, in_features=2)
    features = drawn(400, 2, dtype=torch.float32)
    labels = torch.stack([features[:, 0] > 0, features[:, 0] <= 0, *[torch.zeros(400, dtype=torch.bool)] * 2], -1)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.3)
    for _ in range(20):
        optimizer.zero_grad()
        (-layer.log_likelihood(layer(features[:200]), labels[:200]).mean()).backward()
        optimizer.step()
    right = (layer(features[200:]).mode == labels[200:]).all(-1)
    assert right.float().mean() > 0.95


@pytest.mark.parametrize("components", [None, C])
def test_copies_states_and_files_give_the_same(components: int | None) -> None:
    torch.manual_seed(0)
    layer = cr.nn.ConstraintLayer(CONSTRAINTS["composed"], N, in_features=H, components=components)
    other = cr.nn.ConstraintLayer(CONSTRAINTS["composed"], N, in_features=H, components=components)
    features = drawn(T, H, dtype=torch.float32)
    expected = layer(features).marginals
    assert not torch.equal(other(features).marginals, expected)
    other.load_state_dict(layer.state_dict())
    kept = io.BytesIO()
    torch.save(layer, kept)
    kept.seek(0)
    again = (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(kept, weights_only=False))
    for same in again:
        assert torch.equal(same(features).marginals, expected)
    assert copy.deepcopy(layer).circuit is layer.circuit
    skipped = nn.utils.skip_init(
        cr.nn.ConstraintLayer, CONSTRAINTS["composed"], N, in_features=H, components=components
    )
    skipped.load_state_dict(layer.state_dict())
    assert torch.equal(skipped(features).marginals, expected)


@pytest.mark.parametrize("components", [None, C])
def test_dtypes_and_devices(components: int | None) -> None:
    options: dict[str, Any] = {"in_features": H, "components": components}
    features = drawn(T, H)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        layer = cr.nn.ConstraintLayer(cr.Exactly(3), N, **options, dtype=dtype)
        assert {x.dtype for x in layer.parameters()} == {dtype}
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        distribution = layer(features)
        assert distribution.marginals.dtype == distribution.log_prob(distribution.mode).dtype == wide
        distribution.log_prob(distribution.mode).sum().backward()
        assert all(x.grad.dtype == dtype for x in layer.parameters())
    layer = cr.nn.ConstraintLayer(cr.Exactly(3), N, **options)
    plain = layer(features.float())
    with torch.autocast("cpu", torch.bfloat16):
        inside = layer(features.float())
    assert torch.equal(inside.marginals, plain.marginals)
    assert {x.device.type for x in cr.nn.ConstraintLayer(cr.Exactly(3), N, **options, device="meta").parameters()} == {
        "meta"
    }


def test_what_it_shows() -> None:
    assert repr(cr.nn.ConstraintLayer(cr.Exactly(3), 6)) == "ConstraintLayer(Exactly(3), n=6)"
    shown = repr(cr.nn.ConstraintLayer(cr.Exactly(3), 6, in_features=5, components=2, validate_args=False))
    assert "Exactly(3), n=6, in_features=5, components=2, validate_args=False" in shown


def test_validation_is_the_distributions() -> None:
    logits = drawn(3, N)
    logits[1, 2] = NAN
    for components, given in ((None, logits), (1, logits[:, None])):
        checked = cr.nn.ConstraintLayer(cr.Exactly(3), N, components=components)
        with pytest.raises(ValueError, match="NaN in row"):
            checked(given)
        unchecked = cr.nn.ConstraintLayer(cr.Exactly(3), N, components=components, validate_args=False)
        distribution = unchecked(given)
        for found in (distribution.marginals, distribution.mode, distribution.sample(key=3)):
            assert found.isnan().any(-1).tolist() == [False, True, False]


def test_arguments_that_make_no_layer() -> None:
    circuit = cr.compile(cr.Exactly(3), N)
    layer, ours = cr.nn.ConstraintLayer, cr.nn.ConstraintLayer(circuit)
    with pytest.raises(TypeError, match=r"n=None: Exactly\(3\) does not say how many variables"):
        layer(cr.Exactly(3))
    assert layer(cr.CNF([[1, -2], [3]], n=4)).circuit.n == 4
    with pytest.raises(ValueError, match="over 6 variables"):
        layer(circuit, 7)
    with pytest.raises(cr.InfeasibleError):
        layer(cr.Exactly(3), 2)
    for name in ("in_features", "components"):
        with pytest.raises(ValueError, match=f"{name}=0: must be at least 1"):
            layer(circuit, **{name: 0})
        with pytest.raises(TypeError, match=f"{name}=True"):
            layer(circuit, **{name: True})
    with pytest.raises(TypeError, match="bias=1"):
        layer(circuit, bias=1)
    with pytest.raises(ValueError, match=r"logits have shape \(2, 5\)"):
        ours(drawn(2, 5))
    with pytest.raises(ValueError, match="the layer is no mixture"):
        ours(drawn(2, N), drawn(2, 3))
    with pytest.raises(TypeError, match="expected a tensor"):
        ours([0.0] * N)
    of_features = layer(circuit, in_features=H, components=2)
    with pytest.raises(ValueError, match=r"inputs have shape \(2, 6\): the last dimension must be in_features=5"):
        of_features(drawn(2, N))
    with pytest.raises(ValueError, match="the layer has in_features"):
        of_features(drawn(2, H), drawn(2, 2))
    with pytest.raises(TypeError, match=r"inputs.*expected a tensor"):
        of_features([0.0] * H)
    mixture = layer(circuit, components=2)
    with pytest.raises(ValueError, match=r"inputs have shape \(2, 6\): the last dimensions must be components=3"):
        layer(circuit, components=3)(drawn(2, N))
    with pytest.raises(ValueError, match="the last dimensions must be components=2 and n=6"):
        mixture(drawn(N))
    with pytest.raises(ValueError, match=r"mixture_logits have shape \(4,\)"):
        mixture(drawn(4, 2, N), drawn(4))
    with pytest.raises(ValueError, match="mixture_logits hold NaN"):
        mixture(drawn(4, 2, N), torch.full((4, 2), NAN))
    with pytest.raises(TypeError, match="mixture_logits has dtype"):
        mixture(drawn(4, 2, N), torch.ones(4, 2, dtype=torch.long))


# ---------------------------------------------------------------------------------------------- mixtures


@every_constraint
@pytest.mark.parametrize("validate", [True, False])
def test_a_mixture_by_hand_and_by_the_layer(constraint: cr.Constraint, validate: bool) -> None:
    circuit = cr.compile(constraint, N)
    logits, weights = drawn(T, C, N, scale=2.0).requires_grad_(), drawn(T, C, seed=1).requires_grad_()
    expected = mixed_truth(circuit, logits.detach(), weights.detach())
    by_hand = MixtureSameFamily(
        Categorical(logits=weights, validate_args=validate), circuit(logits, validate_args=validate), validate
    )
    by_layer = cr.nn.ConstraintLayer(circuit, components=C, validate_args=validate)(logits, weights)
    worlds = allowed_worlds(circuit)
    marginals = np.exp(expected) @ WORLDS.numpy()
    gradients = []
    for mixture in (by_hand, by_layer):
        assert isinstance(mixture, MixtureSameFamily)
        for value in (worlds.double(), worlds):
            log_prob = mixture.log_prob(value[:, None].expand(-1, T, -1))
            np.testing.assert_allclose(log_prob.detach().T, expected[:, circuit.satisfies(WORLDS)], rtol=1e-11)
        gradients.append(torch.autograd.grad((log_prob * drawn(*log_prob.shape)).sum(), (logits, weights)))
        np.testing.assert_allclose(mixture.mean.detach(), marginals, rtol=1e-11)
        np.testing.assert_allclose(mixture.variance.detach(), marginals * (1 - marginals), rtol=1e-11)
        torch.manual_seed(0)
        samples = mixture.sample((4000,))
        assert samples.shape == (4000, T, N)
        assert bool(circuit.satisfies(samples).all())
        # 20 rows of 6 means of 4000: 5 standard deviations are beyond chance in 1e-4 of such tests.
        assert bool(((samples.mean(0) - mixture.mean).abs() < 5 * 0.5 / math.sqrt(4000)).all())
        wider = mixture.expand((2, T))
        assert wider.log_prob(worlds[0]).shape == (2, T)
        assert wider.sample((3,)).shape == (3, 2, T, N)
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    if validate:
        found = lambda x, w: cr.nn.ConstraintLayer(circuit, components=C)(x, w).log_prob(worlds[0])  # noqa: E731
        assert torch.autograd.gradcheck(
            found, (logits[:2].detach().requires_grad_(), weights[:2].detach().requires_grad_())
        )


@every_constraint
def test_conditioning_a_mixture_weighs_its_components_anew(constraint: cr.Constraint) -> None:
    circuit = cr.compile(constraint, N)
    logits, weights = drawn(T, C, N, scale=2.0), drawn(T, C, seed=1)
    mixture = cr.nn.ConstraintLayer(circuit, components=C)(logits, weights)
    worlds = allowed_worlds(circuit)
    generator = torch.Generator().manual_seed(2)
    world = worlds[torch.randint(len(worlds), (T,), generator=generator)]
    known = torch.rand(T, N, generator=generator) < 0.3
    include, exclude = world & known, ~world & known
    agree = ((world[:, None] == WORLDS) | ~known[:, None]).all(-1).numpy()
    joint = np.where(agree, mixed_truth(circuit, logits, weights), -np.inf)
    with np.errstate(divide="ignore"):
        evidence = np.log(np.exp(joint).sum(-1))
    np.testing.assert_allclose(mixture.log_evidence(include, exclude), evidence, rtol=1e-11, atol=1e-13)
    given = mixture.condition(include, exclude)
    assert isinstance(given, cr.nn.SubsetMixture)
    np.testing.assert_allclose(given.marginals, np.exp(joint - evidence[:, None]) @ WORLDS.numpy(), atol=1e-12)
    torch.testing.assert_close(
        given.log_prob(world), mixture.log_prob(world) - mixture.log_evidence(include, exclude), rtol=1e-10, atol=1e-11
    )
    for found in (given.mode, given.sample(key=1)):
        assert bool(circuit.satisfies(found).all())
        assert bool((found == world)[known].all())


def test_a_component_that_rules_the_evidence_out_counts_no_more() -> None:
    circuit = cr.compile(cr.Exactly(3), N)
    logits = drawn(2, C, N)
    logits[0, 1, 0], logits[1, :, 0] = -INF, -INF
    mixture = cr.nn.ConstraintLayer(circuit, components=C)(logits)
    given = mixture.condition(include=torch.tensor([[1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]]).bool())
    assert given.mixture_distribution.probs[0, 1] == 0
    assert bool(given.marginals.isfinite().all())
    assert given.marginals[0, 0].item() == pytest.approx(1, abs=1e-15)
    with pytest.raises(
        ValueError, match=r"include or exclude contradicts the infinite logits of all components in row 1"
    ):
        mixture.condition(include=[0])
    with pytest.raises(ValueError, match="leave no subset"):
        mixture.condition(include=range(N))
    unchecked = cr.nn.ConstraintLayer(circuit, components=C, validate_args=False)(logits)
    assert unchecked.condition(include=[0]).marginals.isnan().any(-1).tolist() == [False, True]
    assert unchecked.log_evidence(include=[0]).isinf().tolist() == [False, True]


@every_constraint
def test_the_mode_of_a_mixture_is_allowed_and_the_best_of_its_components(constraint: cr.Constraint) -> None:
    circuit = cr.compile(constraint, N)
    logits, weights = drawn(T, C, N, scale=2.0), drawn(T, C, seed=1)
    mixture = cr.nn.ConstraintLayer(circuit, components=C)(logits, weights)
    candidates = circuit(logits).mode
    scores = torch.stack([mixture.log_prob(candidates[:, c]) for c in range(C)])
    torch.testing.assert_close(mixture.log_prob(mixture.mode), scores.amax(0), rtol=0, atol=0)
    assert bool((mixture.mode[:, None] == candidates).all(-1).any(-1).all())
    assert bool(circuit.satisfies(mixture.mode).all())
    one = cr.nn.ConstraintLayer(circuit, components=1)(logits[:, :1])
    assert torch.equal(one.mode, circuit(logits[:, 0]).mode)
    torch.testing.assert_close(one.log_prob(one.mode), circuit(logits[:, 0]).log_prob(one.mode))


def test_a_sample_of_a_mixture_is_a_function_of_its_row_and_key() -> None:
    circuit = cr.compile(cr.Exactly(3), N)
    logits, weights = drawn(T, C, N, scale=2.0), drawn(T, C, seed=1, scale=2.0)
    layer = cr.nn.ConstraintLayer(circuit, components=C)
    key = cr.random_key(5, torch.arange(T))
    samples = layer(logits, weights).sample((3,), key=key)
    part = layer(logits[7:9], weights[7:9])
    assert torch.equal(part.sample((3,), key=key[7:9]), samples[:, 7:9])
    assert torch.equal(layer(logits[7], weights[7]).sample((3,), key=key[7]), samples[:, 7])
    assert not torch.equal(samples[0], samples[1])
    certain = layer(logits, torch.tensor([-INF, 0.0, -INF]).double().expand(T, C))
    torch.manual_seed(0)
    drawn_once = certain.sample((500,)).mean(0)
    assert bool(((drawn_once - circuit(logits[:, 1]).marginals).abs() < 0.15).all())
    with pytest.raises(ValueError, match="it must broadcast to the batch"):
        layer(logits, weights).sample(key=torch.arange(3))


@pytest.mark.parametrize("batch", [(), (0,), (1,), (2, 3)])
def test_mixtures_of_any_batch(batch: tuple[int, ...]) -> None:
    circuit = cr.compile(cr.Exactly(3), N)
    world = allowed_worlds(circuit)[0]
    logits, weights = drawn(*batch, C, N).requires_grad_(), drawn(*batch, C).requires_grad_()
    mixture = cr.nn.ConstraintLayer(circuit, components=C)(logits, weights)
    assert mixture.batch_shape == batch
    assert mixture.event_shape == (N,)
    for found in (mixture.marginals, mixture.mean, mixture.variance, mixture.mode, mixture.sample()):
        assert found.shape == (*batch, N)
    assert mixture.sample((4, 2)).shape == (4, 2, *batch, N)
    assert mixture.log_prob(world).shape == mixture.log_evidence(include=[0]).shape == batch
    assert mixture.condition(include=[0]).mode.shape == (*batch, N)
    assert mixture.expand((2, *batch)).mode.shape == (2, *batch, N)
    mixture.log_prob(world).sum().backward()
    assert bool(logits.grad.isfinite().all())
    assert str(mixture) == f"SubsetMixture(Exactly(3), n=6, components=3, batch={batch})"
    assert bool(mixture.support.check(mixture.sample()).all())
    assert mixture.circuit is circuit


def test_masks_that_a_mixture_does_not_give() -> None:
    circuit = cr.compile(cr.Exactly(3), N)
    logits = drawn(2, C, N)
    logits[1, :, 0] = -INF
    logits.requires_grad_()
    weights = torch.zeros(2, C, dtype=torch.float64, requires_grad=True)
    mixture = cr.nn.ConstraintLayer(circuit, components=C)(logits, weights)
    excluded = torch.tensor([1.0, 1, 1, 0, 0, 0])
    log_prob = mixture.log_prob(excluded)
    assert log_prob.isinf().tolist() == [False, True]
    gradients = torch.autograd.grad(log_prob.sum(), (logits, weights))
    assert all(bool(x.isfinite().all()) for x in gradients)
    with pytest.raises(ValueError, match=r"does not satisfy Exactly\(3\) in row 1"):
        mixture.log_prob(torch.stack([excluded, torch.ones(N)]))
    with pytest.raises(ValueError, match=r"value holds 2\.0"):
        mixture.log_prob(excluded * 2)
    unchecked = cr.nn.ConstraintLayer(circuit, components=C, validate_args=False)(logits)
    assert bool((unchecked.log_prob(torch.ones(N)) == -INF).all())
    with pytest.raises(TypeError, match=r"component_distribution=Normal.*expected a cr.SubsetDistribution"):
        cr.nn.SubsetMixture(Categorical(torch.ones(2)), torch.distributions.Normal(torch.zeros(2), 1.0))
    with pytest.raises(ValueError, match="component_distribution has no batch"):
        cr.nn.SubsetMixture(Categorical(torch.ones(2)), circuit(torch.zeros(N)))
    with pytest.raises(ValueError, match="component"):
        cr.nn.SubsetMixture(Categorical(torch.ones(2)), circuit(torch.zeros(3, N)))


def test_a_mixture_with_count_potentials() -> None:
    circuit = cr.compile(cr.Between(1, 2), N)
    potential = drawn(T, C, 3, seed=4, scale=3.0)
    parts = circuit(drawn(T, C, N), potential)
    mixture = cr.nn.SubsetMixture(Categorical(logits=drawn(T, C, seed=1)), parts)
    torch.manual_seed(0)
    error = mixture.sample((4000,)).mean(0) - mixture.marginals
    assert bool((error.abs() < 5 * 0.5 / math.sqrt(4000)).all())
    shared = cr.nn.SubsetMixture(Categorical(logits=drawn(T, C, seed=1)), circuit(drawn(T, C, N), potential[0, 0]))
    assert bool(circuit.satisfies(shared.sample(key=0)).all())


def test_a_compiled_layer_is_the_same() -> None:
    torch.manual_seed(0)
    layer = cr.nn.ConstraintLayer(CONSTRAINTS["composed"], N, in_features=H, components=C)
    features = drawn(T, H, dtype=torch.float32)
    labels = layer(features).mode
    labels[::2, 1] = NAN

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        distribution = layer(x)
        return layer.log_likelihood(distribution, labels), distribution.mode

    for ours, theirs in zip(
        torch.compile(both, backend="eager", fullgraph=True)(features), both(features), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


# ---------------------------------------------------------------------------------------------- labels


@every_constraint
@pytest.mark.parametrize("components", [None, C])
def test_labels_that_are_not_known_are_summed_out(constraint: cr.Constraint, components: int | None) -> None:
    circuit = cr.compile(constraint, N)
    layer = cr.nn.ConstraintLayer(circuit, components=components)
    logits = drawn(T, C, N, scale=2.0) if components else drawn(T, N, scale=2.0)
    distribution = layer(logits)
    worlds = allowed_worlds(circuit)
    generator = torch.Generator().manual_seed(1)
    world = worlds[torch.randint(len(worlds), (T,), generator=generator)]
    known = torch.rand(T, N, generator=generator) < 0.5
    known[0] = False
    expected = distribution.log_evidence(include=world & known, exclude=~world & known)
    assert expected[0] == 0
    of_nan = torch.where(known, world.double(), NAN)
    for labels, mask in (
        (of_nan, None),
        (of_nan.float(), None),
        (torch.where(known, world.long(), -1), None),
        (torch.where(known, world.double(), -1.0), None),
        (torch.where(known, world.long(), 7), known),
        (world, known),
        (world, known.float()),
        (of_nan, known),
    ):
        torch.testing.assert_close(layer.log_likelihood(distribution, labels, mask), expected)
    if components:
        by_hand = MixtureSameFamily(distribution.mixture_distribution, distribution.component_distribution)
        torch.testing.assert_close(cr.nn.log_likelihood(by_hand, of_nan), expected)
    for complete in (world, world.double(), world.long(), world.to(torch.uint8)):
        found = layer.log_likelihood(distribution, complete)
        assert torch.equal(found, distribution.log_prob(world))
        assert torch.equal(layer.log_likelihood(distribution, complete, torch.ones(N, dtype=torch.bool)), found)
    # Under one mask for all rows, and one label for all rows.
    columns = torch.tensor([1, 0, 0, 1, 0, 0]).bool()
    found = layer.log_likelihood(distribution, world, columns)
    torch.testing.assert_close(found, distribution.log_evidence(include=world & columns, exclude=~world & columns))
    assert layer.log_likelihood(distribution, world[0]).shape == (T,)


def test_partial_labels_teach() -> None:
    """With every label hidden from half of the rows, the gradient of the likelihood still points at the labels."""
    circuit = cr.compile(cr.Exactly(2), 4)
    logits = torch.zeros(4, requires_grad=True)
    labels = torch.tensor([[1.0, NAN, NAN, NAN], [NAN, NAN, NAN, 1.0]])
    for _ in range(200):
        loss = -cr.nn.log_likelihood(circuit(logits.expand(2, 4)), labels).mean()
        (gradient,) = torch.autograd.grad(loss, logits)
        logits = (logits - gradient).detach().requires_grad_()
    assert circuit(logits).mode.tolist() == [1.0, 0.0, 0.0, 1.0]
    assert loss < 0.1


def test_labels_that_are_none() -> None:
    circuit = cr.compile(cr.Exactly(3), N)
    distribution = circuit(drawn(2, N))
    likelihood = cr.nn.log_likelihood
    with pytest.raises(ValueError, match=r"labels have shape \(5,\): the last dimension must be n=6"):
        likelihood(distribution, torch.ones(5))
    with pytest.raises(ValueError, match=r"labels hold 0\.5: every known label must be 0 or 1; NaN or -1"):
        likelihood(distribution, torch.full((2, N), 0.5))
    with pytest.raises(ValueError, match="labels hold -1: every known label"):
        likelihood(distribution, torch.full((2, N), -1), torch.ones(N))
    with pytest.raises(ValueError, match="does not satisfy"):
        likelihood(distribution, torch.ones(2, N))
    with pytest.raises(ValueError, match="leave no subset"):
        likelihood(distribution, torch.tensor([1.0, 1, 1, 1, NAN, NAN]))
    with pytest.raises(ValueError, match=r"known has shape \(2, 5\)"):
        likelihood(distribution, torch.ones(2, N), torch.ones(2, 5))
    with pytest.raises(TypeError, match=r"labels=.*expected a tensor"):
        likelihood(distribution, [0] * N)
    with pytest.raises(TypeError, match=r"distribution=Normal.*expected what a ConstraintLayer"):
        likelihood(torch.distributions.Normal(0.0, 1.0), torch.ones(2, N))
    unchecked = circuit(drawn(2, N), validate_args=False)
    assert bool((likelihood(unchecked, torch.tensor([1.0, 1, 1, 1, NAN, NAN])) == -INF).all())
