"""Everything that is said about one model on the bus, in order, for tests to wait for.

Owns a subscription while `open_log` is open. What was missed while the bus was away is read back.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import anyio

from weightbus.bus.background import open_background
from weightbus.bus.connection import Bus
from weightbus.bus.received import Reconnected
from weightbus.schemas.base import Message
from weightbus.schemas.checkpoint import (
    CheckpointReady,
    CheckpointRetired,
    CheckpointSkipped,
    CopyReady,
    CopyRetired,
)
from weightbus.schemas.progress import (
    DeadLetter,
    FirstToken,
    StageComplete,
    UpdateComplete,
    UpdateFailed,
)
from weightbus.schemas.rounds import Abort, Commit, Join, Proven, RoundComplete, RoundPlan

__all__ = ("DEADLINE_S", "Log", "open_log")

DEADLINE_S = 60.0
"""How long a test waits for anything; machines that run tests are slow."""

KINDS = (
    CheckpointReady,
    CheckpointRetired,
    CheckpointSkipped,
    CopyReady,
    CopyRetired,
    Join,
    RoundPlan,
    Proven,
    Commit,
    Abort,
    RoundComplete,
    UpdateComplete,
    UpdateFailed,
    StageComplete,
    FirstToken,
    DeadLetter,
)
SHOWN_FIELDS = ("version", "engine", "round", "epoch", "leader", "cause", "reason", "stage", "ok")

M = TypeVar("M", bound=Message)


class Log:
    """What was said so far."""

    def __init__(self, bus: Bus, model: str, deadline_s: float = DEADLINE_S) -> None:
        self._bus, self._model, self._deadline_s = bus, model, deadline_s
        self._messages: list[Message] = []
        self._grown = anyio.Event()

    def said(self, kind: type[M], **fields: object) -> list[M]:
        """What was said of a kind, with these fields, in order."""
        return [m for m in self._messages if isinstance(m, kind) and _has(m, fields)]

    async def wait(self, kind: type[M], **fields: object) -> M:
        """The first message of a kind with these fields, which may have been said before.

        A field may be given as a condition on its value.
        """
        wanted = f"{kind.__name__} with {fields}"
        return await self.wait_until(wanted, lambda: next(iter(self.said(kind, **fields)), None))

    async def wait_until(self, what: str, find: Callable[[], M | None]) -> M:
        """What `find` finds; it looks again whenever something is said."""
        with anyio.move_on_after(self._deadline_s):
            while True:
                grown = self._grown
                if (found := find()) is not None:
                    return found
                await grown.wait()
        raise AssertionError(f"no {what} within {self._deadline_s:g} s; {self}")

    def position(self, message: Message) -> int:
        """How many messages were said before this one."""
        return next(n for n, said in enumerate(self._messages) if said is message)

    def __str__(self) -> str:
        return "said was:\n" + "\n".join(map(_line, self._messages))

    async def run(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        async with self._bus.subscribe(*KINDS, model=self._model) as messages:
            task_status.started()
            async for received in messages:
                if isinstance(received, Reconnected):
                    async for missed in self._bus.replay(*KINDS, model=self._model):
                        if missed.message not in self._messages:
                            self._add(missed.message)
                else:
                    self._add(received.message)

    def _add(self, message: Message) -> None:
        self._messages.append(message)
        grown, self._grown = self._grown, anyio.Event()
        grown.set()


@asynccontextmanager
async def open_log(bus: Bus, model: str, deadline_s: float = DEADLINE_S) -> AsyncIterator[Log]:
    """Entered once everything that is said will be heard. `deadline_s`: of each wait."""
    async with open_background() as tasks:
        log = Log(bus, model, deadline_s)
        await tasks.start(log.run)
        yield log


def _has(message: Message, fields: dict[str, Any]) -> bool:
    for name, wanted in fields.items():
        value = getattr(message, name)
        if not (wanted(value) if callable(wanted) else value == wanted):
            return False
    return True


def _line(message: Message) -> str:
    shown = {field: getattr(message, field) for field in SHOWN_FIELDS if hasattr(message, field)}
    return f"  {type(message).__name__} {shown}"
