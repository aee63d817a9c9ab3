"""The bus: publish, subscribe, look back, and the stores and leases beside the messages.

`open_bus` puts the parts together and owns them all, the embedded server included.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
)
from functools import partial
from typing import TypeVar

from weightbus.bus.background import open_background
from weightbus.bus.buckets import KeyBucket
from weightbus.bus.clock import FIRST_PROBES, OPEN_WITHIN_S, BusClock, HostClock
from weightbus.bus.dead_letters import DeadLetters, open_dead_letters
from weightbus.bus.errors import ServerFailed
from weightbus.bus.history import merged_scan
from weightbus.bus.jetstream import JetStream, PublishAck, StoredMessage
from weightbus.bus.layouts import LayoutStore
from weightbus.bus.leases import ReaderLeases, RoundLeases
from weightbus.bus.link import Link, open_link
from weightbus.bus.objects import ObjectStore
from weightbus.bus.presence import Presence
from weightbus.bus.received import (
    HEADER_CONTENT_TYPE,
    Received,
    content_type_of,
    model_of,
    read,
)
from weightbus.bus.server import EmbeddedServer, open_server
from weightbus.bus.settings import BusSettings
from weightbus.bus.streams import OBJECTS, bus_streams
from weightbus.bus.subscription import Subscription, open_subscription
from weightbus.schemas.base import Message
from weightbus.schemas.catalogue import (
    bucket_name,
    entry_of,
    message_id_of,
    pattern_of,
    stream_name,
    subject_of,
)
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.codec import encode
from weightbus.schemas.errors import MessageInvalid
from weightbus.schemas.leases import ReaderLease, RoundLease
from weightbus.schemas.progress import DeadLetter, EngineState

__all__ = ("Bus", "open_bus")

M = TypeVar("M", bound=Message)


class Bus:
    """One connection with all that is built on it; made by `open_bus`.

    Its methods, and those of its parts, raise besides what they name:

    Raises:
        BusUnavailable: the connection is lost for good; nothing works any more.
        BusTimeout: connected, but the server did not answer in time.
        RequestRefused: the server answered with an error.
        MessageInvalid: what we were about to say breaks the contract.
    """

    settings: BusSettings
    url: str
    """Where it is connected; what another process needs to join."""
    prefix: str
    clock: BusClock
    """What time it is on the bus: every time in a message or a span is of this clock."""
    link: Link
    """For the other parts of the bus."""
    jetstream: JetStream
    """For the other parts of the bus."""
    objects: ObjectStore
    layouts: LayoutStore
    presence: Presence
    round_leases: RoundLeases
    reader_leases: ReaderLeases

    def __init__(
        self,
        settings: BusSettings,
        link: Link,
        jetstream: JetStream,
        dead_letters: DeadLetters,
        clock: BusClock,
    ) -> None:
        self.link, self.jetstream, self._dead_letters = link, jetstream, dead_letters
        self.settings = settings
        self.clock = clock
        self.url = link.url
        self.prefix = prefix = settings.prefix
        self.objects = ObjectStore(jetstream, bucket_name(OBJECTS, prefix))
        self.layouts = LayoutStore(self.objects, settings.layout_cache_dir)

        def bucket(name: str, kind: type[M]) -> KeyBucket[M]:
            return KeyBucket(jetstream, bucket_name(name, prefix), kind, dead_letters)

        self.presence = Presence(link, bucket("presence", EngineState), settings.presence_ttl_s)
        self.round_leases = RoundLeases(bucket("rounds", RoundLease), settings.request_timeout_s)
        self.reader_leases = ReaderLeases(bucket("readers", ReaderLease))

    @property
    def is_connected(self) -> bool:
        """False while a lost connection is waited for, and once it is lost for good."""
        return self.link.is_up

    @contextmanager
    def count_dead_letters(
        self, tell: Callable[[DeadLetter], None], model: str = ""
    ) -> Iterator[None]:
        """While the context is open, call `tell` with each letter that this connection writes, once
        for a message however often that is read. It does not wait; what it raises is logged. Where
        several want to know one is told: that of the letter's model, else the first."""
        entry = model, tell
        self._dead_letters.tell.append(entry)
        try:
            yield
        finally:
            self._dead_letters.tell.remove(entry)

    async def publish(
        self,
        message: Message,
        headers: Mapping[str, str] | None = None,
        *,
        expected_sequence: int | None = None,
    ) -> PublishAck:
        """Say it on the message's subject; returns once the server has stored it.

        A `CheckpointReady` of the same model, version and producer is stored and delivered to the
        history once, and so is a `CheckpointSkipped`: a repeat's acknowledgement says `duplicate`.
        With `expected_sequence`, of `last_sequence`, it is stored only if nothing has been since;
        who listens hears it anyway.

        Raises:
            WrongLastSequence: something has been.
            PayloadTooLarge
        """
        content_type = entry_of(type(message)).content_type
        return await self.jetstream.publish(
            subject_of(message, self.prefix),
            encode(message, content_type),
            {HEADER_CONTENT_TYPE: content_type, **(headers or {})},
            message_id=message_id_of(message),
            expected_sequence=expected_sequence,
        )

    async def last_sequence(
        self, message_type: type[Message], *, model: str, **tokens: str | int
    ) -> int:
        """The number of the last message on the subject of a type, readable or not; 0: none."""
        subject = pattern_of(message_type, self.prefix, model, **tokens)
        stream = stream_name(entry_of(message_type).stream, self.prefix)
        stored = await self.jetstream.last(stream, subject)
        return 0 if stored is None else stored.sequence

    def subscribe(
        self, *message_types: type[M], model: str | None = None, **tokens: str | int
    ) -> AbstractAsyncContextManager[Subscription[M]]:
        """Messages of these types from now on, of one model or of all: see `Subscription`.

        Entered once the server knows: what is published after that is delivered. `tokens` narrow
        the subjects that have them, as in `pattern_of`, and are no matter to the others.
        """
        return open_subscription(
            self.link,
            message_types,
            model,
            self.prefix,
            self._dead_letters,
            self.settings.max_unread_messages,
            tokens,
            self.clock.now_ns,
        )

    async def last(
        self, message_type: type[M], *, model: str | None = None, **tokens: str | int
    ) -> Received[M] | None:
        """The last readable message on the subject of a type; `tokens` as in `pattern_of`.

        What cannot be read is answered on `dead` and hides nothing: what is kept before it counts.
        None: there is none, or it is of another type on the same subject.
        """
        subject = pattern_of(message_type, self.prefix, model, **tokens)
        stream = stream_name(entry_of(message_type).stream, self.prefix)
        stored = await self.jetstream.last(stream, subject)
        if stored is None:
            return None
        last = self.readable(stored)
        if last is None:
            async for earlier in self.jetstream.walk(stream, subject):
                if earlier.sequence != stored.sequence:
                    last = self.readable(earlier) or last
        return None if last is None else _of_types(last, (message_type,))

    async def replay(
        self,
        *message_types: type[M],
        model: str | None = None,
        since_ns: int = 0,
        is_answered: bool = True,
        **tokens: str | int,
    ) -> AsyncIterator[Received[M]]:
        """What the streams hold of these types since a time, in the order in which it was stored.

        Ends when it has caught up. What cannot be read is left out, and answered on `dead` unless
        that is not wanted: who only looks on writes nothing.
        """
        sources = {
            (
                stream_name(entry_of(kind).stream, self.prefix),
                pattern_of(kind, self.prefix, model, **tokens),
            )
            for kind in message_types
        }
        async for stored in merged_scan(self.jetstream, sorted(sources), since_ns):
            readable = self.readable(stored, is_answered=is_answered)
            if readable and (received := _of_types(readable, message_types)):
                yield received

    async def reject(
        self, subject: str, payload: bytes, content_type: str | None, error: MessageInvalid
    ) -> None:
        """Answer on `dead` what was received on `subject` and breaks the contract."""
        model = model_of(subject, self.prefix)
        await self._dead_letters.report(model, subject, payload, content_type or "", error)

    def readable(
        self, stored: StoredMessage, *, is_answered: bool = True
    ) -> Received[Message] | None:
        """What was stored, as a message; None: it cannot be read.

        Then it is answered on `dead`, unless that is not wanted, or it is a letter itself: a letter
        about a letter would never end.
        """
        try:
            return read(
                stored.subject, stored.headers, stored.payload, stored.stored_ns, self.prefix
            )
        except MessageInvalid as error:
            model = model_of(stored.subject, self.prefix)
            if is_answered and stored.subject != f"{self.prefix}.{model}.dead":
                content_type = content_type_of(stored.headers)
                self._dead_letters.report_nowait(
                    model, stored.subject, stored.payload, content_type, error
                )
            return None


def _of_types(received: Received[Message], types: tuple[type[M], ...]) -> Received[M] | None:
    """Several types may share a subject."""
    message = received.message
    if not isinstance(message, types):
        return None
    return Received(message, received.subject, received.headers, received.received_ns)


@asynccontextmanager
async def open_bus(
    settings: BusSettings, *, host_clock: HostClock | None = None
) -> AsyncIterator[Bus]:
    """Connect to `settings.url`, or to an embedded server that lives as long as the context.

    `host_clock`: in place of this host's clocks, which the bus's is told from.

    Raises:
        BusUnavailable: no server within `connect_timeout_s`, or none with JetStream.
        ServerTooOld, SettingInvalid, StreamUnsuitable
        ServerNotFound, ServerFailed, DataDirectoryBusy: the embedded server cannot be run.
    """
    async with AsyncExitStack() as stack:
        server: EmbeddedServer | None = None
        if settings.url is None:
            server = await stack.enter_async_context(open_server(settings))
        link = await stack.enter_async_context(
            open_link(settings, server.url if server else str(settings.url))
        )
        if server is not None:
            tasks = await stack.enter_async_context(open_background())
            tasks.start_soon(_fail_with_server, server, link)
        jetstream = JetStream(
            link,
            bus_streams(settings.prefix),
            ready_within_s=settings.request_timeout_s,
            reconnect_for_s=settings.reconnect_for_s,
        )
        await jetstream.open()
        clock = await stack.enter_async_context(_open_clock(settings, link, jetstream, host_clock))
        dead_letters = await stack.enter_async_context(
            open_dead_letters(jetstream, settings.prefix, settings.name, clock.now_ns)
        )
        yield Bus(settings, link, jetstream, dead_letters, clock)


@asynccontextmanager
async def _open_clock(
    settings: BusSettings, link: Link, jetstream: JetStream, host: HostClock | None
) -> AsyncIterator[BusClock]:
    """By that stream's time in which checkpoints are stored. A bus that cannot be asked in time is
    asked again, and open meanwhile."""
    clock = BusClock(
        partial(
            jetstream.server_ns, stream_name(entry_of(CheckpointReady).stream, settings.prefix)
        ),
        host,
    )
    await clock.measure(OPEN_WITHIN_S, FIRST_PROBES)
    async with open_background() as tasks:
        tasks.start_soon(clock.run)
        with link.listen(clock):
            yield clock


async def _fail_with_server(server: EmbeddedServer, link: Link) -> None:
    """A server of our own that has ended will not come back."""
    try:
        await server.wait()
    except ServerFailed as error:
        link.fail_nowait(str(error))
