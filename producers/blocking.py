"""The publisher for trainers that have no event loop: the same methods, called from any thread.

Owns a daemon thread with an event loop, the bus connection and the publisher in it. It ends with
`close` or its `with` block; a trainer that does neither is cleaned up after when its interpreter
exits, and one that is killed when the next publisher on its host starts.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from types import TracebackType
from typing import Self, TypeVar

from anyio.from_thread import start_blocking_portal

from weightbus.bus.connection import open_bus
from weightbus.bus.settings import BusSettings
from weightbus.producers.errors import PublisherClosed
from weightbus.producers.files import Files
from weightbus.producers.publisher import Publisher, PublisherOptions, open_publisher
from weightbus.producers.shards import Part, Tensors, plan_part
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.tracing.otlp import OtlpSettings
from weightbus.tracing.telemetry import Telemetry, open_telemetry

__all__ = ("BlockingPublisher",)

T = TypeVar("T")


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
    ) -> None:
        """Connect to the bus of `settings` and open a publisher; see `open_publisher`.

        Without `telemetry` its spans go to the collector of `otlp`, as those of a service with the
        producer's name; the last are sent when it is closed.

        Raises:
            ExporterMissing: `otlp` is given, but the extra `otlp` is not installed.
            RankInvalid, MessageInvalid, HostUnknown
            BusUnavailable, BusTimeout, RequestRefused, and what else `open_bus` raises
        """
        self._model = model
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

    def newest_version(self) -> int:
        """As `Publisher.newest_version`."""
        return self._call(self._publisher.newest_version)

    def publish(
        self, tensors: Tensors | Part, version: int, metadata: Mapping[str, str] = {}
    ) -> CheckpointReady:
        """As `Publisher.publish`."""
        part = tensors if isinstance(tensors, Part) else plan_part(tensors)
        return self._call(partial(self._publisher.publish, part, version, metadata))

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

    def _call(self, function: Callable[[], Awaitable[T]]) -> T:
        if not self._open or os.getpid() != self._process:
            raise PublisherClosed(self._model)
        future = self._portal.start_task_soon(function)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # the wait was interrupted, by Ctrl-C: the work must not go on
            raise
