"""Is every ``raise`` of the library reached by a test? ``make test`` runs all tests, and then this on what ran.

With ``RAISES`` in the environment, the name of a folder, ``tests/conftest.py`` has the library imported with a call in
front of every ``raise``, which writes down the place. Files and line numbers stay what they are, for all that read
sources, and nothing else is slower; coverage.py, which traces every line, doubles the time of these tests on Python
3.11. What runs in other processes than pytest's own is not seen.

Afterwards ``python -m tests.raises FOLDER`` names every ``raise`` that was not reached. What no test can reach is in
:data:`UNREACHED`, with the reason; what needs a package that is not installed here is left out, and said so.
"""

from __future__ import annotations

import ast
import builtins
import importlib.util
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("circuitroute", "compilers/circuitroute_compilers")
MODULES = {Path(package).name for package in PACKAGES}

# Why no test reaches a raise, by file and the function it is in.
UNREACHED: dict[tuple[str, str], str] = {}

# What is tested only where a package is installed.
NEEDS = {
    "circuitroute/engines/layered/pyjuice.py": "pyjuice",
    "circuitroute/engines/layered/numba/": "numba",
    "circuitroute/engines/subset/numba/": "numba",
    "circuitroute/engines/subset/triton/": "triton",
    "circuitroute/integrations/deepspeed.py": "deepspeed",
    "circuitroute/integrations/megatron.py": "megatron",
    "circuitroute/integrations/torchtitan.py": "torchtitan",
    "circuitroute/integrations/transformers/": "transformers",
    "circuitroute/interop/pyjuice_circuit.py": "pyjuice",
}


@dataclass(frozen=True)
class Raise:
    """A statement: its file, seen from the root of the checkout, its line, the function it is in, and its text."""

    path: str
    line: int
    function: str
    text: str

    def __str__(self) -> str:
        return f"{self.place}: in {self.function}: {self.text}"

    @property
    def place(self) -> str:
        """How it is written down when it is reached."""
        return f"{self.path}:{self.line}"

    @property
    def key(self) -> tuple[str, str]:
        """How :data:`UNREACHED` names it."""
        return self.path, self.function


def raises(path: str, source: str) -> Iterator[Raise]:
    """Every ``raise`` in a source."""

    def walk(node: ast.AST, inside: tuple[str, ...]) -> Iterator[Raise]:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            inside = (*inside, node.name)
        if isinstance(node, ast.Raise):
            text = " ".join(ast.unparse(node).split())
            yield Raise(path, node.lineno, ".".join(inside) or "<module>", text)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside)

    return walk(ast.parse(source), ())


def in_library() -> list[Raise]:
    """Every ``raise`` of the library."""
    found = []
    for path in sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py")):
        found += raises(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
    return found


# ---------------------------------------------------------------------------------------------- while tests run

REACHED = "_circuitroute_reached"  # what stands in front of a raise; a builtin, so that it is known everywhere


class _Marked(ast.NodeTransformer):
    """Puts a call in front of every ``raise``, on the same line."""

    def __init__(self, path: str) -> None:
        self._path = path

    def visit_Raise(self, node: ast.Raise) -> list[ast.stmt]:
        """The call, and the statement."""
        place = ast.Constant(f"{self._path}:{node.lineno}")
        call = ast.Expr(ast.Call(ast.Name(REACHED, ast.Load()), [place], []))
        return [ast.fix_missing_locations(ast.copy_location(call, node)), node]


class _Loader(SourceFileLoader):
    """Compiles marked sources, past the files of compiled ones."""

    def get_code(self, fullname: str) -> CodeType:
        """See :class:`importlib.abc.Loader`."""
        path = Path(self.path)
        tree = _Marked(path.relative_to(ROOT).as_posix()).visit(ast.parse(path.read_bytes(), self.path))
        code: CodeType = compile(tree, self.path, "exec", dont_inherit=True)
        return code


class _Finder:
    """Finds the modules of the library as ever, and has them loaded by :class:`_Loader`."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        """See :class:`importlib.abc.MetaPathFinder`."""
        if name.partition(".")[0] not in MODULES:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if (
            spec is not None
            and type(spec.loader) is SourceFileLoader
            and spec.loader.path.startswith(f"{ROOT}{os.sep}")
        ):
            spec.loader = _Loader(name, spec.loader.path)
        return spec


def watch(folder: Path) -> None:
    """From now on, write every ``raise`` that is reached to a file of this process in ``folder``."""
    early = sorted(MODULES & sys.modules.keys())
    if early:
        raise RuntimeError(f"{', '.join(early)} was imported before its raise statements could be marked")
    folder.mkdir(parents=True, exist_ok=True)
    seen: set[tuple[int, str]] = set()

    def reached(place: str) -> None:
        mine = os.getpid()  # another one after a fork
        if (mine, place) not in seen:
            seen.add((mine, place))
            with (folder / str(mine)).open("a", encoding="utf-8") as file:
                file.write(f"{place}\n")

    # torch.compile then calls it when it traces a path that leads there, and traces on.
    setattr(builtins, REACHED, torch.compiler.assume_constant_result(reached))
    sys.meta_path.insert(0, _Finder())


# ---------------------------------------------------------------------------------------------- afterwards


def reached_in(folder: Path) -> set[str]:
    """The places that all processes wrote down."""
    return {place for file in folder.iterdir() for place in file.read_text(encoding="utf-8").splitlines()}


def complaints(statements: Iterable[Raise], reached: set[str], allowed: dict[tuple[str, str], str]) -> list[str]:
    """What is wrong: statements that are neither reached nor allowed not to be, and permissions that nothing needs.

    Args:
        statements: those of the library.
        reached: places.
        allowed: as :data:`UNREACHED`.
    """
    unreached = [s for s in statements if s.place not in reached]
    wrong = [f"{s}\n    no test reaches it" for s in unreached if s.key not in allowed]
    unneeded = allowed.keys() - {s.key for s in unreached}
    return wrong + [
        f"{path}: {function} is allowed in tests/raises.py to have a raise that no test reaches, and has none: "
        "remove it there"
        for path, function in sorted(unneeded)
    ]


def main(folder: Path) -> int:
    """Print what is wrong, and how much was looked at; the exit code."""
    reached = reached_in(folder) if folder.is_dir() else set()
    if not reached:
        sys.stdout.write(f"no raise statement is noted in {str(folder)!r}: run `make test`\n")
        return 2
    missing = {place: package for place, package in NEEDS.items() if importlib.util.find_spec(package) is None}
    statements = [s for s in in_library() if not s.path.startswith(tuple(missing))]
    wrong = complaints(statements, reached, UNREACHED)
    left_out = [f"{place}: not looked at, since {package} is not installed" for place, package in missing.items()]
    counted = f"{len(statements)} raise statements, {len(wrong)} complaints"
    sys.stdout.write("\n".join([*left_out, *wrong, counted]) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
