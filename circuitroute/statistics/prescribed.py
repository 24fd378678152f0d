"""Prescribed marginals: the maximum-entropy member of the family that has given inclusion probabilities.

Legend: T rows, N variables; t targets, theta logits, C = Cov(z).

Of all distributions over the allowed subsets with marginals t, the one of the largest entropy is p(S) ~ exp(sum of the
logits of S) for logits at which m(theta) = t (Jaynes; for fixed sizes, the conditional Poisson design of Hajek 1964 and
Chen, Dempster & Liu 1994). It is unique; logits are so up to the fixed directions, along which those returned have no
part.

    d theta = C^+ dt    on the tangent space: the implicit function theorem. C^+ the pseudo-inverse.

Its own derivative, with x = C^+ u and y = C^+ v: d <v, C^+ u> = <y, du> + <x, dv> - <y, dC x>.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from circuitroute._tensors import batched, traced, transformed, without_autocast
from circuitroute._validate import as_real
from circuitroute.compilation import compile
from circuitroute.constraints import Constraint
from circuitroute.inference.circuit import Circuit
from circuitroute.statistics import newton
from circuitroute.statistics.targets import SHOWN, Targets, check_entries, named_rows, targets_of


def logits_for_marginals(marginals: Tensor, constraint: Constraint | Circuit) -> Tensor:
    """Logits at which a constraint's distribution has the given inclusion probabilities: maximum entropy.

    ``cr.compile(constraint, N)(logits_for_marginals(t, constraint)).marginals`` is t, to 1e-10 in float64. Among all
    distributions over the allowed subsets with these marginals it is the one of the largest entropy; for
    ``Exactly(k)``, the conditional Poisson design of survey sampling.

    Args:
        marginals: [..., N] probabilities, any floating dtype. Exactly 0 forbids a variable, exactly 1 forces it.
            Solved in float64, whatever the dtype. Sums that the constraint fixes, such as k for ``Exactly(k)``, may be
            off by rounding, which is taken off: by 1e-9 in float64 and 1e-5 in float32 (2e-3 and 2e-2 in float16 and
            bfloat16), relative where the sum is above 1.
        constraint: what is allowed, or a circuit over N variables.

    Returns:
        [..., N] float32, or float64 for float64: -inf where the target is 0, +inf where it is 1, and finite elsewhere.
        Where logits are not determined, of all solutions the one of the smallest norm: for ``Exactly(k)`` the finite
        logits of a row sum to 0; for groups of fixed size those of each group do. Twice differentiable, by the
        implicit function theorem; gradients have no part along what the constraint fixes, and are 0 at 0 and 1.

    Raises:
        TypeError: marginals that are not a floating-point tensor.
        ValueError: rows that no distribution of the family has, named, with the reason: NaN or outside [0, 1]; a sum
            that the constraint does not have; a target outside of, or on the boundary of, what it allows on average.
        CircuitRouteError: the constraint does not compile, see :func:`circuitroute.compile`.
    """
    marginals = as_real("marginals", marginals, floating=True)
    if marginals.dim() == 0 or marginals.shape[-1] == 0:
        raise ValueError(
            f"marginals have shape {tuple(marginals.shape)}: the last dimension must hold the N variables, at least 1"
        )
    if batched() or transformed() or traced(marginals):
        raise NotImplementedError(
            "logits_for_marginals looks at the marginals' values, which torch.func, torch.compile and tensors without "
            "numbers do not have: call it outside; gradients and second derivatives are those of torch.autograd"
        )
    if isinstance(constraint, Circuit) and constraint.n != marginals.shape[-1]:
        raise ValueError(
            f"marginals have shape {tuple(marginals.shape)}: the last dimension must be that of {constraint!r}, "
            f"n={constraint.n}"
        )
    circuit = compile(constraint, marginals.shape[-1])
    check_entries(marginals.detach())
    with without_autocast(marginals):
        wide = marginals.double()
        flat = wide.reshape(-1, wide.shape[-1])
        names = torch.ones(wide.shape[:-1], dtype=torch.bool).nonzero()  # [T, batch dimensions], the place of every row
        parts = targets_of(circuit, flat.detach(), marginals.dtype, names)
        found = [(rows, _Prescribed.apply(flat[rows], targets, names[rows])) for rows, targets in parts]  # type: ignore[no-untyped-call]
        result = 0.0 * flat  # of no rows
        if found:
            order = torch.cat([rows for rows, _ in found]).argsort()
            result = torch.cat([logits for _, logits in found])[order]
        return result.reshape(wide.shape).to(marginals.dtype if marginals.dtype == torch.float64 else torch.float32)


def _unreached(targets: Targets, theta: Tensor, missing: Tensor, settled: Tensor, names: Tensor) -> ValueError:
    """The error of rows that Newton does not settle."""
    first = int((~settled).nonzero()[0])
    order = theta[first].abs().argsort(descending=True, stable=True)[:SHOWN].tolist()
    largest = ", ".join(
        f"{i} (target {float(targets.target[first, i]):.6g}, logit {float(theta[first, i]):.3g})" for i in order
    )
    return ValueError(
        f"marginals in {named_rows(names, ~settled)}: the logits grow without end, and miss the target by "
        f"{float(missing[first].abs().max()):.3g} (tolerance {newton.RESIDUAL:g}): it lies outside of, or on the "
        f"boundary of, what {targets.circuit.constraint!r} allows on average. Move it towards marginals of that "
        f"constraint, such as those at logits of 0; largest logits: {largest}"
    )


class _Prescribed(torch.autograd.Function):
    """The logits of targets, and the implicit derivative."""

    @staticmethod
    def forward(ctx: Any, target: Tensor, targets: Targets, names: Tensor) -> Tensor:
        theta, missing, settled = newton.solve(targets)
        if not bool(settled.all()):
            raise _unreached(targets, theta, missing, settled, names)
        logits = theta + targets.row
        ctx.targets = targets
        ctx.save_for_backward(logits)
        return logits

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (logits,) = ctx.saved_tensors
        return _Inverse.apply(logits, upstream, ctx.targets), None, None  # type: ignore[no-untyped-call]


class _Inverse(torch.autograd.Function):
    """C(theta)^+ u as a function of both."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, upstream: Tensor, targets: Targets) -> Tensor:
        x = newton.pseudo_solve(targets, torch.where(logits.isinf(), 0.0, logits), upstream)
        ctx.targets = targets
        ctx.save_for_backward(logits, x)
        return x

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        logits, x = ctx.saved_tensors
        y = _Inverse.apply(logits, upstream, ctx.targets)  # type: ignore[no-untyped-call]
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            theta = torch.where(logits.isinf(), 0.0, logits)
            theta = theta if theta.requires_grad else theta.requires_grad_()
            m = newton.distribution(ctx.targets, theta).marginals
            (image,) = torch.autograd.grad(m, theta, x, create_graph=True)
            (turned,) = torch.autograd.grad((image * y).sum(), theta, create_graph=again)
        return -torch.where(logits.isinf(), 0.0, turned), y, None
