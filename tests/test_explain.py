"""`circuitroute explain`: facts, tables, JSON, pictures, and how it finds the constraint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import circuitroute as cr
from circuitroute.cli.explain import command
from circuitroute.cli.explain.facts import facts_of
from circuitroute.cli.main import main
from circuitroute.compilation import predict
from circuitroute.engines import cost
from circuitroute.inference.circuit import scientific

ROOT = Path(__file__).parents[1]

RULES = """
from dataclasses import dataclass
import circuitroute as cr

node_limited = cr.ActiveGroups(cr.Groups(8), at_most=4) & cr.Exactly(8)
impossible = cr.Exactly(9) & cr.AtMost(3)
number = 3


def made():
    return cr.Exactly(2)


def fails():
    raise RuntimeError("not today")


def returns_a_number():
    return 3


class Nested:
    inner = cr.AtMost(1)


@dataclass(frozen=True)
class Silent(cr.Constraint):
    pass


silent = Silent()
"""


@pytest.fixture(autouse=True)
def rules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module `rules` in the current directory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "rules.py"
    path.write_text(RULES, encoding="utf-8")
    yield path
    for name in ("rules", "explained_rules", "broken", "needy", "empty", "leaving"):
        sys.modules.pop(name, None)


def explained(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["explain", *arguments]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    return shown.out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    assert main(["explain", *arguments]) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("circuitroute explain: error: ")
    assert shown.err.count("\n") == 1, "one line"
    return shown.err


# ---------------------------------------------------------------------------------------------- what is shown


def test_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    shown = explained(capsys, "rules:node_limited", "-n", "64")
    circuit = cr.compile(cr.ActiveGroups(cr.Groups(8), at_most=4) & cr.Exactly(8), 64)
    ours, linear = cost(circuit).multiply_adds, 4096 * 64
    for part in (
        repr(circuit.constraint),
        "575,138,936",
        "8 to 8",
        f"{circuit.num_nodes:,}",
        f"{circuit.num_edges:,}",
        circuit.op,
        circuit.engine_for("cpu"),
        f"{cost(circuit).multiply_adds:,} (marginals)",
        f"{cost(circuit).bytes_moved} (logits in",
        f"{ours:,} / ({ours:,} + {linear:,}) = {ours / (ours + linear):.2%}",
        "hidden x n = 4,096 x 64",
        "no engine was timed",
        f"{circuit.num_nodes:,} (predicted ",
    ):
        assert part in shown
    rows = [line.split() for line in shown.splitlines()]
    for i, level in enumerate(circuit.graph.levels):
        sums, elements = len(level.nodes), len(level.left)
        assert any(row[:3] == [str(i + 1), str(sums), str(elements)] for row in rows)


def test_the_json(capsys: pytest.CaptureFixture[str]) -> None:
    facts = json.loads(explained(capsys, "rules:node_limited", "-n", "64", "--hidden", "1000", "--json"))
    circuit = cr.compile(cr.ActiveGroups(cr.Groups(8), at_most=4) & cr.Exactly(8), 64)
    levels = facts.pop("levels")
    assert sum(level["sums"] for level in levels) == (circuit.graph.kind == 3).sum()
    assert sum(level["elements"] for level in levels) == circuit.num_edges
    assert max(level["widest"] for level in levels) == circuit.width
    ours = cost(circuit).multiply_adds
    expected = {
        "constraint": repr(circuit.constraint),
        "n": 64,
        "model_count": circuit.model_count(),
        "min_count": 8,
        "max_count": 8,
        "nodes": circuit.num_nodes,
        "edges": circuit.num_edges,
        "depth": circuit.depth,
        "width": circuit.width,
        "op": "layered",
        "engine": circuit.engine_for(facts["device"]),
        "multiply_adds_per_token": ours,
        "gradient_multiply_adds_per_token": cost(circuit).backward,
        "bytes_per_token": 512,
        "hidden": 1000,
        "router_multiply_adds_per_token": 64_000,
        "predicted_share_of_router": ours / (ours + 64_000),
    }
    assert {name: facts[name] for name in expected} == expected
    assert 10 ** facts["log10_model_count"] == pytest.approx(circuit.model_count())
    predicted = predict(circuit.constraint, 64)
    assert predicted is not None
    names = ("nodes", "edges", "width", "seconds")
    assert facts["predicted"] == {name: getattr(predicted, name) for name in names}
    assert 0 <= facts["seconds_to_compile"] < 60


def test_enormous_counts_are_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    assert " 5 " in explained(capsys, "rules:Nested.inner", "-n", "4")
    Path("large.py").write_text("import circuitroute as cr\nhalf = cr.Exactly(100)\n", encoding="utf-8")
    shown = explained(capsys, "large.py:half", "-n", "200")
    assert f"about {scientific(cr.compile(cr.Exactly(100), 200).model_count())}" in shown


def test_json_leaves_out_counts_that_json_cannot_hold() -> None:
    constraint = cr.AtMost(1).over([0, 1])
    facts = facts_of(cr.compile(constraint, 15_000), 0.5, None, hidden=16).to_json()
    assert facts["model_count"] is None
    assert facts["predicted"] is None
    assert facts["seconds_to_compile"] == 0.5
    assert int(facts["log10_model_count"]) == 4515
    assert json.loads(json.dumps(facts)) == facts


def test_a_single_literal_has_no_levels(capsys: pytest.CaptureFixture[str]) -> None:
    Path("one.py").write_text("import circuitroute as cr\none = cr.Exactly(1)\n", encoding="utf-8")
    facts = json.loads(explained(capsys, "one.py:one", "-n", "1", "--json"))
    assert facts["levels"] == []
    assert "1 to 1" in explained(capsys, "one.py:one", "-n", "1")


def test_a_compiler_that_predicts_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "predict", lambda constraint, n: None)
    shown = explained(capsys, "rules:made", "-n", "5")
    assert "nodes" in shown
    assert "(predicted" not in shown


def test_draw(capsys: pytest.CaptureFixture[str]) -> None:
    explained(capsys, "rules:made", "-n", "5", "--draw", "circuit.png")
    assert Path("circuit.png").read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------------------------------------- finding it


@pytest.mark.parametrize(
    ("target", "constraint"),
    [
        ("rules:made", "Exactly(2)"),
        ("rules.py:made", "Exactly(2)"),
        ("./rules.py:Nested.inner", "AtMost(1)"),
        ("rules:Nested.inner", "AtMost(1)"),
    ],
)
def test_targets(target: str, constraint: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = list(sys.path)
    assert json.loads(explained(capsys, target, "-n", "4", "--json"))["constraint"] == constraint
    assert sys.path == before


def test_a_file_imports_its_neighbours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "neighbour.py").write_text("k = 2\n", encoding="utf-8")
    (folder / "main.py").write_text("import circuitroute as cr, neighbour\nc = cr.Exactly(neighbour.k)\n")
    assert "Exactly(2)" in explained(capsys, f"{folder / 'main.py'}:c", "-n", "4")


ARGUMENTS = ["explain", "rules:node_limited", "-n", "64"]


def test_the_installed_command_finds_modules_here(tmp_path: Path) -> None:
    """A console script has its own directory on the path, not the current one."""
    program = f"import sys; sys.path.remove(''); from circuitroute.cli.main import main; sys.exit(main({ARGUMENTS!r}))"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "compilers")])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "575,138,936" in done.stdout


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("rules", "expected MODULE:CONSTRAINT"),
        (":made", "expected MODULE:CONSTRAINT"),
        ("rules:", "expected MODULE:CONSTRAINT"),
        ("rulez:made", "no module named 'rulez'"),
        ("rules.sub:made", "no module named 'rules.sub'"),
        ("rulez.py:made", "there is no file 'rulez.py'"),
        ("rules:maid", "rules has no 'maid'; its constraints are impossible, node_limited, silent"),
        ("rules:Nested.outer", "rules has no 'Nested.outer'"),
        ("rules:number", "rules:number is of type int, not a constraint; its constraints are"),
        ("rules:fails", "calling rules:fails without arguments failed with RuntimeError: not today"),
        ("circuitroute:Exactly", "calling circuitroute:Exactly without arguments failed with TypeError"),
        ("rules:returns_a_number", "rules:returns_a_number() returned something of type int, not a constraint"),
        ("rules:impossible", "none of the counts 0 to 12 is allowed"),
        ("rules:silent", "no compiler for Silent"),
        ("circuitroute.errors:none", "it has no constraints of its own"),
    ],
)
def test_bad_targets(target: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in refused(capsys, target, "-n", "12")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("1 / 0", "importing broken failed with ZeroDivisionError"),
        (
            "import no_such_package",
            "importing broken failed with ModuleNotFoundError: No module named 'no_such_package'",
        ),
        ("raise SystemExit(3)", "importing broken failed with SystemExit: 3"),
        ("def f(:", "importing broken failed with SyntaxError"),
    ],
)
def test_modules_that_fail_to_import(source: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("broken.py").write_text(source, encoding="utf-8")
    assert says in refused(capsys, "broken:c", "-n", "4")
    assert says.replace("broken", "broken.py", 1) in refused(capsys, "broken.py:c", "-n", "4")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-n", "0"], "n=0"),
        (["-n", "12"], "Groups(8)"),  # 12 variables are not 8 equal groups
        (["-n", "64", "--max-nodes", "10"], "max_nodes=10"),
        (["-n", "64", "--hidden", "0"], "argument --hidden: must be at least 1, got 0"),
        (["-n", "64", "--draw", "circuit.png"], "a picture has room for"),
        (["-n", "16", "--draw", "circuit.gif"], "a file ending in"),
    ],
)
def test_bad_arguments(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in refused(capsys, "rules:node_limited", *arguments)


def test_n_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "rules:made"]) == 2
    assert "-n" in capsys.readouterr().err


@pytest.mark.parametrize("extra", ["rich.console", "rich.table"])
def test_the_missing_extra_is_named(
    extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, extra, None)
    message = refused(capsys, "rules:made", "-n", "4", code=1)
    assert "pip install 'circuitroute[cli]', or ask for --json" in message
    assert json.loads(explained(capsys, "rules:made", "-n", "4", "--json"))["n"] == 4


def test_a_picture_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "rules:made", "-n", "4", "--draw", "no/such/circuit.png", code=1)
    assert "no/such/circuit.png" in message


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--help"]) == 0
    shown: Any = capsys.readouterr().out
    assert all(option in shown for option in ("MODULE:CONSTRAINT", "-n", "--hidden", "--max-nodes", "--json", "--draw"))


def test_a_circuit_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    """It is called on logits, but not here; and it is predicted by nobody, since it is there."""
    source = "import circuitroute as cr\nhalf = cr.compile(cr.Exactly(2), 4)\n\n\ndef made():\n    return half\n"
    Path("whole.py").write_text(source, encoding="utf-8")
    for name in ("half", "made"):
        facts = json.loads(explained(capsys, f"whole.py:{name}", "-n", "4", "--json"))
        assert (facts["constraint"], facts["predicted"]) == ("Exactly(2)", None)
    assert "it is over 4 variables, and there are to be n=5" in refused(capsys, "whole.py:half", "-n", "5")
