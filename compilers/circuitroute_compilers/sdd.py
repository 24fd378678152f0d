"""The compiler named "sdd": sentential decision diagrams (Darwiche 2011) by PySDD.

What it takes is what is a formula: clauses, rules, counts, what is composed of them, and what the built-in compiler
breaks into these. Each conjunct is brought in where the vtree (:mod:`.primal`) has all of its variables for the first
time; the diagram is made in a process of its own (:mod:`.sdd_process`) and read as :func:`circuitroute.read_sdd` reads
one, made smooth along the vtree.
"""

from __future__ import annotations

import importlib.util
import json
import math
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from circuitroute import Circuit, CircuitTooLargeError, Constraint, InfeasibleError, register_compiler
from circuitroute._validate import present
from circuitroute.compilation import SHOWN
from circuitroute.constraints import shown
from circuitroute.constraints.formula import Formula
from circuitroute.deadline import charge, note, remaining, tick
from circuitroute.interop import sdd
from circuitroute_compilers import sdd_process
from circuitroute_compilers.choice import EDGES_PER_LEVEL
from circuitroute_compilers.conjuncts import conjuncts
from circuitroute_compilers.graph import EDGES_PER_NODE
from circuitroute_compilers.primal import candidates
from circuitroute_compilers.trees import MAX_VARIABLES, Vtree, balanced, depth, leaf, nodes, pair

# The elements of diagrams while they are made may be this many even where those of the circuit may not.
LEAST_ELEMENTS = 1_000_000
# Bytes of the process: what Python and an empty manager reserve, and what an element takes with its share of tables.
BASE_BYTES, BYTES_PER_ELEMENT = 1 << 29, 128
_REMEDY = "raise max_nodes, or use a compiler of d-DNNF such as d4 or dsharp and read its circuit with cr.read_nnf"


@register_compiler(Constraint, name="sdd")
def compile_sdd(constraint: Constraint, n: int, max_nodes: int) -> Circuit:
    """Compile a constraint over ``n`` variables by way of an SDD; see :func:`circuitroute.compile` for the errors."""
    folder = _pysdd()
    if n > MAX_VARIABLES:
        raise CircuitTooLargeError(
            f"{shown(constraint, SHOWN)} over {n} variables: diagrams are made over at most {MAX_VARIABLES}"
        )
    formulas = conjuncts(constraint, n)
    note(lambda: "looking for a vtree")
    trees = [_with_others(tree, n) for tree in candidates([_scope(formula) for formula in formulas])]
    trees = trees or [balanced([leaf(v) for v in range(n)])]
    with tempfile.TemporaryDirectory(prefix="circuitroute-sdd-") as place:
        _compiled(Path(place), constraint, n, max_nodes, formulas, trees, folder)
        graph = sdd.graph(
            Path(place, "0.sdd"), Path(place, "0.vtree"), max_nodes, f"the SDD of {shown(constraint, SHOWN)}"
        )
    return Circuit(graph, constraint)


def _pysdd() -> str:
    """The folder that holds PySDD."""
    found = importlib.util.find_spec("pysdd")
    if found is None or not found.submodule_search_locations:
        raise ImportError(
            "compiler='sdd' needs PySDD: pip install 'circuitroute[sdd]', or leave out compiler for the built-in one"
        )
    return str(Path(next(iter(found.submodule_search_locations))).resolve().parent)


def _scope(formula: Formula) -> int:
    return sum(1 << v for v in formula.variables)


def _with_others(tree: Vtree, n: int) -> Vtree:
    """The tree, and beside it the variables that no formula names."""
    others = [leaf(v) for v in range(n) if not tree.scope >> v & 1]
    return pair(tree, balanced(others)) if others else tree


# ---------------------------------------------------------------------------------------------- the process


def _compiled(
    place: Path,
    constraint: Constraint,
    n: int,
    max_nodes: int,
    formulas: Sequence[Formula],
    trees: Sequence[Vtree],
    path: str,
) -> None:
    """Have the diagram made in a folder: 0.sdd and 0.vtree.

    Raises:
        CircuitTooLargeError: it takes more elements, seconds or memory than allowed, or PySDD ended for another reason.
        InfeasibleError: it is false.
    """
    elements = max(EDGES_PER_NODE * max_nodes, LEAST_ELEMENTS)
    seconds = remaining()
    memory = BASE_BYTES + BYTES_PER_ELEMENT * elements
    job = {
        "path": path,
        "seconds": None if math.isinf(seconds) else seconds,
        "memory": memory,
        "elements": elements,
        "nodes": max_nodes,
        "formulas": [formula.steps for formula in formulas],
        "programs": [_program(tree, formulas) for tree in trees],
        "depths": [EDGES_PER_LEVEL * depth(tree) for tree in trees],
    }
    for number, tree in enumerate(trees):
        Path(place, f"{number}.in").write_text(_vtree_text(tree), encoding="ascii")
    Path(place, "job.json").write_text(json.dumps(job), encoding="ascii")
    note(lambda: f"PySDD compiled {len(formulas)} formulas in {len(trees)} vtrees; {_REMEDY}")
    what = f"{shown(constraint, SHOWN)} over {n} variables"
    done = _run(place, seconds, memory, what)
    charge(done["seconds"])
    if done["result"] == "false":
        raise InfeasibleError(f"no subset of {n} variables satisfies {shown(constraint, SHOWN)}")
    if done["result"] == "too large":
        raise CircuitTooLargeError(
            f"{what}: every SDD that was tried needs more than {elements} elements while it is made, the best after "
            f"{done['reached']} of {len(formulas)} formulas; {_REMEDY}"
        )


def _run(place: Path, seconds: float, memory: int, what: str) -> dict[str, Any]:
    """Run the process; what it says it did."""
    # Where the system has no timer that ends a process, its time is that of the clock on the wall.
    timeout = None if hasattr(signal, "setitimer") or math.isinf(seconds) else seconds
    command = [sys.executable, sdd_process.__file__, str(place)]
    ended: subprocess.CompletedProcess[bytes] | None = None
    with suppress(subprocess.TimeoutExpired):
        ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout, check=False)
    if ended is None or ended.returncode == -getattr(signal, "SIGPROF", math.inf):
        charge(seconds + 1e-3)  # which says that the time is over
    ended = present(ended, "a process that took too long is out of time")
    if ended.returncode == 0:
        done: dict[str, Any] = json.loads(Path(place, "done.json").read_text(encoding="ascii"))
        return done
    said = " ".join(ended.stderr.decode("utf-8", "replace").split())[-200:]
    raise CircuitTooLargeError(
        f"{what}: PySDD ended with code {ended.returncode} ({said or 'it said nothing'}), as it does where its memory, "
        f"{memory >> 20} MiB here, is not enough; {_REMEDY}"
    )


def _vtree_text(tree: Vtree) -> str:
    """The tree as libsdd reads it, variables counted from 1."""
    every = nodes(tree)
    number = {id(node): i for i, node in enumerate(every)}
    lines = [f"vtree {len(every)}"]
    for i, node in enumerate(every):
        if node.halves is None:
            lines.append(f"L {i} {node.first + 1}")
        else:
            lines.append(f"I {i} {number[id(node.halves[0])]} {number[id(node.halves[1])]}")
    return "\n".join([*lines, ""])


def _program(tree: Vtree, formulas: Sequence[Formula]) -> list[int]:
    """The steps for a stack that bring every formula in where the tree has all of its variables for the first time."""
    every = nodes(tree)
    at: dict[int, int] = {node.first: i for i, node in enumerate(every) if node.halves is None}
    above = {id(half): i for i, node in enumerate(every) for half in node.halves or ()}
    here: list[list[int]] = [[] for _ in every]
    order = sorted(range(len(formulas)), key=lambda i: len(formulas[i].steps))
    for i in order:
        scope, node = _scope(formulas[i]), at[formulas[i].variables[0]]
        while scope & ~every[node].scope:
            tick()
            node = above[id(every[node])]
        here[node].append(i)
    steps: list[int] = []
    for block, some in zip(every, here, strict=True):
        steps += [sdd_process.PUSH if block.halves is None else sdd_process.JOIN, *some]
    return steps
