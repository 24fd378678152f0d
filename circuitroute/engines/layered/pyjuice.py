"""The engine ``pyjuice`` of arbitrary circuits: PyJuice's kernels, on CUDA GPUs only.

For float32 logits PyJuice gives log Z, by its forward pass, and marginals, by its backward pass: the flow through the
input "i is present" is the probability that it is. All of it is in float32 log space, so errors grow with the logits.
What PyJuice does not offer is inherited from the engine ``torch``:

- float64 logits (PyJuice computes in float32);
- samples that are a function of a key, the mode with its rule for ties, the posterior of the count;
- derivatives of the marginals.

It runs only when forced, by ``circuit.with_engine("pyjuice")``.

Legend: T tokens, N variables.
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from circuitroute.circuit.graph import Graph, model_count
from circuitroute.engines.base import Inference
from circuitroute.engines.layered.definite import evaluated
from circuitroute.engines.layered.torch.engine import TorchLayered
from circuitroute.engines.logspace import log_coins, log_normaliser, nan_rows
from circuitroute.errors import EngineError
from circuitroute.interop.pyjuice_circuit import LOG_ZERO, to_pyjuice

# Values held at once, two per node, product and token, which bounds memory for any circuit.
MAX_VALUES = 1 << 28


def missing() -> str | None:
    """What this machine lacks to run the engine, and the remedy; None if nothing."""
    if find_spec("pyjuice") is None:
        return "the package pyjuice is not installed: pip install 'circuitroute[pyjuice]'"
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU, and PyJuice's kernels run on nothing else: use engine 'torch' here"
    return None


class PyjuiceLayered(TorchLayered):
    """PyJuice inference for any smooth, decomposable, deterministic circuit."""

    name = "pyjuice"

    def __init__(self, graph: Graph, max_count: int, name: str) -> None:
        super().__init__(evaluated(graph), max_count)
        self.gives_counts = False
        self._declared, self._declared_name = graph, name
        self._log_models = math.log(model_count(graph))
        self._compiled: dict[torch.device, Any] = {}

    @torch.no_grad()
    def infer(self, logits_TN: Tensor, potential: Tensor | None, key_T: Tensor | None = None) -> Inference:
        """See :class:`circuitroute.engines.base.Engine`."""
        if logits_TN.dtype == torch.float64:
            return super().infer(logits_TN, None, key_T)
        logits = logits_TN.double()
        unshifted = logits.new_zeros(len(logits))
        coins = torch.stack(log_coins(logits, unshifted)).permute(2, 1, 0)
        value, flows = self._in_chunks(coins.clamp(min=LOG_ZERO).float().contiguous())
        empty = value < LOG_ZERO / 2
        log_root = nan_rows(empty, value.double() + self._log_models)
        log_partition = (log_root + log_normaliser(logits, unshifted)).to(logits_TN.dtype)
        mask = None if key_T is None else self.sample(logits_TN, None, key_T)
        return Inference(log_partition, nan_rows(empty, flows[..., 1]), None, unshifted, log_root, mask)

    def _in_chunks(self, coins_TN2: Tensor) -> tuple[Tensor, Tensor]:
        """([T], [T, N, 2]): the log-value of the root, and the probability of every literal."""
        rows = max(1, MAX_VALUES // (2 * (self._declared.num_nodes + self._declared.num_edges)))
        parts = [self._sweep(chunk.contiguous()) for chunk in coins_TN2.split(rows)]
        return torch.cat([value for value, _ in parts]), torch.cat([flows for _, flows in parts])

    def _sweep(self, coins_TN2: Tensor) -> tuple[Tensor, Tensor]:
        """One forward and backward pass of PyJuice."""
        program = self._program(coins_TN2.device)
        data = torch.zeros(coins_TN2.shape[:2], dtype=torch.int64, device=coins_TN2.device)
        value = program(data, external_soft_evi=coins_TN2)[:, 0]
        log_flows = torch.full_like(coins_TN2, -math.inf)
        program.backward(data, external_soft_evi_grad=log_flows, compute_param_flows=False, logspace_flows=True)
        return value, log_flows.exp()

    def _program(self, device: torch.device) -> Any:
        if device.type != "cuda":
            raise EngineError(
                f"engine='pyjuice' was given logits on {device}: PyJuice runs on CUDA GPUs only; "
                "move the logits to one, or use engine 'torch'"
            )
        if device not in self._compiled:
            import pyjuice

            declared = to_pyjuice(self._declared, self._declared_name)
            self._compiled[device] = pyjuice.compile(declared, device=device, verbose=False)
            self._compiled[device].to(device)
        return self._compiled[device]

    def second_derivative(
        self, logits_TN: Tensor, potential: Tensor | None, inference: Inference, u_TN: Tensor, v_TJ: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """See :class:`circuitroute.engines.base.Engine`; around the shift of the engine ``torch``."""
        known = inference if logits_TN.dtype == torch.float64 else super().infer(logits_TN, None)
        return super().second_derivative(logits_TN, None, known, u_TN, v_TJ)
