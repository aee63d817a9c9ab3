"""Copying into a slot: every dtype, every stride, and digests equal to those of whole tensors."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from weightbus.bus.digest import digest_tensor
from weightbus.producers.copying import CPU_PIECE_BYTES, copy_shard
from weightbus.producers.devices import Stream
from weightbus.producers.digesting import ThreadDigester
from weightbus.producers.sealing import add_digests, plan_seal
from weightbus.producers.shards import Box, Delta, Part, Shard, plan_boxes, plan_part
from weightbus.producers.writing import write_part
from weightbus.schemas.dtypes import DTYPE_BYTES


def _never() -> None:
    pass


def threads(part: Part, data: bytearray, count: int) -> ThreadDigester:
    return ThreadDigester(part.layout, memoryview(data), count)


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = int(np.prod(shape)) * dtype.itemsize
    high = 2 if dtype is torch.bool else 256
    raw = torch.randint(0, high, (size,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape)


def test_write_keeps_every_bit_when_given_each_dtype() -> None:
    names = "bool uint8 int8 float8_e5m2 float8_e4m3fn float8_e8m0fnu int16 uint16 float16 bfloat16"
    names += " int32 uint32 float32 int64 uint64 float64 complex64"
    dtypes = [getattr(torch, name) for name in names.split()]
    assert len(dtypes) == len(DTYPE_BYTES)
    tensors = {str(d): _random_bits((5, 7), d, seed) for seed, d in enumerate(dtypes)}
    part = plan_part(tensors)
    data = bytearray(part.layout.segments[0].size_bytes)
    digests = write_part(part, memoryview(data), threads(part, data, 2), _never)
    for shard, digest in zip(part.layout.shards, digests, strict=True):
        tensor = tensors[part.layout.tensors[shard.tensor].name]
        begin = shard.offset_bytes
        assert bytes(data[begin : begin + tensor.nbytes]) == _bits(tensor), tensor.dtype
        assert digest == digest_tensor(np.frombuffer(_bits(tensor), dtype=np.uint8))


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.t(),
        lambda t: t[::2, 1::3],
        lambda t: t[:, 2:3],
        lambda t: t[0].expand(4, 12),
        lambda t: t.reshape(2, 3, 12).permute(2, 0, 1),
        lambda t: torch.view_as_complex(t.reshape(6, 6, 2)).conj(),
        lambda t: torch.nn.Parameter(t)[1],
    ],
    ids=["transposed", "stepped", "column", "expanded", "permuted", "conjugate", "parameter"],
)
def test_write_follows_strides_when_a_tensor_is_not_contiguous(
    view: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    tensor = view(_random_bits((6, 12), torch.float32, 1).nan_to_num(0.0))
    part = plan_part({"w": tensor})
    data = bytearray(part.layout.segments[0].size_bytes)
    write_part(part, memoryview(data), threads(part, data, 1), _never)
    assert bytes(data[: tensor.nbytes]) == _bits(tensor.detach().resolve_conj())


@pytest.mark.parametrize("target", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_write_casts_as_torch_does_and_digests_what_is_there(target: torch.dtype) -> None:
    tensors = {
        "single": _random_bits((5, 40), torch.float32, 1),
        "turned": _random_bits((7, 40), torch.float64, 2).t(),
        "stepped": _random_bits((9, 40), torch.float32, 3)[::2, 1::3],
        "brain": torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16),
        "specials": torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-45, 1e38]),
        "eight": _random_bits((64,), torch.float8_e4m3fn, 4),
        "whole": _random_bits((5,), torch.int64, 5),
    }
    before = {name: _bits(tensor) for name, tensor in tensors.items()}
    part = plan_part(tensors, dtype=target)
    data = bytearray(part.layout.segments[0].size_bytes)
    digests = write_part(part, memoryview(data), threads(part, data, 2), _never)
    for shard, digest in zip(part.layout.shards, digests, strict=True):
        name = part.layout.tensors[shard.tensor].name
        kept = name in ("eight", "whole")
        expected = _bits(tensors[name] if kept else tensors[name].to(target))
        assert bytes(data[shard.offset_bytes : shard.offset_bytes + len(expected)]) == expected
        assert digest == digest_tensor(np.frombuffer(expected, dtype=np.uint8)), name
        assert _bits(tensors[name]) == before[name], f"{name} was changed"


class Twice(Delta):
    """Adds as much again, and says what is asked of it."""

    def __init__(self) -> None:
        self.prepared = self.alive = self.pieces = 0

    def prepare(self) -> None:
        self.prepared += 1

    def add_to(self, source: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        assert not torch.is_grad_enabled()
        assert self.alive == 0, "another temporary is kept"
        total = source[begin:end] + source[begin:end]
        assert total.nbytes <= CPU_PIECE_BYTES
        self.alive += 1
        self.pieces += 1
        weakref.finalize(total, self._gone)
        return total

    def _gone(self) -> None:
        self.alive -= 1


def test_write_adds_a_delta_before_the_cast_one_temporary_at_a_time() -> None:
    delta = Twice()
    weights = [torch.randn(1300, 700, dtype=torch.float64) for _ in range(6)]
    boxes = [
        Box(f"t{n}", w.dtype, (1300, 700), (0, 0), nn.Parameter(w), delta if n % 2 else None)
        for n, w in enumerate(weights)
    ]
    part = plan_boxes(boxes, torch.bfloat16, [delta])
    data = bytearray(part.layout.segments[0].size_bytes)
    part.prepare()
    write_part(part, memoryview(data), threads(part, data, 1), _never)
    for number, shard in enumerate(part.layout.shards):
        expected = _bits((weights[number] * (2 if number % 2 else 1)).to(torch.bfloat16))
        begin = shard.offset_bytes
        assert bytes(data[begin : begin + len(expected)]) == expected
    assert (delta.prepared, delta.alive, delta.pieces) == (1, 0, 3 * 7)


def test_digests_of_boxes_add_up_to_those_of_whole_tensors_when_ranks_hold_them() -> None:
    whole = _random_bits((6, 10), torch.bfloat16, 2)
    boxes = [
        Shard("w", whole[:3, :5], (6, 10), (0, 0)),
        Shard("w", whole[:3, 5:], (6, 10), (0, 5)),
        Shard("w", whole[3:], (6, 10), (3, 0)),
    ]
    parts = [plan_part(boxes[:1]), plan_part(boxes[1:])]
    digests = []
    for part in parts:
        data = bytearray(part.layout.segments[0].size_bytes)
        digests.append(write_part(part, memoryview(data), threads(part, data, 1), _never))
    plan = plan_seal([part.layout for part in parts])
    expected = digest_tensor(np.frombuffer(_bits(whole), dtype=np.uint8))
    assert add_digests(plan, digests).tolist() == [expected]


def test_write_takes_many_batches_when_there_are_many_shards() -> None:
    tensors = {f"t{n}": torch.full((3,), n, dtype=torch.int16) for n in range(10_000)}
    part = plan_part(tensors)
    data = bytearray(part.layout.segments[0].size_bytes)
    calls = []
    digests = write_part(part, memoryview(data), threads(part, data, 3), lambda: calls.append(1))
    assert len(calls) == 3
    assert len(digests) == 10_000
    last = part.layout.shards[-1].offset_bytes
    assert np.frombuffer(data, np.int16, 3, last).tolist() == [9999] * 3


def test_write_stops_when_cancelled_between_batches() -> None:
    part = plan_part({f"t{n}": torch.ones(1, dtype=torch.uint8) for n in range(5000)})
    data = bytearray(part.layout.segments[0].size_bytes)
    calls = []

    class Cancelled(BaseException):
        pass

    def check() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        write_part(part, memoryview(data), threads(part, data, 1), check)
    assert data[0] == 1
    assert data[part.layout.shards[-1].offset_bytes] == 0


class Late:
    """A copier that copies when it is waited for, as a device would."""

    def __init__(self) -> None:
        self._given: list[tuple[torch.Tensor, Part, int]] = []
        self._lock = threading.Lock()

    def copy(self, data: torch.Tensor, part: Part, begin: int, end: int) -> None:
        with self._lock:
            self._given += [(data, part, number) for number in range(begin, end)]

    def mark(self) -> Callable[[], None]:
        return self._do

    def precede(self, stream: Stream) -> None:
        raise AssertionError(stream)

    def _do(self) -> None:
        with self._lock:
            for data, part, number in self._given:
                copy_shard(data, part, number)
            self._given.clear()


def test_write_digests_what_was_copied_when_copies_are_queued() -> None:
    part = plan_part({f"t{n}": torch.full((64,), n, dtype=torch.int32) for n in range(9000)})
    data = bytearray(part.layout.segments[0].size_bytes)
    digests = write_part(part, memoryview(data), threads(part, data, 2), _never, Late())
    raw = [np.frombuffer(_bits(source), dtype=np.uint8) for source in part.sources]
    assert digests.tolist() == [digest_tensor(each) for each in raw]


def test_trainer_is_told_once_when_all_is_copied() -> None:
    tensors = {f"t{n}": torch.full((3,), n, dtype=torch.int64) for n in range(5000)}
    part = plan_part(tensors)
    data = bytearray(part.layout.segments[0].size_bytes)
    seen = []

    def copied() -> None:
        seen.append(bytes(data))
        for tensor in tensors.values():
            tensor.zero_()

    expected = [digest_tensor(np.frombuffer(_bits(t), dtype=np.uint8)) for t in tensors.values()]
    digests = write_part(part, memoryview(data), threads(part, data, 2), _never, Late(), copied)
    assert digests.tolist() == expected
    assert seen == [bytes(data)]
