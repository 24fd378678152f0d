"""The engine ``triton`` of the count family: one kernel for a sweep, one for its gradient, on NVIDIA GPUs.

Legend: T tokens, N variables, K the largest allowed count, J = K + 1.

The same mathematics as the engine ``torch``, a row's tree held in registers (:mod:`.registers`, up to
``MAX_LANES_COUNT`` and ``MAX_LANES_VARIABLES``) or worked through in memory (:mod:`.memory`, up to ``MAX_COUNT``
and ``MAX_VARIABLES``). Half-precision logits are read as they are and computed with in float32.

The first kernel decides in float32 what float32 can decide. Rows in which a coefficient that matters is lost, and rows
whose sample rounding could change, it puts on a list on the device; a second kernel, launched always, works the list
off as the naive engine would, in float64 log space. The host never waits for the device, so sweeps can be captured in
CUDA graphs. Samples are those of the other engines except where a threshold lies within float64 rounding (about
1e-13) of a cumulative weight, a matter of one draw in 1e12 or so.

What runs elsewhere, and why:

* circuits with more variables or larger counts than the limits: :func:`refusal` says so, and the engine ``torch`` is
  chosen (forcing this engine raises);
* float64 logits: the kernels compute in float32, so the engine ``torch`` takes the call;
* derivatives of the gradient of the marginals (``create_graph=True``): the naive engine, as for ``torch``.

CPU tensors are taken under Triton's interpreter, for tests: set ``TRITON_INTERPRET=1`` before triton is imported.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from circuitroute.engines.autograd import attach
from circuitroute.engines.base import Inference, given
from circuitroute.engines.subset.naive import NaiveSubset
from circuitroute.engines.subset.torch.engine import TorchSubset
from circuitroute.engines.subset.torch.tree import even
from circuitroute.errors import EngineError

# Beyond these a lane's tree outgrows its registers, and a row its warp.
MAX_LANES_COUNT = 16
MAX_LANES_VARIABLES = 512
# Beyond these the engine ``torch`` is chosen.
MAX_COUNT = 64
MAX_VARIABLES = 4096

WARPS = 4
# Programs that share the work of the kernels of one row per program; each needs scratch memory for its tree.
ROW_PROGRAMS = 1056
LIST_PROGRAMS = 264


def refusal(n: int, max_count: int) -> str | None:
    """Why this engine does not take circuits of ``n`` variables and counts up to ``max_count``; None if it does."""
    if n > MAX_VARIABLES:
        return f"it takes up to {MAX_VARIABLES} variables, the circuit has {n}"
    if max_count > MAX_COUNT:
        return f"it takes counts up to {MAX_COUNT}, the circuit allows {max_count}"
    return None


@functools.cache
def installed() -> bool:
    """Whether there is a triton with all that kernels use: 3.2, which comes with torch 2.6, has no gather."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        release = importlib.metadata.version("triton").split(".")
    except importlib.metadata.PackageNotFoundError:  # builds that go by another name
        return True
    return (int(release[0]), int(release[1])) >= (3, 3)


def missing() -> str | None:
    """What this machine lacks for the engine; None if nothing."""
    if not installed():
        return "triton is not installed, or older than 3.3; CUDA builds of torch bring it from torch 2.7 on"
    if not torch.cuda.is_available() and not _interpreter_wanted():
        return (
            "it needs a CUDA GPU, and there is none; to try it on CPU tensors under Triton's interpreter, set "
            "TRITON_INTERPRET=1 in the environment before triton is imported"
        )
    return None


def _interpreter_wanted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@dataclass(frozen=True)
class Sweep(Inference):
    """The outcome of a sweep, with the list of rows that were swept again; ``fallback`` marks lost coefficients.

    Attributes:
        todo: [T] int32, whose first ``count`` entries are the rows, in no order.
        count: [1] int32.
    """

    todo: Tensor | None = None
    count: Tensor | None = None

    @staticmethod
    def listed(inference: Inference) -> Sweep:
        """As a sweep, whose list is made anew of what is marked where ``inference`` has none."""
        if isinstance(inference, Sweep):
            return inference
        if inference.fallback is None:
            raise ValueError("inference: this engine marks the rows that it swept again, and this one has no marks")
        todo = (~inference.fallback).to(torch.int8).argsort(stable=True).to(torch.int32)
        fields = {name: getattr(inference, name) for name in Inference.__dataclass_fields__}
        return Sweep(**fields, todo=todo, count=inference.fallback.sum(0, dtype=torch.int32, keepdim=True))


class TritonSubset:
    """Fused inference for the count family on CUDA tensors."""

    name = "triton"

    @torch.no_grad()
    def infer(self, logits_TN: Tensor, potential: Tensor | None, key_T: Tensor | None = None) -> Inference:
        """See :class:`circuitroute.engines.base.Engine`."""
        if logits_TN.dtype == torch.float64:
            return TorchSubset().infer(logits_TN, potential, key_T)
        return _Problem.of(logits_TN, given(potential)).forward(key_T, with_moments=True)

    def attach(self, inference: Inference, logits_TN: Tensor, potential: Tensor | None) -> Inference:
        """See :class:`circuitroute.engines.base.Engine`."""
        return attach(self, inference, logits_TN, given(potential))

    def second_derivative(
        self, logits_TN: Tensor, potential: Tensor | None, inference: Inference, u_TN: Tensor, v_TJ: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """See :class:`circuitroute.engines.autograd.Differentiable`."""
        if logits_TN.dtype == torch.float64:
            return TorchSubset().second_derivative(logits_TN, potential, inference, u_TN, v_TJ)
        return _Problem.of(logits_TN, given(potential)).backward(Sweep.listed(inference), u_TN, v_TJ)

    def naive_moments(self, logits_TN: Tensor, potential: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`circuitroute.engines.autograd.Differentiable`."""
        return NaiveSubset().moments(logits_TN, given(potential))

    @torch.no_grad()
    def sample(self, logits_TN: Tensor, potential: Tensor | None, key_T: Tensor) -> Tensor:
        """See :class:`circuitroute.engines.base.Engine`."""
        if logits_TN.dtype == torch.float64:
            return TorchSubset().sample(logits_TN, potential, key_T)
        mask = _Problem.of(logits_TN, given(potential)).forward(key_T, with_moments=False).mask
        if mask is None:
            raise RuntimeError("a sweep that is given keys returns a mask")  # cannot happen
        return mask


@dataclass(frozen=True)
class _Problem:
    """Rows laid out for the kernels."""

    logits: Tensor
    potential: Tensor
    interpreted: bool

    @staticmethod
    def of(logits_TN: Tensor, potential: Tensor) -> _Problem:
        reason = refusal(logits_TN.shape[1], potential.shape[-1] - 1)
        if reason is not None:
            raise EngineError(f"engine='triton' cannot run this: {reason}")
        interpreted = interpreter_runs()
        if not interpreted and logits_TN.device.type != "cuda":
            raise EngineError(
                f"engine='triton' got tensors on {logits_TN.device}: it takes CUDA tensors, and CPU tensors only when "
                "TRITON_INTERPRET=1 was set in the environment before triton was imported"
            )
        return _Problem(logits_TN.contiguous(), potential.contiguous(), interpreted)

    @property
    def shape(self) -> tuple[int, int, int]:
        T, N = self.logits.shape
        return T, N, self.potential.shape[-1]

    @property
    def potential_stride(self) -> int:
        """From one row's potential to the next; 0 where all rows share it."""
        return 0 if self.potential.dim() == 1 else self.potential.shape[1]

    @property
    def in_lanes(self) -> bool:
        _, N, J = self.shape
        return lanes_fit(N, J - 1)

    def forward(self, key_T: Tensor | None, with_moments: bool) -> Sweep:
        """The sweep in float32, then the rows of its list in log space."""
        T, N, J = self.shape
        new, exact = self._new(torch.float32), self._new(torch.float64)
        mask = None if key_T is None else self._new(torch.bool)(T, N)
        sweep = Sweep(
            log_partition=new(T if with_moments else 0),
            marginals=new(T if with_moments else 0, N),
            count_probs=new(T if with_moments else 0, J),
            shift=exact(T),
            log_root=exact(T if with_moments else 0),
            mask=mask,
            fallback=self._new(torch.bool)(T),
            todo=self._new(torch.int32)(T),
            count=torch.zeros(1, dtype=torch.int32, device=self.logits.device),
        )
        if T == 0:
            return sweep
        outputs = (sweep.marginals, sweep.count_probs, sweep.log_partition, sweep.log_root, sweep.shift, _bytes(mask))
        results = (*(key_T, *outputs), _bytes(sweep.fallback), sweep.todo, sweep.count)
        flags = {"MOMENTS": with_moments, "SAMPLE": mask is not None}
        sizes = (T, self.potential_stride)
        from circuitroute.engines.subset.triton import memory, registers

        if self.in_lanes:
            self._launch_lanes(registers.forward, False, (self.logits, self.potential, *results, *sizes), **flags)
        for log in (False, True) if not self.in_lanes else (True,):
            self._launch_rows(memory.forward, log, 2, (self.logits, self.potential, *results), sizes, True, **flags)
        return sweep

    def backward(self, sweep: Sweep, u_TN: Tensor, v_TJ: Tensor | None) -> tuple[Tensor, Tensor]:
        """The derivative of (marginals, posterior) along (u, v), then again for the rows that underflowed."""
        T, N, J = self.shape
        new = self._new(torch.float32)
        dm, dq = new(T, N), new(T, J)
        if T == 0:
            return dm, dq
        u, v = u_TN.contiguous(), None if v_TJ is None else v_TJ.contiguous()
        flags = {"HAS_V": v is not None}
        from circuitroute.engines.subset.triton import memory, registers

        if self.in_lanes:
            arguments = (self.logits, sweep.count_probs, sweep.shift, u, v, dm, dq, T)
            self._launch_lanes(registers.backward, True, arguments, **flags)
        known = (sweep.count_probs, sweep.log_root, sweep.shift, _bytes(sweep.fallback), sweep.todo, sweep.count)
        inputs = (self.logits, self.potential, *known, u, v, dm, dq)
        for log in (False, True) if not self.in_lanes else (True,):
            self._launch_rows(memory.backward, log, 4, inputs, (T, self.potential_stride), False, **flags)
        return dm, dq

    def _new(self, dtype: torch.dtype) -> Any:
        """``new(*shape)``: an uninitialised tensor beside the logits."""
        return lambda *shape: torch.empty(shape, dtype=dtype, device=self.logits.device)

    def _launch_lanes(self, kernel: Any, dual: bool, arguments: tuple[Any, ...], **flags: bool) -> None:
        T, N, J = self.shape
        shape = lane_shape(N, dual)
        self._launch(kernel, -(-T // shape["BT"]), arguments, {"N": N, "J": J, **shape, **flags})

    def _launch_rows(
        self,
        kernel: Any,
        log: bool,
        trees: int,
        arguments: tuple[Any, ...],
        sizes: tuple[int, int],
        with_counts: bool,
        **flags: bool,
    ) -> None:
        """One program per row, or the programs that share the list; each with scratch memory for its trees."""
        T, N, J = self.shape
        shape = row_shape(N, J)
        programs = min(T, LIST_PROGRAMS if log else ROW_PROGRAMS)
        scratch = [self._new(torch.float64 if log else torch.float32)(programs * trees * shape["SIZE"])]
        if with_counts:
            scratch.append(self._new(torch.int32)(programs * (N + 2)))
        constants = {"N": N, "J": J, **shape, **flags, "LOG": log}
        self._launch(kernel, programs, (*arguments, *scratch, *sizes), constants)

    def _launch(self, kernel: Any, programs: int, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        """Launch; what a kernel does not look at may be any tensor."""
        given = [self.logits if x is None else x for x in arguments]
        # A GPU raises no floating-point warnings; NumPy, which the interpreter runs on, would.
        quiet: AbstractContextManager[Any] = np.errstate(all="ignore")
        if not self.interpreted:
            quiet = torch.cuda.device(self.logits.device)
        options = {} if self.interpreted else {"num_warps": WARPS, "enable_fp_fusion": True}
        with quiet:
            kernel[(programs,)](*given, **constants, FAST=not self.interpreted, **options)


def _bytes(flags: Tensor | None) -> Tensor | None:
    """Truth values as the bytes they are."""
    return None if flags is None else flags.view(torch.int8)


# Logarithm of how many variables a lane holds, forward and backward.
LANE_SLOTS = 4
DUAL_LANE_SLOTS = 3


def lanes_fit(n: int, K: int) -> bool:
    """Whether rows fit into lanes."""
    return n <= MAX_LANES_VARIABLES and K <= MAX_LANES_COUNT


def lane_shape(n: int, dual: bool) -> dict[str, int]:
    """How rows are dealt out: 2^LE slots of 2^LG lanes, BT rows of a program, which has one lane per thread."""
    depth = max(1, (n - 1).bit_length())
    slots = DUAL_LANE_SLOTS if dual else LANE_SLOTS
    LE = min(depth, max(slots, depth - 5))
    return {"LE": LE, "LG": depth - LE, "BT": (32 * WARPS) >> (depth - LE)}


def row_shape(n: int, J: int) -> dict[str, int]:
    """Sizes of the tree that a row needs in memory."""
    depth, K = (n - 1).bit_length(), max(J - 1, 1)
    size = sum((min(1 << level, K) + 1) * even(-(-n >> level)) for level in range(depth + 1))
    width = 1 << (n - 1).bit_length()
    # Leaves are stored with their padding, so one more than n.
    return {"DEPTH": depth, "SIZE": size, "NP": max(2, width), "JP": 1 << K.bit_length(), "BLOCK": 128}


def interpreter_runs() -> bool:
    """Whether the kernels run under Triton's interpreter; that is settled when triton is imported."""
    import triton
    import triton.language as tl

    library, kernel = (not isinstance(f, triton.JITFunction) for f in (tl.sum, _kernel()))
    if library != kernel:
        raise EngineError(
            "engine='triton': TRITON_INTERPRET was changed after triton was imported; set it before, and leave it"
        )
    return kernel


def _kernel() -> Any:
    from circuitroute.engines.subset.triton import registers

    return registers.forward
