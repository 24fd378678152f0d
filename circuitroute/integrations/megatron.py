"""circuitroute's routers in Megatron-core's mixture-of-experts layers (written against megatron-core 0.16).

:func:`router` makes what ``MoESubmodules(router=...)`` takes. The router's weight, its state dict, the rule for weights
(``moe_router_score_function``, ``moe_router_pre_softmax``, ``moe_router_topk_scaling_factor``), the coefficients of the
auxiliary losses and the expert bias remain Megatron's. The auxiliary losses are computed from the decision itself, that
is from the sampled set and the exact marginals, not from a second top-k.

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

from circuitroute._tensors import without_autocast
from circuitroute.constraints import Constraint
from circuitroute.inference.circuit import Circuit
from circuitroute.integrations.hosted import GROUP_LIMIT, Decider, Weights, refuse_replaced
from circuitroute.integrations.hosted import begin_step as begin_step
from circuitroute.integrations.hosted import recorded_routings as recorded_routings
from circuitroute.integrations.hosted import replay as replay
from circuitroute.routing import losses
from circuitroute.routing.choice import Decide
from circuitroute.routing.decision import Routing
from circuitroute.routing.estimators import Estimator
from circuitroute.routing.records import RoutingRecord

try:
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.moe.router_replay import RouterReplayAction
except ImportError as error:
    raise ImportError(
        "circuitroute.integrations.megatron needs megatron-core 0.16 and what it imports: "
        "pip install megatron-core==0.16.1"
    ) from error

# Settings of TransformerConfig that the constraint replaces or that would change its decision, and what to do instead.
REPLACED = {
    "moe_router_num_groups": GROUP_LIMIT,
    "moe_router_group_topk": GROUP_LIMIT,
    "moe_expert_capacity_factor": "it would drop experts from the sampled sets; bound the experts per token instead, "
    "such as by cr.Between(1, 4)",
    "moe_router_fusion": "the fused kernels compute a top-k; set it to False",
    "moe_router_force_load_balancing": "it replaces the logits by random ones; set it to False",
}


def router(
    constraint: Constraint | Circuit,
    *,
    estimator: str | Estimator = "simple",
    seed: int | None = None,
    decide: Decide | float | None = None,
    temperature: float = 1.0,
) -> Callable[..., CircuitRouter]:
    """The router class for ``MoESubmodules(router=...)``, with a constraint in place of top-k.

    Args:
        constraint: what is allowed, over the E experts; or a circuit.
        estimator, seed, decide, temperature: see :class:`~circuitroute.integrations.hosted.Decider`.
    """
    options = {"estimator": estimator, "seed": seed, "decide": decide, "temperature": temperature}
    return partial(CircuitRouter, constraint=constraint, **options)


class CircuitRouter(TopKRouter):
    """A Megatron router that decides by a constraint.

    In training the subset is sampled, and gradients reach all logits through the estimator; in evaluation it is the
    most probable one. The expert bias shifts the *logits* for the choice (Megatron's router adds it to the scores), and
    leaves the weights alone.

    Args:
        config: Megatron's; ``moe_router_topk`` must be the constraint's largest count. Dispatchers send, and experts
            compute, what was chosen and nothing else.
        pg_collection: Megatron's process groups.
        constraint, options: see :class:`~circuitroute.integrations.hosted.Decider`.

    Raises:
        InfeasibleError: no subset of the experts satisfies the constraint.
        ValueError: settings that the constraint replaces, another ``moe_router_topk``, or a constraint that allows
            several counts where the dispatcher makes room for exactly T * moe_router_topk pairs of token and expert:
            "flex", and "alltoall" with ``moe_permute_fusion``.
    """

    def __init__(
        self,
        config: Any,
        pg_collection: Any = None,
        *,
        constraint: Constraint | Circuit,
        **options: Any,
    ) -> None:
        decider = Decider(constraint, config.num_moe_experts, **options)
        _check(config, decider)
        super().__init__(config, pg_collection)
        self.decider = decider

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled or copied.

        Raises:
            TypeError: the router is part of process groups, which no other process can be given.
        """
        held = [name for name, value in vars(self).items() if isinstance(value, ProcessGroup)]
        if held:
            raise TypeError(
                f"a router of Megatron holds process groups ({', '.join(held)}), which can be neither pickled nor "
                "copied: save its state_dict(), and build the layer again; what router() returns can be pickled"
            )
        state: dict[str, Any] = super().__getstate__()
        return state

    def gating(self, input: Tensor) -> Tensor:
        """[S, B, E] logits of hidden states [S, B, H], in float64 if so configured, else in float32."""
        # Megatron's own method needs a GPU and Transformer Engine.
        wide = torch.float64 if self.config.moe_router_dtype == "fp64" else torch.float32
        bias = None if self.bias is None else self.bias.to(wide)
        with without_autocast(input):
            return F.linear(input.to(wide), self.weight.to(wide), bias)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Decide.

        Args:
            logits: [S, B, E].
            padding_mask: [S, B] bool, True for padding: such tokens are routed, but not counted anywhere.

        Returns:
            (probs [T, E], 0 outside the chosen sets; routing_map [T, E] bool).

        Raises:
            ValueError: recorded decisions, of Megatron's ``RouterReplay`` or of :func:`replay`, that are not of these
                tokens, or that the constraint forbids.
        """
        S, B, E = logits.shape
        valid = None if padding_mask is None else ~padding_mask.reshape(-1)
        rows = self.apply_z_loss(logits.reshape(-1, E), None if valid is None else ~valid)
        routing = self.decider(
            rows,
            weights=self._weights(),
            # Counted sequence by sequence, whichever way these are distributed over processes.
            token=torch.arange(S * B, device=rows.device).view(B, S).t().reshape(-1),
            training=self.training,
            shift=self.expert_bias,
            renormalize=self.score_function == "sigmoid" and self.topk > 1,
            scale=self.config.moe_router_topk_scaling_factor or 1.0,
            replay=self._replayed_by_megatron(S * B),
        )
        if self._replay_action() is RouterReplayAction.RECORD:
            self.router_replay.record_indices(routing.padded(self.topk, pad="minus_one")[1])
        probs, mask = routing.gates, routing.mask
        if self.training and torch.is_grad_enabled():  # once under recomputation
            probs = self._with_aux_losses(probs, routing, valid, S, B)
            if self.enable_expert_bias:  # which is updated from this load
                self.local_tokens_per_expert += (mask if valid is None else mask & valid[:, None]).sum(0)
        return probs, mask

    def _replay_action(self) -> RouterReplayAction | None:
        """What Megatron's ``RouterReplay`` is told to do; None without ``moe_enable_routing_replay``."""
        return None if self.router_replay is None else self.router_replay.router_replay_action

    def _replayed_by_megatron(self, tokens: int) -> Tensor | None:
        """[T, E] bool, the decisions that Megatron's ``RouterReplay`` holds for this pass; None where it has none."""
        action = self._replay_action()
        if action is RouterReplayAction.REPLAY_FORWARD:
            indices = self.router_replay.target_topk_idx
        elif action is RouterReplayAction.REPLAY_BACKWARD:  # passes are recomputed in the order in which they were run
            waiting = self.router_replay.replay_backward_list
            indices = waiting.pop(0) if waiting else None
        else:
            return None
        if indices is None:
            raise ValueError(
                f"RouterReplay is to {action.value} and has no indices left: call RouterReplay.set_replay_data with "
                "those of all layers before the forward pass"
            )
        if len(indices) != tokens:
            raise ValueError(
                f"RouterReplay has indices of {len(indices)} tokens, and this forward pass routes {tokens}: give those "
                "of the same positions and sequences"
            )
        (mask,) = RoutingRecord.of_indices([indices], self.config.num_moe_experts).masks(indices.device)
        return mask

    def _weights(self) -> Weights:
        if self.score_function == "sigmoid":
            return "sigmoid"
        return "softmax" if self.config.moe_router_pre_softmax else "normalized"

    def _with_aux_losses(self, probs: Tensor, routing: Routing, valid: Tensor | None, S: int, B: int) -> Tensor:
        """``probs``, whose backward pass includes that of the configured balance losses."""
        if not self.is_aux_loss_enabled():
            return probs
        load, mass = routing.mask.to(routing.marginals.dtype), routing.marginals
        if valid is not None:
            load, mass = load * valid[:, None], mass * valid[:, None]
        tokens = len(probs) if valid is None else valid.sum()
        attach = partial(self._attach, tokens=tokens)
        probs = attach(probs, "aux_loss", load.sum(0), mass.sum(0), self.tp_cp_group)
        of_sequences = load.view(S, B, -1).sum(0), mass.view(S, B, -1).sum(0)
        probs = attach(probs, "seq_aux_loss", *of_sequences, self.tp_cp_group)
        if self.get_aux_loss_coeff("global_aux_loss") == 0:
            return probs
        averaged = self._averaged_load(load.sum(0), self.tp_dp_cp_group)
        return attach(probs, "global_aux_loss", averaged, mass.sum(0), self.tp_dp_cp_group)

    def _attach(
        self, probs: Tensor, kind: str, load: Tensor, mass: Tensor, group: ProcessGroup, *, tokens: int | Tensor
    ) -> Tensor:
        coefficient = self.get_aux_loss_coeff(kind)
        if coefficient == 0:
            return probs
        # Megatron sums gradients and logged losses over this group; those of circuitroute are meant to be averaged.
        loss = losses.balance(load, mass, group if group.size() > 1 else None).mean() / group.size()
        attached: Tensor = self.attach_and_log_load_balancing_loss(
            probs,
            coefficient,
            coefficient * loss,
            kind.replace("aux", "load_balancing"),
            group,
            reduce_group_has_dp=kind == "global_aux_loss",
            valid_token_count=tokens,
        )
        return attached

    @torch.no_grad()
    def _averaged_load(self, load_E: Tensor, group: ProcessGroup) -> Tensor:
        """[E] the load averaged over the micro-batches since Megatron last reset it, divided by the group's size.

        Megatron's counter holds sums over the group, and :func:`losses.balance` is about to sum over it again.
        """
        total = load_E.clone()
        if group.size() > 1:
            torch.distributed.all_reduce(total, group=group)
        self.global_tokens_per_expert += total
        self.ga_steps += 1
        averaged: Tensor = self.global_tokens_per_expert / self.ga_steps
        return averaged / group.size()


def _check(config: Any, decider: Decider) -> None:
    refuse_replaced(config, REPLACED)
    if "sinkhorn" in config.moe_router_load_balancing_type:
        raise ValueError(
            f"moe_router_load_balancing_type={config.moe_router_load_balancing_type!r}: Sinkhorn routing makes its own "
            f"decisions; use 'none', 'aux_loss', 'seq_aux_loss' or 'global_aux_loss'"
        )
    constraint = decider.circuit.constraint
    if config.moe_router_topk != decider.slots:
        raise ValueError(
            f"moe_router_topk={config.moe_router_topk}: it must be the largest number of experts per token, and "
            f"{constraint!r} allows up to {decider.slots}; set it to {decider.slots}"
        )
    if decider.fixed_count:
        return
    several = f"experts per token, and {constraint!r} allows fewer"
    if config.moe_token_dispatcher_type == "flex":
        raise ValueError(
            f"moe_token_dispatcher_type='flex' sends exactly moe_router_topk={decider.slots} {several}: use 'alltoall' "
            f"or 'allgather', or a constraint with a single count such as cr.Exactly({decider.slots})"
        )
    if config.moe_token_dispatcher_type == "alltoall" and config.moe_permute_fusion:
        raise ValueError(
            f"moe_permute_fusion=True with moe_token_dispatcher_type='alltoall' makes room for exactly "
            f"moe_router_topk={decider.slots} {several}: set it to False, so that the permutation makes room for what "
            "the routing map holds, or use 'allgather'"
        )
