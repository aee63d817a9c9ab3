"""The `torch` engine as a consumer sees it: its front process and its ranks behind one `Engine`.

Owns the connection to the front, the channel to the ranks and, if it started the engine, the guard
of its front process: that engine ends with this process, however this one ends. An engine that ran
before goes on when this closes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import TypeVar

import anyio

from weightbus.bus.host import host_id as this_host_id
from weightbus.consumers.engines.budget import share_for_peer
from weightbus.consumers.engines.channel import WorkerChannel, open_channel
from weightbus.consumers.engines.directory import EngineDirectory
from weightbus.consumers.engines.engine import Engine, EngineReport
from weightbus.consumers.engines.errors import RequestFailed
from weightbus.consumers.engines.torch.client import TorchEngineClient, open_torch_client
from weightbus.consumers.engines.torch.spec import TorchEngineSpec
from weightbus.consumers.engines.torch.start import START_TIMEOUT_S, open_front, wait_until_ready
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

__all__ = ("TorchEngine", "open_torch_engine")

SETTLE_S = 5.0
"""How long ranks whose `apply` was given up may take to end it before they are killed."""

_REPLIES = (Described, Attached, Prepared, Applied, Inspected, Detached, Failed)
R = TypeVar("R", Described, Attached, Prepared, Applied, Inspected)
Outcomes = Mapping[int, WorkerMessage | WeightBusError]


class TorchEngine(Engine):
    """See `Engine`.

    A rank's worker is the process that last answered `describe` or `inspect`: once it is replaced,
    `attach` and `apply` raise `WorkerLost`.
    """

    kind = "torch"

    def __init__(
        self,
        client: TorchEngineClient,
        channel: WorkerChannel,
        name: str,
        roots: Sequence[str],
        host_id: str,
    ) -> None:
        self._client = client
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
        outcomes = await self._ask_every_rank(request, deadline_s)
        return _all_of(Described, outcomes)

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
        return _all_of(Attached, await self._channel.request_each(requests, deadline_s))

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
        return _all_of(Prepared, await self._channel.request_each(requests, deadline_s))

    async def pause(self, deadline_s: float) -> None:
        try:
            await self._client.pause(deadline_s)
        except RequestFailed as error:
            raise EngineUnavailable(self._name, str(error)) from None

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
            outcomes = await self._channel.request_each(requests, deadline_s)
        except anyio.get_cancelled_exc_class():
            await self._settle(feeds)
            raise
        if any(isinstance(outcome, DeadlineExceeded) for outcome in outcomes.values()):
            await self._settle(feeds)
        try:
            return _all_of(Applied, outcomes)
        except ConsumerError as error:
            error.touched = any(_may_have_written(outcome) for outcome in outcomes.values())
            raise

    async def inspect(self, layout_digest: str | None, deadline_s: float) -> tuple[Inspected, ...]:
        request = Inspect(
            request=0, layout_digest=layout_digest, deadline_s=share_for_peer(deadline_s)
        )
        return _all_of(Inspected, await self._ask_every_rank(request, deadline_s))

    async def resume(self, version: int, deadline_s: float) -> None:
        try:
            await self._client.resume(version, deadline_s)
        except RequestFailed as error:
            raise EngineUnavailable(self._name, str(error)) from None

    async def state(self, deadline_s: float) -> EngineReport:
        report = await self._client.state(deadline_s)
        return EngineReport(
            version=report.version,
            paused=report.paused,
            touched=report.touched,
            ranks=report.ranks,
            error=report.error,
        )

    async def _ask_every_rank(self, request: WorkerMessage, deadline_s: float) -> Outcomes:
        """Speak to whoever stands for each rank now."""
        requests = dict.fromkeys(range(self.ranks), request)
        return await self._channel.request_each(requests, deadline_s, adopt=True)

    async def _settle(self, ranks: Iterable[int]) -> None:
        """Return when no rank carries out an `apply` that was given up.

        A rank does one thing after the other, so an answer to anything asked later means that it
        has ended. Ranks that do not answer are killed by their front; if that is gone itself, the
        kernel has killed them.
        """
        with anyio.CancelScope(shield=True):
            ask = Inspect(request=0, deadline_s=share_for_peer(SETTLE_S))
            outcomes = await self._channel.request_each(dict.fromkeys(ranks, ask), SETTLE_S)
            if any(isinstance(outcome, DeadlineExceeded) for outcome in outcomes.values()):
                with suppress(ConsumerError):  # the failure that led here is the one to tell
                    reason = f"a rank was still applying {SETTLE_S:g} s after it should have ended"
                    await self._client.restart(reason, SETTLE_S)


@asynccontextmanager
async def open_torch_engine(
    directory: Path,
    *,
    spawn: TorchEngineSpec | None = None,
    roots: Sequence[str] = (),
    host_id: str | None = None,
    start_timeout_s: float = START_TIMEOUT_S,
) -> AsyncIterator[TorchEngine]:
    """The engine whose sockets are in `directory`, once all its ranks answer.

    With `spawn` it is started here, and ends here. Its ranks read files only below `roots`, and
    shared memory only of the host `host_id` (by default this one).

    Raises:
        EngineUnavailable: there is none, it did not start, or it has another consumer.
    """
    place = EngineDirectory(directory)
    async with AsyncExitStack() as stack:
        front = None
        if spawn is not None:
            place.prepare()
            front = await stack.enter_async_context(open_front(place, spawn))
        client = await stack.enter_async_context(open_torch_client(place.path))
        report = await wait_until_ready(client, place, front, start_timeout_s)
        channel = await stack.enter_async_context(
            open_channel(place.control, report.ranks, _REPLIES)
        )
        yield TorchEngine(client, channel, str(place.path), roots, host_id or this_host_id())


def _all_of(expected: type[R], outcomes: Outcomes) -> tuple[R, ...]:
    """Every rank's reply.

    Raises:
        ApplyFailed, WorkerLost, DeadlineExceeded: of the first rank that has none.
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


def _may_have_written(outcome: WorkerMessage | WeightBusError) -> bool:
    if isinstance(outcome, Failed):
        return outcome.touched
    return not isinstance(outcome, MessageInvalid)
