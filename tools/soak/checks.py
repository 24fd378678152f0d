"""What is checked of a case: every output of a distribution, its gradients and theirs, samples and modes.

Tolerances, as differences relative to 1 + |truth|; upstream gradients are standard normal:

==================  =======  =======
what                float32  float64
==================  =======  =======
values                 1e-5     1e-9
gradients              5e-5     1e-8
second derivatives     5e-4     1e-7
==================  =======  =======

Entropies (and their gradients) and log-probabilities are relative to a tenth of the sum of all |logits|, if that is
more than 1: composed circuits find them as differences of such numbers. Gradients of half-precision leaves are rounded
to their dtype once more. What is equal by promise is compared to the bit: samples and modes between engines, batches,
processes and after storage.

Legend: T rows, N variables, C = N + 1 counts.
"""

from __future__ import annotations

import hashlib
import math
import pickle
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import circuitroute as cr
from tools.soak.cases import ENGINES, Case, engines_of
from tools.soak.rules import Rule
from tools.soak.truth import ENUMERATED, Truth, derivative, worlds

VALUES = {torch.float32: 1e-5, torch.float64: 1e-9}
GRADIENTS = {torch.float32: 5e-5, torch.float64: 1e-8}
SECOND = {torch.float32: 5e-4, torch.float64: 1e-7}


class Fault(Exception):  # noqa: N818 - what is looked for, not an error of this program
    """Something is not as it should be; says which output, and how far off."""


class Run:
    """A case on its circuit: what was covered, and everything that was seen, for comparison with other processes."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.covered: list[str] = []
        self.digest = hashlib.sha256()
        self.tensor = torch.float64 if case.dtype == torch.float64 else torch.float32

    def saw(self, *outputs: Tensor) -> None:
        """Remember values to the bit."""
        for output in outputs:
            self.digest.update(output.detach().double().contiguous().numpy().tobytes())

    def close(
        self, what: str, found: Tensor, true: Tensor, bounds: dict[torch.dtype, float], rounded: float = 0
    ) -> None:
        """Require values to be those of the truth, NaN where it is NaN."""
        self.covered.append(what)
        if found.shape != true.shape:
            raise Fault(f"{what} has shape {tuple(found.shape)}: expected {tuple(true.shape)}")
        found, true = found.detach().double(), true.detach().double()
        bound = bounds[self.tensor] + rounded
        wrong = ~torch.isclose(found, true, rtol=bound, atol=bound, equal_nan=True)
        if bool(wrong.any()):
            at = wrong.nonzero()[0].tolist()
            raise Fault(
                f"{what}{at} is {float(found[tuple(at)])!r}: expected {float(true[tuple(at)])!r} within {bound}"
            )

    def equal(self, what: str, found: Tensor, other: Tensor) -> None:
        """Require two results to be the same to the bit."""
        self.covered.append(what)
        if found.shape != other.shape or not torch.equal(found.nan_to_num(nan=7.0), other.nan_to_num(nan=7.0)):
            raise Fault(f"{what}: {found.tolist()} and {other.tolist()}")


def circuit_of(rule: Rule) -> cr.Circuit | None:
    """Compiled; None where nothing is allowed, which the library must say, too."""
    possible = rule.n > ENUMERATED or bool(rule.allows(worlds(rule.n)).any())
    try:
        circuit = cr.compile(rule.constraint, rule.n)
    except cr.InfeasibleError:
        if not possible:
            return None
        raise
    if not possible:
        raise Fault("compiled, though no subset is allowed")
    if rule.n <= ENUMERATED and circuit.model_count() != int(rule.allows(worlds(rule.n)).sum()):
        raise Fault(f"model_count() is {circuit.model_count()}, expected {int(rule.allows(worlds(rule.n)).sum())}")
    return circuit


def check(run: Run, circuit: cr.Circuit) -> str:
    """All checks of a distribution; the engine that ran."""
    case = run.case
    by_engine = engines_of(circuit)
    names = [name for name in (*ENGINES[case.engine :], *ENGINES) if name in by_engine]
    chosen = by_engine[names[0]]
    potential = case.potential_for(chosen)
    try:
        distribution = chosen(case.logits, potential, validate_args=case.validate)
    except ValueError as error:
        _refused(run, chosen, error)
        return names[0]
    truth = truth_of(case, potential)
    _values(run, distribution, truth)
    _gradients(run, distribution, truth, potential)
    _samples(run, distribution, truth, by_engine, potential)
    _row_alone(run, chosen, distribution, truth, potential)
    _stored(run, chosen, potential)
    _conditioned(run, distribution, truth)
    return names[0]


def truth_of(case: Case, potential: Tensor | None) -> Truth:
    """The truth of a case's rows, flattened."""
    theta = case.logits.detach().double().reshape(-1, case.rule.n).requires_grad_()
    return Truth(case.rule, theta, None if potential is None else _as_phi(potential, len(theta), case.rule.n))


def _as_phi(potential: Tensor, rows: int, n: int) -> Tensor:
    """[T, C] float64, -inf past the end."""
    wide = potential.detach().double().reshape(-1, potential.shape[-1]).expand(rows, -1)
    phi = torch.full((rows, n + 1), -math.inf, dtype=torch.float64)
    phi[:, : wide.shape[-1]] = wide
    return phi.requires_grad_()


def _refused(run: Run, circuit: cr.Circuit, error: ValueError) -> None:
    """Only rows that are bad may be refused, and by name."""
    truth = truth_of(run.case, run.case.potential_for(circuit))
    truth.log_partition  # noqa: B018 - finds the rows that evidence leaves nothing
    if run.case.validate is False or not bool(truth.lost.any()):
        raise Fault(f"refused, though no row is bad: {error}") from error
    if "row" not in str(error):
        raise Fault(f"the error does not name the row: {error}") from error
    run.covered.append("refused")


def outputs_of(distribution: cr.SubsetDistribution, truth: Truth) -> Iterator[tuple[str, Tensor, Callable[[], Tensor]]]:
    """(name, found [T, ...], the truth of it)."""
    rows, n = truth.theta.shape
    J = distribution.circuit.max_count + 1
    yield "log_partition", distribution.log_partition.reshape(rows), lambda: truth.log_partition
    yield "marginals", distribution.marginals.reshape(rows, n), lambda: truth.marginals
    yield "entropy", distribution.entropy().reshape(rows), lambda: truth.entropy
    if n <= ENUMERATED or truth.phi is not None:
        yield "count_probs", distribution.count_probs.reshape(rows, J), lambda: truth.count_probs[:, :J]
    mask = distribution.mode_mask()
    yield "log_prob", distribution.log_prob(mask).reshape(rows), lambda: truth.log_prob(mask.reshape(rows, n))


def _values(run: Run, distribution: cr.SubsetDistribution, truth: Truth) -> None:
    truth.log_partition  # noqa: B018 - finds all lost rows
    for name, found, true in outputs_of(distribution, truth):
        if name == "log_prob" and distribution._validate_args is False and bool(truth.lost.any()):
            continue  # a lost row has no mode to ask for
        scale = truth.magnitude.div(10).clamp(min=1.0)
        if name in ("entropy", "log_prob"):  # differences of numbers as large as the logits
            run.close(name, found / scale, true() / scale, VALUES)
        else:
            run.close(name, found, true(), VALUES)
        run.saw(found)
    variance = distribution.variance.reshape(truth.theta.shape)
    run.close("variance", variance, truth.marginals * (1 - truth.marginals), VALUES)


def _gradients(run: Run, distribution: cr.SubsetDistribution, truth: Truth, potential: Tensor | None) -> None:
    """First and second derivatives of one output, along random directions."""
    if bool(truth.lost.any()):
        return  # their gradients are not promised; rows beside them are seen in _neighbours
    case, rng = run.case, run.case.rng
    outputs = list(outputs_of(distribution, truth))
    name, found, true = outputs[rng.integers(len(outputs))]
    upstream = torch.from_numpy(rng.normal(size=found.shape))
    if not found.requires_grad:  # a certain number
        found = found + 0.0 * case.leaf.to(found.dtype).nan_to_num().sum()
    leaves = [case.leaf] if potential is None else [case.leaf, potential]
    exact = [derivative(true, truth.theta, upstream)]
    if potential is not None and truth.phi is not None:
        exact.append(derivative(true, truth.phi, upstream))
    got = torch.autograd.grad((found * upstream.to(found)).sum(), leaves, create_graph=True, materialize_grads=True)
    eps = torch.finfo(case.dtype).eps if case.dtype.itemsize == 2 else 0.0
    folded = [as_leaf(exact[0], case.logits, case.leaf)]
    if potential is not None:
        folded.append(_as_potential(exact[1], potential))
    for which, ours, theirs in zip(("logits", "potential"), got, folded, strict=False):
        # The entropy's is Cov(z) theta.
        steep = max(1.0, float(truth.magnitude.amax()) / 10) if name == "entropy" and len(truth.theta) else 1.0
        run.close(f"gradient of {name} by {which}", ours / steep, theirs / steep, GRADIENTS, rounded=eps * 4)
        run.saw(ours)
    # Of the gradient by logits, along a second direction, by the logits once more.
    along = torch.from_numpy(rng.normal(size=case.leaf.shape))
    if not got[0].requires_grad:
        return
    (second,) = torch.autograd.grad((got[0] * along.to(got[0])).sum(), case.leaf, materialize_grads=True)
    shaped = _to_rows(along, case)
    twice = as_leaf(derivative(exact[0], truth.theta, shaped), case.logits, case.leaf)
    scale = max(1.0, float(twice.abs().max()) if twice.numel() else 1.0)
    run.close(f"second derivative of {name}", second / scale, twice / scale, SECOND, rounded=eps * 16)


def _to_rows(values: Tensor, case: Case) -> Tensor:
    """Values of the leaf's shape as [T, N], read as the logits read the leaf."""
    if case.layout == "strided":
        return values[:, ::2]
    if case.layout == "transposed":
        return values.t()
    if case.layout == "expanded":
        return values.expand(case.logits.shape)
    if case.layout == "more dimensions":
        return values.transpose(0, 1).reshape(-1, case.rule.n)
    return values.reshape(-1, case.rule.n)


def as_leaf(by_row: Tensor, logits: Tensor, leaf: Tensor) -> Tensor:
    """A gradient [T, N] by the logits as one by the leaf, as autograd would."""
    double = leaf.detach().double().requires_grad_()
    view = double.as_strided(logits.shape, logits.stride(), logits.storage_offset()) if logits is not leaf else double
    (found,) = torch.autograd.grad(view, double, by_row.detach().reshape(logits.shape))
    return found


def _as_potential(by_row: Tensor, potential: Tensor) -> Tensor:
    found = by_row.detach()[:, : potential.shape[-1]]
    return found.sum(0) if potential.dim() == 1 else found.reshape(potential.shape)


def _samples(
    run: Run,
    distribution: cr.SubsetDistribution,
    truth: Truth,
    by_engine: dict[str, cr.Circuit],
    potential: Tensor | None,
) -> None:
    case = run.case
    sample = distribution.sample(key=case.key)
    several = distribution.sample((3,), key=case.key)
    mode = distribution.mode
    run.saw(sample, several, mode)
    for name, other in by_engine.items():
        theirs = other(case.logits.detach(), potential, validate_args=case.validate)
        run.equal(f"sample of {name}", sample, theirs.sample(key=case.key))
        run.equal(f"mode of {name}", mode, theirs.mode)
    kept = ~truth.lost
    rows = [x.reshape(-1, case.rule.n) for x in (sample, *several, mode)]
    for name, found in zip(("sample", "sample", "sample", "sample", "mode"), rows, strict=True):
        if not bool(found[~kept].isnan().all()):
            raise Fault(f"{name} of a row without any subset is not NaN")
        chosen = found[kept] == 1
        if not bool(((found[kept] == 0) | chosen).all()):
            raise Fault(f"{name} holds other values than 0 and 1")
        allowed = Truth(case.rule, truth.theta[kept], None if truth.phi is None else truth.phi[kept])
        if bool(allowed.log_prob(chosen).isinf().any()):
            raise Fault(f"{name} is not allowed: {found.tolist()}")
    if case.rule.n <= ENUMERATED and len(truth.theta):
        best = truth.log_weights_of_all().amax(-1)[kept]
        got = truth.log_weights(torch.nan_to_num(rows[-1]) == 1)[kept]
        run.close("weight of the mode", got, best, {torch.float32: 1e-6, torch.float64: 1e-12})


def _row_alone(
    run: Run, circuit: cr.Circuit, distribution: cr.SubsetDistribution, truth: Truth, potential: Tensor | None
) -> None:
    """The last row, without those beside it."""
    case = run.case
    if len(truth.theta) > 1 and case.logits.dim() == 2 and (potential is None or potential.dim() == 1):
        alone = circuit(case.logits[-1:], potential, validate_args=case.validate)
        run.equal("sample of a row alone", distribution.sample(key=case.key)[-1:], alone.sample(key=case.key[-1:]))
        run.close("log_partition of a row alone", alone.log_partition, truth.log_partition[-1:], VALUES)


def _stored(run: Run, circuit: cr.Circuit, potential: Tensor | None) -> None:
    """Now and then, the same from a file and from a pickle."""
    case = run.case
    if case.rng.random() > 0.15:
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "circuit"
        circuit.save(path)
        loaded = cr.load(path)
    again = pickle.loads(pickle.dumps(circuit))
    for name, other in (("load", loaded), ("pickle", again)):
        if not isinstance(other, cr.Circuit) or other.model_count() != circuit.model_count():
            raise Fault(f"{name} gave {other!r} for {circuit!r}")
        theirs = other(case.logits, potential, validate_args=case.validate).sample(key=case.key)
        ours = circuit(case.logits, potential, validate_args=case.validate).sample(key=case.key)
        run.equal(f"sample after {name}", ours, theirs)


def _conditioned(run: Run, distribution: cr.SubsetDistribution, truth: Truth) -> None:
    """Given that one variable is selected, and another is not."""
    case = run.case
    n = case.rule.n
    if n < 2 or n > ENUMERATED or bool(truth.lost.any()):
        return
    a, b = (int(i) for i in case.rng.choice(n, size=2, replace=False))
    theta = truth.theta.detach().clone()
    contradicted = (theta[:, a] == -math.inf) | (theta[:, b] == math.inf)
    theta[:, a], theta[:, b] = math.inf, -math.inf
    theta[contradicted] = math.nan
    after = Truth(case.rule, theta.requires_grad_(), truth.phi)
    after.log_partition  # noqa: B018 - finds all lost rows
    try:
        found = distribution.condition(include=[a], exclude=[b])
    except ValueError:
        if not bool(after.lost.any()):
            raise
        run.covered.append("condition refused")
        return
    run.close("condition", found.marginals.reshape(-1, n), after.marginals, VALUES)
    run.close("condition", found.log_partition.reshape(-1), after.log_partition, VALUES)


def seen(run: Run) -> str:
    """What a case gave, to the bit."""
    return run.digest.hexdigest()


def describe(case: Case) -> list[str]:
    """What of the input is covered."""
    return [*sorted(case.rule.kinds), str(case.dtype).removeprefix("torch."), case.layout, *_values_of(case)]


def _values_of(case: Case) -> Iterator[str]:
    logits = case.logits.detach()
    if bool(logits.isinf().any()):
        yield "evidence"
    if bool(logits.isnan().any()):
        yield "NaN"
    if case.potential_kind != "none":
        yield "count potential"
