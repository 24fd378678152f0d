"""Logits to decisions with weights: :mod:`~circuitroute.routing.choice` says which subset, and
:mod:`~circuitroute.routing.weights` with what weights.

Legend: T tokens, E experts.
"""

from __future__ import annotations

from torch import Tensor

from circuitroute.inference.circuit import Circuit
from circuitroute.routing import choice, step
from circuitroute.routing.choice import Batch, Decide, Rule
from circuitroute.routing.decision import Routing
from circuitroute.routing.estimators import Estimator
from circuitroute.routing.records import RoutingRecord
from circuitroute.routing.weights import Combine, as_combine, weigh


def route(
    logits: Tensor,
    circuit: Circuit,
    *,
    combine: Combine = "softmax",
    estimator: str | Estimator = "simple",
    training: bool = True,
    key: Tensor | int | None = None,
    replay: Tensor | RoutingRecord | None = None,
    decide: Decide | float | None = None,
    temperature: float | Tensor = 1.0,
    price: float | Tensor | None = None,
    bias: Tensor | None = None,
    count_potential: Tensor | None = None,
    validate_args: bool | None = None,
) -> Routing:
    """Decide which experts each token uses.

    Args:
        logits: [T, E], any floating dtype; computed in float32. Infinite logits force or forbid experts. More
            leading dimensions are flattened into one of tokens, those of the other tensors with them.
        circuit: the compiled constraint over E experts.
        combine: how chosen experts are weighted, g being the estimator's mask: ``"softmax"``, g times the softmax
            over all experts (ProbMoE); ``"normalized"``, the softmax over the chosen ones; ``"sigmoid"``, g times
            sigmoid(logits); ``"marginal"``, g times the exact marginals, those of the
            distribution that is decided on, with its temperature, price and bias.
        estimator: how gradients cross the sample: ``"simple"``, ``"score"``, ``"none"``, ``"dense"`` or an
            :class:`~circuitroute.routing.estimators.Estimator`.
        training: sample when True; take the mode, deterministically, when False.
        key: sampling keys, int64 broadcastable to [T]; a decision is a pure function of (logits row, key row).
            Give every token its own, e.g. ``cr.random_key(seed, step, layer, torch.arange(T))``. None draws from
            torch's global generator.
        replay: a recorded mask [T, E]: the decision is this one, with its gates, log-probability and gradients. Or a
            :class:`RoutingRecord` of one layer, which is refused at another temperature than it was made at.
        decide: how, in training: ``"sample"`` (None is the same), ``"mode"``, or a share from 0 to 1: that share of the
            tokens is sampled, which ones being a function of their keys, and the others take the mode. The estimator's
            gradient crosses either. With ``training=False`` it is always the mode.
        temperature: positive; a number, or a tensor [] or [T], differentiable. Decisions are drawn from the
            distribution over logits / temperature, which ``distribution``, ``log_prob`` and ``marginals`` describe; the
            weights, and the mode, are those of the logits themselves.
        price: what an expert costs, taken off every logit for the choice alone: a number, or a tensor [] or [T].
            A range router chooses fewer experts at a higher price; see :class:`circuitroute.CountController`.
        bias: [E], added to the logits for the choice alone, as auxiliary-loss-free balancing does; see
            :mod:`circuitroute.balance`. Weights are those of the logits as given, but for
            ``combine="marginal"``.
        count_potential: [K + 1] or [T, K + 1], see :class:`SubsetDistribution`.
        validate_args: whether to check values; None follows torch.distributions. Without it, rows with NaN or
            with evidence that leaves nothing choose no expert and have NaN gates, in those rows alone. On a GPU the
            host does not wait for what is wrong with values: a later routing step raises it. A replayed mask is
            checked at once, on a GPU only when validating.

    Raises:
        ValueError: shapes that do not fit, an unknown option, NaN or unsatisfiable rows, a temperature that is not
            positive, a share outside 0..1, tokens that take the mode with the estimator ``"score"``, a replayed mask
            that the constraint or the evidence excludes, named by row, or a record made at another temperature.
    """
    as_combine(combine)
    share = choice.as_share(decide, estimator)
    batch = choice.Batch.of(
        logits,
        circuit,
        key=key,
        temperature=temperature,
        shift=choice.shift_of(price, bias, logits, circuit.n),
        count_potential=count_potential,
        validate_args=validate_args,
    )
    return routed(batch, share if training else 0.0, combine=combine, estimator=estimator, replay=replay)


def routed(
    batch: Batch,
    share: float,
    *,
    combine: Combine,
    estimator: str | Estimator,
    rule: Rule = "mode",
    replay: Tensor | RoutingRecord | None = None,
) -> Routing:
    """The decision of a batch with its weights: in one step where the engine has one, else composed of its parts.

    Args:
        batch: what to decide on, and in ``logits`` what to weigh by.
        share, rule: see :func:`circuitroute.routing.choice.decide`.
        combine, estimator, replay: see :func:`route`.
    """
    if rule == "mode" or share == 1 or replay is not None:
        routing = step.routing(batch, share, replay, combine=combine, estimator=estimator)
        if routing is not None:
            return routing
    decision = choice.decide(batch, share=share, rule=rule, replay=replay)
    return decision.routing(weigh(decision, combine=combine, estimator=estimator))
