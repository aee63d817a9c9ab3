"""A mixture of experts behind vLLM's HTTP server, with two workers: every update is right, and a
worker that is killed is noticed, told, and made good."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from tests.vllm.checkpoints import tensors_of
from tests.vllm.consumers import follow
from tests.vllm.engines import OverHttp, check_versions, is_fresh_at
from tests.vllm.oracle import Oracle
from tests.vllm.processes import END_S
from tests.vllm.server import BACKEND, Server, running_server
from tests.vllm.trainer import WAIT_S, World
from weightbus.schemas.progress import UpdateComplete

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(1800)]

RANKS = 2


@pytest.fixture(scope="module")
def server(oracle: Oracle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "vllm.log"
    folder = oracle.folder("qwen3_moe", 0)
    with running_server(folder, log, *BACKEND, ranks=RANKS) as server:
        yield server


async def test_ten_versions_are_as_in_fresh_engines(
    server: Server, world: World, oracle: Oracle, short_path: Path
) -> None:
    async with follow(world, server, short_path / "engine"):
        engine = OverHttp(server)
        await check_versions(engine, world, oracle, "qwen3_moe", RANKS, range(1, 11))
        assert await server.version() == "10"


async def test_update_fails_in_time_when_a_worker_is_killed_and_a_new_server_gets_the_version(
    server: Server, world: World, oracle: Oracle, short_path: Path, tmp_path: Path
) -> None:
    """The last one of this file: it kills the server."""
    async with follow(world, server, short_path / "engine") as engine:
        await world.publish(tensors_of("qwen3_moe", 21), 21)
        await world.completes(21)
        workers = [*itertools.chain(*await server.call("probe_pid"))]
        assert len(set(workers)) == RANKS
        held = engine.hold("before_apply")
        await world.publish(tensors_of("qwen3_moe", 22), 22)
        with anyio.fail_after(WAIT_S):
            await held.reached.wait()
        os.kill(workers[-1], signal.SIGKILL)
        held.release()
        failed = await world.fails(22)
        assert failed.cause in ("WorkerLost", "EngineUnavailable"), failed
        with anyio.fail_after(END_S):
            await server.ails()

        def restart() -> Server:
            folder, log = oracle.folder("qwen3_moe", 0), tmp_path / "again.log"
            again = running_server(folder, log, *BACKEND, ranks=RANKS, port=server.port)
            return stack.enter_context(again)

        with ExitStack() as stack:
            again = await anyio.to_thread.run_sync(restart)
            await world.log.wait(UpdateComplete, version=22)
            await is_fresh_at(OverHttp(again), oracle, "qwen3_moe", 22, RANKS)
