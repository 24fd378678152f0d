"""Training one model: a step, and the loop that validates and writes checkpoints.

Shapes: B sequences, S positions, T = B S tokens, L layers.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

import circuitroute as cr

from .config import DemoConfig, Run
from .evaluation import evaluate, swap_correlation
from .kinds import KINDS
from .model import token_losses
from .process import Interrupted, Stop, stop_if
from .trainee import Record, Trainee

WARMUP = 0.05  # of all steps
FINAL_RATE = 0.1  # of the learning rate
CLIP = 1.0
LOG_EVERY = 10  # steps

Kind: TypeAlias = Literal["begin", "step", "validated", "swaps", "finished"]


class Event(NamedTuple):
    """Where a run stands."""

    run: Run
    kind: Kind
    step: int
    loss: float | None = None  # of a step, nats per byte
    speed: float | None = None  # of a step, tokens per second
    bits: float | None = None  # per held-out byte: of a validation, and at the end


class HeldOut(NamedTuple):
    """Batches [B, S + 1] of the held-out text, on the device."""

    valid: Sequence[Tensor]
    test: Sequence[Tensor]


Tell: TypeAlias = Callable[[Event], Any]


def train(trainee: Trainee, tell: Tell, stop: Stop) -> Event:
    """Trains to the end, validating on the way, then measures the swap oracle; a checkpoint after each.

    Returns the event of the end, for the caller to pass on: a worker process has its own way of reporting that.
    Raises Interrupted, with a checkpoint written, soon after `stop()` turns true. After any other exception the last
    checkpoint stands.
    """
    record, setting = trainee.record, trainee.setting
    tell(Event(trainee.run, "begin", record.step))
    config, corpus = setting.config, setting.corpus
    batches = HeldOut(
        *([tokens.to(setting.device) for tokens in part(config)] for part in (corpus.validation, corpus.testing))
    )
    try:
        while _validation_due(trainee) or record.step < config.steps:
            _advance(trainee, batches, tell, stop)
        if not record.finished:
            tell(Event(trainee.run, "swaps", record.step))
            with _clock(trainee):
                record.swap_correlation = swap_correlation(trainee.model, config, batches.valid[0], stop)
            record.finished = True
            trainee.save()
        return ended(trainee.run, record)
    except Interrupted:
        trainee.save()
        raise


def ended(run: Run, record: Record) -> Event:
    """The last event of a finished run."""
    return Event(run, "finished", record.step, bits=record.evaluations[-1].bits_per_byte)


def _validation_due(trainee: Trainee) -> bool:
    record, config = trainee.record, trainee.setting.config
    done = record.last.step if record.last else 0
    return done < record.step and (record.step % config.validation_every == 0 or record.step == config.steps)


def _advance(trainee: Trainee, batches: HeldOut, tell: Tell, stop: Stop) -> None:
    """A validation where one is due, otherwise a step: each leaves a state to stop in and resume from."""
    record = trainee.record
    schedule = KINDS[record.router].temperature
    if schedule is not None:
        trainee.model.set_temperature(schedule(trainee.setting.config)(record.step))
    if _validation_due(trainee):
        with _clock(trainee):
            calibrate(trainee)
            found = evaluate(trainee.model, batches.valid, record.step, stop, batches.test)
            record.evaluations.append(found)
        trainee.save()
        tell(Event(trainee.run, "validated", record.step, bits=found.bits_per_byte))
        return
    stop_if(stop)
    began = time.perf_counter()
    with _clock(trainee):
        record.losses.append(training_step(trainee))
        record.step += 1
    record.training_seconds += (took := time.perf_counter() - began)
    speed = trainee.setting.config.tokens_per_step / took
    tell(Event(trainee.run, "step", record.step, loss=record.losses[-1], speed=speed))


@contextmanager
def _clock(trainee: Trainee) -> Iterator[None]:
    began = time.perf_counter()
    try:
        yield
    finally:
        trainee.record.seconds += time.perf_counter() - began


def training_step(trainee: Trainee) -> float:
    """One update; returns the language-model loss before it, in nats per byte. Batch, learning rate and the routers'
    randomness depend on the seed and the step's number alone."""
    config, step, device = trainee.setting.config, trainee.record.step, trainee.setting.device
    kind = KINDS[trainee.record.router]
    tokens = trainee.setting.corpus.batch(config, step).to(device)
    if kind.flipped:
        tokens = tokens.flip(0)
    if step % config.calibrate_every == 0:
        trainee.model.calibrate(tokens[:, :-1])
    positions_T = torch.arange(config.tokens_per_step, device=tokens.device)
    keys_LT = [cr.random_key(config.seed, step, layer, positions_T) for layer in range(config.layers)]
    with _dropout_of(step, kind.dropout, trainee):
        logits_BSV, routings = trainee.model(tokens[:, :-1], keys=keys_LT)
    loss = token_losses(logits_BSV, tokens[:, 1:]).mean()
    total = loss + auxiliary_loss(routings, config, trainee.record.router)
    planned = trainee.model.plan.loss(routings)
    if planned is not None:
        total = total + config.estimation_weight * planned
    trainee.optimizer.zero_grad(set_to_none=True)
    total.backward()
    nn.utils.clip_grad_norm_(trainee.model.parameters(), CLIP)
    for group in trainee.optimizer.param_groups:
        group["lr"] = group["scale"] * learning_rate(config, step)
    trainee.optimizer.step()
    trainee.model.plan.after(routings)
    trainee.record.violations.append(fmean(cr.metrics.max_violation(routing) for routing in routings))
    found = float(loss.detach())
    if trainee.log is not None and step % LOG_EVERY == 0:
        trainee.log.append(step, cr.metrics.summary(routings), loss=found)
    return found


@contextmanager
def _dropout_of(step: int, dropout: float, trainee: Trainee) -> Iterator[None]:
    """Torch's generators draw what the seed and the step say, and are left as they were."""
    if not dropout:
        yield
        return
    device = trainee.setting.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(zlib.crc32(f"{trainee.setting.config.seed}/dropout {step}".encode()))
        yield


def calibrate(trainee: Trainee) -> None:
    """Calibrates soft routers on several batches of training text, in runs on random windows such that no step uses:
    never on held-out text. The other calibrations change nothing about the mode."""
    if not trainee.model.plan.soft:
        return
    config, corpus = trainee.setting.config, trainee.setting.corpus
    batches = [corpus.batch(config, config.steps + i) for i in range(config.calibration_batches)]
    trainee.model.calibrate(torch.cat(batches)[:, :-1].to(trainee.setting.device))


def auxiliary_loss(routings: Sequence[cr.Routing], config: DemoConfig, router: str) -> Tensor:
    """For balanced load, small logits and, where the router chooses how many experts, k of them on average: a scalar,
    the mean over layers."""
    kind = KINDS[router]
    terms = []
    for routing in routings:
        term = config.z_weight * cr.losses.z_loss(routing)
        if kind.balanced:
            term = term + config.balance_weight * cr.losses.load_balance(routing, probabilities=kind.probabilities)
        if kind.free_count:
            term = term + config.count_weight * (inference_count(routing) / config.k - 1).square()
        terms.append(term)
    return torch.stack(terms).mean()


def inference_count(routing: cr.Routing) -> Tensor:
    """Mean experts per token that inference would execute, with the gradient of the expected count: a scalar.

    More experts always fit the text better, so without a price a range router drifts to its upper bound. The price
    is on the mode because that is what runs at inference; while a router is unsure, the mode is smaller than the
    expected count.
    """
    expected = cr.losses.expected_count(routing)
    executed = routing.distribution.mode.sum(dim=-1).mean()
    return executed.detach() + expected - expected.detach()


def learning_rate(config: DemoConfig, step: int) -> float:
    """Linear warm-up, then a cosine."""
    warmup = max(1, round(WARMUP * config.steps))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, config.steps - warmup)
    return config.learning_rate * (FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * done)))
