"""Blobs under a key, larger than a message may be: layouts, needs, digests.

The server's object store format (NATS ADR-20): chunks in a stream, then one message that describes
them, so that half an object is never seen. A description is believed only within the size limit,
and a blob is returned only if it has the description's size and SHA-256.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import uuid
from datetime import UTC, datetime

import anyio
import msgspec
from msgspec import Struct

from weightbus.bus.errors import BusError, ObjectCorrupt, ObjectMissing, ObjectTooLarge
from weightbus.bus.jetstream import JetStream, WrongLastSequence
from weightbus.bus.streams import object_stream
from weightbus.schemas.limits import DEFAULT_LIMITS, Limits

__all__ = ("CHUNK_BYTES", "ObjectStore")

CHUNK_BYTES = 128 * 1024
"""What other NATS clients use too; nats-py reads larger ones more slowly."""

_CLEAN_UP_TIMEOUT_S = 2.0


class _Options(Struct):
    max_chunk_size: int


class _Description(Struct):
    """The last word on an object. Field names are the format's."""

    name: str
    bucket: str
    nuid: str
    size: int
    chunks: int
    digest: str = ""
    mtime: str = ""
    deleted: bool = False
    options: _Options | None = None


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

        Raises:
            ObjectTooLarge
        """
        if len(blob) > self._limit_bytes:
            raise ObjectTooLarge(key, len(blob), self._limit_bytes)
        digest = _digest(blob)
        while True:
            before, sequence = await self._describe(key)
            if before is not None and (before.size, before.digest) == (len(blob), digest):
                return key
            with contextlib.suppress(WrongLastSequence):  # another client was faster: look again
                await self._put_new(key, blob, digest, sequence)
                break
        if before is not None:
            await self._jetstream.purge(self._stream, self._chunks_subject(before.nuid))
        return key

    async def get(self, key: str) -> bytes:
        """The blob under a key.

        Raises:
            ObjectMissing: nothing lies there.
            ObjectTooLarge: it exceeds the limit.
            ObjectCorrupt: its bytes are not those that were stored.
        """
        description, _ = await self._describe(key)
        if description is None:
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
            if await self._describe(key) == (None, 0):
                raise ObjectMissing(key)  # deleted while it was read
            raise ObjectCorrupt(key, "size", f"{len(blob)} bytes", f"{description.size} bytes")
        found = _digest(blob)
        if found.rstrip("=") != description.digest.rstrip("="):
            raise ObjectCorrupt(key, "digest", found, description.digest)
        return bytes(blob)

    async def delete(self, key: str) -> None:
        """Remove what lies under a key, if anything does."""
        description, _ = await self._describe(key)
        if description is None:
            return
        await self._jetstream.purge(self._stream, self._description_subject(key))
        await self._jetstream.purge(self._stream, self._chunks_subject(description.nuid))

    async def _describe(self, key: str) -> tuple[_Description | None, int]:
        """(what lies under a key, sequence of what was said of the key last)"""
        stored = await self._jetstream.last(self._stream, self._description_subject(key))
        if stored is None:
            return None, 0
        try:
            description = msgspec.json.decode(stored.payload, type=_Description)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ObjectCorrupt(key, "description", str(error), "readable") from None
        if not description.nuid.isalnum():
            raise ObjectCorrupt(key, "nuid", description.nuid, "one subject token")
        return None if description.deleted else description, stored.sequence

    async def _put_new(self, key: str, blob: bytes, digest: str, sequence: int) -> None:
        """
        Raises:
            WrongLastSequence: something was said of the key after `sequence`.
        """
        number = uuid.uuid4().hex
        complete = False
        try:
            description = _Description(
                name=key,
                bucket=self._bucket,
                nuid=number,
                size=len(blob),
                chunks=await self._put_chunks(number, blob),
                digest=digest,
                mtime=datetime.now(UTC).isoformat(),
                options=_Options(CHUNK_BYTES),
            )
            await self._jetstream.publish(
                self._description_subject(key),
                msgspec.json.encode(description),
                {"Nats-Rollup": "sub"},
                expected_sequence=sequence,
            )
            complete = True
        finally:
            if not complete:
                await self._drop_chunks(number)

    async def _put_chunks(self, number: str, blob: bytes) -> int:
        subject = self._chunks_subject(number)
        view = memoryview(blob)
        offsets = range(0, len(blob), CHUNK_BYTES)
        for offset in offsets:
            await self._jetstream.publish(subject, bytes(view[offset : offset + CHUNK_BYTES]))
        return len(offsets)

    async def _drop_chunks(self, number: str) -> None:
        """Best effort: the object was not stored, and the reason is already on its way up."""
        with anyio.move_on_after(_CLEAN_UP_TIMEOUT_S, shield=True):
            try:
                await self._jetstream.purge(self._stream, self._chunks_subject(number))
            except BusError:
                return

    def _description_subject(self, key: str) -> str:
        return f"$O.{self._bucket}.M.{base64.urlsafe_b64encode(key.encode()).decode()}"

    def _chunks_subject(self, number: str) -> str:
        return f"$O.{self._bucket}.C.{number}"


def _digest(blob: bytes | bytearray) -> str:
    """As the format writes it."""
    return f"SHA-256={base64.urlsafe_b64encode(hashlib.sha256(blob).digest()).decode()}"
