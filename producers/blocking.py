"""The publisher for trainers that have no event loop: the same methods, called from any thread.

Owns a daemon thread with an event loop, the bus connection and the publisher in it. It ends with
`close` or its `with` block; a trainer that does neither is cleaned up after when its interpreter
exits, and one that is killed when the next publisher on its host starts.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from types import TracebackType
from typing import Self, TypeVar

from anyio.from_thread import start_blocking_portal

from weightbus.bus.connection import open_bus
from weightbus.bus.settings import BusSettings
from weightbus.producers.devices import Devices, Handover
from weightbus.producers.errors import PublisherClosed, VersionSkipped
from weightbus.producers.files import Files
from weightbus.producers.publisher import Publisher, PublisherOptions, open_publisher
from weightbus.producers.shards import Part, Tensors, plan_part
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.progress import EngineState
from weightbus.tracing.otlp import OtlpSettings
from weightbus.tracing.telemetry import Telemetry, open_telemetry

__all__ = ("BlockingPublisher", "Publication")

_logger = logging.getLogger(__name__)

T = TypeVar("T")


class Publication:
    """A version that is being published in the background; of `BlockingPublisher.start`."""

    def __init__(self, version: int, future: Future[CheckpointReady]) -> None:
        self.version, self._future = version, future

    @property
    def is_done(self) -> bool:
        """Whether it was announced, or has failed."""
        return self._future.done()

    def result(self, timeout_s: float | None = None) -> CheckpointReady:
        """What was announced, once it is.

        Raises:
            TimeoutError: it was not within `timeout_s`, and goes on.
            What `BlockingPublisher.publish` raises.
        """
        return self._future.result(timeout_s)


class BlockingPublisher:
    """A `Publisher` with blocking methods. Connected once it is made.

    Not inherited over `fork`: a child's copy does nothing.
    """

    url: str
    """Of the bus: what engines need to join."""

    def __init__(
        self,
        settings: BusSettings,
        model: str,
        *,
        producer: str = "trainer",
        rank: int = 0,
        world_size: int = 1,
        telemetry: Telemetry | None = None,
        otlp: OtlpSettings | None = None,
        options: PublisherOptions | None = None,
        devices: Devices | None = None,
    ) -> None:
        """Connect to the bus of `settings` and open a publisher; see `open_publisher`.

        Without `telemetry` its spans go to the collector of `otlp`, as those of a service with the
        producer's name; the last are sent when it is closed.

        Raises:
            ExporterMissing: `otlp` is given, but the extra `otlp` is not installed.
            RankInvalid, MessageInvalid, HostUnknown
            BusUnavailable, BusTimeout, RequestRefused, and what else `open_bus` raises
        """
        self.model = model
        self._process = os.getpid()
        self._stack = ExitStack()

        @asynccontextmanager
        async def open_both() -> AsyncIterator[tuple[str, Publisher]]:
            async with (
                open_bus(settings) as bus,
                open_publisher(
                    bus,
                    model,
                    producer=producer,
                    rank=rank,
                    world_size=world_size,
                    telemetry=telemetry,
                    options=options,
                    devices=devices,
                ) as publisher,
            ):
                yield bus.url, publisher

        with self._stack:
            if telemetry is None:
                telemetry = self._stack.enter_context(open_telemetry(producer, otlp=otlp))
            self._portal = self._stack.enter_context(start_blocking_portal())
            self.url, self._publisher = self._stack.enter_context(
                self._portal.wrap_async_context_manager(open_both())
            )
            self._stack = self._stack.pop_all()
        self._open = True
        atexit.register(self._abandon)
        if settings.url is None:
            _logger.warning(
                "no URL of a bus is given (WEIGHTBUS_NATS_URL): this one is private to this "
                "process, and engines join it by %s",
                self.url,
            )

    def newest_version(self) -> int:
        """As `Publisher.newest_version`."""
        return self._call(self._publisher.newest_version)

    def wait_until_served(
        self, version: int, *, timeout_s: float, engines: int = 1
    ) -> tuple[EngineState, ...]:
        """As `Publisher.wait_until_served`."""
        wait = self._publisher.wait_until_served
        return self._call(partial(wait, version, timeout_s=timeout_s, engines=engines))

    def publish(
        self, tensors: Tensors | Part, version: int, metadata: Mapping[str, str] = {}
    ) -> CheckpointReady:
        """As `Publisher.publish`."""
        self._check_open()
        part, handover = self._hand_over(tensors, version)
        publish_part = self._publisher.publish_part
        return self._call(partial(publish_part, part, version, metadata, handover))

    def start(
        self, tensors: Tensors | Part, version: int, metadata: Mapping[str, str] = {}
    ) -> Publication:
        """As `publish`, but returns once the trainer may touch its tensors again.

        The rest is done in the background: digests, sealing, the announcement. What is published
        next waits for it. If it fails, that is logged, and `Publication.result` raises it.

        Raises:
            What `publish` raises, if it fails before the tensors are copied. Where a version is
            skipped because another rank does, that can be heard later: of `Publication.result`.
        """
        self._check_open()
        copied = threading.Event()
        part, handover = self._hand_over(tensors, version, copied.set)
        publish_part = self._publisher.publish_part
        future = self._portal.start_task_soon(publish_part, part, version, metadata, handover)
        future.add_done_callback(lambda _: copied.set())
        try:
            copied.wait()
        except BaseException:
            future.cancel()  # Ctrl-C: the work must not go on
            raise
        if future.done():
            future.result()
        future.add_done_callback(partial(_log_failure, version))
        return Publication(version, future)

    def publish_files(
        self,
        files: Files,
        version: int,
        metadata: Mapping[str, str] = {},
        *,
        digest: bool = True,
    ) -> CheckpointReady:
        """As `Publisher.publish_files`."""
        publish_files = self._publisher.publish_files
        return self._call(partial(publish_files, files, version, metadata, digest=digest))

    def give_up(self, version: int, reason: str) -> None:
        """As `Publisher.give_up`. Ctrl-C, or a signal's handler that raises, ends the wait only."""
        self._call(partial(self._publisher.give_up, version, reason))

    def close(self) -> None:
        """End well: linger, retire, wait for readers, remove the blocks. Idempotent.

        Raises:
            BusUnavailable, BusTimeout, RequestRefused: the versions could not be retired; the
                blocks are gone all the same.
        """
        self.__exit__(None, None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._open and os.getpid() == self._process:
            self._open = False
            atexit.unregister(self._abandon)
            self._stack.__exit__(kind, error, traceback)

    def _abandon(self) -> None:
        """At the interpreter's exit: end without lingering."""
        self.__exit__(SystemExit, SystemExit(), None)

    def _hand_over(
        self, tensors: Tensors | Part, version: int, copied: Callable[[], None] | None = None
    ) -> tuple[Part, Handover]:
        """In the trainer's thread. Where it fails, no other rank waits for this one's part."""
        try:
            part = tensors if isinstance(tensors, Part) else plan_part(tensors)
            return part, self._publisher.hand_over(part, copied)
        except Exception as error:
            self._call(partial(self._publisher.give_up_unprepared, version, error))
            raise

    def _check_open(self) -> None:
        if not self._open or os.getpid() != self._process:
            raise PublisherClosed(self.model)

    def _call(self, function: Callable[[], Awaitable[T]]) -> T:
        self._check_open()
        future = self._portal.start_task_soon(function)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # the wait was interrupted, by Ctrl-C: the work must not go on
            raise


def _log_failure(version: int, future: Future[CheckpointReady]) -> None:
    """Nobody may ask for the result."""
    if future.cancelled():
        _logger.error("version %d was not published: the publisher has ended", version)
    elif isinstance(error := future.exception(), VersionSkipped):
        _logger.info("%s", error)
    elif error is not None:
        _logger.error("version %d was not published: %s", version, error)
