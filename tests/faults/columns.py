"""How the argument is given, and what is expected of it.

A column is a function of an entry that returns "value", "refused" or "shape", None where the column means nothing for
the entry, and raises AssertionError otherwise.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tests.faults import judges
from tests.faults.entries import E, Entry, frozen
from tests.faults.judges import close, gradient, jacobian, plain, refused, shape, still_right, value

Column: TypeAlias = Callable[[Entry], "str | None"]
COLUMNS: dict[str, Column] = {}
# Not in the sample of the ordinary run: seconds each.
SLOW: set[str] = set()

OPTIONAL = {"include", "key", "temperature", "price", "bias", "count_potential", "replay", "estimates"}
OPTIONAL |= {"experts", "estimate", "known", "mixture_logits"}
WRAPPED = r"to_local|full_tensor|give a plain one"


def column(name: str, slow: bool = False) -> Callable[[Column], Column]:
    def add(judge: Column) -> Column:
        COLUMNS[name] = judge
        if slow:
            SLOW.add(name)
        return judge

    return add


# ---------------------------------------------------------------------------------------------- dtypes

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn)
OTHERS = (torch.bool, torch.uint8, torch.int64, torch.complex64)


# Where numbers of other kinds have one meaning only, they may be taken for it; logits are refused.
STRICT = {"logits", "gating_output"}


def _dtype(entry: Entry, dtype: torch.dtype) -> str | None:
    if entry.role == "real":
        if "MoE" in entry.name and dtype not in (torch.float32, torch.complex64):
            return None  # experts are of one dtype, and say so themselves
        given = entry.make().to(dtype)
        if entry.argument == "hidden" and entry.python:
            return None  # integers may leave nothing to calibrate
        if dtype in (torch.bool, torch.uint8, torch.int64, torch.float8_e4m3fn):
            return value_or_refused(entry, given) if may_be_taken(entry, dtype) else refused(entry, given, "float|real")
        if dtype not in FLOATS:
            return refused(entry, given, "float|real")
        y0, y = entry.call(given if dtype == torch.float64 else given.float()), entry.call(given)
        close("value", y.to(given.dtype), y0.to(given.dtype))
        return "value"
    if entry.role in ("mask", "bool mask"):
        if dtype.is_complex or (entry.role == "bool mask" and dtype != torch.bool):
            return refused(entry, entry.make().to(dtype), "bool|0 or 1|expected")
        if entry.argument == "include" and dtype in (torch.uint8, torch.int64):
            return None  # those are indices
        close("value", entry.call(entry.make().to(dtype)), entry.call(entry.make()))
        return "value"
    if dtype in (torch.uint8, torch.int64):
        close("value", entry.call(entry.make().to(dtype)), entry.call(entry.make()))
        return "value"
    return refused(entry, entry.make().to(dtype), "integer")


def may_be_taken(entry: Entry, dtype: torch.dtype) -> bool:
    """Whether such numbers may be taken for real ones."""
    return entry.argument not in STRICT or dtype == torch.float8_e4m3fn


def value_or_refused(entry: Entry, given: Tensor) -> str:
    """What float32 gives, or a refusal that names the argument."""
    try:
        y = entry.call(given)
    except judges.REFUSALS:
        return refused(entry, given, "")
    close("value", y, entry.call(given.float()).to(y.dtype))
    return "value"


for _each in (*FLOATS, *OTHERS):
    COLUMNS[f"dtype {str(_each).removeprefix('torch.')}"] = partial(_dtype, dtype=_each)


# ---------------------------------------------------------------------------------------------- layouts


@column("layout strided")
def _(entry: Entry) -> str | None:
    x = plain(entry)
    return None if x.dim() == 0 else value(entry, x, torch.stack([x, x], -1)[..., 0])


@column("layout transposed")
def _(entry: Entry) -> str | None:
    x = plain(entry)
    return None if x.dim() < 2 else value(entry, x, x.transpose(0, 1).contiguous().transpose(0, 1))


@column("layout expanded")
def _(entry: Entry) -> str | None:
    x = plain(entry)
    if x.dim() < 2 or entry.role != "real":
        return None
    y0 = entry.call(x[:1].repeat(len(x), *[1] * (x.dim() - 1)))
    y = entry.call(x[:1].expand(x.shape))
    close("value", y, y0)
    if entry.smooth:
        close("gradient", gradient(y, x), gradient(y0, x))
    return "value"


@column("layout lazily negated")
def _(entry: Entry) -> str | None:
    x = plain(entry)
    return None if x.dtype == torch.bool else value(entry, x, torch._neg_view(-x))


@column("layout lazily conjugated")
def _(entry: Entry) -> str | None:
    return refused(entry, entry.make().to(torch.complex64).conj(), "float|real|integer|bool|expected")


@column("layout sparse_coo")
def _(entry: Entry) -> str | None:
    return None if entry.make().dim() == 0 else refused(entry, entry.make().to_sparse(), "dense")


@column("layout sparse_csr")
def _(entry: Entry) -> str | None:
    if entry.make().dim() != 2:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = entry.make().to_sparse_csr()
    return refused(entry, given, "dense")


@column("layout mkldnn")
def _(entry: Entry) -> str | None:
    if entry.role != "real" or entry.make().dim() == 0:
        return None
    return refused(entry, entry.make().to_mkldnn(), "dense")


@column("layout nested jagged")
def _(entry: Entry) -> str | None:
    x = entry.make()
    if x.dim() < 2:
        return None
    return refused(entry, torch.nested.nested_tensor(list(x), layout=torch.jagged), "nested|dense|padded")


@column("layout nested strided")
def _(entry: Entry) -> str | None:
    x = entry.make()
    if x.dim() < 2:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = torch.nested.nested_tensor(list(x))
    return refused(entry, given, "nested|dense|padded")


@column("quantized")
def _(entry: Entry) -> str | None:
    if entry.role != "real":
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        given = torch.quantize_per_tensor(entry.make(), 0.1, 0, torch.qint8)
    return refused(entry, given, "dequantize|float")


# ---------------------------------------------------------------------------------------------- shapes and kinds


@column("no rows")
def _(entry: Entry) -> str | None:
    x = plain(entry)
    if not entry.rows or x.dim() == 0:
        return None
    y0, given = entry.call(x), x[:0]
    y = entry.call(given)
    assert y.dim() == y0.dim(), f"shape {tuple(y.shape)}"
    assert y.numel() == 0 or not y0.dim() or y.isfinite().all() or y.shape == y0.shape, f"{y}"
    if not y.dim():
        assert bool(torch.isfinite(y.double())), f"{y}"
    if entry.smooth:
        assert gradient(y, x).shape == x.shape
    return "value"


@column("one row more")
def _(entry: Entry) -> str | None:
    """What is said of a row does not depend on the others."""
    x = plain(entry, grad=False)
    if entry.argument not in ("logits", "hidden") or not entry.rows or "routing)" in entry.name:
        return None
    y0 = entry.call(x)
    again = entry.call(torch.cat([x, x[:1] * 3]))
    if y0.shape == again.shape or "sample" in entry.name or "expand" in entry.name or "kl" in entry.name:
        return None
    close("the rows that were there", again[: len(y0)], y0)
    return "value"


@column("wrong last dimension")
def _(entry: Entry) -> str | None:
    if entry.width is None:
        return None
    x = entry.make()
    return refused(entry, torch.cat([x, x[..., :1]], -1), "shape|last dimension|expected")


@column("0-d")
def _(entry: Entry) -> str | None:
    if entry.width is None:
        return None
    return refused(entry, torch.ones((), dtype=entry.make().dtype), "shape|dimension|expected")


@column("list")
def _(entry: Entry) -> str | None:
    if entry.argument in ("include", "indices", "decisions", "a"):
        return None  # a sequence is something else there
    return refused(entry, entry.make().tolist(), "tensor|number|integer")


@column("numpy")
def _(entry: Entry) -> str | None:
    if entry.argument == "include":
        return None
    return refused(entry, entry.make().numpy(), "tensor|number|Routing|integer")


@column("None")
def _(entry: Entry) -> str | None:
    if entry.argument in OPTIONAL or entry.name.startswith(("random_key(indices)", "SubsetPrior.constrained(logits)")):
        return None
    return refused(entry, None, "tensor|number|Routing|mask|decision")


# ---------------------------------------------------------------------------------------------- values


@column("NaN")
def _(entry: Entry) -> str | None:
    if entry.role != "real" or not entry.checked:
        return None
    x = entry.make()
    if x.dim() == 0:
        return None
    x[-1, ...] = torch.nan
    row = "" if not entry.rows else rf"\b{len(x) - 1}\b"
    return refused(entry, x, f"{row}|nan", also="logits")


def _huge(entry: Entry, size: float) -> str | None:
    if entry.argument != "logits" or "covariance" in entry.name:
        return None
    x = (entry.make() * size).requires_grad_(entry.smooth)
    y, y0 = entry.call(x), entry.call(x.detach().double())
    assert not bool(y.isnan().any()), f"NaN: {y.tolist()}"
    finite = y0.abs() < 3e38
    close("value beside float64", y.double()[finite], y0.double()[finite], 1e5)
    if entry.smooth:
        assert not bool(gradient(y, x).isnan().any()), "the gradient is NaN"
    return "value"


COLUMNS["huge 1e30"] = partial(_huge, size=1e30)
COLUMNS["huge 1e38"] = partial(_huge, size=1e37)


@column("evidence")
def _(entry: Entry) -> str | None:
    if entry.argument != "logits" or entry.width != E or "log_prob" in entry.name or "replay" in entry.name:
        return None
    x = entry.make()
    x[0, 0], x[1, 1], x[2, 3] = torch.inf, -torch.inf, -torch.inf
    x.requires_grad_(entry.smooth)
    y = entry.call(x)
    y0 = entry.call(x.detach().double())
    kl = "kl" in entry.name
    assert kl or not bool(y.isnan().any()), f"NaN: {y.tolist()}"
    close("value beside float64", y.double(), y0.double(), 1e4)
    if entry.smooth and not kl:
        assert not bool(gradient(y, x).isnan().any()), "the gradient is NaN"
    return "value"


@column("evidence that leaves nothing")
def _(entry: Entry) -> str | None:
    if entry.argument != "logits" or not entry.checked or "soft_topk" in entry.name or "Poisson" in entry.name:
        return None  # something is left whatever the evidence
    x = entry.make()
    x[2] = torch.inf
    return refused(entry, x, r"row 2\b")


# ---------------------------------------------------------------------------------------------- wrappers


class Own(Tensor):
    """A subclass with data of its own and nothing else."""


class Pair(Tensor):
    """Two tensors that pass for one: what parallel tensors are, in small."""

    first: Tensor
    second: Tensor

    @staticmethod
    def __new__(cls, first: Tensor, second: Tensor) -> Pair:
        made: Pair = Tensor._make_wrapper_subclass(
            cls, first.shape, dtype=first.dtype, device=first.device, requires_grad=first.requires_grad
        )
        made.first, made.second = first, second
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        firsts = torch.utils._pytree.tree_map_only(Pair, lambda p: p.first, (args, kwargs or {}))
        seconds = torch.utils._pytree.tree_map_only(Pair, lambda p: p.second, (args, kwargs or {}))
        first, second = function(*firsts[0], **firsts[1]), function(*seconds[0], **seconds[1])
        return Pair(first, second) if isinstance(first, Tensor) else first

    def __repr__(self) -> str:  # type: ignore[override]
        return "Pair(...)"


@column("Parameter")
def _(entry: Entry) -> str | None:
    if entry.role != "real":
        return None
    x = torch.nn.Parameter(entry.make())
    return value(entry, x, x) if entry.smooth else value(entry, x.detach(), x)


@column("trivial subclass")
def _(entry: Entry) -> str | None:
    x = plain(entry)
    y = entry.call(x.as_subclass(Own))
    return _value_of(entry, x, y)


def _value_of(entry: Entry, x: Tensor, y: Tensor, loose: float = 1.0) -> str:
    base = x.detach().clone().requires_grad_(x.requires_grad)
    y0 = entry.call(base)
    close("value", y.as_subclass(Tensor), y0, loose)
    if entry.smooth:
        close("gradient", gradient(y.as_subclass(Tensor), x), gradient(y0, base), loose)
    return "value"


@column("wrapper subclass")
def _(entry: Entry) -> str | None:
    x = entry.make()
    return refused(entry, Pair(x, x.clone()), WRAPPED)


def _mesh() -> Any:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if not dist.is_initialized():
        dist.init_process_group("fake", rank=0, world_size=1, store=FakeStore())
    return init_device_mesh("cpu", (1,))


def _dtensor(entry: Entry, shard: bool) -> str | None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    x = entry.make()
    if shard and x.dim() == 0:
        return None
    return refused(entry, distribute_tensor(x, _mesh(), [Shard(0) if shard else Replicate()]), WRAPPED)


COLUMNS["DTensor replicated"] = partial(_dtensor, shard=False)
COLUMNS["DTensor sharded"] = partial(_dtensor, shard=True)


@column("inference_mode")
def _(entry: Entry) -> str | None:
    y0 = entry.call(plain(entry)).detach()
    with torch.inference_mode():
        y = entry.call(entry.make())
        close("value", y, y0)
        given = entry.make()
    # Parameters cannot learn from an inference tensor.
    with torch.set_grad_enabled(entry.argument not in ("hidden", "inputs")):
        close("an inference tensor outside", entry.call(given), y0)
    return "value"


@column("no_grad")
def _(entry: Entry) -> str | None:
    y0 = entry.call(plain(entry)).detach()
    with torch.no_grad():
        close("value", entry.call(plain(entry)), y0)
    return "value"


@column("autocast")
def _(entry: Entry) -> str | None:
    if "MoE" in entry.name:
        return None  # whose experts run in bfloat16 then
    x = plain(entry)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = entry.call(x)
    return _value_of(entry, x, y)


# ---------------------------------------------------------------------------------------------- no data


def _has_shape(entry: Entry) -> bool:
    return not entry.python and "swap" not in entry.name


@column("device meta")
def _(entry: Entry) -> str | None:
    if not _has_shape(entry):
        return None
    y0 = entry.call(plain(entry)).detach()
    found = shape(entry, lambda x: x.to("meta"))
    still_right(entry, y0)
    return found


@column("FakeTensorMode")
def _(entry: Entry) -> str | None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    if not _has_shape(entry):
        return None
    y0 = entry.call(plain(entry)).detach()
    x = plain(entry)
    expected = entry.call(x)
    judges.forget()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        given = mode.from_tensor(x.detach())
        if entry.smooth:
            given.requires_grad_()
        y = entry.call(given)
        assert (y.shape, y.dtype) == (expected.shape, expected.dtype), f"{tuple(y.shape)} {y.dtype}"
        if expected.requires_grad:
            (g,) = torch.autograd.grad(y.sum(), given, allow_unused=True, materialize_grads=True)
            assert (g.shape, g.dtype) == (x.shape, x.dtype)
    still_right(entry, y0)
    return "shape"


# ---------------------------------------------------------------------------------------------- transforms


def _double(entry: Entry, smooth: bool = True) -> Tensor | None:
    if entry.role != "real" or entry.python or (smooth and not entry.smooth):
        return None
    return entry.make() if entry.single else entry.make().double()


@column("func.grad")
def _(entry: Entry) -> str | None:
    x = _double(entry)
    if x is None:
        return None
    expected = judges.slope(entry, x)
    close("gradient", torch.func.grad(judges.scalar(entry))(x), expected)
    return "value"


@column("func.vjp")
def _(entry: Entry) -> str | None:
    x = _double(entry)
    if x is None:
        return None
    y0, expected = entry.call(x), judges.slope(entry, x)
    y, pull = torch.func.vjp(entry.call, x)
    close("value", y, y0)
    close("gradient", pull(judges.upstream(y))[0], expected)
    return "value"


def _along(entry: Entry, x: Tensor) -> tuple[Tensor, Tensor]:
    """(a direction, the result's derivative along it by plain reverse mode)."""
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(6), dtype=x.dtype)
    J = jacobian(entry, x)
    return v, torch.tensordot(J, v, dims=x.dim()) if x.dim() else J * v


@column("func.jvp")
def _(entry: Entry) -> str | None:
    x = _double(entry)
    if x is None:
        return None
    v, expected = _along(entry, x)
    y, tangent = torch.func.jvp(entry.call, (x,), (v,))
    close("value", y, entry.call(x))
    close("tangent", tangent, expected)
    return "value"


@column("forward_ad")
def _(entry: Entry) -> str | None:
    x = _double(entry)
    if x is None:
        return None
    v, expected = _along(entry, x)
    with forward_ad.dual_level():
        y, tangent = forward_ad.unpack_dual(entry.call(forward_ad.make_dual(x, v)))
        close("value", y, entry.call(x))
        close("tangent", torch.zeros_like(y) if tangent is None else tangent, expected)
    return "value"


@column("func.jacrev")
def _(entry: Entry) -> str | None:
    x = _double(entry)
    if x is None:
        return None
    expected = jacobian(entry, x)
    close("Jacobian", torch.func.jacrev(entry.call)(x), expected)
    return "value"


@column("func.jacfwd")
def _(entry: Entry) -> str | None:
    x = _double(entry)
    if x is None:
        return None
    expected = jacobian(entry, x)
    close("Jacobian", torch.func.jacfwd(entry.call)(x), expected)
    return "value"


@column("func.hessian")
def _(entry: Entry) -> str | None:
    x = _double(entry)
    if x is None:
        return None
    expected = judges.hessian(entry, x)
    close("Hessian", torch.func.hessian(judges.scalar(entry))(x), expected, 10)
    return "value"


@column("is_grads_batched")
def _(entry: Entry) -> str | None:
    x = _double(entry)
    if x is None:
        return None
    x.requires_grad_()
    y = entry.call(x)
    if not y.requires_grad or y.dim() == 0:
        return None
    units = torch.eye(y.numel(), dtype=y.dtype).reshape(-1, *y.shape)
    (found,) = torch.autograd.grad(y, x, units, is_grads_batched=True)
    close("Jacobian", found.reshape(*y.shape, *x.shape), jacobian(entry, x))
    return "value"


def _slices(entry: Entry) -> Tensor | None:
    if entry.python:
        return None
    x = entry.make()
    if entry.role != "real":
        return torch.stack([x, x.flip(0), x.roll(1, 0)]) if x.dim() else None
    return torch.stack([x, x * 1.5, x.flip(0) if x.dim() else x])


@column("func.vmap")
def _(entry: Entry) -> str | None:
    stacked = _slices(entry)
    if stacked is None:
        return None
    expected = torch.stack([entry.call(x) for x in stacked])
    close("value", torch.func.vmap(entry.call)(stacked), expected)
    return "value"


@column("func.vmap over the last dimension")
def _(entry: Entry) -> str | None:
    stacked = _slices(entry)
    if stacked is None:
        return None
    expected = torch.stack([entry.call(x) for x in stacked])
    close("value", torch.func.vmap(entry.call, in_dims=-1)(stacked.movedim(0, -1).contiguous()), expected)
    return "value"


@column("func.vmap of func.grad")
def _(entry: Entry) -> str | None:
    stacked = _slices(entry)
    if _double(entry) is None or stacked is None:
        return None
    stacked = stacked.double()
    expected = torch.stack([judges.slope(entry, x) for x in stacked])
    close("gradient", torch.func.vmap(torch.func.grad(judges.scalar(entry)))(stacked), expected)
    return "value"


@column("func.functionalize")
def _(entry: Entry) -> str | None:
    if entry.python:
        return None
    y0 = entry.call(entry.make())
    close("value", torch.func.functionalize(entry.call)(entry.make()), y0)
    return "value"


# ---------------------------------------------------------------------------------------------- traces


def _other(entry: Entry, rows: bool) -> Iterator[Tensor]:
    """Other values, and another number of rows."""
    x = entry.make()
    yield x.flip(0) if x.dim() else x
    if rows and entry.rows and x.dim() and entry.role == "real":
        yield torch.cat([x, x.flip(0) * 0.5])[: len(x) + 2]


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@column("jit.trace", slow=True)
def _(entry: Entry) -> str | None:
    if entry.python:
        return None
    entry.call(entry.make())
    with _quietly(), frozen():
        traced = torch.jit.trace(entry.call, entry.make(), check_trace=False)
        close("value", traced(entry.make()), entry.call(entry.make()))
        for x in _other(entry, rows=entry.alone):
            close("value of another", traced(x), entry.call(x))
    return "value"


def _make_fx(entry: Entry, mode: str) -> str | None:
    from torch.fx.experimental.proxy_tensor import make_fx

    if entry.python:
        return None
    entry.call(entry.make())
    with _quietly():
        traced = make_fx(lambda x: entry.call(x), tracing_mode=mode, _allow_non_fake_inputs=True)(entry.make())
    close("value", traced(entry.make()), entry.call(entry.make()))
    for x in _other(entry, rows=False):
        close("value of another", traced(x), entry.call(x))
    return "value"


for _mode in ("real", "fake", "symbolic"):
    COLUMNS[f"make_fx {_mode}"] = partial(_make_fx, mode=_mode)
    SLOW.add(f"make_fx {_mode}")


def _compiled(entry: Entry, backend: str) -> str | None:
    if entry.python:
        return None
    torch._dynamo.reset()
    entry.call(entry.make())  # a program does not compile circuits
    with _quietly():
        compiled = torch.compile(lambda x: entry.call(x), backend=backend)
        x = plain(entry)
        y = compiled(x)
        _value_of(entry, x, y)
        for other in _other(entry, rows=True):
            close("value of another", compiled(other), entry.call(other))
    return "value"


for _backend in ("eager", "aot_eager"):
    COLUMNS[f"compile {_backend}"] = partial(_compiled, backend=_backend)
    SLOW.add(f"compile {_backend}")
