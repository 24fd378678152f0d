"""What records are made of, from servers and router logits, and what they know of their origin."""

import json
import math

import numpy as np
import pytest
import torch

import circuitroute as cr
from circuitroute.routing.records import archive as files
from circuitroute.routing.replay import (
    RoutingRecord,
    masks_for,
)
from tests.record_cases import T, arrays_of, logits_of, policy, record_of, routings_of

# ---------------------------------------------------------------------------------------------- what servers report


INDICES = torch.tensor([[[3, 1, 0], [0, 2, 2]], [[2, 2, 2], [1, 0, 3]], [[-1, 4, 99], [3, -1, 3]]])
WEIGHTS = torch.tensor(
    [[[0.5, 0.0, 0.5], [1.0, 0.0, 0.2]], [[0.0, 0.7, 0.0], [0.1, 0.2, 0.7]], [[1.0, 1.0, 1.0], [-0.0, 1.0, 9.0]]]
)
CHOSEN = [[[0, 3], [0, 2]], [[2], [0, 1, 3]], [[], [3]]]


def chosen_of(record):
    return [[mask[t].nonzero().flatten().tolist() for mask in record.masks()] for t in range(len(record))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float32])
def test_slots_of_weight_0_are_unused(dtype):
    """Whatever expert stands there, one that another slot names too; slots of no expert may hold any weight."""
    weights = WEIGHTS.to(dtype)
    strange = weights.clone()
    strange[2, 0], strange[2, 1, 1] = torch.tensor([math.nan, -1.0, math.inf], dtype=dtype), -math.inf
    for given in (weights, strange, strange.transpose(0, 1).contiguous().transpose(0, 1)):
        assert chosen_of(RoutingRecord.of_indices(INDICES, 4, given)) == CHOSEN
    layers = [RoutingRecord.of_indices(INDICES[:, i : i + 1], [4], weights[:, i : i + 1]) for i in range(2)]
    assert [[chosen_of(layer)[t][0] for layer in layers] for t in range(3)] == CHOSEN
    by_layer = RoutingRecord.of_indices(list(INDICES.unbind(1)), [4, 4], weights=list(weights.unbind(1)))
    assert chosen_of(by_layer) == CHOSEN
    assert chosen_of(RoutingRecord.of_indices(INDICES.int(), 4, weights=weights > 0)) == CHOSEN
    assert by_layer == RoutingRecord.of_indices(INDICES.to(torch.int16), 4, weights * 1000)


def test_what_a_serving_function_reports_is_what_it_decided():
    """Distinct experts of weight 0 fill its unused slots."""
    circuit = cr.compile(cr.Between(1, 4), 12)
    routings = [cr.route(logits_of(12, i), circuit, training=False) for i in range(2)]
    weights, indices = (torch.stack(part, 1) for part in zip(*(r.padded(width=6) for r in routings), strict=True))
    assert int((weights == 0).sum()) > T
    assert RoutingRecord.of_indices(indices, 12, weights).masks()[0].equal(routings[0].mask)
    assert RoutingRecord.of_indices(indices, 12, weights) == RoutingRecord.of(routings, log_probs=False)


@pytest.mark.parametrize("shape", [(0, 2, 3), (1, 1, 1), (5, 3, 0)])
def test_reports_of_any_size(shape):
    record = RoutingRecord.of_indices(torch.zeros(shape, dtype=torch.int64), 1, torch.ones(shape))
    assert (len(record), len(record.layers)) == shape[:2]
    assert all(bool((mask == (shape[2] > 0)).all()) for mask in record.masks())


def bad_weights(layer, row, slot, value):
    weights = WEIGHTS.clone()
    weights[row, layer, slot] = value
    return weights


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (INDICES, 4, bad_weights(1, 0, 0, math.nan)),
            ValueError,
            r"weights\[1\] holds nan in row 0: weights are finite",
        ),
        ((INDICES, 4, bad_weights(0, 1, 1, -0.5)), ValueError, r"weights\[0\] holds -0\.5 in row 1: .*; give weight 0"),
        ((INDICES, 4, bad_weights(0, 1, 1, math.inf)), ValueError, r"weights\[0\] holds inf in row 1"),
        ((INDICES, 4, bad_weights(1, 2, 0, 1.0)), ValueError, r"indices\[1\] names an expert twice in row 2$"),
        (
            (INDICES, 4),
            ValueError,
            r"indices\[0\] names an expert twice in row 1; where unused slots repeat one, give -1",
        ),
        ((INDICES, 4, WEIGHTS[..., :2]), ValueError, r"weights\[0\] has shape \(3, 2\): .* slot of indices, \(3, 3\)"),
        ((INDICES, 4, WEIGHTS[:2]), ValueError, r"weights\[0\] has shape \(2, 3\)"),
        ((INDICES, 4, WEIGHTS[:, :1]), ValueError, "weights has 1 layers: expected those of indices, 2"),
        ((INDICES, 4, torch.zeros(3, 2)), ValueError, r"weights has shape \(3, 2\): .* handed over as log_probs="),
        ((INDICES, 4, 0.5), TypeError, "weights is a float: expected a tensor"),
        ((INDICES, 4, [WEIGHTS[:, 0].tolist()] * 2), TypeError, r"weights\[0\]=.*expected a tensor"),
        ((INDICES, 4, WEIGHTS + 0j), TypeError, r"weights\[0\] has dtype torch.complex64"),
        (("indices", 4), TypeError, "indices is a str: expected a tensor"),
        ((INDICES, 4, WEIGHTS, [1.0]), TypeError, r"log_probs=\[1\.0\]: expected a tensor"),
        ((INDICES, 4, WEIGHTS, torch.zeros(3, 2).long()), TypeError, "log_probs has dtype torch.int64"),
    ],
)
def test_reports_that_make_no_sense_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        RoutingRecord.of_indices(*arguments)


def test_reports_may_say_whose_they_are():
    record = RoutingRecord.of_indices(
        INDICES, 4, WEIGHTS, torch.zeros(3, 2), temperature=0.5, constraints=[cr.AtMost(3), None], model="m"
    )
    assert (record.temperature, record.constraints, record.model) == (0.5, ("AtMost(3)", None), "m")
    assert record.log_probs.equal(torch.zeros(3, 2))


# ---------------------------------------------------------------------------------------------- router logits


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("shape", [(15,), (3, 5), (1, 15)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_modes_of_router_logits(shape, dtype, temperature):
    """Against top-k, and the exact log-probability of enumeration."""
    logits = [logits_of(6, i, 15).to(dtype) for i in range(2)]
    given = tuple(x.reshape(*shape, 6).requires_grad_() for x in logits)
    record = RoutingRecord.of_router_logits(given, cr.Exactly(2), temperature, model="m")
    assert (record.temperature, record.constraints, record.model) == (temperature, ("Exactly(2)",) * 2, "m")
    for i, (x, mask) in enumerate(zip(logits, record.masks(), strict=True)):
        assert mask.equal(torch.zeros(15, 6).bool().scatter(1, x.topk(2).indices, True))
        subsets, log_probs = policy(x.double() / temperature, cr.compile(cr.Exactly(2), 6))
        at = (mask.double() @ subsets.t()).argmax(-1, keepdim=True)
        torch.testing.assert_close(record.log_probs[:, i].double(), log_probs.gather(1, at)[:, 0], rtol=1e-5, atol=1e-5)
    assert RoutingRecord.of_router_logits(given, cr.Exactly(2), log_probs=False) == RoutingRecord(
        RoutingRecord.of(record.masks()).layers
    )


def test_modes_of_layers_that_differ():
    rules = [cr.Between(1, 3), cr.compile(cr.ActiveGroups(cr.Groups(4), at_most=1) & cr.Exactly(2), 8)]
    logits = (logits_of(5, 0), logits_of(8, 1))
    logits[0][3, 2], logits[0][4, 1] = math.inf, -math.inf
    record = RoutingRecord.of_router_logits(logits, rules)
    decided = [cr.route(x, cr.compile(r, x.shape[1]), training=False) for x, r in zip(logits, rules, strict=True)]
    assert record == RoutingRecord.of(decided)
    assert record.constraints == RoutingRecord.of(decided).constraints
    assert bool(record.masks()[0][3, 2])
    assert RoutingRecord.of_router_logits(logits[0], rules[0]).masks()[0].equal(decided[0].mask)
    assert len(RoutingRecord.of_router_logits([torch.zeros(0, 4)], cr.Exactly(1))) == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (((), cr.Exactly(1)), ValueError, "router_logits is empty: call the model with output_router_logits=True"),
        ((None, cr.Exactly(1)), TypeError, "router_logits=None: expected a tensor"),
        (([None], cr.Exactly(1)), TypeError, r"router_logits\[0\]=None: expected a tensor"),
        (([torch.zeros(2, 4).long()], cr.Exactly(1)), TypeError, r"router_logits\[0\] has dtype torch.int64"),
        (
            ([torch.zeros(4)], cr.Exactly(1)),
            ValueError,
            r"router_logits\[0\] has shape \(4,\): expected \[tokens, experts",
        ),
        (([torch.zeros(2, 4), torch.zeros(3, 4)], cr.Exactly(1)), ValueError, r"router_logits are of \[2, 3\] tokens"),
        (([torch.zeros(2, 4)], [cr.Exactly(1)] * 2), ValueError, "constraint has 2 entries: .* router_logits, 1"),
        (([torch.zeros(2, 4)], 3), TypeError, "constraint=3: expected a constraint or circuit"),
        (([torch.zeros(2, 4)], ["Exactly(1)"]), cr.UnsupportedConstraintError, "Exactly"),
        (
            ([torch.zeros(2, 4)], cr.compile(cr.Exactly(1), 5)),
            ValueError,
            r"router_logits\[0\] is over 4 experts: expected 5",
        ),
        (([torch.zeros(2, 4)], cr.Exactly(5)), cr.InfeasibleError, "Exactly"),
        (([torch.full((2, 4), math.nan)], cr.Exactly(1)), ValueError, r"router_logits\[0\]: .*NaN"),
        (([torch.full((2, 4), -math.inf)], cr.Exactly(1)), ValueError, r"router_logits\[0\]: .*row"),
        (([torch.zeros(2, 4)], cr.Exactly(1), 0.0), ValueError, "temperature=0.0"),
    ],
)
def test_router_logits_that_make_no_sense_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        RoutingRecord.of_router_logits(*arguments)


# ---------------------------------------------------------------------------------------------- whose it is


class Parity(cr.Constraint):
    """One of a user's own, whose repr is an address."""

    def leaf(self, var):
        return 0, 1

    def merge(self, left, right):
        return (left + right) % 2

    def accepts(self, state):
        return state == 1

    __repr__ = object.__repr__


def test_a_record_keeps_constraints_and_model(tmp_path):
    record = RoutingRecord.of(routings_of(cr.Between(1, 4), 12), model="policy 7")
    assert (record.constraints, record.model) == (("Between(1, 4)",) * 3, "policy 7")
    assert repr(record).endswith(", of model 'policy 7')")
    record.save(tmp_path / "r.npz")
    with np.load(tmp_path / "r.npz", allow_pickle=False) as archive:  # what older readers look at is what it was
        assert json.loads(archive["header"].tobytes())["version"] == 1
    read = RoutingRecord.load(tmp_path / "r.npz")
    for some in (read, record[3:5], record[[0]], *record.split([10, 20]), RoutingRecord.cat([record, record[:2]])):
        assert (some.constraints, some.model) == (record.constraints, "policy 7")
    assert RoutingRecord.of(record.masks()).constraints is None
    assert RoutingRecord.of(routings_of(cr.Exactly(1), 4)[0]).constraints == ("Exactly(1)",)
    long = cr.Cost(range(1000), at_most=3)
    kept = RoutingRecord(record.layers[:1], constraints=[long]).constraints[0]
    assert len(kept) < 300
    assert kept != RoutingRecord(record.layers[:1], constraints=[cr.Cost(range(1000), at_most=4)]).constraints[0]
    assert RoutingRecord(record.layers[:1], constraints=[Parity()]).constraints is None


def test_joined_records_know_what_all_of_them_know():
    first, second = (RoutingRecord.of(routings_of(rule, 12), model="m") for rule in (cr.AtMost(3), cr.Exactly(2)))
    assert RoutingRecord.cat([first, second]).constraints is None
    mixed = RoutingRecord(second.layers, second.log_probs, constraints=["AtMost(3)", "other", None])
    joined = RoutingRecord.cat([first, mixed])
    assert (joined.constraints, joined.model) == (("AtMost(3)", None, None), None)
    with pytest.raises(ValueError, match=r"records are of models \['m', 'n'\]"):
        RoutingRecord.cat([first, RoutingRecord(first.layers, first.log_probs, model="n")])


def test_records_of_others_are_not_replayed():
    circuit, other = (cr.compile(rule, 12) for rule in (cr.Between(1, 4), cr.Between(0, 4)))
    record = RoutingRecord.of(routings_of(cr.Between(1, 4), 12), model="a")
    assert (
        len(masks_for(record, [circuit] * 3, [1.0] * 3, "a")) == len(masks_for(record, [circuit] * 3, [1.0] * 3)) == 3
    )
    with pytest.raises(ValueError, match="record is of model 'a', and is to be replayed by 'b'"):
        masks_for(record, [circuit] * 3, [1.0] * 3, model="b")
    with pytest.raises(TypeError, match="model=3: expected a text"):
        masks_for(record, [circuit] * 3, [1.0] * 3, model=3)
    with pytest.raises(ValueError, match=r"layer 2 was decided under Between\(1, 4\), and .* under Between\(0, 4\)"):
        masks_for(record, [circuit, circuit, other], [1.0] * 3)
    with pytest.raises(ValueError, match="temperatures has 2 entries: expected one per layer, 3"):
        masks_for(record, [circuit] * 3, [1.0] * 2)
    unknown = RoutingRecord(record.layers)
    assert len(masks_for(unknown, [other] * 3, [1.0] * 3, "b")) == 3
    single = RoutingRecord.of(routings_of(cr.Between(1, 4), 12)[0])
    assert cr.route(logits_of(12, 0), circuit, replay=single).mask.equal(single.masks()[0])
    with pytest.raises(ValueError, match="was decided under"):
        cr.route(logits_of(12, 0), other, replay=single)
    assert cr.route(logits_of(12, 0), other, replay=RoutingRecord(single.layers)).mask.equal(single.masks()[0])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"constraints": ["a"]}, ValueError, "constraints has 1 entries: expected one per layer, 3"),
        ({"constraints": "abc"}, TypeError, "constraints='abc': expected one constraint"),
        ({"constraints": [1, None, None]}, TypeError, r"constraints\[0\]=1: expected a constraint"),
        ({"model": 7}, TypeError, "model=7: expected a text"),
    ],
)
def test_what_is_told_of_a_record_is_checked(options, error, message):
    with pytest.raises(error, match=message):
        RoutingRecord(record_of().layers, **options)


def test_what_a_file_tells_of_a_record_is_checked(tmp_path):
    record = record_of(cr.Exactly(1))
    for origin, message in {
        b"{}": "'constraints'",
        b"[1]": "list indices",
        b"{": "not a readable routing record",
        b'{"constraints": ["a", "b"], "model": null}': "constraints has 2 entries",
        b'{"constraints": null, "model": 3}': "model=3",
    }.items():
        arrays = arrays_of(record) | {"origin": np.frombuffer(origin, dtype=np.uint8)}
        (tmp_path / "r.npz").write_bytes(files.sealed_archive(arrays))
        with pytest.raises(cr.CircuitFileError, match=message):
            RoutingRecord.load(tmp_path / "r.npz")
