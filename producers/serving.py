"""Waiting until engines serve a version: for trainers that generate with what they publish.

Looks at engines' heartbeats, which name the version that they serve.
"""

from __future__ import annotations

from typing import Final

import anyio

from weightbus.bus.connection import Bus
from weightbus.producers.errors import NotServed
from weightbus.schemas.progress import EngineState

__all__ = ("wait_until_served",)

POLL_S: Final = 0.05


async def wait_until_served(
    bus: Bus, model: str, version: int, *, engines: int, timeout_s: float
) -> tuple[EngineState, ...]:
    """Return once at least `engines` are present, and all that are serve `version` or a newer one.

    Raises:
        NotServed: after `timeout_s` it is not so.
        BusUnavailable, BusTimeout, RequestRefused
    """
    present: tuple[EngineState, ...] = ()
    with anyio.move_on_after(timeout_s):
        while True:
            present = await bus.presence.list(model)
            if len(present) >= engines and all(state.version >= version for state in present):
                return present
            await anyio.sleep(POLL_S)
    behind = {state.engine: state.version for state in present if state.version < version}
    raise NotServed(model, version, behind, len(present), engines, timeout_s)
