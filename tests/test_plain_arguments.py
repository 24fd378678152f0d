"""Numbers, flags and words of any kind are kept as Python's own: the same is stored, shown, hashed and written."""

import enum
import inspect
import json
import pickle
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn

import circuitroute as cr
from circuitroute import _validate
from circuitroute.circuit import Graph
from circuitroute.circuit.graph import DeferredGraph
from circuitroute.integrations import hosted, serving
from circuitroute.routing.records import LayerRecord
from circuitroute.testing import Case
from tests.interop.files import BALANCED, ONE_OF_THREE_C2D, ONE_OF_THREE_D4, TWO_PAIRS_SDD


class Count(enum.IntEnum):
    """An integer whose repr is no integer's."""

    TWO = 2
    THREE = 3
    FOUR = 4
    EIGHT = 8


INTEGERS = {
    "int64": np.int64,
    "uint8": np.uint8,
    "array": np.array,
    "tensor": torch.tensor,
    "int32 tensor": lambda value: torch.tensor(value, dtype=torch.int32),
    "enum": Count,
}
NUMBERS = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "array": np.array,
    "tensor": torch.tensor,
    "Parameter": lambda value: nn.Parameter(torch.tensor(value)),
    "Fraction": Fraction,
}
FLAGS = {"bool_": np.bool_, "array": np.array, "tensor": torch.tensor}
PLAIN = (bool, int, float, str, type(None))

# i makes an integer of the kind under test.
CONSTRAINTS = {
    "Exactly": lambda i: cr.Exactly(i(2)),
    "AtMost": lambda i: cr.AtMost(i(2)),
    "AtLeast": lambda i: cr.AtLeast(i(2)),
    "Between": lambda i: cr.Between(i(2), i(3)),
    "CountIn": lambda i: cr.CountIn([i(2), i(4)]),
    "Cost": lambda i: cr.Cost([i(2), i(3), i(2)], at_most=i(4), at_least=i(2)),
    "Cost of two limits": lambda i: cr.Cost([i(2), i(3), i(2)], at_least=i(2)),
    "Groups": lambda i: cr.Groups(i(2)),
    "Groups of lists": lambda i: cr.Groups([[0, i(2)], [1, i(3)]]),
    "EachGroup": lambda i: cr.EachGroup(cr.Groups(i(2)), cr.Exactly(i(2))),
    "ActiveGroups": lambda i: cr.ActiveGroups(cr.Groups(i(4)), at_most=i(3), at_least=i(2)),
    "LayerBudget": lambda i: cr.LayerBudget(i(2), i(4), cr.AtMost(i(2)), cr.Exactly(i(3))),
    "CNF": lambda i: cr.CNF([[i(2), -3], [i(3)]], n=i(4), show=[i(2), 1]),
    "over of clauses": lambda i: cr.CNF([[i(2), -3]]).over([i(3), i(2), 0]),
    "over of a count": lambda i: cr.Exactly(i(2)).over([i(3), i(2)]),
    "over of costs": lambda i: cr.Cost([1, 2], at_most=i(2)).over([i(3), i(2)]),
    "over of over": lambda i: cr.Cost([1, 2], at_most=2).over([1, 0]).over([i(3), i(2)]),
    "over of a composition": lambda i: (cr.Exactly(i(2)) | cr.Cost([1, 2], at_most=2)).over([i(3), i(2)]),
    "over of a negation": lambda i: (~cr.Exactly(i(2))).over([i(3), i(2)]),
    "over of logic": lambda i: cr.Logic("x0 & x1").over([i(3), i(2)]),
    "Logic": lambda i: cr.Logic(cr.variables(i(4))[2]),
}


@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_a_constraint_of_any_integers_is_that_of_plain_ones(name, kind):
    plain, given = CONSTRAINTS[name](int), CONSTRAINTS[name](INTEGERS[kind])
    assert given == plain
    assert hash(given) == hash(plain)
    assert repr(given) == repr(plain)
    assert eval(repr(given), {**vars(cr)}) == plain
    assert pickle.loads(pickle.dumps(given)) == plain
    assert_plain(vars(given))
    if isinstance(given, cr.Constraint):
        sizes = {"Cost": 3, "Cost of two limits": 3, "LayerBudget": 8}
        n = sizes.get(name, 4)
        assert cr.compile(given, np.int64(n)) is cr.compile(plain, n)


@pytest.mark.parametrize("make", [np.array, torch.tensor])
def test_whole_arrays_are_sequences(make):
    assert repr(cr.Cost(make([1, 2, 3]), at_most=3)) == repr(cr.Cost([1, 2, 3], at_most=3))
    assert cr.CountIn(make([2, 4])) == cr.CountIn({2, 4})
    assert repr(cr.Groups(make([[0, 1], [2, 3]]))) == "Groups([[0, 1], [2, 3]])"
    assert cr.Exactly(1).over(make([2, 0])) == cr.Exactly(1).over([0, 2])
    assert (cr.Exactly(1) & cr.AtMost(3)).over(make([2, 0])) == (cr.Exactly(1) & cr.AtMost(3)).over([0, 2])


def test_a_file_keeps_a_constraint_of_any_integers(tmp_path):
    i = np.int64
    rule = cr.ActiveGroups(cr.Groups(i(4)), at_most=i(2)) & cr.Cost(np.arange(8), at_most=i(9)) & cr.Exactly(i(2))
    cr.compile(rule, i(8)).save(tmp_path / "a")
    assert cr.load(tmp_path / "a").constraint == rule


@pytest.mark.parametrize("value", [True, np.True_, np.array(True), torch.tensor(True)], ids=str)
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_bools_are_no_integers(name, value):
    with pytest.raises(TypeError, match=r"expected an integer, got a bool|expected a sequence|expected cr.Groups"):
        CONSTRAINTS[name](lambda _: value)


@pytest.mark.parametrize("make", [np.int64, np.array, torch.tensor])
def test_one_number_is_no_collection(make):
    with pytest.raises(TypeError, match=r"counts=.*expected a set of integers"):
        cr.CountIn(make(2))
    with pytest.raises(TypeError, match=r"costs=.*expected a sequence of integers"):
        cr.Cost(make(2), at_most=1)
    with pytest.raises(TypeError, match=r"indices=.*expected a sequence of variable indices"):
        cr.Exactly(1).over(make(2))
    with pytest.raises(TypeError, match=r"indices=.*expected a sequence of variable indices"):
        (cr.Exactly(1) | cr.Exactly(2)).over(make(2))
    with pytest.raises(TypeError, match=r"include=.*expected a mask or a sequence"):
        cr.compile(cr.Exactly(1), 3)(torch.zeros(3)).condition(include=np.int64(1))


def test_logic_takes_any_truth_and_any_text():
    assert cr.Logic(np.True_) == cr.Logic(True)
    assert cr.Logic(np.str_("x0 & x1")) == cr.Logic("x0 & x1")
    assert repr(cr.Logic(np.str_("x0 & x1"))) == repr(cr.Logic("x0 & x1"))


# ---------------------------------------------------------------------------------------------- everything that is kept


def _experts(count=8):
    return [nn.Linear(4, 4) for _ in range(count)]


# Made with numbers x, integers i, flags b and words w, one of them of the kind under test. The numbers are the same in
# every precision.
OBJECTS = {
    "Router": lambda x, i, b, w: cr.Router(
        i(4), i(8), cr.Exactly(i(2)), combine=w("sigmoid"), estimator=w("none"), decide=w("mode"), bias=b(True)
    ),
    "Router of a share": lambda x, i, b, w: cr.Router(
        i(4), i(8), cr.Exactly(2), decide=x(0.5), temperature=_scalar(x, 0.5)
    ),
    "ExactKRouter": lambda x, i, b, w: cr.ExactKRouter(i(4), i(8), i(2), decide=x(0.5), temperature=_scalar(x, 0.25)),
    "DynamicKRouter": lambda x, i, b, w: cr.DynamicKRouter(i(4), i(8), i(2), i(3), decide=x(0.5)),
    "TopKRouter": lambda x, i, b, w: cr.TopKRouter(i(4), i(8), i(2), combine=w("normalized"), bias=b(False)),
    "SoftTopKRouter": lambda x, i, b, w: cr.SoftTopKRouter(
        i(4),
        i(8),
        x(2.5),
        _scalar(x, 0.5),
        threshold=x(0.25),
        max_experts=i(4),
        cap_factor=x(1.5),
        combine=w("softmax"),
    ),
    "softmoe": lambda x, i, b, w: cr.SoftTopKRouter.softmoe(
        i(4), i(8), x(2.5), x(1.5), threshold=x(0.25), bias=b(True)
    ),
    "relative": lambda x, i, b, w: cr.SoftTopKRouter(i(4), i(8), x(2.5), relative_threshold=b(True)),
    "BudgetRouter": lambda x, i, b, w: cr.BudgetRouter(
        i(4),
        i(8),
        i(3),
        cr.Between(0, i(2)),
        cr.AtMost(i(4)),
        combine=w("normalized"),
        estimator=w("none"),
        decide=x(0.5),
        temperature=_scalar(x, 0.5),
        per_token=b(True),
    ),
    "Budget": lambda x, i, b, w: cr.Budget(i(8), i(3), cr.Between(0, i(2)), cr.AtMost(i(4))),
    "MoE": lambda x, i, b, w: cr.MoE(None, _experts(), probes=i(2), probe_weights=x(4.0), call_idle=b(True)),
    "MoE by words": lambda x, i, b, w: cr.MoE(None, _experts(), probes=w("all"), probe_weights=w("none")),
    "StackedExperts": lambda x, i, b, w: cr.StackedExperts(i(8), i(4), i(3), activation=w("relu")),
    "ConstraintLayer": lambda x, i, b, w: cr.nn.ConstraintLayer(
        cr.Exactly(i(2)), i(8), in_features=i(4), components=i(3), bias=b(True), validate_args=b(False)
    ),
    "LayerAllocation": lambda x, i, b, w: cr.LayerAllocation(i(3), x(6.0), x(0.5), x(4.0)),
    "SubsetPrior": lambda x, i, b, w: cr.SubsetPrior(
        i(4), i(2), vtree=cr.Vtree.linear([i(2), 0, i(3), 1]), layers=w("tucker"), seed=i(3)
    ),
    "Vtree": lambda x, i, b, w: cr.Vtree(i(2), [(0, 1)]),
    "Vtree of pairs": lambda x, i, b, w: cr.Vtree.of_nested(((i(2), 0), (1, i(3)))),
    "CountController": lambda x, i, b, w: cr.CountController(x(2.5), gain=x(0.25)),
    "LossFree": lambda x, i, b, w: cr.balance.LossFree(i(4), x(0.25), target=[x(0.5)] * 4, centre=b(True)),
    "Quantile": lambda x, i, b, w: cr.balance.Quantile(i(4), [x(0.5)] * 4, rate=x(0.5), centre=b(True)),
    "ExactBalance": lambda x, i, b, w: cr.balance.ExactBalance(
        i(4), [x(0.5)] * 4, rate=x(0.5), steps=i(2), temperature=x(0.25)
    ),
    "RoutingRecord": lambda x, i, b, w: cr.RoutingRecord([_layer(i, w)], temperature=x(0.5)),
    "LayerRecord": lambda x, i, b, w: _layer(i, w),
    "RoutingFunction": lambda x, i, b, w: serving.routing_function(
        cr.Exactly(i(2)), i(8), combine=w("sigmoid"), score=w("sigmoid"), scaling=x(2.5)
    ),
    "RoutingFunction that samples": lambda x, i, b, w: serving.routing_function(
        cr.Exactly(i(2)), i(8), sample=b(True), temperature=x(0.5), head=i(2), layer=i(3)
    ),
    "GreedyGroups": lambda x, i, b, w: serving.greedy_groups(
        i(8),
        i(2),
        groups=i(4),
        active=i(2),
        group_score=w("max"),
        score=w("softmax"),
        combine=w("sigmoid"),
        scaling=x(2.5),
    ),
    "Decider": lambda x, i, b, w: hosted.Decider(cr.Exactly(2), i(8), seed=i(3), decide=x(0.5), temperature=x(0.5)),
    "Decider by words": lambda x, i, b, w: hosted.Decider(cr.Exactly(2), 8, estimator=w("none"), decide=w("mode")),
    "Case": lambda x, i, b, w: Case(cr.Exactly(i(2)), i(4), _two),
    "Graph": lambda x, i, b, w: Graph(i(4), *_arrays(4)),
    "Circuit": lambda x, i, b, w: cr.Circuit(Graph(4, *_arrays(4)), cr.Exactly(2), [i(2)], engine=w("naive")),
}


def _scalar(x, value):
    """Temperatures may be tensors, which are kept as they are: learned."""
    made = x(value)
    return value if isinstance(made, torch.Tensor) else made


def _two(selected):
    return len(selected) == 2


def _arrays(n):
    graph = cr.compile(cr.Exactly(2), n).graph
    return [getattr(graph, name).copy() for name in ("kind", "variable", "first", "left", "right")]


def _layer(i, w):
    return LayerRecord(i(8), w("indices"), torch.tensor([[2], [3]], dtype=torch.uint8))


def _made(name, x, i, b, w):
    torch.manual_seed(0)
    return OBJECTS[name](x, i, b, w)


def _state(thing):
    """What an object holds, but for the machinery of modules, tensors, and names that are of this process."""
    if isinstance(thing, nn.Module):
        own = {name: _state(value) for name, value in vars(thing).items() if not name.startswith("_")}
        return own | {name: _state(part) for name, part in thing.named_children()}
    if isinstance(thing, (tuple, list, set, frozenset)):
        return [_state(part) for part in thing]
    if type(thing).__module__.startswith("circuitroute") and hasattr(thing, "__dict__"):
        return {name: _state(value) for name, value in vars(thing).items() if name != "_handle"}
    return thing


def assert_plain(value, place=""):
    """That numbers, flags and texts are of Python's own types, however deep they are."""
    if isinstance(value, dict):
        for name, part in value.items():
            assert_plain(part, f"{place}.{name}")
    elif isinstance(value, (list, tuple, set, frozenset)):
        for part in value:
            assert_plain(part, place)
    elif isinstance(value, (*PLAIN, np.generic)):
        assert type(value) in PLAIN, f"{place} is {value!r}"


KINDS = [
    *[("number", kind) for kind in NUMBERS],
    *[("integer", kind) for kind in INTEGERS],
    *[("flag", kind) for kind in FLAGS],
    ("word", "str_"),
    ("word", "enum"),
]


def _same(value):
    return value


def _shown(thing):
    return re.sub(" at 0x[0-9a-f]+", "", repr(thing))


def _makers(what, kind):
    same = dict.fromkeys(("number", "integer", "flag", "word"), _same)
    words = {"str_": np.str_, "enum": lambda text: enum.Enum("Word", {"WORD": text}, type=str).WORD}
    same[what] = {"number": NUMBERS, "integer": INTEGERS, "flag": FLAGS, "word": words}[what][kind]
    return same["number"], same["integer"], same["flag"], same["word"]


@pytest.mark.parametrize(("what", "kind"), KINDS)
@pytest.mark.parametrize("name", OBJECTS)
def test_objects_keep_plain_values(name, what, kind):
    plain, given = _made(name, *[_same] * 4), _made(name, *_makers(what, kind))
    assert _shown(given) == _shown(plain)
    state = _state(given)
    assert_plain(state, name)
    if isinstance(given, nn.Module):
        assert given.state_dict().keys() == plain.state_dict().keys()


def test_the_tables_hold_every_public_callable_with_numbers():
    """What takes numbers, by its annotations, is tried above or below, or keeps none of them."""
    tried = {name.split()[0] for name in (*CONSTRAINTS, *OBJECTS)} | {"compile", "read_nnf", "read_sdd", "variables"}
    keeps_none = {
        "load",  # a budget of seconds, of the call alone
        "read_cnf",  # likewise
        "BudgetState",  # a plain tuple that begin() makes
        "Routing",
        "SequenceState",  # likewise, of route_sequence()
        "SoftRouting",
        "PriorDistribution",
        "SubsetDistribution",
        "log_count_polynomial",
        "logits_for_marginals",
        "register_compiler",
        "random_key",
        "route",
        "route_batch",
        "route_sequence",
        "soft_topk",
    }
    numeric = {
        name
        for name, value in vars(cr).items()
        if not name.startswith("_") and callable(value) and _takes_numbers(value)
    }
    assert numeric - tried - keeps_none == set()


def _takes_numbers(value):
    try:
        parameters = inspect.signature(value).parameters.values()
    except ValueError:
        return False
    return any("int" in str(p.annotation) or "float" in str(p.annotation) for p in parameters)


# ---------------------------------------------------------------------------------------------- values handed on

LOGITS = torch.linspace(-1, 1, 16).reshape(2, 8)
CIRCUIT = cr.compile(cr.Between(1, 3), 8)
FIXED = cr.compile(cr.Exactly(2), 8)


def _routing(**options):
    return cr.route(LOGITS, CIRCUIT, key=cr.random_key(0, torch.arange(2)), **options)


# The same result, of plain values and of any others.
CALLS = {
    "route": lambda x, i: _routing(decide=x(0.5), temperature=_scalar(x, 0.5)).temperature,
    "price": lambda x, i: _routing(price=x(0.5)).mask.tolist(),
    "route_batch": lambda x, i: cr.route_batch(
        LOGITS, CIRCUIT, max_distinct=i(4), exchanges=i(2), key=i(3), decide=x(0.5), price=x(0.25)
    ).mask.tolist(),
    "route_sequence": lambda x, i: [
        *cr.route_sequence(LOGITS, CIRCUIT, total=i(4), length=i(3), block=i(2), key=i(3)).mask.tolist(),
        *cr.route_sequence(LOGITS, CIRCUIT, total=i(4), length=i(3), decide=x(0.5), key=1).state[:2],
    ],
    "bias_for": lambda x, i: cr.balance.bias_for(FIXED(LOGITS), [x(0.25)] * 8, temperature=x(0.5)).tolist(),
    "random_key": lambda x, i: cr.random_key(i(3), i(2), i(4)).item(),
    "a key": lambda x, i: cr.route(LOGITS, CIRCUIT, key=i(3)).mask.tolist(),
    "padded": lambda x, i: [part.tolist() for part in _routing().padded(width=i(4))],
    "soft_topk": lambda x, i: cr.soft_topk(LOGITS, x(2.5), x(0.5)).tolist(),
    "geometric": lambda x, i: cr.schedules.geometric(x(1.0), x(0.25), i(8))(i(4)),
    "cosine": lambda x, i: cr.schedules.cosine(x(1.0), x(0.25), i(8))(i(2)),
    "constant": lambda x, i: cr.schedules.constant(x(0.25))(i(2)),
    "log_count_polynomial": lambda x, i: cr.log_count_polynomial(LOGITS, i(3)).tolist(),
    "of_indices": lambda x, i: repr(cr.RoutingRecord.of_indices(torch.tensor([[[2]]]), i(8)).num_experts),
    "of_indices of each": lambda x, i: cr.RoutingRecord.of_indices(torch.tensor([[[2]]]), [i(8)]).num_experts,
    "split": lambda x, i: [len(part) for part in _record(4).split([i(2), i(2)])],
    "include": lambda x, i: FIXED(LOGITS).condition(include=[i(2)], exclude=[i(3)]).marginals.tolist(),
    "sample": lambda x, i: FIXED(LOGITS).sample((i(2),), key=i(3)).tolist(),
    "calibrate": lambda x, i: _soft().calibrate(torch.ones(2, 4), mass=x(0.5)),
    "k of a call": lambda x, i: _soft()(torch.ones(2, 4), k=x(2.5)).mask.tolist(),
    "swap_oracle": lambda x, i: (
        cr.metrics.swap_oracle(
            lambda routing: (routing.gates * torch.arange(8)).sum(), LOGITS, FIXED, rounds=i(4), seed=i(3), key=0
        ).correlation
    ),
    "em_step": lambda x, i: _prior().em_step(LOGITS > 0, step_size=x(0.5), smoothing=x(0.25)).item(),
    "prior's sample": lambda x, i: _prior().sample((i(2),), key=i(3)).tolist(),
    "prior's include": lambda x, i: _prior().marginals(include=[i(2)], exclude=[i(3)]).tolist(),
    "summary": lambda x, i: cr.metrics.summary(_routing(), budget=i(8)),
    "calibrate_temperature": lambda x, i: _exact().calibrate_temperature(torch.ones(2, 4), agreement=x(0.75)),
    "of_indices with weights": lambda x, i: (
        cr.RoutingRecord.of_indices(torch.tensor([[[2]]]), i(8), torch.ones(1, 1, 1), temperature=x(0.5)).temperature
    ),
    "of_router_logits": lambda x, i: cr.RoutingRecord.of_router_logits(LOGITS, FIXED, x(0.5)).log_probs.tolist(),
    "truncated_ratio": lambda x, i: cr.replay.truncated_ratio(
        torch.ones(2, 3), torch.zeros(2, 3), low=x(0.5), high=x(2.0)
    ).tolist(),
    "router_shift": lambda x, i: cr.replay.router_shift(torch.ones(2, 3), torch.zeros(2, 3), floor=x(0.5)).tolist(),
    "clip": lambda x, i: cr.replay.importance_ratio(torch.ones(2), torch.zeros(2), clip=(x(0.5), x(2.0))).tolist(),
}


RECORD = cr.RoutingRecord.of(torch.ones(9, 8, dtype=torch.bool))


def _record(tokens):
    return cr.RoutingRecord.of(torch.ones(tokens, 8, dtype=torch.bool))


def _soft():
    torch.manual_seed(0)
    return cr.SoftTopKRouter(4, 8, 2.5, cap_factor=1.0)


def _prior():
    return cr.SubsetPrior(8, 2)


def _exact():
    torch.manual_seed(0)
    return cr.ExactKRouter(4, 8, 2)


@pytest.mark.parametrize(("what", "kind"), [(what, kind) for what, kind in KINDS if what in ("number", "integer")])
@pytest.mark.parametrize("name", CALLS)
def test_calls_do_the_same(name, what, kind):
    torch.manual_seed(0)
    plain = CALLS[name](_same, _same)
    torch.manual_seed(0)
    given = CALLS[name](*_makers(what, kind)[:2])
    assert given == plain
    assert_plain(given, name)


def test_a_soft_mass_of_numpy_is_not_computed_in_its_precision():
    """1.1 in float32 is a little more than a float's 1.1; times a whole factor it is still that number."""
    router = cr.SoftTopKRouter(4, 64, 2.0, cap_factor=1.0)
    hidden = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    for mass in (2.0, 3.0, 5.0, 7.0):
        assert router(hidden, k=np.float32(mass)).max_count == router(hidden, k=mass).max_count == int(mass)


@pytest.mark.parametrize("make", [np.array, list])
def test_masks_of_bools_are_masks(make):
    chosen = [True, *[False] * 7]
    expected = FIXED(LOGITS).condition(include=chosen).marginals
    assert FIXED(LOGITS).condition(include=make(chosen)).marginals.equal(expected)
    assert FIXED(LOGITS).condition(include=[np.bool_(flag) for flag in chosen]).marginals.equal(expected)


# ---------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("kind", INTEGERS)
def test_readers(tmp_path, kind):
    i = INTEGERS[kind]
    for name, text in (("a.nnf", ONE_OF_THREE_C2D), ("b.nnf", ONE_OF_THREE_D4)):
        (tmp_path / name).write_text(text)
        circuit = cr.read_nnf(tmp_path / name, n=i(4), max_nodes=np.int64(1000))
        assert type(circuit.n) is int
        assert circuit.n == 4
        circuit.save(tmp_path / "again")
        assert repr(cr.load(tmp_path / "again")) == repr(circuit)
        assert repr(circuit) == repr(cr.read_nnf(tmp_path / name, n=4))
    (tmp_path / "c.sdd").write_text(TWO_PAIRS_SDD)
    (tmp_path / "c.vtree").write_text(BALANCED)
    assert cr.read_sdd(tmp_path / "c.sdd", tmp_path / "c.vtree", max_nodes=np.int64(1000)).model_count() == 7


@pytest.mark.parametrize("kind", INTEGERS)
def test_a_stream_of_any_integers_is_written(tmp_path, kind):
    i = INTEGERS[kind]
    with cr.replay.RecordWriter(tmp_path / "a", [i(8)], tokens_per_chunk=i(3)) as writer:
        assert_plain([writer.tokens_per_chunk, writer._experts])
        writer.append(RECORD)
    with cr.replay.RecordFile(tmp_path / "a", partial=np.False_) as file:
        assert [len(batch) for batch in file.batches(i(4))] == [4, 4, 1]
        assert file[np.array([8, -9])] == RECORD[[8, 0]]
        assert_plain([file.num_experts, file.temperature, len(file), file.bytes_per_token])
        assert file[:] == RECORD


def test_words_of_records_are_plain(tmp_path):
    record = cr.RoutingRecord(RECORD.layers, constraints=[np.str_("AtMost(8)")], model=np.str_("a"))
    assert_plain([record.constraints, record.model])
    record.save(tmp_path / "a.npz")
    assert cr.RoutingRecord.load(tmp_path / "a.npz").model == "a"
    new, old = torch.ones(2, 3), torch.zeros(2, 3)
    given = cr.replay.truncated_ratio(new, old, per=np.str_("layer"), outside=np.str_("zero"))
    assert given.equal(cr.replay.truncated_ratio(new, old, per="layer", outside="zero"))


def test_a_record_of_any_integers_is_written(tmp_path):
    record = cr.RoutingRecord([_layer(np.int64, np.str_)], temperature=np.float32(0.5))
    record.save(tmp_path / "a.npz")
    assert cr.RoutingRecord.load(tmp_path / "a.npz") == record


def test_a_deferred_graph_of_any_integers():
    graph = cr.compile(cr.Exactly(2).over([0, 1]), 4).graph
    deferred = DeferredGraph(np.int64(4), np.int64(graph.num_nodes), np.int64(graph.num_edges), lambda: graph)
    assert_plain([deferred.n, deferred.num_nodes, deferred.num_edges])
    assert_plain(pickle.loads(pickle.dumps(deferred)).n)


def test_a_circuit_of_any_counts_is_written(tmp_path):
    graph = cr.compile(cr.Exactly(2), 4).graph
    made = cr.Circuit(graph, cr.Exactly(2), np.array([2]))
    made.save(tmp_path / "a")
    assert cr.load(tmp_path / "a").counts == (2,)


def test_an_exported_program_of_numpy_arguments():
    function = serving.routing_function(cr.Exactly(2), np.int64(4))
    program = serving.export(function, topk=np.int64(2), renormalize=np.True_)
    hidden, logits = torch.zeros(5, 3), torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    given = {"hidden_states": hidden, "gating_output": logits, "topk": 2, "renormalize": True}
    for found, expected in zip(program.module()(**given), function(hidden, logits, np.int64(2), np.True_), strict=True):
        assert found.equal(expected)


# ---------------------------------------------------------------------------------------------- the checks themselves


def test_checks_return_plain_values():
    assert type(_validate.as_int("n", Count.TWO)) is int
    assert type(_validate.as_number("x", np.float64(0.5))) is float
    assert type(_validate.as_flag("b", np.True_)) is bool
    assert type(_validate.one_of("w", np.str_("a"), ("a", "b"))) is str
    assert json.dumps(_validate.index_tuple("v", np.array([1, 2]))) == "[1, 2]"


@pytest.mark.parametrize(
    "value",
    [True, np.True_, torch.tensor(True), "1", np.str_("1"), b"1", bytearray(b"1"), np.array("1"), 1j, np.complex64(1)],
)
def test_what_is_no_number_is_refused(value):
    with pytest.raises(TypeError, match=r"x=.*: expected a number, got"):
        _validate.as_number("x", value)


@pytest.mark.parametrize("value", [1, 0.0, "True", None, [], np.int64(1), torch.tensor([True, False]), nn.Linear(1, 1)])
def test_what_is_no_flag_is_refused(value):
    with pytest.raises(TypeError, match=r"b=.*: expected True or False, got"):
        _validate.as_flag("b", value)


def test_what_is_none_of_the_words_is_refused():
    for value in (np.array(["a"]), torch.tensor(1), 3, None, "c", ["a"]):
        with pytest.raises(ValueError, match=r"w=.*: choose one of 'a', 'b'"):
            _validate.one_of("w", value, ("a", "b"))


def test_an_integer_beyond_floats_is_refused():
    with pytest.raises(ValueError, match="x: an integer of 2001 bits is too large"):
        _validate.as_number("x", 1 << 2000)
