"""circuitroute's routers in Megatron-core's mixture-of-experts layers (written against megatron-core 0.16).

:func:`router` makes what ``MoESubmodules(router=...)`` takes. The router's weight, its state dict, the rule for weights
(``moe_router_score_function``, ``moe_router_pre_softmax``, ``moe_router_topk_scaling_factor``), the coefficients of the
auxiliary losses and the expert bias stay Megatron's own. The auxiliary losses are computed from the decision itself:
the sampled set and the exact marginals, not a second top-k.

Importing this module imports megatron.core. Legend: S positions and B sequences of this process, T = S B tokens in that
order, H hidden size, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from circuitroute.constraints import Constraint
from circuitroute.integrations.hosted import Decider, Weights
from circuitroute.integrations.hosted import begin_step as begin_step
from circuitroute.integrations.hosted import recorded_routings as recorded_routings
from circuitroute.routing import losses
from circuitroute.routing.decision import Routing
from circuitroute.routing.estimators import Estimator

try:
    from megatron.core.transformer.moe.router import TopKRouter
except ImportError as error:
    raise ImportError(
        "circuitroute.integrations.megatron needs megatron-core 0.16 and what it imports: "
        "pip install megatron-core==0.16.1"
    ) from error

# Settings of TransformerConfig that the constraint replaces or that would change its decision, with what to do instead.
REPLACED = {
    "moe_router_num_groups": "make the group limit a part of the constraint, such as cr.ActiveGroups(cr.Groups(8), "
    "at_most=4) & cr.Exactly(8)",
    "moe_router_group_topk": "make the group limit a part of the constraint, such as cr.ActiveGroups(cr.Groups(8), "
    "at_most=4) & cr.Exactly(8)",
    "moe_expert_capacity_factor": "it would drop experts from the sampled sets; bound the experts per token instead, "
    "such as by cr.Between(1, 4)",
    "moe_router_fusion": "the fused kernels are those of top-k; set it to False",
    "moe_enable_routing_replay": "it replays ids of top-k; set it to False",
    "moe_router_force_load_balancing": "it draws logits of its own each time; set it to False",
}


def router(
    constraint: Constraint, *, estimator: str | Estimator = "simple", seed: int | None = None
) -> Callable[..., CircuitRouter]:
    """What ``MoESubmodules(router=...)`` takes, for a constraint in the place of top-k.

    Args:
        constraint: what is allowed, over the E experts.
        estimator, seed: see :class:`~circuitroute.integrations.hosted.Decider`.
    """
    return partial(CircuitRouter, constraint=constraint, estimator=estimator, seed=seed)


class CircuitRouter(TopKRouter):
    """A Megatron router that decides by a constraint.

    In training the subset is sampled, and gradients reach all logits through the estimator; in evaluation it is the
    most probable one. The expert bias shifts the *logits* of the choice (Megatron's own router adds it to the scores),
    and no weights.

    Args:
        config: Megatron's; ``moe_router_topk`` must be the constraint's largest count, which dispatchers make room for.
        pg_collection: Megatron's process groups.
        constraint, estimator, seed: see :class:`~circuitroute.integrations.hosted.Decider`.

    Raises:
        InfeasibleError: no subset of the experts satisfies the constraint.
        ValueError: settings that the constraint replaces, another ``moe_router_topk``, or a constraint on several
            counts with a dispatcher other than "allgather": the others make room for exactly T * moe_router_topk.
    """

    def __init__(
        self,
        config: Any,
        pg_collection: Any = None,
        *,
        constraint: Constraint,
        estimator: str | Estimator = "simple",
        seed: int | None = None,
    ) -> None:
        decider = Decider(constraint, config.num_moe_experts, estimator=estimator, seed=seed)
        _check(config, decider)
        super().__init__(config, pg_collection)
        self.decider = decider

    def gating(self, input: Tensor) -> Tensor:
        """[S, B, E] logits of hidden states [S, B, H]: float64 if so configured, else float32; on CPUs too."""
        # Megatron's own needs a GPU and Transformer Engine.
        wide = torch.float64 if self.config.moe_router_dtype == "fp64" else torch.float32
        bias = None if self.bias is None else self.bias.to(wide)
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input.to(wide), self.weight.to(wide), bias)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Decide.

        Args:
            logits: [S, B, E].
            padding_mask: [S, B] bool, True for padding: such tokens are routed, and count nowhere.

        Returns:
            (probs [T, E], 0 off the chosen sets; routing_map [T, E] bool).
        """
        S, B, E = logits.shape
        valid = None if padding_mask is None else ~padding_mask.reshape(-1)
        rows = self.apply_z_loss(logits.reshape(-1, E), None if valid is None else ~valid)
        routing = self.decider(
            rows,
            weights=self._weights(),
            token=_sequence_major(S, B, rows.device),
            training=self.training,
            shift=self.expert_bias,
            renormalize=self.score_function == "sigmoid" and self.topk > 1,
            scale=self.config.moe_router_topk_scaling_factor or 1.0,
        )
        probs, mask = routing.gates, routing.mask
        if self.training and torch.is_grad_enabled():
            probs = self._with_aux_losses(probs, routing, valid, S, B)
        if self.enable_expert_bias and self.training and torch.is_grad_enabled():  # once under recomputation
            self._count(mask, valid)
        return probs, mask

    def _weights(self) -> Weights:
        if self.score_function == "sigmoid":
            return "sigmoid"
        return "softmax" if self.config.moe_router_pre_softmax else "normalized"

    def _with_aux_losses(self, probs: Tensor, routing: Routing, valid: Tensor | None, S: int, B: int) -> Tensor:
        """``probs``, whose backward also runs that of the configured balance losses."""
        if not self.is_aux_loss_enabled():
            return probs
        load, mass = routing.mask.to(routing.marginals.dtype), routing.marginals
        if valid is not None:
            load, mass = load * valid[:, None], mass * valid[:, None]
        tokens = len(probs) if valid is None else valid.sum()
        attach = partial(self._attach, tokens=tokens)
        probs = attach(probs, "aux_loss", "load_balancing_loss", load.sum(0), mass.sum(0), self.tp_cp_group)
        of_sequences = load.view(S, B, -1).sum(0), mass.view(S, B, -1).sum(0)
        probs = attach(probs, "seq_aux_loss", "seq_load_balancing_loss", *of_sequences, self.tp_cp_group)
        if self.get_aux_loss_coeff("global_aux_loss") == 0:
            return probs
        averaged = self._averaged_load(load.sum(0), self.tp_dp_cp_group)
        name = "global_load_balancing_loss"
        return attach(probs, "global_aux_loss", name, averaged, mass.sum(0), self.tp_dp_cp_group, with_dp=True)

    def _attach(
        self,
        probs: Tensor,
        kind: str,
        name: str,
        load: Tensor,
        mass: Tensor,
        group: ProcessGroup,
        *,
        tokens: int | Tensor,
        with_dp: bool = False,
    ) -> Tensor:
        coefficient = self.get_aux_loss_coeff(kind)
        if coefficient == 0:
            return probs
        # Megatron adds up gradients and logged losses over this group, where circuitroute's are to be averaged.
        several = group.size() > 1
        loss = losses.balance(load, mass, group if several else None).mean() / group.size()
        attached: Tensor = self.attach_and_log_load_balancing_loss(
            probs,
            coefficient,
            coefficient * loss,
            name,
            group,
            reduce_group_has_dp=with_dp,
            valid_token_count=tokens,
        )
        return attached

    @torch.no_grad()
    def _averaged_load(self, load_E: Tensor, group: ProcessGroup) -> Tensor:
        """[E] this process's load, averaged over the micro-batches since Megatron last reset it.

        Megatron's counter holds sums over the group: what the others have in it is left to :func:`losses.balance`.
        """
        total = load_E.clone()
        if group.size() > 1:
            torch.distributed.all_reduce(total, group=group)
        self.global_tokens_per_expert += total
        self.ga_steps += 1
        averaged: Tensor = self.global_tokens_per_expert / self.ga_steps
        return averaged / group.size()

    @torch.no_grad()
    def _count(self, mask: Tensor, valid: Tensor | None) -> None:
        """Add the sampled set to the load that the expert bias is updated from."""
        self.local_tokens_per_expert += (mask if valid is None else mask & valid[:, None]).sum(0)


def _sequence_major(S: int, B: int, device: torch.device) -> Tensor:
    """[T] the numbers of tokens that lie position by position, counted sequence by sequence.

    So a token keeps its number, and its key, when the sequences are spread over other processes.
    """
    return torch.arange(S * B, device=device).view(B, S).t().reshape(-1)


def _check(config: Any, decider: Decider) -> None:
    for name, remedy in REPLACED.items():
        if getattr(config, name, None):
            raise ValueError(f"{name}={getattr(config, name)!r} has no meaning under a constraint: {remedy}")
    if "sinkhorn" in config.moe_router_load_balancing_type:
        raise ValueError(
            f"moe_router_load_balancing_type={config.moe_router_load_balancing_type!r}: Sinkhorn routing decides by "
            f"itself; use 'none', 'aux_loss', 'seq_aux_loss' or 'global_aux_loss'"
        )
    circuit = decider.circuit
    if config.moe_router_topk != max(1, circuit.max_count):
        raise ValueError(
            f"moe_router_topk={config.moe_router_topk}: {circuit.constraint!r} allows up to {circuit.max_count} "
            f"experts; set it to that, which is what dispatchers make room for"
        )
    if not decider.fixed_count and config.moe_token_dispatcher_type != "allgather":
        raise ValueError(
            f"moe_token_dispatcher_type={config.moe_token_dispatcher_type!r} makes room for exactly "
            f"{config.moe_router_topk} experts per token, and {circuit.constraint!r} allows fewer: use 'allgather', or "
            f"a constraint of one count such as cr.Exactly({config.moe_router_topk})"
        )
