"""`weightbus consume` with an engine of its own: the two live and die together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from tests.integration.bus.processes import assert_ends
from tests.integration.fleet.engines import Engines
from tests.integration.fleet.fleet import Fleet, open_fleet
from tests.integration.fleet.processes import consume_command
from tests.nats_server import NatsServer
from weightbus.consumers.engines.torch.client import TorchEngineClient, open_torch_client

pytestmark = pytest.mark.anyio

STATE_S = 60.0
ENDS_WITHIN_S = 30.0
"""Of which `ConsumerConfig.stop_s` is 10 s and leave 2 s; the rest is a slow machine's."""


@pytest.fixture
def directory() -> Iterator[Path]:
    """Short, because sockets lie in it."""
    with tempfile.TemporaryDirectory(prefix="wb-") as directory:
        yield Path(directory) / "engine"


@pytest.fixture
async def own_fleet(
    nats_server: NatsServer, engines: Engines, tmp_path: Path
) -> AsyncIterator[Fleet]:
    """A fleet whose bus may be killed."""
    async with open_fleet(nats_server, engines, tmp_path) as fleet:
        yield fleet


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


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_consumer_that_is_interrupted_ends_soon_when_its_bus_is_gone_or_stands_still(
    own_fleet: Fleet, directory: Path, number: signal.Signals
) -> None:
    fleet = own_fleet
    async with (
        fleet.publisher() as trainer,
        open_torch_client(directory) as client,
        fleet.watched(client),
        consume_command(fleet, "own", directory) as consumer,
    ):
        await fleet.completes("own", client, (await trainer.publish()).version)
        pids = await pids_of(client)
        os.kill(fleet.server.pid, number)
        try:
            began = anyio.current_time()
            assert await consumer.stop(signal.SIGINT) == 0
            took_s = anyio.current_time() - began
        finally:  # the trainer has its own words for a bus that is gone
            if number == signal.SIGSTOP:
                os.kill(fleet.server.pid, signal.SIGCONT)
            else:
                await anyio.to_thread.run_sync(fleet.server.restart)
        assert took_s < ENDS_WITHIN_S
        for pid in pids:
            await anyio.to_thread.run_sync(assert_ends, pid)


def test_bus_of_its_own_is_told_of_and_one_mistake_is_said_once() -> None:
    command = ["weightbus", "consume", "--model", "m", "--engine-id", "e", "--tp", "3"]
    environment = {name: os.environ[name] for name in os.environ if name != "WEIGHTBUS_NATS_URL"}
    done = subprocess.run(
        [sys.executable, "-m", *command, "--architecture", "decoder"],
        env=environment | {"PYTHONUNBUFFERED": "1"},  # as in most containers
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "no --nats and no WEIGHTBUS_NATS_URL: this bus is private to this process" in done.stdout
    assert "others join it by nats://" in done.stdout
    assert done.stderr.count("must be a multiple of 3 ranks") == 1, done.stderr
