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
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import Parameter
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

Backward: TypeAlias = Callable[..., Any]

_functorch: Any = torch._C._functorch
_Transform: Any = _functorch.TransformType
# The modes under which tensors have no numbers, or in which operations are recorded rather than done.
_TRACING: tuple[Any, ...] = tuple(
    getattr(torch._C._TorchDispatchModeKey, name) for name in ("FAKE", "PROXY", "FUNCTIONAL")
)


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
    if type(value) is not Tensor and type(value) is not Parameter:
        value = _of_subclass(name, value)
    if value.layout is not torch.strided:
        raise TypeError(f"{name} has layout {value.layout}: expected a dense tensor; give {name}.to_dense()")
    if value.is_quantized:
        raise TypeError(f"{name} is quantized, {value.dtype}: expected plain numbers; give {name}.dequantize()")
    return value.resolve_neg() if value.is_neg() else value


def transformed() -> bool:
    """Whether derivatives are being taken in forward mode, or a transform of torch.func is being applied."""
    if is_compiling():
        return _transformed_in_trace()
    return _functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def traced(*tensors: Tensor | None) -> bool:
    """Whether what is done with these tensors is recorded rather than done, or they have no numbers."""
    if is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    if torch._C._len_torch_dispatch_stack() and any(map(torch._C._get_dispatch_mode, _TRACING)):
        return True
    return any(x is not None and (x.is_meta or _without_numbers(x)) for x in tensors)


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
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def batchable(backward: Backward) -> Backward:
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


def _without_numbers(value: Tensor) -> bool:
    """Of a tensor that is plain otherwise: it is fake, or records what is done with it."""
    if type(value) is not Tensor and type(value) is not Parameter:
        return True
    return bool(torch._is_functional_tensor(value))


def _transformed_in_trace() -> bool:
    """The same for torch.compile, which applies transforms while it traces."""
    return _functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


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
        remedies = [f"{name}.{method}()" for method in ("to_local", "wait", "to_padded_tensor", "get_data") if
                    hasattr(kind, method)]  # fmt: skip
        remedy = f", such as {' or '.join(remedies)}" if remedies else ""
        raise TypeError(
            f"{name} is a {kind.__module__}.{kind.__qualname__}, which keeps its numbers in its own way: give a plain "
            f"torch.Tensor{remedy}"
        )
    with torch._C.DisableTorchFunctionSubclass():
        return value.as_subclass(Tensor)
