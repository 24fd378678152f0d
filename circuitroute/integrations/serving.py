"""A constraint as the routing function of an inference server.

Legend: T tokens, E experts, K slots per token.

vLLM and SGLang let a model bring its own routing: ``custom_routing_function(hidden_states=..., gating_output=...,
topk=..., renormalize=...)`` returns weights [T, K] float32 and ids [T, K] int32. :func:`routing_function` makes one
that takes the most probable subset of every token, as the routers of this library do in evaluation mode. It is
stateless and deterministic.

It consists of plain tensor operations, so that ``torch.compile`` fuses them, CUDA graphs capture them, and
:func:`export` writes a program that runs without this library.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.export import Dim, ExportedProgram

from circuitroute._files import replace_file
from circuitroute._tensors import plain
from circuitroute._validate import as_flag, as_number, int_at_least, one_of
from circuitroute.compilation import compile as compile_constraint
from circuitroute.constraints import Constraint
from circuitroute.engines import layered_engine, ops
from circuitroute.engines.layered import evaluated
from circuitroute.engines.layered.torch.unrolled import MAX_UNROLLED, UnrolledMode, can_unroll
from circuitroute.engines.subset.mode import best_count, best_scores
from circuitroute.engines.tables import Array, Tables
from circuitroute.inference.circuit import Circuit
from circuitroute.integrations.hosted import divided_by_sum
from circuitroute.routing.decision import chosen_first
from circuitroute.routing.weights import expert_softmax

ServedCombine: TypeAlias = Literal["softmax", "normalized", "sigmoid"]
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
    device: torch.device | str | None = None,
) -> RoutingFunction:
    """The deterministic routing of a constraint, as vLLM and SGLang call it.

    Args:
        constraint: what is allowed, over ``num_experts`` variables; or a circuit, such as a loaded one.
        num_experts: E.
        combine: how chosen experts are weighted: ``"softmax"`` over all experts, or over the chosen ones if the server
            asks to renormalise; ``"normalized"`` over the chosen ones in any case; ``"sigmoid"``, divided by its sum if
            the server asks to renormalise.
        score: the choice maximises the sum of ``"logits"``, as in :func:`circuitroute.route`, or of their
            ``"sigmoid"``, as in models that add a correction bias to it (DeepSeek-V3).
        bias: [E], added to the scores for the choice only. -inf forbids an expert, +inf forces it.
        scaling: multiplies all weights.
        device: for its tables; torch's default device when None. Move it with ``.to`` like any module.

    Raises:
        InfeasibleError: no subset of E experts satisfies the constraint.
        TypeError, ValueError: an argument of the wrong kind, or a circuit over another number of experts.
    """
    experts = int_at_least("num_experts", num_experts, 1)
    circuit = compile_constraint(constraint, experts)
    combine = one_of("combine", combine, get_args(ServedCombine))
    score = one_of("score", score, get_args(Score))
    factor = _as_scaling(scaling)
    if bias is not None:
        bias = _as_bias(bias, circuit.n)
    # Of a tensor, since torch 2.6 does not tell of a default set by "with".
    place = torch.empty(0).device if device is None else torch.device(device)
    return RoutingFunction(circuit, combine, score, bias, factor).to(place)


class RoutingFunction(nn.Module):
    """``f(hidden_states, gating_output, topk, renormalize) -> (weights, ids)``; made by :func:`routing_function`.

    Attributes:
        circuit: the compiled constraint.
        portable: whether it can be exported; only circuits of more than 32,768 products cannot.
    """

    def __init__(
        self, circuit: Circuit, combine: ServedCombine, score: Score, bias: Tensor | None, scaling: float
    ) -> None:
        super().__init__()
        self.circuit = circuit
        self.combine, self.score, self.scaling = combine, score, scaling
        self.largest, self.rule = circuit.max_count, repr(circuit.constraint)  # not looked up where it may be traced
        self.unrolled: UnrolledMode | None = None
        self.allows_none = False
        tables: dict[str, Array] = {} if bias is None else {"bias": bias.numpy(force=True)}
        if circuit.counts is not None:
            tables["allowed"] = np.isin(np.arange(self.largest + 1), circuit.counts)
        else:
            self.allows_none = bool(circuit.satisfies(torch.zeros(circuit.n, dtype=torch.bool, device="cpu")))
            graph = evaluated(circuit.graph)  # as in the engines: the order of additions is the same
            self.unrolled = UnrolledMode(graph) if can_unroll(graph) else None
        self.portable = circuit.counts is not None or self.unrolled is not None
        self.biased = bias is not None
        self.tables = Tables(tables)
        # Nothing, in the place where tables are to be: it moves with the module.
        self.register_buffer("place", torch.empty(0, device="cpu"), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RoutingFunction:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for tables in (self.tables, *([] if self.unrolled is None else [self.unrolled.tables])):
            tables.prepare(self.get_buffer("place").device)
        return self

    def forward(
        self, hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool
    ) -> tuple[Tensor, Tensor]:
        """Route every token to the most probable subset.

        Args:
            hidden_states: [T, H], not used.
            gating_output: [T, E] logits of any floating dtype; computed in float32.
            topk: K, at least the constraint's largest count.
            renormalize: whether the weights should add up to 1 (before ``scaling``).

        Returns:
            (weights [T, K] float32, ids [T, K] int32): the chosen experts by decreasing score (equal scores by
            increasing id), then distinct experts that were not chosen, with weight 0. A token with NaN, or whose
            infinite scores leave no subset, has weights NaN.

        Raises:
            TypeError, ValueError: shapes, dtypes or devices that do not fit, or ``topk`` is too small.
        """
        topk = self._check(hidden_states, gating_output, topk)
        logits = gating_output.detach().to(torch.float32)
        score = torch.sigmoid(logits) if self.score == "sigmoid" else logits
        if self.biased:
            score = score + self.tables.on(score.device)["bias"]
        bad = score.isnan().any(-1)
        score = torch.where(bad[:, None], 0.0, score)
        if self.circuit.counts is not None:
            ids, used, possible = self._by_count(score, topk)
        else:
            ids, used, possible = self._by_circuit(score, topk)
        weights = torch.where(used, self._weigh(logits, ids, used, renormalize), 0.0) * self.scaling
        return torch.where((possible & ~bad)[:, None], weights, math.nan), ids.to(torch.int32)

    def _by_count(self, score: Tensor, topk: int) -> tuple[Tensor, Tensor, Tensor]:
        """(ids [T, K], which are chosen [T, K], whether any subset is left [T]) for constraints on the count."""
        potential = torch.where(self.tables.on(score.device)["allowed"], 0.0, -math.inf).double()
        scores, order = best_scores(score, potential)
        used = torch.arange(topk, device=score.device) < best_count(scores)[:, None]
        possible = scores.amax(-1) > -math.inf
        return order[:, :topk], used & possible[:, None], possible

    def _by_circuit(self, score: Tensor, topk: int) -> tuple[Tensor, Tensor, Tensor]:
        """The same for all other constraints."""
        mask = self._mode(score)
        possible = mask.any(-1)
        if self.allows_none:  # the empty set, unless an expert is forced
            possible = possible | ~(score == math.inf).any(-1)
        ids = chosen_first(mask, score, topk)
        return ids, mask.gather(-1, ids), possible

    def _mode(self, score: Tensor) -> Tensor:
        if self.unrolled is not None:
            found: Tensor = self.unrolled(score)
            return found
        if is_exporting():
            raise ValueError(_not_portable(self.circuit))
        if is_compiling():
            return ops.mode(self.circuit, score, None)
        return layered_engine(self.circuit, score.device).mode(score)

    def _weigh(self, logits: Tensor, ids: Tensor, used: Tensor, renormalize: bool) -> Tensor:
        """[T, K] the weights of the used slots, before scaling."""
        chosen = logits.gather(-1, ids)
        if self.combine == "sigmoid":
            weights = torch.where(used, torch.sigmoid(chosen), 0.0)
            return divided_by_sum(weights) if renormalize else weights
        if self.combine == "softmax" and not renormalize:
            return expert_softmax(logits).gather(-1, ids)
        # Not from the softmax over all experts, which may be too small for float32 on all chosen ones.
        chosen = chosen.clamp(max=torch.finfo(torch.float32).max)
        return torch.softmax(torch.where(used, chosen, -math.inf), -1)

    def _check(self, hidden_states: Tensor, gating_output: Tensor, topk: int) -> int:
        """``topk``, as a plain integer."""
        if not is_compiling():
            _check_tensors(hidden_states, gating_output, self.circuit.n)
            place = self.get_buffer("place").device
            # A place of no memory is that of a function whose model was made there, and filled by assignment.
            if place not in (gating_output.device, torch.device("meta")):
                raise ValueError(
                    f"gating_output is on {gating_output.device} and the routing function on {place}: move "
                    f"it there with .to({str(gating_output.device)!r}), once"
                )
            topk = int_at_least("topk", topk, 1)
        if topk < self.largest:
            raise ValueError(
                f"topk={topk}: {self.rule} chooses up to {self.largest} experts per token; give the "
                f"server topk={self.largest} (num_experts_per_tok in most models' configurations)"
            )
        if topk > self.circuit.n:
            raise ValueError(f"topk={topk}: there are only {self.circuit.n} experts")
        return topk

    def extra_repr(self) -> str:
        """What repr() shows."""
        return (
            f"{self.circuit.constraint!r}, num_experts={self.circuit.n}, combine={self.combine!r}, "
            f"score={self.score!r}, scaling={self.scaling}"
        )


def export(
    function: RoutingFunction,
    path: str | os.PathLike[str] | None = None,
    *,
    topk: int,
    renormalize: bool,
    dtype: torch.dtype = torch.float32,
) -> ExportedProgram:
    """The function as a program of torch's own operators, for any number of tokens.

    Call ``torch.export.load(path).module()`` like the function, with all four arguments by name. It needs torch in this
    version or later, but not this library.

    Args:
        function: made by :func:`routing_function`, on the device that the program is for.
        path: the file to write, usually ``*.pt2``; an existing one is replaced atomically. None writes no file.
        topk, renormalize: become constants; the program refuses other values.
        dtype: of hidden states and gating output.

    Raises:
        ValueError: the circuit is too large to be unrolled, ``topk`` does not fit, or the function is on the meta
            device.
        OSError: the file cannot be written.
    """
    if not function.portable:
        raise ValueError(_not_portable(function.circuit))
    topk, renormalize = int_at_least("topk", topk, 1), as_flag("renormalize", renormalize)
    device = function.get_buffer("place").device
    if device.type == "meta":
        raise ValueError("function is on the meta device: move it to the program's with .to_empty(device='cpu')")
    # torch 2.6 refuses an open range, for a guard against the largest integer.
    tokens, hidden_size = Dim("tokens", max=2**31), Dim("hidden_size", max=2**31)
    program = torch.export.export(
        function,
        (),
        {
            "hidden_states": torch.zeros(3, 2, dtype=dtype, device=device),
            "gating_output": torch.zeros(3, function.circuit.n, dtype=dtype, device=device),
            "topk": topk,
            "renormalize": renormalize,
        },
        dynamic_shapes={
            "hidden_states": {0: tokens, 1: hidden_size},
            "gating_output": {0: tokens},
            "topk": None,
            "renormalize": None,
        },
        strict=False,
    )
    if path is not None:
        content = io.BytesIO()
        torch.export.save(program, content)
        replace_file(path, content.getvalue())
    return program


def _as_scaling(scaling: object) -> float:
    try:
        factor = as_number("scaling", scaling)
    except TypeError:
        factor = math.nan
    if not math.isfinite(factor):
        raise ValueError(f"scaling={scaling!r}: expected a finite number")
    return factor


def _as_bias(bias: Tensor, num_experts: int) -> Tensor:
    """[E] float32, a copy."""
    if not isinstance(bias, Tensor) or bias.shape != (num_experts,):
        given = f"has shape {tuple(bias.shape)}" if isinstance(bias, Tensor) else f"is a {type(bias).__name__}"
        raise ValueError(f"bias {given}: expected a tensor of shape ({num_experts},), one number per expert")
    if bias.is_meta:
        raise ValueError("bias is on the meta device, where it holds nothing: make it on the CPU")
    if bool(bias.isnan().any()):
        raise ValueError("bias holds NaN")
    return bias.detach().to(torch.float32, copy=True)


def _check_tensors(hidden_states: Tensor, gating_output: Tensor, num_experts: int) -> None:
    if not isinstance(gating_output, Tensor) or not gating_output.is_floating_point():
        kind = gating_output.dtype if isinstance(gating_output, Tensor) else type(gating_output).__name__
        raise TypeError(f"gating_output is {kind}: expected a floating-point tensor of logits")
    plain("gating_output", gating_output)
    if gating_output.dim() != 2 or gating_output.shape[1] != num_experts:
        raise ValueError(
            f"gating_output has shape {tuple(gating_output.shape)}: expected [tokens, num_experts={num_experts}]"
        )
    if isinstance(hidden_states, Tensor) and len(hidden_states) != len(gating_output):
        raise ValueError(
            f"hidden_states have shape {tuple(hidden_states.shape)} and gating_output {tuple(gating_output.shape)}: "
            "they must have the same number of tokens"
        )


def _not_portable(circuit: Circuit) -> str:
    return (
        f"{circuit.constraint!r} has {evaluated(circuit.graph).num_edges} products, and an exported program can have "
        f"at most {MAX_UNROLLED}: simplify the constraint, or serve it (also compiled) where circuitroute is installed"
    )
