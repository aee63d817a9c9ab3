"""Whether groups of this consumer have met of late, and so whether another is worth trying. Pure.

A group whose members cannot reach each other is not formed, however often a plan names it, and
every attempt costs all of them the time that they wait. So after one that did not form the next
versions come without a group, and after each further one twice as many, up to a bound: a network
that was mended is found again.
"""

from __future__ import annotations

from typing import Final

__all__ = ("MAX_LEFT_OUT", "Favour")

MAX_LEFT_OUT: Final = 64
"""Versions in a row that come without a group, at most."""
FIRST_LEFT_OUT: Final = 2


class Favour:
    """Of one consumer's groups."""

    def __init__(self) -> None:
        self._length = 0
        """Versions that were, or are being, left out; 0: the last group met."""
        self._missed = -1
        """The version whose group did not meet."""
        self._left_out: set[int] = set()
        """Versions that were asked for since."""

    def met(self) -> None:
        """A group has formed."""
        self._length, self._missed = 0, -1
        self._left_out.clear()

    def missed(self, version: int) -> int:
        """The group of a version did not form; several of one version count once.

        Returns:
            how many versions are left out from now on.
        """
        if version != self._missed:
            self._length = min(2 * self._length or FIRST_LEFT_OUT, MAX_LEFT_OUT)
            self._missed = version
            self._left_out.clear()
        return self._length

    def allows(self, version: int) -> bool:
        """Whether a group may be tried for a version; to be asked of every version."""
        if not self._length:
            return True
        if version == self._missed or version in self._left_out:
            return False
        if len(self._left_out) < self._length:
            self._left_out.add(version)
            return False
        return True
