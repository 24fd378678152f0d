"""What is checked of a routing step: decision, weights, gradients, replay and projections, against the formulas.

Legend: T tokens, E experts; z the mask, m the exact marginals at the temperature, g the estimator's mask.
"""

from __future__ import annotations

import math
from typing import TypedDict

import torch
from torch import Tensor

import circuitroute as cr
from circuitroute.engines.step import MAX_RELATIVE_LOGIT, Combine
from circuitroute.routing.choice import Decide
from tools.soak.checks import GRADIENTS, VALUES, Fault, Run, as_leaf, truth_of
from tools.soak.truth import Truth, derivative

COMBINES: tuple[Combine, ...] = ("softmax", "normalized", "sigmoid", "marginal")
ESTIMATORS = ("simple", "none", "score", "dense")
DECIDE: tuple[Decide | float, ...] = ("sample", "mode", 0.5)


class Options(TypedDict):
    """What :func:`circuitroute.route` is told beside logits and circuit, except what is replayed."""

    combine: Combine
    estimator: str
    decide: Decide | float
    temperature: float | Tensor
    price: float | None
    bias: Tensor | None
    count_potential: Tensor | None
    validate_args: bool | None
    key: Tensor


def check(run: Run, circuit: cr.Circuit) -> None:
    """A routing step with random options."""
    case, rng = run.case, run.case.rng
    potential = case.potential_for(circuit)
    truth = truth_of(case, potential)
    tokens = len(truth.theta)
    combine, estimator = COMBINES[rng.integers(len(COMBINES))], str(rng.choice(ESTIMATORS))
    decide: Decide | float = DECIDE[rng.integers(3)] if estimator != "score" else "sample"
    by_row = bool(rng.integers(2))
    number = float(rng.choice([1.0, 0.25, 2.0]))
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    temperature: float | Tensor = torch.full((tokens,), number, dtype=wide).requires_grad_() if by_row else number
    price = float(rng.choice([0.0, 0.5])) or None
    bias = torch.from_numpy(rng.normal(size=case.rule.n)).to(wide) if rng.integers(2) else None
    options: Options = {
        "combine": combine, "estimator": estimator, "decide": decide, "temperature": temperature, "price": price,
        "bias": bias, "count_potential": potential, "validate_args": case.validate, "key": case.key,
    }  # fmt: skip
    truth.log_partition  # noqa: B018 - finds all lost rows
    try:
        routing = cr.route(case.logits, circuit, **options)
    except ValueError:
        if case.validate is None and bool(truth.lost.any()):
            run.covered.append("route refused")
            return
        raise
    label = f"route {combine} {estimator} {decide}"
    # The logits that choose are rounded as theirs are; those that weigh are as given.
    moved = case.logits.detach().reshape(tokens, case.rule.n)
    moved = moved.to(wide)
    if price is not None or bias is not None:
        lower = torch.zeros((), dtype=wide) if price is None else torch.full((), price, dtype=wide)
        moved = moved + (-lower if bias is None else bias - lower)
    offset = moved.double() - truth.theta.detach()
    offset = torch.where(offset.isfinite(), offset, 0.0)
    heat = torch.full((tokens,), number, dtype=torch.float64).requires_grad_()
    choice = truth.theta + offset
    finite = choice.isfinite()
    choice = torch.where(finite, torch.where(finite, choice, 0.0) / heat[:, None], choice)
    tempered = Truth(case.rule, choice, truth.phi)
    tempered.log_partition  # noqa: B018
    _decision(run, routing, tempered, circuit, moved, decide, potential)
    gates = weights(routing.mask, truth.theta, tempered.marginals, combine, estimator, tempered.lost)
    run.close(f"{label}: gates", routing.gates, gates, VALUES)
    run.close("route: marginals", routing.marginals, tempered.marginals, VALUES)
    kept = ~tempered.lost
    run.close("route: log_prob", routing.log_prob[kept], tempered.log_prob(routing.mask)[kept], VALUES)
    run.saw(routing.mask, routing.gates, routing.log_prob)
    again = cr.route(case.logits, circuit, replay=routing.mask, **options)
    run.equal("route: replayed mask", routing.mask, again.mask)
    run.close("route: replayed gates", again.gates, routing.gates.detach().double(), VALUES)
    run.close("route: replayed log_prob", again.log_prob[kept], routing.log_prob[kept].detach().double(), VALUES)
    _projections(run, routing)
    if bool(kept.all()) and tokens:
        for name, found in (("", routing), ("replayed ", again)):
            _gradient(run, f"{name}{label}", found, gates, truth.theta, heat, temperature, _steepness(routing, combine))


def weights(
    mask: Tensor, theta: Tensor, marginals: Tensor, combine: str, estimator: str, lost: Tensor | None = None
) -> Tensor:
    """[T, E] the documented formulas in float64; NaN in lost rows."""
    z = mask.double()
    finite = torch.where(theta.isnan(), 0.0, theta)
    if combine == "marginal":
        every = marginals
    elif combine == "sigmoid":
        every = torch.sigmoid(finite)
    else:
        every = _softmax(finite)
    if estimator == "dense" and combine == "normalized":
        found = _dense_normalized(mask, finite)
    elif estimator == "dense":
        found = torch.where(mask, every, every - every.detach())
    else:
        g = z + marginals - marginals.detach() if estimator == "simple" else z
        if combine == "normalized":
            found = g * _relative(finite, mask)
            total = found.sum(-1, keepdim=True)
            found = found / torch.where(total > 0, total, 1.0)
        else:
            found = g * every
    return found if lost is None else found.masked_fill(lost[:, None], math.nan)


def _softmax(theta: Tensor) -> Tensor:
    return torch.softmax(_softmax_input(theta), -1)


def _softmax_input(theta: Tensor) -> Tensor:
    """Forced experts share all of it; a row of -inf is uniform."""
    forced = theta == math.inf
    some, none = forced.any(-1, keepdim=True), (theta == -math.inf).all(-1, keepdim=True)
    return torch.where(some, torch.where(forced, 0.0, -math.inf), torch.where(none, 0.0, theta))


def _relative(theta: Tensor, mask: Tensor) -> Tensor:
    """exp(theta) relative to the largest chosen; the others' are capped there only by float64."""
    forced = mask & (theta == math.inf)
    some = forced.any(-1, keepdim=True)
    plain = torch.where(some, torch.where(forced, 0.0, -math.inf), theta)
    top = torch.where(mask, plain, -math.inf).amax(-1, keepdim=True)
    top = torch.where(top.isfinite(), top, 0.0).detach()
    return torch.exp((plain - top).clamp(max=MAX_RELATIVE_LOGIT))


def _dense_normalized(mask: Tensor, theta: Tensor) -> Tensor:
    """Over the chosen experts' sum; an unchosen one's gradient is its softmax's, over the same sum as constant."""
    relative = _relative(theta, mask)
    total = torch.where(mask, relative, 0.0).sum(-1, keepdim=True)
    softmax = torch.log_softmax(_softmax_input(theta), -1)
    ratio = torch.where(total > 0, relative / torch.where(total > 0, total, 1.0), softmax.exp())
    possible = softmax.isfinite() & theta.isfinite()
    change = torch.where(possible, softmax, 0.0)
    unchosen = torch.where(possible, ratio.detach() * (change - change.detach()), 0.0)
    return torch.where(mask, ratio, unchosen)


def _decision(
    run: Run,
    routing: cr.Routing,
    tempered: Truth,
    circuit: cr.Circuit,
    moved: Tensor,
    decide: str | float,
    potential: Tensor | None,
) -> None:
    case = run.case
    kept = ~tempered.lost
    if bool(routing.mask[~kept].any()):
        raise Fault("route: a row without any subset has a decision")
    allowed = Truth(case.rule, tempered.theta[kept], None if tempered.phi is None else tempered.phi[kept])
    if bool(allowed.log_prob(routing.mask[kept]).isinf().any()):
        raise Fault(f"route: the decision is not allowed: {routing.mask.tolist()}")
    if potential is not None and potential.dim() > 1:
        potential = potential.reshape(-1, potential.shape[-1])
    mode = circuit(moved, potential, validate_args=False).mode.nan_to_num() == 1
    sample = routing.distribution.sample(key=case.key.reshape(-1)).nan_to_num() == 1
    either = {"mode": routing.mask == mode, "sample": routing.mask == sample}.get(str(decide))
    either = (routing.mask == mode) | (routing.mask == sample) if either is None else either
    if not bool(either.all(-1).all()):
        raise Fault(f"route: decide={decide!r} decided {routing.mask.tolist()}")


def _projections(run: Run, routing: cr.Routing) -> None:
    gates = routing.gates.detach()
    for pad in ("distinct", "sentinel", "minus_one"):
        weight, index = routing.padded(pad=pad)
        experts = gates.shape[-1]
        used = (index >= 0) & (index < experts)
        room = gates.new_zeros(len(gates), experts)
        room = room.scatter_add(-1, index.clamp(0, experts - 1), torch.where(used, weight.detach(), 0.0))
        lost = gates.isnan().any(-1)
        run.equal(f"route: padded {pad}", room[~lost], torch.where(routing.mask, gates, 0.0)[~lost])
    token, expert, weight = routing.ragged()
    run.equal("route: ragged", weight.detach(), gates[routing.mask])
    if not torch.equal(torch.stack([token, expert], -1), routing.mask.nonzero()):
        raise Fault("route: ragged does not list the mask")


def _steepness(routing: cr.Routing, combine: str) -> float:
    """What the marginals' gradient, and its error, is multiplied by: normalised weights of unchosen experts are any."""
    theta = routing.logits.detach().double()
    return float(_relative(theta, routing.mask).amax()) if combine == "normalized" and theta.numel() else 1.0


def _gradient(
    run: Run,
    label: str,
    routing: cr.Routing,
    gates: Tensor,
    theta: Tensor,
    heat: Tensor,
    temperature: float | Tensor,
    steepness: float,
) -> None:
    case = run.case
    if not bool(gates.detach().isfinite().all()):
        return
    upstream = torch.from_numpy(case.rng.normal(size=gates.shape))
    by_row = derivative(gates, theta, upstream)
    exact = as_leaf(by_row, case.logits, case.leaf)
    leaves = [case.leaf] + ([temperature] if isinstance(temperature, Tensor) else [])
    loss = (routing.gates * upstream.to(routing.gates)).sum()
    found = torch.autograd.grad(loss, leaves, materialize_grads=True, allow_unused=True, retain_graph=True)
    eps = torch.finfo(case.dtype).eps if case.dtype.itemsize == 2 else 0.0
    scale = max(1.0, steepness)
    # Normalised weights of unchosen experts go up to e^30, which is infinite in half precision: compared is what the
    # leaf can hold. Where many rows share it, infinities of either sign add up there, and nothing can be said.
    most = torch.finfo(case.dtype).max
    if case.layout != "expanded" or bool((as_leaf(by_row.abs(), case.logits, case.leaf) <= most).all()):
        ours, theirs = (x.double().clamp(-most, most) / scale for x in (found[0], exact))
        run.close(f"{label}: gradient", ours, theirs, GRADIENTS, rounded=4 * eps)
    if len(found) > 1:
        exact = derivative(gates, heat, upstream)
        scale = scale * max(1.0, float(case.logits.detach().abs().max()))
        run.close("route: gradient by temperature", found[1] / scale, exact / scale, GRADIENTS)
