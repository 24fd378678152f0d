"""The benchmark runner writes whole rows, and its baselines compute what they claim. Nothing here is timed.

Shapes: T tokens, N variables, K largest count.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import circuitroute as cr
from benchmarks import registry, rows
from benchmarks.__main__ import main
from benchmarks.measure import Copies
from benchmarks.registry import Forward, Outputs, Provider, UnavailableError
from benchmarks.runner import run_case
from benchmarks.subset.workload import SubsetCase, true_gradient, true_soft_gradient
from tests.truth import count_gradient, count_truth

TINY = ["--tokens", "16", "--sizes", "8:2", "--repeats", "1"]
FIELDS = {
    "op",
    "provider",
    "engine",
    "T",
    "n",
    "kmin",
    "k",
    "counts",
    "dtype",
    "pass",
    "median_ms",
    "p20_ms",
    "p80_ms",
}
FIELDS |= {"ratio_to_topk", "ratio_to_floor", "floor_ms", "peak_mib", "max_abs_error", "threads", "repeats", "clock"}
FIELDS |= {"note", "device", "cpu", "python", "torch", "circuitroute", "utc"}


@pytest.fixture(autouse=True)
def few_objects() -> Iterator[None]:
    """The runner collects garbage before it measures: a fifth of a second each time among all that tests import."""
    gc.freeze()
    yield
    gc.unfreeze()


def _run(tmp_path: Path, *arguments: str) -> list[rows.Row]:
    out = tmp_path / "rows" / "tiny.jsonl"
    assert main([*TINY, "--out", str(out), *arguments]) == 0
    return rows.read(out)


RESEARCH_CODE = ["sequential_dp", "sequential_dp:tuned", "tree_circuit"]
DISTRIBUTIONS = {"klay": "klaycircuits"}
PACKAGE_OF = {"klay": "klay", "circuitroute:numba": "numba"}


@pytest.mark.parametrize("name", [*RESEARCH_CODE, "klay", *(f"circuitroute:{e}" for e in ("numba", "torch", "naive"))])
def test_rows_are_complete(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    package = PACKAGE_OF.get(name)
    pytest.importorskip(package or "torch")
    found = _run(tmp_path, "--providers", name, "--range", "1:3")
    assert name in capsys.readouterr().out
    # The baseline comes along unasked; two cases, two providers, two passes.
    assert [(row["provider"], row["pass"]) for row in found] == [
        (provider, name_of_pass) for provider in ("topk", name) for name_of_pass in registry.PASSES
    ] * 2
    assert [row["counts"] for row in found] == ["2"] * 4 + ["1..3"] * 4
    for row in found:
        used = {package} if package and row["provider"] == name else set()
        assert set(row) == FIELDS | used
        assert all(row[module] == importlib.metadata.version(DISTRIBUTIONS.get(module, module)) for module in used)
        assert (row["note"] is None) == (row["provider"] != "klay")
        assert row["T"] == 16
        assert 0 <= row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["ratio_to_topk"] > 0
        assert row["ratio_to_floor"] == pytest.approx(row["median_ms"] / row["floor_ms"])
        assert (row["max_abs_error"] is None) == (row["provider"] == "topk")
        assert row["max_abs_error"] is None or row["max_abs_error"] < 5e-6


LAYERED = [
    "circuitroute:numba",
    "circuitroute:numba with sample",
    "circuitroute:torch",
    "circuitroute:torch with sample",
]
LAYERED += ["circuitroute:naive", "klay", "klay:exactly 8"]


@pytest.mark.parametrize("constraint", ["groups", "layers"])
def test_composed_circuits_agree_with_the_truth(tmp_path: Path, constraint: str) -> None:
    """Every provider that computes log Z is held to the naive engine, KLay included."""
    pytest.importorskip("klay")
    arguments = ["--op", "layered", "--circuits", f"{constraint}:64", "--providers", ",".join(LAYERED)]
    found = _run(tmp_path, *arguments)
    assert [row["provider"] for row in found[::2]] == ["topk", *LAYERED]
    for row in found:
        used = {row["engine"]} & {"klay", "numba"}
        sizes = {"constraint", "nodes", "edges", "depth", "compile_s"}
        assert set(row) == FIELDS - {"kmin", "k", "counts"} | sizes | used
        assert row["edges"] > row["nodes"] > 64
        assert row["max_abs_error"] is None or row["max_abs_error"] < 1e-5
    edges = {row["provider"]: row["edges"] for row in found}
    assert edges["klay"] == edges["circuitroute:naive"]
    assert edges["klay:exactly 8"] == cr.compile(cr.Exactly(8), 64).num_edges, "its rows are about its own circuit"


def test_the_naive_engine_runs_only_when_named(tmp_path: Path) -> None:
    found = {row["provider"] for row in _run(tmp_path)}
    assert {"topk", *RESEARCH_CODE, "lapsum", "circuitroute:torch"} <= found
    assert "circuitroute:triton" not in found, "its interpreter is not worth timing"
    assert "circuitroute:naive" not in found


def test_a_relaxation_is_held_to_its_own_truth(tmp_path: Path) -> None:
    found = _run(tmp_path, "--providers", "lapsum")[2:]
    assert [row["provider"] for row in found] == ["lapsum"] * 2
    for row in found:
        assert row["note"] == "a soft relaxation, no sample"
        assert row["max_abs_error"] < 2e-6


def test_the_true_gradient_of_soft_gates_is_a_difference_quotient() -> None:
    """Both sides in float64: the quotient of gates whose threshold autograd knows nothing of."""
    case = SubsetCase(tokens=4, n=6, kmin=2, k=2)
    logits, upstream = case.logits.double(), case.upstream(case.logits).double()

    def loss(logits_TN: torch.Tensor) -> torch.Tensor:
        low, high = torch.full((4, 1), -20.0).double(), torch.full((4, 1), 20.0).double()
        for _ in range(80):
            middle = (low + high) / 2
            above = torch.distributions.Laplace(0.0, 1.0).cdf(logits_TN - middle).sum(1, keepdim=True) > 2
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        soft = torch.distributions.Laplace(0.0, 1.0).cdf(logits_TN - high)
        return (upstream * torch.softmax(logits_TN, -1) * soft).sum()

    for t, i in ((0, 0), (1, 3), (3, 5)):
        step = torch.zeros_like(logits)
        step[t, i] = 1e-5
        quotient = (loss(logits + step) - loss(logits - step)) / 2e-5
        assert true_soft_gradient(case)[t, i] == pytest.approx(quotient.item(), abs=1e-8)


@pytest.mark.parametrize(
    ("sizes", "says"), [(["--range", "1:3"], "relaxes one k, not a range 1..3"), (["--sizes", "4:4"], "needs k < n")]
)
def test_lapsum_says_what_it_cannot_do(
    tmp_path: Path, sizes: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        _run(tmp_path, "--providers", "lapsum", *sizes)
    assert says in capsys.readouterr().err


def test_the_circuit_of_klay_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "klay", None)  # what import does for a module that is not there
    with pytest.raises(UnavailableError, match="pip install klaycircuits"):
        _forward("klay", SubsetCase(tokens=4, n=4, kmin=1, k=1))


def test_the_floor_is_a_copy() -> None:
    """A ring of few buffers where they are large, of many where they are small."""

    class Steps:
        name = "steps"

        def __init__(self) -> None:
            self.now = 0.0

        def mark(self) -> float:
            self.now += 6.4
            return self.now

    assert Copies(torch.zeros(4)).time(Steps()) == pytest.approx(6.4 / 64)
    assert Copies(torch.zeros(4, 2**20)).time(Steps()) == pytest.approx(6.4 / 4)


@pytest.mark.parametrize("name", RESEARCH_CODE)
@pytest.mark.parametrize(("kmin", "k"), [(3, 3), (0, 4), (2, 9), (9, 9)])
def test_research_code_agrees_with_the_truth(name: str, kmin: int, k: int) -> None:
    case = SubsetCase(tokens=40, n=9, kmin=kmin, k=k)
    logits = case.logits.clone().requires_grad_()
    outputs = _forward(name, case)(logits)
    truth = count_truth(case.logits, case.potential())
    marginals = outputs.values["marginals"]
    np.testing.assert_allclose(marginals.detach().numpy(), truth.marginals, atol=2e-6)
    np.testing.assert_allclose(outputs.values["log_partition"].detach().numpy(), truth.log_partition, rtol=1e-5)
    counts = outputs.values["mask"].sum(-1)
    assert kmin <= counts.min()
    assert counts.max() <= k

    u = torch.randn(case.logits.shape, generator=torch.Generator().manual_seed(5))
    (gradient,) = torch.autograd.grad(marginals, logits, u, retain_graph=True)
    expected = count_gradient(case.logits, case.potential(), u).marginals
    np.testing.assert_allclose(gradient.numpy(), expected, atol=5e-6)


@pytest.mark.parametrize("name", RESEARCH_CODE)
def test_research_code_samples_its_marginals(name: str) -> None:
    torch.manual_seed(0)
    tokens, case = 20000, SubsetCase(tokens=20000, n=6, kmin=1, k=4)
    logits = torch.tensor([1.0, -0.5, 0.3, 2.0, -1.5, 0.0]).expand(tokens, 6).clone().requires_grad_()
    values = _forward(name, case)(logits).values
    marginals = values["marginals"][0].detach()
    spread = (marginals * (1 - marginals) / tokens).sqrt()
    assert ((values["mask"].mean(0) - marginals).abs() < 5 * spread).all()
    sizes = torch.bincount(values["mask"].sum(-1).long(), minlength=7)[:7] / tokens
    truth = count_truth(logits[:1], case.potential()).count_probs[0]
    np.testing.assert_allclose(sizes.numpy(), truth, atol=5 * math.sqrt(0.25 / tokens))


def test_the_true_gradient_is_that_of_the_gates() -> None:
    case = SubsetCase(tokens=5, n=7, kmin=2, k=4)
    mask = (case.logits > 0).double()
    logits = case.logits.double().requires_grad_()
    marginals = torch.func.vmap(torch.func.grad(_log_partition(case)))
    gates = torch.softmax(logits, -1) * (mask - marginals(logits).detach() + marginals(logits))
    (expected,) = torch.autograd.grad(gates, logits, case.upstream(gates).double())
    np.testing.assert_allclose(true_gradient(case, mask.numpy()), expected.numpy(), atol=1e-7)


def _log_partition(case: SubsetCase) -> Callable[[torch.Tensor], torch.Tensor]:
    worlds = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * case.n)
    allowed = worlds[(worlds.sum(1) >= case.kmin) & (worlds.sum(1) <= case.k)]
    return lambda logits_N: torch.logsumexp(allowed @ logits_N, 0)


def _forward(name: str, case: SubsetCase) -> Forward:
    (found,) = [provider for provider in registry.providers("subset", [name]) if provider.name == name]
    return found.build(case)


def test_threads_are_given_back() -> None:
    before, case = torch.get_num_threads(), SubsetCase(tokens=4, n=4, kmin=1, k=1)
    found = run_case(registry.get_op("subset"), case, registry.providers("subset", []), repeats=1, threads=2)
    assert torch.get_num_threads() == before
    assert {(row["threads"], row["clock"]) for row in found} == {(2, "wall")}


def _stub(build: Callable[[SubsetCase], Forward]) -> list[Provider]:
    return [*registry.providers("subset", []), Provider("subset", "stub", "none", build, by_default=True)]


def test_an_unavailable_provider_is_reported_or_refused() -> None:
    def build(case: SubsetCase) -> Forward:
        raise UnavailableError("no such hardware")

    op, case, said = registry.get_op("subset"), SubsetCase(tokens=4, n=4, kmin=1, k=1), []
    found = run_case(op, case, _stub(build), repeats=1, report=said.append)
    assert {row["provider"] for row in found} == {"topk"}
    assert said == ["skipped stub: no such hardware"]
    with pytest.raises(UnavailableError, match="no such hardware"):
        run_case(op, case, _stub(build), repeats=1, skip_unavailable=False)


@pytest.mark.parametrize(("fill", "message"), [(math.nan, "error against the truth is nan"), (0.0, "size outside")])
def test_a_provider_that_returns_nonsense_gets_no_row(fill: float, message: str) -> None:
    def build(case: SubsetCase) -> Forward:
        def forward(logits: torch.Tensor) -> Outputs:
            mask = torch.eye(4) if math.isnan(fill) else torch.zeros(4, 4)
            values = {"marginals": logits * fill, "log_partition": logits[:, 0], "mask": mask}
            return Outputs(logits * 1, values)

        return forward

    case = SubsetCase(tokens=4, n=4, kmin=1, k=1)
    with pytest.raises(ValueError, match=message):
        run_case(registry.get_op("subset"), case, _stub(build), repeats=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--providers", "nonesuch"], "no provider nonesuch"),
        (["--sizes", "8"], "expected two numbers"),
        (["--sizes", "8:9"], "kmin <= k <= n"),
        (["--range", "3:2"], "kmin <= k <= n"),
        (["--op", "layered", "--circuits", "groups"], "expected a name and a number"),
        (["--op", "layered", "--circuits", "rings:64"], "no constraint 'rings'"),
        (["--op", "layered", "--circuits", "groups:60"], "multiple of 64"),
        (["--repeats", "0"], "'0' is not a whole number of at least 1"),
    ],
)
def test_bad_arguments_are_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*TINY, *arguments])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_registering_twice_is_an_error() -> None:
    with pytest.raises(ValueError, match="has a provider named 'topk' already"):
        registry.provider("subset", "topk")(lambda case: Outputs)
    with pytest.raises(ValueError, match="an op named 'subset' already"):
        registry.op(type(registry.get_op("subset")))


def test_the_table_needs_no_rich(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    row = {"provider": "p", "pass": "forward", "median_ms": 1.234, "p20_ms": 1.0, "p80_ms": 2.0}
    row |= {"ratio_to_topk": 3.0, "peak_mib": None, "max_abs_error": 1e-7, "note": "half of it"}
    rows.show("a title", [row])
    title, headings, line, note = capsys.readouterr().out.splitlines()
    assert title == "a title"
    assert headings.split()[:2] == ["provider", "pass"]
    assert line.split() == ["p", "forward", "1.23", "1.00", "-", "2.00", "3.0", "-", "-", "1.0e-07"]
    assert note == "p: half of it"


def test_rows_are_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    rows.append(path, [{"a": 1}, {"a": None}])
    rows.append(path, [{"a": 2.5}])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"a": 1}, {"a": None}, {"a": 2.5}]


def test_fewer_tokens_of_a_large_case_are_held_against_the_truth() -> None:
    assert SubsetCase(4096, 64, 8, 8).checked == 128
    assert SubsetCase(16, 64, 8, 8).checked == 16
    assert SubsetCase(16, 4096, 512, 512).checked == 7
    assert SubsetCase(16, 65_536, 2048, 2048).checked == 1
