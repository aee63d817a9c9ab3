"""The contract of a route: one way for bytes to reach the live parameters of some ranks.

`local` reads in place; `broadcast` and `p2p` go through staging. A route decides
nothing: the plan has chosen it, its ranks and its deadlines.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import anyio
import anyio.to_thread

from weightbus.consumers.engines.engine import Engine
from weightbus.consumers.errors import DeadlineExceeded
from weightbus.schemas.base import RouteName, Stage
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.layout import Layout
from weightbus.schemas.placement import Placement, Segment
from weightbus.schemas.rounds import RoundPlan
from weightbus.schemas.worker import Applied

__all__ = ("Route", "Transfer")


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """One engine's share of one route of one round."""

    engine: Engine
    ranks: tuple[int, ...]
    """Ranks of this engine that the plan sends this way."""
    version: int
    layout: Layout
    layout_digest: str
    placement: Placement
    plan: RoundPlan
    begin_write: Callable[[], Awaitable[None]]
    """Awaited once before the first byte goes to a live parameter; it pauses the engine."""
    deadline_s: float
    proven: bool = False
    """Every rank's plan of this layout is proven, and writes all parameters directly: a `Stream`
    will do."""


class Route(ABC):
    """One way to move bytes."""

    name: ClassVar[RouteName]
    rendezvous: str = ""
    """Where groups meet whose first member is here; empty: this route forms none."""

    @property
    def groups(self) -> tuple[str, ...]:
        """Ids of the groups that are ready."""
        return ()

    @property
    def room_bytes(self) -> int | None:
        """What this route's staging may take now; None: it has none."""
        return None

    def is_favoured(self, version: int) -> bool:
        """False: it can be taken, but only if nothing else can, since it failed of late."""
        return True

    def know_devices(self, devices: Sequence[str]) -> None:
        """Where the parameters of the engine's ranks are, in rank order: `cpu`, `cuda:0`, ...
        Called before `reach`, whenever they have been described."""
        del devices  # staging is in main memory

    def widen(
        self, ready: CheckpointReady, layout_digest: str, layout: Layout, placement: Placement
    ) -> Placement:
        """A placement with more ways than its publisher offers, for this route alone: another may
        not be able to read them safely. Called before `reach`, and before `transfer`."""
        return placement

    @abstractmethod
    def reach(self, layout: Layout, placement: Placement) -> Sequence[Segment]:
        """For every segment, the way this route would take. Moves nothing; called before `Join`.

        Raises:
            RouteUnavailable: some segment cannot be reached by this route from this host.
        """

    async def reach_in_time(
        self, transfer: Transfer, stage: Stage, deadline_s: float
    ) -> Sequence[Segment]:
        """As `reach`. A file server that hangs keeps a thread, but nobody who waits for it.

        Raises:
            RouteUnavailable
            DeadlineExceeded: of `stage`.
        """
        with anyio.move_on_after(deadline_s):
            return await anyio.to_thread.run_sync(
                self.reach, transfer.layout, transfer.placement, abandon_on_cancel=True
            )
        raise DeadlineExceeded(stage, deadline_s)

    @abstractmethod
    async def transfer(self, transfer: Transfer) -> tuple[Applied, ...]:
        """Bring the version to every rank of `transfer.ranks`; returns in that order.

        Cancelling leaves no thread writing to a live parameter.

        Raises:
            RouteUnavailable, SegmentUnavailable, TornRead, ApplyFailed, WorkerLost,
            DeadlineExceeded: `touched` says whether a live parameter may have been written.
        """

    async def share(self, version: int, layout_digest: str, checkpoint_ns: int) -> bool:
        """What this route brought last is proven: others may read what it keeps of it, if it keeps
        any, which is returned.

        Raises:
            BusUnavailable: the bus is gone for good.
        """
        return False
