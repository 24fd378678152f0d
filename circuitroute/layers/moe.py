"""A small sparse mixture-of-experts layer around any router.

Legend: T tokens, H hidden size, E experts, S chosen (token, expert) pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from circuitroute.layers.routers import LinearRouter
from circuitroute.routing.decision import Routing


class MoE(nn.Module):
    """Runs every token through its chosen experts and adds up their outputs, weighted by the gates.

    The pairs are sorted by expert, each expert sees its tokens as one batch, and the results are added back in
    place: S expert evaluations in all, none for padding, and no loop over tokens.

    Args:
        router: gives a :class:`Routing` for hidden states; None where every call hands over its ``routing``, as with a
            :class:`BudgetRouter` that the layers of a model share.
        experts: E modules, each [S_e, H] -> [S_e, H].
        call_idle: whether experts that no token chose are called too, with an empty batch, so that their parameters
            get a gradient of zero instead of none. Processes that share the work need it: DDP and FSDP wait for the
            same parameters in all of them. None, the default, does so where torch.distributed runs more than one.

    Raises:
        ValueError: the number of experts is not the router's.
    """

    def __init__(
        self,
        router: LinearRouter | None,
        experts: Sequence[nn.Module] | nn.ModuleList,
        *,
        call_idle: bool | None = None,
    ) -> None:
        super().__init__()
        self.router = router
        self.experts = experts if isinstance(experts, nn.ModuleList) else nn.ModuleList(experts)
        self.call_idle = call_idle
        if router is not None and len(self.experts) != router.num_experts:
            raise ValueError(
                f"experts has {len(self.experts)} modules, but the router chooses among {router.num_experts}"
            )

    def forward(
        self,
        hidden: Tensor,
        key: Tensor | int | None = None,
        replay: Tensor | None = None,
        routing: Routing | None = None,
    ) -> tuple[Tensor, Routing]:
        """Apply the layer.

        Args:
            hidden: [..., H].
            key, replay: handed to the router.
            routing: a decision made elsewhere, over the same T tokens; the router is not called then.

        Returns:
            (output [..., H] in the dtype of ``hidden``, the routing decision).

        Raises:
            ValueError: ``routing`` is not over these tokens and experts, comes with ``key`` or ``replay``, or is
                missing where there is no router.
        """
        if routing is not None and (key is not None or replay is not None):
            raise ValueError("routing was given together with key or replay: a decision that is made needs neither")
        if routing is None:
            if self.router is None:
                raise ValueError("routing=None: this layer was made without a router, so every call needs a routing")
            routing = self.router(hidden, key=key, replay=replay)
        rows = hidden.reshape(-1, hidden.shape[-1])
        if routing.mask.shape != (len(rows), len(self.experts)):
            tokens, choices = routing.mask.shape
            raise ValueError(
                f"routing is for {tokens} tokens and {choices} experts, but there are {len(rows)} and "
                f"{len(self.experts)}"
            )
        token, expert, weight = routing.ragged(by="expert")
        loads = torch.bincount(expert, minlength=len(self.experts)).tolist()
        batches = rows[token].split(loads)
        idle_too = _several_processes() if self.call_idle is None else self.call_idle
        outputs = [module(batch) for module, batch in zip(self.experts, batches, strict=True) if idle_too or len(batch)]
        results = torch.cat(outputs) if outputs else rows[token]  # empty, and still a function of its inputs
        weighted = results * weight.unsqueeze(-1).to(results.dtype)
        combined = torch.zeros_like(rows, dtype=weighted.dtype).index_add(0, token, weighted)
        return combined.to(hidden.dtype).reshape(hidden.shape), routing


def _several_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
