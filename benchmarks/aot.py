"""Compile the engine ``triton`` ahead of time, for GPUs that need not be there, and predict its times.

``python -m benchmarks.aot`` (without ``TRITON_INTERPRET``) makes the engine's own calls with a driver that has no GPU,
compiles what they would launch, and writes a row per kernel: registers, spilled bytes, shared memory and SASS
instructions by kind, from the assembler and the disassembler that come with triton. Rows are marked
``"predicted": true``: nothing was run.

The prediction, for the kernels that hold a row in lanes, is the largest of these floors, with nothing for launching:

* issue: each scheduler of a multiprocessor issues one instruction per cycle, so a kernel takes at least
  (instructions per row and lane) x (lanes per row) x T / 32 / (multiprocessors x schedulers x clock). Every
  instruction counts once: the only loop is the shift's Newton iteration, and rarely taken branches count as taken;
* pipes: the same for the slower units, each with its own rate (exponentials and conversions: 16 lanes a cycle and
  multiprocessor, shuffles and shared memory: 32, float64: 64);
* memory: the bytes that are read and written, each once, at the sustained bandwidth.

Shapes: T tokens, n variables, k the largest count.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.rows import Row, append
from circuitroute.engines.subset.triton import engine

ROWS = Path(__file__).parent / "rows" / "aot-subset.jsonl"
TOKENS = 65536
SIZES = ((64, 8), (128, 8), (256, 8), (512, 10), (512, 64))
KINDS = ("forward", "forward+sample", "sample", "backward")


@dataclass(frozen=True)
class Machine:
    """What the prediction knows of a GPU."""

    name: str
    multiprocessors: int
    clock_ghz: float
    bandwidth: float  # bytes per second, sustained


# Schedulers of a multiprocessor, and lanes per cycle and multiprocessor of the units slower than they are.
SCHEDULERS = 4
PIPES = {
    "transcendental": (16, ("MUFU", "F2F", "I2F", "I2FP", "F2I", "FRND")),
    "shared": (32, ("SHFL", "LDS", "STS", "LDSM", "STSM", "LDG", "STG", "LDL", "STL")),
    "float64": (64, ("DADD", "DMUL", "DFMA", "DSETP")),
}
TARGETS = {80: Machine("A100", 108, 1.41, 1.7e12), 90: Machine("H200", 132, 1.7, 4.3e12)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile what the command line asks for and append the rows."""
    options = _parser().parse_args(arguments)
    for size in options.sizes:
        for kind in options.kinds:
            for target in options.targets:
                kernels = compiled(*size, kind, target, options.exactly)
                found = [row_of(*size, kind, target, *kernel) for kernel in kernels]
                append(options.out, found)
                for row in found:
                    print(describe(row), flush=True)
    print(f"rows appended to {options.out}")
    return 0


@dataclass(frozen=True)
class _Compiler(engine._Problem):
    """Compiles what it would launch: names, constants and binaries."""

    compiled: list[tuple[str, dict[str, Any], bytes]] = field(default_factory=list)

    def _run(self, kernel: Any, programs: int, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        binary = kernel.warmup(*arguments, grid=(programs,), **self.sizes, **constants, **engine.on_gpu())
        name = f"{kernel.fn.__module__.split('.')[-1]}.{kernel.fn.__name__}"
        self.compiled.append((name, constants, binary.asm["cubin"]))


@dataclass(frozen=True)
class _Driver:
    """What triton asks of a GPU before it compiles for it."""

    target: int

    def get_current_device(self) -> int:
        return self.target  # compiled kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.target, 32)


def compiled(n: int, k: int, kind: str, target: int, exactly: bool = False) -> list[tuple[str, dict[str, Any], bytes]]:
    """The kernels that a call launches: names, constants and binaries; ``exactly``: for k alone, not up to k."""
    from triton.runtime import driver

    driver.set_active(_Driver(target))
    T = TOKENS  # by how many tokens there are, rows are dealt out to lanes
    logits, potential = torch.zeros(T, n), torch.zeros(k + 1)
    problem = _Compiler(logits, potential, interpreted=False, exact=exactly)
    if kind == "backward":
        known = engine.Sweep(**problem.room(with_moments=True, with_sample=False)._asdict())
        problem.backward(known, logits, torch.zeros(T, k + 1))
    else:
        problem.forward(torch.zeros(T, dtype=torch.int64) if "sample" in kind else None, kind != "sample")
    return problem.compiled


def row_of(n: int, k: int, kind: str, target: int, name: str, constants: dict[str, Any], cubin: bytes) -> Row:
    """The row of one kernel."""
    import triton

    counts = instructions(cubin)
    row = {
        "op": "subset",
        "kernel": name,
        "kind": kind,
        "log": bool(constants.get("LOG", False)),
        "exactly": bool(constants.get("EXACT", False)),
        "n": n,
        "k": k,
        "T": TOKENS,
        "sm": target,
        **resources(cubin),
        "instructions": sum(counts.values()),
        "by_kind": dict(counts.most_common(24)),
        "triton": triton.__version__,
        "predicted": True,
    }
    if name.startswith("registers"):
        lanes = 1 << constants["LG"]
        row |= {"instructions_per_variable": round(sum(counts.values()) * lanes / n, 1)}
        row |= predict(counts, lanes, traffic(n, k, kind), TARGETS[target])
    return row


# ---------------------------------------------------------------------------------------------- what the code is


def resources(cubin: bytes) -> Row:
    """Registers, bytes of stack (spills) and shared memory."""
    text = _dump(cubin, "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", text)
    if found is None:
        raise ValueError(f"cuobjdump printed no resources: {text[-300:]}")
    registers, stack, shared = map(int, found.groups())
    return {"registers": registers, "spilled_bytes": stack, "shared_bytes": shared}


def instructions(cubin: bytes) -> Counter[str]:
    """SASS instructions by kind."""
    line = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", re.MULTILINE)
    return Counter(name for name in line.findall(_dump(cubin, "--dump-sass")) if name != "NOP")


def _dump(cubin: bytes, option: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(tool), option, file.name], capture_output=True, text=True, check=True).stdout


# ---------------------------------------------------------------------------------------------- what it may cost


def traffic(n: int, k: int, kind: str) -> int:
    """Bytes per token that a call must read and write."""
    row = 4 * (k + 1) + 32
    if kind == "backward":
        return 3 * 4 * n + 3 * row
    moments = 0 if kind == "sample" else 4 * n + row
    return 4 * n + moments + (n + 8 if "sample" in kind else 0)


def predict(counts: Counter[str], lanes: int, bytes_per_token: int, machine: Machine) -> Row:
    """Microseconds for TOKENS rows by each floor, and the largest."""
    per_second = machine.multiprocessors * machine.clock_ghz * 1e9
    warps = TOKENS * lanes / 32
    floors = {"issue": sum(counts.values()) * warps / (per_second * SCHEDULERS)}
    for name, (width, kinds) in PIPES.items():
        floors[name] = sum(counts[kind] for kind in kinds) * warps * 32 / (per_second * width)
    floors["memory"] = TOKENS * bytes_per_token / machine.bandwidth
    in_us = {f"{name}_us": round(1e6 * seconds, 1) for name, seconds in floors.items()}
    return {"machine": machine.name, **in_us, "predicted_us": max(in_us.values())}


def describe(row: Row) -> str:
    """One line for people."""
    predicted = f"  predicted {row['predicted_us']:.0f} us (memory {row['memory_us']:.0f})" if "machine" in row else ""
    return (
        f"({row['n']}, {row['k']}) {row['kind']:<14} {row['kernel']:<14} {'log' if row['log'] else '   '} "
        f"{'exactly ' if row['exactly'] else ''}"
        f"sm_{row['sm']}: {row['registers']} registers, {row['spilled_bytes']} bytes spilled, "
        f"{row['instructions']} instructions{predicted}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sizes", type=_sizes, default=SIZES, help="n:k pairs, separated by commas")
    parser.add_argument("--kinds", type=_kinds, default=KINDS, help=f"of {', '.join(KINDS)}")
    parser.add_argument("--exactly", action="store_true", help="for circuits that allow the count k alone")
    parser.add_argument("--targets", type=_targets, default=tuple(TARGETS), help="compute capabilities, as in 80,90")
    parser.add_argument("--out", type=Path, default=ROWS, help="the JSONL file to append to")
    return parser


def _sizes(text: str) -> list[tuple[int, ...]]:
    return [tuple(map(int, pair.split(":"))) for pair in text.split(",")]


def _kinds(text: str) -> list[str]:
    return text.split(",")


def _targets(text: str) -> list[int]:
    return [int(target) for target in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
