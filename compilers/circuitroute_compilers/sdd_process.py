"""The process in which PySDD compiles: a program that imports nothing of this library, nor anything slow.

libsdd is C: one of its calls may take hours, use all memory or end the process, and nothing in Python can stop it. So
it has a process of its own, with limits that the operating system keeps. Called as ``python sdd_process.py FOLDER``, it
reads ``job.json`` there and writes ``done.json`` and, if there is a diagram, ``0.sdd`` and ``0.vtree``.

The job's formulas are steps (operator, operands), as in :mod:`circuitroute.constraints.formula`. A vtree comes with a
program for a stack of diagrams that brings every formula in where the tree has all its variables for the first time:
PUSH true, JOIN the two topmost, or bring formula number i into the topmost. After each step the nodes are counted, and
the dead ones collected. The trees are tried under limits of elements that grow, so that a bad one costs little, and the
choice depends on nothing but the job: of the trees that succeed under the smallest limit, that of the smallest diagram;
where diagrams are large, the first that succeeds.
"""

from __future__ import annotations

import os
import sys

if sys.path and os.path.abspath(sys.path[0]) == os.path.dirname(os.path.abspath(__file__)):
    del sys.path[0]  # where Python put this program's folder, whose modules have names of the standard library's

import json
import signal
import time
from typing import Any

PUSH, JOIN = -1, -2
# The limits on elements begin at the first, each following one being so many times as large.
FIRST_LIMIT, FACTOR = 20_000, 10
# Trees are compared where the first one needs at most so many elements at any time.
COMPARED = 200_000
# Dead elements are collected when there are more than these, and than there are live ones.
DEAD = 50_000
# Diagrams of up to so many elements are made smaller by moving their vtrees; seconds that never pass.
MINIMIZED = 20_000
FOREVER = 1e9


class OverLimitError(Exception):
    """More elements than allowed."""


def main(folder: str) -> None:
    """Does the job in a folder."""
    with open(os.path.join(folder, "job.json"), encoding="utf-8") as file:
        job = json.load(file)
    _limit(job["seconds"], job["memory"])
    sys.path.append(job["path"])
    from pysdd.sdd import SddManager, Vtree

    def manager(number: int) -> Any:
        return SddManager.from_vtree(Vtree.from_file(os.fsencode(os.path.join(folder, f"{number}.in"))))

    done = _compiled(job, manager, folder)
    with open(os.path.join(folder, "done.json"), "w", encoding="utf-8") as file:
        json.dump({**done, "seconds": time.process_time()}, file)


def _limit(seconds: float | None, memory: int) -> None:
    """Let the operating system end this process after so many CPU seconds, and refuse it more bytes than these."""
    if seconds is not None and hasattr(signal, "setitimer"):
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, max(seconds, 1e-3))
    if sys.platform != "win32":
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (memory if hard < 0 else min(memory, hard), hard))


def _compiled(job: dict[str, Any], manager: Any, folder: str) -> dict[str, Any]:
    limit, reached = min(FIRST_LIMIT, job["elements"]), 0
    while True:
        best: tuple[int, Any, Any, int] | None = None
        most = limit
        for number, program in enumerate(job["programs"]):
            made = manager(number)
            run = _Run(made, job["formulas"], min(limit, most))
            try:
                root = run.root(program)
            except OverLimitError:
                reached = max(reached, run.brought)
                continue
            if root.is_false():
                return {"result": "false"}
            # Too many nodes come after everything else, whatever the cost.
            cost = root.size() + job["depths"][number] + (root.count() > job["nodes"]) * (1 << 60)
            if best is None or cost < best[0]:
                best = cost, root, made, number
            if run.most > COMPARED:
                break
            most = max(run.most, FIRST_LIMIT)  # what needed less leaves the next tree no more
        if best is not None:
            _, root, made, number = best
            _minimize(made, root)
            root.save(os.fsencode(os.path.join(folder, "0.sdd")))
            made.vtree().save(os.fsencode(os.path.join(folder, "0.vtree")))
            return {"result": "diagram", "tree": number, "nodes": root.count(), "elements": root.size()}
        if limit >= job["elements"]:
            return {"result": "too large", "reached": reached}
        limit = min(limit * FACTOR, job["elements"])


def _minimize(manager: Any, root: Any) -> None:
    """Let libsdd look for a better vtree, where that does not take long.

    Its limits on time are lifted, so that the outcome depends on the diagram alone; those on growth hold.
    """
    if root.size() > MINIMIZED or root.is_true():
        return
    manager.set_vtree_search_time_limit(FOREVER)
    manager.set_vtree_fragment_time_limit(FOREVER)
    manager.set_vtree_operation_time_limit(FOREVER)
    manager.set_vtree_apply_time_limit(FOREVER)
    manager.minimize_limited()


class _Run:
    """One vtree's program; ``brought`` counts the formulas that were brought in, ``most`` the elements at any time."""

    def __init__(self, manager: Any, formulas: list[list[tuple[str, list[int]]]], limit: int) -> None:
        self.manager = manager
        self.brought = 0
        self.most = 0
        self._formulas = formulas
        self._limit = limit

    def root(self, program: list[int]) -> Any:
        stack: list[Any] = []
        for step in program:
            if step == PUSH:
                stack.append(self._held(self.manager.true()))
                continue
            above = stack.pop()
            if step == JOIN:
                other = stack.pop()
            else:
                other = self._held(self._formula(self._formulas[step]))
                self.brought += 1
            stack.append(self._held(self.manager.conjoin(above, other)))
            above.deref()
            other.deref()
            self._look()
            if stack[-1].is_false():
                break
        return stack[-1]

    def _held(self, node: Any) -> Any:
        node.ref()
        return node

    def _look(self) -> None:
        live, dead = self.manager.live_size(), self.manager.dead_size()
        self.most = max(self.most, live)
        if live > self._limit:
            raise OverLimitError
        if dead > live + DEAD:
            self.manager.garbage_collect()

    def _formula(self, steps: list[tuple[str, list[int]]]) -> Any:
        """The diagram of a formula; nothing is collected until it is complete."""
        values: list[Any] = []
        for operator, operands in steps:
            if operator == "var":
                values.append(self.manager.literal(operands[0] + 1))
            else:
                values.append(self._step(operator, [values[i] for i in operands]))
                if self.manager.live_size() + self.manager.dead_size() > 4 * self._limit + 4 * DEAD:
                    raise OverLimitError
        return values[-1]

    def _step(self, operator: str, some: list[Any]) -> Any:
        manager = self.manager
        if operator == "true":
            return manager.true()
        if operator == "false":
            return manager.false()
        if operator == "not":
            return some[0].negate()
        if operator == "and":
            return self._all(some)
        if operator == "or":
            return self._any(some)
        if operator == "implies":
            return self._any([some[0].negate(), some[1]])
        if operator == "ite":
            return self._any([self._all(some[:2]), self._all([some[0].negate(), some[2]])])
        if operator == "equivalent":
            return self._any([self._all(some), self._any(some).negate()])
        result = manager.false()  # what is left is "xor"
        for each in some:
            result = self._any([self._all([result, each.negate()]), self._all([result.negate(), each])])
        return result

    def _all(self, some: list[Any]) -> Any:
        result = self.manager.true()
        for each in some:
            result = self.manager.conjoin(result, each)
        return result

    def _any(self, some: list[Any]) -> Any:
        result = self.manager.false()
        for each in some:
            result = self.manager.disjoin(result, each)
        return result


if __name__ == "__main__":
    main(sys.argv[1])
