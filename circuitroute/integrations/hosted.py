"""What the adapters have in common: decisions for routers that belong to other libraries' models.

Such a router is called with hidden states alone. Everything else that a decision needs is kept in its
:class:`Decider`: the keys, which the training loop sets once per step with :func:`begin_step`, recorded decisions to
take instead of new ones, which it sets with :func:`replay`, and a list of decisions while :func:`recorded_routings` is
open. Forward changes none of it, so a layer that is recomputed decides the same.

Legend: T tokens of this process, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from circuitroute._validate import as_int, as_number, int_at_least, plain_option
from circuitroute.compilation import compile as compile_constraint
from circuitroute.constraints import Constraint
from circuitroute.inference.circuit import Circuit
from circuitroute.inference.temperature import as_temperature
from circuitroute.keys import fold_in, random_key
from circuitroute.routing.choice import Batch, Decide, as_share
from circuitroute.routing.decision import Routing
from circuitroute.routing.estimators import Dense, Estimator, as_estimator
from circuitroute.routing.records import RoutingRecord, same_temperature
from circuitroute.routing.replay import masks_for
from circuitroute.routing.route import routed

Weights = Literal["softmax", "normalized", "sigmoid"]

# The remedy for settings of a host that limit groups of experts.
GROUP_LIMIT = (
    "make the group limit part of the constraint, such as cr.ActiveGroups(cr.Groups(8), at_most=4) & cr.Exactly(8), "
    "and set this to None"
)


class Decider:
    """A constraint in place of a host router's top-k; the host keeps its linear map and its rule for weights.

    Args:
        constraint: what is allowed, over E experts; or a circuit, compiled already or read from a file.
        num_experts: E.
        estimator: as in :func:`circuitroute.route`.
        seed: keys are ``cr.random_key(seed, step, layer, token)``, see :func:`begin_step`; None draws from torch's
            global generator, which activation checkpointing restores only with ``preserve_rng_state=True``.
        decide, temperature: of decisions in training, as in :func:`circuitroute.route`; attributes that may be set.

    Attributes:
        slots: the largest number of experts that the constraint allows, but at least 1.
        fixed_count: whether all allowed subsets have the same size.

    Raises:
        InfeasibleError: no subset of E experts satisfies the constraint.
        TypeError, ValueError: a constraint, estimator or seed of the wrong kind, or a circuit over another number of
            experts.
    """

    def __init__(
        self,
        constraint: Constraint | Circuit,
        num_experts: int,
        *,
        estimator: str | Estimator = "simple",
        seed: int | None = None,
        decide: Decide | float | None = None,
        temperature: float = 1.0,
    ) -> None:
        self.circuit = compile_constraint(constraint, int_at_least("num_experts", num_experts, 1))
        self.estimator = as_estimator(estimator)
        as_share(decide, estimator)
        self.decide: Any = plain_option("decide", decide)
        self.temperature = as_temperature(as_number("temperature", temperature))
        self.seed = None if seed is None else as_int("seed", seed)
        self.slots = max(1, self.circuit.max_count)
        self.fixed_count = self.circuit.min_count == self.circuit.max_count
        self.recorded: list[Routing] | None = None
        self._position: Tensor | None = None  # [2] int64: the key of (seed, step, layer), the number of the first token
        # [T, E] bool by the tokens' numbers, the decisions to take; and the temperature at which they were made.
        self._replay: tuple[Tensor, float] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A list of whoever records, and decisions about tokens, both of this process.
        return {**vars(self), "recorded": None, "_replay": None}

    def begin(self, step: int, layer: int, offset: int, device: torch.device) -> None:
        """Set what the keys of the next forward passes are derived from; see :func:`begin_step`."""
        if self.seed is None:
            return
        position = torch.stack([random_key(self.seed, step, layer), torch.tensor(offset, device="cpu")]).to(device)
        if self._position is None or self._position.device != position.device:
            self._position = position
        else:
            self._position.copy_(position)  # in place, so that a compiled layer is not recompiled

    def replay(self, mask: Tensor | None, temperature: float = 1.0) -> None:
        """Take these decisions, [T, E] bool on the router's device, in the next forward passes; see :func:`replay`."""
        self._replay = None if mask is None else (mask, temperature)

    def keys(self, token: Tensor) -> Tensor | None:
        """[T] int64 keys of the tokens with these numbers [T] within this process; None without a seed.

        Raises:
            RuntimeError: there is a seed, but no step has begun.
        """
        if self.seed is None:
            return None
        if self._position is None:
            raise RuntimeError(
                f"seed={self.seed} was given, but no step has begun to derive keys from: call "
                f"begin_step(model, step) before every training step, or give seed=None"
            )
        position = self._position.to(token.device)
        return fold_in(position[0], position[1] + token)

    def __call__(
        self,
        logits: Tensor,
        *,
        weights: Weights,
        token: Tensor,
        training: bool,
        shift: Tensor | None = None,
        renormalize: bool = False,
        scale: float = 1.0,
        key: Tensor | None = None,
        replay: Tensor | None = None,
    ) -> Routing:
        """Decide for T tokens.

        Args:
            logits: [T, E], any floating dtype; the weights are computed from them.
            weights: ``"softmax"`` over all experts, ``"normalized"`` over the chosen ones, or ``"sigmoid"``.
            token: [T] int64, the tokens' numbers within this process, 0 to T - 1 in some order.
            training: sample when True, take the mode when False; neither where a record is replayed.
            shift: [E], added to the logits for the choice only, as auxiliary-loss-free balancing does.
            renormalize: whether to divide the weights of each token by their sum.
            scale: multiplies all weights.
            key: [T] int64, keys in place of the tokens' own.
            replay: [T, E] bool, decisions that the host itself recorded, in its order of tokens.

        Returns:
            The decision. Its distribution and marginals are those of the shifted logits, from which it was drawn. A
            chosen expert's weight is never 0, so a weight of 0 marks an unused slot.

        Raises:
            RuntimeError: there is a seed, but no step has begun.
            ValueError: the record that is replayed has another number of tokens or was made at another temperature; or
                there are two, the host's and one of :func:`replay`; or the constraint or infinite logits exclude a
                subset, named by row.
        """
        for_choice = logits if shift is None else logits + shift.detach().to(logits.dtype)
        replay = self._replayed(token, replay)
        key = (self.keys(token) if key is None else key) if training and replay is None else None
        share = as_share(self.decide, self.estimator) if training else 0.0
        batch = Batch.of(for_choice, self.circuit, key=key, temperature=self.temperature)
        given = batch.logits if shift is None else logits.to(batch.logits.dtype)
        batch = batch._replace(logits=given)
        decided = routed(batch, share, combine=weights, estimator=self.estimator, replay=replay)
        gates = decided.gates
        if renormalize:
            # DenseMixer's gates of unchosen experts have a gradient that the sum over the chosen does not share.
            gates = divided_by_sum(gates, decided.mask if isinstance(self.estimator, Dense) else None)
        gates = gates * scale
        gates = torch.where(decided.mask & (gates == 0), torch.finfo(gates.dtype).tiny, gates)
        routing = decided.weighed(gates, batch.logits)
        routing.token = token
        if self.recorded is not None:
            self.recorded.append(routing)
        return routing

    def _replayed(self, token: Tensor, by_host: Tensor | None) -> Tensor | None:
        """[T, E] bool, the recorded decisions for the tokens with these numbers; None where none are replayed."""
        if self._replay is None:
            return by_host
        if by_host is not None:
            raise ValueError(
                "replay: there are two records, one of replay(model, record) and one that the model's own library "
                "replays; end one of them, such as by replay(model, None)"
            )
        mask, temperature = self._replay
        if len(mask) != len(token):
            raise ValueError(
                f"replay: this forward pass routes {len(token)} tokens, and the record is of {len(mask)}: give each "
                "forward pass the record of this process's tokens, of which record.split(lengths) makes parts, or call "
                "replay(model, None) for new decisions"
            )
        if not same_temperature(temperature, float(self.temperature)):
            raise ValueError(
                f"replay: the record was made at temperature {temperature:g}, and the router now decides at "
                f"{float(self.temperature):g}: log-probabilities depend on it; set the temperature to the record's"
            )
        return mask.to(token.device)[token]


def begin_step(model: nn.Module | Sequence[nn.Module], step: int, *, offset: int = 0) -> None:
    """Set the training step of a model's routers; call it before the forward pass, on every process.

    Their keys become ``cr.random_key(seed, step, layer, offset + token)``, where tokens are numbered within this
    process. The layer is the router's own number if it has one, else the last number in its name
    ("layers.3.moe.router"), else its place among the routers.

    Keys hold until the next call. Micro-batches of one step share them unless each gets its own offset. Sharing is
    correct too, and is what schedules need that run several forward passes before a backward pass recomputes the first.

    Args:
        model: a model, or its parts on this process; it may be wrapped by DDP, FSDP, checkpointing or torch.compile.
        step: the training step.
        offset: the number of this process's first token among those of all processes, such as rank * T. Processes that
            share tokens, as under tensor parallelism, must be given the same.

    Raises:
        ValueError: the model has no circuitroute router.
        TypeError: ``step`` or ``offset`` is not an integer.
    """
    first = as_int("offset", offset)
    for position, (name, router, decider) in enumerate(_hosted(model)):
        decider.begin(step, _layer(name, router, position), first, _device(router))


def replay(model: nn.Module | Sequence[nn.Module], record: RoutingRecord | None) -> None:
    """Take recorded decisions in all forward passes, of training and of evaluation, until ``replay(model, None)``.

    Gates, log-probabilities and gradients are those of the recorded decisions under the model as it is; layers that are
    recomputed decide the same. The record is checked whole before any router is given its part, and a record that is
    refused leaves the routers as they were. Copies and pickles of a model replay nothing.

    Args:
        model: as in :func:`begin_step`.
        record: of all routers of the model, or of its parts on this process, in the order in which its modules list
            them; its tokens are those of the next forward pass on this process, numbered as their keys are: sequence by
            sequence. None ends it. Micro-batches have a record each, set before the forward pass; and again before a
            backward pass that recomputes layers, where the forward pass of another micro-batch came between.

    Raises:
        TypeError: ``record`` is none.
        ValueError: the model has no circuitroute router; or the record is of other numbers of layers or experts, was
            made at another temperature or under another constraint, or holds a subset that a layer forbids, named with
            its rows. Another number of tokens is found in the forward pass.
    """
    hosted = _hosted(model)
    deciders = [decider for *_, decider in hosted]
    if record is None:
        for decider in deciders:
            decider.replay(None)
        return
    temperatures = [float(decider.temperature) for decider in deciders]
    masks = masks_for(record, [decider.circuit for decider in deciders], temperatures)
    placed = [mask.to(_device(router)) for mask, (_, router, _) in zip(masks, hosted, strict=True)]
    for decider, mask in zip(deciders, placed, strict=True):
        decider.replay(mask, record.temperature)


@contextmanager
def recorded_routings(model: nn.Module | Sequence[nn.Module]) -> Iterator[list[Routing]]:
    """Collect the decisions that a model's routers make inside the block, in order, for losses and metrics.

    Close it before the backward pass, so that recomputed layers are not recorded again::

        with recorded_routings(model) as routings:
            loss = loss_function(model(tokens), labels)
        loss = loss + 0.01 * sum(cr.losses.load_balance(routing) for routing in routings)

    Raises:
        ValueError: the model has no circuitroute router.
    """
    deciders = [decider for *_, decider in _hosted(model)]
    routings: list[Routing] = []
    for decider in deciders:
        decider.recorded = routings
    try:
        yield routings
    finally:
        for decider in deciders:
            decider.recorded = None


def divided_by_sum(weights: Tensor, mask: Tensor | None = None) -> Tensor:
    """[T, K] weights divided by their sum as in DeepSeek's models, so that weights of 0 remain 0.

    Args:
        mask: [T, K] bool, which of them are added up; None for all.
    """
    summed = weights if mask is None else torch.where(mask, weights, 0.0)
    return weights / (summed.sum(-1, keepdim=True) + 1e-20)


def one_per_layer(constraint: Any, layers: int) -> list[Constraint | Circuit]:
    """The constraints of a model's mixture-of-experts layers, given one for all of them or one for each.

    Raises:
        ValueError: a sequence of another length.
    """
    several = isinstance(constraint, Sequence) and not isinstance(constraint, str)
    constraints: list[Constraint | Circuit] = list(constraint) if several else [constraint] * layers
    if len(constraints) != layers:
        raise ValueError(
            f"constraint has {len(constraints)} entries, but the model has {layers} mixture-of-experts layers: give "
            f"one for all of them, or one for each"
        )
    return constraints


def refuse_replaced(config: Any, replaced: Mapping[str, str]) -> None:
    """Refuse settings of a host that a constraint would leave without effect; ``replaced`` has a remedy for each.

    Raises:
        ValueError: such a setting is in use.
    """
    for name, remedy in replaced.items():
        value = getattr(config, name, None)
        if value is not None and value is not False:
            raise ValueError(f"{name}={value!r} has no meaning under a constraint: {remedy}")


def _hosted(model: nn.Module | Sequence[nn.Module]) -> list[tuple[str, nn.Module, Decider]]:
    """Name, router and decider of all routers of a model, or of its parts."""
    parts = [model] if isinstance(model, nn.Module) else list(model)
    named = [(name, module) for part in parts for name, module in part.named_modules() if hasattr(module, "decider")]
    if not named:
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise ValueError(f"model ({kinds}) has no router of circuitroute.integrations: convert it before it is built")
    # Once each: a module that wraps a router (torch.compile, FSDP, checkpointing) may lend its attributes.
    own: dict[int, tuple[str, nn.Module, Decider]] = {}
    for name, module in named:
        own.setdefault(id(module.decider), (name, module, cast(Decider, module.decider)))
    return list(own.values())


def _device(router: nn.Module) -> torch.device:
    return next((p.device for p in router.parameters()), torch.device("cpu"))


def _layer(name: str, router: nn.Module, position: int) -> int:
    own = getattr(router, "layer_number", None)
    if own is not None:
        return int(own)
    numbers = re.findall(r"\d+", name)
    return int(numbers[-1]) if numbers else position
