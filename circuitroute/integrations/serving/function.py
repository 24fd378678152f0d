"""A constraint as a serving function: the most probable subset of every token, or a sample.

Legend: T tokens, E experts, K slots per token.
"""

from __future__ import annotations

import math
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor
from torch.compiler import is_compiling

from circuitroute._tensors import traced, transformed
from circuitroute._validate import as_flag, int_at_least, one_of
from circuitroute.compilation import compile as compile_constraint
from circuitroute.constraints import Constraint
from circuitroute.engines import layered_engine, ops, transforms
from circuitroute.engines.layered import evaluated
from circuitroute.engines.layered.torch import unrolled
from circuitroute.engines.subset.mode import best_count, best_scores
from circuitroute.engines.subset.mode import mode as mode_of_counts
from circuitroute.engines.tables import Array
from circuitroute.inference.circuit import Circuit
from circuitroute.integrations.serving.checks import (
    as_bias,
    as_scaling,
    check_keys,
    check_keys_given,
    check_no_keys,
)
from circuitroute.integrations.serving.sampling import Sampling
from circuitroute.integrations.serving.served import ServedCombine, ServedFunction, placed
from circuitroute.routing.decision import chosen_first

Score: TypeAlias = Literal["logits", "sigmoid"]

# New in torch 2.7; older versions fail when the program is saved.
is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)


def routing_function(
    constraint: Constraint | Circuit,
    num_experts: int,
    *,
    combine: ServedCombine = "softmax",
    score: Score = "logits",
    bias: Tensor | None = None,
    scaling: float = 1.0,
    sample: bool = False,
    temperature: float = 1.0,
    head: int | None = None,
    layer: int | None = None,
    device: torch.device | str | None = None,
) -> RoutingFunction:
    """The routing of a constraint, as vLLM and SGLang call it: the most probable subset of every token, or a sample.

    Args:
        constraint: what is allowed, over ``num_experts`` variables; or a circuit, such as a loaded one.
        num_experts: E.
        combine: how chosen experts are weighted: ``"softmax"`` over all experts, or over the chosen ones if the server
            asks to renormalise; ``"normalized"`` over the chosen ones in any case; ``"sigmoid"``, divided by its sum if
            the server asks to renormalise.
        score: the choice maximises the sum of ``"logits"``, as in :func:`circuitroute.route`, or of their
            ``"sigmoid"``, as in models that add a correction bias to it (DeepSeek-V3). A sample has a probability in
            proportion to exp(sum of scores / temperature).
        bias: [E], added to the scores for the choice only. -inf forbids an expert, +inf forces it.
        scaling: multiplies all weights.
        sample: draw a subset instead of taking the most probable one. The function is then called with
            ``seed=`` and ``position=`` as well, see :class:`RoutingFunction`.
        temperature: of the sample, positive; the weights are those of the logits themselves. A constant.
        head: so many experts of every token are forced, and the others are drawn given that these are chosen. They are
            the best members of the token's most probable subset, so that some allowed subset always has them; where
            that has fewer members, all of them. None is 0.
        layer: a number that is mixed into the keys as well, since layers that share keys draw alike.
        device: for its tables; torch's default device when None. Move it with ``.to`` like any module.

    Raises:
        InfeasibleError: no subset of E experts satisfies the constraint.
        TypeError, ValueError: an argument of the wrong kind, a circuit over another number of experts, a head larger
            than any allowed subset, or settings of samples without ``sample=True``.
    """
    experts = int_at_least("num_experts", num_experts, 1)
    circuit = compile_constraint(constraint, experts)
    combine = one_of("combine", combine, get_args(ServedCombine))
    score = one_of("score", score, get_args(Score))
    factor = as_scaling(scaling)
    if bias is not None:
        bias = as_bias(bias, circuit.n)
    sampling = None
    if as_flag("sample", sample):
        sampling = Sampling(circuit, temperature, head, layer)
    else:
        _refuse_settings_of_samples(temperature=(temperature, 1.0), head=(head, None), layer=(layer, None))
    made: RoutingFunction = placed(RoutingFunction(circuit, combine, score, bias, factor, sampling), device)
    return made


class RoutingFunction(ServedFunction):
    """``f(hidden_states, gating_output, topk, renormalize) -> (weights, ids)``; made by :func:`routing_function`.

    One that samples is called with ``seed`` and ``position``, too. The key of a token is ``cr.random_key(seed,
    position)``, or ``cr.random_key(seed, position, layer)`` with a ``layer``, and its subset a function of (logits row,
    seed, position) alone: the one that :func:`circuitroute.route` draws with that key and temperature, in any batch.

    Attributes:
        circuit: the compiled constraint.
        sampling: how it draws, None if it takes the most probable subset.
        portable: whether it can be exported; only circuits of more than 32,768 products cannot.
    """

    def __init__(
        self,
        circuit: Circuit,
        combine: ServedCombine,
        score: Score,
        bias: Tensor | None,
        scaling: float,
        sampling: Sampling | None = None,
    ) -> None:
        tables: dict[str, Array] = {}
        if circuit.counts is not None:
            tables["allowed"] = np.isin(np.arange(circuit.max_count + 1), circuit.counts)
        super().__init__(
            circuit.n,
            combine=combine,
            score=score,
            bias=bias,
            scaling=scaling,
            largest=circuit.max_count,
            rule=repr(circuit.constraint),
            tables=tables,
        )
        self.circuit, self.sampling = circuit, sampling
        self.unrolled: unrolled.UnrolledMode | None = None
        if circuit.counts is not None:
            self.allows_none = 0 in circuit.counts
        else:
            self.allows_none = bool(circuit.satisfies(torch.zeros(circuit.n, dtype=torch.bool, device="cpu")))
            graph = evaluated(circuit.graph)  # as in the engines: the order of additions is the same
            self.unrolled = unrolled.UnrolledMode(graph) if unrolled.can_unroll(graph) else None
        if sampling is not None:
            self.portable = sampling.unrolled is not None
        else:
            self.portable = circuit.counts is not None or self.unrolled is not None

    def forward(
        self,
        hidden_states: Tensor,
        gating_output: Tensor,
        topk: int,
        renormalize: bool,
        seed: Tensor | int | None = None,
        position: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Route every token to the most probable subset, or to a sample.

        Args:
            hidden_states: [T, H], not used.
            gating_output: [T, E] logits of any floating dtype; computed in float32.
            topk: K, at least the constraint's largest count.
            renormalize: whether the weights should add up to 1 (before ``scaling``).
            seed: [T] or [] int64, the seed of each token's request; for functions that sample, and only for these.
            position: [T] int64, each token's place in its request; likewise.

        Returns:
            (weights [T, K] float32, ids [T, K] int32): the chosen experts by decreasing score (equal scores by
            increasing id), then distinct experts that were not chosen, with weight 0. A token with NaN, or whose
            infinite scores leave no subset, has weights NaN.

        Raises:
            TypeError, ValueError: shapes, dtypes or devices that do not fit, ``topk`` is too small, or there are keys
                and nothing is drawn, or none and it is.
        """
        topk = self._check(hidden_states, gating_output, topk)
        if self.sampling is None:
            check_no_keys(seed, position)
        else:
            check_keys_given(seed, position)
            if not is_compiling():
                check_keys(seed, position, gating_output)
        logits, score, bad = self._scored(gating_output)
        if self.sampling is not None:
            found = self._by_sample(self.sampling, score, topk, seed, position)
        elif self.circuit.counts is not None:
            found = self._by_count(score, topk)
        else:
            found = self._of_mask(self._mode(score), score, topk)
        ids, used, possible = found
        return self._weighed(logits, ids, used, possible & ~bad, renormalize)

    def _by_count(self, score: Tensor, topk: int) -> tuple[Tensor, Tensor, Tensor]:
        """(ids [T, K], which are chosen [T, K], whether any subset is left [T]) for constraints on the count."""
        scores, order = best_scores(score, self._potential(score))
        used = torch.arange(topk, device=score.device) < best_count(scores)[:, None]
        possible = scores.amax(-1) > -math.inf
        return order[:, :topk], used & possible[:, None], possible

    def _of_mask(self, mask: Tensor, score: Tensor, topk: int) -> tuple[Tensor, Tensor, Tensor]:
        """The same of a decision [T, E] that is empty where no subset is left."""
        possible = mask.any(-1)
        if self.allows_none:  # the empty set, unless an expert is forced
            possible = possible | ~(score == math.inf).any(-1)
        ids = chosen_first(mask, score, topk)
        return ids, mask.gather(-1, ids), possible

    def _by_sample(
        self, sampling: Sampling, score: Tensor, topk: int, seed: Any, position: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same of a sample."""
        if is_exporting():
            self.require_portable()
        given = sampling.forced(score, self._mode(score)) if sampling.head else score
        return self._of_mask(sampling(given, sampling.key(seed, position)), score, topk)

    def _mode(self, score: Tensor) -> Tensor:
        if self.circuit.counts is not None:
            return mode_of_counts(score, self._potential(score))
        found: Tensor
        if transformed():
            found = transforms.mode(self.circuit, score, None)
            return found
        # On CPUs the engine is faster; elsewhere it would wait for the device, to see where there are ties.
        if self.unrolled is not None and (traced(score) or score.device.type != "cpu"):
            found = self.unrolled(score)
            return found
        if is_exporting():
            self.require_portable()
        if is_compiling():
            return ops.mode(self.circuit, score, None)
        return layered_engine(self.circuit, score.device).mode(score)

    def _potential(self, score: Tensor) -> Tensor:
        """[largest + 1] float64, of counts."""
        return torch.where(self.tables.on(score.device)["allowed"], 0.0, -math.inf).double()

    @property
    def keyed(self) -> tuple[str, ...]:
        """See :class:`ServedFunction`."""
        return () if self.sampling is None else ("seed", "position")

    def require_portable(self) -> None:
        """See :meth:`ServedFunction.require_portable`."""
        if self.portable:
            return
        many = self.sampling.products if self.sampling is not None else evaluated(self.circuit.graph).num_edges
        raise ValueError(
            f"{self.rule} has {many} products, and an exported program can have at most {unrolled.MAX_UNROLLED}: "
            "simplify the constraint, or serve it (also compiled) where circuitroute is installed"
        )

    def extra_repr(self) -> str:
        """What repr() shows."""
        if self.sampling is None:
            return super().extra_repr()
        drawn = self.sampling
        return f"{super().extra_repr()}, temperature={drawn.temperature}, head={drawn.head}, layer={drawn.layer}"


def _refuse_settings_of_samples(**settings: tuple[object, object]) -> None:
    for name, (value, default) in settings.items():
        if value is not default and value != default:
            raise ValueError(
                f"{name}={value!r}: this is of samples, and the most probable subset does not depend on it; give "
                "sample=True, or leave it out"
            )
