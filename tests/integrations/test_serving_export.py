"""Serving functions in traced programs, and in programs that run where this library is not."""

import math
import os
import subprocess
import sys

import pytest
import torch

import circuitroute as cr
from circuitroute.engines.layered.torch import unrolled
from circuitroute.integrations import serving
from tests.integrations.served import CONSTRAINTS, H, T, assert_same, assert_same_bits, call, keys_of, logits_of, traced

BIAS = torch.linspace(-1, 1, 12)
# Tracing takes seconds: one of each kind.
FUNCTIONS = {
    "mode of a range": lambda: serving.routing_function(cr.Between(2, 4), 12, bias=BIAS),
    "mode of a circuit": lambda: serving.routing_function(CONSTRAINTS["both"][0], 12, bias=BIAS),
    "sample of a range": lambda: serving.routing_function(cr.Between(2, 4), 12, bias=BIAS, sample=True),
    "sample of a circuit": lambda: serving.routing_function(
        CONSTRAINTS["both"][0], 12, bias=BIAS, combine="sigmoid", sample=True, temperature=0.5, head=1, layer=3
    ),
    "greedy groups": lambda: serving.greedy_groups(12, 4, groups=4, active=2, bias=BIAS, scaling=2.5),
}
DTYPES = dict(
    zip(FUNCTIONS, [torch.float32, torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16], strict=True)
)
TOPK = 5


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def inputs(name, rows):
    """Logits with a row of NaN, and keys for functions that sample."""
    logits = logits_of(rows=rows).to(DTYPES[name])
    logits[1:2, 0] = math.nan
    return logits, keys_of(rows) if name.startswith("sample") else {}


SLOW = {"sample of a range", "sample of a circuit"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in FUNCTIONS]
)
def test_it_compiles_in_one_graph(name):
    """For any number of tokens at once; a row of NaN stays alone there too."""
    function = FUNCTIONS[name]()
    compiled = traced(function)
    torch._dynamo.utils.counters.clear()
    for rows in (T, 7):
        logits, keys = inputs(name, rows)
        hidden = torch.zeros(rows, H)
        for tensor in (hidden, logits, *keys.values()):
            torch._dynamo.mark_dynamic(tensor, 0)  # as vLLM does
        found = compiled(hidden_states=hidden, gating_output=logits, topk=TOPK, renormalize=False, **keys)
        assert_same_bits(found, call(function, logits, TOPK, **keys))
        assert found[0].isnan().all(-1).nonzero().tolist() == [[1]]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_sample_compiles():
    """A small one, in the ordinary run."""
    function = serving.routing_function(cr.AtMost(1), 3, sample=True)
    found = call(traced(function), logits_of(3), 1, **keys_of())
    assert_same_bits(found, call(function, logits_of(3), 1, **keys_of()))


ELSEWHERE = """
import sys, torch
sys.modules["circuitroute"] = sys.modules["circuitroute_compilers"] = None  # not installed
for path, given in torch.load(sys.argv[1], weights_only=True):
    run = torch.export.load(path).module()
    for logits, keys, weights, ids in given:
        hidden = torch.zeros(len(logits), 9, dtype=logits.dtype)
        found = run(hidden_states=hidden, gating_output=logits, topk=5, renormalize=True, **keys)
        assert found[0].dtype == torch.float32 and found[1].dtype == torch.int32
        assert torch.equal(found[0].nan_to_num(nan=7.0), weights.nan_to_num(nan=7.0))
        assert torch.equal(found[1], ids)
    try:
        run(hidden_states=hidden, gating_output=logits, topk=6, renormalize=True, **keys)
    except Exception:
        continue
    raise SystemExit("a topk that was not exported is taken")
print("as in the other process")
"""


def test_exported_programs_run_where_this_library_is_not(tmp_path):
    """In a fresh process, for any number of tokens, one included: bit for bit."""
    work = []
    for name, make in FUNCTIONS.items():
        function, path = make(), tmp_path / f"{name}.pt2"
        program = serving.export(function, path, topk=TOPK, renormalize=True, dtype=DTYPES[name])
        assert not [node for node in program.graph.nodes if "circuitroute" in str(node.target)]
        batches = [inputs(name, rows) for rows in (T, 1, 0, 3)]
        work.append((str(path), [(x, keys, *call(function, x, TOPK, True, **keys)) for x, keys in batches]))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{name}.pt2" for name in FUNCTIONS)
    torch.save(work, tmp_path / "work.pt")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    run = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(tmp_path / "work.pt")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "as in the other process"


def test_too_large_a_circuit_is_served_but_not_exported(monkeypatch, tmp_path):
    constraint, n, topk = CONSTRAINTS["both"]
    expected = call(serving.routing_function(constraint, n), logits_of(), topk)
    monkeypatch.setattr(unrolled, "MAX_UNROLLED", 10)
    function = serving.routing_function(constraint, n)
    assert not function.portable
    for run in (function, traced(function)):
        assert_same(call(run, logits_of(), topk), expected)
    with pytest.raises(ValueError, match=r"has 8\d products, .* at most .*: simplify the constraint, or serve it"):
        serving.export(function, tmp_path / "no.pt2", topk=topk, renormalize=True)
    if hasattr(torch.compiler, "is_exporting"):  # from torch 2.7 on: before, an export looks like a compilation
        with pytest.raises(ValueError, match="simplify the constraint, or serve it"):
            torch.export.export(function, (torch.zeros(3, H), logits_of(rows=3), topk, True))
    assert list(tmp_path.iterdir()) == []
    counting = serving.routing_function(cr.Exactly(3), n)
    assert counting.portable
    program = serving.export(counting, topk=3, renormalize=False)  # which need not be written
    assert_same(call(program.module(), logits_of(), 3), call(counting, logits_of(), 3))


@pytest.mark.parametrize("name", ["range", "both"])
def test_a_sample_of_too_large_a_circuit_is_served_but_not_exported(name, monkeypatch):
    constraint, n, topk = CONSTRAINTS[name]
    expected = call(serving.routing_function(constraint, n, sample=True, head=1), logits_of(), topk, **keys_of())
    monkeypatch.setattr(unrolled, "MAX_UNROLLED", 10)
    function = serving.routing_function(constraint, n, sample=True, head=1)
    assert not function.portable
    assert_same_bits(call(function, logits_of(), topk, **keys_of()), expected)
    if name == "range":  # one is enough
        assert_same_bits(call(traced(function), logits_of(), topk, **keys_of()), expected)
    with pytest.raises(ValueError, match=r"has \d+ products, .* at most 10: simplify the constraint, or serve it"):
        serving.export(function, topk=topk, renormalize=True)
    if hasattr(torch.compiler, "is_exporting"):
        given = (torch.zeros(3, H), logits_of(rows=3), topk, True, *keys_of(3).values())
        with pytest.raises(ValueError, match="simplify the constraint, or serve it"):
            torch.export.export(function, given)


def test_a_missing_key_is_told_while_tracing_too():
    function = serving.routing_function(cr.Exactly(3), 12, sample=True)
    with pytest.raises(TypeError, match="seed is missing"):
        torch.export.export(function, (torch.zeros(3, H), logits_of(rows=3), 3, True))
    with pytest.raises(Exception, match="seed is missing" if hasattr(torch.compiler, "is_exporting") else "Observed"):
        call(traced(function), logits_of(), 3)


def test_a_topk_that_is_too_small_is_refused_while_tracing_too():
    function = serving.routing_function(cr.Between(2, 4), 12)
    with pytest.raises(ValueError, match="topk=3"):
        serving.export(function, topk=3, renormalize=True)
    # Before torch 2.7, a traced program says no more than that there was an exception.
    with pytest.raises(Exception, match="topk=3" if hasattr(torch.compiler, "is_exporting") else "Observed exception"):
        call(traced(function), logits_of(), 3)
