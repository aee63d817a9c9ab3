"""`weightbus consume` with an engine of its own: the two live and die together."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import anyio.to_thread
import pytest

from tests.integration.bus.processes import assert_ends
from tests.integration.fleet.fleet import Fleet
from tests.integration.fleet.processes import consume_command
from weightbus.consumers.engines.torch.client import TorchEngineClient, open_torch_client

pytestmark = pytest.mark.anyio

STATE_S = 10.0


@pytest.fixture
def directory() -> Iterator[Path]:
    """Short, because sockets lie in it."""
    with tempfile.TemporaryDirectory(prefix="wb-") as directory:
        yield Path(directory) / "engine"


async def pids_of(client: TorchEngineClient) -> list[int]:
    state = await client.state(STATE_S)
    return [state.front_pid, *state.pids]


async def test_consumer_takes_its_engine_along_and_catches_up_when_it_is_started_again(
    fleet: Fleet, directory: Path
) -> None:
    async with (
        fleet.publisher() as trainer,
        open_torch_client(directory) as client,
        fleet.watched(client),
    ):
        async with consume_command(fleet, "own", directory) as consumer:
            first = (await trainer.publish()).version
            await fleet.completes("own", client, first)
            pids = await pids_of(client)
            await consumer.kill()
            for pid in pids:
                await anyio.to_thread.run_sync(assert_ends, pid)
        second = (await trainer.publish()).version
        async with consume_command(fleet, "own", directory) as consumer:
            await fleet.completes("own", client, second)
            pids = await pids_of(client)
            assert await consumer.stop(signal.SIGINT) == 0
            for pid in pids:
                await anyio.to_thread.run_sync(assert_ends, pid)
    assert await fleet.present("own") is None
    assert os.listdir(directory) == ["engine.log"]
