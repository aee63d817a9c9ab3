"""One stream read on from a sequence, at its reader's speed, and what was lost on the way.

Owns no connection, and one page of messages at most. A stream drops old messages, by age, size, or
number on one subject, and may be lost with its server's data: a reader that comes too late is told.
"""

from __future__ import annotations

import math
import re
from collections import Counter, deque
from collections.abc import Sequence

import anyio

from weightbus.bus.jetstream import JetStream, StoredMessage, StreamState
from weightbus.bus.link import Link
from weightbus.bus.received import Missed
from weightbus.bus.streams import last_kept
from weightbus.schemas.catalogue import stream_name

__all__ = ("Tail", "open_tail")

_CHECK_S = 30.0
"""After so long it is asked what the stream has dropped meanwhile, and whether it is the same."""


class Tail:
    """What a stream holds of a subject, from somewhere on; made by `open_tail`.

    For one reader, who takes messages out of `buffer` and calls `read` when it is empty.
    """

    buffer: deque[StoredMessage]
    """The rest of the last page."""
    known_until_ns: int
    """What was stored until then is in the buffer, or was."""
    is_behind: bool
    """There is more in the stream than was read."""
    has_passed: bool
    """What was stored before it was opened is in the buffer, or was."""

    def __init__(
        self, jetstream: JetStream, link: Link, name: str, stream: str, subject: str,
        asked_for: re.Pattern[str], state: StreamState, first_sequence: int,
    ) -> None:  # fmt: skip
        self._jetstream, self._link = jetstream, link
        self._name, self._stream = name, stream
        self._subject, self._asked_for = subject, asked_for
        self._created, self._opened_at = state.created, state.last_sequence
        self._next_sequence = first_sequence
        self._settled = 0
        """What lies before this sequence has been read, or is known to be lost, or was not asked
        for: if it is dropped, nothing is lost."""
        self._checked_s, self._connection = anyio.current_time(), link.connections
        self.buffer = deque()
        self.known_until_ns = 0
        self.is_behind = self.has_passed = False

    @property
    def has_given_history(self) -> bool:
        """What is in the buffer, and what comes, was stored after it was opened."""
        return self.has_passed and (not self.buffer or self.buffer[0].sequence > self._opened_at)

    def doubt_nowait(self) -> None:
        """There should be something that is not found: see at the next page what has become of the
        stream."""
        self._checked_s = -math.inf

    async def read(self, known_ns: int) -> tuple[Missed, ...]:
        """Fill the buffer with the next page; may be cancelled, and loses nothing.

        Args:
            known_ns: when the last message was stored that the reader has seen of any stream.

        Returns: what was lost before this page.

        Raises:
            BusUnavailable, BusTimeout, RequestRefused
        """
        connection = None
        while connection != self._link.connections:  # of another one it is not known what is lost
            began_s, connection = anyio.current_time(), self._link.connections
            first, settled, missed = self._next_sequence, self._settled, list[Missed]()
            state = await self._state_if_due(began_s, connection)
            if state is not None:
                unread = max(first, settled)
                if state.created != self._created or state.last_sequence < first - 1:
                    missed.append(Missed(self._name, None))
                    first, settled = 1, 0
                elif state.first_sequence > unread:
                    missed.append(Missed(self._name, state.first_sequence - unread))
                    settled = state.first_sequence
            messages, more = await self._jetstream.page(self._stream, self._subject, first)
            if dropped := await self._dropped_before(messages, max(first, settled)):
                missed.append(Missed(self._name, dropped))
        # From here on nothing waits: a reader that is cancelled has all of this, or nothing.
        if state is not None:
            self._created, self._checked_s = state.created, began_s
            settled = settled if more else max(settled, state.last_sequence + 1)
        self._settled = settled
        self._next_sequence = messages[-1].sequence + 1 if messages else first
        self._connection = connection
        self.known_until_ns = max((message.stored_ns for message in messages), default=known_ns)
        self.is_behind = more > 0
        self.has_passed |= not more or self._next_sequence > self._opened_at
        self.buffer.extend(each for each in messages if self._asked_for.fullmatch(each.subject))
        return tuple(missed)

    async def _state_if_due(self, now_s: float, connection: int) -> StreamState | None:
        """None: nothing has been dropped, or lost, since the last page."""
        if (
            self._connection == connection
            and not self.is_behind
            and now_s < self._checked_s + _CHECK_S
        ):
            return None
        return await self._jetstream.state(self._stream)

    async def _dropped_before(self, messages: Sequence[StoredMessage], begin: int) -> int:
        """How many messages were dropped from `begin` on in the midst of a stream that keeps the
        last few of each subject. None that was asked for was, unless there are as many of one."""
        limit = last_kept(self._name)
        counts = Counter(message.subject for message in messages)
        full = [each for each in messages if limit is not None and counts[each.subject] >= limit]
        if not full:
            return 0
        end = full[0].sequence
        sequence, kept, more = begin, 0, 1
        while more and sequence < end:
            page, more = await self._jetstream.page(self._stream, ">", sequence)
            kept += sum(message.sequence < end for message in page)
            sequence = page[-1].sequence + 1 if page else end
        return max(0, end - begin - kept)


async def open_tail(
    jetstream: JetStream,
    link: Link,
    name: str,
    prefix: str,
    subject: str,
    asked_for: re.Pattern[str],
    since_ns: int | None,
) -> tuple[Tail, tuple[Missed, ...]]:
    """A stream from a time on; 0: all of it; None: what is stored from now on.

    Args:
        name: in the catalogue.
        subject: holds all that is asked for, and maybe more.
        asked_for: matches the subjects that are.

    Returns: besides, whether some of what was asked for is not kept any more.

    Raises:
        BusUnavailable, BusTimeout, RequestRefused
    """
    stream = stream_name(name, prefix)
    state = await jetstream.state(stream)
    first, missed = state.last_sequence + 1, list[Missed]()
    if since_ns == 0:
        first = state.first_sequence
    elif since_ns is not None:
        first = await jetstream.first_since(stream, since_ns) or first
        if state.first_sequence > 1 and state.first_ns > since_ns:
            missed.append(Missed(name, None))
    tail = Tail(jetstream, link, name, stream, subject, asked_for, state, first)
    return tail, tuple(missed)
