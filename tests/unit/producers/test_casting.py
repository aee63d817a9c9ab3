"""A publisher that casts and adds adapters, into slots of every kind: who does what, and when."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.fake_cuda import FakeCuda
from tests.unit.producers.fake_devices import FakeDevice, FakeDevices
from tests.unit.producers.fakes import FakeBus
from weightbus.bus.digest import combine, digest_hex, digest_tensor
from weightbus.producers.devices import Devices
from weightbus.producers.publisher import PublisherOptions, open_publisher
from weightbus.producers.shards import Box, Delta, plan_boxes
from weightbus.producers.writers import SlotsIn

pytestmark = pytest.mark.anyio

MODEL = f"m{uuid.uuid4().hex[:12]}"


class Plus(Delta):
    """Adds what its factor is at the time of `prepare`."""

    def __init__(self, device: FakeDevice) -> None:
        self.factor, self._taken, self._device = 0.0, 0.0, device
        self.threads: list[int] = []

    def prepare(self) -> None:
        self._taken = self.factor
        self.threads.append(threading.get_ident())
        self._device.note(f"prepared on {self._device.current.name}")

    def add_to(self, source: torch.Tensor, begin: int, end: int) -> torch.Tensor:
        self._device.note(f"added on {self._device.current.name}")
        return source[begin:end] + self._taken


@pytest.fixture(autouse=True)
def _leaves_nothing() -> Iterator[None]:
    yield
    assert list(Path("/dev/shm").glob(f"weightbus-{MODEL}.*")) == []


@pytest.mark.parametrize(
    ("slots", "gpu"), [("host", False), ("host", True), ("device", True), ("both", True)]
)
async def test_slots_hold_casts_and_sums_of_the_time_of_publish(slots: SlotsIn, gpu: bool) -> None:
    devices = FakeDevices(FakeCuda(devices=1))
    fake = devices.fakes[0]
    used: Devices = devices if gpu else Devices()
    plus = Plus(fake)
    plain, adapted = torch.randn(300, 7), torch.randn(40, 5)
    boxes = [
        Box("plain", plain.dtype, (300, 7), (0, 0), plain),
        Box("adapted", adapted.dtype, (40, 5), (0, 0), adapted, plus),
    ]
    part = plan_boxes(boxes, torch.bfloat16, [plus])
    assert part.size_bytes == 2 * (300 * 7 + 40 * 5)
    options = PublisherOptions(slots=slots, slot_wait_s=0.0, close_wait_s=0.0)
    async with open_publisher(FakeBus().as_bus(), MODEL, options=options, devices=used) as each:
        for version in range(4):
            plain.add_(1)
            plus.factor += 1
            expected = [plain.bfloat16(), (adapted + plus.factor).bfloat16()]
            fake.notes.clear()
            ready = await each.publish(part, version)
            sums = [digest_tensor(t.view(torch.uint8).numpy().reshape(-1)) for t in expected]
            assert ready.weights_digest == digest_hex(combine(np.array(sums, dtype=np.uint64)))
            assert fake.notes[0] == "prepared on trainer"
            (added,) = [note for note in fake.notes if note.startswith("added")]
            assert (added == "added on trainer") is not gpu
    assert plus.threads == [threading.get_ident()] * 4
    devices.cuda.assert_clean()
