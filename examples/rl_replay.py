"""Reinforcement learning of a mixture of experts whose rollouts come from another engine, with and without replay.

    python examples/rl_replay.py                      # the table of docs/replay.md
    python examples/rl_replay.py --steps 20 --seeds 0

A small policy is taught to name the smallest and the largest of some digits, one token after the other, then trained by GRPO on a reward that a
program gives: 1 if the whole answer is right. As in large stacks, another engine generates: its weights are in 8 bits and
it computes in bfloat16, so that on some tokens its routers choose other experts than the training engine would. The
training engine may route again, or replay the recorded decisions; then the exact log-probabilities of those under both
engines' routers tell how far they are apart, and a truncated importance ratio at the router weighs the tokens.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, median, stdev

import torch
from circuitroute.replay import RoutingRecord, importance_ratio, log_probs, mismatch, truncated_ratio
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import circuitroute as cr

DIGITS, PROMPT, ANSWER, BLANK = 10, 4, 2, 10
HIDDEN, INNER, EXPERTS, CHOSEN, LAYERS = 32, 64, 16, 2, 4
PROMPTS, GROUP = 32, 8  # of a step: so many prompts, with so many answers each
TAUGHT, TEACHING_RATE = 150, 3e-3  # supervised steps before, so that there is something to reward
CLIP, TRUNCATED = (0.8, 1.2), 2.0

ARMS = ("route again", "replay", "replay, truncated ratio")


@dataclass(frozen=True)
class Setting:
    """What a run depends on besides its arm and seed."""

    steps: int = 150
    epochs: int = 2
    minibatches: int = 2
    rate: float = 1e-3
    decide: str = "sample"
    temperature: float = 0.5


class Block(nn.Module):
    """A mixture of experts on normalised tokens, added to them."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(HIDDEN)
        router = cr.ExactKRouter(HIDDEN, EXPERTS, k=CHOSEN, temperature=temperature)
        self.experts = cr.MoE(router, cr.StackedExperts(EXPERTS, HIDDEN, INNER))

    def forward(self, hidden: Tensor, key: Tensor, replay: Tensor | None, decide: str) -> tuple[Tensor, cr.Routing]:
        options = {"decide": decide} if replay is None else {}
        output, routing = self.experts(self.norm(hidden), key=key, replay=replay, **options)
        return hidden + output, routing


class Policy(nn.Module):
    """Prompts and the answer so far, [T, PROMPT + ANSWER - 1] digits or BLANK, to log-probabilities [T, DIGITS]."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.decide = setting.decide
        self.embed = nn.Embedding(DIGITS + 1, HIDDEN)
        self.mix = nn.Linear((PROMPT + ANSWER - 1) * HIDDEN, HIDDEN)
        self.blocks = nn.ModuleList(Block(setting.temperature) for _ in range(LAYERS))
        self.head = nn.Linear(HIDDEN, DIGITS)

    def forward(
        self, seen: Tensor, keys: Sequence[Tensor], replay: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, list[cr.Routing]]:
        hidden, routings = self.mix(self.embed(seen).flatten(1)), []
        for i, block in enumerate(self.blocks):
            hidden, routing = block(hidden, keys[i], None if replay is None else replay[i], self.decide)
            routings.append(routing)
        return self.head(hidden).float().log_softmax(-1), routings


@dataclass(frozen=True)
class Rollout:
    """Tokens of a step: T = PROMPTS * GROUP * ANSWER, answers one after the other within a token's prompt.

    Attributes:
        seen: [T, PROMPT + ANSWER - 1] what the token was generated from.
        token: [T] what was generated.
        log_prob: [T] by the engine that generated.
        advantage: [T] of the whole answer, within its group.
        record: the decisions of all layers.
        keys: [T] per layer.
        reward: mean of the answers'.
    """

    seen: Tensor
    token: Tensor
    log_prob: Tensor
    advantage: Tensor
    record: RoutingRecord
    keys: list[Tensor]
    reward: float


@dataclass
class Curve:
    """What a run showed, a number per step."""

    reward: list[float] = field(default_factory=list)
    subsets: list[float] = field(default_factory=list)
    divergence: list[float] = field(default_factory=list)
    spread: list[float] = field(default_factory=list)
    clipped: list[float] = field(default_factory=list)
    gradient: list[float] = field(default_factory=list)
    solved: float = 0.0


# The task


def prompts_of(seed: int, step: int, count: int) -> Tensor:
    """[count, PROMPT] digits."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    return torch.randint(DIGITS, (count, PROMPT), generator=generator)


def answers_of(prompts: Tensor) -> Tensor:
    """[B, ANSWER]: the smallest digit and the largest."""
    return torch.stack([prompts.amin(1), prompts.amax(1)], dim=1)


def seen_at(prompts: Tensor, answers: Tensor, place: int) -> Tensor:
    """What the token at a place of the answer is generated from."""
    hidden = torch.where(torch.arange(ANSWER - 1) < place, answers[:, : ANSWER - 1], BLANK)
    return torch.cat([prompts, hidden], dim=1)


def keys_of(seed: int, step: int, place: int, count: int) -> list[Tensor]:
    """[count] per layer: both engines may use the same."""
    return [cr.random_key(seed, step, place, layer, torch.arange(count)) for layer in range(LAYERS)]


# The engine that generates


def served(policy: Policy) -> Policy:
    """A copy as an inference server would hold it: weights in 8 bits with a scale per matrix, bfloat16 elsewhere."""
    server = copy.deepcopy(policy)
    with torch.no_grad():
        for parameter in server.parameters():
            if parameter.dim() > 1:
                scale = parameter.abs().max() / torch.finfo(torch.float8_e4m3fn).max
                parameter.copy_((parameter / scale).to(torch.float8_e4m3fn).float() * scale)
    return server.bfloat16()


@torch.no_grad()
def roll_out(server: Policy, seed: int, step: int) -> Rollout:
    """Answers, their tokens' log-probabilities and the record of the routing, by the serving engine."""
    prompts = prompts_of(seed, step, PROMPTS).repeat_interleave(GROUP, dim=0)
    answers = torch.zeros(len(prompts), ANSWER, dtype=torch.int64)
    generator = torch.Generator().manual_seed(seed * 7_919 + step)
    seen, known, records, keys = [], [], [], []
    for place in range(ANSWER):
        seen.append(seen_at(prompts, answers, place))
        keys.append(keys_of(seed, step, place, len(prompts)))
        scores, routings = server(seen[-1], keys[-1])
        token = torch.multinomial(scores.exp(), 1, generator=generator)
        answers[:, place] = token[:, 0]
        known.append(scores.gather(1, token)[:, 0])
        records.append(RoutingRecord.of(routings))
    reward = (answers == answers_of(prompts)).all(1).float()
    groups = reward.view(PROMPTS, GROUP)
    advantage = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()
    return Rollout(
        torch.cat(seen),
        answers.t().flatten(),
        torch.cat(known),
        advantage.repeat(ANSWER),
        RoutingRecord.cat(records),
        [torch.cat(layer) for layer in zip(*keys, strict=True)],
        float(reward.mean()),
    )


# The engine that trains


def forward(policy: Policy, rollout: Rollout, some: Tensor, arm: str) -> tuple[Tensor, list[cr.Routing]]:
    """[t] log-probabilities of the generated tokens by the training engine, and what it decided or replayed."""
    replay = None if arm == "route again" else rollout.record[some].masks()
    scores, routings = policy(rollout.seen[some], [key[some] for key in rollout.keys], replay)
    return scores.gather(1, rollout.token[some, None])[:, 0], routings


def grpo_loss(policy: Policy, rollout: Rollout, some: Tensor, arm: str) -> tuple[Tensor, Tensor]:
    """GRPO's clipped objective per token, weighted by the routers' truncated ratio in that arm; and the ratios [t]."""
    log_prob, routings = forward(policy, rollout, some, arm)
    ratio = importance_ratio(log_prob, rollout.log_prob[some])
    clipped = importance_ratio(log_prob, rollout.log_prob[some], clip=CLIP)
    gain = torch.minimum(ratio * rollout.advantage[some], clipped * rollout.advantage[some])
    if arm == "replay, truncated ratio":
        recorded = rollout.record[some].log_probs
        gain = gain * truncated_ratio(log_probs(routings), recorded, high=TRUNCATED)
    return -gain.mean(), ratio.detach()


def compare(policy: Policy, rollout: Rollout, arm: str, curve: Curve) -> None:
    """How far the engines are apart before anything is learned from a rollout."""
    every = torch.arange(len(rollout.token))
    with torch.no_grad():
        log_prob, routings = forward(policy, rollout, every, arm)
    moved = log_prob.double() - rollout.log_prob.double()
    curve.reward.append(rollout.reward)
    curve.subsets.append(mismatch(routings, rollout.record).subsets)
    # KL(rollout || training) of the tokens, by the estimator r - 1 - log r, which is never negative.
    curve.divergence.append(float((moved.exp() - 1 - moved).mean()))
    curve.spread.append(float(moved.std()))


def update(policy: Policy, optimizer: torch.optim.Optimizer, rollout: Rollout, arm: str, setting: Setting) -> Iterator[tuple[float, float]]:
    """Several passes over a rollout; the gradient's norm and the share of clipped ratios of each minibatch."""
    shuffle = torch.Generator().manual_seed(0)
    for _ in range(setting.epochs):
        for some in torch.randperm(len(rollout.token), generator=shuffle).chunk(setting.minibatches):
            loss, ratio = grpo_loss(policy, rollout, some, arm)
            optimizer.zero_grad()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(policy.parameters(), math.inf)
            optimizer.step()
            yield float(norm), float(((ratio < CLIP[0]) | (ratio > CLIP[1])).float().mean())


def teach(setting: Setting, seed: int) -> Policy:
    """The policy that all arms begin with, supervised for a while."""
    torch.manual_seed(seed)
    policy = Policy(setting)
    optimizer = torch.optim.Adam(policy.parameters(), lr=TEACHING_RATE)
    for step in range(TAUGHT):
        prompts = prompts_of(seed, -1 - step, 256)
        answers = answers_of(prompts)
        loss = torch.zeros(())
        for place in range(ANSWER):
            scores, _ = policy(seen_at(prompts, answers, place), keys_of(seed, -1 - step, place, len(prompts)))
            loss = loss + F.nll_loss(scores, answers[:, place])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy


@torch.no_grad()
def solved(policy: Policy, count: int = 500) -> float:
    """The share of prompts that the serving engine answers right, taking the most probable tokens and experts."""
    server, prompts = served(policy).eval(), prompts_of(12_345, 0, count)
    answers = torch.zeros(count, ANSWER, dtype=torch.int64)
    for place in range(ANSWER):
        scores, _ = server(seen_at(prompts, answers, place), keys_of(0, 0, place, count))
        answers[:, place] = scores.argmax(-1)
    return float((answers == answers_of(prompts)).all(1).float().mean())


def train(start: Policy, arm: str, seed: int, setting: Setting) -> Curve:
    """One run: roll out, compare, learn, again and again."""
    policy, curve = copy.deepcopy(start), Curve()
    optimizer = torch.optim.Adam(policy.parameters(), lr=setting.rate)
    for step in range(setting.steps):
        rollout = roll_out(served(policy), seed, step)
        compare(policy, rollout, arm, curve)
        told = list(update(policy, optimizer, rollout, arm, setting))
        curve.gradient += [norm for norm, _ in told]
        curve.clipped.append(mean(share for _, share in told))
    curve.solved = solved(policy)
    return curve
