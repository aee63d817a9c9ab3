"""The route `local`: what it takes where there are GPUs, and a file server that does not answer."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from tests.unit.transfer.blocks import open_block
from weightbus.consumers.engines.engine import Engine
from weightbus.consumers.errors import (
    ApplyFailed,
    DeadlineExceeded,
    RouteUnavailable,
    SegmentUnavailable,
    TornRead,
)
from weightbus.consumers.transfer.gpu import name_of
from weightbus.consumers.transfer.local import LocalRoute
from weightbus.consumers.transfer.route import Transfer
from weightbus.schemas.layout import Layout, SegmentSpec
from weightbus.schemas.placement import (
    CudaSegment,
    FileSegment,
    Placement,
    Segment,
    SharedMemorySegment,
)
from weightbus.schemas.worker import Applied, Feed, InPlace, Prepared

pytestmark = pytest.mark.anyio

SHORT_S = 0.05
NEVER = cast(Any, None)


class HungRoute(LocalRoute):
    """Its files are on a server that hangs until the test has ended."""

    def __init__(self) -> None:
        super().__init__("host")
        self.answered = threading.Event()

    def reach(self, layout: Layout, placement: Placement) -> Sequence[Segment]:
        self.answered.wait()
        return ()


ON_GPU = CudaSegment(handle=bytes(64), host_id="host", device_uuid="GPU-x", generation=2)
LAYOUT = Layout((), (), (SegmentSpec(8),))


class OneRank:
    """An engine that answers `apply` as it is told to.

    Args:
        failing: kind of segment -> the error that its worker answers.
        busy: how often it says that it is not ready yet.
        unprepared: kind of segment -> why its worker cannot prepare it.
    """

    def __init__(
        self,
        failing: Mapping[type[Segment], ApplyFailed] | None = None,
        busy: int = 0,
        unprepared: Mapping[type[Segment], str] | None = None,
    ) -> None:
        self._failing, self._unprepared = failing or {}, unprepared or {}
        self._busy = busy
        self.taken: list[type[Segment]] = []
        self.events: list[str] = []

    async def prepare(
        self, layout_digest: str, feeds: Mapping[int, Feed], deadline_s: float
    ) -> tuple[Prepared, ...]:
        self.events.append("prepare")
        self._busy -= 1
        ready, feed = self._busy < 0, feeds[0]
        assert isinstance(feed, InPlace)
        reason = self._unprepared.get(type(feed.sources[0]), "") if ready else ""
        return (Prepared(request=1, rank=0, ready=ready, reason=reason),)

    async def apply(
        self, version: int, layout_digest: str, feeds: Mapping[int, Feed], deadline_s: float
    ) -> tuple[Applied, ...]:
        feed = feeds[0]
        self.events.append("apply")
        assert isinstance(feed, InPlace)
        (source,) = feed.sources
        self.taken.append(type(source))
        if type(source) in self._failing:
            raise self._failing[type(source)]
        return (Applied(request=1, rank=0, version=version, bytes=8, cell_digests=b"", stages=()),)


def transfer_of(engine: OneRank, placement: Placement, deadline_s: float = 20.0) -> Transfer:
    async def begin_write() -> None:
        engine.events.append("pause")

    return Transfer(
        engine=cast(Engine, engine),
        ranks=(0,),
        version=1,
        layout=LAYOUT,
        layout_digest="0" * 64,
        placement=placement,
        plan=NEVER,
        begin_write=begin_write,
        deadline_s=deadline_s,
    )


def test_nearest_way_is_memory_of_gpus_when_all_ranks_are_on_gpus(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(8))
    route = LocalRoute("host", [str(tmp_path)])
    with open_block(bytes(8), "host") as block:
        file = FileSegment(path=str(tmp_path / "a"))
        placement = ((file, block.segment(), ON_GPU),)
        taken: list[Segment] = []
        for devices in ([], ["cuda:0", "cuda:1"], ["cpu", "cuda:0"], ["cpu"]):
            route.know_devices(devices)
            taken += route.reach(LAYOUT, placement)
        assert taken == [block.segment(), ON_GPU, block.segment(), block.segment()]
        route.know_devices(["cuda:0"])
        short = CudaSegment(handle=b"", host_id="host", device_uuid="GPU-x", generation=2)
        assert route.reach(LAYOUT, ((short, block.segment()),)) == (block.segment(),)
        assert route.reach(LAYOUT, ((short, file),)) == (file,)


def test_route_says_why_when_memory_of_gpus_is_all_that_is_offered() -> None:
    route = LocalRoute("host")
    with pytest.raises(RouteUnavailable, match="segment 0: a GPU's memory is read only where all"):
        route.reach(LAYOUT, ((ON_GPU,),))
    route.know_devices(["cuda:0"])
    assert route.reach(LAYOUT, ((ON_GPU,),)) == (ON_GPU,)
    other = CudaSegment(handle=bytes(64), host_id="other", device_uuid="GPU-x", generation=2)
    with pytest.raises(RouteUnavailable, match="on host other: must be on this one, host"):
        route.reach(LAYOUT, ((other,),))


async def test_shared_memory_is_taken_when_a_worker_cannot_open_memory_of_a_gpu() -> None:
    refusal = ApplyFailed(0, SegmentUnavailable.__name__, "no peer access", touched=False)
    engine, route = OneRank({CudaSegment: refusal}), LocalRoute("host")
    route.know_devices(["cuda:0"])
    with open_block(bytes(8), "host") as block:
        (applied,) = await route.transfer(transfer_of(engine, ((ON_GPU, block.segment()),)))
    assert applied.version == 1
    assert engine.taken == [CudaSegment, SharedMemorySegment]


async def test_gpu_that_could_not_be_read_is_tried_last_until_the_ranks_are_elsewhere() -> None:
    other = msgspec.structs.replace(ON_GPU, handle=bytes([1] * 64), device_uuid="GPU-y")
    reason = f"segment {name_of(ON_GPU)} is not readable: must be opened on device 0"
    refusal = ApplyFailed(0, SegmentUnavailable.__name__, reason, touched=False)
    engine, route = OneRank({CudaSegment: refusal}), LocalRoute("host")
    route.know_devices(["cuda:0"])
    with open_block(bytes(8), "host") as block:
        placement: Placement = ((ON_GPU, block.segment()),)
        for _ in range(2):
            await route.transfer(transfer_of(engine, placement))
            route.know_devices(["cuda:0"])
        assert engine.taken == [CudaSegment, SharedMemorySegment, SharedMemorySegment]
        assert route.reach(LAYOUT, ((other, block.segment()),)) == (other,)
        assert route.reach(LAYOUT, ((ON_GPU,),)) == (ON_GPU,)  # or nothing at all
        route.know_devices(["cuda:1"])
        assert route.reach(LAYOUT, placement) == (ON_GPU,)


async def test_gpu_is_tried_again_when_nothing_else_could_be_read_either() -> None:
    failure = ApplyFailed(0, SegmentUnavailable.__name__, "it is gone", touched=True)
    engine = OneRank({CudaSegment: failure, SharedMemorySegment: failure})
    route = LocalRoute("host")
    route.know_devices(["cuda:0"])
    with open_block(bytes(8), "host") as block:
        placement: Placement = ((ON_GPU, block.segment()),)
        with pytest.raises(ApplyFailed):
            await route.transfer(transfer_of(engine, placement))
        assert route.reach(LAYOUT, placement) == (ON_GPU,)


@pytest.mark.parametrize("cause", [SegmentUnavailable.__name__, TornRead.__name__])
async def test_first_failure_is_told_when_nothing_else_would_help(cause: str) -> None:
    failure = ApplyFailed(0, cause, "it is gone", touched=True)
    route = LocalRoute("host")
    route.know_devices(["cuda:0"])
    with open_block(bytes(8), "host") as block:
        for placement in (((ON_GPU,),), ((block.segment(),),), ((ON_GPU, block.segment()),)):
            if cause == SegmentUnavailable.__name__ and len(placement[0]) > 1:
                continue
            engine = OneRank({CudaSegment: failure, SharedMemorySegment: failure})
            with pytest.raises(ApplyFailed) as caught:
                await route.transfer(transfer_of(engine, placement))
            assert caught.value is failure
            assert len(engine.taken) == 1


async def test_engine_is_paused_only_when_its_ranks_are_ready_or_cannot_be() -> None:
    reason: dict[type[Segment], str] = {SharedMemorySegment: "OSError: no room"}
    engine, route = OneRank(busy=2, unprepared=reason), LocalRoute("host")
    with open_block(bytes(8), "host") as block:
        await route.transfer(transfer_of(engine, ((block.segment(),),)))
        assert engine.events == [*["prepare"] * 3, "pause", "apply"]
        engine.events.clear()
        await route.transfer(transfer_of(engine, ((block.segment(),),)))
    assert engine.events == ["prepare", "pause", "apply"]


async def test_other_memory_is_taken_before_the_pause_when_that_of_a_gpu_cannot_be_prepared() -> (
    None
):
    why = f"{SegmentUnavailable.__name__}: segment {name_of(ON_GPU)} is out of reach"
    engine, route = OneRank(unprepared={CudaSegment: why}), LocalRoute("host")
    route.know_devices(["cuda:0"])
    with open_block(bytes(8), "host") as block:
        await route.transfer(transfer_of(engine, ((ON_GPU, block.segment()),)))
        assert engine.events == ["prepare", "prepare", "pause", "apply"]
        await route.transfer(transfer_of(engine, ((ON_GPU,),)))  # or nothing at all
    assert engine.taken == [SharedMemorySegment, CudaSegment]


async def test_transfer_ends_unpaused_at_its_deadline_when_a_rank_is_never_ready() -> None:
    engine, route = OneRank(busy=10**9), LocalRoute("host")
    with open_block(bytes(8), "host") as block, pytest.raises(DeadlineExceeded) as caught:
        await route.transfer(transfer_of(engine, ((block.segment(),),), SHORT_S))
    assert not caught.value.touched
    assert set(engine.events) == {"prepare"}


async def test_transfer_ends_untouched_at_its_deadline_when_files_cannot_be_reached() -> None:
    began = []

    async def begin_write() -> None:
        began.append(True)

    route = HungRoute()
    transfer = Transfer(
        engine=NEVER,
        ranks=(0,),
        version=1,
        layout=Layout((), (), ()),
        layout_digest="0" * 64,
        placement=(),
        plan=NEVER,
        begin_write=begin_write,
        deadline_s=SHORT_S,
    )
    try:
        with pytest.raises(DeadlineExceeded) as caught:
            await route.transfer(transfer)
        assert not route.answered.is_set()
    finally:
        route.answered.set()
    assert not caught.value.touched
    assert not began
