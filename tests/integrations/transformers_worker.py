"""Processes that train a patched model of transformers together: run by test_transformers_processes.py.

``python transformers_worker.py DIRECTORY``: all scenarios on two processes, and on one, to which those are held.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import DistributedConfig, OlmoeForCausalLM

sys.modules["numba"] = None  # type: ignore[assignment]  # kernels that each process would have to compile

import circuitroute as cr  # noqa: E402 - once numba is out of the way
from circuitroute.integrations.transformers.experts import choose_padding  # noqa: E402
from tests.integrations.models import tiny, tokens  # noqa: E402
from tests.integrations.process_worker import digest, fork_all  # noqa: E402

STEPS, SEED = 3, 7
BATCH, LENGTH = 4, 12
EXACT, RANGE = cr.Exactly(2), cr.Between(1, 4)


class Scenario:
    """Three updates and an evaluation of a tiny OLMoE that all processes hold, or shards of it."""

    def __init__(self, rank: int, processes: int) -> None:
        self.rank, self.processes = rank, processes

    def build(self, implementation: str = "grouped_mm", dtype: torch.dtype = torch.float32, **layout: Any) -> Any:
        """With the same weights everywhere; laid out over processes by transformers itself where ``layout`` says so."""
        whole = tiny("OLMoE", implementation).to(dtype)
        if self.processes == 1 or not layout:
            return whole
        # transformers shards while it loads. It saves on the first process only.
        with tempfile.TemporaryDirectory() as own:
            directory = [own]
            dist.broadcast_object_list(directory)
            whole.save_pretrained(directory[0])
            dist.barrier()
            laid_out = OlmoeForCausalLM.from_pretrained(
                directory[0], distributed_config=DistributedConfig(**layout), experts_implementation=implementation
            )
            dist.barrier()
        return laid_out

    def run(self, model: Any, handle: Any, split: bool) -> dict[str, Any]:
        """``split``: each process has sequences of its own; otherwise all share all of them."""
        parts = self.processes if split else 1
        mine = BATCH // parts
        first = self.rank * mine if split else 0
        group = dist.group.WORLD if parts > 1 else None
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3, foreach=False)
        before = [full(parameter) for parameter in model.parameters()]
        found: dict[str, Any] = {"losses": [], "decisions": []}
        model.train()
        for step in range(STEPS):
            ids = tokens(BATCH, LENGTH, seed=step)[first : first + mine]
            handle.set_step(step, token_offset=first * LENGTH)
            loss = model(ids, labels=ids, use_cache=False).loss
            found["decisions"].append(digest([routing.mask for routing in handle.routings], self.processes))
            for routing in handle.routings:
                loss = loss + 0.02 * cr.losses.load_balance(routing, group=group)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found["losses"].append(self.mean(loss))
        after = [full(parameter) for parameter in model.parameters()]
        names = [name for name, _ in model.named_parameters()]
        moved = [(new - old).norm().item() for new, old in zip(after, before, strict=True)]
        found["moved"] = dict(zip(names, moved, strict=True))
        model.eval()
        with torch.no_grad():
            ids = tokens(BATCH, LENGTH, seed=STEPS)[first : first + mine]
            found["evaluation"] = self.mean(model(ids, labels=ids).loss)
        plan = model.model.layers[0].mlp.gate.circuitroute_plan
        found["padding"] = choose_padding(plan.experts, plan.session.options.padding, plan.family)
        return found

    def mean(self, loss: Tensor) -> float:
        """Over processes, which have as many tokens each, be they the same or not."""
        total = loss.detach().clone()
        dist.all_reduce(total)
        return total.item() / self.processes


def full(parameter: Tensor) -> Tensor:
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()


def patch(model: Any, constraint: cr.Constraint, **options: Any) -> Any:
    return cr.integrations.transformers.patch(model, constraint, seed=SEED, **options)


def _shared(s: Scenario, constraint: cr.Constraint, probes: int = 0, **layout: Any) -> dict[str, Any]:
    model = s.build(**layout)
    return s.run(model, patch(model, constraint, probes=probes), split=False)


def expert_parallel_exact(s: Scenario) -> dict[str, Any]:
    """Half the experts and half of attention on each process, all tokens on both."""
    return _shared(s, EXACT, tp_size=2, ep_size=2)


def expert_parallel_range(s: Scenario) -> dict[str, Any]:
    model = s.build(tp_size=2, ep_size=2)
    refused = []
    if s.processes > 1:
        for padding in ("ragged", "sentinel"):
            try:
                patch(model, RANGE, padding=padding)
            except ValueError as error:
                refused.append(str(error))
    return {**s.run(model, patch(model, RANGE), split=False), "refused": refused}


def expert_parallel_all_reduce(s: Scenario) -> dict[str, Any]:
    """Each process runs its experts on all tokens; otherwise, in training, it is sent what chose them."""
    return _shared(s, RANGE, tp_size=2, ep_size=2, ep_implementation="all_reduce")


def expert_parallel_float64(s: Scenario) -> dict[str, Any]:
    """To the rounding of float64, which grouped_mm does not take."""
    return _shared(s, RANGE, implementation="eager", dtype=torch.float64, tp_size=2, ep_size=2)


def tensor_parallel_exact(s: Scenario) -> dict[str, Any]:
    """Half of every expert and of attention on each process."""
    return _shared(s, EXACT, tp_size=2, tp_plan="auto")


def tensor_parallel_range(s: Scenario) -> dict[str, Any]:
    return _shared(s, RANGE, tp_size=2, tp_plan="auto")


def expert_parallel_probes(s: Scenario) -> dict[str, Any]:
    """Probes cross the processes as the chosen experts do."""
    return _shared(s, RANGE, 1, tp_size=2, ep_size=2)


def tensor_parallel_probes(s: Scenario) -> dict[str, Any]:
    """What a probe is worth is a sum over processes, each of which has half of its output."""
    return _shared(s, EXACT, 1, tp_size=2, tp_plan="auto")


def expert_parallel_split(s: Scenario) -> dict[str, Any]:
    """Half the experts on each process, the rest under FSDP2, and each process its own tokens."""
    model = s.build(fsdp_size=2, ep_size=2)
    return s.run(model, patch(model, RANGE), split=True)


def _checkpointed(s: Scenario, constraint: cr.Constraint, probes: int = 0) -> dict[str, Any]:
    """FSDP2 of every decoder layer, each of which runs again in backward."""
    model = s.build()
    handle = patch(model, constraint, probes=probes)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if s.processes > 1:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    return s.run(model, handle, split=True)


def fsdp_checkpoint_exact(s: Scenario) -> dict[str, Any]:
    return _checkpointed(s, EXACT)


def fsdp_checkpoint_range(s: Scenario) -> dict[str, Any]:
    return _checkpointed(s, RANGE)


def fsdp_checkpoint_probes(s: Scenario) -> dict[str, Any]:
    return _checkpointed(s, EXACT, 1)


SCENARIOS: dict[str, Callable[[Scenario], dict[str, Any]]] = {
    function.__name__: function
    for function in (
        expert_parallel_exact,
        expert_parallel_range,
        expert_parallel_float64,
        expert_parallel_all_reduce,
        expert_parallel_split,
        tensor_parallel_exact,
        tensor_parallel_range,
        fsdp_checkpoint_exact,
        fsdp_checkpoint_range,
        expert_parallel_probes,
        tensor_parallel_probes,
        fsdp_checkpoint_probes,
    )
}


if __name__ == "__main__":
    fork_all(SCENARIOS, Scenario, Path(sys.argv[1]))
