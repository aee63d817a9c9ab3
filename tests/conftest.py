"""Fixtures that tests of every folder share: a real nats-server and a bus on it."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.nats_server import NatsServer, running_server
from weightbus.bus.connection import Bus, open_bus

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that runs this in the background ignores SIGINT, and so would every process of a test.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def anyio_backend() -> str:
    """nats-py runs on asyncio."""
    return "asyncio"


@pytest.fixture
def nats_server(tmp_path: Path) -> Iterator[NatsServer]:
    """A nats-server of this test's own, on a free port, with its data below `tmp_path`."""
    with running_server(tmp_path / "nats") as server:
        yield server


@pytest.fixture
async def bus(nats_server: NatsServer) -> AsyncIterator[Bus]:
    """A bus on `nats_server`; the test must be marked `anyio`."""
    async with open_bus(nats_server.settings) as bus:
        yield bus
