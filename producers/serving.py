"""Waiting until engines serve a version: for trainers that generate with what they publish.

Looks at engines' heartbeats, which name the version that they serve; and, of those that are behind,
at the last word on their updates: who has refused the version is waited for by nobody.
"""

from __future__ import annotations

from typing import Final

import anyio

from weightbus.bus.connection import Bus
from weightbus.producers.errors import NotServed
from weightbus.schemas.progress import PERMANENT_CAUSES, EngineState, UpdateFailed

__all__ = ("wait_until_served",)

POLL_S: Final = 0.05
ASK_S: Final = 0.5
"""How often those that are behind are asked after."""


async def wait_until_served(
    bus: Bus, model: str, version: int, *, engines: int, timeout_s: float
) -> tuple[EngineState, ...]:
    """Return once at least `engines` are present, and all that are serve `version` or a newer one.

    Raises:
        NotServed: after `timeout_s` it is not so; or before that, once all but those do that have
            refused the version: its `reason` is what they said.
        BusUnavailable, BusTimeout, RequestRefused
    """
    present: tuple[EngineState, ...] = ()
    ask_at = anyio.current_time()
    with anyio.move_on_after(timeout_s):
        while True:
            present = await bus.presence.list(model)
            behind = _behind(present, version)
            if len(present) >= engines and not behind:
                return present
            if behind and anyio.current_time() >= ask_at:
                refused = {
                    name: why
                    for name in behind
                    if (why := await _refusal(bus, model, version, name))
                }
                if len(refused) == len(behind) and len(present) >= engines:
                    reason = "; ".join(f"engine {name}: {why}" for name, why in refused.items())
                    raise NotServed(model, version, behind, len(present), engines, 0.0, reason)
                ask_at = anyio.current_time() + ASK_S
            await anyio.sleep(POLL_S)
    raise NotServed(model, version, _behind(present, version), len(present), engines, timeout_s)


def _behind(present: tuple[EngineState, ...], version: int) -> dict[str, int]:
    """Engine -> what it serves."""
    return {state.engine: state.version for state in present if state.version < version}


async def _refusal(bus: Bus, model: str, version: int, engine: str) -> str:
    """Why an engine does not try `version` again; empty: it may."""
    last = await bus.last(UpdateFailed, model=model, engine=engine)
    if last is None or last.message.version != version:
        return ""
    failed = last.message
    return f"{failed.cause}: {failed.reason}" if failed.cause in PERMANENT_CAUSES else ""
