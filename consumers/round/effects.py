"""Where the two halves of a round machine put what they want done. Does no I/O.

Owns the numbering of actions and timers. A timer has one token at a time: setting it again or
cancelling it makes the old token stale, so that a firing that was already on its way is ignored.
"""

from __future__ import annotations

from collections import deque
from enum import StrEnum

from weightbus.consumers.round.events import TimerFired
from weightbus.consumers.round.instructions import CancelTimer, Instruction, Send, SetTimer
from weightbus.schemas.base import Message

__all__ = ("NS_PER_S", "Effects", "Timer", "timer_of")

NS_PER_S = 1_000_000_000


class Timer(StrEnum):
    """What a timer is for; its name is this alone, or followed by `:` and the round."""

    JOIN = "join"
    """Say `Join` again."""
    NEGOTIATE = "negotiate"
    """No plan came."""
    REPLAN = "replan"
    """No plan came after a group broke."""
    PROVEN = "proven"
    """Say `Proven` again."""
    COMMIT = "commit"
    """No `Commit` came."""
    RETRY = "retry"
    """A version may be tried again."""
    CAMPAIGN = "campaign"
    """Campaign for a round's lease (again)."""
    WINDOW = "window"
    """A round's join window ends."""
    RENEW = "renew"
    """Renew a round's lease."""
    ROUND = "round"
    """A round's budget ends."""


class Effects:
    """The instructions of the event in hand."""

    def __init__(self) -> None:
        self.now_ns = 0
        """When the event in hand happened."""
        self._instructions: list[Instruction] = []
        self._said: deque[Message] = deque()
        self._timers: dict[str, int] = {}
        self._last_token = 0

    def end(self) -> tuple[Instruction, ...]:
        """The event is handled: what there is to do, in order."""
        done = tuple(self._instructions)
        self._instructions.clear()
        return done

    def put(self, *instructions: Instruction) -> None:
        self._instructions.extend(instructions)

    def send(self, message: Message) -> None:
        """Publish `message`; the machine hears it itself at once (`heard`), not from the bus."""
        self._instructions.append(Send(message))
        self._said.append(message)

    def heard(self) -> Message | None:
        """The next message that this machine has said and not yet heard."""
        return self._said.popleft() if self._said else None

    def token(self) -> int:
        """A number no other action and no other timer has."""
        self._last_token += 1
        return self._last_token

    def at_ns(self, delay_s: float) -> int:
        return self.now_ns + round(delay_s * NS_PER_S)

    def set_timer(self, name: str, at_ns: int) -> None:
        token = self._timers[name] = self.token()
        self._instructions.append(SetTimer(name, token, at_ns))

    def cancel_timers(self, *names: str) -> None:
        """Cancel those of `names` that are set."""
        for name in names:
            if self._timers.pop(name, None) is not None:
                self._instructions.append(CancelTimer(name))

    def fired(self, event: TimerFired) -> bool:
        """Whether a firing counts: its timer has neither been set anew nor cancelled."""
        if self._timers.get(event.name) != event.token:
            return False
        del self._timers[event.name]
        return True

    @property
    def timers(self) -> frozenset[str]:
        """Names of the timers that are set."""
        return frozenset(self._timers)


def timer_of(event: TimerFired) -> Timer:
    """What the timer that fired was for."""
    return Timer(event.name.partition(":")[0])
