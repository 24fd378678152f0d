"""Temperature: what is tempered, what is not, its gradient, and records that keep it.

Legend: T tokens, E experts.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import circuitroute as cr
from tests.tempered import (
    CONSTRAINTS,
    INF,
    E,
    T,
    compiled,
    every_constraint,
    hidden_of,
    key_of,
    logits_of,
    with_evidence,
)

# ---------------------------------------------------------------------------------------------- the distribution


@every_constraint
@pytest.mark.parametrize("temperature", [1.0, 1, torch.tensor(1.0), torch.ones(T)], ids=["float", "int", "[]", "[T]"])
def test_temperature_1_changes_no_bit(constraint: cr.Constraint, temperature: Any) -> None:
    circuit, logits = compiled(constraint), with_evidence()
    plain = cr.route(logits.requires_grad_(), circuit, key=key_of())
    found = cr.route(logits, circuit, key=key_of(), temperature=temperature, decide="sample")
    for name in ("mask", "gates", "logits", "marginals", "log_prob"):
        assert torch.equal(getattr(found, name), getattr(plain, name)), name
    gradients = [torch.autograd.grad(r.gates.square().sum(), logits)[0] for r in (plain, found)]
    assert torch.equal(*gradients)


@every_constraint
@pytest.mark.parametrize("temperature", [0.25, 3.0, torch.tensor(0.5), torch.linspace(0.1, 4.0, T)], ids=str)
@pytest.mark.parametrize("decide", ["sample", "mode", 0.5])
def test_the_distribution_is_that_of_divided_logits(constraint: cr.Constraint, temperature: Any, decide: Any) -> None:
    circuit, logits = compiled(constraint), with_evidence()
    routing = cr.route(logits, circuit, key=key_of(), temperature=temperature, decide=decide)
    t = temperature[:, None] if isinstance(temperature, Tensor) and temperature.dim() else temperature
    expected = circuit(logits / t)  # infinite logits stay infinite
    for name in ("marginals", "log_partition", "mode", "variance", "covariance_matrix"):
        assert torch.equal(getattr(routing.distribution, name), getattr(expected, name)), name
    if circuit.counts is not None:
        assert torch.equal(routing.distribution.count_probs, expected.count_probs)
    assert torch.equal(routing.distribution.entropy(), expected.entropy())
    assert torch.equal(routing.marginals, expected.marginals)
    torch.testing.assert_close(routing.log_prob, expected.log_prob(routing.mask), rtol=1e-6, atol=1e-6)
    assert torch.equal(routing.logits, logits)
    assert torch.equal(cr.losses.z_loss(routing), cr.losses.z_loss(cr.route(logits, circuit, key=key_of())))
    share = routing.mask.float().sum(0) / routing.mask.sum().clamp(min=1)
    balance = E * (share * expected.marginals.sum(0) / expected.marginals.sum()).sum()
    torch.testing.assert_close(cr.losses.load_balance(routing), balance)


@every_constraint
def test_a_sample_is_that_of_divided_logits(constraint: cr.Constraint) -> None:
    circuit, logits = compiled(constraint), with_evidence()
    routing = cr.route(logits, circuit, key=key_of(), temperature=0.5)
    assert torch.equal(routing.mask, circuit(logits / 0.5).sample(key=key_of()) == 1)


@pytest.mark.parametrize("combine", ["softmax", "normalized", "sigmoid"])
def test_gates_weigh_by_the_logits_themselves(combine: Any) -> None:
    circuit, logits = compiled(cr.Exactly(2)), logits_of()
    routing = cr.route(logits, circuit, combine=combine, key=key_of(), temperature=0.25)
    again = cr.route(logits, circuit, combine=combine, replay=routing.mask)
    assert torch.equal(routing.gates, again.gates)


def test_marginal_gates_are_the_tempered_marginals() -> None:
    routing = cr.route(logits_of(), compiled(cr.Exactly(2)), combine="marginal", key=key_of(), temperature=0.25)
    assert torch.equal(routing.gates, routing.mask * routing.marginals)


@pytest.mark.parametrize("temperature", [0, 0.0, -1.0, math.nan, torch.tensor(0.0), torch.tensor([1.0, -1.0, 1.0])])
def test_distributions_refuse_temperatures_that_are_not_positive(temperature: Any) -> None:
    with pytest.raises(ValueError, match=r"temperature=.*: must be positive"):
        compiled(cr.Exactly(2))(logits_of(3)).tempered(temperature)


@pytest.mark.parametrize(
    ("temperature", "error", "message"),
    [
        ("hot", TypeError, "temperature='hot': expected a number"),
        (True, TypeError, "temperature=True: expected a number"),
        (None, TypeError, "temperature=None: expected a number"),
        (torch.tensor(1), TypeError, "temperature has dtype torch.int64"),
        (torch.tensor(1j), TypeError, "temperature has dtype torch.complex64"),
        (INF, ValueError, "temperature=inf: must be positive and finite"),
        (1e-40, ValueError, "temperature=1e-40: must be positive and finite"),  # logits would become evidence
        (torch.ones(2), ValueError, r"temperature has shape \(2,\): it must broadcast to \(3,\), the batch"),
        (torch.ones(3, 1), ValueError, r"temperature has shape \(3, 1\): it must broadcast to \(3,\), the batch"),
    ],
    ids=str,
)
def test_distributions_refuse_what_is_no_temperature(temperature: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        compiled(cr.Exactly(2))(logits_of(3)).tempered(temperature)


def test_temperatures_broadcast_to_the_batch() -> None:
    logits = logits_of(6).view(2, 3, E)
    for shape in ((), (1,), (3,), (2, 1), (1, 3), (2, 3)):
        t = torch.linspace(0.5, 2, math.prod(shape)).view(shape)
        found = compiled(cr.Exactly(2))(logits).tempered(t)
        assert torch.equal(found.marginals, compiled(cr.Exactly(2))(logits / t.expand(2, 3)[..., None]).marginals)


def test_a_count_potential_is_not_divided() -> None:
    circuit, logits = compiled(cr.Between(0, 4)), logits_of()
    potential = torch.tensor([0.5, 1.0, -1.0, 0.0, -INF])
    routing = cr.route(logits, circuit, key=key_of(), temperature=0.5, count_potential=potential)
    assert torch.equal(routing.marginals, circuit(logits / 0.5, potential).marginals)


def test_leading_dimensions_come_with_their_temperatures() -> None:
    circuit, logits, t = compiled(cr.Exactly(2)), logits_of(), torch.linspace(0.2, 2, T)
    flat = cr.route(logits, circuit, key=key_of(), temperature=t)
    for given in (t, t.view(5, 8)):
        folded = cr.route(logits.view(5, 8, E), circuit, key=key_of(), temperature=given)
        assert torch.equal(folded.mask, flat.mask)
        assert torch.equal(folded.log_prob, flat.log_prob)
    columns = cr.route(logits.view(5, 8, E), circuit, key=key_of(), temperature=t[:8])
    assert torch.equal(columns.marginals, circuit(logits / t[:8].repeat(5)[:, None]).marginals)


# ---------------------------------------------------------------------------------------------- the mode


@every_constraint
@pytest.mark.parametrize("temperature", [1e-3, 0.25, 1.0, 7.0, torch.linspace(0.1, 4.0, T)], ids=str)
@pytest.mark.parametrize("logits", [logits_of(), with_evidence(), logits_of().round(), torch.zeros(T, E)])
def test_the_mode_is_that_of_the_logits(constraint: cr.Constraint, temperature: Any, logits: Tensor) -> None:
    """To the bit, ties included, in training and in evaluation."""
    circuit = compiled(constraint)
    expected = circuit(logits).mode == 1
    for options in ({"decide": "mode"}, {"decide": 0}, {"decide": 0.0, "key": key_of()}, {"training": False}):
        routing = cr.route(logits, circuit, temperature=temperature, **options)
        assert torch.equal(routing.mask, expected)


@pytest.mark.parametrize("decide", ["mode", "sample", 0.5])
def test_rows_of_nan_are_nan_alone(decide: Any) -> None:
    circuit, logits = compiled(cr.Exactly(2)), with_evidence()
    logits[4, 2], logits[6, :] = math.nan, -INF
    good = [i for i in range(T) if i not in (4, 6)]
    options = {"decide": decide, "temperature": 0.5}
    routing = cr.route(logits, circuit, key=key_of(), validate_args=False, **options)
    alone = cr.route(logits[good], circuit, key=key_of()[good], **options)
    assert not routing.mask[[4, 6]].any()
    assert routing.gates[[4, 6]].isnan().all()
    assert torch.equal(routing.mask[good], alone.mask)
    assert torch.equal(routing.gates[good], alone.gates)
    assert torch.equal(routing.log_prob[good], alone.log_prob)
    with pytest.raises(ValueError, match="NaN in row"):
        cr.route(logits, circuit, key=key_of(), **options)


# ---------------------------------------------------------------------------------------------- its gradient


@pytest.mark.parametrize("evidence", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("constraint", [cr.Exactly(2), cr.Between(1, 4), CONSTRAINTS["groups"]], ids=repr)
def test_the_temperature_has_the_gradient_of_finite_differences(
    constraint: cr.Constraint, per_token: bool, evidence: bool
) -> None:
    circuit = compiled(constraint)
    logits = (with_evidence(torch.float64) if evidence else logits_of(dtype=torch.float64))[:5]
    free = logits.isfinite()
    mask = cr.route(logits, circuit, key=key_of(5)).mask
    t = torch.linspace(0.6, 1.7, 5, dtype=torch.float64) if per_token else torch.tensor(0.7, dtype=torch.float64)

    def outputs(t: Tensor, finite: Tensor) -> tuple[Tensor, ...]:
        full = logits.masked_scatter(free, finite)
        routing = cr.route(full, circuit, replay=mask, temperature=t)
        return routing.marginals, routing.log_prob, routing.distribution.log_partition

    inputs = (t.requires_grad_(), logits[free].requires_grad_())
    assert torch.autograd.gradcheck(outputs, inputs)


def test_the_estimators_gradient_reaches_the_temperature() -> None:
    logits, t = with_evidence().requires_grad_(), torch.tensor(0.5, requires_grad=True)
    routing = cr.route(logits, compiled(cr.Exactly(2)), key=key_of(), temperature=t)
    upstream = logits_of(seed=3)
    found = torch.autograd.grad((routing.gates * upstream).sum(), [t, logits])
    assert all(bool(g.isfinite().all()) for g in found)
    assert float(found[0]) != 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("own", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("decide", ["mode", "sample", 0.5])
def test_the_gradient_reaches_the_temperature_across_any_decision(
    dtype: torch.dtype, own: torch.dtype, decide: Any
) -> None:
    """Gates are (mask + marginals - stopgrad(marginals)) sigmoid(logits), with the marginals at that temperature."""
    logits, upstream = logits_of().to(dtype), logits_of(seed=3, dtype=torch.float64)
    t = torch.linspace(0.5, 1, T).to(own).requires_grad_()
    routing = cr.route(logits, compiled(cr.Exactly(2)), combine="sigmoid", key=key_of(), decide=decide, temperature=t)
    (found,) = torch.autograd.grad((routing.gates * upstream).sum(), t)
    wide, exact = logits.double(), t.detach().double().requires_grad_()
    marginals = compiled(cr.Exactly(2))(wide / exact[:, None]).marginals
    (expected,) = torch.autograd.grad((marginals * wide.sigmoid() * upstream).sum(), exact)
    assert found.dtype == own
    coarsest = max(own, routing.gates.dtype, key=lambda kind: torch.finfo(kind).eps)
    rounding = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 1e-2}[coarsest]
    torch.testing.assert_close(found.double(), expected, rtol=rounding, atol=rounding)


# ---------------------------------------------------------------------------------------------- records


def test_records_keep_the_temperature(tmp_path: Any) -> None:
    circuit, logits = compiled(cr.Between(1, 4)), logits_of()
    routing = cr.route(logits, circuit, key=key_of(), temperature=torch.tensor(0.3))
    record = cr.RoutingRecord.of(routing)
    assert record.temperature == pytest.approx(0.3)
    record.save(tmp_path / "record.npz")
    read = cr.RoutingRecord.load(tmp_path / "record.npz")
    assert read == record
    assert read.temperature == record.temperature
    assert read != cr.RoutingRecord(read.layers, read.log_probs)
    parts = [record[:10], *record[10:].split([20, 10])]
    assert {part.temperature for part in parts} == {record.temperature}
    assert cr.RoutingRecord.cat(parts) == record
    assert "temperature 0.3" in repr(record)
    again = cr.route(logits, circuit, replay=read, temperature=0.3)
    assert torch.equal(again.mask, routing.mask)
    torch.testing.assert_close(again.log_prob, record.path_log_prob.float())
    with pytest.raises(ValueError, match="records were made at temperatures"):
        cr.RoutingRecord.cat([record, cr.RoutingRecord(record.layers, record.log_probs)])


def test_a_record_at_temperature_1_is_the_file_it_was(tmp_path: Any) -> None:
    record = cr.RoutingRecord.of(cr.route(logits_of(), compiled(cr.Exactly(2))))
    assert record.temperature == 1.0
    record.save(tmp_path / "record.npz")
    content = (tmp_path / "record.npz").read_bytes()
    assert b'"version": 1' in content
    assert b"temperature" not in content
    assert cr.RoutingRecord.load(tmp_path / "record.npz") == record


@pytest.mark.parametrize("temperature", [0.5, 2.0, torch.tensor(0.5), torch.linspace(1, 2, T)], ids=str)
def test_records_are_not_replayed_at_another_temperature(temperature: Any) -> None:
    circuit, logits = compiled(cr.Exactly(2)), logits_of()
    record = cr.RoutingRecord.of(cr.route(logits, circuit, key=key_of()))
    with pytest.raises(ValueError, match="replay was recorded at temperature=1, and this decision is at"):
        cr.route(logits, circuit, replay=record, temperature=temperature)
    cr.route(logits, circuit, replay=record.masks()[0], temperature=temperature)  # a mask has none


def test_routers_take_records() -> None:
    router, hidden = cr.ExactKRouter(4, E, 2, temperature=0.5), hidden_of(T)
    record = cr.RoutingRecord.of(router(hidden))
    assert torch.equal(router(hidden, replay=record).mask, record.masks()[0])
    with pytest.raises(ValueError, match=r"recorded at temperature=0\.5"):
        router(hidden, replay=record, temperature=1.0)
    with pytest.raises(ValueError, match="replay is a record of 2 layers"):
        router(hidden, replay=cr.RoutingRecord.of([router(hidden), router(hidden)]))
    soft = cr.SoftTopKRouter(4, E, 2, 2.0)
    executed = cr.RoutingRecord.of(soft(hidden).mask)
    assert torch.equal(soft(hidden, replay=executed).mask, executed.masks()[0])


@pytest.mark.parametrize(
    "decisions",
    [
        [0.5, 0.25],
        [torch.linspace(0.5, 1, T)],
        [1.0, torch.full((T,), 0.5)],
    ],
    ids=["layers", "tokens", "both"],
)
def test_a_record_has_one_temperature(decisions: list[Any]) -> None:
    circuit = compiled(cr.Exactly(2))
    routings = [cr.route(logits_of(), circuit, temperature=t) for t in decisions]
    with pytest.raises(ValueError, match="a record has one temperature for all tokens and layers"):
        cr.RoutingRecord.of(routings)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, INF])
def test_records_refuse_temperatures_that_are_not_positive(temperature: float) -> None:
    record = cr.RoutingRecord.of(cr.route(logits_of(), compiled(cr.Exactly(2))))
    with pytest.raises(ValueError, match="must be positive and finite"):
        cr.RoutingRecord(record.layers, temperature=temperature)
