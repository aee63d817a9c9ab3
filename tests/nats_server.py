"""A real nats-server for tests, which can be killed and started again on its port with its data."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import msgspec
from anyio.from_thread import BlockingPortal, start_blocking_portal

from weightbus.bus.server import EmbeddedServer, open_server
from weightbus.bus.settings import BusSettings

__all__ = ("NatsServer", "running_server")


class NatsServer:
    """Runs in an event loop of its own, so that tests with and without one can use it."""

    settings: BusSettings
    """With these, `open_bus` connects to it."""
    pid: int

    def __init__(self, portal: BlockingPortal, settings: BusSettings) -> None:
        self._portal = portal
        self._own = settings
        self._running: AbstractContextManager[EmbeddedServer] | None = None
        self.pid = 0
        self.start()

    @property
    def data_dir(self) -> Path:
        """Where its streams lie."""
        assert self._own.data_dir is not None
        return self._own.data_dir

    @property
    def url(self) -> str:
        return str(self.settings.url)

    def start(self) -> None:
        """Start it; after the first time on the same port."""
        self._running = self._portal.wrap_async_context_manager(open_server(self._own))
        server = self._running.__enter__()
        self.pid = server.pid
        port = int(server.url.rpartition(":")[2])
        self._own = msgspec.structs.replace(self._own, port=port)
        self.settings = BusSettings(url=server.url)

    def stop(self) -> None:
        """Stop it in order."""
        if self._running is not None:
            running, self._running = self._running, None
            running.__exit__(None, None, None)

    def kill(self) -> None:
        """SIGKILL; returns once it is gone."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.stop()

    def restart(self) -> None:
        """SIGKILL, then start it again with its data."""
        self.kill()
        self.start()


@contextmanager
def running_server(data_dir: Path, host: str = "127.0.0.1") -> Iterator[NatsServer]:
    """A server that is stopped at the end, whatever the test did to it."""
    with start_blocking_portal() as portal:
        server = NatsServer(portal, BusSettings(data_dir=data_dir, host=host))
        try:
            yield server
        finally:
            server.stop()
