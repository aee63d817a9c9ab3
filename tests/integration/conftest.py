"""Fixtures of integration tests that share slow things: a nats-server and running engines."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.integration.fleet.engines import Engines, running_engines
from tests.integration.fleet.fleet import Fleet, open_fleet
from tests.nats_server import NatsServer, running_server


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """A nats-server for tests that keep to a model of their own; do not kill it."""
    with running_server(tmp_path_factory.mktemp("nats")) as server:
        yield server


@pytest.fixture(scope="session")
def engines() -> Iterator[Engines]:
    """Engines that outlive a test; each is started when it is first needed."""
    with running_engines() as engines:
        yield engines


@pytest.fixture
async def fleet(
    shared_server: NatsServer, engines: Engines, tmp_path: Path
) -> AsyncIterator[Fleet]:
    """A model of this test's own; the test must be marked `anyio`."""
    async with open_fleet(shared_server, engines, tmp_path) as fleet:
        yield fleet
