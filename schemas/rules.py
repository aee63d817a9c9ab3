"""Rules that no single field can state: what several fields of one message must agree on.

Does no I/O. One function per message type; a type without one has no such rules. Only what a reader
relies on is a rule: clocks of different machines, for one, are not compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

from weightbus.schemas.base import Message
from weightbus.schemas.checkpoint import (
    CheckpointPart,
    CheckpointReady,
    CheckpointSkipped,
    CopyReady,
)
from weightbus.schemas.errors import MessageInvalid
from weightbus.schemas.limits import Limits
from weightbus.schemas.needs_codec import check_needs, needs_digest
from weightbus.schemas.placement import (
    CudaSegment,
    FileSegment,
    Placement,
    SharedMemorySegment,
)
from weightbus.schemas.progress import UpdateComplete
from weightbus.schemas.rounds import Abort, Join, RoundComplete, RoundPlan
from weightbus.schemas.worker import (
    Applied,
    Apply,
    Attach,
    Described,
    InPlace,
    Inspected,
    Prepare,
    Stream,
)

__all__ = ("DIGEST_BYTES", "check_message", "check_path", "check_ways")

DIGEST_BYTES = 8
"""Bytes of one 64-bit digest in an array of them."""


def check_message(message: Message, limits: Limits) -> None:
    """Every rule beyond the fields' types.

    Raises:
        MessageInvalid: names the field at fault.
    """
    rule = _RULES.get(type(message))
    if rule is not None:
        rule(message, limits)


def check_path(kind: str, field: str, path: str) -> None:
    """A path as the reader sees it. Whether it lies under an allowed root is the reader's check.

    Raises:
        MessageInvalid: not absolute, or not a path that a kernel takes.
    """
    if not path.startswith("/") or "\0" in path:
        raise MessageInvalid(kind, field, path, "must be an absolute path")


def check_ways(kind: str, field: str, placement: Placement) -> None:
    """The ways of a placement, whatever layout it belongs to.

    Raises:
        MessageInvalid: a relative path, an odd generation, or one way offered twice.
    """
    for number, ways in enumerate(placement):
        if not ways:
            raise MessageInvalid(kind, f"{field}[{number}]", ways, "must offer at least one way")
        for n, way in enumerate(ways):
            place = f"{field}[{number}][{n}]"
            if isinstance(way, FileSegment):
                check_path(kind, f"{place}.path", way.path)
            if isinstance(way, SharedMemorySegment | CudaSegment) and way.generation % 2:
                limit = "must be even: odd means that the segment is being written"
                raise MessageInvalid(kind, f"{place}.generation", way.generation, limit)
            if way in ways[:n]:
                raise MessageInvalid(kind, place, way, "must not repeat another way")


def _check_unique(kind: str, field: str, values: Iterable[object]) -> None:
    seen = set()
    for number, value in enumerate(values):
        if value in seen:
            raise MessageInvalid(kind, f"{field}[{number}]", value, "must not repeat another")
        seen.add(value)


def _check_ready(message: CheckpointReady, limits: Limits) -> None:
    kind = "CheckpointReady"
    if message.files:
        if message.layout_digest is not None or message.placement:
            field = "placement" if message.placement else "layout_digest"
            limit = "must not be given beside files, from which readers derive it"
            raise MessageInvalid(kind, field, getattr(message, field), limit)
        for number, path in enumerate(message.files):
            check_path(kind, f"files[{number}]", path)
        _check_unique(kind, "files", message.files)
    elif message.layout_digest is None:
        limit = "must be given with placement, or files alone"
        raise MessageInvalid(kind, "layout_digest", "missing", limit)
    check_ways(kind, "placement", message.placement)
    if message.tensor_digests is not None and message.weights_digest is None:
        limit = "must be given with tensor_digests"
        raise MessageInvalid(kind, "weights_digest", "missing", limit)
    if 0 < message.valid_until_ns < message.created_ns:
        limit = f"must be 0 or not before created_ns, {message.created_ns}"
        raise MessageInvalid(kind, "valid_until_ns", message.valid_until_ns, limit)


def _check_part(message: CheckpointPart, limits: Limits) -> None:
    if message.rank >= message.world_size:
        limit = f"must be below world_size, {message.world_size}"
        raise MessageInvalid("CheckpointPart", "rank", message.rank, limit)
    check_ways("CheckpointPart", "placement", message.placement)


def _check_skipped(message: CheckpointSkipped, limits: Limits) -> None:
    _check_unique("CheckpointSkipped", "ranks", message.ranks)


def _check_join(message: Join, limits: Limits) -> None:
    _check_unique("Join", "ranks", (offer.rank for offer in message.ranks))
    for number, offer in enumerate(message.ranks):
        _check_unique("Join", f"ranks[{number}].routes", offer.routes)
    _check_unique("Join", "groups", message.groups)


def _check_plan(message: RoundPlan, limits: Limits) -> None:
    kind = "RoundPlan"
    _check_unique(kind, "engines", (part.engine for part in message.engines))
    staged: set[tuple[str, int]] = set()
    for number, part in enumerate(message.engines):
        field = f"engines[{number}].ranks"
        _check_unique(kind, field, (route.rank for route in part.ranks))
        for n, route in enumerate(part.ranks):
            if route.route != part.ranks[0].route:
                limit = f"must be {part.ranks[0].route}, as of the engine's other ranks"
                raise MessageInvalid(kind, f"{field}[{n}].route", route.route, limit)
            if route.route == "broadcast":
                staged.add((part.engine, route.rank))
    _check_groups(message, staged)
    if not message.bucket_bytes:
        raise MessageInvalid(kind, "bucket_bytes", 0, "must be at least 1")


def _check_groups(message: RoundPlan, staged: set[tuple[str, int]]) -> None:
    """The lanes of a broadcast name exactly the ranks that take it: `staged`."""
    kind = "RoundPlan"
    _check_unique(kind, "groups.id", (group.id for group in message.groups))
    named: set[tuple[str, int]] = set()
    for number, group in enumerate(message.groups):
        field = f"groups[{number}].members"
        if len(group.members) != len(message.groups[0].members):
            limit = f"must be {len(message.groups[0].members)}, as in the first group"
            raise MessageInvalid(kind, field, f"{len(group.members)} long", limit)
        if len(group.members) > 1 and not group.rendezvous:
            limit = "must be given: its members are of several hosts"
            raise MessageInvalid(kind, f"groups[{number}].rendezvous", "", limit)
        _check_unique(kind, field, (member.engine for member in group.members))
        for n, member in enumerate(group.members):
            if (member.engine, member.rank) not in staged:
                limit = "must be a rank whose route is broadcast"
                raise MessageInvalid(kind, f"{field}[{n}]", (member.engine, member.rank), limit)
            named.add((member.engine, member.rank))
    for engine, rank in sorted(staged - named):
        limit = f"must name rank {rank} of engine {engine}, whose route is broadcast"
        raise MessageInvalid(kind, "groups", "incomplete", limit)


def _check_abort(message: Abort, limits: Limits) -> None:
    _check_unique("Abort", "lost", message.lost)


def _check_complete(message: RoundComplete, limits: Limits) -> None:
    _check_unique("RoundComplete", "completed", message.completed)
    for engine in message.completed:
        if engine in message.failed:
            limit = "must not be in failed and in completed"
            raise MessageInvalid("RoundComplete", "failed", engine, limit)


def _check_update(message: UpdateComplete, limits: Limits) -> None:
    _check_unique("UpdateComplete", "routes", message.routes)
    if message.verified == "verified" and message.weights_digest is None:
        limit = "must be given when verified"
        raise MessageInvalid("UpdateComplete", "weights_digest", "missing", limit)


def _check_described(message: Described, limits: Limits) -> None:
    if message.rank >= message.world_size:
        limit = f"must be below world_size, {message.world_size}"
        raise MessageInvalid("Described", "rank", message.rank, limit)
    try:
        check_needs(message.needs, limits=limits)
    except MessageInvalid as fault:
        field = f"needs.{fault.field}"
        raise MessageInvalid("Described", field, fault.value, fault.limit) from None
    if needs_digest(message.needs) != message.needs_digest:
        limit = "must be the digest of needs"
        raise MessageInvalid("Described", "needs_digest", message.needs_digest, limit)


def _check_attach(message: Attach, limits: Limits) -> None:
    for number, root in enumerate(message.roots):
        check_path("Attach", f"roots[{number}]", root)
    for number, cell in enumerate(message.cells):
        if len(cell.starts) != len(cell.sizes):
            limit = f"as many as sizes: {len(cell.sizes)}"
            raise MessageInvalid("Attach", f"cells[{number}].starts", cell.starts, limit)


def _check_feed(message: Prepare | Apply, limits: Limits) -> None:
    kind = type(message).__name__
    if isinstance(message.feed, InPlace):
        ways = tuple((source,) for source in message.feed.sources)
        check_ways(kind, "feed.sources", ways)
    elif isinstance(message.feed, Stream):
        _check_stream(kind, message.feed)


def _check_stream(kind: str, feed: Stream) -> None:
    _check_unique(kind, "feed.lanes", feed.lanes)
    if not feed.device and (feed.fills or feed.sources or feed.readers):
        raise MessageInvalid(kind, "feed.device", feed.device, "must be true: lanes are filled")
    if feed.device and feed.reader >= feed.readers:
        limit = f"must be less than readers: {feed.readers}"
        raise MessageInvalid(kind, "feed.reader", feed.reader, limit)
    _check_unique(kind, "feed.fills", [fill.lane for fill in feed.fills])
    for number, fill in enumerate(feed.fills):
        field = f"feed.fills[{number}]"
        if fill.lane >= len(feed.lanes):
            limit = f"must be one of {len(feed.lanes)} lanes"
            raise MessageInvalid(kind, f"{field}.lane", fill.lane, limit)
        if fill.place >= fill.size:
            limit = f"must be less than size: {fill.size}"
            raise MessageInvalid(kind, f"{field}.place", fill.place, limit)
    for number, source in enumerate(feed.sources):
        if source is not None:
            check_ways(kind, f"feed.sources[{number}]", ((source,),))


def _check_copy(message: CopyReady, limits: Limits) -> None:
    check_ways("CopyReady", "placement", message.placement)


def _check_applied(message: Applied, limits: Limits) -> None:
    _check_digests("Applied", message.cell_digests)


def _check_inspected(message: Inspected, limits: Limits) -> None:
    cells = _check_digests("Inspected", message.cell_digests)
    for number, cell in enumerate(message.unreadable):
        if cell >= cells:
            raise MessageInvalid("Inspected", f"unreadable[{number}]", cell, f"of {cells} cells")
    _check_unique("Inspected", "proven", message.proven)


def _check_digests(kind: str, digests: bytes) -> int:
    """How many there are."""
    if len(digests) % DIGEST_BYTES:
        limit = f"must be {DIGEST_BYTES} bytes for each cell"
        raise MessageInvalid(kind, "cell_digests", f"{len(digests)} bytes", limit)
    return len(digests) // DIGEST_BYTES


_RULES: Final[dict[type[Message], Callable[[Any, Limits], None]]] = {
    CheckpointReady: _check_ready,
    CheckpointPart: _check_part,
    CheckpointSkipped: _check_skipped,
    CopyReady: _check_copy,
    Join: _check_join,
    RoundPlan: _check_plan,
    Abort: _check_abort,
    RoundComplete: _check_complete,
    UpdateComplete: _check_update,
    Described: _check_described,
    Attach: _check_attach,
    Prepare: _check_feed,
    Apply: _check_feed,
    Applied: _check_applied,
    Inspected: _check_inspected,
}
