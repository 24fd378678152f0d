"""Logits for given marginals, against enumeration: values, implicit derivatives, what is refused and why."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import circuitroute as cr
from circuitroute.inference.hull import fixed_directions
from circuitroute.statistics import newton

D = torch.float64
X = cr.variables(6)
CONSTRAINTS = {
    "exactly": (cr.Exactly(2), 6),
    "between": (cr.Between(1, 4), 6),
    "at most": (cr.AtMost(3), 6),
    "any": (cr.AtLeast(0), 6),
    "two counts": (cr.CountIn({1, 5}), 6),
    "all or none": (cr.CountIn({0, 6}), 6),
    "all, none or one": (cr.CountIn({0, 1, 6}), 6),
    "each group": (cr.EachGroup(cr.Groups(2), cr.Exactly(1)), 6),
    "active groups": (cr.ActiveGroups(cr.Groups(3), at_most=2) & cr.Exactly(3), 6),
    "active groups, all full": (cr.ActiveGroups(cr.Groups(3), at_most=2, at_least=2) & cr.Exactly(4), 6),
    "cost": (cr.Cost([1, 2, 3, 1, 2, 3], at_most=5), 6),
    "logic": (cr.Logic((X[0] >> X[1]) & ~(X[2] & X[3])), 6),
    "a constant": (cr.Logic(X[0] & (X[1] | X[2])), 6),
    "over some": (cr.Exactly(1).over([0, 2, 4]) & cr.AtMost(3), 6),
    "one of one": (cr.AtMost(1), 1),
}


def reachable(constraint, n, *batch, seed=0, scale=1.5):
    """Marginals that the constraint's distributions have."""
    logits = torch.randn(*batch, n, dtype=D, generator=torch.Generator().manual_seed(seed)) * scale
    return cr.compile(constraint, n)(logits).marginals


def enumerated(constraint, n, logits):
    """[..., N] the marginals of logits, from all subsets."""
    masks = ((torch.arange(1 << n)[:, None] >> torch.arange(n)) & 1).bool()
    masks = masks[cr.compile(constraint, n).satisfies(masks)]
    forced, forbidden = logits == math.inf, logits == -math.inf
    finite = torch.where(logits.isinf(), 0.0, logits)
    energy = finite @ masks.to(D).t()
    lost = (forced[..., None, :] & ~masks) | (forbidden[..., None, :] & masks)
    return energy.masked_fill(lost.any(-1), -math.inf).softmax(-1) @ masks.to(D)


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_marginals_are_met(name):
    constraint, n = CONSTRAINTS[name]
    target = reachable(constraint, n, 7)
    logits = cr.logits_for_marginals(target, constraint)
    assert logits.dtype == D
    assert (enumerated(constraint, n, logits) - target).abs().max() <= 1e-10
    # The truth of the solver's own engine, and a circuit in the constraint's place.
    circuit = cr.compile(constraint, n).with_engine("naive")
    assert (circuit(logits).marginals - target).abs().max() <= 1e-10
    assert torch.allclose(cr.logits_for_marginals(target, circuit), logits, atol=1e-8)


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_logits_have_no_part_along_what_is_fixed(name):
    constraint, n = CONSTRAINTS[name]
    logits = cr.logits_for_marginals(reachable(constraint, n, 3), constraint)
    basis, _ = fixed_directions(cr.compile(constraint, n), torch.zeros(n, dtype=D))
    finite = torch.where(logits.isinf(), 0.0, logits)
    if not logits.isinf().any():
        assert (finite @ basis).abs().max() <= 1e-9 if basis.numel() else True
    # So logits of the smallest norm come back as they were.
    own = torch.randn(3, n, dtype=D, generator=torch.Generator().manual_seed(3))
    own = own - (own @ basis) @ basis.t()
    found = cr.logits_for_marginals(cr.compile(constraint, n)(own).marginals, constraint)
    same = found.isfinite()
    assert torch.allclose(found[same], own[same], atol=1e-8)


def test_the_entropy_is_the_largest():
    """Any distribution with the same marginals has less: here one that is mixed of two."""
    constraint, n = cr.Exactly(2), 5
    circuit = cr.compile(constraint, n)
    parts = circuit(torch.randn(2, n, dtype=D, generator=torch.Generator().manual_seed(1)) * 2)
    target = parts.marginals.mean(0)
    best = circuit(cr.logits_for_marginals(target, constraint))
    masks = best.enumerate_support()
    mixed = parts.log_prob(masks[:, None].expand(-1, 2, -1)).exp().mean(-1)
    assert (mixed @ masks - target).abs().max() < 1e-12
    assert best.entropy() > -(mixed * mixed.log()).sum() + 1e-3


SMALL = {"exactly of four": (cr.Exactly(2), 4), "each group of four": (cr.EachGroup(cr.Groups(2), cr.Exactly(1)), 4)}
LARGER = ["exactly", "between", "two counts", "each group", "active groups", "logic", "cost"]


@pytest.mark.parametrize("name", [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGER)])
def test_derivatives_are_those_of_the_implicit_function(name):
    constraint, n = {**CONSTRAINTS, **SMALL}[name]
    target = reachable(constraint, n, 2 - (name in SMALL))
    basis, _ = fixed_directions(cr.compile(constraint, n), torch.zeros(n, dtype=D))
    tangent = torch.eye(n, dtype=D) - basis @ basis.t()
    moves = torch.zeros_like(target).requires_grad_()

    def logits(moves):
        return cr.logits_for_marginals(target + moves @ tangent, constraint)

    assert torch.autograd.gradcheck(logits, (moves,))
    assert torch.autograd.gradgradcheck(logits, (moves,), fast_mode=name in SMALL)


def test_the_gradient_is_the_pseudo_inverse_of_the_covariance():
    constraint, n = cr.Exactly(3), 6
    target = reachable(constraint, n).requires_grad_()
    logits = cr.logits_for_marginals(target, constraint)
    rows = [torch.autograd.grad(logits[i], target, retain_graph=True)[0] for i in range(n)]
    covariance = cr.compile(constraint, n)(logits.detach()).covariance_matrix
    assert torch.allclose(torch.stack(rows), torch.linalg.pinv(covariance, rtol=1e-10, hermitian=True), atol=1e-9)


def test_gradients_are_zero_at_the_ends_and_flow_beside_them():
    target = torch.tensor([1.0, 0.0, 0.25, 0.35, 0.4], dtype=D, requires_grad=True)
    logits = cr.logits_for_marginals(target, cr.Exactly(2))
    assert logits[:2].tolist() == [math.inf, -math.inf]
    (gradient,) = torch.autograd.grad(logits[2:].square().sum(), target)
    assert gradient[:2].tolist() == [0, 0]
    assert gradient[2:].abs().min() > 0
    alone = target.detach()[2:].requires_grad_()
    (expected,) = torch.autograd.grad(cr.logits_for_marginals(alone, cr.Exactly(1)).square().sum(), alone)
    assert torch.allclose(gradient[2:], expected, atol=1e-10)


@pytest.mark.parametrize("k", [0, 4])
def test_none_and_all(k):
    target = torch.full((2, 4), float(k > 0), dtype=D)
    logits = cr.logits_for_marginals(target, cr.Exactly(k))
    assert bool((logits == (math.inf if k else -math.inf)).all())
    assert cr.compile(cr.Exactly(k), 4)(logits).marginals.equal(target)
    near = target + (-1e-10 if k else 1e-10)  # rounding: no choice is left, and the logit does nothing
    assert cr.logits_for_marginals(near, cr.Exactly(k)).tolist() == [[0.0] * 4] * 2


@pytest.mark.parametrize("k", [1, 3, 7])
def test_equal_targets_have_equal_logits(k):
    logits = cr.logits_for_marginals(torch.full((8,), k / 8, dtype=D), cr.Exactly(k))
    assert logits.abs().max() < 1e-12


def test_closed_form_of_one_variable():
    """One of N: logits are the logarithms of the targets; any subset: their log-odds."""
    target = torch.tensor([0.1, 0.2, 0.7], dtype=D)
    logits = cr.logits_for_marginals(target, cr.Exactly(1))
    assert torch.allclose(logits, target.log() - target.log().mean(), atol=1e-12)
    assert torch.allclose(cr.logits_for_marginals(target, cr.AtLeast(0)), target.logit(), atol=1e-12)


@pytest.mark.parametrize("name", ["exactly", "between", "active groups", "logic"])
def test_shapes(name):
    constraint, n = CONSTRAINTS[name]
    for batch in ((), (1,), (0,), (2, 3), (2, 0, 3)):
        target = reachable(constraint, n, *batch).requires_grad_()
        logits = cr.logits_for_marginals(target, constraint)
        assert logits.shape == target.shape
        assert torch.autograd.grad(logits.sum(), target)[0].shape == target.shape
    wide = reachable(constraint, n, 2, 3)
    flat = cr.logits_for_marginals(wide.reshape(6, n), constraint)
    assert torch.allclose(cr.logits_for_marginals(wide, constraint).reshape(6, n), flat, atol=1e-9)
    turned = wide.transpose(0, 1)  # not contiguous
    assert torch.allclose(cr.logits_for_marginals(turned, constraint).transpose(0, 1).reshape(6, n), flat, atol=1e-9)


def test_rows_with_different_evidence():
    target = torch.tensor([[1, 0, 0.5, 0.5], [0, 1, 0.75, 0.25], [0.5, 0.5, 0.5, 0.5]], dtype=D)
    for constraint in (cr.Exactly(2), cr.EachGroup(cr.Groups(2), cr.Exactly(1))):
        logits = cr.logits_for_marginals(target, constraint)
        assert logits[:2, :2].tolist() == [[math.inf, -math.inf], [-math.inf, math.inf]]
        assert (cr.compile(constraint, 4)(logits).marginals - target).abs().max() < 1e-10


@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_lower_precisions_are_float32(dtype, off):
    target = reachable(cr.Exactly(3), 8, 5).to(dtype).requires_grad_()
    logits = cr.logits_for_marginals(target, cr.Exactly(3))
    assert logits.dtype == torch.float32
    assert (cr.compile(cr.Exactly(3), 8)(logits).marginals - target.float()).abs().max() < off
    (gradient,) = torch.autograd.grad(logits.square().sum(), target)
    assert gradient.dtype == dtype


@pytest.mark.parametrize("small", [1e-6, 1e-12])
def test_extreme_targets(small):
    target = torch.tensor([small, 1 - small, 2 * small, 1 - 2 * small, 0.5, 0.5], dtype=D)
    for constraint in (cr.Exactly(3), cr.Between(1, 5), cr.Exactly(3) & cr.AtMost(1).over([0, 2])):
        logits = cr.logits_for_marginals(target, constraint)
        found = enumerated(constraint, 6, logits)
        assert (found - target).abs().max() < 1e-12
        assert abs(float(found[0]) / small - 1) < 1e-3  # 1 - small has no more digits of it


def test_a_target_next_to_what_is_fixed_alone():
    """Two variables of which one is nearly certain: the start is far from the solution."""
    target = torch.tensor([1e-12, 1 - 1e-12], dtype=D)
    logits = cr.logits_for_marginals(target, cr.Exactly(1))
    assert abs(float(logits[0] - logits[1]) + math.log(1e12)) < 1e-3


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted(CONSTRAINTS)),
    st.floats(0.1, 5.0),
    st.integers(0, 10_000),
)
def test_what_a_distribution_has_is_reached(name, scale, seed):
    constraint, n = CONSTRAINTS[name]
    target = reachable(constraint, n, 2, seed=seed, scale=scale).clamp(0, 1)
    logits = cr.logits_for_marginals(target, constraint)
    assert (cr.compile(constraint, n)(logits).marginals - target).abs().max() <= 1e-10


@pytest.mark.slow
def test_large_designs():
    """A population of 10,000 with a sample of 1,000."""
    sizes = torch.rand(10_000, dtype=D, generator=torch.Generator().manual_seed(0)) + 0.05
    target = sizes * 1000 / sizes.sum()
    logits = cr.logits_for_marginals(target, cr.Exactly(1000))
    assert (cr.compile(cr.Exactly(1000), 10_000)(logits).marginals - target).abs().max() <= 1e-10


# ---------------------------------------------------------------------------------------------- what is refused

REFUSED = {
    "the sum": ([[0.5, 0.5, 0.5], [0.6, 0.2, 0.2], [0.9, 0.5, 0.5]], cr.Exactly(1), r"rows 0, 2 sum to 1.5.*has 1 "),
    "above 1": ([[0.5, 0.5], [-0.5, 1.5]], cr.Exactly(1), r"hold -0.5 in row 1: inclusion probabilities"),
    "NaN": ([[0.5, 0.5], [math.nan, 0.5]], cr.Exactly(1), r"NaN in row 1"),
    "infinite": ([[0.5, math.inf]], cr.Exactly(1), r"hold inf in row 0"),
    "below a range": ([0.1, 0.1, 0.1], cr.Between(1, 2), r"the only row sum to 0.3.*strictly between 1 and 2"),
    "at its end": ([0.5, 0.5, 0.0], cr.Between(1, 2), r"sum to 1: that must lie strictly between 1 and 2"),
    "evidence": ([[1, 1, 0.0]], cr.Exactly(1), r"row 0: no subset that Exactly\(1\) allows has all"),
    "evidence of logic": ([[1, 1.0]], cr.Logic(~(X[0] & X[1])), r"row 0: no subset"),
    "no choice": ([1, 0.5, 0.0], cr.Exactly(1), r"sum to 1.5"),
    "no choice by itself": ([0.5, 0.5], cr.Exactly(2), r"sum to 1: every subset .* has 2"),
    "a constant": ([0.5, 0.5], cr.Logic(X[0] & (X[1] | ~X[1])), r"variable 0 no choice: it is always 1"),
    "a group": ([0.5, 0.6, 0.5, 0.5], cr.EachGroup(cr.Groups(2), cr.Exactly(1)), r"variables \[0, 1\] sum to 1.1,"),
    "tied": ([0.5, 0.6, 0.5], cr.CountIn({0, 3}), r"marginals\[0\] \+ -1 marginals\[1\]|-1 marginals"),
    "outside": ([0.6, 0.6], cr.Logic(~(X[0] & X[1])), r"the logits grow without end.*outside of, or on the boundary"),
    "boundary": ([0.5, 0.5], cr.Logic(~(X[0] & X[1])), r"the logits grow without end.*outside of, or on the boundary"),
    "outside of counts": ([0.9, 0.9, 0.1, 0.1], cr.CountIn({1, 3}), r"the logits grow without end"),
    "too many groups": (
        [0.9, 0.9, 0.1, 0.1, 0.9, 0.1, 0.1, 0.2],
        cr.AtMost(4) & cr.ActiveGroups(cr.Groups(4), at_most=2),
        r"the only row: the logits grow without end",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    values, constraint, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        cr.logits_for_marginals(torch.tensor(values, dtype=D), constraint)


def test_rows_of_batches_are_named():
    target = torch.full((2, 3, 4), 0.5, dtype=D)
    target[1, 2] = 0.25
    with pytest.raises(ValueError, match=r"row \(1, 2\) sum to 1"):
        cr.logits_for_marginals(target, cr.Exactly(2))
    with pytest.raises(ValueError, match=r"rows .* and 4 more"):
        cr.logits_for_marginals(torch.full((12, 4), 0.3, dtype=D), cr.Exactly(2))


def test_rounding_is_taken_off():
    target = torch.tensor([0.5, 0.25, 0.25], dtype=D)
    logits = cr.logits_for_marginals(target, cr.Exactly(1))
    assert torch.allclose(cr.logits_for_marginals(target * (1 + 5e-10), cr.Exactly(1)), logits, atol=1e-8)
    with pytest.raises(ValueError, match="tolerance 1e-09"):
        cr.logits_for_marginals(target * (1 + 1e-8), cr.Exactly(1))
    cr.logits_for_marginals((target * (1 + 5e-6)).float(), cr.Exactly(1))
    with pytest.raises(ValueError, match="tolerance 1e-05"):
        cr.logits_for_marginals((target * (1 + 1e-4)).float(), cr.Exactly(1))


@pytest.mark.parametrize("given", [[0.5, 0.5], None, torch.tensor([1, 0]), torch.tensor([0.5 + 0j, 0.5])])
def test_other_types_are_refused(given):
    with pytest.raises(TypeError, match="marginals"):
        cr.logits_for_marginals(given, cr.Exactly(1))


def test_shapes_and_constraints_that_do_not_fit():
    with pytest.raises(ValueError, match="last dimension must hold the N variables"):
        cr.logits_for_marginals(torch.tensor(0.5), cr.Exactly(1))
    with pytest.raises(ValueError, match="last dimension must hold the N variables"):
        cr.logits_for_marginals(torch.zeros(3, 0), cr.Exactly(1))
    with pytest.raises(ValueError, match=r"last dimension must be that of .*n=3"):
        cr.logits_for_marginals(torch.full((4,), 0.25), cr.compile(cr.Exactly(1), 3))
    with pytest.raises(cr.InfeasibleError):
        cr.logits_for_marginals(torch.full((4,), 0.25), cr.Exactly(5))
    with pytest.raises(TypeError, match="constraint"):
        cr.logits_for_marginals(torch.full((4,), 0.25), 1)


def test_transforms_are_refused_by_name():
    target = torch.full((2, 4), 0.25)
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.vmap(lambda t: cr.logits_for_marginals(t, cr.Exactly(1)))(target)
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        cr.logits_for_marginals(target.to("meta"), cr.Exactly(1))


def test_modes_of_torch():
    target = reachable(cr.Exactly(2), 5, 2)
    expected = cr.logits_for_marginals(target, cr.Exactly(2))
    with torch.no_grad():
        assert torch.allclose(cr.logits_for_marginals(target, cr.Exactly(2)), expected)
    with torch.inference_mode():
        assert torch.allclose(cr.logits_for_marginals(target.clone(), cr.Exactly(2)), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.allclose(cr.logits_for_marginals(target, cr.Exactly(2)), expected)
    circuit = pickle.loads(pickle.dumps(copy.deepcopy(cr.compile(cr.Exactly(2), 5))))
    assert torch.allclose(cr.logits_for_marginals(target, circuit), expected)


def test_conjugate_gradients_and_matrices_agree(monkeypatch):
    """Small circuits are solved by matrices; forced onto products, they give the same."""
    for name in ("each group", "active groups", "logic", "cost", "all or none"):
        constraint, n = CONSTRAINTS[name]
        target = reachable(constraint, n, 4)
        by_matrix = cr.logits_for_marginals(target, constraint)
        with monkeypatch.context() as patch:
            patch.setattr(newton, "DENSE", 0)
            assert torch.allclose(cr.logits_for_marginals(target, constraint), by_matrix, atol=1e-7)


def test_a_count_constraint_takes_few_products(monkeypatch):
    """The preconditioner is the covariance, nearly: Hajek's approximation."""
    products = []
    solved = newton._operators

    def counted(targets, theta):
        product, preconditioned = solved(targets, theta)
        return lambda u: products.append(1) or product(u), preconditioned

    monkeypatch.setattr(newton, "_operators", counted)
    sizes = torch.rand(200, dtype=D, generator=torch.Generator().manual_seed(0)) + 0.05
    cr.logits_for_marginals(sizes * 40 / sizes.sum(), cr.Exactly(40))
    assert 0 < len(products) <= 12
