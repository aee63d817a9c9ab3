"""The contract of a lane's group: how bytes come to other hosts, and who is ready for them.

Does no I/O. Members keep step: every call is made by all of them, as often, in the same order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Final

__all__ = ("LEAVING", "READY", "WAITING", "Exchange")

READY: Final = b"\1"
"""Answer to a roll call: the next part can come."""

WAITING: Final = b"\2"
"""Not yet: for its engine, for its readers, or for what it fetches."""

LEAVING: Final = b"\3"
"""It never will: this member is about to leave the group."""


class Exchange(ABC):
    """One lane's group, as one of its members has it."""

    id: str
    """Of the group."""
    place: int
    """This member's rank in the group."""
    size: int
    others: tuple[str, ...]
    """The other members, for messages."""

    def name_of(self, place: int) -> str:
        """Of another member."""
        assert place != self.place
        return self.others[place - (place > self.place)]

    @abstractmethod
    async def roll_call(self, answer: bytes, deadline_s: float) -> tuple[bytes, ...]:
        """What every member says, by place. All answer with as many bytes.

        Raises:
            PeerLost: a member is gone, or did not call it in time.
        """

    @abstractmethod
    async def broadcast(self, address: int, size_bytes: int, root: int, stall_s: float) -> None:
        """Bring memory of this process to that of the root; the root's stays as it is.

        All members call it for the same bytes. If it is cancelled or fails, the memory may still
        be written to.

        Args:
            stall_s: some of the bytes must come so soon after those before them.

        Raises:
            PeerLost: it failed, or stood still.
        """

    @abstractmethod
    def writing(self) -> bool:
        """Whether an operation that was left may still write to the memory it was given."""
