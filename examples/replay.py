"""Routing replay in reinforcement learning: train on exactly what the rollout decided.

A toy policy of four mixture-of-experts layers picks an action for each of some contexts. It is rolled out in bfloat16,
one token at a time, as an inference server might, and trained in float32, all tokens at once. The two do not agree on
every decision. The record of the rollout makes them agree, and the exact log-probabilities of its decisions correct for
what is left: the two sides' policies differ by rounding.
"""

from __future__ import annotations

import copy

import torch
from circuitroute.replay import RoutingRecord, importance_ratio, mismatch, path_log_prob
from torch import Tensor, nn

import circuitroute as cr

LAYERS, EXPERTS, HIDDEN, ACTIONS = 4, 64, 32, 4
SHARPNESS, STEPS, MINIBATCHES, RATE, CLIP = 3.0, 6, 2, 0.5, (0.8, 1.2)


class Policy(nn.Module):
    """Contexts [T, H] to actions' log-probabilities [T, A], by way of between 2 and 6 of 64 experts in each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            cr.MoE(
                cr.DynamicKRouter(HIDDEN, EXPERTS, 2, 6),
                [nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.GELU()) for _ in range(EXPERTS)],
            )
            for _ in range(LAYERS)
        )
        self.head = nn.Linear(HIDDEN, ACTIONS)
        for layer in self.layers:  # as decided as a router that has been trained
            layer.router.weight.data *= SHARPNESS

    def forward(
        self, hidden: Tensor, keys: list[Tensor] | None = None, replay: list[Tensor] | None = None
    ) -> tuple[Tensor, list[cr.Routing]]:
        """The actions' log-probabilities, and what every layer decided: anew, or as in ``replay``."""
        routings = []
        for i, layer in enumerate(self.layers):
            output, routing = layer(hidden, key=keys and keys[i], replay=replay and replay[i])
            hidden = hidden + output
            routings.append(routing)
        return self.head(hidden).float().log_softmax(-1), routings


def roll_out(policy: Policy, contexts: Tensor, keys: list[Tensor]) -> tuple[Tensor, Tensor, RoutingRecord]:
    """Actions [T], their log-probabilities [T], and the record: in bfloat16, one token at a time."""
    server = copy.deepcopy(policy).bfloat16()
    actions, log_probs, records = [], [], []
    for token in range(len(contexts)):
        here = slice(token, token + 1)
        scores, routings = server(contexts[here].bfloat16(), keys=[key[here] for key in keys])
        action = torch.multinomial(scores.exp(), 1)
        actions.append(action[:, 0])
        log_probs.append(scores.gather(1, action)[:, 0])
        records.append(RoutingRecord.of(routings))
    return torch.cat(actions), torch.cat(log_probs), RoutingRecord.cat(records)


def train(
    policy: Policy, contexts: Tensor, actions: Tensor, old: Tensor, reward: Tensor, record: RoutingRecord
) -> None:
    """Proximal policy optimisation of the whole path, routing and action: clipped importance ratios, minibatches."""
    parameters = list(policy.parameters())
    advantage = reward - reward.mean()
    for _ in range(STEPS):
        for some in torch.randperm(len(contexts)).chunk(MINIBATCHES):
            scores, routings = policy(contexts[some], replay=record[some].masks())
            new = path_log_prob(routings) + scores.gather(1, actions[some, None])[:, 0]
            ratio = importance_ratio(new, old[some])
            clipped = importance_ratio(new, old[some], clip=CLIP)
            gain = torch.minimum(ratio * advantage[some], clipped * advantage[some]).mean()
            gradients = torch.autograd.grad(gain, parameters, allow_unused=True)  # experts that nobody chose have none
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:
                        parameter += RATE * gradient


def main(tokens: int = 128, seed: int = 0) -> dict[str, float]:
    """Roll out, compare, train; print a table, and return its numbers."""
    torch.manual_seed(seed)
    policy = Policy()
    contexts = torch.randn(tokens, HIDDEN)
    wanted = contexts[:, :ACTIONS].argmax(-1)
    keys = [cr.random_key(seed, layer, torch.arange(tokens)) for layer in range(LAYERS)]
    with torch.no_grad():
        actions, action_log_prob, record = roll_out(policy, contexts, keys)
        tried = {
            "route again": policy(contexts)[1],
            "route again, same keys": policy(contexts, keys=keys)[1],
            "replay": policy(contexts, replay=record.masks())[1],
        }
        served = RoutingRecord.of(roll_out(policy.eval(), contexts, keys)[2].masks())
        print(f"| {'training side':<28} | subsets | slots | tokens |\n| {'-' * 28} | ---: | ---: | ---: |")
        numbers = {}
        for name, routings in {**tried, "most probable, route again": policy(contexts)[1]}.items():
            found = mismatch(served if name.startswith("most") else record, routings)
            numbers[name] = found.subsets
            print(f"| {name:<28} | {found.subsets:7.1%} | {found.slots:.1%} | {found.tokens:.1%} |")
        policy.train()
        ratio = importance_ratio(path_log_prob(tried["replay"]), record.path_log_prob)
        numbers |= {
            "lowest ratio": float(ratio.min()),
            "mean ratio": float(ratio.mean()),
            "highest ratio": float(ratio.max()),
        }
        print(f"\nimportance ratios of the routing: {ratio.min():.3f} to {ratio.max():.3f}, mean {ratio.mean():.4f}")
    reward = (actions == wanted).float()
    train(policy, contexts, actions, record.path_log_prob + action_log_prob, reward, record)
    with torch.no_grad():
        after = float(policy(contexts)[0].exp().gather(1, wanted[:, None]).mean())
    numbers |= {"reward before": float(reward.mean()), "reward after": after}
    print(
        f"reward: {reward.mean():.3f} in the rollout, {after:.3f} after training on it\n"
        f"the record: {record.nbytes} bytes for {tokens} tokens in {LAYERS} layers"
    )
    return numbers


if __name__ == "__main__":
    main()
