"""A trainer waits until engines serve what it has published: heartbeats on a real bus."""

from __future__ import annotations

import anyio
import pytest
import torch

from weightbus.bus.connection import Bus
from weightbus.producers.errors import NotServed, PublisherClosed
from weightbus.producers.publisher import PublisherOptions, open_publisher
from weightbus.producers.serving import ASK_S
from weightbus.schemas.progress import EngineState, UpdateFailed

pytestmark = pytest.mark.anyio

DEADLINE_S = 30.0
NEVER_S = 3600.0


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


def failed(model: str, engine: str, version: int, cause: str) -> UpdateFailed:
    return UpdateFailed(
        model=model, version=version, round=f"v{version}", engine=engine, cause=cause, reason="no"
    )


async def test_wait_ends_with_the_reason_once_only_those_are_behind_that_refused_the_version(
    bus: Bus, model: str
) -> None:
    async with open_publisher(bus, model) as publisher:
        await bus.presence.put(beat(model, "a", 4))
        await bus.presence.put(beat(model, "b", 4))
        await bus.publish(failed(model, "a", 5, "CheckpointRefused"))
        await bus.publish(failed(model, "b", 5, "TornRead"))  # it will try again
        with pytest.raises(NotServed) as found:
            await publisher.wait_until_served(5, timeout_s=3 * ASK_S)
        assert (found.value.reason, found.value.behind) == ("", {"a": 4, "b": 4})
        await bus.presence.put(beat(model, "b", 5))
        with anyio.fail_after(DEADLINE_S), pytest.raises(NotServed) as found:
            await publisher.wait_until_served(5, timeout_s=NEVER_S)
    assert found.value.behind == {"a": 4}
    assert str(found.value) == (
        f"version 5 of {model} is not served: engine a: CheckpointRefused: no"
    )


async def test_publisher_ends_without_waiting_for_an_engine_that_refused_its_version(
    bus: Bus, model: str, caplog: pytest.LogCaptureFixture
) -> None:
    await bus.presence.put(beat(model, "a", -1))
    await bus.publish(failed(model, "a", 1, "CheckpointRefused"))
    with anyio.fail_after(DEADLINE_S):
        options = PublisherOptions(linger_s=NEVER_S)
        async with open_publisher(bus, model, options=options) as publisher:
            await publisher.publish({"w": torch.zeros(4)}, 1)
    assert "engine a: CheckpointRefused: no" in caplog.text


async def test_refusal_of_another_version_is_no_matter(bus: Bus, model: str) -> None:
    async with open_publisher(bus, model) as publisher:
        await bus.presence.put(beat(model, "a", 4))
        await bus.publish(failed(model, "a", 4, "CheckpointRefused"))
        with pytest.raises(NotServed) as found:
            await publisher.wait_until_served(5, timeout_s=0.2)
    assert found.value.reason == ""
