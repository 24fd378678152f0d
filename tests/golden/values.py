"""What the library draws and computes on fixed inputs, as plain data.

Engines are held to one another elsewhere; these constants notice a change that all of them share. Logits come from
integer arithmetic, not from a generator, so that no release of torch moves them; all are multiples of 1/64.

Legend: T tokens, N variables; a mask is written as a string of hexadecimal digits per token, variable 0 being the
highest bit.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import circuitroute as cr

HERE = Path(__file__).resolve().parent
DECISIONS, SIGNATURES = HERE / "decisions.json", HERE / "signatures.json"
T = 6
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}

# Constraint, number of variables, spread of the logits.
CIRCUITS: tuple[tuple[str, int, float], ...] = (
    ("Exactly(1)", 16, 4.0),
    ("Exactly(2)", 8, 1.0),
    ("Exactly(8)", 64, 4.0),
    ("Exactly(8)", 60, 1000.0),
    ("Between(4, 8)", 64, 2.0),
    ("CountIn([2, 4, 8])", 40, 16.0),
    ("AtMost(3)", 12, 1.0),
    ("AtLeast(5)", 10, 4.0),
    ("Exactly(2).over([0, 2, 4, 6])", 9, 2.0),
    ("EachGroup(Groups(4), Exactly(1))", 16, 4.0),
    ("ActiveGroups(Groups(4), at_most=2) & Exactly(4)", 16, 2.0),
    ("Cost([1, 2, 3, 4, 5, 1, 2, 3, 4, 5], at_most=9, at_least=3)", 10, 4.0),
    ("Logic(variables(6)[3] >> variables(6)[5]) & AtMost(3)", 6, 4.0),
    ("~Exactly(2)", 7, 1.0),
    ("LayerBudget(layers=3, experts=5, per_layer=Between(1, 3), total=AtMost(6))", 15, 2.0),
)
COMBINES = ("softmax", "normalized", "sigmoid", "marginal")


def logits_of(n: int, spread: float, dtype: torch.dtype, salt: int = 0) -> Tensor:
    """[T, N] logits in [-spread, spread], multiples of 1/64; the last row is full of ties."""
    at = np.arange(T * n, dtype=np.uint64).reshape(T, n) + np.uint64(1 + salt * 7919)
    mixed = (at * np.uint64(2654435761)) % np.uint64(1 << 32)
    mixed = ((mixed ^ (mixed >> np.uint64(15))) * np.uint64(2246822519)) % np.uint64(1 << 32)
    unit = mixed.astype(np.float64) / 2.0**31 - 1.0
    logits = np.round(unit * spread * 64) / 64
    logits[-1] = np.round(unit[-1])
    return torch.from_numpy(logits).to(dtype)


def constraint_of(text: str) -> cr.Constraint:
    """The constraint that a line of CIRCUITS names."""
    found: cr.Constraint = eval(text, {name: getattr(cr, name) for name in dir(cr)})
    return found


def hexadecimal(mask: Tensor) -> list[str]:
    """A mask [T, N] as strings."""
    width = -(-mask.shape[-1] // 4)
    return [f"{int(''.join(str(int(x)) for x in row), 2):0{width}x}" for row in mask.tolist()]


def rounded(values: Tensor) -> Any:
    """Numbers with seven significant digits, enough for every tolerance used."""
    return json.loads(
        json.dumps(values.detach().double().tolist()), parse_float=lambda text: float(f"{float(text):.7g}")
    )


def keys() -> Tensor:
    """[T] the keys of every decision."""
    return cr.random_key(2026, 11, torch.arange(T))


def decisions_of(circuit: cr.Circuit, spread: float, dtype: torch.dtype) -> dict[str, Any]:
    """Samples, mode, the four gates with their gradient, and the replay of the first decision on other logits."""
    logits = logits_of(circuit.n, spread, dtype)
    found: dict[str, Any] = {
        "sample": hexadecimal(circuit(logits).sample(key=keys())),
        "samples": [hexadecimal(mask) for mask in circuit(logits).sample((2,), key=keys())],
        "mode": hexadecimal(cr.route(logits, circuit, training=False).mask),
    }
    if circuit.counts is not None:
        potential = torch.arange(circuit.max_count + 1, dtype=torch.float32) / 4
        found["with_potential"] = hexadecimal(circuit(logits, potential).sample(key=keys()))
    weights = torch.arange(1, circuit.n + 1) / circuit.n
    for combine in COMBINES:
        leaf = logits.clone().requires_grad_()
        routing = cr.route(leaf, circuit, combine=combine, key=keys())
        (routing.gates * weights).sum().backward()
        gates = rounded(routing.gates[routing.mask])
        found[combine] = {"mask": hexadecimal(routing.mask), "gates": gates, "gradient": rounded(leaf.grad[0])}
    sampled = cr.route(logits, circuit, key=keys())
    found["log_prob"] = rounded(sampled.log_prob)
    weights_TK, indices_TK = sampled.padded(pad="minus_one")
    found["padded"] = {"weights": rounded(weights_TK), "indices": indices_TK.tolist()}
    again = cr.route(logits_of(circuit.n, spread, dtype, salt=1), circuit, replay=sampled.mask)
    found["replay"] = {"gates": rounded(again.gates[again.mask]), "log_prob": rounded(again.log_prob)}
    return found


def random_keys() -> list[int]:
    """A few mixed keys."""
    mixed = [cr.random_key(0), cr.random_key(1, 2, 3), cr.random_key(2**70, -1)]
    return [int(key) for key in mixed] + cr.random_key(7, torch.arange(3), 5).tolist()


def signatures() -> dict[str, str]:
    """Every public name with its signature, methods and module members included."""
    found: dict[str, str] = {}
    for name in sorted(n for n in dir(cr) if not n.startswith("_")):
        thing = getattr(cr, name)
        if inspect.ismodule(thing):
            if name in PUBLIC_MODULES:
                found |= _members(name, thing)
        elif inspect.isclass(thing):
            found[name] = _signature(thing)
            found |= _members(name, thing)
        else:
            found[name] = _signature(thing)
    return {name: signature for name, signature in found.items() if name not in INTERNAL}


PUBLIC_MODULES = ("losses", "metrics", "nn", "replay")
# Which replay, metrics and nn show as their own.
SHOWN = ("LayerRecord", "RecordFile", "RecordWriter", "RoutingRecord", "RunLog", "SubsetMixture", "summary")
# For engines and compilers, not for users: free to change.
INTERNAL = ("Circuit", "Circuit.engine", "Circuit.handle", "Circuit.of_handle", "Circuit.holds", "Circuit.as_mask")


def _members(prefix: str, thing: Any) -> dict[str, str]:
    """Functions, methods and properties of a class or a module of our own."""
    found = {}
    for name, member in vars(thing).items():
        home = getattr(member, "__module__", None)
        if name.startswith("_") or (inspect.ismodule(thing) and home != thing.__name__ and name not in SHOWN):
            continue
        if isinstance(member, property) or type(member).__name__ == "cached_property":
            found[f"{prefix}.{name}"] = "property"
        elif isinstance(member, (staticmethod, classmethod)):
            found[f"{prefix}.{name}"] = _signature(member.__func__)
        elif callable(member):
            found[f"{prefix}.{name}"] = _signature(member)
    return found


def _signature(thing: Any) -> str:
    try:
        return "(" + ", ".join(str(p) for p in _bare(inspect.signature(thing))) + ")"
    except (TypeError, ValueError):
        return "(...)"


def _bare(signature: inspect.Signature) -> list[inspect.Parameter]:
    """Parameters without annotations, which are free to become more precise."""
    return [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]


def state_dicts() -> dict[str, dict[str, list[int]]]:
    """Names and shapes of what the modules keep in checkpoints."""
    budget = cr.BudgetRouter(4, 6, layers=3, per_layer=cr.Between(1, 3), total=cr.AtMost(6), per_token=True, bias=True)
    plain = cr.BudgetRouter(4, 6, layers=3, per_layer=cr.Between(1, 3), total=cr.AtMost(6))
    modules = {
        "ExactKRouter": cr.ExactKRouter(4, 6, 2, bias=True),
        "DynamicKRouter": cr.DynamicKRouter(4, 6, 1, 3),
        "Router": cr.Router(4, 6, cr.AtMost(2)),
        "TopKRouter": cr.TopKRouter(4, 6, 2),
        "SoftTopKRouter": cr.SoftTopKRouter(4, 6, 2, alpha=0.5),
        "LayerAllocation": cr.LayerAllocation(4, 12),
        "BudgetRouter": budget,
        "Budget": plain.without_routers(),
        "ConstraintLayer": cr.nn.ConstraintLayer(cr.Exactly(2), 6, in_features=4, components=3),
        "MoE": cr.MoE(cr.ExactKRouter(4, 2, 1), [torch.nn.Linear(4, 4) for _ in range(2)]),
    }
    return {
        name: {key: list(value.shape) for key, value in module.state_dict().items()} for name, module in modules.items()
    }


def write() -> None:
    """Write both files of constants; the files of circuits and records beside them are never written again."""
    decisions = {
        f"{text} of {n}, {name}": decisions_of(cr.compile(constraint_of(text), n), spread, dtype)
        for text, n, spread in CIRCUITS
        for name, dtype in DTYPES.items()
    }
    content = {"random_key": random_keys(), "state_dicts": state_dicts(), "decisions": decisions}
    DECISIONS.write_text(json.dumps(content, separators=(",", ":")).replace('},"', '},\n"') + "\n", encoding="utf-8")
    SIGNATURES.write_text(json.dumps(signatures(), indent=0, sort_keys=True) + "\n", encoding="utf-8")


SAVED = {
    "exactly": ("Exactly(2)", 5),
    "logic": ("Logic(variables(6)[3] >> variables(6)[5]) & AtMost(3)", 6),
}


def recorded_masks() -> list[Tensor]:
    """The decisions of two layers, one kept as indices and one as bits."""
    at = torch.arange(T * 40).reshape(T, 40)
    return [at % 20 == 3, at * 7 % 3 == 1]
