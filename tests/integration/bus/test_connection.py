"""The bus on a real server: publish, subscribe, look back, refuse."""

from __future__ import annotations

import anyio
import msgspec
import pytest

from tests.integration.bus.raw import publish_raw
from tests.nats_server import NatsServer
from weightbus.bus.connection import Bus, open_bus
from weightbus.bus.errors import PayloadTooLarge, SubscriptionOverflow
from weightbus.bus.received import Received
from weightbus.schemas.checkpoint import CheckpointReady, CheckpointRetired
from weightbus.schemas.codec import CONTENT_TYPE_JSON, encode
from weightbus.schemas.errors import MessageInvalid
from weightbus.schemas.progress import DeadLetter, StageComplete, UpdateComplete, UpdateFailed
from weightbus.schemas.rounds import Commit, Join, RankOffer

pytestmark = pytest.mark.anyio

DIGEST = "0" * 64


def ready(version: int, model: str = "m") -> CheckpointReady:
    return CheckpointReady(model=model, version=version, producer="trainer", files=("/a.st",))


def retired(version: int) -> CheckpointRetired:
    return CheckpointRetired(model="m", version=version, producer="trainer")


def commit(version: int, round_id: str = "r") -> Commit:
    return Commit(model="m", version=version, round=round_id, epoch=0)


def failed(engine: str) -> UpdateFailed:
    return UpdateFailed(model="m", version=1, round="r", engine=engine, cause="X", reason="x")


def complete(engine: str) -> UpdateComplete:
    return UpdateComplete(
        model="m",
        version=1,
        round="r",
        engine=engine,
        verified="not_offered",
        routes=("local",),
        bytes=1,
        start_ns=1,
        end_ns=2,
    )


async def test_subscriber_receives_message_and_headers_when_published(bus: Bus) -> None:
    async with bus.subscribe(CheckpointReady, model="m") as messages:
        await bus.publish(ready(1), {"traceparent": "00-1-2-01"})
        received = await anext(messages)
    assert isinstance(received, Received)
    assert received.message == ready(1)
    assert received.subject == "weightbus.m.checkpoint.ready"
    assert received.headers["traceparent"] == "00-1-2-01"


async def test_subscriber_reads_json_when_another_language_published_it(bus: Bus) -> None:
    payload = encode(ready(3), CONTENT_TYPE_JSON)
    async with bus.subscribe(CheckpointReady) as messages:
        await publish_raw(
            bus.url,
            "weightbus.m.checkpoint.ready",
            payload,
            {"Content-Type": "application/json"},
        )
        received = await anext(messages)
    assert isinstance(received, Received)
    assert received.message == ready(3)


async def test_subscriber_receives_types_in_order_when_several_are_asked_for(bus: Bus) -> None:
    sent = [ready(1), retired(0), ready(2), retired(1), ready(3)]
    async with bus.subscribe(CheckpointReady, CheckpointRetired, Join, model="m") as messages:
        for message in sent:
            await bus.publish(message)
        await bus.publish(commit(1))  # of no type that was asked for
        await bus.publish(ready(4))
        got = [await anext(messages) for _ in range(len(sent) + 1)]
    assert [item.message for item in got if isinstance(item, Received)] == [*sent, ready(4)]


async def test_subscriber_hears_only_its_model_when_one_is_given(bus: Bus) -> None:
    async with bus.subscribe(CheckpointReady, model="a") as messages:
        await bus.publish(ready(1, "b"))
        await bus.publish(ready(2, "a"))
        received = await anext(messages)
    assert isinstance(received, Received)
    assert received.message == ready(2, "a")


async def test_duplicate_is_dropped_when_a_checkpoint_is_published_twice(bus: Bus) -> None:
    async with bus.subscribe(CheckpointReady, model="m") as messages:
        first = await bus.publish(ready(1))
        second = await bus.publish(ready(1))
        await bus.publish(ready(2))
        got = [await anext(messages), await anext(messages)]
    assert (first.duplicate, second.duplicate) == (False, True)
    assert [item.message for item in got if isinstance(item, Received)] == [ready(1), ready(2)]


async def test_unreadable_message_lands_on_dead_when_received_and_the_next_one_passes(
    bus: Bus,
) -> None:
    broken = msgspec.json.encode({**msgspec.to_builtins(ready(1)), "version": -7})
    subject = "weightbus.m.checkpoint.ready"
    async with (
        bus.subscribe(DeadLetter, model="m") as letters,
        bus.subscribe(CheckpointReady, model="m") as messages,
    ):
        await publish_raw(bus.url, subject, broken, {"Content-Type": "application/json"})
        await bus.publish(ready(2))
        received = await anext(messages)
        letter = await anext(letters)
    assert isinstance(received, Received)
    assert received.message == ready(2)
    assert isinstance(letter, Received)
    message = letter.message
    assert isinstance(message, DeadLetter)
    assert (message.subject, message.field, message.value) == (subject, "version", "-7")
    assert "0" in message.limit
    assert message.content_type == "application/json"
    assert message.payload == broken[:1024]
    assert message.payload_bytes == len(broken)


async def test_message_lands_on_dead_when_its_subject_names_another_model(bus: Bus) -> None:
    async with (
        bus.subscribe(DeadLetter) as letters,
        bus.subscribe(CheckpointReady) as messages,
    ):
        await publish_raw(bus.url, "weightbus.other.checkpoint.ready", encode(ready(1)), {})
        await bus.publish(ready(2))
        received = await anext(messages)
        letter = await anext(letters)
    assert isinstance(received, Received)
    assert received.message == ready(2)
    assert isinstance(letter, Received)
    assert isinstance(letter.message, DeadLetter)
    assert letter.message.model == "other"
    assert "weightbus.m.checkpoint.ready" in letter.message.limit


async def test_unreadable_letter_is_not_answered_when_received(bus: Bus) -> None:
    async with bus.subscribe(DeadLetter) as letters:
        await publish_raw(bus.url, "weightbus.m.dead", b"\xc1", {})
        error = MessageInvalid("test", "$", 1, "none")
        await bus.reject("weightbus.m.checkpoint.ready", b"x", None, error)
        letter = await anext(letters)
    assert isinstance(letter, Received)
    assert letter.message.payload == b"x"
    kept = [item.message.payload async for item in bus.replay(DeadLetter)]
    assert kept == [b"x"]


async def test_letters_collapse_when_several_readers_reject_one_message(
    bus: Bus, nats_server: NatsServer
) -> None:
    async with open_bus(nats_server.settings) as other:
        error = MessageInvalid("test", "$", 1, "none")
        for reader in (bus, other):
            await reader.reject("weightbus.m.checkpoint.ready", b"x", None, error)
    assert len([letter async for letter in bus.replay(DeadLetter)]) == 1


async def test_subscription_raises_overflow_when_its_reader_is_too_slow(
    nats_server: NatsServer,
) -> None:
    settings = msgspec.structs.replace(nats_server.settings, max_unread_messages=4)
    async with open_bus(settings) as bus, bus.subscribe(CheckpointReady) as messages:
        for version in range(6):
            await bus.publish(ready(version))
        with pytest.raises(SubscriptionOverflow, match="4 unread messages"):
            await anext(messages)
        await bus.publish(ready(7))  # the connection lives on


async def test_last_is_the_newest_message_when_several_were_published(bus: Bus) -> None:
    assert await bus.last(CheckpointReady, model="m") is None
    await bus.publish(ready(1))
    await bus.publish(ready(2))
    await bus.publish(ready(9, "other"))
    last = await bus.last(CheckpointReady, model="m")
    assert last is not None
    assert last.message == ready(2)
    assert last.received_ns > 0


async def test_last_is_chosen_by_tokens_when_they_are_given(bus: Bus) -> None:
    await bus.publish(complete("a"))
    await bus.publish(complete("b"))
    last = await bus.last(UpdateComplete, model="m", engine="a")
    assert last is not None
    assert last.message.engine == "a"


async def test_last_is_the_newest_readable_message_when_junk_came_after_it(bus: Bus) -> None:
    await bus.publish(ready(1))
    await bus.publish(ready(2))
    async with bus.subscribe(DeadLetter) as letters:
        for junk in (b"junk", b"", encode(ready(3, "other"))):
            await publish_raw(bus.url, "weightbus.m.checkpoint.ready", junk, {})
        last = await bus.last(CheckpointReady, model="m")
        assert "weightbus.m.checkpoint.ready" in str(await anext(letters))
    assert last is not None
    assert last.message == ready(2)


async def test_last_is_none_when_nothing_on_the_subject_can_be_read(bus: Bus) -> None:
    await publish_raw(bus.url, "weightbus.m.checkpoint.ready", b"junk", {})
    assert await bus.last(CheckpointReady, model="m") is None


async def test_last_is_none_when_the_subject_ends_with_another_type(bus: Bus) -> None:
    await bus.publish(complete("a"))
    await bus.publish(failed("a"))
    assert await bus.last(UpdateComplete, model="m", engine="a") is None
    assert await bus.last(UpdateFailed, model="m", engine="a") is not None


async def test_replay_gives_history_in_order_when_types_lie_in_several_streams(bus: Bus) -> None:
    sent = [ready(1), commit(1), retired(0), complete("a"), failed("b"), commit(2)]
    for message in sent:
        await bus.publish(message)
    kinds = (CheckpointReady, CheckpointRetired, Commit, UpdateComplete, UpdateFailed)
    got = [item.message async for item in bus.replay(*kinds, model="m")]
    assert got == sent


async def test_replay_begins_at_a_time_when_one_is_given(bus: Bus) -> None:
    for version in range(3):
        await bus.publish(commit(version))
    history = [item async for item in bus.replay(Commit)]
    later = [item.message async for item in bus.replay(Commit, since_ns=history[1].received_ns)]
    assert later == [commit(1), commit(2)]
    now = history[-1].received_ns + 1
    assert [item async for item in bus.replay(Commit, since_ns=now)] == []


@pytest.mark.parametrize("is_answered", [True, False])
async def test_replay_answers_what_it_cannot_read_when_that_is_wanted(
    is_answered: bool, bus: Bus, nats_server: NatsServer
) -> None:
    await publish_raw(bus.url, "weightbus.m.update.a", b"\xc1", {})
    async with open_bus(nats_server.settings) as reader:  # its letters are sent when it is closed
        assert [each async for each in reader.replay(UpdateComplete, is_answered=is_answered)] == []
    letters = [letter async for letter in bus.replay(DeadLetter)]
    assert len(letters) == is_answered


async def test_replay_gives_all_when_history_is_longer_than_one_page(bus: Bus) -> None:
    count = 1200  # pages hold 512
    async with anyio.create_task_group() as tasks:
        for worker in range(8):
            tasks.start_soon(publish_commits, bus, range(worker, count, 8))
    got = [item.message.version async for item in bus.replay(Commit, model="m", round="r")]
    assert sorted(got) == list(range(count))


async def publish_commits(bus: Bus, versions: range) -> None:
    for version in versions:
        await bus.publish(commit(version))


async def test_publish_is_refused_when_the_message_breaks_the_contract(bus: Bus) -> None:
    with pytest.raises(MessageInvalid, match="version"):
        await bus.publish(ready(-1))


async def test_publish_is_refused_when_payload_and_headers_exceed_the_servers_limit(
    bus: Bus,
) -> None:
    with pytest.raises(PayloadTooLarge, match="the server takes 1048576"):
        await bus.publish(ready(1), {"long": "x" * 1_048_576})
    await bus.publish(ready(1))


async def test_every_kind_of_message_is_stored_when_published(bus: Bus) -> None:
    offer = RankOffer(rank=0, needs_digest=DIGEST, need_bytes=1, routes=("local",))
    join = Join(
        model="m", version=1, round="r", engine="e", consumer="c", host_id="h", ranks=(offer,)
    )
    stage = StageComplete(
        model="m", version=1, round="r", engine="e", stage="fetch", start_ns=1, end_ns=2
    )
    for message in (join, stage):
        ack = await bus.publish(message)
        assert ack.stream == "weightbus-PROGRESS"
    ack = await bus.publish(ready(1))
    assert ack.stream == "weightbus-CHECKPOINTS"


async def test_buses_do_not_mix_when_prefixes_differ(bus: Bus, nats_server: NatsServer) -> None:
    settings = msgspec.structs.replace(nats_server.settings, prefix="other")
    async with open_bus(settings) as other:
        await bus.publish(ready(1))
        await other.publish(ready(2))
        last = await other.last(CheckpointReady, model="m")
    assert last is not None
    assert (last.message, last.subject) == (ready(2), "other.m.checkpoint.ready")


async def test_error_of_the_body_comes_out_bare_when_raised_inside_a_bus(
    nats_server: NatsServer,
) -> None:
    with pytest.raises(ZeroDivisionError):
        async with open_bus(nats_server.settings):
            raise ZeroDivisionError
