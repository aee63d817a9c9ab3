"""The end of a command that runs until it is told to stop: SIGINT or SIGTERM, at any time."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import anyio.abc

__all__ = ("Stop", "open_stop", "until_stopped")


class Stop:
    """What a signal does; made by `open_stop`."""

    def __init__(self) -> None:
        self._scope = anyio.CancelScope()
        self._waited_for: anyio.Event | None = None

    @property
    def came(self) -> bool:
        """The block was cancelled by a signal."""
        return self._scope.cancel_called

    async def wait(self) -> None:
        """Returns at the first signal, so that contexts are left in order; a second one cancels."""
        self._waited_for = anyio.Event()
        await self._waited_for.wait()
        self._waited_for = None

    async def _listen(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            task_status.started()
            async for _ in signals:
                if self._waited_for is None:
                    self._scope.cancel()
                else:
                    self._waited_for.set()


@asynccontextmanager
async def open_stop() -> AsyncIterator[Stop]:
    """Signals cancel the block, unless it waits for one; while it ends, they are absorbed.

    Cancelled by a signal, the context is left without an error: look at `Stop.came`.
    """
    stop = Stop()
    async with anyio.create_task_group() as tasks:
        await tasks.start(stop._listen)
        with stop._scope:
            yield stop
        tasks.cancel_scope.cancel()


async def until_stopped() -> None:
    """Waits for SIGINT or SIGTERM; returns, so that contexts are left in order."""
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            return
