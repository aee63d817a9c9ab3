"""Where a version's segments can be read from this host, and the fetcher that reads them.

Memory of this host comes before its files, files before other hosts; what other hosts hold is read
from a copy on this one, as long as there is one. Owns nothing.

Invariant: nobody protects a copy, so it is never read in place: its bytes are fetched, looked at
for tears, and fetched from somebody else if there are any.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from functools import partial

import anyio
import anyio.to_thread

from weightbus.bus.cuda import host_device_uuids
from weightbus.bus.endpoint import Endpoint
from weightbus.bus.errors import RemoteReadFailed
from weightbus.consumers.errors import (
    RouteUnavailable,
    SegmentUnavailable,
    TornRead,
)
from weightbus.consumers.transfer.copies import Copies, CopyHere, with_copies
from weightbus.consumers.transfer.fetch import (
    Fetcher,
    LocalSegments,
    OpenRemote,
    ReplaceableFetcher,
    open_fetcher,
)
from weightbus.consumers.transfer.gpu import check_cuda_segment
from weightbus.consumers.transfer.remote import open_remote_fetcher, read_generations
from weightbus.consumers.transfer.route import Transfer
from weightbus.consumers.transfer.segments import nearest_way, probe_segment
from weightbus.schemas.base import RouteName
from weightbus.schemas.checkpoint import CheckpointReady
from weightbus.schemas.layout import Layout
from weightbus.schemas.placement import (
    CudaSegment,
    FileSegment,
    Placement,
    RemoteSegment,
    Segment,
    SharedMemorySegment,
)

__all__ = ("Sources",)

_logger = logging.getLogger(__name__)

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

    def widen(
        self, ready: CheckpointReady, layout_digest: str, layout: Layout, placement: Placement
    ) -> Placement:
        """As of `Route`: with the copies that other hosts can be asked for."""
        if self._copies is None:
            return placement
        return with_copies(placement, self._copies.of(ready, layout_digest, layout))

    def reach(self, route: RouteName, layout: Layout, placement: Placement) -> tuple[Segment, ...]:
        """For every segment, the nearest way that answers now. Blocking.

        Raises:
            RouteUnavailable: of `route`: some segment has none.
        """
        probe = _RemoteProbe(self._endpoint, self._missing, placement)
        ways = []
        for number, (offered, spec) in enumerate(zip(placement, layout.segments, strict=True)):
            try:
                ways.append(self._nearest(number, offered, spec.size_bytes, probe))
            except SegmentUnavailable as error:
                raise RouteUnavailable(route, str(error)) from error
        return tuple(ways)

    def of_workers(
        self, placement: Placement, ways: Sequence[Segment], *, gpus: bool
    ) -> tuple[Segment | None, ...]:
        """For every segment, how a worker on a GPU of this host reads it itself; None: it does not.

        Args:
            ways: as `reach` found them.
            gpus: whether memory of GPUs is tried where no memory of the host is offered.
        """
        mine: list[Segment | None] = []
        for offered, way in zip(placement, ways, strict=True):
            found = way if isinstance(way, SharedMemorySegment) else None
            on_gpus = [one for one in offered if gpus and isinstance(one, CudaSegment)]
            mine.append(found or next(filter(self._is_here, on_gpus), None))
        return tuple(mine)

    def open(
        self, transfer: Transfer, ways: Sequence[Segment], deadline_s: float
    ) -> AbstractAsyncContextManager[Fetcher]:
        """As `open_fetcher`; what other hosts hold is read from copies, too."""
        if self._endpoint is None:
            return open_fetcher(ways, transfer.layout, self._local, deadline_s)
        copies, here = [], []
        if self._copies is not None:
            offered = self._copies.matching(
                transfer.version,
                transfer.layout_digest,
                transfer.plan.checkpoint_ns,
                transfer.layout,
            )
            copies = self._copies.sources(offered, self._endpoint.protocol)
            here = self._copies.here(offered, self._host_id)
        open_remote = partial(open_remote_fetcher, self._endpoint, copies, self._turn)
        if here:
            open_remote = partial(self._open_here, here, open_remote)
        return open_fetcher(ways, transfer.layout, self._local, deadline_s, open_remote)

    @asynccontextmanager
    async def _open_here(
        self,
        copies: Sequence[CopyHere],
        open_remote: OpenRemote,
        remote: Mapping[int, RemoteSegment],
        layout: Layout,
        deadline_s: float,
    ) -> AsyncIterator[Fetcher]:
        """As `OpenRemote`: from the first of these copies that can be read, while it lasts."""
        end = anyio.current_time() + deadline_s
        async with AsyncExitStack() as stack:
            fetcher = await stack.enter_async_context(open_remote(remote, layout, deadline_s))
            for copy in copies:
                ways = {number: copy.ways[number] for number in remote}
                left_s = end - anyio.current_time()
                try:
                    first = await stack.enter_async_context(self._local.open(ways, layout, left_s))
                except (SegmentUnavailable, TornRead) as error:
                    _logger.warning("%s is not read: %s", copy.name, error)
                    continue
                fetcher = ReplaceableFetcher(copy.name, first, fetcher, copy.is_offered)
                break
            yield fetcher

    def _is_here(self, way: CudaSegment) -> bool:
        try:
            check_cuda_segment(way, self._host_id, host_device_uuids())
        except SegmentUnavailable:
            return False
        return True

    def _nearest(
        self, number: int, ways: Sequence[Segment], size_bytes: int, probe: _RemoteProbe
    ) -> Segment:
        def look(way: Segment) -> None:
            if isinstance(way, RemoteSegment):
                probe.look_at(number, way)
            else:
                probe_segment(way, size_bytes, self._host_id, self._roots)

        way, reasons = nearest_way(ways, _NEAREST_FIRST, look)
        if way is not None:
            return way
        found = "; ".join(reasons) or "offered neither to this host nor to others"
        raise SegmentUnavailable(str(number), found, "must be readable from here")


class _RemoteProbe:
    """Looks at segments of other hosts. Blocking.

    Args:
        placement: all that may be asked for: what lies in one process is asked for together.
    """

    def __init__(self, endpoint: Endpoint | None, missing: str, placement: Placement) -> None:
        self._endpoint, self._missing = endpoint, missing
        self._offered = dict.fromkeys(
            way for ways in placement for way in ways if isinstance(way, RemoteSegment)
        )
        self._found: dict[RemoteSegment, int] = {}
        self._silent: dict[str, str] = {}
        """Sessions that do not answer, and why."""
        self._asked: set[str] = set()

    def look_at(self, number: int, way: RemoteSegment) -> None:
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
        self._ask_all(self._endpoint, way)
        if way.session in self._silent:
            found = f"not readable ({self._silent[way.session]})"
            raise SegmentUnavailable(name, found, limit)
        generation = self._found.get(way)
        if generation is None:  # some other segment of the process cannot be read, or this one
            try:
                (generation,) = read_generations(self._endpoint, [way])
            except RemoteReadFailed as error:
                raise SegmentUnavailable(name, f"not readable ({error.reason})", limit) from error
        if generation != way.generation:
            raise TornRead(name, way.generation, generation)

    def _ask_all(self, endpoint: Endpoint, way: RemoteSegment) -> None:
        """All segments of the process that has this one, unless they have been asked for."""
        if way.session in self._asked:
            return
        self._asked.add(way.session)
        ways = [
            one
            for one in self._offered
            if (one.session, one.protocol) == (way.session, way.protocol)
        ]
        try:
            self._found |= zip(ways, read_generations(endpoint, ways), strict=True)
        except RemoteReadFailed:
            try:
                endpoint.probe(way.session)
            except RemoteReadFailed as gone:  # its other segments need not be asked for
                self._silent[way.session] = gone.reason
