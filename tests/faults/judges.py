"""When a cell is as it should be: judges raise AssertionError, and say what kind of answer they saw.

Legend: x the argument as it is given plainly, y the result, u an upstream gradient.
"""

from __future__ import annotations

import functools
import gc
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import circuitroute as cr
from tests.faults.entries import Entry

# Dynamo's and autograd's own errors come as RuntimeError; a refusal of the library's never does.
REFUSALS = (TypeError, ValueError)


def plain(entry: Entry, dtype: torch.dtype | None = None, grad: bool = True) -> Tensor:
    """The argument as it is meant to be given; a leaf."""
    x = entry.make()
    x = x.to(dtype) if dtype is not None and entry.role == "real" else x
    return x.requires_grad_() if grad and entry.smooth else x


@functools.cache
def _weights(shape: tuple[int, ...]) -> Tensor:
    # Kept, since nothing is drawn in a transformed function.
    return torch.randn(shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def upstream(y: Tensor) -> Tensor:
    """A fixed gradient for a result."""
    return _weights(tuple(y.shape)).to(y.dtype)


def gradient(y: Tensor, x: Tensor, u: Tensor | None = None, create_graph: bool = False) -> Tensor:
    """Of <u, y> by x; zero where it is none."""
    if not y.requires_grad:
        return torch.zeros_like(x)
    found = torch.autograd.grad(
        y, x, upstream(y) if u is None else u, retain_graph=True, create_graph=create_graph, allow_unused=True,
        materialize_grads=True,
    )  # fmt: skip
    return found[0]


def close(what: str, found: Any, expected: Tensor, loose: float = 1.0) -> None:
    """Require equality but for rounding."""
    assert isinstance(found, Tensor), f"{what}: got {type(found).__name__}"
    assert found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    if not expected.is_floating_point():
        assert torch.equal(found, expected), f"{what}: {found.tolist()}, expected {expected.tolist()}"
        return
    bound = loose * {torch.float64: 1e-9, torch.float32: 2e-5}.get(expected.dtype, 2e-2)
    a, b = found.detach().double(), expected.detach().double()
    same = torch.isclose(a, b, rtol=bound, atol=bound, equal_nan=True)
    worst, few = (
        float((a - b).abs().nan_to_num(nan=1e9).max()) if a.numel() else 0.0,
        (a.flatten()[:6], b.flatten()[:6]),
    )
    assert bool(same.all()), f"{what}: off by {worst:.3g}: {few[0].tolist()}, {few[1].tolist()}"


def value(entry: Entry, x: Tensor, given: Tensor, expected: Tensor | None = None, loose: float = 1.0) -> str:
    """The result, and its gradient by x of which ``given`` is a function, are those of plain x."""
    base = (x if expected is None else expected).detach().clone().requires_grad_(x.requires_grad)
    y0 = entry.call(base)
    y = entry.call(given)
    close("value", y, y0, loose)
    if entry.smooth and x.requires_grad:
        close("gradient", gradient(y, x, upstream(y0)), gradient(y0, base), loose)
    return "value"


def refused(entry: Entry, given: Any, remedy: str, also: str = "") -> str:
    """A TypeError or ValueError that names the argument and says what to do; ``also`` is another name of it."""
    try:
        y = entry.given(given)
    except REFUSALS as error:
        text = str(error)
        names = [entry.argument, *([also] if also else [])]
        assert any(re.search(rf"\b{name}\b", text) for name in names), f"does not name {entry.argument}: {text[:300]}"
        assert re.search(remedy, text, re.IGNORECASE), f"no remedy ({remedy}): {text[:300]}"
        return "refused"
    except Exception as error:
        raise AssertionError(f"not refused in words: {type(error).__name__}: {str(error)[:300]}") from error
    shown = y.detach().flatten()[:4].tolist() if type(y) is Tensor and y.device.type == "cpu" else type(y).__name__
    raise AssertionError(f"not refused: gave {shown}")


def forget() -> None:
    """Empty every cache of the library, so that the next call is the first."""
    cr.compilation.clear_cache()
    for name, found in list(sys.modules.items()):
        if name.startswith("circuitroute"):
            for kept in vars(found).values():
                if callable(getattr(kept, "cache_clear", None)) and isinstance(kept, functools._lru_cache_wrapper):
                    kept.cache_clear()
    gc.collect()


def shape(entry: Entry, give: Callable[[Tensor], Tensor], read: Callable[[Tensor], Tensor] = lambda x: x) -> str:
    """Shape, dtype and device of the result and of the gradient; and a real call right afterwards."""
    x = plain(entry)
    y0 = entry.call(x)
    g0 = gradient(y0, x) if entry.smooth else None
    forget()
    given = give(x.detach().clone())
    if entry.smooth:
        given.requires_grad_()
    y = entry.call(given)
    assert (y.shape, y.dtype, y.device.type) == (y0.shape, y0.dtype, given.device.type), (
        f"{tuple(y.shape)} {y.dtype} {y.device}, expected {tuple(y0.shape)} {y0.dtype}"
    )
    if g0 is not None and y0.requires_grad:
        assert y.requires_grad, "no gradient"
        (g,) = torch.autograd.grad(y.sum(), given, allow_unused=True, materialize_grads=True)
        assert (g.shape, g.dtype) == (g0.shape, g0.dtype), f"gradient {tuple(g.shape)} {g.dtype}"
    return "shape"


def still_right(entry: Entry, y0: Tensor) -> None:
    """That a plain call gives what it gave before."""
    close("a real call afterwards", entry.call(plain(entry)), y0)


# ---------------------------------------------------------------------------------------------- derivatives


def jacobian(entry: Entry, x: Tensor) -> Tensor:
    """[y..., x...] by plain reverse mode, row by row."""
    leaf = x.detach().clone().requires_grad_()
    y = entry.call(leaf)
    rows = [gradient(y, leaf, unit, create_graph=False) for unit in _units(y)] if y.requires_grad else []
    rows = rows or [torch.zeros_like(leaf) for _ in range(y.numel())]
    return torch.stack(rows).reshape(*y.shape, *x.shape)


def _units(y: Tensor) -> list[Tensor]:
    eye = torch.eye(y.numel(), dtype=y.dtype)
    return [row.reshape(y.shape) for row in eye]


def slope(entry: Entry, x: Tensor) -> Tensor:
    """The plain gradient of <u, y>."""
    leaf = x.detach().clone().requires_grad_()
    return gradient(entry.call(leaf), leaf)


def hessian(entry: Entry, x: Tensor) -> Tensor:
    """[x..., x...] of <u, y>, by plain autograd twice."""
    leaf = x.detach().clone().requires_grad_()
    once = gradient(entry.call(leaf), leaf, create_graph=True)
    rows = [gradient(once, leaf, unit) for unit in _units(once)]
    return torch.stack(rows).reshape(*x.shape, *x.shape)


def scalar(entry: Entry) -> Callable[[Tensor], Tensor]:
    """<u, y> as a function."""

    entry.call(entry.make().double())  # draws all that is drawn

    def of(x: Tensor) -> Tensor:
        y = entry.call(x)
        return (y * upstream(y)).sum()

    return of
