"""One routing step: logits to chosen experts with their weights, and the way back, as an engine does it in one go.

Legend: T tokens, N experts, K the largest allowed count, J = K + 1, S slots, max(1, K) of them; z the 0/1 mask of the
chosen experts, a the logits that are decided on, theta those that the weights are made of, phi the count potential.

**Forward.** p(z) ~ exp(phi(|z|) + sum_{i in z} a_i / t); z is a sample of it, or the mode at t = 1. Expert i has the
weight g_i w_i, where g is z in value, and by the rule

    softmax      w = softmax(theta)
    normalized   w_i = e_i / sum_{j in z} e_j,    e_i = exp(min(theta_i - max_{j in z} theta_j, 30))
    sigmoid      w_i = sigmoid(theta_i)
    marginal     w = m, the marginals of p

**Backward.** With v the gradient that reaches the gates (that of slot s at its expert, nothing at unused slots), SIMPLE
gives g the gradient of m: u_i = v_i w_i, for the normalized rule w_i (v_i - <v, g w>). Together with what reaches m
(by the marginal rule also v_i z_i), log Z (w0), log p(z) (c) and the count posterior q (v_q):

    d / d(a / t)  =  H_m (u, v_q) + (w0 - c) m + c z          d / d phi  =  H_q (u, v_q) + (w0 - c) q + c e_|z|

H being the second derivative of log Z, see :mod:`circuitroute.engines.autograd`; and theta gets the derivative of w:

    softmax      w_j (v_j z_j - <v, z w>)
    normalized   z_j w_j (v_j - <v, z w>)
    sigmoid      v_j z_j w_j (1 - w_j)

Infinite logits are evidence: they are no arguments of p and get no gradient. Rows with NaN, or that nothing satisfies,
choose no expert: they are marked, their slots are unused, their other numbers are NaN and their gradients 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, TypeAlias, get_args, runtime_checkable

from torch import Tensor

Combine: TypeAlias = Literal["softmax", "normalized", "sigmoid", "marginal"]
COMBINES = get_args(Combine)  # here, since torch 2.6 cannot trace get_args

# An unchosen expert's weight relative to the chosen ones enters a gradient only; e^30 keeps that finite.
MAX_RELATIVE_LOGIT = 30.0
# Mixed into the key that says whether a token is sampled, so that what is drawn then does not depend on it.
SHARE = 0x5A4E


class Inputs(NamedTuple):
    """What a step is given.

    Attributes:
        logits: [T, N] float32 (float16 and bfloat16 too, where the engine takes them), theta.
        choice: [T, N] likewise, a; the same tensor where nothing moves the choice.
        temperature: t, a number, or a tensor [T].
        potential: [J] or [T, J], phi; -inf where a count is not allowed.
        key: [T] int64; None where no token is sampled.
    """

    logits: Tensor
    choice: Tensor
    temperature: float | Tensor
    potential: Tensor
    key: Tensor | None


class Rule(NamedTuple):
    """What is done with them.

    Attributes:
        combine: the rule of the weights.
        share: how many tokens are sampled, from 0 (all take the mode) to 1. In between, a token is one of them if
            uniform 0 of ``fold_in(key, SHARE)`` is below it.
        simple: whether SIMPLE's gradient crosses the decision (else none does).
    """

    combine: Combine
    share: float
    simple: bool


@dataclass(frozen=True)
class Step:
    """The outcome.

    Attributes:
        weights: [T, S] float32, of the chosen experts by decreasing theta (lower indices first among equals); 0 in
            unused slots.
        indices: [T, S] int64, these experts, then the largest others likewise.
        mask: [T, N] bool, z.
        invalid: [T] bool, rows with NaN, or that nothing satisfies.
        count_probs: [T, J] q; None, like all that follows, where only the mode was asked for.
        log_partition: [T] log Z.
        log_prob: [T] log p(z).
        shift, log_root, fallback: [T], see :class:`circuitroute.engines.base.Inference`.
    """

    weights: Tensor
    indices: Tensor
    mask: Tensor
    invalid: Tensor
    count_probs: Tensor | None = None
    log_partition: Tensor | None = None
    log_prob: Tensor | None = None
    shift: Tensor | None = None
    log_root: Tensor | None = None
    fallback: Tensor | None = None


class Upstream(NamedTuple):
    """The gradients that reach the results, None where there is none; gates [T, N] are the weights, scattered."""

    weights: Tensor | None = None
    gates: Tensor | None = None
    marginals: Tensor | None = None
    log_partition: Tensor | None = None
    log_prob: Tensor | None = None
    count_probs: Tensor | None = None


class Slopes(NamedTuple):
    """The gradients of a step's inputs: [T, N], [T, N] and [T, J].

    ``choice`` is None where it is the same tensor as the logits, whose gradient then has both parts.
    """

    logits: Tensor
    choice: Tensor | None
    potential: Tensor


@runtime_checkable
class Stepper(Protocol):
    """An engine of the count family with a fused step. Results carry no gradient."""

    def steps(self, inputs: Inputs) -> bool:
        """Whether it takes inputs of these shapes, dtypes and device."""
        ...

    def step(self, inputs: Inputs, rule: Rule, moments: bool) -> Step:
        """Decide and weigh; without ``moments``, all that is asked of p is the decision."""
        ...

    def step_marginals(self, inputs: Inputs, step: Step, out_TN: Tensor) -> None:
        """Fill in the marginals of p, around what a step with moments found."""
        ...

    def step_gradient(self, inputs: Inputs, rule: Rule, step: Step, upstream: Upstream) -> Slopes:
        """The way back of a step with moments."""
        ...
