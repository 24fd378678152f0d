"""A small sparse mixture-of-experts layer around any router.

Legend: T tokens, H hidden size, E experts, S chosen (token, expert) pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from circuitroute._tensors import batched, plain, recorded, tracked, transformed, without_numbers
from circuitroute._validate import as_flag
from circuitroute.keys import drawn_keys
from circuitroute.layers.experts import StackedExperts
from circuitroute.layers.routers import LinearRouter
from circuitroute.routing.choice import per_token
from circuitroute.routing.decision import Routing
from circuitroute.routing.probes import (
    ProbeCount,
    ProbeWeights,
    as_probe_count,
    as_probe_weights,
    draw_probes,
    every_unchosen,
    plain_probe_weights,
    probe_slots,
    with_worth,
)
from circuitroute.routing.records import RoutingRecord


class MoE(nn.Module):
    """Runs every token through its chosen experts and adds up their outputs, weighted by the gates.

    The pairs are sorted by expert, each expert sees its tokens as one batch, and the results are added back in
    place: S expert evaluations in all, none for padding, and no loop over tokens.

    Args:
        router: gives a :class:`Routing` for hidden states; None where every call hands over its ``routing``, as with a
            :class:`BudgetRouter` that the layers of a model share.
        experts: E modules, each [S_e, H] -> [S_e, H], or a :class:`StackedExperts`.
        probes: in training, how many unchosen experts every token runs besides, without replacement in proportion to
            their exact (tempered) marginals and keyed like the decision, or ``"all"`` of them. The output is
            the same to the bit, whatever they give, and they take no gradient themselves; the gates' gradient learns
            what they would have been worth, unless they give inf or NaN. With probes the layer is differentiable once,
            and not by torch.func. None are run where the gates take no gradient. See
            :mod:`circuitroute.routing.probes`.
        probe_weights: how much a probe counts in that gradient: ``"importance"``, such that it is what running all
            experts would give, in expectation; ``"none"``, 1 each; or a number that caps the former.
        call_idle: whether experts that no token chose are called too, with an empty batch, so that their parameters
            get a gradient of zero instead of none. Processes that share the work need it: DDP and FSDP wait for the
            same parameters in all of them. None, the default, does so where torch.distributed runs more than one.

    Raises:
        ValueError: the number of experts is not the router's.
    """

    def __init__(
        self,
        router: LinearRouter | None,
        experts: Sequence[nn.Module] | nn.ModuleList | StackedExperts,
        probes: ProbeCount = 0,
        probe_weights: ProbeWeights = "importance",
        *,
        call_idle: bool | None = None,
    ) -> None:
        super().__init__()
        self.router = router
        self.experts = experts if isinstance(experts, (nn.ModuleList, StackedExperts)) else nn.ModuleList(experts)
        self.num_experts = self.experts.num_experts if isinstance(self.experts, StackedExperts) else len(self.experts)
        self.probes = as_probe_count(probes)
        as_probe_weights(probe_weights)
        self.probe_weights: ProbeWeights = plain_probe_weights(probe_weights)
        self.call_idle = None if call_idle is None else as_flag("call_idle", call_idle)
        if router is not None and self.num_experts != router.num_experts:
            raise ValueError(
                f"there are {self.num_experts} experts, but the router chooses among {router.num_experts}: give as "
                f"many, or a router with num_experts={self.num_experts}"
            )

    def forward(
        self,
        hidden: Tensor,
        key: Tensor | int | None = None,
        replay: Tensor | RoutingRecord | None = None,
        routing: Routing | None = None,
        **options: Any,
    ) -> tuple[Tensor, Routing]:
        """Apply the layer.

        Args:
            hidden: [..., H].
            key, replay, options: handed to the router; options such as ``decide`` and ``temperature``.
            routing: a decision made elsewhere, over the same T tokens; the router is not called then. The probes of one
                are keyed by ``key``.

        Returns:
            (output [..., H] in the dtype of ``hidden``, the routing decision).

        Raises:
            ValueError: ``routing`` is not over these tokens and experts, comes with ``replay``, options or (without
                probes) ``key``, or is missing where there is no router.
        """
        hidden = plain("hidden", hidden)
        probe_key = key
        if key is None and self.training and self.probes not in (0, "all"):
            probe_key = drawn_keys(hidden.shape[:-1].numel(), hidden.device)
        if routing is not None:
            self._check_alone(key, replay, options)
        else:
            if self.router is None:
                raise ValueError("routing=None: this layer was made without a router, so every call needs a routing")
            routing = self.router(hidden, key=key if replay is not None else probe_key, replay=replay, **options)
        rows = hidden.reshape(-1, hidden.shape[-1])
        if routing.mask.shape != (len(rows), self.num_experts):
            tokens, choices = routing.mask.shape
            raise ValueError(
                f"routing is for {tokens} tokens and {choices} experts, but there are {len(rows)} and "
                f"{self.num_experts}"
            )
        probed = bool(self.training and self.probes and tracked(routing.gates))
        if probed and (transformed() or recorded(rows)):
            raise NotImplementedError(
                f"probes={self.probes!r} in a traced program, or under a transform of torch.func: there they have no "
                "gradient; set probes=0, or call eval()"
            )
        if batched() or recorded(rows):
            combined = self._everywhere(rows, routing)
        else:
            combined = self._dispatched(rows, routing)
        if probed:
            if isinstance(probe_key, Tensor):
                probe_key = per_token("key", probe_key, hidden.shape[:-1])
            combined = self._with_probes(combined, rows, routing, probe_key)
        return combined.to(hidden.dtype).reshape(hidden.shape), routing

    def _dispatched(self, rows: Tensor, routing: Routing) -> Tensor:
        """[T, H] the weighted sums of what the chosen experts give."""
        if without_numbers(rows):  # as many experts as a token may have
            weights, _ = routing.padded()
            token, loads = self._somewhere(rows, weights.shape[1])
            weight = weights.reshape(-1)
        else:
            token, expert, weight = routing.ragged(by="expert")
            loads = self._loads(expert)
        outputs = self._run(rows.index_select(0, token), loads)
        # Under autocast the two may differ; the sum is taken in the wider.
        weighted = outputs * weight.unsqueeze(-1).to(torch.promote_types(outputs.dtype, rows.dtype))
        return torch.zeros_like(rows, dtype=weighted.dtype).index_add(0, token, weighted)

    def _everywhere(self, rows: Tensor, routing: Routing) -> Tensor:
        """The same where nothing may depend on who was chosen: every expert runs on every token, most in vain."""
        outputs = self._run(rows.repeat(self.num_experts, 1), [len(rows)] * self.num_experts)
        outputs = outputs.reshape(self.num_experts, len(rows), -1)
        gates, chosen = routing.gates.t()[..., None], routing.mask.t()[..., None]
        weighted = outputs * gates.to(torch.promote_types(outputs.dtype, rows.dtype))
        # A gate of NaN is a decision that could not be made, which must not pass for 0.
        return torch.where(chosen | gates.isnan(), weighted, 0.0).sum(0)

    def _somewhere(self, rows: Tensor, each: int) -> tuple[Tensor, list[int]]:
        """Pairs of tokens without numbers, ``each`` of every token, and loads of experts that add up to as many."""
        token = torch.arange(len(rows), device=rows.device).repeat_interleave(each)
        share, rest = divmod(len(token), self.num_experts)
        return token, [share + (i < rest) for i in range(self.num_experts)]

    def _check_alone(
        self, key: Tensor | int | None, replay: Tensor | RoutingRecord | None, options: dict[str, Any]
    ) -> None:
        """That nothing besides a decision that is made says how to make it; a key is for probes."""
        said = {"key": None if self.probes else key, "replay": replay}
        given = [*(name for name, value in said.items() if value is not None), *options]
        if given:
            raise ValueError(
                f"routing was given together with {', '.join(given)}: a decision that is made needs none of that; hand "
                "it to the router that makes the decision"
            )

    def _loads(self, expert: Tensor) -> list[int]:
        """How many pairs [S] each expert has."""
        loads: list[int] = torch.bincount(expert, minlength=self.num_experts).tolist()
        return loads

    def _run(self, rows: Tensor, loads: list[int]) -> Tensor:
        """[S, H] the outputs of rows [S, H] that are sorted by expert, ``loads[e]`` of them for expert e."""
        if isinstance(self.experts, StackedExperts):
            outputs: Tensor = self.experts(rows, loads)
            return outputs
        idle_too = _several_processes() if self.call_idle is None else self.call_idle
        parts = zip(self.experts, rows.split(loads), strict=True)
        found = [module(part) for module, part in parts if idle_too or len(part)]
        return torch.cat(found) if found else rows  # empty, and still a function of its inputs

    def _with_probes(self, combined: Tensor, rows: Tensor, routing: Routing, key: Tensor | int | None) -> Tensor:
        """The output, with probes that add 0 to it and their worth to the gradient of the gates."""
        if without_numbers(rows):
            each = probe_slots(routing.untempered.circuit, self.probes)
            token, loads = self._somewhere(rows, each)
            gates = routing.gates[:, :each].reshape(-1)
        else:
            if self.probes == "all":
                probes = every_unchosen(routing)
            else:
                probes = draw_probes(routing, self.probes, key, self.probe_weights)
            order = probes.expert.argsort(stable=True)
            token, expert, weight = (part[order] for part in probes)
            gates, loads = routing.gates[token, expert] * weight, self._loads(expert)
        with torch.no_grad():
            outputs = self._run(rows.index_select(0, token), loads)
        return with_worth(combined, gates, outputs, token)


def _several_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
