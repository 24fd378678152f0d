"""Errors that belong to no other test: what types cannot say, missing stacks, and the check of all raise statements."""

from __future__ import annotations

import builtins
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from circuitroute_compilers import builtin, diagram, graph
from torch import nn

import circuitroute as cr
from circuitroute._validate import present
from circuitroute.constraints.counts import Count
from circuitroute.deadline import OutOfTimeError
from circuitroute.engines import ops, subset
from circuitroute.integrations import hosted
from circuitroute.integrations.transformers import extra
from tests import raises

DOOR = """
class Door:
    def open(self, key):
        if key is None:
            raise ValueError(
                "key=None: give one"
            )
        try:
            turn(key)
        except OSError:
            raise

def knock():
    raise NotImplementedError
"""


# ---------------------------------------------------------------------------------------------- all raise statements


def test_every_raise_is_found_with_its_place_and_text() -> None:
    found = [(r.line, r.function, r.text) for r in raises.raises("door.py", DOOR)]
    assert found == [
        (5, "Door.open", "raise ValueError('key=None: give one')"),
        (11, "Door.open", "raise"),
        (14, "knock", "raise NotImplementedError"),
    ]


def test_what_no_test_reaches_is_named_with_file_and_line() -> None:
    statements = list(raises.raises("door.py", DOOR))
    assert raises.complaints(statements, {"door.py:5", "door.py:11", "door.py:14"}, {}) == []
    (complaint,) = raises.complaints(statements, {"door.py:5", "door.py:14", "window.py:11"}, {})
    assert complaint.startswith("door.py:11: in Door.open: raise\n")
    assert len(raises.complaints(statements, set(), {})) == 3


def test_permissions_hold_for_a_function_and_only_where_they_are_needed() -> None:
    statements = list(raises.raises("door.py", DOOR))
    allowed = {("door.py", "knock"): "nobody is in"}
    assert raises.complaints(statements, {"door.py:5", "door.py:11"}, allowed) == []
    (complaint,) = raises.complaints(statements, {"door.py:5", "door.py:11", "door.py:14"}, allowed)
    assert complaint.startswith("door.py: knock is allowed")
    (complaint,) = raises.complaints([], set(), {("wall.py", "climb"): "it was pulled down"})
    assert complaint.startswith("wall.py: climb is allowed")


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library with one module."""
    (tmp_path / "house").mkdir()
    (tmp_path / "house" / "__init__.py").touch()
    (tmp_path / "house" / "door.py").write_text(DOOR)
    monkeypatch.setattr(raises, "ROOT", tmp_path)
    monkeypatch.setattr(raises, "PACKAGES", ("house",))
    monkeypatch.setattr(raises, "MODULES", {"house"})
    monkeypatch.setattr(raises, "UNREACHED", {})
    monkeypatch.setattr(raises, "NEEDS", {})
    return tmp_path


def test_what_is_reached_is_written_down_once_and_lines_stay(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(raises, "REACHED", "_reached_in_the_house")
    monkeypatch.setattr(builtins, "_reached_in_the_house", None, raising=False)
    monkeypatch.syspath_prepend(house)
    for name in ("house", "house.door"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    raises.watch(house / "reached")
    door = importlib.import_module("house.door")
    for _ in range(2):
        with pytest.raises(ValueError, match="key=None: give one") as caught:
            door.Door().open(None)
    assert caught.traceback[-1].lineno + 1 == 5
    assert inspect.getsource(door.knock) == "def knock():\n    raise NotImplementedError\n"
    with pytest.raises(NotImplementedError):
        door.knock()
    assert (house / "reached" / str(os.getpid())).read_text() == "house/door.py:5\nhouse/door.py:14\n"
    assert not list(house.rglob("*.pyc"))  # which would outlive the run
    with pytest.raises(RuntimeError, match="house was imported before its raise statements could be marked"):
        raises.watch(house / "reached")


@pytest.mark.parametrize(("noted", "code"), [("5 11 14", 0), ("5 11", 1), ("", 2)])
def test_the_check_fails_without_notes_and_with_complaints(
    noted: str, code: int, house: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for process, line in enumerate(noted.split()):
        (house / "reached").mkdir(exist_ok=True)
        (house / "reached" / str(process)).write_text(f"house/door.py:{line}\n")
    assert raises.main(house / "reached") == code
    assert ("house/door.py:14: in knock" in capsys.readouterr().out) == (code == 1)


def test_what_needs_a_package_is_left_out_where_it_is_missing(
    house: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (house / "reached").mkdir()
    (house / "reached" / "1").write_text("house/window.py:1\n")
    monkeypatch.setattr(raises, "NEEDS", {"house/door.py": "a_door_nobody_has"})
    assert raises.main(house / "reached") == 0
    assert "house/door.py: not looked at, since a_door_nobody_has is not installed" in capsys.readouterr().out


def test_what_needs_a_package_exists() -> None:
    for place in raises.NEEDS:
        assert (raises.ROOT / place).exists(), place


# ---------------------------------------------------------------------------------------------- what types cannot say


def test_what_cannot_be_missing_is_reported_as_an_error_of_ours() -> None:
    assert present(0, "nothing is something") == 0
    with pytest.raises(RuntimeError, match="sweeps find a sample: this is an error in circuitroute, please report it"):
        present(None, "sweeps find a sample")


@pytest.mark.parametrize("engine", [subset.NaiveSubset(), subset.TorchSubset()], ids=["naive", "torch"])
def test_the_count_family_needs_a_potential(engine: Any) -> None:
    with pytest.raises(ValueError, match="potential=None: the count family needs the log potentials of its counts"):
        engine.infer(torch.zeros(2, 4), None)


class Few(Count):
    """A count that defines nothing."""


@pytest.mark.parametrize(
    ("use", "lacking"), [(lambda few: few.largest, "largest"), (lambda few: few.allows(1), r"allows\(count\)")]
)
def test_a_count_of_ones_own_defines_what_is_used(use: Callable[[Count], object], lacking: str) -> None:
    with pytest.raises(NotImplementedError, match=f"Few does not define {lacking}"):
        use(Few())


# ---------------------------------------------------------------------------------------------- hosts


class Host(nn.Module):
    """A router in some stack's model."""

    def __init__(self, seed: int | None) -> None:
        super().__init__()
        self.decider = hosted.Decider(cr.Exactly(2), 4, seed=seed)


def test_keys_need_a_step() -> None:
    host = Host(seed=3)
    with pytest.raises(RuntimeError, match=r"seed=3 was given, but no step has begun.*begin_step\(model, step\)"):
        host.decider.keys(torch.arange(2))
    hosted.begin_step(host, 0)
    assert host.decider.keys(torch.arange(2)).shape == (2,)


def test_a_model_without_routers_has_no_steps() -> None:
    with pytest.raises(
        ValueError, match=r"model \(Linear, ReLU\) has no router of circuitroute.integrations: convert it"
    ):
        hosted.begin_step([nn.Linear(1, 1), nn.ReLU()], 0)


def test_settings_without_effect_are_refused() -> None:
    config = SimpleNamespace(groups=4, fusion=False, capacity=None)
    remedies = {"fusion": "switch it off", "capacity": "leave it", "absent": "add nothing"}
    hosted.refuse_replaced(config, remedies)
    with pytest.raises(ValueError, match=r"groups=4 has no meaning under a constraint: use cr.ActiveGroups"):
        hosted.refuse_replaced(config, {**remedies, "groups": "use cr.ActiveGroups"})


@pytest.mark.parametrize(
    ("adapter", "needs", "remedy"),
    [
        ("deepspeed", "deepspeed.moe.sharded_moe", "pip install deepspeed==0.19.8"),
        ("megatron", "megatron.core.transformer.moe.router", "pip install megatron-core==0.16.1"),
        ("torchtitan", "torchtitan.models.common.moe", "pip install torchtitan==0.3.0"),
    ],
)
def test_an_adapter_names_the_stack_that_is_missing(
    adapter: str, needs: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"circuitroute.integrations.{adapter}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, needs, None)
    with pytest.raises(ImportError, match=f"{name} needs .*{remedy}"):
        importlib.import_module(name)


def test_transformers_must_be_installed_and_new_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    remedy = r"pip install 'circuitroute\[transformers\]'"
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(__version__="4.57.1"))  # type: ignore[arg-type]
    with pytest.raises(ImportError, match=rf"transformers 4\.57\.1 is too old, 5\.23 is needed: {remedy}"):
        extra.transformers()
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=f"this needs transformers .*: {remedy}") as caught:
        extra.transformers()
    assert caught.value.name == "transformers"


# ---------------------------------------------------------------------------------------------- in the last corners


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (
            lambda: cr.compile(cr.Exactly(2), 4).satisfies(torch.ones(4, dtype=torch.complex64)),
            TypeError,
            "mask has dtype torch.complex64: expected bool, or real numbers that are 0 or 1",
        ),
        (lambda: cr.log_count_polynomial(torch.tensor(1.0), 2), ValueError, r"logits have shape \(\): expected"),
        (
            lambda: cr.route(torch.zeros(2, 4), cr.compile(cr.Exactly(2), 4), price=torch.tensor(True)),
            TypeError,
            "price has dtype torch.bool: expected numbers",
        ),
        (
            lambda: ops.sample(cr.compile(cr.Exactly(2), 4), torch.zeros(3, 4), torch.zeros(3), torch.arange(2)),
            ValueError,
            "key has 2 rows and the logits have 3: the program was traced with another number of rows.*trace it again",
        ),
        (lambda: cr.RoutingRecord.of(3), TypeError, "is a int: expected a Routing or a mask"),
        (lambda: cr.RoutingRecord.of_indices(3, 4), TypeError, "indices is a int: expected a tensor"),
        (
            lambda: cr.compile(cr.ActiveGroups(cr.Groups(2), at_most=1), 100_000),
            cr.CircuitTooLargeError,
            "only counts over all variables are compiled for more than 92000; compile other rules over fewer",
        ),
        (
            lambda: cr.compile(~cr.CountIn(range(0, 20_000, 2)), 20_000),
            cr.CircuitTooLargeError,
            "more than max_nodes=1000000 allows",
        ),
    ],
    ids=[
        "complex mask",
        "polynomial of a number",
        "price of a bool",
        "baked rows",
        "record of a number",
        "indices",
        "too many variables",
        "too large",
    ],
)
def test_what_is_wrong_is_named(call: Callable[[], Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        call()


class Listing(cr.Constraint):
    """Its states are lists, once two are merged."""

    def __hash__(self) -> int:
        return 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Listing)

    def leaf(self, var: int) -> tuple[Any, Any]:
        return (0,), (1,)

    def merge(self, left: Any, right: Any) -> Any:
        return [*left, *right]

    def accepts(self, state: Any) -> bool:
        return True


def test_states_that_cannot_be_told_apart() -> None:
    with pytest.raises(TypeError, match=r"states must be hashable, such as integers and tuples \(unhashable type"):
        cr.compile(Listing(), 4)
    with pytest.raises(graph.UnhashableStateError, match="unhashable type"):
        graph._number({}, [0])


def test_a_diagram_that_is_too_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagram, "MAX_ENTRIES", 4)
    x = cr.variables(6)
    with pytest.raises(cr.CircuitTooLargeError, match=r"its decision diagram is wide.*split the formula into smaller"):
        cr.compile(cr.Logic((x[0] & x[3]) | (x[1] & x[4]) | (x[2] & x[5])), 6)


def test_what_contradicts_what_is_left_out_when_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*_: Any) -> Any:
        raise OutOfTimeError("too late")

    monkeypatch.setattr(builtin, "_graph", late)
    assert builtin._blame(cr.ActiveGroups(cr.Groups(2), at_most=0) & cr.Exactly(1), 4) is None
