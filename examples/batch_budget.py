"""What a number of distinct experts per decode step costs, and a total per sequence: quality, time and loss.

    pip install -e '.[demo]'
    python examples/batch_budget.py quality        # the greedy rule beside the best set, by exhaustive search
    python examples/batch_budget.py time           # beside cr.route
    python examples/batch_budget.py model          # bits per byte of the demo's model: M experts per step of 32 tokens
    python examples/batch_budget.py sequence       # and of totals of a sequence

Each writes rows, one JSON object per line, and prints what it has found. "model" and "sequence" train the demo's model
first, once per seed, unless --checkpoints holds it.

Shapes: T tokens, E experts, M experts of a step, B sequences, S bytes of each.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from language_model.config import DemoConfig
from language_model.model import LanguageModel, token_losses
from language_model.process import threads
from language_model.texts import load_corpus
from language_model.trainee import Setting, start
from language_model.training import train
from torch import Tensor

import circuitroute as cr

Row = dict[str, Any]
SEEDS = (0, 1, 2)
BATCH = 32  # sequences that decode together
LIMITS = (4, 6, 8, 10, 12, 16, 20, 24)  # M, of 32 experts
MODEL = {"steps": 300, "experts": 32, "hidden": 64, "validations": 1, "validation_batches": 8, "oracle_rounds": 0}
ROUTER = "top-k"
SHARPNESS = 32.0  # of the law that keeps weight


# ---------------------------------------------------------------------------------------------- quality


def quality(options: argparse.Namespace) -> Iterator[Row]:
    """How much the rule gives away to the best set of what is kept per token, in its unit; and how often nothing."""
    for by, spread, (E, rule, M) in itertools.product(("weights", "logits"), (0.5, 1.0, 2.0, 4.0, 8.0), CASES):
        circuit, gaps = cr.compile(rule, E), {exchanges: [] for exchanges in EXCHANGES}
        sets = torch.stack([set_of(E, chosen) for chosen in itertools.combinations(range(E), M)])
        for trial in range(options.trials):
            logits = spread * torch.randn(8, E, generator=torch.Generator().manual_seed(trial), dtype=torch.float64)
            scores = SHARPNESS * logits.softmax(-1) if by == "weights" else logits
            best = kept(scores, circuit, sets).max()
            for exchanges in EXCHANGES:
                options_ = {"training": False, "by": by, "exchanges": exchanges}
                found = cr.route_batch(logits, circuit, max_distinct=M, **options_).experts
                gaps[exchanges].append(float(best - kept(scores, circuit, set_of(E, found.tolist())[None])[0]))
        unit = SHARPNESS if by == "weights" else 1.0
        for name, values in gaps.items():
            yield {
                "by": by, "spread": spread, "experts": E, "rule": repr(rule), "M": M, "exchanges": name,
                "trials": len(values), "mean_gap": sum(values) / len(values) / unit, "worst_gap": max(values) / unit,
                "optimal": sum(value < 1e-9 for value in values),
            }  # fmt: skip


CASES = ((10, cr.Exactly(2), 4), (10, cr.Exactly(3), 5), (8, cr.Between(1, 3), 4))
CASES += ((8, cr.ActiveGroups(cr.Groups(4), at_most=2) & cr.Exactly(2), 4),)
EXCHANGES = (0, 2, 4, 8)


def set_of(E: int, chosen: Any) -> Tensor:
    return torch.zeros(E, dtype=torch.bool).index_fill(0, torch.tensor(list(chosen)), True)


def kept(scores: Tensor, circuit: cr.Circuit, sets: Tensor) -> Tensor:
    """[sets] the mean over tokens of log P(S within the set)."""
    inside = circuit(scores.expand(len(sets), -1, -1).masked_fill(~sets[:, None], -math.inf), validate_args=False)
    found = inside.log_partition.nan_to_num(nan=-math.inf)  # of a set that leaves a token nothing
    return (found - circuit(scores).log_partition).mean(-1)


# ---------------------------------------------------------------------------------------------- time


def times(options: argparse.Namespace) -> Iterator[Row]:
    """Milliseconds of CPU time, the least of several, of a step of T tokens at (64, 8)."""
    circuit = cr.compile(cr.Exactly(8), 64)
    for T in (16, 64, 256):
        logits = 2 * torch.randn(T, 64, generator=torch.Generator().manual_seed(0))
        mode, keys = partial(cr.route, logits, circuit, training=False), torch.arange(T)
        yield {"T": T, "what": "route", "ms": least(mode)}
        yield {"T": T, "what": "route, sampled", "ms": least(partial(cr.route, logits, circuit, key=keys))}
        for M in (16, 32):
            batch = partial(cr.route_batch, logits, circuit, max_distinct=M)
            for exchanges in (0, 2, 4, 8):
                ms = least(partial(batch, training=False, exchanges=exchanges))
                yield {"T": T, "M": M, "what": f"exchanges={exchanges}", "ms": ms}
            yield {"T": T, "M": M, "what": "sampled", "ms": least(partial(batch, key=keys))}
    for T in (256, 4096):
        logits = 2 * torch.randn(T, 64, generator=torch.Generator().manual_seed(0))
        rule = cr.compile(cr.Between(1, 8), 64)
        yield {"T": T, "what": "route, 1 to 8", "ms": least(partial(cr.route, logits, rule, key=torch.arange(T)))}
        sequence = partial(cr.route_sequence, logits, rule, total=4 * T, key=torch.arange(T))
        yield {"T": T, "what": "sequence", "ms": least(sequence, rounds=3)}


def least(call: Callable[[], object], rounds: int = 9) -> float:
    call()
    found = []
    for _ in range(rounds):
        began = time.process_time()
        call()
        found.append(time.process_time() - began)
    return 1e3 * min(found)


# ---------------------------------------------------------------------------------------------- the model


def trained(seed: int, checkpoints: Path) -> tuple[LanguageModel, list[Tensor]]:
    """The demo's model and batches [B, S + 1] of held-out text."""
    config = DemoConfig(seed=seed, routers=(ROUTER,), **MODEL)
    setting = Setting(config, load_corpus(config), torch.device("cpu"), checkpoints / f"seed{seed}")
    trainee = start(setting, ROUTER, resume=True)
    train(trainee, lambda event: None, lambda: False)
    windows = torch.cat(setting.corpus.validation(config))
    return trainee.model.eval().requires_grad_(False), list(windows.split(BATCH))


Decided = Callable[[Tensor, cr.Router], Tensor]  # one step's logits [B, E] -> mask [B, E]


def bits(model: LanguageModel, batches: list[Tensor], decided: Decided) -> tuple[float, float]:
    """(bits per byte, distinct experts per step and layer), a step being the bytes at one position of B sequences."""
    losses, distinct = [], []

    def steps(logits_TE: Tensor, router: cr.Router) -> cr.Routing:
        logits_BSE = logits_TE.view(BATCH, -1, logits_TE.shape[-1])
        mask = torch.stack([decided(logits_BE, router) for logits_BE in logits_BSE.unbind(1)], 1)
        distinct.append(mask.any(0).sum(-1).double().mean())
        options = {"combine": router.combine, "training": False}
        return cr.route(logits_TE, router.circuit, replay=mask.flatten(0, 1), **options)

    for tokens in batches:
        routers = [cast(cr.Router, model.router(layer)) for layer in range(len(model.blocks))]
        overrides = {layer: partial(steps, router=router) for layer, router in enumerate(routers)}
        losses.append(token_losses(model(tokens[:, :-1], overrides=overrides)[0], tokens[:, 1:]).double().mean())
    return float(torch.stack(losses).mean()) / math.log(2), float(torch.stack(distinct).mean())


def plain(logits: Tensor, router: cr.Router) -> Tensor:
    return cr.route(logits, router.circuit, training=False).mask


def frequency(logits: Tensor, router: cr.Router, M: int) -> Tensor:
    """Top-k within the M experts that most tokens' top-k hold."""
    often = plain(logits, router).sum(0).argsort(descending=True, stable=True)[:M]
    return cr.route_batch(logits, router.circuit, max_distinct=M, training=False, experts=often).mask


def summed(logits: Tensor, router: cr.Router, M: int) -> Tensor:
    """Top-k within the M experts of the largest summed exact marginals."""
    often = router.circuit(logits).marginals.sum(0).argsort(descending=True, stable=True)[:M]
    return cr.route_batch(logits, router.circuit, max_distinct=M, training=False, experts=often).mask


def opportunistic(logits: Tensor, router: cr.Router, first: int) -> Tensor:
    """OEA's rule (arXiv 2511.02237): the union of all top-``first``, and top-k within it; no M is kept."""
    heads = cr.route(logits, cr.compile(cr.Exactly(first), logits.shape[-1]), training=False).mask.any(0)
    most = int(heads.sum())
    if most < router.circuit.min_count:
        return plain(logits, router)
    return cr.route_batch(logits, router.circuit, max_distinct=most, training=False, experts=heads).mask


def ours(logits: Tensor, router: cr.Router, M: int, **options: Any) -> Tensor:
    return cr.route_batch(logits, router.circuit, max_distinct=M, **options).mask


def model(options: argparse.Namespace) -> Iterator[Row]:
    for seed in SEEDS:
        network, batches = trained(seed, options.checkpoints)
        batches = batches[: options.batches]

        def row(rule: str, decided: Decided, M: int | None = None) -> Row:
            found, distinct = bits(network, batches, decided)  # noqa: B023 - called at once
            return {"seed": seed, "rule": rule, "M": M, "distinct": distinct, "bits": found}  # noqa: B023

        yield row("top-k", plain)
        for first in (1, 2, 3):
            yield row(f"OEA, top-{first}", partial(opportunistic, first=first))
        for M in LIMITS:
            yield row("frequency", partial(frequency, M=M), M)
            yield row("summed marginals", partial(summed, M=M), M)
            yield row("first pick", partial(ours, M=M, training=False, exchanges=0), M)
            yield row("greedy", partial(ours, M=M, training=False, exchanges=4), M)
            yield row("greedy by logits", partial(ours, M=M, training=False, exchanges=4, by="logits"), M)
            drawn = partial(ours, M=M, choose="sample", decide="mode", key=cr.random_key(seed, M))
            yield row("set drawn, mode within", drawn, M)


def sequence(options: argparse.Namespace) -> Iterator[Row]:
    """Totals of a sequence in one layer, as experts per token: between 1 and 8 within the total, and k of each."""
    for seed in SEEDS:
        network, batches = trained(seed, options.checkpoints)
        E = network.router(0).circuit.n  # type: ignore[union-attr]
        free = cr.compile(cr.Between(1, 8), E)
        for k in (2, 3, 4, 5, 6):
            for rule in ("k each", "total", "total, cold"):
                spent: list[Tensor] = []

                def decided(logits_TE: Tensor, router: cr.Router) -> cr.Routing:
                    logits = logits_TE.view(BATCH, -1, E)  # noqa: B023
                    weights = {"combine": router.combine, "training": False}
                    if rule == "k each":  # noqa: B023
                        routing = cr.route(logits, cr.compile(cr.Exactly(k), E), **weights)  # noqa: B023
                    else:
                        sharper = 1.0 if rule == "total" else 4.0  # noqa: B023
                        total = k * logits.shape[1]  # noqa: B023
                        mask = cr.route_sequence(sharper * logits, free, total=total, training=False).mask  # noqa: B023
                        routing = cr.route(logits, free, replay=mask, **weights)  # noqa: B023
                    spent.append(routing.counts.double().mean())  # noqa: B023
                    return routing

                losses = []
                for tokens in batches[: options.batches]:
                    routers = [cast(cr.Router, network.router(layer)) for layer in range(len(network.blocks))]
                    overrides = {layer: partial(decided, router=router) for layer, router in enumerate(routers)}
                    found = network(tokens[:, :-1], overrides=overrides)[0]
                    losses.append(token_losses(found, tokens[:, 1:]).double().mean())
                mean = float(torch.stack(losses).mean()) / math.log(2)
                executed = float(torch.stack(spent).mean())
                yield {"seed": seed, "rule": rule, "per_token": k, "executed": executed, "bits": mean}


PARTS = {"quality": quality, "time": times, "model": model, "sequence": sequence}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, help="a file for the rows (default batch-budget-PART.jsonl)")
    parser.add_argument("--trials", type=int, default=40, help="batches per case of quality (default 40)")
    parser.add_argument("--batches", type=int, default=2, help="held-out batches of 32 sequences (default 2)")
    parser.add_argument("--checkpoints", type=Path, help="a directory: keep trained models there, or take them from it")
    options = parser.parse_args()
    out = options.out or Path(f"batch-budget-{options.part}.jsonl")
    with threads(1), tempfile.TemporaryDirectory() as scratch, out.open("w", encoding="utf-8") as file:
        options.checkpoints = options.checkpoints or Path(scratch)
        for row in PARTS[options.part](options):
            print(json.dumps(row), file=file, flush=True)
            print(
                *(f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in row.items())
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main()
