"""Budgets in models that pass nothing from layer to layer: what a forward pass has spent, for the layers after it.

A layer that is recomputed in a backward pass decides from the state of its first run
(:mod:`circuitroute.integrations.transformers.recomputation`).

Legend: T tokens, L layers, E experts, J counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from circuitroute._tensors import without_autocast
from circuitroute.integrations.transformers.recomputation import Recomputation, in_backward
from circuitroute.layers.budget import Budget, BudgetState
from circuitroute.routing.decision import Routing


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

    def __init__(self, budget: Budget, recomputation: Recomputation) -> None:
        self.budget = budget
        self.recomputation = recomputation
        # The turns of the last forward pass in training mode, and of the last one in evaluation mode.
        self._last: dict[bool, Turns] = {True: {}, False: {}}

    def __getstate__(self) -> dict[str, Any]:
        # Turns are of passes of this process.
        return {**vars(self), "_last": {True: {}, False: {}}}

    @property
    def _kept(self) -> Turns | None:
        """The turns of the checkpointed function that is running, if any."""
        return None if self.recomputation.memory is None else self.recomputation.memory.turns

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


def _check_tokens(state: BudgetState, logits: Tensor, position: int) -> None:
    if len(state.spent) != len(logits):
        raise RuntimeError(
            f"mixture-of-experts layer {position} has {len(logits)} tokens, but the forward pass it belongs to has "
            f"{len(state.spent)}: run the layers in order, and unless checkpointing is that of transformers, run the "
            f"backward pass before the next forward pass"
        )
