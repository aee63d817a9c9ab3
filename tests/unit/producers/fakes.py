"""A bus without a server: keeps what is said, and fails where it is told to."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import anyio
import anyio.lowlevel

from tests.clocks import unmeasured_clock
from weightbus.bus.connection import Bus
from weightbus.bus.errors import BusTimeout
from weightbus.bus.jetstream import PublishAck, WrongLastSequence
from weightbus.bus.received import Received
from weightbus.bus.settings import BusSettings
from weightbus.schemas.base import Message
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.layout import Layout
from weightbus.schemas.layout_codec import layout_digest
from weightbus.schemas.leases import ReaderLease
from weightbus.schemas.progress import DeadLetter, EngineState

__all__ = ("FakeBus",)


class FakeBus:
    """What a publisher of one rank asks of a bus."""

    prefix = "weightbus"
    url = "nats://127.0.0.1:4222"
    settings = BusSettings(url=url)

    def __init__(self) -> None:
        self.clock = unmeasured_clock()
        self.said: list[Message] = []
        self.forgetful = False
        """Nothing that was said can be read back."""
        self.failing: set[str] = set()
        """`put`, or the name of a message type: the next one times out, without effect."""
        self.kept: dict[str, bytes] = {}
        self.leases: list[ReaderLease] = []
        self.looks = 0
        """How often readers were listed."""
        self.looked = anyio.Event()
        """They were."""
        self.objects = self.layouts = self.presence = self.reader_leases = self

        self.on_publish: Callable[[Message], None] = lambda message: None
        """Called with every message once it was said."""
        self.slow_put_s = 0.0
        """How long it takes to put an object."""
        self.faster: list[CheckpointReady] = []
        """What others announce just before our next `CheckpointReady` comes."""

    def as_bus(self) -> Bus:
        return cast(Bus, self)

    def count_dead_letters(
        self, tell: Callable[[DeadLetter], None], model: str = ""
    ) -> AbstractContextManager[None]:
        return nullcontext()

    def said_of(self, kind: type[Message]) -> list[Any]:
        return [message for message in self.said if isinstance(message, kind)]

    async def publish(
        self, message: Message, headers: Mapping[str, str] | None = None, **options: int
    ) -> PublishAck:
        await anyio.lowlevel.checkpoint()
        self._fail(type(message).__name__)
        if isinstance(message, CheckpointReady):
            self.said += self.faster
            self.faster = []
        if options.get("expected_sequence", len(self.said)) != len(self.said):
            raise WrongLastSequence
        self.said.append(message)
        self.on_publish(message)
        return PublishAck(stream="s", sequence=len(self.said))

    async def last_sequence(self, message_type: type[Message], *, model: str) -> int:
        return len(self.said)

    async def last(
        self, message_type: type[Message], *, model: str, **tokens: Any
    ) -> Received[Any] | None:
        found = self.said_of(message_type)
        if self.forgetful or not found:
            return None
        return Received(found[-1], "", {}, 0)

    async def replay(
        self, message_type: type[Message], *, model: str
    ) -> AsyncIterator[Received[Any]]:
        for message in self.said_of(message_type):
            yield Received(message, "", {}, 0)

    async def list(self, model: str) -> tuple[EngineState, ...]:
        return ()

    async def readers(self, model: str, version: int) -> tuple[ReaderLease, ...]:
        self.looks += 1
        self.looked.set()
        return tuple(lease for lease in self.leases if lease.version == version)

    async def put(self, what: str | Layout, blob: bytes = b"", *, partial: bool = False) -> str:
        if isinstance(what, Layout):
            return layout_digest(what)
        self._fail("put")
        await anyio.sleep(self.slow_put_s)
        self.kept[what] = blob
        return what

    async def delete(self, key: str) -> None:
        self.kept.pop(key, None)

    def _fail(self, what: str) -> None:
        if what in self.failing:
            self.failing.discard(what)
            raise BusTimeout(what, 0.0)
