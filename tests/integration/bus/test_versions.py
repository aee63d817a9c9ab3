"""What peers of other languages and other versions hear and say, on a real server."""

from __future__ import annotations

from typing import Any

import anyio
import msgspec
import pytest

from tests.contract.examples import EXAMPLES
from tests.integration.bus.raw import publish_raw, raw_client
from weightbus.bus.connection import Bus
from weightbus.bus.received import Received
from weightbus.schemas.checkpoint import CheckpointReady, CheckpointSkipped
from weightbus.schemas.codec import CONTENT_TYPE_JSON, CONTENT_TYPE_MSGPACK
from weightbus.schemas.placement import FileSegment
from weightbus.schemas.progress import DeadLetter

pytestmark = pytest.mark.anyio

CODECS: dict[str, Any] = {CONTENT_TYPE_JSON: msgspec.json, CONTENT_TYPE_MSGPACK: msgspec.msgpack}
SUBJECT = "weightbus.m.checkpoint.ready"
DEADLINE_S = 10.0


def ready(version: int) -> CheckpointReady:
    return CheckpointReady(model="m", version=version, producer="trainer", files=("/a.st",))


@pytest.mark.parametrize(
    ("name", "content_type"),
    [
        ("CheckpointSkipped", CONTENT_TYPE_JSON),
        ("RoundComplete", CONTENT_TYPE_JSON),
        ("UpdateComplete", CONTENT_TYPE_JSON),
        ("UpdateFailed", CONTENT_TYPE_JSON),
        ("DeadLetter", CONTENT_TYPE_JSON),
        ("CheckpointReady", CONTENT_TYPE_MSGPACK),
        ("RoundPlan", CONTENT_TYPE_MSGPACK),
    ],
)
async def test_message_goes_out_in_the_encoding_of_the_catalogue_and_says_so(
    bus: Bus, name: str, content_type: str
) -> None:
    message = EXAMPLES[name]
    async with raw_client(bus.url) as client:
        heard = await client.subscribe("weightbus.>")
        await client.flush()
        await bus.publish(message)
        raw = await heard.next_msg(DEADLINE_S)
    assert raw.headers is not None
    assert raw.headers["Content-Type"] == content_type
    codec = CODECS[content_type]
    assert codec.decode(raw.data) == codec.decode(codec.encode(message))


async def test_dead_letter_is_json_when_a_trainer_sends_nonsense(bus: Bus) -> None:
    async with raw_client(bus.url) as client, bus.subscribe(CheckpointReady) as messages:
        heard = await client.subscribe("weightbus.m.dead")
        await client.flush()
        await publish_raw(bus.url, SUBJECT, b"nonsense", {"Content-Type": "text/plain"})
        await bus.publish(ready(2))
        with anyio.fail_after(DEADLINE_S):
            await anext(messages)
        raw = await heard.next_msg(DEADLINE_S)
    assert raw.headers is not None
    assert raw.headers["Content-Type"] == CONTENT_TYPE_JSON
    letter = msgspec.json.decode(raw.data)
    assert (letter["type"], letter["subject"]) == ("DeadLetter", SUBJECT)
    assert (letter["field"], letter["value"]) == ("Content-Type", "text/plain")


async def test_skipped_version_is_stored_once_when_several_ranks_say_so(bus: Bus) -> None:
    said = [
        CheckpointSkipped(model="m", version=8, producer="t", cause="ranks", reason=f"rank {rank}")
        for rank in (1, 2)
    ]
    async with bus.subscribe(CheckpointSkipped, model="m") as messages:
        acks = [await bus.publish(message) for message in said]
        again = CheckpointReady(model="m", version=8, producer="t", files=("/a.st",))
        assert not (await bus.publish(again)).duplicate, "the same version may come after all"
        await bus.publish(msgspec.structs.replace(said[0], version=9))
        heard = [await anext(messages) for _ in range(2)]
    assert [ack.duplicate for ack in acks] == [False, True]
    assert [item.message.version for item in heard if isinstance(item, Received)] == [8, 9]
    kept = [item.message async for item in bus.replay(CheckpointSkipped, model="m")]
    assert [message.reason for message in kept] == ["rank 1", "rank 1"]


@pytest.mark.parametrize("content_type", CODECS)
async def test_message_of_another_major_version_is_refused_on_dead_and_the_next_is_read(
    bus: Bus, content_type: str
) -> None:
    document = msgspec.to_builtins(ready(1)) | {"schema_version": 2, "files": {"moved": True}}
    payload = CODECS[content_type].encode(document)
    async with (
        bus.subscribe(DeadLetter, model="m") as letters,
        bus.subscribe(CheckpointReady, model="m") as messages,
    ):
        await publish_raw(bus.url, SUBJECT, payload, {"Content-Type": content_type})
        await bus.publish(ready(2))
        with anyio.fail_after(DEADLINE_S):
            received, letter = await anext(messages), await anext(letters)
    assert isinstance(received, Received)
    assert received.message == ready(2)
    assert isinstance(letter, Received)
    message = letter.message
    assert isinstance(message, DeadLetter)
    assert (message.field, message.value) == ("schema_version", "2")
    assert message.limit == "spoken here: 1"
    assert message.payload == payload
    history = [item.message async for item in bus.replay(CheckpointReady, model="m")]
    assert history == [ready(2)]


@pytest.mark.parametrize("content_type", CODECS)
async def test_message_of_a_newer_minor_version_is_read_for_what_we_know_of_it(
    bus: Bus, content_type: str
) -> None:
    known = {"kind": "file", "path": "/a.st"}
    document = {
        "model": "m",
        "version": 1,
        "producer": "trainer",
        "layout_digest": "0" * 64,
        "placement": [[{"kind": "tape", "reel": 7}, known | {"stripes": 4}]],
        "urgency": "high",
    }
    async with (
        bus.subscribe(DeadLetter, model="m") as letters,
        bus.subscribe(CheckpointReady, model="m") as messages,
    ):
        payload = CODECS[content_type].encode(document)
        await publish_raw(bus.url, SUBJECT, payload, {"Content-Type": content_type})
        with anyio.fail_after(DEADLINE_S):
            received = await anext(messages)
        broken = CODECS[content_type].encode(document | {"version": -1})
        await publish_raw(bus.url, SUBJECT, broken, {"Content-Type": content_type})
        await bus.publish(ready(2))
        with anyio.fail_after(DEADLINE_S):
            await anext(messages)
            letter = await anext(letters)
    assert isinstance(received, Received)
    assert received.message.placement == ((FileSegment(path="/a.st"),),)
    assert isinstance(letter, Received)
    assert letter.message.payload == broken, "the first letter is about the second message"
