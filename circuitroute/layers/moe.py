"""A small sparse mixture-of-experts layer around any router.

Null experts stand behind the E experts: the router chooses among E + Z, and the last Z have no parameters and cost
nothing. They make a dynamic number of experts out of a constraint on the count: of ``cr.Exactly(k)``, those among the
last Z are a token's to spare.

Legend: T tokens, H hidden size, E experts, Z null experts, S chosen (token, expert) pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn

from circuitroute._tensors import batched, plain, recorded, tracked, transformed, without_numbers
from circuitroute._validate import as_flag, one_of
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

NullExperts: TypeAlias = Literal["identity", "zero"]


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
        null_experts: what the router's choices behind the E experts are: ``"identity"``, which return the hidden state
            itself (the zero-computation experts of LongCat-Flash, arXiv:2509.01322, and the copy experts of MoE++,
            arXiv:2410.07348), or ``"zero"``, which return 0 (AdaMoE's null experts, arXiv:2406.13233). No expert is run
            for them; their gates and gradients are those of any other. None, the default: there are none.

    Raises:
        ValueError: the number of experts is not the router's; with ``null_experts`` it is not below the router's.
    """

    def __init__(
        self,
        router: LinearRouter | None,
        experts: Sequence[nn.Module] | nn.ModuleList | StackedExperts,
        probes: ProbeCount = 0,
        probe_weights: ProbeWeights = "importance",
        *,
        call_idle: bool | None = None,
        null_experts: NullExperts | None = None,
    ) -> None:
        super().__init__()
        self.router = router
        self.experts = experts if isinstance(experts, (nn.ModuleList, StackedExperts)) else nn.ModuleList(experts)
        self.num_experts = self.experts.num_experts if isinstance(self.experts, StackedExperts) else len(self.experts)
        self.probes = as_probe_count(probes)
        as_probe_weights(probe_weights)
        self.probe_weights: ProbeWeights = plain_probe_weights(probe_weights)
        self.call_idle = None if call_idle is None else as_flag("call_idle", call_idle)
        self.null_experts: NullExperts | None = None
        if null_experts is not None:
            self.null_experts = one_of("null_experts", null_experts, get_args(NullExperts))
        if router is not None:
            self._check_router(router.num_experts)

    def executed_counts(self, routing: Routing) -> Tensor:
        """[T] int64, how many experts each token runs: ``routing.counts`` without the null experts.

        Raises:
            ValueError: the decision is over another number of experts.
        """
        tokens, choices = routing.mask.shape
        self._check_choices(choices, tokens, tokens)
        return routing.mask[:, : self.num_experts].sum(-1)

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
        self._check_choices(routing.mask.shape[-1], len(routing.mask), len(rows))
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
        if self.null_experts == "identity":
            combined = combined + self._through_identity(combined, rows, routing)
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
            loads, pairs = self._loads(expert)
            token, weight = token[:pairs], weight[:pairs]
        outputs = self._run(rows.index_select(0, token), loads)
        # Under autocast the two may differ; the sum is taken in the wider.
        weighted = outputs * weight.unsqueeze(-1).to(torch.promote_types(outputs.dtype, rows.dtype))
        return torch.zeros_like(rows, dtype=weighted.dtype).index_add(0, token, weighted)

    def _everywhere(self, rows: Tensor, routing: Routing) -> Tensor:
        """The same where nothing may depend on who was chosen: every expert runs on every token, most in vain."""
        outputs = self._run(rows.repeat(self.num_experts, 1), [len(rows)] * self.num_experts)
        outputs = outputs.reshape(self.num_experts, len(rows), -1)
        real = slice(self.num_experts)
        gates, chosen = routing.gates[:, real].t()[..., None], routing.mask[:, real].t()[..., None]
        weighted = outputs * gates.to(torch.promote_types(outputs.dtype, rows.dtype))
        # A gate of NaN is a decision that could not be made, which must not pass for 0.
        return torch.where(chosen | gates.isnan(), weighted, 0.0).sum(0)

    def _through_identity(self, combined: Tensor, rows: Tensor, routing: Routing) -> Tensor:
        """[T, H] what null experts add that return the hidden state: the sum of their gates, times it."""
        gates = routing.gates[:, self.num_experts :]
        chosen = routing.mask[:, self.num_experts :] | gates.isnan()
        weight = torch.where(chosen, gates, 0.0).sum(-1, keepdim=True)
        return rows * weight.to(combined.dtype)

    def _somewhere(self, rows: Tensor, each: int) -> tuple[Tensor, list[int]]:
        """Pairs of tokens without numbers, ``each`` of every token, and loads of experts that add up to as many."""
        token = torch.arange(len(rows), device=rows.device).repeat_interleave(each)
        share, rest = divmod(len(token), self.num_experts)
        return token, [share + (i < rest) for i in range(self.num_experts)]

    def _check_router(self, choices: int) -> None:
        """That the router chooses among the experts, and null experts if there are any."""
        E = self.num_experts
        if self.null_experts is not None and choices <= E:
            raise ValueError(
                f"null_experts={self.null_experts!r}: there are {E} experts and the router chooses among {choices}, so "
                f"none is left to be a null expert: give a router with num_experts above {E}, or null_experts=None"
            )
        if self.null_experts is None and choices != E:
            spare = f", or null_experts='identity' or 'zero' for the last {choices - E}" if choices > E else ""
            raise ValueError(
                f"there are {E} experts, but the router chooses among {choices}: give as many, or a router with "
                f"num_experts={E}{spare}"
            )

    def _check_choices(self, choices: int, tokens: int, rows: int) -> None:
        """That a decision is over these experts, and over as many tokens as there are rows."""
        E = self.num_experts
        if self.null_experts is None:
            fits, besides = choices == E, ""
        elif self.router is None:
            fits, besides = choices >= E, ", and null experts"
        else:
            null = self.router.num_experts - E
            fits, besides = choices == E + null, f", and {null} null experts"
        if tokens != rows or not fits:
            raise ValueError(
                f"routing is for {tokens} tokens and {choices} experts, but there are {rows} and {E}{besides}"
            )

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

    def _loads(self, expert: Tensor) -> tuple[list[int], int]:
        """How many pairs [S] each expert has, and all of them together; those of null experts do not count."""
        loads: list[int] = torch.bincount(expert, minlength=self.num_experts).tolist()[: self.num_experts]
        return loads, sum(loads)

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
            gates, pairs = routing.gates[:, :each].reshape(-1), len(token)
        else:
            if self.probes == "all":
                probes = every_unchosen(routing)
            else:
                probes = draw_probes(routing, self.probes, key, self.probe_weights)
            order = probes.expert.argsort(stable=True)
            token, expert, weight = (part[order] for part in probes)
            gates = routing.gates[token, expert] * weight
            loads, pairs = self._loads(expert)
        with torch.no_grad():
            outputs = self._run(rows.index_select(0, token[:pairs]), loads)
            if self.null_experts == "identity":
                outputs = torch.cat([outputs, rows.index_select(0, token[pairs:]).to(outputs.dtype)])
        token, gates = token[: len(outputs)], gates[: len(outputs)]
        return with_worth(combined, gates, outputs, token)


def _several_processes() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
