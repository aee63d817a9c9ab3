"""The server's streams: publish with acknowledgement, last message, history. JSON over a `Link`.

A thin client of JetStream's API (NATS ADR-8, ADR-31 and ADR-43), instead of nats-py's: every call
has a deadline, can be sent again after a reconnect without doing its work twice, and needs no
consumer on the server. Streams that are missing (a server came back without its data) are made
again.

`last`, `walk` and `state` ask the leader of a stream and see every write that was acknowledged
before; `scan`, `page` and `first_since` may be answered by a replica that lags behind.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

import anyio
import msgspec
from msgspec import Struct

from weightbus.bus.errors import BusTimeout, BusUnavailable, RequestRefused, StreamUnsuitable
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

HEADER_MESSAGE_ID: Final = "Nats-Msg-Id"
HEADER_TTL: Final = "Nats-TTL"
_HEADER_EXPECTED: Final = "Nats-Expected-Last-Subject-Sequence"
_HEADER_STATUS: Final = "Status"

_STATUS_END_OF_BATCH = "204"
_STATUS_NOT_FOUND = "404"

_MESSAGE_NOT_FOUND = 10037
_STREAM_NOT_FOUND = 10059
_WRONG_LAST_SEQUENCE = frozenset((10071, 10164))
_NOT_READY = frozenset((10004, 10008, 10009))
"""JetStream is starting, or a cluster has no leader yet."""

BATCH_MESSAGES = 512
BATCH_BYTES = 4 * 2**20
_RETRY_WAIT_S = 0.1
_LOOK_S = 1.0
"""How long it is asked, after a publish was not answered, whether the streams are there."""
_NS_PER_S = 10**9
_DUPLICATE_WINDOW_S = 120
_RESEND_FOR_S = 100.0
"""How long a message whose fate is not known is sent again: less than the server remembers it."""

T = TypeVar("T")


class StreamConfig(Struct, frozen=True, kw_only=True):
    """A stream as the server's API knows it. Times in nanoseconds; -1: no limit."""

    name: str
    subjects: tuple[str, ...]
    description: str = ""
    storage: str = "file"
    retention: str = "limits"
    discard: str = "old"
    max_msgs_per_subject: int = -1
    max_bytes: int = -1
    max_age: int = 0
    duplicate_window: int = _DUPLICATE_WINDOW_S * _NS_PER_S
    """How long a `Nats-Msg-Id` is remembered: longer than a message is sent again."""
    allow_direct: bool = True
    allow_rollup_hdrs: bool = True
    allow_msg_ttl: bool = False
    subject_delete_marker_ttl: int = 0


class PublishAck(Struct, frozen=True, kw_only=True):
    """The server has stored a message."""

    stream: str
    sequence: int = msgspec.field(name="seq")
    duplicate: bool = False
    """It had stored a message with this id before, and dropped this one."""


class StoredMessage(Struct, frozen=True, kw_only=True):
    """A message of a stream."""

    subject: str
    sequence: int
    stored_ns: int
    """When the server stored it, by the server's clock."""
    headers: Mapping[str, str]
    payload: bytes


class StreamState(Struct, frozen=True, kw_only=True):
    """What a stream holds."""

    created: str
    """When it was made: another stream of the same name has another."""
    first_sequence: int
    """Of the oldest message that is kept; one more than the last, if none is."""
    last_sequence: int
    """Of the last message that was stored, kept or not; 0: none ever was."""
    first_ns: int
    """When the oldest message was stored, by the server's clock; 0: none is kept."""


class WrongLastSequence(Exception):
    """The subject's last message is not the expected one. Only `Bus.publish` lets it out."""


class _ApiError(Struct):
    code: int
    err_code: int = 0
    description: str = ""


class _Answer(Struct):
    error: _ApiError | None = None


class _LeadersMessage(Struct):
    """As `STREAM.MSG.GET` answers; both byte strings in base64."""

    subject: str
    seq: int
    time: str
    hdrs: bytes = b""
    data: bytes = b""


class _LeadersAnswer(Struct):
    message: _LeadersMessage


class _Information(Struct):
    """As `STREAM.INFO` answers."""

    ts: str
    """When, by the clock of the stream's leader."""


class _NotReady(Exception):
    pass


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
            all_headers[_HEADER_EXPECTED] = str(expected_sequence)
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
                return _decode(answer, PublishAck, operation)
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
        stream = next(s.name for s in self._streams if _covers(s.subjects, subject))
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
            found = _decode(answer, _LeadersAnswer, operation).message
        except RequestRefused as error:
            if error.code != _MESSAGE_NOT_FOUND:
                raise
            return None
        return StoredMessage(
            subject=found.subject,
            sequence=found.seq,
            stored_ns=nanoseconds_of(found.time),
            headers=_headers_of(found.hdrs),
            payload=found.data,
        )

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
            return nanoseconds_of(_decode(answer, _Information, operation).ts)
        except _NotReady as error:
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
                is_last=lambda answer: not _is_stored(answer),
                operation=operation,
            )

        *messages, end = await self._when_ready(send, operation)
        status = end.headers.get(_HEADER_STATUS)
        if status == _STATUS_NOT_FOUND:
            return [], 0
        if status != _STATUS_END_OF_BATCH:
            raise _refused(operation, end)
        pending = int(end.headers.get("Nats-Num-Pending", 0)) if messages else 0
        return [_stored(message) for message in messages], pending

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
            except (NoResponders, _NotReady):
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
                    if error.code != _STREAM_NOT_FOUND:
                        raise
                    request = msgspec.to_builtins(wanted)
                    found = await self._api(f"STREAM.CREATE.{wanted.name}", request)
                _check_stream(wanted, found["config"])
            self._checked_connection = connection

    async def _api(self, call: str, request: dict[str, Any]) -> dict[str, Any]:
        operation = f"request {call}"
        payload = msgspec.json.encode(request)
        answer = await self._link.request(f"$JS.API.{call}", payload, operation=operation)
        return _decode(answer, dict[str, Any], operation)


def _decode(answer: Incoming, kind: type[T], operation: str) -> T:
    """The server's JSON answer.

    Raises:
        WrongLastSequence, RequestRefused
    """
    try:
        error = msgspec.json.decode(answer.payload, type=_Answer).error
        if error is None:
            return msgspec.json.decode(answer.payload, type=kind)
    except msgspec.DecodeError as fault:
        raise RequestRefused(operation, 0, f"the answer cannot be read: {fault}") from None
    if error.err_code in _WRONG_LAST_SEQUENCE:
        raise WrongLastSequence(error.description)
    if error.err_code in _NOT_READY:
        raise _NotReady(error.description)
    raise RequestRefused(operation, error.err_code or error.code, error.description)


def _refused(operation: str, answer: Incoming) -> RequestRefused:
    code = answer.headers.get(_HEADER_STATUS, "0")
    return RequestRefused(operation, int(code), answer.headers.get("Description", ""))


def _is_stored(answer: Incoming) -> bool:
    """A stored message, and not a word of the server's own. Whoever stored it may have given it any
    headers; these two are the server's."""
    return "Nats-Sequence" in answer.headers and "Nats-Stream" in answer.headers


def _stored(answer: Incoming) -> StoredMessage:
    headers = answer.headers
    return StoredMessage(
        subject=headers["Nats-Subject"],
        sequence=int(headers["Nats-Sequence"]),
        stored_ns=nanoseconds_of(headers["Nats-Time-Stamp"]),
        headers=headers,
        payload=answer.payload,
    )


def _headers_of(block: bytes) -> dict[str, str]:
    """A header block as it is stored: a line of its own, then `name: value` lines."""
    headers: dict[str, str] = {}
    for line in block.decode(errors="replace").split("\r\n")[1:]:
        name, colon, value = line.partition(":")
        if colon:
            headers.setdefault(name.strip(), value.strip())
    return headers


def _covers(patterns: tuple[str, ...], subject: str) -> bool:
    """Whether a subject is among those of a stream."""
    tokens = subject.split(".")
    for pattern in patterns:
        wanted = pattern.split(".")
        is_open = wanted[-1] == ">"
        if is_open:
            wanted.pop()
        fits = len(tokens) > len(wanted) if is_open else len(tokens) == len(wanted)
        if fits and all(one in ("*", token) for one, token in zip(wanted, tokens, strict=False)):
            return True
    return False


def _check_stream(wanted: StreamConfig, found: Mapping[str, Any]) -> None:
    """Sizes, ages and replicas are the operator's; what the bus is built on must be as we made it.

    Raises:
        StreamUnsuitable
    """
    missing = [s for s in wanted.subjects if s not in found.get("subjects", ())]
    if missing:
        raise StreamUnsuitable(wanted.name, "subjects", found.get("subjects"), missing)
    if found.get("max_msgs_per_subject") != wanted.max_msgs_per_subject:
        value, needed = found.get("max_msgs_per_subject"), wanted.max_msgs_per_subject
        raise StreamUnsuitable(wanted.name, "max_msgs_per_subject", value, needed)
    if found.get("duplicate_window", 0) < wanted.duplicate_window:
        value, needed = found.get("duplicate_window"), wanted.duplicate_window
        raise StreamUnsuitable(wanted.name, "duplicate_window", value, needed)
    for feature in ("allow_direct", "allow_rollup_hdrs", "allow_msg_ttl"):
        if getattr(wanted, feature) and not found.get(feature, False):
            raise StreamUnsuitable(wanted.name, feature, False, True)


def rfc3339_of(time_ns: int) -> str:
    seconds, fraction_ns = divmod(time_ns, _NS_PER_S)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{fraction_ns:09d}Z"


def nanoseconds_of(rfc3339: str) -> int:
    """Go writes up to nine digits of the second, without trailing zeros."""
    match = re.fullmatch(r"(.{19})(?:\.(\d{1,9}))?Z", rfc3339)
    if match is None:
        raise RequestRefused("read", 0, f"the server's time stamp is {rfc3339!r}")
    seconds = int(datetime.fromisoformat(match[1] + "+00:00").timestamp())
    return seconds * _NS_PER_S + int((match[2] or "0").ljust(9, "0"))
