"""Processes that train together: run by test_processes.py, which reads what the first of them writes.

``python process_worker.py DIRECTORY``: all scenarios on two processes, and on one, to which those are held. All three
are forked from the process that was started, which has imported what takes long to import.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

sys.modules["numba"] = None  # type: ignore[assignment]  # kernels that each process would have to compile

import circuitroute as cr  # noqa: E402 - once numba is out of the way

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_distributed.py"


def load_example() -> Any:
    """A fresh copy, whose constants a scenario may change."""
    spec = importlib.util.spec_from_file_location("train_distributed", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BudgetModel(nn.Module):
    """The example's model with one budget over its layers; begin() in forward, the layers' decisions in the blocks."""

    def __init__(self, example: Any, recompute: bool) -> None:
        super().__init__()
        self.inner = example.Model()
        total, layers = cr.Between(4, 7), example.LAYERS
        self.budget = cr.BudgetRouter(example.HIDDEN, example.EXPERTS, layers, cr.Between(1, 4), total, per_token=True)
        for block in self.inner.blocks:
            block.experts.router = None
        self.recompute = recompute

    def forward(self, tokens: Tensor, keys: list[Tensor]) -> tuple[Tensor, list[cr.Routing]]:
        hidden, routings = self.inner.embed(tokens), []
        state = self.budget.begin(hidden)
        for block, key in zip(self.inner.blocks, keys, strict=True):
            if self.recompute:
                hidden, routing, state = checkpoint(
                    self.layer, block, hidden, state, key, use_reentrant=False, preserve_rng_state=False
                )
            else:
                hidden, routing, state = self.layer(block, hidden, state, key)
            routings.append(routing)
        return self.inner.head(hidden.flatten(0, 1)), routings

    def layer(self, block: Any, hidden: Tensor, state: cr.BudgetState, key: Tensor) -> Any:
        hidden = hidden + block.mix(hidden)
        normed = block.norm(hidden)
        routing, state = self.budget(normed, state, key=key)
        output, _ = block.experts(normed, routing=routing)
        return hidden + output, routing, state


def digest(masks: list[Tensor], processes: int) -> list[list[int]]:
    """Per layer, every token's chosen experts as one integer, over all processes in order."""
    everyone = []
    for mask in masks:
        word = (mask.long() << torch.arange(mask.shape[1])).sum(-1)
        parts = [torch.empty_like(word) for _ in range(processes)]
        if processes > 1:
            dist.all_gather(parts, word)
        else:
            parts = [word]
        everyone.append(torch.cat(parts).tolist())
    return everyone


class Scenario:
    """One way to train, with the example's loop: on this process's share of the batch, or on all of it."""

    def __init__(self, rank: int, processes: int) -> None:
        self.rank, self.processes = rank, processes
        self.example = load_example()
        self.example.STEPS = 3
        self.masks: list[list[Tensor]] = []
        self.summaries: list[dict[str, float]] = []
        self.autocast: Any = contextlib.nullcontext()

    def run(self, model: nn.Module, budget: cr.BudgetRouter | None = None) -> dict[str, Any]:
        objective = self.example.objective

        def observed(logits: Tensor, labels: Tensor, routings: list[cr.Routing], group: Any) -> Tensor:
            self.masks.append([routing.mask for routing in routings])
            self.summaries.append(cr.metrics.summary(routings, group=group))
            loss: Tensor = objective(logits.float(), labels, routings, group)
            return loss if budget is None else loss + 0.1 * budget.estimation_loss(routings)

        self.example.objective = observed
        with self.autocast:
            losses = self.example.train(model, self.rank, self.processes)
        decisions = [digest(masks, self.processes) for masks in self.masks]
        return {"losses": losses, "decisions": decisions, "summaries": self.summaries}

    def shard(self, model: Any, alone: bool = False, **options: Any) -> nn.Module:
        if self.processes == 1 and not alone:
            return model
        for block in model.blocks:
            fully_shard(block, **options)
        fully_shard(model, **options)
        return model

    def replicate(self, model: nn.Module, **options: Any) -> nn.Module:
        return model if self.processes == 1 else DistributedDataParallel(model, **options)


def ddp(s: Scenario) -> dict[str, Any]:
    return s.run(s.replicate(s.example.build()))


def fsdp(s: Scenario) -> dict[str, Any]:
    return s.run(s.shard(s.example.build()))


def fsdp_checkpoint(s: Scenario) -> dict[str, Any]:
    return s.run(s.shard(s.example.build(recompute=True)))


def _few_tokens(s: Scenario) -> Any:
    s.example.BATCH, s.example.LENGTH = 2, 1
    model = s.example.build()
    for block in model.blocks:
        # One process would leave an idle expert without a gradient, and the optimizer its momentum as it is.
        block.experts.call_idle = True if s.processes == 1 else None
    return model


def few_tokens_ddp(s: Scenario) -> dict[str, Any]:
    """So few that every process has experts without a token in every layer."""
    return s.run(s.replicate(_few_tokens(s)))


def few_tokens_fsdp_of_each_expert(s: Scenario) -> dict[str, Any]:
    """Each expert and router is a unit of its own, gathered when it is called."""
    model = _few_tokens(s)
    if s.processes > 1:
        for block in model.blocks:
            fully_shard(block.experts.router, reshard_after_forward=False)
            for expert in block.experts.experts:
                fully_shard(expert)
    return s.run(s.shard(model))


def autocast(s: Scenario) -> dict[str, Any]:
    s.autocast = torch.autocast("cpu", torch.bfloat16)
    return s.run(s.replicate(s.example.build(recompute=True)))


def bfloat16_fsdp(s: Scenario) -> dict[str, Any]:
    """Parameters and activations in bfloat16; the router keeps its weight, and takes its hidden states, in float32."""
    model = s.example.build(recompute=True)
    mesh = DeviceMesh.from_group(dist.group.WORLD, "cpu")
    for block in model.blocks:
        whole = MixedPrecisionPolicy(param_dtype=torch.float32)
        fully_shard(block.experts.router, mesh=mesh, mp_policy=whole, reshard_after_forward=False)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return s.run(s.shard(model, mesh=mesh, mp_policy=policy, alone=True))


def compiled_fsdp(s: Scenario) -> dict[str, Any]:
    """torch.compile of a block that is recomputed in backward, held to one process that compiles nothing."""
    model = s.example.build(recompute=True)
    if s.processes > 1:
        model.blocks[0].compile(backend="aot_eager")
    return s.run(s.shard(model))


def _budget(s: Scenario, recompute: bool) -> BudgetModel:
    torch.manual_seed(s.example.SEED)
    return BudgetModel(s.example, recompute)


def budget_ddp_checkpoint(s: Scenario) -> dict[str, Any]:
    model = _budget(s, recompute=True)
    return s.run(s.replicate(model), model.budget)


def budget_fsdp_checkpoint(s: Scenario) -> dict[str, Any]:
    """The blocks' experts are units; the budget is the root's, which stays gathered until backward."""
    model = _budget(s, recompute=True)
    if s.processes > 1:
        for block in model.inner.blocks:
            fully_shard(block.experts)
        fully_shard(model)
    return s.run(model, model.budget)


SCENARIOS: dict[str, Callable[[Scenario], dict[str, Any]]] = {
    function.__name__: function
    for function in (
        ddp,
        fsdp,
        fsdp_checkpoint,
        few_tokens_ddp,
        few_tokens_fsdp_of_each_expert,
        autocast,
        bfloat16_fsdp,
        compiled_fsdp,
        budget_ddp_checkpoint,
        budget_fsdp_checkpoint,
    )
}


def run_all(
    rank: int,
    processes: int,
    directory: Path,
    scenarios: dict[str, Callable[[Any], dict[str, Any]]],
    scenario_class: Callable[[int, int], Any],
) -> None:
    """All scenarios in one process group; the first process writes what they give."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/store-{processes}", rank=rank, world_size=processes
    )
    # cr.MoE's outputs are views of its sum, which FSDP2 warns about in case someone changes them in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    results = {name: scenario(scenario_class(rank, processes)) for name, scenario in scenarios.items()}
    if rank == 0:
        (directory / f"{processes}.json").write_text(json.dumps(results), encoding="utf-8")
    dist.destroy_process_group()


def fork_all(
    scenarios: dict[str, Callable[[Any], dict[str, Any]]], scenario_class: Callable[[int, int], Any], directory: Path
) -> None:
    """One process alone beside two together; raises what one of them raises, once the others are stopped."""
    groups = [
        torch.multiprocessing.start_processes(
            run_all, (processes, directory, scenarios, scenario_class), processes, join=False, start_method="fork"
        )
        for processes in (1, 2)
    ]
    for group in groups:
        while not group.join():
            pass


if __name__ == "__main__":
    fork_all(SCENARIOS, Scenario, Path(sys.argv[1]))
