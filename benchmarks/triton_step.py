"""A routing step of the engine ``triton``, forward and back, against the same composed in float64.

Shapes: T tokens, n variables, J = K + 1 counts, S slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

import circuitroute as cr
from circuitroute.engines.step import Inputs, Rule, Step, Stepper, Upstream
from circuitroute.routing.composed import ComposedSteps

# Sampled at a temperature that divides exactly, so that float32 and float64 decide on the same numbers.
TEMPERATURE, RULE = 0.5, Rule("softmax", 1.0, True)
BOUNDS = {"weights": 1e-5, "step_log_prob": 1e-5, "step_gradient": 1e-4}


def judge(engine: Stepper, x: Tensor, phi: Tensor, key: Tensor) -> tuple[dict[str, float], list[str]]:
    """The largest errors by name, and what is wrong; nothing where the engine takes no step of these shapes."""
    inputs = Inputs(x, x, TEMPERATURE, phi, key)
    if not engine.steps(inputs):
        return {}, []
    step, gradient = _taken(engine, inputs)
    counts = phi.isfinite().nonzero().flatten().tolist()
    circuit = cr.compile(cr.CountIn(set(counts)), x.shape[1]).with_engine("naive")
    logits = x.cpu().double()
    exact = Inputs(logits, logits, TEMPERATURE, phi.cpu().double(), key.cpu())
    truth, expected = _taken(ComposedSteps(circuit), exact)
    valid = ~truth.invalid
    wrong = ["step " + name for name in ("mask", "indices", "invalid") if not _same(step, truth, name, valid)]
    scale = _given(truth.log_prob)[valid].abs().clamp(min=1)
    errors = {
        "weights": _largest(step.weights.cpu()[valid] - truth.weights[valid]),
        "step_log_prob": _largest((_given(step.log_prob).cpu()[valid] - _given(truth.log_prob)[valid]) / scale),
        "step_gradient": _largest(gradient.cpu() - expected),
    }
    return errors, wrong + [name for name, bound in BOUNDS.items() if not errors[name] <= bound]


def _taken(engine: Stepper, inputs: Inputs) -> tuple[Step, Tensor]:
    """A step, and the gradient of the logits from that of weights, marginals and log-probability."""
    (T, n), S = inputs.logits.shape, max(1, inputs.potential.shape[-1] - 1)
    step, generator = engine.step(inputs, RULE, True), torch.Generator().manual_seed(9)
    weights, marginals = (torch.randn(T, width, generator=generator).to(inputs.logits) for width in (S, n))
    upstream = Upstream(weights=weights, marginals=marginals, log_prob=torch.ones(T).to(inputs.logits))
    return step, engine.step_gradient(inputs, RULE, step, upstream).logits


def _same(step: Step, truth: Step, name: str, valid: Tensor) -> bool:
    ours, theirs = getattr(step, name).cpu(), getattr(truth, name)
    return torch.equal(ours, theirs) if name == "invalid" else torch.equal(ours[valid], theirs[valid])


def _largest(differences: Tensor) -> float:
    return float(differences.abs().amax()) if differences.numel() else 0.0


def _given(values: Tensor | None) -> Tensor:
    if values is None:
        raise ValueError("a step with moments has a log-probability")
    return values
