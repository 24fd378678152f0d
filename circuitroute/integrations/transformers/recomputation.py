"""Layers that run again in a backward pass, as under activation checkpointing, and must decide as in their first run.

Checkpointing of transformers keeps the arguments of a layer for that; its function is wrapped here so that it keeps
what else the decision came of, too, and any number of forward passes may precede their backward passes. Under any other
checkpointing, a layer that runs inside a backward pass is taken to belong to the last forward pass in the same mode.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.compiler import is_compiling

CHECKPOINTING = "_gradient_checkpointing_func"


def in_backward() -> bool:
    """Whether autograd is running backward, which is when checkpointed layers are recomputed."""
    return not is_compiling() and int(torch._C._current_graph_task_id()) != -1


@dataclass(eq=False)
class Memory:
    """What the first run of a checkpointed function leaves for the others.

    Attributes:
        setting: what its decisions were made with; None before the first.
        turns: by position of the layer, what it did with the budget; empty without one.
    """

    setting: Any = None
    turns: dict[int, Any] = field(default_factory=dict)


class Recomputation:
    """Which checkpointed function of a model is running, and what it remembers."""

    def __init__(self) -> None:
        self.memory: Memory | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Functions run in this process alone.
        return {"memory": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Recomputation:
        memo[id(self)] = copied = Recomputation()
        return copied

    def run(self, memory: Memory, function: Callable[..., Any], *args: Any) -> Any:
        """Run a checkpointed function, for the first time or again, with what it remembers."""
        if is_compiling():  # traced once, and never again with another setting
            return function(*args)
        outer, self.memory = self.memory, memory
        try:
            return function(*args)
        finally:
            self.memory = outer


class Keeper:
    """A checkpointing function as transformers assigns it to layers, which keeps what its layer decided by, too."""

    def __init__(self, checkpoint: Callable[..., Any], recomputation: Recomputation) -> None:
        self.checkpoint = checkpoint
        self.recomputation = recomputation

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checkpoint ``function``."""
        return self.checkpoint(partial(self.recomputation.run, Memory(), function), *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Unwrapped: a copied model wraps it again, with its own."""
        return self.checkpoint

    def __reduce__(self) -> Any:
        return _unwrapped, (self.checkpoint,)


def _unwrapped(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """What a pickled :class:`Keeper` becomes."""
    return checkpoint


def keep(model: nn.Module | None, recomputation: Recomputation) -> None:
    """Let all checkpointed layers remember; one that is running already does so from its next run on."""
    for module in () if model is None else model.modules():
        function = module.__dict__.get(CHECKPOINTING)
        if function is not None and not isinstance(function, Keeper):
            setattr(module, CHECKPOINTING, Keeper(function, recomputation))


def forget(model: nn.Module) -> None:
    """Undo :func:`keep`."""
    for module in model.modules():
        function = module.__dict__.get(CHECKPOINTING)
        if isinstance(function, Keeper):
            setattr(module, CHECKPOINTING, function.checkpoint)
