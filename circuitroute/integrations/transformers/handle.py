"""The handle of a patched model: its sampling keys, its decisions, its auxiliary loss, and unpatching.

Legend: T tokens, E experts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from circuitroute._validate import as_int
from circuitroute.inference.evidence import rows_text
from circuitroute.integrations.transformers.callback import Duties, callback_of
from circuitroute.integrations.transformers.controls import (
    Biases,
    Control,
    Place,
    Prices,
    as_biases,
    as_plain,
    as_prices,
)
from circuitroute.integrations.transformers.experts import leave_ragged
from circuitroute.integrations.transformers.recomputation import forget
from circuitroute.integrations.transformers.routers import (
    OWNER,
    CircuitRouting,
    restore_class,
    use_ragged_experts,
)
from circuitroute.integrations.transformers.session import Replay, Session
from circuitroute.integrations.transformers.settings import SETTINGS, Options
from circuitroute.layers.budget import Budget
from circuitroute.routing import losses
from circuitroute.routing.decision import Routing, SoftRouting
from circuitroute.routing.probes import ProbeCount
from circuitroute.routing.records import RoutingRecord, same_temperature
from circuitroute.routing.replay import masks_for
from circuitroute.routing.schedules import Schedule

# The name of the budget in its model, with which the names of its parameters begin.
BUDGET = "circuitroute_budget"


class Handle:
    """What :func:`patch` returns; ``model`` is the patched model."""

    def __init__(self, model: nn.Module, session: Session) -> None:
        self.model = model
        self._session = session

    @property
    def layers(self) -> tuple[int, ...]:
        """The numbers of the routed layers, in order."""
        return tuple(router.circuitroute_plan.layer for router in self._routers().values())

    @property
    def budget(self) -> Budget | None:
        """The budget over the layers, ``model.circuitroute_budget``, or None."""
        return None if self._session.walk is None else self._session.walk.budget

    @property
    def temperature(self) -> float:
        """What router logits are divided by for decisions; a schedule may set it, and a saved model keeps it.

        Raises:
            ValueError: set to a number that is not positive.
        """
        return self._session.options.temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        options, replayed = replace(self._session.options, temperature=value), self.replaying
        if replayed is not None and not same_temperature(replayed.temperature, options.temperature):
            raise ValueError(
                f"temperature={options.temperature}: a record made at {replayed.temperature:g} is replayed, whose "
                "log-probabilities would be others; call handle.replay(None) first"
            )
        self._set(options)

    @property
    def probes(self) -> ProbeCount:
        """How many unchosen experts every token runs in training; a schedule may set it, and a saved model keeps it.

        Raises:
            ValueError, TypeError: set to what :func:`patch` would refuse.
        """
        return self._session.options.probes

    @probes.setter
    def probes(self, value: ProbeCount) -> None:
        options = replace(self._session.options, probes=value)
        use_ragged_experts((router.circuitroute_plan for router in patched_routers(self.model)), options)
        self._set(options)

    def _set(self, options: Options) -> None:
        """Route by ``options`` from now on, and save those that may change."""
        self._session.keep()
        self._session.options = options
        settings: dict[str, Any] = getattr(self.model.config, SETTINGS)
        settings["temperature"], settings["probes"] = options.temperature, options.probes

    def replay(self, record: RoutingRecord | None) -> None:
        """Take recorded decisions in place of the model's own, in training and in evaluation, until ``replay(None)``.

        Every layer takes those of its layer in the record, with their gates, log-probabilities and gradients under
        the model as it is. Layers that are recomputed in a backward pass take what they took in their first run, even
        if another record, or none, is replayed by then (under transformers' own checkpointing; under any other for
        one forward pass at a time). A copy of the model replays nothing.

        Args:
            record: of all routed layers in order, and of the tokens of one forward pass: all of the batch's, one
                sequence after the other, padding included. None goes back to the model's own decisions.

        Raises:
            TypeError: it is something else.
            ValueError: it is of other numbers of layers or experts, was made at another temperature than
                :attr:`temperature`, or holds subsets that a layer or the budget forbids; names layer and rows.
                Whatever was replayed before goes on. Forward passes over another number of tokens raise one, too.
            RuntimeError: the model is no longer patched.
        """
        replay = None if record is None else self._checked(record)
        self._session.keep()
        self._session.replay = replay

    @property
    def replaying(self) -> RoutingRecord | None:
        """What :meth:`replay` was given last."""
        return None if self._session.replay is None else self._session.replay.record

    def _checked(self, record: RoutingRecord) -> Replay:
        """A record that all layers can replay, on their devices."""
        routers, places = self._routers(), self._places()
        circuits = [router.circuitroute_plan.circuit for router in routers.values()]
        masks = masks_for(record, circuits, [self.temperature] * len(circuits))
        if self.budget is not None:
            _check_total(masks, self.budget)
        placed = [mask.to(place.device) for mask, place in zip(masks, places, strict=True)]
        return Replay(record, dict(zip(routers, placed, strict=True)))

    def set_step(self, step: int | Tensor, token_offset: int | Tensor = 0) -> None:
        """Set the training step: with a seed, token i draws with ``cr.random_key(seed, step, layer, i)``.

        There is no automatic counter, so that layers recomputed under activation checkpointing draw the same. Call this
        before every forward pass in training (:meth:`trainer_callback` does).

        Args:
            step: initially 0.
            token_offset: added to the position of a token in the batch. Data-parallel processes, and the parts of a
                batch that accumulate gradients, need separate ranges; processes that share tokens (tensor and expert
                parallelism) need the same.

        Raises:
            TypeError: an argument is neither an integer nor an integer tensor.
        """
        step, token_offset = _as_counter("step", step), _as_counter("token_offset", token_offset)
        self._session.keep()
        self._session.step, self._session.token_offset = step, token_offset

    @property
    def price(self) -> tuple[Tensor | None, ...]:
        """[] per routed layer, what an expert costs: taken off its logits for the choice alone; None for nothing.

        So a range takes fewer experts at a higher price, and weights are those of the logits themselves, as in
        :func:`circuitroute.route`, in training and in evaluation: a layer with a price decides in evaluation by its
        mode, not as the stock router. A saved model keeps it. Set it between steps, to a number or [] for all layers,
        to one per routed layer ([L] or a sequence), or to None.

        Raises:
            TypeError, ValueError: set to what is not finite, requires a gradient, or is not one per layer; nothing
                changes then.
            RuntimeError: set when the model is no longer patched.
        """
        return tuple(control.price for control in self._controls())

    @price.setter
    def price(self, value: Prices) -> None:
        self._move("price", as_prices(value, self._places()))

    @property
    def bias(self) -> tuple[Tensor | None, ...]:
        """[E] per routed layer, added to the logits for the choice alone, as loss-free balancing does; see `price`.

        Set it to [E] for all layers, to one per routed layer ([L, E] or a sequence), or to None.

        Raises:
            TypeError, ValueError, RuntimeError: as :attr:`price`.
        """
        return tuple(control.bias for control in self._controls())

    @bias.setter
    def bias(self, value: Biases) -> None:
        self._move("bias", as_biases(value, self._places()))

    def _controls(self) -> list[Control]:
        return [self._session.controls.get(position, Control()) for position in self._routers()]

    def _move(self, name: str, values: Sequence[Tensor | None]) -> None:
        """Let these prices or biases, by layer, move the choices from now on, and save them."""
        moved = [control._replace(**{name: value}) for control, value in zip(self._controls(), values, strict=True)]
        each = zip(self._routers(), moved, strict=True)
        self._session.keep()
        self._session.controls = {
            position: control for position, control in each if any(x is not None for x in control)
        }
        settings: dict[str, Any] = getattr(self.model.config, SETTINGS)
        kept = as_plain(values)
        if kept is None:
            settings.pop(name, None)
        else:
            settings[name] = kept

    def _routers(self) -> dict[int, CircuitRouting]:
        """The routers by position of their layer, in order."""
        routers = {router.circuitroute_plan.position: router for router in patched_routers(self.model)}
        return dict(sorted(routers.items()))

    def _places(self) -> list[Place]:
        """The routed layers, in order.

        Raises:
            RuntimeError: the model is no longer patched.
        """
        routers = self._routers()
        if not routers:
            raise RuntimeError(f"model={type(self.model).__name__} is not patched: it has no layers that are routed")
        plans = [(router.circuitroute_plan, router) for router in routers.values()]
        return [Place(plan.layer, plan.circuit.n, _device_of(router)) for plan, router in plans]

    def trainer_callback(
        self,
        *,
        trainer: Any = None,
        path: str | os.PathLike[str] | None = None,
        log_every: int = 10,
        run: str | None = None,
        temperature: Schedule | None = None,
        controller: Any = None,
    ) -> Any:
        """A ``TrainerCallback`` that sets the step, with an offset for every process and accumulated batch.

        And what else is asked for: it logs :func:`circuitroute.metrics.summary` of the decisions, sets the temperature,
        and moves controllers. All of these look at the last forward pass of a step; of accumulated batches, at the last
        one. Controllers' states go into the Trainer's checkpoints and are taken up again where it resumes from one.

        Args:
            trainer: whose logs get ``"routing/layer0/load_entropy"`` and the like, for TensorBoard, W&B and
                ``log_history``; so add the callback with ``trainer.add_callback(handle.trainer_callback(
                trainer=trainer))``.
            path: a file for ``circuitroute report``, see :class:`circuitroute.metrics.RunLog`, with the loss of steps
                that the Trainer logs, too.
            log_every: after how many steps either is written.
            run: tells the run of ``path`` from others; by default the Trainer's ``run_name``, or its ``output_dir``.
            temperature: a schedule, such as those of :mod:`circuitroute.schedules`, for :attr:`temperature`.
            controller: with ``init()`` and ``update(state, routing)``, such as :class:`circuitroute.CountController`,
                or several: every routed layer has a state of each, whose ``price`` or ``bias`` becomes the layer's
                :attr:`price` or :attr:`bias` for the next step. Where several processes train, ``group=`` makes them
                agree.

        Raises:
            TypeError, ValueError: an argument of the wrong kind; two controllers that both have a price, or a bias.
        """
        duties = Duties.of(trainer, path, log_every, run, temperature, controller)
        return callback_of(self, duties)

    @property
    def routings(self) -> tuple[Routing, ...]:
        """The decisions of the last forward pass, one per routed layer; empty before the first.

        They hold on to the graph of that pass until the next forward pass, :meth:`release`, or
        ``handle.recording = False``. Layers recomputed in a backward pass (activation checkpointing) are not recorded.
        Under reentrant checkpointing neither the forward pass nor its decisions have a graph.
        """
        return tuple(self._session.records[position] for position in sorted(self._session.records))

    def release(self) -> None:
        """Drop the decisions of the last forward pass, and with them its graph."""
        self._session.records.clear()

    @property
    def recording(self) -> bool:
        """Whether forward passes record their decisions; initially True. Setting it to False releases them."""
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

        It replaces the stock loss (``output_router_logits=True``), which repeats a top-k on the logits and ignores what
        was sampled. That one counts k experts per token: multiply its coefficient by k for this one.

        Args:
            attention_mask: [batch, sequence] or [T], 0 for tokens that do not count; None counts all.
            probabilities: as in :func:`circuitroute.losses.load_balance`.

        Raises:
            RuntimeError: there was no forward pass, or it left no graph although gradients are enabled.
            ValueError: a mask for another number of tokens.
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
            return  # a frozen router needs none
        raise RuntimeError(
            "the last forward pass left no graph to the routers' logits, so this loss would have no gradient. "
            "Reentrant checkpointing does that: call model.gradient_checkpointing_enable("
            "gradient_checkpointing_kwargs={'use_reentrant': False}); or run the forward pass with gradients enabled."
        )

    def unpatch(self) -> None:
        """Restore the model: its routers, its experts implementation and its configuration; a budget is removed.

        Raises:
            RuntimeError: it is no longer patched.
        """
        routers = list(patched_routers(self.model))
        if not routers:
            raise RuntimeError(f"model={type(self.model).__name__} is not patched: it has been unpatched already")
        for experts in {router.circuitroute_plan.experts for router in routers}:
            leave_ragged(experts)
        for router in routers:
            restore_class(router)
        owner = self._session.model()
        if self._session.walk is not None and owner is not None:
            delattr(owner, BUDGET)
            self._session.walk = None
        if owner is not None:
            forget(owner)
            vars(owner).pop(OWNER, None)
        config = getattr(self.model, "config", None)
        if hasattr(config, SETTINGS):
            delattr(config, SETTINGS)
        self._session.replay = None
        self.release()

    def __repr__(self) -> str:
        return f"Handle({type(self.model).__name__}, layers={list(self.layers)})"


def patched_routers(model: nn.Module) -> Iterator[CircuitRouting]:
    """The patched routers of a model."""
    return (module for module in model.modules() if isinstance(module, CircuitRouting))


def _device_of(router: nn.Module) -> torch.device:
    """Where a router decides; the CPU for one whose parameters are elsewhere until it runs."""
    device = next(router.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


def _check_total(masks: Sequence[Tensor], budget: Budget) -> None:
    """Refuse recorded paths whose experts add up to what the budget forbids."""
    total = torch.stack([mask.sum(-1) for mask in masks]).sum(0)
    allowed = budget.feasible[-1].cpu()
    forbidden = (total >= len(allowed)) | ~allowed[total.clamp(max=len(allowed) - 1)]
    if bool(forbidden.any()):
        raise ValueError(
            f"record: over all layers the experts add up to what the budget, {budget.total!r}, forbids, in "
            f"{rows_text(forbidden)}: replay decisions that were made under the same budget"
        )


def _as_counter(name: str, value: int | Tensor) -> int | Tensor:
    if isinstance(value, Tensor):
        if value.dtype.is_floating_point or value.dtype == torch.bool:
            raise TypeError(f"{name} has dtype {value.dtype}: expected an integer tensor")
        return value
    return as_int(name, value)


def _selected(routing: Routing, attention_mask: Tensor | None) -> Routing:
    """The decision for the tokens that count, without a distribution: losses do not need one."""
    if attention_mask is None:
        return routing
    kept = attention_mask.reshape(-1).to(routing.mask.device) != 0
    if len(kept) != len(routing.mask):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: the last forward pass had "
            f"{len(routing.mask)} tokens"
        )
    logits, marginals = routing.logits[kept], routing.marginals[kept]
    return SoftRouting(logits, marginals, routing.mask[kept], routing.gates[kept], routing.max_count)
