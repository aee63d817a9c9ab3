"""The server's streams: publish with acknowledgement, last message, history. JSON over a `Link`.

A thin client of JetStream's API (NATS ADR-8, ADR-31 and ADR-43), instead of nats-py's: every call
has a deadline, can be sent again after a reconnect without doing its work twice, and needs no
consumer on the server. Streams that are missing (a server came back without its data) are made
again.

`last`, `walk` and `state` ask the leader of a stream and see every write that was acknowledged
before; `scan`, `page` and `first_since` may be answered by a replica that lags behind.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, TypeVar

import anyio
import msgspec

from weightbus.bus.errors import BusTimeout, BusUnavailable, RequestRefused
from weightbus.bus.jetstream_api import (
    HEADER_EXPECTED,
    HEADER_MESSAGE_ID,
    HEADER_STATUS,
    HEADER_TTL,
    MESSAGE_NOT_FOUND,
    STATUS_END_OF_BATCH,
    STATUS_NOT_FOUND,
    STREAM_NOT_FOUND,
    Information,
    LeadersAnswer,
    NotReady,
    PublishAck,
    StoredMessage,
    StreamConfig,
    StreamState,
    WrongLastSequence,
    check_stream,
    covers,
    decode_answer,
    is_stored,
    nanoseconds_of,
    refused,
    rfc3339_of,
    stored_of,
)
from weightbus.bus.link import Incoming, Interrupted, Link, NoResponders

__all__ = (
    "BATCH_BYTES",
    "BATCH_MESSAGES",
    "HEADER_MESSAGE_ID",
    "HEADER_TTL",
    "JetStream",
    "PublishAck",
    "StoredMessage",
    "StreamConfig",
    "StreamState",
    "WrongLastSequence",
)

BATCH_MESSAGES = 512
BATCH_BYTES = 4 * 2**20
_RETRY_WAIT_S = 0.1
_LOOK_S = 1.0
"""How long it is asked, after a publish was not answered, whether the streams are there."""
_RESEND_FOR_S = 100.0
"""How long a message whose fate is not known is sent again: less than the server remembers it."""

T = TypeVar("T")


class JetStream:
    """Streams over one link.

    Every method raises, besides what it names:

    Raises:
        BusUnavailable: the connection is lost for good, or nothing serves JetStream on it.
        BusTimeout: the server did not answer in time.
        RequestRefused: the server answered with an error.
    """

    def __init__(
        self,
        link: Link,
        streams: tuple[StreamConfig, ...],
        *,
        ready_within_s: float,
        reconnect_for_s: float,
        resend_for_s: float = _RESEND_FOR_S,
    ) -> None:
        """`streams` are made when missing, on every new connection.

        A call waits `ready_within_s` for a JetStream that is not ready, and is given up when it was
        interrupted for longer than `reconnect_for_s` by connections that do not last. A message
        that may have been stored is sent again for `resend_for_s` at most.
        """
        self._link = link
        self._streams = streams
        self._ready_within_s = ready_within_s
        self._reconnect_for_s = reconnect_for_s
        self._resend_for_s = resend_for_s
        self._checked_connection = 0
        self._checking = anyio.Lock()

    async def open(self) -> None:
        """Make the streams that are missing.

        Raises:
            StreamUnsuitable: one exists, but lacks something.
        """
        await self._when_ready(self._check_streams, "making of the streams")

    async def publish(
        self,
        subject: str,
        payload: bytes,
        headers: Mapping[str, str] | None = None,
        *,
        message_id: str | None = None,
        ttl_s: int | None = None,
        expected_sequence: int | None = None,
    ) -> PublishAck:
        """Store a message in the stream that its subject belongs to.

        Of several messages with one `message_id` within the stream's window only the first is
        stored; without one it gets its own, so that sending it again is harmless.

        Raises:
            WrongLastSequence: the subject's last message is not `expected_sequence` (0: none).
            BusTimeout: also when the connection was lost for so long that the server may have
                forgotten whether it has stored the message.
            PayloadTooLarge
        """
        message_id = message_id or uuid.uuid4().hex
        all_headers = {**(headers or {}), HEADER_MESSAGE_ID: message_id}
        if ttl_s is not None:
            all_headers[HEADER_TTL] = str(ttl_s)
        if expected_sequence is not None:
            all_headers[HEADER_EXPECTED] = str(expected_sequence)
        operation = f"publish to {subject}"
        in_doubt_since: float | None = None
        has_timed_out = False

        async def send() -> PublishAck:
            nonlocal in_doubt_since, has_timed_out
            sent = anyio.current_time()
            if in_doubt_since is not None and sent >= in_doubt_since + self._resend_for_s:
                raise BusTimeout(operation, self._resend_for_s)
            try:
                answer = await self._link.request(
                    subject, payload, all_headers, operation=operation
                )
                return decode_answer(answer, PublishAck, operation)
            except Interrupted:
                in_doubt_since = in_doubt_since or sent
                raise
            except BusTimeout:
                in_doubt_since = in_doubt_since or sent
                if has_timed_out or not await self._has_streams():
                    raise
                has_timed_out = True
                return await send()
            except WrongLastSequence:
                ours = await self._find(subject, message_id) if in_doubt_since else None
                if ours is None:
                    raise
                return ours

        return await self._when_ready(send, operation)

    async def _find(self, subject: str, message_id: str) -> PublishAck | None:
        """The acknowledgement of a message that was stored, if it still is its subject's last.

        The server compares the expected sequence before the id: a compare and set that is sent
        again is not called a duplicate, but refused because of its own first copy.
        """
        stream = next(s.name for s in self._streams if covers(s.subjects, subject))
        last = await self._get(stream, {"last_by_subj": subject}, f"publish to {subject}")
        if last is None or last.headers.get(HEADER_MESSAGE_ID) != message_id:
            return None
        return PublishAck(stream=stream, sequence=last.sequence, duplicate=True)

    async def last(self, stream: str, subject: str) -> StoredMessage | None:
        """The last message of a subject, which may hold wildcards; the leader's word."""
        operation = f"read of the last message of {subject}"

        async def send() -> StoredMessage | None:
            return await self._get(stream, {"last_by_subj": subject}, operation)

        return await self._when_ready(send, operation)

    async def walk(self, stream: str, subject: str) -> AsyncIterator[StoredMessage]:
        """As `scan`, from the leader: one round trip for each message.

        A message that is there when the walk begins, and is only replaced by later ones of its
        subject, is found itself or in its replacement: those have higher sequences.
        """
        operation = f"read of {subject} from the leader of stream {stream}"
        sequence = 1

        async def send() -> StoredMessage | None:
            return await self._get(stream, {"seq": sequence, "next_by_subj": subject}, operation)

        while (message := await self._when_ready(send, operation)) is not None:
            yield message
            sequence = message.sequence + 1

    async def _get(
        self, stream: str, request: dict[str, Any], operation: str
    ) -> StoredMessage | None:
        """One message, from the stream's leader."""
        answer = await self._link.request(
            f"$JS.API.STREAM.MSG.GET.{stream}", msgspec.json.encode(request), operation=operation
        )
        try:
            return decode_answer(answer, LeadersAnswer, operation).stored()
        except RequestRefused as error:
            if error.code != MESSAGE_NOT_FOUND:
                raise
            return None

    async def scan(
        self, stream: str, subject: str, *, since_ns: int = 0
    ) -> AsyncIterator[StoredMessage]:
        """Every stored message of a subject, which may hold wildcards, in the stream's order.

        Begins with the first one stored at or after `since_ns`; ends when it has caught up.
        """
        start: dict[str, Any] = {"start_time": rfc3339_of(since_ns)} if since_ns else {"seq": 1}
        while True:
            page, pending = await self._page(stream, subject, start)
            for message in page:
                yield message
            if not pending:
                return
            start = {"seq": page[-1].sequence + 1}

    async def server_ns(self, stream: str) -> int:
        """What time it is for the leader of a stream, whose clock stamps what is stored in it.

        Asked for once, on this connection.

        Raises, besides:
            Interrupted: the connection was lost before the answer came.
            NoResponders: nobody serves JetStream.
        """
        call = f"STREAM.INFO.{stream}"
        operation = f"request {call}"
        answer = await self._link.request(f"$JS.API.{call}", b"{}", operation=operation)
        try:
            return nanoseconds_of(decode_answer(answer, Information, operation).ts)
        except NotReady as error:
            raise NoResponders(operation) from error

    async def page(
        self, stream: str, subject: str, first_sequence: int
    ) -> tuple[list[StoredMessage], int]:
        """Some stored messages of a subject, which may hold wildcards, from a sequence on.

        Returns them in the stream's order, and how many more there are.
        """
        return await self._page(stream, subject, {"seq": first_sequence})

    async def first_since(self, stream: str, since_ns: int) -> int | None:
        """The sequence of the first message stored at or after a time; None: there is none."""
        start = {"start_time": rfc3339_of(since_ns)}
        page, _ = await self._page(stream, ">", start, batch_messages=1)
        return page[0].sequence if page else None

    async def state(self, stream: str) -> StreamState:
        """What a stream holds; its leader's word."""

        async def send() -> StreamState:
            info = await self._api(f"STREAM.INFO.{stream}", {})
            state = info["state"]
            return StreamState(
                created=info["created"],
                first_sequence=state["first_seq"] if state["messages"] else state["last_seq"] + 1,
                last_sequence=state["last_seq"],
                first_ns=nanoseconds_of(state["first_ts"]) if state["messages"] else 0,
            )

        return await self._when_ready(send, f"state of stream {stream}")

    async def count(self, stream: str, subject: str) -> int:
        """How many messages of a subject, without wildcards, are stored."""

        async def send() -> int:
            info = await self._api(f"STREAM.INFO.{stream}", {"subjects_filter": subject})
            return int((info["state"].get("subjects") or {}).get(subject, 0))

        return await self._when_ready(send, f"count of {subject}")

    async def purge(self, stream: str, subject: str) -> None:
        """Remove all messages of a subject."""

        async def send() -> dict[str, Any]:
            return await self._api(f"STREAM.PURGE.{stream}", {"filter": subject})

        await self._when_ready(send, f"purge of {subject}")

    async def _page(
        self,
        stream: str,
        subject: str,
        start: dict[str, Any],
        batch_messages: int = BATCH_MESSAGES,
    ) -> tuple[list[StoredMessage], int]:
        """(messages, how many more there are)"""
        operation = f"read of {subject} from stream {stream}"
        request = msgspec.json.encode(
            {**start, "next_by_subj": subject, "batch": batch_messages, "max_bytes": BATCH_BYTES}
        )

        async def send() -> list[Incoming]:
            return await self._link.request_many(
                f"$JS.API.DIRECT.GET.{stream}",
                request,
                is_last=lambda answer: not is_stored(answer),
                operation=operation,
            )

        *messages, end = await self._when_ready(send, operation)
        status = end.headers.get(HEADER_STATUS)
        if status == STATUS_NOT_FOUND:
            return [], 0
        if status != STATUS_END_OF_BATCH:
            raise refused(operation, end)
        pending = int(end.headers.get("Nats-Num-Pending", 0)) if messages else 0
        return [stored_of(message) for message in messages], pending

    async def _when_ready(self, send: Callable[[], Awaitable[T]], operation: str) -> T:
        """What `send` returns, once JetStream and the streams are there; sends again if need be."""
        give_up = anyio.current_time() + self._reconnect_for_s + self._ready_within_s
        ready_by: float | None = None
        while anyio.current_time() < give_up:
            try:
                await self._check_streams()
                return await send()
            except Interrupted:
                ready_by = None
            except (NoResponders, NotReady):
                self._checked_connection = 0
                now = anyio.current_time()
                ready_by = ready_by or now + self._ready_within_s
                if now >= ready_by:
                    reason = f"JetStream does not answer ({operation}): is it enabled?"
                    raise BusUnavailable(self._link.url, reason) from None
                await anyio.sleep(_RETRY_WAIT_S)
        raise BusTimeout(operation, self._reconnect_for_s + self._ready_within_s)

    async def _has_streams(self) -> bool:
        """Whether the streams are there, those made that are missing: of one that vanished from a
        server that goes on nobody tells while somebody listens to its subject; it is silent."""
        self._checked_connection = 0
        with anyio.move_on_after(_LOOK_S), suppress(BusTimeout):
            await self._check_streams()
            return True
        return False

    async def _check_streams(self) -> None:
        """Make the streams that are missing, once for each connection: the server may be another
        one, or have lost its data. Harmless when many clients do so at once."""
        connection = self._link.connections
        if self._checked_connection == connection:
            return
        async with self._checking:
            if self._checked_connection == connection:
                return
            for wanted in self._streams:
                try:
                    found = await self._api(f"STREAM.INFO.{wanted.name}", {})
                except RequestRefused as error:
                    if error.code != STREAM_NOT_FOUND:
                        raise
                    request = msgspec.to_builtins(wanted)
                    found = await self._api(f"STREAM.CREATE.{wanted.name}", request)
                check_stream(wanted, found["config"])
            self._checked_connection = connection

    async def _api(self, call: str, request: dict[str, Any]) -> dict[str, Any]:
        operation = f"request {call}"
        payload = msgspec.json.encode(request)
        answer = await self._link.request(f"$JS.API.{call}", payload, operation=operation)
        return decode_answer(answer, dict[str, Any], operation)
