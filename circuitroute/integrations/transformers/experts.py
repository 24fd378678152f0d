"""The cost of a dynamic number of experts: unused slots, and how each experts implementation handles them; probes.

A router returns K slots per token. Those that a token does not use have weight 0 and hold

- ``"distinct"``: other experts, which were not chosen. Correct everywhere; their outputs are computed for nothing.
- ``"sentinel"``: the index E. The eager loop over experts skips it; ``batched_mm`` fails on it, and ``grouped_mm``
  silently returns wrong gradients. Where a model has null experts (LongCat-Flash), it is the index of one: nothing is
  computed for it either.
- ``"ragged"``: the index E, for an experts implementation registered here, ``"circuitroute"``. It drops these slots and
  passes the remaining pairs of token and expert to the previous implementation, each as a token with one expert. In a
  compiled program, where shapes may not depend on values, every slot has a row; ``grouped_mm`` multiplies the used ones
  only, the others compute all.

Probes (:mod:`circuitroute.routing.probes`) are slots too, of weight 0 in value, whose gradient is the gate's. An
implementation that knows nothing of them computes the right thing: the output plus 0, and a backward pass of zeros
through the probed experts. The ragged implementations are told which slots are probes by indices past E, and run these
without gradient, after the others: P slots more per token, which hold E + 1 + e for a probe of expert e, and 2 E + 1
for none.

Legend: T tokens, K slots, P slots of probes, S used slots, H hidden size, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from circuitroute.integrations.transformers.extra import transformers
from circuitroute.integrations.transformers.families import Family

Padding: TypeAlias = Literal["auto", "distinct", "sentinel", "ragged"]
# (experts, hidden [T, H], index [T, K], weights [T, K]) -> [T, H]
Experts: TypeAlias = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]

EAGER = "eager"
# The implementations that can run on any list of pairs, by the name of their ragged form.
RAGGED = {"circuitroute": "grouped_mm", "circuitroute:batched_mm": "batched_mm", "circuitroute:eager": EAGER}
RAGGED_FORM = {inner: name for name, inner in RAGGED.items()}


def register() -> None:
    """Register the ragged implementations with transformers, once."""
    interface = transformers("transformers.integrations.moe").ALL_EXPERTS_FUNCTIONS
    for name, inner in RAGGED.items():
        if name not in interface:
            interface.register(name, _Ragged(inner, interface))


def implementation_of(experts: nn.Module) -> str:
    """The name of the implementation that runs these experts; "eager" if they cannot switch."""
    name = getattr(getattr(experts, "config", None), "_experts_implementation", None)
    return EAGER if name is None or not _dispatches(experts) else str(name)


def is_parallel(experts: nn.Module) -> bool:
    """Whether other processes hold part of the experts."""
    return bool(getattr(experts, "_is_expert_parallel", False))


def _dispatches(experts: nn.Module) -> bool:
    return hasattr(type(experts).forward, "__wrapped__") and hasattr(experts, "config")


def ragged_form(experts: nn.Module, padding: Padding, family: Family, probes: bool = False) -> str | None:
    """The implementation to switch to for ``padding``; None to keep the current one.

    Args:
        probes: whether there are any, which others than ragged implementations run with a backward pass.

    Raises:
        ValueError: ``padding`` is ``"ragged"``, and the experts do not support it.
    """
    name = implementation_of(experts)
    good_already = name in RAGGED or (padding == "auto" and not probes and _skips(experts, family))
    if good_already or padding in ("distinct", "sentinel"):
        return None
    possible = _dispatches(experts) and not is_parallel(experts)
    form = RAGGED_FORM.get(name) if possible else None
    if padding == "ragged" and form is None:
        raise _refusal(experts, padding, "it requires " + ", ".join(map(repr, RAGGED_FORM)) + " in one process")
    return form


def _skips(experts: nn.Module, family: Family) -> bool:
    """Whether the experts skip the index E without being switched."""
    skips = family.skips_sentinel or family.null_expert(experts) is not None
    return implementation_of(experts) == EAGER and skips and not is_parallel(experts)


def choose_padding(experts: nn.Module, padding: Padding, family: Family) -> Padding:
    """What to put into unused slots under the current implementation: ``padding`` with ``"auto"`` resolved.

    Raises:
        ValueError: ``padding`` would be wrong, perhaps only since the model was patched.
    """
    ragged = implementation_of(experts) in RAGGED and not is_parallel(experts)
    skips = _skips(experts, family)
    if padding == "auto":
        return "ragged" if ragged else "sentinel" if skips else "distinct"
    if padding == "ragged" and not ragged:
        raise _refusal(experts, padding, f"it needs the implementation that patch() set, one of {', '.join(RAGGED)}")
    if padding == "sentinel" and not (skips or ragged):
        raise _refusal(experts, padding, "only the eager loop skips the index E, except that of GPT-OSS")
    return padding


def _refusal(experts: nn.Module, padding: str, why: str) -> ValueError:
    where = "in several processes" if is_parallel(experts) else "in one process"
    return ValueError(
        f"padding={padding!r} would be wrong for {type(experts).__name__} with the experts implementation "
        f"{implementation_of(experts)!r} {where}: {why}. Use padding='auto' or 'distinct'."
    )


def leave_ragged(experts: Any) -> None:
    """Switch back from a ragged implementation to the one below it."""
    name = implementation_of(experts)
    if name in RAGGED:
        experts.config._experts_implementation = RAGGED[name]


def encoded_probes(indices: Tensor, experts: int) -> Tensor:
    """[T, P] what ragged implementations take for probes of the experts ``indices`` [T, P], E being none."""
    return indices + (experts + 1)


class _Ragged:
    """An experts implementation that drops unused slots and knows probes, on top of another implementation."""

    def __init__(self, inner: str, interface: Any) -> None:
        self.inner = inner
        self.interface = interface

    def __call__(self, experts: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """[T, H] from hidden [T, H], index [T, K + P] in 0..2 E + 1 and weights [T, K + P]."""
        E = experts.num_experts
        loop = type(experts).forward.__wrapped__
        run: Experts = loop if self.inner == EAGER else self.interface.get_interface(self.inner, loop)
        if is_compiling():
            expert = torch.where(index > E, index - (E + 1), index)
            return _run_every_slot(run, experts, hidden, expert, weights.masked_fill(expert == E, 0.0), self.inner)
        # One wait for the device: how many slots are not for probes, and how many of these are unused.
        slots, unused = torch.stack([(index <= E).all(0).sum(), (index == E).sum()]).tolist()
        output = _run_chosen(run, experts, hidden, index[:, :slots], weights[:, :slots], unused > 0)
        if slots == index.shape[-1]:
            return output
        return _add_probes(output, run, experts, hidden, index[:, slots:] - (E + 1), weights[:, slots:])


def _run_every_slot(run: Experts, experts: Any, hidden: Tensor, index: Tensor, weights: Tensor, inner: str) -> Tensor:
    """[T, H] where shapes may not depend on values, from hidden [T, H], index [T, K] in 0..E and weights [T, K].

    All slots have a row, but ``grouped_mm`` multiplies only those of experts: as a part of several processes has it,
    the index E is sorted behind them, where the product ends. Others compute an expert for it, in vain.
    """
    if inner != "grouped_mm":
        return run(experts, hidden, index.clamp(max=experts.num_experts - 1), weights)
    experts._is_expert_parallel = True
    try:
        return run(experts, hidden, index, weights)
    finally:
        experts._is_expert_parallel = False


def _run_chosen(run: Experts, experts: Any, hidden: Tensor, index: Tensor, weights: Tensor, drop: bool) -> Tensor:
    """[T, H] from hidden [T, H], index [T, K] and weights [T, K]; with ``drop`` some of the indices are E."""
    if not drop:
        return run(experts, hidden, index, weights)
    slot = (index < experts.num_experts).reshape(-1).nonzero().squeeze(-1)
    token = slot // index.shape[-1]
    # The gradient of index_select adds whole rows; that of indexing adds element by element.
    rows = hidden.index_select(0, token)
    output = run(experts, rows, index.reshape(-1, 1)[slot], weights.reshape(-1, 1).index_select(0, slot))
    # The other implementations accumulate in float32 too.
    total = hidden.new_zeros(hidden.shape, dtype=torch.promote_types(torch.float32, output.dtype))
    return total.index_add(0, token, output.to(total.dtype)).to(hidden.dtype)


def _add_probes(output: Tensor, run: Experts, experts: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """``output`` [T, H] plus 0, with the probes' part in the gradient of weights [T, P]; index [T, P] in 0..E.

    A probe with an output that is not finite is left out: 0 times it would be NaN.
    """
    slot = (index < experts.num_experts).reshape(-1).nonzero().squeeze(-1)
    if len(slot) == 0:
        return output
    token = slot // index.shape[-1]
    with torch.no_grad():
        rows = hidden.index_select(0, token)
        outputs = run(experts, rows, index.reshape(-1, 1)[slot], weights.new_ones(len(slot), 1))
        outputs = torch.where(outputs.isfinite().all(-1, keepdim=True), outputs, 0.0)
    weighted = outputs * weights.reshape(-1, 1).index_select(0, slot)
    return output.index_add(0, token, weighted.to(output.dtype))
