"""circuitroute's routers in DeepSpeed's mixture-of-experts layers (written against deepspeed 0.19).

:func:`convert` puts a constraint in place of top-k in the gates of a model's ``deepspeed.moe.layer.MoE`` layers. The
gate's weight, the state dict, the experts, the dispatch and the process groups remain DeepSpeed's.

A gate tells its layer K routes per token, of which those with the expert -1 are dropped: what a token does not use
takes no row of an expert. DeepSpeed makes room for the same number of rows, the capacity, in every expert; here that is
the largest load of any expert, so that nothing that was chosen is dropped.

Importing this module imports deepspeed. Legend: T tokens of this process, H hidden size, E experts, K routes per token,
C capacity.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from circuitroute._tensors import without_autocast
from circuitroute.constraints import Constraint
from circuitroute.inference.circuit import Circuit
from circuitroute.integrations.hosted import Decider, one_per_layer, refuse_replaced
from circuitroute.integrations.hosted import begin_step as begin_step
from circuitroute.integrations.hosted import recorded_routings as recorded_routings
from circuitroute.integrations.hosted import replay as replay
from circuitroute.routing import losses
from circuitroute.routing.decision import Routing

try:
    from deepspeed import comm
    from deepspeed.comm import pg_utils
    from deepspeed.moe.sharded_moe import TOPK_GATE_TIMER, TopKGate
    from deepspeed.utils import groups
    from deepspeed.utils.bwc import bwc_tensor_model_parallel_world_size
except ImportError as error:
    raise ImportError(
        "circuitroute.integrations.deepspeed needs deepspeed 0.19 and what it imports: pip install deepspeed==0.19.8"
    ) from error

# Settings of the gate that the constraint replaces or that would change its decision, and what to do instead.
REPLACED = {
    "drop_tokens": "a capacity (capacity_factor, eval_capacity_factor, min_capacity) would drop experts from the "
    "sampled sets; build the layer with drop_tokens=False, and bound the experts per token, such as by "
    "cr.Between(1, 4)",
}
NOISE = "decisions are sampled from the exact distribution, whose temperature is the noise; set it to None"


class CircuitGate(TopKGate):
    """A DeepSpeed gate that decides by a constraint; :func:`convert` makes it of a ``TopKGate``.

    In training the subset is sampled, and gradients reach all logits through the estimator; in evaluation it is the
    most probable one. Weights are the softmax over the chosen experts, or, where the constraint allows one expert at
    most, the softmax over all of them: DeepSpeed's rules for several experts and for one. The balance loss is
    :func:`circuitroute.losses.load_balance`: of the sampled set and the exact marginals.
    """

    decider: Decider

    def forward(
        self,
        input: Tensor,
        used_token: Tensor | None = None,
        sparse_routes: bool = False,
        use_tutel: bool = False,
    ) -> tuple[Any, ...]:
        """Decide for T tokens.

        Args:
            input: [T, H], any floating dtype; the logits are computed in float32, or float64.
            used_token: [T], 0 for tokens that are padding: those have no expert, and count in no load and no loss.
            sparse_routes: which of DeepSpeed's two forms to return.
            use_tutel: no difference here.

        Returns:
            With ``sparse_routes`` (balance loss [], C [] int64, E, experts [K, T] int32 with -1 for none, rows within
            the experts [K, T] int32, weights [K, T], load [E] int64); otherwise (balance loss, weights [T, E, C], that
            as bool, load).
        """
        if self.wall_clock_breakdown:
            self.timers(TOPK_GATE_TIMER).start()
        wide = torch.promote_types(input.dtype, torch.float32)
        with without_autocast(input):
            logits_TE = F.linear(input.to(wide), self.wg.weight.to(wide))
        routing = self.decider(
            logits_TE,
            weights="softmax" if self.k == 1 else "normalized",
            token=torch.arange(len(logits_TE), device=logits_TE.device),
            training=self.training,
        )
        chosen_TE, mass_TE = routing.mask, routing.marginals
        if used_token is not None:
            real_T1 = (used_token.reshape(-1, 1) != 0).to(chosen_TE.device)
            chosen_TE, mass_TE = chosen_TE & real_T1, mass_TE * real_T1
        load_E = chosen_TE.sum(0)
        balance = losses.balance(load_E.to(mass_TE.dtype), mass_TE.sum(0))
        room = self._room(load_E)
        routes = self._routes(routing, chosen_TE) if sparse_routes else _dense(routing.gates, chosen_TE, int(room))
        if self.wall_clock_breakdown:
            self.timers(TOPK_GATE_TIMER).stop()
            self.gate_time = self.timers(TOPK_GATE_TIMER).elapsed(reset=False)
        return (balance, room, self.decider.circuit.n, *routes, load_E) if sparse_routes else (balance, *routes, load_E)

    def _routes(self, routing: Routing, chosen_TE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(experts, rows within the experts, weights), [K, T] each."""
        ids_TK = chosen_TE.float().topk(self.k).indices
        used_TK, weights_TK = chosen_TE.gather(-1, ids_TK), routing.gates.gather(-1, ids_TK)
        rows_TK = torch.where(used_TK, _rows(chosen_TE).gather(-1, ids_TK), 0)
        ids_TK = torch.where(used_TK, ids_TK, -1)
        # Weights of NaN, of tokens without a decision, remain: the layer multiplies what is not there by them.
        weights_TK = torch.where(used_TK | weights_TK.isnan(), weights_TK, 0.0)
        return ids_TK.t().contiguous().int(), rows_TK.t().contiguous().int(), weights_TK.t().contiguous()

    def _room(self, load_E: Tensor) -> Tensor:
        """[] int64: the largest load of any expert, of all processes that share the experts; C."""
        most = load_E.max()
        if pg_utils.is_parallel(self.ep_group):
            comm.all_reduce(most, op=comm.ReduceOp.MAX, group=self.ep_group)
        if groups.mpu is not None and groups._get_expert_model_parallel_world_size() == 1:
            # Tensor-parallel processes hold the same tokens, and each of them takes its share of the rows.
            shares = bwc_tensor_model_parallel_world_size(mpu=groups.mpu)
            most = (most + shares - 1) // shares * shares
        return most


def _rows(chosen_TE: Tensor) -> Tensor:
    """[T, E] int64: the row of every chosen token among those of the expert."""
    return chosen_TE.cumsum(0) - 1


def _dense(gates_TE: Tensor, chosen_TE: Tensor, room: int) -> tuple[Tensor, Tensor]:
    """([T, E, C] the weights of tokens in the rows of the experts, [T, E, C] bool: which rows they take)."""
    rows_TE1 = torch.where(chosen_TE, _rows(chosen_TE), 0)[..., None]
    weights_TE1 = torch.where(chosen_TE, gates_TE, 0.0)[..., None]
    weights = gates_TE.new_zeros(*gates_TE.shape, room)
    weights = weights.scatter_add(-1, rows_TE1, weights_TE1) if room else weights
    # Tokens without a decision take no row, and get NaN for what is in all of them.
    return weights.masked_fill(gates_TE.isnan()[..., None], torch.nan), weights.bool()


def convert(model: nn.Module, constraint: Any, **options: Any) -> int:
    """Replace top-k by a constraint in all mixture-of-experts layers of a model, which is changed.

    Before ``deepspeed.initialize`` or after. Gates keep their weights, their names in the state dict, their hooks and
    being a ``TopKGate``; those that were converted before get the new constraint. A gate that is refused leaves all as
    they were.

    Args:
        model: a model that contains ``deepspeed.moe.layer.MoE`` layers, or the engine that holds it.
        constraint: one for all layers, or one per layer in the order of ``model.modules()``; or circuits.
        options: ``estimator``, ``seed``, ``decide`` and ``temperature`` of
            :class:`~circuitroute.integrations.hosted.Decider`.

    Returns:
        How many layers there are.

    Raises:
        InfeasibleError: no subset of a layer's experts satisfies the constraint.
        TypeError: a gate of a class of its own, or not a constraint.
        ValueError: there is no such layer, or one that AutoEP made; the number of constraints differs from that of the
            layers; a gate's ``k`` is not the constraint's largest count, or it has settings that the constraint
            replaces.
    """
    others = [name for name, module in model.named_modules() if getattr(module, "_is_autoep_layer", False)]
    if others:
        raise ValueError(
            f"model has layers that AutoEP made ({', '.join(others)}): their router is a top-k of its own, which is "
            "not converted; leave expert_parallel out of DeepSpeed's configuration"
        )
    gates = [(name, module) for name, module in model.named_modules() if isinstance(module, TopKGate)]
    if not gates:
        raise ValueError(
            f"model ({type(model).__name__}) has no mixture-of-experts layer of deepspeed.moe: nothing to convert"
        )
    rules = one_per_layer(constraint, len(gates))
    deciders = [_decider(name, gate, rule, options) for (name, gate), rule in zip(gates, rules, strict=True)]
    for (_, gate), decider in zip(gates, deciders, strict=True):
        gate.__class__ = CircuitGate
        gate.decider = decider
    return len(gates)


def _decider(name: str, gate: Any, constraint: Constraint | Circuit, options: dict[str, Any]) -> Decider:
    """What a gate is to decide by, if it can."""
    if type(gate) not in (TopKGate, CircuitGate):
        raise TypeError(
            f"gate {name!r} is a {type(gate).__qualname__}, which may decide in its own way: only TopKGate itself is "
            "converted"
        )
    if gate.noisy_gate_policy != "None":  # a word of DeepSpeed's for there being none
        refuse_replaced(gate, {"noisy_gate_policy": NOISE})
    refuse_replaced(gate, REPLACED)
    if gate.k == 2 and gate.top2_2nd_expert_sampling:
        raise ValueError(
            "top2_2nd_expert_sampling=True has no meaning under a constraint, whose subsets are sampled as a whole; "
            "set it to False"
        )
    decider = Decider(constraint, gate.wg.out_features, **options)
    if gate.k != decider.slots:
        raise ValueError(
            f"k={gate.k}: {constraint!r} allows up to {decider.slots} experts per token; build the layer with "
            f"k={decider.slots}"
        )
    return decider
