"""Prints every update, its first token, and why one failed."""

from __future__ import annotations

import os
import sys

import anyio

from weightbus.bus.connection import open_bus
from weightbus.bus.monitor import EngineGone, Missed, Received, open_monitor
from weightbus.bus.settings import BusSettings
from weightbus.schemas import EngineState, FirstToken, UpdateComplete, UpdateFailed, WeightBusError


async def main() -> None:
    settings = BusSettings.from_env(os.environ)
    if settings.url is None:
        sys.exit("set WEIGHTBUS_NATS_URL to what `weightbus serve` printed")
    async with (
        open_bus(settings) as bus,
        open_monitor(bus, UpdateComplete, FirstToken, UpdateFailed) as monitor,
    ):
        async for event in monitor:
            match event:
                case Received(UpdateComplete() as update):
                    seconds = (update.end_ns - update.start_ns) / 1e9
                    print(f"{update.engine} serves {update.version} after {seconds:.3f} s")
                case Received(FirstToken() as token):
                    seconds = (token.end_ns - token.start_ns) / 1e9
                    print(f"{token.engine} made a token with {token.version} {seconds:.3f} s later")
                case Received(UpdateFailed() as update):
                    print(f"{update.engine} failed at {update.version}: {update.reason}")
                case EngineState():
                    print(f"{event.engine} is {event.status}, version {event.version}")
                case EngineGone():
                    print(f"{event.engine} is gone")
                case Missed():
                    print(f"some of {event.stream} was dropped before we read it")


if __name__ == "__main__":
    try:
        anyio.run(main)
    except (KeyboardInterrupt, WeightBusError) as end:
        sys.exit(str(end) or "interrupted")
