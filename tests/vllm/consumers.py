"""Consumers beside a vLLM server: in the test's own event loop, or by the command that users run.

Owns each while its context is open.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio

from tests.integration.fleet.held import HeldEngine
from tests.vllm.processes import ROOT
from tests.vllm.server import Server
from tests.vllm.trainer import ENGINE, World
from weightbus.consumers.engines.vllm.engine import VllmSettings, open_vllm_engine
from weightbus.consumers.service import open_consumer
from weightbus.consumers.transfer.compose import open_routes
from weightbus.tracing.telemetry import Telemetry

__all__ = ("consume_command", "follow")

OPEN_S = 120.0
"""How long the workers of an engine that is ready may take to answer for the first time."""
END_S = 30.0


@asynccontextmanager
async def follow(
    world: World, server: Server, directory: Path, settings: VllmSettings | None = None
) -> AsyncIterator[HeldEngine]:
    """A consumer in this event loop; `directory` is where the workers meet it."""
    config = world.config
    async with (
        open_vllm_engine(
            directory,
            url=server.url,
            settings=settings,
            roots=config.file_roots,
            host_id=config.host_id,
            start_timeout_s=OPEN_S,
        ) as engine,
        open_routes(config, world.bus) as routes,
    ):
        held = HeldEngine(engine)
        async with open_consumer(
            config, bus=world.bus, engine=held, routes=routes, telemetry=Telemetry()
        ):
            yield held


@asynccontextmanager
async def consume_command(world: World, server: Server, directory: Path) -> AsyncIterator[None]:
    """`weightbus consume --engine vllm`; entered once it follows."""
    command = [sys.executable, "-m", "weightbus", "consume", "--engine", "vllm"]
    command += ["--url", server.url, "--engine-dir", str(directory), "--engine-id", ENGINE]
    command += ["--model", world.model, "--nats", world.server.url, "--root", str(world.directory)]
    log = world.directory / "consume.log"
    with log.open("wb") as output:
        process = await anyio.open_process(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
    try:
        with anyio.fail_after(OPEN_S):
            while f"follows {world.model}" not in log.read_text():
                assert process.returncode is None, log.read_text()
                await anyio.sleep(0.1)
        yield
    finally:
        with anyio.CancelScope(shield=True), anyio.move_on_after(END_S) as ending:
            if process.returncode is None:
                process.terminate()
            await process.wait()
        if ending.cancelled_caught:
            process.kill()
        print(log.read_text())
