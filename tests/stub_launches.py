"""Launch the kernels of the engine ``triton`` on the stub driver: ``python -m tests.stub_launches FOLDER CASE ...``.

A case is n:k:dtype, with :exactly behind it for one count alone. Prints a JSON object: what each call launched and
compiled, and the kernels that were launched.
"""

import functools
import importlib
import json
import pkgutil
import sys
from pathlib import Path

import torch
from triton import JITFunction

from benchmarks import stub_cuda
from circuitroute.engines.step import Inputs, Rule, Upstream
from circuitroute.engines.subset import TritonSubset
from circuitroute.engines.subset import triton as package
from circuitroute.engines.subset.triton import engine as engines
from circuitroute.keys import folding

TOKENS = (31, 1, 64, 4096, 65536)


def kernels():
    """What is launched from the host, by name: kernels, unlike their helpers, tell sizes that are not specialised."""
    modules = [importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)]
    modules.append(folding)
    return {
        f"{found.__module__.split('.')[-1]}.{name}": found
        for module in modules
        for name, found in vars(module).items()
        if isinstance(found, JITFunction) and found.do_not_specialize and found.__module__ == module.__name__
    }


def compilations(kernel):
    """How many variants of a kernel there are by now."""
    return sum(len(caches[0]) for caches in kernel.device_caches.values())


def calls(n, k, dtype, exact, T):
    """The calls of the engine on ``T`` rows, by name: all flags of all kernels."""
    engine, logits, u = TritonSubset(exact), torch.zeros(T, n, dtype=dtype), torch.zeros(T, n)
    shared, own, v = torch.zeros(k + 1), torch.zeros(T, k + 1), torch.zeros(T, k + 1)
    key = torch.zeros(T, dtype=torch.int64)
    found = {
        "moments and sample": lambda phi: engine.infer(logits, phi, key),
        "moments": lambda phi: engine.infer(logits, phi),
        "sample": lambda phi: engine.sample(logits, phi, key),
    }
    swept = engine.infer(logits, shared, key)
    found["gradient"] = lambda phi: engine.second_derivative(logits, phi, swept, u, None)
    found["gradient, v"] = lambda phi: engine.second_derivative(logits, phi, swept, u, v)
    if n <= engines.MAX_LANES_VARIABLES and k <= engines.MAX_LANES_COUNT:
        found |= step_calls(engine, logits, key, k)
    both = {"": shared, ", potential per row": own}
    return {name + which: (call, phi) for name, call in found.items() for which, phi in both.items()}


def step_calls(engine, logits, key, k):
    """Those of a routing step: sampled and not, what is read of it, and its gradient."""
    T, rule = len(logits), Rule("softmax", 1.0, True)

    def inputs(phi):
        return Inputs(logits, logits, 0.5, phi, key)

    taken = engine.step(inputs(torch.zeros(k + 1)), rule, True)
    upstream = Upstream(weights=torch.zeros(T, max(1, k)), marginals=torch.zeros(logits.shape), log_prob=torch.zeros(T))
    return {
        "step": lambda phi: engine.step(inputs(phi), rule, True),
        "step, evaluation": lambda phi: engine.step(inputs(phi)._replace(key=None), rule._replace(share=0.0), False),
        "step, marginals": lambda phi: engine.step_marginals(inputs(phi), taken, torch.zeros(logits.shape)),
        "step, gradient": lambda phi: engine.step_gradient(inputs(phi), rule, taken, upstream),
    }


def keyed(T):
    """Keys of T tokens, of integers of any size, by name."""
    tokens, large = torch.arange(T), torch.arange(T + 1)[1:]
    return {
        "fold a number": lambda: folding.folded(5, tokens),
        "fold a large number": lambda: folding.folded(-(1 << 62), large),
        "fold tensors": lambda: folding.folded(large, tokens),
    }


def main(folder, *cases):
    launches, known, out = stub_cuda.activate(Path(folder)), kernels(), []

    def record(case, T, name, call):
        before = launches(), {kernel: compilations(found) for kernel, found in known.items()}
        call()
        compiled = {kernel: compilations(found) - before[1][kernel] for kernel, found in known.items()}
        out.append({"case": case, "T": T, "call": name, "launches": launches() - before[0], **compiled})

    for case in cases:
        n, k, dtype, *exactly = case.split(":")
        for T in TOKENS:
            for name, (call, phi) in calls(int(n), int(k), getattr(torch, dtype), bool(exactly), T).items():
                record(case, T, name, functools.partial(call, phi))
    for T in TOKENS:
        for name, call in keyed(T).items():
            record("keys", T, name, call)
    sys.stdout.write(
        json.dumps({"calls": out, "compilations": {name: compilations(found) for name, found in known.items()}})
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
