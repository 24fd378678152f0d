"""Budgets in models that pass nothing from layer to layer: what a forward pass has spent, for the layers after it.

A layer that is recomputed in a backward pass decides from the state of its first run. Checkpointing of transformers
keeps the arguments of a layer for that; its function is wrapped here so that it keeps the layer's turns too, and any
number of forward passes may precede their backward passes. Under any other checkpointing, a layer that runs inside a
backward pass is taken to belong to the last forward pass in the same mode.

Legend: T tokens, L layers, E experts, J counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from circuitroute._tensors import without_autocast
from circuitroute.layers.budget import Budget, BudgetState
from circuitroute.routing.decision import Routing

CHECKPOINTING = "_gradient_checkpointing_func"

# What leads to a patched model and does not keep it alive: a weak reference.
Model: TypeAlias = Callable[[], nn.Module | None]


def no_model() -> None:
    """In place of a model that was not pickled along."""


def in_backward() -> bool:
    """Whether autograd is running backward, which is when checkpointed layers are recomputed."""
    return not is_compiling() and int(torch._C._current_graph_task_id()) != -1


@dataclass(frozen=True, eq=False)
class Turn:
    """The first run of a layer in a forward pass.

    Attributes:
        before: the state that the layer decided from.
        after: the state for the next layer.
        made: whether the layer computed the messages of its state, which later layers only use.
        graph: whether gradients were enabled; reentrant checkpointing disables them.
    """

    before: BudgetState
    after: BudgetState
    made: bool
    graph: bool


Turns: TypeAlias = dict[int, Turn]


class Walk:
    """The forward passes of a model through the layers of its budget."""

    def __init__(self, budget: Budget, model: Model) -> None:
        self.budget = budget
        self.model = model
        # The turns of the last forward pass in training mode, and of the last one in evaluation mode.
        self._last: dict[bool, Turns] = {True: {}, False: {}}
        # The turns of the checkpointed function that is running, if any.
        self._kept: Turns | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Turns are of passes of this process; the model is given back by its owner.
        return {"budget": self.budget, "model": no_model, "_last": {True: {}, False: {}}, "_kept": None}

    def decide(self, position: int, logits: Tensor, training: bool, choose: Callable[[Tensor], Routing]) -> Routing:
        """The decision of ``choose`` for the layer at ``position``, given its count potential [T, J].

        Raises:
            RuntimeError: the layer before has not run, or had other tokens.
        """
        if self._is_recomputed(position):
            return choose(self._potential(self._state_again(position, logits, training), logits))
        before, made = self._next_state(position, logits, training)
        routing = choose(self._potential(before, logits))
        turn = Turn(before, self.budget.spend(before, routing), made, torch.is_grad_enabled())
        self._last[training][position] = turn
        if self._kept is not None:
            self._kept[position] = turn
        return routing

    def _potential(self, state: BudgetState, logits: Tensor) -> Tensor:
        with without_autocast(logits):
            return self.budget.potential(state).to(logits.device)

    def _next_state(self, position: int, logits: Tensor, training: bool) -> tuple[BudgetState, bool]:
        """The state for a layer that runs for the first time, and whether its messages were computed for it."""
        if position == 0:
            self._last[training] = {}
            keep_turns(self.model(), self)
            return self._begin(logits), True
        if position - 1 not in self._last[training]:
            raise RuntimeError(
                f"mixture-of-experts layer {position} runs before layer {position - 1}: with a budget the layers must "
                f"run in order, as in the model's forward pass"
            )
        state = self._last[training][position - 1].after
        _check_tokens(state, logits, position)
        if self._learns() and not state.messages.requires_grad:
            return self._renewed(state), True
        return state, False

    def _is_recomputed(self, position: int) -> bool:
        return in_backward() if self._kept is None else position in self._kept

    def _state_again(self, position: int, logits: Tensor, training: bool) -> BudgetState:
        """The state that a recomputed layer had in its first run."""
        if position == 0:
            return self._begin(logits)
        turns = self._last[training] if self._kept is None else self._kept
        if position not in turns:
            raise RuntimeError(
                f"mixture-of-experts layer {position} runs in a backward pass, as if recomputed, but has never run; "
                "run a forward pass of the model first"
            )
        turn = turns[position]
        _check_tokens(turn.before, logits, position)
        # Messages that the layer made are recomputed with it, and those of a run without gradients have no graph.
        return self._renewed(turn.before) if turn.made or (self._learns() and not turn.graph) else turn.before

    def _begin(self, logits: Tensor) -> BudgetState:
        return self.budget.begin(logits.detach().to(self.budget.preferences.device))

    def _renewed(self, state: BudgetState) -> BudgetState:
        return state._replace(messages=self.budget.messages())

    def _learns(self) -> bool:
        return torch.is_grad_enabled() and any(p.requires_grad for p in self.budget.parameters())

    def run_keeping(self, turns: Turns, function: Callable[..., Any], *args: Any) -> Any:
        """Run a checkpointed function, for the first time or again, with the turns that it keeps."""
        outer, self._kept = self._kept, turns
        try:
            return function(*args)
        finally:
            self._kept = outer


class TurnKeeper:
    """A checkpointing function as transformers assigns it to layers, which keeps the turns of its layer too."""

    def __init__(self, checkpoint: Callable[..., Any], walk: Walk) -> None:
        self.checkpoint = checkpoint
        self.walk = walk

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checkpoint ``function``."""
        return self.checkpoint(partial(self.walk.run_keeping, {}, function), *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Unwrapped: a copied model wraps it again, with its own walk."""
        return self.checkpoint

    def __reduce__(self) -> Any:
        return _unwrapped, (self.checkpoint,)


def _unwrapped(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """What a pickled :class:`TurnKeeper` becomes."""
    return checkpoint


def keep_turns(model: nn.Module | None, walk: Walk) -> None:
    """Let all checkpointed layers keep their turns; the one that is running is the first, and needs none."""
    for module in () if model is None else model.modules():
        function = module.__dict__.get(CHECKPOINTING)
        if function is not None and not isinstance(function, TurnKeeper):
            setattr(module, CHECKPOINTING, TurnKeeper(function, walk))


def forget_turns(model: nn.Module) -> None:
    """Undo :func:`keep_turns`."""
    for module in model.modules():
        function = module.__dict__.get(CHECKPOINTING)
        if isinstance(function, TurnKeeper):
            setattr(module, CHECKPOINTING, function.checkpoint)


def _check_tokens(state: BudgetState, logits: Tensor, position: int) -> None:
    if len(state.spent) != len(logits):
        raise RuntimeError(
            f"mixture-of-experts layer {position} has {len(logits)} tokens, but the forward pass it belongs to has "
            f"{len(state.spent)}: run the layers in order, and unless checkpointing is that of transformers, run the "
            f"backward pass before the next forward pass"
        )
