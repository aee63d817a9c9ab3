"""The tests of this folder run where there is a GPU, and are skipped elsewhere, with the reason.

Their modules can be imported anywhere: what only a GPU machine has, such as Triton, they import
inside a test or fixture. A test that needs several GPUs asks for them by the fixture `gpus`; one
that measures what is free of a GPU asks for `whole_gpu`.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from tests.engine_paths import short_path
from tests.gpu.machine import why_not
from tests.integration.fleet.engines import Engines, running_engines
from tests.integration.fleet.fleet import Fleet, open_fleet
from tests.nats_server import NatsServer, running_server

__all__ = ("short_path",)

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Also called for tests of other folders, which are left alone."""
    reason = why_not()
    if reason:
        for item in items:
            if item.path.is_relative_to(HERE):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def gpus() -> Callable[[int], None]:
    """Skips the test unless there are so many."""

    def need(count: int) -> None:
        reason = why_not(count)
        if reason:
            pytest.skip(reason)

    return need


@pytest.fixture
def whole_gpu() -> None:
    """Skips the test where others run beside it: what they take of the GPU it would count too."""
    if int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1:
        pytest.skip("measures what is free of a GPU: run it with no other test beside it, by -n 0")


@pytest.fixture(scope="session")
def gpu_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """A nats-server for tests that keep to a model of their own."""
    with running_server(tmp_path_factory.mktemp("nats")) as server:
        yield server


@pytest.fixture(scope="session")
def gpu_engines() -> Iterator[Engines]:
    """Engines on GPUs that outlive a test; each is started when it is first needed."""
    with running_engines(device="cuda") as engines:
        yield engines


@pytest.fixture
async def gpu_fleet(
    gpu_server: NatsServer, gpu_engines: Engines, tmp_path: Path
) -> AsyncIterator[Fleet]:
    """A model of this test's own, and engines on GPUs; the test must be marked `anyio`."""
    async with open_fleet(gpu_server, gpu_engines, tmp_path) as fleet:
        yield fleet
