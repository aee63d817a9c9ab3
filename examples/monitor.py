"""A monitor in 20 lines: prints every update of every engine, and why one failed."""

from __future__ import annotations

import os
import sys

import anyio

from weightbus.bus.connection import open_bus
from weightbus.bus.received import Received
from weightbus.bus.settings import BusSettings
from weightbus.schemas import UpdateComplete, UpdateFailed


async def main() -> None:
    settings = BusSettings.from_env(os.environ)
    if settings.url is None:
        sys.exit("set WEIGHTBUS_NATS_URL to what `weightbus serve` printed")
    async with (
        open_bus(settings) as bus,
        bus.subscribe(UpdateComplete, UpdateFailed) as messages,
    ):
        async for received in messages:
            match received:
                case Received(UpdateComplete() as update):
                    seconds = (update.end_ns - update.start_ns) / 1e9
                    print(f"{update.engine} serves {update.version} after {seconds:.3f} s")
                case Received(UpdateFailed() as update):
                    print(f"{update.engine} failed at {update.version}: {update.reason}")
                case _:
                    print("the connection was lost and is back")


if __name__ == "__main__":
    anyio.run(main)
