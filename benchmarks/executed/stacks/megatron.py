"""Megatron-core: a ``MoELayer`` with ``SequentialMLP``, by token dispatcher; a fixed top-k is the stock router.

Where every token pays for k slots, those it does not use are in the routing map with probability 0, as a router has to
do whose contract is a fixed number of indices. Several processes share the experts (expert parallelism).

Without a GPU, the functions of torch.cuda that Megatron calls to copy counts to the CPU do nothing: they are there
already. The stock router's linear map, which needs a GPU, is the adapter's.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.executed.settings import Layer, Setting

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it says what it would use if it were installed
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import layers, mappings
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe import token_dispatcher
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_config import TransformerConfig

    from circuitroute.integrations import megatron as adapter

PACKAGES = ("megatron.core",)
WAYS = ("allgather", "alltoall")
GROUPS = ("ep", "tp", "cp", "tp_cp", "tp_dp_cp", "expt_tp", "expt_dp", "tp_ep")


class StockRouter(TopKRouter):
    """Megatron's, whose linear map runs anywhere."""

    gating = adapter.CircuitRouter.gating


class PaddedRouter(adapter.CircuitRouter):
    """Every token pays for k slots, those it does not use with probability 0."""

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with adapter.recorded_routings(self) as routings:
            probs, _ = super().routing(logits, padding_mask)
        _, indices = routings[0].padded(self.topk, pad="distinct")
        return probs, torch.zeros_like(routings[0].mask).scatter_(1, indices, True)


def build(way: str, setting: Setting) -> Layer:
    """The layer, with all of its parts on the CPU."""
    torch.manual_seed(0)
    submodules = MoESubmodules(
        experts=ModuleSpec(
            module=SequentialMLP,
            submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
        ),
        router=_router(setting),
    )
    with _stand_ins():
        layer = MoELayer(_configuration(way, setting), submodules, pg_collection=_groups())
    layer.set_layer_number(1)
    with torch.no_grad():
        layer.router.weight.copy_(setting.priced_router)
    chosen: list[float] = []

    def count(router: Any, given: Any, output: tuple[Tensor, Tensor]) -> None:
        chosen[:] = [float((output[0].detach() > 0).sum(-1).double().mean())]

    layer.router.register_forward_hook(count)

    def run(hidden: Tensor) -> Tensor:
        with _stand_ins():
            output, _ = layer(hidden.unsqueeze(1))
        return output.squeeze(1)

    return Layer(layer, run, lambda: chosen[0])


def _router(setting: Setting) -> Any:
    if setting.asked is None:
        return StockRouter
    if setting.padded:
        return lambda config, pg_collection: PaddedRouter(
            config, pg_collection, constraint=setting.constraint, decide="mode"
        )
    return adapter.router(setting.constraint, decide="mode")


def _configuration(way: str, setting: Setting) -> Any:
    sizes = setting.sizes
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TransformerConfig(
            num_layers=1,
            hidden_size=sizes.hidden,
            num_attention_heads=2,
            num_moe_experts=sizes.experts,
            moe_router_topk=sizes.k,
            moe_router_load_balancing_type="none",
            moe_token_dispatcher_type=way,
            expert_model_parallel_size=dist.get_world_size() if dist.is_initialized() else 1,
            add_bias_linear=False,
            use_cpu_initialization=True,
            ffn_hidden_size=sizes.inner,
            moe_ffn_hidden_size=sizes.inner,
        )


# ---------------------------------------------------------------------------------------------- processes and GPUs


class _Alone:
    """A process group of one process, as far as Megatron asks."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def _groups() -> Any:
    """Megatron's process groups: those of expert parallelism, or of a process without any."""
    if not dist.is_initialized():
        return SimpleNamespace(**dict.fromkeys(GROUPS, _Alone()))
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(expert_model_parallel_size=dist.get_world_size())
    return get_default_pg_collection()


class _Stream:
    """A stream of a CPU, where nothing runs beside anything."""

    def wait_stream(self, other: Any) -> None:
        """Nothing to wait for."""

    def record_event(self) -> Any:
        return self

    def synchronize(self) -> None:
        """Nothing to wait for."""


def _already_there(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and isinstance(tensor, Tensor) else tensor


@contextlib.contextmanager
def _stand_ins() -> Iterator[None]:
    """For a GPU and for process groups, where there are none; in several processes for good: backward asks too."""
    replaced: list[Any] = []
    if not dist.is_initialized():
        asked = "get_tensor_model_parallel_group_if_none"
        replaced += [mock.patch.object(module, asked, return_value=_Alone()) for module in (layers, mappings)]
    if not torch.cuda.is_available():
        replaced += [
            mock.patch.object(torch.cuda, "current_device", return_value=torch.device("cpu")),
            mock.patch.object(torch.cuda, "Stream", _Stream),
            mock.patch.object(torch.cuda, "current_stream", _Stream),
            mock.patch.object(torch.cuda, "stream", return_value=contextlib.nullcontext()),
            mock.patch.object(token_dispatcher, "maybe_move_tensor_to_cpu", _already_there),
        ]
    with contextlib.ExitStack() as until_then:
        for each in replaced:
            until_then.enter_context(each)
        if dist.is_initialized():
            until_then.pop_all()
        yield
