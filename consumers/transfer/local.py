"""The route `local`: every rank reads the segments of its own host.

Picks the nearest way to each segment. Memory is read in place: the engine's workers read it
straight into their parameters. That of GPUs is the nearest for workers on GPUs, and none for
others; where a worker cannot open it after all, as two GPUs that do not reach each other, what else
is offered is taken, and from then on before that GPU's memory, until the ranks are elsewhere. Files
go through staging, so that each is read once per host and not once per rank, wherever the workers
can take a stream; elsewhere they read them in place, too.
No group, no other engine.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from weightbus.bus.errors import SharedMemoryFull
from weightbus.consumers.errors import (
    ApplyFailed,
    ProofNeeded,
    RouteUnavailable,
    SegmentUnavailable,
)
from weightbus.consumers.transfer.alone import stream_alone
from weightbus.consumers.transfer.fetch import LocalSegments, open_fetcher
from weightbus.consumers.transfer.gpu import is_gpu, name_of
from weightbus.consumers.transfer.preparing import prepare_ranks
from weightbus.consumers.transfer.route import Route, Transfer
from weightbus.consumers.transfer.segments import nearest_way, probe_segment
from weightbus.consumers.transfer.staged import Clock, Staging, apply_checked
from weightbus.schemas.base import RouteName
from weightbus.schemas.layout import Layout
from weightbus.schemas.placement import (
    CudaSegment,
    FileSegment,
    Placement,
    Segment,
    SharedMemorySegment,
)
from weightbus.schemas.worker import Applied, InPlace

__all__ = ("LocalRoute",)

_logger = logging.getLogger(__name__)

_NEAREST_FIRST = (SharedMemorySegment, FileSegment)
_NEAREST_TO_GPUS = (CudaSegment, *_NEAREST_FIRST)


class LocalRoute(Route):
    """Reads memory of this host, and files that this host can see.

    Args:
        host_id: of this host, as publishers here put it into their segments.
        roots: directories below which files may be read.
        staging: what files are streamed through; None: they are read in place.
    """

    name: ClassVar[RouteName] = "local"

    def __init__(
        self, host_id: str, roots: Sequence[str] = (), staging: Staging | None = None
    ) -> None:
        self._host_id, self._roots = host_id, tuple(roots)
        self._staging = staging
        self._segments = LocalSegments(host_id, self._roots)
        self._kinds: tuple[type[Segment], ...] = _NEAREST_FIRST
        """Of segments that the ranks can read, the nearest first."""
        self._devices: tuple[str, ...] = ()
        self._refused: frozenset[str] = frozenset()
        """UUIDs of GPUs whose memory a rank could not open, when something else could be read."""

    def know_devices(self, devices: Sequence[str]) -> None:
        if tuple(devices) != self._devices:
            self._devices, self._refused = tuple(devices), frozenset()
        on_gpus = bool(devices) and all(map(is_gpu, devices))
        self._kinds = _NEAREST_TO_GPUS if on_gpus else _NEAREST_FIRST

    def reach(self, layout: Layout, placement: Placement) -> Sequence[Segment]:
        return tuple(
            self._nearest(number, ways, spec.size_bytes)
            for number, (ways, spec) in enumerate(zip(placement, layout.segments, strict=True))
        )

    async def transfer(self, transfer: Transfer) -> tuple[Applied, ...]:
        clock = Clock("reload", transfer.deadline_s)
        sources = await self.reach_in_time(transfer, "reload", clock.left_s())
        try:
            return await self._bring(transfer, sources, clock)
        except ApplyFailed as error:
            others = _others(transfer.placement, sources)
            if error.cause != SegmentUnavailable.__name__ or others is None:
                raise
            _logger.warning("memory of GPUs is not read, but what is offered beside it: %s", error)
            refused = _refused_devices(sources, error.reason)
        transfer = replace(transfer, placement=others)  # no rank writes any more
        sources = await self.reach_in_time(transfer, "reload", clock.left_s())
        applied = await self._bring(transfer, sources, clock)
        self._refused |= refused
        return applied

    async def _bring(
        self, transfer: Transfer, sources: Sequence[Segment], clock: Clock
    ) -> tuple[Applied, ...]:
        has_files = any(isinstance(source, FileSegment) for source in sources)
        if self._staging is not None and transfer.proven and has_files:
            try:
                return await self._stream(transfer, sources, self._staging, clock)
            except SharedMemoryFull as error:
                _logger.info("files are read in place: %s", error)
            except ApplyFailed as error:
                if error.cause != ProofNeeded.__name__:
                    raise
        feeds = dict.fromkeys(transfer.ranks, InPlace(sources=tuple(sources)))
        for rank, reason in (await prepare_ranks(transfer, feeds, clock.left_s)).items():
            cause = SegmentUnavailable.__name__
            if reason.startswith(cause) and _others(transfer.placement, sources) is not None:
                raise ApplyFailed(rank, cause, reason, touched=False)  # before anybody is paused
        await transfer.begin_write()
        return await apply_checked(transfer, feeds, clock.left_s())

    async def _stream(
        self, transfer: Transfer, sources: Sequence[Segment], staging: Staging, clock: Clock
    ) -> tuple[Applied, ...]:
        fetcher = open_fetcher(sources, transfer.layout, self._segments, clock.left_s())
        async with fetcher as opened:
            return await stream_alone(transfer, opened, staging, clock.left_s())

    def _nearest(self, number: int, ways: Sequence[Segment], size_bytes: int) -> Segment:
        """The nearest way to one segment that can be opened now."""

        def probe(way: Segment) -> None:
            probe_segment(way, size_bytes, self._host_id, self._roots)

        likely = [way for way in ways if not self._is_refused(way)]
        way, reasons = nearest_way(likely, self._kinds, probe)
        if way is None and len(likely) < len(ways):
            way, reasons = nearest_way(ways, self._kinds, probe)
        if way is not None:
            return way
        if CudaSegment not in self._kinds and any(isinstance(way, CudaSegment) for way in ways):
            reasons.append("a GPU's memory is read only where all ranks are on GPUs")
        reason = "; ".join(reasons) or "it is offered neither as memory of this host nor as a file"
        raise RouteUnavailable(self.name, f"segment {number}: {reason}")

    def _is_refused(self, way: Segment) -> bool:
        return isinstance(way, CudaSegment) and way.device_uuid in self._refused


def _refused_devices(sources: Sequence[Segment], reason: str) -> frozenset[str]:
    """The GPUs of the segments that a reason names; if it names none, of all that were tried."""
    tried = [source for source in sources if isinstance(source, CudaSegment)]
    named = [source for source in tried if name_of(source) in reason]
    return frozenset(source.device_uuid for source in named or tried)


def _others(placement: Placement, sources: Sequence[Segment]) -> Placement | None:
    """What is offered beside memory of GPUs; None: that is not read, or something is left without
    a way."""
    others = tuple(
        tuple(way for way in ways if not isinstance(way, CudaSegment)) for ways in placement
    )
    on_gpus = any(isinstance(source, CudaSegment) for source in sources)
    return others if on_gpus and all(others) else None
