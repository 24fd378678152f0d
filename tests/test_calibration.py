"""How often samples agree with the mode, temperatures calibrated by it, and schedules.

Legend: T tokens, E experts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import circuitroute as cr
from tests.tempered import INF, E, T, compiled, every_constraint, key_of, logits_of, with_evidence

# ---------------------------------------------------------------------------------------------- agreement


@every_constraint
@pytest.mark.parametrize("temperature", [0.3, 1.0, torch.linspace(0.2, 3, T)], ids=str)
def test_mode_agreement_is_that_of_enumeration(constraint: cr.Constraint, temperature: Any) -> None:
    circuit, logits = compiled(constraint), with_evidence(torch.float64)
    logits[5] = -9.0  # an empty mode, where there is one
    routing = cr.route(logits, circuit, key=key_of(), temperature=temperature)
    worlds = torch.tensor(list(itertools.product([False, True], repeat=E)))
    distribution = circuit(logits / (temperature[:, None] if isinstance(temperature, Tensor) else temperature))
    allowed = worlds[circuit.satisfies(worlds)]
    mode = circuit(logits).mode == 1
    expected = torch.zeros(T, dtype=torch.float64)
    for world in allowed:
        possible = ((~(logits == INF) | world) & (~(logits == -INF) | ~world)).all(-1)
        chance = distribution.log_prob(world.expand(T, E).double()).exp().where(possible, torch.tensor(0.0).double())
        shared = (mode & world).sum(-1) / mode.sum(-1).clamp(min=1)
        expected += chance * torch.where(mode.any(-1), shared, (~world.any()).double())
    found = cr.metrics.mode_agreement(routing)
    assert found.shape == (T,)
    assert not found.requires_grad
    torch.testing.assert_close(found, expected)


def test_mode_agreement_is_1_in_the_cold() -> None:
    circuit, logits = compiled(cr.Exactly(2)), logits_of()
    found = [float(cr.metrics.mode_agreement(cr.route(logits, circuit, temperature=t)).mean()) for t in (1e6, 1, 1e-6)]
    assert found[0] == pytest.approx(2 / E, abs=1e-4)
    assert found[0] < found[1] < found[2]
    assert found[2] == pytest.approx(1, abs=1e-6)


@every_constraint
@pytest.mark.parametrize("agreement", [0.75, 0.9])
def test_calibration_hits_its_target(constraint: cr.Constraint, agreement: float) -> None:
    torch.manual_seed(0)
    router, hidden = cr.Router(8, E, constraint), torch.randn(3, 20, 8)
    found = router.calibrate_temperature(hidden, agreement)
    assert isinstance(found, float)
    assert router.temperature == found
    reached = cr.metrics.mode_agreement(router(hidden)).mean()
    assert float(reached) == pytest.approx(agreement, abs=1e-3)


def test_calibration_follows_the_scale_of_the_logits() -> None:
    torch.manual_seed(0)
    router, hidden = cr.ExactKRouter(8, E, 2), torch.randn(50, 8)
    small, large = (router.calibrate_temperature(hidden * scale) for scale in (1e-3, 1e3))
    assert large / small == pytest.approx(1e6, rel=1e-3)


@pytest.mark.parametrize(
    ("hidden", "agreement", "message"),
    [
        (torch.ones(5, 8), 1.0, r"agreement=1\.0: on these logits temperatures give from"),
        (torch.ones(5, 8), 0.2, r"agreement=0\.2: on these logits"),
        (torch.ones(5, 8), math.nan, "agreement=nan: on these logits"),
        (torch.ones(5, 8), 75, r"agreement=75\.0: on these logits .*; ask for a mean in between"),
        (
            torch.zeros(5, 8),
            0.75,
            r"agreement=0\.75: on these logits every temperature gives 0\.3333; they are all equal",
        ),
        (torch.ones(0, 8), 0.75, "there are no tokens to calibrate on"),
    ],
)
def test_targets_that_no_temperature_reaches(hidden: Tensor, agreement: float, message: str) -> None:
    router = cr.ExactKRouter(8, E, 2)
    with pytest.raises(ValueError, match=message):
        router.calibrate_temperature(hidden, agreement)
    assert router.temperature == 1.0


@pytest.mark.parametrize("agreement", [None, True, "0.75", [0.75], torch.tensor([0.7, 0.8])], ids=str)
def test_an_agreement_is_a_number(agreement: Any) -> None:
    with pytest.raises(TypeError, match=r"agreement=.*: expected a number"):
        cr.ExactKRouter(8, E, 2).calibrate_temperature(torch.ones(5, 8), agreement)


@pytest.mark.parametrize("k", [0, E])
def test_there_may_be_nothing_to_calibrate(k: int) -> None:
    """But for rounding, samples agree with the mode at any temperature."""
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"every temperature gives 1; .*or the constraint leaves no choice"):
        cr.ExactKRouter(8, E, k).calibrate_temperature(torch.randn(5, 8))


def test_agreement_is_that_of_a_routing() -> None:
    routing = cr.route(logits_of(), compiled(cr.Exactly(2)))
    for other in (None, routing.mask, [routing], cr.RoutingRecord.of(routing)):
        with pytest.raises(TypeError, match=f"routing is a {type(other).__name__}: expected the Routing"):
            cr.metrics.mode_agreement(other)
    with pytest.raises(AttributeError, match="a soft routing has no distribution"):
        cr.metrics.mode_agreement(cr.SoftTopKRouter(4, E, 2)(torch.ones(3, 4)))


# ---------------------------------------------------------------------------------------------- schedules


def test_schedules_end_where_they_are_told_however_far() -> None:
    far = cr.schedules.geometric(1e-300, 1e300, 4)
    assert [far(step) for step in (0, 2, 4)] == pytest.approx([1e-300, 1.0, 1e300])
    for end in (0.1, 0.3, 0.7):
        assert {cr.schedules.geometric(3.0, end, 7)(step) for step in (7, 8.5, INF)} == {end}
    assert type(cr.schedules.geometric(1.0, 0.5, 2)(torch.tensor(1))) is float


@pytest.mark.parametrize("make", [cr.schedules.geometric, cr.schedules.cosine])
@pytest.mark.parametrize(
    ("step", "error"),
    [(None, TypeError), ("2", TypeError), (math.nan, ValueError), (torch.arange(2), TypeError)],
    ids=str,
)
def test_a_step_is_a_number(make: Callable[..., Any], step: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"step=.*: expected"):
        make(1.0, 0.5, 3)(step)


def test_schedules() -> None:
    geometric = cr.schedules.geometric(1.0, 0.125, steps=300)
    assert [geometric(step) for step in (0, 100, 200, 300, 5000)] == pytest.approx([1, 0.5, 0.25, 0.125, 0.125])
    cosine = cr.schedules.cosine(1.0, 0.0, steps=100)
    assert [cosine(step) for step in (0, 25, 50, 100, 900)] == pytest.approx(
        [1, (1 + math.cos(math.pi / 4)) / 2, 0.5, 0, 0]
    )
    constant = cr.schedules.constant(0.25)
    assert {constant(step) for step in (0, 7, 1e9)} == {0.25}
    assert geometric(-5) == 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: cr.schedules.geometric(1.0, 0.0, 10), r"end=0\.0: a geometric schedule has positive ends"),
        (lambda: cr.schedules.geometric(-1.0, 1.0, 10), r"start=-1\.0: a geometric"),
        (lambda: cr.schedules.geometric(1.0, 0.5, 0), "steps=0: must be at least 1"),
        (lambda: cr.schedules.cosine(math.nan, 0.5, 5), "start=nan: must be finite"),
        (lambda: cr.schedules.constant(INF), "value=inf: must be finite"),
    ],
)
def test_schedules_refuse_nonsense(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
