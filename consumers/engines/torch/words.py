"""Two words that the front process and one rank's worker share, readable at any time.

A rank that is applying an update answers nothing until it is done; what it holds must be known all
the same. So each side writes one 8-byte word of an anonymous file and reads the other's:

    the rank's word   which version it holds, and whether an update of it is under way
    the front's word  whether the rank is held: no request runs on it, its weights may change

Each word has one writer. A rank writes `touched` before it looks whether it is held, and the front
lets go before it looks at `touched`: whichever order they meet in, one of them sees the other.
"""

from __future__ import annotations

import os
import struct

__all__ = ("RankWords",)

_WORD = struct.Struct("<q")
_RANK_OFFSET = 0
_FRONT_OFFSET = 8
_NOTHING_HELD = -1
_HELD, _FREE = 1, 0


class RankWords:
    """The words of one rank, as either side sees them."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    @staticmethod
    def create(rank: int) -> RankWords:
        """The front's side: of a rank that holds nothing and is held."""
        words = RankWords(os.memfd_create(f"weightbus-rank-{rank}"))
        words.report(_NOTHING_HELD, touched=False)
        words.hold()
        return words

    def report(self, version: int, *, touched: bool) -> None:
        """Called by the rank: it holds `version`, whole unless `touched`."""
        self._write(_RANK_OFFSET, version * 2 + touched)

    def held_version(self) -> tuple[int, bool]:
        """(version, touched) as the rank last reported."""
        word = self._read(_RANK_OFFSET)
        return word >> 1, bool(word & 1)

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
