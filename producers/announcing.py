"""What every kind of publishing does on the bus: the order of versions, digests, the one event.

Owns the objects with tensor digests that it and publishers of its name before it have put into the
store, and removes those of old versions.
Remembers what it has said or may have said: the bus can forget, or be unable to tell. Imports no
torch: a publisher of files needs none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NoReturn

from msgspec import structs

from weightbus.bus.connection import Bus
from weightbus.bus.digest import combine, digest_hex
from weightbus.bus.errors import RequestRefused
from weightbus.bus.jetstream import WrongLastSequence
from weightbus.producers.digests import Sums, put_sums
from weightbus.producers.errors import VersionNotNew
from weightbus.schemas.catalogue import check_token, entry_of, message_id_of
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.codec import encode
from weightbus.tracing.attributes import (
    MESSAGING_BODY_SIZE,
    MESSAGING_MESSAGE_ID,
    Destination,
)
from weightbus.tracing.telemetry import Span, Telemetry

__all__ = ("Announcer",)

MAX_RACES = 16
"""Each lost race means that something else came between; so many in a row do not happen."""


class Announcer:
    """Tells the bus of the versions of one model by one producer."""

    def __init__(self, bus: Bus, model: str, producer: str) -> None:
        """
        Raises:
            MessageInvalid: `model` or `producer` is no subject token.
        """
        check_token("model", model)
        check_token("producer", producer)
        self.bus, self.model, self.producer = bus, model, producer
        self._keys: set[str] = set()
        self._key_before: str | None = None
        self._adopted = False
        self._newest, self._newest_by = -1, ""
        self._clock = bus.clock.reading()
        self._created_ns = 0
        self._span: Span | None = None
        self._unsure: set[int] = set()

    def draft(self, version: int, metadata: Mapping[str, str]) -> CheckpointReady:
        """The event of a version, but for what is published; checked before anything is done.

        Raises:
            MessageInvalid: version or metadata break the contract.
        """
        ready = CheckpointReady(
            model=self.model,
            version=version,
            producer=self.producer,
            created_ns=self._clock.now_ns(),
            metadata=dict(metadata),
        )
        encode(structs.replace(ready, files=("/",)))
        return ready

    @contextmanager
    def span(self, telemetry: Telemetry, version: int) -> Iterator[Span]:
        """Around everything that publishing a version takes, whose times are of one clock."""
        self._clock = clock = self.bus.clock.reading()
        destination = Destination.of_ready(
            self.bus.prefix, self.model, client=self.bus.settings.name, url=self.bus.url
        )
        with telemetry.publish_span(
            destination,
            model=self.model,
            version=version,
            producer=self.producer,
            offset_ns=clock.offset_ns,
            residual_ns=clock.residual_ns,
            now_ns=clock.now_ns,
        ) as span:
            self._span = span
            yield span

    async def newest(self) -> int:
        """The newest version that the bus has told of or has kept of ours; -1: none."""
        last = await self.bus.last(CheckpointReady, model=self.model)
        if last is not None:
            self.remember(last.message)
        return self._newest

    async def check_new(self, version: int) -> int:
        """Readers must be able to take `version` for news. Returns the newest version so far.

        Raises:
            VersionNotNew: it is not greater than that.
        """
        newest = await self.newest()
        if version <= newest:
            raise VersionNotNew(self.model, version, newest, self._newest_by)
        return newest

    def is_offered(self, version: int) -> bool:
        """Whether readers may know of a version of ours, also if nobody could tell us so."""
        return version <= self._newest or version in self._unsure

    async def put_digests(self, tensor_digests: Sums) -> tuple[str, str]:
        """Offer proof of a version: (its weights digest, key of the tensor digests' object)."""
        key = await put_sums(self.bus, tensor_digests)
        self._keys.add(key)
        return digest_hex(combine(tensor_digests)), key

    async def say(self, ready: CheckpointReady, headers: Mapping[str, str]) -> CheckpointReady:
        """Publish the event, `created_ns` being now; returns it once the bus keeps it.

        Digests are kept of this version and of the one before, which an engine whose update is cut
        short may still take.

        Raises:
            VersionNotNew: another publisher has announced it, or a greater one, in the meantime.
            BusUnavailable, BusTimeout, RequestRefused: it may have been announced.
        """
        if not self._adopted:
            await self._adopt()
        for key in self._keys - {ready.tensor_digests, self._key_before}:
            await self.bus.objects.delete(key)
            self._keys.discard(key)
        self._created_ns = max(self._clock.now_ns(), self._created_ns + 1)
        ready = structs.replace(
            ready, created_ns=self._created_ns, clock_residual_ns=self._clock.residual_ns
        )
        await self._say_if_newer(ready, headers)
        self._describe(ready)
        self.remember(ready)
        self._key_before = ready.tensor_digests
        return ready

    def _describe(self, ready: CheckpointReady) -> None:
        """On the span of the version: which message told of it, and how long that is."""
        if self._span is not None and self._span.is_recorded:
            self._span.set(MESSAGING_MESSAGE_ID, message_id_of(ready) or "")
            size_bytes = len(encode(ready, entry_of(CheckpointReady).content_type))
            self._span.set(MESSAGING_BODY_SIZE, size_bytes)

    async def _adopt(self) -> None:
        """Become the owner of the objects of earlier publishers of this name."""
        async for past in self.bus.replay(CheckpointReady, model=self.model):
            key = past.message.tensor_digests
            if past.message.producer == self.producer and key is not None:
                self._keys.add(key)
                self._key_before = key
        self._adopted = True

    async def _say_if_newer(self, ready: CheckpointReady, headers: Mapping[str, str]) -> None:
        """Say it as the next word after a look at the last one, or not at all.

        After a lost connection the bus sends again: then the word found there can be our own.
        """
        for _ in range(MAX_RACES):
            sequence = await self.bus.last_sequence(CheckpointReady, model=self.model)
            last = await self.bus.last(CheckpointReady, model=self.model)
            if last is not None and last.message == ready:
                return
            if last is not None and last.message.version >= ready.version:
                self._refuse(ready, last.message)
            self._unsure.add(ready.version)
            try:
                ack = await self.bus.publish(ready, headers, expected_sequence=sequence)
            except WrongLastSequence:
                continue
            if not ack.duplicate:
                return
            last = await self.bus.last(CheckpointReady, model=self.model)
            if last is not None and last.message == ready:
                return
            newer = last is not None and last.message.version > ready.version
            self._refuse(ready, last.message if last and newer else ready)
        operation = f"announcement of version {ready.version} of {self.model}"
        raise RequestRefused(operation, 0, "other clients keep saying something")

    def _refuse(self, ready: CheckpointReady, newest: CheckpointReady) -> NoReturn:
        self.remember(newest)
        raise VersionNotNew(self.model, ready.version, newest.version, newest.producer)

    def remember(self, ready: CheckpointReady) -> None:
        """It has been announced, by whomever."""
        if ready.version > self._newest:
            self._newest, self._newest_by = ready.version, ready.producer
            self._unsure = {version for version in self._unsure if version > ready.version}
