"""PyJuice: the circuit it is given, by reading the declaration in plain torch; the engine around its kernels.

PyJuice's kernels run on CUDA GPUs only. Without one, the declared nodes are interpreted instead, and the kernels
themselves are run by Triton's interpreter, in a process of its own; the last test runs them where there is a GPU.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import circuitroute as cr
from circuitroute.circuit import Graph, NodeKind
from circuitroute.engines import ENGINES
from circuitroute.engines.layered import NaiveLayered, PyjuiceLayered, TorchLayered
from circuitroute.engines.layered import pyjuice as engine_module
from circuitroute.inference.circuit import Circuit
from circuitroute.interop.pyjuice_circuit import LOG_ZERO, soft_evidence
from tests.test_views import CASES, IDS, factors_the_root

ROOT = Path(__file__).parents[1]
NODE_LIMITED = cr.ActiveGroups(cr.Groups(4), at_most=2) & cr.Exactly(3)
ALL = [*CASES, (NODE_LIMITED, 16)]
LAYERED = [case for case in ALL if cr.compile(*case).op == "layered"]
installed = pytest.mark.skipif(importlib.util.find_spec("pyjuice") is None, reason="PyJuice is not installed")
cases = pytest.mark.parametrize(("constraint", "n"), ALL, ids=[*IDS, "node limited"])
layered = pytest.mark.parametrize(("constraint", "n"), LAYERED, ids=[repr(constraint) for constraint, _ in LAYERED])


@pytest.fixture(scope="module", autouse=True)
def quiet_import() -> None:
    """PyJuice compiles parts of itself when it is imported, and torch warns of what it uses for that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if importlib.util.find_spec("pyjuice") is not None:
            importlib.import_module("pyjuice")


def test_what_installs_the_tests_installs_it() -> None:
    """So that none of what is below is skipped where ``make test`` runs, but what needs a GPU."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    wanted = project.split("\ntest = [", 1)[1].split("\n]", 1)[0]
    assert "circuitroute[pyjuice]; sys_platform == 'linux'" in wanted


# ---------------------------------------------------------------------------------------------- the declaration


def given_inputs(nodes: Any, inputs_T2: Tensor) -> Tensor:
    """[T, 2] of the distribution External: what is given per sample."""
    return inputs_T2


def coins(nodes: Any, inputs_T2: Tensor) -> Tensor:
    """[T, S] of the distribution Bernoulli, whose parameters are the probabilities of 1."""
    present = nodes.get_params().double()
    return (inputs_T2.exp()[:, :1] * (1 - present) + inputs_T2.exp()[:, 1:] * present).log()


def interpret(root: Any, inputs_TN2: Tensor, leaf: Callable[[Any, Tensor], Tensor] = given_inputs) -> Tensor:
    """[T] the log-value of declared PyJuice nodes, as its documentation defines them; float64."""
    values: dict[Any, Tensor] = {}
    for nodes in root:  # children first
        if nodes.is_input():
            values[nodes] = leaf(nodes, inputs_TN2[:, nodes.scope.to_list()[0]].double())
        elif nodes.is_prod():
            values[nodes] = torch.stack(
                [values[child][:, nodes.edge_ids[:, j]] for j, child in enumerate(nodes.chs)]
            ).sum(0)
        else:
            below = torch.cat([values[child] for child in nodes.chs], 1)[:, nodes.edge_ids[1]]
            terms, owner = below + nodes.get_params().flatten().log(), nodes.edge_ids[0]
            values[nodes] = torch.stack([terms[:, owner == i].logsumexp(1) for i in range(nodes.num_nodes)], 1)
    return values[root][:, 0]


def weight_sums(root: Any) -> Tensor:
    """The weights of every sum, added up."""
    found = []
    for nodes in root:
        if nodes.is_sum():
            weights = nodes.get_params().flatten()
            found.append(weights.new_zeros(nodes.num_nodes).index_add(0, nodes.edge_ids[0], weights))
    return torch.cat(found)


@installed
@cases
def test_the_declared_circuit_has_our_partition_function(constraint: cr.Constraint, n: int) -> None:
    circuit = cr.compile(constraint, n)
    logits = 3 * torch.randn(5, n, generator=torch.Generator().manual_seed(0))
    root = circuit.to_pyjuice()
    log_partition = interpret(root, soft_evidence(logits)) + math.log(circuit.model_count())
    torch.testing.assert_close(log_partition, circuit(logits.double()).log_partition, rtol=1e-6, atol=1e-6)


@installed
@cases
def test_the_declared_weights_are_normalised(constraint: cr.Constraint, n: int) -> None:
    """As PyJuice makes them on compiling, which must change nothing."""
    root = cr.compile(constraint, n).to_pyjuice()
    torch.testing.assert_close(weight_sums(root), torch.ones_like(weight_sums(root)))


@installed
def test_nodes_of_one_scope_become_one_vector() -> None:
    circuit = cr.compile(cr.Exactly(4), 8)
    nodes = list(circuit.to_pyjuice())
    assert sum(ns.is_input() for ns in nodes) == 8
    assert sum(ns.is_sum() for ns in nodes) == 7  # the inner nodes of a tree over 8 variables
    assert sum(ns.num_nodes for ns in nodes if ns.is_sum()) == circuit.num_nodes - 16
    assert sum(ns.num_nodes for ns in nodes if ns.is_prod()) == circuit.num_edges


@installed
def test_sums_of_one_scope_above_each_other() -> None:
    """A root that passes a sum over the same variables on, and factors that are constant."""
    kinds = [NodeKind.TRUE, NodeKind.ABSENT, NodeKind.PRESENT, NodeKind.SUM, NodeKind.SUM, NodeKind.SUM]
    graph = Graph(
        n=1,
        kind=np.array(kinds, dtype=np.uint8),
        variable=np.array([-1, 0, 0, -1, -1, -1], dtype=np.int32),
        first=np.array([0, 0, 0, 0, 2, 3, 4]),
        left=np.array([1, 2, 3, 4], dtype=np.int32),
        right=np.array([0, 0, 0, 0], dtype=np.int32),
    )
    for circuit in (Circuit(graph, cr.AtMost(1)), factors_the_root()):
        value = interpret(circuit.to_pyjuice(), soft_evidence(torch.tensor([[0.7]])))
        expected = circuit(torch.tensor([[0.7]], dtype=torch.float64)).log_partition
        torch.testing.assert_close(value + math.log(circuit.model_count()), expected)


def test_soft_evidence() -> None:
    logits = torch.tensor([[0.5, math.inf, -math.inf]])
    expected = torch.tensor([[[0.0, 0.5], [LOG_ZERO, 0.0], [0.0, LOG_ZERO]]])
    torch.testing.assert_close(soft_evidence(logits), expected)
    assert soft_evidence(logits.double()).dtype == torch.float32


def learned(n: int, states: int, layers: str = "cp") -> tuple[cr.SubsetPrior, Tensor]:
    """A prior after a step of training, and the masks it was trained on."""
    prior = cr.SubsetPrior(n, states, layers=layers, seed=n)
    masks = torch.rand(16, n, generator=torch.Generator().manual_seed(0)) < 0.4
    prior.em_step(masks, smoothing=0.5)
    return prior, masks


PRIORS = pytest.mark.parametrize(
    ("n", "states", "layers"), [(5, 3, "cp"), (4, 2, "tucker"), (3, 1, "cp"), (1, 3, "cp")]
)


@installed
@PRIORS
def test_a_learned_prior_is_declared_with_its_weights(n: int, states: int, layers: str) -> None:
    """Values of whole masks and of partial ones, and the weights themselves, node by node."""
    prior, masks = learned(n, states, layers)
    root = prior.to_pyjuice()
    seen = torch.stack([(~masks).log(), masks.log()], -1)
    torch.testing.assert_close(interpret(root, seen, coins).float(), prior.log_prob(masks), rtol=1e-5, atol=1e-5)
    partial = seen.clone()
    partial[:, 0] = 0.0  # the first variable is not observed
    chosen, rest = masks.clone(), ~masks
    chosen[:, 0], rest[:, 0] = False, False
    expected = prior.log_evidence(include=chosen, exclude=rest)
    torch.testing.assert_close(interpret(root, partial, coins).float(), expected, rtol=1e-5, atol=1e-5)
    weights = prior.log_weights()
    sums = [nodes.get_params() for nodes in root if nodes.is_sum()]
    mixtures = [*weights.mixtures, weights.root[None]]
    assert len(sums) == len(mixtures) == max(1, n - 1)
    for mixture in mixtures:  # vectors come in an order of PyJuice's own
        expected = mixture.exp().flatten().float()
        alike = [one.flatten() for one in sums if one.numel() == expected.numel()]
        assert any(torch.allclose(one, expected, atol=1e-6) for one in alike)
    torch.testing.assert_close(weight_sums(root), torch.ones_like(weight_sums(root)))


@installed
def test_weights_too_small_for_float32_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Exactly\(128\) over 256 variables: an element has .*float32 weights end at"):
        cr.compile(cr.Exactly(128), 256).to_pyjuice()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyjuice", None)
    with pytest.raises(ImportError, match=r"circuit.to_pyjuice needs .*pip install 'circuitroute\[pyjuice\]'"):
        cr.compile(cr.Exactly(2), 5).to_pyjuice()
    with pytest.raises(ImportError, match=r"prior.to_pyjuice needs .*pip install 'circuitroute\[pyjuice\]'"):
        cr.SubsetPrior(2, 2).to_pyjuice()


# ---------------------------------------------------------------------------------------------- the engine


class Interpreted(PyjuiceLayered):
    """The engine with an interpreter in place of PyJuice's kernels: forward, and backward by autograd."""

    def __init__(self, circuit: Circuit) -> None:
        super().__init__(circuit.graph, circuit.max_count, repr(circuit.constraint))
        self._root = circuit.to_pyjuice()

    def _sweep(self, coins_TN2: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            inputs = coins_TN2.double().requires_grad_()
            value = interpret(self._root, inputs)
            (flows,) = torch.autograd.grad(value.sum(), inputs)
        return value.detach().float(), flows.float()


def logits_of(n: int, tokens: int = 6) -> Tensor:
    return 2 * torch.randn(tokens, n, generator=torch.Generator().manual_seed(1))


@installed
@layered
def test_the_engine_around_the_kernels(constraint: cr.Constraint, n: int) -> None:
    circuit = cr.compile(constraint, n)
    logits = logits_of(n)
    found, expected = Interpreted(circuit).infer(logits, None), NaiveLayered(circuit.graph).infer(logits, None)
    assert found.marginals.dtype == found.log_partition.dtype == torch.float32
    assert found.log_root.dtype == torch.float64
    for name in ("log_partition", "marginals", "log_root", "shift"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-5)


@installed
def test_evidence_and_rows_that_nothing_satisfies() -> None:
    circuit = cr.compile(NODE_LIMITED, 16)
    logits = logits_of(16)
    logits[0, 3] = math.inf
    logits[1, ::2] = -math.inf
    logits[2, :] = -math.inf
    logits[3, [0, 4, 8]] = math.inf  # three groups
    found, expected = Interpreted(circuit).infer(logits, None), NaiveLayered(circuit.graph).infer(logits, None)
    for name in ("log_partition", "marginals", "log_root"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-5, equal_nan=True)
    assert found.log_partition.isnan().tolist() == [False, False, True, True, False, False]


@installed
def test_gradients_around_the_kernels() -> None:
    circuit = cr.compile(NODE_LIMITED, 16)
    engine, naive = Interpreted(circuit), NaiveLayered(circuit.graph)
    w, u = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(2)).unbind()

    def gradients(each: Any) -> list[Tensor]:
        logits = logits_of(16).requires_grad_()
        result = each.attach(each.infer(logits.detach(), None), logits, None)
        (by_value,) = torch.autograd.grad(result.log_partition, logits, w[:, 0], create_graph=True)
        (by_marginals,) = torch.autograd.grad(result.marginals, logits, u, retain_graph=True)
        (second,) = torch.autograd.grad(by_value, logits, u)
        return [by_value, by_marginals, second]

    for found, expected in zip(gradients(engine), gradients(naive), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@installed
def test_what_is_left_to_the_engine_torch() -> None:
    circuit = cr.compile(NODE_LIMITED, 16)
    engine, other = Interpreted(circuit), TorchLayered(circuit.graph, circuit.max_count)
    logits, keys = logits_of(16), torch.arange(6)
    double = logits.double().requires_grad_()
    exact = engine.attach(engine.infer(double.detach(), None), double, None)
    torch.testing.assert_close(exact.marginals, other.infer(double.detach(), None).marginals, rtol=0, atol=0)
    assert exact.marginals.requires_grad
    assert torch.equal(engine.sample(logits, None, keys), other.sample(logits, None, keys))
    drawn = engine.infer(logits, None, keys).mask
    assert drawn is not None
    assert torch.equal(drawn, other.sample(logits, None, keys))
    assert torch.equal(engine.mode(logits), other.mode(logits))
    counted, expected = (each.counting().infer(logits, None).count_probs for each in (engine, other))
    assert counted is not None
    assert torch.equal(counted, expected)


@installed
def test_large_batches_go_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    circuit = cr.compile(NODE_LIMITED, 16)
    whole = Interpreted(circuit).infer(logits_of(16), None)
    monkeypatch.setattr(engine_module, "MAX_VALUES", 4 * (circuit.num_nodes + circuit.num_edges))
    assert torch.equal(Interpreted(circuit).infer(logits_of(16), None).marginals, whole.marginals)


def test_the_engine_is_never_chosen_by_itself() -> None:
    assert "pyjuice" in ENGINES["layered"][1:]
    assert "pyjuice" not in ENGINES["subset"]


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "find_spec", lambda name: None)
    with pytest.raises(cr.EngineError, match=r"cannot run here: the package pyjuice is not installed: pip install"):
        cr.compile(NODE_LIMITED, 16).with_engine("pyjuice")


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(cr.EngineError, match=r"torch sees no CUDA GPU, .* use engine 'torch' here"):
        cr.compile(NODE_LIMITED, 16).with_engine("pyjuice")


def test_where_it_can_run_logits_must_be_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    circuit = cr.compile(NODE_LIMITED, 16).with_engine("pyjuice")
    assert circuit.engine_for("cuda") == "pyjuice"
    with pytest.raises(cr.EngineError, match="was given logits on cpu: PyJuice runs on CUDA GPUs only"):
        circuit(torch.zeros(2, 16)).log_partition  # noqa: B018 - a property that computes


def test_count_constraints_have_other_engines() -> None:
    with pytest.raises(cr.EngineError, match="'pyjuice' does not run circuits of op 'subset'"):
        cr.compile(cr.Exactly(2), 5).with_engine("pyjuice")


# PyJuice compiles and runs as on a GPU, except that tensors stay where they are, Triton's interpreter runs its kernels
# (TRITON_INTERPRET=1), and the one function of CUDA's library that they call is written out.
KERNELS = """
import contextlib, json, math, types, warnings
warnings.simplefilter("ignore")
import torch
import triton.language as tl
torch.cuda.current_device = lambda: 0
torch.cuda.device = lambda device: contextlib.nullcontext()
torch.Tensor.cuda = lambda self: self
import pyjuice
from pyjuice.layer.kernels import prod
prod.tlmath = types.SimpleNamespace(log1p=lambda x: tl.log(x + 1.0))
import circuitroute as cr
from circuitroute.engines.layered import NaiveLayered, PyjuiceLayered

class Kernels(PyjuiceLayered):
    def __init__(self, circuit):
        super().__init__(circuit.graph, circuit.max_count, repr(circuit.constraint))
        self._root = circuit.to_pyjuice()

    def _program(self, device):
        if not self._compiled:
            program = pyjuice.compile(self._root, disable_gpu_compilation=True, verbose=False)
            for layer in program.input_layer_group:
                layer.device = types.SimpleNamespace(type="cuda", index=0)
            self._compiled[device] = program
        return self._compiled[device]

# A learned prior: values, and a step of PyJuice's own expectation maximisation from its own flows.
from pyjuice.layer import input_layer

class OnTheHost:  # torch for a module that believes it is on a GPU: what it makes is made here
    def __getattr__(self, name):
        return getattr(torch, name)
    def zeros(self, *args, device=None, **options):
        return torch.zeros(*args, **options)
    def tensor(self, *args, device=None, **options):
        return torch.tensor(*args, **options)

def steps(n, states, layers):
    prior = cr.SubsetPrior(n, states, layers=layers, seed=3)
    masks = torch.rand(8, n, generator=torch.Generator().manual_seed(0)) < 0.4
    program = pyjuice.compile(prior.to_pyjuice(), disable_gpu_compilation=True, verbose=False)
    for layer in program.input_layer_group:
        layer.device = types.SimpleNamespace(type="cuda", index=0)
    means = []
    for _ in range(2):
        torch.testing.assert_close(program(masks)[:, 0], prior.log_prob(masks), rtol=1e-5, atol=1e-5)
        program.backward(masks, flows_memory=0.0, compute_param_flows=True)
        program.mini_batch_em(step_size=0.5, pseudocount=0.0)
        means.append(prior.em_step(masks, step_size=0.5).item())
    torch.testing.assert_close(program(masks)[:, 0], prior.log_prob(masks), rtol=1e-5, atol=1e-5)
    return [*means, prior.log_prob(masks).mean().item()]

host, input_layer.torch = input_layer.torch, OnTheHost()
learned = [steps(*options) for options in [(4, 4, "cp"), (3, 2, "tucker"), (3, 1, "cp")]]
input_layer.torch = host

report = {"learned": learned}
for constraint, n in [
    (cr.AtMost(1).over([0, 2]), 4),
    (cr.Cost([3, 1, 2, 2], at_most=4), 4),
    (cr.ActiveGroups(cr.Groups(4), at_most=2) & cr.Exactly(3), 16),
]:
    circuit = cr.compile(constraint, n)
    logits = 2 * torch.randn(4, n, generator=torch.Generator().manual_seed(0))
    logits[0, 1], logits[1, 0], logits[2] = math.inf, -math.inf, -math.inf
    found, expected = Kernels(circuit).infer(logits, None), NaiveLayered(circuit.graph).infer(logits, None)
    for name in ("log_partition", "marginals", "log_root"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-5, equal_nan=True)
    report[repr(constraint)] = found.log_partition.isnan().tolist()
print(json.dumps(report))
"""


@installed
def test_the_kernels_under_tritons_interpreter() -> None:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "compilers")])
    environment = {**os.environ, "PYTHONPATH": paths, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", KERNELS], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    for means in report.pop("learned"):
        assert means[0] < means[1] < means[2]  # the steps, which both take alike, are steps that learn
    assert list(report.values()) == [[False] * 4, [False] * 4, [False, False, True, False]]


@installed
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyJuice runs on CUDA GPUs only")
@pytest.mark.filterwarnings("ignore")  # of PyJuice and what it compiles with
@layered
def test_on_a_gpu(constraint: cr.Constraint, n: int) -> None:
    circuit = cr.compile(constraint, n)
    results = []
    for name, dtype in (("pyjuice", torch.float32), ("naive", torch.float64)):
        logits = logits_of(n, tokens=64).to("cuda", dtype).requires_grad_()
        dist = circuit.with_engine(name)(logits)
        (by_value,) = torch.autograd.grad(dist.log_partition.sum(), logits)
        (by_marginals,) = torch.autograd.grad(dist.marginals.square().sum(), logits)
        results.append([dist.log_partition, dist.marginals, by_value, by_marginals])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
