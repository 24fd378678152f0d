"""Prune a trained mixture of experts to a budget over all its layers, learning which experts to keep.

    pip install -e '.[demo]'
    python examples/prune_experts.py --budgets 48 32 24

Trains the demo's small language model. Then every (layer, expert) gets a score, and cr.LayerBudget makes the scores a
distribution over what may be kept: as many experts in all as the budget says, in every layer enough to route to. The
gradient of the expected loss, estimated from sampled subsets, moves the scores; the most probable subset is kept.

Shapes: L layers, E experts in each, N = L E, B sequences, S bytes in each, T = B S tokens.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
from language_model.config import DemoConfig, DemoError
from language_model.model import LanguageModel, token_losses
from language_model.process import threads
from language_model.progress import make_console, progress_on
from language_model.texts import load_corpus
from language_model.trainee import Setting, start
from language_model.training import train
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

import circuitroute as cr

ROUTER = "top-k"  # the stock router: what a model that needs pruning usually has
RATE = 0.2  # of Adam, falling to 0
RANDOM_DRAWS = 5
REMOVAL_BATCHES = 3  # a forward pass per expert and batch: about the work of learning for one budget


def allowed(config: DemoConfig, budget: int, at_least: int, at_most: int) -> cr.Circuit:
    """What may be kept: `budget` experts in all, in every layer between `at_least` and `at_most`."""
    rule = cr.LayerBudget(config.layers, config.experts, cr.Between(at_least, at_most), cr.Exactly(budget))
    return cr.compile(rule, config.layers * config.experts)


def routable(config: DemoConfig, budget: int) -> cr.Circuit:
    """What may be kept if every token is to find its k experts in every layer."""
    return allowed(config, budget, config.k, config.experts)


@dataclass(frozen=True)
class Task:
    """A trained model, the text that decides what to prune, and the text that judges it: batches [B, S + 1]."""

    model: LanguageModel
    config: DemoConfig
    calibration: list[Tensor]
    held_out: list[Tensor]

    def losses(self, tokens_BS: Tensor, kept_BN: Tensor | None = None) -> Tensor:
        """Nats per byte of every sequence, [B], each with its own experts kept (all where None)."""
        overrides = None
        if kept_BN is not None:
            kept_BLE = kept_BN.expand(len(tokens_BS), -1).unflatten(-1, (self.config.layers, self.config.experts))
            kept_LTE = kept_BLE.repeat_interleave(tokens_BS.shape[1] - 1, dim=0).unbind(1)
            routers = [cast(cr.Router, self.model.router(layer)) for layer in range(self.config.layers)]
            overrides = {
                layer: partial(route_kept, router=router, kept_TE=kept_LTE[layer])
                for layer, router in enumerate(routers)
            }
        logits_BSV, _ = self.model(tokens_BS[:, :-1], overrides=overrides)
        return token_losses(logits_BSV, tokens_BS[:, 1:]).mean(dim=-1)

    @cached_property
    @torch.no_grad()
    def unpruned(self) -> list[Tensor]:
        """The loss of the whole model on the calibration text, [B] per batch."""
        return [self.losses(tokens_BS) for tokens_BS in self.calibration]

    @torch.no_grad()
    def bits(self, kept_N: Tensor | None = None) -> float:
        """Held-out bits per byte."""
        losses = [self.losses(tokens_BS, kept_N) for tokens_BS in self.held_out]
        return float(torch.cat(losses).double().mean()) / math.log(2)


def route_kept(logits_TE: Tensor, router: cr.Router, kept_TE: Tensor) -> cr.Routing:
    """What the router chooses among the kept experts, softmax weights over these.

    With a gradient in `kept_TE`, removed experts that the token would have chosen run too, at weight 0: that is how the
    gradient learns what keeping them would have changed.
    """
    choose = partial(cr.route, circuit=router.circuit, combine="softmax", estimator="none", training=False)
    routing = choose(logits_TE.masked_fill(kept_TE < 0.5, -math.inf))
    if not kept_TE.requires_grad:
        return routing
    mask_TE = routing.mask | choose(logits_TE).mask
    weights_TE = kept_TE * logits_TE.softmax(dim=-1)
    gates_TE = torch.where(mask_TE, weights_TE / weights_TE.sum(dim=-1, keepdim=True), 0.0)
    return cr.Routing(routing.distribution, mask_TE, gates_TE)


# Learning what to keep


def score_loss(task: Task, distribution: cr.SubsetDistribution, batch: int, key: Tensor) -> Tensor:
    """The score function: unbiased, and forward passes suffice. The loss of the whole model on a sequence does not
    depend on the sample, so subtracting it reduces the variance and nothing else."""
    tokens_BS = task.calibration[batch]
    kept_BN = distribution.sample((len(tokens_BS),), key=key)
    with torch.no_grad():
        cost_B = task.losses(tokens_BS, kept_BN) - task.unpruned[batch]
    return cr.estimators.score_function_loss(distribution.log_prob(kept_BN), cost_B)


def simple_loss(task: Task, distribution: cr.SubsetDistribution, batch: int, key: Tensor) -> Tensor:
    """SIMPLE: the loss with the sampled experts, whose gradient is passed on to the marginals. Biased, but with far
    less noise: every expert of every layer learns from every byte, not only from the sequence's loss."""
    tokens_BS = task.calibration[batch]
    return task.losses(tokens_BS, distribution.rsample((len(tokens_BS),), key=key)).mean()


ESTIMATORS = {"score function": score_loss, "SIMPLE": simple_loss}


def learn(task: Task, budget: int, estimator: str, steps: int, console: Console) -> cr.SubsetDistribution:
    """The distribution after `steps` updates of its scores; twice as many where no backward pass is needed."""
    steps = steps if estimator == "SIMPLE" else 2 * steps
    circuit = routable(task.config, budget)
    scores_N = torch.zeros(circuit.n, requires_grad=True)
    optimizer = torch.optim.Adam([scores_N], lr=RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for step in range(steps):
        batch, key = step % len(task.calibration), cr.random_key(task.config.seed, step)
        loss = ESTIMATORS[estimator](task, circuit(scores_N), batch, key)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % math.ceil(steps / 4) == 0:
            entropy = float(circuit(scores_N.detach()).entropy())
            console.print(f"  {estimator}: step {step + 1}/{steps}, entropy {entropy:.1f} nats")
    found = circuit(scores_N.detach())
    describe(task, found, estimator, console)
    return found


# Baselines: scores [N] that the same circuit turns into a subset


@torch.no_grad()
def magnitudes(task: Task) -> Tensor:
    """The norm of each expert's weights."""
    stacks = [cast(Any, block).experts.experts for block in task.model.blocks]
    return torch.cat([torch.cat([stack.up.flatten(1), stack.down.flatten(1)], dim=1).norm(dim=1) for stack in stacks])


@torch.no_grad()
def usage(task: Task) -> Tensor:
    """How many tokens of the calibration text choose each expert."""
    counts_LE = torch.zeros(task.config.layers, task.config.experts)
    for tokens_BS in task.calibration:
        _, routings = task.model(tokens_BS[:, :-1])
        counts_LE += torch.stack([routing.mask.sum(dim=0) for routing in routings])
    return counts_LE.flatten()


@torch.no_grad()
def removal_costs(task: Task) -> Tensor:
    """The loss on calibration text with one expert removed, for each in turn."""
    batches = task.calibration[:REMOVAL_BATCHES]
    kept_NN = 1 - torch.eye(task.config.layers * task.config.experts)
    return torch.stack(
        [torch.cat([task.losses(tokens_BS, kept_N) for tokens_BS in batches]).mean() for kept_N in kept_NN]
    )


# The comparison


@dataclass(frozen=True)
class Row:
    """One line of the table. `kept`: how many experts each layer keeps, None for the mean of several subsets."""

    budget: int
    method: str
    bits: float
    kept: list[int] | None


def ranked(task: Task, budget: int, rankings: dict[str, Tensor]) -> Iterator[Row]:
    """The subsets that need no learning at this budget."""
    circuit = routable(task.config, budget)
    uniform = circuit(torch.zeros(circuit.n))  # every allowed subset with the same probability
    draws = uniform.sample((RANDOM_DRAWS,), key=cr.random_key(task.config.seed, budget))
    yield Row(budget, f"random, mean of {RANDOM_DRAWS}", sum(map(task.bits, draws)) / RANDOM_DRAWS, None)
    share, rest = divmod(budget, task.config.layers)
    equal = allowed(task.config, budget, share, share + (rest > 0))
    yield row_of(task, budget, "magnitude, equal layers", equal(rankings["magnitude"]).mode)
    for name, scores_N in rankings.items():
        yield row_of(task, budget, name, circuit(scores_N).mode)


def row_of(task: Task, budget: int, method: str, kept_N: Tensor) -> Row:
    per_layer = kept_N.view(task.config.layers, -1).sum(dim=-1).int().tolist()
    return Row(budget, method, task.bits(kept_N), per_layer)


def describe(task: Task, found: cr.SubsetDistribution, name: str, console: Console) -> None:
    """What the distribution says, exactly: how sure it is, and how probably each expert is kept."""
    marginals_N, kept_N = found.marginals, found.mode
    sure, most = float(found.entropy()), math.log(found.circuit.model_count())
    shared = float((marginals_N * kept_N).sum())
    console.print(
        f"  {name}: entropy {sure:.1f} of at most {most:.1f} nats; a sample shares {shared:.1f} of {int(kept_N.sum())} "
        "experts with the mode; P(kept) in percent:",
        soft_wrap=True,
    )
    for layer, marginals_E in enumerate(marginals_N.view(task.config.layers, -1)):
        console.print(f"    layer {layer}:" + "".join(f"{100 * float(p):4.0f}" for p in marginals_E), soft_wrap=True)


def table_of(rows: Sequence[Row], whole: float, total: int) -> Table:
    table = Table(title=f"Held-out bits per byte; {whole:.3f} with all {total} experts", box=SIMPLE_HEAD)
    for heading in ("experts", "chosen by", "bits/byte", "lost", "kept per layer"):
        table.add_column(heading, no_wrap=True, justify="left" if heading == "chosen by" else "right")
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        kept = "-" if row.kept is None else " ".join(map(str, row.kept))
        last = following is None or following.budget != row.budget
        cells = (f"{row.bits:.3f}", f"{row.bits - whole:+.3f}", kept)
        table.add_row(f"{row.budget}", row.method, *cells, end_section=last)
    return table


# The program


def config_of(options: argparse.Namespace) -> DemoConfig:
    """Raises DemoError or cr.InfeasibleError for impossible options, before anything slow."""
    config = DemoConfig(
        steps=options.steps,
        seed=options.seed,
        routers=(ROUTER,),
        validations=2,
        validation_batches=options.held_out,
        oracle_rounds=0,
    )
    for budget in options.budgets:
        routable(config, budget)
    return config


def prepare(config: DemoConfig, directory: Path, batches: int, console: Console) -> Task:
    """The model of an earlier run in `directory`, or one trained now and saved there."""
    setting = Setting(config, load_corpus(config), torch.device("cpu"), directory)
    trainee = start(setting, ROUTER, resume=True)
    with progress_on(console, config.steps) as tell:
        tell(train(trainee, tell, stop=lambda: False))
    model = trainee.model.eval().requires_grad_(False)
    # Windows of the training text that no step has taken.
    calibration = [setting.corpus.batch(config, config.steps + i) for i in range(batches)]
    return Task(model, config, calibration, setting.corpus.validation(config))


def prune(options: argparse.Namespace, task: Task, console: Console) -> None:
    whole = task.bits()
    console.print(f"measuring {task.config.layers * task.config.experts} experts: magnitude, usage, removal of each")
    rankings = {"magnitude": magnitudes(task), "usage": usage(task), "removal, one at a time": removal_costs(task)}
    rows: list[Row] = []
    for budget in options.budgets:
        console.print(f"keeping {budget} experts")
        rows += ranked(task, budget, rankings)
        found = {name: learn(task, budget, name, options.prune_steps, console) for name in ESTIMATORS}
        rows += [row_of(task, budget, f"learned, {name}", learned.mode) for name, learned in found.items()]
        if budget == options.budgets[0]:  # the rows of the other budgets show whether its scores carry over
            rankings[f"learned for {budget}, SIMPLE"] = found["SIMPLE"].logits
    console.print(table_of(rows, whole, task.config.layers * task.config.experts))


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=positive, default=200, help="training steps (default 200)")
    parser.add_argument(
        "--prune-steps", type=positive, default=80, help="updates of the scores, per budget (default 80)"
    )
    parser.add_argument(
        "--budgets", type=positive, nargs="+", default=[48, 32, 24], help="experts to keep, of 64 (default 48 32 24)"
    )
    parser.add_argument("--calibration", type=positive, default=32, help="batches of text to prune by (default 32)")
    parser.add_argument("--held-out", type=positive, default=20, help="batches of text to judge by (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, text and samples (default 0)")
    parser.add_argument(
        "--checkpoint", type=Path, help="a directory: keep the trained model there, or take it from there"
    )
    return parser.parse_args(arguments)


def main() -> None:
    options, console = parse(), make_console()
    # One thread, as in the demo: the model is too small to gain from more, and the numbers do not depend on the cores.
    with threads(1), tempfile.TemporaryDirectory() as scratch:
        try:
            directory = options.checkpoint or Path(scratch)
            task = prepare(config_of(options), directory, options.calibration, console)
        except (DemoError, cr.InfeasibleError) as error:
            sys.exit(f"prune_experts: error: {error}".replace("without --resume", "with another --checkpoint"))
        prune(options, task, console)


if __name__ == "__main__":
    main()
