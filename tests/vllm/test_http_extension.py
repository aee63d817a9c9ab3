"""A model and its drafter behind vLLM's HTTP server, which knows of Weight bus by nothing but the
class of its workers' extension: every update is right."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.vllm.checkpoints import SPECULATIVE
from tests.vllm.consumers import follow
from tests.vllm.engines import OverHttp, check_versions
from tests.vllm.oracle import Oracle
from tests.vllm.probe_extension import PROBE_EXTENSION
from tests.vllm.server import Server, running_server
from tests.vllm.trainer import World

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def server(oracle: Oracle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "vllm.log"
    speculative = msgspec.json.encode(SPECULATIVE["mimo"]).decode()
    options = ("--worker-extension-cls", PROBE_EXTENSION, "--speculative-config", speculative)
    with running_server(oracle.folder("mimo", 0), log, *options) as server:
        yield server


async def test_versions_of_target_and_drafter_are_as_in_fresh_engines(
    server: Server, world: World, oracle: Oracle, short_path: Path
) -> None:
    async with follow(world, server, short_path / "engine"):
        engine = OverHttp(server)
        await check_versions(engine, world, oracle, "mimo", 1, range(1, 3), from_files=(2,))
        assert await server.version() == "2"
