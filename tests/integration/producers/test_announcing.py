"""Two publishers announce at once: the last word on the bus is the newest version, said once."""

from __future__ import annotations

import pytest
from msgspec import structs

from tests.integration.producers.reader import next_message
from weightbus.bus.connection import Bus
from weightbus.bus.jetstream import WrongLastSequence
from weightbus.producers.announcing import Announcer
from weightbus.producers.errors import VersionNotNew
from weightbus.schemas.checkpoint import CheckpointPart, CheckpointReady, CheckpointRetired

pytestmark = pytest.mark.anyio


def drafted(announcer: Announcer, version: int, path: str) -> CheckpointReady:
    return structs.replace(announcer.draft(version, {}), files=(path,))


async def newest(bus: Bus, model: str) -> CheckpointReady:
    last = await bus.last(CheckpointReady, model=model)
    assert last is not None
    return last.message


@pytest.mark.parametrize(("faster", "producer"), [(8, "b"), (7, "b"), (7, "a")])
async def test_announcement_is_refused_when_another_comes_after_the_check(
    bus: Bus, model: str, faster: int, producer: str
) -> None:
    one, other = Announcer(bus, model, "a"), Announcer(bus, model, producer)
    await one.check_new(7)
    said = await other.say(drafted(other, faster, "/other"), {})
    with pytest.raises(VersionNotNew, match=f"is 7: .* {faster}, which {producer} has used"):
        await one.say(drafted(one, 7, "/one"), {})
    assert await newest(bus, model) == said


async def test_announcement_is_refused_when_an_older_one_of_its_name_is_remembered(
    bus: Bus, model: str
) -> None:
    """The server drops a repeat without a word; nobody may take that for success."""
    one, other = Announcer(bus, model, "a"), Announcer(bus, model, "a")
    await one.say(drafted(one, 7, "/one"), {})
    await bus.publish(drafted(other, 3, "/files"))
    with pytest.raises(VersionNotNew, match="is 7: must be greater than 7"):
        await other.say(drafted(other, 7, "/other"), {})


async def test_bus_refuses_a_word_when_another_was_stored_since(bus: Bus, model: str) -> None:
    announcer = Announcer(bus, model, "a")
    assert await bus.last_sequence(CheckpointReady, model=model) == 0
    await bus.publish(drafted(announcer, 1, "/one"), expected_sequence=0)
    with pytest.raises(WrongLastSequence):
        await bus.publish(drafted(announcer, 2, "/two"), expected_sequence=0)
    sequence = await bus.last_sequence(CheckpointReady, model=model)
    await bus.publish(drafted(announcer, 2, "/two"), expected_sequence=sequence)
    assert (await newest(bus, model)).version == 2


async def test_retirement_is_found_when_another_producer_has_retired_something_since(
    bus: Bus, model: str
) -> None:
    for producer, version in (("a", 7), ("b", 2)):
        await bus.publish(CheckpointRetired(model=model, version=version, producer=producer))
    last = await bus.last(CheckpointRetired, model=model, producer="a")
    assert last is not None
    assert last.message.version == 7


async def test_subscription_takes_in_nothing_else_when_tokens_are_given(
    bus: Bus, model: str
) -> None:
    async with bus.subscribe(
        CheckpointReady, CheckpointPart, model=model, producer="a", rank=0
    ) as messages:
        for producer, rank in (("a", 1), ("b", 0), ("a", 0)):
            part = CheckpointPart(
                model=model,
                version=1,
                producer=producer,
                rank=rank,
                world_size=2,
                layout_digest="0" * 64,
                placement=(),
            )
            await bus.publish(part)
        assert (await next_message(messages)).message == part
        ready = drafted(Announcer(bus, model, "b"), 2, "/b")
        await bus.publish(ready)
        assert (await next_message(messages)).message == ready
