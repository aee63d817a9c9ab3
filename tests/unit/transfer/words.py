"""The words of a staging block, from outside, without mapping it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weightbus.schemas.shared_memory import (
    SHM_FILLED_OFFSET,
    SHM_GIVEN_UP_OFFSET,
    SHM_READERS_OFFSET,
    TURN_BITS,
)

__all__ = ("Words", "open_words")


class Words:
    def __init__(self, fd: int) -> None:
        self._fd = fd

    def word(self, offset_bytes: int) -> int:
        return int.from_bytes(os.pread(self._fd, 8, offset_bytes), "little")

    def set_word(self, offset_bytes: int, value: int) -> None:
        os.pwrite(self._fd, value.to_bytes(8, "little"), offset_bytes)

    def filled(self, turn: int) -> int:
        """How many buckets are filled in a turn."""
        return self.count(SHM_FILLED_OFFSET, turn)

    def count(self, offset_bytes: int, turn: int) -> int:
        """What a word counts in a turn."""
        word = self.word(offset_bytes)
        return word & 0xFFFFFFFF if word >> TURN_BITS == turn else 0

    @property
    def given_up(self) -> int:
        """The turn that was given up; 0: none."""
        return self.word(SHM_GIVEN_UP_OFFSET)

    def say_done(self, reader: int, turn: int, buckets: int) -> None:
        self.set_word(SHM_READERS_OFFSET + 8 * reader, turn << TURN_BITS | buckets)


@contextmanager
def open_words(name: str) -> Iterator[Words]:
    """Of a block below /dev/shm."""
    fd = os.open(Path("/dev/shm") / name, os.O_RDWR | os.O_CLOEXEC)
    try:
        yield Words(fd)
    finally:
        os.close(fd)
