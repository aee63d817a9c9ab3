"""Wakes one task that waits for several things. Does no I/O.

A ring is remembered until the task waits, and only the last one: it says that there is something to
look at, and not what.
"""

from __future__ import annotations

import anyio

__all__ = ("Bell",)


class Bell:
    """For one waiting task; whoever has news rings."""

    def __init__(self) -> None:
        self._rung = anyio.Event()

    def ring(self) -> None:
        self._rung.set()

    async def wait(self, timeout_s: float) -> None:
        """Returns at the next ring, or the one since the last wait, or after `timeout_s`."""
        with anyio.move_on_after(timeout_s):
            await self._rung.wait()
        if self._rung.is_set():
            self._rung = anyio.Event()
