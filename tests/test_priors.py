"""Priors over subsets and their products with constraints, held to plain enumeration of all worlds.

Legend: n variables, W = 2^n worlds, T rows.
"""

import copy
import itertools
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import circuitroute as cr
from circuitroute.priors import states as states_module
from tests.interop.files import BALANCED, TWO_PAIRS_SDD

X = cr.variables(10)
RULE = cr.ActiveGroups(cr.Groups(3), at_most=2) & cr.Between(1, 3)  # over 6 variables


def worlds(n):
    """[W, n] bool."""
    return torch.tensor(list(itertools.product([False, True], repeat=n)))


def plain_prior(prior):
    """[W] the probability of every world: a recursion over the vtree, in plain probabilities."""
    root, mixtures, coins = (
        prior.root_logits.double().softmax(-1),
        prior.mixture_logits.double().softmax(-1),
        prior.coin_logits.double().sigmoid(),
    )
    vtree, found = prior.vtree, []
    for world in worlds(prior.n).tolist():
        values = [coins[v] if world[v] else 1 - coins[v] for v in range(prior.n)]
        for v, (left, right) in enumerate(vtree.halves, start=prior.n):
            a, b = values[left], values[right]
            terms = torch.outer(a, b).flatten() if prior.layers == "tucker" else a * b
            values.append(terms if v == vtree.num_nodes - 1 else mixtures[v - prior.n] @ terms)
        found.append(values[-1] @ root)
    return torch.stack(found)


class Truth:
    """Prior, logits [T, n] and constraint multiplied world by world; differentiable."""

    def __init__(self, prior, circuit, logits):
        self.worlds = worlds(prior.n)
        z = self.worlds.double()
        allowed = torch.ones(len(z), dtype=torch.bool) if circuit is None else circuit.satisfies(self.worlds)
        possible = allowed & ~(
            (self.worlds & (logits == -math.inf)[:, None]) | (~self.worlds & (logits == math.inf)[:, None])
        ).any(-1)
        finite = torch.where(logits.isinf(), 0.0, logits)
        weights = plain_prior(prior) * (finite @ z.t()).exp() * possible
        total = weights.sum(1)
        self.probs = weights / total[:, None]
        self.log_partition = total.log()
        self.marginals = self.probs @ z
        self.covariance = torch.einsum("tw,wi,wj->tij", self.probs, z, z) - torch.einsum(
            "ti,tj->tij", self.marginals, self.marginals
        )


def made(n, states=3, circuit=None, **options):
    vtree = None if circuit is None else cr.Vtree.of_circuit(circuit)
    return cr.SubsetPrior(n, states, vtree=vtree, dtype=torch.float64, **options)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_true(distribution, truth):
    """Every output, and every gradient of first order in logits and parameters."""
    torch.testing.assert_close(distribution.log_partition, truth.log_partition)
    torch.testing.assert_close(distribution.marginals, truth.marginals)
    torch.testing.assert_close(distribution.mean, truth.marginals)
    torch.testing.assert_close(distribution.variance, truth.marginals * (1 - truth.marginals))
    torch.testing.assert_close(distribution.covariance_matrix, truth.covariance)
    support = (
        truth.worlds if distribution.circuit is None else truth.worlds[distribution.circuit.satisfies(truth.worlds)]
    )
    mine = truth.worlds if distribution.circuit is None else distribution.circuit.satisfies(truth.worlds)
    probs = truth.probs.t() if distribution.circuit is None else truth.probs.t()[mine]
    torch.testing.assert_close(distribution.log_prob(support[:, None]).exp(), probs)


def gradients(values, inputs, seed):
    weights = randn(*values.shape, seed=seed)
    total = (values * weights).sum()
    return torch.autograd.grad(total, inputs, retain_graph=True, materialize_grads=True, allow_unused=True)


# ---------------------------------------------------------------------------------------------- against the truth

CASES = [
    (None, 1), (None, 2), (None, 5),
    (cr.Exactly(1), 1), (cr.AtMost(1), 1), (cr.Exactly(0), 3), (cr.Exactly(3), 3), (cr.Exactly(2), 6),
    (cr.CountIn({0, 3}), 5),
    (RULE, 6), (cr.Cost([1, 2, 3, 1, 2, 3], at_most=5), 6),
    (cr.Logic((X[0] | X[2]) & (X[3] >> X[5])), 7), (cr.AtMost(1).over([0, 2]) | cr.Logic(X[1]), 4), (cr.AtLeast(0), 4),
]  # fmt: skip


@pytest.mark.parametrize("layers", ["cp", "tucker"])
@pytest.mark.parametrize(("constraint", "n"), CASES, ids=[f"{c} {n}" for c, n in CASES])
def test_every_output_and_gradient(constraint, n, layers):
    circuit = None if constraint is None else cr.compile(constraint, n)
    prior = made(n, circuit=circuit, layers=layers, seed=n)
    logits = randn(3, n).requires_grad_()
    distribution = prior(logits) if circuit is None else prior.constrained(circuit, logits)
    truth = Truth(prior, circuit, logits)
    assert_true(distribution, truth)
    inputs = [logits, *prior.parameters()]
    for name in ("log_partition", "marginals"):
        found, expected = (gradients(getattr(each, name), inputs, seed=7) for each in (distribution, truth))
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(prior.log_prob(truth.worlds).exp(), plain_prior(prior))
    assert prior.log_prob(truth.worlds).exp().sum().item() == pytest.approx(1.0)


FORMULAS = st.recursive(
    st.integers(0, 6).map(lambda i: X[i]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map(lambda p: p[0] & p[1]),
        st.tuples(inner, inner).map(lambda p: p[0] | p[1]),
        inner.map(lambda f: ~f),
    ),
    max_leaves=8,
).map(cr.Logic)
COUNTS = st.tuples(st.integers(0, 4), st.integers(0, 3)).map(lambda p: cr.Between(p[0], p[0] + p[1]))
CONSTRAINTS = st.one_of(FORMULAS, COUNTS, st.tuples(FORMULAS, COUNTS).map(lambda p: p[0] & p[1]))


@settings(max_examples=15, deadline=None)
@given(CONSTRAINTS, st.integers(1, 3), st.sampled_from(["cp", "tucker"]), st.integers(0, 100))
def test_any_constraint(constraint, states, layers, seed):
    try:
        circuit = cr.compile(constraint, 7)
    except cr.InfeasibleError:
        return
    prior = made(7, states, circuit, layers=layers, seed=seed)
    logits = 2 * randn(2, 7, seed=seed)
    distribution, truth = prior.constrained(constraint, logits), Truth(prior, circuit, logits)
    torch.testing.assert_close(distribution.log_partition, truth.log_partition)
    torch.testing.assert_close(distribution.marginals, truth.marginals)
    assert bool(circuit.satisfies(distribution.sample((20,), key=seed)).all())


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 8), st.sets(st.integers(0, 8), min_size=1), st.randoms(use_true_random=False))
def test_counts_go_along_any_vtree(n, counts, random):
    allowed = {count for count in counts if count <= n}
    if not allowed:
        return
    parts = list(range(n))
    while len(parts) > 1:
        random.shuffle(parts)
        parts.append((parts.pop(), parts.pop()))
    prior = cr.SubsetPrior(n, 2, vtree=cr.Vtree.of_nested(parts[0]), dtype=torch.float64)
    circuit = cr.compile(cr.CountIn(allowed), n)
    torch.testing.assert_close(
        prior.constrained(circuit, randn(2, n)).marginals, Truth(prior, circuit, randn(2, n)).marginals
    )


def test_evidence_is_conditioning():
    circuit = cr.compile(RULE, 6)
    prior = made(6, circuit=circuit)
    logits = randn(3, 6)
    logits[0, 2], logits[1, 3], logits[2, 0], logits[2, 1] = math.inf, -math.inf, math.inf, -math.inf
    assert_true(prior.constrained(circuit, logits), Truth(prior, circuit, logits))
    given_rows = prior.constrained(circuit, randn(3, 6)).condition(
        include=[4], exclude=torch.eye(6, dtype=torch.bool)[:3]
    )
    logits = randn(3, 6)
    logits[:, 4] = math.inf
    logits[range(3), range(3)] = -math.inf
    torch.testing.assert_close(given_rows.marginals, Truth(prior, circuit, logits).marginals)


def test_conditionals_of_the_prior_itself():
    prior = made(5)
    every, probs = worlds(5), plain_prior(prior)
    seen = every[:, 1] & ~every[:, 3]
    torch.testing.assert_close(prior.log_evidence(include=[1], exclude=[3]).exp(), probs[seen].sum())
    expected = (probs[seen, None] * every[seen]).sum(0) / probs[seen].sum()
    torch.testing.assert_close(prior.marginals(include=[1], exclude=[3]), expected)
    torch.testing.assert_close(prior.marginals(), (probs[:, None] * every).sum(0))
    torch.testing.assert_close(prior.condition(include=[1]).condition(exclude=[3]).marginals, expected)
    partial = torch.tensor([[True, False, False, False, False], [False, False, True, False, False]])
    assert prior.marginals(include=partial).shape == (2, 5)


def test_constraints_multiply_probabilities():
    """The log-partition without logits is the prior's probability of the constraint."""
    prior = made(8)
    each = [prior.constrained(cr.Exactly(k)).log_partition for k in range(9)]
    torch.testing.assert_close(torch.stack(each).exp().sum(), torch.ones((), dtype=torch.float64))
    assert prior.constrained(cr.AtLeast(0)).log_partition.item() == pytest.approx(0.0, abs=1e-12)


def test_a_prior_on_an_sdd_of_anyones(tmp_path):
    (tmp_path / "a.sdd").write_text(TWO_PAIRS_SDD)
    (tmp_path / "a.vtree").write_text(BALANCED)
    circuit = cr.read_sdd(tmp_path / "a.sdd", tmp_path / "a.vtree")
    prior = made(4, circuit=circuit)
    assert_true(prior.constrained(circuit, randn(2, 4)), Truth(prior, circuit, randn(2, 4)))


def test_one_latent_state_is_independent_coins():
    circuit = cr.compile(RULE, 6)
    prior = made(6, 1, circuit)
    logits = randn(4, 6)
    coins = circuit(logits + prior.coin_logits[:, 0])
    torch.testing.assert_close(prior.constrained(circuit, logits).marginals, coins.marginals)


def test_second_derivatives():
    circuit = cr.compile(RULE, 6)
    prior = made(6, 2, circuit)
    logits = randn(1, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: prior.constrained(circuit, x).marginals, logits)
    assert torch.autograd.gradgradcheck(lambda x: prior.constrained(circuit, x).log_partition, logits)
    parameters = [p.detach().clone().requires_grad_() for p in prior.parameters()]

    def log_prob(*free):
        names = [name for name, _ in prior.named_parameters()]
        value = torch.zeros(1, 6, dtype=torch.bool).index_fill(1, torch.tensor([0, 1]), True)
        return torch.func.functional_call(
            _LogProb(prior), {f"prior.{n}": p for n, p in zip(names, free, strict=True)}, value
        )

    assert torch.autograd.gradcheck(log_prob, parameters)


class _LogProb(torch.nn.Module):
    def __init__(self, prior):
        super().__init__()
        self.prior = prior

    def forward(self, value):
        return self.prior.constrained(RULE).log_prob(value)


def test_functions_of_functions():
    circuit = cr.compile(RULE, 6)
    prior = made(6, circuit=circuit).requires_grad_(False)
    logits = randn(4, 6)

    def log_partition(x):
        return prior.constrained(circuit, x).log_partition

    marginals = prior.constrained(circuit, logits).marginals
    torch.testing.assert_close(torch.func.vmap(log_partition)(logits), log_partition(logits))
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(log_partition))(logits), marginals)
    torch.testing.assert_close(torch.func.vmap(lambda x: prior.constrained(circuit, x).marginals)(logits), marginals)


# ---------------------------------------------------------------------------------------------- numbers


def test_what_a_matrix_product_would_lose_is_written_out():
    """Latent states whose values differ by more than float64 holds, and a mixture that needs the smaller ones."""
    prior = made(4, 2)
    with torch.no_grad():
        prior.coin_logits.copy_(torch.tensor([[2000.0, -2000.0]] * 4))
        prior.mixture_logits.copy_(torch.tensor([[[1500.0, 0.0], [0.0, 1500.0]]] * 2))
        prior.root_logits.copy_(torch.tensor([-1000.0, 0.0]))
    # All present is either coins of state 0 below a root of state 0, or unlikely coins: log p is -1000.
    assert prior.log_prob(torch.ones(4)).item() == pytest.approx(-1000.0, abs=1e-9)
    # Variables 0 and 1 from state 0, 2 and 3 from state 1: a mixture's unlikely term, on one side or the other.
    assert prior.log_prob(torch.tensor([1.0, 1, 0, 0])).item() == pytest.approx(-1500.0, abs=1e-9)
    (gradient,) = torch.autograd.grad(prior.log_prob(torch.tensor([1.0, 1, 0, 0])), prior.mixture_logits)
    assert bool(gradient.isfinite().all())
    assert gradient.abs().max().item() == pytest.approx(1.0)
    under_vmap = torch.func.vmap(lambda x: prior(x).log_partition)(torch.tensor([[0.0, 0, -math.inf, -math.inf]]))
    assert under_vmap.item() == pytest.approx(0.0, abs=1e-9)


def test_extreme_logits():
    circuit = cr.compile(cr.Exactly(2), 4)
    prior = made(4)
    logits = torch.tensor([[1e4, -1e4, 3.0, 1e4], [-1e4, -1e4, -1e4, 1e4]], dtype=torch.float64)
    distribution = prior.constrained(circuit, logits)
    torch.testing.assert_close(distribution.marginals[0], torch.tensor([1.0, 0, 0, 1], dtype=torch.float64))
    assert distribution.marginals[1].sum().item() == pytest.approx(2.0)
    assert bool(distribution.log_partition.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(dtype):
    prior = cr.SubsetPrior(4, 2)
    distribution = prior.constrained(cr.Exactly(2), torch.zeros(3, 4, dtype=dtype))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert distribution.marginals.dtype == distribution.log_partition.dtype == wide
    assert distribution.sample(key=0).dtype == distribution.log_prob(torch.tensor([1, 1, 0, 0])).dtype == wide
    assert prior.to(dtype).log_prob(torch.ones(4)).dtype == wide


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0), (2, 3)])
def test_batches_of_any_shape(shape):
    prior = cr.SubsetPrior(5, 2)
    logits = torch.zeros(*shape, 5)
    distribution = prior.constrained(cr.Exactly(2), logits)
    assert distribution.batch_shape == distribution.log_partition.shape == shape
    assert distribution.marginals.shape == (*shape, 5)
    assert distribution.covariance_matrix.shape == (*shape, 5, 5)
    assert distribution.sample((4, 1), key=1).shape == (4, 1, *shape, 5)
    assert [part.shape for part in distribution.max_product()] == [(*shape, 5), shape]
    assert distribution.log_prob(distribution.sample(key=0)).shape == shape
    assert distribution.expand((2, *shape)).marginals.shape == (2, *shape, 5)


def test_rows_that_nothing_satisfies():
    prior, inf = cr.SubsetPrior(4, 2), math.inf
    bad = torch.tensor([[0.0, 0, 0, 0], [inf, inf, inf, 0], [math.nan, 0, 0, 0]])
    with pytest.raises(ValueError, match=r"no subset that satisfies Exactly\(2\) is left .* in row 1$"):
        prior.constrained(cr.Exactly(2), bad[:2])
    with pytest.raises(ValueError, match=r"logits hold NaN in row 1$"):
        prior(bad[[0, 2]])
    distribution = prior.constrained(cr.Exactly(2), bad, validate_args=False)
    rows = [False, True, True]
    assert distribution.log_partition.isnan().tolist() == rows
    assert distribution.marginals.isnan().all(-1).tolist() == rows
    assert distribution.sample(key=0).isnan().all(-1).tolist() == rows
    assert distribution.log_prob(torch.tensor([1.0, 1, 0, 0])).isnan().tolist() == rows
    assert distribution.covariance_matrix.isnan().flatten(1).all(-1).tolist() == rows
    with pytest.raises(ValueError, match=r"no subset .* is left .* in the only row"):
        prior.constrained(cr.Exactly(2)).condition(include=[0, 1, 2])
    with pytest.raises(ValueError, match="include or exclude contradicts the infinite logits in the only row"):
        prior(torch.tensor([-inf, 0, 0, 0])).condition(include=[0])


# ---------------------------------------------------------------------------------------------- samples


@pytest.mark.parametrize("layers", ["cp", "tucker"])
def test_samples_come_as_often_as_they_should(layers):
    """Chi-squared over all allowed worlds; a right sampler fails at one in a million such seeds."""
    circuit = cr.compile(RULE, 6)
    prior = made(6, circuit=circuit, layers=layers)
    logits = randn(1, 6)
    truth = Truth(prior, circuit, logits)
    draws = prior.constrained(circuit, logits).sample((4000,), key=3)[:, 0]
    counts = (draws @ 2.0 ** torch.arange(5, -1, -1, dtype=torch.float64)).long().bincount(minlength=64)
    likely = truth.probs[0] > 0
    assert int(counts[~likely].sum()) == 0
    expected = 4000 * truth.probs[0][likely]
    statistic = ((counts[likely] - expected) ** 2 / expected).sum().item()
    freedom = int(likely.sum()) - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom) + 12


def test_a_sample_is_a_function_of_row_and_key():
    circuit = cr.compile(RULE, 6)
    prior = made(6, circuit=circuit)
    logits, keys = randn(5, 6), cr.random_key(0, torch.arange(5))
    together = prior.constrained(circuit, logits).sample(key=keys)
    apart = [prior.constrained(circuit, row).sample(key=key) for row, key in zip(logits, keys, strict=True)]
    assert torch.equal(together, torch.stack(apart))
    many = prior.constrained(circuit, logits).sample((3,), key=keys)
    assert torch.equal(many, prior.constrained(circuit, logits).sample((3,), key=keys))
    assert torch.equal(many[:, 2], prior.constrained(circuit, logits[2]).sample((3,), key=keys[2]))
    assert not torch.equal(many[0], many[1])
    torch.manual_seed(0)
    first = prior.sample((4,))
    torch.manual_seed(0)
    assert torch.equal(first, prior.sample((4,)))
    with pytest.raises(ValueError, match=r"key has shape \(2,\): it must broadcast"):
        prior.constrained(circuit, logits).sample(key=keys[:2])


def test_straight_through():
    prior = made(4)
    logits = randn(2, 4).requires_grad_()
    distribution = prior.constrained(cr.Exactly(2), logits)
    mask, u = distribution.rsample(key=1), randn(2, 4, seed=1)
    torch.testing.assert_close(mask, distribution.sample(key=1))
    torch.testing.assert_close(*(torch.autograd.grad((m * u).sum(), logits)[0] for m in (mask, distribution.marginals)))


@pytest.mark.parametrize("layers", ["cp", "tucker"])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_max_product_is_the_best_world_with_its_latent_states(layers, n):
    """By all worlds and all latent states of a small tree, in the max-product semiring."""
    prior = made(n, 2, layers=layers, seed=n)
    logits = randn(1, n)
    weights = prior.requires_grad_(False).log_weights()
    best = {}
    for world in worlds(n).tolist():
        values = [weights.coins[v, :, int(world[v])] + float(logits[0, v]) * world[v] for v in range(n)]
        for v, (left, right) in enumerate(prior.vtree.halves, start=n):
            a, b = values[left], values[right]
            terms = (a[:, None] + b).flatten() if layers == "tucker" else a + b
            top = v == prior.vtree.num_nodes - 1
            values.append(terms if top else (weights.mixtures[v - n] + terms).amax(-1))
        best[tuple(world)] = float((values[-1] + weights.root).max())
    distribution = prior(logits)
    mask, bound = distribution.max_product()
    expected = max(best, key=best.__getitem__)
    assert tuple(mask[0].bool().tolist()) == expected
    assert bound.item() == pytest.approx(best[expected] - distribution.log_partition.item())
    assert bound.item() <= distribution.log_prob(mask).item() + 1e-12


def test_what_has_no_exact_form_says_what_to_do():
    distribution = cr.SubsetPrior(3, 2).constrained(cr.Exactly(1))
    with pytest.raises(NotImplementedError, match=r"no tractable form: estimate it by samples"):
        distribution.entropy()
    with pytest.raises(NotImplementedError, match=r"max_product\(\) gives"):
        distribution.mode  # noqa: B018 - a property that raises


# ---------------------------------------------------------------------------------------------- modules and arguments


def test_copies_and_checkpoints():
    prior = cr.SubsetPrior(5, 3, vtree=cr.Vtree.linear(5), seed=4)
    expected = prior.log_prob(torch.eye(5))
    for other in (copy.deepcopy(prior), pickle.loads(pickle.dumps(prior))):
        assert torch.equal(other.log_prob(torch.eye(5)), expected)
    other = cr.SubsetPrior(5, 3, vtree=cr.Vtree.linear(5), seed=1)
    assert not torch.equal(other.log_prob(torch.eye(5)), expected)
    other.load_state_dict(prior.state_dict())
    assert torch.equal(other.log_prob(torch.eye(5)), expected)
    assert sorted(prior.state_dict()) == ["coin_logits", "mixture_logits", "root_logits"]
    assert torch.equal(cr.SubsetPrior(5, 3, seed=4).coin_logits, prior.coin_logits)
    assert repr(prior) == "SubsetPrior(n=5, states=3, layers='cp')"
    assert repr(prior.constrained(cr.Exactly(2))) == "PriorDistribution(Exactly(2), n=5, latent=3, batch=())"
    assert repr(prior()) == "PriorDistribution(n=5, latent=3, batch=())"


def test_support():
    prior = cr.SubsetPrior(3, 2)
    masks = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0.5, 0, 0]])
    assert prior.constrained(cr.Exactly(1)).support.check(masks).tolist() == [True, False, False]
    assert prior().support.check(masks).tolist() == [True, True, False]


@pytest.mark.slow
def test_traced():
    prior = cr.SubsetPrior(4, 2).requires_grad_(False)
    circuit = cr.compile(cr.Exactly(2), 4)
    logits = randn(3, 4).float()

    def function(x):
        return prior.constrained(circuit, x, validate_args=False).log_partition

    compiled = torch.compile(function, backend="eager", fullgraph=False)
    torch.testing.assert_close(compiled(logits), function(logits))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: cr.SubsetPrior(0), ValueError, "n=0: must be at least 1"),
        (lambda: cr.SubsetPrior(2.5), TypeError, "n=2.5: expected an integer"),
        (lambda: cr.SubsetPrior(3, 0), ValueError, "states=0: must be at least 1"),
        (lambda: cr.SubsetPrior(3, layers="dense"), ValueError, "layers='dense': choose one of 'cp', 'tucker'"),
        (lambda: cr.SubsetPrior(3, vtree=((0, 1), 2)), TypeError, r"vtree=\(\(0, 1\), 2\): expected a Vtree"),
        (lambda: cr.SubsetPrior(3, vtree=cr.Vtree.balanced(4)), ValueError, "vtree is over 4 variables: .* n=3"),
        (lambda: cr.SubsetPrior(3).log_prob(torch.ones(2)), ValueError, r"mask has shape \(2,\): .* n=3"),
        (lambda: cr.SubsetPrior(3).log_prob(torch.full((3,), 2.0)), ValueError, "mask holds 2.0"),
        (lambda: cr.SubsetPrior(3)(torch.ones(2)), ValueError, r"logits have shape \(2,\): .* n=3"),
        (lambda: cr.SubsetPrior(3)(torch.ones(3, dtype=torch.long)), TypeError, "logits have dtype torch.int64"),
        (lambda: cr.SubsetPrior(3).constrained("x0"), TypeError, "constraint='x0': expected a constraint or a circuit"),
        (lambda: cr.SubsetPrior(3).constrained(cr.Exactly(4)), cr.InfeasibleError, "Exactly"),
        (
            lambda: cr.SubsetPrior(3).constrained(cr.compile(cr.Exactly(1), 4)),
            ValueError,
            "constraint: a circuit over 4 variables was given to a prior over 3",
        ),
        (
            lambda: cr.SubsetPrior(4).constrained(cr.Logic(X[0] >> X[2]) & cr.Logic(X[1] >> X[3])),
            ValueError,
            r"does not respect the prior's vtree, which splits \[0, 1\] from \[2, 3\]: its node \d+ multiplies",
        ),
        (
            lambda: cr.SubsetPrior(3).constrained(cr.Exactly(1)).log_prob(torch.ones(3)),
            ValueError,
            r"value does not satisfy Exactly\(1\) in the only row",
        ),
        (lambda: cr.SubsetPrior(3).condition(include=[3]), ValueError, "include holds index 3"),
        (lambda: cr.SubsetPrior(3).marginals(include=[1], exclude=[1]), ValueError, r"share the variables \[1\]"),
    ],
)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_masks_that_are_not_allowed_have_no_probability():
    prior = cr.SubsetPrior(3, 2)
    distribution = prior.constrained(cr.Exactly(1), validate_args=False)
    assert distribution.log_prob(torch.tensor([[1, 1, 0], [1, 0, 0]])).isinf().tolist() == [True, False]
    assert prior().condition(include=[0]).log_prob(torch.tensor([0, 1, 0])).item() == -math.inf


def test_layouts_end(monkeypatch):
    monkeypatch.setattr(states_module, "MAX_PAIRS", 20)
    with pytest.raises(cr.CircuitTooLargeError, match="more than 20 pairs of states along the vtree"):
        cr.SubsetPrior(9, 2).constrained(cr.Between(2, 5))


def test_several_backward_passes():
    """A distribution keeps no graph of its own: each of its values can be differentiated by itself."""
    prior = cr.SubsetPrior(3, 2)
    distribution = prior.constrained(cr.Exactly(1))
    distribution.log_partition.backward()
    distribution.marginals[0].backward()
    distribution.log_prob(torch.tensor([1, 0, 0])).backward()
    assert bool(prior.coin_logits.grad.isfinite().all())
