"""When the first answer was made with what is served now. Does no I/O."""

from __future__ import annotations

import time

import anyio

__all__ = ("FirstAnswer",)


class FirstAnswer:
    """Of one resumption; made anew with the next."""

    def __init__(self) -> None:
        self._at_ns = 0
        self._settled = anyio.Event()

    def made(self) -> None:
        """An answer has been made; all but the first change nothing."""
        if not self._settled.is_set():
            self._at_ns = time.time_ns()
            self._settled.set()

    def end(self) -> None:
        """There will be none any more, if there was none."""
        self._settled.set()

    async def wait(self) -> int:
        """Nanoseconds since the Unix epoch, by this host's clock; 0: it ended without one."""
        await self._settled.wait()
        return self._at_ns
