"""Two processes that control together, beside one with all of their tokens: run by test_balance_processes.py.

Legend: T tokens, E experts.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import circuitroute as cr

T, E = 120, 8
# Tokens of the first process: fewer than the other's, and none.
SPLITS = (17, 0)


def controllers() -> dict[str, Any]:
    """Everything that takes a process group."""
    return {
        "LossFree": cr.balance.LossFree(E, step=0.1),
        "Quantile": cr.balance.Quantile(E, rate=0.7),
        "Quantile, target": cr.balance.Quantile(E, [0.1, 0.4, 0.25, 0.25, 0.25, 0.25, 0.25, 0.25]),
        "ExactBalance": cr.balance.ExactBalance(E),
        "ExactBalance, steps": cr.balance.ExactBalance(E, steps=1, temperature=0.5),
        "CountController": cr.CountController(2.5, gain=0.5),
    }


def logits() -> torch.Tensor:
    return torch.randn(T, E, generator=torch.Generator().manual_seed(0)) * 2 + torch.linspace(-1, 1, E)


def steps(controller: Any, rows: torch.Tensor, group: Any) -> torch.Tensor:
    """The state after three steps, as one tensor."""
    ranged = isinstance(controller, cr.CountController)
    circuit = cr.compile(cr.Between(1, 5) if ranged else cr.Exactly(2), E)
    state = controller.init()
    for _ in range(3):
        moved = {"price": state.price} if ranged else {"bias": state.bias}
        routing = cr.route(rows, circuit, decide="mode", **moved)
        state = controller.update(state, routing, group)
    found: torch.Tensor = state[0]
    return found


def work(rank: int, directory: Path) -> None:
    """All controllers, for every split, in one process of two."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    group = dist.group.WORLD
    found = {}
    for split in SPLITS:
        rows = logits()[:split] if rank == 0 else logits()[split:]
        for name, controller in controllers().items():
            found[f"{name}/{split}"] = steps(controller, rows, group)
        distribution = cr.compile(cr.Exactly(2), E)(rows.double())
        found[f"bias_for/{split}"] = cr.balance.bias_for(distribution, group=group)
    try:
        cr.balance.bias_for(cr.compile(cr.Exactly(2), E)(rows), [0.5] * E, group=group)
    except ValueError as error:
        found["error"] = torch.tensor([ord(letter) for letter in str(error)])
    torch.save(found, directory / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    context = torch.multiprocessing.start_processes(work, (Path(sys.argv[1]),), 2, join=False, start_method="fork")
    while not context.join():
        pass
