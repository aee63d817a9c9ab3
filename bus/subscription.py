"""Live messages of some types, in one bounded stream.

Owns core NATS subscriptions: one for each family of subjects (`checkpoint`, `round`, `stage`, ...),
so that the messages of a family come in the order in which the server sent them. A repeat (the
same `Nats-Msg-Id` on the same subject, which the streams drop too) is left out. Nothing here waits
for the reader: one that falls too far behind loses the subscription, not the connection.
"""

from __future__ import annotations

import re
from collections import OrderedDict, defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Generic, TypeVar

import anyio

from weightbus.bus.dead_letters import Reporter
from weightbus.bus.errors import BusError, BusUnavailable, SubscriptionOverflow
from weightbus.bus.jetstream import HEADER_MESSAGE_ID
from weightbus.bus.link import Incoming, Link
from weightbus.bus.received import Received, Reconnected, content_type_of, model_of, read
from weightbus.schemas.base import Message
from weightbus.schemas.catalogue import entry_of, pattern_of
from weightbus.schemas.errors import MessageInvalid

__all__ = ("Subscription", "cover", "matcher", "merge", "open_subscription")

_REMEMBERED_IDS = 1024
_FAMILY_TOKEN = 2  # of prefix, model, family, ...

M = TypeVar("M", bound=Message)

_Item = tuple[Incoming, int] | Reconnected
"""What came and when, or a mark."""


class Subscription(Generic[M]):
    """An asynchronous iterator of `Received` and `Reconnected`; made by `open_subscription`.

    Messages that cannot be read are answered on `dead` and left out.

    Raises (from iteration):
        SubscriptionOverflow: the reader fell `max_unread_messages` behind.
        BusUnavailable: the connection is lost for good.
    """

    def __init__(
        self,
        types: tuple[type[M], ...],
        patterns: Sequence[str],
        prefix: str,
        dead_letters: Reporter,
        limit: int,
        now_ns: Callable[[], int],
    ) -> None:
        """`patterns`: the subjects of `types`, with wildcards. `now_ns`: the bus's clock."""
        self._types, self._patterns, self._prefix = types, tuple(patterns), prefix
        self._asked_for = matcher(patterns)
        self._dead_letters = dead_letters
        self._limit, self._now_ns = limit, now_ns
        self._send, self._receive = anyio.create_memory_object_stream[_Item](limit)
        self._error: BusError | None = None
        self._seen: OrderedDict[tuple[str, str], None] = OrderedDict()

    def __aiter__(self) -> AsyncIterator[Received[M] | Reconnected]:
        return self

    async def __anext__(self) -> Received[M] | Reconnected:
        while True:
            if isinstance(self._error, SubscriptionOverflow):
                raise self._error
            try:
                item = await self._receive.receive()
            except (anyio.EndOfStream, anyio.ClosedResourceError):
                if self._error is not None:
                    raise self._error from None
                raise StopAsyncIteration from None
            if isinstance(item, Reconnected):
                return item
            if (received := self._read(*item)) is not None:
                return received

    def deliver_nowait(self, incoming: Incoming) -> None:
        self._put((incoming, self._now_ns()))

    def reconnected_nowait(self) -> None:
        self._put(Reconnected())

    def failed_nowait(self, error: BusUnavailable) -> None:
        self._end(error)

    def close(self) -> None:
        self._send.close()
        self._receive.close()

    def _put(self, item: _Item) -> None:
        if self._error is not None:
            return
        try:
            self._send.send_nowait(item)
        except anyio.WouldBlock:
            self._end(SubscriptionOverflow(self._patterns, self._limit))
        except (anyio.ClosedResourceError, anyio.BrokenResourceError):
            return  # came after the reader left

    def _end(self, error: BusError) -> None:
        self._error = error
        self._send.close()

    def _read(self, incoming: Incoming, received_ns: int) -> Received[M] | None:
        """None: of a type that was not asked for, or not readable."""
        if not self._asked_for.fullmatch(incoming.subject):
            return None
        try:
            received = read(
                incoming.subject,
                incoming.headers,
                incoming.payload,
                received_ns,
                self._prefix,
            )
        except MessageInvalid as error:
            self._reject(incoming, error)
            return None
        message = received.message
        if not isinstance(message, self._types) or self._is_repeat(received):
            return None
        return Received(message, received.subject, received.headers, received.received_ns)

    def _is_repeat(self, received: Received[Message]) -> bool:
        identity = received.headers.get(HEADER_MESSAGE_ID)
        if identity is None:
            return False
        key = (received.subject, identity)
        if key in self._seen:
            return True
        self._seen[key] = None
        if len(self._seen) > _REMEMBERED_IDS:
            self._seen.popitem(last=False)
        return False

    def _reject(self, incoming: Incoming, error: MessageInvalid) -> None:
        model = model_of(incoming.subject, self._prefix)
        if incoming.subject == f"{self._prefix}.{model}.dead":
            return  # a letter about a letter would never end
        content_type = content_type_of(incoming.headers)
        self._dead_letters.report_nowait(
            model, incoming.subject, incoming.payload, content_type, error
        )


@asynccontextmanager
async def open_subscription(
    link: Link,
    types: tuple[type[M], ...],
    model: str | None,
    prefix: str,
    dead_letters: Reporter,
    limit: int,
    tokens: Mapping[str, str | int],
    now_ns: Callable[[], int],
) -> AsyncIterator[Subscription[M]]:
    """Subscribe; entered once the server has been told of every subject.

    With `tokens` each subject is subscribed to by itself: nothing else comes in, but the messages
    of a family may come out of order.
    """
    patterns = [_pattern(kind, prefix, model, tokens) for kind in types]
    subscription = Subscription(types, patterns, prefix, dead_letters, limit, now_ns)
    async with AsyncExitStack() as stack:
        stack.enter_context(link.listen(subscription))
        for subject in patterns if tokens else cover(patterns):
            await stack.enter_async_context(link.subscribe(subject, subscription.deliver_nowait))
        try:
            await link.settle()
            yield subscription
        finally:
            subscription.close()


def _pattern(
    kind: type[Message], prefix: str, model: str | None, tokens: Mapping[str, str | int]
) -> str:
    """With those of `tokens` that the subject of `kind` has."""
    template = entry_of(kind).subject
    own = {name: token for name, token in tokens.items() if f"{{{name}}}" in template}
    return pattern_of(kind, prefix, model, **own)


def cover(patterns: Sequence[str]) -> tuple[str, ...]:
    """The fewest subjects that hold `patterns` and overlap nowhere: one for each family.

    >>> cover(["p.m.round.*.join", "p.m.round.*.plan", "p.m.dead"])
    ('p.m.round.*.*', 'p.m.dead')
    """
    families: dict[str, list[str]] = defaultdict(list)
    for pattern in patterns:
        families[pattern.split(".")[_FAMILY_TOKEN]].append(pattern)
    return tuple(merge(members) for members in families.values())


def merge(patterns: Sequence[str]) -> str:
    """One subject that holds all `patterns`, and more.

    >>> merge(["p.m.round.*.join", "p.m.update.*", "p.m.dead"])
    'p.m.>'
    """
    split = [pattern.split(".") for pattern in patterns]
    shortest = min(map(len, split))
    merged = [
        tokens[0] if len(set(tokens)) == 1 else "*"
        for tokens in zip(*(tokens[:shortest] for tokens in split), strict=True)
    ]
    if any(len(tokens) != shortest for tokens in split):
        merged[-1] = ">"
    return ".".join(merged)


def matcher(patterns: Sequence[str]) -> re.Pattern[str]:
    """Of the subjects that match a pattern; `cover` and `merge` bring in others."""
    return re.compile("|".join(re.escape(p).replace(r"\*", "[^.]+") for p in patterns))
