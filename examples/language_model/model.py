"""A small decoder-only mixture-of-experts transformer over bytes.

Shapes: B sequences, S positions, T = B S tokens, H hidden size, E experts, V = 256 byte values, A attention
heads, D = H / A.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

import circuitroute as cr

from .config import HEAD_SIZE, DemoConfig
from .kinds import KINDS, RouterKind
from .plans import LayerRouter

VOCABULARY = 256
RECENT = 4  # bytes that the first layer sees at once: one says little, and attention learns this slowly
# A budget router starts, in each layer, where that layer's own router would: so models differ in their routing alone.
_BUDGET_ROUTER = re.compile(r"^plan\.budget\.routers\.(\d+)\.")
Override = Callable[[Tensor], cr.Routing]
Choose = Callable[[Tensor], cr.Routing]  # a layer's hidden states [B, S, H] -> its routing


class Attention(nn.Module):
    """Causal self-attention with rotary positions: [B, S, H] -> [B, S, H]."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.project_in = nn.Linear(hidden, 3 * hidden, bias=False)
        self.project_out = nn.Linear(hidden, hidden, bias=False)

    def forward(self, hidden_BSH: Tensor) -> Tensor:
        batch, length, width = hidden_BSH.shape
        heads = self.project_in(hidden_BSH).view(batch, length, 3, width // HEAD_SIZE, HEAD_SIZE)
        query_BASD, key_BASD, value_BASD = heads.permute(2, 0, 3, 1, 4).unbind(0)
        out_BASD = functional.scaled_dot_product_attention(
            _rotate(query_BASD), _rotate(key_BASD), value_BASD, is_causal=True
        )
        out_BSH: Tensor = self.project_out(out_BASD.transpose(1, 2).reshape(batch, length, width))
        return out_BSH


def _rotate(x_BASD: Tensor) -> Tensor:
    """Rotary position embedding (Su et al., 2021)."""
    length, half = x_BASD.shape[-2], x_BASD.shape[-1] // 2
    frequencies = 1000.0 ** -(torch.arange(half, device=x_BASD.device) / half)
    angles = torch.arange(length, device=x_BASD.device)[:, None] * frequencies
    a, b = x_BASD.chunk(2, dim=-1)
    return torch.cat((a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()), dim=-1)


class Block(nn.Module):
    """Attention, then a mixture of experts, each on a normalised residual stream."""

    def __init__(self, config: DemoConfig, kind: RouterKind) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.hidden)
        self.attention = Attention(config.hidden)
        self.experts_norm = nn.RMSNorm(config.hidden)
        experts = cr.StackedExperts(config.experts, config.hidden, config.hidden, _squared_relu)
        self.experts = cr.MoE(kind.layer(config), experts, kind.probes)
        self.dropout = nn.Dropout(kind.dropout)

    def forward(self, hidden_BSH: Tensor, choose: Choose, key_T: Tensor | None) -> tuple[Tensor, cr.Routing]:
        hidden_BSH = hidden_BSH + self.dropout(self.attention(self.attention_norm(hidden_BSH)))
        normed_BSH = self.experts_norm(hidden_BSH)
        key_T = key_T if self.experts.probes else None  # of the probes; the decision has its own
        out_BSH, routing = self.experts(normed_BSH, routing=choose(normed_BSH), key=key_T)
        return hidden_BSH + self.dropout(out_BSH), routing


def _squared_relu(x: Tensor) -> Tensor:
    """So et al., 2021: does as well as GELU and costs far less on a CPU."""
    return x.relu().square()


class LanguageModel(nn.Module):
    """Bytes [B, S] int64 -> next-byte logits [B, S, V] and the routing of every layer. Forward keeps no state.

    keys: one int64 [T] per layer, for a router that samples (in training mode).
    overrides: layer -> function from that layer's router logits [T, E] to the Routing to use instead, for layers
    with a router of their own.
    calibrating: see `calibrate`.
    """

    def __init__(self, config: DemoConfig, router: str) -> None:
        super().__init__()
        kind = KINDS[router]
        self.embedding = nn.Embedding(VOCABULARY, config.hidden)
        self.mix_recent = nn.Linear(RECENT * config.hidden, config.hidden, bias=False)
        self.blocks = nn.ModuleList(Block(config, kind) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden)
        self.head = nn.Linear(config.hidden, VOCABULARY, bias=False)
        self.plan = kind.plan(config)
        if kind.frozen:
            for layer in range(config.layers):
                cast(cr.Router, self.router(layer)).requires_grad_(False)

    def forward(
        self,
        tokens_BS: Tensor,
        keys: Sequence[Tensor] | None = None,
        overrides: Mapping[int, Override] | None = None,
        calibrating: bool = False,
    ) -> tuple[Tensor, list[cr.Routing]]:
        hidden_BSH = self.embedding(tokens_BS)
        hidden_BSH = hidden_BSH + self.mix_recent(_recent(hidden_BSH))
        state = self.plan.begin(hidden_BSH)
        routings: list[cr.Routing] = []

        def choose(normed_BSH: Tensor) -> cr.Routing:
            nonlocal state
            layer = len(routings)
            router = self.router(layer)
            if overrides and layer in overrides:
                assert router is not None
                return overrides[layer](router.logits(normed_BSH.flatten(0, 1)))
            if calibrating:
                self.plan.calibrate(router, normed_BSH, layer, state)
            key_T = None if keys is None else keys[layer]
            routing, state = self.plan.route(router, normed_BSH, layer, state, key_T)
            return routing

        for layer, block in enumerate(self.blocks):
            hidden_BSH, routing = block(hidden_BSH, choose, None if keys is None else keys[layer])
            routings.append(routing)
        return self.head(self.norm(hidden_BSH)), routings

    @torch.no_grad()
    def calibrate(self, tokens_BS: Tensor) -> None:
        """Sets, layer by layer, what the routers read off training text instead of learning it by gradient."""
        if not self.plan.calibrated:
            return
        training = self.training
        self.eval()  # nothing is drawn
        self(tokens_BS, calibrating=True)
        self.train(training)

    @property
    def samples(self) -> bool:
        """Whether training executes samples, instead of the mode or of what a threshold says."""
        router = self.router(0)
        return not self.plan.soft and (router is None or cast(cr.Router, router).decide in (None, "sample"))

    def set_temperature(self, temperature: float) -> None:
        """Of the layers' own routers, from now on."""
        for layer in range(len(self.blocks)):
            cast(cr.Router, self.router(layer)).temperature = temperature

    def router(self, layer: int) -> LayerRouter | None:
        """The layer's own router; None where one router serves the whole model."""
        return cast(LayerRouter | None, cast(Block, self.blocks[layer]).experts.router)


def _recent(hidden_BSH: Tensor) -> Tensor:
    """Each position beside those before it, [B, S, RECENT H], zeros before the first."""
    length = hidden_BSH.shape[1]
    padded = functional.pad(hidden_BSH, (0, 0, RECENT - 1, 0))
    return torch.cat([padded[:, shift : shift + length] for shift in range(RECENT)], dim=-1)


def build_model(config: DemoConfig, router: str) -> LanguageModel:
    """A model whose weights depend on the seed and their own names alone: equal across routers where shapes agree.
    Leaves torch's global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        model = LanguageModel(config, router)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if is_matrix(name, weight):
                generator = torch.Generator().manual_seed(zlib.crc32(f"{config.seed}/{common_name(name)}".encode()))
                scale = 0.02 if name == "embedding.weight" else weight.shape[-1] ** -0.5
                weight.normal_(0.0, scale, generator=generator)
    return model


def common_name(name: str) -> str:
    """A parameter's name in models whose layers have routers of their own."""
    return _BUDGET_ROUTER.sub(r"blocks.\1.experts.router.", name)


def is_matrix(name: str, weight: Tensor) -> bool:
    """Whether a parameter is a linear map: drawn at random and subject to weight decay. A table of a plan, such as the
    preferences among counts, is not, whatever its shape."""
    return weight.dim() >= 2 and name.endswith(("weight", ".up", ".down"))


def token_losses(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """Cross-entropy of every position in nats, [B, S] float32."""
    return functional.cross_entropy(logits_BSV.flatten(0, 1), targets_BS.flatten(), reduction="none").view_as(
        targets_BS
    )
