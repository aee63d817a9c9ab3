"""What one test works with: a bus, a model of its own on it, its trainer, and what is said.

Owns a bus connection, a publisher and the log of the model while `open_world` is open.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from tests.integration.fleet.log import Log, open_log
from tests.nats_server import NatsServer
from weightbus.bus.connection import Bus, open_bus
from weightbus.bus.host import host_id
from weightbus.consumers.config import ConsumerConfig
from weightbus.producers.publisher import Publisher, PublisherOptions, open_publisher
from weightbus.schemas.base import Message
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.progress import UpdateComplete, UpdateFailed
from weightbus.schemas.rounds import Budgets

__all__ = ("ENGINE", "WAIT_S", "World", "open_world")

ENGINE: Final = "engine"
"""Id of the one engine that follows the model."""
WAIT_S: Final = 150.0
"""How long a test waits for what is said on the bus; longer than any budget of a round."""
SLOT_WAIT_S: Final = 60.0
ENGINE_LOST_S: Final = 900.0
"""So long a consumer bears with an engine that is being started anew."""


@dataclass(frozen=True)
class World:
    bus: Bus
    server: NatsServer
    model: str
    publisher: Publisher
    log: Log
    directory: Path
    """Below it engines may read files."""

    @property
    def config(self) -> ConsumerConfig:
        return ConsumerConfig(
            model=self.model,
            engine=ENGINE,
            host_id=host_id(),
            file_roots=(str(self.directory),),
            routes=("local",),
            engine_lost_s=ENGINE_LOST_S,
            command_s=60.0,
            budgets=Budgets(prepare_s=120.0, transfer_s=120.0, commit_s=60.0, round_s=300.0),
        )

    async def publish(self, tensors: Mapping[str, torch.Tensor], version: int) -> CheckpointReady:
        return await self.publisher.publish(tensors, version)

    async def completes(self, version: int) -> UpdateComplete:
        """Wait until the engine serves a version, proven."""
        ended = await self.log.wait_until(f"end of version {version}", lambda: self._ended(version))
        assert isinstance(ended, UpdateComplete), ended
        ready = self.log.said(CheckpointReady, version=version)[-1]
        assert ready.weights_digest is not None
        assert (ended.verified, ended.weights_digest) == ("verified", ready.weights_digest)
        return ended

    async def fails(self, version: int) -> UpdateFailed:
        """Wait until it is said that the engine did not reach a version."""
        ended = await self.log.wait_until(f"end of version {version}", lambda: self._ended(version))
        assert isinstance(ended, UpdateFailed), ended
        return ended

    def _ended(self, version: int) -> Message | None:
        done = self.log.said(UpdateComplete, version=version)
        failed = self.log.said(UpdateFailed, version=version)
        return next(iter((*done, *failed)), None)


@asynccontextmanager
async def open_world(server: NatsServer, directory: Path) -> AsyncIterator[World]:
    model = f"m{uuid.uuid4().hex[:12]}"
    options = PublisherOptions(slot_wait_s=SLOT_WAIT_S, linger_s=0.0)
    async with (
        open_bus(server.settings) as bus,
        open_log(bus, model, WAIT_S) as log,
        open_publisher(bus, model, options=options) as publisher,
    ):
        yield World(bus, server, model, publisher, log, directory)
