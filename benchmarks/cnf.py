"""``python -m benchmarks.cnf``: random 3-CNF compiled by our diagrams, by SDDs over our vtrees, and by PySDD by itself.

A row per formula and way: the smooth circuit's nodes and products, CPU seconds (of PySDD's process, too), and the model
count, on which all ways that finish must agree. ``python -m benchmarks.cnf --plot`` draws the rows.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch

import circuitroute as cr
from benchmarks import rows
from circuitroute.circuit import Graph
from circuitroute.circuit.graph import model_count
from circuitroute.interop import sdd
from circuitroute.plots import COLORS, MARKERS, new_figure

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "benchmarks" / "rows" / "cpu-cnf.jsonl"
IMAGE = ROOT / "docs" / "images" / "cnf.svg"
BUILT_IN, SDD = "built-in", 'compiler="sdd"'
PEERS = {"PySDD, balanced": "balanced", "PySDD, right-linear": "right"}

# PySDD by itself: its reader, its compiler and its initial vtree of that kind, made smaller by its search afterwards.
PEER = """
import signal, sys
signal.signal(signal.SIGPROF, signal.SIG_DFL)
signal.setitimer(signal.ITIMER_PROF, float(sys.argv[4]))
from pysdd.sdd import SddManager
manager, root = SddManager.from_cnf_file(sys.argv[1].encode(), sys.argv[2].encode())
root.ref()
if not root.is_false():
    manager.minimize_limited()
root.save((sys.argv[3] + "/a.sdd").encode())
manager.vtree().save((sys.argv[3] + "/a.vtree").encode())
"""


def random_3cnf(n: int, ratio: float, seed: int) -> cr.CNF:
    """``ratio`` clauses per variable, each of three distinct variables, with random signs."""
    draw = random.Random(f"{n} {ratio} {seed}")
    clauses = [[v * draw.choice((1, -1)) for v in draw.sample(range(1, n + 1), 3)] for _ in range(round(n * ratio))]
    return cr.CNF(clauses, n)


def ours(cnf: cr.CNF, compiler: str | None, seconds: float) -> Graph:
    """The graph by a compiler of ours."""
    cr.compilation.clear_cache()
    return cr.compile(cnf, max_nodes=10_000_000, max_seconds=seconds, compiler=compiler).graph


def peer(cnf: cr.CNF, vtree: str, seconds: float) -> Graph:
    """The graph of the diagram that PySDD makes by itself."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.cnf")
        lines = [f"p cnf {cnf.n} {len(cnf.clauses)}", *(" ".join(map(str, [*c, 0])) for c in cnf.clauses)]
        path.write_text("\n".join([*lines, ""]))
        done = subprocess.run([sys.executable, "-c", PEER, str(path), vtree, folder, str(seconds)], check=False)
        if done.returncode:
            raise cr.CircuitTooLargeError(f"PySDD ended with code {done.returncode}")
        return sdd.graph(Path(folder, "a.sdd"), Path(folder, "a.vtree"), 10_000_000, "PySDD's")


def _seconds() -> float:
    """CPU seconds of this process and of those it waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def measured(cnf: cr.CNF, make: Callable[[], Graph]) -> dict[str, Any]:
    """What one way makes of one formula."""
    start = _seconds()
    try:
        graph = make()
    except cr.InfeasibleError:
        return {"result": "unsatisfiable", "models": "0", "seconds": _seconds() - start}
    except cr.CircuitTooLargeError:
        return {"result": "over the limit", "seconds": _seconds() - start}
    taken = _seconds() - start
    sizes = {"nodes": graph.num_nodes, "edges": graph.num_edges, "depth": len(graph.levels)}
    return {"result": "circuit", "models": str(model_count(graph, None)), "seconds": taken, **sizes}


def measure(options: argparse.Namespace) -> Iterator[rows.Row]:
    """A row per formula and way."""
    for n, ratio, seed in product(options.sizes, options.ratios, range(options.seeds)):
        cnf = random_3cnf(n, ratio, seed)
        ways: dict[str, Callable[[], Graph]] = {
            BUILT_IN: lambda cnf=cnf: ours(cnf, None, options.seconds),
            SDD: lambda cnf=cnf: ours(cnf, "sdd", options.seconds),
        }
        if n <= options.peers_up_to:
            ways |= {name: lambda cnf=cnf, kind=kind: peer(cnf, kind, options.seconds) for name, kind in PEERS.items()}
        found = []
        for way, make in ways.items():
            row = {"op": "cnf", "n": n, "ratio": ratio, "seed": seed, "provider": way, **measured(cnf, make)}
            found.append(row)
            yield row
        counts = {row["models"] for row in found if "models" in row}
        if len(counts) > 1:
            raise AssertionError(f"the model counts of n={n}, ratio={ratio}, seed={seed} differ: {counts}")


def table(measured: Sequence[rows.Row]) -> list[str]:
    """Lines: the median over seeds, and the smallest and the largest; of those satisfiable and within the limits."""
    lines = ["| n | clauses per variable | way | circuits, of formulas | products | nodes | CPU seconds |"]
    lines.append("| ---: | ---: | --- | ---: | ---: | ---: | ---: |")
    for n, ratio, way in dict.fromkeys((row["n"], row["ratio"], row["provider"]) for row in measured):
        some = [row for row in measured if (row["n"], row["ratio"], row["provider"]) == (n, ratio, way)]
        satisfiable = [row for row in some if row["result"] != "unsatisfiable"]
        done = [row for row in satisfiable if row["result"] == "circuit"]
        if not satisfiable:
            continue
        sizes = [_spread([row[name] for row in done], ",.0f") for name in ("edges", "nodes")]
        seconds = _spread([row["seconds"] for row in done], ".2f")
        lines.append(
            f"| {n} | {ratio:g} | {way} | {len(done)} of {len(satisfiable)} | {' | '.join(sizes)} | {seconds} |"
        )
    return lines


def _spread(values: Sequence[float], form: str) -> str:
    if not values:
        return ""
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def draw(measured: Sequence[rows.Row], path: Path, n: int) -> None:
    """Products against clauses per variable, a line per way through the medians and a mark per formula."""
    import matplotlib as mpl

    with mpl.rc_context({"font.size": 13, "svg.hashsalt": "cnf", "svg.fonttype": "path"}):
        figure = new_figure(5.4, 4.2)
        axes = figure.subplots()
        for way, color, marker in zip((BUILT_IN, SDD, *PEERS), COLORS, MARKERS, strict=False):
            done = [row for row in measured if row["n"] == n and row["provider"] == way and row["result"] == "circuit"]
            ratios = sorted({row["ratio"] for row in done})
            middle = [median(row["edges"] for row in done if row["ratio"] == ratio) for ratio in ratios]
            axes.plot(ratios, middle, color=color, label=way)
            axes.plot(
                [r["ratio"] for r in done], [r["edges"] for r in done], marker, color=color, markersize=5, alpha=0.6
            )
        axes.set_yscale("log")
        axes.set_xlabel("clauses per variable")
        axes.set_ylabel("products in the circuit")
        axes.set_title(f"Random 3-CNF, {n} variables", fontsize=13)
        axes.legend(frameon=False, fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def parser() -> argparse.ArgumentParser:
    """Of the command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.cnf")
    made.add_argument("--sizes", type=int, nargs="+", default=[10, 20, 30])
    made.add_argument("--ratios", type=float, nargs="+", default=[1.5, 2.5, 3.5, 4.5])
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--seconds", type=float, default=10.0, help="of CPU time per formula and way (default 10)")
    made.add_argument(
        "--peers-up-to", type=int, default=40, metavar="N", help="variables that PySDD by itself is given"
    )
    made.add_argument("--out", type=Path, default=OUT)
    made.add_argument("--plot", action="store_true", help="draw and print the rows that are there, and measure nothing")
    made.add_argument("--image", type=Path, default=IMAGE)
    made.add_argument("--image-n", type=int, default=30, help="the number of variables of the picture (default 30)")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, append, print; or draw."""
    options = parser().parse_args(arguments)
    if options.plot:
        found = [json.loads(line) for line in options.out.read_text().splitlines()]
        draw(found, options.image, options.image_n)
        print("\n".join(table(found)))
        return 0
    common = rows.environment(torch.device("cpu"))
    found = []
    for row in measure(options):
        found.append(row | common)
        rows.append(options.out, [row | common])
    print("\n".join(table(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
