"""A trainer waits until engines serve what it has published: heartbeats on a real bus."""

from __future__ import annotations

import anyio
import pytest

from weightbus.bus.connection import Bus
from weightbus.producers.errors import NotServed, PublisherClosed
from weightbus.producers.publisher import open_publisher
from weightbus.schemas.progress import EngineState

pytestmark = pytest.mark.anyio


def beat(model: str, engine: str, version: int) -> EngineState:
    return EngineState(
        model=model,
        engine=engine,
        consumer="c",
        host_id="h",
        status="serving",
        version=version,
    )


async def test_wait_ends_once_every_present_engine_serves_the_version(bus: Bus, model: str) -> None:
    served: list[tuple[EngineState, ...]] = []

    async with open_publisher(bus, model) as publisher, anyio.create_task_group() as tasks:

        async def wait() -> None:
            served.append(await publisher.wait_until_served(5, engines=2, timeout_s=30))

        await bus.presence.put(beat(model, "a", 5))
        tasks.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        await bus.presence.put(beat(model, "b", 4))
        with pytest.raises(NotServed) as found:
            await publisher.wait_until_served(5, timeout_s=0.2)
        assert found.value.behind == {"b": 4}
        assert served == []
        await bus.presence.put(beat(model, "b", 6))
    assert {state.engine: state.version for state in served[0]} == {"a": 5, "b": 6}


async def test_wait_names_who_is_missing_when_too_few_engines_are_there(
    bus: Bus, model: str
) -> None:
    async with open_publisher(bus, model) as publisher:
        await bus.presence.put(beat(model, "a", -1))
        with pytest.raises(NotServed) as found:
            await publisher.wait_until_served(0, engines=3, timeout_s=0.2)
        assert str(found.value) == (
            f"version 0 of {model} is not served after 0.2 s: 1 of 3 engines are present, "
            "a serves version -1"
        )
        await bus.presence.drop(model, "a")
    with pytest.raises(PublisherClosed):
        await publisher.wait_until_served(0, timeout_s=0.2)
