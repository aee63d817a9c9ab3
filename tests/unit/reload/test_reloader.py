"""A device that has no room for what a proven plan needs: who writes then, and what is said."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.reload.models import ModuleHost
from tests.unit.reload.test_worker import (
    Client,
    Fused,
    check_model,
    load_fused,
    make_client,
    make_tensors,
)
from tests.unit.transfer.publishing import Kind, Trainer, cut_layout, open_trainer
from weightbus.bus.errors import CudaFailed
from weightbus.consumers.errors import PlanError
from weightbus.consumers.planning.tiles import BoundTiles, TilePlan
from weightbus.consumers.reload import split
from weightbus.consumers.reload.cpu import CpuExecutor
from weightbus.consumers.reload.executor import Executor, Sums
from weightbus.schemas.worker import Attach, Failed

NO_ROOM = CudaFailed("80 bytes of a table", "cuda:0", "OutOfMemoryError: CUDA out of memory.")
TOO_MANY = PlanError("tiles of a table", 2**31, "must be fewer than 2**31")
FEW_BYTES = 120
STICKY = "CUDA error: an illegal memory access was encountered"


class Device:
    """What happens when an executor for it prepares a plan."""

    def __init__(self) -> None:
        self.on_prepare: Callable[[], None] = lambda: None
        self.updates = 0
        """Steps of versions so far."""

    def refuse(self, error: Exception) -> None:
        def fail() -> None:
            raise error

        self.on_prepare = fail


class DeviceHost(ModuleHost):
    """Its device can be lost, once it is one."""

    kind = "cpu"

    @property
    def device(self) -> str:
        return self.kind


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()

    class Preparing(CpuExecutor):
        portion_bytes = 2**30

        def update(self, bound: BoundTiles, numbers: Iterable[int]) -> Sums:
            device.updates += 1
            return super().update(bound, numbers)

        def prepare(self, plan: TilePlan) -> None:
            device.on_prepare()
            super().prepare(plan)

    def make(place: str, *rest: Any) -> Executor:
        return Preparing(*rest)

    monkeypatch.setattr(split, "make_executor", make)
    return device


@pytest.fixture
def host() -> DeviceHost:
    return DeviceHost(Fused, load_fused)


@pytest.fixture
def trainer(tmp_path: Path) -> Iterator[Trainer]:
    with open_trainer(cut_layout(make_tensors(0)), "memory", tmp_path) as trainer:
        yield trainer


@pytest.fixture
def client(trainer: Trainer, host: DeviceHost) -> Iterator[Client]:
    client = make_client(trainer, host)
    yield client
    client.worker.close()


@pytest.mark.parametrize("refusal", [NO_ROOM, TOO_MANY])
def test_engine_loads_every_version_and_says_why_when_the_device_has_no_room(
    client: Client, host: DeviceHost, device: Device, refusal: Exception
) -> None:
    device.refuse(refusal)
    for version in (1, 2, 3):
        tensors = make_tensors(10 * version)
        applied = client.apply(tensors, version)
        assert applied.reason == str(refusal)
        assert applied.direct_parameters == 0
        assert not client.worker.touched
        check_model(host.live, tensors)
    assert len(host.reloads) == 3
    assert client.attach().tiles == 0
    assert client.describe().untraced_reason == str(refusal)


def test_version_fails_when_the_device_was_lost_while_its_tables_were_made(
    client: Client, host: DeviceHost, trainer: Trainer, device: Device
) -> None:
    """It would be lost to every later version, too: the engine has to end the process."""

    def fail() -> None:
        raise RuntimeError(STICKY)

    def lose() -> None:
        host.on_synchronize = fail
        raise CudaFailed("a table", "cuda:0", STICKY)

    host.kind, device.on_prepare = "cuda:0", lose
    failed = client.worker.handle(client.request(trainer.publish(make_tensors(10), 1), 1))
    assert isinstance(failed, Failed), failed
    assert (failed.error, failed.touched) == ("DeviceLost", True)
    assert client.worker.lost is not None


def test_cells_stay_what_they_were_when_the_device_has_no_room_for_others(
    client: Client, host: DeviceHost, trainer: Trainer, device: Device
) -> None:
    client.apply(make_tensors(10), 1)
    device.refuse(NO_ROOM)
    described = client.describe()
    fewer = Attach(
        request=2,
        layout_digest=trainer.layout_digest,
        needs_digest=described.needs_digest,
        cells=client.cells[1:],
        roots=trainer.roots,
        host_id="host",
        deadline_s=30.0,
    )
    failed = client.worker.handle(fewer)
    assert isinstance(failed, Failed), failed
    assert failed.error == "CudaFailed"
    tensors = make_tensors(20)
    applied = client.apply(tensors, 2)  # and its digests are the publisher's
    assert (applied.direct_parameters, applied.reason) == (3, "")
    check_model(host.live, tensors)


@pytest.mark.parametrize(("kind", "steps"), [("memory", 1), ("files", 2)])
def test_steps_are_short_only_when_what_they_read_is_fetched(
    kind: Kind,
    steps: int,
    host: DeviceHost,
    device: Device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is fetched takes as much main memory as a step spans."""
    monkeypatch.setattr(split, "PORTION_BYTES", FEW_BYTES)
    with open_trainer(cut_layout(make_tensors(0)), kind, tmp_path) as trainer:
        client = make_client(trainer, host)
        client.apply(make_tensors(10), 1)
        for version in (2, 3):
            device.updates = 0
            tensors = make_tensors(10 * version)
            assert client.apply(tensors, version).direct_parameters == 3
            assert device.updates == steps
            check_model(host.live, tensors)
        client.worker.close()
