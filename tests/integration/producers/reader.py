"""A reader by hand: maps blocks by what the event says, and knows nothing of producers."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from weightbus.bus.connection import Bus
from weightbus.bus.digest import combine, digest_hex, digest_tensor
from weightbus.bus.host import host_id
from weightbus.bus.received import Received
from weightbus.bus.subscription import Subscription
from weightbus.schemas.base import Message
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.layout import Layout
from weightbus.schemas.placement import SharedMemorySegment
from weightbus.schemas.shared_memory import SHM_HEADER_BYTES, unpack_shm_header

__all__ = ("MappedBlock", "blocks_of", "digest_of_model", "next_message", "read_checkpoint")

M = TypeVar("M", bound=Message)

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "I64": torch.int64, "U8": torch.uint8}


class MappedBlock:
    """One block, mapped for reading."""

    def __init__(self, segment: SharedMemorySegment) -> None:
        assert segment.host_id == host_id()
        self.promised = segment.generation
        with (Path("/dev/shm") / segment.name).open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)

    @property
    def generation(self) -> int:
        return unpack_shm_header(self._map[:32])[1]

    @property
    def is_whole(self) -> bool:
        """Whether the data is the version that was promised."""
        return self.generation == self.promised

    @property
    def data(self) -> bytes:
        return self._map[SHM_HEADER_BYTES:]


def blocks_of(ready: CheckpointReady) -> list[MappedBlock]:
    ways = [way for ways in ready.placement for way in ways]
    return [MappedBlock(way) for way in ways if isinstance(way, SharedMemorySegment)]


async def next_message(messages: Subscription[M]) -> Received[M]:
    heard = await anext(messages)
    assert isinstance(heard, Received)
    return heard


async def read_checkpoint(bus: Bus, ready: CheckpointReady) -> dict[str, torch.Tensor]:
    """Every tensor; fails if a block is not whole before and after."""
    assert ready.layout_digest is not None
    layout, _ = await bus.layouts.get(ready.layout_digest)
    blocks = blocks_of(ready)
    assert len(blocks) == len(layout.segments)
    assert all(block.is_whole for block in blocks)
    tensors = _put_together(layout, [block.data for block in blocks])
    assert all(block.is_whole for block in blocks)
    return tensors


def _put_together(layout: Layout, segments: list[bytes]) -> dict[str, torch.Tensor]:
    tensors = {
        spec.name: torch.empty(spec.shape, dtype=DTYPES[spec.dtype]) for spec in layout.tensors
    }
    for shard in layout.shards:
        assert len(segments[shard.segment]) == layout.segments[shard.segment].size_bytes
        spec = layout.tensors[shard.tensor]
        box = torch.frombuffer(
            bytearray(segments[shard.segment]),
            dtype=DTYPES[spec.dtype],
            count=int(np.prod(shard.sizes, dtype=int)),
            offset=shard.offset_bytes,
        )
        ends = map(int.__add__, shard.starts, shard.sizes)
        tensors[spec.name][tuple(map(slice, shard.starts, ends))] = box.reshape(shard.sizes)
    return tensors


def digest_of_model(tensors: Iterable[torch.Tensor]) -> str:
    """The weights digest, from whole tensors in layout order."""
    raw = [t.detach().contiguous().flatten().view(torch.uint8).numpy() for t in tensors]
    return digest_hex(combine(np.array([digest_tensor(data) for data in raw], dtype=np.uint64)))
