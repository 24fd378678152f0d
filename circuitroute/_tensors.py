"""Tensors that are not plain: the one place that knows them, and decides how they are computed on.

A tensor may stand for more than its numbers, or for none at all. Engines, which read memory, are given none of these:

- *dual* or *transformed*: inside ``torch.func`` (grad, vjp, jvp, vmap, ...), under ``forward_ad.dual_level``, or in a
  backward pass with ``is_grads_batched``. These go by :mod:`circuitroute.engines.transforms`, functions that know their
  derivatives in both modes and how to be batched.
- *traced*: in torch.compile, torch.export, torch.jit.trace, make_fx or functionalize; or without numbers, on the meta
  device or under FakeTensorMode. These go by :mod:`circuitroute.engines.ops`, operators that tracing sees as one node.
- *lazy*, such as a view that is negated when it is read, or a subclass that adds only names: made plain.
- all others (sparse, nested and quantized layouts, wrappers such as DTensor): refused, with what to do about it.

``docs/tensors.md`` has the table of what each gives.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import Parameter
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

# A static method of torch.autograd.Function.
Static: TypeAlias = Callable[..., Any]

_functorch: Any = torch._C._functorch
_Transform: Any = _functorch.TransformType
_Mode: Any = torch._C._TorchDispatchModeKey
# For functions that torch.compile is to leave alone.
untraced: Any = _disable_dynamo
# What subclasses that wrap other tensors call the way to a plain one.
_UNWRAPPERS = ("to_local", "wait", "get_data")


def plain(name: str, value: object) -> Tensor:
    """``value`` as a tensor that holds its own numbers in memory, one after another; or one that is traced.

    Args:
        name: of the argument, for messages.

    Raises:
        TypeError: it is no tensor, or one of a kind that is not computed on; says how to make a plain one.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}={value!r}: expected a tensor, got {type(value).__name__}")
    if is_compiling():
        return value
    if value.is_nested:
        raise TypeError(
            f"{name}: expected a dense tensor, got a nested one; give torch.nested.to_padded_tensor({name}, 0)"
        )
    if type(value) is not Tensor and type(value) is not Parameter:
        value = _of_subclass(name, value)
    if value.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got one of layout {value.layout}; give {name}.to_dense()")
    if value.is_quantized:
        raise TypeError(f"{name}: expected plain numbers, got a quantized {value.dtype}; give {name}.dequantize()")
    return value.resolve_neg() if value.is_neg() else value


def transformed() -> bool:
    """Whether derivatives are being taken in forward mode, or a transform of torch.func is being applied."""
    return _transformed_in_trace() if is_compiling() else _transformed()


def traced(*tensors: Tensor | None) -> bool:
    """Whether what is done with these tensors is recorded rather than done, or they have no numbers."""
    if is_compiling() or recorded(*tensors):
        return True
    for x in tensors:  # noqa: SIM110 - asked several times per call, where a generator takes longer than the answer
        if x is not None and without_numbers(x):
            return True
    return False


def recorded(*tensors: Tensor | None) -> bool:
    """Whether it is recorded, to be done again with other numbers; by anything but torch.compile."""
    if torch._C._get_tracing_state() is not None:
        return True
    if torch._C._len_torch_dispatch_stack() and any(map(torch._C._get_dispatch_mode, (_Mode.PROXY, _Mode.FUNCTIONAL))):
        return True
    levels = _functorch.get_interpreter_stack()
    if levels is not None and any(level.key() == _Transform.Functionalize for level in levels):
        return True
    for x in tensors:  # noqa: SIM110 - as above
        if x is not None and torch._is_functional_tensor(x):
            return True
    return False


def without_numbers(values: Tensor) -> bool:
    """Whether a tensor, plain otherwise, has a shape only: on the meta device, or under FakeTensorMode."""
    if values.is_meta or (type(values) is not Tensor and type(values) is not Parameter):
        return True
    return bool(torch._C._len_torch_dispatch_stack()) and torch._C._get_dispatch_mode(_Mode.FAKE) is not None


def lasting() -> bool:
    """Whether a tensor that is made now may be kept for later.

    Not in a traced program, under fake tensors, or inside torch.func's transforms: there it is of the trace or the
    transform, and must not outlive it.
    """
    if is_compiling():
        return False
    probe = torch.empty(0, device="cpu")
    return type(probe) is Tensor and not _functorch.is_functorch_wrapped_tensor(probe)


def batched() -> bool:
    """Whether a transform hides how many rows there are: torch.func.vmap, or a batch of gradients."""
    if is_compiling() or _functorch.peek_interpreter_stack() is None:
        return False
    return any(level.key() == _Transform.Vmap for level in _functorch.get_interpreter_stack())


def cannot_look(values: Tensor) -> bool:
    """Whether branching on ``values`` is out of the question: it has none, or on a GPU, for which it would wait."""
    return traced(values) or values.is_cuda or batched()


def tracked(*tensors: Tensor | None) -> bool:
    """Whether results are to be functions of these: gradients or tangents are recorded, or may be."""
    if transformed():
        return True
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    return False


def without_autocast(values: Tensor) -> AbstractContextManager[Any]:
    """What keeps the dtypes that are asked for, where ``values`` are; the meta device has no autocast."""
    if values.is_meta:
        return nullcontext()
    device = values.device.type
    # A trace may be run under autocast later. Else there is nothing to switch off, and switching takes its time.
    if not is_compiling() and not recorded(values) and not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def batchable(backward: Static) -> Static:
    """A ``backward`` of torch.autograd.Function that also takes batches of gradients (``is_grads_batched``).

    Those come in wrappers of their own kind, older than torch.func.vmap, for which functions have no rules: so they
    are handed on to the latter.
    """

    @functools.wraps(backward)
    def batched_too(ctx: Any, *upstream: Any) -> Any:
        marked = [isinstance(x, Tensor) and _functorch.is_legacy_batchedtensor(x) for x in upstream]
        if not any(marked):
            return backward(ctx, *upstream)
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        given = [torch._remove_batch_dim(x, level, 0, 0) for x, mark in zip(upstream, marked, strict=True) if mark]
        found: list[Any] = []

        def inside(*batches: Tensor) -> tuple[Tensor, ...]:
            each = iter(batches)
            results = backward(ctx, *(next(each) if mark else x for x, mark in zip(upstream, marked, strict=True)))
            found.extend(results if isinstance(results, tuple) else (results,))
            return tuple(x for x in found if x is not None)

        results = iter(torch.func.vmap(inside)(*given))
        return tuple(None if x is None else torch._add_batch_dim(next(results), 0, level) for x in found)

    return batched_too


def nestable(jvp: Static) -> Static:
    """A ``jvp`` of torch.autograd.Function that also has a derivative in forward mode.

    torch switches forward mode off around it, and so would take tangents of tangents for 0. What is kept is free of the
    tangents that are handed in here, so there is nothing to switch off.
    """

    @functools.wraps(jvp)
    def nested_too(ctx: Any, *tangents: Any) -> Any:
        with forward_ad._set_fwd_grad_enabled(True):
            return jvp(_Kept(ctx), *tangents)

    return nested_too


class _Kept:
    """A context whose tensors have no tangents of their own."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx

    @property
    def saved_tensors(self) -> tuple[Tensor | None, ...]:
        return tuple(None if x is None else forward_ad.unpack_dual(x).primal for x in self._ctx.saved_tensors)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def _transformed() -> bool:
    if forward_ad._current_level >= 0:
        return True
    levels = _functorch.get_interpreter_stack()
    if levels is None:
        return False
    kinds = {level.key() for level in levels}
    if _Transform.Functionalize in kinds and len(kinds) > 1:
        raise NotImplementedError(
            "torch.func.functionalize together with other transforms of torch.func: circuits take either, not both"
        )
    return _Transform.Functionalize not in kinds


def _transformed_in_trace() -> bool:
    """The same for torch.compile, which applies transforms while it traces; operators know how to be batched."""
    levels = _functorch.get_interpreter_stack() or ()
    return forward_ad._current_level >= 0 or any(level.key() != _Transform.Vmap for level in levels)


# What torch.compiler.assume_constant_result does, without its import of the compiler.
_transformed_in_trace._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _of_subclass(name: str, value: Tensor) -> Tensor:
    """A tensor of a subclass: traced ones as they are, those with their own numbers without the subclass."""
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    kind = type(value)
    if isinstance(value, (FakeTensor, FunctionalTensor)):
        return value
    if isinstance(value, (UninitializedParameter, UninitializedBuffer)):
        raise TypeError(f"{name} is an {kind.__name__}, without a shape yet: run the lazy module that has it once")
    if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        own = (m for m in _UNWRAPPERS if getattr(kind, m, None) is not getattr(Tensor, m, None))
        remedies = [f"{name}.{method}()" for method in own]
        remedy = f", such as {' or '.join(remedies)}" if remedies else ""
        raise TypeError(
            f"{name}: expected a plain torch.Tensor, got a {kind.__module__}.{kind.__qualname__}, which keeps its "
            f"numbers in its own way; give a plain one{remedy}"
        )
    with torch._C.DisableTorchFunctionSubclass():
        return value.as_subclass(Tensor)
