"""Dead letters without a server: what they say, and what a flood does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import anyio
import pytest

from weightbus.bus.dead_letters import _TOLD_LETTERS, UNKNOWN_MODEL, DeadLetters
from weightbus.bus.errors import BusUnavailable
from weightbus.bus.jetstream import JetStream
from weightbus.schemas.codec import decode
from weightbus.schemas.errors import MessageInvalid
from weightbus.schemas.progress import DeadLetter

pytestmark = pytest.mark.anyio

FAULT = MessageInvalid("CheckpointReady", "version", -1, "must be at least 0")
SUBJECT = "p.m.checkpoint.ready"
NOW_NS = 1_700_000_000_000_000_000


class Stored:
    """In the place of the streams: what was published, unless it is broken."""

    def __init__(self) -> None:
        self.letters: list[DeadLetter] = []
        self.subjects: list[str] = []
        self.ids: list[str | None] = []
        self.broken = False

    async def publish(
        self,
        subject: str,
        payload: bytes,
        headers: Mapping[str, str],
        *,
        message_id: str | None = None,
    ) -> None:
        if self.broken:
            raise BusUnavailable("nats://host", "gone")
        self.subjects.append(subject)
        self.letters.append(decode(payload, headers["Content-Type"], DeadLetter))
        self.ids.append(message_id)


def letters_to(stored: Stored) -> DeadLetters:
    return DeadLetters(cast(JetStream, stored), "p", "tester", lambda: NOW_NS)


async def send_all(letters: DeadLetters) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(letters.run)
        await letters.close()


async def test_letter_names_place_field_value_and_limit_when_sent() -> None:
    stored = Stored()
    payload = bytes(5000)
    await letters_to(stored).report("m", SUBJECT, payload, "application/json", FAULT)
    (letter,) = stored.letters
    assert stored.subjects == ["p.m.dead"]
    assert (letter.model, letter.subject, letter.field) == ("m", SUBJECT, "version")
    assert (letter.value, letter.limit) == ("-1", "must be at least 0")
    assert letter.reason == str(FAULT)
    assert (letter.payload, letter.payload_bytes) == (payload[:1024], 5000)
    assert (letter.content_type, letter.reported_by) == ("application/json", "tester")
    assert letter.reported_ns == NOW_NS


async def test_letter_is_valid_when_everything_in_it_is_too_long() -> None:
    stored = Stored()
    long = MessageInvalid("kind" * 2000, "field" * 2000, "value" * 2000, "limit" * 2000)
    letters = letters_to(stored)
    await letters.report("no token!", "s" * 2000, b"", "c" * 2000, long)
    (letter,) = stored.letters
    assert letter.model == UNKNOWN_MODEL
    assert stored.subjects == [f"p.{UNKNOWN_MODEL}.dead"]


async def test_letters_have_one_id_when_they_are_about_one_message() -> None:
    stored = Stored()
    for reporter in (letters_to(stored), letters_to(stored)):
        await reporter.report("m", SUBJECT, b"x", "", FAULT)
        await reporter.report("m", SUBJECT, b"y", "", FAULT)
    assert stored.ids[:2] == stored.ids[2:]
    assert len(set(stored.ids)) == 2


async def test_letters_that_found_no_room_are_counted_when_there_is_a_flood() -> None:
    stored = Stored()
    letters = letters_to(stored)
    for number in range(300):
        letters.report_nowait("m", SUBJECT, str(number).encode(), "", FAULT)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(letters.run)
        await anyio.wait_all_tasks_blocked()
        letters.report_nowait("m", SUBJECT, b"last", "", FAULT)
        await letters.close()
    assert len(stored.letters) == 257
    assert stored.letters[-1].reason.endswith("(44 more letters were dropped before this one)")


async def test_letter_is_told_once_when_its_message_is_read_again_and_again() -> None:
    letters, told = letters_to(Stored()), list[DeadLetter]()
    letters.tell.append(("m", told.append))
    for _ in range(3):
        letters.report_nowait("m", SUBJECT, b"x", "", FAULT)
        await letters.report("m", SUBJECT, b"x", "", FAULT)
    letters.report_nowait("m", SUBJECT, b"y", "", FAULT)
    assert [letter.payload for letter in told] == [b"x", b"y"]


async def test_letter_is_told_to_one_of_those_who_want_to_know() -> None:
    letters, told = letters_to(Stored()), list[tuple[str, str]]()
    for name, model in (("first", "n"), ("second", "m"), ("third", "m")):
        letters.tell.append((model, lambda letter, name=name: told.append((name, letter.model))))  # type: ignore[misc]
    for model in ("m", "n", "other"):
        letters.report_nowait(model, f"p.{model}.x", b"", "", FAULT)
    assert told == [("second", "m"), ("first", "n"), ("first", "other")]


async def test_letter_is_sent_when_who_is_told_raises(caplog: pytest.LogCaptureFixture) -> None:
    def raises(letter: DeadLetter) -> None:
        raise OSError("the meter is gone")

    stored = Stored()
    letters = letters_to(stored)
    letters.tell.append(("m", raises))
    letters.report_nowait("m", SUBJECT, b"x", "", FAULT)
    await send_all(letters)
    assert len(stored.letters) == 1
    assert f"the dead letter about {SUBJECT} is not counted" in caplog.text


async def test_causes_that_were_told_are_bounded() -> None:
    letters, told = letters_to(Stored()), list[DeadLetter]()
    letters.tell.append(("m", told.append))
    for number in range(2 * _TOLD_LETTERS):
        letters.report_nowait("m", SUBJECT, str(number).encode(), "", FAULT)
    assert len(told) == 2 * _TOLD_LETTERS
    assert len(letters._told) == _TOLD_LETTERS


async def test_waiting_letters_are_sent_when_closed() -> None:
    stored = Stored()
    letters = letters_to(stored)
    letters.report_nowait("m", SUBJECT, b"x", "", FAULT)
    await send_all(letters)
    assert len(stored.letters) == 1


async def test_sender_goes_on_when_the_bus_is_gone(caplog: pytest.LogCaptureFixture) -> None:
    stored = Stored()
    stored.broken = True
    letters = letters_to(stored)
    letters.report_nowait("m", SUBJECT, b"x", "", FAULT)
    await send_all(letters)
    assert f"dead letter about {SUBJECT} was not sent" in caplog.text
