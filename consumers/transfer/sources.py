"""Where a version's segments can be read from this host, and the fetcher that reads them.

Memory of this host comes before its files, files before other hosts. Owns nothing.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from functools import partial

import anyio
import anyio.to_thread

from weightbus.bus.endpoint import Endpoint
from weightbus.bus.errors import RemoteReadFailed
from weightbus.consumers.errors import (
    DeadlineExceeded,
    RouteUnavailable,
    SegmentUnavailable,
    TornRead,
)
from weightbus.consumers.transfer.copies import Copies
from weightbus.consumers.transfer.fetch import Fetcher, LocalSegments, open_fetcher
from weightbus.consumers.transfer.remote import open_remote_fetcher, read_generation
from weightbus.consumers.transfer.route import Transfer
from weightbus.consumers.transfer.segments import probe_segment
from weightbus.schemas.base import RouteName
from weightbus.schemas.layout import Layout
from weightbus.schemas.placement import (
    FileSegment,
    Placement,
    RemoteSegment,
    Segment,
    SharedMemorySegment,
)

__all__ = ("Sources",)

_NEAREST_FIRST = (SharedMemorySegment, FileSegment, RemoteSegment)


class Sources:
    """For one engine.

    Args:
        local: opens what lies on this host.
        host_id, roots: as of `LocalRoute`.
        endpoint: of this process; None: other hosts cannot be read, and `missing` says why.
        receiver: this engine's id; receivers of different ids begin at different sources.
        copies: other engines' copies; None: the publisher is asked alone.
    """

    def __init__(
        self,
        local: LocalSegments,
        host_id: str,
        roots: Sequence[str] = (),
        *,
        endpoint: Endpoint | None = None,
        receiver: str = "",
        copies: Copies | None = None,
        missing: str = "there is no transfer engine",
    ) -> None:
        self._local, self._host_id, self._roots = local, host_id, tuple(roots)
        self._endpoint, self._missing = endpoint, missing
        self._turn = zlib.crc32(receiver.encode())
        self._copies = copies

    def reach(self, route: RouteName, layout: Layout, placement: Placement) -> tuple[Segment, ...]:
        """For every segment, the nearest way that answers now. Blocking.

        Raises:
            RouteUnavailable: of `route`: some segment has none.
        """
        silent: dict[str, str] = {}
        ways = []
        for number, (offered, spec) in enumerate(zip(placement, layout.segments, strict=True)):
            try:
                ways.append(self._nearest(number, offered, spec.size_bytes, silent))
            except SegmentUnavailable as error:
                raise RouteUnavailable(route, str(error)) from error
        return tuple(ways)

    async def reach_in_time(
        self, route: RouteName, transfer: Transfer, deadline_s: float
    ) -> tuple[Segment, ...]:
        """As `reach`. A file server that hangs keeps a thread, but nobody who waits for it.

        Raises:
            RouteUnavailable, DeadlineExceeded
        """
        with anyio.move_on_after(deadline_s):
            return await anyio.to_thread.run_sync(
                self.reach, route, transfer.layout, transfer.placement, abandon_on_cancel=True
            )
        raise DeadlineExceeded("fetch", deadline_s)

    def open(
        self, transfer: Transfer, ways: Sequence[Segment], deadline_s: float
    ) -> AbstractAsyncContextManager[Fetcher]:
        """As `open_fetcher`; what other hosts hold is read from copies, too."""
        if self._endpoint is None:
            return open_fetcher(ways, transfer.layout, self._local, deadline_s)
        copies = (
            self._copies.sources(
                transfer.version,
                transfer.layout_digest,
                transfer.plan.checkpoint_ns,
                self._endpoint.protocol,
            )
            if self._copies is not None
            else []
        )
        open_remote = partial(open_remote_fetcher, self._endpoint, copies, self._turn)
        return open_fetcher(ways, transfer.layout, self._local, deadline_s, open_remote)

    def _nearest(
        self, number: int, ways: Sequence[Segment], size_bytes: int, silent: dict[str, str]
    ) -> Segment:
        """`silent` holds the sessions that did not answer, and why."""
        reasons = []
        for kind in _NEAREST_FIRST:
            for way in ways:
                if not isinstance(way, kind):
                    continue
                try:
                    if isinstance(way, RemoteSegment):
                        self._probe(number, way, silent)
                    else:
                        probe_segment(way, size_bytes, self._host_id, self._roots)
                except (SegmentUnavailable, TornRead) as error:
                    reasons.append(str(error))
                else:
                    return way
        found = "; ".join(reasons) or "offered neither to this host nor to others"
        raise SegmentUnavailable(str(number), found, "must be readable from here")

    def _probe(self, number: int, way: RemoteSegment, silent: dict[str, str]) -> None:
        """
        Raises:
            SegmentUnavailable, TornRead: it cannot be read now.
        """
        name, limit = f"{number} at {way.session}", "must be readable from here"
        if self._endpoint is None:
            raise SegmentUnavailable(name, f"on another host ({self._missing})", limit)
        if way.protocol != self._endpoint.protocol:
            found = f"offered by {way.protocol}, not by {self._endpoint.protocol}"
            raise SegmentUnavailable(name, found, limit)
        if way.session in silent:
            raise SegmentUnavailable(name, f"not readable ({silent[way.session]})", limit)
        try:
            generation = read_generation(self._endpoint, way)
        except RemoteReadFailed as error:
            try:
                self._endpoint.probe(way.session)
            except RemoteReadFailed as gone:  # its other segments need not be asked for
                silent[way.session] = gone.reason
            raise SegmentUnavailable(name, f"not readable ({error.reason})", limit) from error
        if generation != way.generation:
            raise TornRead(name, way.generation, generation)
