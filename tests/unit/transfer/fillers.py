"""A worker that fills a device lane, by its words alone: a task that a test may hold."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import anyio

from tests.unit.transfer.steps import Steps
from tests.unit.transfer.words import Words
from weightbus.schemas.shared_memory import (
    SHM_ADMITTED_OFFSET,
    SHM_FETCHED_OFFSET,
    SHM_FILLED_OFFSET,
    SHM_STAGED_OFFSET,
)

__all__ = ("WordFiller",)


class WordFiller:
    """Fills one lane, bucket after bucket, and is its only reader, too.

    Args:
        place, size: of its group; the lane's number is 0.
    """

    def __init__(
        self,
        words: Words,
        steps: Steps,
        *,
        turn: int,
        buckets: int,
        slots: int,
        place: int = 0,
        size: int = 1,
        reader: int = 0,
    ) -> None:
        self.words, self.steps = words, steps
        self.reads = True
        """Whether it reads what is filled."""
        self._turn, self._buckets, self._slots = turn, buckets, slots
        self._place, self._size, self._reader = place, size, reader
        self._read = 0

    async def run(self) -> None:
        """Until all is filled and read, or the owner gives up."""
        self._say(SHM_FETCHED_OFFSET, 0)
        self.words.say_done(self._reader, self._turn, 0)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._fetch)
            tasks.start_soon(self._fill)

    async def _fetch(self) -> None:
        for bucket in range(self._buckets):
            if not await self._until(partial(self._has_room, bucket)):
                return
            if bucket % self._size == self._place:
                if not await self._until(partial(self._says, SHM_STAGED_OFFSET, bucket)):
                    return
                await self.steps.take(f"copy {bucket}")
            self._say(SHM_FETCHED_OFFSET, bucket + 1)

    async def _fill(self) -> None:
        awaited = SHM_FETCHED_OFFSET if self._size == 1 else SHM_ADMITTED_OFFSET
        for bucket in range(self._buckets):
            if not await self._until(partial(self._says, awaited, bucket)):
                return
            await self.steps.take(f"fill {bucket}")
            self._say(SHM_FILLED_OFFSET, bucket + 1)
            if self.reads:
                self._read = bucket + 1
                self.words.say_done(self._reader, self._turn, self._read)

    def _has_room(self, bucket: int) -> bool:
        return self._read > bucket - self._slots

    def _says(self, offset_bytes: int, bucket: int) -> bool:
        """Whether a word has passed a bucket."""
        return self.words.count(offset_bytes, self._turn) > bucket

    async def _until(self, condition: Callable[[], bool]) -> bool:
        """Whether it came true before the owner gave up."""
        while not condition():
            if self.words.given_up == self._turn:
                return False
            await anyio.sleep(1e-4)
        return True

    def _say(self, offset_bytes: int, count: int) -> None:
        self.words.set_word(offset_bytes, self._turn << 32 | count)
