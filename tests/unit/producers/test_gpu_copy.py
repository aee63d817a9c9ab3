"""The kernel that copies a part into a slot, interpreted: every bit, whatever the alignment."""

from __future__ import annotations

import random
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch

from tests.interpreted import interpreted
from weightbus.producers.shards import Box, Delta, Part, plan_boxes, plan_part, torch_dtype

GUARD = 0xA5


@pytest.fixture(scope="module")
def gpu() -> Iterator[ModuleType]:
    with interpreted("weightbus.producers.gpu_copy") as module:
        yield module


def blank(part: Part) -> torch.Tensor:
    return torch.full((part.layout.segments[0].size_bytes,), GUARD, dtype=torch.uint8)


def assert_copied(part: Part, data: torch.Tensor) -> None:
    """Every box is there, and the bytes between them are untouched."""
    left = data.numpy().copy()
    for shard, source in zip(part.layout.shards, part.sources, strict=True):
        dtype = torch_dtype(part.layout, shard)
        plain = source.detach().resolve_conj().resolve_neg().to(dtype).contiguous()
        raw = plain.reshape(-1).view(torch.uint8).numpy()
        place = slice(shard.offset_bytes, shard.offset_bytes + raw.size)
        assert np.array_equal(left[place], raw)
        left[place] = GUARD
    assert (left == GUARD).all()


@pytest.mark.parametrize("seed", range(4))
def test_copy_keeps_every_bit_when_sources_begin_anywhere(gpu: ModuleType, seed: int) -> None:
    chosen = random.Random(seed)
    memory = torch.randint(0, 256, (2**21,), dtype=torch.uint8)
    tensors, end = {}, 0
    for number in range(30):
        begin = end + chosen.choice([0, 1, 2, 3, 4, 8, 16, 40])
        end = begin + chosen.choice([1, 2, 3, 7, 15, 16, 17, 100, 1023, 20_000, 131_072, 140_001])
        tensors[f"t{number}"] = memory[begin:end]
    part = plan_part(tensors)
    data = blank(part)
    copy = gpu.GpuCopy(part.layout, torch.device("cpu"))
    copy.prepare(part)
    copy.start(data, part)
    assert_copied(part, data)


def test_copy_keeps_every_nan_when_tensors_are_of_any_dtype(gpu: ModuleType) -> None:
    names = "bool uint8 float8_e4m3fn float8_e5m2 bfloat16 float16 uint16 float32 float64 complex64"
    tensors = {}
    for name in names.split():
        dtype = getattr(torch, name)
        raw = torch.arange(512, dtype=torch.int32).remainder(2 if name == "bool" else 256)
        tensors[name] = raw.to(torch.uint8).view(dtype)
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
    tensors |= {"half": every.view(torch.float16), "brain": every.view(torch.bfloat16)}
    part = plan_part(tensors)
    data = blank(part)
    copy = gpu.GpuCopy(part.layout, torch.device("cpu"))
    copy.prepare(part)
    copy.start(data, part)
    assert_copied(part, data)


def test_copy_follows_strides_when_a_tensor_has_gaps(gpu: ModuleType) -> None:
    base = torch.randn(12, 18)
    part = plan_part(
        {
            "plain": base,
            "turned": base.t(),
            "column": base[:, 3:4],
            "stepped": base[::2, 1::3],
            "conjugate": torch.view_as_complex(base.reshape(12, 9, 2)).conj(),
            "negative": torch.view_as_complex(base.reshape(12, 9, 2)).conj().imag,
            "parameter": torch.nn.Parameter(base)[1],
            "one": torch.tensor(3.0),
            "long": torch.randn(1, 700).as_strided((1, 700), (3, 1)),
        }
    )
    data = blank(part)
    copy = gpu.GpuCopy(part.layout, torch.device("cpu"))
    copy.prepare(part)
    copy.start(data, part)
    assert_copied(part, data)


def test_copy_casts_when_another_dtype_is_published(gpu: ModuleType) -> None:
    tensors = {
        "single": torch.randn(12, 18),
        "brain": torch.randn(300).bfloat16(),
        "turned": torch.randn(12, 18).t(),
        "whole": torch.arange(99),
        "double": torch.randn(70_000, dtype=torch.float64),
    }
    part = plan_part(tensors, dtype=torch.bfloat16)
    data = blank(part)
    copy = gpu.GpuCopy(part.layout, torch.device("cpu"))
    copy.prepare(part)
    copy.start(data, part)
    assert_copied(part, data)


def test_copy_adds_a_delta_when_a_shard_has_one(gpu: ModuleType) -> None:
    class One(Delta):
        def prepare(self) -> None:
            raise AssertionError("that is for the trainer's thread")

        def add_to(self, source: torch.Tensor, begin: int, end: int) -> torch.Tensor:
            return source[begin:end] + 1

    shape = (8, 8)
    boxes = [Box("w", torch.float32, shape, (0, 0), torch.randn(shape), One())]
    part = plan_boxes(boxes)
    data = blank(part)
    copy = gpu.GpuCopy(part.layout, torch.device("cpu"))
    copy.prepare(part)
    copy.start(data, part)
    assert torch.equal(data[:256].view(torch.float32).view(shape), part.sources[0] + 1)


def test_copy_finds_tensors_where_they_are_now_when_they_have_moved(gpu: ModuleType) -> None:
    memory = torch.randint(0, 256, (4096,), dtype=torch.uint8)
    first = plan_part({"a": memory[0:100], "b": memory[128:1128]})
    copy = gpu.GpuCopy(first.layout, torch.device("cpu"))
    for a, b in [(0, 128), (0, 128), (3, 2001), (1024, 2001), (0, 128)]:
        part = plan_part({"a": memory[a : a + 100], "b": memory[b : b + 1000]})
        assert part.layout == first.layout
        data = blank(part)
        copy.prepare(part)
        copy.start(data, part)
        assert_copied(part, data)
    memory.random_(0, 256)
    copy.prepare(part)
    copy.start(data, part)
    assert_copied(part, data)


def test_pieces_are_bounded_and_take_every_byte_once(gpu: ModuleType) -> None:
    sizes = [1, 255, 256, 131_072, 131_073, 400_000]
    part = plan_part({f"t{size}": torch.zeros(size, dtype=torch.uint8) for size in sizes})
    taken = blank(part).numpy() * 0
    for source, first, offset, length in gpu.plan_pieces(part.layout).tolist():
        assert 0 < length <= gpu.PIECE_BYTES
        assert first + length <= sizes[source]
        assert offset == part.layout.shards[source].offset_bytes + first
        taken[offset : offset + length] += 1
    assert taken.sum() == sum(sizes)
    assert taken.max() == 1
