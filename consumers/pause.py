"""The pause of one transfer: begun before the first byte is written, undone if none was.

Owns nothing but what it has seen of the engine. Invariant: an engine that may have been written to
stays paused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import anyio

from weightbus.consumers.engines.beside import beside
from weightbus.consumers.engines.engine import Engine, EngineReport
from weightbus.consumers.errors import ConsumerError, WorkerLost
from weightbus.schemas.worker import Inspected

__all__ = ("Pause",)

_logger = logging.getLogger(__name__)


class Pause:
    """Of one engine, for one transfer."""

    def __init__(
        self,
        engine: Engine,
        instances: Sequence[str],
        deadline_s: float,
        command_s: float,
        steady_ns: Callable[[], int],
    ) -> None:
        """`steady_ns`: a clock of this process that nobody sets."""
        self._engine = engine
        self._instances = instances
        self._deadline_s = deadline_s
        self._command_s, self._steady_ns = command_s, steady_ns
        self._lock = anyio.Lock()
        self._before: tuple[Inspected, ...] | None = None
        self._served: EngineReport | None = None
        self.start_ns = 0
        """When requests began to wait, by the steady clock; 0: not paused."""

    async def begin(self) -> None:
        """Pause the engine, once, however many routes ask; requests that run are waited for.

        Raises:
            WorkerLost: a worker is not the process that was prepared.
        """
        async with self._lock:
            if self._before is not None:
                return
            self._served, before = await self._look()
            self.start_ns = self._steady_ns()
            await self._engine.pause(self._deadline_s)
            self._before = before

    async def _look(self) -> tuple[EngineReport, tuple[Inspected, ...]]:
        """What the engine serves and holds, once it can be paused. All is asked at once: each
        answer may take a step of the model."""
        inspected: tuple[Inspected, ...] = ()

        async def look_at_ranks() -> None:
            nonlocal inspected
            inspected = await self._engine.look(self._deadline_s)
            for rank, known in zip(inspected, self._instances, strict=True):
                if rank.instance != known:
                    raise WorkerLost(rank.rank, "another process took its place since `Prepare`")

        async with beside() as tasks:
            tasks.start_soon(self._engine.before_pause, self._deadline_s)
            tasks.start_soon(look_at_ranks)
            report = await self._engine.state(self._command_s)
        return report, inspected

    async def undo_unless_touched(self) -> bool:
        """Whether a live parameter may have been written; if none was, serve as before.

        Never raises: an engine that does not answer may have been written to.
        """
        if self._served is None:
            return False
        with anyio.CancelScope(shield=True):
            try:
                if self._before is not None:  # the pause was complete: routes may have written
                    after = await self._engine.inspect(None, self._command_s)
                    if _contents(after) != _contents(self._before):
                        return True
                if self._served.touched:
                    return True
                if not self._served.paused:
                    await self._engine.resume(self._served.version, self._command_s)
            except ConsumerError as error:
                _logger.warning("the engine's parameters count as touched: %s", error)
                return True
        return False


def _contents(ranks: Sequence[Inspected]) -> list[tuple[str, int, int, bool]]:
    """Differs if the parameters of some rank may have been written to in between."""
    return [(rank.instance, rank.updates, rank.version, rank.touched) for rank in ranks]
