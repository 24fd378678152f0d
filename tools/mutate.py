"""Mutation testing: one small mistake at a time in a copy of the checkout, and whether the tests notice.

::

    python -m tools.mutate TREE --count 6              six mutants of every file of the table
    python -m tools.mutate TREE --only keys --count 20
    python -m tools.mutate TREE --again survived       those that survived, now that there are more tests

TREE is a folder for the copy. It is kept, so that kernels which a mutant leaves alone need not be compiled again; what
differs from the checkout is put right at the start. Compiled and interpreted kernels are read from files, which is why
mutants are files. Which mutants are tried depends on ``--seed`` and the source alone: within a file, operators take
turns. Rows are appended to ``tools/mutants.jsonl``, one a mutant::

    file, line, column    where, counted from 1
    code                  the line as it stands
    operator, old, new    what was done
    verdict               killed, survived, timeout (which kills, too), or equivalent: no right test could tell
    by                    the test that failed first
    first                 the verdict before there were more tests, where that was another one
    reason                why it is equivalent, by a person
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from types import FrameType

from tools.sites import Site, find
from tools.targets import TESTS

ROOT = Path(__file__).resolve().parent.parent
ROWS = Path(__file__).with_name("mutants.jsonl")
# Seconds that tests may take beyond what they take of the unchanged source, which is trebled: kernels are compiled.
PATIENCE = 120.0
# Processes for tests are forked from one that has imported these already: most mutants are killed in less time.
PRELOADED = ["torch", "numba", "triton.language", "sympy", "networkx", "scipy.special", "pytest"]
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(PRELOADED)


@dataclass(frozen=True)
class Row:
    """A mutant and what became of it; see the module's docstring."""

    file: str
    line: int
    column: int
    code: str
    operator: str
    old: str
    new: str
    verdict: str
    by: str | None = None
    first: str | None = None
    reason: str | None = None

    @property
    def mutant(self) -> tuple[object, ...]:
        """What it is the same mutant by, in a file whose lines have moved."""
        return self.file, self.column, self.code, self.operator, self.old, self.new


@dataclass(frozen=True)
class Verdict:
    """What a run of tests says: killed, survived or timeout; the test that failed; and seconds."""

    verdict: str
    by: str | None
    seconds: float


# ---------------------------------------------------------------------------------------------- the copy


def copy_tree(root: Path, tree: Path) -> None:
    """Bring ``tree`` to the state of the checkout ``root``: the files that git knows or would add.

    Raises:
        ValueError: ``tree`` is the checkout, or holds it.
    """
    if tree.resolve() in (root.resolve(), *root.resolve().parents):
        raise ValueError(f"tree={tree}: mutants are made there; give a folder of their own")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, check=True, capture_output=True).stdout.decode()
    for name in filter(None, listed.split("\0")):
        source, copy = root / name, tree / name
        if not source.is_file():
            copy.unlink(missing_ok=True)
        elif not copy.is_file() or copy.read_bytes() != source.read_bytes():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy)


@contextlib.contextmanager
def mutated(path: Path, site: Site) -> Iterator[None]:
    """The file with one mutation, inside; as it was, its times too, outside."""
    source, times = path.read_bytes(), path.stat()
    try:
        _write(path, site.applied(source))
        yield
    finally:
        _write(path, source)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def _write(path: Path, source: bytes) -> None:
    """Bytecode is found by a file's seconds and size, which a mutant may share with the last one."""
    path.write_bytes(source)
    Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------- verdicts


def run_tests(tree: Path, tests: Sequence[str], limit: float) -> Verdict:
    """Run tests in the copy until one fails, in a process of their own.

    Args:
        tests: arguments of pytest.
        limit: seconds; what takes longer is ended, with all that it started.

    Raises:
        RuntimeError: pytest could not run them.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        process = _SERVER.Process(target=_run_pytest, args=(tree, list(tests), out))
        process.start()
        try:
            process.join(limit)
            code, printed = process.exitcode, out.read_text(errors="replace") if out.is_file() else ""
        finally:
            if process.is_alive() and process.pid is not None:
                with contextlib.suppress(ProcessLookupError):  # it has not made a group of its own yet
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()
            process.join()
            process.close()
    seconds = time.monotonic() - began
    if code is None:
        return Verdict("timeout", None, seconds)
    if code == 0:
        return Verdict("survived", None, seconds)
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", printed, re.MULTILINE)
    if code in (4, 5) or (
        code == 1 and not failed
    ):  # arguments it does not understand, no tests, or an error of its own
        raise RuntimeError(f"tests={tests}: pytest ran none of them:\n{printed[-2000:]}")
    return Verdict("killed", failed[1] if failed else f"exit status {code}", seconds)


def _run_pytest(tree: Path, tests: list[str], out: Path) -> None:
    """In the process that tests run in, whose exit status is pytest's."""
    os.setsid()
    with out.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(tree)
    paths = [str(tree / name) for name in (".", "compilers", "examples")]
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    import pytest

    code = pytest.main(["-x", "-q", "--tb=no", "-rfE", "-p", "no:cacheprovider", *tests])
    sys.stdout.flush()
    os._exit(int(code))


def tests_of(file: str) -> list[str]:
    """The tests named for a file by the first pattern that fits it.

    Raises:
        ValueError: there is none.
    """
    for pattern, tests in TESTS.items():
        if PurePosixPath(file).match(pattern):
            return tests
    raise ValueError(f"file={file!r}: tools/targets.py names no tests for it")


# ---------------------------------------------------------------------------------------------- which mutants


def chosen(file: str, source: bytes, count: int, seed: int) -> list[Site]:
    """``count`` sites of a file, fewer if there are fewer, by chance; its operators take turns."""
    generator = random.Random(f"{seed} {file}")
    by_operator: dict[str, list[Site]] = {}
    for site in find(source):
        by_operator.setdefault(site.operator, []).append(site)
    turns = list(by_operator.values())
    generator.shuffle(turns)
    for sites in turns:
        generator.shuffle(sites)
    longest = max(map(len, turns), default=0)
    return [sites[i] for i in range(longest) for sites in turns if i < len(sites)][:count]


def files_of(root: Path, only: str) -> list[str]:
    """The files of the table whose name contains ``only``, in its order."""
    found: dict[str, None] = {}
    for pattern in TESTS:
        for path in sorted(root.glob(pattern)):
            found.setdefault(path.relative_to(root).as_posix())
    return [name for name in found if only in name]


def as_row(file: str, source: bytes, site: Site, verdict: Verdict) -> Row:
    """What is kept of a verdict."""
    code = source.splitlines()[site.line - 1].decode().strip()
    column = site.start - source.rfind(b"\n", 0, site.start)
    return Row(file, site.line, column, code, site.operator, site.old, site.new, verdict.verdict, verdict.by)


def load(path: Path) -> list[Row]:
    """The rows of a file, none if there is none."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return [Row(**json.loads(line)) for line in lines]


def save(path: Path, rows: Sequence[Row]) -> None:
    """All rows, without what is None."""
    kept = ({name: value for name, value in asdict(row).items() if value is not None} for row in rows)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))


# ---------------------------------------------------------------------------------------------- the command


class Session:
    """Mutants tried one after the other, each row written when it is known."""

    def __init__(self, root: Path, tree: Path, rows_path: Path, limit: float | None = None) -> None:
        self.root, self.tree, self.path, self._limit = root, tree, rows_path, limit
        self.rows = load(rows_path)
        self._limits: dict[tuple[str, ...], float] = {}
        copy_tree(root, tree)

    def limit(self, tests: list[str]) -> float:
        """Seconds for these tests of a mutant; where none are given, by what they take of the unchanged source.

        Raises:
            RuntimeError: they fail there.
        """
        if self._limit is not None:
            return self._limit
        key = tuple(tests)
        if key not in self._limits:
            verdict = run_tests(self.tree, tests, 3600)
            if verdict.verdict != "survived":
                raise RuntimeError(f"tests={tests}: {verdict.by or verdict.verdict} without any mutation")
            print(f"{verdict.seconds:6.1f} s unchanged: {' '.join(tests)}", flush=True)
            self._limits[key] = 3 * verdict.seconds + PATIENCE
        return self._limits[key]

    def attempt(self, file: str, site: Site) -> Row:
        """Try one mutant, write its row and return it."""
        tests, path = tests_of(file), self.tree / file
        limit, source = self.limit(tests), path.read_bytes()
        with mutated(path, site):
            verdict = run_tests(self.tree, tests, limit)
        row = as_row(file, source, site, verdict)
        print(f"{verdict.seconds:6.1f} s {row.verdict:9} {file}:{row.line} {site.operator} {row.by or ''}", flush=True)
        return row

    def sample(self, only: str, count: int, seed: int) -> None:
        """Try ``count`` mutants of every file that ``only`` names, without those that have rows."""
        known = {row.mutant for row in self.rows}
        for file in files_of(self.root, only):
            source = (self.tree / file).read_bytes()
            for site in chosen(file, source, count, seed):
                if as_row(file, source, site, Verdict("", None, 0)).mutant not in known:
                    self.rows.append(self.attempt(file, site))
                    save(self.path, self.rows)

    def again(self, only: str, verdict: str) -> None:
        """Try those with this verdict again, where their line still stands."""
        for i, row in enumerate(self.rows):
            site = self._site(row) if row.verdict == verdict and only in row.file else None
            if site is None:
                continue
            found = self.attempt(row.file, site)
            first = row.first or (row.verdict if found.verdict != row.verdict else None)
            self.rows[i] = Row(**{**asdict(found), "first": first, "reason": row.reason})
            save(self.path, self.rows)

    def _site(self, row: Row) -> Site | None:
        source = (self.tree / row.file).read_bytes()
        same = [s for s in find(source) if as_row(row.file, source, s, Verdict("", None, 0)).mutant == row.mutant]
        return min(same, key=lambda site: abs(site.line - row.line), default=None)


def summary(rows: Sequence[Row]) -> str:
    """Per directory: mutants, how many were killed at first and now, and how many are equivalent."""
    lines = [f"{'':44} mutants  killed first  killed now  equivalent"]
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(os.path.dirname(row.file), []).append(row)
    for name, some in [*sorted(groups.items()), ("all", list(rows))]:
        equivalent = sum(row.verdict == "equivalent" for row in some)
        now = sum(row.verdict in ("killed", "timeout") for row in some)
        first = sum((row.first or row.verdict) in ("killed", "timeout") for row in some)
        lines.append(f"{name:44} {len(some):7}  {first:12}  {now:10}  {equivalent:10}")
    return "\n".join(lines)


def _ended(number: int, frame: FrameType | None) -> None:
    """What is mutated is put right when the process is told to end, too."""
    raise SystemExit(128 + number)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.mutate", description=__doc__.splitlines()[0])
    parser.add_argument("tree", type=Path, nargs="?", help="a folder for the copy; without it rows are summed up")
    parser.add_argument("--only", default="", help="files whose path contains this")
    parser.add_argument("--count", type=int, default=4, help="mutants a file (4)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of mutants (0)")
    parser.add_argument("--again", metavar="VERDICT", help="try those with this verdict again, and no others")
    parser.add_argument("--rows", type=Path, default=ROWS, help="the rows (tools/mutants.jsonl)")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout (this one)")
    parser.add_argument("--limit", type=float, help="seconds a mutant; the unchanged source is not tested first then")
    options = parser.parse_args(arguments)
    if options.tree is not None:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # settled when triton is imported, see tests/conftest.py
        signal.signal(signal.SIGTERM, _ended)
        session = Session(options.root.resolve(), options.tree.resolve(), options.rows, options.limit)
        if options.again:
            session.again(options.only, options.again)
        else:
            session.sample(options.only, options.count, options.seed)
    print(summary(load(options.rows)))


if __name__ == "__main__":
    main()
