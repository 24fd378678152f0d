"""The handle of a patched model: its sampling keys, its decisions, its auxiliary loss, and the way back.

Legend: T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from circuitroute._validate import as_int
from circuitroute.integrations.transformers.experts import leave_ragged
from circuitroute.integrations.transformers.extra import transformers
from circuitroute.integrations.transformers.routers import CircuitRouting, Session, restore_class
from circuitroute.integrations.transformers.walk import forget_turns
from circuitroute.layers.budget import Budget
from circuitroute.routing import losses
from circuitroute.routing.decision import Routing

SETTINGS = "circuitroute"
# The name by which a model has its budget, and the start of the names of its parameters.
BUDGET = "circuitroute_budget"


class Handle:
    """What :func:`patch` gives.

    Attributes:
        model: the patched model.
        layers: the numbers of its routed layers, in order.
    """

    def __init__(self, model: nn.Module, session: Session) -> None:
        self.model = model
        self._session = session

    @property
    def layers(self) -> tuple[int, ...]:
        """The numbers of the routed layers, in order."""
        plans = {router.circuitroute_plan.position: router.circuitroute_plan for router in patched_routers(self.model)}
        return tuple(plans[position].layer for position in sorted(plans))

    @property
    def budget(self) -> Budget | None:
        """The budget over the layers, ``model.circuitroute_budget``; None without one."""
        return None if self._session.walk is None else self._session.walk.budget

    # ------------------------------------------------------------------ sampling

    def set_step(self, step: int | Tensor, token_offset: int | Tensor = 0) -> None:
        """Say which step of training this is: with a seed, token i draws with ``cr.random_key(seed, step, layer, i)``.

        Nothing counts by itself, so that layers which run again under activation checkpointing draw the same. Call it
        before every forward pass in training (:meth:`trainer_callback` does).

        Args:
            step: at first 0.
            token_offset: added to the position of a token in the batch. Give data-parallel processes, and the parts
                of a batch that accumulate gradients, ranges of their own; give processes that share tokens (tensor
                and expert parallelism) the same.

        Raises:
            TypeError: neither integers nor integer tensors.
        """
        self._session.step = _as_counter("step", step)
        self._session.token_offset = _as_counter("token_offset", token_offset)

    def trainer_callback(self) -> Any:
        """A ``TrainerCallback`` that sets the step, with an offset for every process and accumulated batch."""
        return _step_setter(self)

    # ------------------------------------------------------------------ decisions

    @property
    def routings(self) -> tuple[Routing, ...]:
        """The decisions of the last forward pass, one per routed layer; empty before the first.

        They are part of the pass's graph, which lives as long as they do: until the next forward pass,
        :meth:`release`, or ``handle.recording = False``. Layers that run again in a backward pass (activation
        checkpointing) leave the record alone. Under reentrant checkpointing the forward pass itself has no graph, and
        neither have these.
        """
        return tuple(self._session.records[position] for position in sorted(self._session.records))

    def release(self) -> None:
        """Forget the decisions of the last forward pass, and let go of its graph."""
        self._session.records.clear()

    @property
    def recording(self) -> bool:
        """Whether forward passes leave their decisions behind; True at first. Setting it to False releases them."""
        return self._session.recording

    @recording.setter
    def recording(self, value: bool) -> None:
        self._session.recording = bool(value)
        if not value:
            self.release()

    def load_balance_loss(
        self, attention_mask: Tensor | None = None, probabilities: losses.Probabilities = "marginal"
    ) -> Tensor:
        """Mean over layers of :func:`circuitroute.losses.load_balance` of the last forward pass; 1 at perfect balance.

        In the place of the stock loss (``output_router_logits=True``), which repeats a top-k on the logits and knows
        nothing of what was sampled. That one counts k experts per token: its coefficient, times k, is this one's.

        Args:
            attention_mask: [batch, sequence] or [T], 0 for the tokens that do not count; None: all do.
            probabilities: as in :func:`circuitroute.losses.load_balance`.

        Raises:
            RuntimeError: there was no forward pass, or none that left a graph although gradients are asked for.
            ValueError: a mask of another number of tokens.
        """
        routings = self.routings
        if not routings:
            raise RuntimeError("no routings are recorded: run the model first, with handle.recording True")
        if torch.is_grad_enabled() and self.model.training and not any(r.gates.requires_grad for r in routings):
            self._refuse_without_graph()
        parts = [losses.load_balance(_selected(routing, attention_mask), probabilities) for routing in routings]
        return torch.stack([part.to(parts[0].device) for part in parts]).mean()

    def _refuse_without_graph(self) -> None:
        if not any(p.requires_grad for router in patched_routers(self.model) for p in router.parameters()):
            return  # a frozen router asks for none
        raise RuntimeError(
            "the last forward pass left no graph to the routers' logits, so this loss would have no gradient. "
            "Reentrant checkpointing does that: call model.gradient_checkpointing_enable("
            "gradient_checkpointing_kwargs={'use_reentrant': False}); or run the forward pass with gradients enabled."
        )

    # ------------------------------------------------------------------ the way back

    def unpatch(self) -> None:
        """Restore the model: its routers, its experts implementation, its configuration; a budget goes.

        Raises:
            RuntimeError: it is not patched any more.
        """
        routers = list(patched_routers(self.model))
        if not routers:
            raise RuntimeError(f"model={type(self.model).__name__} is not patched (any more)")
        for experts in {router.circuitroute_plan.experts for router in routers}:
            leave_ragged(experts)
        for router in routers:
            restore_class(router)
        owner = self._session.model()
        if self._session.walk is not None and owner is not None:
            forget_turns(owner)
            delattr(owner, BUDGET)
            self._session.walk = None
        config = getattr(self.model, "config", None)
        if hasattr(config, SETTINGS):
            delattr(config, SETTINGS)
        self.release()

    def __repr__(self) -> str:
        return f"Handle({type(self.model).__name__}, layers={list(self.layers)})"


def patched_routers(model: nn.Module) -> Iterator[CircuitRouting]:
    """The patched routers of a model."""
    return (module for module in model.modules() if isinstance(module, CircuitRouting))


def _as_counter(name: str, value: int | Tensor) -> int | Tensor:
    if isinstance(value, Tensor):
        if value.dtype.is_floating_point or value.dtype == torch.bool:
            raise TypeError(f"{name} has dtype {value.dtype}: expected an integer tensor")
        return value
    return as_int(name, value)


class _Selected(Routing):
    """Some of the tokens of a decision: what losses need of it."""

    def __init__(self, routing: Routing, kept: Tensor) -> None:
        super().__init__(routing.distribution, routing.mask[kept], routing.gates[kept])
        self._kept = kept

    @property
    def logits(self) -> Tensor:
        return self.distribution.logits[self._kept]

    @property
    def marginals(self) -> Tensor:
        return self.distribution.marginals[self._kept]


def _selected(routing: Routing, attention_mask: Tensor | None) -> Routing:
    if attention_mask is None:
        return routing
    kept = attention_mask.reshape(-1).to(routing.mask.device) != 0
    if len(kept) != len(routing.mask):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: the last forward pass had "
            f"{len(routing.mask)} tokens"
        )
    return _Selected(routing, kept)


def _share(model: Any, rank: int) -> int:
    """Which share of the batch a process has: those of a tensor- or pipeline-parallel group have one together.

    Of the dimensions of transformers' device mesh, tensors are the innermost and pipelines the outermost.
    """
    layout = getattr(model.config, "distributed_config", None)
    if layout is None:
        return rank
    return int(rank // layout.tp_size % layout.dp_size)


def _step_setter(handle: Handle) -> Any:
    class StepSetter(transformers().TrainerCallback):  # type: ignore[misc]
        """Tells the handle which step it is."""

        def _set(self, args: Any, state: Any, part: int) -> None:
            self.part = part
            # Room for 2^32 tokens per part and 2^16 parts per process.
            share = _share(handle.model, args.process_index)
            handle.set_step(state.global_step, ((share << 16) + part) << 32)

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._set(args, state, 0)

        def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._set(args, state, self.part + 1)

    return StepSetter()
