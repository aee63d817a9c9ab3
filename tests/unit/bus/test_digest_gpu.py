"""The digest's kernel, interpreted: equal to the CPU's for any box, and no byte is left out."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from tests.interpreted import interpreted
from weightbus.bus.digest import digest_box, digest_tensor


@pytest.fixture(scope="module")
def gpu() -> Iterator[ModuleType]:
    with interpreted("weightbus.bus.digest_gpu") as module:
        yield module


class Slot:
    """Boxes one after the other, at multiples of 256 bytes, and what the CPU makes of them."""

    def __init__(self, gpu: ModuleType, seed: int = 0) -> None:
        self._gpu, self._end = gpu, 0
        self._random = np.random.default_rng(seed)
        self.data = np.zeros(0, dtype=np.uint8)
        self.boxes: list[Any] = []
        self.expected: list[int] = []

    def add(
        self,
        shape: tuple[int, ...],
        itemsize: int,
        starts: tuple[int, ...] | None = None,
        sizes: tuple[int, ...] | None = None,
    ) -> None:
        starts, sizes = starts or (0,) * len(shape), shape if sizes is None else sizes
        size_bytes = math.prod(sizes) * itemsize
        box = self._random.integers(0, 256, size_bytes, dtype=np.uint8)
        padding = self._random.integers(0, 256, -size_bytes % 256, dtype=np.uint8)
        self.boxes.append(self._gpu.Box(len(self.data), shape, itemsize, starts, sizes))
        self.expected.append(digest_box(box, shape, itemsize, starts, sizes))
        self.data = np.concatenate([self.data, box, padding])

    def found(self) -> list[int]:
        digest = self._gpu.GpuDigest(self.boxes, torch.device("cpu"))
        digest.start(self.data.ctypes.data)
        sums: list[int] = digest.finish().tolist()
        return sums


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8])
def test_gpu_digest_is_the_cpu_s_when_given_whole_tensors(gpu: ModuleType, itemsize: int) -> None:
    slot = Slot(gpu)
    for shape in [(), (1,), (3,), (5, 7), (300, 411), (0, 4), (2, 3, 5)]:
        slot.add(shape, itemsize)
    assert slot.found() == slot.expected


@pytest.mark.parametrize("seed", range(8))
def test_gpu_digest_is_the_cpu_s_when_given_any_box(gpu: ModuleType, seed: int) -> None:
    chosen = random.Random(seed)
    slot = Slot(gpu, seed)
    for _ in range(15):
        shape = tuple(chosen.randint(1, 12) for _ in range(chosen.randint(1, 5)))
        starts = tuple(chosen.randrange(extent) for extent in shape)
        sizes = tuple(
            chosen.randint(1, extent - start) for extent, start in zip(shape, starts, strict=True)
        )
        slot.add(shape, chosen.choice([1, 2, 4, 8]), starts, sizes)
    assert slot.found() == slot.expected


@pytest.mark.parametrize("first", [0, 1, 2, 3])
@pytest.mark.parametrize("itemsize", [1, 2])
def test_gpu_digest_is_the_cpu_s_when_long_rows_begin_anywhere(
    gpu: ModuleType, first: int, itemsize: int
) -> None:
    slot = Slot(gpu, first)
    slot.add((3, 40_000), itemsize, (1, first), (2, 39_001 - first))
    slot.add((7, 1_001), itemsize, (0, first), (7, 500))
    slot.add((2, 150_003), itemsize, (first % 2, 0), (1, 150_003))
    assert slot.found() == slot.expected


def test_gpu_digest_is_the_cpu_s_when_boxes_are_digested_a_few_at_a_time(gpu: ModuleType) -> None:
    slot = Slot(gpu)
    for shape in [(3, 5), (0,), (300, 411), (2, 70_001), (1,), (140_001,)]:
        slot.add(shape, 2)
        slot.add((40, 90), 2, (1, 3), (37, 41))
    digest = gpu.GpuDigest(slot.boxes, torch.device("cpu"))
    for ends in [(12,), (0, 1, 2, 3, 7, 7, 12), (11, 12)]:
        begin = 0
        for end in ends:
            digest.start(slot.data.ctypes.data, begin, end)
            begin = end
        assert digest.finish().tolist() == slot.expected


def test_gpu_digest_finds_the_data_where_it_is_told_when_there_are_two_slots(
    gpu: ModuleType,
) -> None:
    slot, other = Slot(gpu, 1), Slot(gpu, 2)
    for each in (slot, other):
        each.add((31, 1001), 2)
        each.add((77,), 1)
    digest = gpu.GpuDigest(slot.boxes, torch.device("cpu"))
    memory = np.concatenate([np.zeros(4, dtype=np.uint8), other.data])
    for address, expected in [
        (slot.data.ctypes.data, slot.expected),
        (memory[4:].ctypes.data, other.expected),
        (slot.data.ctypes.data, slot.expected),
    ]:
        digest.start(address)
        assert digest.finish().tolist() == expected


def test_gpu_digests_of_boxes_add_up_to_that_of_the_tensor(gpu: ModuleType) -> None:
    slot = Slot(gpu)
    whole = np.random.default_rng(5).integers(0, 256, (10, 33), dtype=np.uint8)
    parts = []
    for rows, columns in [(slice(0, 4), slice(0, 33)), (slice(4, 10), slice(0, 5))]:
        parts.append((rows, columns))
    parts.append((slice(4, 10), slice(5, 33)))
    for rows, columns in parts:
        box = whole[rows, columns]
        slot.add(whole.shape, 1, (rows.start, columns.start), box.shape)
        begin = slot.boxes[-1].offset_bytes
        slot.data[begin : begin + box.size] = box.reshape(-1)
    assert sum(slot.found()) % 2**64 == digest_tensor(whole.reshape(-1))


def test_tiles_take_every_byte_once_when_boxes_are_of_all_kinds(gpu: ModuleType) -> None:
    slot = Slot(gpu)
    slot.add((300_001,), 1)
    slot.add((90, 7_001), 2, (3, 2), (80, 6_001))
    slot.add((4, 5, 6, 7), 1, (1, 1, 1, 1), (3, 4, 5, 6))
    slot.add((500, 3), 4, (0, 1), (500, 2))
    slot.add((3, 8_194), 2, sizes=(3, 8_193))  # a row is aligned in the tensor, or in the data
    slot.add((3, 16_388), 1, sizes=(3, 16_387))
    slot.add((3, 16_385), 1, sizes=(3, 16_384))
    taken = np.zeros(len(slot.data), dtype=np.int64)
    for kind, tiles in gpu.plan_tiles(slot.boxes).items():
        for begin, units, row_units, first_byte, step_bytes, _ in tiles.tolist():
            size_bytes = units * kind.unit_bytes
            taken[begin : begin + size_bytes] += 1
            assert 0 < size_bytes <= gpu.TILE_BYTES
            assert begin % kind.unit_bytes == first_byte % kind.unit_bytes == 0
            assert kind.has_rows or (row_units, step_bytes) == (units, 0)
            assert units % row_units == 0
    for box in slot.boxes:
        size_bytes = math.prod(box.sizes) * box.itemsize
        inside = slice(box.offset_bytes, box.offset_bytes + size_bytes)
        assert (taken[inside] == 1).all()
        taken[inside] = 0
    assert not taken.any()


def test_there_are_no_tiles_when_there_are_no_bytes(gpu: ModuleType) -> None:
    assert gpu.plan_tiles([]) == {}
    assert gpu.plan_tiles([gpu.Box(0, (3, 0), 2, (0, 0), (3, 0))]) == {}
