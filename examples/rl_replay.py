"""Reinforcement learning of a mixture of experts whose rollouts come from another engine, with and without replay.

    python examples/rl_replay.py                      # the table of docs/replay.md
    python examples/rl_replay.py --steps 20 --seeds 0

A small policy is taught to name the smallest and the largest of some digits, one token after the other, then trained by
GRPO on a reward that a program gives: 1 if the whole answer is right. As in large stacks, another engine generates: its
weights are in 8 bits and it computes in bfloat16, so that on some tokens its routers choose other experts than the
training engine would. The training engine may route again, with keys of its own or with those of the rollout, which
leaves what rounding decides; or it replays the recorded decisions. Then the exact log-probabilities of those under both
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
HIDDEN, INNER, EXPERTS, CHOSEN, LAYERS = 32, 64, 32, 4, 4
PROMPTS, GROUP = 24, 8  # of a step: so many prompts, with so many answers each
TAUGHT, TEACHING_RATE = 16, 3e-3  # supervised steps before, so that there is something to reward
CLIP, HIGHEST = (0.8, 1.2), 2.0

OWN_KEYS, AGAIN, REPLAY, TRUNCATED = "route again, own keys", "route again", "replay", "replay, truncated ratio"
ARMS = (OWN_KEYS, AGAIN, REPLAY, TRUNCATED)


@dataclass(frozen=True)
class Setting:
    """What a run depends on besides its arm and seed."""

    steps: int = 60
    epochs: int = 2
    minibatches: int = 2
    rate: float = 3e-3
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
    replay = rollout.record[some].masks() if arm in (REPLAY, TRUNCATED) else None
    keys = [cr.random_key(1, key[some]) if arm == OWN_KEYS else key[some] for key in rollout.keys]
    scores, routings = policy(rollout.seen[some], keys, replay)
    return scores.gather(1, rollout.token[some, None])[:, 0], routings


def grpo_loss(policy: Policy, rollout: Rollout, some: Tensor, arm: str) -> tuple[Tensor, Tensor]:
    """GRPO's clipped objective per token, weighted by the routers' truncated ratio in that arm; and the ratios [t]."""
    log_prob, routings = forward(policy, rollout, some, arm)
    ratio = importance_ratio(log_prob, rollout.log_prob[some])
    clipped = importance_ratio(log_prob, rollout.log_prob[some], clip=CLIP)
    gain = torch.minimum(ratio * rollout.advantage[some], clipped * rollout.advantage[some])
    if arm == TRUNCATED:
        recorded = rollout.record[some].log_probs
        gain = gain * truncated_ratio(log_probs(routings), recorded, high=HIGHEST)
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


def update(
    policy: Policy, optimizer: torch.optim.Optimizer, rollout: Rollout, arm: str, setting: Setting
) -> Iterator[tuple[float, float]]:
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


# The comparison


@dataclass(frozen=True)
class Row:
    """One run in numbers.

    Attributes:
        reward: mean over the last fifth of the steps.
        solved: share of unseen prompts that the serving engine answers right at the end.
        subsets: share of decisions that the two engines make differently on a rollout, before any update.
        divergence: KL(rollout || training) of a generated token, before any update.
        spread: standard deviation of the tokens' log-ratio, before any update.
        clipped: share of ratios beyond the bounds, over all updates.
        gradient: median norm.
        spike: largest norm over the median, 0 where that is 0.
        collapsed: the reward of the last fifth is less than half of what ten steps in a row once had.
    """

    arm: str
    seed: int
    reward: float
    solved: float
    subsets: float
    divergence: float
    spread: float
    clipped: float
    gradient: float
    spike: float
    collapsed: bool


def row_of(arm: str, seed: int, curve: Curve) -> Row:
    steps, window = len(curve.reward), min(10, len(curve.reward))
    last = mean(curve.reward[-math.ceil(steps / 5) :])
    best = max(mean(curve.reward[i : i + window]) for i in range(steps - window + 1))
    typical = median(curve.gradient)
    return Row(
        arm,
        seed,
        reward=last,
        solved=curve.solved,
        subsets=mean(curve.subsets),
        divergence=mean(curve.divergence),
        spread=mean(curve.spread),
        clipped=mean(curve.clipped),
        gradient=typical,
        spike=max(curve.gradient) / typical if typical else 0.0,
        collapsed=last < best / 2,
    )


def paired(rows: Sequence[Row], arm: str) -> str:
    """The difference of an arm's reward to that of routing again with the same seed."""
    first = {row.seed: row.reward for row in rows if row.arm == AGAIN}
    own = [row for row in rows if row.arm == arm and row.seed in first]
    return "" if arm == AGAIN or not own else shown([row.reward - first[row.seed] for row in own], "+")


def shown(values: Sequence[float], sign: str = "") -> str:
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.3f}{spread}"


def table_of(rows: Sequence[Row]) -> Table:
    table = Table(title="Means over seeds, ± their standard deviation", box=SIMPLE_HEAD)
    headings = ("training side", "reward", "paired", "solved", "subsets", "KL x 1000", "log-ratio", "clipped", "spike")
    for heading in (*headings, "collapsed"):
        table.add_column(heading, no_wrap=True, justify="left" if heading == headings[0] else "right")
    for arm in dict.fromkeys(row.arm for row in rows):
        own = [row for row in rows if row.arm == arm]
        table.add_row(
            arm,
            shown([row.reward for row in own]),
            paired(rows, arm),
            shown([row.solved for row in own]),
            f"{mean(row.subsets for row in own):.1%}",
            shown([1000 * row.divergence for row in own]),
            f"{mean(row.spread for row in own):.3f}",
            f"{mean(row.clipped for row in own):.1%}",
            f"{mean(row.spike for row in own):.1f}",
            f"{sum(row.collapsed for row in own)} of {len(own)}",
        )
    return table


def run(setting: Setting, seeds: Sequence[int], arms: Sequence[str], console: Console) -> list[Row]:
    """The arms from the same policies, on the same prompts and keys."""
    rows = []
    for seed in seeds:
        start = teach(setting, seed)
        console.print(f"seed {seed}: {solved(start):.3f} solved when taught")
        for arm in arms:
            rows.append(row_of(arm, seed, train(start, arm, seed, setting)))
            console.print(f"  {arm}: reward {rows[-1].reward:.3f}, solved {rows[-1].solved:.3f}")
    return rows


# The program


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    standard = Setting()
    parser.add_argument("--steps", type=positive, default=standard.steps, help="rollouts (default %(default)s)")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="of weights and prompts (default 0 1 2)"
    )
    parser.add_argument(
        "--epochs", type=positive, default=standard.epochs, help="passes over each (default %(default)s)"
    )
    parser.add_argument("--rate", type=float, default=standard.rate, help="learning rate (default %(default)s)")
    parser.add_argument(
        "--decide", choices=("sample", "mode"), default=standard.decide, help="how routers choose (default %(default)s)"
    )
    parser.add_argument("--arms", choices=ARMS, nargs="+", default=list(ARMS), help="training sides (default all)")
    parser.add_argument("--rows", type=Path, help="a file to append a line of JSON per run to")
    return parser.parse_args(arguments)


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Run, print the table, and return its rows."""
    options = parse(arguments)
    torch.set_num_threads(1)  # too small a model to gain from more
    console = Console(width=170)
    setting = Setting(options.steps, options.epochs, rate=options.rate, decide=options.decide)
    rows = run(setting, options.seeds, options.arms, console)
    if options.rows is not None:
        with options.rows.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(setting) | asdict(row)) + "\n" for row in rows)
    console.print(table_of(rows))
    return rows


if __name__ == "__main__":
    main()
