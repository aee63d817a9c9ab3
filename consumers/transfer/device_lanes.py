"""Device lanes, as one worker sees them: what it fills of them, and what it reads in all of them.

The slots of a device lane lie in memory of the GPU of the worker that fills it; the lane's block in
shared memory, owned by that worker's consumer, holds the words by which all know how far it is, and
what the consumer alone could fetch. So every byte crosses PCIe once per host: one worker copies it
from the host, all others of the host read it from that worker's GPU.

`DeviceStaging` owns, from transfer to transfer, the worker's slots, its peers' handles, two streams
and the communicators. `DeviceLanes` is one transfer, as `Lanes`: it fills what this worker has to
fill whenever it waits for what it reads.

Invariants:
    However a transfer ends, nothing that was queued for it still runs when `open_lanes` is left:
    communicators of one that failed are dropped, streams are waited for.
    Slots are announced, and filled as far as there is room, before anything is waited for that
    other workers of the host do: no two of them wait for each other's.
    The words of a reader count only what it has read; its own slots are no exception.

Blocking: runs in workers. Not for several threads at once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np

from weightbus.bus.cuda import CudaRuntime, open_cuda
from weightbus.bus.errors import CudaFailed, CudaUnavailable
from weightbus.consumers.errors import PlanError, SegmentUnavailable
from weightbus.consumers.planning.buckets import BucketPlan
from weightbus.consumers.transfer.communicators import Communicators
from weightbus.consumers.transfer.device_filler import (
    Broadcaster,
    FilledLane,
    Filler,
    Source,
    root_runs,
)
from weightbus.consumers.transfer.device_slots import KEPT_OPENINGS, DeviceSlots, LaneSlots
from weightbus.consumers.transfer.gpu import OpenCuda, is_gpu
from weightbus.consumers.transfer.lanes import (
    Budget,
    Lanes,
    StagingBlock,
    StagingCache,
    leave_lanes,
    wait_for,
)
from weightbus.consumers.transfer.segments import OpenDevice, OpenMemory, SegmentCache
from weightbus.schemas.placement import Segment
from weightbus.schemas.shared_memory import SHM_FETCHED_OFFSET, SHM_FILLED_OFFSET
from weightbus.schemas.worker import LaneFill, StageTiming, Stream

__all__ = ("Broadcasters", "DeviceFeed", "DeviceLanes", "DeviceStaging", "TimedBudget", "number_of")

EAGER_S: Final = 20e-3
"""A bucket takes a millisecond: for so long a worker looks again at once."""

PREPARE_S: Final = 0.5
"""So long a worker that prepares waits for its peers' slots: they may be made at another time."""

BURIAL_S: Final = 2.0
"""What was broadcast ends so long after it is given up, or is found on the device."""

_FIRST_PAUSE_S: Final = 20e-6
_LONGEST_PAUSE_S: Final = 1e-3

_logger = logging.getLogger(__name__)


class TimedBudget(Budget, Protocol):
    """A budget that can be passed on."""

    @property
    def left_s(self) -> float:
        """Seconds; 0: nothing is left."""


class Broadcasters(Protocol):
    """As `weightbus.consumers.transfer.communicators.Communicators`."""

    def open_all(
        self, fills: Sequence[LaneFill], deadline_s: float, check: Callable[[], None]
    ) -> Sequence[Broadcaster]: ...

    def drop(self, group: str) -> None: ...

    def wait_burials(self, deadline_s: float) -> int: ...

    def close(self, deadline_s: float) -> int: ...


@dataclass(frozen=True)
class DeviceFeed:
    """What one transfer through device lanes is, for one worker."""

    feed: Stream
    blocks: tuple[StagingBlock, ...]
    """Of all lanes, in their order."""
    plan: BucketPlan
    """How the layout is cut."""
    sizes_bytes: tuple[int, ...]
    """Of every segment of the layout."""
    staging: StagingCache
    """Has opened the blocks."""
    segments: SegmentCache
    """For what this worker reads itself."""

    def check(self) -> None:
        """
        Raises:
            PlanError: its parts disagree.
        """
        feed, plan = self.feed, self.plan
        if (plan.lanes, plan.bucket_bytes) != (len(feed.lanes), feed.bucket_bytes):
            limit = f"must be those of the feed: {len(feed.lanes)} of {feed.bucket_bytes:,} bytes"
            raise PlanError("lanes", f"{plan.lanes} of {plan.bucket_bytes:,} bytes", limit)
        if feed.sources and len(feed.sources) != len(self.sizes_bytes):
            limit = f"must be {len(self.sizes_bytes)}"
            raise PlanError("sources", f"{len(feed.sources)} long", limit)


def number_of(device: str) -> int:
    """Of a worker's GPU, as it names its device: `cuda`, `cuda:1`.

    Raises:
        SegmentUnavailable: it is no GPU: it has no device lanes.
    """
    if not is_gpu(device):
        limit = "must be one of a worker on a GPU"
        raise SegmentUnavailable("device lane", f"told to a worker on {device}", limit)
    return int(device.partition(":")[2] or "0")


class DeviceLanes(Lanes):
    """One transfer through the device lanes of a host. From now on the owners count on this reader.

    Args:
        addresses: of every lane's first slot, for this worker's GPU.
        filler: of the lanes that this worker fills.
        is_current: whether a peer's slots are where they were.
    """

    def __init__(
        self,
        blocks: Sequence[StagingBlock],
        feed: Stream,
        budget: Budget,
        addresses: Sequence[int],
        filler: Filler,
        is_current: Callable[[StagingBlock], bool],
    ) -> None:
        super().__init__(blocks, feed, budget)
        self._addresses, self._filler = tuple(addresses), filler
        self._is_current = is_current
        self._feed = feed
        own = {fill.lane for fill in feed.fills}
        self._peers = [block for lane, block in enumerate(blocks) if lane not in own]

    @property
    def timings(self) -> tuple[StageTiming, ...]:
        """What this worker did for the lanes that it fills."""
        return self._filler.timings

    def address(self, bucket: int, lane: int) -> int:
        """Where the part of a bucket lies that goes through a lane, for this worker's GPU."""
        return self._addresses[lane] + bucket % self._slots * self.bucket_bytes

    def wait_filled(self, bucket: int) -> None:
        """Return when a bucket can be read in every lane; fill meanwhile what is this worker's.

        Raises:
            SegmentUnavailable: an owner has given up, or is gone.
            TornRead: what this worker fills a lane from was written while it was read.
            PeerLost, NcclFailed: a lane cannot be broadcast.
            CudaFailed: the device refuses something.
            DeadlineExceeded
        """

        def is_filled() -> bool:
            self._filler.step()
            return min([block.filled(self._turn) for block in self._blocks]) > bucket

        wait_for(is_filled, self._blocks, self._budget, eager_s=EAGER_S)

    def done(self, bucket: int) -> None:
        """A bucket has been read: its slots may be filled again.

        Raises:
            SegmentUnavailable: an owner gave up meanwhile, or a peer has other slots: what was read
                may have been anything.
            As `wait_filled`.
        """
        for block in self._peers:
            if not self._is_current(block):
                found = "filled in other slots"
                raise SegmentUnavailable(block.name, found, "must stay where they were opened")
        super().done(bucket)
        if not self._filler.is_done:
            self._filler.step()

    def serve(self) -> None:
        """Read nothing more, but fill to the end what others still want.

        Raises:
            As `wait_filled`.
        """
        leave_lanes(self._blocks, self._feed)

        def is_done() -> bool:
            self._filler.step()
            return self._filler.is_done

        wait_for(is_done, self._blocks, self._budget, eager_s=EAGER_S)


class DeviceStaging:
    """What one worker has for device lanes. Not for several threads.

    Args:
        device: of the worker's parameters, as it names it.
        cuda: asked for when device lanes are first opened.
        groups: the communicators; None: those of NCCL, made when they are first needed.
    """

    def __init__(
        self, device: str, cuda: OpenCuda = open_cuda, groups: Broadcasters | None = None
    ) -> None:
        self._device, self._open_cuda, self._groups = device, cuda, groups
        self._slots: DeviceSlots | None = None
        self._streams: tuple[int, int] | None = None
        self._rests = 0
        """Transfers in a row that went without device lanes."""

    @contextmanager
    def open_lanes(self, fed: DeviceFeed, budget: TimedBudget) -> Iterator[DeviceLanes]:
        """The lanes of one transfer. The blocks stay open until this is left.

        Raises:
            PlanError: feed and plan disagree, or a copy would go elsewhere.
            SegmentUnavailable, TornRead: a segment or a peer's slots cannot be read.
            PeerLost, RouteUnavailable, NcclFailed: a group does not come together.
            CudaFailed: the device has no room, or refuses something.
            DeadlineExceeded
        """
        feed, blocks, plan = fed.feed, fed.blocks, fed.plan
        fed.check()
        slots = self._begin()
        with ExitStack() as stack:
            own = _take(slots, fed)
            sources = stack.enter_context(_sources(fed))
            for lane, mine in own.items():
                mine.begin(blocks[lane], feed.turn, feed.readers, plan.buckets)
            _announce(blocks, feed, budget)
            fillers: list[Filler] = []
            stack.enter_context(self._settled(feed, lambda: bool(fillers) and fillers[0].is_done))
            groups = self._open_groups(feed, blocks, budget)
            filler = Filler(
                plan,
                feed,
                [
                    FilledLane(
                        fill=fill,
                        block=blocks[fill.lane],
                        address=own[fill.lane].address,
                        group=groups.get(fill.lane),
                    )
                    for fill in feed.fills
                ],
                sources,
                self._runtime(),
                slots.device,
                self._stream_pair(),
                budget,
            )
            fillers.append(filler)
            stack.callback(filler.close)
            addresses = _addresses(slots, blocks, feed, own, budget, step=filler.step)
            yield DeviceLanes(blocks, feed, budget, addresses, filler, slots.is_current)
        slots.end()

    def prepare(self, fed: DeviceFeed, budget: TimedBudget) -> None:
        """What takes long of `open_lanes`: it will find it done. Moves nothing.

        Handles of peers are opened as far as they are there soon; the rest is left to `open_lanes`.

        Raises:
            As `open_lanes`.
        """
        feed, blocks = fed.feed, fed.blocks
        fed.check()
        slots = self._begin()
        own = _take(slots, fed)
        with _sources(fed):
            pass
        self._stream_pair()
        _announce(blocks, feed, None)
        self._open_groups(feed, blocks, budget)
        with suppress(SegmentUnavailable):
            _addresses(slots, blocks, feed, own, budget, patience_s=PREPARE_S)
        slots.end()

    def rest(self) -> None:
        """A transfer goes without device lanes: after a few of them memory of the GPU that is kept
        for lanes is let go of. Does not wait."""
        self._rests += 1
        if self._slots is not None:
            self._slots.begin()
            self._slots.end()
        if self._rests == KEPT_OPENINGS and self._groups is not None:
            self._groups.close(0.0)

    def close(self) -> None:
        """Let go of everything. Nothing of it is used on the device."""
        if self._groups is not None:
            self._groups.close(BURIAL_S)
            self._groups = None
        if self._slots is not None:
            self._slots.close()
            self._slots = None
        if self._streams is not None:
            for stream in self._streams:
                with suppress(CudaFailed):  # it goes with the process
                    self._runtime().destroy_stream(number_of(self._device), stream)
            self._streams = None

    # -- what a transfer needs

    def _begin(self) -> DeviceSlots:
        if self._slots is None:
            self._slots = DeviceSlots(number_of(self._device), self._runtime)
        self._slots.begin()
        self._rests = 0
        return self._slots

    def _open_groups(
        self, feed: Stream, blocks: Sequence[StagingBlock], budget: TimedBudget
    ) -> dict[int, Broadcaster]:
        """Lane -> the communicator of its group, of several members."""
        shared = sorted(
            (fill for fill in feed.fills if fill.size > 1), key=lambda fill: fill.number
        )
        if not shared:
            return {}

        def check() -> None:
            budget.check()
            for block in blocks:
                block.filled(feed.turn)

        opened = self._communicators().open_all(shared, budget.left_s, check)
        return {fill.lane: group for fill, group in zip(shared, opened, strict=True)}

    @contextmanager
    def _settled(self, feed: Stream, is_done: Callable[[], bool]) -> Iterator[None]:
        """When it is left, nothing runs any more in the streams. A device cannot be told to stop:
        only what waits for lost members is ended.

        Args:
            is_done: whether all broadcasts are over.
        """
        try:
            yield
        except BaseException:
            if self._groups is not None and not is_done():
                for fill in feed.fills:
                    if fill.size > 1:
                        self._groups.drop(fill.group)
                if left := self._groups.wait_burials(BURIAL_S):
                    _logger.warning("%d broadcasts go on after %g s", left, BURIAL_S)
            with suppress(CudaFailed):  # the device does nothing any more: its host finds that out
                self._wait_idle()
            raise
        self._wait_idle()

    def _wait_idle(self) -> None:
        cuda, device = self._runtime(), number_of(self._device)
        pause_s = _FIRST_PAUSE_S
        for stream in self._streams or ():
            while not cuda.is_done(device, stream):
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _stream_pair(self) -> tuple[int, int]:
        if self._streams is None:
            cuda, device = self._runtime(), number_of(self._device)
            self._streams = cuda.create_stream(device), cuda.create_stream(device)
        return self._streams

    def _communicators(self) -> Broadcasters:
        if self._groups is None:
            self._groups = Communicators(number_of(self._device), cuda=self._open_cuda)
        return self._groups

    def _runtime(self) -> CudaRuntime:
        try:
            return self._open_cuda()
        except CudaUnavailable as error:
            limit = f"must be readable by device {self._device}"
            raise SegmentUnavailable("device lane", f"out of reach ({error})", limit) from error


def _take(slots: DeviceSlots, fed: DeviceFeed) -> dict[int, LaneSlots]:
    """Slots for the lanes that this worker fills, by lane; their blocks hold their handles."""
    own = {}
    for fill in fed.feed.fills:
        block = fed.blocks[fill.lane]
        own[fill.lane] = slots.take(block.name, fed.feed.slots * fed.feed.bucket_bytes)
        own[fill.lane].name_in(block)
    return own


@contextmanager
def _sources(fed: DeviceFeed) -> Iterator[Mapping[int, Source]]:
    """The segments that this worker reads itself for the lanes that it fills, by number. Blocks
    into which others are staged for it are registered.

    Raises:
        SegmentUnavailable, TornRead: as `SegmentCache.open_all`; or one is no memory.
    """
    offered = dict(enumerate(fed.feed.sources))
    found: dict[int, Segment] = {}
    for fill in fed.feed.fills:
        for number in np.unique(root_runs(fed.plan, fill)["segment"]).tolist():
            source = offered.get(number)
            if source is None:
                fed.staging.register(fed.blocks[fill.lane])
            else:
                found[number] = source
    sizes = [fed.sizes_bytes[number] for number in found]
    with fed.segments.open_all(found.values(), sizes) as opened:
        sources: dict[int, Source] = {}
        for number, segment in zip(found, opened, strict=True):
            if not isinstance(segment, OpenMemory | OpenDevice):
                limit = "must be memory, for a worker that fills lanes"
                raise SegmentUnavailable(segment.name, "a file", limit)
            sources[number] = segment
        yield sources


def _announce(blocks: Sequence[StagingBlock], feed: Stream, budget: Budget | None) -> None:
    """Tell the readers that the handles are those of this turn, once its owner has begun it.

    Args:
        budget: None: only where the owner has.
    """
    waiting = [blocks[fill.lane] for fill in feed.fills]

    def is_announced() -> bool:
        for block in tuple(waiting):
            block.filled(feed.turn)
            if block.count(SHM_FILLED_OFFSET, feed.turn) >= 0:
                block.set_count(SHM_FETCHED_OFFSET, feed.turn, 0)
                waiting.remove(block)
        return not waiting

    if budget is None:
        is_announced()
    else:
        wait_for(is_announced, blocks, budget)


def _addresses(
    slots: DeviceSlots,
    blocks: Sequence[StagingBlock],
    feed: Stream,
    own: Mapping[int, LaneSlots],
    budget: Budget,
    *,
    step: Callable[[], None] = lambda: None,
    patience_s: float | None = None,
) -> list[int]:
    """Of every lane's first slot, for this worker's GPU; its own are where they are.

    Args:
        step: called meanwhile: what can be filled is filled, although a peer's engine may not be
            paused yet.
        patience_s: so long is waited for peers to tell theirs; None: as long as the budget allows.
            Those that are not there then are left out.
    """
    size_bytes = feed.slots * feed.bucket_bytes
    found = {lane: mine.address for lane, mine in own.items()}
    end = None if patience_s is None else time.monotonic() + patience_s

    def are_open() -> bool:
        step()
        for lane, block in enumerate(blocks):
            block.filled(feed.turn)
            if lane not in found and block.count(SHM_FETCHED_OFFSET, feed.turn) >= 0:
                found[lane] = slots.open_peer(block, size_bytes)
        return len(found) == len(blocks) or (end is not None and time.monotonic() >= end)

    wait_for(are_open, blocks, budget, eager_s=EAGER_S)
    return [found[lane] for lane in sorted(found)]
