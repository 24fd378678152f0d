"""The shape of the library: who may import whom, what an import costs, and what is public.

Read from the source, so that an import is judged where it is written and not by what happens to be loaded.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import networkx
import pytest

import circuitroute as cr

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "circuitroute"
MODULES = sorted(path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py"))

# The floors of the house, from the ground up, as CONTRIBUTING.md prints them: rooms and modules that share a floor know
# nothing of one another, and imports point to lower floors only, inside functions too; a room has no circle.
# "circuitroute" itself is the facade; what stands on it uses the library as anyone would.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("_files", "_tensors", "errors"),
    ("_validate",),
    ("deadline", "keys", "plots"),
    ("constraints",),
    ("circuit",),
    ("interop",),
    ("engines",),
    ("inference",),
    ("compilation",),
    ("statistics",),
    ("routing",),
    ("layers",),
    ("priors",),
    ("integrations",),
    ("circuitroute",),
    ("testing",),
    ("cli",),
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}

IMPORTERS = ("import_module", "importlib.import_module", "__import__")

# Slow to import, or extras that need not be installed: for the functions that use them.
LAZY = {
    "matplotlib",
    "networkx",
    "numba",
    "pyjuice",
    "pysdd",
    "rich",
    "safetensors",
    "sympy",
    "tqdm",
    "transformers",
    "triton",
}
LAZY |= {"accelerate", "deepspeed", "hypothesis", "megatron", "peft", "pytest", "torchtitan"}

# Adapters that subclass what is in their stack: imported by whoever uses it, and by nothing here.
ADAPTERS = {
    "circuitroute/integrations/deepspeed.py": {"deepspeed"},
    "circuitroute/integrations/megatron.py": {"megatron"},
    "circuitroute/integrations/torchtitan.py": {"torchtitan"},
}

# Folders of engines whose decorators need a compiler when they are imported: all modules but ``engine`` do, and only
# functions may import them.
KERNELS = {"circuitroute/engines/subset/numba": "numba", "circuitroute/engines/subset/triton": "triton"}
KERNELS |= {"circuitroute/engines/layered/numba": "numba", "circuitroute/keys": "triton"}

PUBLIC = [
    "ActiveGroups",
    "AtLeast",
    "AtMost",
    "BatchRouting",
    "Between",
    "Budget",
    "BudgetRouter",
    "BudgetState",
    "CNF",
    "Circuit",
    "CircuitFileError",
    "CircuitPropertyError",
    "CircuitRouteError",
    "CircuitTooLargeError",
    "Constraint",
    "Cost",
    "CountController",
    "CountIn",
    "DynamicKRouter",
    "EachGroup",
    "EngineError",
    "Estimator",
    "ExactKRouter",
    "Exactly",
    "Groups",
    "InfeasibleError",
    "LayerAllocation",
    "LayerBudget",
    "Logic",
    "MoE",
    "PoissonBinomial",
    "PriorDistribution",
    "Router",
    "Routing",
    "RoutingRecord",
    "SequenceRouting",
    "SequenceState",
    "SoftRouting",
    "SoftTopKRouter",
    "StackedExperts",
    "SubsetDistribution",
    "SubsetPrior",
    "TopKRouter",
    "UnsupportedConstraintError",
    "Vtree",
    "balance",
    "compilation",
    "compile",
    "divergence",
    "engines",
    "estimators",
    "integrations",
    "load",
    "log_count_polynomial",
    "logits_for_marginals",
    "losses",
    "metrics",
    "nn",
    "random_key",
    "read_cnf",
    "read_nnf",
    "read_sdd",
    "register_compiler",
    "replay",
    "route",
    "route_batch",
    "route_sequence",
    "schedules",
    "soft_topk",
    "variables",
]


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse((ROOT / module).read_text(encoding="utf-8"), module)


def _on_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when a module is imported: no function bodies, nothing for type checkers only."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            continue
        yield child
        yield from _on_import(child)


def _imported(nodes: Iterator[ast.AST], module: str) -> Iterator[str]:
    """The dotted names of what import statements (and calls of import_module with a literal) name."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = _origin(node, module)
            yield from (_module_named(origin, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in IMPORTERS:
            yield from (str(argument.value) for argument in node.args[:1] if isinstance(argument, ast.Constant))


def _origin(node: ast.ImportFrom, module: str) -> str:
    """What stands between "from" and "import", dots resolved."""
    package = Path(module).parts[: -node.level] if node.level else ()
    return ".".join([*package, *([node.module] if node.module else [])])


def _module_named(origin: str, name: str) -> str:
    """ "from circuitroute import losses" names the module circuitroute.routing.losses, since there is one."""
    path = ROOT / Path(*origin.split("."), name)
    return f"{origin}.{name}" if path.with_suffix(".py").exists() or path.is_dir() else origin


def _place(dotted: str) -> str:
    """The name by which a module of the package appears in FLOORS."""
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 else parts[0]


def _own_place(module: str) -> str:
    path = Path(module)
    return "circuitroute" if path.as_posix() == "circuitroute/__init__.py" else path.with_suffix("").parts[1]


def test_the_sources_are_found() -> None:
    assert "circuitroute/__init__.py" in MODULES
    assert len(MODULES) > 20


@pytest.mark.parametrize("module", MODULES)
def test_the_core_imports_no_compiler(module: str) -> None:
    """Not even inside functions: compilers are found by the type of the constraint, in a registry."""
    imported = set(_imported(ast.walk(_tree(module)), module))
    assert not {name for name in imported if name.split(".")[0] == "circuitroute_compilers"}


def _arrows(module: str) -> Iterator[str]:
    """The modules of the library that a module imports, anywhere in it."""
    for name in _imported(ast.walk(_tree(module)), module):
        if name.split(".")[0] == "circuitroute":
            path = name.replace(".", "/")
            yield f"{path}.py" if f"{path}.py" in MODULES else f"{path}/__init__.py"


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down_the_stair_only(module: str) -> None:
    own = _own_place(module)
    assert own in FLOOR_OF, f"{module} has no place in FLOORS of {Path(__file__).name}: decide what it may import"
    for name in _imported(ast.walk(_tree(module)), module):
        if name.split(".")[0] != "circuitroute" or _place(name) == own:
            continue
        assert FLOOR_OF[_place(name)] < FLOOR_OF[own], f"{module} imports {name}, which is not below it"


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = networkx.DiGraph((module, other) for module in MODULES for other in _arrows(module))
    assert sorted(networkx.simple_cycles(graph, length_bound=8)) == []
    assert networkx.is_directed_acyclic_graph(graph)
    assert len(graph) > 100


def test_every_floor_exists_and_is_printed() -> None:
    assert set(FLOOR_OF) == {_own_place(module) for module in MODULES}
    printed = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = [" ".join(f"`{name}`" for name in names) for names in FLOORS if names != ("circuitroute",)]
    places = [printed.find(f"| {row} |") for row in rows]
    assert -1 not in places, f"CONTRIBUTING.md lacks the floor {rows[places.index(-1)]}"
    assert places == sorted(places)


@pytest.mark.parametrize("module", MODULES)
def test_slow_and_optional_packages_are_imported_where_they_are_used(module: str) -> None:
    names = set(_imported(_on_import(_tree(module)), module))
    allowed = ADAPTERS.get(module, set()) | {_compiler_of(module)}
    assert not {name.split(".")[0] for name in names} & (LAZY - allowed)
    if not _compiler_of(module):
        assert not {other for other in _arrows_on_import(module) if _compiler_of(other)}


def _compiler_of(module: str) -> str | None:
    """The compiler that a module of kernels needs; None for the others."""
    path = Path(module)
    if path.name in ("engine.py", "__init__.py"):
        return None
    return next((compiler for folder, compiler in KERNELS.items() if Path(folder) in path.parents), None)


def _arrows_on_import(module: str) -> set[str]:
    return {f"{name.replace('.', '/')}.py" for name in _imported(_on_import(_tree(module)), module)}


def test_the_rules_can_tell() -> None:
    """A rule that never fires protects nothing."""
    source = """
import numpy, sympy.logic
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import triton
try:
    from rich.table import Table
except ImportError:
    pass
class A:
    import numba
def f():
    import matplotlib
plot = import_module("networkx")
"""
    found = {name.split(".")[0] for name in _imported(_on_import(ast.parse(source)), "example")}
    assert found & LAZY == {"sympy", "rich", "numba", "networkx"}
    inner = "circuitroute/engines/subset/naive.py"
    relative = ast.parse("from . import mode\nfrom ..base import Engine\nfrom ... import routing\nimport circuitroute")
    assert list(_imported(_on_import(relative), inner)) == [
        "circuitroute.engines.subset.mode",
        "circuitroute.engines.base",
        "circuitroute.routing",
        "circuitroute",
    ]


# ---------------------------------------------------------------------------------------------- the facade


def _exported() -> list[str]:
    """Names the facade re-exports, in the form type checkers take for deliberate: ``import y as y``."""
    names = []
    for node in _tree("circuitroute/__init__.py").body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            public = [alias for alias in node.names if not str(alias.asname).startswith("_")]
            assert all(alias.asname == alias.name for alias in public), ast.unparse(node)
            names += [alias.name for alias in public]
    return names


def test_the_public_names_are_these() -> None:
    assert sorted(_exported()) == sorted(PUBLIC)
    assert len(set(PUBLIC)) == len(PUBLIC)
    assert all(hasattr(cr, name) for name in PUBLIC)


def test_public_names_are_documented_where_they_are_defined() -> None:
    assert [name for name in PUBLIC if not (getattr(cr, name).__doc__ or "").strip()] == []


def test_every_module_says_what_it_is_for() -> None:
    assert [module for module in MODULES if not ast.get_docstring(_tree(module))] == []


# ---------------------------------------------------------------------------------------------- a fresh process

FRESH = """
import importlib.metadata, json, sys, warnings
import numpy, torch
sys.modules["numba"] = None
sys.modules.pop("sympy", None)  # which torch may have loaded
before = set(sys.modules)
warnings.simplefilter("error")
# As if nothing were installed, whether or not it is.
importlib.metadata.entry_points = lambda **selection: ()
import circuitroute as cr
after_import = set(sys.modules)
routing = cr.route(torch.zeros(3, 6), cr.compile(cr.Exactly(2), 6), key=1)
router = cr.Router(4, 6, cr.AtMost(1).over([0, 2]))
cr.compile(cr.Logic("x0 >> x1"), 3)
compilers = sys.modules["circuitroute_compilers"]
after_use = set(sys.modules)
import circuitroute.cli.main
print(json.dumps({
    "library": cr.__file__,
    "compilers": compilers.__file__,
    "counts": routing.counts.tolist() + [int(router(torch.zeros(1, 4)).mask[0, [0, 2]].sum() <= 1)],
    "imported": sorted({name.split(".")[0] for name in after_import - before}),
    "lazy": sorted({name.split(".")[0] for name in after_use - before}),
    "command": sorted({name.split(".")[0] for name in set(sys.modules) - before}),
}))
"""


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a new interpreter reports that has nothing but the checkout on its path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "compilers")])}
    run = subprocess.run(
        [sys.executable, "-c", FRESH],
        cwd=tmp_path_factory.mktemp("elsewhere"),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    report: dict[str, Any] = json.loads(run.stdout)
    return report


def test_an_uninstalled_checkout_works(fresh: dict[str, Any]) -> None:
    assert Path(fresh["library"]).resolve() == PACKAGE / "__init__.py"
    assert Path(fresh["compilers"]).resolve() == ROOT / "compilers" / "circuitroute_compilers" / "__init__.py"
    assert fresh["counts"] == [2, 2, 2, 1]


def test_importing_the_library_loads_no_compiler_and_no_extra(fresh: dict[str, Any]) -> None:
    """Beyond what torch itself loads."""
    assert "circuitroute" in fresh["imported"]
    assert "circuitroute_compilers" not in fresh["imported"]
    assert not set(fresh["imported"]) & LAZY


def test_routing_needs_no_extra_either(fresh: dict[str, Any]) -> None:
    """Nor does a formula that is text need sympy."""
    assert not set(fresh["lazy"]) & LAZY


def test_the_command_line_loads_no_extra(fresh: dict[str, Any]) -> None:
    assert not set(fresh["command"]) & LAZY
