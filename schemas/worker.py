"""What a consumer and its engine's workers say to each other over ZeroMQ `ipc://`. Does no I/O.

Strict request and reply: the consumer asks, the worker answers with the matching reply or `Failed`,
carrying the same `request`. Handles travel as bytes in structs; nothing is unpickled.
Between hosts of one engine nothing of this is spoken: it never leaves the machine.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from weightbus.schemas.base import (
    INT64_MAX,
    BucketTimings,
    Count,
    Message,
    Nanoseconds,
    ObjectDigest,
    RankNumber,
    Reason,
    Seconds,
    SizeBytes,
    Stage,
    Version,
)
from weightbus.schemas.layout import Index, Shape
from weightbus.schemas.limits import MAX_CELLS
from weightbus.schemas.needs import Needs
from weightbus.schemas.placement import SHM_NAME_PATTERN, Segment
from weightbus.schemas.shared_memory import MAX_READERS

__all__ = (
    "Applied",
    "Apply",
    "Attach",
    "Attached",
    "Cell",
    "Describe",
    "Described",
    "Detach",
    "Detached",
    "Failed",
    "Feed",
    "InPlace",
    "Inspect",
    "Inspected",
    "LaneFill",
    "Prepare",
    "Prepared",
    "Relay",
    "StageTiming",
    "Stream",
    "WorkerMessage",
    "WorkerReply",
    "WorkerRequest",
)

Request = Annotated[int, Meta(ge=0, le=INT64_MAX)]

BlockName = Annotated[str, Meta(pattern=SHM_NAME_PATTERN)]
"""Of a block below /dev/shm."""

Turn = Annotated[int, Meta(ge=1, le=2**32 - 1)]
"""Tells the transfers apart that go through one staging block."""

ReaderNumber = Annotated[int, Meta(ge=0, lt=MAX_READERS)]

MAX_LANES = 4096

LaneNumber = Annotated[int, Meta(ge=0, lt=MAX_LANES)]

Digests = Annotated[bytes, Meta(max_length=8 * MAX_CELLS)]
"""64-bit digests, 8 bytes each, little endian."""


class WorkerMessage(Message, frozen=True, kw_only=True):
    """Base of what is said over `ipc://`: it may be larger than a message of the bus."""


class Cell(Struct, frozen=True, array_like=True, gc=False):
    """A box of a tensor whose partial digest a rank reports.

    Over all ranks, two cells of one tensor are either the same box (replicas, which are compared)
    or do not overlap; together they hold every element of every tensor.
    """

    tensor: Index
    starts: Shape
    sizes: Shape
    copy: Annotated[int, Meta(ge=-1)]
    """Index into `Needs.copies` of the copy that holds the box; -1: no rank needs it, and it is
    read from the source for the sum's sake."""


class StageTiming(Struct, frozen=True, array_like=True):
    """One timed stage inside a worker."""

    stage: Stage
    start_ns: Nanoseconds
    end_ns: Nanoseconds
    bytes: SizeBytes = 0
    buckets: BucketTimings = ()


class Describe(WorkerMessage, frozen=True, kw_only=True):
    """What do you need of this layout?"""

    request: Request
    layout_digest: ObjectDigest
    layout: bytes
    """The layout, as `encode_layout` made it."""
    deadline_s: Seconds


class Described(WorkerMessage, frozen=True, kw_only=True):
    """Answer to `Describe`: what this rank needs."""

    request: Request
    rank: RankNumber
    world_size: Annotated[int, Meta(ge=1)]
    instance: Annotated[str, Meta(max_length=64)]
    """Of the worker process; another one means that everything attached is gone."""
    device: Annotated[str, Meta(max_length=64)] = "cpu"
    free_bytes: SizeBytes = 0
    needs_digest: ObjectDigest
    needs: Needs
    untraced_reason: Reason = ""
    """Not empty: the model cannot be traced; `needs` holds whole tensors and no destination, and
    every update takes the engine's own loader."""


class Attach(WorkerMessage, frozen=True, kw_only=True):
    """Compile the plan for this layout and prepare to report these cells."""

    request: Request
    layout_digest: ObjectDigest
    needs_digest: ObjectDigest
    cells: Annotated[tuple[Cell, ...], Meta(max_length=MAX_CELLS)]
    roots: Annotated[tuple[str, ...], Meta(max_length=64)] = ()
    """Directories below which files may be read."""
    host_id: Annotated[str, Meta(max_length=128)] = ""
    """The consumer's host id; shared memory of another one is not opened."""
    deadline_s: Seconds


class Attached(WorkerMessage, frozen=True, kw_only=True):
    """Answer to `Attach`: the plan is compiled."""

    request: Request
    rank: RankNumber
    tiles: Count
    tile_bytes: SizeBytes


class InPlace(Struct, frozen=True, kw_only=True, tag_field="feed", tag="in_place"):
    """The worker reads the segments themselves, in any order, as often as it likes."""

    sources: Annotated[tuple[Segment, ...], Meta(max_length=4096)]
    """For every segment of the layout, in its order, the one way to take."""


class LaneFill(Struct, frozen=True, array_like=True):
    """A device lane that a worker fills: its slots lie in memory of the worker's GPU."""

    lane: LaneNumber
    """Index into `Stream.lanes`."""
    number: LaneNumber
    """Of the lane in the plan: the root of bucket `k` is place `(k + number) % size`."""
    place: Annotated[int, Meta(ge=0, lt=65_536)] = 0
    """Of this worker in the lane's group."""
    size: Annotated[int, Meta(ge=1, le=65_536)] = 1
    """Of the group; 1: nothing is broadcast."""
    group: Annotated[str, Meta(max_length=256)] = ""
    """Id of the membership, as `Group.id`."""
    rendezvous: Annotated[str, Meta(max_length=512)] = ""
    """Where the group's members meet if they have not met before: `tcp://host:port`."""
    key: Annotated[str, Meta(max_length=256)] = ""
    """What only members of this plan know."""


class Stream(Struct, frozen=True, kw_only=True, tag_field="feed", tag="stream"):
    """Every byte comes by once, in buckets, through the staging blocks of this host's lanes.

    How buckets are cut follows from the layout, `bucket_bytes` and the number of lanes alone
    (`plan_buckets`). Lane `l` of bucket `k` is in slot `k % slots` of block `lanes[l]`, or of the
    allocation whose handle is in that block, if these are device lanes.
    """

    lanes: Annotated[tuple[BlockName, ...], Meta(min_length=1, max_length=MAX_LANES)]
    """Names of the staging blocks below /dev/shm. One may be made a little later than the others:
    its owner is another consumer of this host."""
    bucket_bytes: Annotated[int, Meta(ge=1, le=INT64_MAX)]
    """Of one slot of one lane."""
    slots: Annotated[int, Meta(ge=1, le=16)]
    turn: Turn
    """Of this transfer, in the blocks' words."""
    reader: ReaderNumber
    """Which word of every block this worker counts in."""
    device: bool = False
    """The lanes are device lanes: their blocks hold words, and what a consumer brings into them for
    the worker that fills the lane."""
    fills: Annotated[tuple[LaneFill, ...], Meta(max_length=MAX_LANES)] = ()
    """The device lanes that this worker fills."""
    sources: Annotated[tuple[Segment | None, ...], Meta(max_length=4096)] = ()
    """For every segment of the layout, how this worker reads it when it fills a device lane; None:
    its consumer brings it into the blocks. Empty: of all segments."""
    readers: Annotated[int, Meta(ge=0, le=MAX_READERS)] = 0
    """How many workers read the lanes; who fills one waits for all of them."""


class Relay(Struct, frozen=True, kw_only=True, tag_field="feed", tag="relay"):
    """The worker asks for windows of the segments, in any order, as often as it likes; its consumer
    puts them into the slots of a staging block that is this worker's own."""

    block: BlockName
    window_bytes: Annotated[int, Meta(ge=1, le=INT64_MAX)]
    """Of one slot: window `w` of a segment holds its bytes from `w * window_bytes` on."""
    slots: Annotated[int, Meta(ge=1, le=16)]
    turn: Turn


Feed = InPlace | Stream | Relay


class Prepare(WorkerMessage, frozen=True, kw_only=True):
    """Do now, beside the serving, what takes long of an `Apply` of this feed. It begins, and is
    answered at once; asked again, the answer says whether it is done."""

    request: Request
    layout_digest: ObjectDigest
    feed: Feed
    deadline_s: Seconds


class Prepared(WorkerMessage, frozen=True, kw_only=True):
    """Answer to `Prepare`."""

    request: Request
    rank: RankNumber
    ready: bool
    """False: something is under way still, for this feed or an earlier one: ask again."""
    reason: Reason = ""
    """Why it could not be prepared: the name of the error class, a colon, what it says. `Apply`
    tries again, and fails with the error if it lasts. Empty: it was, or is not ready."""


class Apply(WorkerMessage, frozen=True, kw_only=True):
    """Write this version into the live parameters, now. The engine is paused."""

    request: Request
    version: Version
    layout_digest: ObjectDigest
    feed: Feed
    """Where the bytes come from."""
    deadline_s: Seconds


class Applied(WorkerMessage, frozen=True, kw_only=True):
    """The device is synchronised and every byte of this rank is written; not yet proven."""

    request: Request
    rank: RankNumber
    version: Version
    bytes: SizeBytes
    cell_digests: Digests
    """Partial digest of every cell, in the order of `Attach.cells`."""
    stages: Annotated[tuple[StageTiming, ...], Meta(max_length=4096)] = ()
    direct_parameters: Count = 0
    processed_parameters: Count = 0
    reason: Reason = ""
    """Why the engine's own loader was taken, if it was."""
    proven: Annotated[tuple[ObjectDigest, ...], Meta(max_length=16)] | None = None
    """As in `Inspected`; None: it is not told."""
    updates: Count | None = None
    """As in `Inspected`; None: it is not told."""


class Failed(WorkerMessage, frozen=True, kw_only=True):
    """The request was not carried out."""

    request: Request
    rank: RankNumber
    error: Annotated[str, Meta(max_length=128)]
    """Name of the error class."""
    reason: Reason
    touched: bool = False
    """True: a live parameter may have been written; the engine must not serve."""


class Inspect(WorkerMessage, frozen=True, kw_only=True):
    """What do your parameters hold now?"""

    request: Request
    layout_digest: ObjectDigest | None = None
    """Given: read the digests of the attached cells back from the live parameters."""
    deadline_s: Seconds


class Inspected(WorkerMessage, frozen=True, kw_only=True):
    """Answer to `Inspect`."""

    request: Request
    rank: RankNumber
    instance: Annotated[str, Meta(max_length=64)]
    version: Annotated[int, Meta(ge=-1)]
    """The version whose bytes were written last, whole; -1: none."""
    touched: bool
    """True: an update began and did not end whole."""
    updates: Count = 0
    """How many updates have begun since the process started: the same version may come twice."""
    cell_digests: Digests = b""
    """As in `Applied`, but read back now; empty if not asked for. Cells that cannot be read back
    (copy -1, casts, parameters that the engine repacks) are 0 and listed in `unreadable`."""
    unreadable: Annotated[tuple[Index, ...], Meta(max_length=MAX_CELLS)] = ()
    """Numbers of the cells that cannot be read back."""
    proven: Annotated[tuple[ObjectDigest, ...], Meta(max_length=16)] = ()
    """Layouts whose plan is proven, and writes every parameter directly: a `Stream` will do."""


class Detach(WorkerMessage, frozen=True, kw_only=True):
    """Forget what was attached: close segments, free plans. Parameters stay as they are."""

    request: Request
    deadline_s: Seconds


class Detached(WorkerMessage, frozen=True, kw_only=True):
    """Answer to `Detach`."""

    request: Request
    rank: RankNumber


WorkerRequest = Describe | Attach | Prepare | Apply | Inspect | Detach
WorkerReply = Described | Attached | Prepared | Applied | Inspected | Detached | Failed
