"""Everything a consumer hears on the bus, as events for its round machine.

Owns the subscriptions while `run_messages` and `run_presence` run. After a lost connection it reads
what was missed: the last checkpoint and, of the round in hand, the last plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import anyio
import anyio.abc

from weightbus.bus.connection import Bus
from weightbus.bus.presence import EngineGone
from weightbus.bus.received import Received, Reconnected
from weightbus.consumers.errands import keep_on
from weightbus.consumers.journal import Journal
from weightbus.consumers.round import events as ev
from weightbus.schemas.base import Message
from weightbus.schemas.checkpoint import CheckpointReady, CheckpointRetired
from weightbus.schemas.progress import EngineState, UpdateComplete, UpdateFailed
from weightbus.schemas.rounds import Abort, Commit, Join, Proven, RoundComplete, RoundPlan

__all__ = ("HEARD_MESSAGES", "Listener")

HEARD_MESSAGES: Final = (
    CheckpointReady,
    CheckpointRetired,
    Join,
    RoundPlan,
    Proven,
    Commit,
    Abort,
    RoundComplete,
    UpdateComplete,
    UpdateFailed,
)

RETRY_S: Final = 1.0
"""Pause before the bus is asked again for what it did not answer."""


class Listener:
    """Hears on behalf of one round machine.

    Its tasks raise, besides what they name:

    Raises:
        BusUnavailable: the bus is gone for good.
        SubscriptionOverflow: this process is too slow for what is said.
    """

    round = ""
    """The round in hand, whose plan may be missed; empty: none."""

    def __init__(
        self,
        bus: Bus,
        model: str,
        journal: Journal,
        feed: Callable[[ev.Event], None],
        reconnected: Callable[[], None],
        tell: Callable[[Message], None],
    ) -> None:
        """`tell` is called with every message that is heard; it neither waits nor raises."""
        self._bus = bus
        self._model = model
        self._journal = journal
        self._feed = feed
        self._reconnected = reconnected
        self._tell = tell

    async def run_messages(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        async with self._bus.subscribe(*HEARD_MESSAGES, model=self._model) as messages:
            task_status.started()
            async for message in messages:
                if isinstance(message, Reconnected):
                    self._reconnected()
                    await self.catch_up()
                else:
                    self._hear(message)

    async def catch_up(self) -> None:
        """Read what was missed, however long the server takes to be ready for it."""
        while True:
            missed = await keep_on(self._look_back())
            if missed is not None:
                break
            await anyio.sleep(RETRY_S)
        for received in missed:
            self._hear(received)

    async def _look_back(self) -> Sequence[Received[Any]]:
        """The last checkpoint, its producer's last that is gone and, of the round in hand, the last
        plan."""
        model = self._model
        ready = await self._bus.last(CheckpointReady, model=model)
        found: list[Received[Any] | None] = [ready]
        if ready is not None:
            producer = ready.message.producer
            found.append(await self._bus.last(CheckpointRetired, model=model, producer=producer))
        if self.round:
            found.append(await self._bus.last(RoundPlan, model=model, round=self.round))
        return [received for received in found if received is not None]

    def _hear(self, received: Received[Message]) -> None:
        self._tell(received.message)
        match received.message:
            case CheckpointReady() as ready:
                self._feed(ev.CheckpointSeen(ready, self._journal.hear(ready, received.headers)))
            case CheckpointRetired() as retired:
                self._feed(ev.CheckpointGone(retired.version, retired.reason, retired.producer))
            case Join() as join:
                self._feed(ev.JoinSeen(join))
            case RoundPlan() as plan:
                self._feed(ev.PlanSeen(plan))
            case Proven() as proven:
                self._feed(ev.ProvenSeen(proven))
            case Commit() as commit:
                self._feed(ev.CommitSeen(commit))
            case Abort() as abort:
                self._feed(ev.AbortSeen(abort))
            case RoundComplete() as complete:
                self._feed(ev.RoundCompleteSeen(complete))
            case UpdateComplete() | UpdateFailed() as update:
                self._feed(ev.UpdateSeen(update))

    async def run_presence(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        async with self._bus.presence.watch(self._model) as changes:
            for state in await self._bus.presence.list(self._model):
                self._feed(ev.EngineSeen(state))
            task_status.started()
            while True:
                match await keep_on(anext(changes)):
                    case EngineState() as state:
                        self._feed(ev.EngineSeen(state))
                    case EngineGone(engine=engine):
                        self._feed(ev.EngineGone(engine))
                    case None:
                        await anyio.sleep(RETRY_S)
