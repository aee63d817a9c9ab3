"""Ranks of a Megatron grid publish over a real bus: one checkpoint, under the names of engines."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import anyio
import pytest
import torch

from tests.integration.producers.reader import digest_of_model, read_checkpoint
from tests.nats_server import NatsServer
from tests.unit.producers.megatron_trainer import Case, checkpoint, grids, held
from weightbus.bus.connection import Bus, open_bus
from weightbus.producers.megatron import megatron_shards
from weightbus.producers.publisher import Publisher, open_publisher
from weightbus.producers.shards import Part, plan_part
from weightbus.schemas.checkpoint import CheckpointReady

pytestmark = pytest.mark.anyio

CASE = Case(experts=4, tp=2, dp=2, pp=2, ep=2, etp=2)
RANKS = 8


@asynccontextmanager
async def open_ranks(server: NatsServer, model: str) -> AsyncIterator[list[Publisher]]:
    async with AsyncExitStack() as stack:
        buses = [await stack.enter_async_context(open_bus(server.settings)) for _ in range(RANKS)]
        yield [
            await stack.enter_async_context(open_publisher(bus, model, rank=rank, world_size=RANKS))
            for rank, bus in enumerate(buses)
        ]


async def test_versions_of_a_grid_are_whole_when_parts_were_planned_once(
    nats_server: NatsServer, bus: Bus, model: str
) -> None:
    whole = checkpoint(CASE)
    tensors = [held(CASE, whole, grid, stage) for grid, stage in grids(CASE)]
    parts: list[Part] = [
        plan_part(megatron_shards(mine, grid))
        for mine, (grid, _) in zip(tensors, grids(CASE), strict=True)
    ]
    ready: dict[int, CheckpointReady] = {}
    async with open_ranks(nats_server, model) as ranks:

        async def publish(rank: int, version: int) -> None:
            ready[rank] = await ranks[rank].publish(parts[rank], version)

        for version in (1, 2):
            step(tensors, whole)
            async with anyio.create_task_group() as tasks:
                for rank in range(RANKS):
                    tasks.start_soon(publish, rank, version)
            found = await read_checkpoint(bus, ready[0])
            assert found.keys() == whole.keys()
            for name, tensor in whole.items():
                assert torch.equal(found[name], tensor), name
            assert ready[0].weights_digest == digest_of_model(whole[name] for name in found)


def step(tensors: list[dict[str, torch.Tensor]], whole: dict[str, torch.Tensor]) -> None:
    """What a rank holds may alias the checkpoint, or another rank's: each memory once."""
    every = [tensor for mine in tensors for tensor in mine.values()] + list(whole.values())
    memories = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in every}
    for memory in memories.values():
        torch.empty(0).set_(memory).mul_(1.5)
