"""Keys: the same bits from integers on the host, from torch's operations and from the kernel."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import circuitroute as cr
from circuitroute import keys
from circuitroute.keys import as_key, fold_in, mix64

WORD = (1 << 64) - 1
VALUES = (0, 1, -1, 7, 1 << 40, -(1 << 63), (1 << 63) - 1)


def mixed(x):
    """The finaliser of SplitMix64 on an integer in [0, 2^64)."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & WORD
    return x ^ (x >> 31)


def truth(*parts):
    """Keys by their definition: mix((key ^ mix(part)) + golden ratio), from 0; signed."""
    key = 0
    for part in parts:
        key = mixed(((key ^ mixed(part & WORD)) + 0x9E3779B97F4A7C15) & WORD)
    return key - (1 << 64) if key >> 63 else key


class Log(TorchDispatchMode):
    """The operations that run, by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def test_numbers_and_tensors_give_the_same_keys():
    for seed in VALUES:
        expected = [truth(seed, 3, value) for value in VALUES]
        assert [int(cr.random_key(seed, 3, value)) for value in VALUES] == expected
        assert cr.random_key(seed, 3, torch.tensor(VALUES)).tolist() == expected
        assert cr.random_key(torch.tensor(seed), torch.full((7,), 3), torch.tensor(VALUES)).tolist() == expected
        assert cr.random_key(torch.full((7, 1), seed), 3, torch.tensor(VALUES))[0].tolist() == expected
    assert cr.random_key(torch.tensor(VALUES), 5).tolist() == [truth(value, 5) for value in VALUES]
    assert cr.random_key(1 << 70, 2) == truth(0, 2)
    small = torch.tensor([1, 255], dtype=torch.uint8)
    assert cr.random_key(small, small).tolist() == [truth(1, 1), truth(255, 255)]


def test_arguments_stay_as_they_are():
    key, index = torch.tensor(VALUES), torch.arange(7)
    before = key.clone(), index.clone()
    fold_in(key, index), mix64(key), cr.random_key(key, index), keys.uniform(key, 0, 2, torch.float64)
    assert torch.equal(key, before[0])
    assert torch.equal(index, before[1])


def test_numbers_are_mixed_on_the_host():
    """Beside a tensor they cost no operation, however many they are."""
    logs = []
    for numbers in ((1,), (1, 2, 3, 4, 5)):
        with Log() as log:
            cr.random_key(*numbers, torch.arange(4))
        logs.append(log.names)
    assert logs[0] == logs[1]
    assert not [name for name in logs[0] if "copy" in name or "lift" in name]


def test_a_number_gets_to_a_device_without_a_copy():
    with Log() as log:
        assert as_key("key", 1 << 63, torch.device("cpu")).item() == -(1 << 63)
    assert not [name for name in log.names if "copy" in name or "lift" in name]
    assert as_key("key", 7, torch.device("meta")).device.type == "meta"
    with pytest.raises(TypeError, match=r"key has dtype torch\.float32: expected an integer tensor"):
        as_key("key", torch.zeros(2))


def test_the_kernel_gives_the_same_bits(monkeypatch):
    """Under the interpreter where there is no GPU."""
    pytest.importorskip("triton", minversion="3.4")
    from circuitroute.keys import folding

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        monkeypatch.setattr(folding, "current", lambda device: contextlib.nullcontext())
    values, others = torch.tensor(VALUES, device=device), torch.arange(-300, 400, device=device)
    assert folding.folded(0, values).tolist() == [truth(value) for value in VALUES]
    assert torch.equal(folding.folded(others, 5).cpu(), fold_in(others.cpu(), torch.tensor(5)))
    assert torch.equal(folding.folded(others, others.int()).cpu(), fold_in(others.cpu(), others.cpu()))
    table = folding.folded(values[:, None], others)
    assert table.shape == (7, 700)
    assert torch.equal(table.cpu(), fold_in(values.cpu()[:, None], others.cpu()))
    assert torch.equal(folding.folded(torch.tensor(5), others).cpu(), fold_in(torch.tensor(5), others.cpu()))
    assert folding.folded(3, others[:0]).shape == (0,)


def test_drawn_keys_use_every_bit():
    """From torch's generator; each bit of 1,000 is off by more than 6 standard deviations once in 10 million runs."""
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    key = keys.drawn_keys(1000, torch.device("cpu"))
    again = keys.drawn_keys(1000, torch.device("cpu"))
    torch.manual_seed(0)
    assert torch.equal(keys.drawn_keys(1000, torch.device("cpu")), key)
    torch.random.set_rng_state(state)
    assert not (key == again).any()
    set_bits = ((key[:, None] >> torch.arange(64)) & 1).double().mean(0)
    assert ((set_bits - 0.5).abs() < 6 * 0.5 / 1000**0.5).all()
