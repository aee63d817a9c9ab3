"""Answers a consumer's requests inside one engine worker: describe, attach, prepare, apply, ...

Owns the live parameters of one rank while `handle` runs, what is known of each layout, the mapped
segments and staging blocks, and the threads that move and digest. Engine-independent: the engine's
adapter is a `ModelHost`.

A GPU cannot be stopped: when a deadline passes while it writes, it is waited for all the same, and
only then is the failure told, `touched`. If it never ends, neither does `handle`: the consumer
gives the worker up, and the engine ends the process.

Invariants:
    `touched` is set before the first write to a live parameter, whoever writes, and cleared only
    when a whole update has ended, its sources checked and the device synchronised;
    `version` is the version whose bytes were written last, whole;
    when `handle` returns, nothing writes to a parameter, and no segment is read any more; only what
    `Prepare` began goes on, on its own thread. Until it has ended, or `Apply` has waited for it,
    segments, staging blocks and the plans of streams are that thread's alone;
    no exception leaves `handle`: each becomes `Failed`, naming its class and `touched`.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Final

from weightbus.bus.cuda import open_cuda
from weightbus.consumers.errors import DeviceLost, NotAttached, PlanError, ProofNeeded
from weightbus.consumers.planning.buckets import BucketPlan
from weightbus.consumers.reload.deadline import Deadline
from weightbus.consumers.reload.faults import our_error, settle, settling
from weightbus.consumers.reload.host import ModelHost
from weightbus.consumers.reload.preparing import PrepareBudget, Preparing
from weightbus.consumers.reload.reloader import Outcome, Reloader
from weightbus.consumers.reload.threads import Threads, threads_per_worker
from weightbus.consumers.transfer.device_lanes import DeviceFeed, DeviceStaging
from weightbus.consumers.transfer.gpu import OpenCuda
from weightbus.consumers.transfer.lanes import Lanes, StagingBlock, StagingCache, leave_lanes
from weightbus.consumers.transfer.relayed import OpenRelayed, RelayReader
from weightbus.consumers.transfer.segments import OpenSegment, SegmentCache
from weightbus.schemas.errors import WeightBusError
from weightbus.schemas.layout_codec import decode_layout, layout_digest
from weightbus.schemas.needs_codec import needs_digest
from weightbus.schemas.worker import (
    Applied,
    Apply,
    Attach,
    Attached,
    Describe,
    Described,
    Detach,
    Detached,
    Failed,
    Feed,
    InPlace,
    Inspect,
    Inspected,
    Prepare,
    Prepared,
    Relay,
    StageTiming,
    Stream,
    WorkerReply,
    WorkerRequest,
)

__all__ = ("ReloadWorker",)

LAYOUTS_KEPT: Final = 4
"""Layouts whose plans are kept, as many as a consumer keeps; the longest unused goes first."""

_logger = logging.getLogger(__name__)


class _Known:
    """What a worker knows of one layout."""

    def __init__(self, reloader: Reloader) -> None:
        self.reloader = reloader
        self.needs_digest = needs_digest(reloader.needs)
        self.attached = False


class ReloadWorker:
    """One rank's end of the consumer's requests.

    Not thread-safe: `handle` and `close` are called on the worker's main thread, `handle(Apply)`
    only while no forward pass runs.
    """

    def __init__(
        self,
        host: ModelHost,
        rank: int,
        world_size: int,
        cuda: OpenCuda = open_cuda,
        lanes: DeviceStaging | None = None,
    ) -> None:
        """
        Args:
            cuda: asked for when a GPU first needs it.
            lanes: what it fills and reads device lanes with, from now on its own; None: that of the
                host's device.
        """
        self.rank = rank
        self.world_size = world_size
        self.instance = uuid.uuid4().hex
        """Of this worker process; a new one has nothing attached."""
        self._host = host
        self._threads = Threads(threads_per_worker(len(os.sched_getaffinity(0)), world_size))
        self._version = -1
        self._touched = False
        self._updates = 0
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._cuda = cuda
        self._lost: DeviceLost | None = None
        self._segments = SegmentCache("", (), host.device, cuda)
        self._staging = StagingCache(host.device, cuda)
        self._device_staging = lanes or DeviceStaging(host.device, cuda)
        self._readable: tuple[str, tuple[str, ...]] = ("", ())
        self._preparing = Preparing()

    @property
    def version(self) -> int:
        """The version whose bytes were written last, whole; -1: none."""
        return self._version

    @property
    def touched(self) -> bool:
        """True: an update began and did not end whole; the model must not serve."""
        return self._touched

    @property
    def updates(self) -> int:
        """How many updates have begun to write."""
        return self._updates

    @property
    def lost(self) -> DeviceLost | None:
        """Not None: the device does nothing for this process any more. Every request fails, and the
        engine has to end the process."""
        return self._lost

    def handle(self, request: WorkerRequest) -> WorkerReply:
        """Carry out one request and answer it; never raises.

        Blocks until done or its deadline, and then until the device is.
        """
        if self._lost is not None:
            return self._failed(request, self._lost)
        try:
            match request:
                case Describe():
                    return self._describe(request)
                case Attach():
                    return self._attach(request)
                case Prepare():
                    return self._prepare(request)
                case Apply():
                    return self._apply(request)
                case Inspect():
                    return self._inspect(request)
                case Detach():
                    self.close()
                    return Detached(request=request.request, rank=self.rank)
        except Exception as error:
            told = self._told(error)
            if not isinstance(error, WeightBusError):
                _logger.exception("rank %d: %s", self.rank, type(request).__name__)
            return self._failed(request, told)

    def close(self) -> None:
        """Unmap every segment and block, end every thread, and forget every plan. Parameters stay
        as they are."""
        self._preparing.finish()
        self._threads.close()
        self._known.clear()
        self._segments.close()
        self._device_staging.close()
        self._staging.close()

    def _told(self, error: Exception) -> Exception:
        """What is said of an error, once the device is idle."""
        try:
            settle(self._host)
        except DeviceLost as lost:
            error = lost
        if isinstance(error, DeviceLost):
            self._lost = error
        return our_error(error, self._host.device)

    def _failed(self, request: WorkerRequest, error: Exception) -> Failed:
        return Failed(
            request=request.request,
            rank=self.rank,
            error=type(error).__name__,
            reason=str(error)[:4096],
            touched=self._touched,
        )

    def _describe(self, request: Describe) -> Described:
        deadline = Deadline("describe", request.deadline_s)
        known = self._known.get(request.layout_digest)
        if known is None:
            layout = decode_layout(request.layout)
            found = layout_digest(layout)
            if found != request.layout_digest:
                raise PlanError("digest of the layout", found, f"must be {request.layout_digest}")
            deadline.check()
            known = self._known[request.layout_digest] = _Known(
                Reloader(self._host, layout, self._threads, self._cuda)
            )
            if len(self._known) > LAYOUTS_KEPT:
                self._known.popitem(last=False)
        deadline.check()
        return Described(
            request=request.request,
            rank=self.rank,
            world_size=self.world_size,
            instance=self.instance,
            device=self._host.device,
            free_bytes=self._host.free_bytes(),
            needs_digest=known.needs_digest,
            needs=known.reloader.needs,
            untraced_reason=known.reloader.untraced_reason[:4096],
        )

    def _attach(self, request: Attach) -> Attached:
        known = self._known_layout(request.layout_digest)
        if known.needs_digest != request.needs_digest:
            raise PlanError("needs", request.needs_digest, f"this rank's are {known.needs_digest}")
        self._preparing.finish()
        known.reloader.attach(request.cells)
        known.attached = True
        readable = (request.host_id, request.roots)
        if readable != self._readable:
            self._segments.close()
            self._segments = SegmentCache(*readable, self._host.device, self._cuda)
            self._readable = readable
        plan = known.reloader.plan
        return Attached(
            request=request.request,
            rank=self.rank,
            tiles=plan.tiles.size if plan else 0,
            tile_bytes=plan.source_bytes if plan else 0,
        )

    def _prepare(self, request: Prepare) -> Prepared:
        reloader = self._attached_layout(request.layout_digest).reloader

        def work(budget: PrepareBudget) -> None:
            self._prepare_feed(reloader, request.feed, budget)

        key = (request.layout_digest, request.feed)
        ready, reason = self._preparing.ask(key, work, request.deadline_s)
        return Prepared(request=request.request, rank=self.rank, ready=ready, reason=reason[:4096])

    def _prepare_feed(self, reloader: Reloader, feed: Feed, budget: Deadline) -> None:
        """What takes long of `_apply`, on the preparing thread: map and register what is read, and
        plan what is streamed."""
        if isinstance(feed, Stream):
            with self._blocks(feed, budget) as blocks:
                plan = reloader.prepare_stream(feed.bucket_bytes, len(blocks))
                if feed.device:
                    fed = self._fed(reloader, feed, blocks, plan)
                    self._device_staging.prepare(fed, budget)
        else:
            with self._opened(reloader, feed, budget):
                pass

    def _apply(self, request: Apply) -> Applied:
        deadline = Deadline("reload", request.deadline_s)
        reloader = self._attached_layout(request.layout_digest).reloader
        self._preparing.finish((request.layout_digest, request.feed))
        start_ns = time.time_ns()
        if isinstance(request.feed, Stream):
            outcome, filled = self._stream(reloader, request.feed, deadline)
        else:
            opened = self._opened(reloader, request.feed, deadline)
            with opened as segments, settling(self._host):
                self._await_steps(deadline)
                self._begin()
                outcome, filled = reloader.apply(segments, deadline), ()
        self._touched, self._version = False, request.version
        if not (isinstance(request.feed, Stream) and request.feed.device):
            self._device_staging.rest()
        return Applied(
            request=request.request,
            rank=self.rank,
            version=request.version,
            bytes=outcome.source_bytes,
            cell_digests=outcome.digests.astype("<u8").tobytes(),
            stages=(
                *filled,
                StageTiming(
                    "reload", start_ns, time.time_ns(), outcome.source_bytes, outcome.buckets
                ),
            ),
            direct_parameters=outcome.direct,
            processed_parameters=outcome.processed,
            reason=outcome.reason[:4096],
            proven=self._proven(),
            updates=self._updates,
        )

    def _await_steps(self, deadline: Deadline) -> None:
        """What the engine has left to the device ends before anything of ours is queued there."""
        self._host.synchronize()
        deadline.check()

    def _begin(self) -> None:
        """From here on a live parameter may have been written."""
        self._touched = True
        self._updates += 1

    def _stream(
        self, reloader: Reloader, feed: Stream, deadline: Deadline
    ) -> tuple[Outcome, tuple[StageTiming, ...]]:
        """What came of it, and what was done for lanes that this worker fills."""
        with self._blocks(feed, deadline) as blocks:
            try:
                if not feed.device:
                    _check_proven(reloader)
                with settling(self._host):
                    self._await_steps(deadline)
                    plan = reloader.prepare_stream(feed.bucket_bytes, len(blocks))
                    if feed.device:
                        fed = self._fed(reloader, feed, blocks, plan)
                        return self._stream_device(reloader, fed, deadline)
                    lanes = Lanes(blocks, feed, deadline)
                    return reloader.stream(lanes, deadline, self._begin), ()
            except BaseException:
                leave_lanes(blocks, feed)  # the other readers of the host go on
                raise

    def _stream_device(
        self, reloader: Reloader, fed: DeviceFeed, deadline: Deadline
    ) -> tuple[Outcome, tuple[StageTiming, ...]]:
        with self._device_staging.open_lanes(fed, deadline) as lanes:
            try:
                _check_proven(reloader)
                return reloader.stream(lanes, deadline, self._begin), lanes.timings
            except ProofNeeded:
                with suppress(WeightBusError):  # others do not suffer from what only this one needs
                    lanes.serve()
                raise

    def _blocks(
        self, feed: Stream, budget: Deadline
    ) -> AbstractContextManager[tuple[StagingBlock, ...]]:
        """Of all lanes; those of device lanes are only looked at."""
        size_bytes = 0 if feed.device else feed.slots * feed.bucket_bytes
        return self._staging.open_all(
            feed.lanes, size_bytes, feed.turn, budget, is_read=not feed.device
        )

    def _fed(
        self,
        reloader: Reloader,
        feed: Stream,
        blocks: tuple[StagingBlock, ...],
        plan: BucketPlan,
    ) -> DeviceFeed:
        sizes = tuple(segment.size_bytes for segment in reloader.layout.segments)
        return DeviceFeed(feed, blocks, plan, sizes, self._staging, self._segments)

    @contextmanager
    def _opened(
        self, reloader: Reloader, feed: InPlace | Relay, deadline: Deadline
    ) -> Iterator[Sequence[OpenSegment]]:
        """The segments of one version, however its feed brings them."""
        sizes = [segment.size_bytes for segment in reloader.layout.segments]
        if isinstance(feed, InPlace):
            if len(feed.sources) != len(sizes):
                raise PlanError("sources", f"{len(feed.sources)} long", f"must be {len(sizes)}")
            with self._segments.open_all(feed.sources, sizes, deadline.check) as segments:
                yield segments
            return
        size_bytes = feed.slots * feed.window_bytes
        with self._staging.open_all([feed.block], size_bytes, feed.turn, deadline) as (block,):
            reader = RelayReader(block, feed, deadline)
            yield [OpenRelayed(reader, number, size) for number, size in enumerate(sizes)]

    def _inspect(self, request: Inspect) -> Inspected:
        digests = b""
        unreadable: tuple[int, ...] = ()
        if request.layout_digest is not None:
            reloader = self._attached_layout(request.layout_digest).reloader
            self._preparing.finish()
            sums, unreadable = reloader.read_back()
            digests = sums.astype("<u8").tobytes()
        return Inspected(
            request=request.request,
            rank=self.rank,
            instance=self.instance,
            version=self._version,
            touched=self._touched,
            updates=self._updates,
            cell_digests=digests,
            unreadable=unreadable,
            proven=self._proven(),
        )

    def _proven(self) -> tuple[str, ...]:
        """Layouts that can be streamed."""
        return tuple(
            digest
            for digest, known in self._known.items()
            if known.attached and known.reloader.can_stream()
        )

    def _known_layout(self, digest: str) -> _Known:
        if digest not in self._known:
            raise NotAttached(digest, "described")
        self._known.move_to_end(digest)
        return self._known[digest]

    def _attached_layout(self, digest: str) -> _Known:
        known = self._known_layout(digest)
        if not known.attached:
            raise NotAttached(digest, "attached")
        return known


def _check_proven(reloader: Reloader) -> None:
    """
    Raises:
        ProofNeeded
    """
    if not reloader.can_stream():
        raise ProofNeeded("version", "no proof lets every parameter be written directly")
