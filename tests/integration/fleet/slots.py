"""A publisher's slot that is written to by somebody, as only its publisher may: blocking."""

from __future__ import annotations

import struct
from pathlib import Path

from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.placement import SharedMemorySegment
from weightbus.schemas.shared_memory import (
    SHM_GENERATION_OFFSET,
    SHM_HEADER_BYTES,
    unpack_shm_header,
)

__all__ = ("block_of", "flip_bit", "overwrite")

SHM = Path("/dev/shm")
GARBAGE = b"\xa5"


def block_of(ready: CheckpointReady) -> Path:
    """The one block that a version lies in."""
    ((segment,),) = ready.placement
    assert isinstance(segment, SharedMemorySegment)
    return SHM / segment.name


def overwrite(ready: CheckpointReady) -> None:
    """Begin to write the next version into a version's slot, and do not end."""
    with block_of(ready).open("r+b", buffering=0) as block:
        size_bytes, generation = unpack_shm_header(block.read(SHM_HEADER_BYTES))
        block.seek(SHM_GENERATION_OFFSET)
        block.write(struct.pack("<Q", generation | 1))
        block.seek(SHM_HEADER_BYTES)
        block.write(GARBAGE * size_bytes)


def flip_bit(ready: CheckpointReady, offset_bytes: int) -> None:
    """Damage one byte of a version's segment, unnoticed by its generation word."""
    with block_of(ready).open("r+b", buffering=0) as block:
        block.seek(SHM_HEADER_BYTES + offset_bytes)
        (byte,) = block.read(1)
        block.seek(SHM_HEADER_BYTES + offset_bytes)
        block.write(bytes([byte ^ 1]))
