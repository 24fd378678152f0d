"""Moments and their derivatives of every order, in both modes of differentiation, one function of another.

Legend: T tokens, N variables, J = K + 1 counts. Everything below is per token.

**The functions.** Let F(x) = log Z at x = (theta, phi), the logits and the count potential. A sweep gives F and its
gradient, m = dF / dtheta (the marginals) and q = dF / dphi (the count posterior). Two functions of autograd say all
that there is to differentiate:

    Moments     x -> (F, grad F)
    Derivative  (x, d_1, ..., d_k) -> D_k = d/de_1 ... d/de_k grad F(x + e_1 d_1 + ... + e_k d_k) at e = 0

with directions d_i = (u_i, v_i) in the space of x. D_0 is grad F itself; D_1 = H d_1, with H the second derivative
of F, whose block d m / d theta is the covariance of the variables.

**The derivative.** Since F is smooth, D_k is the gradient of a form that is symmetric in its k directions, and linear
in each. So both ways of differentiating lead to the same family of functions. For upstream gradients w of F and a of
grad F, or of D_k; and for tangents x' and d_i':

    backward    Moments      by x    w grad F + D_1(a)
                Derivative   by x    D_(k+1)(d_1, ..., d_k, a)        by d_i    D_k with a in place of d_i
    forward     Moments      F' = <grad F, x'>,  (grad F)' = D_1(x')
                Derivative   D_(k+1)(d_1, ..., d_k, x') + sum over i of D_k with d_i' in place of d_i

D_1 is a sweep in forward mode, on dual numbers, in the memory of a sweep and without a matrix: an engine supplies it as
``second_derivative``. From D_2 on, which training does not need, autograd goes through the naive engine. A circuit that
is no count constraint, but whose root tells counts apart, has a potential too, of 0, that nobody gives: directions v in
it are what reaches its count posterior.

**Batches** (torch.func.vmap, ``is_grads_batched``). All of this is by row, so a batch of calls is one on more rows.

**Evidence.** An infinite logit conditions F on its variable and is not an argument of it: its gradient is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from circuitroute._tensors import batchable, cannot_look, nestable, traced, transformed
from circuitroute.engines.base import Engine, Inference, certainly_finite

# A direction in the space of (logits, potential); None stands for zero.
Direction: TypeAlias = tuple[Tensor | None, Tensor | None]
# Shift, fallback and count posterior ([T, J or 0]) of a sweep: how it was done, and what need not be found again.
Marks: TypeAlias = Sequence[Tensor]
NaiveMoments: TypeAlias = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor | None]]

# Log Z, marginals, count posterior [T, J or 0]; then shift, log root, mask (empty without keys) and fallback.
Found: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class Source(Protocol):
    """Where the values of both functions come from: an engine (:class:`Direct`), or an operator."""

    def infer(self, logits_TN: Tensor, potential: Tensor | None, key_T: Tensor | None) -> Inference:
        """Moments."""
        ...

    def derivative(
        self, logits_TN: Tensor, potential: Tensor | None, marks: Marks, directions: Sequence[Direction]
    ) -> tuple[Tensor, Tensor | None]:
        """D_k of k = 1, 2, ... directions, 0 where there is evidence."""
        ...


@dataclass(frozen=True)
class Direct:
    """The values from an engine."""

    engine: Engine

    def infer(self, logits_TN: Tensor, potential: Tensor | None, key_T: Tensor | None) -> Inference:
        """See :class:`Source`."""
        return self.engine.infer(logits_TN, potential, key_T)

    def derivative(
        self, logits_TN: Tensor, potential: Tensor | None, marks: Marks, directions: Sequence[Direction]
    ) -> tuple[Tensor, Tensor | None]:
        """See :class:`Source`: a sweep for one direction, and autograd through the naive engine for more."""
        if len(directions) == 1:
            shift, fallback, counts = marks
            ((u, v),) = directions
            posterior = counts if counts.shape[-1] else None
            known = Inference(shift, logits_TN, posterior, shift, shift, None, fallback)
            u = torch.zeros_like(logits_TN) if u is None else u
            by_logits, by_potential = self.engine.second_derivative(logits_TN, potential, known, u, v)
        else:
            by_logits, by_potential = naive_derivative(self.engine.naive_moments, logits_TN, potential, directions)
        return _without_evidence(by_logits, logits_TN), by_potential


def naive_derivative(
    moments: NaiveMoments, logits_TN: Tensor, potential: Tensor | None, directions: Sequence[Direction]
) -> tuple[Tensor, Tensor | None]:
    """The values of D_k, through moments that are a graph: the gradient of the moments along each direction in turn."""
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [logits_TN.detach().clone().requires_grad_()]
        if potential is not None:
            leaves.append(potential.detach().expand(len(logits_TN), -1).clone().requires_grad_())
        log_partition, m, q = moments(leaves[0], leaves[1] if len(leaves) > 1 else None)
        found: list[Tensor] = [x for x in (m, q) if x is not None]
        if potential is None and q is not None:
            # The potential that nobody gives: at phi, Z would be the sum over j of q_j e^phi_j times what it is.
            leaves.append(torch.zeros_like(q).requires_grad_())
            log_partition = log_partition + (q * leaves[1].exp()).sum(-1).log()
            found = list(torch.autograd.grad(log_partition.sum(), leaves, create_graph=True))
        for i, direction in enumerate(directions):
            both = [(x, d) for x, d in zip(found, direction, strict=False) if d is not None]
            pairs = [(x, d.to(x.dtype)) for x, d in both if x.requires_grad]
            if not pairs:
                found = [torch.zeros_like(leaf) for leaf in leaves]
                break
            outputs, upstream = [x for x, _ in pairs], [d for _, d in pairs]
            again = i + 1 < len(directions)
            found = list(torch.autograd.grad(outputs, leaves, upstream, create_graph=again, materialize_grads=True))
    return found[0].detach(), found[1].detach() if len(leaves) > 1 else None


def attach(
    engine: Engine, inference: Inference, logits_TN: Tensor, potential: Tensor | None, finite: bool = False
) -> Inference:
    """The same results as functions of logits and potential; see :meth:`circuitroute.engines.base.Engine.attach`."""
    if transformed():
        given = (logits_TN, potential, None, Direct(engine), inference)
        log_partition, marginals, counts, *_ = Moments.apply(*given)  # type: ignore[no-untyped-call]
        counts = None if inference.count_probs is None else counts
    else:
        known = (logits_TN, potential, Direct(engine), inference, finite)
        log_partition, marginals, counts = Attached.apply(*known)  # type: ignore[no-untyped-call]
    return replace(
        inference, log_partition=log_partition, marginals=marginals, count_probs=counts
    )  # an engine's own kind


def inference_of(found: Found, sampled: bool) -> Inference:
    """The parts under their names; what is empty is not there."""
    log_partition, marginals, counts, shift, log_root, mask, fallback = found
    posterior, drawn = counts if counts.shape[-1] else None, mask if sampled else None
    return Inference(log_partition, marginals, posterior, shift, log_root, drawn, fallback)


def parts_of(found: Inference) -> Found:
    """The parts as tensors; empty for what is not there."""
    like = found.marginals
    counts, fallback = _as_tensors(like, found.count_probs, found.fallback)
    mask = like.new_empty(0, dtype=torch.bool) if found.mask is None else found.mask
    return found.log_partition, found.marginals, counts, found.shift, found.log_root, mask, fallback


def _as_tensors(like: Tensor, counts: Tensor | None, fallback: Tensor | None) -> tuple[Tensor, Tensor]:
    """Count posterior and fallback."""
    counts = like.new_empty(len(like), 0) if counts is None else counts
    fallback = like.new_zeros(len(like), dtype=torch.bool) if fallback is None else fallback
    return counts, fallback


# ---------------------------------------------------------------------------------------------- the functions


class Moments(torch.autograd.Function):
    """(logits, potential, key) -> :data:`Found`, by a sweep, or known already."""

    @staticmethod
    def forward(
        logits_TN: Tensor, potential: Tensor | None, key_T: Tensor | None, source: Source, known: Inference | None
    ) -> Found:
        """``known`` is None where nothing is."""
        if known is None:
            return parts_of(source.infer(logits_TN, potential, key_T))
        return tuple(x.detach() for x in parts_of(known))  # type: ignore[return-value]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Found) -> None:
        """Kept: the inputs, and of what was found all that derivatives are made of."""
        logits, potential, _, ctx.source, _ = inputs
        _, marginals, counts, shift, log_root, mask, fallback = output
        ctx.mark_non_differentiable(shift, log_root, mask, fallback)
        _keep(ctx, logits, potential, marginals, shift, fallback, counts)

    @staticmethod
    @batchable
    def backward(
        ctx: Any, w_T: Tensor | None, u_TN: Tensor | None, v_TJ: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        """See :func:`_moments_backward`."""
        return *_moments_backward(ctx, False, w_T, u_TN, v_TJ), None, None, None

    @staticmethod
    @nestable
    def jvp(ctx: Any, x_TN: Tensor | None, phi: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        """(<grad F, x'>, D_1(x'))."""
        logits, potential, marginals, *marks = ctx.saved_tensors
        direction = _tangent(x_TN, phi, logits)
        dm, dq = derivative(ctx.source, logits, potential, marks, [direction])
        slope = torch.zeros_like(marginals[:, 0])
        for along, by in zip(direction, (marginals, marks[-1]), strict=True):
            slope = slope if along is None else slope + (along * by).sum(-1)
        return slope, dm, torch.zeros_like(marks[-1]) if dq is None else dq, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Found, tuple[int, ...]]:
        """One call on more rows."""
        logits, potential, key, source, _ = inputs
        rows = Batch(info.batch_size, in_dims[0], logits)
        given = (rows(logits, in_dims[0]), rows(potential, in_dims[1], shared=True), rows(key, in_dims[2]))
        found = Moments.apply(*given, source, None)  # type: ignore[no-untyped-call]
        return tuple(map(rows.apart, found)), (0,) * len(found)  # type: ignore[return-value]


class Attached(torch.autograd.Function):
    """(logits, potential) -> (log Z, marginals, count posterior or None), known already; of plain tensors.

    :class:`Moments` without what transforms need. Torch inspects the signature of functions that provide for these at
    each call, which takes longer than a small sweep.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_TN: Tensor, potential: Tensor | None, source: Source, known: Inference, finite: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Kept is what :class:`Moments` keeps, and whether the logits are known to be ``finite``."""
        log_partition, marginals = known.log_partition.detach(), known.marginals.detach()
        counts = None if known.count_probs is None else known.count_probs.detach()
        ctx.source, ctx.finite = source, finite
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits_TN, potential, marginals, known.shift, known.fallback, counts)
        return log_partition, marginals, counts

    @staticmethod
    @batchable
    def backward(ctx: Any, w_T: Tensor | None, u_TN: Tensor | None, v_TJ: Tensor | None) -> tuple[Tensor | None, ...]:
        """See :func:`_moments_backward`."""
        return *_moments_backward(ctx, ctx.finite, w_T, u_TN, v_TJ), None, None, None


def _moments_backward(
    ctx: Any, finite: bool, w_T: Tensor | None, u_TN: Tensor | None, v_TJ: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """w grad F + D_1(u, v), by logits and by potential, for those that need it."""
    logits, potential, marginals, shift, fallback, counts = ctx.saved_tensors
    of_logits, of_potential = ctx.needs_input_grad[:2]
    upstream = _along(u_TN, v_TJ)
    by_logits = by_potential = None
    if upstream != (None, None):
        posterior, by_naive = _as_tensors(marginals, counts, fallback)
        marks = (shift, by_naive, posterior)
        by_logits, by_potential = derivative(ctx.source, logits, potential, marks, [upstream])
    if w_T is not None and of_logits:
        slope = marginals if finite else _without_evidence(marginals, logits)
        by_logits = _plus(by_logits, slope, w_T)
    if w_T is not None and of_potential:
        by_potential = _plus(by_potential, counts, w_T)
    return _wanted((of_logits, of_potential), by_logits, by_potential, potential)


class Derivative(torch.autograd.Function):
    """(logits, potential, *marks, u_1, v_1, ..., u_k, v_k) -> D_k, [T, N] and [T, J or 0]."""

    @staticmethod
    def forward(source: Source, logits_TN: Tensor, potential: Tensor | None, *rest: Tensor) -> tuple[Tensor, Tensor]:
        """At least one direction."""
        marks, directions = _pairs(rest)
        by_logits, by_potential = source.derivative(logits_TN, potential, marks, directions)
        return by_logits, logits_TN.new_empty(len(logits_TN), 0) if by_potential is None else by_potential

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        """Kept: the inputs."""
        ctx.source, *tensors = inputs
        ctx.counts = output[1].shape[-1]
        _keep(ctx, *tensors)

    @staticmethod
    @batchable
    def backward(ctx: Any, a_TN: Tensor | None, b_TJ: Tensor | None) -> tuple[Tensor | None, ...]:
        """D_(k+1) by x, and D_k by the directions, each along the upstream gradient."""
        logits, potential, *rest = ctx.saved_tensors
        marks, directions = _pairs(rest)
        upstream, (_, *of_point), of_directions = _along(a_TN, b_TJ), ctx.needs_input_grad[:3], ctx.needs_input_grad[6:]
        if upstream == (None, None):
            return (None,) * len(ctx.needs_input_grad)
        by_logits = by_potential = None
        if any(of_point):
            by_logits, by_potential = derivative(ctx.source, logits, potential, marks, [*directions, upstream])
        by_directions: list[Tensor | None] = []
        for i, wanted in enumerate(zip(of_directions[::2], of_directions[1::2], strict=True)):
            found: Direction = (None, None)
            if any(wanted):
                found = derivative(ctx.source, logits, potential, marks, _replaced(directions, i, upstream))
            by_directions += [x if want else None for x, want in zip(found, wanted, strict=True)]
        return None, *_wanted(of_point, by_logits, by_potential, potential), None, None, None, *by_directions

    @staticmethod
    @nestable
    def jvp(ctx: Any, _: None, x_TN: Tensor | None, phi: Tensor | None, *rest: Tensor | None) -> tuple[Tensor, Tensor]:
        """D_(k+1) along x', and D_k along the tangents of the directions."""
        logits, potential, *kept = ctx.saved_tensors
        marks, directions = _pairs(kept)
        moves = list(zip(rest[3::2], rest[4::2], strict=True))
        terms = [_replaced(directions, i, move) for i, move in enumerate(moves) if move != (None, None)]
        if (x_TN, phi) != (None, None):
            terms.append([*directions, _tangent(x_TN, phi, logits)])
        dm, dq = torch.zeros_like(logits), logits.new_zeros(len(logits), ctx.counts)
        for term in terms:
            by_logits, by_potential = derivative(ctx.source, logits, potential, marks, term)
            dm, dq = dm + by_logits, dq if by_potential is None else dq + by_potential
        return dm, dq

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """One call on more rows."""
        source, logits, potential, *others = inputs
        _, of_logits, of_potential, *dims = in_dims
        rows = Batch(info.batch_size, of_logits, logits)
        given = (rows(logits, of_logits), rows(potential, of_potential, shared=True))
        rest = [rows(x, dim) for x, dim in zip(others, dims, strict=True)]
        found = Derivative.apply(source, *given, *rest)  # type: ignore[no-untyped-call]
        return tuple(map(rows.apart, found)), (0, 0)


def derivative(
    source: Source, logits_TN: Tensor, potential: Tensor | None, marks: Marks, directions: Sequence[Direction]
) -> tuple[Tensor, Tensor | None]:
    """D_k along the directions, itself differentiable where derivatives are recorded."""
    recorded = transformed() or (torch.is_grad_enabled() and not traced(logits_TN))
    if not recorded:
        return source.derivative(logits_TN, potential, marks, directions)
    flat = [x for pair in directions for x in pair]
    by_logits, by_potential = Derivative.apply(source, logits_TN, potential, *marks, *flat)  # type: ignore[no-untyped-call]
    return by_logits, by_potential if by_potential.shape[-1] else None


# ---------------------------------------------------------------------------------------------- their parts


class Batch:
    """A batch of calls as one on more rows: inputs [B, T, ...] to [B * T, ...], and outputs back.

    What torch.func.vmap says of a call, ``info`` and ``in_dims``, is made one of these.

    Args:
        size: B.
        dim: which dimension of the logits is the batch; None if they are the same for all.
    """

    def __init__(self, size: int, dim: int | None, logits: Tensor) -> None:
        self.size = size
        self.tokens = logits.shape[0] if dim is None else logits.movedim(dim, 0).shape[1]

    def __call__(self, value: Tensor | None, dim: int | None, shared: bool = False) -> Tensor | None:
        """An input by row; or, with ``shared``, one that may be [J] for all rows."""
        if value is None or (dim is None and shared and value.dim() == 1):
            return value
        value = value.expand(self.size, *value.shape) if dim is None else value.movedim(dim, 0)
        if shared and value.dim() == 2:
            value = value[:, None].expand(-1, self.tokens, -1)
        return value.reshape(self.size * self.tokens, *value.shape[2:])

    def apart(self, value: Tensor) -> Tensor:
        """An output by row, as a batch; one that is empty because nobody wants it stays so."""
        if value.shape[0] != self.size * self.tokens:
            return value.expand(self.size, *value.shape)
        return value.reshape(self.size, self.tokens, *value.shape[1:])


def _keep(ctx: Any, *tensors: Tensor | None) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)
    if transformed():  # only then is it asked for, and results that are kept so keep themselves alive
        ctx.save_for_forward(*tensors)


def _pairs(rest: Sequence[Any]) -> tuple[Marks, list[Direction]]:
    """Marks and directions from one list."""
    shift, fallback, counts, *flat = rest
    return (shift, fallback, counts), list(zip(flat[::2], flat[1::2], strict=True))


def _replaced(directions: list[Direction], i: int, direction: Direction) -> list[Direction]:
    return [*directions[:i], direction, *directions[i + 1 :]]


def _along(u_TN: Tensor | None, v_TJ: Tensor | None) -> Direction:
    """An upstream gradient as a direction; there is none in counts that are not told apart."""
    return u_TN, v_TJ if v_TJ is not None and v_TJ.shape[-1] else None


def _tangent(x_TN: Tensor | None, phi: Tensor | None, logits_TN: Tensor) -> Direction:
    """A tangent as a direction: none along evidence, and that of a potential of all rows for each of them."""
    x_TN = None if x_TN is None else _without_evidence(x_TN, logits_TN)
    return x_TN, phi.expand(len(logits_TN), -1) if phi is not None and phi.dim() == 1 else phi


def _wanted(
    needed: Sequence[bool], by_logits: Tensor | None, by_potential: Tensor | None, potential: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of logits and potential, if they are needed; that of a potential of all rows is their sum."""
    if by_potential is not None and potential is not None and potential.dim() == 1:
        by_potential = by_potential.sum(0)
    return by_logits if needed[0] else None, by_potential if needed[1] else None


def _plus(total: Tensor | None, values: Tensor, w_T: Tensor) -> Tensor:
    """total + w values."""
    return values * w_T[:, None] if total is None else torch.addcmul(total, values, w_T[:, None])


def _without_evidence(gradient: Tensor, logits_TN: Tensor) -> Tensor:
    # Where values cannot be looked at, it is not known that there is none.
    if not cannot_look(logits_TN) and certainly_finite(logits_TN):
        return gradient
    return torch.where(torch.isinf(logits_TN), 0.0, gradient)
