"""The routers that are compared: what every layer of a model gets, and how it is trained.

T = 0.25 where nothing else is said; `docs/study-learning.md` describes all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import circuitroute as cr

from .config import DemoConfig
from .plans import (
    BIAS_STEP,
    COLD,
    AgreementBudgetPlan,
    AgreementPlan,
    BalancePlan,
    BudgetPlan,
    ControlledPlan,
    LayerRouter,
    Plan,
    SoftPlan,
)


@dataclass(frozen=True)
class RouterKind:
    """One router of the comparison: how to build it, and what in training goes with it.

    Attributes:
        layer: each layer's own router; None where the plan has them all.
        probabilities: what the balance loss averages; top-k has no marginals.
        free_count: whether the router chooses how many, so that its expected count needs a price in the loss.
        plan: what the layers share.
        temperature: a schedule over the steps, where the temperature changes.
        probes: of `cr.MoE`.
        dropout: of what attention and experts add to the residual stream.
        frozen: whether the router keeps the weights that it starts with.
        flipped: whether the sequences of a batch come in reverse order: the same mathematics, rounded differently.
        balanced: whether a loss keeps the experts' load even.
    """

    layer: Callable[[DemoConfig], LayerRouter | None]
    probabilities: Literal["marginal", "softmax"] = "marginal"
    free_count: bool = False
    plan: Callable[[DemoConfig], Plan] = lambda config: Plan()
    temperature: Callable[[DemoConfig], cr.schedules.Schedule] | None = None
    probes: int | Literal["all"] = 0
    dropout: float = 0.0
    frozen: bool = False
    flipped: bool = False
    balanced: bool = True


def _top_k(config: DemoConfig) -> LayerRouter:
    return cr.TopKRouter(config.hidden, config.experts, config.k)


def _exact(config: DemoConfig, **options: Any) -> LayerRouter:
    return cr.ExactKRouter(config.hidden, config.experts, config.k, **options)


def _range(config: DemoConfig, **options: Any) -> LayerRouter:
    return cr.DynamicKRouter(config.hidden, config.experts, *config.k_range, **options)


def _soft(config: DemoConfig) -> LayerRouter:
    # The threshold is calibrated before the first step.
    return cr.SoftTopKRouter(config.hidden, config.experts, config.k, config.soft_alpha, threshold=0.5)


def _nothing(config: DemoConfig) -> None:
    return None


_mode = partial(_exact, decide="mode", temperature=COLD)
# Balance by a bias. For top-k, whose own distribution is at temperature 1, the exact rule balances a colder one.
_loss_free = partial(BalancePlan, rule=partial(cr.balance.LossFree, step=BIAS_STEP))
_quantile = partial(BalancePlan, rule=cr.balance.Quantile)
_exact_balance = partial(BalancePlan, rule=partial(cr.balance.ExactBalance, temperature=COLD))

KINDS = {
    "top-k": RouterKind(_top_k, "softmax"),
    "exact-k": RouterKind(_exact),
    "range-k": RouterKind(_range, free_count=True),
    "soft-uniform": RouterKind(_soft, plan=partial(SoftPlan, learned=False)),
    "soft-learned": RouterKind(_soft, plan=partial(SoftPlan, learned=True)),
    "budget": RouterKind(_nothing, plan=BudgetPlan),
    "exact-k-0.5": RouterKind(partial(_exact, temperature=0.5)),
    "exact-k-0.25": RouterKind(partial(_exact, temperature=COLD)),
    "exact-k-annealed": RouterKind(_exact, temperature=lambda c: cr.schedules.geometric(1.0, 0.125, c.steps)),
    "exact-k-none": RouterKind(partial(_exact, temperature=COLD, estimator="none")),
    "mode": RouterKind(_mode),
    "probe": RouterKind(_mode, probes=1),
    "probes-all": RouterKind(_mode, probes="all"),
    "densemixer": RouterKind(partial(_exact, decide="mode", estimator="dense"), "softmax", probes="all"),
    "range-k-calibrated": RouterKind(_range, free_count=True, plan=AgreementPlan),
    "range-k-controlled": RouterKind(partial(_range, decide="mode", temperature=COLD), plan=ControlledPlan),
    "budget-calibrated": RouterKind(_nothing, plan=AgreementBudgetPlan),
    "frozen": RouterKind(_top_k, "softmax", frozen=True),
    **{f"dropout-{share}": RouterKind(_top_k, "softmax", dropout=share) for share in (0.1, 0.2, 0.3)},
    "top-k-bias": RouterKind(_top_k, "softmax", plan=_loss_free, balanced=False),
    "mode-bias": RouterKind(_mode, plan=_loss_free, balanced=False),
    "probe-bias": RouterKind(_mode, probes=1, plan=_loss_free, balanced=False),
    "top-k-free": RouterKind(_top_k, "softmax", balanced=False),
    "top-k-quantile": RouterKind(_top_k, "softmax", plan=_quantile, balanced=False),
    "top-k-exact": RouterKind(_top_k, "softmax", plan=_exact_balance, balanced=False),
    "mode-free": RouterKind(_mode, balanced=False),
    "mode-quantile": RouterKind(_mode, plan=_quantile, balanced=False),
    "mode-exact": RouterKind(_mode, plan=_exact_balance, balanced=False),
    "top-k-again": RouterKind(_top_k, "softmax", flipped=True),
}
