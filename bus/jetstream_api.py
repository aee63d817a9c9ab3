"""What JetStream's API is told and what it answers: structs, headers and errors. No I/O.

NATS ADR-8, ADR-31 and ADR-43; requests and answers are JSON, stored messages come with headers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

import msgspec
from msgspec import Struct

from weightbus.bus.errors import RequestRefused, StreamUnsuitable
from weightbus.bus.link import Incoming

__all__ = (
    "HEADER_EXPECTED",
    "HEADER_MESSAGE_ID",
    "HEADER_STATUS",
    "HEADER_TTL",
    "MESSAGE_NOT_FOUND",
    "STATUS_END_OF_BATCH",
    "STATUS_NOT_FOUND",
    "STREAM_NOT_FOUND",
    "Information",
    "LeadersAnswer",
    "NotReady",
    "PublishAck",
    "StoredMessage",
    "StreamConfig",
    "StreamState",
    "WrongLastSequence",
    "check_stream",
    "covers",
    "decode_answer",
    "is_stored",
    "nanoseconds_of",
    "refused",
    "rfc3339_of",
    "stored_of",
)

HEADER_MESSAGE_ID: Final = "Nats-Msg-Id"
HEADER_TTL: Final = "Nats-TTL"
HEADER_EXPECTED: Final = "Nats-Expected-Last-Subject-Sequence"
HEADER_STATUS: Final = "Status"

STATUS_END_OF_BATCH = "204"
STATUS_NOT_FOUND = "404"

MESSAGE_NOT_FOUND = 10037
STREAM_NOT_FOUND = 10059
_WRONG_LAST_SEQUENCE = frozenset((10071, 10164))
_NOT_READY = frozenset((10004, 10008, 10009))

_NS_PER_S = 10**9
_DUPLICATE_WINDOW_S = 120

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


class LeadersAnswer(Struct):
    """One message, from the leader of its stream."""

    message: _LeadersMessage

    def stored(self) -> StoredMessage:
        """The message, as every other answer has it."""
        found = self.message
        return StoredMessage(
            subject=found.subject,
            sequence=found.seq,
            stored_ns=nanoseconds_of(found.time),
            headers=_headers_of(found.hdrs),
            payload=found.data,
        )


class Information(Struct):
    """As `STREAM.INFO` answers."""

    ts: str
    """When, by the clock of the stream's leader."""


class NotReady(Exception):
    """JetStream is starting, or has no leader yet: it may be asked again."""


def decode_answer(answer: Incoming, kind: type[T], operation: str) -> T:
    """The server's JSON answer.

    Raises:
        WrongLastSequence, NotReady, RequestRefused
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
        raise NotReady(error.description)
    raise RequestRefused(operation, error.err_code or error.code, error.description)


def refused(operation: str, answer: Incoming) -> RequestRefused:
    """What the server said by a status instead of JSON."""
    code = answer.headers.get(HEADER_STATUS, "0")
    return RequestRefused(operation, int(code), answer.headers.get("Description", ""))


def is_stored(answer: Incoming) -> bool:
    """A stored message, and not a word of the server's own. Whoever stored it may have given it any
    headers; these two are the server's."""
    return "Nats-Sequence" in answer.headers and "Nats-Stream" in answer.headers


def stored_of(answer: Incoming) -> StoredMessage:
    """The message that a direct answer is; see `is_stored`."""
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


def covers(patterns: tuple[str, ...], subject: str) -> bool:
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


def check_stream(wanted: StreamConfig, found: Mapping[str, Any]) -> None:
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
    """A time as the server takes it."""
    seconds, fraction_ns = divmod(time_ns, _NS_PER_S)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{fraction_ns:09d}Z"


def nanoseconds_of(rfc3339: str) -> int:
    """Go writes up to nine digits of the second, without trailing zeros."""
    match = re.fullmatch(r"(.{19})(?:\.(\d{1,9}))?Z", rfc3339)
    if match is None:
        raise RequestRefused("read", 0, f"the server's time stamp is {rfc3339!r}")
    seconds = int(datetime.fromisoformat(match[1] + "+00:00").timestamp())
    return seconds * _NS_PER_S + int((match[2] or "0").ljust(9, "0"))
