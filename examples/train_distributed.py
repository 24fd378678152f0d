"""Trains a small mixture-of-experts model on one process or on many: the same decisions, the same losses.

    python examples/train_distributed.py
    torchrun --nproc-per-node 2 examples/train_distributed.py
    torchrun --nproc-per-node 2 examples/train_distributed.py --wrap fsdp --checkpoint

On many processes the first one then trains on the whole batch alone, to compare.
"""

import argparse
import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import circuitroute as cr

SEED, STEPS, VOCABULARY, HIDDEN, EXPERTS, LAYERS = 0, 6, 32, 32, 8, 3
BATCH, LENGTH = 8, 16  # of all processes together


class Block(nn.Module):
    """A causal mean over positions, then a mixture of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(HIDDEN, HIDDEN)
        self.norm = nn.RMSNorm(HIDDEN)
        experts = [
            nn.Sequential(nn.Linear(HIDDEN, 2 * HIDDEN), nn.GELU(), nn.Linear(2 * HIDDEN, HIDDEN))
            for _ in range(EXPERTS)
        ]
        self.experts = cr.MoE(cr.DynamicKRouter(HIDDEN, EXPERTS, kmin=1, kmax=4, temperature=0.25), experts)

    def forward(self, hidden: Tensor, key: Tensor) -> tuple[Tensor, cr.Routing]:
        positions = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)[:, None]
        hidden = hidden + self.mix(hidden).cumsum(1) / positions
        output, routing = self.experts(self.norm(hidden), key=key)
        return hidden + output, routing


class Model(nn.Module):
    """Tokens [B, S] and one row of keys [B * S] per layer -> logits [B * S, V] and the decisions of the layers."""

    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(HIDDEN, VOCABULARY)
        self.recompute = recompute

    def forward(self, tokens: Tensor, keys: list[Tensor]) -> tuple[Tensor, list[cr.Routing]]:
        hidden, routings = self.embed(tokens), []
        for block, key in zip(self.blocks, keys, strict=True):
            if self.recompute:
                # A block that is run again decides the same, because of its keys: no generator has to be restored.
                hidden, routing = checkpoint(block, hidden, key, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden, routing = block(hidden, key)
            routings.append(routing)
        return self.head(hidden.flatten(0, 1)), routings


def build(recompute: bool = False) -> Model:
    torch.manual_seed(SEED)  # the same weights on every process
    return Model(recompute)


def share(step: int, rank: int, processes: int) -> tuple[Tensor, list[Tensor]]:
    """This process's sequences of a batch [B, S + 1], and the keys of its tokens."""
    batch = torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    batch[:, 1::2] = (batch[:, 0:-1:2] + 1) % VOCABULARY  # something to learn
    mine = BATCH // processes
    token = rank * mine * LENGTH + torch.arange(mine * LENGTH)  # numbered over all processes
    keys = [cr.random_key(SEED, step, layer, token) for layer in range(LAYERS)]
    return batch[rank * mine : (rank + 1) * mine], keys


def objective(logits: Tensor, labels: Tensor, routings: list[cr.Routing], group: dist.ProcessGroup | None) -> Tensor:
    loss = nn.functional.cross_entropy(logits, labels.flatten())
    for routing in routings:
        loss = loss + 0.02 * cr.losses.load_balance(routing, group=group) + 0.01 * cr.losses.expected_count(routing)
    return loss


def train(model: nn.Module, rank: int, processes: int) -> list[float]:
    """The loss of every step, over all processes."""
    group = dist.group.WORLD if processes > 1 else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    losses = []
    for step in range(STEPS):
        batch, keys = share(step, rank, processes)
        logits, routings = model(batch[:, :-1], keys)
        loss = objective(logits, batch[:, 1:], routings, group)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach() / processes
        if group is not None:
            dist.all_reduce(mean, group=group)
        losses.append(mean.item())
    return losses


def wrap(model: Model, how: str) -> nn.Module:
    if how == "ddp":
        return DistributedDataParallel(model)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wrap", choices=["ddp", "fsdp"], default="ddp")
    parser.add_argument("--checkpoint", action="store_true", help="recompute the blocks in backward")
    arguments = parser.parse_args()
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    shared: list[float] = []
    if processes > 1:
        dist.init_process_group("gloo")
        shared = train(wrap(build(arguments.checkpoint), arguments.wrap), rank, processes)
        dist.destroy_process_group()
    if rank == 0:
        alone = train(build(arguments.checkpoint), 0, 1)
        print("step   1 process" + (f"   {processes} processes, {arguments.wrap}" if shared else ""))
        for step, loss in enumerate(alone):
            print(f"{step:4d}   {loss:9.6f}" + (f"   {shared[step]:9.6f}" if shared else ""))
    if shared and arguments.wrap == "fsdp":
        leave()


def leave() -> None:
    """Ends a process whose work is done, without the interpreter's own end.

    DTensor, which FSDP2 is made of, remembers meshes in several caches, and a mesh its process group: gloo's threads
    outlive `destroy_process_group`. One of them that has yet to let go of a tensor needs the interpreter's lock for it,
    and where the interpreter is ending by then, that aborts: "terminate called without an active exception".
    """
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
