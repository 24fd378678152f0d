"""``python -m benchmarks.circuits.random_cnf``: the circuits of KLay's synthetic protocol, as a folder of files.

A formula of n variables has n / 2 clauses for an SDD and 2 n for a d-DNNF; a clause has three literals, each a variable
and a sign drawn uniformly, so that it may name one twice (Maene, Derkinderen & Zuidberg Dos Martires, ICLR 2025). The
SDD is PySDD's, clause by clause on a balanced vtree that stays as it is; the d-DNNF is that of a compiler given by its
path (the paper's is d4; dsharp takes the same formulas).
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
from collections.abc import Sequence
from functools import reduce
from operator import or_
from pathlib import Path

Clauses = list[list[int]]
LITERALS = 3


def random_clauses(n: int, count: int, seed: int) -> Clauses:
    """``count`` clauses of three literals over the variables 1 to n."""
    draw = random.Random(f"{n} {count} {seed}")
    return [[draw.choice((1, -1)) * draw.randint(1, n) for _ in range(LITERALS)] for _ in range(count)]


def dimacs(n: int, clauses: Clauses) -> str:
    """The formula as a DIMACS file."""
    lines = (" ".join(map(str, [*clause, 0])) for clause in clauses)
    return "\n".join([f"p cnf {n} {len(clauses)}", *lines, ""])


def write_sdd(path: Path, n: int, clauses: Clauses) -> None:
    """``path`` and the vtree beside it."""
    from pysdd.sdd import SddManager, Vtree

    manager = SddManager.from_vtree(Vtree(var_count=n, vtree_type="balanced"))
    node = manager.true()
    for clause in clauses:
        node = node & reduce(or_, map(manager.literal, clause))
    node.save(str(path).encode())
    node.vtree().root().save(str(path.with_suffix(".vtree")).encode())


def write_ddnnf(path: Path, n: int, clauses: Clauses, compiler: Path) -> None:
    """``path``, by dsharp or d4 in a process of its own."""
    formula = path.with_suffix(".cnf")
    formula.write_text(dimacs(n, clauses))
    options = ["-dDNNF", formula, f"-out={path}"] if compiler.name.startswith("d4") else ["-Fnnf", path, formula]
    subprocess.run([compiler, *options], check=True, stdout=subprocess.DEVNULL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the circuits; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.circuits.random_cnf", description="Circuits of 3-CNF.")
    parser.add_argument("out", type=Path, help="the folder, made if it is not there")
    parser.add_argument("--sizes", default="30,40,50", help="variables: n,n,... (default: 30,40,50)")
    parser.add_argument("--seeds", type=int, default=10, help="formulas of each size (default: 10)")
    parser.add_argument("--ddnnf", type=Path, metavar="COMPILER", help="d-DNNFs by this dsharp or d4, instead of SDDs")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    for n in map(int, options.sizes.split(",")):
        for seed in range(options.seeds):
            name = f"cnf-{n}-{seed}"
            if options.ddnnf is None:
                write_sdd(options.out / f"{name}.sdd", n, random_clauses(n, n // 2, seed))
            else:
                write_ddnnf(options.out / f"{name}.nnf", n, random_clauses(n, 2 * n, seed), options.ddnnf)
            print(name, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
