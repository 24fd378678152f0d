"""Megatron-core's mixture-of-experts layers on CPUs; importing this imports Megatron-core.

Megatron asks for a GPU where it needs none: :func:`no_gpu` stands in for the few functions of torch.cuda that it calls.
Nothing of what is tested is replaced.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it says what it would use if it were installed
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe import token_dispatcher
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_config import TransformerConfig

    from circuitroute.integrations import megatron

import circuitroute as cr

MARKS = [
    pytest.mark.integrations,
    pytest.mark.filterwarnings("ignore:Warning. tp_group is None:DeprecationWarning"),  # Megatron's own modules do that
]

S, B, H, E = 6, 2, 16, 8
T = S * B


@contextlib.contextmanager
def one_process() -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


class Stream:
    """A stream of a CPU, where nothing runs beside anything."""

    def wait_stream(self, other: Any) -> None:
        """Nothing to wait for."""

    def record_event(self) -> Any:
        return self

    def synchronize(self) -> None:
        """Nothing to wait for."""


def no_gpu(replace: Callable[[Any, str, Any], None]) -> None:
    """Megatron makes its counters and buffers on "the current GPU", and copies counts to the CPU on a stream."""
    replace(torch.cuda, "current_device", lambda: torch.device("cpu"))
    replace(torch.cuda, "Stream", Stream)
    replace(torch.cuda, "current_stream", Stream)
    replace(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    # Counts that are on the CPU already would stay tensors, which torch.distributed does not take for sizes.
    move = token_dispatcher.maybe_move_tensor_to_cpu

    def moved(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        given = move(tensor, as_numpy, record_stream)
        return given.numpy() if as_numpy and isinstance(given, Tensor) else given

    replace(token_dispatcher, "maybe_move_tensor_to_cpu", moved)


def configuration(**settings: Any) -> Any:
    defaults = {
        "num_layers": 2,
        "hidden_size": H,
        "num_attention_heads": 2,
        "num_moe_experts": E,
        "moe_router_topk": 4,
        "moe_token_dispatcher_type": "allgather",
        "moe_router_load_balancing_type": "none",
        "add_bias_linear": False,
        "use_cpu_initialization": True,
        "ffn_hidden_size": 24,
        "moe_ffn_hidden_size": 24,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TransformerConfig(**{**defaults, **settings})


def build(router: Any = None, **settings: Any) -> Any:
    linear = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    given = {} if router is None else {"router": router}
    submodules = MoESubmodules(experts=ModuleSpec(module=SequentialMLP, submodules=linear), **given)
    layer = MoELayer(configuration(**settings), submodules, pg_collection=get_default_pg_collection())
    layer.set_layer_number(1)
    torch.manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


def build_circuit(constraint: cr.Constraint, seed: int | None = 0, **settings: Any) -> Any:
    layer = build(megatron.router(constraint, seed=seed), **settings)
    megatron.begin_step(layer, 0)
    return layer


def hidden(requires_grad: bool = False) -> Tensor:
    return torch.randn(S, B, H, generator=torch.Generator().manual_seed(1)).requires_grad_(requires_grad)


def dense(layer: Any, x: Tensor, gates_TE: Tensor) -> Tensor:
    """All experts on all tokens, weighted by the gates."""
    tokens = x.flatten(0, 1)
    ones = torch.ones(len(tokens), dtype=x.dtype)
    outputs = torch.stack([expert(tokens, ones)[0] for expert in layer.experts.local_experts], 1)
    return (outputs * gates_TE[..., None]).sum(1).view_as(x)
