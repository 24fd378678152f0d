"""What is called: public callables as functions of one tensor, all else fixed.

Legend: T tokens, E experts, H hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

import circuitroute as cr
from circuitroute.integrations import serving

Role: TypeAlias = Literal["real", "mask", "bool mask", "key", "index"]
T, E, H = 4, 5, 3
M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Entry:
    """A public callable as a function of one of its arguments.

    Attributes:
        name: "callable(argument)" or "callable(argument).output".
        argument: what errors must call it.
        role: what kind of tensor it is.
        make: the argument, plain; float32 where it is real.
        function: the result, a tensor, of the argument as it is given and of one that tells where and of what shape
            all else is: the same, or a plain one where what is given cannot be asked.
        smooth: whether the result has a gradient in the argument.
        width: the size that the last dimension must have; None where any will do.
        rows: whether the first dimension is one of tokens, of which there may be none.
        python: whether numbers are read out of the tensor, which a trace cannot do.
        checked: whether NaN is refused.
        alone: whether the result is made of the argument and of nothing else that has its rows.
        single: whether the result is float32 whatever is given.
    """

    name: str
    argument: str
    role: Role
    make: Callable[[], Tensor]
    function: Callable[[Any, Tensor], Tensor]
    smooth: bool = True
    width: int | None = E
    rows: bool = True
    python: bool = False
    checked: bool = True
    single: bool = False
    alone: bool = False

    def call(self, x: Tensor) -> Tensor:
        """The result."""
        return self.function(x, x)

    def given(self, x: Any) -> Tensor:
        """The result of something that may be no tensor at all."""
        return self.function(x, self.make())


@cache
def _drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    # Kept, since nothing is drawn in a transformed function.
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def randn(*shape: int, seed: int = 0) -> Tensor:
    return _drawn(tuple(int(size) for size in shape), seed).clone()  # in a trace sizes are no integers


def flat() -> cr.Circuit:
    return cr.compile(cr.Between(1, 3), E)


def composed() -> cr.Circuit:
    return cr.compile(cr.Exactly(1).over([0, 2, 3]) & cr.AtMost(3), E)


def on(b: Tensor, other: Tensor) -> Tensor:
    """Beside b: on its device, and real numbers in its precision."""
    return other.to(b.device, torch.float64 if b.dtype == torch.float64 and other.is_floating_point() else other.dtype)


def key(b: Tensor) -> Tensor:
    return cr.random_key(7, torch.arange(_tokens(b))).to(b.device)


def _tokens(b: Tensor) -> int:
    return T if b.dim() == 0 or b.shape == (E,) else int(b.shape[0])


def mask(b: Tensor) -> Tensor:
    """[T, E] subsets that both circuits allow."""
    chosen = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 1], [0, 0, 1, 0, 0]], dtype=torch.bool)
    tokens = _tokens(b)
    return chosen.repeat(-(-tokens // T) if tokens else 1, 1)[:tokens].to(b.device)


def _experts() -> list[nn.Module]:
    return [nn.Linear(H, H) for _ in range(E)]


_MODULES: dict[str, Callable[[], nn.Module]] = {
    "Router": lambda: cr.Router(H, E, cr.Exactly(1).over([0, 2, 3]) & cr.AtMost(3)),
    "ExactKRouter": lambda: cr.ExactKRouter(H, E, 2),
    "DynamicKRouter": lambda: cr.DynamicKRouter(H, E, 1, 3, combine="normalized", bias=True),
    "TopKRouter": lambda: cr.TopKRouter(H, E, 2),
    "SoftTopKRouter": lambda: cr.SoftTopKRouter(H, E, 2.0),
    "MoE": lambda: cr.MoE(cr.DynamicKRouter(H, E, 1, 3), _experts()),
    "MoE, probes": lambda: cr.MoE(cr.DynamicKRouter(H, E, 1, 3), _experts(), probes=1),
    "MoE, stacked": lambda: cr.MoE(cr.ExactKRouter(H, E, 2), cr.StackedExperts(E, H, 4)),
    "MoE, null experts": lambda: cr.MoE(cr.ExactKRouter(H, E + 2, 3), _experts(), probes=1, null_experts="identity"),
    "BudgetRouter": lambda: cr.BudgetRouter(H, E, 2, cr.Between(1, 3), cr.AtMost(4), per_token=True),
    "ConstraintLayer": lambda: cr.nn.ConstraintLayer(flat(), in_features=H),
    "ConstraintLayer, mixture": lambda: cr.nn.ConstraintLayer(composed(), in_features=H, components=2),
    "SubsetPrior": lambda: cr.SubsetPrior(E, 2),
}


@cache
def _placed(name: str, device: str, double: bool) -> nn.Module:
    torch.manual_seed(0)
    found = _MODULES[name]().to(device)
    return found.double() if double else found


def module(name: str, b: Tensor) -> Any:
    """A module where b is, in double precision if b is."""
    return _placed(name, b.device.type, b.dtype == torch.float64)


@contextmanager
def frozen() -> Iterator[None]:
    """Modules whose parameters do not learn, as torch.jit.trace wants those of a function."""
    found = [
        parameter
        for name in _MODULES
        for parameter in _placed(name, "cpu", False).parameters()
        if parameter.requires_grad
    ]
    for parameter in found:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in found:
            parameter.requires_grad_()


def _budget(x: Any, b: Tensor) -> cr.Routing:
    router = module("BudgetRouter", b)
    state = router.begin(x)
    _, state = router(x, state, key=key(b))
    routing: cr.Routing = router(x, state, key=key(b))[0]
    return routing


def logits() -> Tensor:
    return randn(T, E)


def hidden() -> Tensor:
    return randn(T, H)


def _of_routing(x: Any, b: Tensor, circuit: Callable[[], cr.Circuit] = flat, **options: Any) -> cr.Routing:
    return cr.route(x, circuit(), key=key(b), **options)


def _distributions() -> list[Entry]:
    found = []
    outputs: dict[str, tuple[Callable[[cr.SubsetDistribution, Tensor], Tensor], bool]] = {
        "log_partition": (lambda d, b: d.log_partition, True),
        "marginals": (lambda d, b: d.marginals, True),
        "variance": (lambda d, b: d.variance, True),
        "count_probs": (lambda d, b: d.count_probs, True),
        "entropy": (lambda d, b: d.entropy(), True),
        "log_prob": (lambda d, b: d.log_prob(mask(b)), True),
        "rsample": (lambda d, b: d.rsample(key=key(b)), True),
        "sample": (lambda d, b: d.sample((2,), key=key(b)), False),
        "mode": (lambda d, b: d.mode, False),
        "covariance_matrix": (lambda d, b: d.covariance_matrix, False),
        "expand": (lambda d, b: d.expand((2, *d.batch_shape)).marginals, True),
        "tempered": (lambda d, b: d.tempered(0.5).marginals, True),
        "condition": (lambda d, b: d.condition(include=[0]).marginals, True),
        "log_evidence": (lambda d, b: d.log_evidence(exclude=[1]), True),
        "semantic_loss": (lambda d, b: cr.losses.semantic_loss(d), True),
    }
    for kind, circuit in (("flat", flat), ("composed", composed)):
        for name, (output, smooth) in outputs.items():
            found.append(
                Entry(
                    f"{kind} circuit(logits).{name}", "logits", "real", logits,
                    lambda x, b, output=output, circuit=circuit: output(circuit()(x), b), smooth,
                    alone=name not in ("log_prob", "rsample", "sample"),
                )
            )  # fmt: skip
        found.append(
            Entry(
                f"{kind} circuit.satisfies(mask)", "mask", "mask", lambda: mask(logits()),
                lambda x, b, circuit=circuit: circuit().satisfies(x), False,
            )
        )  # fmt: skip
        found.append(
            Entry(
                f"{kind} log_prob(value)", "value", "mask", lambda: mask(logits()),
                lambda x, b, circuit=circuit: circuit()(logits().to(b.device)[: len(b)]).log_prob(x), False,
            )
        )  # fmt: skip
    potential = Entry(
        "circuit(count_potential).marginals", "count_potential", "real", lambda: randn(T, 4, seed=1),
        lambda x, b: flat()(on(b, randn(*b.shape[:-1], E)), x).marginals, width=4,
    )  # fmt: skip
    q = Entry(
        "kl_divergence(p, q)", "logits", "real", logits,
        lambda x, b: torch.distributions.kl_divergence(flat()(x), flat()(b.flip(0))),
    )  # fmt: skip
    return [*found, potential, q]


def _arguments_of_distributions() -> list[Entry]:
    return [
        Entry("condition(include)", "include", "mask", lambda: torch.eye(T, E),
              lambda x, b: flat()(logits().to(b.device)[: len(b)]).condition(include=x).marginals, False),
        Entry("log_evidence(include)", "include", "mask", lambda: torch.eye(T, E),
              lambda x, b: flat()(logits().to(b.device)[: len(b)]).log_evidence(include=x), False),
        Entry("nn.log_likelihood(labels)", "labels", "mask", lambda: mask(logits()),
              lambda x, b: cr.nn.log_likelihood(composed()(logits().to(b.device)[: len(b)]), x), False),
        Entry("nn.log_likelihood(known)", "known", "mask", lambda: torch.eye(T, E),
              lambda x, b: cr.nn.log_likelihood(composed()(logits().to(b.device)[: len(b)]), mask(b), x), False),
        Entry("sample(key)", "key", "key", lambda: torch.arange(T),
              lambda x, b: flat()(logits().to(b.device)[: len(b)]).sample(key=x), False, width=None),
        Entry("tempered(temperature)", "temperature", "real", lambda: randn(T).abs() + 0.5,
              lambda x, b: flat()(on(b, randn(len(b), E))).tempered(x).marginals, width=None),
    ]  # fmt: skip


def _routes() -> list[Entry]:
    found = []
    for kind, circuit in (("flat", flat), ("composed", composed)):
        for combine in ("softmax", "normalized", "sigmoid", "marginal"):
            found += [
                Entry(f"route(logits, {kind}, {combine}).gates", "logits", "real", logits,
                      lambda x, b, c=circuit, how=combine: _of_routing(x, b, c, combine=how).gates)
            ]  # fmt: skip
        found += [
            Entry(f"route(logits, {kind}, dense).gates", "logits", "real", logits,
                  lambda x, b, c=circuit: _of_routing(x, b, c, estimator="dense").gates),
            Entry(f"route(logits, {kind}).log_prob", "logits", "real", logits,
                  lambda x, b, c=circuit: _of_routing(x, b, c).log_prob),
            Entry(f"route(logits, {kind}).marginals", "logits", "real", logits,
                  lambda x, b, c=circuit: _of_routing(x, b, c, temperature=0.5).marginals),
            Entry(f"route(logits, {kind}).padded", "logits", "real", logits,
                  lambda x, b, c=circuit: _of_routing(x, b, c, decide="mode").padded()[0]),
            Entry(f"route(logits, {kind}, evaluation).gates", "logits", "real", logits,
                  lambda x, b, c=circuit: cr.route(x, c(), training=False).gates, alone=True),
            Entry(f"route(logits, {kind}, replay).gates", "logits", "real", logits,
                  lambda x, b, c=circuit: cr.route(x, c(), replay=mask(b)).gates),
        ]  # fmt: skip
    found += [
        Entry("route_batch(logits, sampled).gates", "logits", "real", logits,
              lambda x, b: cr.route_batch(x, flat(), max_distinct=3, key=key(b)).gates, python=True),
        Entry("route_batch(experts).gates", "experts", "index", lambda: torch.tensor([0, 2, 4]),
              lambda x, b: cr.route_batch(logits().to(b.device), flat(), max_distinct=3, experts=x, key=1).gates,
              False, width=None, rows=False, python=True, checked=False),
        Entry("route_sequence(logits).gates", "logits", "real", logits,
              lambda x, b: cr.route_sequence(x, flat(), total=15, key=key(b)).gates, python=True),
        Entry("route_sequence(estimate).log_prob", "estimate", "real", lambda: randn(4, seed=1),
              lambda x, b: cr.route_sequence(logits().to(b.device), flat(), total=6, key=1, estimate=x).log_prob,
              False, width=4, rows=False, python=True),
        Entry("route(temperature).marginals", "temperature", "real", lambda: randn(T).abs() + 0.5,
              lambda x, b: _of_routing(on(b, randn(len(b), E)), b, temperature=x).marginals, width=None),
        Entry("route(price).marginals", "price", "real", lambda: randn(T, seed=2),
              lambda x, b: _of_routing(on(b, randn(len(b), E)), b, price=x).marginals, width=None),
        Entry("route(bias).marginals", "bias", "real", lambda: randn(E, seed=2),
              lambda x, b: _of_routing(on(b, randn(T, E)), b, bias=x).marginals, rows=False, checked=False),
        Entry("route(count_potential).log_prob", "count_potential", "real", lambda: randn(T, 4, seed=1),
              lambda x, b: _of_routing(on(b, randn(*b.shape[:-1], E)), b, count_potential=x).log_prob, width=4),
        Entry("route(key).mask", "key", "key", lambda: torch.arange(T),
              lambda x, b: cr.route(randn(len(b), E).to(b.device), flat(), key=x).mask, False, width=None),
        Entry("route(replay).gates", "replay", "mask", lambda: mask(logits()),
              lambda x, b: cr.route(randn(len(b), E).to(b.device), flat(), replay=x).gates, False),
    ]  # fmt: skip
    return found


def _layers() -> list[Entry]:
    found = [
        Entry(f"{name}(hidden).gates", "hidden", "real", hidden,
              lambda x, b, name=name: module(name, b)(x, key=key(b)).gates, width=H)
        for name in ("Router", "ExactKRouter", "DynamicKRouter", "TopKRouter", "SoftTopKRouter")
    ]  # fmt: skip
    found += [
        Entry(f"{name}(hidden)", "hidden", "real", hidden, lambda x, b, name=name: module(name, b)(x, key=key(b))[0],
              width=H, python=True)
        for name in ("MoE", "MoE, probes", "MoE, stacked", "MoE, null experts")
    ]  # fmt: skip
    return [
        *found,
        Entry("BudgetRouter(hidden).gates", "hidden", "real", hidden, lambda x, b: _budget(x, b).gates, width=H),
        Entry("BudgetRouter.begin(estimates)", "estimates", "real", lambda: randn(T, 2, 4, seed=3),
              lambda x, b: module("BudgetRouter", b).begin(on(b, randn(len(b), H)), x).messages, width=4,
              checked=False),
        Entry("ConstraintLayer(inputs).marginals", "inputs", "real", hidden,
              lambda x, b: module("ConstraintLayer", b)(x).marginals, width=H),
        Entry("ConstraintLayer(inputs), mixture.log_prob", "inputs", "real", hidden,
              lambda x, b: module("ConstraintLayer, mixture", b)(x).log_prob(mask(b)), width=H),
        Entry("ConstraintLayer(inputs), mixture.mode", "inputs", "real", hidden,
              lambda x, b: module("ConstraintLayer, mixture", b)(x).mode, False, width=H),
        Entry("ConstraintLayer(mixture_logits)", "mixture_logits", "real", lambda: randn(T, 2, seed=6),
              lambda x, b: cr.nn.ConstraintLayer(flat(), components=2)(on(b, randn(len(b), 2, E)), x).marginals,
              width=2),
        Entry("log_count_polynomial(logits)", "logits", "real", logits,
              lambda x, b: cr.log_count_polynomial(x, 3), width=None, checked=False, alone=True),
        Entry("calibrate_temperature(hidden)", "hidden", "real", hidden,
              lambda x, b: torch.tensor(copy.deepcopy(module("ExactKRouter", b)).calibrate_temperature(x, 0.75)),
              False, width=H, rows=False, python=True),
        Entry("SoftTopKRouter.calibrate(hidden)", "hidden", "real", hidden,
              lambda x, b: torch.tensor(copy.deepcopy(module("SoftTopKRouter", b)).calibrate(x, executed=2.0)),
              False, width=H, rows=False, python=True),
        Entry("CountController.update(price)", "price", "real", lambda: torch.tensor(0.5),
              lambda x, b: cr.CountController(2.0).update(
                  cr.CountController(2.0).init()._replace(price=x), _of_routing(on(b, randn(T, E)), b)).price,
              False, width=None, rows=False),
        Entry("balance.LossFree.update(routing)", "logits", "real", logits,
              lambda x, b: cr.balance.LossFree(E, 1.0).update(
                  cr.balance.LossFree(E, 1.0).init(b.device), _of_routing(x, b)).bias, False, rows=False, single=True),
        Entry("BudgetRouter(bias).gates", "bias", "real", lambda: randn(E, seed=2),
              lambda x, b: module("BudgetRouter", b)(
                  on(b, randn(T, H)), module("BudgetRouter", b).begin(on(b, randn(T, H))), key=key(b), bias=x)[0].gates,
              rows=False),
        Entry("SoftTopKRouter(bias).gates", "bias", "real", lambda: randn(E, seed=2),
              lambda x, b: module("SoftTopKRouter", b)(on(b, randn(T, H)), bias=x).gates.detach(), False, rows=False),
    ]  # fmt: skip


def _priors() -> list[Entry]:
    def given(x: Any, b: Tensor) -> cr.PriorDistribution:
        found: cr.PriorDistribution = module("SubsetPrior", b).constrained(flat(), x)
        return found

    outputs: dict[str, tuple[Callable[[cr.PriorDistribution, Tensor], Tensor], bool]] = {
        "log_partition": (lambda d, b: d.log_partition, True),
        "marginals": (lambda d, b: d.marginals, True),
        "log_prob": (lambda d, b: d.log_prob(mask(b)), True),
        "sample": (lambda d, b: d.sample((2,), key=key(b)), False),
        "max_product": (lambda d, b: d.max_product()[0], False),
        "condition": (lambda d, b: d.condition(include=[0]).marginals, True),
    }
    found = [
        Entry(f"SubsetPrior.constrained(logits).{name}", "logits", "real", logits,
              lambda x, b, output=output: output(given(x, b), b), smooth, alone=name not in ("log_prob", "sample"),
              python=name in ("marginals", "max_product", "condition"))  # torch.jit.trace takes no torch.func.grad
        for name, (output, smooth) in outputs.items()
    ]  # fmt: skip
    return [
        *found,
        Entry("SubsetPrior.log_prob(mask)", "mask", "mask", lambda: mask(logits()),
              lambda x, b: module("SubsetPrior", b).log_prob(x).detach(), False),
        Entry("SubsetPrior.em_step(masks)", "masks", "mask", lambda: mask(logits()),
              lambda x, b: copy.deepcopy(module("SubsetPrior", b)).em_step(x), False, rows=False, python=True),
    ]  # fmt: skip


def _soft() -> list[Entry]:
    return [
        Entry("soft_topk(logits)", "logits", "real", logits, lambda x, b: cr.soft_topk(x, 2.0, 0.5), width=None,
              alone=True),
        Entry("soft_topk(k)", "k", "real", lambda: randn(T).abs() + 0.5,
              lambda x, b: cr.soft_topk(on(b, randn(len(b), E)), x, 0.5), width=None),
        Entry("soft_topk(alpha)", "alpha", "real", lambda: randn(T).abs() + 0.5,
              lambda x, b: cr.soft_topk(on(b, randn(len(b), E)), 2.0, x), width=None),
    ]  # fmt: skip


def _counts_of(x: Any, b: Tensor) -> cr.PoissonBinomial:
    return cr.PoissonBinomial(logits=x)


def _statistics() -> list[Entry]:
    value = torch.tensor(2.0)
    outputs: dict[str, tuple[Callable[[cr.PoissonBinomial, Tensor], Tensor], bool]] = {
        "log_prob": (lambda d, b: d.log_prob(value.to(b.device)), True),
        "log_pmf": (lambda d, b: d.log_pmf(), True),
        "log_cdf": (lambda d, b: d.log_cdf(value.to(b.device)), True),
        "entropy": (lambda d, b: d.entropy(), True),
        "variance": (lambda d, b: d.variance, True),
        "icdf": (lambda d, b: d.icdf((value / 3).to(b.device)), False),
        "sample": (lambda d, b: d.sample((2,), key=key(b)), False),
        "expand": (lambda d, b: d.expand((2, *d.batch_shape)).mean, True),
    }
    return [
        *(
            Entry(f"PoissonBinomial(logits).{name}", "logits", "real", logits,
                  lambda x, b, output=output: output(_counts_of(x, b), b), smooth, width=None,
                  alone=name != "sample")
            for name, (output, smooth) in outputs.items()
        ),
        Entry("PoissonBinomial(probs).log_pmf", "probs", "real", lambda: 0.6 * randn(T, E).sigmoid(),
              lambda x, b: cr.PoissonBinomial(probs=x).log_pmf(), width=None),
        Entry("logits_for_marginals(marginals)", "marginals", "real", lambda: flat()(randn(T, E)).marginals,
              lambda x, b: cr.logits_for_marginals(x, flat()), python=True),
    ]  # fmt: skip


def _worth(routing: cr.Routing) -> Tensor:
    return (routing.gates * on(routing.gates, randn(T, E, seed=9))).sum()


def _losses_and_metrics() -> list[Entry]:
    found = [
        Entry(f"losses.{name}(routing)", "logits", "real", logits,
              lambda x, b, name=name: getattr(cr.losses, name)(_of_routing(x, b)))
        for name in ("load_balance", "z_loss", "expected_count")
    ]  # fmt: skip
    found.append(
        Entry("losses.balance(mass)", "mass", "real", lambda: randn(E).abs(),
              lambda x, b: cr.losses.balance(on(b, torch.ones(E)), x), rows=False, checked=False, width=None)
    )  # fmt: skip
    found += [
        Entry(f"metrics.{name}(mask)", "decisions", "mask", lambda: mask(logits()),
              lambda x, b, name=name: torch.as_tensor(getattr(cr.metrics, name)(x)), False, width=None, python=True)
        for name in ("utilization", "load_entropy", "max_violation", "active_experts", "subset_diversity")
    ]  # fmt: skip
    return [
        *found,
        Entry("metrics.mode_agreement(routing)", "logits", "real", logits,
              lambda x, b: cr.metrics.mode_agreement(_of_routing(x, b)), False),
        Entry("metrics.summary(mask)", "routings", "mask", lambda: mask(logits()),
              lambda x, b: torch.tensor([cr.metrics.summary(x).get(f"all/{name}", 0.0) for name in
                                         ("load_entropy", "max_violation", "experts_per_token_std", "dead_experts")]),
              False, width=None, python=True),
        Entry("metrics.swap_oracle(logits)", "logits", "real", logits,
              lambda x, b: cr.metrics.swap_oracle(_worth, x, flat(), rounds=4).actual, False, rows=False, python=True),
    ]  # fmt: skip


def _records() -> list[Entry]:
    return [
        Entry("random_key(indices)", "indices", "key", lambda: torch.arange(T),
              lambda x, b: cr.random_key(3, x), False, width=None),
        Entry("RoutingRecord.of(mask)", "decisions", "bool mask", lambda: mask(logits()),
              lambda x, b: cr.RoutingRecord.of(x).masks()[0], False, width=None, python=True),
        Entry("RoutingRecord.of_indices(indices)", "indices", "index",
              lambda: torch.tensor([[[0, 1]], [[3, 2]], [[4, 5]], [[1, 4]]]),
              lambda x, b: cr.RoutingRecord.of_indices(x, E).masks()[0], False, width=None, python=True),
        Entry("RoutingRecord.of_indices(weights)", "weights", "real", lambda: randn(T, 2).abs(),
              lambda x, b: cr.RoutingRecord.of_indices([mask(b)[:, :2] + torch.tensor([0, 2])], E, [x]).masks()[0],
              False, width=2, python=True),
        Entry("RoutingRecord.of_router_logits(logits)", "router_logits", "real", logits,
              lambda x, b: cr.RoutingRecord.of_router_logits(x, flat()).log_probs[:, 0], False, python=True),
        Entry("replay.mismatch(a)", "a", "bool mask", lambda: mask(logits()),
              lambda x, b: torch.tensor(cr.replay.mismatch(x, mask(b).roll(1, 0)).slots), False, width=None,
              python=True),
        Entry("replay.importance_ratio(new_log_prob)", "new_log_prob", "real", lambda: randn(T),
              lambda x, b: cr.replay.importance_ratio(x, randn(len(b), seed=1).to(b.device)), width=None,
              checked=False, single=True),
        Entry("replay.truncated_ratio(new_log_probs)", "new_log_probs", "real", lambda: randn(T, 3),
              lambda x, b: cr.replay.truncated_ratio(x, randn(len(b), 3, seed=1).to(b.device)), False, width=None,
              checked=False, single=True),
        Entry("replay.router_shift(new_log_probs)", "new_log_probs", "real", lambda: randn(T, 3),
              lambda x, b: cr.replay.router_shift(x, randn(len(b), 3, seed=1).to(b.device)), False, width=None,
              checked=False, single=True),
        Entry("estimators.score_function_loss(log_prob)", "log_prob", "real", lambda: randn(T),
              lambda x, b: cr.estimators.score_function_loss(x, on(b, randn(len(b), seed=1))), width=None, rows=False,
              checked=False),
        Entry("serving.routing_function(gating_output)", "gating_output", "real", logits,
              lambda x, b: serving.routing_function(flat(), E).to(b.device)(x, x, 3, True)[0], False, checked=False),
        Entry("serving.routing_function(sample=True)(gating_output)", "gating_output", "real", logits,
              lambda x, b: serving.routing_function(flat(), E, sample=True).to(b.device)(
                  x, x, 3, True, seed=3, position=torch.arange(len(b), device=b.device))[0], False, checked=False),
        Entry("serving.routing_function(sample=True)(position)", "position", "key", lambda: torch.arange(T),
              lambda x, b: serving.routing_function(flat(), E, sample=True).to(b.device)(
                  *[randn(len(b), E).to(b.device)] * 2, 3, True, seed=3, position=x)[0], False, width=None),
        Entry("serving.greedy_groups(gating_output)", "gating_output", "real", logits,
              lambda x, b: serving.greedy_groups(E, 2, groups=5, active=3, group_score="max").to(b.device)(
                  x, x, 3, True)[0], False, checked=False),
    ]  # fmt: skip


ENTRIES = {
    entry.name: entry
    for entry in (
        *_distributions(), *_arguments_of_distributions(), *_routes(), *_layers(), *_priors(), *_soft(),
        *_losses_and_metrics(), *_statistics(), *_records(),
    )
}  # fmt: skip
