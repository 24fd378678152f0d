"""Routing decisions on record, compact in memory and in files.

Legend: T tokens, L layers, E experts of a layer, K slots (the largest number of experts any token has in a layer).
"""

from __future__ import annotations

import io
import json
import math
import os
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from circuitroute._files import as_path, replace_file, sealed, unsealed
from circuitroute._tensors import plain
from circuitroute._validate import as_items, as_number, int_at_least, one_of
from circuitroute.errors import CircuitFileError
from circuitroute.inference.evidence import rows_text
from circuitroute.routing.decision import Routing, by_token

Form: TypeAlias = Literal["indices", "bits"]
Array: TypeAlias = npt.NDArray[Any]

# A record made at temperature 1 is written as version 1, which has no temperature.
VERSION = 2
# Temperatures that differ by less are the same: a number may have been a float32 tensor on the way.
_SAME_TEMPERATURE = 1e-6
_KIND = "circuitroute routing record"
# The dtypes of indices, narrowest first, and how many values each tells apart.
_WIDTHS = ((torch.uint8, 1 << 8), (torch.int16, 1 << 15), (torch.int32, 1 << 31))
_SEAL = b"sha256 "


@dataclass(frozen=True, eq=False)
class LayerRecord:
    """The decisions of one layer.

    Attributes:
        experts: E.
        form: how they are written. ``"indices"``: [T, K] the chosen experts, increasing, then E in unused slots; uint8
            where that fits, else int16 or int32. ``"bits"``: [T, ceil(E / 8)] uint8, expert i being bit i % 8 of byte
            i // 8.
        data: the numbers, on the CPU.
    """

    experts: int
    form: Form
    data: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "experts", int_at_least("experts", self.experts, 1))
        object.__setattr__(self, "form", one_of("form", self.form, get_args(Form)))

    @staticmethod
    def of(mask: Tensor) -> LayerRecord:
        """A mask [T, E] bool in the form that takes less memory (indices where they are equal)."""
        mask = mask.detach().cpu()
        experts = mask.shape[1]
        counts = mask.sum(-1)
        slots = int(counts.max()) if len(mask) else 0
        full = not len(mask) or int(counts.min()) == slots
        dtype = _index_dtype(experts if full else experts + 1)
        if slots * dtype.itemsize > _bytes_of(experts):
            return LayerRecord(experts, "bits", _pack(mask))
        return LayerRecord(experts, "indices", _indices(mask, slots).to(dtype))

    def mask(self) -> Tensor:
        """[T, E] bool."""
        if self.form == "bits":
            return _unpack(self.data, self.experts)
        # One column more, for unused slots.
        mask = torch.zeros(len(self.data), self.experts + 1, dtype=torch.bool, device="cpu")
        return mask.scatter_(1, self.data.long(), True)[:, : self.experts].contiguous()

    def __getitem__(self, tokens: Any) -> LayerRecord:
        return LayerRecord(self.experts, self.form, self.data[tokens])


class RoutingRecord:
    """What T tokens were routed to in L layers.

    Args:
        layers: one record per layer, of the same number of tokens.
        log_probs: [T, L] float32 log-probability of each decision when it was made, if known.
        temperature: what the logits of all layers were divided by for the decisions; routers that are handed a record
            refuse to replay it at another.

    Raises:
        ValueError: no layers, numbers of tokens or layers that do not fit together, or a temperature that is not
            positive.
    """

    def __init__(
        self, layers: Iterable[LayerRecord], log_probs: Tensor | None = None, temperature: float = 1.0
    ) -> None:
        self.layers = tuple(layers)
        if not self.layers:
            raise ValueError("layers is empty: a record has one entry per routing layer")
        tokens = [len(layer.data) for layer in self.layers]
        if len(set(tokens)) > 1:
            raise ValueError(f"layers have {tokens} tokens: all must have the same")
        self.log_probs = None if log_probs is None else log_probs.detach().to("cpu", torch.float32)
        if self.log_probs is not None and self.log_probs.shape != (tokens[0], len(self.layers)):
            raise ValueError(
                f"log_probs has shape {tuple(self.log_probs.shape)}: expected (tokens, layers) = "
                f"({tokens[0]}, {len(self.layers)})"
            )
        self.temperature = as_number("temperature", temperature)
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature}: must be positive and finite")

    # ------------------------------------------------------------------ making one

    @staticmethod
    def of(decisions: Routing | Tensor | Sequence[Routing | Tensor], *, log_probs: bool = True) -> RoutingRecord:
        """Record decisions: one per layer, each a :class:`Routing` or a mask [T, E].

        Args:
            decisions: those of all layers, or of the only one. The record has their temperature; that of masks is 1.
                Routings of a host that numbers its tokens are put in the order of these numbers.
            log_probs: whether to keep the log-probabilities of Routings (masks have none): exact, and already computed
                where the decision was sampled. :func:`importance_ratio` compares with them.

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
        return RoutingRecord(layers, known, _temperature_of(routings))

    @staticmethod
    def of_indices(
        indices: Tensor | Sequence[Tensor], num_experts: int | Sequence[int], log_probs: Tensor | None = None
    ) -> RoutingRecord:
        """Record what an inference server reports: the experts' numbers.

        Slots outside 0..E-1, such as -1 or E, are unused. A server that pads with real experts of weight 0 reports
        those too: where the count is not constant, put -1 there first, by the weights.

        Args:
            indices: [T, L, K] integers, as vLLM and SGLang return them, or one [T, K] per layer.
            num_experts: E, of all layers or of each.
            log_probs: [T, L], if known.

        Raises:
            TypeError, ValueError: tensors of other shapes or dtypes, or an expert that is named twice in one token.
        """
        indices = _by_layer(indices)
        several = isinstance(num_experts, Iterable) and getattr(num_experts, "ndim", 1) > 0
        sizes: list[Any] = as_items("num_experts", num_experts, "E") if several else [num_experts] * len(indices)
        if len(sizes) != len(indices):
            raise ValueError(f"num_experts has {len(sizes)} entries: expected one per layer, {len(indices)}")
        masks = [
            _mask_of_indices(f"indices[{i}]", given, int_at_least("num_experts", size, 1))
            for i, (given, size) in enumerate(zip(indices, sizes, strict=True))
        ]
        return RoutingRecord([LayerRecord.of(mask) for mask in masks], log_probs)

    @staticmethod
    def cat(records: Iterable[RoutingRecord]) -> RoutingRecord:
        """The tokens of several records of the same layers, one record after the other.

        Raises:
            ValueError: none is given, they are of other layers or temperatures, or some have log-probabilities and
                others do not.
        """
        given = list(records)
        if not given:
            raise ValueError("records is empty: give one at least")
        sizes = {record.num_experts for record in given}
        if len(sizes) > 1:
            raise ValueError(f"records have layers of {sorted(sizes)} experts: all must have the same")
        if len({record.log_probs is None for record in given}) > 1:
            raise ValueError("some records have log_probs and others do not: RoutingRecord(record.layers) has none")
        temperature = given[0].temperature
        if not all(same_temperature(record.temperature, temperature) for record in given):
            found = sorted({record.temperature for record in given})
            raise ValueError(f"records were made at temperatures {found}: join those of one temperature")
        layers = [_joined([record.layers[i] for record in given]) for i in range(len(given[0].layers))]
        known = [record.log_probs for record in given if record.log_probs is not None]
        return RoutingRecord(layers, torch.cat(known) if known else None, temperature)

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
            rows = _indices(mask, slots)
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

    def __len__(self) -> int:
        return len(self.layers[0].data)

    def __getitem__(self, tokens: slice | Tensor | Sequence[int]) -> RoutingRecord:
        """Some tokens, those of a minibatch, say: a slice, indices or a mask [T].

        Raises:
            IndexError: an index outside 0..T-1, a mask of another length, or something else.
        """
        at = tokens if isinstance(tokens, slice) else _as_index(tokens)
        known = None if self.log_probs is None else self.log_probs[at]
        return RoutingRecord([layer[at] for layer in self.layers], known, self.temperature)

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
        """The same decisions (whatever their form), log-probabilities and temperature."""
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
        return f"RoutingRecord({len(self)} tokens, {len(self.layers)} layers, {self.nbytes} bytes{known}{tempered})"

    # ------------------------------------------------------------------ files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the record to a file that :meth:`load` reads; a file that is there is replaced in one step.

        A NumPy archive (``.npz``) without pickled objects, with a checksum; see ``docs/replay.md``.

        Raises:
            OSError: the file cannot be written.
        """
        arrays = {f"layer_{i}": layer.data.numpy() for i, layer in enumerate(self.layers)}
        if self.log_probs is not None:
            arrays["log_probs"] = self.log_probs.numpy()
        forms = [layer.form for layer in self.layers]
        header: dict[str, Any] = {"kind": _KIND, "version": 1, "experts": list(self.num_experts), "forms": forms}
        if self.temperature != 1:
            header |= {"version": VERSION, "temperature": self.temperature}
        arrays["header"] = np.frombuffer(json.dumps(header).encode("ascii"), dtype=np.uint8)
        replace_file(path, _sealed(arrays))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> RoutingRecord:
        """Read a record that :meth:`save` wrote. It is verified, and nothing in it is executed.

        Raises:
            FileNotFoundError: there is no such file.
            CircuitFileError: the file is damaged, of another kind, or of a newer version; names the path.
        """
        source = as_path("path", path)
        try:
            return _record(_unsealed(source.read_bytes()))
        except (ValueError, KeyError, TypeError, EOFError, MemoryError, RuntimeError, zipfile.BadZipFile) as error:
            raise CircuitFileError(f"{source} is not a readable routing record: {error}") from None


# ---------------------------------------------------------------------------------------------- masks and codes


def each_of(name: str, decisions: Any) -> list[Routing | Tensor]:
    """The decisions of all layers; one of a single layer alone."""
    if isinstance(decisions, Routing):
        return [decisions]
    if isinstance(decisions, Tensor):
        return [plain(name, decisions)]
    if not isinstance(decisions, Iterable):
        kind = type(decisions).__name__
        raise TypeError(f"{name} is a {kind}: expected a Routing or a mask [tokens, experts], or one per layer")
    return list(decisions)


def mask_of(name: str, decision: Routing | Tensor) -> Tensor:
    mask = decision.mask if isinstance(decision, Routing) else decision
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} is a {type(mask).__name__}: expected a Routing or a mask [tokens, experts]")
    mask = plain(name, mask)
    if mask.dtype != torch.bool or mask.dim() != 2 or mask.shape[1] == 0:
        raise ValueError(
            f"{name} has shape {tuple(mask.shape)} and dtype {mask.dtype}: expected [tokens, experts] bool"
        )
    return mask.detach()


def same_temperature(a: float, b: float) -> bool:
    """Whether two temperatures are one, but for the rounding of a float32."""
    return math.isclose(a, b, rel_tol=_SAME_TEMPERATURE)


def temperatures_of(temperature: float | Tensor) -> list[float]:
    """The lowest and the highest of a number, or of a tensor [] or [T]; none where there are no tokens."""
    if not isinstance(temperature, Tensor):
        return [temperature]
    return [float(bound) for bound in temperature.detach().aminmax()] if temperature.numel() else []


def _temperature_of(routings: Sequence[Routing]) -> float:
    """The temperature of all tokens in all layers; 1 where there are no routings."""
    found = [bound for routing in routings for bound in temperatures_of(routing.temperature)] or [1.0]
    if not all(same_temperature(bound, found[0]) for bound in found):
        raise ValueError(
            f"decisions were made at temperatures from {min(found):g} to {max(found):g}: a record has one temperature "
            "for all tokens and layers, so make one record for each"
        )
    return found[0]


def _by_layer(indices: Any) -> Sequence[Tensor]:
    """[T, K] of every layer."""
    if isinstance(indices, Tensor):
        indices = plain("indices", indices)
        if indices.dim() != 3:
            raise ValueError(f"indices has shape {tuple(indices.shape)}: expected [tokens, layers, slots]")
        return list(indices.unbind(1))
    if not isinstance(indices, Sequence):
        kind = type(indices).__name__
        raise TypeError(
            f"indices is a {kind}: expected a tensor [tokens, layers, slots], or one [tokens, slots] per layer"
        )
    return indices


def _mask_of_indices(name: str, indices: Tensor, experts: int) -> Tensor:
    """[T, E] bool of [T, K] integers; slots outside 0..E-1 are unused."""
    if not isinstance(indices, Tensor):
        raise TypeError(f"{name} is not a tensor of integers [tokens, slots] but a {type(indices).__name__}")
    indices = plain(name, indices)
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        raise TypeError(f"{name} is not a tensor of integers: its dtype is {indices.dtype}")
    if indices.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(indices.shape)}: expected [tokens, slots]")
    at = indices.cpu().long()
    at = torch.where((at >= 0) & (at < experts), at, experts)
    times = torch.zeros(len(at), experts + 1, dtype=torch.int32, device="cpu")
    times = times.scatter_add_(1, at, torch.ones_like(at, dtype=torch.int32))[:, :experts]
    twice = (times > 1).any(-1)
    if bool(twice.any()):
        raise ValueError(f"{name} names an expert twice in {rows_text(twice)}")
    return times > 0


def _index_dtype(values: int) -> torch.dtype:
    """The narrowest dtype of indices that holds 0 to ``values`` - 1."""
    return next(dtype for dtype, limit in _WIDTHS if values <= limit)


def _indices(mask: Tensor, slots: int) -> Tensor:
    """[T, slots] int64: the chosen experts, increasing, then E."""
    token, expert = mask.nonzero(as_tuple=True)
    counts = mask.sum(-1)
    start = counts.cumsum(0) - counts
    rows = torch.full((len(mask), slots), mask.shape[1], device="cpu")
    rows[token, torch.arange(len(token), device="cpu") - start[token]] = expert
    return rows


def _pack(mask: Tensor) -> Tensor:
    """[T, ceil(E / 8)] uint8."""
    return torch.from_numpy(np.packbits(mask.numpy(), axis=1, bitorder="little"))


def _unpack(bits: Tensor, experts: int) -> Tensor:
    """[T, E] bool."""
    return torch.from_numpy(np.unpackbits(bits.numpy(), axis=1, count=experts, bitorder="little")).bool()


def _as_index(tokens: Tensor | Sequence[int]) -> Tensor:
    index = tokens.cpu() if isinstance(tokens, Tensor) else torch.as_tensor(tokens, device="cpu")
    index = index.long() if index.numel() == 0 else index
    if index.dim() != 1 or index.is_floating_point():
        raise IndexError(f"record[{tokens!r}]: give a slice, indices or a mask of tokens, such as [0] for the first")
    return index


def _joined(layers: Sequence[LayerRecord]) -> LayerRecord:
    """The tokens of several records of one layer."""
    first = layers[0]
    if len({(layer.form, layer.data.dtype, layer.data.shape[1]) for layer in layers}) == 1:
        return LayerRecord(first.experts, first.form, torch.cat([layer.data for layer in layers]))
    return LayerRecord.of(torch.cat([layer.mask() for layer in layers]))


# ---------------------------------------------------------------------------------------------- files


def _sealed(arrays: dict[str, Array]) -> bytes:
    """A NumPy archive whose comment is the checksum of all bytes before the checksum's digits."""
    content, digits = io.BytesIO(), len(sealed(b""))
    np.savez(content, **arrays)  # type: ignore[arg-type]  # no array is called allow_pickle
    with zipfile.ZipFile(content, "a") as archive:
        archive.comment = _SEAL + b"0" * digits
    return sealed(content.getvalue()[:-digits])


def _unsealed(data: bytes) -> dict[str, Array]:
    body = unsealed(data)
    if not (body.startswith(b"PK") and body.endswith(_SEAL)):
        raise ValueError("it is not an archive with its checksum as the comment")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        # As save() writes it, so that what is read takes no more memory than the file.
        if any(part.compress_type != zipfile.ZIP_STORED or part.file_size > len(data) for part in archive.infolist()):
            raise ValueError("it holds compressed arrays, or larger ones than itself")
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _record(arrays: dict[str, Array]) -> RoutingRecord:
    header = json.loads(_array(arrays, "header").tobytes())
    if header["kind"] != _KIND:
        raise ValueError(f"it is of kind {header['kind']!r}")
    if header["version"] not in range(1, VERSION + 1):
        raise ValueError(
            f"it is of version {header['version']}, and this circuitroute reads versions 1 to {VERSION}: update it"
        )
    layers = [
        _checked_layer(f"layer_{i}", _array(arrays, f"layer_{i}"), experts, form)
        for i, (experts, form) in enumerate(zip(header["experts"], header["forms"], strict=True))
    ]
    known = arrays.get("log_probs")
    temperature = header["temperature"] if header["version"] > 1 else 1.0
    return RoutingRecord(layers, None if known is None else torch.from_numpy(known), temperature)


def _array(arrays: dict[str, Array], name: str) -> Array:
    if name not in arrays:
        raise ValueError(f"it lacks the array {name!r}")
    return arrays[name]


def _checked_layer(name: str, array: Array, experts: int, form: Form) -> LayerRecord:
    """A layer from a file whose checksum is right; whatever wrote the file may still have written nonsense."""
    experts = int_at_least("experts", experts, 1)
    if array.ndim != 2 or form not in get_args(Form):
        raise ValueError(f"{name} has shape {array.shape} and form {form!r}")
    data = torch.from_numpy(array)
    if form == "bits":
        fits = data.dtype == torch.uint8 and data.shape[1] == _bytes_of(experts)
    else:
        low, high = (int(data.min()), int(data.max())) if data.numel() else (0, 0)
        fits = data.dtype in [dtype for dtype, _ in _WIDTHS] and low >= 0 and high <= experts
    if not fits:
        raise ValueError(f"{name} does not hold {form} of {experts} experts")
    return LayerRecord(experts, form, data)


def _bytes_of(experts: int) -> int:
    return -(-experts // 8)
