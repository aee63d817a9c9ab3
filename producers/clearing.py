"""What a publisher does for those that died before it: removes their blocks, and says what is gone.

Called once, before the publisher is open.
"""

from __future__ import annotations

from collections.abc import Collection

import anyio.to_thread

from weightbus.bus.blocks import SHM_DIRECTORY, SHM_PREFIX
from weightbus.bus.connection import Bus
from weightbus.bus.host import host_id
from weightbus.bus.sweep import sweep_blocks
from weightbus.schemas.checkpoint import CheckpointReady, CheckpointRetired
from weightbus.schemas.placement import CudaSegment, SharedMemorySegment

__all__ = ("clean_up_after_the_dead",)


async def clean_up_after_the_dead(bus: Bus, model: str) -> None:
    """Remove their blocks; if the last version of this model lay there, say that it is gone.

    Raises:
        BusUnavailable, BusTimeout, RequestRefused
    """
    removed = await anyio.to_thread.run_sync(sweep_blocks, model)
    last = await bus.last(CheckpointReady, model=model)
    if last is None or not await anyio.to_thread.run_sync(_was_in, last.message, removed):
        return
    await bus.publish(
        CheckpointRetired(
            model=model,
            version=last.message.version,
            producer=last.message.producer,
            reason="its publisher died",
        )
    )


def _was_in(ready: CheckpointReady, removed: Collection[str]) -> bool:
    """Whether a version lay in blocks that are gone, or on GPUs whose sign of life they were.

    A segment on a GPU does not name its sign. While any publisher of its name has a block here, it
    may be that one's: what was swept can be of another that died before.
    """
    here = host_id()
    prefix = f"{SHM_PREFIX}{ready.model}.{ready.producer}."
    owner_died = any(name.startswith(prefix) for name in removed) and not any(
        SHM_DIRECTORY.glob(f"{prefix}*")
    )
    return any(
        (isinstance(way, SharedMemorySegment) and way.name in removed)
        or (isinstance(way, CudaSegment) and way.host_id == here and owner_died)
        for ways in ready.placement
        for way in ways
    )
