"""What is said on the bus of any model, kept by version, for the benchmark to wait for.

Owns a subscription while `open_news` is open. Invariant: waiting costs the engines nothing.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final

import anyio
import anyio.abc

from benchmarks.h200.processes import BenchFailed
from benchmarks.h200.timing import Heard, is_whole
from weightbus.bus.background import open_background
from weightbus.bus.connection import Bus
from weightbus.bus.received import Received
from weightbus.schemas.progress import StageComplete, UpdateComplete, UpdateFailed

__all__ = ("News", "open_news")

POLL_S: Final = 0.5
"""How often it is looked whether somebody has died."""

Said = StageComplete | UpdateComplete | UpdateFailed


class News:
    """What was said so far."""

    def __init__(self, check: Callable[[], None]) -> None:
        self._check = check
        self._said: dict[tuple[str, int, str], list[Said]] = {}
        self._grown = anyio.Event()

    async def hear(self, model: str, version: int, engine: str, ranks: int) -> Heard:
        """What the consumer of an engine said once the version is served and reported whole.

        Raises:
            BenchFailed: it failed, or a process has ended.
        """
        while True:
            grown, said = self._grown, self._said.get((model, version, engine), [])
            stages = tuple(one for one in said if isinstance(one, StageComplete) and one.ok)
            for one in said:
                if isinstance(one, UpdateFailed):
                    raise BenchFailed(f"{engine}: {one.cause}: {one.reason}")
                if isinstance(one, UpdateComplete) and is_whole(stages, ranks):
                    return Heard(complete=one, stages=stages)
            with anyio.move_on_after(POLL_S):
                await grown.wait()
            self._check()

    def completed(self, engine: str) -> list[UpdateComplete]:
        """Every update of an engine so far, of whatever model."""
        return [
            one
            for (_, _, name), said in self._said.items()
            for one in said
            if name == engine and isinstance(one, UpdateComplete)
        ]

    async def run(self, bus: Bus, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        kinds: Sequence[type[Said]] = (StageComplete, UpdateComplete, UpdateFailed)
        async with bus.subscribe(*kinds) as heard:
            task_status.started()
            async for received in heard:
                if isinstance(received, Received):
                    message = received.message
                    key = message.model, message.version, message.engine
                    self._said.setdefault(key, []).append(message)
                    grown, self._grown = self._grown, anyio.Event()
                    grown.set()


@asynccontextmanager
async def open_news(bus: Bus, check: Callable[[], None]) -> AsyncIterator[News]:
    """Entered once everything that is said will be heard.

    Args:
        check: raises if a process has ended.
    """
    news = News(check)
    async with open_background() as tasks:
        await tasks.start(news.run, bus)
        yield news
