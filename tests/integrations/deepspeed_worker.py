"""DeepSpeed's layers in processes that share the experts: run by test_deepspeed_processes.py.

``python deepspeed_worker.py DIRECTORY``: every scenario on two processes, and on one, to which those are held.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import deepspeed
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

import circuitroute as cr
from circuitroute.integrations import deepspeed as adapter
from tests.integrations.process_worker import fork_all

B, L, H, E, STEPS = 4, 6, 16, 8, 3
RULE = cr.Between(1, 4)


class Model(nn.Module):
    """A layer of which each process has its part of the experts."""

    def __init__(self, rank: int, processes: int, k: int) -> None:
        super().__init__()
        self.inner = nn.Linear(H, H)
        self.moe = MoE(
            H,
            nn.Linear(H, H),
            num_experts=E,
            ep_size=processes,
            k=k,
            drop_tokens=False,
            top2_2nd_expert_sampling=False,
        )
        generator = torch.Generator().manual_seed(0)
        whole = {"weight": torch.randn(E, H, H, generator=generator), "bias": torch.randn(E, H, generator=generator)}
        with torch.no_grad():
            for module in (self.inner, self.moe.deepspeed_moe.gate.wg):
                for parameter in module.parameters():
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
            for i, expert in enumerate(self.experts):
                number = rank * E // processes + i
                expert.weight.copy_(0.3 * whole["weight"][number])
                expert.bias.copy_(0.3 * whole["bias"][number])

    @property
    def experts(self) -> Any:
        return self.moe.deepspeed_moe.experts.deepspeed_experts

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(x)
        output: Tensor = hidden + self.moe(hidden)[0]
        return output


class Scenario:
    """A layer on this process's share of the sequences, or on all of them."""

    def __init__(self, rank: int, processes: int) -> None:
        self.rank, self.processes = rank, processes
        logging.disable(logging.WARNING)
        # It would be compiled, for tensors that processes of one machine share.
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
        if not deepspeed.comm.is_initialized():
            deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)

    def share(self) -> Tensor:
        x = torch.randn(B, L, H, generator=torch.Generator().manual_seed(2))
        return x.chunk(self.processes)[self.rank]

    def build(self, rule: cr.Constraint, **options: Any) -> Model:
        model = Model(self.rank, self.processes, max(1, cr.compile(rule, E).max_count))
        adapter.convert(model, rule, **options)
        return model

    def gradients(self, rule: cr.Constraint, record: cr.RoutingRecord | None = None, **options: Any) -> dict[str, Any]:
        """A forward and a backward pass, with gradients summed over processes as data parallelism does."""
        model, x = self.build(rule, **options), self.share().requires_grad_()
        model.moe.set_deepspeed_parallelism()
        adapter.begin_step(model, 0, offset=self.rank * x.shape[0] * L)
        if record is not None:
            adapter.replay(model, record.split([B * L // self.processes] * self.processes)[self.rank])
        rows: list[int] = []
        self_of = model.moe.deepspeed_moe.experts
        self_of.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[2]))
        with adapter.recorded_routings(model) as routings:
            output = model(x)
        group = dist.group.WORLD if self.processes > 1 else None
        balance = cr.losses.load_balance(routings[0], group=group)
        (output.square().sum() + balance / self.processes).backward()
        shared = [model.inner.weight.grad, model.moe.deepspeed_moe.gate.wg.weight.grad]
        return {
            "output": self.gathered(output.detach()),
            "balance": float(balance.detach()),
            "decisions": self.gathered(routings[0].mask.long()),
            "load": self.summed(model.moe.deepspeed_moe.exp_counts),
            "rows": rows,
            "gradients": [
                self.gathered(x.grad),
                *[self.summed(gradient) for gradient in shared],
                self.gathered(torch.stack([expert.weight.grad for expert in model.experts])),
                self.gathered(torch.stack([expert.bias.grad for expert in model.experts])),
            ],
        }

    def engine(self, stage: int) -> dict[str, Any]:
        """Steps of DeepSpeed's engine with ZeRO, and the balance loss of all processes' tokens.

        Without ZeRO, at stage 0, DeepSpeed does not divide the experts' gradients by the number of processes.
        """
        model, x = self.build(RULE, seed=0), self.share()
        groups = split_params_into_different_moe_groups_for_optimizer(
            {"params": list(model.parameters()), "name": "all"}
        )
        config = {
            "train_micro_batch_size_per_gpu": B // self.processes,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        }
        optimizer = torch.optim.SGD(groups, lr=0.05)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        found: dict[str, Any] = {"losses": [], "decisions": []}
        group = dist.group.WORLD if self.processes > 1 else None
        for step in range(STEPS):
            adapter.begin_step(engine, step, offset=self.rank * x.shape[0] * L)
            with adapter.recorded_routings(engine) as routings:
                loss = engine(x).square().mean()
            loss = loss + 0.1 * cr.losses.load_balance(routings[0], group=group)
            engine.backward(loss)
            engine.step()
            found["losses"].append(self.summed(loss.detach()) / self.processes)
            found["decisions"].append(self.gathered(routings[0].mask.long()))
        return found

    def gathered(self, tensor: Tensor) -> Any:
        if self.processes == 1:
            return tensor.tolist()
        parts = [torch.empty_like(tensor) for _ in range(self.processes)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts).tolist()

    def summed(self, tensor: Tensor) -> Any:
        tensor = tensor.clone()
        if self.processes > 1:
            dist.all_reduce(tensor)
        return tensor.tolist()


def between(s: Scenario) -> dict[str, Any]:
    return s.gradients(RULE, seed=0)


def fixed(s: Scenario) -> dict[str, Any]:
    return s.gradients(cr.Exactly(2), seed=0)


def one(s: Scenario) -> dict[str, Any]:
    return s.gradients(cr.Exactly(1), seed=0)


def replayed(s: Scenario) -> dict[str, Any]:
    """A record of all tokens, of which each process replays its own; those of the second need no expert."""
    logits = torch.randn(B * L, E, generator=torch.Generator().manual_seed(9))
    mask = cr.compile(RULE, E)(logits).sample(key=cr.random_key(9, torch.arange(B * L))).bool()
    mask[B * L // 2 :] = False
    return s.gradients(cr.AtMost(4), cr.RoutingRecord.of(mask), seed=None)


def engine_zero_1(s: Scenario) -> dict[str, Any]:
    return s.engine(1)


def engine_zero_2(s: Scenario) -> dict[str, Any]:
    return s.engine(2)


SCENARIOS: dict[str, Callable[[Scenario], dict[str, Any]]] = {
    function.__name__: function for function in (between, fixed, one, replayed, engine_zero_1, engine_zero_2)
}

if __name__ == "__main__":
    fork_all(SCENARIOS, Scenario, Path(sys.argv[1]))
