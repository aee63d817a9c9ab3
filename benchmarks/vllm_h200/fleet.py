"""The fleet of `benchmarks.h200`, with a vLLM server for an engine.

Owns, beside what `Fleet` owns, a connection to every server that runs.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

import anyio
import msgspec

from benchmarks.h200.fleet import CHECK_S, Engines, Fleet
from benchmarks.h200.memory import Memory
from benchmarks.h200.news import News
from benchmarks.h200.processes import BenchFailed, Processes
from benchmarks.h200.setup import EngineSetup, Setup
from benchmarks.vllm_h200.load import SETTLE_S, Window
from benchmarks.vllm_h200.server import Server, open_server
from benchmarks.vllm_h200.setup import ADDRESS, server_environment, server_options, write_folder
from weightbus.bus.connection import Bus

__all__ = ("PROMPTS", "VllmFleet")

SERVE_S: Final = 900.0
FIRST_ANSWER_S: Final = 120.0
POLL_S: Final = 0.25
PROMPTS: Final = ((3, 5, 9, 200), (10, 5, 9, 201), (17, 5, 9, 202), (24, 5, 9, 203))
ANSWER_TOKENS: Final = 16


class VllmFleet(Fleet):
    """See `Fleet`; engines serve while they are checked, and answer requests."""

    def __init__(
        self, setup: Setup, bus: Bus, processes: Processes, news: News, memory: Memory | None
    ) -> None:
        super().__init__(setup, bus, processes, news, memory)
        self._servers: dict[str, tuple[Server, AsyncExitStack]] = {}
        """By the name of the engine."""
        self.graphs = False
        """Whether servers that are started from now on decode by CUDA graphs."""

    def runs(self, engine: EngineSetup) -> bool:
        """Whether its server was not ended."""
        return engine.name in self._servers

    def server(self, engine: EngineSetup) -> Server:
        return self._servers[engine.name][0]

    async def end_engines(self) -> None:
        await super().end_engines()
        await self._disconnect()

    async def close(self) -> None:
        await super().close()
        await self._disconnect()

    async def clear(self, engines: Engines) -> None:
        """No parameter holds anything afterwards."""
        for engine in engines.setups:
            await self.server(engine).call("bench_clear", deadline_s=CHECK_S)

    @asynccontextmanager
    async def paused(self, engines: Engines, windows: list[Window]) -> AsyncIterator[None]:
        """Requests wait meanwhile, as in our updates; from when to when is added to `windows`."""
        (engine,) = engines.setups
        server = self.server(engine)
        begin_ns = time.time_ns()
        await server.pause()
        try:
            yield
        finally:
            with anyio.CancelScope(shield=True):
                await server.resume()
        windows.append(Window(begin_ns, time.time_ns()))

    async def answers(self, engines: Engines) -> tuple[tuple[int, ...], ...] | None:
        """What the engine answers to some prompts; None: something else when it is asked again."""
        (engine,) = engines.setups
        server, said = self.server(engine), []
        for _ in range(2):
            found = [await server.complete(prompt, ANSWER_TOKENS) for prompt in PROMPTS]
            said.append(tuple(map(tuple, found)))
        return said[0] if said[0] == said[1] else None

    async def _start_engine(self, engine: EngineSetup) -> None:
        folder = self.processes.directory / f"model-{engine.name}"
        write_folder(folder, self.setup.config)
        port, cpu = _free_port(), self.setup.cpu
        await self.processes.start_guarded(
            engine.name,
            "vllm.entrypoints.openai.api_server",
            *server_options(folder, port, engine.tp, cpu=cpu, graphs=self.graphs),
            environment=server_environment(
                engine.tp, cpu=cpu, path=os.environ.get("PYTHONPATH", "")
            ),
        )
        stack = AsyncExitStack()
        server = await stack.enter_async_context(open_server(f"http://{ADDRESS}:{port}"))
        self._servers[engine.name] = server, stack

    async def _serves(self, engine: EngineSetup) -> None:
        """Whatever vLLM loads with its first request is there, too."""
        server = self.server(engine)
        with anyio.move_on_after(SERVE_S) as limit:
            while not await server.is_healthy():
                self.processes.check()
                await anyio.sleep(POLL_S)
        if limit.cancelled_caught:
            raise BenchFailed(f"{engine.name} did not start within {SERVE_S:g} s")
        await server.call("bench_warm", deadline_s=CHECK_S)
        for prompt in PROMPTS:
            await server.complete(prompt, ANSWER_TOKENS, FIRST_ANSWER_S)

    def _server_of(self, engine: EngineSetup) -> str:
        return self.server(engine).url

    async def _holding(self, engine: EngineSetup) -> tuple[int | None, Sequence[str]]:
        """Requests run on for a moment first: it is looked what the update has cost them."""
        await anyio.sleep(SETTLE_S)
        config = msgspec.json.encode(self.setup.config).decode()
        found = await self.server(engine).call("bench_check", config, deadline_s=CHECK_S)
        if len(found) != engine.tp:
            raise BenchFailed(f"{engine.name} has {len(found)} workers, not {engine.tp}")
        return None, [held for (held,) in found]

    async def _disconnect(self) -> None:
        while self._servers:
            _, (_, stack) = self._servers.popitem()
            await stack.aclose()


def _free_port() -> int:
    with socket.create_server((ADDRESS, 0)) as listening:
        port: int = listening.getsockname()[1]
    return port
