"""Fill triton's cache without a GPU: ``TRITON_CACHE_DIR=cache python -m benchmarks.stub_cuda.prewarm 64:8 128:8``.

Run it with the Python and triton of the machine with the GPU, whose cache it is: its keys are hashes of both, and of
the sources. What does not fit is compiled there; ``PREWARMED=cache bash benchmarks/gpu.sh`` takes the rest.
"""

import sys
import tempfile
from pathlib import Path

import torch

from benchmarks import stub_cuda
from circuitroute.engines.subset.triton.engine import MANY_TOKENS

# What is left out of the cache: read by people only.
FOR_PEOPLE = ("ttir", "ttgir", "llir", "ptx", "source")


def prewarm(n: int, k: int, exact: bool, tokens: int) -> None:
    """Compile what counts up to ``k``, or ``k`` alone, of ``n`` variables launch, with all flags, for float32."""
    from circuitroute.engines.subset import TritonSubset

    engine, x = TritonSubset(exact), torch.zeros(tokens, n)
    phi, key = torch.zeros(k + 1), torch.zeros(tokens, dtype=torch.int64)
    known = engine.infer(x, phi, key)
    engine.infer(x, phi)
    engine.sample(x, phi, key)
    for v in (None, torch.zeros(tokens, k + 1)):
        engine.second_derivative(x, phi, known, x, v)


def main(sizes: list[str]) -> int:
    """For all sizes n:k, which is k alone, or n:lo-k."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        stub_cuda.activate(Path(folder))
        for size in sizes:
            n, counts = size.split(":")
            for tokens in (MANY_TOKENS - 1, MANY_TOKENS):
                prewarm(int(n), int(counts.split("-")[-1]), "-" not in counts, tokens)
            print(f"compiled for {size}", flush=True)
    for path in Path(knobs.cache.dir).glob("*/*"):
        if path.suffix.removeprefix(".") in FOR_PEOPLE:
            path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
