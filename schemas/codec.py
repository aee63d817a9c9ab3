"""Messages to bytes and back, in MessagePack and JSON; what breaks the contract goes no further.

Does no I/O. Whatever the bytes are, `decode` returns a message that keeps every rule or raises
`MessageInvalid`; `encode` lets nothing out that `decode` would refuse.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final, TypeVar

import msgspec

from weightbus.schemas.base import SCHEMA_VERSION, Message
from weightbus.schemas.errors import MessageInvalid
from weightbus.schemas.faults import DECODE_ERRORS, ENCODE_ERRORS, NOT_READ, fault_of, reread
from weightbus.schemas.limits import DEFAULT_LIMITS, Limits
from weightbus.schemas.newer import without_unknown_ways
from weightbus.schemas.rules import check_message
from weightbus.schemas.worker import WorkerMessage

__all__ = ("CONTENT_TYPE_JSON", "CONTENT_TYPE_MSGPACK", "decode", "encode")

CONTENT_TYPE_MSGPACK: Final = "application/msgpack"
CONTENT_TYPE_JSON: Final = "application/json"

M = TypeVar("M", bound=Message)

_ENCODERS: Final[dict[str, Callable[[Any], bytes]]] = {
    CONTENT_TYPE_MSGPACK: msgspec.msgpack.Encoder().encode,
    CONTENT_TYPE_JSON: msgspec.json.Encoder().encode,
}
_UNTYPED: Final[dict[str, Callable[[bytes], Any]]] = {
    CONTENT_TYPE_MSGPACK: msgspec.msgpack.Decoder().decode,
    CONTENT_TYPE_JSON: msgspec.json.Decoder().decode,
}


def decode(
    payload: bytes,
    content_type: str | None,
    expected: type[M] | tuple[type[M], ...],
    limits: Limits = DEFAULT_LIMITS,
) -> M:
    """The message in `payload`, which must be of one of the `expected` types.

    `content_type` is the header's value; None or empty stands for MessagePack.

    Raises:
        MessageInvalid: not readable, another type, another major version, or a rule broken.
    """
    types = expected if isinstance(expected, tuple) else (expected,)
    kind = " or ".join(t.__name__ for t in types)
    media_type = _media_type(kind, content_type)
    _check_size(kind, payload, types, limits)
    if media_type == CONTENT_TYPE_MSGPACK and payload[:1] == b"{":
        limit = f"must be MessagePack, or come with the header Content-Type: {CONTENT_TYPE_JSON}"
        raise MessageInvalid(kind, "$", "JSON", limit)
    try:
        message: M = _decoder(media_type, types)(payload)
    except DECODE_ERRORS as error:
        document = reread(payload, _UNTYPED[media_type])
        _check_schema_version(kind, document)
        message = _without_news(kind, error, document, media_type, types)
    if message.schema_version != SCHEMA_VERSION:
        raise _other_version(type(message).__name__, message.schema_version)
    check_message(message, limits)
    return message


def encode(
    message: Message,
    content_type: str = CONTENT_TYPE_MSGPACK,
    limits: Limits = DEFAULT_LIMITS,
) -> bytes:
    """The bytes of `message`, checked by the rules that its readers will apply.

    JSON has no infinities: `Needs` with an infinite fill go as MessagePack only.

    Raises:
        MessageInvalid: a field or a rule is broken; nothing may be sent.
    """
    kind = type(message).__name__
    if not isinstance(message, Message):
        raise MessageInvalid(kind, "$", message, "must be a message")
    media_type = _media_type(kind, content_type)
    try:
        payload = _ENCODERS[media_type](message)
    except ENCODE_ERRORS as error:
        raise MessageInvalid(kind, "$", "not encodable", str(error)) from None
    decode(payload, media_type, type(message), limits)
    return payload


def _media_type(kind: str, content_type: str | None) -> str:
    """The content type without its parameters."""
    media_type = (content_type or CONTENT_TYPE_MSGPACK).partition(";")[0].strip().lower()
    if media_type not in _ENCODERS:
        limit = f"must be {CONTENT_TYPE_MSGPACK} or {CONTENT_TYPE_JSON}"
        raise MessageInvalid(kind, "Content-Type", content_type, limit)
    return media_type


def _check_size(
    kind: str, payload: bytes, types: tuple[type[Message], ...], limits: Limits
) -> None:
    local = all(issubclass(t, WorkerMessage) for t in types)
    max_bytes = limits.max_worker_payload_bytes if local else limits.max_payload_bytes
    if len(payload) > max_bytes:
        raise MessageInvalid(kind, "$", f"{len(payload)} bytes", f"at most {max_bytes} bytes")


def _check_schema_version(kind: str, document: Any) -> None:
    """Before a message of another major version is blamed for anything else."""
    if document is NOT_READ or not isinstance(document, dict):
        return
    found = document.get("schema_version", SCHEMA_VERSION)
    if isinstance(found, int) and not isinstance(found, bool) and found > SCHEMA_VERSION:
        raise _other_version(kind, found)


def _without_news(
    kind: str,
    error: Exception,
    document: Any,
    media_type: str,
    types: tuple[type[M], ...],
) -> M:
    """The message in a `document` that did not decode because of `error`, if what stands in the
    way is only what a newer minor version has added; else `error` is raised in our words."""
    known = without_unknown_ways(document)
    if known is document:
        raise fault_of(kind, error, _union(types), document) from None
    try:
        payload = _ENCODERS[media_type](known)
        message: M = _decoder(media_type, types)(payload)
    except (*DECODE_ERRORS, *ENCODE_ERRORS) as other:
        raise fault_of(kind, other, _union(types), known) from None
    return message


def _other_version(kind: str, found: int) -> MessageInvalid:
    return MessageInvalid(kind, "schema_version", found, f"spoken here: {SCHEMA_VERSION}")


def _union(types: tuple[type[Message], ...]) -> Any:
    union: Any = types[0]
    for one in types[1:]:
        union = union | one
    return union


@lru_cache(maxsize=256)
def _decoder(media_type: str, types: tuple[type[Message], ...]) -> Callable[[bytes], Any]:
    if media_type == CONTENT_TYPE_JSON:
        return msgspec.json.Decoder(_union(types)).decode
    return msgspec.msgpack.Decoder(_union(types)).decode
