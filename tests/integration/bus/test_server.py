"""The embedded nats-server: found, started, locked, stopped, and never left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anyio
import msgspec
import pytest

from tests.integration.bus.processes import assert_ends, is_running
from tests.nats_server import NatsServer
from weightbus.bus.connection import open_bus
from weightbus.bus.errors import (
    BusUnavailable,
    DataDirectoryBusy,
    ServerFailed,
    ServerTooOld,
    SettingInvalid,
)
from weightbus.bus.server import open_server
from weightbus.bus.settings import BusSettings
from weightbus.schemas.checkpoint import CheckpointRetired

pytestmark = pytest.mark.anyio

OWNER = """
import sys
from pathlib import Path
import anyio
from weightbus.bus.server import open_server
from weightbus.bus.settings import BusSettings

async def main():
    async with open_server(BusSettings(data_dir=Path(sys.argv[1]))) as server:
        print(server.pid, flush=True)
        await anyio.sleep_forever()

anyio.run(main)
"""


@contextmanager
def server_of_another_process(data_dir: Path) -> Iterator[tuple[int, int]]:
    """(process id of the owner, process id of the server)"""
    command = [sys.executable, "-c", OWNER, str(data_dir)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, process_group=0
    ) as owner:
        assert owner.stdout is not None
        yield owner.pid, int(owner.stdout.readline())
        owner.kill()


def server_pid(data_dir: Path) -> int:
    """From the name of the server's ports file."""
    (ports,) = data_dir.glob("*.ports")
    return int(ports.stem.rpartition("_")[2])


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


async def test_server_listens_on_loopback_and_ends_when_the_context_closes() -> None:
    async with open_server(BusSettings()) as server:
        assert server.url.startswith("nats://127.0.0.1:")
        assert is_running(server.pid)
        assert server.data_dir.is_dir()
    assert not is_running(server.pid)
    assert not server.data_dir.exists()


async def test_two_servers_run_side_by_side_when_no_port_is_named() -> None:
    async with open_server(BusSettings()) as one, open_server(BusSettings()) as other:
        assert one.url != other.url


async def test_server_is_refused_when_another_owns_the_data_directory(tmp_path: Path) -> None:
    settings = BusSettings(data_dir=tmp_path)
    async with open_server(settings):
        with pytest.raises(DataDirectoryBusy, match=f"process {os.getpid()}"):
            async with open_server(settings):
                pass
    async with open_server(settings):
        pass


async def test_data_is_there_when_the_server_is_started_again(tmp_path: Path) -> None:
    message = CheckpointRetired(model="m", version=1, producer="trainer")
    settings = BusSettings(data_dir=tmp_path)
    async with open_bus(settings) as bus:
        await bus.publish(message)
    async with open_bus(settings) as bus:
        last = await bus.last(CheckpointRetired, model="m")
    assert last is not None
    assert last.message == message


@pytest.mark.faults
async def test_no_server_is_left_when_its_owner_is_killed(tmp_path: Path) -> None:
    with server_of_another_process(tmp_path) as (owner, server):
        assert is_running(server)
        os.kill(owner, signal.SIGKILL)
        async with open_server(BusSettings(data_dir=tmp_path)):  # waits for the lock
            assert not is_running(server)
    assert_ends(server)


async def test_owner_stops_the_server_in_order_when_its_terminal_interrupts_it(
    tmp_path: Path,
) -> None:
    with server_of_another_process(tmp_path) as (owner, server):
        os.killpg(owner, signal.SIGINT)
        assert_ends(owner)
    assert_ends(server)
    log = (tmp_path / "nats-server.log").read_text()
    assert "interrupt" not in log
    assert "Server Exiting" in log


async def test_error_names_the_reason_when_the_port_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServerFailed, match="address already in use"):
            async with open_server(BusSettings(port=port)):
                pass


async def test_server_is_refused_when_it_is_too_old(tmp_path: Path) -> None:
    old = script(tmp_path / "nats-server", "echo 'nats-server: v2.10.29'")
    with pytest.raises(ServerTooOld, match=r"version 2\.10\.29: 2\.11 or later"):
        async with open_server(BusSettings(server_path=old)):
            pass


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("echo something else", "is no nats-server"),
        ("exit 1", "is no nats-server"),
        ("echo 'nats-server: v2.12.0'; test $1 = --version || exit 9", "status 9"),
    ],
)
async def test_server_is_refused_when_it_is_none(tmp_path: Path, text: str, reason: str) -> None:
    program = script(tmp_path / "nats-server", text)
    with pytest.raises(ServerFailed, match=reason):
        async with open_server(BusSettings(server_path=program)):
            pass


async def test_server_is_given_up_when_it_does_not_become_ready(tmp_path: Path) -> None:
    text = "test $1 = --version && echo 'nats-server: v2.12.0' || exec sleep 600"
    program = script(tmp_path / "nats-server", text)
    with pytest.raises(ServerFailed, match=r"was not ready within 0\.3 s"):
        async with open_server(BusSettings(server_path=program, server_start_timeout_s=0.3)):
            pass


async def test_data_directory_is_refused_when_it_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SettingInvalid, match="data_dir"):
        async with open_server(BusSettings(data_dir=tmp_path / "file")):
            pass


async def test_wait_raises_when_the_server_is_killed() -> None:
    async with open_server(BusSettings()) as server:
        os.kill(server.pid, signal.SIGKILL)
        with anyio.fail_after(5), pytest.raises(ServerFailed, match="status 137"):
            await server.wait()


async def test_bus_fails_at_once_when_its_own_server_is_killed(tmp_path: Path) -> None:
    async with (
        open_bus(BusSettings(data_dir=tmp_path)) as bus,
        bus.subscribe(CheckpointRetired) as messages,
    ):
        os.kill(server_pid(tmp_path), signal.SIGKILL)
        with anyio.fail_after(5), pytest.raises(BusUnavailable, match="status 137"):
            await anext(messages)


async def test_bus_is_unavailable_when_nothing_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"nats://user:secret@127.0.0.1:{taken.getsockname()[1]}"
    settings = BusSettings(url=url, connect_timeout_s=0.5)
    with pytest.raises(BusUnavailable, match="refused") as raised:
        async with open_bus(settings):
            pass
    assert "secret" not in str(raised.value)


async def test_bus_connects_when_the_server_comes_up_a_little_later(
    nats_server: NatsServer,
) -> None:
    await anyio.to_thread.run_sync(nats_server.kill)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.to_thread.run_sync, nats_server.start)
        async with open_bus(msgspec.structs.replace(nats_server.settings, connect_timeout_s=10)):
            pass
