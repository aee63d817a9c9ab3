"""Words that the front process and one rank's worker share, readable at any time.

A rank that is applying an update answers nothing until it is done; what it holds must be known all
the same. So each side writes 8-byte words of an anonymous file and reads the other's:

    the rank's words  how many updates have begun to write, and whether one is under way;
                      which version it holds
    the front's word  whether the rank is held: no request runs on it, its weights may change

Each word has one writer. A rank writes `touched` before it looks whether it is held, and the front
lets go before it looks at `touched`: whichever order they meet in, one of them sees the other. A
version changes only while `touched` stands, and every update has a number of its own: who finds the
first word the same before and after has read the version that belongs to it.
"""

from __future__ import annotations

import os
import struct
from typing import NamedTuple

__all__ = ("NOTHING_HELD", "Held", "RankWords")

_WORD = struct.Struct("<q")
_UPDATES_OFFSET = 0
_FRONT_OFFSET = 8
_VERSION_OFFSET = 16
_HELD, _FREE = 1, 0


class Held(NamedTuple):
    """What one rank holds."""

    version: int
    """Written last, whole; -1: none of the bus."""
    touched: bool
    """An update is under way, or did not end whole."""
    updates: int
    """How many have begun to write since the rank's process started."""


NOTHING_HELD = Held(-1, False, 0)


class RankWords:
    """The words of one rank, as either side sees them."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    @staticmethod
    def create(rank: int) -> RankWords:
        """The front's side: of a rank that holds nothing and is held."""
        words = RankWords(os.memfd_create(f"weightbus-rank-{rank}"))
        words.report(NOTHING_HELD)
        words.hold()
        return words

    def report(self, held: Held) -> None:
        """Called by the rank."""
        words = [
            (_VERSION_OFFSET, held.version),
            (_UPDATES_OFFSET, held.updates * 2 + held.touched),
        ]
        for offset, word in reversed(words) if held.touched else words:
            self._write(offset, word)

    def held(self) -> Held:
        """As the rank last reported."""
        word = self._read(_UPDATES_OFFSET)
        while True:  # until nothing was reported meanwhile
            version, before = self._read(_VERSION_OFFSET), word
            word = self._read(_UPDATES_OFFSET)
            if word == before:
                return Held(version, bool(word & 1), word >> 1)

    def hold(self) -> None:
        """Called by the front: no request is running and none will."""
        self._write(_FRONT_OFFSET, _HELD)

    def let_go(self) -> None:
        """Called by the front: requests may run."""
        self._write(_FRONT_OFFSET, _FREE)

    def is_held(self) -> bool:
        return self._read(_FRONT_OFFSET) == _HELD

    def close(self) -> None:
        os.close(self.descriptor)

    def _write(self, offset: int, word: int) -> None:
        os.pwrite(self.descriptor, _WORD.pack(word), offset)

    def _read(self, offset: int) -> int:
        word: int
        (word,) = _WORD.unpack(os.pread(self.descriptor, _WORD.size, offset))
        return word
