"""Another consumer of the same engine: whoever starts second gives way, unless the first is dead.

Asks the bus's presence, and decides before anything is said or done to the engine. Invariant:
clocks are never compared; a consumer lives if it beats while it is looked at. Two that start at
once, before either has beaten, do not see each other.
"""

from __future__ import annotations

from typing import Final

import anyio

from weightbus.bus.presence import Presence
from weightbus.consumers.errors import EngineTaken

__all__ = ("wait_for_rival",)

LOOK_S: Final = 0.1
SLACK_S: Final = 1.0
"""The server may take so long to end a key that has expired."""


async def wait_for_rival(presence: Presence, model: str, engine: str, leave_s: float) -> None:
    """Returns once no other consumer keeps the engine; at once if none is present.

    One that was killed is present until its heartbeat runs out, `presence.ttl_s` at most. One that
    is stopping is given `leave_s`.

    Raises:
        EngineTaken: it beats.
        BusUnavailable, BusTimeout, RequestRefused
    """
    first = found = await presence.get(model, engine)
    start = anyio.current_time()
    while found is not None:
        beats = first is not None and found.updated_ns != first.updated_ns
        stopping = found.status == "stopping"
        waited_s = anyio.current_time() - start
        if beats and (not stopping or waited_s > leave_s):
            raise EngineTaken(model, engine, found.consumer, found.host_id)
        if waited_s > max(presence.ttl_s, leave_s if stopping else 0) + SLACK_S:
            return  # it neither beats nor expires
        await anyio.sleep(LOOK_S)
        found = await presence.get(model, engine)
