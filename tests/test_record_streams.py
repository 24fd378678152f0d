"""Streams of records: what was written comes back, in any pieces; damage and interruptions are told, none is silent."""

import errno
import hashlib
import json
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from circuitroute.replay import LayerRecord, RecordFile, RecordWriter, RoutingRecord, masks_for
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import circuitroute as cr
from circuitroute.routing.records import frames
from circuitroute.routing.records.layers import indices_of

ROOT = Path(__file__).parent.parent
EXPERTS = (12, 300, 5)


def record_of(tokens, seed=0, experts=EXPERTS, log_probs=True, **told):
    """Counts that vary, and a layer that chooses nobody."""
    generator = torch.Generator().manual_seed(seed)
    masks = [torch.rand(tokens, n, generator=generator) < 2 / n for n in experts]
    masks[-1][:] = False
    record = RoutingRecord.of(masks)
    known = torch.randn(tokens, len(experts), generator=generator) if log_probs else None
    return RoutingRecord(record.layers, known, **told)


def written(path, records, **options):
    with RecordWriter(path, **options) as writer:
        for record in records:
            writer.append(record)
    return path


# ---------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("log_probs", [True, False])
@pytest.mark.parametrize("tokens_per_chunk", [1, 7, 64, 1000])
def test_what_is_written_comes_back(tmp_path, tokens_per_chunk, log_probs):
    told = {"temperature": 0.5, "constraints": [cr.AtMost(9), None, "mine"], "model": "policy 3"}
    records = [record_of(n, i, log_probs=log_probs, **told) for i, n in enumerate((5, 0, 1, 90, 33))]
    whole = RoutingRecord.cat(records)
    path = written(tmp_path / "r", records, tokens_per_chunk=tokens_per_chunk)
    assert [x.name for x in tmp_path.iterdir()] == ["r"]
    with RecordFile(path) as file:
        assert (len(file), file.num_experts, file.has_log_probs, file.complete) == (129, EXPERTS, log_probs, True)
        assert (file.temperature, file.constraints, file.model) == (0.5, ("AtMost(9)", None, "mine"), "policy 3")
        read = file[:]
        assert read == whole
        assert (read.temperature, read.constraints, read.model) == (0.5, ("AtMost(9)", None, "mine"), "policy 3")
        assert all(layer.data.is_contiguous() for layer in read.layers)
        assert file.bytes_per_token == path.stat().st_size / 129
        file.verify()
    assert read == whole  # copies, which outlive the file


@pytest.mark.parametrize(
    "tokens",
    [
        slice(None), slice(3, 20), slice(63, 65), slice(5, 5), slice(-7, None), slice(100, 20, -3), slice(90, 1000),
        [4, 4, 0, 128, -1, 64, 7], [], torch.arange(129) % 3 == 0, torch.randperm(129), torch.zeros(129).bool(),
        np.array([1, 100, 2]), [7, 8, 9, 10],
    ],
)  # fmt: skip
def test_any_tokens_are_read(tmp_path, tokens):
    whole = record_of(129)
    file = RecordFile(written(tmp_path / "r", [whole], tokens_per_chunk=16))
    at = torch.arange(129).numpy()[tokens] if isinstance(tokens, slice) else tokens
    expected = whole[torch.as_tensor(at.copy() if isinstance(at, np.ndarray) else at)]
    assert file[tokens] == expected
    file.close()


@pytest.mark.parametrize("size", [1, 16, 50, 129, 1000])
def test_batches_are_all_tokens_in_order(tmp_path, size):
    whole = record_of(129)
    file = RecordFile(written(tmp_path / "r", [whole], tokens_per_chunk=16))
    batches = list(file.batches(size))
    assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)
    assert RoutingRecord.cat(batches) == whole


def test_tokens_one_at_a_time_are_written_in_chunks(tmp_path):
    """As a decoder makes them, and with forms that change from one to the next."""
    whole = record_of(100)
    path = written(tmp_path / "r", [whole[i : i + 1] for i in range(100)], tokens_per_chunk=40)
    file = RecordFile(path)
    assert [part.tokens for part in file._parts] == [40, 40, 20]
    assert file[:] == whole


@pytest.mark.parametrize("records", [[], [record_of(0)]])
def test_a_stream_of_no_tokens(tmp_path, records):
    path = written(tmp_path / "r", records, num_experts=EXPERTS)
    file = RecordFile(path)
    assert (len(file), file.bytes_per_token, file.num_experts) == (0, 0.0, EXPERTS)
    assert file[:] == file[[]] == (records[0] if records else record_of(0, log_probs=False))
    assert list(file.batches(3)) == []
    with pytest.raises(IndexError, match="index 0 is outside of the file's 0 tokens"):
        file[[0]]


def test_a_stream_is_replayed(tmp_path):
    circuit, logits = cr.compile(cr.Between(1, 3), 8), torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    with RecordWriter(tmp_path / "r", tokens_per_chunk=16) as writer:
        for start in range(0, 50, 10):
            writer.append(RoutingRecord.of(cr.route(logits[start : start + 10], circuit, key=start)))
    file = RecordFile(tmp_path / "r")
    some = torch.tensor([40, 3, 17])
    (mask,) = masks_for(file[some], [circuit], [1.0])
    again = cr.route(logits[some], circuit, replay=mask)
    torch.testing.assert_close(again.log_prob, file[some].log_probs[:, 0])
    with pytest.raises(ValueError, match=r"decided under Between\(1, 3\), and is to be replayed under AtMost\(3\)"):
        masks_for(file[some], [cr.compile(cr.AtMost(3), 8)], [1.0])


def test_bytes_of_a_token(tmp_path):
    """8 of 128 in 48 layers are 8 bytes a layer, and what is told of a chunk is little beside."""
    mask = torch.rand(3000, 128, generator=torch.Generator().manual_seed(0)).topk(8).indices
    layer = LayerRecord.of_rows(mask.sort(-1).values, 128)
    record = RoutingRecord([layer] * 48)
    assert record.bytes_per_token == 384
    assert RoutingRecord([layer] * 48, torch.zeros(3000, 48)).bytes_per_token == 576
    path = tmp_path / "r"
    with RecordWriter(path) as writer:
        writer.append(record)
        assert writer.bytes_per_token == 0.0
        writer.flush()
        assert 384 < writer.bytes_per_token < 385
    assert 384 < RecordFile(path).bytes_per_token < 385


def test_others_can_read_a_file_by_what_the_page_says(tmp_path):
    record = record_of(20, temperature=0.5)
    data = written(tmp_path / "r", [record], tokens_per_chunk=16).read_bytes()
    assert data.startswith(b"circuitroute routing stream\n")
    place, found, digest = len(b"circuitroute routing stream\n"), [], hashlib.sha256()

    def frame():
        name, (length,) = data[place : place + 4], struct.unpack("<I", data[place + 4 : place + 8])
        stop = place + 8 + length
        assert data[stop : stop + 32] == hashlib.sha256(data[place:stop]).digest()
        return name, json.loads(data[place + 8 : stop]), stop + 32

    name, head, place = frame()
    assert (name, head) == (b"head", {"version": 1, "experts": [12, 300, 5], "log_probs": True, "temperature": 0.5,
                                      "constraints": None, "model": None})  # fmt: skip
    for tokens in (16, 4):
        start = place
        name, part, place = frame()
        assert (name, part["tokens"]) == (b"part", tokens)
        digest.update(data[start:place])
        start = place
        for i, (form, code, width) in enumerate(part["layers"]):
            rows = np.frombuffer(data, code, tokens * width, place).reshape(tokens, width)
            place += rows.nbytes
            found.append((i, form, rows))
        log_probs = np.frombuffer(data, "<f4", tokens * 3, place).reshape(tokens, 3)
        place += log_probs.nbytes
        assert hashlib.sha256(data[start:place]).hexdigest() == part["sha256"]
        assert np.array_equal(log_probs, record.log_probs[:16] if tokens == 16 else record.log_probs[16:])
    assert frame() == (b"done", {"tokens": 20, "sha256": digest.hexdigest()}, len(data))
    for i, mask in enumerate(record.masks()):
        chosen = []
        for layer, form, rows in found:
            if layer == i and form == "bits":
                chosen += [[e for e in range(EXPERTS[i]) if row[e // 8] >> e % 8 & 1] for row in rows]
            elif layer == i:
                chosen += [[int(e) for e in row if e < EXPERTS[i]] for row in rows]
        assert chosen == [row.nonzero().flatten().tolist() for row in mask]


def test_a_file_goes_to_other_processes(tmp_path):
    file = pickle.loads(pickle.dumps(RecordFile(written(tmp_path / "r", [record_of(9)]))))
    assert file[:] == record_of(9)


# ---------------------------------------------------------------------------------------------- nothing half-written


def test_an_exception_leaves_the_old_file_and_what_was_written(tmp_path):
    path = written(tmp_path / "r", [record_of(3)])

    def rollouts():
        yield record_of(10, 1)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        written(path, rollouts(), tokens_per_chunk=4)
    assert RecordFile(path)[:] == record_of(3)
    left = RecordFile(tmp_path / "r.partial", partial=True)
    assert not left.complete
    assert left[:] == record_of(10, 1)
    assert "not complete" in repr(left)
    with pytest.raises(cr.CircuitFileError, match=r"r\.partial is not complete.*first 10 tokens, in 3 whole chunks"):
        RecordFile(tmp_path / "r.partial")
    with pytest.raises(FileExistsError, match=r"r\.partial', partial=True\), or remove it"):
        RecordWriter(path)


def test_a_process_that_is_killed_leaves_whole_chunks(tmp_path):
    program = """
import os, signal, sys, torch
from circuitroute.replay import RecordWriter, RoutingRecord
writer = RecordWriter(sys.argv[1], tokens_per_chunk=4)
writer.append(RoutingRecord.of(torch.eye(10, dtype=torch.bool)))
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "compilers")])}
    run = subprocess.run([sys.executable, "-c", program, str(tmp_path / "r")], env=environment, check=False)
    assert run.returncode == -9
    assert [x.name for x in tmp_path.iterdir()] == ["r.partial"]
    assert RecordFile(tmp_path / "r.partial", partial=True)[:] == RoutingRecord.of(torch.eye(10, dtype=torch.bool))[:8]


def test_a_full_disk_takes_back_what_it_has_no_room_for(tmp_path, monkeypatch):
    path, writer = tmp_path / "r", RecordWriter(tmp_path / "r", tokens_per_chunk=4)
    writer.append(record_of(4))
    before = (tmp_path / "r.partial").stat().st_size
    file = writer._file._file

    class Full:
        written = 0

        def write(self, part):
            if self.written > 100:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.written += 30
            return file.write(bytes(part[:30]))

        def __getattr__(self, name):
            return getattr(file, name)

    monkeypatch.setattr(writer._file, "_file", Full())
    with pytest.raises(OSError, match="No space left"):
        writer.append(record_of(5, 1))
    assert (tmp_path / "r.partial").stat().st_size == before
    assert RecordFile(tmp_path / "r.partial", partial=True)[:] == record_of(4)
    monkeypatch.undo()
    writer.close()  # there is room again
    assert RecordFile(path)[:] == RoutingRecord.cat([record_of(4), record_of(5, 1)])


def test_records_that_do_not_fit_are_refused_whole(tmp_path):
    told = {"temperature": 0.5, "constraints": ["a", "b", "c"], "model": "m"}
    writer = RecordWriter(tmp_path / "r")
    writer.append(record_of(2, **told))
    others = {
        r"record has experts=\(12,\)": record_of(2, experts=(12,), temperature=0.5, model="m"),
        "record has log_probs=False": record_of(2, log_probs=False, **told),
        r"record has temperature=1\.0, and the stream, by its first record, 0\.5": record_of(
            2, **told | {"temperature": 1}
        ),
        "record has constraints=None": record_of(2, **told | {"constraints": None}),
        "record has model='n', and the stream": record_of(2, **told | {"model": "n"}),
    }
    for message, other in others.items():
        with pytest.raises(ValueError, match=message):
            writer.append(other)
    with pytest.raises(TypeError, match="record is a list: expected a RoutingRecord"):
        writer.append([1])
    writer.append(record_of(3, 1, **told | {"temperature": float(torch.tensor(0.5))}))
    assert len(writer) == 5
    writer.close()
    writer.close()
    assert repr(writer).endswith("5 tokens, closed)")
    with pytest.raises(ValueError, match="is closed"):
        writer.append(record_of(2, **told))
    assert RecordFile(tmp_path / "r")[:] == RoutingRecord.cat([record_of(2, **told), record_of(3, 1, **told)])


def test_what_a_writer_is_told_is_checked(tmp_path):
    path = tmp_path / "r"
    for call, error, message in [
        (lambda: RecordWriter(path, tokens_per_chunk=0), ValueError, "tokens_per_chunk=0"),
        (lambda: RecordWriter(path, tokens_per_chunk=1 << 40), ValueError, "must be at most 1048576"),
        (lambda: RecordWriter(path, []), ValueError, "num_experts is empty"),
        (lambda: RecordWriter(path, [4, 0]), ValueError, r"num_experts\[1\]=0"),
        (lambda: RecordWriter(path, 4), TypeError, "num_experts=4: expected E of every layer"),
        (lambda: RecordWriter(""), ValueError, "path=''"),
        (lambda: RecordWriter(tmp_path), PermissionError, "no file that may be replaced"),
        (lambda: RecordWriter(tmp_path / "no" / "r"), FileNotFoundError, "no"),
        (lambda: written(path, []), ValueError, "nothing was appended: give num_experts"),
        (lambda: RecordFile(path), FileNotFoundError, "r"),
        (lambda: RecordFile(path, partial="yes"), TypeError, "partial='yes'"),
    ]:
        with pytest.raises(error, match=message):
            call()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=r"layers of \[5\] experts: expected \[4\]"), RecordWriter(path, [4]) as writer:
        writer.append(record_of(2, experts=(5,)))


def test_what_a_reader_is_asked_is_checked(tmp_path):
    file = RecordFile(written(tmp_path / "r", [record_of(9)]))
    for tokens, message in [
        ([9], "index 9 is outside of the file's 9 tokens"),
        ([0, -10], "index -10 is outside"),
        (3, r"record\[3\]: give a slice"),
        ([0.5], "give a slice"),
        (torch.ones(8).bool(), "a mask of 8 tokens: the file has 9"),
    ]:
        with pytest.raises(IndexError, match=message):
            file[tokens]
    with pytest.raises(ValueError, match="tokens=0"):
        file.batches(0)
    file.close()
    file.close()
    with pytest.raises(ValueError, match="was closed: open it again"):
        file[:1]


def test_a_file_keeps_its_permissions_and_links(tmp_path):
    path, link = written(tmp_path / "r", [record_of(1)]), tmp_path / "link"
    path.chmod(0o640)
    link.symlink_to(path)
    written(link, [record_of(2)])
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    assert len(RecordFile(path)) == 2


# ---------------------------------------------------------------------------------------------- damage


def read_all(path, **options):
    with RecordFile(path, **options) as file:
        return file[:]


def test_no_damage_goes_unnoticed(tmp_path):
    path = written(tmp_path / "r", [record_of(6)], tokens_per_chunk=4)
    sound = path.read_bytes()
    flipped = [sound[:i] + bytes([sound[i] ^ 1]) + sound[i + 1 :] for i in range(0, len(sound), 2)]
    cut = [sound[:i] for i in range(0, len(sound), 5)]
    for content in (*flipped, *cut, sound + b"\n", sound + sound):
        path.write_bytes(content)
        with pytest.raises(cr.CircuitFileError, match=f"{path} is (not a readable|not complete|damaged in chunk)"):
            read_all(path)
    path.write_bytes(sound)
    assert read_all(path) == record_of(6)


def test_a_damaged_chunk_is_named_and_the_others_are_read(tmp_path):
    whole = record_of(40)
    path = written(tmp_path / "r", [whole], tokens_per_chunk=10)
    place = RecordFile(path)._parts[2].start + 5
    content = bytearray(path.read_bytes())
    content[place] ^= 64
    path.write_bytes(content)
    file = RecordFile(path)
    for read in (file.verify, lambda: file[:], lambda: file[[39, 20]], lambda: list(file.batches(7))):
        with pytest.raises(
            cr.CircuitFileError, match=r"r is damaged in chunk 2, tokens 20 to 29: its checksum is wrong"
        ):
            read()
    assert file[:20] == whole[:20]
    assert file[30:] == whole[30:]


def test_chunks_that_are_moved_or_taken_out_are_missed(tmp_path):
    path = written(tmp_path / "r", [record_of(8, log_probs=False)], tokens_per_chunk=4)
    sound, parts = path.read_bytes(), RecordFile(path)._parts
    begin = frames.read_frame(memoryview(sound), len(frames.MAGIC))[2]
    middle, end = parts[0].start + parts[0].nbytes, parts[1].start + parts[1].nbytes
    first, second = sound[begin:middle], sound[middle:end]
    for chunks in (second + first, first, first + first, first + second + first):
        path.write_bytes(sound[:begin] + chunks + sound[end:])
        with pytest.raises(
            cr.CircuitFileError, match=r"its chunks, of .* tokens, are not the 8 that its end speaks of"
        ):
            RecordFile(path)


def test_other_files_are_told_apart(tmp_path):
    record_of(3).save(tmp_path / "a.npz")
    with pytest.raises(cr.CircuitFileError, match=r"of another kind; RoutingRecord\.load reads archives"):
        RecordFile(tmp_path / "a.npz")
    with pytest.raises(cr.CircuitFileError, match="is a stream of records, which RecordFile reads"):
        RoutingRecord.load(written(tmp_path / "r", [record_of(3)]))
    for content in (b"", b"circuitroute", b"x" * 100):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(cr.CircuitFileError, match=r"too short|of another kind"):
            RecordFile(tmp_path / "x", partial=True)


def stream(*told):
    """A sealed file of whatever is told."""
    return frames.MAGIC + b"".join(x if isinstance(x, bytes) else frames.frame(*x) for x in told)


def test_whatever_is_in_a_sealed_file_is_checked(tmp_path):
    """By someone who can compute a checksum."""
    head = {"version": 1, "experts": [4], "log_probs": False, "temperature": 1, "constraints": None, "model": None}
    numbers = bytes([0, 1, 4, 2])
    digest = hashlib.sha256(numbers).hexdigest()
    part = {"tokens": 2, "layers": [["indices", "|u1", 2]], "sha256": digest}

    def file(head=head, part=part, numbers=numbers, tokens=2):
        shown = frames.frame(b"part", part)
        done = {"tokens": tokens, "sha256": hashlib.sha256(shown).hexdigest()}
        return stream((b"head", head), shown, numbers, (b"done", done))

    path = tmp_path / "r"
    path.write_bytes(file())
    assert [row.nonzero().flatten().tolist() for row in read_all(path).masks()[0]] == [[0, 1], [2]]
    wrong = {
        "it is of version 2, and this circuitroute reads version 1: update it": file(head | {"version": 2}),
        "'version'": stream((b"head", {})),
        "experts=0: must be at least 1": file(head | {"experts": [0]}),
        "layers is empty": file(head | {"experts": []}),
        "temperature=-1": file(head | {"temperature": -1}),
        r"constraints has 2 entries": file(head | {"constraints": ["a", "b"]}),
        r"constraints\[0\]=1: expected a constraint": file(head | {"constraints": [1]}),
        "model=3: expected a text": file(head | {"model": 3}),
        "it begins with b'part'": stream((b"part", head)),
        "there is b'more' at byte": stream((b"head", head), (b"more", {})),
        "begins at byte 28 is no frame": stream((b"head", [1])),
        "it ends before it says": frames.MAGIC + b"head",
        "tokens=0": file(part=part | {"tokens": 0}),
        "a chunk of 1048577 tokens is larger than any": file(part=part | {"tokens": 1048577}),
        "a chunk is written as .* for 1 layers": file(part=part | {"layers": []}),
        "width=-1": file(part=part | {"layers": [["indices", "|u1", -1]]}),
        "a chunk is written as .*O8": file(part=part | {"layers": [["indices", "|O8", 2]]}),
        "are not the 3 that its end speaks of": file(tokens=3),
        "not complete": file(part=part | {"layers": [["indices", "|u1", 2_000]]}),
        "damaged in chunk 0, tokens 0 to 1: its checksum is wrong": file(part=part | {"sha256": None}),
        "layer 0 does not hold indices of 2 experts": file(head | {"experts": [2]}),
        "layer 0 does not hold bits of 4 experts": file(part=part | {"layers": [["bits", "|u1", 2]]}),
        "form 'list'": file(part=part | {"layers": [["list", "|u1", 2]]}),
    }
    for message, content in wrong.items():
        path.write_bytes(content)
        with pytest.raises(cr.CircuitFileError, match=message) as caught:
            read_all(path)
        assert str(path) in str(caught.value)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_files_that_were_tampered_with(tmp_path, data):
    """Nothing but a sound file is read whole; of one that is read in part, what is read is what was written."""
    whole = record_of(11)
    path = tmp_path / "r"
    if not path.exists():
        written(path, [whole], tokens_per_chunk=4)
        (tmp_path / "sound").write_bytes(path.read_bytes())
    content = sound = (tmp_path / "sound").read_bytes()
    for _ in range(data.draw(st.integers(0, 3))):
        at, stop = data.draw(st.integers(0, len(content))), data.draw(st.integers(0, 40))
        inserted = data.draw(st.one_of(st.binary(max_size=5), st.sampled_from([sound[:40], sound[-90:]])))
        content = content[:at] + inserted + content[at + data.draw(st.sampled_from([0, 1, 2, stop, len(sound)])) :]
    path.write_bytes(content)
    for partial in (False, True):
        try:
            found = read_all(path, partial=partial)
        except cr.CircuitFileError as error:
            refused = str(error)
        else:
            refused = None
            assert found == whole[: len(found)]
            assert partial or content == sound
        assert refused is None or (str(path) in refused and content != sound)


@pytest.mark.parametrize("rows", [0, 1, 20])
def test_layers_of_rows_are_those_of_masks(rows):
    for n in (1, 9, 300):
        mask = torch.rand(rows, n, generator=torch.Generator().manual_seed(n)) < 0.3
        slots = int(mask.sum(-1).max()) if rows else 0
        for wide in (slots, slots + 3):
            found, expected = LayerRecord.of_rows(indices_of(mask, wide), n), LayerRecord.of(mask)
            assert (found.form, found.data.dtype, found.data.tolist()) == (
                expected.form, expected.data.dtype, expected.data.tolist()
            )  # fmt: skip
