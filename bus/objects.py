"""Blobs under a key, larger than a message may be: layouts, needs, digests.

The server's object store format (NATS ADR-20): chunks in a stream, then one message that describes
them, so that half an object is never seen. A description is believed only within the size limit,
and a blob is returned only if it has the description's size and SHA-256.
"""

from __future__ import annotations

import base64
import hashlib
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from typing import Annotated

import anyio
import msgspec
from msgspec import Meta, Struct

from weightbus.bus.errors import (
    BusError,
    ObjectCorrupt,
    ObjectMissing,
    ObjectTooLarge,
    RequestRefused,
)
from weightbus.bus.jetstream import JetStream, WrongLastSequence
from weightbus.bus.streams import object_stream
from weightbus.schemas.limits import DEFAULT_LIMITS, Limits

__all__ = ("CHUNK_BYTES", "ObjectStore")

CHUNK_BYTES = 128 * 1024
"""What other NATS clients use too; nats-py reads larger ones more slowly."""

_CLEAN_UP_TIMEOUT_S = 2.0
_MAX_RACES = 16
"""Each lost race means that someone else changed the object; so many in a row do not happen."""


class _Options(Struct):
    max_chunk_size: int


class _Description(Struct):
    """The last word on an object. Field names are the format's."""

    name: str
    bucket: str
    nuid: Annotated[str, Meta(pattern=r"^[A-Za-z0-9]{1,64}\Z")]
    """Token of the chunks' subject."""
    size: int
    chunks: int
    digest: str = ""
    mtime: str = ""
    deleted: bool = False
    options: _Options | None = None

    def is_of(self, size_bytes: int, digest: str) -> bool:
        """Whether it describes such a blob. Clients differ in padding the digest's base64."""
        same = self.size == size_bytes and self.digest.rstrip("=") == digest.rstrip("=")
        return same and not self.deleted


class ObjectStore:
    """One object store of the server.

    Every method raises, besides what it names:

    Raises:
        BusUnavailable, BusTimeout, RequestRefused
    """

    def __init__(self, jetstream: JetStream, bucket: str, limits: Limits = DEFAULT_LIMITS) -> None:
        self._jetstream = jetstream
        self._bucket = bucket
        self._stream = object_stream(bucket)
        self._limit_bytes = limits.max_object_bytes

    async def put(self, key: str, blob: bytes) -> str:
        """Store a blob under a key and return the key; the same blob is not stored twice.

        A description whose chunks are not there is replaced.

        Raises:
            ObjectTooLarge
        """
        if len(blob) > self._limit_bytes:
            raise ObjectTooLarge(key, len(blob), self._limit_bytes)
        digest = _digest(blob)
        for _ in range(_MAX_RACES):
            before, sequence = await self._describe(key)
            if before is not None and before.is_of(len(blob), digest):
                chunks = self._chunks_subject(before.nuid)
                if await self._jetstream.count(self._stream, chunks) == before.chunks:
                    return key
            try:
                await self._put_new(key, blob, digest, sequence)
            except WrongLastSequence:  # another client was faster: look again
                continue
            if before is not None:
                await self._jetstream.purge(self._stream, self._chunks_subject(before.nuid))
            return key
        raise RequestRefused(f"put of object {key}", 0, "other clients keep changing it")

    async def get(self, key: str) -> bytes:
        """The blob under a key.

        Raises:
            ObjectMissing: nothing lies there.
            ObjectTooLarge: it exceeds the limit.
            ObjectCorrupt: its bytes are not those that were stored.
        """
        description, sequence = await self._describe(key)
        if description is None and sequence:
            raise ObjectCorrupt(key, "description", "not readable", "that of an object")
        if description is None or description.deleted:
            raise ObjectMissing(key)
        if not 0 <= description.size <= self._limit_bytes:
            raise ObjectTooLarge(key, description.size, self._limit_bytes)
        blob = bytearray()
        subject = self._chunks_subject(description.nuid)
        async for chunk in self._jetstream.scan(self._stream, subject):
            blob += chunk.payload
            if len(blob) > description.size:
                raise ObjectCorrupt(key, "size", "larger", f"{description.size} bytes")
        if len(blob) != description.size:
            if await self._describe(key) != (description, sequence):
                raise ObjectMissing(key)  # deleted or replaced while it was read
            raise ObjectCorrupt(key, "size", f"{len(blob)} bytes", f"{description.size} bytes")
        digest = _digest(blob)
        if not description.is_of(len(blob), digest):
            raise ObjectCorrupt(key, "digest", digest, description.digest)
        return bytes(blob)

    async def delete(self, key: str) -> None:
        """Remove what lies under a key, if anything does."""
        description, sequence = await self._describe(key)
        if sequence:
            await self._jetstream.purge(self._stream, self._description_subject(key))
        if description is not None:
            await self._jetstream.purge(self._stream, self._chunks_subject(description.nuid))

    async def _describe(self, key: str) -> tuple[_Description | None, int]:
        """(what lies under a key, sequence of its description); (None, sequence): not readable."""
        stored = await self._jetstream.last(self._stream, self._description_subject(key))
        if stored is None:
            return None, 0
        try:
            return msgspec.json.decode(stored.payload, type=_Description), stored.sequence
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None, stored.sequence

    async def _put_new(self, key: str, blob: bytes, digest: str, sequence: int) -> None:
        """Chunks, then their description, if nothing was said of the key after `sequence`.

        Chunks of a description that may have been stored stay, whatever happens to us.

        Raises:
            WrongLastSequence
        """
        number = uuid.uuid4().hex
        async with self._dropped_on(BaseException, number):
            chunks = await self._put_chunks(number, blob)
        description = _Description(
            name=key,
            bucket=self._bucket,
            nuid=number,
            size=len(blob),
            chunks=chunks,
            digest=digest,
            mtime=datetime.now(UTC).isoformat(),
            options=_Options(CHUNK_BYTES),
        )
        async with self._dropped_on(WrongLastSequence, number):
            await self._jetstream.publish(
                self._description_subject(key),
                msgspec.json.encode(description),
                {"Nats-Rollup": "sub"},
                expected_sequence=sequence,
            )

    @asynccontextmanager
    async def _dropped_on(self, cause: type[BaseException], number: str) -> AsyncIterator[None]:
        """Drops the chunks, as far as that is possible, when the body raises `cause`."""
        try:
            yield
        except cause:
            with anyio.move_on_after(_CLEAN_UP_TIMEOUT_S, shield=True), suppress(BusError):
                await self._jetstream.purge(self._stream, self._chunks_subject(number))
            raise

    async def _put_chunks(self, number: str, blob: bytes) -> int:
        subject = self._chunks_subject(number)
        view = memoryview(blob)
        offsets = range(0, len(blob), CHUNK_BYTES)
        for offset in offsets:
            await self._jetstream.publish(subject, bytes(view[offset : offset + CHUNK_BYTES]))
        return len(offsets)

    def _description_subject(self, key: str) -> str:
        return f"$O.{self._bucket}.M.{base64.urlsafe_b64encode(key.encode()).decode()}"

    def _chunks_subject(self, number: str) -> str:
        return f"$O.{self._bucket}.C.{number}"


def _digest(blob: bytes | bytearray) -> str:
    """As the format writes it."""
    return f"SHA-256={base64.urlsafe_b64encode(hashlib.sha256(blob).digest()).decode()}"
