"""A key-value bucket whose values are messages and whose keys live as long as they are renewed.

Keys are derived from the message by the catalogue. Every write has a time to live of whole seconds,
and may demand that nobody wrote in between (compare and set). What cannot be read counts as absent
and is reported as a dead letter.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Mapping
from typing import Generic, TypeVar

from msgspec import Struct

from weightbus.bus.dead_letters import Reporter
from weightbus.bus.jetstream import HEADER_TTL, JetStream, StoredMessage
from weightbus.bus.received import HEADER_CONTENT_TYPE
from weightbus.bus.streams import kv_stream
from weightbus.schemas.base import Message
from weightbus.schemas.catalogue import key_of
from weightbus.schemas.codec import CONTENT_TYPE_MSGPACK, decode, encode
from weightbus.schemas.errors import MessageInvalid

__all__ = ("Kept", "KeyBucket", "is_end", "ttl_of", "whole_seconds")

_HEADER_OPERATION = "KV-Operation"
_HEADER_MARKER = "Nats-Marker-Reason"
_TOMBSTONE_TTL_S = 10
"""How long a deleted key is remembered: watchers are told by the message itself."""

M = TypeVar("M", bound=Message)


class Kept(Struct, Generic[M], frozen=True, kw_only=True):
    """What lies under a key."""

    message: M | None
    """None: the key was deleted, has expired, or its value cannot be read."""
    sequence: int
    """For compare and set; 0: nothing was ever there."""
    ttl_s: int
    """0: it does not expire."""
    stored_ns: int
    """By the server's clock."""


class KeyBucket(Generic[M]):
    """One bucket of the server, holding messages of one type."""

    def __init__(
        self, jetstream: JetStream, bucket: str, kind: type[M], dead_letters: Reporter
    ) -> None:
        self._jetstream = jetstream
        self._stream = kv_stream(bucket)
        self._subject = f"$KV.{bucket}."
        self._kind = kind
        self._dead_letters = dead_letters

    def subject(self, key: str) -> str:
        """Where changes of a key, or a pattern of keys, are published."""
        return self._subject + key

    async def get(self, key: str) -> Kept[M]:
        """What lies under a key."""
        stored = await self._jetstream.last(self._stream, self.subject(key))
        if stored is None:
            return Kept(message=None, sequence=0, ttl_s=0, stored_ns=0)
        return self._kept(stored)

    async def put(self, message: M, ttl_s: float, *, expected_sequence: int | None = None) -> int:
        """Write a message under its key, for `ttl_s` rounded up to whole seconds.

        Returns the sequence to expect next time.

        Raises:
            WrongLastSequence: what lies there has not `expected_sequence` (0: nothing lies there).
            MessageInvalid: the message breaks the contract.
        """
        ack = await self._jetstream.publish(
            self.subject(key_of(message)),
            encode(message),
            {HEADER_CONTENT_TYPE: CONTENT_TYPE_MSGPACK},
            ttl_s=whole_seconds(ttl_s),
            expected_sequence=expected_sequence,
        )
        return ack.sequence

    async def delete(self, key: str, *, expected_sequence: int | None = None) -> None:
        """End a key.

        Raises:
            WrongLastSequence: what lies there has not `expected_sequence`.
        """
        await self._jetstream.publish(
            self.subject(key),
            b"",
            {_HEADER_OPERATION: "DEL"},
            ttl_s=_TOMBSTONE_TTL_S,
            expected_sequence=expected_sequence,
        )

    async def scan(self, keys: str) -> AsyncIterator[Kept[M]]:
        """What lies under every key that matches a pattern (`model.*`), ended ones left out."""
        async for stored in self._jetstream.scan(self._stream, self.subject(keys)):
            kept = self._kept(stored)
            if kept.message is not None:
                yield kept

    async def walk(self, keys: str) -> AsyncIterator[Kept[M]]:
        """As `scan`, from the leader: whoever wrote before it began, and keeps on, is not missed.
        One round trip for each key."""
        async for stored in self._jetstream.walk(self._stream, self.subject(keys)):
            kept = self._kept(stored)
            if kept.message is not None:
                yield kept

    def read(self, subject: str, headers: Mapping[str, str], payload: bytes) -> M | None:
        """The value of a key in a message on its subject; None: an end, or not readable."""
        if is_end(headers):
            return None
        content_type = headers.get(HEADER_CONTENT_TYPE, "")
        key = subject.removeprefix(self._subject)
        try:
            message = decode(payload, content_type, self._kind)
            if key_of(message) != key:
                name = self._kind.__name__
                raise MessageInvalid(name, "$", f"under {key}", f"belongs under {key_of(message)}")
        except MessageInvalid as error:
            model = key.partition(".")[0]
            self._dead_letters.report_nowait(model, subject, payload, content_type, error)
            return None
        return message

    def _kept(self, stored: StoredMessage) -> Kept[M]:
        return Kept(
            message=self.read(stored.subject, stored.headers, stored.payload),
            sequence=stored.sequence,
            ttl_s=ttl_of(stored.headers),
            stored_ns=stored.stored_ns,
        )


def is_end(headers: Mapping[str, str]) -> bool:
    """Whether a message on a key's subject ends the key: deleted by a client, or by the server."""
    return _HEADER_OPERATION in headers or _HEADER_MARKER in headers


def whole_seconds(ttl_s: float) -> int:
    """The server counts time to live in whole seconds, and knows none below one."""
    return max(1, math.ceil(ttl_s))


def ttl_of(headers: Mapping[str, str]) -> int:
    """A message's time to live in seconds; 0: none, or not one that this bus writes."""
    text = headers.get(HEADER_TTL, "")
    return int(text) if text.isdecimal() else 0
