"""circuitroute's routers in torchtitan's mixture-of-experts layers (written against torchtitan 0.3).

:func:`convert` puts a constraint in place of top-k in a model's config, before the model is built. The gate, the rule
for weights (``score_func``, ``route_norm``, ``route_scale``) and the state dict remain the model's.

Probes are further slots, whose scores are 0 in value and have the gates' gradient. torchtitan's dispatchers multiply
the experts' *outputs* by the scores, so this gradient is what the expert would have been worth; the backward pass
through the probed experts computes zeros.

Importing this module imports torchtitan. Legend, as there: B sequences, L positions, D model dimension, E experts, K
slots per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, SupportsIndex

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from circuitroute._validate import plain_word
from circuitroute.constraints import Constraint
from circuitroute.inference.circuit import Circuit
from circuitroute.integrations.hosted import GROUP_LIMIT, Decider, one_per_layer, refuse_replaced
from circuitroute.integrations.hosted import begin_step as begin_step
from circuitroute.integrations.hosted import recorded_routings as recorded_routings
from circuitroute.integrations.hosted import replay as replay
from circuitroute.keys import drawn_keys
from circuitroute.routing.choice import Decide
from circuitroute.routing.estimators import Estimator
from circuitroute.routing.probes import (
    ProbeCount,
    ProbeWeights,
    as_probe_count,
    as_probe_weights,
    padded_with_probes,
    plain_probe_weights,
    probe_slots,
    probe_weights,
    refuse_idle_probes,
)

try:
    from torchtitan.config.override import derive
    from torchtitan.models.common.moe import MoE, TokenChoiceTopKRouter
except ImportError as error:
    raise ImportError(
        "circuitroute.integrations.torchtitan needs torchtitan 0.3 and what it imports: pip install torchtitan==0.3.0"
    ) from error

# Settings of the router's config that would silently have no effect, and what to do instead.
REPLACED = {
    "num_expert_groups": GROUP_LIMIT,
    "num_limited_groups": GROUP_LIMIT,
    "_debug_force_load_balance": "this router does not force balance; set it to False",
}


class CircuitRouter(TokenChoiceTopKRouter):
    """A torchtitan router that decides by a constraint, with K slots per token for its largest count and the probes.

    In training the subset is sampled, and gradients reach all logits through the estimator; in evaluation it is the
    most probable one. The expert bias of auxiliary-loss-free balancing shifts the *logits* for the choice (torchtitan's
    router adds it to the scores), and leaves the weights alone. Slots that a token does not use have weight 0 and the
    ids of experts that it did not choose, as torchtitan's dispatchers require.

    Raises:
        ValueError: settings that the constraint replaces, or a ``top_k`` that is not the constraint's largest count.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(TokenChoiceTopKRouter.Config):
        """The host's fields, the arguments of :class:`~circuitroute.integrations.hosted.Decider`, and ``probes`` and
        ``probe_weights`` as in :class:`circuitroute.MoE`.
        """

        constraint: Constraint | Circuit
        estimator: str | Estimator = "simple"
        seed: int | None = None
        decide: Decide | float | None = None
        temperature: float = 1.0
        probes: ProbeCount = 0
        probe_weights: ProbeWeights = "importance"

    def __init__(self, config: Config) -> None:
        refuse_replaced(config, REPLACED)
        super().__init__(config)
        self.decider = Decider(
            config.constraint,
            config.num_experts,
            estimator=config.estimator,
            seed=config.seed,
            decide=config.decide,
            temperature=config.temperature,
        )
        self.probes = as_probe_count(config.probes)
        self.probe_weights = plain_probe_weights(config.probe_weights)
        needed = _slots(self.decider, config.probes, config.probe_weights)
        if config.top_k != needed:
            raise ValueError(
                f"top_k={config.top_k}: {config.constraint!r} with probes={config.probes!r} needs {needed} slots per "
                f"token; make the config with circuit_moe() or convert(), which set this for the router and the "
                f"dispatcher"
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
        key, token = None, torch.arange(B * L, device=logits_BLE.device)
        if self.training and self.probes:
            key = self.decider.keys(token)
            key = drawn_keys(B * L, token.device) if key is None else key
        routing = self.decider(
            logits_BLE.reshape(-1, E),
            weights=self.score_func,
            token=token,
            training=self.training,
            shift=expert_bias_E,
            renormalize=self.route_norm,
            scale=self.route_scale,
            key=key,
        )
        if self.is_probing():
            worth_TE = probe_weights(routing, self.probes, key, self.probe_weights)
            weights_TK, ids_TK = padded_with_probes(routing, worth_TE, self.top_k)
        else:
            weights_TK, ids_TK = routing.padded(self.top_k)
        scores_BLE = logits_BLE.sigmoid() if self.score_func == "sigmoid" else logits_BLE.softmax(-1)
        # Dispatchers flatten the ids with view().
        return weights_TK.reshape(B, L, -1), ids_TK.contiguous().view(B, L, -1), scores_BLE

    def is_probing(self) -> bool:
        """Whether a forward pass runs probes now: in training, with gradients enabled."""
        return bool(self.probes) and self.training and torch.is_grad_enabled()

    def _logits(self, x_BLD: Tensor) -> Tensor:
        # In float32 on GPUs, as in the host; autocast on CPUs has no such mode and would only warn.
        on_gpu = x_BLD.device.type != "cpu"
        with torch.autocast(x_BLD.device.type, dtype=torch.float32 if on_gpu else None, enabled=on_gpu):
            logits_BLE: Tensor = self.gate(x_BLD)
        if isinstance(logits_BLE, DTensor):
            raise TypeError(
                f"the gate returned a DTensor ({logits_BLE.placements}): tensor and expert parallelism of the router "
                f"are not supported by this adapter; use data parallelism (DDP, FSDP) or torchtitan's own router"
            )
        return logits_BLE if logits_BLE.dtype == torch.float64 else logits_BLE.float()


def _slots(decider: Decider, probes: ProbeCount, weights: ProbeWeights) -> int:
    """How many slots a token needs, or an error that says what is wrong with the probes."""
    as_probe_weights(weights)
    refuse_idle_probes(as_probe_count(probes), decider.estimator)
    return min(decider.circuit.n, decider.slots + probe_slots(decider.circuit, probes))


def circuit_moe(
    config: Any,
    constraint: Constraint | Circuit,
    *,
    probes: ProbeCount = 0,
    probe_weights: ProbeWeights = "importance",
    **options: Any,
) -> Any:
    """The config of a mixture-of-experts layer, with a constraint in place of top-k.

    For a factory of torchtitan's ``@override(target=MoE.Config)``; :func:`convert` applies it to a whole model.

    Args:
        config: a ``MoE.Config``, or that of a subclass; not changed.
        constraint: what is allowed, over its experts; or a circuit.
        probes, probe_weights: in training, how many unchosen experts every token runs besides, or ``"all"``, and how
            much each counts in the gradient of the gates: see :class:`circuitroute.MoE`.
        options: ``estimator``, ``seed``, ``decide`` and ``temperature`` of
            :class:`~circuitroute.integrations.hosted.Decider`.

    Returns:
        A config of the same kind, whose layer counts the sampled experts as load: no unused slots, and no probes.

    Raises:
        InfeasibleError: no subset of the layer's experts satisfies the constraint.
        TypeError: not such a config, or not a constraint.
        ValueError: settings that the constraint replaces; probes with the estimators ``"none"`` and ``"score"``, where
            unchosen experts' gates have no gradient.
    """
    if not isinstance(config, MoE.Config):
        raise TypeError(f"config is a {type(config).__qualname__}: expected the MoE.Config of a layer")
    refuse_replaced(config.router, REPLACED)
    decider = Decider(constraint, config.num_experts, **options)  # bad options raise here, before anything is built
    slots = _slots(decider, probes, probe_weights)
    probing = {"probes": as_probe_count(probes), "probe_weights": plain_probe_weights(probe_weights)}
    # As the decider has them, plain: configs are printed and written to files.
    kept = {name: getattr(decider, name) if name != "estimator" else plain_word(options[name]) for name in options}
    router = derive(config.router, CircuitRouter.Config, top_k=slots, constraint=constraint, **probing, **kept)
    experts = config.routed_experts
    dispatcher = derive(experts.token_dispatcher, type(experts.token_dispatcher), top_k=slots)
    routed = derive(experts, type(experts), token_dispatcher=dispatcher)
    return derive(config, _counting(type(config)._owner).Config, router=router, routed_experts=routed)


def convert(
    model: Any,
    constraint: Constraint | Circuit | Sequence[Constraint | Circuit],
    **options: Any,
) -> int:
    """Replace top-k by a constraint in all mixture-of-experts layers of a model's config, which is changed.

    Args:
        model: a config that contains such layers, before ``build()``.
        constraint: one for all layers, or one per layer, in order; or circuits.
        options: of :func:`circuit_moe`: ``estimator``, ``seed``, ``decide``, ``temperature``, ``probes`` and
            ``probe_weights``.

    Returns:
        How many layers there are.

    Raises:
        ValueError: there is no such layer, the number of constraints differs from that of the layers, or
            :func:`circuit_moe` refuses one.
    """
    found = list(model.traverse(MoE.Config))
    if not found:
        raise ValueError(f"model ({type(model).__qualname__}) has no mixture-of-experts layer: nothing to convert")
    rules = one_per_layer(constraint, len(found))
    new = [circuit_moe(config, rule, **options) for (_, config, _, _), rule in zip(found, rules, strict=True)]
    for (name, _, parent, place), config in zip(found, new, strict=True):
        if parent is None:
            raise ValueError(f"model is the layer {name!r} itself: use circuit_moe(), which returns a new config")
        if isinstance(parent, list):
            parent[place] = config
        else:
            setattr(parent, place, config)
    return len(found)


@cache
def _counting(owner: Any) -> Any:
    """The subclass of a MoE whose load counter counts the sampled experts only, and which has slots for probes only
    where these are run.
    """

    class CircuitMoE(owner):
        @dataclass(kw_only=True, slots=True)
        class Config(owner.Config):
            def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
                return _unpickled, (owner, True), *object.__reduce_ex__(self, 2)[2:]

        def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
            return _unpickled, (owner, False), self.__getstate__()

        def __init__(self, config: Config) -> None:
            super().__init__(config)
            if self.router.probes:
                self.router.register_forward_hook(self._narrow)
            if self.router.probes or not self.router.decider.fixed_count:
                self.router.register_forward_hook(self._discount_unused)

        def _narrow(self, router: Any, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> Any:
            # The chosen experts come first. The dispatcher divides by the number of slots.
            weights, ids, scores = output
            slots = router.top_k if router.is_probing() else router.decider.slots
            self.routed_experts.token_dispatcher.top_k = slots
            return weights[..., :slots].contiguous(), ids[..., :slots].contiguous(), scores

        @torch.no_grad()
        def _discount_unused(self, router: Any, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            # The layer is about to count all slots; unused ones and probes are those with weight 0.
            if self.training:
                weights, ids, _ = output
                load_E = self.tokens_per_expert_E
                load_E.index_add_(0, ids.flatten(), -(weights == 0).flatten().to(load_E.dtype))

    # These classes have no names to be found by: they are made again.
    CircuitMoE.__name__ = CircuitMoE.__qualname__ = f"Circuit{owner.__name__}"
    return CircuitMoE


def _unpickled(owner: Any, config: bool) -> Any:
    """A layer of :func:`_counting`, or a config of one, that is about to be given its state."""
    kind = _counting(owner)
    return object.__new__(kind.Config if config else kind)
