"""Slots in host memory digested by the GPU that fills them: with the CPU's sums, or by the CPU."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.interpreted import interpreted
from tests.unit.producers.fake_devices import FakeDevice, FakeDevices, FakeStream
from weightbus.bus.errors import CudaFailed, CudaTimeout
from weightbus.producers.copying import GpuCopier
from weightbus.producers.devices import Digest
from weightbus.producers.digesting import (
    DeviceDigester,
    DeviceDigesters,
    Digester,
    ThreadDigester,
)
from weightbus.producers.digests import Sums
from weightbus.producers.shards import Part, Shard, plan_part
from weightbus.producers.writing import write_part
from weightbus.schemas.dtypes import DTYPE_BYTES, TORCH_NAMES
from weightbus.schemas.layout import Layout


class Slot:
    """Host memory for a part whose tensors lie on the fake GPU 0, and who writes there."""

    def __init__(self, part: Part, devices: FakeDevices) -> None:
        self.part, self.devices = part, devices
        self.raw = np.zeros(part.layout.segments[0].size_bytes, dtype=np.uint8)
        self.checks = 0

    @property
    def address(self) -> int:
        return int(self.raw.ctypes.data)

    def by_threads(self) -> ThreadDigester:
        return ThreadDigester(self.part.layout, self.raw.data, 2)

    def write(
        self,
        digester: Digester | None,
        copied: Callable[[], None] = lambda: None,
        cancel_at: int = 0,
    ) -> Sums:
        assert digester is not None
        streams = {0: FakeStream("copies", self.devices.fakes[0])}
        copier = GpuCopier(self.devices, streams, self.devices.hand_over(self.part))

        def check_cancelled() -> None:
            self.checks += 1
            if self.checks == cancel_at:
                raise KeyboardInterrupt

        return write_part(self.part, self.raw.data, digester, check_cancelled, copier, copied)


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """In three batches, of 4,096 each at most."""
    generator = torch.Generator().manual_seed(seed)
    return {f"t{n}": torch.randn(2, 3, generator=generator) for n in range(9000)}


@pytest.fixture
def devices() -> FakeDevices:
    return FakeDevices()


@pytest.fixture
def digesters(devices: FakeDevices) -> DeviceDigesters:
    return DeviceDigesters(devices)


def test_sums_are_the_threads_when_a_gpu_digests(
    devices: FakeDevices, digesters: DeviceDigesters
) -> None:
    for seed in range(3):
        slot = Slot(plan_part(tensors(seed)), devices)
        found = slot.write(digesters.open(0, slot.part.layout, slot.address))
        assert found.tolist() == slot.write(slot.by_threads()).tolist()
        assert found.dtype == np.uint64


def test_sums_are_the_threads_when_the_kernel_reads_a_slot_of_any_boxes() -> None:
    chosen = random.Random(4)
    shards = []
    for number, name in enumerate(TORCH_NAMES.values()):
        dtype = getattr(torch, name)
        shape = (chosen.randint(2, 9), chosen.randint(2, 40))
        starts = (chosen.randrange(shape[0]), chosen.randrange(shape[1]))
        raw = torch.randint(0, 2, (shape[0] * shape[1] * dtype.itemsize,), dtype=torch.uint8)
        whole = raw.view(dtype).reshape(shape)
        shards.append(Shard(f"t{number}", whole[starts[0] :, starts[1] :], shape, starts))
    slot = Slot(plan_part(shards), FakeDevices())
    with interpreted("weightbus.bus.digest_gpu") as gpu:
        layout, boxes = slot.part.layout, []
        for shard in layout.shards:
            spec = layout.tensors[shard.tensor]
            size = DTYPE_BYTES[spec.dtype]
            boxes.append(gpu.Box(shard.offset_bytes, spec.shape, size, shard.starts, shard.sizes))
        stream = FakeStream("digests", slot.devices.fakes[0])
        digest = gpu.GpuDigest(boxes, torch.device("cpu"))
        found = slot.write(DeviceDigester(digest, stream, slot.address))
    assert found.tolist() == slot.write(slot.by_threads()).tolist()


def test_every_batch_is_digested_after_it_is_copied_and_the_trainer_waits_for_copies_alone(
    devices: FakeDevices, digesters: DeviceDigesters
) -> None:
    slot = Slot(plan_part(tensors()), devices)
    notes = devices.fakes[0].notes
    slot.write(digesters.open(0, slot.part.layout, slot.address), lambda: notes.append("told"))
    batch = ["stream 1 follows copies", "digested on stream 1"]
    first = notes.index("copies follows trainer")
    assert notes[first + 1 :] == [*batch * 3, "waited for copies", "told", "waited for stream 1"]


def test_tables_are_made_once_for_each_layout(
    devices: FakeDevices, digesters: DeviceDigesters
) -> None:
    opened = count_opened(devices.fakes[0])
    one, other = plan_part({"a": torch.ones(9)}), plan_part({"b": torch.ones(4, 4)})
    for part in (one, one, other, one):
        slot = Slot(part, devices)
        found = slot.write(digesters.open(0, part.layout, slot.address))
        assert found.tolist() == slot.write(slot.by_threads()).tolist()
    assert opened == [one.layout, other.layout, one.layout]


def count_opened(device: FakeDevice, failing: int = 0) -> list[Layout]:
    """Layouts that were opened; so many fail at first."""
    opened: list[Layout] = []
    before = device.open_digest

    def open_digest(layout: Layout) -> Digest:
        opened.append(layout)
        if len(opened) <= failing:
            raise CudaFailed("copying tables", "to device 0", "OutOfMemoryError: none left")
        return before(layout)

    device.open_digest = open_digest  # type: ignore[method-assign]
    return opened


def test_cpu_digests_and_it_is_said_once_when_there_is_no_compiler(
    devices: FakeDevices, digesters: DeviceDigesters, caplog: pytest.LogCaptureFixture
) -> None:
    devices.fakes[0].has_compiler = False
    layout = plan_part(tensors()).layout
    assert [digesters.open(0, layout, 4096) for _ in range(3)] == [None] * 3
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "digested by the CPU, not by GPU 0" in record.message
    assert "triton is not installed" in record.message


def test_gpu_is_tried_again_for_the_next_version_when_it_had_no_memory_for_tables(
    devices: FakeDevices, digesters: DeviceDigesters, caplog: pytest.LogCaptureFixture
) -> None:
    opened = count_opened(devices.fakes[0], failing=2)
    slot = Slot(plan_part(tensors()), devices)
    layout = slot.part.layout
    assert [digesters.open(0, layout, slot.address) for _ in range(2)] == [None] * 2
    assert slot.write(digesters.open(0, layout, slot.address)) is not None
    assert len(opened) == 3
    assert ["none left" in record.message for record in caplog.records] == [True]


def test_copies_and_digests_are_waited_for_when_it_is_cancelled(
    devices: FakeDevices, digesters: DeviceDigesters
) -> None:
    slot = Slot(plan_part(tensors()), devices)
    digester = digesters.open(0, slot.part.layout, slot.address)
    with pytest.raises(KeyboardInterrupt):
        slot.write(digester, cancel_at=3)
    notes = devices.fakes[0].notes
    assert notes.count("digested on stream 1") == 2
    assert notes[-2:] == ["waited for copies", "waited for stream 1"]
    found = slot.write(digesters.open(0, slot.part.layout, slot.address))
    assert found.tolist() == slot.write(slot.by_threads()).tolist()


def test_timeout_is_told_when_the_digest_does_not_get_done(
    devices: FakeDevices, digesters: DeviceDigesters
) -> None:
    slot, device = Slot(plan_part(tensors()), devices), devices.fakes[0]
    digester = digesters.open(0, slot.part.layout, slot.address)

    def late() -> None:
        device.late = True

    with pytest.raises(CudaTimeout, match="stream 1"):
        slot.write(digester, late)
    digesters.leave(0)
    device.late = False
    found = slot.write(digesters.open(0, slot.part.layout, slot.address))
    assert device.notes[-1] == "waited for stream 2", "nothing is queued after what is late"
    assert found.tolist() == slot.write(slot.by_threads()).tolist()
