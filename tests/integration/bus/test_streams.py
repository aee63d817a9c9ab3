"""The streams and buckets on the server: made once, checked always."""

from __future__ import annotations

import anyio
import msgspec
import pytest

from tests.integration.bus.raw import raw_client
from tests.nats_server import NatsServer
from weightbus.bus.connection import Bus, open_bus
from weightbus.bus.errors import StreamUnsuitable
from weightbus.bus.streams import bus_streams
from weightbus.schemas.checkpoint import CheckpointReady, CheckpointRetired

pytestmark = pytest.mark.anyio


async def stream_configs(url: str) -> dict[str, dict[str, object]]:
    async with raw_client(url) as client:
        answer = await client.request("$JS.API.STREAM.LIST")
    streams = msgspec.json.decode(answer.data)["streams"]
    return {stream["config"]["name"]: stream["config"] for stream in streams}


async def test_streams_are_made_once_when_many_clients_race(nats_server: NatsServer) -> None:
    async def connect() -> None:
        async with open_bus(nats_server.settings) as bus:
            message = CheckpointRetired(model="m", version=1, producer="trainer")
            await bus.publish(message)

    async with anyio.create_task_group() as tasks:
        for _ in range(12):
            tasks.start_soon(connect)
    expected = {stream.name for stream in bus_streams("weightbus")}
    assert set(await stream_configs(nats_server.url)) == expected


async def test_streams_have_limits_and_lie_in_files_when_made(bus: Bus) -> None:
    configs = await stream_configs(bus.url)
    assert {config["storage"] for config in configs.values()} == {"file"}
    assert all(config["duplicate_window"] for config in configs.values())
    assert configs["weightbus-CHECKPOINTS"]["max_msgs_per_subject"] == 16
    progress = configs["weightbus-PROGRESS"]
    assert (progress["max_bytes"], progress["max_age"]) == (256 * 2**20, 7 * 86_400 * 10**9)
    for bucket in ("presence", "rounds", "readers"):
        config = configs[f"KV_weightbus-{bucket}"]
        assert config["allow_msg_ttl"] is True
        assert config["max_msgs_per_subject"] == 1


async def test_only_the_last_few_are_kept_when_a_model_publishes_versions(bus: Bus) -> None:
    for version in range(20):
        await bus.publish(
            CheckpointReady(model="m", version=version, producer="trainer", files=("/a.st",))
        )
    kept = [item.message.version async for item in bus.replay(CheckpointReady)]
    assert kept == list(range(4, 20))


async def test_operators_sizes_are_respected_when_a_stream_is_there(
    nats_server: NatsServer,
) -> None:
    (progress,) = (s for s in bus_streams("weightbus") if s.name == "weightbus-PROGRESS")
    smaller = msgspec.structs.replace(progress, max_bytes=2**20, max_age=10**12)
    async with raw_client(nats_server.url) as client:
        request = msgspec.json.encode(smaller)
        await client.request(f"$JS.API.STREAM.CREATE.{progress.name}", request)
    async with open_bus(nats_server.settings):
        pass
    assert (await stream_configs(nats_server.url))[progress.name]["max_bytes"] == 2**20


async def test_stream_is_refused_when_it_forgets_ids_before_messages_are_sent_again(
    nats_server: NatsServer,
) -> None:
    (progress,) = (s for s in bus_streams("weightbus") if s.name == "weightbus-PROGRESS")
    forgetful = msgspec.structs.replace(progress, duplicate_window=10**9)
    async with raw_client(nats_server.url) as client:
        request = msgspec.json.encode(forgetful)
        await client.request(f"$JS.API.STREAM.CREATE.{progress.name}", request)
    with pytest.raises(StreamUnsuitable, match="duplicate_window"):
        async with open_bus(nats_server.settings):
            pass


async def test_stream_is_refused_by_name_when_it_lacks_what_the_bus_needs(
    nats_server: NatsServer,
) -> None:
    async with raw_client(nats_server.url) as client:
        await client.jetstream().create_key_value(bucket="weightbus-presence")
    with pytest.raises(StreamUnsuitable, match="KV_weightbus-presence has allow_"):
        async with open_bus(nats_server.settings):
            pass


@pytest.mark.parametrize("count", [1, 3])
async def test_stream_that_vanishes_is_made_again_when_somebody_listens(
    count: int, nats_server: NatsServer
) -> None:
    """Then the server says nothing to who publishes, not even that nobody answers."""

    def retired(version: int) -> CheckpointRetired:
        return CheckpointRetired(model="m", version=version, producer="trainer")

    settings = msgspec.structs.replace(nats_server.settings, request_timeout_s=0.5)
    async with open_bus(settings) as bus, bus.subscribe(CheckpointRetired):
        await bus.publish(retired(1))
        async with raw_client(bus.url) as client:
            await client.jetstream().delete_stream("weightbus-CHECKPOINTS")
        async with anyio.create_task_group() as tasks:
            for version in range(2, 2 + count):
                tasks.start_soon(bus.publish, retired(version))
        kept = [item.message.version async for item in bus.replay(CheckpointRetired)]
    assert sorted(kept) == list(range(2, 2 + count))
