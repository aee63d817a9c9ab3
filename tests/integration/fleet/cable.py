"""A cable to the bus that can be cut: forwards TCP connections while it is whole.

Owns a listener and every connection through it while `open_cable` is open.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import anyio
from anyio.abc import SocketAttribute, SocketStream

from weightbus.bus.background import open_background

__all__ = ("Cable", "open_cable")

HOST = "127.0.0.1"
BROKEN = (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError)


class Cable:
    """Whole at first."""

    def __init__(self, bus_url: str, port: int) -> None:
        self.url = f"nats://{HOST}:{port}"
        """For who shall be connected through it."""
        self._bus_port = urlsplit(bus_url).port or 0
        self._whole = True
        self._connections: set[anyio.CancelScope] = set()

    def cut(self) -> None:
        """End every connection, and let no new one through."""
        self._whole = False
        for connection in self._connections:
            connection.cancel()

    def mend(self) -> None:
        self._whole = True

    async def forward(self, near: SocketStream) -> None:
        async with near:
            if not self._whole:
                return
            with anyio.CancelScope() as scope:
                self._connections.add(scope)
                try:
                    async with (
                        await anyio.connect_tcp(HOST, self._bus_port) as far,
                        anyio.create_task_group() as tasks,
                    ):
                        tasks.start_soon(_pump, near, far, scope)
                        tasks.start_soon(_pump, far, near, scope)
                finally:
                    self._connections.discard(scope)


@asynccontextmanager
async def open_cable(bus_url: str) -> AsyncIterator[Cable]:
    listener = await anyio.create_tcp_listener(local_host=HOST)
    cable = Cable(bus_url, listener.extra(SocketAttribute.local_port))
    async with listener, open_background() as tasks:
        tasks.start_soon(listener.serve, cable.forward)
        yield cable


async def _pump(source: SocketStream, sink: SocketStream, both: anyio.CancelScope) -> None:
    """Until either side ends; then both end."""
    try:
        while True:
            await sink.send(await source.receive())
    except BROKEN:
        both.cancel()
