"""Routing decisions on record, compact in memory and in files.

Legend: T tokens, L layers, E experts of a layer, K slots (the largest number of experts any token has in a layer).
"""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from circuitroute._files import as_path, replace_file
from circuitroute._validate import as_flag, as_number, as_real, int_at_least
from circuitroute.errors import CircuitFileError
from circuitroute.routing.decision import Routing, by_token
from circuitroute.routing.records.archive import KIND, array_in, as_json, packed, read, unpacked
from circuitroute.routing.records.layers import Array, LayerRecord, checked_layer, indices_of, joined
from circuitroute.routing.records.sources import (
    Rule,
    each_of,
    layers_of_indices,
    mask_of,
    model_label,
    modes_of,
    only_temperature,
    rule_of,
    rule_text,
    rule_texts,
    same_temperature,
)


class RoutingRecord:
    """What T tokens were routed to in L layers.

    Args:
        layers: one record per layer, of the same number of tokens.
        log_probs: [T, L] float32 log-probability of each decision when it was made, if known.
        temperature: what the logits of all layers were divided by for the decisions; routers that are handed a record
            refuse to replay it at another.
        constraints: what the decisions of each layer were made under, if known: constraints, circuits, or their texts
            (``repr``), which is what is kept; None for a layer of which it is not known.
        model: a label of the model that decided, if it is to be checked: any text.

    Attributes:
        constraints: a text or None per layer, or None where nothing is known; long ones are their beginning and digest.

    Raises:
        TypeError: arguments of other kinds.
        ValueError: no layers, numbers of tokens, layers or constraints that do not fit together, or a temperature that
            is not positive.
    """

    def __init__(
        self,
        layers: Iterable[LayerRecord],
        log_probs: Tensor | None = None,
        temperature: float = 1.0,
        *,
        constraints: Sequence[Rule | str | None] | None = None,
        model: str | None = None,
    ) -> None:
        self.layers = tuple(layers)
        if not self.layers:
            raise ValueError("layers is empty: a record has one entry per routing layer")
        tokens = [len(layer.data) for layer in self.layers]
        if len(set(tokens)) > 1:
            raise ValueError(f"layers have {tokens} tokens: all must have the same")
        self.log_probs = None
        if log_probs is not None:
            self.log_probs = as_real("log_probs", log_probs, floating=True).detach().to("cpu", torch.float32)
        if self.log_probs is not None and self.log_probs.shape != (tokens[0], len(self.layers)):
            raise ValueError(
                f"log_probs has shape {tuple(self.log_probs.shape)}: expected (tokens, layers) = "
                f"({tokens[0]}, {len(self.layers)})"
            )
        self.temperature = _positive(temperature)
        self.constraints = rule_texts("constraints", constraints, len(self.layers))
        self.model = model_label(model)

    # ------------------------------------------------------------------ making one

    @staticmethod
    def of(
        decisions: Routing | Tensor | Sequence[Routing | Tensor], *, log_probs: bool = True, model: str | None = None
    ) -> RoutingRecord:
        """Record decisions: one per layer, each a :class:`Routing` or a mask [T, E].

        Args:
            decisions: those of all layers, or of the only one. The record has their temperature and constraints; that
                of masks is 1, and their constraints are not known. Routings of a host that numbers its tokens are put
                in the order of these numbers.
            log_probs: whether to keep the log-probabilities of Routings (masks have none): exact, and already computed
                where the decision was sampled. :func:`importance_ratio` compares with them.
            model: a label of the model, see :class:`RoutingRecord`.

        Raises:
            TypeError, ValueError: anything else, or decisions made at several temperatures.
            AttributeError: a decision without a log-probability, such as a soft router's; record its mask.
        """
        each = each_of("decisions", decisions)
        masks = [by_token(decision, mask_of(f"decisions[{i}]", decision)) for i, decision in enumerate(each)]
        layers = [LayerRecord.of(mask) for mask in masks]
        routings = [decision for decision in each if isinstance(decision, Routing)]
        known = None
        if log_probs and routings and len(routings) == len(each):
            with torch.no_grad():
                known = torch.stack([by_token(routing, routing.log_prob).float().cpu() for routing in routings], dim=1)
        rules = [rule_of(decision) for decision in each]
        return RoutingRecord(layers, known, only_temperature(routings), constraints=rules, model=model)

    @staticmethod
    def of_indices(
        indices: Tensor | Sequence[Tensor],
        num_experts: int | Sequence[int],
        weights: Tensor | Sequence[Tensor] | None = None,
        log_probs: Tensor | None = None,
        *,
        temperature: float = 1.0,
        constraints: Sequence[Rule | str | None] | None = None,
        model: str | None = None,
    ) -> RoutingRecord:
        """Record what an inference server reports: the experts' numbers.

        Slots outside 0..E-1, such as -1 or E, are unused, and so are those of weight 0, whatever expert stands there:
        servers pad with real ones.

        Args:
            indices: [T, L, K] integers, as vLLM and SGLang return them, or one [T, K] per layer.
            num_experts: E, of all layers or of each.
            weights: of the same shape: what each expert's output is multiplied by, or bools that say which slots are
                used. Those of slots outside 0..E-1 are not looked at.
            log_probs: [T, L], if known.
            temperature, constraints, model: see :class:`RoutingRecord`.

        Raises:
            TypeError, ValueError: tensors of other shapes or dtypes, an expert that is named twice in one token, or a
                weight that is negative, NaN or infinite; names the layer and the rows.
        """
        layers = layers_of_indices(indices, num_experts, weights)
        return RoutingRecord(layers, log_probs, temperature, constraints=constraints, model=model)

    @staticmethod
    def of_router_logits(
        router_logits: Tensor | Sequence[Tensor],
        constraint: Rule | Sequence[Rule],
        temperature: float = 1.0,
        *,
        log_probs: bool = True,
        model: str | None = None,
    ) -> RoutingRecord:
        """Record what a model decides that takes the most probable subset of its router logits.

        Models of transformers report their logits with ``output_router_logits=True``, padding tokens too (index the
        record by the attention mask). Where a model chooses by other scores, such as sigmoids with a bias that corrects
        the choice, hand over the logarithms of those.

        Args:
            router_logits: one per layer, as ``outputs.router_logits`` has them: [T, E], or [B, S, E] whose tokens are
                taken in order; or that of the only layer.
            constraint: what every layer allows, such as ``cr.Exactly(8)`` for a top-8 router, or one per layer.
            temperature: of the log-probabilities; the mode does not depend on it.
            log_probs: whether to keep the modes' log-probabilities, exact, under logits / temperature.
            model: a label of the model, see :class:`RoutingRecord`.

        Raises:
            TypeError, ValueError: tensors of other shapes or dtypes, other numbers of layers, or NaN; names the layer.
            InfeasibleError: a constraint that nothing satisfies.
        """
        temperature, known = _positive(temperature), as_flag("log_probs", log_probs)
        layers, found, rules = modes_of(router_logits, constraint, temperature, known)
        return RoutingRecord(layers, found, temperature, constraints=rules, model=model)

    @staticmethod
    def cat(records: Iterable[RoutingRecord]) -> RoutingRecord:
        """The tokens of several records of the same layers, one record after the other.

        Of a layer whose constraint is not the same in all of them the joined record knows none.

        Raises:
            ValueError: none is given, they are of other layers, temperatures or models, or some have log-probabilities
                and others do not.
        """
        given = list(records)
        if not given:
            raise ValueError("records is empty: give one at least")
        sizes = {record.num_experts for record in given}
        if len(sizes) > 1:
            raise ValueError(f"records have layers of {sorted(sizes)} experts: all must have the same")
        if len({record.log_probs is None for record in given}) > 1:
            raise ValueError("some records have log_probs and others do not: RoutingRecord(record.layers) has none")
        first = given[0]
        if not all(same_temperature(record.temperature, first.temperature) for record in given):
            found = sorted({record.temperature for record in given})
            raise ValueError(f"records were made at temperatures {found}: join those of one temperature")
        labels = {record.model for record in given}
        if len(labels - {None}) > 1:
            raise ValueError(f"records are of models {sorted(map(str, labels))}: join those of one model")
        layers = [joined([record.layers[i] for record in given]) for i in range(len(first.layers))]
        known = [record.log_probs for record in given if record.log_probs is not None]
        return RoutingRecord(
            layers,
            torch.cat(known) if known else None,
            first.temperature,
            constraints=_common([record.constraints for record in given], len(layers)),
            model=first.model if len(labels) == 1 else None,
        )

    # ------------------------------------------------------------------ reading it

    def masks(self, device: torch.device | str | None = None) -> list[Tensor]:
        """[T, E] bool per layer, for the ``replay=`` of that layer's router; on the CPU when ``device`` is None."""
        return [layer.mask().to(device) for layer in self.layers]

    def indices(self, device: torch.device | str | None = None) -> list[Tensor]:
        """[T, K] int64 per layer, the chosen experts in increasing order, then -1."""
        found = []
        for layer in self.layers:
            mask = layer.mask()
            slots = int(mask.sum(-1).max()) if len(mask) else 0
            rows = indices_of(mask, slots)
            found.append(torch.where(rows == layer.experts, -1, rows).to(device))
        return found

    @property
    def path_log_prob(self) -> Tensor:
        """[T] float64, the recorded log-probability of each token's path through the layers.

        Raises:
            ValueError: this record was made without log-probabilities.
        """
        if self.log_probs is None:
            raise ValueError("log_probs is None: record Routings, not masks, or give log_probs")
        return self.log_probs.double().sum(1)

    @property
    def num_experts(self) -> tuple[int, ...]:
        """E of every layer."""
        return tuple(layer.experts for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        known = 0 if self.log_probs is None else self.log_probs.nbytes
        return known + sum(layer.data.nbytes for layer in self.layers)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of memory for one token in all layers."""
        known = 0 if self.log_probs is None else self.log_probs.element_size() * len(self.layers)
        return known + sum(layer.data.element_size() * layer.data.shape[1] for layer in self.layers)

    def __len__(self) -> int:
        return len(self.layers[0].data)

    def __getitem__(self, tokens: slice | Tensor | Sequence[int]) -> RoutingRecord:
        """Some tokens, those of a minibatch, say: a slice, indices or a mask [T].

        Raises:
            IndexError: an index outside 0..T-1, a mask of another length, or something else.
        """
        at = tokens if isinstance(tokens, slice) else as_rows(tokens)
        known = None if self.log_probs is None else self.log_probs[at]
        layers = [layer[at] for layer in self.layers]
        return RoutingRecord(layers, known, self.temperature, constraints=self.constraints, model=self.model)

    def split(self, lengths: Sequence[int]) -> list[RoutingRecord]:
        """One record per rollout, of these many tokens each, in order; the inverse of :meth:`cat`.

        Raises:
            ValueError: the lengths do not add up to T.
        """
        sizes = [int_at_least(f"lengths[{i}]", length, 0) for i, length in enumerate(lengths)]
        if sum(sizes) != len(self):
            raise ValueError(f"lengths add up to {sum(sizes)}: the record has {len(self)} tokens")
        return [self[start:stop] for start, stop in pairwise(accumulate(sizes, initial=0))]

    def __eq__(self, other: object) -> bool:
        """The same decisions (whatever their form), log-probabilities and temperature; whoever made them."""
        if not isinstance(other, RoutingRecord):
            return NotImplemented
        if self.num_experts != other.num_experts or len(self) != len(other):
            return False
        if self.temperature != other.temperature:
            return False
        if (self.log_probs is None) != (other.log_probs is None):
            return False
        if self.log_probs is not None and other.log_probs is not None and not self.log_probs.equal(other.log_probs):
            return False
        return all(a.mask().equal(b.mask()) for a, b in zip(self.layers, other.layers, strict=True))

    __hash__ = None  # type: ignore[assignment]  # tensors can change

    def __repr__(self) -> str:
        known = "" if self.log_probs is None else ", with log_probs"
        tempered = "" if self.temperature == 1 else f", temperature {self.temperature:g}"
        of = "" if self.model is None else f", of model {self.model!r}"
        return f"RoutingRecord({len(self)} tokens, {len(self.layers)} layers, {self.nbytes} bytes{known}{tempered}{of})"

    # ------------------------------------------------------------------ files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the record to a file that :meth:`load` reads; a file that is there is replaced in one step.

        A NumPy archive (``.npz``) without pickled objects, with a checksum; see ``docs/replay.md``.

        Raises:
            OSError: the file cannot be written.
        """
        arrays: dict[str, Array] = {f"layer_{i}": layer.data.numpy() for i, layer in enumerate(self.layers)}
        if self.log_probs is not None:
            arrays["log_probs"] = self.log_probs.numpy()
        if self.constraints is not None or self.model is not None:
            arrays["origin"] = as_json({"constraints": self.constraints, "model": self.model})
        forms = [layer.form for layer in self.layers]
        header: dict[str, Any] = {"kind": KIND, "version": 1, "experts": list(self.num_experts), "forms": forms}
        if self.temperature != 1:
            header |= {"version": 2, "temperature": self.temperature}
        replace_file(path, packed(arrays, header))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> RoutingRecord:
        """Read a record that :meth:`save` wrote. It is verified, and nothing in it is executed.

        Raises:
            FileNotFoundError: there is no such file.
            CircuitFileError: the file is damaged, of another kind, or of a newer version; names the path.
        """
        source = as_path("path", path)
        try:
            return _record(*unpacked(read(source)))
        except (ValueError, KeyError, TypeError, EOFError, MemoryError, RuntimeError, zipfile.BadZipFile) as error:
            raise CircuitFileError(f"{source} is not a readable routing record: {error}") from None


def check_constraint(record: RoutingRecord, layer: int, rule: Rule) -> None:
    """Compare what a layer's decisions were made under, where that is known, with a constraint or circuit.

    Raises:
        ValueError: it is another.
    """
    known, asked = record.constraints and record.constraints[layer], rule_text(rule)
    if None not in (known, asked) and known != asked:
        raise ValueError(
            f"record: layer {layer} was decided under {known}, and is to be replayed under {asked}, by which its "
            "decisions have other log-probabilities: use the same constraint, or replay RoutingRecord(record.layers), "
            "which names none"
        )


def as_rows(tokens: Tensor | Sequence[int]) -> Tensor:
    """Indices or a mask [T] of tokens.

    Raises:
        IndexError: anything else.
    """
    index = tokens.cpu() if isinstance(tokens, Tensor) else torch.as_tensor(tokens, device="cpu")
    index = index.long() if index.numel() == 0 else index
    if index.dim() != 1 or index.is_floating_point():
        raise IndexError(f"record[{tokens!r}]: give a slice, indices or a mask of tokens, such as [0] for the first")
    return index


def _positive(temperature: object) -> float:
    number = as_number("temperature", temperature)
    if not 0 < number < math.inf:
        raise ValueError(f"temperature={number}: must be positive and finite")
    return number


def _common(texts: list[tuple[str | None, ...] | None], layers: int) -> list[str | None]:
    """The constraint of every layer that all records tell, and tell the same of."""
    each = [(None,) * layers if known is None else known for known in texts]
    return [known[0] if len(set(known)) == 1 else None for known in zip(*each, strict=True)]


def _record(arrays: dict[str, Array], header: dict[str, Any]) -> RoutingRecord:
    layers = [
        checked_layer(f"layer_{i}", array_in(arrays, f"layer_{i}"), experts, form)
        for i, (experts, form) in enumerate(zip(header["experts"], header["forms"], strict=True))
    ]
    known = arrays.get("log_probs")
    origin = json.loads(arrays["origin"].tobytes()) if "origin" in arrays else {"constraints": None, "model": None}
    return RoutingRecord(
        layers,
        None if known is None else torch.from_numpy(known),
        header["temperature"] if header["version"] > 1 else 1.0,
        constraints=origin["constraints"],
        model=origin["model"],
    )
