"""circuitroute's routers in torchtitan's mixture-of-experts layers (written against torchtitan 0.3).

:func:`convert` puts a constraint in the place of top-k in a model's config, before the model is built. The gate, the
rule for weights (``score_func``, ``route_norm``, ``route_scale``) and the state dict stay the model's own.

Importing this module imports torchtitan. Legend, as there: B sequences, L positions, D model dimension, E experts, K
slots per token.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from circuitroute.compilation import compile as compile_constraint
from circuitroute.constraints import Constraint
from circuitroute.integrations.hosted import Decider
from circuitroute.integrations.hosted import begin_step as begin_step
from circuitroute.integrations.hosted import recorded_routings as recorded_routings
from circuitroute.routing.estimators import Estimator

try:
    from torchtitan.config.override import derive
    from torchtitan.models.common.moe import MoE, TokenChoiceTopKRouter
except ImportError as error:
    raise ImportError(
        "circuitroute.integrations.torchtitan needs torchtitan 0.3 and what it imports: pip install torchtitan==0.3.0"
    ) from error


class CircuitRouter(TokenChoiceTopKRouter):
    """A torchtitan router that decides by a constraint, with K slots per token for its largest count.

    In training the subset is sampled, and gradients reach all logits through the estimator; in evaluation it is the
    most probable one. The expert bias of auxiliary-loss-free balancing shifts the *logits* of the choice (torchtitan's
    own router adds it to the scores), and no weights. Slots that a token does not use have weight 0 and ids of experts
    that it did not choose, as torchtitan's dispatchers need it.

    Raises:
        ValueError: settings that the constraint replaces, or a ``top_k`` that is not the constraint's largest count.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(TokenChoiceTopKRouter.Config):
        """The host's fields, and what :class:`~circuitroute.integrations.hosted.Decider` takes."""

        constraint: Constraint
        estimator: str | Estimator = "simple"
        seed: int | None = None

    def __init__(self, config: Config) -> None:
        _check_replaced(config)
        super().__init__(config)
        self.decider = Decider(config.constraint, config.num_experts, estimator=config.estimator, seed=config.seed)
        slots = max(1, self.decider.circuit.max_count)
        if config.top_k != slots:
            raise ValueError(
                f"top_k={config.top_k}: {config.constraint!r} needs {slots} slots per token; let circuit_moe() or "
                f"convert() make the config, which sets this for the router and the dispatcher"
            )

    def forward(self, x_BLD: Tensor, expert_bias_E: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Route hidden states.

        Args:
            x_BLD: any floating dtype.
            expert_bias_E: added to the logits for the choice.

        Returns:
            (weights [B, L, K] float32, distinct ids [B, L, K] int64, scores of all experts [B, L, E] float32).

        Raises:
            TypeError: a sharded DTensor.
        """
        logits_BLE = self._logits(x_BLD)
        B, L, E = logits_BLE.shape
        routing = self.decider(
            logits_BLE.reshape(-1, E),
            weights=self.score_func,
            token=torch.arange(B * L, device=logits_BLE.device),
            training=self.training,
            shift=expert_bias_E,
            renormalize=self.route_norm,
            scale=self.route_scale,
        )
        weights_TK, ids_TK = routing.padded(self.top_k)
        scores_BLE = logits_BLE.sigmoid() if self.score_func == "sigmoid" else logits_BLE.softmax(-1)
        # Dispatchers flatten the ids with view().
        return weights_TK.reshape(B, L, -1), ids_TK.contiguous().view(B, L, -1), scores_BLE

    def _logits(self, x_BLD: Tensor) -> Tensor:
        # In float32 on GPUs, as the host has it; autocast on CPUs knows no such mode and would only warn.
        on_gpu = x_BLD.device.type != "cpu"
        with torch.autocast(x_BLD.device.type, dtype=torch.float32 if on_gpu else None, enabled=on_gpu):
            logits_BLE: Tensor = self.gate(x_BLD)
        if isinstance(logits_BLE, DTensor):
            raise TypeError(
                f"the gate gave a DTensor ({logits_BLE.placements}): tensor and expert parallelism of the router are "
                f"not supported by this adapter; use data parallelism (DDP, FSDP) or torchtitan's own router"
            )
        return logits_BLE if logits_BLE.dtype == torch.float64 else logits_BLE.float()


def circuit_moe(
    config: Any, constraint: Constraint, *, estimator: str | Estimator = "simple", seed: int | None = None
) -> Any:
    """The config of a mixture-of-experts layer, with a constraint in the place of top-k.

    For a factory of torchtitan's ``@override(target=MoE.Config)``; :func:`convert` applies it to a whole model.

    Args:
        config: a ``MoE.Config``, or that of a subclass; not changed.
        constraint: what is allowed, over its experts.
        estimator, seed: see :class:`~circuitroute.integrations.hosted.Decider`.

    Returns:
        A config of the same kind, whose layer counts the sampled experts as load, and not slots that stay unused.

    Raises:
        InfeasibleError: no subset of the layer's experts satisfies the constraint.
        TypeError: not such a config, or not a constraint.
        ValueError: settings that the constraint replaces.
    """
    if not isinstance(config, MoE.Config):
        raise TypeError(f"config is a {type(config).__qualname__}: expected the MoE.Config of a layer")
    Decider(constraint, config.num_experts, estimator=estimator, seed=seed)  # refuse what cannot be, here
    _check_replaced(config.router)
    slots = max(1, compile_constraint(constraint, config.num_experts).max_count)
    router = derive(
        config.router, CircuitRouter.Config, top_k=slots, constraint=constraint, estimator=estimator, seed=seed
    )
    experts = config.routed_experts
    dispatcher = derive(experts.token_dispatcher, type(experts.token_dispatcher), top_k=slots)
    routed = derive(experts, type(experts), token_dispatcher=dispatcher)
    return derive(config, _counting(type(config)._owner).Config, router=router, routed_experts=routed)


def convert(
    model: Any,
    constraint: Constraint | Sequence[Constraint],
    *,
    estimator: str | Estimator = "simple",
    seed: int | None = None,
) -> int:
    """Put a constraint in the place of top-k in all mixture-of-experts layers of a model's config, in place.

    Args:
        model: a config with such layers in it, before ``build()``.
        constraint: one for all layers, or one per layer, in order.
        estimator, seed: see :class:`~circuitroute.integrations.hosted.Decider`.

    Returns:
        How many layers there are.

    Raises:
        ValueError: no such layer, another number of constraints than layers, or what :func:`circuit_moe` refuses.
    """
    found = list(model.traverse(MoE.Config))
    if not found:
        raise ValueError(f"model ({type(model).__qualname__}) has no mixture-of-experts layer: nothing to convert")
    rules = [constraint] * len(found) if isinstance(constraint, Constraint) else list(constraint)
    if len(rules) != len(found):
        raise ValueError(f"constraint has {len(rules)} entries: the model has {len(found)} such layers")
    new = [
        circuit_moe(config, rule, estimator=estimator, seed=seed)
        for (_, config, _, _), rule in zip(found, rules, strict=True)
    ]
    for (name, _, parent, place), config in zip(found, new, strict=True):
        if parent is None:
            raise ValueError(f"model is the layer {name!r} itself: use circuit_moe(), which returns its new config")
        if isinstance(parent, list):
            parent[place] = config
        else:
            setattr(parent, place, config)
    return len(found)


def _check_replaced(config: Any) -> None:
    """What the constraint takes the place of must not be asked for besides, and silently have no effect."""
    if config.num_expert_groups is not None or config.num_limited_groups is not None:
        raise ValueError(
            f"num_expert_groups={config.num_expert_groups}, num_limited_groups={config.num_limited_groups}: group "
            f"limits are a part of the constraint here, such as cr.ActiveGroups(cr.Groups(8), at_most=4) & "
            f"cr.Exactly(8); set both to None"
        )
    if config._debug_force_load_balance:
        raise ValueError("_debug_force_load_balance=True: this router does not force balance; set it to False")


@functools.cache
def _counting(owner: Any) -> Any:
    """The subclass of a MoE whose load counter sees the sampled experts only."""

    class CircuitMoE(owner):
        @dataclass(kw_only=True, slots=True)
        class Config(owner.Config):
            pass

        def __init__(self, config: Config) -> None:
            super().__init__(config)
            if not self.router.decider.fixed_count:
                self.router.register_forward_hook(self._discount_unused)

        @torch.no_grad()
        def _discount_unused(self, router: Any, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            # The layer is about to count all slots; those with weight 0, and these alone, are not used.
            if self.training:
                weights, ids, _ = output
                load_E = self.tokens_per_expert_E
                load_E.index_add_(0, ids.flatten(), -(weights == 0).flatten().to(load_E.dtype))

    CircuitMoE.__name__ = CircuitMoE.__qualname__ = f"Circuit{owner.__name__}"
    return CircuitMoE
