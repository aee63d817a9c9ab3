"""The `torch` engine as a consumer sees it: its front process and its ranks behind one `Engine`.

Owns the connection to the front, the channel to the ranks and, if it started the engine, the guard
of its front process: that engine ends with this process, however this one ends. An engine that ran
before goes on when this closes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

from weightbus.bus.host import host_id as this_host_id
from weightbus.consumers.engines.asking import REPLIES, SETTLE_S, AskingEngine
from weightbus.consumers.engines.channel import WorkerChannel, open_channel
from weightbus.consumers.engines.directory import EngineDirectory
from weightbus.consumers.engines.engine import EngineReport, TokenSeen
from weightbus.consumers.engines.errors import RequestFailed
from weightbus.consumers.engines.torch.client import TorchEngineClient, open_torch_client
from weightbus.consumers.engines.torch.spec import TorchEngineSpec
from weightbus.consumers.engines.torch.start import START_TIMEOUT_S, open_front, wait_until_ready
from weightbus.consumers.errors import ConsumerError, EngineUnavailable

__all__ = ("TorchEngine", "open_torch_engine")


class TorchEngine(AskingEngine):
    """See `Engine` and `AskingEngine`."""

    kind = "torch"

    def __init__(
        self,
        client: TorchEngineClient,
        channel: WorkerChannel,
        name: str,
        roots: Sequence[str],
        host_id: str,
    ) -> None:
        super().__init__(channel, name, roots, host_id)
        self._client = client

    async def pause(self, deadline_s: float) -> None:
        try:
            await self._client.pause(deadline_s)
        except RequestFailed as error:
            raise EngineUnavailable(self._name, str(error)) from None

    async def resume(self, version: int, deadline_s: float) -> None:
        try:
            await self._client.resume(version, deadline_s)
        except RequestFailed as error:
            raise EngineUnavailable(self._name, str(error)) from None

    async def first_token(self, version: int, deadline_s: float) -> TokenSeen | None:
        """The front knows when it had the first answer, whole: of a decoder, all its tokens."""
        try:
            at_ns = await self._client.first_answer(version, deadline_s)
        except RequestFailed as error:
            raise EngineUnavailable(self._name, str(error)) from None
        return TokenSeen(at_ns=at_ns) if at_ns else None

    async def state(self, deadline_s: float) -> EngineReport:
        report = await self._client.state(deadline_s)
        return EngineReport(
            version=report.version,
            paused=report.paused,
            touched=report.touched,
            ranks=report.ranks,
            error=report.error,
        )

    async def _settle(self, ranks: Iterable[int]) -> None:
        """Ranks that do not answer are killed by their front; if that is gone itself, the kernel
        has killed them."""
        if await self._still_busy(ranks):
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
            open_channel(place.control, report.ranks, REPLIES)
        )
        yield TorchEngine(client, channel, str(place.path), roots, host_id or this_host_id())
