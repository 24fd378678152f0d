"""The engine ``triton`` of the count family: one kernel for a sweep, one for its gradient, on NVIDIA GPUs.

Legend: T tokens, N variables, K the largest allowed count, J = K + 1.

The same mathematics as the engine ``torch``, a row's tree held in registers (:mod:`.registers`, up to
``MAX_LANES_COUNT`` and ``MAX_LANES_VARIABLES``) or worked through in memory (:mod:`.memory`, up to ``MAX_COUNT``
and ``MAX_VARIABLES``). Half-precision logits are read as they are and computed with in float32.

The first kernel decides in float32 what float32 can decide, and lists on the device the rows in which a coefficient
that matters is lost or rounding could change the sample. A second kernel, always launched, does the listed rows in
float64, and where that is not enough in log space, as the naive engine would. The host never waits for the device, so
sweeps can be captured in CUDA graphs. Samples are those of the other engines unless a threshold lies within float64
rounding (about 1e-13) of a cumulative weight, which happens about once in 1e12 draws.

What runs elsewhere, and why:

* circuits with more variables or larger counts than the limits: :func:`refusal` says so, and the engine ``torch`` is
  chosen (forcing this engine raises);
* GPUs other than NVIDIA's, and those before compute capability 8.0: likewise (:func:`unfit`);
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
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from circuitroute._validate import present
from circuitroute.engines import step as stepping
from circuitroute.engines.autograd import attach
from circuitroute.engines.base import Inference, given
from circuitroute.engines.subset.naive import NaiveSubset
from circuitroute.engines.subset.torch.engine import TorchSubset
from circuitroute.engines.subset.torch.tree import even
from circuitroute.engines.subset.triton import SIZES, aligned
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
# Bytes that the trees of all programs may take: where trees are large, there are fewer programs.
MAX_SCRATCH = 1 << 27


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
    return (int(release[0]), int(release[1])) >= (3, 4)


def missing() -> str | None:
    """What this machine lacks for the engine; None if nothing."""
    if not installed():
        return "triton is not installed, or older than 3.4; CUDA builds of torch bring it from torch 2.8 on"
    if _interpreter_wanted():
        return None
    if not torch.cuda.is_available():
        return (
            "it needs a CUDA GPU, and there is none; to try it on CPU tensors under Triton's interpreter, set "
            "TRITON_INTERPRET=1 in the environment before triton is imported"
        )
    return unfit(torch.device("cuda"))


# What triton compiles for.
CAPABILITY = (8, 0)


@functools.cache
def unfit(device: torch.device) -> str | None:
    """Why a GPU cannot run the kernels, None if it can; one that is not there can."""
    if torch.version.hip is not None:
        return "its kernels are written for NVIDIA GPUs, in part in PTX, and this build of torch is for ROCm"
    if torch.cuda.is_available() and (found := torch.cuda.get_device_capability(device)) < CAPABILITY:
        return "it needs compute capability {}.{}, and the GPU has {}.{}".format(*CAPABILITY, *found)
    return None


def _interpreter_wanted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


# Arguments of the kernels, which Triton takes as named tuples. What a kernel need not read or write is None.
#
# A kernel is compiled once for its constants and dtypes (and how :func:`lane_shape` deals out small and large batches),
# and never again for other tensors of the kind: that would take seconds to minutes in the middle of training. Triton
# compiles anew when an integer becomes 1 or a multiple of 16, unless told otherwise, and inside tuples it cannot be
# told: sizes are arguments of their own. It compiles anew when an address stops being a multiple of 16, too: there are
# no others, see :func:`aligned`.


class Rows(NamedTuple):
    """The rows of a sweep."""

    logits: Tensor
    potential: Tensor
    key: Tensor | None
    temperature: Tensor | None = None  # only a step has one, see :class:`~.step.Tempered`


class Swept(NamedTuple):
    """A :class:`Sweep` as kernels fill it and read it."""

    log_partition: Tensor | None
    marginals: Tensor | None
    count_probs: Tensor | None
    shift: Tensor
    log_root: Tensor | None
    mask: Tensor | None
    fallback: Tensor
    todo: Tensor
    length: Tensor


class Slopes(NamedTuple):
    """The direction (u, v), and the derivatives of marginals and posterior along it."""

    u: Tensor
    v: Tensor | None
    marginals: Tensor
    count_probs: Tensor
    # Only a step has more, see :class:`~.step.Again`.
    log_partition: Tensor | None = None
    log_prob: Tensor | None = None
    mask: Tensor | None = None
    choice: Tensor | None = None


class Scratch(NamedTuple):
    """Memory for the kernels with one row per program: a few trees for each program, and counts to split."""

    trees: Tensor
    counts: Tensor | None


@dataclass(frozen=True)
class Sweep(Inference):
    """The outcome of a sweep, with the list of rows that were swept again; ``fallback`` marks lost coefficients.

    Attributes:
        todo: [T] int32, whose first ``length`` entries are the rows, in no order.
        length: [1] int32.
    """

    todo: Tensor | None = None
    length: Tensor | None = None

    @staticmethod
    def listed(inference: Inference) -> Sweep:
        """As a sweep, whose list is made anew of what is marked where ``inference`` has none."""
        if isinstance(inference, Sweep):
            return inference
        if inference.fallback is None:
            raise ValueError("inference: this engine marks the rows that it swept again, and this one has no marks")
        todo = (~inference.fallback).to(torch.int8).argsort(stable=True).to(torch.int32)
        return Sweep(**vars(inference), todo=todo, length=inference.fallback.sum(0, dtype=torch.int32, keepdim=True))


class TritonSubset:
    """Fused inference for the count family on CUDA tensors.

    Args:
        exact: whether the largest count is the only one that is allowed. Less is computed then, and what potentials
            say of other counts is not looked at.
    """

    name = "triton"

    def __init__(self, exact: bool = False) -> None:
        self._exact = exact

    @torch.no_grad()
    def infer(self, logits_TN: Tensor, potential: Tensor | None, key_T: Tensor | None = None) -> Inference:
        """See :class:`circuitroute.engines.base.Engine`."""
        if logits_TN.dtype == torch.float64:
            return TorchSubset().infer(logits_TN, potential, key_T)
        swept = self._problem(logits_TN, potential).forward(key_T, with_moments=True)
        return Sweep(**swept._asdict())

    def attach(
        self, inference: Inference, logits_TN: Tensor, potential: Tensor | None, finite: bool = False
    ) -> Inference:
        """See :class:`circuitroute.engines.base.Engine`."""
        return attach(self, inference, logits_TN, given(potential), finite)

    def second_derivative(
        self, logits_TN: Tensor, potential: Tensor | None, inference: Inference, u_TN: Tensor, v_TJ: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """See :class:`circuitroute.engines.base.Engine`."""
        if logits_TN.dtype == torch.float64:
            return TorchSubset().second_derivative(logits_TN, potential, inference, u_TN, v_TJ)
        return self._problem(logits_TN, potential).backward(Sweep.listed(inference), u_TN, v_TJ)

    def naive_moments(self, logits_TN: Tensor, potential: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """See :class:`circuitroute.engines.base.Engine`."""
        return NaiveSubset().moments(logits_TN, given(potential))

    @torch.no_grad()
    def sample(self, logits_TN: Tensor, potential: Tensor | None, key_T: Tensor) -> Tensor:
        """See :class:`circuitroute.engines.base.Engine`."""
        if logits_TN.dtype == torch.float64:
            return TorchSubset().sample(logits_TN, potential, key_T)
        swept = self._problem(logits_TN, potential).forward(key_T, with_moments=False)
        return present(swept.mask, "a sweep that is given keys draws a sample")

    def steps(self, inputs: stepping.Inputs) -> bool:
        """See :class:`circuitroute.engines.step.Stepper`."""
        from circuitroute.engines.subset.triton import step as taking

        if inputs.mask is not None:  # a replay: composed of its parts
            return False
        fits = lanes_fit(inputs.logits.shape[1], inputs.potential.shape[-1] - 1) and taking.readable(inputs)
        return fits and (inputs.logits.is_cuda or interpreter_runs())

    def step(self, inputs: stepping.Inputs, rule: stepping.Rule, moments: bool) -> stepping.Step:
        """See :class:`circuitroute.engines.step.Stepper`."""
        from circuitroute.engines.subset.triton import step as taking

        return taking.step(self._problem(inputs.choice, inputs.potential), inputs, rule, moments)

    def step_marginals(self, inputs: stepping.Inputs, found: stepping.Step, out_TN: Tensor) -> None:
        """See :class:`circuitroute.engines.step.Stepper`."""
        from circuitroute.engines.subset.triton import step as taking

        taking.step_marginals(self._problem(inputs.choice, inputs.potential), inputs, found, out_TN)

    def step_gradient(
        self, inputs: stepping.Inputs, rule: stepping.Rule, found: stepping.Step, upstream: stepping.Upstream
    ) -> stepping.Slopes:
        """See :class:`circuitroute.engines.step.Stepper`."""
        from circuitroute.engines.subset.triton import step as taking

        return taking.step_gradient(self._problem(inputs.choice, inputs.potential), inputs, rule, found, upstream)

    def _problem(self, logits_TN: Tensor, potential: Tensor | None) -> _Problem:
        return _Problem.of(logits_TN, given(potential), self._exact)


@dataclass(frozen=True)
class _Problem:
    """Rows laid out for the kernels."""

    logits: Tensor
    potential: Tensor
    interpreted: bool
    exact: bool = False  # the largest count alone is allowed, and it is not 0

    @staticmethod
    def of(logits_TN: Tensor, potential: Tensor, exact: bool = False) -> _Problem:
        reason = refusal(logits_TN.shape[1], potential.shape[-1] - 1)
        if reason is not None:
            raise EngineError(f"engine='triton' cannot run this: {reason}")
        interpreted = interpreter_runs()
        if not interpreted and not launchable(logits_TN.device):
            raise EngineError(
                f"engine='triton' got tensors on {logits_TN.device}: it takes CUDA tensors, and CPU tensors only when "
                "TRITON_INTERPRET=1 was set in the environment before triton was imported"
            )
        exact = exact and potential.shape[-1] > 1
        return _Problem(aligned(logits_TN), aligned(potential), interpreted, exact)

    @property
    def shape(self) -> tuple[int, int, int]:
        T, N = self.logits.shape
        return T, N, self.potential.shape[-1]

    @property
    def in_lanes(self) -> bool:
        _, N, J = self.shape
        return lanes_fit(N, J - 1)

    def rows(self, key_T: Tensor | None = None) -> Rows:
        return Rows(self.logits, self.potential, None if key_T is None else aligned(key_T))

    @property
    def sizes(self) -> dict[str, int]:
        """How many rows there are, and how far their potentials are apart: 0 where all rows share one."""
        T, _, J = self.shape
        return dict(zip(SIZES, (T, 0 if self.potential.dim() == 1 else J), strict=True))

    def room(self, with_moments: bool, with_sample: bool) -> Swept:
        """Memory for the outcome."""
        T, N, J = self.shape
        new, exact = self._new(torch.float32), self._new(torch.float64)
        return Swept(
            log_partition=new(T) if with_moments else None,
            marginals=new(T, N) if with_moments else None,
            count_probs=new(T, J) if with_moments else None,
            shift=exact(T),
            log_root=exact(T) if with_moments else None,
            mask=self._new(torch.bool)(T, N) if with_sample else None,
            fallback=self._new(torch.bool)(T),
            todo=self._new(torch.int32)(T),
            length=torch.zeros(1, dtype=torch.int32, device=self.logits.device),
        )

    def forward(self, key_T: Tensor | None, with_moments: bool) -> Swept:
        """The sweep in float32, then the rows of its list in log space."""
        from circuitroute.engines.subset.triton import memory, registers

        swept = self.room(with_moments, with_sample=key_T is not None)
        self._launch(registers.forward, memory.forward, self.rows(key_T), swept)
        return swept

    def backward(self, sweep: Sweep, u_TN: Tensor, v_TJ: Tensor | None) -> tuple[Tensor, Tensor]:
        """The derivative of (marginals, posterior) along (u, v), then again for the rows that underflowed."""
        from circuitroute.engines.subset.triton import memory, registers

        T, N, J = self.shape
        new = self._new(torch.float32)
        slopes = Slopes(aligned(u_TN), None if v_TJ is None else aligned(v_TJ), new(T, N), new(T, J))
        parts: dict[str, Any] = {name: None if part is None else aligned(part) for name, part in vars(sweep).items()}
        swept = Swept(**parts)
        self._launch(registers.backward, memory.backward, self.rows(), swept, slopes)
        return slopes.marginals, slopes.count_probs

    def _new(self, dtype: torch.dtype) -> Any:
        """``new(*shape)``: an uninitialised tensor beside the logits."""
        return lambda *shape: torch.empty(shape, dtype=dtype, device=self.logits.device)

    def _launch(self, in_registers: Any, in_memory: Any, *arguments: NamedTuple) -> None:
        """All rows in float32, then those of the list in log space."""
        T, N, J = self.shape
        if T == 0:
            return
        dual = len(arguments) > 2  # with slopes
        if self.in_lanes:
            shape = lane_shape(N, J, dual, T)
            self._run(in_registers, -(-T // shape["BT"]), arguments, {**shape, "EXACT": self.exact})
        else:
            self._launch_rows(in_memory, arguments, dual, log=False)
        self._launch_rows(in_memory, arguments, dual, log=True)

    def launch_lanes(
        self, kernel: Any, arguments: tuple[Any, ...], dual: bool = False, constants: dict[str, Any] | None = None
    ) -> None:
        """All rows, in lanes."""
        T, N, J = self.shape
        if T > 0:
            shape = lane_shape(N, J, dual, T)
            self._run(kernel, -(-T // shape["BT"]), arguments, {**shape, **(constants or {}), "EXACT": self.exact})

    def launch_list(self, kernel: Any, arguments: tuple[Any, ...], dual: bool = False) -> None:
        """The listed rows, in log space."""
        if len(self.logits) > 0:
            self._launch_rows(kernel, arguments, dual, log=True)

    def launch_settling(self, kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        """The listed rows, by a kernel that needs no tree."""
        T, N, J = self.shape
        shape = {name: size for name, size in row_shape(N, J).items() if name != "SIZE"}
        if T > 0:
            self._run(kernel, min(T, LIST_PROGRAMS), arguments, {**shape, **constants})

    def _launch_rows(self, kernel: Any, arguments: tuple[NamedTuple, ...], dual: bool, log: bool) -> None:
        """One program per row, or the programs that share the list."""
        T, N, J = self.shape
        shape = row_shape(N, J)
        values = (4 if dual else 2) * shape["SIZE"]
        programs = min(T, row_programs(values, log))
        trees = self._new(torch.float64 if log else torch.float32)(programs * values)
        scratch = Scratch(trees, None if dual else self._new(torch.int32)(programs * (N + 2)))
        # Only where a shift is looked for does it matter that one count alone is allowed.
        one = {} if dual or log else {"EXACT": self.exact}
        self._run(kernel, programs, (*arguments, scratch), {**shape, "LOG": log, **one})

    def _run(self, kernel: Any, programs: int, arguments: tuple[NamedTuple, ...], constants: dict[str, Any]) -> None:
        # A GPU raises no floating-point warnings; NumPy, which the interpreter runs on, would.
        quiet: AbstractContextManager[Any] = np.errstate(all="ignore")
        if not self.interpreted:
            quiet = current(self.logits.device)
        with quiet:
            how = {"FAST": False} if self.interpreted else on_gpu()
            kernel[(programs,)](*arguments, **self.sizes, **constants, **how)


def launchable(device: torch.device) -> bool:
    """Whether compiled kernels can be launched on tensors of a device."""
    return device.type == "cuda"


def current(device: torch.device) -> AbstractContextManager[Any]:
    """While a device is the one that triton launches on."""
    return torch.cuda.device(device)


def on_gpu() -> dict[str, Any]:
    """How kernels are compiled for GPUs."""
    return {"FAST": True, "num_warps": WARPS, "enable_fp_fusion": True}


# Logarithm of how many variables a lane holds, forward and backward. The more, the less there is to do in all; a batch
# of fewer than MANY_TOKENS leaves a GPU idle, and is done sooner in more lanes.
LANE_SLOTS = 4
FEW_LANE_SLOTS = 3
DUAL_LANE_SLOTS = 3
MANY_TOKENS = 8192


def lanes_fit(n: int, K: int) -> bool:
    """Whether rows fit into lanes."""
    return n <= MAX_LANES_VARIABLES and K <= MAX_LANES_COUNT


def lane_shape(n: int, J: int, dual: bool, tokens: int = MANY_TOKENS) -> dict[str, int]:
    """How rows are dealt out: 2^LE slots of 2^LG lanes, BT rows of a program, which has one lane per thread."""
    depth = max(1, (n - 1).bit_length())
    slots = DUAL_LANE_SLOTS if dual else LANE_SLOTS if tokens >= MANY_TOKENS else FEW_LANE_SLOTS
    LE = min(depth, max(slots, depth - 5))
    return {"N": n, "J": J, "LE": LE, "LG": depth - LE, "BT": (32 * WARPS) >> (depth - LE)}


def row_shape(n: int, J: int) -> dict[str, int]:
    """Sizes of the tree that a row needs in memory."""
    depth, K = (n - 1).bit_length(), max(J - 1, 1)
    size = sum((min(1 << level, K) + 1) * even(-(-n >> level)) for level in range(depth + 1))
    return {"N": n, "J": J, "DEPTH": depth, "SIZE": size, "JP": 1 << K.bit_length()}


def row_programs(values: int, log: bool) -> int:
    """How many programs of one row each there may be, whose trees take ``values`` each."""
    fitting = max(1, MAX_SCRATCH // (values * (8 if log else 4)))
    return min(fitting, LIST_PROGRAMS if log else ROW_PROGRAMS)


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
