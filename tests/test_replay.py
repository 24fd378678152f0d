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
    masks_for,
    mismatch,
    path_log_prob,
)
from tests.record_cases import T, arrays_of, logits_of, policy, record_of, routings_of

ROOT = Path(__file__).parent.parent


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
