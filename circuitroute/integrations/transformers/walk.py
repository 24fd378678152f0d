"""A budget in a model that hands nothing from layer to layer: what a forward pass has spent, for the layers after it.

A layer that runs again in a backward pass decides from the state of its first run. Checkpointing of transformers
keeps the arguments of a layer for that; its function is wrapped here so that it keeps the layer's turns too, so that
any number of forward passes may wait for their backward passes. Under checkpointing of other makers, a layer that runs
inside a backward pass is taken to belong to the last forward pass of its mode.

Legend: T tokens, L layers, E experts, J counts.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from circuitroute.layers.budget import Budget, BudgetState
from circuitroute.routing.decision import Routing

CHECKPOINTING = "_gradient_checkpointing_func"


def in_backward() -> bool:
    """Whether autograd is running backward, which is when checkpointed layers run again."""
    return int(torch._C._current_graph_task_id()) != -1


@dataclass(eq=False)
class Turn:
    """One layer in one forward pass.

    Attributes:
        state: before the layer.
        made: whether the layer computed the messages, which others only use.
        graph: whether gradients were enabled; reentrant checkpointing runs layers without.
        after: the state for the next layer, once this one has decided.
    """

    state: BudgetState
    made: bool
    graph: bool
    after: BudgetState | None = None


Turns: TypeAlias = dict[int, Turn]


class Walk:
    """The forward passes of a model through the layers of its budget."""

    def __init__(self, budget: Budget, model: weakref.ref[nn.Module]) -> None:
        self.budget = budget
        self._model = model
        # Of the last forward pass, in training mode and not: only training mode is recomputed by transformers.
        self._last: dict[bool, Turns] = {True: {}, False: {}}
        # Of the checkpointed function that is running.
        self._kept: Turns | None = None

    def decide(self, position: int, logits: Tensor, training: bool, choose: Callable[[Tensor], Routing]) -> Routing:
        """What ``choose`` decides for the layer at ``position``, given its count potential [T, J].

        Raises:
            RuntimeError: the layer before has not run, or had other tokens.
        """
        turn = self._recomputed(position, logits, training)
        if turn is not None:
            return choose(self._potential(turn.state, logits))
        turn = self._next(position, logits, training)
        routing = choose(self._potential(turn.state, logits))
        turn.after = self.budget.spend(turn.state, routing)
        self._last[training][position] = turn
        if self._kept is not None:
            self._kept[position] = turn
        return routing

    def _potential(self, state: BudgetState, logits: Tensor) -> Tensor:
        with torch.autocast(logits.device.type, enabled=False):
            return self.budget.potential(state).to(logits.device)

    def _next(self, position: int, logits: Tensor, training: bool) -> Turn:
        graph = torch.is_grad_enabled()
        if position == 0:
            self._last[training] = {}
            keep_turns(self._model(), self)
            return Turn(self._first(logits), True, graph)
        before = self._last[training].get(position - 1)
        if before is None or before.after is None:
            raise RuntimeError(
                f"mixture-of-experts layer {position} runs before layer {position - 1}: with a budget the layers run "
                f"in order, as the model's forward does"
            )
        _check_tokens(before.after, logits, position)
        made = self._learns() and not before.after.messages.requires_grad
        state = before.after._replace(messages=self.budget.messages()) if made else before.after
        return Turn(state, made, graph)

    def _recomputed(self, position: int, logits: Tensor, training: bool) -> Turn | None:
        """The turn that a layer runs again; None where it runs for the first time."""
        if self._kept is not None:
            turn = self._kept.get(position)
        elif is_compiling() or not in_backward():
            turn = None
        elif position == 0:
            turn = Turn(self._first(logits), False, True)
        else:
            turn = self._last[training].get(position)
            if turn is None:
                raise RuntimeError(f"mixture-of-experts layer {position} is recomputed, but has never run")
        if turn is None:
            return None
        _check_tokens(turn.state, logits, position)
        # What a first run without gradients used has no graph, and what it shared with others has theirs.
        if turn.made or (self._learns() and not turn.graph):
            return Turn(turn.state._replace(messages=self.budget.messages()), turn.made, turn.graph)
        return turn

    def _first(self, logits: Tensor) -> BudgetState:
        return self.budget.begin(logits.detach().to(self.budget.preferences.device))

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
    """transformers' checkpointing function of a layer, which then keeps the turns of the layer too."""

    def __init__(self, checkpoint: Callable[..., Any], walk: Walk) -> None:
        self.checkpoint = checkpoint
        self.walk = walk

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checkpoint ``function``."""
        return self.checkpoint(partial(self.walk.run_keeping, {}, function), *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copied model wraps it again, with its own walk."""
        return self.checkpoint


def keep_turns(model: nn.Module | None, walk: Walk) -> None:
    """Let all checkpointed layers keep their turns. The layer that is running need not: it is the first."""
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
            f"{len(state.spent)}: run the layers in order, and the backward pass before the next forward pass where "
            f"checkpointing is not that of transformers"
        )
