"""Weights on their way to a device: each once, no more ahead than may be, none held longer than it is used."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest
import torch

from fake_backend import FakeKernel
from kernelmux.contract import uploads
from kernelmux.contract.device import PLATFORMS, Device, Platform
from kernelmux.contract.packed import PackedWeights
from kernelmux.contract.packed_cache import PackedCache
from kernelmux.contract.uploads import Uploads, _Ring
from kernelmux.errors import ModelError
from kernelmux.graph.formats import Weight
from kernelmux.models.gguf import read
from kernelmux.models.stored import StoredPlane
from tiny_model import write_tiny_llama


class Remote(Platform):
    """Memory of its own, which the host happens to reach as well."""

    kind = "remote"
    host_memory = False


class Ring:
    """Sends at once, and remembers what."""

    sent: list[torch.Tensor] = []

    def __init__(self, device):
        self.sent.clear()

    def send(self, plane):
        self.sent.append(plane)
        return plane.clone(), []

    def close(self):
        pass


class Looked(dict):
    """Weights that count how often each is looked up."""

    def __init__(self, sizes):
        super().__init__()
        self.times = dict.fromkeys(sizes, 0)
        for number, (name, size) in enumerate(sizes.items()):
            self[name] = Weight(name, (size // 4,), "f32", (torch.full((size // 4,), float(number)),))

    def __getitem__(self, name):
        self.times[name] += 1
        return super().__getitem__(name)


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(uploads, "_Ring", Ring)
    monkeypatch.setattr(uploads, "AHEAD", 100)
    monkeypatch.setitem(PLATFORMS, "remote", Remote())
    return Device("remote")


def test_a_weight_of_several_uses_travels_once_and_ahead(remote):
    weights = Looked({"a": 40, "b": 40, "c": 40})
    travelling = Uploads(weights, remote, ["a", "a", "b", "c"])
    first = travelling.take("a")
    assert len(Ring.sent) == 2  # Of a and b: c would be more than may be ahead.
    assert first.planes[0].equal(weights["a"].planes[0])
    travelling.done("a")
    assert travelling.take("a") is first
    travelling.done("a")
    travelling.take("b")
    assert len(Ring.sent) == 3
    assert weights.times == {"a": 2, "b": 1, "c": 1}  # One of them is this test's.


def test_what_is_asked_for_out_of_turn_comes_too(remote):
    weights = Looked({"a": 40, "b": 40, "c": 40, "later": 40})
    travelling = Uploads(weights, remote, ["a", "b", "c"])
    for name in ("c", "later", "b", "a"):
        assert travelling.take(name).planes[0].equal(dict.__getitem__(weights, name).planes[0])
        travelling.done(name)
    assert len(Ring.sent) == 4


def test_a_weight_larger_than_may_be_ahead_stays_where_it_lies(remote):
    weights = Looked({"small": 40, "large": 200, "next": 40})
    travelling = Uploads(weights, remote, ["small", "large", "next"])
    travelling.take("small")
    travelling.done("small")
    assert travelling.take("large").planes[0].data_ptr() == dict.__getitem__(weights, "large").planes[0].data_ptr()
    travelling.done("large")
    travelling.take("next")
    assert len(Ring.sent) == 2


@pytest.mark.parametrize("damaged", [False, True])
def test_forms_of_the_cache_travel_in_their_weights_place_each_once(remote, monkeypatch, damaged: bool):
    """Also one that is larger than what may be ahead; what is damaged is found on the device, and packed there."""
    weights = Looked({"a": 40, "b": 400, "c": 40})
    kernel, forms = FakeKernel(), [((name,), "torch/form") for name in weights]
    monkeypatch.setattr(PackedCache, "_event", lambda cache: None)

    def get(form):
        node = SimpleNamespace(weights=[SimpleNamespace(name=name) for name in form[0]])
        kernel.packed = "form"
        return packed.get(node, "torch:f", kernel)

    first = PackedCache(weights, remote, Path("m"), (1, 2))
    for form in forms[:2]:
        first.keep(form, kernel, (2 * dict.__getitem__(weights, form[0][0]).planes[0],), [])
    first.start()
    first.background.finish()
    if damaged:
        for file in Path(os.environ["KERNELMUX_CACHE"], "packed").iterdir():
            data = file.read_bytes()
            file.write_bytes(data[:-3] + b"x" + data[-2:])
    cache = PackedCache(weights, remote, Path("m"), (1, 2))
    packed = PackedWeights(weights, remote).holder(cache)
    assert [packed.find(form, kernel) for form in forms] == [True, True, False]
    with packed.uploading(forms):
        for name, form in zip(weights, forms, strict=True):
            factor = 1 if damaged or name == "c" else 2
            assert get(form)[0].equal(factor * dict.__getitem__(weights, name).planes[0])
    sent = [plane.nbytes for plane in Ring.sent]
    assert packed.made == (3 if damaged else 1)
    assert len(cache.notes) == (2 if damaged else 0)
    # The large weight stays where it lies, a large form does not.
    assert sorted(sent) == ([40, 40, 40, 400] if damaged else [40, 40, 400])


def test_in_host_memory_nothing_is_copied_and_each_is_looked_up_once():
    weights = Looked({"a": 40, "b": 40})
    travelling = Uploads(weights, Device("cpu"), ["a", "b", "a"])
    for name in ("a", "b", "a"):
        assert travelling.take(name).planes[0].data_ptr() == dict.__getitem__(weights, name).planes[0].data_ptr()
        travelling.done(name)
    travelling.close()
    assert weights.times == {"a": 1, "b": 1}


class Event:
    """One that has happened."""

    def __init__(self, device=None):
        pass

    def record(self):
        pass

    wait = synchronize = record


@pytest.mark.parametrize("pieces", [1, 5])
def test_weights_of_a_file_are_read_piece_by_piece_on_their_way(tmp_path, monkeypatch, pieces: int):
    """Straight into what is sent: as on a device, but that its memory is the host's."""
    weights = read(write_tiny_llama(tmp_path / "m.gguf", weight_type=gguf.GGMLQuantizationType.Q8_0)).weights
    largest = max(weight.nbytes for weight in weights.values())
    monkeypatch.setattr(uploads, "PIECE", -(-largest // pieces))
    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(StoredPlane, "tensor", None)
    monkeypatch.setattr(_Ring, "_buffer", lambda ring: (torch.empty(uploads.PIECE, dtype=torch.uint8), Event()))
    platform = SimpleNamespace(stream=lambda device: None, on=nullcontext, host_memory=False)
    device = SimpleNamespace(torch="cpu", platform=platform)
    travelling = Uploads(weights, device, list(weights))
    raw = (tmp_path / "m.gguf").read_bytes()
    for name, weight in weights.items():
        (plane,), (stored,) = travelling.take(name).planes, weight.stored
        assert plane.shape == stored.shape
        assert plane.view(-1).view(torch.uint8).numpy().tobytes() == raw[stored.offset : stored.offset + stored.nbytes]
        travelling.done(name)
    travelling.close()


def test_a_file_cut_short_on_the_way_is_the_readers_error(tmp_path, monkeypatch):
    path = write_tiny_llama(tmp_path / "m.gguf")
    weights = read(path).weights
    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(_Ring, "_buffer", lambda ring: (torch.empty(uploads.PIECE, dtype=torch.uint8), Event()))
    platform = SimpleNamespace(stream=lambda device: None, on=nullcontext, host_memory=False)
    travelling = Uploads(weights, SimpleNamespace(torch="cpu", platform=platform), ["output_norm.weight"])
    os.truncate(path, 100)
    with pytest.raises(ModelError, match="has become shorter since it was opened"):
        travelling.take("output_norm.weight")
    travelling.close()
