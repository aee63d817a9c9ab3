"""A monitor in a process of its own, for tests that stop it. Its arguments: the URL and the model.

Prints `watching`, then the version of every `UpdateComplete`, one per line, until it is killed.
"""

from __future__ import annotations

import sys

import anyio

from weightbus.bus.connection import open_bus
from weightbus.bus.monitor import Missed, open_monitor
from weightbus.bus.received import Received
from weightbus.bus.settings import BusSettings
from weightbus.schemas.progress import UpdateComplete

__all__ = ("WATCHING",)

WATCHING = "watching"


async def main(url: str, model: str) -> None:
    async with open_bus(BusSettings(url=url)) as bus, open_monitor(bus, model=model) as monitor:
        print(WATCHING, flush=True)
        async for event in monitor:
            match event:
                case Received(UpdateComplete() as update):
                    print(update.version, flush=True)
                case Missed():
                    print(event, flush=True)


if __name__ == "__main__":
    anyio.run(main, sys.argv[1], sys.argv[2])
