"""Tests against real vLLM, on CPUs: `make test-vllm` runs them in an environment that has it.

Elsewhere they are skipped, with the reason; their modules import vLLM inside tests only. At most
two engines live at once: the one under test, and a fresh one that it is compared with.
"""

from __future__ import annotations

import importlib.util
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.engine_paths import short_path
from tests.nats_server import NatsServer
from tests.vllm.oracle import Oracle
from tests.vllm.trainer import World, open_world

__all__ = ("short_path",)

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Also called for tests of other folders, which are left alone."""
    if importlib.util.find_spec("vllm") is None:
        for item in items:
            if item.path.is_relative_to(HERE):
                item.add_marker(pytest.mark.skip(reason="vLLM is not installed: make test-vllm"))


@pytest.fixture(scope="session")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Oracle]:
    """What fresh engines say."""
    with ExitStack() as stack:
        yield Oracle(tmp_path_factory.mktemp("oracle"), stack)


@pytest.fixture
async def world(nats_server: NatsServer, tmp_path: Path) -> AsyncIterator[World]:
    """A model of this test's own; the test must be marked `anyio`."""
    async with open_world(nats_server, tmp_path) as world:
        yield world
