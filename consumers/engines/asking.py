"""An engine whose workers are asked by the channel: all that two kinds of engine have in common.

Owns nothing: the channel is its opener's. A subclass says how an engine is paused and resumed, and
may say how its workers come to carry out what they are asked (`_ask`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import anyio

from weightbus.consumers.engines.budget import share_for_peer
from weightbus.consumers.engines.channel import WorkerChannel
from weightbus.consumers.engines.engine import Engine
from weightbus.consumers.errors import (
    ApplyFailed,
    ConsumerError,
    DeadlineExceeded,
    EngineUnavailable,
    WorkerLost,
)
from weightbus.schemas.errors import MessageInvalid, WeightBusError
from weightbus.schemas.worker import (
    Applied,
    Apply,
    Attach,
    Attached,
    Cell,
    Describe,
    Described,
    Detached,
    Failed,
    Feed,
    Inspect,
    Inspected,
    Prepare,
    Prepared,
    WorkerMessage,
)

__all__ = ("REPLIES", "SETTLE_S", "AskingEngine", "Outcomes", "all_of", "may_have_written")

SETTLE_S = 5.0
"""How long ranks whose `apply` was given up may take to end it before they are given up, too."""

REPLIES = (Described, Attached, Prepared, Applied, Inspected, Detached, Failed)
"""What a worker answers."""

Outcomes = Mapping[int, WorkerMessage | WeightBusError]
"""By rank: its reply, or why there is none."""

R = TypeVar("R", Described, Attached, Prepared, Applied, Inspected)


class AskingEngine(Engine):
    """See `Engine`.

    A rank's worker is the process that last answered `describe` or `inspect`: once it is replaced,
    `attach` and `apply` raise `WorkerLost`.
    """

    def __init__(
        self, channel: WorkerChannel, name: str, roots: Sequence[str], host_id: str
    ) -> None:
        """Workers read files only below `roots`, and shared memory only of the host `host_id`."""
        self._channel = channel
        self._name = name
        self._roots = tuple(roots)
        self._host_id = host_id

    @property
    def ranks(self) -> int:
        return self._channel.ranks

    async def describe(
        self, layout_digest: str, layout: bytes, deadline_s: float
    ) -> tuple[Described, ...]:
        request = Describe(
            request=0,
            layout_digest=layout_digest,
            layout=layout,
            deadline_s=share_for_peer(deadline_s),
        )
        return all_of(Described, await self._ask_every_rank(request, deadline_s))

    async def attach(
        self,
        layout_digest: str,
        needs_digests: Sequence[str],
        cells: Sequence[Sequence[Cell]],
        deadline_s: float,
    ) -> tuple[Attached, ...]:
        requests = {
            rank: Attach(
                request=0,
                layout_digest=layout_digest,
                needs_digest=needs_digests[rank],
                cells=tuple(cells[rank]),
                roots=self._roots,
                host_id=self._host_id,
                deadline_s=share_for_peer(deadline_s),
            )
            for rank in range(self.ranks)
        }
        return all_of(Attached, await self._ask(requests, deadline_s))

    async def prepare(
        self, layout_digest: str, feeds: Mapping[int, Feed], deadline_s: float
    ) -> tuple[Prepared, ...]:
        requests = {
            rank: Prepare(
                request=0,
                layout_digest=layout_digest,
                feed=feed,
                deadline_s=share_for_peer(deadline_s),
            )
            for rank, feed in feeds.items()
        }
        return all_of(Prepared, await self._ask(requests, deadline_s))

    async def apply(
        self,
        version: int,
        layout_digest: str,
        feeds: Mapping[int, Feed],
        deadline_s: float,
    ) -> tuple[Applied, ...]:
        requests = {
            rank: Apply(
                request=0,
                version=version,
                layout_digest=layout_digest,
                feed=feed,
                deadline_s=share_for_peer(deadline_s),
            )
            for rank, feed in feeds.items()
        }
        try:
            outcomes = await self._ask(requests, deadline_s)
        except anyio.get_cancelled_exc_class():
            with anyio.CancelScope(shield=True):
                await self._settle(feeds)
            raise
        given_up = DeadlineExceeded | EngineUnavailable
        if any(isinstance(outcome, given_up) for outcome in outcomes.values()):
            with anyio.CancelScope(shield=True):
                await self._settle(feeds)
        try:
            return all_of(Applied, outcomes)
        except ConsumerError as error:
            error.touched = any(may_have_written(outcome) for outcome in outcomes.values())
            raise

    async def inspect(self, layout_digest: str | None, deadline_s: float) -> tuple[Inspected, ...]:
        request = Inspect(
            request=0, layout_digest=layout_digest, deadline_s=share_for_peer(deadline_s)
        )
        return all_of(Inspected, await self._ask_every_rank(request, deadline_s))

    async def _ask_every_rank(self, request: WorkerMessage, deadline_s: float) -> Outcomes:
        """Speak to whoever stands for each rank now."""
        requests = dict.fromkeys(range(self.ranks), request)
        return await self._ask(requests, deadline_s, adopt=True)

    async def _ask(
        self, requests: Mapping[int, WorkerMessage], deadline_s: float, *, adopt: bool = False
    ) -> Outcomes:
        """Have each rank carry out its request. Raises nothing: what went wrong is the outcome of
        the ranks that it concerns. See `WorkerChannel.request_each`."""
        return await self._channel.request_each(requests, deadline_s, adopt=adopt)

    @abstractmethod
    async def _settle(self, ranks: Iterable[int]) -> None:
        """Return when no rank carries out an `apply` that was given up, or after `SETTLE_S`. Called
        shielded from cancellation; raises nothing.

        A rank does one thing after the other, so an answer to anything asked later means that it
        has ended.
        """

    async def _still_busy(self, ranks: Iterable[int]) -> bool:
        """Whether a rank does not answer within `SETTLE_S`."""
        ask = Inspect(request=0, deadline_s=share_for_peer(SETTLE_S))
        outcomes = await self._ask(dict.fromkeys(ranks, ask), SETTLE_S)
        return any(isinstance(outcome, DeadlineExceeded) for outcome in outcomes.values())


def all_of(expected: type[R], outcomes: Outcomes) -> tuple[R, ...]:
    """Every rank's reply.

    Raises:
        WeightBusError: of the first rank that has none; `ApplyFailed` if it answered `Failed`.
    """
    replies = []
    for rank, outcome in outcomes.items():
        match outcome:
            case Failed(error=cause, reason=reason, touched=touched):
                raise ApplyFailed(rank, cause, reason, touched=touched)
            case WeightBusError():
                raise outcome
            case _ if isinstance(outcome, expected):
                replies.append(outcome)
            case _:
                raise WorkerLost(rank, f"it answered with {type(outcome).__name__}")
    return tuple(replies)


def may_have_written(outcome: WorkerMessage | WeightBusError) -> bool:
    """Whether the rank of this outcome of an `apply` may have written to a live parameter."""
    if isinstance(outcome, Failed):
        return outcome.touched
    return not isinstance(outcome, MessageInvalid)
