"""The trainer's side of the bus: `open_publisher` and what it yields.

Owns two slots per rank; every step of publishing lies in a module of its own.
Invariants: versions only grow; what was published last stays readable until the next version is
published or the publisher ends; a `publish` that raises leaves the publisher as useful as before.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from functools import partial

import anyio
import anyio.from_thread
import anyio.to_thread
from msgspec import structs

from weightbus.bus.connection import Bus
from weightbus.bus.endpoint import Endpoint, open_endpoint_if_any
from weightbus.bus.errors import CudaFailed
from weightbus.bus.host import host_id
from weightbus.producers.announcing import Announcer
from weightbus.producers.clearing import clean_up_after_the_dead
from weightbus.producers.devices import Devices, Handover
from weightbus.producers.digests import put_sums
from weightbus.producers.errors import (
    DeviceMemoryFull,
    GivenUp,
    RankInvalid,
    VersionNotNew,
)
from weightbus.producers.files import Files, publish_files
from weightbus.producers.group import RankGroup
from weightbus.producers.lifetime import Lifetime
from weightbus.producers.measuring import BlockedClock, Measures
from weightbus.producers.memory import HostMemory, Owner
from weightbus.producers.options import PublisherOptions, WhenBusy, check_options
from weightbus.producers.sealer import Piece, Sealer, StoredLayout
from weightbus.producers.serving import wait_until_served
from weightbus.producers.shards import Part, Tensors, plan_part
from weightbus.producers.skipping import SkipTeller
from weightbus.producers.slots import Slot, Slots
from weightbus.producers.writers import Writer, Writers
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.errors import WeightBusError
from weightbus.schemas.progress import EngineState
from weightbus.tracing.attributes import BYTES, RANK
from weightbus.tracing.telemetry import Span, Telemetry

__all__ = ("Publisher", "PublisherOptions", "WhenBusy", "open_publisher")

_logger = logging.getLogger(__name__)

GIVE_UP_WAIT_S = 1.0
"""Of `give_up`, for what is being published to end by itself."""


@asynccontextmanager
async def open_publisher(
    bus: Bus,
    model: str,
    *,
    producer: str = "trainer",
    rank: int = 0,
    world_size: int = 1,
    telemetry: Telemetry | None = None,
    options: PublisherOptions | None = None,
    devices: Devices | None = None,
) -> AsyncIterator[Publisher]:
    """The publisher of one rank. Every rank of a trainer opens one, with the same `producer`.

    Blocks that dead publishers left in /dev/shm are removed first. At the end the versions in slots
    are retired and their readers waited for (see `PublisherOptions`); then the blocks are removed.
    A slot that a device still writes then is removed when that ends.
    `devices` are the GPUs of this process; None: all of them.

    Raises:
        RankInvalid: there is no such rank.
        SettingInvalid: `options` name no such slots or policy, or slots that `options.p2p` could
            not let others read.
        MessageInvalid: `model` or `producer` is no subject token.
        HostUnknown: the system does not tell which host this is.
        EndpointUnavailable, EndpointFailed: `options.p2p` requires a transfer engine.
        BusUnavailable, BusTimeout, RequestRefused: at the start or at the end.
    """
    if not 0 <= rank < world_size:
        raise RankInvalid(rank, f"must be from 0 to {world_size - 1}")
    announcer = Announcer(bus, model, producer)
    telemetry, options = telemetry or Telemetry(), options or PublisherOptions()
    check_options(options)
    with ExitStack() as stack:
        endpoint = await anyio.to_thread.run_sync(
            stack.enter_context, open_endpoint_if_any(options.p2p, bus.url)
        )
        publisher = Publisher(
            announcer, rank, world_size, telemetry, options, endpoint, devices or Devices()
        )
        stack.enter_context(bus.count_dead_letters(publisher._measures.dead_letter, model))
        await clean_up_after_the_dead(bus, model)
        if world_size > 1:
            await publisher._group.open()
        try:
            yield publisher
            await publisher._lifetime.linger()
        except BaseException:
            try:
                await publisher._lifetime.close()
            except WeightBusError as error:  # of two errors the first
                _logger.warning("the publisher of %s did not end well: %s", model, error)
            raise
        await publisher._lifetime.close()


class Publisher:
    """Publishes the versions of one model; made by `open_publisher`. One `publish` at a time."""

    def __init__(
        self,
        announcer: Announcer,
        rank: int,
        world_size: int,
        telemetry: Telemetry,
        options: PublisherOptions,
        endpoint: Endpoint | None,
        devices: Devices,
    ) -> None:
        self._bus, self._announcer = announcer.bus, announcer
        self._model, self._producer = announcer.model, announcer.producer
        self._rank, self._world_size = rank, world_size
        self._telemetry, self._options = telemetry, options
        owner = Owner(self._model, self._producer, rank, host_id())
        host = HostMemory(owner, endpoint)
        self._devices = devices
        self._writers = Writers(options.slots, owner, host, devices, options.digest_threads)
        self._slots = Slots(announcer, options.when_busy, options.slot_wait_s, warns=rank == 0)
        self._sealer = Sealer(announcer)
        self._part_layout = StoredLayout(self._bus, partial=True)
        self._group = RankGroup(announcer, rank, world_size, options.seal_timeout_s)
        self._teller = SkipTeller(announcer, rank, self._group if world_size > 1 else None)
        self._measures = Measures(announcer, self._slots, telemetry, rank)
        self._lifetime = Lifetime(announcer, self._slots, self._measures, options)
        self._tried = -1

    async def newest_version(self) -> int:
        """The greatest version of the model so far, -1: none. What comes next must be greater.

        Raises:
            BusUnavailable, BusTimeout, RequestRefused
        """
        return await self._announcer.newest()

    async def wait_until_served(
        self, version: int, *, timeout_s: float, engines: int = 1
    ) -> tuple[EngineState, ...]:
        """Until all present engines, at least `engines` of them, serve `version` or a newer one.

        Raises:
            NotServed: after `timeout_s` it is not so.
            PublisherClosed, BusUnavailable, BusTimeout, RequestRefused
        """
        self._lifetime.check_open()
        return await wait_until_served(
            self._bus, self._model, version, engines=engines, timeout_s=timeout_s
        )

    async def publish(
        self,
        tensors: Tensors | Part,
        version: int,
        metadata: Mapping[str, str] = {},
        *,
        copied: Callable[[], None] | None = None,
    ) -> CheckpointReady:
        """Copy what this rank holds into a slot, and announce `version` once all ranks have.

        Every rank calls it, with the same version; `metadata` is rank 0's, but where two ranks name
        a `step` in it that must be the same. Returns when the
        checkpoint is sealed. The trainer may touch its tensors again then, or when it raises, or
        from when `copied` is called before that, in the event loop. Of tensors on a GPU this is
        true of the stream that is this thread's current one as `publish` is called: what is queued
        there before is published, and what is queued there after is not.

        In a group of ranks a version that fails on one rank fails on all and is used up: go on with
        a greater one. Alone, the same version may be tried again.

        Raises:
            TensorInvalid, MessageInvalid: this cannot be published; nothing was written.
            SlotsUnsuitable, CudaUnavailable: not in slots of this kind; nothing was written.
            VersionNotNew: the version is not greater than all before it: nothing was written; or
                another publisher has announced one meanwhile: a slot was written for nothing.
            VersionSkipped: engines are still busy, and `when_busy` is `skip`; the newest version is
                untouched.
            SlotBusy: readers did not end in time, or at once if `when_busy` is `fail`. The newest
                version is untouched; the older one is retired if its readers were waited for.
            SharedMemoryFull, DeviceMemoryFull: two slots of this size do not fit; the newest
                version is untouched.
            SharedMemoryUnavailable: the system refuses a slot; the newest version is untouched.
            EndpointFailed: the slot cannot be registered; the newest version is untouched.
            CudaFailed: a device refuses a slot, or fails; the newest version is untouched.
            CudaTimeout: a device may go on reading the tensors and writing to the slot, which is
                left to it; the newest version is untouched. That GPU takes no further slot.
            SealFailed: the ranks did not come together, or are at different steps.
            PublisherClosed: it has ended, maybe while this was under way: it is not announced.
            ObjectTooLarge, BusUnavailable, BusTimeout, RequestRefused
        """
        tell = None if copied is None else partial(anyio.from_thread.run_sync, copied)
        try:
            part = tensors if isinstance(tensors, Part) else plan_part(tensors)
            handover = self.hand_over(part, tell)
        except Exception as error:
            await self.give_up_unprepared(version, error)
            raise
        return await self.publish_part(part, version, metadata, handover)

    def hand_over(self, part: Part, copied: Callable[[], None] | None = None) -> Handover:
        """To be called in the trainer's thread, just before `publish_part`, if that is another.

        `copied` is called in a thread of the publisher's.
        """
        return self._devices.hand_over(part, copied)

    async def publish_part(
        self, part: Part, version: int, metadata: Mapping[str, str], handover: Handover
    ) -> CheckpointReady:
        """As `publish`, for a trainer in another thread than this one."""
        clock = BlockedClock(handover)
        async with self._lifetime.turn():
            with (
                self._announcer.span(self._telemetry, version) as span,
                self._measures.measure(clock, span),
                self._measures.count(version),
            ):
                span.set(BYTES, part.size_bytes)
                return await self._publish_part(part, version, metadata, span, clock.handover)

    async def publish_files(
        self,
        files: Files,
        version: int,
        metadata: Mapping[str, str] = {},
        *,
        digest: bool = True,
    ) -> CheckpointReady:
        """Announce safetensors files: paths, patterns, or a `*.safetensors.index.json`.

        Called on rank 0 alone. The files are read in place: leave them as they are.

        Raises:
            FileUnreadable, MessageInvalid: files are missing, or not safetensors.
            VersionNotNew, RankInvalid, PublisherClosed
            BusUnavailable, BusTimeout, RequestRefused
        """
        if self._rank != 0:
            raise RankInvalid(self._rank, "files are published by rank 0 alone")
        async with self._lifetime.turn():
            with (
                self._announcer.span(self._telemetry, version) as span,
                self._measures.count(version),
            ):
                try:
                    return await publish_files(
                        self._announcer, files, version, metadata, digest=digest, span=span
                    )
                except BaseException as error:
                    await self._teller.tell(version, error, 0.0)
                    raise

    async def give_up(self, version: int, reason: str) -> None:
        """Say that this rank will not come to publish `version`: its training has failed.

        Called on every rank that still can, for what was to be published next. No rank that is in
        `publish` waits for it any longer, and `CheckpointSkipped` names the ranks of which nothing
        is heard within 0.5 s. In a group of ranks the version is used up; nothing is said of one
        that `publish` was called with there. Best effort, within 6 s, which a cancellation does
        not cut short; what the bus refuses is logged.

        Raises:
            MessageInvalid: there is no such version.
            PublisherClosed
        """
        draft, error = self._announcer.draft(version, {}), GivenUp(version, reason)
        with anyio.CancelScope(shield=True), suppress(GivenUp):
            async with AsyncExitStack() as stack:
                with anyio.move_on_after(GIVE_UP_WAIT_S):  # what runs may take much longer
                    await stack.enter_async_context(self._lifetime.one_at_a_time)
                self._lifetime.check_open()
                if version <= self._tried:
                    return
                with self._measures.count(version):
                    await self._say_given_up(draft, error)
                    raise error

    async def _say_given_up(self, draft: CheckpointReady, error: GivenUp) -> None:
        if self._world_size == 1:
            await self._teller.tell(draft.version, error, 0.0)
            return
        self._tried = draft.version
        said = self._group.draft(draft)
        await self._group.give_up(said, error)
        await self._teller.tell_of_others(said, error)

    async def give_up_unprepared(self, version: int, error: Exception) -> None:
        """`publish` was called, but there is no part to publish: other ranks may wait for it."""
        if self._world_size > 1:
            with suppress(WeightBusError):  # of two errors the first
                await self.give_up(version, f"{type(error).__name__}: {error}")

    async def _publish_part(
        self,
        part: Part,
        version: int,
        metadata: Mapping[str, str],
        span: Span,
        handover: Handover,
    ) -> CheckpointReady:
        if self._world_size > 1:
            return await self._publish_among_ranks(part, version, metadata, span, handover)
        draft, write = await self._begin(part, version, metadata, handover)
        try:
            await self._sealer.prepare([part.layout])
            mine = await write()
            return await self._sealer.seal([mine], draft, span.ref.headers())
        except BaseException as error:
            await self._teller.tell(version, error, self._slots.waited_s)
            raise

    async def _publish_among_ranks(
        self,
        part: Part,
        version: int,
        metadata: Mapping[str, str],
        span: Span,
        handover: Handover,
    ) -> CheckpointReady:
        said = self._group.draft(self._announcer.draft(version, {}), metadata.get("step", ""))
        if version <= self._tried:
            raise VersionNotNew(self._model, version, self._tried, self._producer)
        self._tried = version
        self._group.headers = span.ref.headers()
        span.set(RANK, self._rank)
        try:
            draft, write = await self._begin(part, version, metadata, handover)
            layout_digest = await self._part_layout.put(part.layout)
            said = structs.replace(said, layout_digest=layout_digest)
            mine = await write()
            key = await put_sums(self._bus, mine.digests)
            said = structs.replace(said, placement=mine.placement, shard_digests=key)
            if self._rank != 0:
                ready = await self._group.follow(said)
                self._announcer.remember(ready)
                return ready
            parts = await self._group.gather(said)
            span.link(*self._group.spans.values())
            pieces = await self._sealer.fetch(mine, parts)
            self._lifetime.check_open()
            return await self._sealer.seal(pieces, draft, span.ref.headers())
        except BaseException as error:
            await self._group.give_up(said, error)
            if self._teller.is_own(error):
                await self._teller.tell(version, error, self._slots.waited_s)
            else:
                await self._teller.tell_of_others(said, error)
            raise

    async def _begin(
        self, part: Part, version: int, metadata: Mapping[str, str], handover: Handover
    ) -> tuple[CheckpointReady, Callable[[], Awaitable[Piece]]]:
        """The event, and what writes the part; or raises, before anything is done."""
        draft = self._announcer.draft(version, metadata)
        newest = await self._announcer.check_new(version)
        writer = await self._choose(part)
        return draft, partial(self._write, part, version, newest, handover, writer)

    async def _choose(self, part: Part) -> Writer:
        """In a thread: it asks the driver, and compiles kernels."""
        return await anyio.to_thread.run_sync(self._writers.choose, part)

    async def _write(
        self, part: Part, version: int, newest: int, handover: Handover, writer: Writer
    ) -> Piece:
        """Into a free slot. Cancelled or failed, the slot stays odd: nobody can read it."""
        try:
            writer, slot = await self._free(part, version, newest, writer)
            self._lifetime.check_open()
            digests = await anyio.to_thread.run_sync(
                writer.write, part, slot, handover, anyio.from_thread.check_cancelled
            )
            self._lifetime.check_open()
            slot.version = version
            return Piece(part.layout, self._slots.placement(slot), digests)
        finally:
            self._slots.done()

    async def _free(
        self, part: Part, version: int, newest: int, writer: Writer
    ) -> tuple[Writer, Slot]:
        """A slot, and who writes it: `writer`, unless there is no room on its device."""
        size_bytes = part.layout.segments[0].size_bytes
        while True:
            try:
                return writer, await self._slots.free(size_bytes, version, newest, writer.kinds)
            except (CudaFailed, DeviceMemoryFull) as error:
                if not self._writers.falls_back(error):
                    raise
                writer = await self._choose(part)
