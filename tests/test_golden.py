"""What must not change: decisions as a function of their keys, public signatures, checkpoints, and files.

Samples, modes and indices are compared exactly; gates, log-probabilities and gradients to the errors stated in
``tests/test_engines_subset.py``. Every engine gives the same constants.
"""

import json

import numpy as np
import pytest
import torch

import circuitroute as cr
from circuitroute.engines import ENGINES
from circuitroute.engines.subset.triton.engine import installed
from tests.golden import values

GOLDEN = json.loads(values.DECISIONS.read_text(encoding="utf-8"))
# The interpreter that stands in for a GPU is slow: two circuits say as much, and the larger one is for the slow run.
INTERPRETED = ("Exactly(2)", "Between(4, 8)")
LONG = ("Between(4, 8)", "triton")
EXACT = ("sample", "samples", "mode", "with_potential")


def engines_of(text, n, dtype):
    names = [
        name for name in ENGINES[cr.compile(values.constraint_of(text), n).op] if name not in ("pyjuice", "triton")
    ]
    return [*names, "triton"] if text in INTERPRETED and dtype == "float32" and installed() else names


CASES = [
    pytest.param(
        *(text, n, spread, dtype, engine),
        id=f"{text}-{n}-{dtype}-{engine}",
        marks=[pytest.mark.slow] if (text, engine) == LONG else [],
    )
    for text, n, spread in values.CIRCUITS
    for dtype in values.DTYPES
    for engine in engines_of(text, n, dtype)
]


@pytest.mark.parametrize(("text", "n", "spread", "dtype", "engine"), CASES)
def test_decisions(text, n, spread, dtype, engine):
    golden = GOLDEN["decisions"][f"{text} of {n}, {dtype}"]
    circuit = cr.compile(values.constraint_of(text), n).with_engine(engine)
    found = values.decisions_of(circuit, spread, values.DTYPES[dtype])
    assert found.keys() == golden.keys()
    for name in EXACT:
        assert found.get(name) == golden.get(name), name
    tolerance = 2e-6 * max(1.0, spread)
    rounding = 1e-2 if dtype == "bfloat16" else 1e-4  # of the gradient, which is of the logits' dtype
    np.testing.assert_allclose(found["log_prob"], golden["log_prob"], rtol=1e-5, atol=tolerance)
    for combine in values.COMBINES:
        assert found[combine]["mask"] == golden[combine]["mask"]
        np.testing.assert_allclose(found[combine]["gates"], golden[combine]["gates"], rtol=0, atol=4e-6)
        np.testing.assert_allclose(found[combine]["gradient"], golden[combine]["gradient"], rtol=rounding, atol=1e-5)
    assert found["padded"]["indices"] == golden["padded"]["indices"]
    np.testing.assert_allclose(found["padded"]["weights"], golden["padded"]["weights"], rtol=0, atol=4e-6)
    np.testing.assert_allclose(found["replay"]["gates"], golden["replay"]["gates"], rtol=0, atol=4e-6)
    np.testing.assert_allclose(found["replay"]["log_prob"], golden["replay"]["log_prob"], rtol=1e-5, atol=tolerance)


def test_keys():
    assert values.random_keys() == GOLDEN["random_key"]


def test_checkpoints():
    assert values.state_dicts() == GOLDEN["state_dicts"]


def test_signatures():
    """A parameter more, with a default, is written down by ``python -m tests.golden``; one less breaks somebody."""
    assert values.signatures() == json.loads(values.SIGNATURES.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["exactly", "logic"])
def test_circuits_saved_by_version_0_1(name, tmp_path):
    path = values.HERE / "files" / f"{name}.circuit"
    circuit = cr.load(path)
    assert circuit.constraint == values.constraint_of(values.SAVED[name][0])
    assert circuit.n == values.SAVED[name][1]
    circuit.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("with_log_probs", [True, False])
def test_records_saved_by_version_0_1(with_log_probs):
    masks = values.recorded_masks()
    record = cr.RoutingRecord.load(values.HERE / "files" / f"record-{'with' if with_log_probs else 'without'}.npz")
    assert [layer.form for layer in record.layers] == ["indices", "bits"]
    assert all(torch.equal(mask, again) for mask, again in zip(masks, record.masks(), strict=True))
    assert (record.log_probs is not None) == with_log_probs
    if with_log_probs:
        assert torch.equal(record.log_probs, torch.arange(12).reshape(6, 2) / -4)
