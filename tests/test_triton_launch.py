"""The engine ``triton`` through triton's own launcher, on a CUDA driver that does nothing: what it refuses, and when it
compiles. Results are for ``test_engines_triton.py``; what is launched here computes nothing.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import stub_cuda
from circuitroute.engines.subset.triton import aligned
from circuitroute.engines.subset.triton.engine import MAX_LANES_COUNT

pytest.importorskip("triton", minversion="3.4")
pytestmark = pytest.mark.skipif(stub_cuda.compiler() is None, reason="the stub driver needs a C compiler")

ROOT = Path(__file__).resolve().parent.parent
# In lanes, in one lane with one count alone, in memory; what the kernels read as it is.
SMALL = ("3:2:float32", "1:1:bfloat16:exactly", "21:17:float32")
LARGE = (
    "6:2:float32",
    "1:1:bfloat16",
    "11:1:float16:exactly",
    "64:8:float32",
    "64:8:bfloat16",
    "64:8:float32:exactly",
    "128:8:float32",
    "256:8:float32",
    "512:10:float32",
    "512:64:float32",
)
MANY = 65536  # tokens for which sweeps may be laid out otherwise
# What each call of the engine launches: a kernel over all rows, then those for the rows that it lists.
SWEEPS = {"moments and sample": 2, "moments": 2, "sample": 2, "gradient": 2, "gradient, v": 2}
STEPS = {"step": 3, "step, evaluation": 1, "step, marginals": 2, "step, gradient": 2}
POTENTIALS = ("", ", potential per row")


def python(folder, *arguments):
    """Run Python with compiled kernels, which it keeps in ``folder``."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "compilers")])
    environment = {**os.environ, "PYTHONPATH": paths, "TRITON_CACHE_DIR": str(folder), "TRITON_DEFAULT_FP_FUSION": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


def launched(folder, cases):
    done = python(folder, "-m", "tests.stub_launches", folder, *cases)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return launched(tmp_path_factory.mktemp("small"), SMALL)


def hold(found, cases):
    """Every call launches what it has to, whatever is in the list; one compilation serves all T, a second one many."""
    for case in cases:
        mine = [call for call in found["calls"] if call["case"] == case]
        wanted = {**SWEEPS, **(STEPS if int(case.split(":")[1]) <= MAX_LANES_COUNT else {})}
        wanted = {name + which: many for name, many in wanted.items() for which in POTENTIALS}
        for T in {call["T"] for call in mine}:
            assert {call["call"]: call["launches"] for call in mine if call["T"] == T} == wanted
        assert len({call["T"] for call in mine}) == 5
        compiled = [(sum(call[kernel] for kernel in found["compilations"]), call) for call in mine]
        per_row = [many for many, call in compiled if call["call"].endswith(POTENTIALS[1])]
        few = [many for many, call in compiled if call["T"] not in (mine[0]["T"], MANY)]
        assert not any(per_row + few), "compiled again for other sizes"
        assert all(many <= 1 for many, call in compiled if call["T"] == MANY), "compiled a third time"


def test_every_kernel_launches_and_is_compiled_once(small):
    hold(small, SMALL)
    keys = [call for call in small["calls"] if call["case"] == "keys"]
    assert [call["launches"] for call in keys] == 15 * [1]
    assert small["compilations"]["folding.fold"] == 2  # of a number and of tensors, of any size and number
    assert {"registers", "memory", "routing_step", "folding"} == {name.split(".")[0] for name in small["compilations"]}
    assert [name for name, many in small["compilations"].items() if not many] == []


@pytest.mark.slow
def test_large_kernels_launch_and_are_compiled_once(tmp_path):
    hold(launched(tmp_path, LARGE), LARGE)


NAN_KERNELS = """
import sys
from pathlib import Path
import torch, triton, triton.language as tl
from benchmarks import stub_cuda

NAN = tl.constexpr(float("nan"))

@triton.jit
def captured(out):
    tl.store(out, NAN)

@triton.jit
def written(out):
    tl.store(out, float("nan"))

launches = stub_cuda.activate(Path(sys.argv[1]))
for kernel in (captured, written):
    before = launches()
    try:
        kernel[(1,)](torch.zeros(1))
    except RuntimeError as error:
        print(error)
    print(kernel.__name__, "launched", launches() - before)
"""


def test_a_constant_that_differs_from_itself_is_refused(tmp_path):
    """Neither the interpreter nor compilation ahead of time does: without this the tests above would show nothing."""
    script = tmp_path / "kernel.py"
    script.write_text(NAN_KERNELS)
    done = python(tmp_path, script, tmp_path)
    captured, _, written = done.stdout.partition("captured launched 0")
    assert "Global variable NAN has changed" in captured, done.stderr[-3000:]
    assert written.strip() == "written launched 1"


def test_what_is_not_aligned_is_copied():
    whole = torch.arange(40.0)
    assert aligned(whole) is whole
    for odd in (whole[1:], whole.view(8, 5)[1:], whole.view(8, 5).t()):
        found = aligned(odd)
        assert found.data_ptr() % 16 == 0
        assert found.is_contiguous()
        assert torch.equal(found, odd)
