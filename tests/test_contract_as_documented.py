"""The contract as docs/add-a-constraint.md shows it: its blocks in a file of a user's, run by their pytest."""

import os
import re
import runpy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import circuitroute as cr
from circuitroute.testing import Case, CompilerContract

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(
    r"^```python\n(.*?)^```$",
    (ROOT / "docs" / "add-a-constraint.md").read_text(encoding="utf-8"),
    re.DOTALL | re.MULTILINE,
)


def run(folder, *arguments):
    """(exit status, what it says) of Python in a folder, with the library that is tested here."""
    places = [str(ROOT), str(ROOT / "compilers"), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(places)},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_the_documented_blocks_pass_in_one_file(tmp_path):
    constraint, contract = BLOCKS[0], next(block for block in BLOCKS if "CompilerContract" in block)
    (tmp_path / "test_alternating.py").write_text(f"{constraint}\n{contract}", encoding="utf-8")
    code, said = run(tmp_path, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", ".", "test_alternating.py")
    assert code == 0, said
    assert " passed" in said


def test_it_passes_as_a_script(tmp_path):
    """Where the types are those of ``__main__``."""
    constraint, contract = BLOCKS[0], next(block for block in BLOCKS if "CompilerContract" in block)
    checks = "for case in TestAlternating().cases():\n    TestAlternating().test_repr_evaluates_back(case)\n"
    (tmp_path / "script.py").write_text(f"{constraint}\n{contract}\n{checks}", encoding="utf-8")
    left = runpy.run_path(str(tmp_path / "script.py"), run_name="__main__")
    assert left["TestAlternating"].__module__ == "__main__"


@dataclass(frozen=True)
class Odd(cr.Constraint):
    """An odd number of variables is selected."""

    def leaf(self, var):
        return 0, 1

    def merge(self, left, right):
        return (left + right) % 2

    def accepts(self, state):
        return state == 1


class Holder:
    @dataclass(frozen=True)
    class Inner(Odd):
        """Defined in a class, with a field that needs a name of this module."""

        like: Odd = Odd()


def local(odd=Odd):
    @dataclass(frozen=True)
    class Local(odd):
        """Defined in a function."""

        name: str = "Local(<locals>)"

    return Local()


def odd(selected):
    return len(selected) % 2 == 1


def compositions():
    """Every one of the types in every place where a constraint may stand."""
    for one in (Odd(), Holder.Inner(), local()):
        yield Case(one, 3, odd)
        yield Case(one & cr.AtMost(2), 4, lambda s: len(s) == 1)
        yield Case(cr.Exactly(2) | one, 3, lambda s: len(s) > 0)
        yield Case(~one, 3, lambda s: not odd(s))
        yield Case(one.over([0, 2]), 3, lambda s: odd(s & {0, 2}))
        yield Case(cr.EachGroup(cr.Groups(2), one), 4, lambda s: odd(s & {0, 1}) and odd(s & {2, 3}))
        yield Case(
            cr.EachGroup(cr.Groups(2), ~(one & cr.AtLeast(1))), 4, lambda s: not (odd(s & {0, 1}) or odd(s & {2, 3}))
        )
    yield Case(Odd() & ~Holder.Inner(like=Odd()) | local(), 3, odd)


class TestNestedAnywhere(CompilerContract):
    def cases(self):
        return compositions()


def test_names_of_the_suite_come_first():
    """What ``namespace`` says, and an unequal result is an error."""

    class Renamed(CompilerContract):
        namespace = {"Odd": Holder.Inner}  # noqa: RUF012

    with pytest.raises(
        AssertionError, match=r"expected repr to evaluate to an equal one, got Holder\.Inner\(like=Odd\(\)\)"
    ):
        Renamed().test_repr_evaluates_back(Case(Odd(), 3, odd))
