"""What a GPU is given to do: kernels, copies and waits of a call, counted without a GPU.

``python -m benchmarks.device_ops`` prints them for one routing step at T = 4096, (64, 8): at sizes like these launching
costs more than what is launched. Views and allocations are free and not counted. A matrix product counts once.

The tensors are a CPU's and say that they are on a GPU: torch's autograd does not run where there is none, on fake
tensors either. Triton's kernels are not run. A tensor that is made of Python numbers counts as a copy, for which the
host may wait.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import circuitroute as cr
from circuitroute.engines import choice, choose
from circuitroute.engines.subset.triton import engine
from circuitroute.routing import deferred

FREE = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::detach", "aten::alias"}
FREE |= {"aten::scalar_tensor", "aten::new_empty_strided", "aten::_unsafe_view", "aten::is_pinned", "prim::device"}
HOST = {"aten::_local_scalar_dense": "wait", "aten::nonzero": "wait", "aten::equal": "wait", "aten::lift_fresh": "copy"}
# What the host looks at, and finds: nothing is wrong, and all is finite.
ANSWERS = {"aten::any": False, "aten::all": True}
CALLS = ("route", "route validated", "padded", "balance", "random_key", "evaluation", "router")


class Operations(TorchDispatchMode):
    """Logs what runs on the device. What the host waits for is answered as for ordinary logits: nothing is wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []
        self._last = ""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name().split(".")[0]
        if name in HOST:
            self.log.append(HOST[name])
        elif name not in FREE and not function.is_view:
            self.log.append(name.removeprefix("aten::"))
        if name == "aten::_local_scalar_dense":
            return ANSWERS.get(self._last, 0)
        self._last = name
        if name == "aten::scatter_":  # no kernel has filled in where to
            return args[0]
        return function(*args, **(kwargs or {}))

    def kernel(self, name: str) -> None:
        """One of triton's, which torch does not see."""
        self.log.append(f"triton {name}")


@contextmanager
def counting() -> Iterator[Operations]:
    """Replaced is only what needs a GPU: to be on one, launching, and looking at addresses."""
    # Imported here: what modules compute when they are imported is not to be counted, nor answered.
    from circuitroute.engines.subset.triton import memory, routing_step  # noqa: F401
    from circuitroute.keys import folding

    operations = Operations()

    def launch(self: Any, kernel: Any, *arguments: Any) -> None:
        function = kernel.fn
        operations.kernel(f"{function.__module__.split('.')[-1]}.{function.__name__}")

    with ExitStack() as stack:
        replaced: tuple[tuple[Any, str, Any], ...] = (
            (Tensor, "is_cuda", property(lambda tensor: True)),
            (choice, "choose", lambda circuit, device: choose(circuit, torch.device("cuda"))),
            (engine, "launchable", lambda device: True),
            (engine._Problem, "_run", launch),
            (engine, "aligned", Tensor.contiguous),
            (deferred, "send", lambda invalid: operations.log.append("copy")),
            (folding, "launch", lambda programs, arguments: operations.kernel("keys.fold")),
        )
        for target, name, new in replaced:
            stack.enter_context(mock.patch.object(target, name, new))
        stack.enter_context(operations)
        yield operations


Count = tuple[list[str], list[str]]


def count(name: str, T: int = 4096, n: int = 64, k: int = 8) -> Count:
    """What one of ``CALLS`` gives the device forward, and back where it has a gradient; the first call warms up."""
    circuit = cr.compile(cr.Exactly(k), n)
    with counting() as operations:
        call = _call(name, circuit, T, n, k)
        _backward(call())
        operations.log.clear()
        out = call()
        forward = list(operations.log)
        operations.log.clear()
        _backward(out)
        return forward, list(operations.log)


def _call(name: str, circuit: cr.Circuit, T: int, n: int, k: int) -> Callable[[], tuple[Tensor, ...]]:
    logits = torch.zeros(T, n, requires_grad=True)
    key, tokens = torch.zeros(T, dtype=torch.int64), torch.zeros(T, dtype=torch.int64)
    if name == "random_key":
        return lambda: (cr.random_key(1, 2, 3, tokens),)
    if name == "router":
        router, hidden = cr.ExactKRouter(256, n, k), torch.zeros(T, 256, requires_grad=True)
        return lambda: (router(hidden, key).gates,)
    if name == "evaluation":
        logits = logits.detach()
        return lambda: (cr.route(logits, circuit, training=False, validate_args=False).gates,)
    return lambda: READ.get(name, READ["route"])(cr.route(logits, circuit, key=key, validate_args="validated" in name))


READ: dict[str, Callable[[cr.Routing], tuple[Tensor, ...]]] = {
    "route": lambda routing: (routing.gates,),
    "padded": lambda routing: routing.padded()[:1],
    "balance": lambda routing: (routing.gates, routing.marginals, routing.log_prob),
}


def _backward(out: tuple[Tensor, ...]) -> None:
    if out[0].requires_grad:
        torch.autograd.backward(out, [torch.empty_like(x) for x in out])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the counts."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device_ops", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("calls", nargs="*", default=CALLS, help=f"of {', '.join(CALLS)}")
    parser.add_argument("--size", default="4096:64:8", help="tokens:n:k (default: 4096:64:8)")
    options = parser.parse_args(arguments)
    for name in options.calls:
        for which, log in zip(("forward", "backward"), count(name, *map(int, options.size.split(":"))), strict=True):
            listed = ", ".join(f"{many} {what}" if many > 1 else what for what, many in Counter(log).items())
            print(f"{name}, {which}: {len(log)} operations, {log.count('wait')} waits: {listed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
