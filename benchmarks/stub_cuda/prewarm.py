"""Fill triton's cache without a GPU: ``TRITON_CACHE_DIR=cache python -m benchmarks.stub_cuda.prewarm 64:8 128:8``.

Run it with the Python and triton of the machine with the GPU, whose cache it is: its keys are hashes of both, and of
the sources. What does not fit is compiled there; ``PREWARMED=cache bash benchmarks/gpu.sh`` takes the rest.
"""

import sys
import tempfile
from pathlib import Path

import torch

from benchmarks import stub_cuda

# What is left out of the cache: read by people only.
FOR_PEOPLE = ("ttir", "ttgir", "llir", "ptx", "source")


def prewarm(n: int, k: int) -> None:
    """Compile what counts up to ``k`` of ``n`` variables launch, with all flags, for float32 logits."""
    from circuitroute.engines.subset import TritonSubset

    engine, x, phi, key = TritonSubset(), torch.zeros(4, n), torch.zeros(k + 1), torch.zeros(4, dtype=torch.int64)
    known = engine.infer(x, phi, key)
    engine.infer(x, phi)
    engine.sample(x, phi, key)
    for v in (None, torch.zeros(4, k + 1)):
        engine.second_derivative(x, phi, known, x, v)


def main(sizes: list[str]) -> int:
    """For all sizes n:k or n:lo-k."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        stub_cuda.activate(Path(folder))
        for size in sizes:
            n, counts = size.split(":")
            prewarm(int(n), int(counts.split("-")[-1]))
            print(f"compiled for {size}", flush=True)
    for path in Path(knobs.cache.dir).glob("*/*"):
        if path.suffix.removeprefix(".") in FOR_PEOPLE:
            path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
