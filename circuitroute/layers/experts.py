"""Experts of one shape, stacked: two matrices each, applied to tokens that are sorted by expert.

Legend: S (token, expert) pairs, E experts, H hidden size, I inner size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling
from torch.nn import functional as F

from circuitroute._tensors import batchable, recorded, transformed, without_numbers
from circuitroute._validate import int_at_least, plain_word, present

Activation = Callable[[Tensor], Tensor]


def relu2(inner: Tensor) -> Tensor:
    """max(x, 0)^2, elementwise: squared ReLU, found by architecture search in Primer (So et al., 2021, section 3)."""
    return F.relu(inner).square()


# Of torch 2.10.
_GROUPED_MM: Callable[..., Tensor] | None = getattr(F, "grouped_mm", None)
# Bytes; what the kernel asks of addresses and of the length of rows.
ALIGNMENT = 16

ACTIVATIONS: dict[str, Activation] = {"gelu": F.gelu, "relu": F.relu, "relu2": relu2, "silu": F.silu}
# (upstream, x) -> upstream times the derivative at x: without the value again, which autograd would need.
DERIVATIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu": torch.ops.aten.gelu_backward,
    "relu": lambda upstream, inner: torch.ops.aten.threshold_backward(upstream, inner, 0),
    "relu2": lambda upstream, inner: F.relu(inner).mul_(2).mul_(upstream),
    "silu": torch.ops.aten.silu_backward,
}


class StackedExperts(nn.Module):
    """E two-layer perceptrons x -> down_e activation(up_e x), as two stacked parameters and one autograd node.

    Attributes:
        up: [E, I, H].
        down: [E, H, I].

    Args:
        num_experts: E.
        hidden_size: H.
        inner_size: I.
        activation: ``"gelu"``, ``"relu"``, ``"relu2"`` (squared ReLU: So et al., 2021, "Primer"), ``"silu"``, or an
            elementwise function of a tensor.

    Raises:
        ValueError: a size below 1, or an unknown activation.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        inner_size: int,
        activation: str | Activation = "gelu",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_experts = int_at_least("num_experts", num_experts, 1)
        self.hidden_size = int_at_least("hidden_size", hidden_size, 1)
        self.inner_size = int_at_least("inner_size", inner_size, 1)
        if isinstance(activation, str) and activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation!r}: choose one of {', '.join(ACTIVATIONS)}, or give a function")
        self.activation: str | Activation = plain_word(activation)
        E, H, inner = self.num_experts, self.hidden_size, self.inner_size
        self.up = nn.Parameter(torch.empty(E, inner, H, device=device, dtype=dtype))
        self.down = nn.Parameter(torch.empty(E, H, inner, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every matrix as torch.nn.Linear does."""
        for matrix in (self.up, self.down):
            bound = 1 / math.sqrt(matrix.shape[-1])
            nn.init.uniform_(matrix, -bound, bound)

    def forward(self, rows: Tensor, loads: Sequence[int]) -> Tensor:
        """[S, H] the outputs of rows [S, H] that are sorted by expert, ``loads[e]`` of them for expert e.

        Raises:
            ValueError: loads of another number of experts or rows.
        """
        if len(loads) != self.num_experts or sum(loads) != len(rows) or min(loads) < 0:
            raise ValueError(
                f"loads={list(loads)}: expected {self.num_experts} numbers of rows that add up to {len(rows)}"
            )
        if transformed() or recorded(rows):
            return self._by_expert(rows, loads)
        outputs: Tensor = _Grouped.apply(rows, self.up, self.down, list(loads), self.activation)  # type: ignore[no-untyped-call]
        return outputs

    def _by_expert(self, rows: Tensor, loads: Sequence[int]) -> Tensor:
        """The same in operations that any transform and any tracer knows."""
        activation = ACTIVATIONS[self.activation] if isinstance(self.activation, str) else self.activation
        parts = zip(rows.split(list(loads)), self.up, self.down, strict=True)
        return torch.cat([F.linear(activation(F.linear(part, up)), down) for part, up, down in parts])

    def extra_repr(self) -> str:
        """What repr() shows."""
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, inner_size={self.inner_size}, "
            f"activation={self.activation!r}"
        )


class _Groups(NamedTuple):
    """How many rows each expert has, and where they end: int32 [E] where torch's kernel is to be used, else None."""

    loads: list[int]
    ends: Tensor | None


def _groups(loads: list[int], rows: Tensor, widths: tuple[int, int]) -> _Groups:
    if not grouped_kernel(rows, widths):
        return _Groups(loads, None)
    return _Groups(loads, torch.tensor(loads, dtype=torch.int32).cumsum(0, dtype=torch.int32).to(rows.device))


def grouped_kernel(rows: Tensor, widths: tuple[int, int]) -> bool:
    """Whether torch multiplies all experts' rows in one call: ``torch.nn.functional.grouped_mm``, of torch 2.10.

    On CPUs it has the bits of a product per expert and takes a little less time, most where experts have few rows. On
    CUDA it is a launch in place of E, for bfloat16 and from compute capability 8.0 on. Everywhere rows and matrices
    must start and go on at multiples of 16 bytes. Not in programs that torch.compile traces, which know it for bfloat16
    only.

    Args:
        rows: [S, A], contiguous.
        widths: H and I.
    """
    if _GROUPED_MM is None or is_compiling() or len(rows) == 0 or without_numbers(rows) or transformed():
        return False
    if rows.is_cuda:
        known = rows.dtype == torch.bfloat16 and torch.cuda.get_device_capability(rows.device) >= (8, 0)
    else:
        known = rows.device.type == "cpu" and rows.dtype in (torch.float32, torch.bfloat16)
    return known and all(width * rows.element_size() % ALIGNMENT == 0 for width in widths)


class _Grouped(torch.autograd.Function):
    """Both layers of all experts: a matrix product per expert and layer, the activation once over all rows.

    With h = x up^T, a = act(h), y = a down^T and an upstream dy: da = dy down, ddown = dy^T a, dh = act'(h) da,
    dx = dh up, dup = dh^T x, each for the rows of its expert.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, up: Tensor, down: Tensor, loads: list[int], activation: str | Activation
    ) -> Tensor:
        if not rows.is_meta and torch.is_autocast_enabled(rows.device.type) and rows.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(rows.device.type)
            rows, up, down = rows.to(dtype), up.to(dtype), down.to(dtype)
        groups = _groups(loads, rows, (up.shape[2], up.shape[1]))
        inner = _grouped_mm(rows, up.transpose(1, 2), groups)
        active = ACTIVATIONS[activation](inner) if isinstance(activation, str) else activation(inner)
        for_rows, for_up, for_down, *_ = ctx.needs_input_grad
        deep = for_rows or for_up  # whether anything below the activation learns
        kept = ((rows, for_up), (up, for_rows), (down, deep), (inner, deep), (active, for_down))
        ctx.save_for_backward(*(value if needed else None for value, needed in kept))
        ctx.groups, ctx.activation = groups, activation
        return _grouped_mm(active, down.transpose(1, 2), groups)

    @staticmethod
    @batchable
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        rows, up, down, inner, active = ctx.saved_tensors
        for_rows, for_up, for_down, *_ = ctx.needs_input_grad
        to_rows = to_up = None
        if for_rows or for_up:
            to_inner = _through(ctx.activation, _grouped_mm(upstream, down, ctx.groups), inner)
            to_rows = _grouped_mm(to_inner, up, ctx.groups) if for_rows else None
            to_up = _grouped_outer(to_inner, rows, ctx.groups) if for_up else None
        to_down = _grouped_outer(upstream, active, ctx.groups) if for_down else None
        return to_rows, to_up, to_down, None, None


def _through(activation: str | Activation, upstream: Tensor, inner: Tensor) -> Tensor:
    """The gradient of the activation's argument: by its derivative where it is one of ours, else by autograd."""
    if isinstance(activation, str):
        return DERIVATIVES[activation](upstream, inner)
    with torch.enable_grad():
        leaf = inner.detach().requires_grad_()
        return torch.autograd.grad(activation(leaf), leaf, upstream)[0]


def _grouped_mm(rows: Tensor, matrices: Tensor, groups: _Groups) -> Tensor:
    """[S, B] the rows [S, A] of each expert times its matrix [E, A, B]."""
    loads = groups.loads
    if transformed():  # which know no results that are given
        return torch.cat([part @ matrix for part, matrix in zip(rows.split(loads), matrices, strict=True)])
    if groups.ends is not None and _aligned(rows, matrices):
        return _in_one_call(rows.contiguous(), matrices, groups.ends)
    out = rows.new_empty(len(rows), matrices.shape[-1])
    for part, matrix, result in zip(rows.split(loads), matrices, out.split(loads), strict=True):
        torch.mm(part, matrix, out=result)
    return out


def _grouped_outer(left: Tensor, right: Tensor, groups: _Groups) -> Tensor:
    """[E, A, B] the product left^T right of the rows [S, A] and [S, B] of each expert."""
    loads = groups.loads
    if transformed():
        return torch.stack([a.t() @ b for a, b in zip(left.split(loads), right.split(loads), strict=True)])
    if groups.ends is not None and _aligned(left, right):
        return _in_one_call(left.contiguous().t(), right.contiguous(), groups.ends)
    out = left.new_empty(len(loads), left.shape[-1], right.shape[-1])
    for a, b, result in zip(left.split(loads), right.split(loads), out, strict=True):
        torch.mm(a.t(), b, out=result)
    return out


def _aligned(*values: Tensor) -> bool:
    """Whether their numbers start where the kernel wants them: parameters that are mapped from a file may not.

    Those that are traced are nowhere; what is traced may begin after a call that was not.
    """
    return not is_compiling() and all(value.data_ptr() % ALIGNMENT == 0 for value in values)


def _in_one_call(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    found: Tensor = present(_GROUPED_MM, "asked for by grouped_kernel")(left, right, offs=ends)
    return found
