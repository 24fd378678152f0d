"""What a Trainer calls: it sets the step of a patched model and its temperature, logs decisions, moves controllers.

The class is made for every handle, since the one that it is derived from is transformers', which is imported late; and
since Trainers that restore callbacks from a checkpoint make a new one of it, without arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from circuitroute._files import as_path
from circuitroute._validate import int_at_least
from circuitroute.integrations.transformers.extra import transformers
from circuitroute.routing.runs import PREFIX, RunLog
from circuitroute.routing.schedules import Schedule
from circuitroute.routing.summary import summary

# A state of a controller: a named tuple of tensors and numbers.
State: TypeAlias = Any
FORMAT = 1
MOVES = ("price", "bias")


@dataclass(frozen=True)
class Duties:
    """What a callback does besides setting the step; see :meth:`Handle.trainer_callback`."""

    trainer: Any = None
    path: Path | None = None
    log_every: int = 10
    run: str | None = None
    temperature: Schedule | None = None
    controllers: tuple[Any, ...] = ()

    @staticmethod
    def of(trainer: Any, path: Any, log_every: Any, run: Any, temperature: Any, controller: Any) -> Duties:
        """Of unchecked arguments."""
        if trainer is not None and not callable(getattr(trainer, "log", None)):
            raise TypeError(f"trainer={trainer!r}: expected a Trainer, whose logs get the numbers")
        if run is not None and not isinstance(run, str):
            raise TypeError(f"run={run!r}: expected a text that tells this run from others")
        if temperature is not None and not callable(temperature):
            raise TypeError(
                f"temperature={temperature!r}: expected a function of the step, such as "
                "cr.schedules.geometric(1.0, 0.25, steps=1000); a constant one is handle.temperature"
            )
        given = () if controller is None else controller if isinstance(controller, (list, tuple)) else (controller,)
        where = None if path is None else as_path("path", path)
        return Duties(trainer, where, int_at_least("log_every", log_every, 1), run, temperature, _checked(given))

    @property
    def logs(self) -> bool:
        """Whether anything is logged."""
        return self.trainer is not None or self.path is not None


def _checked(controllers: Sequence[Any]) -> tuple[Any, ...]:
    """Controllers that move different things."""
    movers: dict[str, Any] = {}
    for controller in controllers:
        if not all(callable(getattr(controller, name, None)) for name in ("init", "update")):
            raise TypeError(
                f"controller={controller!r}: expected one with init() and update(state, routing), such as "
                "cr.CountController(2.5), or several"
            )
        state = controller.init()
        moved = [name for name in MOVES if hasattr(state, name)]
        if not moved or not hasattr(state, "_asdict"):
            raise TypeError(
                f"controller={controller!r}: its state, {state!r}, is no named tuple with a price or a bias"
            )
        for name in moved:
            if name in movers:
                raise ValueError(
                    f"controller: {movers[name]!r} and {controller!r} both have a {name}: give one of them"
                )
            movers[name] = controller
    return tuple(controllers)


class Controllers:
    """Controllers of a patched model, with a state per routed layer.

    Attributes:
        states: by controller, then by layer.
    """

    def __init__(self, handle: Any, controllers: Sequence[Any]) -> None:
        self.handle = handle
        self.controllers = controllers
        self.states = self._initial()

    def _initial(self) -> list[list[State]]:
        devices = [place.device for place in self.handle._places()] if self.controllers else []
        return [[_moved(controller.init(), device) for device in devices] for controller in self.controllers]

    def apply(self, states: list[list[State]]) -> None:
        """Let these states move the choices from now on."""
        moves = {name: [getattr(s, name) for s in row] for row in states for name in MOVES if hasattr(row[0], name)}
        before = {name: getattr(self.handle, name) for name in moves}
        try:
            for name, values in moves.items():
                setattr(self.handle, name, values)
        except (TypeError, ValueError):
            for name, values in before.items():
                setattr(self.handle, name, values)
            raise
        self.states = states

    def update(self, routings: Sequence[Any], group: dist.ProcessGroup | None) -> None:
        """Move all of them by the decisions of a step, then the choices of the next."""
        together: dict[str, Any] = {} if group is None else {"group": group}
        self.apply(
            [
                [controller.update(state, routing, **together) for state, routing in zip(row, routings, strict=True)]
                for controller, row in zip(self.controllers, self.states, strict=True)
            ]
        )

    def export(self) -> dict[str, Any]:
        """As JSON keeps it."""
        places = self.handle._places() if self.controllers else []
        return {
            "format": FORMAT,
            "layers": [place.layer for place in places],
            "experts": [place.experts for place in places],
            "rules": [type(controller).__name__ for controller in self.controllers],
            "controllers": [repr(controller) for controller in self.controllers],
            "states": [[_plain(state) for state in row] for row in self.states],
        }

    def restore(self, kept: Any) -> None:
        """Go on from what :meth:`export` made, all of it or nothing.

        Raises:
            ValueError: it is of other layers, experts or controllers, or damaged.
        """
        mine, remedy = self.export(), "resume with what was trained, or without the controller"
        if not isinstance(kept, Mapping) or kept.get("format") != FORMAT:
            raise ValueError(f"the checkpoint's states of controllers cannot be read: {remedy}")
        for name in ("layers", "experts"):
            if kept.get(name) != mine[name]:
                raise ValueError(
                    f"the checkpoint has states of controllers for {name} {kept.get(name)}, and the patched model has "
                    f"{mine[name]}: {remedy}"
                )
        rows = kept.get("states")
        other = kept.get("rules") != mine["rules"]
        if (
            other
            or not isinstance(rows, list)
            or [_kinds(row) for row in rows] != [_kinds(row) for row in mine["states"]]
        ):
            raise ValueError(
                f"the checkpoint has states of the controllers {kept.get('controllers')}, which do not fit "
                f"{mine['controllers']}: {remedy}"
            )
        try:
            states = [
                [_like(template, state) for template, state in zip(templates, row, strict=True)]
                for templates, row in zip(self._initial(), rows, strict=True)
            ]
            self.apply(states)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the checkpoint's states of controllers cannot be used ({error}): {remedy}") from None


def _moved(state: State, device: torch.device) -> State:
    return type(state)(*(x.to(device) if isinstance(x, Tensor) else x for x in state))


def _plain(state: State) -> dict[str, Any]:
    values = {name: x.tolist() if isinstance(x, Tensor) else x for name, x in state._asdict().items()}
    return {"kind": type(state).__name__, "values": values}


def _kinds(row: Any) -> list[Any] | None:
    """What the states of a controller are: the name of their class and those of their fields."""
    if not isinstance(row, list) or not all(isinstance(state, Mapping) for state in row):
        return None
    return [(state.get("kind"), sorted(state.get("values", ()))) for state in row]


def _like(template: State, kept: Mapping[str, Any]) -> State:
    """The state of a layer, of the shapes and on the device of another."""
    values = []
    for name, known in template._asdict().items():
        value = kept["values"][name]
        if isinstance(known, Tensor):
            value = torch.tensor(value, dtype=known.dtype, device=known.device)
            if value.shape != known.shape:
                raise ValueError(f"{name} has shape {tuple(value.shape)}, and {tuple(known.shape)} is expected")
        values.append(value)
    return type(template)(*values)


# ---------------------------------------------------------------------------------------------- the callback


def _share(model: Any, rank: int) -> int:
    """The share of the batch that a process has; tensor- and pipeline-parallel groups have one together.

    In transformers' device mesh, tensor parallelism is the innermost dimension and pipeline parallelism the outermost.
    """
    layout = getattr(model.config, "distributed_config", None)
    if layout is None:
        return rank
    return int(rank // layout.tp_size % layout.dp_size)


def _group() -> dist.ProcessGroup | None:
    """All processes that train; None where there is one."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return dist.group.WORLD if several else None


def callback_of(handle: Any, duties: Duties) -> Any:
    """A callback of a handle."""
    module = transformers("transformers.trainer_callback")

    class StepSetter(module.TrainerCallback, module.ExportableState):  # type: ignore[misc,name-defined]
        """Sets the step of the handle, and does the duties."""

        def __init__(self) -> None:
            self.part = 0
            self.controllers = Controllers(handle, duties.controllers)
            self.log: RunLog | None = None
            # A line for the log that waits for the loss, which the Trainer tells later in the same step.
            self.waiting: tuple[int, dict[str, float]] | None = None
            # Set by Trainers that restore callbacks, and read from the Trainer's own state where they do not.
            self.kept: Any = None

        def _set(self, args: Any, state: Any, part: int) -> None:
            self.part = part
            # Room for 2^32 tokens per part and 2^16 parts per process.
            share = _share(handle.model, args.process_index)
            handle.set_step(state.global_step, ((share << 16) + part) << 32)

        def __reduce__(self) -> Any:
            # Without the Trainer, which has the callback, and the open log.
            values = {"part": self.part, "states": self.controllers.states}
            return callback_of, (handle, replace(duties, trainer=None)), values

        def __setstate__(self, values: Mapping[str, Any]) -> None:
            self.part, self.controllers.states = values["part"], values["states"]

        def state(self) -> dict[str, Any]:
            """What goes into a checkpoint."""
            return {"args": {}, "attributes": {"kept": self.controllers.export()}}

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if duties.path is not None and state.is_world_process_zero:
                run = duties.run or getattr(args, "run_name", None) or args.output_dir
                self.log = RunLog(duties.path, str(run))
            if duties.controllers:
                kept = _kept(state, type(self).__name__) if state.global_step else None
                if kept is None:
                    self.controllers.apply(self.controllers.states)
                else:
                    self.controllers.restore(kept)

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._write()
            if duties.temperature is not None:
                handle.temperature = duties.temperature(state.global_step)
            self._set(args, state, 0)

        def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._set(args, state, self.part + 1)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            due = duties.logs and state.global_step % duties.log_every == 0
            if not due and not duties.controllers:
                return
            routings = handle.routings
            if not routings:
                raise RuntimeError(
                    "no routings are recorded, by which to log or to control: set handle.recording = True"
                )
            found = _found(handle, routings) if due else {}
            if duties.controllers:
                self.controllers.update(routings, _group())
            if due:
                self._tell(state, control, found)

        def _tell(self, state: Any, control: Any, found: dict[str, float]) -> None:
            if self.log is not None:
                self.waiting = state.global_step, found
            if duties.trainer is not None:
                # Logging clears the mark by which the Trainer is about to log the loss.
                marked = control.should_log
                numbers = {f"{PREFIX}{key}": value for key, value in found.items()}
                duties.trainer.log({**numbers, f"{PREFIX}temperature": handle.temperature})
                control.should_log = marked
            if not control.should_log:
                self._write()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs is not None and "loss" in logs:
                self._write(logs["loss"])

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._write()

        def _write(self, loss: float | None = None) -> None:
            """Write the line that waits, if one does."""
            if self.log is not None and self.waiting is not None:
                step, found = self.waiting
                self.log.append(step, found, loss=loss, temperature=handle.temperature)
            self.waiting = None

    return StepSetter()


def _found(handle: Any, routings: Sequence[Any]) -> dict[str, float]:
    """The summary of a step, with the prices and the spread of the biases that it was made with."""
    names = [f"layer{layer}" for layer in handle.layers]
    found = summary(dict(zip(names, routings, strict=True)), budget=handle.budget, group=_group())
    for name, price, bias in zip(names, handle.price, handle.bias, strict=True):
        if price is not None:
            found[f"{name}/price"] = float(price)
        if bias is not None:
            found[f"{name}/bias_spread"] = float(bias.max() - bias.min())
    return found


def _kept(state: Any, name: str) -> Any:
    """The states of controllers in a Trainer's state that was read from a checkpoint; None where it has none."""
    found = (state.stateful_callbacks or {}).get(name)
    if isinstance(found, list):
        raise ValueError(f"the checkpoint has the states of {len(found)} callbacks of handles: use one per Trainer")
    kept = None if found is None else found["attributes"].get("kept")
    return kept if kept and kept.get("states") else None
