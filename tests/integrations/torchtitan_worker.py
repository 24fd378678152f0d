"""torchtitan's layers in processes that share the experts: run by test_torchtitan_processes.py.

``python torchtitan_worker.py DIRECTORY``: every scenario on two processes, and on one, to which those are held. The
experts are sharded, and the tokens exchanged, by torchtitan's own ``parallelize`` and all-to-all dispatcher.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchtitan.distributed import parallel_dims, utils
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter
    from torchtitan.models.common.moe_sharding import set_moe_sharding_config
    from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher

import circuitroute as cr
from circuitroute.integrations import torchtitan
from tests.integrations.process_worker import fork_all

B, L, D, E, HIDDEN, STEPS = 4, 6, 16, 8, 24, 3
RULE = cr.Between(1, 4)


class LoopedExperts(GroupedExperts):
    """In the dtype of the input, expert by expert; as many as this process has."""

    @dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):
        pass

    def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        w1, w2, w3 = (local(weight) for weight in (self.w1_EFD, self.w2_EDF, self.w3_EFD))
        self.rows = len(x_RD)
        outputs = []
        for e, x in enumerate(x_RD.split(num_tokens_per_expert_E.tolist())):
            outputs.append((nn.functional.silu(x @ w1[e].T) * (x @ w3[e].T)) @ w2[e].T)
        return torch.cat(outputs)


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def layer_config(top_k: int = 2) -> Any:
    gate = Linear.Config(in_features=D, out_features=E)
    return MoE.Config(
        num_experts=E,
        router=TokenChoiceTopKRouter.Config(num_experts=E, gate=gate, top_k=top_k, route_norm=True),
        routed_experts=RoutedExperts.Config(
            inner_experts=LoopedExperts.Config(dim=D, hidden_dim=HIDDEN, num_experts=E),
            token_dispatcher=AllToAllTokenDispatcher.Config(num_experts=E, top_k=top_k),
        ),
    )


class Scenario:
    """A layer on this process's share of the sequences, or on all of them."""

    def __init__(self, rank: int, processes: int) -> None:
        self.rank, self.processes = rank, processes
        self.record: cr.RoutingRecord | None = None
        self.recompute = False

    def run(self, constraint: cr.Constraint, *, share: Any = None, **options: Any) -> dict[str, Any]:
        """``share``: the hidden states, of shape [B, ...], in place of random ones."""
        config = torchtitan.circuit_moe(layer_config(), constraint, **{"seed": 0, **options})
        layout = dict.fromkeys(("w1_EFD", "w2_EDF", "w3_EFD"))
        set_moe_sharding_config(config, enable_ep=True, enable_sp=False, expert_param_layout=layout)
        layer = config.build()
        torch.manual_seed(0)
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.3)
        hidden = torch.randn(B, L, D) if share is None else share
        hidden = hidden.chunk(self.processes)[self.rank].requires_grad_()
        # Exchanges of unequal numbers of rows: gloo has none of the kind that torchtitan's default backend asks for.
        backend = "partial_dtensor"
        utils.set_spmd_backend(backend)
        dims = parallel_dims.ParallelDims(1, self.processes, 1, 1, 1, self.processes, self.processes, backend)
        dims.build_mesh()
        layer.parallelize(dims)
        with utils.get_spmd_context(parallel_dims=dims)():
            return self.train(layer, hidden)

    def train(self, layer: Any, hidden: Tensor) -> dict[str, Any]:
        """Steps of gradient descent, with the gate's gradient summed over processes as data parallelism does."""
        if self.record is not None:
            tokens = hidden.shape[0] * hidden.shape[1]
            torchtitan.replay(layer, self.record.split([tokens] * self.processes)[self.rank])
        found: dict[str, Any] = {"losses": [], "decisions": [], "rows": [], "load": [], "gradients": []}
        for step in range(STEPS):
            torchtitan.begin_step(layer, step, offset=self.rank * hidden.shape[0] * hidden.shape[1])
            with torchtitan.recorded_routings(layer) as routings:
                output = checkpoint(layer, hidden, use_reentrant=False) if self.recompute else layer(hidden)
                loss = output.square().sum()
            rows = layer.routed_experts.inner_experts.rows
            loss.backward()
            if self.processes > 1:
                dist.all_reduce(local(layer.router.gate.weight.grad))
            found["losses"].append(self.total(loss.detach()))
            found["decisions"].append(self.gathered(routings[0].mask.long()))
            found["rows"].append(self.total(torch.tensor(float(rows))))
            found["load"].append(self.summed(local(layer.tokens_per_expert_E)))
            experts = layer.routed_experts.inner_experts
            weights = [local(weight.grad) for weight in (experts.w1_EFD, experts.w2_EDF, experts.w3_EFD)]
            found["gradients"].append(
                [
                    self.gathered(hidden.grad),
                    local(layer.router.gate.weight.grad).tolist(),
                    *[self.gathered(gradient) for gradient in weights],
                ]
            )
            with torch.no_grad():
                for parameter in layer.parameters():
                    local(parameter).sub_(0.002 * local(parameter.grad))
                    parameter.grad = None
                hidden.grad = None
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

    def total(self, tensor: Tensor) -> float:
        return float(self.summed(tensor))


def ragged(s: Scenario) -> dict[str, Any]:
    return s.run(RULE)


def distinct(s: Scenario) -> dict[str, Any]:
    return s.run(RULE, padding="distinct")


def ragged_checkpoint(s: Scenario) -> dict[str, Any]:
    s.recompute = True
    return s.run(RULE)


def ragged_probes(s: Scenario) -> dict[str, Any]:
    return s.run(RULE, probes=1)


def fixed(s: Scenario) -> dict[str, Any]:
    return s.run(cr.Exactly(2))


def empty_handed(s: Scenario) -> dict[str, Any]:
    """Tokens of the first process need experts of the second alone, and those of the second need none."""
    hidden = torch.randn(B, 1, D) * 0.01
    s.record = cr.RoutingRecord.of(torch.arange(E).ge(E - 2).expand(B, E) & torch.arange(B)[:, None].lt(B // 2))
    return s.run(cr.AtMost(2), share=hidden)


def replayed(s: Scenario) -> dict[str, Any]:
    """A record of all tokens, of which each process replays its own."""
    logits = torch.randn(B * L, E, generator=torch.Generator().manual_seed(9))
    mask = cr.compile(RULE, E)(logits).sample(key=cr.random_key(9, torch.arange(B * L))).bool()
    s.record = cr.RoutingRecord.of(mask)
    return s.run(RULE, seed=None)


SCENARIOS: dict[str, Callable[[Scenario], dict[str, Any]]] = {
    function.__name__: function
    for function in (ragged, distinct, ragged_checkpoint, ragged_probes, fixed, empty_handed, replayed)
}

if __name__ == "__main__":
    parallel_dims.device_type = "cpu"  # torchtitan takes a machine without a GPU for one with
    fork_all(SCENARIOS, Scenario, Path(sys.argv[1]))
