"""What the layers of one patched model share, and what a copy of the model makes of it.

Legend: T tokens, E experts.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from circuitroute.integrations.transformers.controls import Control
from circuitroute.integrations.transformers.recomputation import Recomputation, in_backward, keep
from circuitroute.integrations.transformers.settings import Options
from circuitroute.integrations.transformers.walk import Walk
from circuitroute.keys import drawn_keys, random_key
from circuitroute.routing.decision import Routing
from circuitroute.routing.records import RoutingRecord

# What leads to a patched model and does not keep it alive: a weak reference.
Model: TypeAlias = Callable[[], nn.Module | None]


def no_model() -> None:
    """In place of a model that was not pickled along."""


class Replay(NamedTuple):
    """Recorded decisions that all layers take in place of their own.

    Attributes:
        record: as it was handed over.
        masks: [T, E] bool by position of the layer, on its router's device.
    """

    record: RoutingRecord
    masks: Mapping[int, Tensor]


class Setting(NamedTuple):
    """What decisions are made with, besides a router's logits; constant in a forward pass.

    Attributes:
        options: how all layers route.
        step, token_offset: see :meth:`Handle.set_step`.
        replay: see :meth:`Handle.replay`.
        controls: by position of the layer; layers that nothing moves have none.
    """

    options: Options
    step: int | Tensor
    token_offset: int | Tensor
    replay: Replay | None
    controls: Mapping[int, Control]

    def keys(self, layer: int, tokens: int, device: torch.device) -> Tensor | None:
        """[T] int64 sampling keys; None without a seed, for a decision that draws from torch's global generator."""
        if self.options.seed is None:
            return drawn_keys(tokens, device) if self.options.probes else None
        token = torch.arange(tokens, device=device) + self.token_offset
        return random_key(self.options.seed, self.step, layer, token)


@dataclass(eq=False)
class Session:
    """What the layers of one patched model share.

    Attributes:
        model: the model, by which a copy of all of it differs from a copy of a layer.
        options, step, token_offset, replay, controls: see :class:`Setting`.
        recording: whether forward passes record their decisions.
        records: the decisions of the last forward pass, by position of the layer.
        walk: the progress of forward passes through the budget over the layers; None without a budget.
        recomputation: what checkpointed layers remember.

    Pickled, a session is without its model, which the model's own :class:`Owner` gives back: so a router can be pickled
    without the model, and a model with its routers and its handle. Decisions are of passes, in this process, of this
    very model: copies and pickles have neither records nor a record to replay.
    """

    model: Model
    options: Options
    step: int | Tensor = 0
    token_offset: int | Tensor = 0
    replay: Replay | None = None
    controls: Mapping[int, Control] = field(default_factory=dict)
    recording: bool = True
    records: dict[int, Routing] = field(default_factory=dict)
    walk: Walk | None = None
    recomputation: Recomputation = field(default_factory=Recomputation)
    # What the last forward pass was made with, in training mode and in evaluation mode.
    _last: dict[bool, Setting] = field(default_factory=dict)

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        fresh: dict[str, Any] = {"replay": None, "records": {}, "walk": None, "_last": {}}
        copied = replace(self, **fresh, recomputation=Recomputation())
        memo[id(self)] = copied
        if self.walk is not None:
            copied.walk = Walk(copy.deepcopy(self.walk.budget, memo), copied.recomputation)
        copied.belong_to(memo[id(self.model())])
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "model": no_model, "replay": None, "records": {}, "_last": {}}

    def belong_to(self, model: nn.Module) -> None:
        """Let ``model`` be the one whose layers share this."""
        self.model = weakref.ref(model)

    def keep(self) -> None:
        """Let checkpointed layers remember what they decide with."""
        keep(self.model(), self.recomputation)

    def setting(self, training: bool) -> Setting:
        """What a layer that is running decides with: what it did in its first run, where this is another one."""
        now = Setting(self.options, self.step, self.token_offset, self.replay, self.controls)
        if is_compiling():
            return now
        memory = self.recomputation.memory
        if memory is not None:
            now = memory.setting = memory.setting or now
        if not in_backward():
            self._last[training] = now
        return now if memory is not None else self._last.get(training, now)

    def record(self, position: int, routing: Routing) -> None:
        """Keep a decision, unless it is recomputed: then it belongs to a graph of the backward pass."""
        if self.recording and not in_backward():
            self.records[position] = routing


class Owner:
    """What a patched model keeps, as its attribute ``OWNER``, so that a pickled one finds its session again."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def __getstate__(self) -> dict[str, Any]:
        return {"session": self.session, "model": self.session.model()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.session = state["session"]
        if state["model"] is not None:
            self.session.belong_to(state["model"])

    def __deepcopy__(self, memo: dict[int, Any]) -> Owner:
        if id(self.session.model()) not in memo:
            return self
        return Owner(copy.deepcopy(self.session, memo))
