"""Deciding for routers that live in other libraries' models: what the adapters have in common.

Such a router is called with hidden states alone. So what a decision needs besides is kept beside it, in a
:class:`Decider`: the keys, which the training loop sets once per step with :func:`begin_step`, and a list of decisions
while :func:`recorded_routings` is open. Forward changes none of it, so a layer that is run again decides the same.

Legend: T tokens of this process, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from circuitroute._validate import as_int, int_at_least
from circuitroute.compilation import compile as compile_constraint
from circuitroute.constraints import Constraint
from circuitroute.inference.circuit import Circuit
from circuitroute.keys import fold_in, random_key
from circuitroute.routing.choice import decide
from circuitroute.routing.decision import Routing
from circuitroute.routing.estimators import Estimator, as_estimator
from circuitroute.routing.weights import weigh

Weights = Literal["softmax", "normalized", "sigmoid"]


class Decider:
    """A constraint in the place of a host router's top-k; the host keeps its linear map and its rule for weights.

    Args:
        constraint: what is allowed, over E experts.
        num_experts: E.
        estimator: as in :func:`circuitroute.route`.
        seed: keys are ``cr.random_key(seed, step, layer, token)``, see :func:`begin_step`; None draws from torch's
            global generator, which activation checkpointing restores only with ``preserve_rng_state=True``.

    Raises:
        InfeasibleError: no subset of E experts satisfies the constraint.
        TypeError, ValueError: a constraint, estimator or seed that is none.
    """

    def __init__(
        self,
        constraint: Constraint,
        num_experts: int,
        *,
        estimator: str | Estimator = "simple",
        seed: int | None = None,
    ) -> None:
        if not isinstance(constraint, Constraint):
            raise TypeError(f"constraint={constraint!r}: expected a constraint such as cr.Between(2, 8)")
        self.circuit = compile_constraint(constraint, int_at_least("num_experts", num_experts, 1))
        self.estimator = as_estimator(estimator)
        self.seed = None if seed is None else as_int("seed", seed)
        self.fixed_count = _fixed_count(self.circuit)
        self.recorded: list[Routing] | None = None
        self._position: Tensor | None = None  # [2] int64: the key of (seed, step, layer), the number of the first token

    def begin(self, step: int, layer: int, offset: int, device: torch.device) -> None:
        """Set what the keys of the next forward passes are made of; see :func:`begin_step`."""
        if self.seed is None:
            return
        position = torch.stack([random_key(self.seed, step, layer), torch.tensor(offset)]).to(device)
        if self._position is None or self._position.device != position.device:
            self._position = position
        else:
            self._position.copy_(position)  # the same tensor: a compiled layer is not compiled anew

    def keys(self, token: Tensor) -> Tensor | None:
        """[T] int64 keys of tokens with these numbers within this process, [T] int64; None without a seed.

        Raises:
            RuntimeError: there is a seed, and no step has begun.
        """
        if self.seed is None:
            return None
        if self._position is None:
            raise RuntimeError(
                f"seed={self.seed} was given, but no step has begun, so that there is nothing to make keys of: call "
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
    ) -> Routing:
        """Decide for T tokens.

        Args:
            logits: [T, E], any floating dtype; the weights are theirs.
            weights: ``"softmax"`` over all experts, ``"normalized"``, over the chosen ones, or ``"sigmoid"``.
            token: [T] int64, the tokens' numbers within this process; unused in evaluation.
            training: sample when True, take the mode when False.
            shift: [E], added to the logits for the choice only, as auxiliary-loss-free balancing does.
            renormalize: divide the weights of each token by their sum.
            scale: multiplies all weights.

        Returns:
            The decision. Its distribution and marginals are those of the shifted logits, which it was drawn from. A
            chosen expert's weight is never 0, so that a weight of 0 means a slot that is not used.
        """
        for_choice = logits if shift is None else logits + shift.detach().to(logits.dtype)
        key = self.keys(token) if training else None
        decision = decide(for_choice, self.circuit, share=1.0 if training else 0.0, key=key)
        gates = weigh(decision, combine=weights, estimator=self.estimator, logits=logits)
        if renormalize:
            gates = gates / (gates.sum(-1, keepdim=True) + 1e-20)
        gates = gates * scale
        vanished = decision.mask & (gates == 0)
        gates = torch.where(vanished, torch.finfo(gates.dtype).tiny, gates)
        routing = decision.routing(gates)
        if self.recorded is not None:
            self.recorded.append(routing)
        return routing


def begin_step(model: nn.Module | Sequence[nn.Module], step: int, *, offset: int = 0) -> None:
    """Tell the routers of a model which training step it is; before its forward pass, on every process.

    Their keys become ``cr.random_key(seed, step, layer, offset + token)``, token being a number within this process.
    The layer is the router's own number where it has one, else the last number in its name ("layers.3.moe.router"),
    else its place among the routers.

    Keys hold until the next call. Micro-batches of one step share them unless each gets an offset of its own; that is
    right too, and what schedules need that run several forward passes before a backward pass recomputes the first.

    Args:
        model: a model, or its parts on this process; wrapped by DDP, FSDP, checkpointing or torch.compile or not.
        step: the training step.
        offset: the number of this process's first token among those of all processes, such as rank * T. Give processes
            that share tokens, as under tensor parallelism, the same.

    Raises:
        ValueError: the model has no router of circuitroute's.
        TypeError: ``step`` or ``offset`` that are no integers.
    """
    first = as_int("offset", offset)
    for position, (name, router) in enumerate(_hosted(model)):
        device = next((p.device for p in router.parameters()), torch.device("cpu"))
        _decider(router).begin(step, _layer(name, router, position), first, device)


@contextmanager
def recorded_routings(model: nn.Module | Sequence[nn.Module]) -> Iterator[list[Routing]]:
    """Collects the decisions that the routers of a model make in the block, in the order they are made in.

    For losses and metrics; close it before the backward pass, so that recomputed layers are not recorded again::

        with recorded_routings(model) as routings:
            loss = loss_function(model(tokens), labels)
        loss = loss + 0.01 * sum(cr.losses.load_balance(routing) for routing in routings)

    Raises:
        ValueError: the model has no router of circuitroute's.
    """
    deciders = [_decider(router) for _, router in _hosted(model)]
    routings: list[Routing] = []
    for decider in deciders:
        decider.recorded = routings
    try:
        yield routings
    finally:
        for decider in deciders:
            decider.recorded = None


def _hosted(model: nn.Module | Sequence[nn.Module]) -> list[tuple[str, nn.Module]]:
    parts = [model] if isinstance(model, nn.Module) else list(model)
    found = [(name, module) for part in parts for name, module in part.named_modules() if hasattr(module, "decider")]
    if not found:
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise ValueError(f"model ({kinds}) has no router of circuitroute.integrations: convert it before it is built")
    return found


def _decider(router: nn.Module) -> Decider:
    decider = router.decider
    assert isinstance(decider, Decider)
    return decider


def _fixed_count(circuit: Circuit) -> bool:
    """Whether all allowed subsets have the same size."""
    if circuit.counts is not None:
        return len(circuit.counts) == 1
    with torch.device("cpu"):  # hosts build their models on the meta device
        possible = circuit(torch.zeros(1, circuit.n)).count_probs > 0
    return int(possible.sum()) == 1


def _layer(name: str, router: nn.Module, position: int) -> int:
    own = getattr(router, "layer_number", None)
    if own is not None:
        return int(own)
    numbers = re.findall(r"\d+", name)
    return int(numbers[-1]) if numbers else position
