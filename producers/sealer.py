"""Makes one checkpoint of what the ranks have written, and announces it: rank 0's last step.

Owns what it has worked out for the layouts it saw last. A version with the same layouts as the one
before costs no planning and puts no layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import anyio
import anyio.to_thread
from msgspec import structs

from weightbus.bus.connection import Bus
from weightbus.producers.announcing import Announcer
from weightbus.producers.digests import Sums, get_sums
from weightbus.producers.errors import SealFailed
from weightbus.producers.sealing import SealPlan, add_digests, plan_seal, seal_placement
from weightbus.schemas.checkpoint import CheckpointPart, CheckpointReady
from weightbus.schemas.errors import WeightBusError
from weightbus.schemas.layout import Layout
from weightbus.schemas.placement import Placement

__all__ = ("Piece", "Sealer", "StoredLayout")

FETCHES_AT_ONCE = 16
"""Objects of other ranks' parts that are read at a time."""


@dataclass(frozen=True)
class Piece:
    """What one rank has written."""

    layout: Layout
    placement: Placement
    digests: Sums
    """Of its shards."""


class StoredLayout:
    """Puts layouts into the store; one that is like the last costs a comparison."""

    def __init__(self, bus: Bus, *, partial: bool) -> None:
        self._bus, self._partial = bus, partial
        self._last: tuple[Layout, str] | None = None

    async def put(self, layout: Layout) -> str:
        """Check and store a layout; returns its digest.

        Raises:
            MessageInvalid: it breaks a rule.
            ObjectTooLarge, BusUnavailable, BusTimeout, RequestRefused
        """
        if self._last is None or self._last[0] != layout:
            self._last = layout, await self._bus.layouts.put(layout, partial=self._partial)
        return self._last[1]


class Sealer:
    """Rank 0's, or that of a trainer of one rank."""

    def __init__(self, announcer: Announcer) -> None:
        self._bus, self._announcer = announcer.bus, announcer
        self._stored = StoredLayout(self._bus, partial=False)
        self._planned: tuple[tuple[Layout, ...], SealPlan] | None = None
        self._part_layouts: dict[str, Layout] = {}

    async def prepare(self, layouts: Sequence[Layout]) -> tuple[SealPlan, str]:
        """Plan what parts of these layouts make, and store its layout; (plan, layout digest).

        Raises:
            TensorInvalid, MessageInvalid: they make no checkpoint.
            ObjectTooLarge, BusUnavailable, BusTimeout, RequestRefused
        """
        key = tuple(layouts)
        if self._planned is None or self._planned[0] != key:
            self._planned = key, await anyio.to_thread.run_sync(plan_seal, key)
        plan = self._planned[1]
        return plan, await self._stored.put(plan.layout)

    async def seal(
        self, pieces: Sequence[Piece], draft: CheckpointReady, headers: Mapping[str, str]
    ) -> CheckpointReady:
        """Announce what `pieces`, of ranks 0, 1, ..., make; the rest of the event is in `draft`.

        Raises:
            TensorInvalid, MessageInvalid: they make no checkpoint.
            ObjectTooLarge, BusUnavailable, BusTimeout, RequestRefused
        """
        plan, layout_digest = await self.prepare([piece.layout for piece in pieces])
        tensor_digests = add_digests(plan, [piece.digests for piece in pieces])
        weights_digest, key = await self._announcer.put_digests(tensor_digests)
        ready = structs.replace(
            draft,
            layout_digest=layout_digest,
            placement=seal_placement(plan, [piece.placement for piece in pieces]),
            weights_digest=weights_digest,
            tensor_digests=key,
        )
        return await self._announcer.say(ready, headers)

    async def fetch(self, mine: Piece, parts: Sequence[CheckpointPart]) -> list[Piece]:
        """The pieces of all ranks, given one's own; `parts` are in rank order.

        The objects with their digests are removed: nobody else reads them, and no rank writes those
        of a later version before this one is sealed.

        Raises:
            SealFailed: what a rank says of its part is not to be had.
            BusUnavailable, BusTimeout, RequestRefused
        """
        pieces = {0: mine}
        failures: list[WeightBusError] = []
        limiter = anyio.CapacityLimiter(FETCHES_AT_ONCE)

        async def fetch_one(part: CheckpointPart) -> None:
            async with limiter:
                try:
                    pieces[part.rank] = await self._fetch(part)
                except WeightBusError as error:
                    reason = f"the part of rank {part.rank} cannot be read: {error}"
                    failures.append(SealFailed(part.version, reason))

        async with anyio.create_task_group() as group:
            for part in parts[1:]:
                group.start_soon(fetch_one, part)
        if failures:
            raise failures[0]
        for key in {part.shard_digests for part in parts if part.shard_digests is not None}:
            await self._bus.objects.delete(key)
        used = {part.layout_digest for part in parts}
        self._part_layouts = {d: layout for d, layout in self._part_layouts.items() if d in used}
        return [pieces[rank] for rank in range(len(parts))]

    async def _fetch(self, part: CheckpointPart) -> Piece:
        if part.layout_digest not in self._part_layouts:
            layout, _ = await self._bus.layouts.get(part.layout_digest, partial=True)
            self._part_layouts[part.layout_digest] = layout
        layout = self._part_layouts[part.layout_digest]
        if part.shard_digests is None:
            raise SealFailed(part.version, f"rank {part.rank} offers no digests")
        digests = await get_sums(self._bus, part.shard_digests, len(layout.shards))
        return Piece(layout, part.placement, digests)
