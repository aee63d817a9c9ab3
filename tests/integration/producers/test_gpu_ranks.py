"""Ranks whose slots lie on GPUs, on the host, or both make one checkpoint. The GPUs are fakes."""

from __future__ import annotations

import ctypes
from contextlib import AsyncExitStack

import anyio
import pytest
import torch

from tests.fake_cuda import FakeCuda
from tests.integration.producers.reader import digest_of_model
from tests.nats_server import NatsServer
from tests.unit.producers.fake_devices import FakeDevices
from weightbus.bus.connection import Bus, open_bus
from weightbus.producers.publisher import PublisherOptions, open_publisher
from weightbus.producers.shards import Shard
from weightbus.producers.writers import SlotsIn
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.placement import CudaSegment
from weightbus.schemas.shared_memory import SHM_HEADER_BYTES

pytestmark = pytest.mark.anyio

ROWS = 6
SLOTS: tuple[SlotsIn, ...] = ("device", "host", "both")


def whole(version: int) -> torch.Tensor:
    return torch.randn(ROWS, 300, generator=torch.Generator().manual_seed(version))


async def test_ranks_make_one_checkpoint_when_their_slots_are_of_several_kinds(
    nats_server: NatsServer, bus: Bus, model: str
) -> None:
    cudas = [FakeCuda()]
    cudas += [cudas[0].other_process() for _ in SLOTS[1:]]
    said: dict[int, CheckpointReady] = {}
    async with AsyncExitStack() as stack:
        ranks = []
        for rank, slots in enumerate(SLOTS):
            own = await stack.enter_async_context(open_bus(nats_server.settings))
            opened = open_publisher(
                own,
                model,
                rank=rank,
                world_size=len(SLOTS),
                options=PublisherOptions(slots=slots, linger_s=0.0),
                devices=FakeDevices(cudas[rank]),
            )
            ranks.append(await stack.enter_async_context(opened))

        async def publish(rank: int, version: int) -> None:
            rows = slice(2 * rank, 2 * rank + 2)
            box = Shard("w", whole(version)[rows], (ROWS, 300), (2 * rank, 0))
            said[rank] = await ranks[rank].publish([box], version)

        for version in range(1, 4):
            async with anyio.create_task_group() as tasks:
                for rank in range(len(SLOTS)):
                    tasks.start_soon(publish, rank, version)
            ready = said[0]
            assert said == dict.fromkeys(range(len(SLOTS)), ready)
            assert ready.weights_digest == digest_of_model([whole(version)])
            kinds = [[way.__struct_config__.tag for way in ways] for ways in ready.placement]
            assert kinds == [["cuda"], ["shared_memory"], ["cuda", "shared_memory"]]
            for rank in (0, 2):
                near = ready.placement[rank][0]
                assert isinstance(near, CudaSegment)
                reader = cudas[0].other_process()
                address = reader.open_handle(0, near.handle)
                data = ctypes.string_at(address + SHM_HEADER_BYTES, 2 * 300 * 4)
                reader.close_handle(0, address)
                assert data == whole(version)[2 * rank : 2 * rank + 2].numpy().tobytes()
    cudas[0].assert_clean()
