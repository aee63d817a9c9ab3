"""A publisher whose slots lie on a GPU, or on both sides of the link: what readers are offered."""

from __future__ import annotations

import ctypes
import logging
import threading
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import numpy as np
import pytest
import torch

from tests.fake_cuda import FakeCuda
from tests.unit.producers.fake_devices import FakeDevices
from tests.unit.producers.fakes import FakeBus
from weightbus.bus.cuda import CUDA_ALIGNMENT_BYTES, CudaRuntime
from weightbus.bus.digest import combine, digest_hex, digest_tensor
from weightbus.bus.endpoint import P2pOptions
from weightbus.bus.errors import CudaFailed, CudaTimeout, CudaUnavailable, SettingInvalid
from weightbus.bus.host import host_id
from weightbus.producers import lifetime
from weightbus.producers.errors import DeviceMemoryFull, SlotBusy, SlotsUnsuitable
from weightbus.producers.publisher import Publisher, PublisherOptions, open_publisher
from weightbus.producers.writers import SlotsIn
from weightbus.schemas.checkpoint import CheckpointReady, CheckpointRetired
from weightbus.schemas.leases import ReaderLease
from weightbus.schemas.placement import CudaSegment, Segment, SharedMemorySegment
from weightbus.schemas.shared_memory import SHM_HEADER_BYTES, unpack_shm_header

pytestmark = pytest.mark.anyio

MODEL = f"m{uuid.uuid4().hex[:12]}"
SHM = Path("/dev/shm")


def blocks() -> list[Path]:
    return list(SHM.glob(f"weightbus-{MODEL}.*"))


@pytest.fixture
def fake() -> FakeBus:
    return FakeBus()


@pytest.fixture
def devices() -> Iterator[FakeDevices]:
    """Nothing may be left on them."""
    devices = FakeDevices(FakeCuda(devices=2))
    yield devices
    devices.cuda.assert_clean()
    assert blocks() == []


@asynccontextmanager
async def publishing(
    fake: FakeBus, devices: FakeDevices, slots: SlotsIn
) -> AsyncIterator[Publisher]:
    options = PublisherOptions(slots=slots, slot_wait_s=0.0, close_wait_s=0.0)
    async with open_publisher(fake.as_bus(), MODEL, options=options, devices=devices) as publisher:
        yield publisher


def weights(seed: int, size: int = 800) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(size, generator=generator).bfloat16(),
        "b": torch.randn(4, 6, generator=generator).t(),
    }


def ways_of(ready: CheckpointReady) -> tuple[Segment, ...]:
    (ways,) = ready.placement
    return ways


def read_gpu(devices: FakeDevices, segment: Segment, size_bytes: int) -> tuple[int, bytes]:
    """(generation, data) of a segment, as another process of the host sees it."""
    assert isinstance(segment, CudaSegment)
    assert segment.host_id == host_id()
    reader = devices.cuda.other_process()
    device = reader.find_device(segment.device_uuid)
    assert device is not None
    address = reader.open_handle(device, segment.handle)
    _, generation = unpack_shm_header(reader.read(device, address, 64))
    data = ctypes.string_at(address + SHM_HEADER_BYTES, size_bytes)
    reader.close_handle(device, address)
    return generation, data


def read_host(segment: Segment, size_bytes: int) -> tuple[int, bytes]:
    assert isinstance(segment, SharedMemorySegment)
    raw = (SHM / segment.name).read_bytes()
    _, generation = unpack_shm_header(raw)
    return generation, raw[SHM_HEADER_BYTES : SHM_HEADER_BYTES + size_bytes]


def raw_of(tensor: torch.Tensor) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def first_tensor(tensors: Mapping[str, torch.Tensor]) -> bytes:
    return tensors["a"].view(torch.uint8).numpy().tobytes()


async def test_reader_finds_every_bit_on_the_gpu_when_versions_follow_each_other(
    fake: FakeBus, devices: FakeDevices
) -> None:
    handles = []
    async with publishing(fake, devices, "device") as publisher:
        for version in range(4):
            tensors = weights(version)
            ready = await publisher.publish(tensors, version)
            (segment,) = ways_of(ready)
            assert isinstance(segment, CudaSegment)
            generation, data = read_gpu(devices, segment, 1600)
            assert data == first_tensor(tensors)
            assert generation == segment.generation
            handles.append(segment.handle)
    assert handles[0] == handles[2] != handles[1] == handles[3]
    assert len(devices.cuda.allocated) == 0


@pytest.mark.parametrize("slots", ["device", "both"])
async def test_digests_are_those_of_host_slots(
    fake: FakeBus, devices: FakeDevices, slots: SlotsIn
) -> None:
    async with publishing(fake, devices, slots) as publisher:
        one = await publisher.publish(weights(1), 1)
    async with publishing(FakeBus(), devices, "host") as publisher:
        other = await publisher.publish(weights(1), 1)
    assert one.weights_digest == other.weights_digest


async def test_both_ways_hold_the_same_bytes_when_slots_are_on_both_sides(
    fake: FakeBus, devices: FakeDevices
) -> None:
    async with publishing(fake, devices, "both") as publisher:
        for version in range(3):
            tensors = weights(version)
            near, far = ways_of(await publisher.publish(tensors, version))
            assert isinstance(far, SharedMemorySegment)
            expected = first_tensor(tensors)
            assert read_gpu(devices, near, 1600) == (near_generation(near), expected)
            assert read_host(far, 1600) == (far.generation, expected)
        assert len(devices.cuda.registered) == 2


def shared_ways(ready: CheckpointReady) -> list[SharedMemorySegment]:
    return [way for way in ways_of(ready) if isinstance(way, SharedMemorySegment)]


def near_generation(segment: Segment) -> int:
    assert isinstance(segment, CudaSegment)
    return segment.generation


async def test_slot_is_pinned_once_when_tensors_on_a_gpu_go_to_the_host(
    fake: FakeBus, devices: FakeDevices
) -> None:
    async with publishing(fake, devices, "host") as publisher:
        for version in range(5):
            (segment,) = ways_of(await publisher.publish(weights(version), version))
            assert read_host(segment, 1600)[1] == first_tensor(weights(version))
        assert devices.cuda.calls["register"] == 2
        assert devices.cuda.allocated == {}


@pytest.mark.parametrize("driver", [True, False])
async def test_slot_is_written_and_one_warning_given_when_it_cannot_be_pinned(
    fake: FakeBus, devices: FakeDevices, caplog: pytest.LogCaptureFixture, driver: bool
) -> None:
    devices.has_driver = driver
    devices.cuda.fail("register", "CUDA_ERROR_NOT_PERMITTED")
    async with publishing(fake, devices, "host") as publisher:
        for version in range(3):
            (segment,) = ways_of(await publisher.publish(weights(version), version))
            assert read_host(segment, 1600)[1] == first_tensor(weights(version))
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "not pinned" in caplog.text


async def test_trainer_is_told_once_its_tensors_are_copied_and_before_they_are_digested(
    fake: FakeBus, devices: FakeDevices
) -> None:
    device = devices.fakes[0]
    async with publishing(fake, devices, "both") as publisher:
        await publisher.publish(weights(1), 1, copied=lambda: device.note("told"))
    assert device.notes == [
        "stream 1 follows trainer",
        "copied on stream 1",
        "trainer follows stream 1",
        "told",
        "stream 2 follows stream 1",
        "digested on stream 1",
        "waited for stream 1",
        "waited for stream 2",
    ]


async def test_trainer_s_work_is_waited_for_when_tensors_on_a_gpu_go_to_the_host(
    fake: FakeBus, devices: FakeDevices
) -> None:
    device = devices.fakes[0]
    async with publishing(fake, devices, "host") as publisher:
        await publisher.publish(weights(1), 1, copied=lambda: device.note("told"))
    assert device.notes == [
        "stream 1 follows trainer",
        "stream 2 follows stream 1",
        "digested on stream 2",
        "waited for stream 1",
        "told",
        "waited for stream 2",
    ]


@pytest.mark.parametrize("missing", ["nothing", "driver", "pinning", "compiler", "one GPU", "GPUs"])
async def test_digest_is_the_same_when_the_cpu_takes_it_of_host_slots(
    fake: FakeBus, devices: FakeDevices, caplog: pytest.LogCaptureFixture, missing: str
) -> None:
    tensors = weights(1)
    addresses = [tensor.data_ptr() for tensor in tensors.values()]
    devices.has_driver = missing != "driver"
    devices.fakes[0].has_compiler = missing != "compiler"
    if missing == "pinning":
        devices.cuda.fail("register", "CUDA_ERROR_NOT_PERMITTED")
    if missing == "one GPU":
        devices.elsewhere = {addresses[1]: 1}
    if missing == "GPUs":
        devices.elsewhere = dict.fromkeys(addresses)
    async with publishing(fake, devices, "host") as publisher:
        found = [(await publisher.publish(tensors, n)).weights_digest for n in (1, 2, 3)]
    sums = [digest_tensor(raw_of(tensor)) for tensor in tensors.values()]
    assert found == [digest_hex(combine(np.array(sums, dtype=np.uint64)))] * 3
    digested = [note for note in devices.fakes[0].notes if note.startswith("digested")]
    assert len(digested) == (3 if missing == "nothing" else 0)
    told = 0 if missing in ("nothing", "one GPU", "GPUs") else 1
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * told


async def test_slot_is_left_to_the_gpu_when_it_does_not_get_done_digesting_it(
    fake: FakeBus,
) -> None:
    devices = FakeDevices()
    device = devices.fakes[0]

    def late() -> None:
        device.late = True

    async with publishing(fake, devices, "host") as publisher:
        first = await publisher.publish(weights(1), 1)
        before = set(blocks())
        with pytest.raises(CudaTimeout, match="stream 2"):
            await publisher.publish(weights(2), 2, copied=late)
        device.late = False
        (left,) = set(blocks()) - before
        second = await publisher.publish(weights(2), 2)
        assert left not in {SHM / way.name for way in shared_ways(second)}
        assert device.notes[-1] == "waited for stream 3"
        assert fake.said_of(CheckpointReady) == [first, second]
    assert blocks() == [left]
    assert len(devices.cuda.registered) == 1, "what may be read stays registered"
    left.unlink()


async def test_newest_version_stays_when_the_gpu_fails_as_it_digests_a_host_slot(
    fake: FakeBus, devices: FakeDevices
) -> None:
    device = devices.fakes[0]

    def fail() -> None:
        device.broken = True

    async with publishing(fake, devices, "host") as publisher:
        first = await publisher.publish(weights(1), 1)
        with pytest.raises(CudaFailed, match="ECC"):
            await publisher.publish(weights(2), 2, copied=fail)
        assert fake.said_of(CheckpointReady) == [first]
        device.broken = False
        (segment,) = ways_of(await publisher.publish(weights(2), 2))
        assert read_host(segment, 1600)[1] == first_tensor(weights(2))


async def test_generation_is_odd_while_the_slot_is_copied(
    fake: FakeBus, devices: FakeDevices
) -> None:
    seen = []
    async with publishing(fake, devices, "device") as publisher:
        (segment,) = ways_of(await publisher.publish(weights(1), 1))
        await publisher.publish(weights(2), 2)
        look = lambda: seen.append(read_gpu(devices, segment, 0)[0])  # noqa: E731
        devices.fakes[0].before_copy = look
        (again,) = ways_of(await publisher.publish(weights(3), 3))
    assert seen == [near_generation(segment) + 1]
    assert near_generation(again) == near_generation(segment) + 2


async def test_newest_version_stays_when_the_device_fails(
    fake: FakeBus, devices: FakeDevices
) -> None:
    async with publishing(fake, devices, "device") as publisher:
        first = await publisher.publish(weights(1), 1)
        devices.fakes[0].broken = True
        with pytest.raises(CudaFailed, match="ECC"):
            await publisher.publish(weights(2), 2)
        assert fake.said_of(CheckpointReady) == [first]
        assert read_gpu(devices, ways_of(first)[0], 1600)[1] == first_tensor(weights(1))
        devices.fakes[0].broken = False
        await publisher.publish(weights(2), 2)


@pytest.mark.parametrize("slots", ["host", "device", "both", "auto"])
@pytest.mark.parametrize("fails_first", [False, True])
async def test_slot_is_left_to_the_device_when_it_does_not_get_done(
    fake: FakeBus, slots: SlotsIn, fails_first: bool
) -> None:
    devices = FakeDevices()
    device = devices.fakes[0]

    def fail() -> None:
        raise CudaFailed("launching", "a kernel", "CUDA_ERROR_LAUNCH_FAILED")

    async with publishing(fake, devices, slots) as publisher:
        first = await publisher.publish(weights(1), 1)
        before = set(blocks()), set(devices.cuda.allocated)
        device.late = True
        if fails_first:
            device.before_copy = fail
        with pytest.raises(CudaTimeout, match="300 s"):
            await publisher.publish(weights(2), 2)
        device.late = False
        left = set(blocks()) - before[0], set(devices.cuda.allocated) - before[1]
        assert any(left), "the slot that is written still"
        if slots in ("device", "both"):
            with pytest.raises(CudaTimeout):
                await publisher.publish(weights(2), 2)
        else:
            second = await publisher.publish(weights(2), 2)
            assert not {SHM / way.name for way in shared_ways(second)} & left[0]
        assert fake.said_of(CheckpointReady)[0] == first
    assert set(blocks()) == left[0]
    assert set(devices.cuda.allocated) == left[1]
    for path in left[0]:
        path.unlink()


async def test_publish_names_need_and_have_when_the_gpu_is_full(fake: FakeBus) -> None:
    devices = FakeDevices(FakeCuda(device_bytes=5 * CUDA_ALIGNMENT_BYTES))
    async with publishing(fake, devices, "device") as publisher:
        events = [await publisher.publish(weights(version), version) for version in (1, 2)]
        huge = weights(3, 5 * CUDA_ALIGNMENT_BYTES // 2)
        with pytest.raises(DeviceMemoryFull) as full:
            await publisher.publish(huge, 3)
        assert (full.value.device, full.value.uuid) == (0, devices.cuda.device_uuid(0))
        assert full.value.need_bytes == 6 * CUDA_ALIGNMENT_BYTES
        assert full.value.have_bytes == 4 * CUDA_ALIGNMENT_BYTES, "the old slot's is counted in"
        assert fake.said_of(CheckpointRetired) == []
        for version, ready in enumerate(events, 1):
            found = read_gpu(devices, ways_of(ready)[0], 1600)[1]
            assert found == first_tensor(weights(version))
        await publisher.publish(weights(3), 3)
    devices.cuda.assert_clean()


async def test_nothing_is_left_when_a_slot_cannot_be_had_on_one_side(
    fake: FakeBus, devices: FakeDevices
) -> None:
    async with publishing(fake, devices, "both") as publisher:
        devices.cuda.fail("export", "CUDA_ERROR_NOT_SUPPORTED")
        with pytest.raises(CudaFailed, match="NOT_SUPPORTED"):
            await publisher.publish(weights(1), 1)
        assert devices.cuda.allocated == {}
        assert blocks() == []
        await publisher.publish(weights(1), 1)


async def test_slots_are_made_anew_when_the_part_grows(fake: FakeBus, devices: FakeDevices) -> None:
    async with publishing(fake, devices, "both") as publisher:
        for version, size in enumerate((800, 800, 900_000, 900_000, 900_000, 10)):
            tensors = weights(version, size)
            near, far = ways_of(await publisher.publish(tensors, version))
            assert read_gpu(devices, near, 2 * size)[1] == first_tensor(tensors)
            assert read_host(far, 2 * size)[1] == first_tensor(tensors)
        assert len(devices.cuda.allocated) == len(devices.cuda.registered) == 2


async def test_gpu_slot_is_not_written_while_a_reader_holds_its_lease(
    fake: FakeBus, devices: FakeDevices
) -> None:
    async with publishing(fake, devices, "device") as publisher:
        first = await publisher.publish(weights(1), 1)
        await publisher.publish(weights(2), 2)
        fake.leases = [ReaderLease(model=MODEL, version=1, engine="a", consumer="c")]
        with pytest.raises(SlotBusy, match="a \\(version 1\\)"):
            await publisher.publish(weights(3), 3)
        assert read_gpu(devices, ways_of(first)[0], 1600)[1] == first_tensor(weights(1))
        fake.leases = []


async def test_gpu_memory_is_left_to_the_process_s_end_when_a_reader_does_not_end(
    fake: FakeBus, caplog: pytest.LogCaptureFixture
) -> None:
    devices = FakeDevices()
    async with publishing(fake, devices, "device") as publisher:
        ready = await publisher.publish(weights(1), 1)
        fake.leases = [ReaderLease(model=MODEL, version=1, engine="a", consumer="c")]
    assert read_gpu(devices, ways_of(ready)[0], 1600)[1] == first_tensor(weights(1))
    assert "stays allocated" in caplog.text
    assert [retired.active_readers for retired in fake.said_of(CheckpointRetired)] == [0, 1]
    assert blocks() == []


async def test_version_of_a_dead_publisher_s_gpu_is_retired_by_the_next_one(
    fake: FakeBus, devices: FakeDevices
) -> None:
    async with publishing(fake, devices, "device") as publisher:
        ready = await publisher.publish(weights(1), 1)
        (sign,) = blocks()
        assert sign.stat().st_size == SHM_HEADER_BYTES
    fake.said = [ready]
    sign.write_bytes(bytes(SHM_HEADER_BYTES))  # nobody holds a lock on it: its owner was killed
    async with publishing(fake, devices, "device"):
        (retired,) = fake.said_of(CheckpointRetired)
        assert (retired.version, retired.reason) == (1, "its publisher died")
        assert not sign.exists()


async def test_version_of_a_living_publisher_s_gpu_is_left_alone_when_another_has_died(
    fake: FakeBus, devices: FakeDevices
) -> None:
    async with publishing(fake, devices, "device") as publisher:
        await publisher.publish(weights(1), 1)
        dead = SHM / f"weightbus-{MODEL}.trainer.0.{uuid.uuid4().hex[:16]}"
        dead.write_bytes(bytes(SHM_HEADER_BYTES))  # of one that was killed before
        async with publishing(fake, devices, "device"):
            assert not dead.exists()
            assert fake.said_of(CheckpointRetired) == []


async def test_version_of_another_host_s_gpu_is_left_alone(
    fake: FakeBus, devices: FakeDevices
) -> None:
    far = CudaSegment(handle=b"h", host_id="another", device_uuid="GPU-1", generation=2)
    fake.said = [
        CheckpointReady(
            model=MODEL, version=1, producer="trainer", layout_digest="0" * 64, placement=((far,),)
        )
    ]
    (SHM / f"weightbus-{MODEL}.trainer.0.dead").write_bytes(bytes(SHM_HEADER_BYTES))
    async with publishing(fake, devices, "device"):
        assert fake.said_of(CheckpointRetired) == []


# -- which memory


async def test_publish_refuses_device_slots_when_nothing_lies_on_a_gpu(
    fake: FakeBus, devices: FakeDevices
) -> None:
    tensors = weights(1)
    devices.elsewhere = {tensor.data_ptr(): None for tensor in tensors.values()}
    async with publishing(fake, devices, "device") as publisher:
        with pytest.raises(SlotsUnsuitable, match="no tensor lies on a GPU"):
            await publisher.publish(tensors, 1)


async def test_publish_refuses_device_slots_when_tensors_lie_on_two_gpus(
    fake: FakeBus, devices: FakeDevices
) -> None:
    tensors = weights(1)
    devices.elsewhere = {tensors["b"].data_ptr(): 1}
    async with publishing(fake, devices, "device") as publisher:
        with pytest.raises(SlotsUnsuitable, match="GPUs 0, 1"):
            await publisher.publish(tensors, 1)


async def test_publish_refuses_device_slots_when_there_is_no_driver_or_compiler(
    fake: FakeBus, devices: FakeDevices
) -> None:
    async with publishing(fake, devices, "both") as publisher:
        devices.has_driver = False
        with pytest.raises(CudaUnavailable, match="driver"):
            await publisher.publish(weights(1), 1)
        devices.has_driver, devices.fakes[0].has_compiler = True, False
        with pytest.raises(CudaUnavailable, match="triton"):
            await publisher.publish(weights(1), 1)
        devices.fakes[0].has_compiler = True
        await publisher.publish(weights(1), 1)


async def test_tensors_of_two_gpus_go_to_host_slots_together(
    fake: FakeBus, devices: FakeDevices
) -> None:
    tensors = weights(1)
    devices.elsewhere = {tensors["b"].data_ptr(): 1}
    async with publishing(fake, devices, "host") as publisher:
        (segment,) = ways_of(await publisher.publish(tensors, 1))
        assert read_host(segment, 1600)[1] == first_tensor(tensors)
    assert devices.fakes[1].notes[0] == "stream 1 follows trainer"


async def test_auto_takes_the_gpu_when_tensors_lie_there_and_the_host_when_they_do_not(
    fake: FakeBus, devices: FakeDevices, caplog: pytest.LogCaptureFixture
) -> None:
    async with publishing(fake, devices, "auto") as publisher:
        (near,) = ways_of(await publisher.publish(weights(1), 1))
        assert isinstance(near, CudaSegment)
        tensors = weights(2)
        devices.elsewhere = {tensor.data_ptr(): None for tensor in tensors.values()}
        (far,) = ways_of(await publisher.publish(tensors, 2))
        assert isinstance(far, SharedMemorySegment)
    assert caplog.records == []


@pytest.mark.parametrize("missing", ["driver", "compiler", "one GPU", "memory", "handles"])
async def test_auto_takes_the_host_and_says_why_when_there_is_no_gpu_memory_to_be_had(
    fake: FakeBus,
    devices: FakeDevices,
    caplog: pytest.LogCaptureFixture,
    missing: str,
) -> None:
    tensors = weights(1)
    devices.has_driver = missing != "driver"
    devices.fakes[0].has_compiler = missing != "compiler"
    if missing == "one GPU":
        devices.elsewhere = {tensors["b"].data_ptr(): 1}
    if missing == "memory":
        devices.cuda.fail("allocate")
    if missing == "handles":
        devices.cuda.fail("export", "CUDA_ERROR_NOT_SUPPORTED")
    async with publishing(fake, devices, "auto") as publisher:
        for version in (1, 2):
            (segment,) = ways_of(await publisher.publish(tensors, version))
            assert read_host(segment, 1600)[1] == first_tensor(tensors)
    told = [record.message for record in caplog.records if "not on the GPU" in record.message]
    assert len(told) == 1


async def test_publisher_is_refused_when_other_hosts_could_read_nothing(fake: FakeBus) -> None:
    options = PublisherOptions(slots="device", p2p=P2pOptions())
    with pytest.raises(SettingInvalid, match="say 'both'"):
        async with open_publisher(fake.as_bus(), MODEL, options=options):
            raise AssertionError("opened")


async def test_publisher_is_refused_when_there_are_no_such_slots(fake: FakeBus) -> None:
    options = PublisherOptions(slots="gpu")  # type: ignore[arg-type]
    with pytest.raises(SettingInvalid, match="one of host, device, both, auto"):
        async with open_publisher(fake.as_bus(), MODEL, options=options):
            raise AssertionError("opened")


class HeldCuda(FakeCuda):
    """Frees nothing before it may."""

    def __init__(self) -> None:
        super().__init__()
        self.may_free = threading.Event()

    def free(self, device: int, address: int) -> None:
        assert self.may_free.wait(30)
        super().free(device, address)


async def test_publisher_ends_when_the_driver_does_not_free_its_slots(
    fake: FakeBus, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifetime, "FREE_TIMEOUT_S", 0.1)
    cuda = HeldCuda()
    async with publishing(fake, FakeDevices(cuda), "device") as publisher:
        await publisher.publish(weights(1), 1)
    assert "were not freed within 0.1 s" in caplog.text
    assert len(cuda.allocated) == 1
    cuda.may_free.set()
    with anyio.fail_after(30):
        while cuda.allocated or blocks():  # noqa: ASYNC110  # a thread that nobody waits for
            await anyio.sleep(0.01)
    cuda.assert_clean()


class WatchedDevices(FakeDevices):
    """Notes which threads ask the driver."""

    def __init__(self) -> None:
        super().__init__()
        self.asked_in: set[int] = set()

    def runtime(self) -> CudaRuntime:
        self.asked_in.add(threading.get_ident())
        return super().runtime()


@pytest.mark.parametrize("slots", ["host", "device", "both", "auto"])
async def test_driver_is_not_asked_in_the_event_loop_when_a_writer_is_chosen(
    fake: FakeBus, slots: SlotsIn
) -> None:
    devices = WatchedDevices()
    async with publishing(fake, devices, slots) as publisher:
        await publisher.publish(weights(1), 1)
    assert devices.asked_in
    assert threading.get_ident() not in devices.asked_in
