"""What one test works with: a model of its own on a bus, engines that follow it, and a publisher.

Owns a bus connection and the log of the model. Consumers run in the test's own event loop, beside
engines in processes of their own; `processes.py` has consumers in processes.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import torch
from msgspec import structs

from tests.integration.fleet.elsewhere import ADDRESS
from tests.integration.fleet.engines import EngineProcess, Engines
from tests.integration.fleet.held import HeldEngine, Hold, Moment
from tests.integration.fleet.log import DEADLINE_S, Log, open_log
from tests.integration.fleet.probe import Probe
from tests.integration.fleet.staging import staging_blocks
from tests.integration.fleet.weights import fingerprints_of, weights_of
from tests.nats_server import NatsServer
from weightbus.bus.background import open_background
from weightbus.bus.clock import HostClock
from weightbus.bus.connection import Bus, open_bus
from weightbus.bus.endpoint import P2pOptions
from weightbus.bus.host import host_id
from weightbus.bus.settings import BusSettings
from weightbus.bus.sweep import sweep_staging
from weightbus.consumers.config import ConsumerConfig
from weightbus.consumers.engines.torch.client import TorchEngineClient, open_torch_client
from weightbus.consumers.engines.torch.engine import open_torch_engine
from weightbus.consumers.engines.torch.messages import StateReport
from weightbus.consumers.service import open_consumer
from weightbus.consumers.transfer.compose import open_routes
from weightbus.producers.publisher import Publisher, PublisherOptions, open_publisher
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.progress import EngineState, UpdateComplete, UpdateFailed
from weightbus.tracing.telemetry import Telemetry

__all__ = ("PRESENCE_TTL_S", "Fleet", "Follower", "open_fleet")

PRESENCE_TTL_S = 3
"""So soon a killed consumer is missed, and one that lives, should it not beat for so long."""

HEARTBEAT_S = 0.5

COMMAND_S = 60.0
POLL_S = 0.02
SHM = Path("/dev/shm")


@dataclass(frozen=True, kw_only=True)
class Follower:
    """An engine that a consumer keeps on the newest version."""

    name: str
    fleet: Fleet
    engine: HeldEngine
    first_hold: Hold | None
    client: TorchEngineClient
    """As the engine's users have it."""
    process: EngineProcess

    @property
    def held(self) -> Hold:
        """The hold that it was started with."""
        assert self.first_hold is not None
        return self.first_hold

    async def completes(self, version: int) -> UpdateComplete:
        """Wait until the engine serves a version, proven, and see that it does."""
        return await self.fleet.completes(self.name, self.client, version)

    async def fails(self, version: int, cause: str) -> UpdateFailed:
        """Wait until it is said that the engine did not reach a version, and why."""
        return await self.fleet.fails(self.name, version, cause)

    async def state(self) -> StateReport:
        return await self.client.state(COMMAND_S)

    async def serves(self, version: int) -> None:
        """The engine serves a version, whole, now."""
        await self.fleet.serves(self.client, version)


class Fleet:
    """Made by `open_fleet`."""

    def __init__(
        self, server: NatsServer, engines: Engines, directory: Path, bus: Bus, log: Log, model: str
    ) -> None:
        self.server = server
        self.engines = engines
        self.directory = directory
        """Below it engines may read files."""
        self.bus = bus
        self.log = log
        self.model = model
        self.p2p = P2pOptions(address=ADDRESS)
        """Of a trainer that engines on other hosts can read from."""
        self.used: set[str] = set()

    @property
    def settings(self) -> BusSettings:
        """How any part of the test connects to its bus."""
        return self.bus.settings

    def config(self, name: str, **changes: Any) -> ConsumerConfig:
        """A consumer's settings: the shortest times that a slow machine can keep, and a leader who
        waits for everyone that is present."""
        config = ConsumerConfig(
            model=self.model,
            engine=name,
            host_id=host_id(),
            file_roots=(str(self.directory),),
            routes=("local",),
            join_window_s=DEADLINE_S,
            heartbeat_s=HEARTBEAT_S,
            round_ttl_s=PRESENCE_TTL_S,
        )
        return structs.replace(config, **changes)

    @asynccontextmanager
    async def follow(
        self,
        name: str,
        *,
        ranks: int = 1,
        first_gpu: int = 0,
        hold: Moment | None = None,
        settings: BusSettings | None = None,
        telemetry: Telemetry | None = None,
        skew_ns: int = 0,
        **changes: Any,
    ) -> AsyncIterator[Follower]:
        """A consumer beside the engine `name`, held where it first comes to `hold`; no mix may be
        seen while it runs. `skew_ns`: by how much its host's wall clock is ahead."""
        process = await self.engine(name, ranks, first_gpu)
        config = self.config(name, **changes)
        async with (
            open_torch_client(process.directory) as client,
            self.watched(client),
            open_bus(settings or self.settings, host_clock=skewed_host(skew_ns)) as bus,
            open_torch_engine(
                process.directory, roots=config.file_roots, host_id=config.host_id
            ) as torch_engine,
            open_routes(config, bus) as routes,
        ):
            engine = HeldEngine(torch_engine, skew_ns)
            held = None if hold is None else engine.hold(hold)
            async with open_consumer(
                config,
                bus=bus,
                engine=engine,
                routes=routes,
                telemetry=telemetry or Telemetry(),
            ):
                yield Follower(
                    name=name,
                    fleet=self,
                    engine=engine,
                    first_hold=held,
                    client=client,
                    process=process,
                )

    async def engine(self, name: str, ranks: int = 1, first_gpu: int = 0) -> EngineProcess:
        """An engine without a consumer."""
        self.used.add(name)
        return await anyio.to_thread.run_sync(self.engines.get, name, ranks, first_gpu)

    @asynccontextmanager
    async def watched(self, client: TorchEngineClient) -> AsyncIterator[Probe]:
        """See that an engine never serves a mix, from here to the end."""
        probe = Probe(client, self.model)
        async with open_background() as tasks:
            tasks.start_soon(probe.run, self.engines.next_version())
            yield probe
        probe.check()

    @asynccontextmanager
    async def publisher(
        self, *, telemetry: Telemetry | None = None, skew_ns: int = 0, **options: Any
    ) -> AsyncIterator[Trainer]:
        """A trainer with one rank, in this process, which does not linger. `skew_ns`: as in
        `follow`."""
        chosen = PublisherOptions(**{"slot_wait_s": DEADLINE_S, "linger_s": 0.0, **options})
        async with (
            open_bus(self.settings, host_clock=skewed_host(skew_ns)) as bus,
            open_publisher(bus, self.model, options=chosen, telemetry=telemetry) as publisher,
        ):
            yield Trainer(self, publisher)

    def next_version(self) -> int:
        return self.engines.next_version()

    async def say(self, ready: CheckpointReady) -> CheckpointReady:
        """Say it as some trainer would, without being one."""
        await self.bus.publish(ready)
        return ready

    async def completes(self, name: str, client: TorchEngineClient, version: int) -> UpdateComplete:
        """Wait until an engine serves a version, and see that it holds that and nothing else."""
        done = await self.log.wait(UpdateComplete, engine=name, version=version)
        ready = self.log.said(CheckpointReady, version=version)[-1]
        assert ready.weights_digest is not None
        assert (done.verified, done.weights_digest) == ("verified", ready.weights_digest)
        await self.serves(client, version)
        return done

    async def serves(self, client: TorchEngineClient, version: int) -> None:
        """See that an engine serves a version, and holds that and nothing else."""
        held = await client.fingerprint(DEADLINE_S)
        assert held.version == version
        published = fingerprints_of(self.model, version, len(held.fingerprints))
        assert held.fingerprints == published, "it holds something else than was published"

    async def fails(self, name: str, version: int, cause: str) -> UpdateFailed:
        failed = await self.log.wait(UpdateFailed, engine=name, version=version)
        assert failed.cause == cause, failed
        return failed

    async def present(self, name: str) -> EngineState | None:
        """What an engine's heartbeat says."""
        found = await self.bus.presence.list(self.model)
        return next((state for state in found if state.engine == name), None)

    async def is_empty(self) -> bool:
        return await self.bus.presence.list(self.model) == ()

    async def eventually(self, what: str, look: Callable[[], Awaitable[bool]]) -> None:
        """Look until it is so: for what nobody says on the bus."""
        with anyio.move_on_after(DEADLINE_S):
            while True:
                if await look():
                    return
                await anyio.sleep(POLL_S)
        raise AssertionError(f"{what}: not within {DEADLINE_S:g} s; {self.log}")

    def blocks(self) -> list[str]:
        """Names of the model's blocks in /dev/shm."""
        return [path.name for path in SHM.glob(f"weightbus-{self.model}.*")]


def skewed_host(skew_ns: int) -> HostClock:
    """A host whose wall clock is ahead."""
    return HostClock(wall_ns=lambda: time.time_ns() + skew_ns)


class Trainer:
    """Publishes the weights that `weights_of` gives."""

    def __init__(self, fleet: Fleet, publisher: Publisher) -> None:
        self._fleet, self.publisher = fleet, publisher

    async def publish(self, **extra: torch.Tensor) -> CheckpointReady:
        """The next version; `extra`: tensors that no engine needs."""
        version = self._fleet.next_version()
        tensors = weights_of(self._fleet.model, version) | extra
        return await self.publisher.publish(tensors, version)


@asynccontextmanager
async def open_fleet(server: NatsServer, engines: Engines, directory: Path) -> AsyncIterator[Fleet]:
    """A fleet; at the end nothing of its model may be left in /dev/shm, on the bus or paused."""
    model = f"m{uuid.uuid4().hex[:12]}"
    settings = structs.replace(server.settings, presence_ttl_s=PRESENCE_TTL_S)
    async with open_bus(settings) as bus, open_log(bus, model) as log:
        fleet = Fleet(server, engines, directory, bus, log, model)
        try:
            yield fleet
        finally:
            await engines.inspect(fleet.used)
            left = fleet.blocks()
            for block in left:
                (SHM / block).unlink()
            await anyio.to_thread.run_sync(sweep_staging, model)  # of consumers that were killed
            staged = [block.name for block in staging_blocks(model)]
        assert left == []
        assert staged == [], "staging blocks whose owners live"
        # The heartbeat of a consumer that was killed runs out by itself.
        await fleet.eventually("no engine is present", fleet.is_empty)
