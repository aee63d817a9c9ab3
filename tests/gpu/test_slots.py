"""Engines on GPUs follow a trainer whose slots lie on a GPU, through the real bus."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.integration.fleet.fleet import Fleet
from tests.integration.fleet.weights import weights_of
from weightbus.producers.writers import SlotsIn
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.placement import CudaSegment, SharedMemorySegment
from weightbus.schemas.progress import UpdateFailed

KINDS: dict[SlotsIn, list[type]] = {
    "host": [SharedMemorySegment],
    "device": [CudaSegment],
    "both": [CudaSegment, SharedMemorySegment],
    "auto": [CudaSegment],
}


@pytest.mark.anyio
@pytest.mark.parametrize("slots", KINDS)
@pytest.mark.parametrize("ranks", [1, 2])
async def test_engine_holds_each_version_bit_for_bit_when_tensors_lie_on_a_gpu(
    gpu_fleet: Fleet, gpus: Callable[[int], None], slots: SlotsIn, ranks: int
) -> None:
    """Five versions: each slot is written and read again, over handles that were kept open."""
    gpus(ranks)
    async with (
        gpu_fleet.follow(f"g{ranks}", ranks=ranks) as g,
        gpu_fleet.publisher(slots=slots) as trainer,
    ):
        for _ in range(5):
            version = gpu_fleet.next_version()
            held = weights_of(gpu_fleet.model, version)
            tensors = {name: tensor.cuda() for name, tensor in held.items()}
            ready: CheckpointReady = await trainer.publisher.publish(tensors, version)
            assert [[type(way) for way in ways] for ways in ready.placement] == [KINDS[slots]]
            await g.completes(version)
    assert gpu_fleet.log.said(UpdateFailed) == []


@pytest.mark.anyio
async def test_engine_goes_on_when_the_trainer_ends_and_another_one_begins(
    gpu_fleet: Fleet,
) -> None:
    """The second trainer's slots may lie where the first one's lay."""
    async with gpu_fleet.follow("g1") as g:
        for _ in range(3):
            async with gpu_fleet.publisher(slots="device") as trainer:
                for _ in range(2):
                    version = gpu_fleet.next_version()
                    held = weights_of(gpu_fleet.model, version)
                    tensors = {name: tensor.cuda() for name, tensor in held.items()}
                    await trainer.publisher.publish(tensors, version)
                    await g.completes(version)
    assert gpu_fleet.log.said(UpdateFailed) == []
