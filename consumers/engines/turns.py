"""Turns: how the workers of an engine that is not ours come to carry out what they are asked.

A worker of an engine that is not ours owns its main thread, and nothing may be written beside a
forward pass. So requests reach it by its channel (`channel.py`) and wait there; a *turn* is one
call of the engine's own on every worker's main thread, in which each carries out the one request
that the turn names. Its reply goes back by the channel. `taking.py` is the worker's side.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Annotated

import anyio
from msgspec import Meta, Struct

from weightbus.consumers.engines.asking import AskingEngine, Outcomes
from weightbus.consumers.engines.budget import left_s
from weightbus.consumers.engines.channel import WorkerChannel
from weightbus.consumers.errors import ConsumerError, DeadlineExceeded
from weightbus.schemas.errors import WeightBusError
from weightbus.schemas.worker import WorkerMessage

__all__ = ("NO_REQUEST", "Turn", "TurnEngine")

NO_REQUEST = -1

WAIT_S = 5.0
"""How long a worker may wait for the request that its turn is for: it was sent before."""

END_S = 5.0
"""How long a turn may take to end once every worker has replied."""

REPLY_S = 0.25
"""How much later than the failure of its turn a reply may come that tells more of it."""

RequestNumber = Annotated[int, Meta(ge=NO_REQUEST)]


class Turn(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Travels as JSON, or as the object that its JSON is."""

    numbers: Annotated[tuple[RequestNumber, ...], Meta(min_length=1, max_length=4096)]
    """`numbers[rank]` is the number of the request that rank shall carry out; -1: none."""
    wait_s: Annotated[float, Meta(ge=0, le=60)]
    """How long a worker may wait for it to arrive, in seconds: the engine stands still."""


class TurnEngine(AskingEngine):
    """See `AskingEngine`. One turn at a time: what is asked meanwhile waits."""

    def __init__(
        self, channel: WorkerChannel, name: str, roots: Sequence[str], host_id: str
    ) -> None:
        super().__init__(channel, name, roots, host_id)
        self._turns = anyio.Lock()

    @abstractmethod
    async def _open_ranks(self, deadline_s: float) -> None:
        """Have every worker that is there now connect to the channel. Idempotent.

        Raises:
            EngineUnavailable, DeadlineExceeded
        """

    @abstractmethod
    async def _give_turn(self, turn: Turn, deadline_s: float) -> None:
        """Have every worker take this turn; returns when all have. May be cancelled, and then the
        turn may go on.

        Raises:
            EngineUnavailable: at least one worker may not have taken it.
            DeadlineExceeded: it may go on.
        """

    async def _ask(
        self, requests: Mapping[int, WorkerMessage], deadline_s: float, *, adopt: bool = False
    ) -> Outcomes:
        end = anyio.current_time() + deadline_s
        with anyio.move_on_after(deadline_s) as waiting:
            await self._turns.acquire()
        if waiting.cancelled_caught:
            return dict.fromkeys(requests, DeadlineExceeded("the turn before", deadline_s))
        try:
            if adopt:
                await self._open_ranks(left_s(end))
            return await self._ask_in_turn(requests, left_s(end), adopt)
        except ConsumerError as error:
            return dict.fromkeys(requests, error)
        finally:
            self._turns.release()

    async def _ask_in_turn(
        self, requests: Mapping[int, WorkerMessage], deadline_s: float, adopt: bool
    ) -> Outcomes:
        """A turn that fails lets its requests fail with it, but for those that were replied to."""
        numbers = {rank: self._channel.next_number() for rank in requests}
        turn = Turn(
            numbers=tuple(numbers.get(rank, NO_REQUEST) for rank in range(self.ranks)),
            wait_s=min(WAIT_S, deadline_s),
        )
        outcomes: dict[int, WorkerMessage | WeightBusError] = {}
        asked, given = anyio.Event(), anyio.Event()

        async def ask() -> None:
            outcomes.update(
                await self._channel.request_each(requests, deadline_s, adopt=adopt, numbers=numbers)
            )
            asked.set()

        async def give() -> None:
            try:
                await self._give_turn(turn, deadline_s)
            except ConsumerError as error:
                await self._fail(numbers.values(), error, asked)
            given.set()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask)
            tasks.start_soon(give)
            await asked.wait()
            if not any(isinstance(outcome, WeightBusError) for outcome in outcomes.values()):
                with anyio.move_on_after(END_S):
                    await given.wait()
            tasks.cancel_scope.cancel()
        return outcomes

    async def _fail(
        self, numbers: Collection[int], error: WeightBusError, asked: anyio.Event
    ) -> None:
        with anyio.move_on_after(REPLY_S):
            await asked.wait()
        self._channel.give_up_nowait(numbers, error)

    async def _settle(self, ranks: Iterable[int]) -> None:
        """Workers that are not ours cannot be ended by us: one that is still applying then goes on,
        and whoever is told of the failure must take its parameters for touched. A turn that has not
        begun yet finds that its request is not wanted any more (`TurnTaker`)."""
        await self._still_busy(ranks)
