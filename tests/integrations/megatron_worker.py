"""Expert parallelism in Megatron-core: run by test_megatron_processes.py, which reads what the first process writes.

``python megatron_worker.py DIRECTORY``: all scenarios on two processes with half of the experts each, and on one, which
also says what a dense layer gives: all experts on all tokens, weighted by the gates.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.integrations.process_worker import fork_all  # isort: skip - before numba could be imported

from megatron.core import parallel_state

import circuitroute as cr
from circuitroute.integrations import megatron
from tests.integrations.megatron_support import E, H, S, build, dense, no_gpu

SEQUENCES = 4
T = S * SEQUENCES
RANGE = cr.Between(1, 4)
WIDE = {"params_dtype": torch.float64, "moe_router_dtype": "fp64"}


class Together:
    """One layer, its experts spread over the processes, and this process's share of the sequences."""

    def __init__(self, rank: int, processes: int) -> None:
        self.rank, self.processes = rank, processes
        no_gpu(setattr)
        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel(expert_model_parallel_size=processes)

    def run(
        self,
        constraint: cr.Constraint = RANGE,
        *,
        first: int = SEQUENCES // 2,
        record: cr.RoutingRecord | None = None,
        training: bool = True,
        recompute: bool = False,
        dispatcher: str = "alltoall",
        **settings: Any,
    ) -> dict[str, Any]:
        """Decisions, outputs and gradients of all tokens and parameters, in the order of one process.

        Args:
            first: how many sequences the first of two processes has.
            record: decisions of all tokens, sequence by sequence.
        """
        settings = {**WIDE, "moe_token_dispatcher_type": dispatcher, **settings}
        settings["expert_model_parallel_size"] = self.processes
        layer = build(megatron.router(constraint, seed=3), **settings)
        self._initialise(layer)
        mine = [slice(0, SEQUENCES)] if self.processes == 1 else [slice(0, first), slice(first, SEQUENCES)]
        own = mine[self.rank]
        megatron.begin_step(layer, 5, offset=own.start * S)
        if record is not None:
            megatron.replay(layer, record[own.start * S : own.stop * S])
        layer.train(training)
        dtype = settings["params_dtype"]
        generator = torch.Generator().manual_seed(1)
        whole, upstream = torch.randn(2, S, SEQUENCES, H, generator=generator, dtype=dtype)
        x = whole[:, own].contiguous().requires_grad_()
        with megatron.recorded_routings(layer) as routings:
            if recompute:
                output, _ = checkpoint(layer, x, use_reentrant=True, preserve_rng_state=False)
            else:
                output, _ = layer(x)
        (output * upstream[:, own]).sum().backward()
        routing = routings[0]
        found = self._gathered(mine, output, x.grad, routing.mask.view(S, -1, E), routing.log_prob.view(S, -1, 1))
        found["router"] = self._summed(layer.router.weight.grad).tolist()
        found["experts"] = self._of_experts(layer)
        found["counts"] = self._counted(layer, x)
        if self.processes == 1:
            found["dense"] = self._dense(layer, x, upstream, routing)
        return found

    def _initialise(self, layer: Any) -> None:
        """Every parameter has values that do not depend on which process holds it."""
        generator = torch.Generator().manual_seed(7)
        layer.router.weight.data.normal_(std=0.3, generator=generator)
        for local, expert in enumerate(layer.experts.local_experts):
            generator.manual_seed(100 + self.rank * len(layer.experts.local_experts) + local)
            for parameter in expert.parameters():
                parameter.data.normal_(std=0.3, generator=generator)

    def _gathered(self, mine: list[slice], *values: Tensor) -> dict[str, Any]:
        names = ("output", "input", "mask", "log_prob")
        return {name: self._whole(mine, value.detach()).tolist() for name, value in zip(names, values, strict=True)}

    def _whole(self, mine: list[slice], value: Tensor) -> Tensor:
        """[S, SEQUENCES, ...], from the sequences of all processes; they may have different numbers of them."""
        whole = torch.zeros(S, SEQUENCES, *value.shape[2:], dtype=torch.float64)
        whole[:, mine[self.rank]] = value.double()
        return self._summed(whole)

    def _summed(self, value: Tensor) -> Tensor:
        if self.processes > 1:
            dist.all_reduce(value)
        return value

    def _of_experts(self, layer: Any) -> list[Any]:
        """Gradients of both matrices of every expert, of all processes in order; 0 where there is none."""
        local = layer.experts.local_experts
        own = torch.stack([torch.cat([_grad(p).flatten() for p in expert.parameters()]) for expert in local])
        if self.processes == 1:
            return own.tolist()
        parts = [torch.empty_like(own) for _ in range(self.processes)]
        dist.all_gather(parts, own)
        return torch.cat(parts).tolist()

    def _counted(self, layer: Any, x: Tensor) -> list[int]:
        """Rows that each expert computes in a forward pass, of all processes in order."""
        rows = torch.zeros(E, dtype=torch.int64)
        first = self.rank * len(layer.experts.local_experts)
        hooks = [
            expert.register_forward_pre_hook(lambda _, given, at=first + i: rows.__setitem__(at, len(given[0])))
            for i, expert in enumerate(layer.experts.local_experts)
        ]
        with torch.no_grad():
            layer(x)
        for hook in hooks:
            hook.remove()
        return self._summed(rows).tolist()

    def _dense(self, layer: Any, x: Tensor, upstream: Tensor, routing: cr.Routing) -> dict[str, Any]:
        layer.zero_grad(set_to_none=True)
        x = x.detach().requires_grad_()
        logits = layer.router.gating(x).flatten(0, 1)
        circuit = routing.distribution.circuit
        gates = cr.route(logits, circuit, combine="normalized", replay=routing.mask, training=layer.training).gates
        output = dense(layer, x, torch.where(routing.mask, gates, 0.0).to(x.dtype))
        (output * upstream).sum().backward()
        found = {"output": output.tolist(), "input": x.grad.tolist()}
        return found | {"router": layer.router.weight.grad.tolist(), "experts": self._of_experts(layer)}


def _grad(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def recorded(choose: Callable[[int], list[int]]) -> cr.RoutingRecord:
    """A record in which the token with number t has the experts ``choose(t)``."""
    mask = torch.zeros(T, E, dtype=torch.bool)
    for token in range(T):
        mask[token, choose(token)] = True
    return cr.RoutingRecord.of(mask)


def some_experts(token: int) -> list[int]:
    """From 1 to 4, everywhere."""
    return sorted({(token * 3 + i * 5) % E for i in range(1 + token % 4)})


GROUPED = cr.ActiveGroups(cr.Groups(4), at_most=2) & cr.Between(1, 4)

SCENARIOS: dict[str, Callable[[Together], dict[str, Any]]] = {
    "one count": lambda s: s.run(cr.Exactly(4)),
    "several counts": lambda s: s.run(),
    "no experts for some": lambda s: s.run(cr.Between(0, 4)),
    "groups": lambda s: s.run(GROUPED),
    "float32": lambda s: s.run(params_dtype=torch.float32, moe_router_dtype=None),
    "allgather": lambda s: s.run(dispatcher="allgather"),
    "recomputed": lambda s: s.run(recompute=True),
    "evaluation": lambda s: s.run(training=False),
    "other numbers of tokens": lambda s: s.run(first=3),
    "tokens on one process": lambda s: s.run(first=SEQUENCES),
    "replayed": lambda s: s.run(record=recorded(some_experts)),
    "replayed, recomputed": lambda s: s.run(record=recorded(some_experts), recompute=True),
    "replayed in evaluation": lambda s: s.run(record=recorded(some_experts), training=False),
    "replayed, allgather": lambda s: s.run(record=recorded(some_experts), dispatcher="allgather"),
    "replayed, other numbers of tokens": lambda s: s.run(record=recorded(some_experts), first=1),
    "an idle process": lambda s: s.run(record=recorded(lambda t: [t % 4, (t + 1) % 4])),
    "an idle process that sends nothing": lambda s: s.run(
        cr.Between(0, 4), record=recorded(lambda t: [t % 4] if t < T // 2 else [])
    ),
    "nothing anywhere": lambda s: s.run(cr.Between(0, 4), record=recorded(lambda t: [])),
}


if __name__ == "__main__":
    fork_all(SCENARIOS, Together, Path(sys.argv[1]))
