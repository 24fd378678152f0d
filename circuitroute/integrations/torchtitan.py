"""circuitroute's routers in torchtitan's mixture-of-experts layers (written against torchtitan 0.3).

:func:`convert` puts a constraint in place of top-k in a model's config, before the model is built. The gate, the rule
for weights (``score_func``, ``route_norm``, ``route_scale``) and the state dict remain the model's.

Probes are further slots, whose scores are 0 in value and have the gates' gradient. torchtitan's dispatchers multiply
the experts' *outputs* by the scores, so this gradient is what the expert would have been worth; the backward pass
through the probed experts computes zeros.

Slots that are not used have the score -0.0, the sign of which tells them from probes. The dispatchers made here leave
such slots out before the experts run; any other computes them and weighs them by 0, which is as right.

Importing this module imports torchtitan. Legend, as there: B sequences, L positions, T = B L tokens, D model dimension,
E experts, K slots per token; S the slots in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, SupportsIndex, TypeAlias, get_args

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from circuitroute._tensors import traced, without_autocast
from circuitroute._validate import one_of, plain_word
from circuitroute.constraints import Constraint
from circuitroute.inference.circuit import Circuit
from circuitroute.integrations.hosted import GROUP_LIMIT, Decider, one_per_layer, refuse_replaced
from circuitroute.integrations.hosted import begin_step as begin_step
from circuitroute.integrations.hosted import recorded_routings as recorded_routings
from circuitroute.integrations.hosted import replay as replay
from circuitroute.keys import drawn_keys
from circuitroute.routing.choice import Decide
from circuitroute.routing.decision import Routing
from circuitroute.routing.estimators import Estimator
from circuitroute.routing.probes import (
    ProbeCount,
    ProbeWeights,
    as_probe_count,
    as_probe_weights,
    plain_probe_weights,
    probe_slots,
    probe_weights,
    refuse_idle_probes,
)

try:
    from torchtitan.config.override import derive
    from torchtitan.models.common.moe import MoE, TokenChoiceTopKRouter
    from torchtitan.models.common.token_dispatcher import (
        AllToAllTokenDispatcher,
        LocalTokenDispatcher,
        TorchAOTokenDispatcher,
    )
except ImportError as error:
    raise ImportError(
        "circuitroute.integrations.torchtitan needs torchtitan 0.3 and what it imports: pip install torchtitan==0.3.0"
    ) from error

Padding: TypeAlias = Literal["auto", "distinct", "ragged"]

# Dispatchers that gather the rows of all slots in one method, _local_reorder, and go by its counts.
REORDERING = (LocalTokenDispatcher, AllToAllTokenDispatcher, TorchAOTokenDispatcher)

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
    router adds it to the scores), and leaves the weights alone. Slots that a token does not use have the weight -0.0
    and the ids of experts that it did not choose, as torchtitan's dispatchers require; probes have the weight 0.0. A
    row without a decision, of NaN, has weights of NaN.

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
        worth_TE = None
        if self.is_probing():
            worth_TE = probe_weights(routing, self.probes, key, self.probe_weights)
        weights_TK, ids_TK = _in_slots(routing, worth_TE, self.top_k)
        scores_BLE = logits_BLE.sigmoid() if self.score_func == "sigmoid" else logits_BLE.softmax(-1)
        # Dispatchers flatten the ids with view().
        return weights_TK.reshape(B, L, self.top_k), ids_TK.contiguous().view(B, L, self.top_k), scores_BLE

    def is_probing(self) -> bool:
        """Whether a forward pass runs probes now: in training, with gradients enabled."""
        return bool(self.probes) and self.training and torch.is_grad_enabled()

    def _logits(self, x_BLD: Tensor) -> Tensor:
        # In float32 on GPUs, as in the host; autocast on CPUs has no such mode and would only warn.
        kind = x_BLD.device.type
        context = nullcontext() if kind in ("cpu", "meta") else torch.autocast(kind, dtype=torch.float32)
        with without_autocast(x_BLD), context:
            logits_BLE: Tensor = self.gate(x_BLD)
        if isinstance(logits_BLE, DTensor):
            raise TypeError(
                f"the gate returned a DTensor ({logits_BLE.placements}): a router that is sharded, as under tensor "
                f"parallelism, is not supported by this adapter; use data and expert parallelism without it, or "
                f"torchtitan's own router"
            )
        return logits_BLE if logits_BLE.dtype == torch.float64 else logits_BLE.float()


def _in_slots(routing: Routing, worth_TE: Tensor | None, slots: int) -> tuple[Tensor, Tensor]:
    """(weights [T, K], distinct ids [T, K]): the chosen experts, then probes, then others, those of high logits first.

    Args:
        routing: a decision.
        worth_TE: how much each expert counts as a probe, 0 where it is none; None where there are no probes.
        slots: K.
    """
    gates_TE, used_TE = routing.gates, routing.mask
    # atan keeps the order of logits and makes the infinite ones finite.
    rank_TE = routing.logits.detach().atan() + 8.0 * routing.mask
    if worth_TE is not None:
        probed_TE = worth_TE > 0
        gates_TE = gates_TE * torch.where(routing.mask, 1.0, worth_TE)
        used_TE, rank_TE = used_TE | probed_TE, rank_TE + 4.0 * probed_TE
    ids_TK = rank_TE.topk(slots).indices
    weights_TK = gates_TE.gather(-1, ids_TK)
    # Weights of NaN, of rows without a decision, are not to pass for 0. Adding 0 makes 0.0 of a probe's -0.0.
    used_TK = used_TE.gather(-1, ids_TK) | weights_TK.isnan()
    return torch.where(used_TK, weights_TK + 0.0, -0.0), ids_TK


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
    padding: Padding = "auto",
    **options: Any,
) -> Any:
    """The config of a mixture-of-experts layer, with a constraint in place of top-k.

    For a factory of torchtitan's ``@override(target=MoE.Config)``; :func:`convert` applies it to a whole model.

    Args:
        config: a ``MoE.Config``, or that of a subclass; not changed.
        constraint: what is allowed, over its experts; or a circuit.
        probes, probe_weights: in training, how many unchosen experts every token runs besides, or ``"all"``, and how
            much each counts in the gradient of the gates: see :class:`circuitroute.MoE`.
        padding: what becomes of slots that a token does not use. ``"ragged"``: the dispatcher leaves them out, so that
            experts compute what was chosen, and probes; in traced programs, such as those of ``torch.compile``, whose
            shapes are not to depend on values, all slots are computed. ``"distinct"``: the dispatcher remains the
            config's, and all slots are computed, unused ones with weight 0. ``"auto"``: ``"ragged"`` for torchtitan's
            local and all-to-all dispatchers, ``"distinct"`` for others.
        options: ``estimator``, ``seed``, ``decide`` and ``temperature`` of
            :class:`~circuitroute.integrations.hosted.Decider`.

    Returns:
        A config of the same kind, whose layer counts the sampled experts as load: no unused slots, and no probes.

    Raises:
        InfeasibleError: no subset of the layer's experts satisfies the constraint.
        TypeError: not such a config, or not a constraint.
        ValueError: settings that the constraint replaces; probes with the estimators ``"none"`` and ``"score"``, where
            unchosen experts' gates have no gradient; ``padding="ragged"`` for a dispatcher that is not one of
            torchtitan's local and all-to-all ones.
    """
    if not isinstance(config, MoE.Config):
        raise TypeError(f"config is a {type(config).__qualname__}: expected the MoE.Config of a layer")
    refuse_replaced(config.router, REPLACED)
    decider = Decider(constraint, config.num_experts, **options)  # bad options raise here, before anything is built
    slots = _slots(decider, probes, probe_weights)
    probing = {"probes": as_probe_count(probes), "probe_weights": plain_probe_weights(probe_weights)}
    # As the decider has them, plain: configs are printed and written to files. All of them, since a config may have
    # been converted before.
    kept = {name: getattr(decider, name) for name in ("seed", "decide", "temperature")}
    kept["estimator"] = plain_word(options.get("estimator", "simple"))
    router = derive(config.router, CircuitRouter.Config, top_k=slots, constraint=constraint, **probing, **kept)
    experts = config.routed_experts
    # Where every token uses all slots there is nothing to leave out.
    sparing = bool(probing["probes"]) or not decider.fixed_count
    kind = _dispatcher(type(experts.token_dispatcher), plain_word(padding), sparing)
    dispatcher = derive(experts.token_dispatcher, kind, top_k=slots)
    routed = derive(experts, type(experts), token_dispatcher=dispatcher)
    return derive(config, _counting(_host(type(config)._owner)).Config, router=router, routed_experts=routed)


def convert(
    model: Any,
    constraint: Constraint | Circuit | Sequence[Constraint | Circuit],
    **options: Any,
) -> int:
    """Replace top-k by a constraint in all mixture-of-experts layers of a model's config, which is changed.

    Args:
        model: a config that contains such layers, before ``build()``.
        constraint: one for all layers, or one per layer, in order; or circuits.
        options: of :func:`circuit_moe`: ``estimator``, ``seed``, ``decide``, ``temperature``, ``probes``,
            ``probe_weights`` and ``padding``.

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


def _dispatcher(config: Any, padding: str, sparing: bool) -> Any:
    """The class of a dispatcher's config: the host's, or of its subclass that leaves unused slots out.

    Args:
        config: the class of the layer's dispatcher config.
        padding: see :func:`circuit_moe`.
        sparing: whether there may be unused slots.

    Raises:
        ValueError: an unknown ``padding``, or ``"ragged"`` for a dispatcher that has its own way of dispatching.
    """
    one_of("padding", padding, get_args(Padding))
    owner = _host(config._owner)
    known = any(
        owner.dispatch is kind.dispatch and owner._local_reorder is kind._local_reorder and issubclass(owner, kind)
        for kind in REORDERING
    )
    if padding == "ragged" and not known:
        names = ", ".join(kind.__name__ for kind in REORDERING)
        raise ValueError(
            f"padding='ragged': {owner.__qualname__} dispatches in its own way, and whether it can leave slots out is "
            f"not known; use padding='distinct', or one of {names}"
        )
    return _ragged(owner).Config if known and sparing and padding != "distinct" else owner.Config


def _used(scores_TK: Tensor) -> Tensor:
    """[T, K] bool: all slots but those with the score -0.0."""
    return (scores_TK != 0) | ~torch.signbit(scores_TK)


@cache
def _ragged(owner: Any) -> Any:
    """The subclass of a token dispatcher that leaves unused slots out, except in traced programs."""

    class RaggedTokenDispatcher(owner):
        _host = owner

        @dataclass(kw_only=True, slots=True)
        class Config(owner.Config):
            def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
                return _unpickled, (_ragged, owner, True), *object.__reduce_ex__(self, 2)[2:]

        def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
            return _unpickled, (_ragged, owner, False), self.__getstate__()

        def dispatch(self, x_TD: Tensor, scores_TK: Tensor, ids_TK: Tensor, counts_E: Tensor) -> Any:
            if not traced(scores_TK):
                # The layer counts all slots.
                chosen_TE = counts_E.new_zeros(len(ids_TK), self.num_experts, dtype=torch.bool)
                counts_E = chosen_TE.scatter_(-1, ids_TK, _used(scores_TK)).sum(0).to(counts_E.dtype)
            return super().dispatch(x_TD, scores_TK, ids_TK, counts_E)

        def _local_reorder(self, x_TD: Tensor, scores_TK: Tensor, ids_TK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            if traced(scores_TK):
                reordered: tuple[Tensor, Tensor, Tensor] = super()._local_reorder(x_TD, scores_TK, ids_TK)
                return reordered
            slot_S = _used(scores_TK).flatten().nonzero().squeeze(-1)
            # By expert, and then by token, as all slots would be.
            slot_S = slot_S[ids_TK.flatten()[slot_S].argsort(stable=True)]
            token_S = slot_S // scores_TK.shape[-1]
            return x_TD[token_S], token_S, scores_TK.flatten()[slot_S]

    RaggedTokenDispatcher.__name__ = RaggedTokenDispatcher.__qualname__ = f"Ragged{owner.__name__}"
    return RaggedTokenDispatcher


@cache
def _counting(owner: Any) -> Any:
    """The subclass of a MoE whose load counter counts the sampled experts only, and which has slots for probes only
    where these are run.
    """

    class CircuitMoE(owner):
        _host = owner

        @dataclass(kw_only=True, slots=True)
        class Config(owner.Config):
            def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
                return _unpickled, (_counting, owner, True), *object.__reduce_ex__(self, 2)[2:]

        def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
            return _unpickled, (_counting, owner, False), self.__getstate__()

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
            # The layer is about to count all slots; unused ones and probes are those with weight 0, and rows without a
            # decision have weights of NaN.
            if self.training:
                weights, ids, _ = output
                load_E = self.tokens_per_expert_E
                uncounted = (weights == 0) | weights.isnan()
                load_E.index_add_(0, ids.flatten(), -uncounted.flatten().to(load_E.dtype))

    # These classes have no names to be found by: they are made again.
    CircuitMoE.__name__ = CircuitMoE.__qualname__ = f"Circuit{owner.__name__}"
    return CircuitMoE


def _host(owner: Any) -> Any:
    """What :func:`_counting` or :func:`_ragged` made ``owner`` of; ``owner`` itself if they did not make it."""
    return vars(owner).get("_host", owner)


def _unpickled(subclass: Any, owner: Any, config: bool) -> Any:
    """An object of ``subclass(owner)``, or a config of one, that is about to be given its state."""
    kind = subclass(owner)
    return object.__new__(kind.Config if config else kind)
