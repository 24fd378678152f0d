"""The constraint language: random nested constraints against all 2^n worlds, and every composed form's errors."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import circuitroute as cr
from tests.test_compile import NoNeighbours, Parity
from tests.test_logic import formulas, says
from tests.truth import enumerate_worlds, world_truth

MAX_N = 10


def meaning(constraint, worlds):
    """[W] bool: what a constraint says about worlds [W, m], by its definition and nothing else."""
    match constraint:
        case cr.constraints.And(parts=parts):
            return np.all([meaning(p, worlds) for p in parts], axis=0)
        case cr.constraints.Or(parts=parts):
            return np.any([meaning(p, worlds) for p in parts], axis=0)
        case cr.constraints.Not(part=part):
            return ~meaning(part, worlds)
        case cr.constraints.Over(constraint=inner, indices=indices):
            ordered = sorted(indices) if isinstance(inner, NoNeighbours) else list(indices)
            return meaning(inner, worlds[:, ordered])
        case cr.constraints.Count():
            return np.array([constraint.allows(int(c)) for c in worlds.sum(1)])
        case cr.Cost(costs=costs, at_most=high, at_least=low):
            total = worlds @ np.array(costs)
            return (total >= low) & (total <= (math.inf if high is None else high))
        case cr.EachGroup(groups=groups, constraint=inner):
            return np.all([meaning(inner, worlds[:, list(g)]) for g in groups.of(worlds.shape[1])], axis=0)
        case cr.ActiveGroups(groups=groups, at_most=high, at_least=low):
            active = sum(worlds[:, list(g)].any(1).astype(int) for g in groups.of(worlds.shape[1]))
            return (active >= low) & (active <= (len(worlds[0]) if high is None else high))
        case cr.LayerBudget(layers=layers, per_layer=each, total=total):
            layered = cr.EachGroup(cr.Groups(layers), each)
            return meaning(layered, worlds) & meaning(total, worlds)
        case cr.Logic(expr=expr):
            return says(expr, worlds)
        case Parity():
            return worlds.sum(1) % 2 == 0
        case NoNeighbours():
            return ~(worlds[:, 1:] & worlds[:, :-1]).any(1)
    raise AssertionError(constraint)


@st.composite
def partitions(draw, n):
    order = draw(st.permutations(range(n)))
    cuts = sorted(draw(st.sets(st.integers(1, n - 1), max_size=3))) if n > 1 else []
    return cr.Groups([order[a:b] for a, b in itertools.pairwise([0, *cuts, n])])


@st.composite
def simple(draw, n):
    """A constraint over n variables without operators."""
    a, b = sorted((draw(st.integers(0, n)), draw(st.integers(0, n))))
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return cr.Between(a, b)
    if kind == 1:
        return cr.CountIn(draw(st.sets(st.integers(0, n), min_size=1)))
    if kind == 2:
        return cr.AtLeast(a)
    if kind == 3:
        costs = draw(st.lists(st.integers(0, 4), min_size=n, max_size=n))
        return cr.Cost(costs, at_most=a + b, at_least=a) if draw(st.booleans()) else cr.Cost(costs, at_least=b + 1)
    if kind == 4:
        groups = draw(partitions(n))
        low = draw(st.integers(0, groups.count))
        return cr.ActiveGroups(groups, at_most=draw(st.none() | st.integers(low, groups.count)), at_least=low)
    if kind == 5:
        return cr.EachGroup(draw(partitions(n)), cr.Between(draw(st.integers(0, 1)), draw(st.integers(1, 3))))
    if kind == 6:
        layers = draw(st.sampled_from([d for d in range(1, n + 1) if n % d == 0]))
        return cr.LayerBudget(layers, n // layers, cr.AtMost(draw(st.integers(0, 3))), cr.Between(a, b))
    if kind == 7:
        return cr.Logic(draw(formulas(n)))
    return Parity() if kind == 8 else NoNeighbours()


@st.composite
def nested(draw, n, depth=3):
    """Any constraint over n variables: operators, scopes, groups, costs, users' machines."""
    kind = draw(st.integers(0, 4)) if depth else 4
    if kind == 0:
        return draw(nested(n, depth - 1)) & draw(nested(n, depth - 1))
    if kind == 1:
        return draw(nested(n, depth - 1)) | draw(nested(n, depth - 1))
    if kind == 2:
        return ~draw(nested(n, depth - 1))
    if kind == 3:
        scope = draw(st.lists(st.integers(0, n - 1), min_size=1, unique=True))
        return draw(nested(len(scope), depth - 1)).over(scope)
    return draw(simple(n))


def nested_examples(many):
    return settings(
        max_examples=many, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
    )


@nested_examples(120)
@given(st.data())
def test_nested_constraints_against_all_worlds(data):
    against_all_worlds(data)


@pytest.mark.slow
@nested_examples(1000)
@given(st.data())
def test_many_more_nested_constraints_against_all_worlds(data):
    against_all_worlds(data)


def against_all_worlds(data):
    n = data.draw(st.integers(1, MAX_N))
    constraint = data.draw(nested(n))
    worlds = enumerate_worlds(n)
    accept = meaning(constraint, worlds)
    if not accept.any():
        with pytest.raises(cr.InfeasibleError):
            cr.compile(constraint, n)
        return
    circuit = cr.compile(constraint, n)
    assert circuit.model_count() == accept.sum()
    assert torch.equal(circuit.satisfies(torch.from_numpy(worlds)), torch.from_numpy(accept))
    circuit.check()
    logits = torch.randn(3, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64) * 3
    logits.requires_grad_()
    dist, truth = circuit(logits), world_truth(logits.detach().numpy(), accept)
    np.testing.assert_allclose(dist.log_partition.detach(), truth.log_partition, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(dist.marginals.detach(), truth.marginals, atol=1e-9)
    np.testing.assert_allclose(dist.count_probs.detach(), truth.count_probs[:, : circuit.max_count + 1], atol=1e-9)
    np.testing.assert_allclose(dist.entropy().detach(), truth.entropy, atol=1e-8)
    u = torch.randn(3, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if dist.marginals.requires_grad:
        (grad,) = torch.autograd.grad((dist.marginals * u).sum(), logits)
        np.testing.assert_allclose(grad, (truth.covariance @ u.numpy()[..., None])[..., 0], atol=1e-8)
    best = dist.log_prob(dist.mode).detach()
    np.testing.assert_allclose(best, truth.log_probs.max(1), rtol=1e-9, atol=1e-9)
    samples = dist.sample((20,), key=cr.random_key(0, torch.arange(3)))
    assert circuit.satisfies(samples).all()


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_repr_evaluates_back(data):
    constraint = data.draw(nested(data.draw(st.integers(1, MAX_N))))
    again = eval(repr(constraint), {**vars(cr), "Parity": Parity, "NoNeighbours": NoNeighbours})
    assert again == constraint
    assert hash(again) == hash(constraint)


def test_operators_normalise():
    a, b, c = cr.Exactly(1).over([0, 1]), cr.AtMost(1).over([2, 3]), cr.AtLeast(1)
    assert (a & b) & c == a & (b & c)
    assert a & a == a
    assert ~~a == a
    assert repr(a & b | ~c) == "((Exactly(1).over([0, 1]) & AtMost(1).over([2, 3])) | ~AtLeast(1))"
    with pytest.raises(TypeError):
        a & 3
    with pytest.raises(TypeError, match=r"parts\[1\]=3"):
        cr.constraints.And([a, 3])
    with pytest.raises(TypeError, match="part=3"):
        cr.constraints.Not(3)
    with pytest.raises(ValueError, match="at least one constraint"):
        cr.constraints.Or([])


@pytest.mark.parametrize(
    ("constraint", "counts"),
    [
        (cr.Exactly(3) | cr.Exactly(5), (3, 5)),
        (cr.AtLeast(2) & cr.AtMost(4), (2, 3, 4)),
        (~cr.Between(1, 7), (0, 8)),
        (cr.Exactly(3).over(range(8)) & cr.AtMost(4), (3,)),
        (~(cr.AtMost(2) | cr.AtLeast(5)), (3, 4)),
    ],
)
def test_counts_of_all_variables_stay_on_the_fused_op(constraint, counts):
    circuit = cr.compile(constraint, 8)
    assert circuit.op == "subset"
    assert circuit.counts == counts


def surjective_picks(groups, size, k):
    """Ways to pick k of groups x size variables that touch every group, by inclusion and exclusion."""
    return sum((-1) ** j * math.comb(groups, j) * math.comb(size * (groups - j), k) for j in range(groups + 1))


@pytest.mark.parametrize("n", [64, 256])
def test_node_limited_routing(n):
    """DeepSeek-V3's rule: at most 4 of 8 groups, 8 experts in all."""
    circuit = cr.compile(cr.ActiveGroups(cr.Groups(8), at_most=4) & cr.Exactly(8), n)
    assert circuit.model_count() == sum(math.comb(8, g) * surjective_picks(g, n // 8, 8) for g in range(1, 5))
    circuit.check()
    dist = circuit(torch.randn(50, n, generator=torch.Generator().manual_seed(0)) * 2)
    torch.testing.assert_close(dist.marginals.sum(-1), torch.full((50,), 8.0))
    samples = dist.sample(key=cr.random_key(0, torch.arange(50)))
    assert circuit.satisfies(samples).all()
    assert (samples.reshape(50, 8, -1).any(-1).sum(-1) <= 4).all()
    if n == 64:
        assert circuit.num_nodes < 1000


def test_layer_budget_counts_models():
    circuit = cr.compile(cr.LayerBudget(layers=3, experts=4, per_layer=cr.Between(1, 3), total=cr.AtMost(5)), 12)
    ways = [math.comb(4, a) * math.comb(4, b) * math.comb(4, c)
            for a, b, c in itertools.product(range(1, 4), repeat=3) if a + b + c <= 5]  # fmt: skip
    assert circuit.model_count() == sum(ways)
    assert circuit.max_count == 5
    large = cr.compile(cr.LayerBudget(layers=16, experts=64, per_layer=cr.Between(2, 12), total=cr.AtMost(128)), 1024)
    assert large.num_nodes < 20_000


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: cr.Groups([[0, 1], [1, 2]]), ValueError, "overlap in variable 1"),
        (lambda: cr.Groups([[0, 1], [3]]), ValueError, r"leave out the variables \[2\]"),
        (lambda: cr.Groups([]), ValueError, "at least one group"),
        (lambda: cr.Groups([[0], []]), ValueError, r"groups\[1\]=\[\]"),
        (lambda: cr.Groups(0), ValueError, "groups=0"),
        (lambda: cr.Groups("ab"), TypeError, "groups"),
        (lambda: cr.compile(cr.EachGroup(cr.Groups(3), cr.Exactly(1)), 8), ValueError, "n=8 variables do not divide"),
        (lambda: cr.compile(cr.EachGroup(cr.Groups([[0, 1]]), cr.Exactly(1)), 3), ValueError, "covers 2 variables"),
        (lambda: cr.EachGroup([[0]], cr.Exactly(1)), TypeError, "expected cr.Groups"),
        (lambda: cr.EachGroup(cr.Groups(2), 1), TypeError, "constraint=1"),
        (lambda: cr.ActiveGroups(cr.Groups(4), at_most=-1), ValueError, "at_most=-1"),
        (lambda: cr.ActiveGroups(cr.Groups(4), at_most=1, at_least=2), ValueError, "at_most=1"),
        (lambda: cr.ActiveGroups(cr.Groups(4), at_least=5), ValueError, "only 4 groups"),
        (lambda: cr.Cost([1, -1], at_most=3), ValueError, r"costs\[1\]=-1"),
        (lambda: cr.Cost([1, 0.5], at_most=3), TypeError, r"costs\[1\]=0.5"),
        (lambda: cr.Cost([1, 2]), ValueError, "give one of them, or both"),
        (lambda: cr.Cost([], at_most=1), ValueError, "one cost per variable"),
        (lambda: cr.Cost(3, at_most=1), TypeError, "costs=3"),
        (lambda: cr.Cost([1], at_most=1, at_least=2), ValueError, "at_most=1"),
        (lambda: cr.compile(cr.Cost([1, 2], at_most=2), 3), ValueError, "costs has 2 entries, but there are 3"),
        (lambda: cr.compile(cr.Cost([1, 2], at_least=4), 2), cr.InfeasibleError, "all costs together are 3"),
        (lambda: cr.LayerBudget(0, 4, cr.Exactly(1), cr.AtMost(2)), ValueError, "layers=0"),
        (lambda: cr.LayerBudget(2, 4, 3, cr.AtMost(2)), TypeError, "per_layer=3"),
        (lambda: cr.compile(cr.LayerBudget(2, 4, cr.Exactly(1), cr.AtMost(2)), 9), ValueError, "compile it with n=8"),
    ],
)
def test_bad_arguments_are_named(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_contradictions_name_the_smallest_part():
    with pytest.raises(cr.InfeasibleError, match=r"^Exactly\(3\) and AtMost\(2\) contradict each other"):
        cr.compile(cr.Exactly(3) & cr.AtMost(2) & Parity(), 8)
    some = cr.Exactly(2).over([0, 1]) & cr.AtLeast(1) & cr.Exactly(0).over([1, 2])
    with pytest.raises(cr.InfeasibleError) as caught:
        cr.compile(some, 8)
    assert str(caught.value).startswith("Exactly(2).over([0, 1]) and Exactly(0).over([1, 2]) contradict each other")
    with pytest.raises(cr.InfeasibleError, match="no alternative is possible"):
        cr.compile((cr.Exactly(9) & Parity()) | cr.Exactly(10), 8)


def test_the_costliest_part_is_named():
    costs = cr.Cost([3**i for i in range(20)], at_most=3**19 + 3**18 + 7)
    with pytest.raises(cr.CircuitTooLargeError, match=r"Cost\(.*\) costs most: lower its limit.*or raise max_nodes"):
        cr.compile(costs & cr.AtMost(3).over(range(10)), 20, max_nodes=400)


def test_a_merge_that_is_not_associative_is_refused():
    @dataclass(frozen=True)
    class Minus(cr.Constraint):
        def leaf(self, var):
            return 0, 1

        def merge(self, left, right):
            return (left - right) % 5

        def accepts(self, state):
            return state == 1

    with pytest.raises(ValueError, match=r"Minus.*merge is not associative"):
        cr.compile(Minus(), 8)
    assert cr.compile(Parity(), 64).model_count() == 2**63


@pytest.mark.parametrize(
    "use",
    [
        lambda: cr.ActiveGroups(cr.Groups(8), at_most=4) and cr.Exactly(8),
        lambda: cr.Exactly(2) or cr.Exactly(3),
        lambda: not cr.Exactly(2),
        lambda: bool(cr.Exactly(1) & cr.AtMost(2)),
    ],
)
def test_constraints_have_no_truth_value(use):
    """``a and b`` would silently be ``b``."""
    with pytest.raises(TypeError, match=r"has no truth value: combine constraints with & \| ~"):
        use()


def test_a_lower_limit_of_0_is_a_bound_like_any_other():
    anything = cr.Cost([1, 2, 3], at_least=0)
    assert cr.compile(anything, 3).model_count() == 8
    assert anything == eval(repr(anything), {"Cost": cr.Cost})
