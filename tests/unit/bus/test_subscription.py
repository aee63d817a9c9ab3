"""What a subscription makes of what comes, without a server."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from weightbus.bus.errors import BusUnavailable, SubscriptionOverflow
from weightbus.bus.link import Incoming
from weightbus.bus.received import Received, Reconnected
from weightbus.bus.subscription import Subscription, cover
from weightbus.schemas.base import Message
from weightbus.schemas.catalogue import pattern_of, subject_of
from weightbus.schemas.checkpoint import CheckpointReady, CheckpointRetired
from weightbus.schemas.codec import encode
from weightbus.schemas.errors import MessageInvalid
from weightbus.schemas.rounds import Commit, Join, RoundPlan

pytestmark = pytest.mark.anyio

NOW_NS = 1_700_000_000_000_000_000


@dataclass
class Letters:
    """A `Reporter`."""

    reported: list[tuple[str, str]] = field(default_factory=list)

    def report_nowait(
        self, model: str, subject: str, payload: bytes, content_type: str, error: MessageInvalid
    ) -> None:
        self.reported.append((model, subject))


def retired(version: int) -> CheckpointRetired:
    return CheckpointRetired(model="m", version=version, producer="t")


def incoming(
    message: Message, identity: str | None = None, *, subject: str | None = None
) -> Incoming:
    headers = {} if identity is None else {"Nats-Msg-Id": identity}
    return Incoming(subject or subject_of(message, "p"), headers, encode(message))


def subscription(
    *types: type[Message], limit: int = 8, letters: Letters | None = None
) -> Subscription[Message]:
    patterns = [pattern_of(kind, "p") for kind in types]
    return Subscription(types, patterns, "p", letters or Letters(), limit, lambda: NOW_NS)


async def versions(messages: Subscription[Message]) -> list[int]:
    """Of everything that waits; ends the subscription."""
    messages.failed_nowait(BusUnavailable("nats://host", "the end"))
    found: list[int] = []
    try:
        async for item in messages:
            assert isinstance(item, Received)
            assert isinstance(item.message, CheckpointRetired)
            found.append(item.message.version)
    except BusUnavailable:
        return found
    raise AssertionError("the error was not raised")


@pytest.mark.parametrize(
    ("patterns", "covers"),
    [
        (["p.m.dead"], ("p.m.dead",)),
        (["p.*.update.*", "p.*.update.*"], ("p.*.update.*",)),
        (
            ["p.m.round.*.join", "p.m.round.*.plan", "p.m.checkpoint.ready"],
            ("p.m.round.*.*", "p.m.checkpoint.ready"),
        ),
        (["p.m.checkpoint.ready", "p.m.checkpoint.part.*.*"], ("p.m.checkpoint.>",)),
        (["p.m.checkpoint.ready", "p.m.checkpoint.retired.*"], ("p.m.checkpoint.>",)),
    ],
)
def test_cover_is_one_subject_per_family_when_patterns_are_given(
    patterns: list[str], covers: tuple[str, ...]
) -> None:
    assert cover(patterns) == covers


async def test_other_types_of_the_family_are_left_out_when_they_come() -> None:
    letters = Letters()
    messages = subscription(CheckpointRetired, Join, RoundPlan, letters=letters)
    ready = CheckpointReady(model="m", version=5, producer="t", files=("/a",))
    messages.deliver_nowait(incoming(ready))
    messages.deliver_nowait(incoming(Commit(model="m", version=6, round="r", epoch=0)))
    messages.deliver_nowait(Incoming("p.m.checkpoint.new-in-a-later-version", {}, b"?"))
    messages.deliver_nowait(incoming(retired(7)))
    assert await versions(messages) == [7]
    assert letters.reported == []


async def test_repeat_is_left_out_when_its_id_came_before() -> None:
    messages = subscription(CheckpointRetired)
    for version, identity in ((1, "a"), (1, "a"), (2, "b"), (1, "a"), (2, None), (2, None)):
        messages.deliver_nowait(incoming(retired(version), identity))
    assert await versions(messages) == [1, 2, 2, 2]


async def test_good_message_passes_when_an_unreadable_one_had_its_id() -> None:
    letters = Letters()
    messages = subscription(CheckpointRetired, letters=letters)
    subject = "p.m.checkpoint.retired.t"
    messages.deliver_nowait(Incoming(subject, {"Nats-Msg-Id": "a"}, b"junk"))
    messages.deliver_nowait(incoming(retired(1), "a"))
    assert await versions(messages) == [1]
    assert letters.reported == [("m", subject)]


@pytest.mark.parametrize(
    "subject", ["p.other.checkpoint.retired.t", "p.bad model.checkpoint.retired.t"]
)
async def test_message_is_rejected_when_its_subject_is_not_its_own(subject: str) -> None:
    letters = Letters()
    messages = subscription(CheckpointRetired, letters=letters)
    messages.deliver_nowait(incoming(retired(1), subject=subject))
    assert await versions(messages) == []
    assert letters.reported == [(subject.split(".")[1], subject)]


async def test_overflow_is_raised_at_once_when_more_wait_than_allowed() -> None:
    messages = subscription(CheckpointRetired, limit=3)
    for version in range(4):
        messages.deliver_nowait(incoming(retired(version)))
    for _ in range(2):
        with pytest.raises(
            SubscriptionOverflow, match=r"p\.\*\.checkpoint\.retired\.\* had 3 unread"
        ):
            await anext(messages)


async def test_what_came_before_is_read_when_the_connection_is_lost_for_good() -> None:
    messages = subscription(CheckpointRetired)
    messages.deliver_nowait(incoming(retired(1)))
    messages.reconnected_nowait()
    messages.failed_nowait(BusUnavailable("nats://host", "gone"))
    messages.deliver_nowait(incoming(retired(2)))
    assert isinstance(await anext(messages), Received)
    assert isinstance(await anext(messages), Reconnected)
    with pytest.raises(BusUnavailable, match="gone"):
        await anext(messages)


async def test_iteration_ends_when_the_subscription_is_closed() -> None:
    messages = subscription(CheckpointRetired)
    messages.close()
    messages.deliver_nowait(incoming(retired(1)))
    assert [item async for item in messages] == []


async def test_message_has_the_time_at_which_it_came_when_it_is_read_later() -> None:
    times = iter((1, 2))
    patterns = [pattern_of(CheckpointRetired, "p")]
    messages = Subscription((CheckpointRetired,), patterns, "p", Letters(), 8, lambda: next(times))
    for version in (7, 8):
        messages.deliver_nowait(incoming(retired(version)))
    assert next(times, None) is None, "nobody has read them yet"
    read = [await anext(messages) for _ in range(2)]
    assert [item.received_ns for item in read if isinstance(item, Received)] == [1, 2]
