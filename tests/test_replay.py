"""Records of decisions: compact, lossless, replayed exactly; and ratios against enumeration."""

import hashlib
import io
import json
import math
import runpy
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import circuitroute as cr
from circuitroute._files import sealed
from circuitroute.routing.records import archive as files
from circuitroute.routing.records.layers import indices_of, pack
from circuitroute.routing.replay import (
    LayerRecord,
    RoutingRecord,
    importance_ratio,
    log_probs,
    masks_for,
    mismatch,
    path_log_prob,
    router_shift,
    truncated_ratio,
)

ROOT = Path(__file__).parent.parent
T = 30


def logits_of(n, seed=0, rows=T):
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(seed)) * 2


def routings_of(constraint, n, layers=3, rows=T, shift=0.0):
    circuit = cr.compile(constraint, n).with_engine("torch")
    return [
        cr.route(logits_of(n, i, rows) + shift, circuit, key=cr.random_key(i, torch.arange(rows)))
        for i in range(layers)
    ]


def record_of(constraint=cr.Between(1, 4), n=12, **options):  # noqa: B008 - constraints are immutable
    return RoutingRecord.of(routings_of(constraint, n, **options))


# ---------------------------------------------------------------------------------------------- recording


@pytest.mark.parametrize(
    ("constraint", "n", "form", "dtype", "width"),
    [
        (cr.Exactly(1), 16, "indices", torch.uint8, 1),
        (cr.Between(3, 4), 16, "bits", torch.uint8, 2),
        (cr.Exactly(8), 64, "indices", torch.uint8, 8),  # as many bytes as bits: indices
        (cr.Exactly(9), 64, "bits", torch.uint8, 8),
        (cr.Exactly(8), 256, "indices", torch.uint8, 8),  # no slot is unused, so 256 values are enough
        (cr.Between(7, 8), 256, "indices", torch.int16, 8),
        (cr.Exactly(3), 300, "indices", torch.int16, 3),
    ],
)
def test_a_record_is_small_and_loses_nothing(constraint, n, form, dtype, width):
    routings = routings_of(constraint, n, shift=-5.0)  # as few as may be, too
    record = RoutingRecord.of(routings)
    for layer, mask, routing in zip(record.layers, record.masks(), routings, strict=True):
        assert torch.equal(mask, routing.mask)
        assert (layer.experts, layer.form, layer.data.dtype, layer.data.shape) == (n, form, dtype, (T, width))
    assert torch.equal(record.log_probs, torch.stack([r.log_prob for r in routings], 1))
    assert len(record) == T
    assert record.nbytes == 3 * T * (width * dtype.itemsize + 4)
    assert repr(record) == f"RoutingRecord({T} tokens, 3 layers, {record.nbytes} bytes, with log_probs)"


@pytest.mark.parametrize("n", [1, 8, 13, 40_000])
def test_any_masks_come_back(n):
    """Empty subsets, full ones, and more experts than int16 can number."""
    masks = torch.rand(5, n, generator=torch.Generator().manual_seed(0)) < 1 / min(n, 1000)
    masks[0], masks[1] = False, n < 100
    for rows in (slice(0, 5), slice(0, 1), slice(0, 0)):
        (found,) = RoutingRecord.of(masks[rows]).masks()
        assert torch.equal(found, masks[rows])
    if n > 1 << 15:
        sparse = LayerRecord.of(torch.arange(n) == torch.tensor([[n - 1], [0]]))
        assert (sparse.data.dtype, sparse.data.tolist()) == (torch.int32, [[n - 1], [0]])


def test_log_probabilities_are_left_out_where_there_are_none():
    routings = routings_of(cr.Exactly(2), 8)
    for record in (RoutingRecord.of(routings, log_probs=False), RoutingRecord.of([r.mask for r in routings])):
        assert record.log_probs is None
        assert "log_probs" not in repr(record)
        with pytest.raises(ValueError, match="log_probs is None: record Routings, not masks"):
            _ = record.path_log_prob


@pytest.mark.parametrize("unused", [-1, 12, 99])
def test_what_servers_report_is_recorded(unused):
    record = record_of()
    indices = [layer.masked_fill(layer < 0, unused) for layer in record.indices()]
    assert all(layer.shape == (T, 4) and (layer.diff() > 0).sum() > T for layer in indices)
    stacked = torch.stack(indices, dim=1).flip(-1).to(torch.int32)
    assert RoutingRecord.of_indices(stacked, 12, log_probs=record.log_probs) == record
    assert RoutingRecord.of_indices(indices, [12, 12, 12], log_probs=record.log_probs) == record


# ---------------------------------------------------------------------------------------------- minibatches


def test_rollouts_are_joined_and_taken_apart():
    records = [record_of(rows=rows) for rows in (5, 1, 9)] + [record_of()[:0]]
    # Their widest rows differ, and with them the form of what they store.
    records[1] = RoutingRecord([LayerRecord.of(layer.mask()) for layer in records[1].layers], records[1].log_probs)
    records.append(RoutingRecord.of(routings_of(cr.Exactly(1), 12)))
    whole = RoutingRecord.cat(records)
    assert len({layer.form for record in records for layer in record.layers}) > 1
    assert len(whole) == 15 + T
    assert whole.split([5, 1, 9, 0, T]) == records
    for i, mask in enumerate(whole.masks()):
        assert torch.equal(mask, torch.cat([record.masks()[i] for record in records]))


@pytest.mark.parametrize(
    "tokens", [slice(3, 20, 2), [4, 4, 0], torch.tensor([7, -1]), torch.arange(T) % 3 == 0, [], torch.zeros(0)]
)
def test_minibatches_are_gathered(tokens):
    record = record_of()
    at = torch.tensor([], dtype=torch.int64) if not isinstance(tokens, slice) and len(tokens) == 0 else tokens
    some = record[tokens]
    for found, whole in zip(some.masks(), record.masks(), strict=True):
        assert torch.equal(found, whole[at])
    assert torch.equal(some.path_log_prob, record.path_log_prob[at])


def test_records_are_equal_if_their_decisions_are():
    record = record_of()
    bits = RoutingRecord([LayerRecord(12, "bits", pack(mask)) for mask in record.masks()], record.log_probs)
    indices = RoutingRecord(
        [LayerRecord(12, "indices", indices_of(mask, 7).to(torch.int16)) for mask in record.masks()],
        record.log_probs,
    )
    assert record == bits == indices
    moved = record.masks()
    moved[2][4] = ~moved[2][4]
    others = [
        record[1:],
        RoutingRecord(record.layers),
        RoutingRecord(record.layers, record.log_probs + 1),
        RoutingRecord.of(moved),
        RoutingRecord(RoutingRecord.of(moved).layers, record.log_probs),
        RoutingRecord(record.layers[:2], record.log_probs[:, :2]),
        record.masks(),
    ]
    assert all(record != other for other in others)
    with pytest.raises(TypeError, match="unhashable"):
        hash(record)


# ---------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("record", [record_of(), record_of(cr.Exactly(3), 300), RoutingRecord(record_of().layers)])
def test_files_bring_records_back(record, tmp_path):
    record.save(tmp_path / "r.npz")
    again = RoutingRecord.load(str(tmp_path / "r.npz"))
    assert again == record
    assert [layer.form for layer in again.layers] == [layer.form for layer in record.layers]
    assert [path.name for path in tmp_path.iterdir()] == ["r.npz"]
    with np.load(tmp_path / "r.npz", allow_pickle=False) as archive:  # anyone can read it
        assert np.array_equal(archive["layer_1"], record.layers[1].data.numpy())


def test_others_can_read_a_file_by_what_the_page_says(tmp_path):
    record = RoutingRecord.cat([record_of(), record_of(cr.Exactly(1))])
    few = RoutingRecord.of([torch.eye(300, dtype=torch.bool)[:3] | (torch.arange(300) == 299)])
    for written, forms in ((record, ["bits"] * 3), (few, ["indices"])):
        written.save(tmp_path / "r.npz")
        data = (tmp_path / "r.npz").read_bytes()
        assert data.endswith(b"sha256 " + hashlib.sha256(data[:-64]).hexdigest().encode())
        with np.load(tmp_path / "r.npz", allow_pickle=False) as archive:
            header = json.loads(archive["header"].tobytes())
            experts = written.num_experts
            assert header == {
                "kind": "circuitroute routing record",
                "version": 1,
                "experts": list(experts),
                "forms": forms,
            }
            for i, mask in enumerate(written.masks()):
                rows = archive[f"layer_{i}"]
                if forms[i] == "bits":
                    chosen = [[e for e in range(experts[i]) if row[e // 8] >> e % 8 & 1] for row in rows]
                else:
                    chosen = [[int(e) for e in row if e < experts[i]] for row in rows]
                assert chosen == [row.nonzero().flatten().tolist() for row in mask]


def test_no_damage_goes_unnoticed(tmp_path):
    path = tmp_path / "r.npz"
    record_of(rows=4).save(path)
    sound = path.read_bytes()
    damaged = [sound[:i] + bytes([sound[i] ^ 1]) + sound[i + 1 :] for i in range(0, len(sound), 3)]
    for content in (*damaged, sound[:-1], sound[:100], sound + b"\n", b"", b"PK"):
        path.write_bytes(content)
        with pytest.raises(cr.CircuitFileError, match=r"r\.npz is not a readable .* its checksum is wrong"):
            RoutingRecord.load(path)


def test_a_hostile_record_takes_no_more_memory_than_its_file(tmp_path):
    """A valid checksum says nothing about who wrote a file: it may promise arrays that it does not hold."""
    path = tmp_path / "r.npz"
    header = np.frombuffer(json.dumps({"kind": files.KIND, "version": 1}).encode(), dtype=np.uint8)
    compressed = io.BytesIO()
    np.savez_compressed(compressed, header=header, layer_0=np.zeros((1 << 20, 8), dtype=np.uint8))
    with zipfile.ZipFile(compressed, "a") as archive:
        archive.comment = files.SEAL + b"0" * 64
    path.write_bytes(sealed(compressed.getvalue()[:-64]))
    with pytest.raises(cr.CircuitFileError, match="compressed"):
        RoutingRecord.load(path)
    promised = io.BytesIO()
    np.lib.format.write_array_header_1_0(promised, {"descr": "|u1", "fortran_order": False, "shape": (1 << 40,)})
    short = io.BytesIO()
    with zipfile.ZipFile(short, "w") as archive:
        archive.writestr("header.npy", promised.getvalue())
        archive.comment = files.SEAL + b"0" * 64
    path.write_bytes(sealed(short.getvalue()[:-64]))
    with pytest.raises(cr.CircuitFileError, match="not a readable routing record"):
        RoutingRecord.load(path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "r.npz"
    record = record_of()
    record.save(path)

    def fail(_):
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        record[:3].save(path)
    assert RoutingRecord.load(path) == record
    assert list(tmp_path.iterdir()) == [path]


def arrays_of(record, **changes):
    header = {"kind": files.KIND, "version": 1, "experts": [12], "forms": ["indices"], **changes}
    return {
        "layer_0": record.layers[0].data.numpy(),
        "header": np.frombuffer(json.dumps(header).encode(), dtype=np.uint8),
    }


def test_whatever_is_in_a_sealed_file_is_checked(tmp_path):
    """By someone who can compute a checksum."""
    path = tmp_path / "r.npz"
    record = record_of(cr.Exactly(1))
    sound = arrays_of(record)
    wrong = {
        "it is of kind 'model'": arrays_of(record, kind="model"),
        "it is of version 3, and this circuitroute reads versions 1 to 2: update it": arrays_of(record, version=3),
        "not a readable routing record: 'temperature'": arrays_of(record, version=2),
        "temperature=-1.0: must be positive": arrays_of(record, version=2, temperature=-1),
        "temperature='hot': expected a number": arrays_of(record, version=2, temperature="hot"),
        "layer_0 does not hold indices of 2 experts": arrays_of(record, experts=[2]),
        "layer_0 does not hold bits of 12 experts": arrays_of(record, forms=["bits"]),
        "form 'list'": arrays_of(record, forms=["list"]),
        "experts=0": arrays_of(record, experts=[0]),
        "argument": arrays_of(record, experts=[12, 12]),
        "it lacks the array 'header'": {"layer_0": sound["layer_0"]},
        "it lacks the array 'layer_0'": {"header": sound["header"]},
        "has shape": {**sound, "layer_0": sound["layer_0"][:, 0]},
        "does not hold indices": {**sound, "layer_0": sound["layer_0"].astype(np.int16) - 1},
        "log_probs has shape": {**sound, "log_probs": np.zeros(3, dtype=np.float32)},
        "Object arrays cannot be loaded": {**sound, "layer_0": np.array([[object()]])},
    }
    path.write_bytes(files.sealed_archive(sound))
    assert RoutingRecord.load(path) == RoutingRecord(record.layers[:1])
    for message, arrays in wrong.items():
        path.write_bytes(files.sealed_archive(arrays))
        with pytest.raises(cr.CircuitFileError, match=message):
            RoutingRecord.load(path)
    plain = io.BytesIO()
    np.savez(plain, **sound)
    path.write_bytes(plain.getvalue())
    with pytest.raises(cr.CircuitFileError, match="checksum is wrong or missing"):
        RoutingRecord.load(path)
    array = io.BytesIO()
    np.save(array, sound["layer_0"])
    path.write_bytes(sealed(array.getvalue()))
    with pytest.raises(cr.CircuitFileError, match="it is not an archive"):
        RoutingRecord.load(path)
    with pytest.raises(FileNotFoundError):
        RoutingRecord.load(tmp_path / "none.npz")


# ---------------------------------------------------------------------------------------------- replay and ratios


def policy(logits, circuit):
    """Every allowed subset [M, N], and its exact log-probability [T, M] in float64."""
    subsets = circuit(logits[:1]).enumerate_support()[:, 0].double()
    return subsets, (logits.double() @ subsets.t()).log_softmax(-1)


@pytest.mark.parametrize("constraint", [cr.Between(1, 3), cr.ActiveGroups(cr.Groups(4), at_most=2) & cr.AtLeast(1)])
def test_replay_gives_the_exact_ratio_of_the_same_decisions(constraint):
    """Rolled out in bfloat16, trained in float32: against enumeration, with its gradient S - m."""
    circuit = cr.compile(constraint, 8).with_engine("torch")
    served = [logits_of(8, i).bfloat16().float() for i in range(2)]
    record = RoutingRecord.of([cr.route(x, circuit, key=cr.random_key(5, torch.arange(T))) for x in served])
    trained = [(logits_of(8, i) * 1.1).requires_grad_() for i in range(2)]
    routings = [
        cr.route(x, circuit, estimator="none", replay=mask) for x, mask in zip(trained, record.masks(), strict=True)
    ]
    assert mismatch(record, routings).subsets == 0
    ratio = importance_ratio(path_log_prob(routings), record.path_log_prob)

    log_ratio = torch.zeros(T, dtype=torch.float64)
    for old, new, mask in zip(served, trained, record.masks(), strict=True):
        subsets = policy(old, circuit)[0]
        chosen = (mask.double() @ subsets.t() + (~mask).double() @ (1 - subsets).t()).argmax(-1, keepdim=True)
        moved = policy(new.detach(), circuit)[1] - policy(old, circuit)[1]
        log_ratio += moved.gather(1, chosen)[:, 0]
    torch.testing.assert_close(ratio.double(), log_ratio.exp(), rtol=2e-6, atol=0)
    assert ratio.std() > 0.05

    gradients = torch.autograd.grad(ratio.sum(), trained)
    for gradient, new, mask in zip(gradients, trained, record.masks(), strict=True):
        subsets, log_probs = policy(new.detach(), circuit)
        expected = ratio[:, None].detach() * (mask.double() - log_probs.exp() @ subsets)
        torch.testing.assert_close(gradient, expected.float(), rtol=1e-4, atol=1e-5)


def test_ratios_average_to_one_over_all_decisions():
    """E_old[p_new / p_old] = 1: every subset is replayed, and weighted with its old probability."""
    circuit = cr.compile(cr.Between(1, 3), 6).with_engine("torch")
    old, new = logits_of(6, 0, 1), logits_of(6, 1, 1)
    subsets = circuit(old).enumerate_support()[:, 0].bool()
    before, after = (cr.route(x.expand(len(subsets), -1), circuit, replay=subsets).log_prob for x in (old, new))
    ratio = importance_ratio(after, before)
    assert float((before.exp() * ratio).sum()) == pytest.approx(1, abs=1e-5)
    assert ratio.max() > 5


def test_sums_over_many_layers_keep_their_difference():
    """In float32, half the digits of a ratio would be lost in a sum of sixty log-probabilities."""
    routings = routings_of(cr.Exactly(8), 64, layers=60)
    old = path_log_prob(routings) + 1e-6
    ratio = importance_ratio(path_log_prob(routings), old)
    assert path_log_prob(routings).mean() < -500
    torch.testing.assert_close(ratio, torch.full((T,), 1 - 1e-6), rtol=1e-7, atol=0)


def test_ratios_are_clipped_without_gradient():
    new = torch.tensor([-1000.0, -1.1, -1.0, -0.9, 1000.0, -math.inf], requires_grad=True)
    old = torch.full((6,), -1.0, requires_grad=True)
    ratio = importance_ratio(new, old, clip=(0.5, 2.0))
    torch.testing.assert_close(ratio, torch.tensor([0.5, math.exp(-0.1), 1, math.exp(0.1), 2, 0.5]))
    assert importance_ratio(new, old, clip=(0, 2.0))[0] == 0
    assert importance_ratio(new[-1:], old[-1:])[0] == 0
    ratio.sum().backward()
    torch.testing.assert_close(new.grad, torch.tensor([0, math.exp(-0.1), 1, math.exp(0.1), 0, 0]))
    assert old.grad is None


# ---------------------------------------------------------------------------------------------- mismatch


def test_mismatch_counts_subsets_slots_and_tokens():
    a = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    b = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]]).bool()
    found = mismatch([a, a], [b, a])
    assert (found.subsets, found.slots, found.tokens) == (2 / 8, 3 / 21, 2 / 4)
    assert mismatch([a, a], [a, a]) == cr.replay.Mismatch(0.0, 0.0, 0.0)
    assert mismatch(a, RoutingRecord.of(b)).subsets == 2 / 4
    assert mismatch(a[:0], b[:0]) == mismatch(a[3:], b[3:]) == cr.replay.Mismatch(0.0, 0.0, 0.0)
    routings = routings_of(cr.Exactly(2), 8)
    assert mismatch(routings, RoutingRecord.of(routings)) == cr.replay.Mismatch(0.0, 0.0, 0.0)


# ---------------------------------------------------------------------------------------------- errors

RECORD = record_of()
MASK = torch.eye(4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: RoutingRecord([]), ValueError, "layers is empty"),
        (lambda: RoutingRecord([*RECORD.layers, RECORD[:3].layers[0]]), ValueError, r"layers have \[30, 30, 30, 3\]"),
        (lambda: RoutingRecord(RECORD.layers, torch.zeros(T)), ValueError, r"log_probs has shape \(30,\): .*\(30, 3\)"),
        (lambda: RoutingRecord.of([]), ValueError, "layers is empty"),
        (lambda: RoutingRecord.of(["mask"]), TypeError, r"decisions\[0\] is a str: expected a Routing or a mask"),
        (lambda: RoutingRecord.of([MASK, MASK.float()]), ValueError, r"decisions\[1\] has .*float32"),
        (lambda: RoutingRecord.of(MASK[0]), ValueError, r"shape \(4,\)"),
        (lambda: RoutingRecord.of_indices(torch.zeros(3, 2).long(), 4), ValueError, r"indices has shape \(3, 2\)"),
        (lambda: RoutingRecord.of_indices([torch.zeros(3).long()], 4), ValueError, r"indices\[0\] has shape \(3,\)"),
        (
            lambda: RoutingRecord.of_indices([torch.zeros(3, 1)], 4),
            TypeError,
            r"indices\[0\] is not a tensor of integers",
        ),
        (lambda: RoutingRecord.of_indices([[1, 2]], 4), TypeError, r"indices\[0\] is not a tensor of integers"),
        (lambda: RoutingRecord.of_indices([torch.zeros(3, 2).long()], 4), ValueError, "names an expert twice in row"),
        (lambda: RoutingRecord.of_indices([torch.zeros(3, 1).long()], [4, 4]), ValueError, "num_experts has 2 entries"),
        (lambda: RoutingRecord.of_indices([torch.zeros(3, 1).long()], 0), ValueError, "num_experts=0"),
        (lambda: RoutingRecord.cat([]), ValueError, "records is empty"),
        (lambda: RoutingRecord.cat([RECORD, record_of(n=13)]), ValueError, r"\(12, 12, 12\), \(13, 13, 13\)"),
        (lambda: RoutingRecord.cat([RECORD, RoutingRecord(RECORD.layers)]), ValueError, "others do not"),
        (lambda: RECORD.split([1, 2]), ValueError, "lengths add up to 3: the record has 30 tokens"),
        (lambda: RECORD.split([31, -1]), ValueError, r"lengths\[1\]=-1"),
        (lambda: RECORD[3], IndexError, r"record\[3\]: give a slice"),
        (lambda: RECORD[[0.5]], IndexError, "give a slice"),
        (lambda: RECORD[torch.ones(2, dtype=torch.bool)], IndexError, "mask"),
        (lambda: mismatch(MASK, MASK[1:]), ValueError, r"a has masks of shapes \[\(4, 4\)\] and b \[\(3, 4\)\]"),
        (lambda: mismatch([], MASK), ValueError, "a is empty"),
        (lambda: mismatch(3, MASK), TypeError, "a is a int: expected a Routing or a mask"),
        (lambda: path_log_prob([]), ValueError, r"routings have \[\] tokens"),
        (
            lambda: path_log_prob([routings_of(cr.Exactly(1), 4, rows=r)[0] for r in (2, 3)]),
            ValueError,
            r"routings have \[2, 3\] tokens",
        ),
        (lambda: importance_ratio(torch.zeros(2), torch.zeros(2, 1)), ValueError, r"\(2,\) and old_log_prob \(2, 1\)"),
        (lambda: importance_ratio(torch.zeros(1), torch.tensor([-math.inf])), ValueError, "old_log_prob is not finite"),
        (lambda: importance_ratio(torch.zeros(1), torch.zeros(1), clip=(2, 1)), ValueError, r"clip=\(2, 1\)"),
        (lambda: importance_ratio(torch.zeros(1), torch.zeros(1), clip=(-1, 1)), ValueError, r"clip=\(-1, 1\)"),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_decisions_without_a_probability_are_recorded_as_masks():
    class Soft(cr.Routing):
        @property
        def log_prob(self):
            raise AttributeError("nothing was drawn")

    routing = routings_of(cr.Exactly(2), 8)[0]
    soft = Soft(routing.distribution, routing.mask, routing.gates)
    with pytest.raises(AttributeError, match="nothing was drawn"):
        RoutingRecord.of(soft)
    assert RoutingRecord.of(soft, log_probs=False) == RoutingRecord.of(routing.mask)


# ---------------------------------------------------------------------------------------------- the example


def test_the_example_shows_what_it_says(capsys):
    found = runpy.run_path(str(ROOT / "examples" / "replay.py"))["main"](tokens=32)
    assert found["route again"] > 0.5
    assert found["replay"] == 0
    assert found["lowest ratio"] < 1 < found["highest ratio"]
    assert found["mean ratio"] == pytest.approx(1, abs=0.02)
    assert found["reward after"] > found["reward before"]
    assert "| replay                       |    0.0% |" in capsys.readouterr().out


def test_masks_for_checks_every_layer_before_any_replays():
    circuits = [cr.compile(cr.Exactly(2), 5), cr.compile(cr.Between(1, 2), 4)]
    record = RoutingRecord.of([cr.route(torch.randn(6, circuit.n), circuit, key=1) for circuit in circuits])
    masks = masks_for(record, circuits, [1.0, 1.0])
    assert all(a.equal(b) for a, b in zip(masks, record.masks(), strict=True))
    with pytest.raises(TypeError, match="record is a list"):
        masks_for(masks, circuits, [1.0, 1.0])
    with pytest.raises(ValueError, match=r"layers of \[5, 4\] experts, and the model's routers \[5\]"):
        masks_for(record, circuits[:1], [1.0])
    with pytest.raises(ValueError, match=r"layer 1 decides at 0\.5"):
        masks_for(record, circuits, [1.0, 0.5])
    masks[1][3] = True
    with pytest.raises(ValueError, match=r"layer 1 has subsets that Between\(1, 2\) forbids, in row 3"):
        masks_for(RoutingRecord.of(masks), circuits, [1.0, 1.0])


# ---------------------------------------------------------------------------------------------- what servers report


INDICES = torch.tensor([[[3, 1, 0], [0, 2, 2]], [[2, 2, 2], [1, 0, 3]], [[-1, 4, 99], [3, -1, 3]]])
WEIGHTS = torch.tensor(
    [[[0.5, 0.0, 0.5], [1.0, 0.0, 0.2]], [[0.0, 0.7, 0.0], [0.1, 0.2, 0.7]], [[1.0, 1.0, 1.0], [-0.0, 1.0, 9.0]]]
)
CHOSEN = [[[0, 3], [0, 2]], [[2], [0, 1, 3]], [[], [3]]]


def chosen_of(record):
    return [[mask[t].nonzero().flatten().tolist() for mask in record.masks()] for t in range(len(record))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float32])
def test_slots_of_weight_0_are_unused(dtype):
    """Whatever expert stands there, one that another slot names too; slots of no expert may hold any weight."""
    weights = WEIGHTS.to(dtype)
    strange = weights.clone()
    strange[2, 0], strange[2, 1, 1] = torch.tensor([math.nan, -1.0, math.inf], dtype=dtype), -math.inf
    for given in (weights, strange, strange.transpose(0, 1).contiguous().transpose(0, 1)):
        assert chosen_of(RoutingRecord.of_indices(INDICES, 4, given)) == CHOSEN
    layers = [RoutingRecord.of_indices(INDICES[:, i : i + 1], [4], weights[:, i : i + 1]) for i in range(2)]
    assert [[chosen_of(layer)[t][0] for layer in layers] for t in range(3)] == CHOSEN
    by_layer = RoutingRecord.of_indices(list(INDICES.unbind(1)), [4, 4], weights=list(weights.unbind(1)))
    assert chosen_of(by_layer) == CHOSEN
    assert chosen_of(RoutingRecord.of_indices(INDICES.int(), 4, weights=weights > 0)) == CHOSEN
    assert by_layer == RoutingRecord.of_indices(INDICES.to(torch.int16), 4, weights * 1000)


def test_what_a_serving_function_reports_is_what_it_decided():
    """Distinct experts of weight 0 fill its unused slots."""
    circuit = cr.compile(cr.Between(1, 4), 12)
    routings = [cr.route(logits_of(12, i), circuit, training=False) for i in range(2)]
    weights, indices = (torch.stack(part, 1) for part in zip(*(r.padded(width=6) for r in routings), strict=True))
    assert int((weights == 0).sum()) > T
    assert RoutingRecord.of_indices(indices, 12, weights).masks()[0].equal(routings[0].mask)
    assert RoutingRecord.of_indices(indices, 12, weights) == RoutingRecord.of(routings, log_probs=False)


@pytest.mark.parametrize("shape", [(0, 2, 3), (1, 1, 1), (5, 3, 0)])
def test_reports_of_any_size(shape):
    record = RoutingRecord.of_indices(torch.zeros(shape, dtype=torch.int64), 1, torch.ones(shape))
    assert (len(record), len(record.layers)) == shape[:2]
    assert all(bool((mask == (shape[2] > 0)).all()) for mask in record.masks())


def bad_weights(layer, row, slot, value):
    weights = WEIGHTS.clone()
    weights[row, layer, slot] = value
    return weights


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (INDICES, 4, bad_weights(1, 0, 0, math.nan)),
            ValueError,
            r"weights\[1\] holds nan in row 0: weights are finite",
        ),
        ((INDICES, 4, bad_weights(0, 1, 1, -0.5)), ValueError, r"weights\[0\] holds -0\.5 in row 1: .*; give weight 0"),
        ((INDICES, 4, bad_weights(0, 1, 1, math.inf)), ValueError, r"weights\[0\] holds inf in row 1"),
        ((INDICES, 4, bad_weights(1, 2, 0, 1.0)), ValueError, r"indices\[1\] names an expert twice in row 2$"),
        (
            (INDICES, 4),
            ValueError,
            r"indices\[0\] names an expert twice in row 1; where unused slots repeat one, give -1",
        ),
        ((INDICES, 4, WEIGHTS[..., :2]), ValueError, r"weights\[0\] has shape \(3, 2\): .* slot of indices, \(3, 3\)"),
        ((INDICES, 4, WEIGHTS[:2]), ValueError, r"weights\[0\] has shape \(2, 3\)"),
        ((INDICES, 4, WEIGHTS[:, :1]), ValueError, "weights has 1 layers: expected those of indices, 2"),
        ((INDICES, 4, torch.zeros(3, 2)), ValueError, r"weights has shape \(3, 2\): .* handed over as log_probs="),
        ((INDICES, 4, 0.5), TypeError, "weights is a float: expected a tensor"),
        ((INDICES, 4, [WEIGHTS[:, 0].tolist()] * 2), TypeError, r"weights\[0\]=.*expected a tensor"),
        ((INDICES, 4, WEIGHTS + 0j), TypeError, r"weights\[0\] has dtype torch.complex64"),
        (("indices", 4), TypeError, "indices is a str: expected a tensor"),
        ((INDICES, 4, WEIGHTS, [1.0]), TypeError, r"log_probs=\[1\.0\]: expected a tensor"),
        ((INDICES, 4, WEIGHTS, torch.zeros(3, 2).long()), TypeError, "log_probs has dtype torch.int64"),
    ],
)
def test_reports_that_make_no_sense_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        RoutingRecord.of_indices(*arguments)


def test_reports_may_say_whose_they_are():
    record = RoutingRecord.of_indices(
        INDICES, 4, WEIGHTS, torch.zeros(3, 2), temperature=0.5, constraints=[cr.AtMost(3), None], model="m"
    )
    assert (record.temperature, record.constraints, record.model) == (0.5, ("AtMost(3)", None), "m")
    assert record.log_probs.equal(torch.zeros(3, 2))


# ---------------------------------------------------------------------------------------------- router logits


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("shape", [(15,), (3, 5), (1, 15)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_modes_of_router_logits(shape, dtype, temperature):
    """Against top-k, and the exact log-probability of enumeration."""
    logits = [logits_of(6, i, 15).to(dtype) for i in range(2)]
    given = tuple(x.reshape(*shape, 6).requires_grad_() for x in logits)
    record = RoutingRecord.of_router_logits(given, cr.Exactly(2), temperature, model="m")
    assert (record.temperature, record.constraints, record.model) == (temperature, ("Exactly(2)",) * 2, "m")
    for i, (x, mask) in enumerate(zip(logits, record.masks(), strict=True)):
        assert mask.equal(torch.zeros(15, 6).bool().scatter(1, x.topk(2).indices, True))
        subsets, log_probs = policy(x.double() / temperature, cr.compile(cr.Exactly(2), 6))
        at = (mask.double() @ subsets.t()).argmax(-1, keepdim=True)
        torch.testing.assert_close(record.log_probs[:, i].double(), log_probs.gather(1, at)[:, 0], rtol=1e-5, atol=1e-5)
    assert RoutingRecord.of_router_logits(given, cr.Exactly(2), log_probs=False) == RoutingRecord(
        RoutingRecord.of(record.masks()).layers
    )


def test_modes_of_layers_that_differ():
    rules = [cr.Between(1, 3), cr.compile(cr.ActiveGroups(cr.Groups(4), at_most=1) & cr.Exactly(2), 8)]
    logits = (logits_of(5, 0), logits_of(8, 1))
    logits[0][3, 2], logits[0][4, 1] = math.inf, -math.inf
    record = RoutingRecord.of_router_logits(logits, rules)
    decided = [cr.route(x, cr.compile(r, x.shape[1]), training=False) for x, r in zip(logits, rules, strict=True)]
    assert record == RoutingRecord.of(decided)
    assert record.constraints == RoutingRecord.of(decided).constraints
    assert bool(record.masks()[0][3, 2])
    assert RoutingRecord.of_router_logits(logits[0], rules[0]).masks()[0].equal(decided[0].mask)
    assert len(RoutingRecord.of_router_logits([torch.zeros(0, 4)], cr.Exactly(1))) == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (((), cr.Exactly(1)), ValueError, "router_logits is empty: call the model with output_router_logits=True"),
        ((None, cr.Exactly(1)), TypeError, "router_logits=None: expected a tensor"),
        (([None], cr.Exactly(1)), TypeError, r"router_logits\[0\]=None: expected a tensor"),
        (([torch.zeros(2, 4).long()], cr.Exactly(1)), TypeError, r"router_logits\[0\] has dtype torch.int64"),
        (
            ([torch.zeros(4)], cr.Exactly(1)),
            ValueError,
            r"router_logits\[0\] has shape \(4,\): expected \[tokens, experts",
        ),
        (([torch.zeros(2, 4), torch.zeros(3, 4)], cr.Exactly(1)), ValueError, r"router_logits are of \[2, 3\] tokens"),
        (([torch.zeros(2, 4)], [cr.Exactly(1)] * 2), ValueError, "constraint has 2 entries: .* router_logits, 1"),
        (([torch.zeros(2, 4)], 3), TypeError, "constraint=3: expected a constraint or circuit"),
        (([torch.zeros(2, 4)], ["Exactly(1)"]), cr.UnsupportedConstraintError, "Exactly"),
        (
            ([torch.zeros(2, 4)], cr.compile(cr.Exactly(1), 5)),
            ValueError,
            r"router_logits\[0\] is over 4 experts: expected 5",
        ),
        (([torch.zeros(2, 4)], cr.Exactly(5)), cr.InfeasibleError, "Exactly"),
        (([torch.full((2, 4), math.nan)], cr.Exactly(1)), ValueError, r"router_logits\[0\]: .*NaN"),
        (([torch.full((2, 4), -math.inf)], cr.Exactly(1)), ValueError, r"router_logits\[0\]: .*row"),
        (([torch.zeros(2, 4)], cr.Exactly(1), 0.0), ValueError, "temperature=0.0"),
    ],
)
def test_router_logits_that_make_no_sense_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        RoutingRecord.of_router_logits(*arguments)


# ---------------------------------------------------------------------------------------------- whose it is


class Parity(cr.Constraint):
    """One of a user's own, whose repr is an address."""

    def leaf(self, var):
        return 0, 1

    def merge(self, left, right):
        return (left + right) % 2

    def accepts(self, state):
        return state == 1

    __repr__ = object.__repr__


def test_a_record_keeps_constraints_and_model(tmp_path):
    record = RoutingRecord.of(routings_of(cr.Between(1, 4), 12), model="policy 7")
    assert (record.constraints, record.model) == (("Between(1, 4)",) * 3, "policy 7")
    assert repr(record).endswith(", of model 'policy 7')")
    record.save(tmp_path / "r.npz")
    with np.load(tmp_path / "r.npz", allow_pickle=False) as archive:  # what older readers look at is what it was
        assert json.loads(archive["header"].tobytes())["version"] == 1
    read = RoutingRecord.load(tmp_path / "r.npz")
    for some in (read, record[3:5], record[[0]], *record.split([10, 20]), RoutingRecord.cat([record, record[:2]])):
        assert (some.constraints, some.model) == (record.constraints, "policy 7")
    assert RoutingRecord.of(record.masks()).constraints is None
    assert RoutingRecord.of(routings_of(cr.Exactly(1), 4)[0]).constraints == ("Exactly(1)",)
    long = cr.Cost(range(1000), at_most=3)
    kept = RoutingRecord(record.layers[:1], constraints=[long]).constraints[0]
    assert len(kept) < 300
    assert kept != RoutingRecord(record.layers[:1], constraints=[cr.Cost(range(1000), at_most=4)]).constraints[0]
    assert RoutingRecord(record.layers[:1], constraints=[Parity()]).constraints is None


def test_joined_records_know_what_all_of_them_know():
    first, second = (RoutingRecord.of(routings_of(rule, 12), model="m") for rule in (cr.AtMost(3), cr.Exactly(2)))
    assert RoutingRecord.cat([first, second]).constraints is None
    mixed = RoutingRecord(second.layers, second.log_probs, constraints=["AtMost(3)", "other", None])
    joined = RoutingRecord.cat([first, mixed])
    assert (joined.constraints, joined.model) == (("AtMost(3)", None, None), None)
    with pytest.raises(ValueError, match=r"records are of models \['m', 'n'\]"):
        RoutingRecord.cat([first, RoutingRecord(first.layers, first.log_probs, model="n")])


def test_records_of_others_are_not_replayed():
    circuit, other = (cr.compile(rule, 12) for rule in (cr.Between(1, 4), cr.Between(0, 4)))
    record = RoutingRecord.of(routings_of(cr.Between(1, 4), 12), model="a")
    assert (
        len(masks_for(record, [circuit] * 3, [1.0] * 3, "a")) == len(masks_for(record, [circuit] * 3, [1.0] * 3)) == 3
    )
    with pytest.raises(ValueError, match="record is of model 'a', and is to be replayed by 'b'"):
        masks_for(record, [circuit] * 3, [1.0] * 3, model="b")
    with pytest.raises(TypeError, match="model=3: expected a text"):
        masks_for(record, [circuit] * 3, [1.0] * 3, model=3)
    with pytest.raises(ValueError, match=r"layer 2 was decided under Between\(1, 4\), and .* under Between\(0, 4\)"):
        masks_for(record, [circuit, circuit, other], [1.0] * 3)
    with pytest.raises(ValueError, match="temperatures has 2 entries: expected one per layer, 3"):
        masks_for(record, [circuit] * 3, [1.0] * 2)
    unknown = RoutingRecord(record.layers)
    assert len(masks_for(unknown, [other] * 3, [1.0] * 3, "b")) == 3
    single = RoutingRecord.of(routings_of(cr.Between(1, 4), 12)[0])
    assert cr.route(logits_of(12, 0), circuit, replay=single).mask.equal(single.masks()[0])
    with pytest.raises(ValueError, match="was decided under"):
        cr.route(logits_of(12, 0), other, replay=single)
    assert cr.route(logits_of(12, 0), other, replay=RoutingRecord(single.layers)).mask.equal(single.masks()[0])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"constraints": ["a"]}, ValueError, "constraints has 1 entries: expected one per layer, 3"),
        ({"constraints": "abc"}, TypeError, "constraints='abc': expected one constraint"),
        ({"constraints": [1, None, None]}, TypeError, r"constraints\[0\]=1: expected a constraint"),
        ({"model": 7}, TypeError, "model=7: expected a text"),
    ],
)
def test_what_is_told_of_a_record_is_checked(options, error, message):
    with pytest.raises(error, match=message):
        RoutingRecord(RECORD.layers, **options)


def test_what_a_file_tells_of_a_record_is_checked(tmp_path):
    record = record_of(cr.Exactly(1))
    for origin, message in {
        b"{}": "'constraints'",
        b"[1]": "list indices",
        b"{": "not a readable routing record",
        b'{"constraints": ["a", "b"], "model": null}': "constraints has 2 entries",
        b'{"constraints": null, "model": 3}': "model=3",
    }.items():
        arrays = arrays_of(record) | {"origin": np.frombuffer(origin, dtype=np.uint8)}
        (tmp_path / "r.npz").write_bytes(files.sealed_archive(arrays))
        with pytest.raises(cr.CircuitFileError, match=message):
            RoutingRecord.load(tmp_path / "r.npz")


# ---------------------------------------------------------------------------------------------- truncated ratios


def replayed_pair(layers=3):
    """Exact log-probabilities of the same decisions under two policies, [T, L] float64, the first with gradients."""
    circuit = cr.compile(cr.Between(1, 3), 8).with_engine("torch")
    record = RoutingRecord.of(
        [cr.route(logits_of(8, i), circuit, key=cr.random_key(i, torch.arange(T))) for i in range(layers)]
    )
    leaf = torch.stack([logits_of(8, i) + logits_of(8, 9 + i) / 4 for i in range(layers)]).requires_grad_()
    routings = [cr.route(x, circuit, replay=mask) for x, mask in zip(leaf, record.masks(), strict=True)]
    return log_probs(routings), record.log_probs


def test_log_probs_are_those_of_every_layer():
    new, old = replayed_pair()
    assert (new.shape, new.dtype, new.requires_grad) == ((T, 3), torch.float64, True)
    routings = routings_of(cr.Exactly(2), 8)
    assert log_probs(routings).equal(torch.stack([r.log_prob.double() for r in routings], 1))
    assert log_probs(routings).sum(1).equal(path_log_prob(routings))
    assert log_probs(routings).float().equal(RoutingRecord.of(routings).log_probs)
    assert importance_ratio(new, old).shape == (T, 3)


def test_truncated_ratios_are_what_they_say():
    new, old = replayed_pair()
    ratios = (new - old.double()).exp().detach()
    path = ratios.prod(1)
    assert float(path.min()) < 0.5 < 2 < float(path.max())

    def found(**options):
        weight = truncated_ratio(new, old, **options)
        assert (weight.dtype, weight.requires_grad, weight.shape) == (torch.float32, False, (T,))
        return weight.double()

    def same(a, b):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)

    same(found(), path.clamp(max=2))
    same(found(low=0.5, high=1.5), path.clamp(0.5, 1.5))
    same(found(high=math.inf), path)
    same(found(per="layer", low=0.8, high=1.2), ratios.clamp(0.8, 1.2).prod(1))
    inside = (path >= 0.5) & (path <= 2)
    same(found(low=0.5, outside="zero"), path * inside)
    same(found(low=0.5, outside="zero", per="layer"), (ratios * ((ratios >= 0.5) & (ratios <= 2))).prod(1))
    shift = (-(new - old.double()).abs().mean(1)).exp().detach()
    same(router_shift(new, old).double(), shift)
    same(router_shift(new, old, floor=0.9).double(), shift.clamp(min=0.9))
    assert not router_shift(new, old).requires_grad
    assert router_shift(old, old).equal(torch.ones(T))


def test_a_truncated_ratio_is_biased_by_what_it_cuts_and_no_more():
    """E_old[min(r, C)] = sum min(p_new, C p_old), against enumeration."""
    circuit = cr.compile(cr.Between(1, 3), 6).with_engine("torch")
    old, new = logits_of(6, 0, 1), logits_of(6, 1, 1)
    subsets = circuit(old).enumerate_support()[:, 0].bool()
    before, after = (cr.route(x.expand(len(subsets), -1), circuit, replay=subsets).log_prob for x in (old, new))
    weight = truncated_ratio(after[:, None], before[:, None], high=1.5)
    expected = torch.minimum(after.exp(), 1.5 * before.exp()).sum()
    torch.testing.assert_close((before.exp() * weight).sum(), expected.detach(), rtol=1e-5, atol=0)
    assert expected < 0.9


@pytest.mark.parametrize("outside", ["clamp", "zero"])
def test_extreme_ratios_stay_bounded(outside):
    new = torch.tensor([[-1000.0, 0.0], [1000.0, 0.0], [-math.inf, 0.0], [1000.0, -1000.0], [math.nan, 0.0]])
    old = torch.zeros(5, 2)
    path = truncated_ratio(new, old, outside=outside, high=2)
    top = 2.0 if outside == "clamp" else 0.0
    assert path[:4].tolist() == [0.0, top, 0.0, 1.0]
    assert path[4].isnan()
    assert truncated_ratio(new, old, outside=outside, per="layer", low=0.5, high=2)[:4].tolist() == (
        [0.5, 2.0, 0.5, 1.0] if outside == "clamp" else [0.0, 0.0, 0.0, 0.0]
    )
    assert router_shift(new, old, floor=0.25)[:4].tolist() == [0.25] * 4
    assert truncated_ratio(new[:0], old[:0], outside=outside).shape == (0,)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"per": "token"}, ValueError, "per='token': choose one of 'path', 'layer'"),
        ({"outside": "drop"}, ValueError, "outside='drop': choose one of 'clamp', 'zero'"),
        ({"low": 2.0}, ValueError, r"low=2\.0 and high=2\.0: expected 0 <= low < high"),
        ({"low": -1}, ValueError, r"low=-1\.0"),
        ({"high": math.nan}, ValueError, "high=nan"),
        ({"high": "2"}, TypeError, "high='2': expected a number"),
    ],
)
def test_bounds_of_ratios_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        truncated_ratio(torch.zeros(2, 3), torch.zeros(2, 3), **options)


@pytest.mark.parametrize("ratio", [truncated_ratio, router_shift])
def test_log_probs_of_ratios_are_checked(ratio):
    for new, old, error, message in [
        (torch.zeros(2), torch.zeros(2), ValueError, r"new_log_probs has shape \(2,\): expected \[tokens, layers\]"),
        (torch.zeros(2, 0), torch.zeros(2, 0), ValueError, r"new_log_probs has shape \(2, 0\)"),
        (torch.zeros(2, 3), torch.zeros(2, 4), ValueError, r"\(2, 3\) and old_log_probs \(2, 4\)"),
        (torch.zeros(2, 3), torch.full((2, 3), -math.inf), ValueError, "old_log_probs is not finite"),
        (torch.zeros(2, 3), None, TypeError, "old_log_probs=None: expected a tensor"),
        (torch.zeros(2, 3).long(), torch.zeros(2, 3), TypeError, "new_log_probs has dtype torch.int64"),
    ]:
        with pytest.raises(error, match=message):
            ratio(new, old)
    with pytest.raises(ValueError, match=r"floor=2\.0: must lie in 0\.\.1"):
        router_shift(torch.zeros(2, 3), torch.zeros(2, 3), floor=2)
