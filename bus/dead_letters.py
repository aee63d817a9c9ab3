"""What could not be read is answered on `dead`, with the reason, and has no other effect.

Letters are sent by one background task, so that a reader is never held up by what it cannot read.
Its queue is bounded: under a flood the rest are counted, and the next letter says how many.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Protocol

import anyio

from weightbus.bus.background import open_background
from weightbus.bus.errors import BusError
from weightbus.bus.jetstream import JetStream
from weightbus.schemas.catalogue import check_token, entry_of, subject_of
from weightbus.schemas.codec import encode
from weightbus.schemas.errors import MessageInvalid
from weightbus.schemas.progress import DeadLetter

__all__ = ("UNKNOWN_MODEL", "DeadLetters", "Reporter", "open_dead_letters")

UNKNOWN_MODEL = "_"
"""Model of a letter about something whose subject names none."""

_QUEUE_LETTERS = 256
_TOLD_LETTERS = 1024
_PAYLOAD_BYTES = 1024
_CLOSE_TIMEOUT_S = 1.0
_log = logging.getLogger(__name__)


class Reporter(Protocol):
    """Who takes note of what could not be read."""

    def report_nowait(
        self, model: str, subject: str, payload: bytes, content_type: str, error: MessageInvalid
    ) -> None:
        """`subject`: where it came from; `model`: the subject's token, whatever it looks like."""


class DeadLetters:
    """The sender; made by `open_dead_letters`."""

    def __init__(
        self, jetstream: JetStream, prefix: str, reporter: str, now_ns: Callable[[], int]
    ) -> None:
        """`now_ns`: the bus's clock."""
        self._jetstream = jetstream
        self._prefix = prefix
        self._reporter, self._now_ns = reporter, now_ns
        self._send, self._receive = anyio.create_memory_object_stream[DeadLetter](_QUEUE_LETTERS)
        self._dropped = 0
        self._sent = anyio.Event()
        self.tell: list[tuple[str, Callable[[DeadLetter], None]]] = []
        """Model, and what is called with a letter that is new, sent or not; it does not wait."""
        self._told: dict[str, None] = {}
        """Causes of letters that were, the last of them."""

    def report_nowait(
        self, model: str, subject: str, payload: bytes, content_type: str, error: MessageInvalid
    ) -> None:
        """Queue a letter."""
        letter = self._letter(model, subject, payload, content_type, error)
        try:
            self._send.send_nowait(letter)
        except (anyio.WouldBlock, anyio.ClosedResourceError):
            self._dropped += 1
        else:
            self._dropped = 0

    async def report(
        self, model: str, subject: str, payload: bytes, content_type: str, error: MessageInvalid
    ) -> None:
        """Send a letter; returns once it is stored.

        Raises:
            BusUnavailable, BusTimeout, RequestRefused
        """
        await self._publish(self._letter(model, subject, payload, content_type, error))

    async def run(self) -> None:
        """Send what is queued, until closed."""
        async for letter in self._receive:
            try:
                await self._publish(letter)
            except BusError as error:  # whoever reads the bus is told by its own calls
                _log.warning("dead letter about %s was not sent: %s", letter.subject, error)
        self._receive.close()
        self._sent.set()

    async def close(self) -> None:
        """Take no more letters; those that wait have a moment to be sent."""
        self._send.close()
        with anyio.move_on_after(_CLOSE_TIMEOUT_S, shield=True):
            await self._sent.wait()

    def _letter(
        self, model: str, subject: str, payload: bytes, content_type: str, error: MessageInvalid
    ) -> DeadLetter:
        try:
            check_token("model", model)
        except MessageInvalid:
            model = UNKNOWN_MODEL
        dropped = self._dropped
        more = f" ({dropped} more letters were dropped before this one)" if dropped else ""
        letter = DeadLetter(
            model=model,
            subject=subject[:512],
            reason=f"{error}"[:4000] + more,
            field=error.field[:512],
            value=error.value[:256],
            limit=error.limit[:512],
            content_type=content_type[:128],
            payload=payload[:_PAYLOAD_BYTES],
            payload_bytes=len(payload),
            reported_by=self._reporter[:64],
            reported_ns=self._now_ns(),
        )
        self._tell(letter)
        return letter

    def _tell(self, letter: DeadLetter) -> None:
        """One of those who want to know, once for a message: it may be read again and again. Of
        several that of the letter's model, else the first."""
        cause = _cause_of(letter)
        if cause in self._told or not self.tell:
            return
        self._told[cause] = None
        if len(self._told) > _TOLD_LETTERS:
            del self._told[next(iter(self._told))]
        tell = next((tell for model, tell in self.tell if model == letter.model), self.tell[0][1])
        try:
            tell(letter)
        except Exception:  # noqa: BLE001 - no reader fails for want of a figure
            _log.warning("the dead letter about %s is not counted", letter.subject, exc_info=True)

    async def _publish(self, letter: DeadLetter) -> None:
        """Many readers report the same message; the id collapses their letters into one."""
        content_type = entry_of(DeadLetter).content_type
        await self._jetstream.publish(
            subject_of(letter, self._prefix),
            encode(letter, content_type),
            {"Content-Type": content_type},
            message_id=f"dead/{_cause_of(letter)}",
        )


def _cause_of(letter: DeadLetter) -> str:
    """The same for all letters about one message."""
    return hashlib.sha256(letter.subject.encode() + b"\0" + letter.payload).hexdigest()


@asynccontextmanager
async def open_dead_letters(
    jetstream: JetStream, prefix: str, reporter: str, now_ns: Callable[[], int]
) -> AsyncIterator[DeadLetters]:
    """A sender of dead letters, while the context is open."""
    letters = DeadLetters(jetstream, prefix, reporter, now_ns)
    async with open_background() as tasks:
        tasks.start_soon(letters.run)
        try:
            yield letters
        finally:
            await letters.close()
