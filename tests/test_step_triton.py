"""The engine ``triton``'s routing step against its definition, composed in float64 of the naive engine's moments.

On a GPU where there is one, else under Triton's interpreter, as in ``test_engines_triton.py``. Every case holds rows
of all scales, ties, evidence, rows with NaN and rows that nothing satisfies, so there are few cases.

Legend: T tokens, N experts, K the largest allowed count, J = K + 1, S slots.
"""

import math

import pytest
import torch

import circuitroute as cr
from circuitroute.engines.step import MAX_RELATIVE_LOGIT, SHARE, Inputs, Rule, Stepper, Upstream
from circuitroute.engines.subset import NaiveSubset, TritonSubset
from circuitroute.engines.subset.mode import mode
from circuitroute.engines.subset.triton import engine as fused
from circuitroute.keys import fold_in, uniform
from circuitroute.routing.decision import chosen_first
from circuitroute.routing.weights import expert_softmax

pytest.importorskip("triton", minversion="3.3")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INF = math.inf


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """The interpreter charges by program."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(fused, "WARPS", 64)


def logits_of(n, seed=0):
    """[T, n]: small, large, tied, forced, excluded, all equal, with NaN."""
    g = torch.Generator().manual_seed(seed + n)
    x = torch.randn(24, n, generator=g) * torch.tensor([0.3, 1.0, 3.0, 30.0]).repeat(6)[:, None]
    x[4:8] = x[4:8].round()
    x[8] = 0.0
    x[9, ::2], x[9, 1::2] = 0.0, -0.0
    x[10, 0], x[11, -1] = INF, -INF
    x[12, 0], x[12, -1] = -INF, INF
    x[13, 1] = math.nan
    x[14] = INF  # more than K are forced
    x[15] = -INF
    x[16] += 50
    return x


def potential_of(constraint, n, tokens=None, seed=1):
    """[J], or [T, J] with a number for every allowed count."""
    counts = cr.compile(constraint, n).counts
    phi = torch.full((max(counts) + 1,), -INF)
    phi[list(counts)] = 0.0
    if tokens is None:
        return phi
    return phi + 2 * torch.randn(tokens, len(phi), generator=torch.Generator().manual_seed(seed))


def keys_of(tokens):
    return cr.random_key(3, torch.arange(tokens))


class Composed:
    """A step by its definition: every result a function of float64 leaves."""

    def __init__(self, inputs, rule):
        theta, choice, t, phi, key, _ = inputs
        self.invalid = theta.isnan().any(-1) | choice.isnan().any(-1) | phi.isnan().any(-1)
        clean = torch.where(self.invalid[:, None], 0.0, choice.float())
        theta = torch.where(self.invalid[:, None], 0.0, theta.float())
        temperature = t[:, None].float() if isinstance(t, torch.Tensor) else t
        x = clean / temperature
        self.invalid |= NaiveSubset().infer(x, phi).log_partition.isnan()
        self.mask = self._decide(clean, x, phi, key, rule.share) & ~self.invalid[:, None]
        self.leaves = [v.double().requires_grad_() for v in (theta, clean, phi.expand(len(x), -1).nan_to_num(0.0, INF))]
        theta, clean, phi = self.leaves
        safe = torch.where(self.invalid[:, None], 0.0, clean)
        tempered = torch.where(safe.isinf(), safe.detach(), torch.where(safe.isinf(), 0.0, safe) / temperature)
        log_z, m, q = NaiveSubset().moments(tempered, phi)
        z = self.mask.double()
        scored = (torch.where(self.mask & tempered.isfinite(), tempered, 0.0)).sum(-1)
        phi_z = phi.gather(-1, self.mask.sum(-1, keepdim=True)).squeeze(-1)
        g = z + (m - m.detach() if rule.simple else 0.0)
        self.results = {
            "marginals": m,
            "log_partition": log_z,
            "log_prob": torch.where(self.invalid, 0.0, phi_z) + scored - log_z,
            "count_probs": q,
            "gates": self._gates(g, theta, m, rule.combine),
        }
        self.indices = chosen_first(self.mask, theta.detach(), max(1, phi.shape[-1] - 1))
        used = self.mask.gather(-1, self.indices)
        self.results["weights"] = torch.where(used, self.results["gates"].gather(-1, self.indices), 0.0)

    @staticmethod
    def _decide(choice, x, phi, key, share):
        best = mode(choice, phi)
        if share == 0:
            return best
        drawn = NaiveSubset().sample(x, phi, key)
        sampled = uniform(fold_in(key, key.new_tensor(SHARE)), 0, 1, torch.float64)[0] < share
        return torch.where(sampled[:, None], drawn, best)

    def _gates(self, g, theta, m, combine):
        if combine == "softmax":
            return g * expert_softmax(theta)
        if combine == "sigmoid":
            return g * torch.sigmoid(theta)
        if combine == "marginal":
            return g * m
        finite = theta.clamp(max=torch.finfo(torch.float32).max)
        top = torch.where(self.mask, finite, -INF).amax(-1, keepdim=True).detach()
        e = (finite - torch.where(top.isinf(), 0.0, top)).clamp(max=MAX_RELATIVE_LOGIT).exp()
        total = (g * e).sum(-1, keepdim=True)
        return g * e / torch.where(total > 0, total, 1.0)

    def gradients(self, upstream):
        """By theta, choice and potential; 0 in invalid rows and at infinite logits."""
        inner = 0.0
        for name, slope in upstream._asdict().items():
            if slope is not None:
                valid = ~self.invalid.reshape(-1, *[1] * (slope.dim() - 1))
                kept = torch.where(valid, self.results[name], 0.0)
                inner = inner + (kept * slope.double()).sum()
        grads = torch.autograd.grad(inner, self.leaves, allow_unused=True)
        out = []
        for leaf, grad in zip(self.leaves, grads, strict=True):
            grad = torch.zeros_like(leaf) if grad is None else grad
            out.append(torch.where(self.invalid[:, None] | leaf.isinf(), 0.0, grad))
        return out


def upstream_of(step, names, seed=5):
    T, N = step.mask.shape
    shapes = {"weights": step.weights.shape, "gates": (T, N), "marginals": (T, N)}
    shapes |= {"log_partition": (T,), "log_prob": (T,), "count_probs": step.count_probs.shape}
    g = torch.Generator().manual_seed(seed)
    return Upstream(**{name: torch.randn(shapes[name], generator=g) for name in names})


def on_device(values):
    moved = [v.to(DEVICE) if isinstance(v, torch.Tensor) else v for v in values]
    if values[0] is values[1]:
        moved[1] = moved[0]
    return type(values)(*moved)


def hold(inputs, rule, names=("weights", "log_prob"), bound=1e-6):
    """A step, its marginals and its gradients against the definition; returns the step."""
    one = bool((inputs.potential[..., :-1] == -math.inf).all())  # as circuits know
    engine, given = TritonSubset(exact=one), on_device(inputs)
    assert isinstance(engine, Stepper)
    assert engine.steps(given)
    truth, step = Composed(inputs, rule), engine.step(given, rule, True)
    marginals = torch.empty(inputs.logits.shape, device=DEVICE)
    engine.step_marginals(given, step, marginals)
    assert torch.equal(step.invalid.cpu(), truth.invalid)
    assert torch.equal(step.mask.cpu(), truth.mask)
    valid = ~truth.invalid
    assert torch.equal(step.indices.cpu()[valid], truth.indices[valid])
    assert not step.weights[step.invalid].any()
    near(step.weights[step.invalid.logical_not()], truth.results["weights"][valid], bound)
    moments = {"log_partition": step.log_partition, "log_prob": step.log_prob, "count_probs": step.count_probs}
    for name, found in {**moments, "marginals": marginals}.items():
        assert found[step.invalid].isnan().all(), name
        expected = truth.results[name][valid]
        near(found.cpu()[valid] / expected.detach().abs().clamp(min=1), expected / expected.detach().abs().clamp(min=1),
             2 * bound)  # fmt: skip
    upstream = upstream_of(step, names)
    slopes = engine.step_gradient(given, rule, step, on_device(upstream))
    by_theta, by_choice, by_potential = truth.gradients(upstream)
    if inputs.choice is inputs.logits:
        assert slopes.choice is None
        by_theta = by_theta + by_choice
    else:
        near(slopes.choice, by_choice, 1e-5)
    near(slopes.logits, by_theta, 1e-5)
    near(slopes.potential, by_potential, 1e-5)
    return step


def near(found, expected, bound):
    torch.testing.assert_close(found.detach().cpu().double(), expected.detach().double(), atol=bound, rtol=0)


# ---------------------------------------------------------------------------------------------- all at once


ALL = ("weights", "gates", "marginals", "log_partition", "log_prob", "count_probs")
MOVED = torch.randn(24, 7, generator=torch.Generator().manual_seed(8)) * 0.7
WARMTH = torch.linspace(0.4, 3.0, 24)


@pytest.mark.parametrize(
    ("constraint", "rule", "moved", "temperature", "per_token", "names"),
    [
        (cr.Exactly(3), Rule("softmax", 1.0, True), False, 1.0, False, ("weights", "log_prob")),
        (cr.Between(1, 4), Rule("normalized", 0.5, True), True, 0.7, True, ALL),
        (cr.AtMost(2), Rule("sigmoid", 0.0, True), False, WARMTH, False, ("gates", "count_probs")),
        (cr.CountIn({1, 4}), Rule("marginal", 1.0, True), True, 1.0, True, ("weights", "marginals")),
        (cr.Between(2, 5), Rule("marginal", 0.0, False), False, 2.0, True, ("weights", "log_partition")),
        (cr.Between(0, 7), Rule("softmax", 0.3, True), True, WARMTH, False, ("weights",)),
        (cr.Exactly(4), Rule("normalized", 0.0, False), True, 1.0, False, ("weights", "log_prob")),
    ],
    ids=lambda value: value.combine if isinstance(value, Rule) else "",
)
def test_a_step_by_its_definition(constraint, rule, moved, temperature, per_token, names):
    theta = logits_of(7)
    choice = theta + MOVED if moved else theta
    phi = potential_of(constraint, 7, 24 if per_token else None)
    if per_token:
        phi[3, 1] = math.nan
    hold(Inputs(theta, choice, temperature, phi, keys_of(24)), rule, names)


def test_only_weights_that_no_gradient_crosses():
    """The decision's logits get nothing, and no sweep is made."""
    theta = logits_of(7)
    inputs = Inputs(theta, theta.clone(), 1.0, potential_of(cr.Exactly(2), 7), keys_of(24))
    hold(inputs, Rule("softmax", 1.0, False), ("weights",))


@pytest.mark.parametrize(("combine", "share", "apart"), [("softmax", 0.5, True), ("marginal", 0.0, False)])
def test_rows_that_float32_loses_are_weighed_in_float64(combine, share, apart):
    """Counts 0 and n weigh about the same, and no shift shows float32 both."""
    theta = torch.tensor([[90.0, 60.0, -70.0, -80.5], [0.3, -0.2, 1.0, 0.0]]).repeat(2, 1)
    choice = theta.clone() if apart else theta
    inputs = Inputs(theta, choice, 1.25, potential_of(cr.CountIn({0, 4}), 4), keys_of(4))
    step = hold(inputs, Rule(combine, share, True), ALL)
    assert step.fallback.tolist() == [True, False] * 2


# ---------------------------------------------------------------------------------------------- shapes and dtypes


@pytest.mark.parametrize(
    ("n", "constraint", "tokens"),
    [(1, cr.AtMost(1), 1), (5, cr.Exactly(0), 3), (6, cr.Exactly(6), 1), (70, cr.Exactly(8), 3)],
)
def test_sizes(n, constraint, tokens):
    theta = torch.randn(tokens, n, generator=torch.Generator().manual_seed(n))
    hold(Inputs(theta, theta, 1.0, potential_of(constraint, n), keys_of(tokens)), Rule("softmax", 1.0, True))


def test_the_top_k_is_found_without_a_sweep():
    theta, phi = logits_of(7), potential_of(cr.Between(1, 4), 7)
    given, rule = on_device(Inputs(theta, theta, 1.0, phi, None)), Rule("normalized", 0.0, True)
    alone, whole = TritonSubset().step(given, rule, False), TritonSubset().step(given, rule, True)
    for name in ("weights", "indices", "mask", "invalid"):
        assert torch.equal(getattr(alone, name), getattr(whole, name)), name
    assert alone.shift is alone.log_prob is alone.count_probs is None


def test_half_precision_logits_are_read_as_they_are():
    dtype, rule = torch.bfloat16, Rule("softmax", 0.0, True)
    theta = logits_of(4).to(dtype)
    given = on_device(Inputs(theta, theta, 1.0, potential_of(cr.Exactly(2), 4), None))
    wide = theta.float().to(DEVICE)
    found, expected = (TritonSubset().step(i, rule, True) for i in (given, given._replace(logits=wide, choice=wide)))
    assert torch.equal(found.weights, expected.weights)
    assert torch.equal(found.mask, expected.mask)
    slopes = TritonSubset().step_gradient(given, rule, found, on_device(upstream_of(found, ("weights",))))
    assert slopes.logits.dtype == dtype


def test_no_rows_and_rows_for_others():
    phi = potential_of(cr.Exactly(2), 5).to(DEVICE)
    none = torch.zeros(0, 5, device=DEVICE)
    inputs = Inputs(none, none, 1.0, phi, keys_of(0).to(DEVICE))
    step = TritonSubset().step(inputs, Rule("softmax", 1.0, True), True)
    assert step.weights.shape == (0, 2)
    slopes = TritonSubset().step_gradient(inputs, Rule("softmax", 1.0, True), step, Upstream(weights=step.weights))
    assert slopes.logits.shape == (0, 5)
    double = torch.zeros(2, 5, dtype=torch.float64, device=DEVICE)
    assert not TritonSubset().steps(Inputs(double, double, 1.0, phi.double(), None))
    many = torch.zeros(2, 40, device=DEVICE)
    assert not TritonSubset().steps(Inputs(many, many, 1.0, torch.zeros(21, device=DEVICE), None))


def test_steps_that_cannot_be_taken_are_refused():
    phi, theta = potential_of(cr.Exactly(2), 5).to(DEVICE), torch.zeros(3, 5, device=DEVICE)
    inputs, sampled, mode = Inputs(theta, theta, 1.0, phi, None), Rule("softmax", 0.5, True), Rule("softmax", 0.0, True)
    with pytest.raises(ValueError, match=r"share=0\.5: sampled tokens need keys, and key is None"):
        TritonSubset().step(inputs, sampled, True)
    step = TritonSubset().step(inputs, mode, False)
    for asked in (
        lambda: TritonSubset().step_marginals(inputs, step, torch.empty_like(theta)),
        lambda: TritonSubset().step_gradient(inputs, mode, step, Upstream(log_prob=torch.ones(3, device=DEVICE))),
    ):
        with pytest.raises(ValueError, match=r"step: only a step with moments, of this engine, has marginals"):
            asked()


def test_shares_split_tokens_to_the_last_bit():
    """A share that is exactly one token's uniform leaves that token out; the next larger number takes it in."""
    theta, phi, keys = torch.zeros(24, 7), potential_of(cr.Exactly(3), 7), keys_of(24)
    drawn = uniform(fold_in(keys, keys.new_tensor(SHARE)), 0, 1, torch.float64)[0]
    for share in (drawn[5].item(), math.nextafter(drawn[5].item(), 1.0)):
        inputs = Inputs(theta, theta, 1.0, phi, keys)
        step = TritonSubset().step(on_device(inputs), Rule("softmax", share, True), True)
        assert torch.equal(step.mask.cpu(), Composed(inputs, Rule("softmax", share, True)).mask)
