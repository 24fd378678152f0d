"""The example and the benchmarks of survey sampling."""

import importlib.util
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import rows
from benchmarks.registry import UnavailableError
from benchmarks.survey import __main__ as against_r
from benchmarks.survey import counts, picture

ROOT = Path(__file__).parent.parent


def example():
    """The module examples/horvitz_thompson.py."""
    spec = importlib.util.spec_from_file_location("horvitz_thompson", ROOT / "examples" / "horvitz_thompson.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["horvitz_thompson"] = module
    spec.loader.exec_module(module)
    return module


def test_the_example(tmp_path, monkeypatch, capsys):
    """Exact standard errors, by both formulas, are those of simulation to four of its errors."""
    out = tmp_path / "rows.jsonl"
    monkeypatch.setattr("sys.argv", ["x", "--units", "30", "--sample", "6,10", "--samples", "4000", "--out", str(out)])
    example().main()
    found = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len(found) == 6
    for row in found:
        assert abs(row["simulated"] - row["standard_error"]) < 6 * row["simulated_spread"]
        assert abs(row["bias_in_errors"]) < 4
    for row in found[::3]:
        assert math.isclose(row["sen_yates_grundy"], row["standard_error"], rel_tol=1e-9)
        assert row["sizes"] == [row["sample"]] * 2
    assert found[0]["standard_error"] < found[2]["standard_error"]
    assert "maximum entropy" in capsys.readouterr().out
    picture.save(picture.figure(found), tmp_path / "a.svg")
    assert "<svg" in (tmp_path / "a.svg").read_text(encoding="utf-8")


def test_units_that_are_certain():
    module = example()
    pi = module.inclusion_probabilities(torch.tensor([10.0, 6.0, 1.0, 1.0, 2.0], dtype=torch.float64), 3)
    assert pi.tolist() == [1, 1, 0.25, 0.25, 0.5]


def test_the_rows_say_what_the_page_says():
    """The bars: equal to R to 1e-8, and pmf right to 1e-12."""
    newest = {(r["op"], r["n"], r.get("step"), r["provider"]): r for r in rows.read(against_r.FILE)}
    page = (ROOT / "docs" / "survey-sampling.md").read_text(encoding="utf-8")
    for step in ("logits", "marginals", "joint"):
        row = newest["survey", 1000, step, "circuitroute"]
        assert row["difference"] < 1e-8
        assert f"| {row['ratio']:.1f} | {row['difference']:.1e} |" in page
    for n in (10, 100, 1000, 10_000):
        assert newest["poisson-binomial", n, None, "circuitroute"]["error"] < 1e-12


def test_without_r(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(UnavailableError, match="R is not installed"):
        against_r.require_r()
    monkeypatch.setattr(shutil, "which", lambda _: "false")
    with pytest.raises(UnavailableError, match="no package sampling"):
        against_r.require_r()


def test_providers_and_truth_agree(monkeypatch):
    p = counts.coins(40)
    exact = counts.truth(p).astype(float)
    for name in ("circuitroute", "scipy"):
        assert np.allclose(counts.PROVIDERS[name](p), exact, rtol=1e-12)
    measured = counts.measured("circuitroute", 20, 1)
    assert measured["seconds"] > 0
    assert measured["error"] < 1e-12
    monkeypatch.setitem(sys.modules, "fast_poibin", None)
    with pytest.raises(UnavailableError, match="fast-poibin is not installed"):
        counts.fast_poibins(p)
